"""The engine with a log: pages for known shoppers, changes while it is open, and what must never differ."""

import threading

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.data.cleaning import clean
from ecomrec.data.memory import Memory
from ecomrec.data.simulator import simulate
from ecomrec.data.sources import Tables
from ecomrec.data.tables import TableError
from ecomrec.search.catalogue import SORTS, Catalogue, FilterError
from ecomrec.search.engine import Engine, EngineError, UnknownItem, diversified, follows_of
from ecomrec.search.explain import LANGUAGES, linear_ranker
from ecomrec.search.index import LexicalIndex
from ecomrec.search.ranking import LambdaRanker
from ecomrec.search.recipe import Recipe

QUICK = settings(deadline=None, max_examples=25)
WORDS = Recipe(candidates={"words": 0.5, "attributes": 0.5, "vectors": 0.0}, order={"words": 1.0, "attributes": 0.0, "vectors": 0.0})


@pytest.fixture(scope="module")
def shop():
    return clean(Tables("toy", **simulate(5, n_items=250, n_users=40, n_days=6, requests_per_day=150).tables()))[0]


@pytest.fixture(scope="module")
def engine(shop):
    ranker = linear_ranker({"words": 2.0, "popularity": 0.3, "brand_taste": 1.0, "dearer": -0.5, "co_occurrence": 1.0})
    return Engine.from_products(shop.products, users=shop.users, events=shop.events, recipe=WORDS, rankers={"search": ranker})


def test_whatever_is_asked_for_the_page_keeps_its_promises(engine, shop):
    now, ids = engine.until + 1, set(shop.products["item_id"])

    @given(st.data())
    @QUICK
    def asked(data):
        arranged = data.draw(st.sampled_from([{}, {"sort": "price"}, {"sort": "-rating"}, {"explore": 0.5, "seed": 3}]))
        options = {
            "k": data.draw(st.integers(1, 30)), "offset": data.draw(st.integers(0, 60)), "fold": data.draw(st.booleans()), "explain": data.draw(st.booleans()),
            "language": data.draw(st.sampled_from(LANGUAGES)), "facets": data.draw(st.sampled_from([[], ["brand", "price"], ["category"]])), "device": data.draw(st.sampled_from([None, "phone"])),
            "filters": data.draw(st.sampled_from([None, {"price": (None, 50)}, {"in_stock": True}, {"brand": ["Norrun", "Kaimo"]}])),
        } | arranged
        user = data.draw(st.sampled_from([None, "a stranger", *engine.users[:3]]))
        kind = data.draw(st.sampled_from(["search", "recommend", "similar"]))
        if kind == "search":
            page = engine.search(data.draw(st.sampled_from(["running shoes", "white", "跑步鞋", "", "zebra"])), user=user, now=now, **options)
        else:
            page = engine.recommend(user, now=now, **options) if kind == "recommend" else engine.similar(shop.products["item_id"].iloc[3], user=user, now=now, **options)
        items = page.items
        assert len(page) <= options["k"] and items["item_id"].is_unique and set(items["item_id"]) <= ids
        assert items["rank"].tolist() == list(range(options["offset"] + 1, options["offset"] + 1 + len(page)))
        assert items["propensity"].between(0, 1, inclusive="right").all() and len(page) + options["offset"] <= page.total or not len(page)
        assert engine.catalogue.allowed(options["filters"])[engine.catalogue.rows.get_indexer(items["item_id"])].all()
        if "sort" in options:
            column, sign = SORTS[options["sort"]]
            assert (sign * items[column].dropna()).is_monotonic_increasing
        elif not arranged:
            assert items["score"].is_monotonic_decreasing
        if options["fold"]:
            assert len(set(engine.catalogue.parent[engine.catalogue.rows.get_indexer(items["item_id"])])) == len(page)
        if options["explain"]:
            assert np.allclose([sum(reason.contribution for reason in told) for told in page.reasons], items["score"], atol=1e-9)
        assert set(page.facets) == set(options["facets"]) and isinstance(page._repr_html_(), str)

    asked()


@pytest.mark.parametrize(
    ("options", "error"), [({"k": True}, "k must be positive"), ({"k": 2.0}, "k must be positive"), ({"offset": -1}, "offset"), ({"diversity": 2.0}, "diversity"), ({"explore": -0.1}, "explore"),
                           ({"sort": "cheap"}, "'cheap' is no order"), ({"facets": ["size"]}, "facets: no column 'size'"), ({"explain": True, "language": "fr"}, "'fr' is not spoken"), ({"sort": "price", "explore": 1.0}, "ask for one")],
)
def test_options_that_make_no_sense_are_typed_errors(engine, options, error):
    with pytest.raises(ValueError, match=error):
        engine.search("shoes", **options)


