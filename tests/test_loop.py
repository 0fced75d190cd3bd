"""The loop's promises: unbiased targets, reproducible rounds, logs that can be trained on, and a gate that stops what is broken."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from ecomrec.data import sources
from ecomrec.data.cleaning import clean
from ecomrec.data.pages import page_propensities, plackett_luce
from ecomrec.data.simulator import load_truth
from ecomrec.feedback.loop import (
    WORTH, Candidates, Gate, Learner, Lesson, Pages, clicked_gain, doubted, fit_ranker, look_up, off_policy, page_scale, quality, rounds_of, signals, targets,
)
from ecomrec.model.text import DEFAULT_ENCODER

PRODUCTS = pd.DataFrame({"item_id": ["a", "b", "c"]})


def _pages(rows, features=None):
    rows = np.asarray(rows)
    requests = pd.DataFrame({"request_id": [f"r{i}" for i in range(len(rows))]})
    features = np.zeros((*rows.shape, 1)) if features is None else features
    return Pages(requests, rows, features, tuple(f"f{n}" for n in range(features.shape[2])), np.ones(rows.shape, dtype=bool))


def _events(rows):
    return pd.DataFrame(rows, columns=["request_id", "item_id", "kind", "propensity", "position", "stars"]).astype({"propensity": float, "position": float, "stars": float})


def _logged(n, seen, seed=0):
    """Pages of two places out of three items, the first liked by the old policy and the last by the shoppers."""
    rng = np.random.default_rng(seed)
    scores, wanted = np.tile([2.0, 0.0, -1.0], (n, 1)), np.array([0.2, 0.4, 0.6])
    drawn = plackett_luce(scores, 2, rng)
    clicked = rng.random(drawn.shape) < wanted[drawn] * seen
    shown = pd.DataFrame({"request_id": np.repeat([f"r{i}" for i in range(n)], 2), "item_id": PRODUCTS["item_id"].to_numpy()[drawn.ravel()], "kind": "impression",
                          "propensity": page_propensities(scores, drawn).ravel(), "position": np.tile([1.0, 2.0], n), "stars": np.nan})
    return pd.concat([shown, shown[clicked.ravel()].assign(kind="click")]), drawn, clicked, wanted


def test_weighted_clicks_estimate_what_is_wanted_whatever_was_shown():
    seen = np.array([1.0, 0.4])
    events, _, _, wanted = _logged(40_000, seen)
    pages = _pages(np.tile(np.arange(3), (40_000, 1)))
    corrected, naive = (targets(pages, events, PRODUCTS, clip).weights.mean(axis=0) for clip in (1e9, None))
    assert np.allclose(corrected / corrected.sum(), wanted / wanted.sum(), atol=0.02) and np.argmax(naive) == 0


def test_within_the_page_the_ranker_finds_utilities_and_places():
    seen = np.array([1.0, 0.4])
    events, _, _, wanted = _logged(40_000, seen, seed=1)
    rows = np.tile(np.arange(3), (40_000, 1))
    one_hot = np.broadcast_to(np.eye(3), (40_000, 3, 3))
    ranker = fit_ranker([targets(_pages(rows, one_hot), events, PRODUCTS, shown=True)])
    weight = ranker.table()["per_unit"]
    odds = np.exp(weight[["f0", "f1", "f2"]].to_numpy())
    # With two clicks on some pages the odds are not exactly those of the chances, but near.
    assert np.allclose(odds / odds[0], wanted / wanted[0], rtol=0.15) and np.isclose(np.exp(weight["place 2"]), 0.4, rtol=0.15)


def _lesson(seed, weights, n=400):
    """Pages of four items of which one is chosen by these weights of three features."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 4, 3))
    chosen = (features @ weights + rng.gumbel(size=(n, 4))).argmax(axis=1)
    pages = _pages(np.tile(np.arange(4), (n, 1)), features)
    return Lesson(pages, np.eye(4)[chosen], pages.offered, np.zeros((n, 4), dtype="int16"))


