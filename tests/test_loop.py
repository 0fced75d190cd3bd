"""The loop's promises: unbiased targets, reproducible rounds, logs that can be trained on."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

from ecomrec.data import sources
from ecomrec.data.cleaning import clean
from ecomrec.data.pages import page_propensities, plackett_luce
from ecomrec.data.simulator import load_truth
from ecomrec.feedback.loop import Arm, Candidates, click_weights, quality, rounds_of
from ecomrec.model.text import DEFAULT_ENCODER

PRODUCTS = pd.DataFrame({"item_id": ["a", "b", "c"]})


def _weights(rows, events, clip):
    requests = pd.DataFrame({"request_id": [f"r{i}" for i in range(len(rows))]})
    return click_weights(requests, np.asarray(rows), events, PRODUCTS, clip)


def _events(rows):
    return pd.DataFrame(rows, columns=["request_id", "item_id", "kind", "propensity"])


def test_weighted_clicks_estimate_what_is_wanted_whatever_was_shown():
    rng, n = np.random.default_rng(0), 40_000
    scores, wanted, seen = np.tile([2.0, 0.0, -1.0], (n, 1)), np.array([0.2, 0.4, 0.6]), np.array([1.0, 0.4])
    drawn = plackett_luce(scores, 2, rng)
    propensity = page_propensities(scores, drawn)
    clicked = rng.random(drawn.shape) < wanted[drawn] * seen
    shown = pd.DataFrame({"request_id": np.repeat([f"r{i}" for i in range(n)], 2), "item_id": PRODUCTS["item_id"].to_numpy()[drawn.ravel()],
                          "kind": "impression", "propensity": propensity.ravel()})
    events = pd.concat([shown, shown[clicked.ravel()].assign(kind="click")])
    rows = np.tile(np.arange(3), (n, 1))
    corrected = _weights(rows, events, clip=1e9).mean(axis=0) / seen.sum()
    naive = _weights(rows, events, clip=None).mean(axis=0)
    assert np.allclose(corrected, wanted, atol=0.03) and np.argmax(naive) == 0


def test_weights_are_clipped_and_strangers_left_out():
    events = _events([("r0", "a", "impression", 0.01), ("r0", "a", "click", None), ("r0", "z", "impression", 0.5), ("r0", "z", "click", None),
                      ("r9", "b", "impression", 0.5), ("r9", "b", "click", None)])
    assert _weights([[2, 0]], events, clip=20).tolist() == [[0, 20]]
    assert _weights([[2, 1]], events, clip=None).tolist() == [[0, 0]]


def test_a_click_without_propensity_cannot_be_corrected():
    events = _events([("r0", "a", "impression", None), ("r0", "a", "click", None)])
    assert _weights([[0]], events, clip=None).sum() == 1
    with pytest.raises(ValueError, match="impression of request r0 has no propensity"):
        _weights([[0]], events, clip=5)


def test_the_best_page_has_no_regret_and_the_worst_most():
    gains = np.array([[0.5, 0.1, 0.0, 0.4]])
    rows = np.array([[0, 1, 2, 3]])
    best, worst = quality(gains, rows, gains, k=2), quality(-gains, rows, gains, k=2)
    assert best["ndcg@2"][0] == 1 and best["regret"][0] == 0 and np.isclose(worst["regret"][0], 0.8) and worst["ndcg@2"][0] < 0.2


def test_equal_scores_are_ordered_alike_by_both_numbers():
    gains, rows = np.array([[1.0, 0.0, 0.0]]), np.array([[0, 1, 2]])
    table = quality(np.zeros((1, 3)), rows, gains, k=1)
    assert table["ndcg@1"][0] == 0 and table["regret"][0] == 1


@pytest.fixture(scope="module")
def world():
    shop, _ = clean(sources.load("shop"))
    return shop, load_truth(sources.folder("shop")), Candidates(shop.products, DEFAULT_ENCODER, n=20)


def test_rounds_repeat_to_the_bit(world):
    shop, truth, find = world
    runs = [
        [(n, arm.ranker.weights.copy(), len(arm.events)) for n, arm in
         rounds_of(Arm(shop, find, partial(click_weights, clip=80.0), "x"), truth, 2, 60, 31, seed=5)]
        for _ in range(2)
    ]
    for (n, weights, size), (m, others, length) in zip(*runs):
        assert (n, size) == (m, length) and np.array_equal(weights, others)


def test_served_pages_are_logged_with_their_probabilities(world):
    shop, truth, find = world
    arm = Arm(shop, find, partial(click_weights, clip=None), "naive").train()
    asked = truth.requests(30, seed=3, day=31)
    items, propensities = arm.fill(asked, seed=3)
    log = truth.respond(asked, items, propensities, policy="naive-1", seed=3)
    shown = log[log["kind"] == "impression"].sort_values(["request_id", "position"])
    assert len(shown) == items.size and shown["propensity"].between(0, 1, inclusive="right").all() and set(shown["policy"]) == {"naive-1"}
    first = shown[shown["request_id"] == asked["request_id"][0]]
    assert first["item_id"].tolist() == items[0].tolist() and np.allclose(first["propensity"].astype(float), propensities[0])


def test_candidates_do_not_depend_on_what_was_asked_before(world):
    shop, truth, _ = world
    products = shop.products.head(60)
    few = Candidates(products, DEFAULT_ENCODER, n=20)
    queries = truth.queries["query"].head(12).tolist()
    together = few(queries)
    few._found.clear()
    for query in reversed(queries):
        few([query])
    apart = few(queries)
    assert np.array_equal(together[0], apart[0]) and all(np.array_equal(together[1][k], apart[1][k]) for k in ("words", "text"))
