"""Click models: every story of a page counted one by one, EM that never falls, curves that come back."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.feedback.click_models import LEVELS, Cascade, ClickLog, ClickLogError, DynamicBayesian, PositionBased, TrustBias, _climb, _kinds, click_log

ALL = [PositionBased, TrustBias, Cascade, DynamicBayesian]
READING = (Cascade, DynamicBayesian)


def make(model, **options):
    """A model that takes rare pairs too."""
    return model(at_least=1, **options) if model in READING else model()


def log_of(pair, clicks, n=None):
    pair = np.asarray(pair)
    pairs = pd.DataFrame({"query": "q", "item_id": [f"i{code}" for code in range(n or pair.max(initial=-1) + 1)]})
    return ClickLog(pair, np.asarray(clicks, dtype=bool), pairs, np.array([f"r{row}" for row in range(len(pair))], dtype=object))


def set_up(model, seed, k=3, n=4):
    """A model with drawn parameters, as if fitted."""
    rng, out = np.random.default_rng(seed), make(model)
    out.appeal, out.prior, out.examination = rng.uniform(0.05, 0.9, n), (1.0, 4.0), np.r_[1.0, rng.uniform(0.1, 1, k - 1)]
    if model in READING:
        out.patience, out.satisfaction, out.slip, out.spread = rng.uniform(0.3, 1), rng.uniform(0, 1), rng.uniform(0.01, 0.3), rng.choice([0.0, 0.8])
    if model is Cascade:
        out.patience = out.satisfaction = 1.0
    if model in (PositionBased, TrustBias):
        out.trust = rng.uniform(0, 0.4, k) * (model is TrustBias)
    return out


def chance_of_looks(model, looks, wants):
    """P(examined | wanted) of one page, from the definition of the mechanism."""
    if isinstance(model, PositionBased):
        theta = model.examination[: len(looks)]
        return np.prod(np.where(looks, theta, 1 - theta))
    p, before = 1.0, 1.0
    for look, want in zip(looks, wants):
        p *= before if look else 1 - before
        before = look * model.patience * (1 - model.satisfaction * want)
    return p


def stories(model, pair):
    """Every story of one page: (probability, examined, wanted, clicked)."""
    k = len(pair)
    slip = model.trust[:k] if isinstance(model, PositionBased) else np.full(k, model.slip)
    for (keen, share), looks, wants, slips in itertools.product(zip(*_kinds(model.spread)), *[list(itertools.product([0, 1], repeat=k))] * 3):
        looks, wants, slips = (np.array(part) for part in (looks, wants, slips))
        alpha = keen * model.appeal[pair]
        p = share * chance_of_looks(model, looks, wants) * np.prod(np.where(wants, alpha, 1 - alpha)) * np.prod(np.where(slips, slip, 1 - slip))
        yield p, looks, wants, looks & (wants | slips)


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("length", [3, 2])
def test_equals_the_count_of_all_stories(model, length):
    fitted = set_up(model, seed=length)
    pair = np.array([2, 0, 3])[:length]
    told = list(stories(fitted, pair))
    assert np.isclose(sum(p for p, *_ in told), 1)
    patterns = np.array(list(itertools.product([0, 1], repeat=length)))
    padded = np.pad(patterns, ((0, 0), (0, 3 - length))).astype(bool)
    log = log_of(np.tile(np.r_[pair, np.full(3 - length, -1)], (len(patterns), 1)), padded, n=4)
    likelihood, (examined, wanted) = np.exp(fitted.log_likelihood(log)), fitted.posterior(log)
    assert np.isclose(likelihood.sum(), 1)
    for row, pattern in enumerate(patterns):
        fit = [(p, looks, wants) for p, looks, wants, clicked in told if (clicked == pattern).all()]
        total = sum(p for p, *_ in fit)
        assert np.isclose(likelihood[row], total)
        for found, place in ((examined, 1), (wanted, 2)):
            assert np.allclose(found[row, :length], sum(story[0] * story[place] for story in fit) / total)
            assert (found[row, length:] == 0).all()
    assert np.allclose(fitted.clicks(log)[0, :length], sum(p * clicked for p, _, _, clicked in told))
    steps = fitted.conditional(log)[:, :length]
    assert np.allclose(np.where(patterns, steps, 1 - steps).prod(axis=1), likelihood)


@pytest.mark.parametrize("model", [PositionBased, TrustBias])
def test_evidence_is_that_of_pairs_with_their_attraction_integrated_out(model):
    rng = np.random.default_rng(0)
    pair = np.array([rng.permutation(6)[:3] for _ in range(200)])
    log = log_of(pair, rng.random(pair.shape) < np.linspace(0.1, 0.8, 6)[pair] * [1, 0.6, 0.3])
    fitted = model(rare=10**9).fit(log)
    evidence, means = 0.0, []
    for code in range(6):
        joint = fitted.levels.copy()
        for row, place in zip(*np.nonzero(pair == code)):
            click = fitted.examination[place] * (fitted.trust[place] + (1 - fitted.trust[place]) * LEVELS)
            joint *= click if log.clicks[row, place] else 1 - click
        evidence += np.log(joint.sum())
        means.append(joint @ LEVELS / joint.sum())
    assert np.isclose(fitted.history[-1], evidence) and np.allclose(fitted.appeal, means)
    assert fitted.examination[0] == 1 and fitted.trust[-1] == 0


def test_frequent_pairs_follow_plain_em():
    log, _, _ = draw_log(PositionBased, 4000, seed=9, k=3, n=5)
    fitted = PositionBased(rare=0).fit(log, tol=1e-12)
    theta, alpha, place = np.array([1.0, 0.5, 0.5]), np.full(5, 0.3), np.tile(np.arange(3), len(log))
    pair, click = log.pair.ravel(), log.clicks.ravel()
    for _ in range(3000):
        seen = theta[place] * alpha[pair]
        looked = np.where(click, 1, (theta[place] - seen) / (1 - seen))
        theta, alpha = np.r_[1, (np.bincount(place, looked) / len(log))[1:]], np.bincount(pair, click) / np.bincount(pair, looked)
    seen = theta[place] * alpha[pair]
    assert np.allclose(fitted.examination, theta, atol=1e-4) and np.isclose(fitted.history[-1], np.log(np.where(click, seen, 1 - seen)).sum())
    yes, no = fitted.prior
    assert np.allclose(fitted.appeal, alpha, atol=0.02) and (np.abs(fitted.appeal - yes / (yes + no)) <= np.abs(alpha - yes / (yes + no)) + 1e-4).all()


@st.composite
def logs(draw):
    pages, k, n = draw(st.integers(2, 25)), draw(st.integers(1, 4)), draw(st.integers(4, 8))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    pair = np.array([rng.permutation(n)[:k] for _ in range(pages)])
    length = rng.integers(1, k + 1, pages)
    pair[np.arange(k) >= length[:, None]] = -1
    clicks = (rng.random((pages, k)) < draw(st.sampled_from([0.05, 0.3, 0.9, 1.0]))) & (pair >= 0)
    clicks[0, 0] = True
    return log_of(pair, clicks, n)


@settings(max_examples=60, deadline=None)
@given(logs(), st.sampled_from(ALL), st.booleans())
def test_em_never_lowers_the_likelihood_and_shares_stay_shares(log, model, alike):
    fitted = make(model, **({"alike": alike} if model in READING else {})).fit(log, most=60)
    assert np.isfinite(fitted.history).all() and (np.diff(fitted.history) >= -1e-7 * (1 + abs(fitted.history[0]))).all()
    for share in (fitted.examination, fitted.attraction, fitted.appeal, fitted.clicks(log), fitted.conditional(log), *fitted.posterior(log)):
        assert np.isfinite(share).all() and (share >= -1e-12).all() and (share <= 1 + 1e-9).all()
    assert min(fitted.prior) > 0
    steps = fitted.conditional(log)
    steps = np.where(log.pair < 0, 1, np.where(log.clicks, steps, 1 - steps))
    assert np.allclose(np.log(steps.clip(1e-300)).sum(axis=1), fitted.log_likelihood(log), rtol=1e-6, atol=1e-6)
    assert (fitted.perplexity(log) >= 1 - 1e-9).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_jumps_end_where_em_ends(seed, first, second):
    """A mixture of two known coins, whose share EM finds: one number, one optimum."""
    clicks = np.random.default_rng(seed).random(300) < 0.5

    def step(x):
        a, b = x[0] * np.where(clicks, 0.8, 0.2), (1 - x[0]) * np.where(clicks, 0.3, 0.7)
        return np.array([(a / (a + b)).mean()]), float(np.log(a + b).sum())

    ends = [_climb(step, np.array([start]), 2000, 1e-14, False) for start in (first, second)]
    for x, history in ends:
        assert (np.diff(history) >= -1e-10).all()
    assert np.isclose(ends[0][0], ends[1][0], atol=1e-3)


def draw_log(model, pages, seed, k=6, n=40, spread=0.0, patience=0.85, satisfaction=0.6, slip=0.02):
    """A log by one of the mechanisms, and who looked where; written down apart from the models."""
    rng = np.random.default_rng(seed)
    alpha, pair = rng.beta(0.8, 2, n), rng.random((pages, n)).argsort(axis=1)[:, :k]
    luck = (pair / n + rng.random(pair.shape)).argsort(axis=1)  # an old ranker: small codes on top, more or less
    pair = np.take_along_axis(pair, luck, axis=1)
    wants = rng.random(pair.shape) < alpha[pair] * rng.random((pages, 1)) ** spread
    if model in (PositionBased, TrustBias):
        looked = rng.random(pair.shape) < np.arange(1, k + 1) ** -0.8
        slips = rng.random(pair.shape) < (0.3 * (1 / np.arange(1, k + 1) - 1 / k) if model is TrustBias else 0)
    else:
        if model is Cascade:
            patience = satisfaction = 1.0
        on = rng.random(pair.shape) < patience * (1 - satisfaction * wants)
        looked = np.cumprod(np.c_[np.ones(pages, dtype=bool), on[:, :-1]], axis=1) > 0
        slips = rng.random(pair.shape) < (slip if model is Cascade else 0)
    return log_of(pair, looked & (wants | slips), n), looked, alpha


@pytest.mark.parametrize("model", ALL)
def test_recovers_the_curve_of_its_own_mechanism(model):
    log, looked, alpha = draw_log(model, 30_000 if model in READING else 100_000, seed=1)
    fitted = make(model).fit(log)
    assert np.abs(fitted.examination - looked.mean(axis=0)).max() <= 0.02
    assert np.abs(fitted.attraction - alpha).mean() < 0.02
    examined, _ = fitted.posterior(log)
    assert abs(examined[~log.clicks].mean() - looked[~log.clicks].mean()) < 0.01


def test_shoppers_who_differ_need_a_model_that_knows_it():
    log, looked, _ = draw_log(DynamicBayesian, 30_000, seed=2, spread=1.0)
    error = {alike: np.abs(DynamicBayesian(alike=alike).fit(log).examination - looked.mean(axis=0)).max() for alike in (True, False)}
    assert error[False] <= 0.02 < 2 * error[False] < error[True]


def test_the_matching_model_has_the_best_held_out_likelihood():
    for law in (PositionBased, Cascade, DynamicBayesian):
        log, _, _ = draw_log(law, 20_000, seed=3)
        train, held_out = log.take(np.arange(15_000)), log.take(np.arange(15_000, 20_000))
        score = {model: make(model).fit(train, most=60).log_likelihood(held_out).mean() for model in (PositionBased, Cascade, DynamicBayesian)}
        assert max(score, key=score.get) is law


@pytest.mark.parametrize("model", ALL)
def test_order_of_pages_and_names_of_pairs_are_of_no_importance(model):
    log, _, _ = draw_log(model, 1500, seed=4, n=12)
    names, rows = np.random.default_rng(0).permutation(12), np.random.default_rng(1).permutation(1500)
    other = log_of(names[log.pair][rows], log.clicks[rows], 12)
    one, two = make(model).fit(log, most=90), make(model).fit(other, most=90)
    assert np.allclose(one.examination, two.examination, atol=1e-6) and np.allclose(one.appeal, two.appeal[names], atol=1e-5)
    assert np.allclose(one.log_likelihood(log)[rows], two.log_likelihood(other), atol=1e-5)


@pytest.mark.parametrize("model", ALL)
def test_rare_pairs_are_drawn_to_the_mean_and_strangers_have_it(model):
    log, _, _ = draw_log(model, 3000, seed=5, n=20)
    pair = np.vstack([log.pair, [[20, 21, 22, 23, 24, 25]]])
    log = log_of(pair, np.vstack([log.clicks, [[True, False, False, False, False, False]]]), 26)
    fitted = (make(model) if model in READING else model(rare=10**9)).fit(log, most=90)
    mean = fitted.prior[0] / sum(fitted.prior)
    assert mean < fitted.appeal[20] < 0.99 and 0.001 < fitted.appeal[21] < mean
    stranger = log_of([[99, -1, -1, -1, -1, -1]], np.zeros((1, 6)), 100)
    known = log_of([[20, -1, -1, -1, -1, -1]], np.zeros((1, 6)), 100)
    fitted.appeal[20] = mean
    assert np.allclose(fitted.clicks(stranger), fitted.clicks(known))


def test_a_cascade_takes_a_page_with_two_clicks_for_a_slip():
    log, _, _ = draw_log(Cascade, 3000, seed=6, slip=0.0)
    assert (log.clicks.sum(axis=1) <= 1).all()
    fitted = make(Cascade).fit(log)
    twice = log.take(np.arange(1))
    twice.clicks[0] = [True, False, True, False, False, False]
    assert np.isfinite(fitted.log_likelihood(twice)).all() and fitted.posterior(twice)[1][0, 0] == 0


def to_events(log, surface="search"):
    rows, places = np.nonzero(log.pair >= 0)
    events = pd.DataFrame({"kind": "impression", "request_id": log.requests[rows], "query": "q", "position": places + 1,
                           "item_id": log.pairs["item_id"].to_numpy()[log.pair[rows, places]], "surface": surface})
    return pd.concat([events, events[log.clicks[rows, places]].assign(kind="click")], ignore_index=True)


@settings(max_examples=50, deadline=None)
@given(logs(), st.integers(0, 1000))
def test_pages_come_back_from_their_events_in_any_order(log, seed):
    events = to_events(log).sample(frac=1, random_state=seed)
    events = pd.concat([events, events[events["kind"] == "click"]])  # a click counts once
    back = click_log(events)
    place = pd.Index(back.requests).get_indexer(log.requests)
    k = back.pair.shape[1]
    assert (place >= 0).all() and len(back) == len(log) and (log.pair[:, k:] < 0).all() and back.left_out == 0
    assert np.array_equal(back.clicks[place], log.clicks[:, :k])
    names = np.append(back.pairs["item_id"].to_numpy(), None)
    assert np.array_equal(names[back.pair[place]], np.append(log.pairs["item_id"].to_numpy(), None)[log.pair[:, :k]])
    assert not back.pairs.duplicated().any()


def test_known_pairs_keep_their_codes():
    first = click_log(to_events(log_of([[0, 1], [2, 0]], [[1, 0], [0, 0]])))
    then = click_log(to_events(log_of([[3, 2], [1, 4]], [[0, 0], [0, 1]])), known=first.pairs)
    assert then.pairs["item_id"].tolist()[:3] == first.pairs["item_id"].tolist() and set(then.pairs["item_id"]) == {"i0", "i1", "i2", "i3", "i4"}
    assert then.pairs["item_id"].to_numpy()[then.pair].tolist() == [["i3", "i2"], ["i1", "i4"]]


BROKEN = {
    "without a position": lambda e: e.assign(position=e["position"].astype(float).mask(e.index == 0)),
    "two items at one position": lambda e: e.assign(position=e["position"].mask(e.index == 1, 1)),
    "shows one item twice": lambda e: e.assign(item_id=e["item_id"].mask(e.index == 1, "i0")),
    "has a gap": lambda e: e.assign(position=e["position"].mask(e.index == 1, 3)),
    "did not show": lambda e: e.assign(item_id=e["item_id"].mask(e.index == 4, "i3")),
    "counted from 1": lambda e: e.assign(position=e["position"].mask(e["request_id"] == "r0", e["position"] - 1)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_requests_are_named_or_left_out(fault):
    events = to_events(log_of([[0, 1], [2, 3]], [[1, 0], [0, 0]]))
    events = BROKEN[fault](events)
    with pytest.raises(ClickLogError, match=f"request r0 .*{fault}"):
        click_log(events)
    log = click_log(events, broken="drop")
    assert log.left_out == 1 and log.requests.tolist() == ["r1"] and log.pairs["item_id"].tolist() == ["i2", "i3"]


def test_clicks_of_unknown_requests_are_named_or_counted():
    events = to_events(log_of([[0, 1]], [[1, 0]]))
    events = pd.concat([events, events.tail(1).assign(request_id="r7")])
    with pytest.raises(ClickLogError, match="request r7 has clicks and no impression"):
        click_log(events)
    assert click_log(events, broken="drop").left_out == 1 and click_log(events, broken="drop").clicks.tolist() == [[True, False]]


@pytest.mark.parametrize("change, message", [
    (lambda e: e.drop(columns="position"), "column 'position' is missing"),
    (lambda e: e.assign(query=None), "'query' is empty in 2 impressions"),
])
def test_events_that_are_refused(change, message):
    with pytest.raises(ClickLogError, match=message):
        click_log(change(to_events(log_of([[0, 1]], [[1, 0]]))))


def test_other_keys_and_an_empty_log():
    events = to_events(log_of([[0, 1]], [[1, 0]]))
    assert click_log(events, key=("item_id",)).pairs.columns.tolist() == ["item_id"]
    with pytest.raises(ClickLogError, match="broken must be"):
        click_log(events, broken="ignore")
    nothing = click_log(events.head(0))
    assert len(nothing) == 0
    with pytest.raises(ClickLogError, match="0 pages and no click"):
        PositionBased().fit(nothing)


@pytest.mark.parametrize("pair, clicks, message", [
    ([0, 1], [False, True], "must be .pages, k."),
    ([[0, 9]], [[False, True]], "code 9 has no row"),
    ([[0, -1]], [[False, True]], "request r0 has a click where its page has no item"),
])
def test_logs_that_are_refused(pair, clicks, message):
    with pytest.raises(ClickLogError, match=message):
        log_of(pair, clicks, n=2)


def test_models_say_what_they_need():
    log = log_of([[0, 1], [1, 0]], [[1, 0], [0, 0]])
    for model in ALL:
        with pytest.raises(ClickLogError, match=f"{model.__name__} knows nothing yet"):
            make(model).posterior(log)
    with pytest.raises(ClickLogError, match="shown 50 times .the median., the best 2"):
        DynamicBayesian().fit(log)
    with pytest.raises(ClickLogError, match="pages of 2 places, but the model was fitted on 1"):
        make(Cascade).fit(log_of([[0], [1]], [[1], [0]])).log_likelihood(log)


@pytest.mark.slow
@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("seed", range(5))
def test_recovers_the_curve_for_many_seeds(model, seed):
    log, looked, _ = draw_log(model, 60_000 if model in READING else 200_000, seed=100 + seed, spread=0.7 if model in READING else 0.0)
    assert np.abs(make(model).fit(log).examination - looked.mean(axis=0)).max() <= 0.02
