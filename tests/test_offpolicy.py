"""Off-policy estimators against every log that there could be, against what they reduce to, and against obp."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from ecomrec.data import sources
from ecomrec.data.pages import page_propensities, plackett_luce
from ecomrec.data.simulator import load_truth
from ecomrec.feedback.offpolicy import (
    Estimate,
    OffPolicyError,
    PrefixRewards,
    cascade_dr,
    clipped,
    cross_fitted,
    doubly_robust,
    estimates_table,
    ips,
    item_position,
    logged_pages,
    on_policy,
    prefix_probabilities,
    prefix_propensities,
    pseudo_inverse,
    pseudo_inverse_weights,
    reward_interaction,
    snips,
    target_propensities,
)

seeds = st.integers(0, 2**32 - 1)


# One place: all logs of a few requests, each outcome with its probability


def every_log(seed: int, n: int = 3, n_actions: int = 3):
    """A world of one place: policies, reward chances, and all logs of n requests with their probabilities."""
    rng = np.random.default_rng(seed)
    old, new = rng.dirichlet(np.ones(n_actions), size=2)
    old = (old + 0.05) / (old + 0.05).sum()
    wants, guess = rng.random((2, n_actions))
    outcomes = [(a, r, old[a] * (wants[a] if r else 1 - wants[a])) for a in range(n_actions) for r in (0.0, 1.0)]
    logs = [(np.array([o[0] for o in log]), np.array([o[1] for o in log]), np.prod([o[2] for o in log])) for log in itertools.product(outcomes, repeat=n)]
    return old, new, wants, guess, logs


@given(seeds)
def test_single_estimators_are_unbiased_over_every_log(seed):
    old, new, wants, guess, logs = every_log(seed)
    truth, q_target = new @ wants, np.full(3, new @ guess)
    expected = dict.fromkeys(("ips", "doubly_robust", "on_policy", "clipped"), 0.0)
    for a, r, p in logs:
        seen = r, old[a], new[a]
        expected["ips"] += p * ips(*seen).value
        expected["doubly_robust"] += p * doubly_robust(*seen, guess[a], q_target).value
        expected["on_policy"] += p * on_policy(r).value
        expected["clipped"] += p * clipped(*seen, clip=1.5).value
    assert expected["ips"] == pytest.approx(truth, abs=1e-12)
    assert expected["doubly_robust"] == pytest.approx(truth, abs=1e-12)
    assert expected["on_policy"] == pytest.approx(old @ wants, abs=1e-12)
    assert expected["clipped"] == pytest.approx(old @ (np.minimum(new / old, 1.5) * wants), abs=1e-12)
    assert expected["clipped"] <= truth + 1e-12


@given(seeds)
def test_doubly_robust_needs_only_one_of_the_two_to_be_right(seed):
    old, new, wants, _, logs = every_log(seed, n=2)
    wrong = np.roll(old, 1)
    found = sum(p * doubly_robust(r, wrong[a], new[a], wants[a], np.full(2, new @ wants)).value for a, r, p in logs)
    assert found == pytest.approx(new @ wants, abs=1e-12)


def test_bias_of_snips_vanishes_with_the_log():
    found = {}
    for n in (2, 4, 6):
        old, new, wants, _, logs = every_log(0, n=n, n_actions=2)
        found[n] = abs(sum(p * snips(r, old[a], new[a]).value for a, r, p in logs) - new @ wants)
    assert found[2] > found[4] > found[6] > 1e-9
    assert found[6] * 6 < found[2] * 2 * 1.5  # of order 1/n


@given(seeds, st.floats(-5, 5))
def test_snips_moves_with_its_rewards_and_stays_among_them(seed, shift):
    rng = np.random.default_rng(seed)
    r, p, t = rng.normal(size=20), rng.uniform(0.05, 1, 20), rng.random(20)
    value = snips(r, p, t).value
    assert snips(r + shift, p, t).value == pytest.approx(value + shift, abs=1e-9)
    assert r.min() - 1e-9 <= value <= r.max() + 1e-9


# Pages: all pages of a few candidates, each with its probability


def page_world(seed: int, n_candidates: int = 4, k: int = 3):
    """All pages of k of the candidates, with scores of two policies repeated for each page."""
    rng = np.random.default_rng(seed)
    pages = np.array(list(itertools.permutations(range(n_candidates), k)))
    old, new = (np.tile(scores, (len(pages), 1)) for scores in rng.normal(size=(2, n_candidates)) * 1.2)
    return rng, pages, old, new


def rewards(kind: str, rng: np.random.Generator, pages: np.ndarray, n_candidates: int) -> np.ndarray:
    """Expected rewards at each place that obey an assumption and are random otherwise."""
    n, k = pages.shape
    alone = rng.normal(size=(k, n_candidates))[np.arange(k), pages]
    if kind == "alone":
        return alone
    if kind == "from the top":
        codes = np.cumsum(pages * (n_candidates + 1) ** np.arange(k), axis=1)  # one number for each beginning of a page
        values = [rng.normal(size=codes[:, place].max() + 1)[codes[:, place]] for place in range(k)]
        return np.stack(values, axis=1)
    if kind == "sum":  # the total is the sum of one number for each item at its place; where it is counted has no rule
        shares = rng.normal(size=(n, k))
        return shares + ((alone.sum(axis=1) - shares.sum(axis=1)) / k)[:, None]
    return rng.normal(size=(n, k))


def expectation(estimate: Estimate, probability: np.ndarray) -> float:
    """Mean of an estimate over pages that a log shows with these probabilities."""
    return float(probability @ (estimate.influence + estimate.value))


HOLDS = {  # the estimators that are unbiased for each kind of reward
    "alone": {"whole", "reward_interaction", "cascade_dr", "pseudo_inverse", "item_position"},
    "from the top": {"whole", "reward_interaction", "cascade_dr"},
    "sum": {"whole", "pseudo_inverse"},
    "anything": {"whole"},
}


def page_errors(kind: str, seed: int, n_candidates: int, k: int) -> dict[str, float]:
    """Expected error of each page estimator."""
    rng, pages, old, new = page_world(seed, n_candidates, k)
    reward = rewards(kind, rng, pages, n_candidates)
    above, total = (prefix_propensities(old, pages), prefix_propensities(new, pages)), reward.sum(axis=1)
    p_old, p_new = (each.prod(axis=1) for each in above)
    draws, q = prefix_probabilities(new, pages), rng.normal(size=(k, n_candidates))
    found = {
        "whole": ips(total, p_old, p_new),
        "reward_interaction": reward_interaction(reward, *above),
        "cascade_dr": cascade_dr(reward, *above, q[np.arange(k), pages], (draws * q).sum(axis=2)),
        "pseudo_inverse": pseudo_inverse(total, pseudo_inverse_weights(pages, old, new)),
        "item_position": item_position(reward, page_propensities(old, pages), page_propensities(new, pages)),
    }
    return {name: expectation(estimate, p_old) - p_new @ total for name, estimate in found.items()}


@given(st.sampled_from(sorted(HOLDS)), seeds, st.sampled_from([(2, 1), (3, 2), (3, 3), (4, 2), (5, 3)]))
def test_page_estimators_are_unbiased_under_their_assumption(kind, seed, size):
    errors = page_errors(kind, seed, *size)
    assert {name: errors[name] for name in HOLDS[kind]} == pytest.approx(dict.fromkeys(HOLDS[kind], 0.0), abs=1e-8)


@pytest.mark.parametrize("kind", sorted(HOLDS))
def test_page_estimators_err_where_their_assumption_fails(kind):
    errors = page_errors(kind, 3, 5, 3)
    assert {name for name, error in errors.items() if abs(error) > 1e-3} == HOLDS["alone"] - HOLDS[kind]


# What estimators reduce to


def a_log(seed: int, n: int = 60, n_candidates: int = 5, k: int = 3):
    """Scores of both policies, pages of the old one, and rewards."""
    rng = np.random.default_rng(seed)
    old, new = rng.normal(size=(2, n, n_candidates))
    return rng, old, new, plackett_luce(old, k, rng), rng.random((n, k))


@given(seeds)
def test_the_logging_policy_itself_gets_the_plain_mean(seed):
    rng, old, _, pages, reward = a_log(seed)
    marginal, above, mean = page_propensities(old, pages), prefix_propensities(old, pages), on_policy(reward)
    q_logged, q_target = rng.normal(size=(2, 60))
    single = reward[:, 0], marginal[:, 0], marginal[:, 0]
    for estimate in (item_position(reward, marginal, marginal), reward_interaction(reward, above, above), pseudo_inverse(reward.sum(axis=1), pseudo_inverse_weights(pages, old, old))):
        assert estimate.value == pytest.approx(mean.value) and estimate.low == pytest.approx(mean.low)
        assert estimate.ess == pytest.approx(60) and "support" not in estimate.cautions
    for estimate in (ips(*single), snips(*single), clipped(*single, clip=1.0)):
        assert estimate.value == pytest.approx(reward[:, 0].mean())
    dr = doubly_robust(*single, q_logged, q_target)
    assert dr.value == pytest.approx((reward[:, 0] - q_logged + q_target).mean())


@given(seeds)
def test_one_place_is_the_single_case_and_a_model_of_nothing_changes_nothing(seed):
    rng, old, new, pages, reward = a_log(seed, k=1)
    p, t = page_propensities(old, pages), page_propensities(new, pages)
    q_logged, q_target = rng.normal(size=(2, 60, 1))
    single = ips(reward[:, 0], p[:, 0], t[:, 0])
    same = [item_position(reward, p, t), reward_interaction(reward, p, t), pseudo_inverse(reward[:, 0], pseudo_inverse_weights(pages, old, new))]
    same += [cascade_dr(reward, p, t, 0 * p, 0 * p), doubly_robust(reward[:, 0], p[:, 0], t[:, 0], np.zeros(60), np.zeros(60)), clipped(reward[:, 0], p[:, 0], t[:, 0], clip=1e9)]
    for estimate in same:
        assert (estimate.value, estimate.low, estimate.high, estimate.ess) == pytest.approx((single.value, single.low, single.high, single.ess))
    dr = doubly_robust(reward[:, 0], p[:, 0], t[:, 0], q_logged[:, 0], q_target[:, 0])
    assert cascade_dr(reward, p, t, q_logged, q_target).value == pytest.approx(dr.value)


@given(seeds)
def test_order_of_the_log_does_not_matter(seed):
    rng, old, new, pages, reward = a_log(seed)
    marginals, above = [[f(s, pages) for s in (old, new)] for f in (page_propensities, prefix_propensities)]
    q_logged, q_target, order = *rng.normal(size=(2, 60, 3)), rng.permutation(60)
    weight = pseudo_inverse_weights(pages, old, new)
    assert np.allclose(pseudo_inverse_weights(pages[order], old[order], new[order]), weight[order])
    runs = [(item_position, (reward, *marginals)), (reward_interaction, (reward, *above)), (cascade_dr, (reward, *above, q_logged, q_target)), (pseudo_inverse, (reward.sum(axis=1), weight))]
    runs += [(f, (reward[:, 0], marginals[0][:, 0], marginals[1][:, 0])) for f in (ips, snips)]
    for run, arrays in runs:
        first, second = run(*arrays), run(*(array[order] for array in arrays))
        assert (first.value, first.low, first.ess) == pytest.approx((second.value, second.low, second.ess))
        assert np.allclose(first.influence[order], second.influence) and first.cautions.keys() == second.cautions.keys()


# The interval and what stands beside it


@given(seeds)
def test_effective_sample_size_lies_between_one_and_the_log(seed):
    _, old, new, pages, reward = a_log(seed)
    above = prefix_propensities(old, pages), prefix_propensities(new, pages)
    estimate = reward_interaction(reward, *above)
    assert 1 - 1e-9 <= estimate.ess <= 60 + 1e-9
    weights = np.cumprod(above[1] / above[0], axis=1)
    assert estimate.ess == pytest.approx(min(w.sum() ** 2 / (w**2).sum() for w in weights.T))


def test_interval_is_that_of_a_mean():
    _, old, new, pages, reward = a_log(0)
    weight = page_propensities(new, pages)[:, 0] / page_propensities(old, pages)[:, 0]
    terms, estimate = weight * reward[:, 0], ips(reward[:, 0], page_propensities(old, pages)[:, 0], page_propensities(new, pages)[:, 0])
    half = 1.959963984540054 * pd.Series(terms).sem()
    assert (estimate.low, estimate.high) == pytest.approx((terms.mean() - half, terms.mean() + half))
    assert estimate.influence.sum() == pytest.approx(0, abs=1e-9)


def test_groups_widen_the_interval_by_what_they_share():
    _, old, new, pages, reward = a_log(1)
    arrays = reward, page_propensities(old, pages), page_propensities(new, pages)
    once, twice = item_position(*arrays), item_position(*(np.concatenate([a, a]) for a in arrays))
    shoppers = np.tile(np.arange(60), 2)
    assert twice.high - twice.low < 0.75 * (once.high - once.low)  # a log copied twice knows no more
    grouped = twice.grouped(shoppers)
    assert (grouped.value, grouped.low, grouped.high) == pytest.approx((once.value, once.low, once.high))
    alone = once.grouped([f"u{i}" for i in range(60)])
    unknown = once.grouped([None] * 60)
    assert (alone.low, alone.high) == pytest.approx((once.low, once.high)) == (unknown.low, unknown.high)


def test_difference_is_paired():
    _, old, new, pages, reward = a_log(2)
    p, t = page_propensities(old, pages), page_propensities(new, pages)
    lift = item_position(reward, p, t) - on_policy(reward)
    terms = ((t / p - 1) * reward).sum(axis=1)
    assert lift.value == pytest.approx(terms.mean())
    assert lift.high - lift.value == pytest.approx(1.959963984540054 * pd.Series(terms).sem())
    assert lift.name == "item_position - on_policy"


def test_cautions_name_what_is_wrong():
    rng, n = np.random.default_rng(0), 4_000
    old, new = np.array([0.7, 0.3, 0.0]), np.array([0.1, 0.3, 0.6])
    a = rng.choice(3, size=n, p=old)
    r = (rng.random(n) < 0.4).astype(float)
    assert ips(r, old[a], old[a]).warning is None
    missing = ips(r, old[a], new[a])
    assert missing.cautions.keys() == {"support"} and "average 0.4" in missing.warning
    halved = ips(r, old[a] / 2, old[a])
    assert halved.cautions.keys() == {"support"}
    rare = np.where(np.arange(n) < 3, 1e-3, 1.0)
    heavy = ips(r, rare, np.ones(n))
    assert {"ess", "concentrated"} <= heavy.cautions.keys()
    assert ips(np.eye(1, n, 5)[0], np.ones(n), np.ones(n)).cautions.keys() == {"rewards"}
    seldom, often = np.array([0.8, 0.2]), np.array([0.2, 0.8])
    a = rng.choice(2, size=n, p=seldom)
    low, high = (clipped(reward, seldom[a], often[a], clip=2.0) for reward in (np.ones(n), -np.ones(n)))
    assert low.cautions.keys() == high.cautions.keys() == {"clip"}
    lost = ips(np.ones(n), seldom[a], often[a]).value - low.value
    assert f"takes {lost:.2g} off the value" in low.warning and f"adds {lost:.2g} to the value" in high.warning
    a = rng.choice(3, size=n, p=old)
    assert clipped(np.ones(n), old[a], new[a], clip=5.0).cautions.keys() == {"support"}


def test_a_target_outside_the_log_is_seen_by_every_page_estimator():
    rng, n = np.random.default_rng(1), 3_000
    old, new = np.tile([1.0, 0.5, 0.0, -np.inf], (n, 1)), np.tile([0.0, 0.5, 1.0, 1.5], (n, 1))
    pages, reward = plackett_luce(old, 2, rng), np.ones((n, 2))
    marginals = page_propensities(old, pages), target_propensities(new, pages)
    above = prefix_propensities(old, pages), prefix_propensities(new, pages)
    weight = pseudo_inverse_weights(pages, old, new)
    for estimate in (item_position(reward, *marginals), reward_interaction(reward, *above), pseudo_inverse(reward.sum(axis=1), weight)):
        assert "support" in estimate.cautions and estimate.value < 2


def test_table_puts_estimates_side_by_side():
    estimates = [on_policy(np.arange(100.0)), ips(np.ones(100), np.full(100, 0.5), np.r_[1.0, np.zeros(99)])]
    table = estimates_table(estimates)
    assert list(table.index) == ["on_policy", "ips"] and (table["n"] == 100).all()
    assert table.loc["on_policy", "warning"] == "" and "effective sample size 1 of 100" in table.loc["ips", "warning"]
    assert np.allclose(table["high"] - table["low"], table["width"]) and str(estimates[0]).startswith("on_policy 49.5000 [")


# Probabilities of pages


@given(seeds, st.booleans())
def test_conditional_and_marginal_probabilities_agree_with_enumeration(seed, left_out):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=5) * 2
    if left_out:
        scores[rng.integers(5)] = -np.inf
    pages = np.array(list(itertools.permutations(range(5), 3)))
    all_scores = np.tile(scores, (len(pages), 1))
    given_above = prefix_probabilities(all_scores, pages)
    reachable = np.isfinite(scores[pages]).all(axis=1)
    assert np.allclose(given_above.sum(axis=2), 1) and np.allclose(given_above[:, 0], softmax(scores))
    assert (np.take_along_axis(given_above[:, 1:], pages[:, :1, None].repeat(2, axis=1), axis=2) == 0).all()
    p = prefix_propensities(all_scores, pages).prod(axis=1)
    assert p.sum() == pytest.approx(1) and (p[~reachable] == 0).all()
    marginal = target_propensities(all_scores, pages)
    for place, item in itertools.product(range(3), range(5)):
        here = pages[:, place] == item
        assert marginal[here, place] == pytest.approx(p[here].sum(), abs=1e-10)


def test_temperature_scales_the_scores():
    _, old, new, pages, _ = a_log(3)
    for function in (prefix_probabilities, prefix_propensities, target_propensities):
        assert np.allclose(function(old, pages, 2.0), function(old / 2, pages))
    assert np.allclose(pseudo_inverse_weights(pages, old, new, 2.0, 0.5), pseudo_inverse_weights(pages, old / 2, new * 2))


@given(seeds)
def test_pseudo_inverse_weights_are_those_of_the_definition(seed):
    rng, pages, old, new = page_world(seed)
    shows = np.zeros((len(pages), 12))
    np.put_along_axis(shows, pages + 4 * np.arange(3), 1.0, axis=1)
    p, q = (prefix_propensities(scores, pages).prod(axis=1) for scores in (old, new))
    gamma = shows.T @ (p[:, None] * shows)
    weight = shows @ np.linalg.pinv(gamma, rcond=1e-9, hermitian=True) @ shows.T @ q
    assert np.allclose(pseudo_inverse_weights(pages, old, new), weight, atol=1e-5) and p @ weight == pytest.approx(1)


def test_pseudo_inverse_needs_support_of_items_at_places_only():
    """Two pages were logged; a third that shows the same items at the same places is judged from them."""
    pages = np.array(list(itertools.permutations(range(4), 2)))
    old, new = np.tile([2.0, 1.0, 0.0, -1.0], (12, 1)), np.tile([-1.0, 0.0, 1.0, 2.0], (12, 1))
    weight = pseudo_inverse_weights(pages, old, new, 1.0, target_temperature=0.01)  # shows one page for certain
    p = prefix_propensities(old, pages).prod(axis=1)
    phi = np.arange(8.0).reshape(2, 4)
    total = phi[0][pages[:, 0]] + phi[1][pages[:, 1]]
    assert p @ (weight * total) == pytest.approx(phi[0, 3] + phi[1, 2])


# Reward models


def tabular():
    return make_pipeline(OneHotEncoder(handle_unknown="ignore"), LinearRegression())


def test_prefix_rewards_find_the_truth_of_a_world_that_they_can_hold():
    rng, pages, old, new = page_world(7, n_candidates=4, k=2)
    reward = rewards("from the top", rng, pages, 4)
    draws = prefix_probabilities(new, pages)
    beginning = np.stack([np.zeros(len(pages), dtype=int), pages[:, 0] + 1], axis=1)
    features = (beginning[:, :, None] * 4 + np.arange(4))[..., None]  # a number for each beginning and next item
    q_logged, q_target = PrefixRewards(tabular()).fit(features, pages, reward, draws).predict(features, pages, draws)
    assert np.allclose(q_logged[:, 1], reward[:, 1])
    second = np.array([[reward[(pages == [a, b]).all(axis=1), 1][0] if a != b else 0.0 for b in range(4)] for a in range(4)])
    to_go = reward[:, 0] + (second[pages[:, 0]] * draws[:, 1]).sum(axis=1)
    assert np.allclose(q_logged[:, 0], to_go) and np.allclose(q_target[:, 1], (second[pages[:, 0]] * draws[:, 1]).sum(axis=1))
    perfect = cascade_dr(reward, prefix_propensities(old, pages), prefix_propensities(new, pages), q_logged, q_target)
    assert perfect.value == pytest.approx(prefix_propensities(new, pages).prod(axis=1) @ reward.sum(axis=1))
    assert np.allclose(perfect.influence, 0, atol=1e-9)  # nothing is left to chance


@pytest.mark.parametrize("shoppers", [None, np.arange(60) // 4])
def test_cross_fitting_hides_a_request_from_its_own_prediction(shoppers):
    rng, old, new, pages, reward = a_log(4)
    features, draws = rng.normal(size=(60, 3, 5, 2)), prefix_probabilities(new, pages)
    before = cross_fitted(KNeighborsRegressor(1), features, pages, reward, draws, groups=shoppers, seed=1)
    mine = [17] if shoppers is None else np.flatnonzero(shoppers == 4)
    changed = reward.copy()
    changed[mine] += 100
    after = cross_fitted(KNeighborsRegressor(1), features, pages, changed, draws, groups=shoppers, seed=1)
    for one, other in zip(before, after):
        assert np.array_equal(one[mine], other[mine]) and not np.array_equal(one, other)


@pytest.mark.slow
def test_cross_fitted_intervals_hold_the_truth():
    """1,500 logs of 1,600 requests (160 of them with the heaviest weight) with a model that would remember every request if it could."""
    old, new, wants = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.3, 0.6]), np.array([0.2, 0.3, 0.5])
    held, n = {"cross-fitted": [], "same log": []}, 1_600
    for seed in range(1_500):
        rng = np.random.default_rng(seed)
        who, a = rng.random(n), rng.choice(3, size=n, p=old)
        r = (rng.random(n) < wants[a] * (0.5 + who)).astype(float)
        features = np.stack(np.broadcast_arrays(who[:, None], 10.0 * np.arange(3)), axis=-1)[:, None]
        known, draws = (features, a[:, None], r[:, None]), np.broadcast_to(new, (n, 1, 3))
        remembered = PrefixRewards(KNeighborsRegressor(1)).fit(*known, draws).predict(features, a[:, None], draws)
        for name, q in (("cross-fitted", cross_fitted(KNeighborsRegressor(1), *known, draws, seed=seed)), ("same log", remembered)):
            estimate = doubly_robust(r, old[a], new[a], q[0][:, 0], q[1][:, 0])
            held[name].append(estimate.low <= new @ wants <= estimate.high)
    assert 0.93 <= np.mean(held["cross-fitted"]) <= 0.97 and np.mean(held["same log"]) < 0.6


# Logs as tables


@pytest.fixture(scope="module")
def shop_log():
    truth = load_truth(sources.folder("shop"))
    asked = truth.requests(120, seed=3, day=31)
    items, propensities = truth.logging_pages(asked, seed=3)
    return asked, items, propensities, truth.respond(asked, items, propensities, policy="old", seed=3)


def test_logged_pages_reads_what_was_shown(shop_log):
    asked, items, propensities, events = shop_log
    log = logged_pages(events.sample(frac=1, random_state=0))
    order = pd.Index(asked["request_id"]).get_indexer(log.request_id)
    assert np.array_equal(log.items, items[order]) and np.allclose(log.propensity, propensities[order])
    assert np.array_equal(log.user_id, asked["user_id"].to_numpy()[order]) and log.left_out == 0
    assert log.reward.sum() == (events["kind"] == "click").sum()
    clicks = events[events["kind"] == "click"]
    shown = {(request, item): r for request, row, rs in zip(log.request_id, log.items, log.reward) for item, r in zip(row, rs)}
    assert all(shown[key] == 1 for key in zip(clicks["request_id"], clicks["item_id"]))
    assert np.array_equal(logged_pages(events, k=4).items[:, :4], logged_pages(events).items[:, :4])


def test_logged_pages_counts_money(shop_log):
    *_, events = shop_log
    bought = events[events["kind"] == "purchase"]
    assert logged_pages(events, reward="revenue").reward.sum() == pytest.approx((bought["price"] * bought["quantity"]).sum())
    assert logged_pages(events, reward="purchase").reward.sum() == len(bought) > 0


def test_pages_with_holes_are_left_out_and_counted(shop_log):
    *_, events = shop_log
    hole = events.index[(events["kind"] == "impression") & (events["position"] == 5)][7]
    log = logged_pages(events.drop(index=hole))
    assert log.left_out == 1 and events.loc[hole, "request_id"] not in log.request_id and len(log.items) == 119


def _twice(events, column, value):
    first = events.index[events["kind"] == "impression"][0]
    return pd.concat([events, events.loc[[first]].assign(**{column: value})])


@pytest.mark.parametrize("change, message", [
    (lambda e: e.assign(propensity=np.nan), "without a propensity"),
    (lambda e: _twice(e, "item_id", "i999999"), "shows position .* twice"),
    (lambda e: _twice(e, "position", 11), "shows item_id .* twice"),
    (lambda e: e[e["kind"] != "impression"], "none of 0 requests"),
])
def test_logs_that_cannot_be_weighed_are_refused(shop_log, change, message):
    with pytest.raises(OffPolicyError, match=message):
        logged_pages(change(shop_log[3]))


# Refusals

GOOD = {"reward": np.ones((3, 2)), "propensity": np.full((3, 2), 0.5), "target": np.full((3, 2), 0.5)}


def _with(name, value, at=(1, 1)):
    array = GOOD[name].copy()
    array[at] = value
    return GOOD | {name: array}


@pytest.mark.parametrize("arrays, message", [
    (_with("propensity", 0.0), "propensity: 0 in request 1, place 2"),
    (_with("propensity", -0.1), "propensity: -0.1 in request 1"),
    (_with("propensity", 1.2), "propensity: 1.2 in request 1, place 2; .* was a score logged"),
    (_with("propensity", np.nan), "propensity: nan in request 1, place 2"),
    (_with("reward", np.inf), "reward: inf in request 1, place 2"),
    (_with("target", 1.1), "target: 1.1 in request 1, place 2"),
    (_with("target", -0.1), "target: -0.1"),
    (GOOD | {"target": np.ones((3, 1))}, r"target is of shape \(3, 1\), reward of \(3, 2\)"),
    ({name: array[:1] for name, array in GOOD.items()}, "at least two requests"),
    ({name: array[:, 0] for name, array in GOOD.items()}, r"reward must be \(requests, k\)"),
    ({name: array[:, :0] for name, array in GOOD.items()}, "not of shape"),
])
@pytest.mark.parametrize("estimator", [item_position, reward_interaction, lambda **a: cascade_dr(**a, q_logged=np.zeros((3, 2)), q_target=np.zeros((3, 2)))])
def test_what_is_no_log_is_refused(estimator, arrays, message):
    with pytest.raises(OffPolicyError, match=message):
        estimator(**arrays)


@pytest.mark.parametrize("call, message", [
    (lambda: ips([1.0, 0.0], [0.5, 0.0], [0.5, 0.5]), "propensity: 0 in request 1; "),
    (lambda: ips(np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2))), r"reward must be \(requests,\)"),
    (lambda: snips([1.0, 0.0], [0.5, 0.5], [0.0, 0.0]), "chosen no logged action at all"),
    (lambda: clipped([1.0, 0.0], [0.5, 0.5], [0.5, 0.5], clip=0.5), "at least 1, not 0.5"),
    (lambda: clipped([1.0, 0.0], [0.5, 0.5], [0.5, 0.5], clip=np.nan), "at least 1, not nan"),
    (lambda: doubly_robust([1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.0, np.nan], [0.0, 0.0]), "q_logged: nan in request 1"),
    (lambda: pseudo_inverse([1.0, 0.0], [1.0]), "weight is of shape"),
    (lambda: on_policy(np.ones(1)), "at least two requests"),
    (lambda: on_policy(np.ones((2, 2, 2))), "not of shape"),
    (lambda: on_policy(np.ones(3)) - on_policy(np.ones(2)), "needs the same log"),
    (lambda: on_policy(np.ones(3)).grouped(["a", "a"]), "2 for 3 requests"),
    (lambda: on_policy(np.ones(3)).grouped(["a", "a", "a"]), "two groups are needed"),
    (lambda: pseudo_inverse_weights(np.zeros((2, 1), int), np.zeros((2, 400)), np.zeros((2, 400))), "keep fewer candidates or places"),
    (lambda: PrefixRewards(tabular()).fit(np.zeros((2, 1, 3, 1)), np.zeros((2, 2), int), np.zeros((2, 2)), np.zeros((2, 2, 3))), "must be"),
    (lambda: cross_fitted(tabular(), np.zeros((3, 1, 2, 1)), np.zeros((3, 1), int), np.zeros((3, 1)), np.zeros((3, 1, 2)), folds=5), "5 parts of 3 groups"),
    (lambda: logged_pages(pd.DataFrame(), reward="stars"), "click, cart, purchase or revenue, not 'stars'"),
])
def test_every_refusal_says_what_and_where(call, message):
    with pytest.raises(OffPolicyError, match=message):
        call()


def test_pages_that_are_none_are_refused():
    scores = np.zeros((2, 3))
    for function in (prefix_probabilities, prefix_propensities, target_propensities):
        with pytest.raises(ValueError, match="same candidate twice"):
            function(scores, [[0, 0], [0, 1]])
        with pytest.raises(ValueError, match="candidates go from 0 to 2"):
            function(scores, [[0, 3], [0, 1]])


# The oracle


@pytest.fixture(scope="module")
def obp():
    return pytest.importorskip("obp.ope", reason="obp, the oracle of off-policy estimators, is not installed")


@pytest.mark.parametrize("seed", range(5))
def test_single_estimators_agree_with_obp(obp, seed):
    rng = np.random.default_rng(seed)
    n, actions = 400, 6
    old, new, q = (softmax(rng.normal(size=(n, actions)), axis=1) for _ in range(3))
    a, r = np.array([rng.choice(actions, p=row) for row in old]), rng.random(n)
    every = np.arange(n)
    theirs = {"reward": r, "action": a, "pscore": old[every, a], "action_dist": new[:, :, None], "position": np.zeros(n, int)}
    ours = r, old[every, a], new[every, a]
    assert ips(*ours).value == pytest.approx(obp.InverseProbabilityWeighting().estimate_policy_value(**theirs))
    assert snips(*ours).value == pytest.approx(obp.SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**theirs))
    dr = doubly_robust(*ours, q[every, a], (q * new).sum(axis=1))
    assert dr.value == pytest.approx(obp.DoublyRobust().estimate_policy_value(**theirs, estimated_rewards_by_reg_model=q[:, :, None]))


@pytest.mark.parametrize("seed", range(5))
def test_page_estimators_agree_with_obp(obp, seed):
    _, old, new, pages, reward = a_log(seed, n=200)
    n, k = pages.shape
    rows = {"slate_id": np.repeat(np.arange(n), k), "reward": reward.ravel(), "position": np.tile(np.arange(k), n)}
    marginal, above = [[f(scores, pages) for scores in (old, new)] for f in (page_propensities, prefix_propensities)]
    iips = obp.SlateIndependentIPS(len_list=k).estimate_policy_value(
        **rows, pscore_item_position=marginal[0].ravel(), evaluation_policy_pscore_item_position=marginal[1].ravel()
    )
    down = [np.cumprod(p, axis=1).ravel() for p in above]
    rips = obp.SlateRewardInteractionIPS(len_list=k).estimate_policy_value(**rows, pscore_cascade=down[0], evaluation_policy_pscore_cascade=down[1])
    whole = [p.prod(axis=1) for p in above]
    sips = obp.SlateStandardIPS(len_list=k).estimate_policy_value(
        **rows, pscore=whole[0].repeat(k), evaluation_policy_pscore=whole[1].repeat(k)
    )
    assert item_position(reward, *marginal).value == pytest.approx(iips)
    assert reward_interaction(reward, *above).value == pytest.approx(rips)
    assert ips(reward.sum(axis=1), *whole).value == pytest.approx(sips)


def test_normal_interval_is_near_obps_bootstrap(obp):
    rng, n = np.random.default_rng(0), 2_000
    old, new = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.3, 0.6])
    a = rng.choice(3, size=n, p=old)
    r = (rng.random(n) < np.array([0.2, 0.3, 0.5])[a]).astype(float)
    ours = ips(r, old[a], new[a])
    theirs = obp.InverseProbabilityWeighting().estimate_interval(
        reward=r, action=a, pscore=old[a], action_dist=np.tile(new, (n, 1))[:, :, None], position=np.zeros(n, int), n_bootstrap_samples=2_000, random_state=0
    )
    ends = [value for name, value in theirs.items() if "lower" in name or "upper" in name]
    assert (ours.low, ours.high) == pytest.approx((min(ends), max(ends)), abs=0.1 * (ours.high - ours.low))


def test_open_bandit_is_read_as_pinned(real_data):
    for policy, campaign in itertools.product(("random", "bts"), ("men", "women")):
        (path,) = sources.fetch(f"obd_{policy}_{campaign}")
        log = pd.read_csv(path)
        assert path.parent.parent.name == policy and len(log) == 10_000 and log["position"].isin([1, 2, 3]).all()
        if policy == "random":
            assert np.allclose(log["propensity_score"], 1 / log["item_id"].nunique())