def test_the_prior_is_doubted_when_and_where_the_world_changes():
    before, after = np.array([1.0, -0.5, 0.5]), np.array([1.0, 0.3, 0.5])
    prior = fit_ranker([_lesson(0, before)])
    alarms = [doubted(prior, [_lesson(seed, before)], level=0.05) is not prior for seed in range(1, 61)]
    assert sum(alarms) <= 9  # of the 3 expected; 10 and more have a probability of 0.0006
    loose = doubted(prior, [_lesson(1, after)])
    grown = np.diag(loose.covariance) - np.diag(prior.covariance)
    assert (grown >= 0).all() and grown.argmax() == 1 and (loose.weights == prior.weights).all()
    learned = [fit_ranker([_lesson(1, after)], believed).table()["per_unit"]["f1"] for believed in (prior, loose)]
    assert abs(learned[1] - after[1]) < abs(learned[0] - after[1])


def test_targets_are_clipped_and_strangers_left_out():
    shown = [("r0", "a", "impression", 0.01, 1, None), ("r0", "z", "impression", 0.5, 2, None), ("r1", "b", "impression", 0.5, 1, None), ("r9", "b", "impression", 0.5, 1, None)]
    events = _events([*shown, *((*row[:2], "click", None, *row[4:]) for row in shown)])
    told = {clip: targets(_pages([[2, 0], [0, 1]]), events, PRODUCTS, clip=clip).weights for clip in (20, 1000)}
    assert [np.argwhere(weights > 0).tolist() for weights in told.values()] == [[[0, 1], [1, 1]]] * 2
    assert np.isclose(told[20][0, 1] / told[20][1, 1], 20 / 2) and np.isclose(told[1000][0, 1] / told[1000][1, 1], 100 / 2)
    assert targets(_pages([[2, 2]]), events, PRODUCTS).weights.tolist() == [[0, 0]]


def test_where_a_click_stood_must_be_known_to_compare_it_on_its_page():
    shown = [("r0", "a", "impression", 0.5, None, None), ("r0", "b", "impression", 0.5, 2, None), ("r0", "c", "impression", 0.5, 3, None), ("r0", "c", "click", None, 3, None)]
    lesson = targets(_pages([[0, 1, 2]]), _events([*shown, ("r0", "a", "click", None, None, None)]), PRODUCTS, shown=True)
    assert lesson.weights.tolist() == [[0, 0, 1]] and lesson.offered.tolist() == [[False, True, True]]


def test_a_click_without_propensity_cannot_be_weighted():
    events = _events([("r0", "a", "impression", None, 1, None), ("r0", "a", "click", None, 1, None)])
    assert targets(_pages([[0]]), events, PRODUCTS).weights.sum() == 1
    with pytest.raises(ValueError, match="impression of request r0 has no propensity"):
        targets(_pages([[0]]), events, PRODUCTS, clip=5)


def test_signals_add_up_and_end_at_nothing():
    events = _events([("r0", item, "impression", 0.5, n + 1, None) for n, item in enumerate("abc")] + [
        ("r0", "a", "click", None, 1, None), ("r0", "a", "purchase", None, 1, None), ("r0", "a", "rating", None, None, 5),
        ("r0", "b", "click", None, 2, None), ("r0", "b", "return", None, 2, None)])
    told = signals(events, WORTH).set_index("item_id")
    assert told["target"].to_dict() == {"a": 3.0, "b": 0.0, "c": 0.0} and told.loc["a", "rating"] == 2
    assert signals(events, {"click": 1.0})["target"].sum() == 2
    assert signals(events[events["kind"] != "impression"], {"click": 1.0})["item_id"].tolist() == ["a", "b"]  # a log that keeps clicks only


def test_the_best_page_has_no_regret_and_the_worst_most():
    gains = np.array([[0.5, 0.1, 0.0, 0.4]])
    rows = np.array([[0, 1, 2, 3]])
    best, worst = quality(gains, rows, gains, k=2), quality(-gains, rows, gains, k=2)
    assert best["ndcg@2"][0] == 1 and best["regret"][0] == 0 and np.isclose(worst["regret"][0], 0.8) and worst["ndcg@2"][0] < 0.2


