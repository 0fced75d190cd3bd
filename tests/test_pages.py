"""Pages and their propensities: properties that hold for any scores."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.data.pages import page_propensities, plackett_luce


def enumerate_pages(scores, k):
    """P(candidate at place), (candidates, k), by summing the probabilities of all pages."""
    weight = np.exp(scores - np.max(scores))
    table = np.zeros((len(scores), k))
    for page in itertools.permutations(np.flatnonzero(weight), k):
        left, probability = weight.copy(), 1.0
        for candidate in page:
            probability *= left[candidate] / left.sum()
            left[candidate] = 0
        table[list(page), range(k)] += probability
    return table


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-15, 15), min_size=2, max_size=5), st.data())
def test_equals_enumeration(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    pages = np.array(list(itertools.permutations(range(len(scores)), k)))
    expected = enumerate_pages(np.array(scores), k)[pages, np.arange(k)]
    found = page_propensities(np.tile(scores, (len(pages), 1)), pages)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.floats(0.1, 8), st.integers(0, 10_000))
def test_each_place_is_taken_once(candidates, spread, seed):
    scores = np.random.default_rng(seed).normal(size=candidates) * spread
    k = min(10, candidates)
    ladder = np.stack([np.roll(np.arange(candidates), -shift)[:k] for shift in range(candidates)])
    table = page_propensities(np.tile(scores, (candidates, 1)), ladder)
    np.testing.assert_allclose(table.sum(0), 1, atol=1e-10)
    assert (table >= 0).all()


def test_frequencies_of_fifty_candidates():
    rng = np.random.default_rng(3)
    scores, n = rng.normal(size=50), 40_000
    pages = plackett_luce(np.tile(scores, (n, 1)), 10, rng)
    weight = 1 / page_propensities(np.tile(scores, (200, 1)), pages[:200])
    assert (weight >= 1).all()
    propensity = page_propensities(np.tile(scores, (1, 1)), pages[:1])[0]
    seen = (pages == pages[0]).mean(0)
    assert (abs(seen - propensity) < 5 * np.sqrt(propensity * (1 - propensity) / n)).all()


def test_what_does_not_matter():
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(70, 20)) * 2
    pages = plackett_luce(scores, 6, rng)
    base = page_propensities(scores, pages)
    np.testing.assert_allclose(page_propensities(scores + 1000, pages), base, rtol=1e-9)
    np.testing.assert_allclose(page_propensities(scores * 3, pages, temperature=3), base, rtol=1e-9)
    np.testing.assert_allclose(page_propensities(scores[5:6], pages[5:6]), base[5:6], rtol=1e-9)
    order = rng.permutation(20)
    np.testing.assert_allclose(page_propensities(scores[:, order], np.argsort(order)[pages]), base, rtol=1e-9)
    more = np.concatenate([scores, np.full((70, 5), -np.inf)], axis=1)
    np.testing.assert_allclose(page_propensities(more, pages), base, rtol=1e-9)


def test_pages_hold_offered_candidates_once():
    scores = np.random.default_rng(5).normal(size=(300, 15))
    scores[:, ::3] = -np.inf
    pages = plackett_luce(scores, 10, np.random.default_rng(0))
    assert np.isfinite(np.take_along_axis(scores, pages, axis=1)).all()
    assert all(len(set(page)) == 10 for page in pages.tolist())
    assert (pages == plackett_luce(scores, 10, np.random.default_rng(0))).all()
    assert not (pages == plackett_luce(scores, 10, np.random.default_rng(1))).all()


def test_cold_policy_sorts():
    scores = np.random.default_rng(6).permuted(np.tile(np.arange(12.0), (5, 1)), axis=1)
    pages = plackett_luce(scores, 12, np.random.default_rng(0), temperature=0.03)
    assert (pages == np.argsort(-scores, axis=1)).all()
    np.testing.assert_allclose(page_propensities(scores, pages, temperature=0.03), 1, atol=1e-9)


def test_no_requests():
    assert plackett_luce(np.empty((0, 5)), 3, np.random.default_rng(0)).shape == (0, 3)
    assert page_propensities(np.empty((0, 5)), np.empty((0, 3), dtype=int)).shape == (0, 3)


@pytest.mark.parametrize("scores, k, message", [
    ([0.0, 1.0], 1, "requests, candidates"),
    ([[0.0, np.nan]], 1, "request 0, candidate 1"),
    ([[0.0, np.inf]], 1, "only finite"),
    ([[0.0, 1.0]], 3, "offers 2"),
    ([[0.0, 1.0]], 0, "1 <= k"),
])
def test_scores_that_are_refused(scores, k, message):
    with pytest.raises(ValueError, match=message):
        plackett_luce(np.array(scores), k, np.random.default_rng(0))


@pytest.mark.parametrize("pages, message", [
    ([[0], [1]], "with 1 requests"),
    ([[0, 3]], "from 0 to 2"),
    ([[0, 0]], "twice"),
    ([[0, 2]], "not offered"),
])
def test_pages_that_are_refused(pages, message):
    with pytest.raises(ValueError, match=message):
        page_propensities(np.array([[0.0, 1.0, -np.inf]]), np.array(pages))


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature must be positive"):
        plackett_luce([[0.0, 1.0]], 1, np.random.default_rng(0), temperature=0)
