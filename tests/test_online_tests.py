"""Online tests against loops, integrals and enumeration: errors at every look, drafts coin by coin."""

import hashlib
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binomtest, chi2_contingency, norm, ttest_1samp, ttest_ind

from ecomrec.data.simulator import simulate
from ecomrec.feedback.online_tests import OnlineTestError, always_valid, assign, credit, page_clicks, sample_ratio, sequential_test, team_draft

seeds = st.integers(0, 2**32 - 1)
scales = st.floats(0.01, 100)
half = {"old": 0.5, "new": 0.5}


# Who sees what


@given(st.lists(st.one_of(st.text(), st.integers()), min_size=1, unique_by=str), st.text(), seeds)
def test_an_arm_depends_on_the_user_and_the_experiment_alone(users, experiment, seed):
    arms = dict(zip(users, assign(users, experiment, half)))
    later = np.random.default_rng(seed).choice(np.array(users, dtype=object), 5)
    assert [arms[user] for user in later] == assign(later, experiment, half).tolist()


def test_an_arm_is_the_keyed_hash_of_the_user():
    salt = hashlib.blake2b(b"prices").digest()
    for user in ("ann", "博", 17):
        number = int.from_bytes(hashlib.blake2b(str(user).encode(), digest_size=8, key=salt).digest(), "little") / 2**64
        assert assign([user], "prices", {"a": 0.2, "b": 0.5, "c": 0.3})[0] == ("a" if number < 0.2 else "b" if number < 0.7 else "c")


def test_arms_have_their_shares_and_experiments_are_independent():
    users, shares = [f"u{n}" for n in range(50_000)], {"a": 0.2, "b": 0.5, "c": 0.3}
    first, second = assign(users, "one", shares), assign(users, "two", shares)
    assert sample_ratio(first, shares) > 1e-4
    assert chi2_contingency(pd.crosstab(first, second)).pvalue > 1e-4


@given(st.integers(0, 200), st.integers(1, 200))
def test_sample_ratio_is_the_square_of_the_normal_deviate(first, second):
    n = first + second
    z = (first - n / 2) / np.sqrt(n / 4)
    assert sample_ratio(["old"] * first + ["new"] * second, half) == pytest.approx(2 * norm.sf(abs(z)))


# The bet


@given(st.floats(-5, 5), scales, scales, st.floats(0.001, 0.5))
def test_p_is_one_over_the_mixed_likelihood_ratio(z, s, effect, alpha):
    middle, width = z * s * effect**2 / (s**2 + effect**2), 10 * s * effect / np.hypot(s, effect)  # outside of it the product is nothing
    term = lambda d: np.exp(norm.logpdf(z * s, d, s) - norm.logpdf(z * s, 0, s) + norm.logpdf(d, 0, effect))
    ratio, _ = quad(term, middle - width, middle + width)
    low, high, p = always_valid(z * s, s, effect, alpha)
    assert p == pytest.approx(min(1, 1 / ratio), rel=1e-5)
    assert (low <= 0 <= high) == (p >= alpha) or p == pytest.approx(alpha, rel=1e-9)


@given(st.floats(-3, 3), st.floats(0.2, 5), st.floats(0.1, 10), st.floats(0.2, 3))
def test_capital_is_a_martingale(score, information, more, effect):
    """Given score and information now, the mean of 1/p (before it is cut at 1) after more information is what it is now."""

    def log_capital(score, information):
        return effect**2 * score**2 / (2 * (1 + effect**2 * information)) - np.log1p(effect**2 * information) / 2

    def term(gained):
        return np.exp(log_capital(score + gained, information + more) + norm.logpdf(gained, 0, np.sqrt(more)))

    middle = effect**2 * more * score / (1 + effect**2 * information)  # where the product is largest
    width = 12 * np.sqrt(more * (1 + effect**2 * (information + more)) / (1 + effect**2 * information))
    mean, _ = quad(term, middle - width, middle + width, points=[middle], limit=500)
    assert mean == pytest.approx(np.exp(log_capital(score, information)), rel=1e-6)
    s = 1 / np.sqrt(information)
    assert always_valid(score * s**2, s, effect)[2] == pytest.approx(min(1, np.exp(-log_capital(score, information))))