def test_a_drawn_page_stands_where_its_propensities_say(engine):
    """Over many draws each product stands at the first place as often as it claims."""
    now, user = engine.until + 1, engine.users[0]
    pages = [engine.search("running shoes", user=user, now=now, k=3, explore=1.0, seed=seed, fold=False).items for seed in range(600)]
    first = pd.concat([page.iloc[[0]] for page in pages])
    often = first["item_id"].value_counts()
    claimed = first.drop_duplicates("item_id").set_index("item_id")["propensity"]
    gap = (often / len(pages) - claimed.reindex(often.index)).abs()
    assert (gap < 4 * np.sqrt(claimed.reindex(often.index) / len(pages))).all()


def test_trees_rank_and_are_explained(shop):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(400, 3)), columns=["words", "popularity", "cheaper"])
    trees = LambdaRanker(trees=5, min_in_leaf=10).fit(table, (table["words"] > 0).astype(int), np.repeat(np.arange(20), 20))
    engine = Engine.from_products(shop.products, users=shop.users, events=shop.events, recipe=WORDS, rankers={"search": trees})
    page = engine.search("running shoes", user=engine.users[0], now=engine.until + 1, explain=True)
    assert len(page) and np.allclose([sum(reason.contribution for reason in told) for told in page.reasons], page.items["score"])


def test_users_of_whom_only_ids_are_known_are_like_unknown_ones(engine, shop):
    pages = [
        Engine.from_products(shop.products, users=users, events=shop.events, recipe=WORDS, rankers=engine.rankers).search("running shoes", user=engine.users[0], now=engine.until + 1)
        for users in (shop.users[["user_id"]], None)
    ]
    assert len(pages[0]) and pages[0].items.equals(pages[1].items)
    with pytest.raises(TableError, match="user_id"):
        Engine.from_products(shop.products, users=shop.users[["age"]], events=shop.events, recipe=WORDS)


def test_the_order_in_which_events_arrive_leaves_the_same_memory(shop):
    cut = int(shop.events["ts"].quantile(0.7))
    past, later = shop.events[shop.events["ts"] < cut], shop.events[shop.events["ts"] >= cut]
    rows, now, users = np.arange(len(shop.products)), int(shop.events["ts"].max()) + 1, shop.users["user_id"].head(12)
    told = []
    for seed in range(3):
        memory = Memory(shop.products, shop.users, past)
        order = np.random.default_rng(seed).permutation(len(later)) if seed else np.arange(len(later))
        for chunk in np.array_split(order, 5 + seed):
            part = later.iloc[chunk]
            memory.observe(part)
            memory.observe(part.tail(2))  # twice is once
        told.append(np.stack([memory.features(rows, now, user, "running shoes") for user in users]))
    assert np.array_equal(told[0], told[1]) and np.array_equal(told[0], told[2])


def test_a_query_is_heard_whatever_came_first_and_whatever_it_is_called(shop):
    now = int(shop.events["ts"].max()) + 1
    of = dict.fromkeys(shop.events.columns) | {"user_id": "u", "session_id": "s", "request_id": "r", "surface": "search"}
    click = of | {"event_id": "c", "kind": "click", "item_id": shop.products["item_id"].iloc[0], "price": 9.0, "ts": now + 1}
    search = of | {"event_id": "r", "kind": "search", "query": "shoes", "ts": now}  # of the same name as its request
    for order in ([search, click], [click, search]):
        memory = Memory(shop.products, shop.users, shop.events)
        for row in (*order, *order):
            memory.observe([row])
        told = memory.histories("u", now + 2)
        assert [memory.texts[code] for code in told["query"] if code >= 0] == ["shoes"] and (told["item"] >= 0).sum() == 1


def test_what_is_forgotten_is_in_no_feature_no_suggestion_and_no_saved_file(shop, tmp_path):
    engine = Engine.from_products(shop.products, users=shop.users, events=shop.events, recipe=WORDS)
    engine.rename_users(lambda name: f"alias {name}")
    user = engine.users[0]
    typed = [engine.memory.texts[code] for code in engine.memory.histories(user, engine.until + 1)["query"] if code >= 0]
    engine.forget(user)
    assert user not in engine.users
    engine.save(tmp_path / "engine")
    saved = pd.concat([pd.read_parquet(tmp_path / "engine" / "memory" / name)[["user_id"]] for name in ("log.parquet", "histories.parquet", "moments.parquet", "users.parquet")])["user_id"].dropna()
    assert len(saved) and user not in set(saved) and saved.str.startswith("alias ").all()
    secret = {text for text in typed if text not in set(pd.read_parquet(tmp_path / "engine" / "memory" / "log.parquet")["query"])}
    written = (tmp_path / "engine" / "memory" / "memory.json").read_text() + pd.read_parquet(tmp_path / "engine" / "memory" / "clicks.parquet").to_string()
    assert secret and not any(f'"{text}"' in written or f" {text} " in written for text in secret)
    again = Engine.load(tmp_path / "engine")
    assert again.recommend(user, now=engine.until + 1).items.equals(again.recommend(now=engine.until + 1).items)