def test_equal_scores_are_ordered_alike_by_both_numbers():
    gains, rows = np.array([[1.0, 0.0, 0.0]]), np.array([[0, 1, 2]])
    table = quality(np.zeros((1, 3)), rows, gains, k=1)
    assert table["ndcg@1"][0] == 0 and table["regret"][0] == 1


def test_both_estimates_of_the_gate_are_unbiased():
    events, drawn, clicked, wanted = _logged(60_000, np.array([1.0, 0.4]), seed=2)
    logged = events[events["kind"] == "impression"]["propensity"].to_numpy().reshape(drawn.shape)
    scores = np.tile([0.0, 0.5, 1.5], (len(drawn), 1))
    gain = clicked_gain(scores, drawn, logged, clicked, clip=1e9)
    truth = (wanted / np.log2([4, 3, 2])).sum() * 1.4
    assert gain.low < truth < gain.high
    pages = plackett_luce(scores, 2, np.random.default_rng(3))
    earned = (wanted[pages] * [1.0, 0.4]).sum(axis=1).mean()
    assert abs(off_policy(scores, drawn, logged, clicked.astype(float)).value - earned) < 0.03


def test_what_is_no_candidate_is_never_shown():
    places, scores = np.array([[0, -1], [-1, 2]]), np.zeros((2, 3))
    found = off_policy(scores, places, np.full((2, 2), 0.5), np.ones((2, 2)))
    assert np.isclose(found.value, (1 / 3) / 0.5)


def test_the_scale_of_a_page_follows_its_scores():
    scores = np.array([[0.0, 1.0, -np.inf], [2.0, 4.0, 3.0]])
    assert np.isclose(page_scale(3 * scores), 3 * page_scale(scores)) and page_scale(np.zeros((2, 3))) == 1


@pytest.fixture(scope="module")
def world():
    shop, _ = clean(sources.load("shop"))
    return shop, load_truth(sources.folder("shop")), Candidates(shop.products, DEFAULT_ENCODER, n=20)


def _learner(world, **more):
    return Learner(world[0], world[2], partial(targets, shown=True), "x", first=partial(targets, clip=80.0), **more)


def test_rounds_repeat_to_the_bit_and_the_gate_sees_what_nobody_was_taught(world):
    runs = []
    for _ in range(2):
        learner = _learner(world, warm=True)
        turns = rounds_of(learner, world[1], [31, 32, 33], 300, 5, Gate(margin=0.5))
        runs.append([(turn.number, turn.proposal.ranker.weights.copy(), len(learner.events), turn.verdict.promoted, turn.held, turn.proposal.lessons) for turn in turns])
    for (n, weights, size, promoted, held, lessons), (m, others, length, same, _, _) in zip(*runs):
        assert (n, size, promoted) == (m, length, same) and np.array_equal(weights, others)
        taught = pd.concat([lesson.pages.requests for lesson in lessons])
        assert not taught["request_id"].isin(held.requests["request_id"]).any() and taught["ts"].max() < held.requests["ts"].min()
        assert taught["request_id"].is_unique


def test_served_pages_are_logged_with_their_probabilities(world):
    shop, truth, _ = world
    learner = _learner(world)
    asked = truth.requests(30, seed=3, day=31)
    log = shop.events[(shop.events["kind"] == "search") & shop.events["query"].notna()].reset_index(drop=True)
    learner.learn(learner.look_up(log))
    learner.promote(learner.propose())
    items, propensities = learner.fill(learner.look_up(asked), seed=3)
    events = truth.respond(asked, items, propensities, policy="x-1", seed=3)
    shown = events[events["kind"] == "impression"].sort_values(["request_id", "position"])
    assert len(shown) == items.size and shown["propensity"].between(0, 1, inclusive="right").all() and set(shown["policy"]) == {"x-1"}
    first = shown[shown["request_id"] == asked["request_id"][0]]
    assert first["item_id"].tolist() == items[0].tolist() and np.allclose(first["propensity"].astype(float), propensities[0])
    for policy, expected in (("greedy", [1.0]), ("thompson", [])):
        learner.policy = policy
        assert np.unique(learner.fill(learner.look_up(asked), seed=3)[1][~np.isnan(learner.fill(learner.look_up(asked), seed=3)[1])]).tolist() == expected