@given(st.floats(-5, 5), scales, scales, st.floats(-100, 100), scales)
def test_interval_holds_exactly_what_would_not_be_refused(z, s, effect, shift, unit):
    low, high, p = always_valid(z * s, s, effect)
    for edge, inside in ((low, 1e-6), (high, -1e-6)):
        assert always_valid(z * s - edge - inside * s, s, effect)[2] >= 0.05 >= always_valid(z * s - edge + inside * s, s, effect)[2]
    moved = always_valid(unit * z * s, unit * s, unit * effect)
    assert np.allclose(moved, [unit * low, unit * high, p], rtol=1e-9)
    assert always_valid(-z * s, s, effect)[2] == pytest.approx(p)


def test_nothing_is_concluded_where_nothing_is_known():
    low, high, p = always_valid([0.0, 1.0, np.nan, 1.0], [0.0, np.nan, 1.0, np.inf], 1.0)
    assert (low == -np.inf).all() and (high == np.inf).all() and (p == 1).all()


# The table against loops


def by_hand(values, users):
    """Mean and cluster-robust squared error, as the formula is written."""
    names = sorted(set(users))
    mean = np.mean(values)
    residuals = [sum(v - mean for v, u in zip(values, users) if u == name) for name in names]
    if len(names) < 2:
        return mean, np.nan
    return mean, len(names) / (len(names) - 1) * sum(r**2 for r in residuals) / len(values) ** 2