def test_changed_while_open_saved_and_loaded_finds_the_same(shop, tmp_path):
    engine = Engine.from_products(shop.products, users=shop.users, events=shop.events, recipe=WORDS)
    gone = shop.products["item_id"].iloc[:3].tolist()
    fresh = shop.products.iloc[[10]].assign(item_id="new", title="Quokka unicycle", parent_id="quokka", price=5.0)
    engine.put(fresh)
    engine.remove(gone)
    engine.save(tmp_path / "engine")
    again, now = Engine.load(tmp_path / "engine"), engine.until + 1
    assert len(again.products) == len(shop.products) - 2 and not set(gone) & set(again.products["item_id"])
    assert again.search("quokka", k=1).items["item_id"].tolist() == ["new"] == engine.search("quokka", k=1).items["item_id"].tolist()
    for user in engine.users[:3]:
        both = [of.search("running shoes", user=user, now=now, k=10, fold=False).items["item_id"].tolist() for of in (engine, again)]
        assert both[0] == both[1]
    with pytest.raises(UnknownItem):
        engine.similar(gone[0])
    with pytest.raises(FilterError, match="no product 'nobody'"):
        engine.remove(["nobody"])


def test_pages_are_made_while_products_and_events_come_in(shop):
    engine = Engine.from_products(shop.products, users=shop.users, events=shop.events, recipe=WORDS)
    now, errors, stop = engine.until + 1, [], threading.Event()

    def shopping(number: int) -> None:
        try:
            while not stop.is_set():
                engine.search("quokka running shoes", user=engine.users[number], now=now + 10_000, facets=["brand"], explain=True)
                engine.recommend(engine.users[number], now=now + 10_000)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=shopping, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for number in range(25):
        engine.put(shop.products.iloc[[number]].assign(item_id=f"new {number}", title=f"Quokka {number}", price=5.0 + number))
        click = {"event_id": f"e{number}", "ts": now + number, "user_id": engine.users[0], "session_id": "s", "kind": "click", "item_id": f"new {number}"}
        assert engine.observe(pd.DataFrame([click])) == 1
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors and len(engine.search("quokka", k=100, fold=False)) == 25


@given(st.lists(st.lists(st.sampled_from(["red", "blue", "shoe", "hat", "跑步鞋"]), min_size=1, max_size=5).map(" ".join), min_size=3, max_size=12), st.randoms())
@QUICK
def test_the_same_text_put_again_scores_the_same(texts, random):
    ids = [f"i{n}" for n in range(len(texts))]
    index = LexicalIndex.build(ids, texts)
    before = index.scores(["red shoe", "跑步鞋"])
    some = random.sample(range(len(ids)), 2)
    index.put([ids[n] for n in some], [texts[n] for n in some])
    assert np.allclose(index.scores(["red shoe", "跑步鞋"]), before, atol=1e-6)


@given(st.integers(1, 12), st.floats(0, 1), st.integers(0, 100))
@QUICK
def test_a_diverse_page_begins_with_the_best_and_repeats_nothing(n, diversity, seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = rng.permutation(n).astype(float)
    order = diversified(scores, vectors, 8, diversity)
    assert len(set(order.tolist())) == len(order) == min(8, n)
    assert diversity == 1 or n == 1 or order[0] == scores.argmax()
    assert diversity > 0 or order.tolist() == np.argsort(-scores)[:8].tolist()


def test_a_log_without_choices_follows_nothing(shop):
    with pytest.raises(ValueError, match="none of"):
        follows_of(shop.products, shop.events[shop.events["kind"] == "impression"])


@pytest.mark.parametrize("attributes", [None, "", "[1, 2]", '"red"', '{"colour": ["red", "blue"]}'])
def test_attributes_of_any_form_are_no_trouble(attributes):
    catalogue = Catalogue(pd.DataFrame({"item_id": ["a", "b"], "title": ["x", "y"], "attributes": [attributes, '{"colour": "red"}']}))
    assert catalogue.allowed({"attributes.colour": "red"}).tolist()[1] is True
    assert catalogue.allowed({"attributes.colour": "red, blue"}).tolist() == ['["red"' in str(attributes), False]
    with pytest.raises(FilterError, match="no column 'attributes.size'"):
        catalogue.allowed({"attributes.size": "L"})


def test_errors_are_one_family():
    assert issubclass(UnknownItem, EngineError) and issubclass(EngineError, ValueError) and issubclass(FilterError, ValueError)