@pytest.fixture(scope="module")
def at_the_gate(world):
    """A learner after two rounds, and the last round."""
    *_, turn = rounds_of(_learner(world), world[1], [31, 32], 3000, 3, Gate())
    return turn


@pytest.mark.parametrize(("breaks", "check"), [
    (lambda proposal, turn: replace(proposal, items=proposal.items[::-1]), "catalogue"),
    (lambda proposal, turn: replace(proposal, lessons=(*proposal.lessons, proposal.lessons[-1])), "once"),
    (lambda proposal, turn: replace(proposal, lessons=(*proposal.lessons, turn.learner.teach(turn.held, turn.learner.events, turn.learner.shop.products))), "leaks"),
    (lambda proposal, turn: replace(proposal, ranker=proposal.whole), "names"),
    (lambda proposal, turn: replace(proposal, sees=lambda pages: pages.features[::-1]), "features"),
    (lambda proposal, turn: replace(proposal, sees=lambda pages: pages.features + np.float32(100)), "scales"),
    (lambda proposal, turn: replace(proposal, sees=lambda pages: pages.features * np.nan), "finite"),
])
def test_the_gate_names_what_is_wrong(at_the_gate, breaks, check):
    turn = at_the_gate
    verdict = Gate()(breaks(turn.proposal, turn), turn.learner, turn.held)
    assert not verdict.promoted and check in verdict.reasons and "off-policy" not in verdict.checks.index


def test_the_gate_lets_itself_pass_and_no_constant_or_reversed_order(at_the_gate):
    turn, ranker = at_the_gate, at_the_gate.learner.ranker
    same = replace(turn.proposal, ranker=ranker)
    assert Gate(margin=1e-6)(same, turn.learner, turn.held).promoted
    for factor, reasons in ((0.0, ["varied"]), (0.001, ["spread"]), (50.0, ["spread"]), (2.0, [])):
        other = ranker.marginal(ranker.names)
        other.weights = factor * ranker.weights
        assert Gate()(replace(turn.proposal, ranker=other), turn.learner, turn.held).reasons == reasons
    other.weights = -ranker.weights
    assert "off-policy" in Gate()(replace(turn.proposal, ranker=other), turn.learner, turn.held).reasons


def test_the_gate_needs_drawn_pages(world):
    with pytest.raises(ValueError, match="a thompson policy gives none"):
        next(rounds_of(_learner(world, policy="thompson"), world[1], [31, 32], 300, 5, Gate()))


def test_a_day_without_a_click_teaches_nothing(world):
    learner = _learner(world, warm=True)
    *_, turn = rounds_of(learner, world[1], [31, 32], 300, 5)
    served = turn.learner.ranker.weights.copy()
    learner.learn(learner.known[-1].pages, until=0)
    assert not learner.fresh[-1].weights.any() and np.array_equal(learner.propose().ranker.weights, served)


def test_what_is_refused_does_not_serve(world):
    learner, nothing = _learner(world), Gate(margin=-0.9)  # whoever is not almost twice as good
    turns = [(turn.verdict.promoted, learner.ranker) for turn in rounds_of(learner, world[1], [31, 32], 300, 5, nothing)]
    assert [promoted for promoted, _ in turns] == [True, False] and turns[0][1] is turns[1][1]


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


def test_later_events_do_not_reach_a_page(world):
    shop, truth, find = world
    asked = truth.requests(20, seed=4, day=20)
    whole = look_up(asked, shop, find, shop.events)
    cut = look_up(asked, shop, find, shop.events[shop.events["ts"] < asked["ts"].max()])
    assert np.array_equal(whole.features, cut.features)