def some_log(seed, n=40, people=9):
    rng = np.random.default_rng(seed)
    users = rng.integers(people, size=n)
    values = rng.poisson(1, n) * rng.choice([1.0, 0.5, 7.0], n) - rng.integers(2)
    arms = np.where(rng.permutation(people) < people // 2, "old", "new")[users]
    assume(len(set(arms[:6])) == 2)
    return values, users, arms


@given(seeds)
def test_every_look_is_the_formula_on_what_was_seen(seed):
    values, users, arms = some_log(seed)
    table = sequential_test(values, users, 0.7, arms, ("old", "new"), least=0)
    alone = sequential_test(values, users, 0.7, least=0)
    for n in range(1, len(values) + 1):
        (old, old_noise), (new, new_noise) = (by_hand(values[:n][mine], users[:n][mine]) if mine.any() else (np.nan, np.nan) for mine in (arms[:n] == "old", arms[:n] == "new"))
        assert table["difference"][n] == pytest.approx(new - old, abs=1e-12, nan_ok=True)
        assert table["error"][n] == pytest.approx(np.sqrt(old_noise + new_noise), abs=1e-7, nan_ok=True)
        assert (alone["difference"][n], alone["error"][n] ** 2) == pytest.approx(by_hand(values[:n], users[:n]), abs=1e-12, nan_ok=True)
        assert alone["users"][n] == table["users"][n] == len(set(users[:n]))
    assert (table["p"].diff().dropna() <= 0).all() and table["p"].between(0, 1).all()


@given(seeds, st.integers(10, 30), st.floats(-1e7, 1e7), scales)
def test_what_comes_later_changes_nothing_and_neither_do_units_nor_names(seed, cut, shift, unit):
    values, users, arms = some_log(seed)
    assume(len(set(arms[:cut])) == 2)
    whole = sequential_test(values, users, 0.7, arms, ("old", "new"), least=0)
    early = sequential_test(values[:cut], users[:cut], 0.7, arms[:cut], ("old", "new"), least=0)
    pd.testing.assert_frame_equal(whole.iloc[:cut], early, atol=1e-9)
    few = sequential_test(values, users, 0.7, arms, ("old", "new"), looks=[cut, len(values)], least=0)
    assert np.allclose(few[["difference", "error"]], whole.loc[[cut, len(values)], ["difference", "error"]], equal_nan=True)
    names = np.array([f"user {n}" for n in range(9)], dtype=object)[::-1][users]
    other = sequential_test(unit * values, names, 0.7 * unit, np.where(arms == "old", "B", "A"), ("B", "A"), least=0)
    assert np.allclose(other["p"], whole["p"], rtol=1e-6) and np.allclose(other["difference"], unit * whole["difference"], equal_nan=True)
    moved = sequential_test(values + shift, users, 0.7, arms, ("old", "new"), least=0)
    assert np.allclose(moved["difference"], whole["difference"], atol=1e-6, equal_nan=True)
    assert np.allclose(moved["error"] ** 2, whole["error"] ** 2, atol=1e-6, equal_nan=True)


def test_with_one_visit_a_user_the_error_is_that_of_the_t_tests():
    rng = np.random.default_rng(0)
    values, arms = rng.normal(size=300), np.where(rng.random(300) < 0.3, "old", "new")
    two = sequential_test(values, np.arange(300), 0.1, arms, ("old", "new"), looks=[300]).iloc[0]
    one = sequential_test(values, np.arange(300), 0.1, looks=[300]).iloc[0]
    assert two["difference"] / two["error"] == pytest.approx(ttest_ind(values[arms == "new"], values[arms == "old"], equal_var=False).statistic)
    assert one["difference"] / one["error"] == pytest.approx(ttest_1samp(values, 0).statistic)


def test_looks_count_from_enough_effective_givers_in_both_arms():
    users, arms = np.arange(400), np.tile(["old", "new"], 200)
    table = sequential_test(np.ones(400) + 1e-3 * (users % 7), users, 0.1, arms, ("old", "new"), least=50)
    assert np.isinf(table["high"][98]) and np.isfinite(table["high"][102])
    giants = np.where(users < 2, 1_000.0, 1.0)  # one fortune in each arm: some six givers, whoever else comes
    assert (sequential_test(giants, users, 0.1, arms, ("old", "new"), least=10)["p"] == 1).all()
    rare = np.where(users == 399, 0.0, np.arange(400) % 4 == 0)  # nobody of the new arm gives anything
    assert (sequential_test(rare, users, 0.1, arms, ("old", "new"), least=1)["p"] == 1).all()


def visits(rng, people=300, each=10):
    """Users with tastes of their own, their clicks, and the arm of each visit: nothing to find."""
    users = rng.permutation(np.repeat(np.arange(people), each))
    clicks = (rng.random(len(users)) < rng.beta(0.5, 4.5, people)[users]).astype(float)
    return clicks, users, np.where(rng.permutation(people) < people // 2, "old", "new")[users]


def false_alarms(tests, seed=0, least=30):
    """Tests without an effect that were significant at one look, at any look, and by the always-valid p."""
    rng, looks, found = np.random.default_rng(seed), np.arange(100, 3_001, 100), np.zeros(3)
    for _ in range(tests):
        clicks, users, arms = visits(rng)
        table = sequential_test(clicks, users, 0.03, arms, ("old", "new"), looks, least=least)
        z = (table["difference"] / table["error"]).abs()
        found += [z.iloc[-1] > 1.96, (z > 1.96).any(), table["p"].iloc[-1] <= 0.05]
    return found.astype(int)


def test_watching_returning_users_keeps_the_error_that_peeking_loses():
    one, any_look, valid = false_alarms(400)
    assert binomtest(one, 400, 0.05).pvalue > 1e-3
    assert any_look > 4 * 0.05 * 400 and valid <= 0.05 * 400


@pytest.mark.slow
def test_error_of_five_thousand_watched_tests():
    one, any_look, valid = false_alarms(5_000, seed=1)
    assert binomtest(one, 5_000, 0.055, alternative="greater").pvalue > 1e-3
    assert any_look > 4 * 0.05 * 5_000 and valid <= 0.05 * 5_000


@pytest.mark.slow
def test_brownian_motion_leaves_the_interval_in_at_most_one_test_of_twenty():
    rng, steps = np.random.default_rng(0), np.geomspace(0.01, 1e6, 2_000)
    crossed = np.zeros(20_000, dtype=bool)
    motion, before = np.zeros(20_000), 0.0
    for information in steps:  # eight powers of ten: nearly all that a test could ever cross
        motion += rng.normal(0, np.sqrt(information - before), 20_000)
        low, high, _ = always_valid(motion / information + 3.0, np.full(20_000, 1 / np.sqrt(information)), 1.0)
        crossed |= (low > 3) | (high < 3)
        before = information
    assert 0.03 < crossed.mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 20_000)


# Drafts


def draft_by_hand(first, second, coins, k):
    """Radlinski, Kurup and Joachims (2008), algorithm 2, with the coins given."""
    page, team_a, team_b, coin = [], set(), set(), iter(coins)
    while len(page) < k:
        a_first = next(coin) == 0 if len(team_a) == len(team_b) else None
        if len(team_a) < len(team_b) or a_first:
            item = next(x for x in first if x not in page)
            team_a.add(item)
        else:
            item = next(x for x in second if x not in page)
            team_b.add(item)
        page.append(item)
    return page, [0 if item in team_a else 1 for item in page]


def two_rankings(seed, requests=6, m=7):
    """Rankings of items that the two share in part, as numbers or as texts."""
    rng = np.random.default_rng(seed)
    first, second = (np.stack([rng.permutation(m + 3)[:m] for _ in range(requests)]) for _ in range(2))
    if seed % 2:
        first, second = (np.array([f"i{n}" for n in range(m + 3)], dtype=object)[ranking] for ranking in (first, second))
    return first, second


@given(seeds, st.integers(1, 7))
def test_a_draft_is_that_of_the_paper(seed, k):
    first, second = two_rankings(seed)
    pages, team = team_draft(first, second, k, np.random.default_rng(seed))
    assert pages.shape == team.shape == (6, k) and pages.dtype == first.dtype
    for row in range(6):
        coins = team[row, ::2]
        page, whose = draft_by_hand(first[row].tolist(), second[row].tolist(), coins, k)
        assert pages[row].tolist() == page and team[row].tolist() == whose
        assert len(set(page)) == k and abs(2 * sum(whose) - k) <= 1
    again = team_draft(first, second, k, np.random.default_rng(seed))
    assert (again[0] == pages).all() and (again[1] == team).all()


@given(seeds, st.integers(1, 7))
def test_of_two_equal_rankers_neither_wins_whatever_shoppers_do(seed, k):
    ranking, rng = two_rankings(seed, requests=1)[0], np.random.default_rng(seed)
    worth = rng.lognormal(size=k) * (rng.random(k) < 0.6)
    drafts = {}
    while len(drafts) < 2 ** -(-k // 2):
        pages, team = team_draft(np.repeat(ranking, 64, axis=0), np.repeat(ranking, 64, axis=0), k, rng)
        assert (pages == ranking[:, :k]).all()
        drafts |= {tuple(row): row for row in team}
    won = np.diff(credit(np.tile(worth, (len(drafts), 1)), np.stack(list(drafts.values()))))[:, 0]
    assert np.allclose(np.sort(won), np.sort(-won)) and np.isclose(won.mean(), 0)


@given(seeds, st.integers(1, 6))
def test_naming_the_rankers_the_other_way_round_turns_the_preference_over(seed, k):
    first, second = (ranking[0].tolist() for ranking in two_rankings(seed, requests=1))
    like = {item: chance for item, chance in zip(sorted({*first, *second}), np.random.default_rng(seed).random(13))}

    def preference(one, other):
        drafts = [draft_by_hand(one, other, coins, k) for coins in itertools.product((0, 1), repeat=k)]
        return np.mean([np.diff(credit([[like[item] for item in page]], [team]))[0, 0] for page, team in drafts])

    assert preference(first, second) == pytest.approx(-preference(second, first))


def test_every_draft_is_as_probable_as_every_other():
    ranking = np.tile(np.arange(6), (8_000, 1))
    _, team = team_draft(ranking, ranking[:, ::-1], 5, np.random.default_rng(0))
    _, counts = np.unique(team, axis=0, return_counts=True)
    assert len(counts) == 8 and chi2_contingency([counts, np.full(8, 1_000)]).pvalue > 1e-4


def test_a_better_order_of_wanted_items_is_preferred():
    rng, n = np.random.default_rng(0), 4_000
    wanted = rng.random((n, 8))
    better, worse = np.argsort(-wanted, axis=1), np.argsort(-(wanted + rng.normal(0, 0.5, (n, 8))), axis=1)
    pages, team = team_draft(worse, better, 5, rng)
    clicks = rng.random((n, 5)) < np.take_along_axis(wanted, pages, axis=1) / np.arange(1, 6)
    earned = credit(clicks, team)
    assert earned.sum() == clicks.sum()
    table = sequential_test(earned[:, 1] - earned[:, 0], np.arange(n), 0.05)
    assert table["p"].iloc[-1] < 0.01 and table["low"].iloc[-1] > 0


# A log


@pytest.fixture(scope="module")
def log():
    truth = simulate(seed=3, n_items=120, n_users=60, n_days=1, requests_per_day=5).truth
    asked = truth.requests(300, seed=1, day=1)
    pages = truth.oracle(asked, k=4)
    return asked, pages, truth.respond(asked, pages, np.full(pages.shape, np.nan), policy="test", seed=2)


@pytest.mark.parametrize("kind", ["click", "cart", "purchase"])
def test_clicks_stand_where_the_items_were_shown(log, kind):
    asked, pages, events = log
    found = page_clicks(events, asked["request_id"], 4, kind)
    done = events[events["kind"] == kind]
    assert found.any() and set(zip(asked["request_id"].to_numpy()[np.nonzero(found)[0]], pages[found])) == set(zip(done["request_id"], done["item_id"]))
    some = asked["request_id"].to_numpy()[[7, 3, 250]]  # some of the requests, in another order, and events told twice
    assert (page_clicks(pd.concat([events, events]).sample(frac=1, random_state=0), some, 4, kind) == found[[7, 3, 250]]).all()


def test_a_request_without_a_click_counts(log):
    asked, _, events = log
    clicks = page_clicks(events, asked["request_id"], 4)
    assert (clicks.sum(axis=1) == 0).any() and clicks.sum() == (events["kind"] == "click").sum()


# What is refused


two = {"values": [1.0, 0.0, 2.0], "users": ["ann", "bo", "ann"], "effect": 1.0}
WRONG = {
    "torn user": (lambda: sequential_test(**two, arms=["old", "new", "new"], compare=("old", "new")), "user 'ann' is in both arms, in 'new' in row 2"),
    "unknown arm": (lambda: sequential_test(**two, arms=["old", "new", "x"], compare=("old", "new")), "'x' in row 2 is neither of"),
    "empty arm": (lambda: sequential_test(**two, arms=["old"] * 3, compare=("old", "new")), "nobody is in 'new'"),
    "no names": (lambda: sequential_test(**two, arms=["old", "new", "old"]), "compare name two of them"),
    "nan": (lambda: sequential_test([1.0, np.nan], ["ann", "bo"], 1.0), "values: nan in row 1"),
    "no user": (lambda: sequential_test([1.0, 1.0], ["ann", None], 1.0), "users: missing in row 1"),
    "too few users": (lambda: sequential_test([1.0, 1.0], ["ann"], 1.0), "users must be one for each observation"),
    "one value": (lambda: sequential_test([1.0], ["ann"], 1.0), "two at least"),
    "effect": (lambda: sequential_test([1.0, 1.0], ["ann", "bo"], 0.0), "effect must be positive"),
    "alpha": (lambda: always_valid(1.0, 1.0, 1.0, alpha=1.0), "alpha lie between 0 and 1"),
    "looks down": (lambda: sequential_test([1.0, 1.0], ["ann", "bo"], 1.0, looks=[2, 1]), "ascending, from 1 to 2"),
    "looks beyond": (lambda: sequential_test([1.0, 1.0], ["ann", "bo"], 1.0, looks=[3]), "ascending, from 1 to 2"),
    "looks by halves": (lambda: sequential_test([1.0, 1.0], ["ann", "bo"], 1.0, looks=[1.5]), "whole numbers"),
    "shares": (lambda: assign(["ann"], "x", {"old": 0.5, "new": 0.4}), "sum to 1"),
    "one share": (lambda: assign(["ann"], "x", {"old": 1.0}), "of two arms or more"),
    "who": (lambda: assign(["ann", np.nan], "x", half), "users: missing in row 1"),
    "strange arm": (lambda: sample_ratio(["old", "x"], half), "'x' is none of"),
    "nobody": (lambda: sample_ratio([], half), "no user to count"),
    "lengths": (lambda: team_draft([["a", "b"]], [["a", "b", "c"]], 2, None), r"first \(1, 2\) and second \(1, 3\)"),
    "long page": (lambda: team_draft([["a", "b"]], [["a", "b"]], 3, None), "a page of 3 cannot be drafted from rankings of 2"),
    "twice": (lambda: team_draft([["a", "b"]], [["b", "b"]], 2, None), "second: request 0 ranks an item twice"),
    "missing item": (lambda: team_draft([["a", None]], [["a", "b"]], 2, None), "first: an item is missing in request 0"),
    "shapes": (lambda: credit([[1, 0]], [[1]]), r"clicks \(1, 2\) and team \(1, 1\)"),
    "third team": (lambda: credit([[1, 0]], [[1, 2]]), "teams be 0 and 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_says_nothing_is_refused(case):
    call, message = WRONG[case]
    with pytest.raises(OnlineTestError, match=message):
        call()


def test_a_log_that_does_not_fit_is_refused(log):
    asked, _, events = log
    ids = asked["request_id"].to_numpy()
    with pytest.raises(OnlineTestError, match="kind is click, cart or purchase, not 'buy'"):
        page_clicks(events, ids, 4, "buy")
    with pytest.raises(OnlineTestError, match="stands twice"):
        page_clicks(events, ids[[0, 0]], 4)
    with pytest.raises(OnlineTestError, match="'nobody' is not in the log"):
        page_clicks(events, [ids[0], "nobody"], 4)
    with pytest.raises(OnlineTestError, match="of a page of 1"):
        page_clicks(events, ids, 1)
