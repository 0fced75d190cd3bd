"""Feedback, features of pairs, trees and two stages: what a reader of the notebooks need not see."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.data.artefacts import ArtefactError
from ecomrec.evaluate.metrics import ndcg
from ecomrec.search.index import with_feedback
from ecomrec.search.ranking import ChoiceRanker, LambdaRanker, match_features, mixture_ndcg, rerank, tune_mixture, weight_grid

QUICK = settings(deadline=None, max_examples=25)
COLUMNS = [
    "bm25_title", "bm25_description", "bm25_brand_category", "brand_match", "attribute_match", "title_cover",
    "log_price", "price_within", "rating", "log_ratings", "title_length",
]


def unit(rng: np.random.Generator, rows: int, dimension: int) -> np.ndarray:
    vectors = rng.normal(size=(rows, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# feedback


@given(
    st.integers(1, 5), st.integers(1, 30), st.integers(2, 8), st.integers(0, 40), st.floats(0, 3), st.integers(0, 2**31),
)
@QUICK
def test_feedback_is_the_formula_and_blind_to_the_order_of_items(n_queries, n_items, dimension, depth, weight, seed):
    rng = np.random.default_rng(seed)
    queries, items = unit(rng, n_queries, dimension), unit(rng, n_items, dimension)
    moved = with_feedback(queries, items, depth, weight)
    assert moved.shape == queries.shape and moved.dtype == np.float32
    assert np.allclose(np.linalg.norm(moved, axis=1), 1, atol=1e-5)
    assert np.allclose(with_feedback(queries, items[rng.permutation(n_items)], depth, weight), moved, atol=1e-4)
    for q, found in zip(queries, moved):
        best = items[np.argsort(-(items @ q))[:depth]]
        wanted = q + weight * best.mean(axis=0) if len(best) else q
        assert np.allclose(found, wanted / np.linalg.norm(wanted), atol=1e-4)


@pytest.mark.parametrize("change", [dict(weight=0), dict(depth=0), dict(items=np.zeros((0, 4)))])
def test_feedback_without_weight_depth_or_items_gives_the_queries_back(change):
    rng = np.random.default_rng(0)
    queries = unit(rng, 3, 4)
    moved = with_feedback(**{"queries": queries, "items": unit(rng, 9, 4)} | change)
    assert np.array_equal(moved, queries) and not np.shares_memory(moved, queries)
    assert not np.allclose(with_feedback(queries, unit(rng, 9, 4)), queries)


def test_feedback_of_no_query_is_empty_and_wrong_shapes_are_refused():
    items = unit(np.random.default_rng(0), 9, 4)
    assert with_feedback(np.zeros((0, 4)), items).shape == (0, 4)
    shapes, numbers = [dict(queries=items[0]), dict(queries=items[:, :3])], [dict(depth=-1), dict(weight=-0.1)]
    for wrong in [*shapes, *numbers, dict(weight=np.nan)]:
        with pytest.raises(ValueError):
            with_feedback(**{"queries": items, "items": items} | wrong)


# features of pairs


@pytest.fixture(scope="module")
def products():
    return pd.DataFrame({
        "item_id": ["a", "b", "c", "d"],
        "title": ["Red running shoes", "飞跃 红色跑步鞋", "", "🙂"],
        "description": ["Light shoes for runs", None, "bottle", ""],
        "category": ["Sports > Shoes", "Sports > Shoes", None, ""],
        "brand": ["Swift Feet", "飞跃", None, ""],
        "price": [80.0, 20.0, None, -3.0],
        "rating": [4.0, None, 0.0, np.inf],
        "n_ratings": pd.array([9, None, 0, -1], dtype="Int64"),
        "attributes": [json.dumps({"colour": "red", "size": 42}), json.dumps({"颜色": "红色"}), "no json", None],
    })


QUERIES = pd.Series({"q1": "red shoes by swift feet", "q2": "飞跃 跑步鞋", "q3": "", "q4": "🙂 !?", "q5": "swift"})
PAIRS = pd.DataFrame([(q, x) for q in QUERIES.index for x in "abcd"], columns=["query_id", "item_id"])


def test_features_say_what_their_names_say(products):
    found = match_features(products, QUERIES, PAIRS)
    assert list(found.columns) == COLUMNS and (found.dtypes == "float32").all() and np.isfinite(found.to_numpy()).all()
    at = found.set_index(pd.MultiIndex.from_frame(PAIRS))
    first = at.loc["q1", "a"]
    assert first["brand_match"] == 1
    assert first["title_cover"] == np.float32(2 / 5) and first["attribute_match"] == np.float32(1 / 5)
    assert at.loc[("q5", "a"), "brand_match"] == 0  # half a brand is none
    assert at.loc[("q2", "b"), "brand_match"] == 1 and at.loc[("q2", "b"), "bm25_title"] > 0
    assert first["bm25_title"] > 0 and first["bm25_description"] > 0 and first["bm25_brand_category"] > 0
    assert np.isclose(first["price_within"], np.log(2), atol=1e-6) and at.loc[("q1", "c"), "price_within"] == 0
    assert np.isclose(at.loc[("q1", "c"), "log_price"], (np.log(80) + np.log(20)) / 2)
    assert at.loc["q1"]["rating"].tolist() == [4, 2, 0, 2] and np.isclose(first["log_ratings"], np.log(10))
    assert at.loc["q1"]["title_length"].tolist()[2:] == [0, 0]
    words = COLUMNS[:6]
    assert (at.loc[["q3", "q4"], words] == 0).all(axis=None)


@given(st.permutations(range(len(PAIRS))), st.permutations(range(4)))
@QUICK
def test_features_do_not_know_the_order_of_pairs_and_products(products, pairs, rows):
    shuffled = match_features(products.iloc[list(rows)], QUERIES[::-1], PAIRS.iloc[list(pairs)])
    assert shuffled.index.tolist() == list(pairs)
    pd.testing.assert_frame_equal(shuffled.sort_index(), match_features(products, QUERIES, PAIRS))


@given(st.sets(st.sampled_from(
    ["title", "description", "category", "brand", "price", "rating", "n_ratings", "attributes"]
)))
@QUICK
def test_absent_columns_are_zero_and_change_no_other_feature(products, absent):
    whole = match_features(products, QUERIES, PAIRS)
    found = match_features(products.drop(columns=list(absent)), QUERIES, PAIRS)
    source = {
        "title": ["bm25_title", "title_cover", "title_length"], "description": ["bm25_description"],
        "rating": ["rating"], "brand": ["brand_match"], "price": ["log_price", "price_within"], "n_ratings": ["log_ratings"],
        "attributes": ["attribute_match"], "category": [],
    }
    gone = [name for column in absent for name in source[column]]
    assert (found[gone] == 0).all(axis=None)
    mixed = ["bm25_brand_category"] if absent & {"brand", "category"} else []
    assert found.drop(columns=gone + mixed).equals(whole.drop(columns=gone + mixed))


@given(
    st.text(max_size=30), st.text(max_size=30), st.one_of(st.none(), st.text(max_size=10)),
    st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)),
)
@QUICK
def test_one_pair_of_any_text_and_number_is_finite(query, title, brand, number):
    one = pd.DataFrame({"item_id": ["a"], "title": [title], "brand": [brand], "price": [number], "rating": [number],
                        "n_ratings": [number], "attributes": [brand]})
    found = match_features(one, pd.Series({"q": query}), pd.DataFrame({"query_id": ["q"], "item_id": ["a"]}))
    assert found.shape == (1, len(COLUMNS)) and np.isfinite(found.to_numpy()).all()
    assert found["price_within"].item() == 0 and 0 <= found["title_cover"].item() <= 1


def test_features_refuse_what_cannot_be_matched(products):
    with pytest.raises(ValueError, match="'a' stands there more than once"):
        match_features(pd.concat([products, products]), QUERIES, PAIRS)
    with pytest.raises(ValueError, match="'q1' stands there more than once"):
        match_features(products, pd.concat([QUERIES, QUERIES]), PAIRS)
    with pytest.raises(ValueError, match="'q2' has no text"):
        match_features(products, QUERIES.replace("飞跃 跑步鞋", None), PAIRS)
    with pytest.raises(ValueError, match="item 'z' is not among"):
        match_features(products, QUERIES, PAIRS.replace("c", "z"))
    assert match_features(products, QUERIES, PAIRS[:0]).shape == (0, len(COLUMNS))


# clicks


@given(st.integers(0, 2**31), st.floats(-5, 5))
@QUICK
def test_an_offset_takes_out_what_decided_who_could_be_chosen(seed, shift):
    rng = np.random.default_rng(seed)
    features, known, looks = rng.normal(size=(200, 6, 2)), np.array([1.0, -0.5]), rng.uniform(0.05, 1, size=(200, 6))
    chosen = looks * np.exp(features @ known)
    expected = chosen / chosen.sum(axis=1, keepdims=True)  # shares of the clicks, without noise
    fit = lambda **more: ChoiceRanker(["a", "b"], decay=0).fit(features, expected, **more)
    corrected = fit(offset=np.log(looks) + shift * rng.normal(size=(200, 1)))  # what all of a page share says nothing
    assert np.allclose(corrected.weights / corrected.spread, known, atol=1e-4)
    assert np.abs(fit().weights / corrected.spread - known).max() > 1e-3
    assert np.array_equal(fit(offset=np.zeros((200, 6))).weights, fit().weights)


def test_an_offset_is_refused_where_it_does_not_fit_and_unread_where_nothing_is_offered():
    features, clicks = np.random.default_rng(0).normal(size=(4, 3, 1)), np.eye(3)[[0, 1, 0, 1]]
    there = np.ones((4, 3), dtype=bool)
    there[:, 2] = False
    nothing = np.where(there, 0.0, -np.inf)
    assert np.array_equal(*(ChoiceRanker(["a"]).fit(features, clicks, there, offset).weights for offset in (None, nothing)))
    for wrong in (np.zeros((4, 2)), np.zeros(3), np.full((4, 3), np.nan), nothing):
        with pytest.raises(ValueError, match="offset: shape"):
            ChoiceRanker(["a"]).fit(features, clicks, None, wrong)


# trees


@pytest.fixture(scope="module")
def shelves():
    """Forty queries of ten products; in one half of the queries the cheap ones are good, in the other the dear ones."""
    rng = np.random.default_rng(0)
    features = pd.DataFrame({"kind, \"of\" [q]": np.repeat(np.arange(40) % 2, 10), "price": rng.uniform(size=400)})
    asked = np.repeat([f"q{n:02}" for n in range(40)], 10)
    wanted = pd.Series(np.where(features.iloc[:, 0] == 1, features["price"], -features["price"]))
    return features, np.digitize(wanted.groupby(asked).rank(), [6, 9]), asked


def test_trees_learn_what_can_be_separated(shelves):
    features, grades, asked = shelves
    ranker = LambdaRanker(trees=200).fit(features, grades, asked)
    scores = ranker.scores(features)
    assert ndcg(scores.reshape(40, 10), (2.0**grades - 1).reshape(40, 10)).mean() > 0.99
    table = ranker.importance()
    assert np.isclose(table["gain"].sum(), 1) and set(table.index) == set(features.columns) and table["splits"].min() > 0


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=8)
def test_trees_do_not_know_the_order_of_rows_and_columns(shelves, seed):
    features, grades, asked = shelves
    order = np.random.default_rng(seed).permutation(len(features))
    one = LambdaRanker(trees=10).fit(features, grades, asked)
    other = LambdaRanker(trees=10).fit(features.iloc[order, ::-1], grades[order], asked[order])
    assert other.booster.model_to_string() == one.booster.model_to_string()
    assert np.array_equal(other.scores(features.iloc[order]), one.scores(features)[order])


def test_same_seed_same_trees_on_any_number_of_threads(shelves):
    one, two = (LambdaRanker(trees=10, num_threads=n).fit(*shelves).scores(shelves[0]) for n in (1, 2))
    assert np.array_equal(one, two) and len(np.unique(one)) > 3


def test_a_saved_ranker_is_equal_verified_and_no_pickle(shelves, tmp_path):
    ranker = LambdaRanker(trees=20, leaves=5, seed=3).fit(*shelves)
    ranker.save(tmp_path / "ranker")
    again = LambdaRanker.load(tmp_path / "ranker")
    assert np.array_equal(again.scores(shelves[0]), ranker.scores(shelves[0])) and again.settings == ranker.settings
    pd.testing.assert_frame_equal(again.importance(), ranker.importance())
    again.save(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"config.json", "trees.txt", "manifest.json"}
    assert LambdaRanker.load(tmp_path / "copy").names == ranker.names
    for name in ("config.json", "trees.txt"):
        ranker.save(tmp_path / name)
        data = bytearray((tmp_path / name / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / name / name).write_bytes(data)
        with pytest.raises(ArtefactError, match=name):
            LambdaRanker.load(tmp_path / name)
    with pytest.raises(ArtefactError):
        LambdaRanker.load(tmp_path / "nothing here")


@pytest.mark.parametrize(("change", "message"), [
    (dict(grades=[1] * 400), "no query has two different ones"),
    (dict(query_ids=[f"q{n}" for n in range(400)]), "no query has two different ones"),
    (dict(grades=[0.5] + [1] * 399), "whole numbers"),
    (dict(grades=[-1] + [1] * 399), "whole numbers"),
    (dict(grades=[np.nan] + [1] * 399), "whole numbers"),
    (dict(grades=[31] + [1] * 399), "whole numbers"),
    (dict(grades=[1, 0]), "give one for each"),
    (dict(query_ids=["q1"]), "give one for each"),
    (dict(features=pd.DataFrame({"price": [np.nan] + [1.0] * 399})), "'price' of row 0 is not finite"),
])
def test_what_cannot_be_learned_from_is_refused(shelves, change, message):
    arguments = dict(zip(("features", "grades", "query_ids"), shelves)) | change
    with pytest.raises(ValueError, match=message):
        LambdaRanker().fit(**arguments)


def test_what_cannot_be_scored_is_refused(shelves, tmp_path):
    features = shelves[0]
    for verb, arguments in {"scores": [features], "importance": [], "save": [tmp_path / "x"]}.items():
        with pytest.raises(ValueError, match="not learned yet"):
            getattr(LambdaRanker(), verb)(*arguments)
    assert not (tmp_path / "x").exists()
    ranker = LambdaRanker(trees=2).fit(*shelves)
    assert ranker.scores(features[:0]).shape == (0,) and ranker.scores(features[:1]).shape == (1,)
    with pytest.raises(ValueError, match="missing .'price'."):
        ranker.scores(features.drop(columns="price"))
    with pytest.raises(ValueError, match="unknown .'stock'."):
        ranker.scores(features.assign(stock=1))
    with pytest.raises(ValueError, match="needed once"):
        ranker.scores(pd.concat([features, features[["price"]]], axis=1))
    with pytest.raises(ValueError, match="row 7 is not finite"):
        ranker.scores(features.assign(price=features["price"].where(features.index != 7)))


# two stages


LEVELS = st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0])


SECONDS = st.sampled_from([-np.inf, -1.0, 0.0, 2.0])


@given(st.lists(st.tuples(LEVELS, SECONDS), min_size=1, max_size=15), st.integers(0, 20))
@QUICK
def test_rerank_is_the_sorted_list_in_two_parts(pairs, depth):
    first, second = (np.array([column]) for column in zip(*pairs))
    found = rerank(first, second, depth)[0]
    assert (np.isneginf(found) == np.isneginf(first[0])).all()
    open_to = [n for n in range(len(pairs)) if pairs[n][0] > -np.inf]
    cut = sorted((pairs[n][0] for n in open_to), reverse=True)[:depth][-1:] or [np.inf]
    keys = {n: (pairs[n][0] >= cut[0], pairs[n][1] if pairs[n][0] >= cut[0] else 0, pairs[n][0]) for n in open_to}
    for a in open_to:
        for b in open_to:
            assert (found[a] > found[b]) == (keys[a] > keys[b])


@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 25), st.integers(0, 2**31))
@QUICK
def test_rerank_keeps_its_ends_and_moves_with_its_items(n_queries, n_items, depth, seed):
    rng = np.random.default_rng(seed)
    first, second = (rng.permuted(np.tile(np.arange(n_items), (n_queries, 1)), axis=1).astype(float) for _ in range(2))
    found = rerank(first, second, depth)
    assert np.array_equal(np.sort(found, axis=1), np.tile(np.arange(n_items), (n_queries, 1)))
    assert np.array_equal(rerank(first, second, 0), first) and np.array_equal(rerank(first, second, n_items), second)
    head = np.argsort(-first, axis=1)[:, :depth]
    assert np.array_equal(np.sort(np.argsort(-found, axis=1)[:, :depth]), np.sort(head))
    order = rng.permutation(n_items)
    assert np.array_equal(rerank(first[:, order], second[:, order], depth), found[:, order])
    unread = np.full(first.shape, np.nan)
    np.put_along_axis(unread, head, np.take_along_axis(second, head, axis=1), axis=1)
    assert np.array_equal(rerank(first, unread, depth), found)


def test_rerank_with_ties_and_errors():
    first = np.array([[3.0, 2.0, 2.0, 1.0]])
    second = np.array([[0.0, 1.0, 5.0, 9.0]])
    assert rerank(first, second, 2).tolist() == [[1, 2, 3, 0]]  # what ties at the cut comes in
    assert rerank(first, np.zeros((1, 4)), 4).tolist() == [[2, 1, 1, 0]]
    with pytest.raises(ValueError, match="must be equal"):
        rerank(first, first[:, :3], 2)
    with pytest.raises(ValueError, match="not negative"):
        rerank(first, first, -1)
    with pytest.raises(ValueError, match="query 0, item 1: .* NaN"):
        rerank(first, np.array([[1.0, np.nan, 2.0, np.nan]]), 2)


def test_weights_are_tried_alike_on_pairs_and_on_whole_catalogues():
    rng, names, items = np.random.default_rng(0), ["q1", "q2"], ["a", "b", "c", "d"]
    parts = {"words": rng.random((2, 4)), "vectors": rng.random((2, 4))}
    judged = pd.DataFrame({"query_id": ["q1", "q1", "q1", "q2", "q2"], "item_id": ["a", "c", "d", "b", "a"], "grade": [2, 0, 1, 1, 0]})
    grid = weight_grid(["vectors", "words"], step=0.5)
    low, high = ({name: end(part, axis=1, keepdims=True) for name, part in parts.items()} for end in (np.min, np.max))
    place = [names.index(q) for q in judged["query_id"]], [items.index(i) for i in judged["item_id"]]
    voices = {name: ((part - low[name]) / (high[name] - low[name]))[place] for name, part in parts.items()}
    table = mixture_ndcg(voices, judged, grid)
    pd.testing.assert_frame_equal(table, tune_mixture(parts, judged, names, items, grid))
    for number, weights in enumerate(grid):
        score = sum(weights[name] * voices[name] for name in voices)
        grades = judged.assign(score=score)[judged["query_id"] == "q1"].sort_values("score", ascending=False)["grade"]
        ideal = 3 + 1 / np.log2(3)
        assert table.loc["q1", number] == pytest.approx(((2.0**grades - 1) / np.log2(np.arange(2, 5))).sum() / ideal)


def test_bm25_by_field_follows_its_constants(products):
    usual, flat = match_features(products, QUERIES, PAIRS), match_features(products, QUERIES, PAIRS, k1=0.4, b=0.0)
    by_field = [name for name in usual if name.startswith("bm25_")]
    assert (usual[by_field] != flat[by_field]).any(axis=None) and usual.drop(columns=by_field).equals(flat.drop(columns=by_field))


# how sure the choice ranker is, and how it goes on


def _chosen(seed, pages=300, known=(1.0, -0.5), weigh=False):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(pages, 6, len(known)))
    clicks = np.eye(6)[(features @ np.array(known) + rng.gumbel(size=(pages, 6))).argmax(axis=1)]
    return features, clicks * (rng.choice([1.0, 9.0], size=(pages, 1)) if weigh else 1.0)


@pytest.mark.parametrize("weigh", [False, True])
def test_the_truth_lies_where_the_ranker_says_it_may(weigh):
    inside = []
    for seed in range(120):
        ranker = ChoiceRanker(["a", "b"], decay=1e-9).fit(*_chosen(seed, weigh=weigh))
        z = (ranker.weights - np.array([1.0, -0.5]) * ranker.spread) / np.sqrt(np.diag(ranker.covariance))
        inside.extend(np.abs(z) < 1.96)
    assert 0.90 < np.mean(inside) < 0.99


def test_going_on_is_near_to_reading_everything_and_a_firm_prior_stays():
    days = [_chosen(seed) for seed in range(4)]
    ranker = ChoiceRanker(["a", "b"], decay=1e-6).fit(*days[0])
    for day in days[1:]:
        ranker = ChoiceRanker(["a", "b"]).fit(*day, prior=ranker)
    whole = ChoiceRanker(["a", "b"], decay=1e-6).fit(*(np.concatenate(part) for part in zip(*days)))
    error = np.sqrt(np.diag(whole.covariance))
    assert (np.abs(ranker.weights / ranker.spread - whole.weights / whole.spread) < error).all()
    assert np.allclose(np.sqrt(np.diag(ranker.covariance)), error, rtol=0.25)
    other = _chosen(9, known=(-1.0, 0.5))
    firm, loose = (ChoiceRanker(["a", "b"]).fit(*other, prior=whole, trust=trust).weights for trust in (1.0, 1e-6))
    assert firm[0] > 0 > loose[0]
    with pytest.raises(ValueError, match=r"trust in \(0, 1\], not 0"):
        ChoiceRanker(["a", "b"]).fit(*days[0], prior=whole, trust=0)


def test_a_marginal_is_the_same_ranker_without_the_others(tmp_path):
    ranker = ChoiceRanker(["a", "b", "c"]).fit(*_chosen(1, known=(1.0, -0.5, 0.2)))
    alone, x = ranker.marginal(["c", "a"]), np.zeros((1, 2, 3))
    x[0, 0] = [1.0, 0.0, 2.0]
    both = ranker.scores(x)[0] @ [1, -1]
    assert np.isclose(alone.scores(x[:, :, [2, 0]])[0] @ [1, -1], both) and alone.covariance[0, 1] == ranker.covariance[2, 0]
    ranker.save(tmp_path / "ranker")
    again = ChoiceRanker.load(tmp_path / "ranker")
    rng = np.random.default_rng
    assert np.array_equal(again.scores(x, rng=rng(0)), ranker.scores(x, rng=rng(0))) and not np.array_equal(again.scores(x, rng=rng(1)), ranker.scores(x, rng=rng(0)))
