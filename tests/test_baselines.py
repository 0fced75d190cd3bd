"""Counting, ranks and mixtures against their definitions."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sequences import whole_of

from ecomrec.data.sequences import Questions, leave_last_out
from ecomrec.model.baselines import ALS, EASE, GRIDS, CoOccurrence, ItemKNN, Popularity, chance, rank_metrics, target_ranks, tuned
from ecomrec.model.mixture import Mixture, tuned_mixture

for_any = settings(deadline=None, max_examples=40)
histories = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=6)
LOG = whole_of([[0, 1, 2, 3], [0, 1, 2, 4], [5, 0, 1, 2], [6, 7, 0, 1], [1, 2, 3, 0], [8, 9, 8, 9]])


@given(histories, st.integers(0, 1000), st.booleans(), st.integers(1, 3))
@for_any
def test_ranks_are_counted_one_by_one(lists, seed, masked, n_targets):
    whole, rng = whole_of(lists), np.random.default_rng(seed)
    table = rng.integers(0, 4, (len(lists), 10)).astype(np.float32)
    asker = np.sort(rng.integers(0, len(lists), n_targets))
    asked = Questions(whole, asker, rng.integers(0, 10, n_targets))
    found = target_ranks(lambda some: table[[int(user[1:]) for user in some.history.user_ids]], asked, masked)
    for rank, user, target in zip(found, asker, asked.target):
        out = set(lists[user]) if masked else set()
        rivals = [table[user, item] for item in range(10) if item not in out and item != target]
        own = table[user, target]
        expected = math.inf if target in out else 1 + sum(r > own for r in rivals) + sum(r == own for r in rivals) / 2
        assert rank == expected
    table[0, 0] = np.nan
    with pytest.raises(ValueError, match="not a number for user 'u0', item '0'"):
        target_ranks(lambda some: table[[int(user[1:]) for user in some.history.user_ids]], asked, masked)


def test_the_best_order_of_several_targets_earns_one():
    asked = Questions(LOG, np.array([0, 0, 1]), np.array([1, 2, 3]))
    table = rank_metrics(np.array([1.0, 30.0, 3.0]), asked, ks=(10,))
    assert table["recall@10"].to_dict() == {"u0": 0.5, "u1": 1.0} and table["ndcg@10"].to_dict() == pytest.approx({"u0": 1 / (1 + 1 / np.log2(3)), "u1": 0.5})
    assert rank_metrics(np.array([2.0, 1.0, 1.0]), asked, ks=(1, 10)).filter(like="ndcg").eq(1).all(axis=None)
    many = Questions(LOG, np.zeros(5, int), np.arange(5))
    assert rank_metrics(np.arange(1.0, 6), many, ks=(3,))["ndcg@3"].item() == pytest.approx(1), "a page of three cannot hold five"
    assert rank_metrics(np.array([1.0, 30.0, 3.0]), asked, (10,), only=np.array([False, True, False])).index.tolist() == ["u0"]


@pytest.mark.parametrize("masked", [True, False])
def test_chance_is_what_a_random_order_earns(masked):
    asked, rng = leave_last_out(LOG).test, np.random.default_rng(0)
    drawn = [rank_metrics(target_ranks(lambda some: rng.random((len(some), 10)), asked, masked), asked, (3,))["ndcg@3"].mean() for _ in range(2000)]
    assert abs(np.mean(drawn) - chance(asked, masked, k=3)) < 0.01


def test_chance_where_the_page_is_longer_than_the_shop():
    asked = leave_last_out(LOG).test
    assert chance(asked, masked=False, k=50) == pytest.approx(np.mean(1 / np.log2(np.arange(2, 12))))


def test_item_to_item_weights_by_definition():
    lists = [LOG.history(row).tolist() for row in range(len(LOG))]
    directed = CoOccurrence(gap_decay=0.5, norm=1.0).fit(LOG).weights.toarray()
    for i in range(10):
        for j in range(10):
            total = sum(0.5 ** (b - a - 1) for h in lists for a in range(len(h)) for b in range(a + 1, len(h)) if (h[a], h[b]) == (i, j))
            assert directed[i, j] == pytest.approx(total / sum(h.count(i) for h in lists))
    cosine = ItemKNN(neighbours=9).fit(LOG).weights.toarray()
    had = np.array([[i in h for i in range(10)] for h in lists], float)
    norm = np.sqrt(had.sum(axis=0))
    expected = had.T @ had / np.outer(norm, norm)
    np.fill_diagonal(expected, 0)
    assert np.allclose(cosine, expected, atol=1e-6)
    assert np.allclose(np.diag(EASE().fit(LOG).weights), 0)


def test_popularity_fades_with_time():
    timed = whole_of([[0, 0, 1]], times=True)
    object.__setattr__(timed, "ts", np.array([0, 0, 10 * 86_400_000]))
    assert Popularity().fit(timed).counts[:2].tolist() == [2, 1]
    assert Popularity(half_life=10).fit(timed).counts[:2].tolist() == [1, 1]


@pytest.mark.parametrize("kind", GRIDS)
def test_every_baseline_answers_everybody(kind):
    split = leave_last_out(LOG)
    model, setting, quality = tuned(kind, split, masked=False)
    nobody = Questions(LOG.keep(np.zeros(len(LOG.items), bool)), np.array([0]), np.array([1]))
    scores = np.asarray(model.scores(nobody))
    assert scores.shape == (6, 10) and np.isfinite(scores).all() and 0 <= quality <= 1
    assert set(setting) == set(GRIDS[kind]) and all(getattr(model, name) == value for name, value in setting.items())


def test_als_repeats():
    asked = Questions(LOG, np.arange(6), np.zeros(6, int))
    assert np.array_equal(ALS(4).fit(LOG).scores(asked), ALS(4).fit(LOG).scores(asked))


def test_a_mixture_is_no_worse_than_its_parts():
    split = leave_last_out(LOG)
    good, useless = CoOccurrence().fit(split.train), Popularity().fit(whole_of([[9, 8, 7]]))
    mixture, log = tuned_mixture({"good": good, "useless": useless}, split.valid, masked=False, bags=1)
    assert log["added"].iloc[0] == "good" and math.isclose(sum(mixture.weights.values()), 1)
    alone = {name: rank_metrics(target_ranks(Mixture({name: part}, {name: 1.0}).scores, split.valid, False), split.valid, (10,))["ndcg@10"].mean() for name, part in {"good": good, "useless": useless}.items()}
    assert log["ndcg@10"].max() >= max(alone.values()) - 1e-9
    assert isinstance(log, pd.DataFrame) and len(log) == 10
    bagged, log = tuned_mixture({"good": good, "useless": useless}, split.valid, masked=False)
    assert len(log) == 50 and math.isclose(sum(bagged.weights.values()), 1)
    assert log.groupby("bag")["added"].first().nunique() == 2, "here halves of the users differ in which part is the better one"
    assert set(bagged.weights) == {"good", "useless"} and bagged.weights == tuned_mixture({"good": good, "useless": useless}, split.valid, masked=False)[0].weights


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_a_perfect_page_earns_one_in_every_slice(seed):
    rng = np.random.default_rng(seed)
    asker = np.sort(rng.integers(0, 2, 6))
    asked = Questions(LOG, asker, rng.integers(0, 10, 6))
    ranks, only = np.concatenate([1 + rng.permutation((asker == user).sum()) for user in (0, 1)]).astype(float), rng.random(6) < 0.5
    assert np.allclose(rank_metrics(ranks, asked, (3,), only)["ndcg@3"], 1)


def test_who_never_saw_an_item_abstains():
    class Knows:
        def __init__(self, known, scores):
            self.known, self.table = np.array(known), np.array(scores, np.float32)

        def scores(self, asked):
            return np.tile(self.table, (len(asked), 1))

    wide, narrow = Knows([True, True, True, False], [1, 2, 5, 0]), Knows([True, True, False, False], [3, 1, 0, 0])
    questions = leave_last_out(replace(whole_of([[0, 1, 2]]), item_ids=np.array(list("abcd"), object))).test
    (scores,) = Mixture({"wide": wide, "narrow": narrow}, {"wide": 0.5, "narrow": 0.5}).scores(questions)
    of = {name: np.log(part.table / part.table.sum() + 1e-4) for name, part in (("wide", wide), ("narrow", narrow))}
    assert np.allclose(scores[:2], (of["wide"] + of["narrow"])[:2] / 2, atol=1e-5), "both know these"
    assert np.isclose(scores[2], of["wide"][2], atol=1e-5), "the vote of one alone"
    assert scores[3] == scores.min() < -1000, "nobody knows the last"
    mixture, _ = tuned_mixture({"wide": wide, "narrow": narrow}, replace(questions, target=np.array([2])), masked=False)
    assert mixture.weights == {"wide": 1.0}
