"""Indexes, rankings and the engine: what a reader of the notebooks need not see."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.data.artefacts import ArtefactError
from ecomrec.data.tables import TableError
from ecomrec.model.text import embed, load_encoder, product_text
from ecomrec.search.catalogue import Catalogue
from ecomrec.search.engine import Engine, FilterError, Page, Recipe
from ecomrec.search.index import DenseIndex, LexicalIndex, LexicalSettings, tokenise, top_k
from ecomrec.search.ranking import (
    ChoiceRanker, candidates, fit_weights, mixture, reciprocal_rank_fusion, scaled, staged, weight_grid,
)

WORDS = ["red", "blue", "running", "shoe", "bottle", "laptop", "跑步鞋", "水壶", "nike", "5.5"]
QUICK = settings(deadline=None, max_examples=25)
LEXICAL = Recipe(
    candidates={"words": 0.5, "attributes": 0.5, "vectors": 0.0},
    order={"words": 1.0, "attributes": 0.0, "vectors": 0.0},
)


@pytest.fixture(scope="module")
def products():
    rng = np.random.default_rng(0)
    kinds = {
        "running shoes": ("Sports > Shoes", "跑步鞋"),
        "water bottle": ("Kitchen > Bottles", "水壶"),
        "laptop": ("Computers", "笔记本电脑"),
    }
    rows = []
    for n in range(45):
        kind = list(kinds)[n % 3]
        colour = ["red", "blue", "black"][rng.integers(3)]
        title = f"{kinds[kind][1]} {colour}" if n % 5 == 4 else f"{colour} {kind}"
        rows.append({
            "item_id": f"p{n:02}", "title": title, "description": f"model {n}", "category": kinds[kind][0],
            "brand": ["Swift", "飞跃"][n % 2], "price": float(10 + n), "rating": 5.0 if n == 7 else None,
            "in_stock": n % 4 != 0, "attributes": json.dumps({"colour": colour}),
        })
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def engine(products):
    return Engine.from_products(products, progress=False)


def one_flipped_byte(folder: Path, name: str):
    file = folder / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# tokens and indexes


@given(st.text(max_size=40))
@QUICK
def test_tokenising_is_stable_and_folds_case_and_width(text):
    (terms,) = tokenise([text])
    assert all(terms) and not any(" " in term for term in terms)
    assert tokenise([text.casefold()]) == tokenise([text.casefold()])


def test_one_word_in_many_spellings():
    variants = tokenise(["Shoes", "SHOE", "ＳＨＯＥＳ", "shoe!", "shoe's"])
    assert {tuple(terms) for terms in variants} == {("shoe",)}
    assert set(tokenise(["笔记本"])[0]) <= set(tokenise(["笔记本电脑"])[0])


@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=5), min_size=1, max_size=12),
    st.lists(st.sampled_from([*WORDS, "zebra"]), max_size=3),
    st.randoms(),
)
@QUICK
def test_shuffling_products_changes_no_lexical_result(texts, query, random):
    ids = [f"i{n}" for n in range(len(texts))]
    order = list(range(len(ids)))
    random.shuffle(order)
    one = LexicalIndex.build(ids, [" ".join(text) for text in texts])
    other = LexicalIndex.build([ids[n] for n in order], [" ".join(texts[n]) for n in order])
    found, again = one.search([" ".join(query)], k=5), other.search([" ".join(query)], k=5)
    assert found["item_id"].tolist() == again["item_id"].tolist() and np.allclose(found["score"], again["score"])
    assert (found["score"] > 0).all()
    known = {term for text in texts for term in tokenise([" ".join(text)])[0]}
    assert found.empty == (not known & set(tokenise([" ".join(query)])[0]))


@given(
    st.lists(st.sampled_from([-np.inf, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=30), st.integers(1, 40), st.data(),
)
@QUICK
def test_top_k_is_the_sorted_list_cut(scores, k, data):
    ids = [f"i{n:02}" for n in range(len(scores))]
    allowed = data.draw(st.one_of(st.none(), st.sets(st.sampled_from(ids))))
    found = top_k(np.array([scores]), ids, k, allowed=allowed)["item_id"].tolist()
    open_to = [n for n in range(len(ids)) if scores[n] > -np.inf and (allowed is None or ids[n] in allowed)]
    assert found == [ids[n] for n in sorted(open_to, key=lambda n: (scores[n], ids[n]), reverse=True)][:k]


def test_run_of_several_queries_keeps_their_names():
    index = LexicalIndex.build(["a", "b"], ["shoe", "bottle"])
    run = index.search(pd.Series({"q9": "bottle", "q1": "nothing", "q5": "shoe bottle"}), k=5)
    assert run["query_id"].tolist() == ["q9", "q5", "q5"]
    assert list(run.columns) == ["query_id", "item_id", "score"]
    assert index.search([], k=3).empty


@pytest.mark.parametrize("texts", [["", ""], ["!?", "..."]])
def test_a_catalogue_without_words_finds_nothing(texts):
    index = LexicalIndex.build(["a", "b"], texts)
    assert index.search(["shoe", ""], k=3).empty and (index.scores(["shoe"]) == 0).all()


def test_bad_indexes_are_refused():
    with pytest.raises(ValueError, match="must be equal and more than 0"):
        LexicalIndex.build([], [])
    with pytest.raises(ValueError, match="'a' stands there more than once"):
        DenseIndex.build(["a", "a"], np.eye(2))
    with pytest.raises(ValueError, match="shape"):
        DenseIndex.build(["a"], np.ones(3))
    with pytest.raises(ValueError, match="has not length 1"):
        DenseIndex.build(["a"], np.full((1, 3), np.nan))


@pytest.mark.parametrize("kind", ["lexical", "dense"])
def test_saved_indexes_are_equal_and_verified(kind, tmp_path):
    if kind == "lexical":
        index, query = LexicalIndex.build(
            ["a", "b", "c"], ["red shoe", "跑步鞋", "bottle"], k1=0.7, b=0.3,
        ), ["shoe", "跑步鞋"]
    else:
        index, query = DenseIndex.build(["a", "b", "c"], np.eye(3)), np.array([[0.6, 0.8, 0.0]])
    index.save(tmp_path / "index")
    again = type(index).load(tmp_path / "index")
    assert np.array_equal(again.scores(query), index.scores(query)) and again.item_ids == index.item_ids
    index.save(tmp_path / "index")  # written again over the old one
    files = sorted(p.name for p in (tmp_path / "index").iterdir() if p.name != "manifest.json")
    assert not any(name.endswith((".pkl", ".pickle", ".pt", ".bin")) for name in files)
    for name in files:
        index.save(tmp_path / name)
        one_flipped_byte(tmp_path / name, name)
        with pytest.raises(ArtefactError, match=name):
            type(index).load(tmp_path / name)
    with pytest.raises(ArtefactError):
        type(index).load(tmp_path / "nothing here")


# ranking


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**31))
@QUICK
def test_mixture_is_convex_and_blind_to_units(rows, columns, seed):
    rng = np.random.default_rng(seed)
    parts = {
        "a": rng.normal(size=(rows, columns)), "b": rng.normal(size=(rows, columns)), "c": np.zeros((rows, columns)),
    }
    mixed = mixture(parts, {"a": 1, "b": 2, "c": 0})
    assert mixed.min() >= 0 and mixed.max() <= 1 + 1e-6
    assert np.allclose(mixture(parts | {"a": parts["a"] * 7 - 3}, {"a": 1, "b": 2, "c": 0}), mixed, atol=1e-5)
    order = rng.permutation(columns)
    assert np.allclose(
        mixture({name: part[:, order] for name, part in parts.items()}, {"a": 1, "b": 2, "c": 0}),
        mixed[:, order],
        atol=1e-6,
    )
    assert reciprocal_rank_fusion(parts).shape == (rows, columns)


@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=20), st.integers(1, 25))
@QUICK
def test_candidates_stand_before_all_others(scores, depth):
    row = np.array([scores])
    inside = candidates(row, depth)
    assert inside.sum() >= min(depth, len(scores))
    final = staged(scaled(-row), inside)
    if not inside.all():
        assert final[inside].min() >= final[~inside].max()


def test_weight_grid_and_choice():
    grid = weight_grid(["a", "b", "c"], step=0.2)
    assert len(grid) == 21 and all(np.isclose(sum(weights.values()), 1) for weights in grid)
    table = pd.DataFrame({n: [0.0, 1.0 - n] for n in range(21)}, index=["q1", "q2"])
    assert fit_weights(table, grid, ["q2"]) == grid[0]
    assert fit_weights(table, grid, ["q1"]) == grid[0]  # all equal: the first


@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_choice_ranker_is_blind_to_order_and_units(seed, n_candidates, n_features):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(60, n_candidates, n_features))
    clicks = np.eye(n_candidates)[rng.integers(n_candidates, size=60)] * rng.uniform(0.5, 3, size=(60, 1))
    names = [f"f{n}" for n in range(n_features)]
    one = ChoiceRanker(names, decay=0.01).fit(features, clicks)
    order, place = rng.permutation(60), rng.permutation(n_candidates)
    other = ChoiceRanker(names, decay=0.01).fit((features * 10 + 3)[order][:, place], clicks[order][:, place])
    assert np.allclose(one.weights, other.weights, atol=1e-4)
    assert np.allclose(one.scores(features)[:, place], one.scores(features[:, place]))
    assert np.array_equal(ChoiceRanker(names, decay=0.01).fit(features, clicks).weights, one.weights)


def test_choice_ranker_survives_constant_features_and_empty_pages():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(50, 4, 1)), np.ones((50, 4, 1))], axis=2)
    clicks = np.eye(4)[features[:, :, 0].argmax(axis=1)]
    clicks[10:20] = 0
    offered = np.ones((50, 4), dtype=bool)
    offered[15] = False
    ranker = ChoiceRanker(["signal", "constant"]).fit(features, clicks, offered)
    assert ranker.weights[0] > 1 and abs(ranker.weights[1]) < 1e-6
    assert (ranker.scores(features, offered)[15] == -np.inf).all()


@pytest.mark.parametrize(("change", "message"), [
    (dict(features=np.zeros((2, 3))), "shape"), (dict(clicks=np.ones((2, 4))), "clicks"), (
        dict(clicks=-np.ones((2, 3))), "weight",
    ),
    (dict(clicks=np.full((2, 3), np.nan)), "weight"), (dict(offered=np.zeros((2, 3), dtype=bool)), "offered"), (
        dict(offered=np.ones((3, 3))), "offered",
    ),
])
def test_choice_ranker_refuses_what_makes_no_sense(change, message):
    arguments = {"features": np.random.default_rng(0).normal(size=(2, 3, 2)), "clicks": np.eye(3)[:2]} | change
    with pytest.raises(ValueError, match=message):
        ChoiceRanker(["a", "b"]).fit(**arguments)


def test_choice_ranker_refuses_a_click_on_what_was_not_offered():
    offered = np.array([[True, True, False]])
    with pytest.raises(ValueError, match="clicked candidate 2 was not offered"):
        ChoiceRanker(["a"]).fit(np.array([[[0.0], [1.0], [2.0]]]), np.array([[0.0, 0.0, 1.0]]), offered)


# the engine


def test_a_page_for_english_and_chinese(engine):
    page = engine.search("running shoes", k=5)
    assert list(page.table.columns) == ["rank", "item_id", "title", "brand", "price", "rating", "score"]
    assert page.items["rank"].tolist() == [1, 2, 3, 4, 5] and page.items["title"].str.contains("running shoes").all()
    assert engine.search("跑步鞋", k=3).items["title"].str.contains("跑步鞋").all()
    assert engine.search("ＲＵＮＮＩＮＧ shoes", k=5).items["item_id"].tolist() == page.items["item_id"].tolist()


def test_meaning_without_shared_words(engine):
    assert engine.search("sneakers for jogging", k=3).items["title"].str.contains("running shoes").all()


@given(st.data())
@QUICK
def test_a_filter_never_leaks(engine, products, data):
    low = data.draw(st.integers(0, 60))
    high = data.draw(st.integers(low, 70))
    filters = {"price": (low, high)}
    if data.draw(st.booleans()):
        filters["brand"] = data.draw(st.sampled_from(["Swift", "飞跃", "swift "]))
    if data.draw(st.booleans()):
        filters["category"] = data.draw(st.sampled_from(["shoes", "Sports > Shoes", "computers"]))
    if data.draw(st.booleans()):
        filters["in_stock"] = data.draw(st.booleans())
    page = engine.search(data.draw(st.sampled_from(["red shoes", "水壶", "", "laptop"])), k=50, filters=filters)
    passed = set(products["item_id"][engine.catalogue.allowed(filters)])
    assert set(page.items["item_id"]) <= passed
    assert page.items["price"].between(low, high).all()
    assert passed or len(page) == 0


def test_filters_come_before_the_cut(engine):
    assert len(engine.search("running shoes", k=10, filters={"category": "kitchen"})) == 10
    unfiltered = engine.search("red running shoes", k=45).items
    kept = engine.search("red running shoes", k=45, filters={"brand": "Swift"}).items
    assert kept["item_id"].tolist() == unfiltered[unfiltered["brand"] == "Swift"]["item_id"].tolist()


def test_missing_values_pass_no_filter():
    frame = pd.DataFrame(
        {
            "item_id": ["a", "b"],
            "price": [1.0, None],
            "brand": [None, "x"],
            "in_stock": pd.array([True, None], dtype="boolean"),
        }
    )
    catalogue = Catalogue(frame.assign(title="t"))
    assert catalogue.allowed({"price": (None, None)}).tolist() == [True, False]
    assert catalogue.allowed({"brand": ["x", ""]}).tolist() == [False, True]
    assert catalogue.allowed({"in_stock": True}).tolist() == [True, False]
    assert catalogue.allowed({"in_stock": False}).tolist() == [False, False]


@pytest.mark.parametrize(
    "filters", [{"colour": "red"}, {"brand": (1, 2)}, {"price": (3, 2)}, {"price": (1, 2, 3)}, {"price": "cheap"}],
)
def test_wrong_filters_are_typed_errors(engine, filters):
    with pytest.raises(FilterError, match=next(iter(filters))):
        engine.search("shoes", filters=filters)


@pytest.mark.parametrize("query", [None, 7, ["shoes"], b"shoes"])
def test_queries_that_are_no_text_are_refused(engine, query):
    with pytest.raises(ValueError, match="query must be a text"):
        engine.search(query)


@given(st.text(max_size=60), st.integers(1, 60))
@QUICK
def test_whatever_is_typed_gives_a_page(engine, query, k):
    page = engine.search(query, k=k)
    assert len(page) <= k and page.items["item_id"].is_unique
    assert isinstance(page._repr_html_(), str) and repr(page)


def test_empty_and_unknown_queries(engine):
    empty = engine.search("  ", k=3)
    assert empty.items["item_id"].iloc[0] == "p07" and "No query" in empty.note
    unknown = engine.search("饕餮")
    assert len(unknown) == 0 and "No product holds" in unknown.note
    assert len(engine.search("shoes", k=1000)) == 45


@pytest.mark.parametrize("field", ["title", "brand"])
def test_a_page_escapes_what_strangers_wrote(field):
    row = {"rank": 1, "item_id": "a", "title": "t", "brand": "b", "price": 1.0, "rating": None, "score": 0.5} | {
        field: "<img src=x onerror=alert(1)>"
    }
    shown = Page("<b>", pd.DataFrame([row]), note="<i>")._repr_html_()
    assert "<img" not in shown and "<b>" not in shown and "<i>" not in shown


def test_shuffled_products_give_the_same_pages(products, engine):
    shuffled = Engine.from_products(products.sample(frac=1, random_state=3), progress=False)
    for query in ["running shoes", "red", "跑步鞋", ""]:
        pages = [one.search(query, k=20).items["item_id"].tolist() for one in (shuffled, engine)]
        assert pages[0] == pages[1]


def test_engine_without_an_encoder_needs_none(products, monkeypatch):
    monkeypatch.setattr("ecomrec.search.recipe.load_encoder", lambda *_: pytest.fail("no encoder is needed"))
    lexical = Engine.from_products(products, recipe=LEXICAL)
    assert lexical.search("running shoes", k=3).items["title"].str.contains("running").all()
    assert len(lexical.search("zebra")) == 0


@pytest.mark.parametrize("recipe", [None, LEXICAL], ids=["hybrid", "lexical"])
def test_saved_engines_answer_the_same_and_are_verified(products, engine, recipe, tmp_path):
    original = engine if recipe is None else Engine.from_products(products, recipe=recipe)
    original.save(tmp_path / "engine")
    again = Engine.load(tmp_path / "engine")
    for query in ["running shoes", "跑步鞋", "", "饕餮"]:
        pd.testing.assert_frame_equal(again.search(query).items, original.search(query).items)
    assert again.recipe == original.recipe
    files = [
        str(
            p.relative_to(tmp_path / "engine")
        ) for p in (tmp_path / "engine").rglob("*") if p.is_file() and p.name != "manifest.json"
    ]
    for name in files:
        original.save(tmp_path / "broken")
        one_flipped_byte(tmp_path / "broken", name)
        with pytest.raises(ArtefactError):
            Engine.load(tmp_path / "broken")


def test_a_trained_encoder_is_saved_with_its_engine(products, tmp_path):
    encoder = load_encoder(device="cpu")
    with_own = Engine.from_products(products, encoder=encoder, progress=False)
    with_own.save(tmp_path / "engine")
    assert (tmp_path / "engine" / "encoder" / "model.safetensors").exists()
    assert Engine.load(tmp_path / "engine").search("shoes").items.equals(with_own.search("shoes").items)


def test_bad_catalogues_are_typed_errors(products):
    with pytest.raises(TableError, match="item_id"):
        Engine.from_products(products.drop(columns="item_id"))
    with pytest.raises(ValueError, match="'p00' stands there more than once"):
        Engine.from_products(pd.concat([products, products.head(1)]), recipe=LEXICAL)
    with pytest.raises(ValueError, match="more than 0"):
        Engine.from_products(products.head(0), recipe=LEXICAL)


def test_only_two_columns_are_enough():
    two = pd.DataFrame({"item_id": [1, 2], "title": ["red shoes", None]})
    page = Engine.from_products(two, recipe=LEXICAL).search("shoe")
    assert page.items["item_id"].tolist() == ["1"] and "red shoes" in page._repr_html_()


def test_judgements_fit_the_recipe(products):
    judged = pd.DataFrame({"query_id": ["a"] * 3 + ["b"] * 3, "query": ["red shoes"] * 3 + ["bottle"] * 3,
                           "item_id": ["p00", "p01", "p02", "p01", "p03", "p05"], "grade": [3, 0, 0, 2, 0, 0]})
    vectors = embed(load_encoder(device="cpu"), product_text(products))
    fitted = Engine.from_products(products, judged, vectors=vectors)
    assert isinstance(fitted.recipe.lexical, LexicalSettings)
    assert np.isclose(sum(fitted.recipe.order.values()), 1) and np.isclose(sum(fitted.recipe.candidates.values()), 1)


def test_judgements_without_query_ids_are_named_by_their_text(products):
    judged = pd.DataFrame(
        {"query": ["red shoes"] * 2 + ["bottle"] * 2, "item_id": ["p00", "p01", "p02", "p01"], "grade": [1, 0, 0, 1]}
    )
    vectors = embed(load_encoder(device="cpu"), product_text(products))
    assert np.isclose(sum(Engine.from_products(products, judged, vectors=vectors).recipe.order.values()), 1)
