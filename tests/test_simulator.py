"""The simulated shop: the bundled copy, its card, and what must hold of any such shop."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ecomrec.data import artefacts, simulator, tables
from ecomrec.data.pages import page_propensities
from ecomrec.data.simulator import DIRT, START, Settings, load_truth, simulate, write_shop

SHOP = Path(__file__).parents[1] / "data" / "shop"
TRUTH = ("items", "users", "queries", "raters", "dirt")


@pytest.fixture(scope="module")
def shop():
    return simulate(seed=0)


@pytest.fixture(scope="module")
def small():
    return simulate(seed=3, n_items=200, n_users=30, n_days=2, requests_per_day=20)


@pytest.mark.parametrize("name", tables.TABLES)
def test_bundled_tables_are_what_the_seed_gives(shop, name):
    bundled = pd.read_parquet(SHOP / f"{name}.parquet")
    pd.testing.assert_frame_equal(bundled, shop.tables()[name], check_exact=True)


def test_bundled_truth_is_what_the_seed_gives(shop):
    truth = load_truth(SHOP)
    assert truth.seed == 0 and truth.settings == Settings()
    for name in TRUTH:
        pd.testing.assert_frame_equal(getattr(truth, name), getattr(shop.truth, name), check_exact=True, check_dtype=name != "dirt")
    requests = truth.requests(40, seed=1)
    pd.testing.assert_frame_equal(requests, shop.truth.requests(40, seed=1))
    assert (truth.utility(requests) == shop.truth.utility(requests)).all()


def test_bundled_files_are_small_and_whole():
    files = [path for path in SHOP.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert set(artefacts.verify(SHOP)) == {*(f"{name}.parquet" for name in tables.TABLES), "truth/world.json", *(f"truth/{name}.parquet" for name in TRUTH)}


def test_card_has_the_numbers_of_the_data(shop):
    card = (SHOP.parent / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", card, flags=re.M))
    assert {name: int(n.replace(",", "")) for name, n in rows.items()} == {name: len(t) for name, t in shop.tables().items()}
    planted = dict(re.findall(r"^\| ([a-z ]+) \| [a-z]+ \| [\d.]+ % \| (\d+) \|", card, flags=re.M))
    assert {kind: int(n) for kind, n in planted.items()} == {k: n for k, n in shop.truth.dirt.kind.value_counts().items() if k in DIRT}


def test_catalogue(shop):
    products = shop.products.drop_duplicates()
    assert len(products) == 2000 and products.item_id.is_unique
    assert products.category.str.count(" > ").eq(2).all() and products.category.nunique() >= 24
    running = products[products.category.str.endswith("running shoes")]
    assert running.language.value_counts().min() > 50 and running.brand.nunique() >= 8
    assert running.title.str.contains("跑步鞋").any() and running.title.str.contains("Running Shoes").any()
    assert products.attributes.map(json.loads).map(len).gt(0).all()
    assert 1.5 < products.groupby("parent_id").size().mean() < 3
    assert products.groupby("parent_id").category.nunique().max() == 1
    assert (products.listed_ts <= products.snapshot_ts).all()
    tables.check_links(shop.judgements, shop.products)


def test_words_are_complete_in_both_languages():
    words = simulator._words()
    for category in words["categories"]:
        for language in ("en", "zh"):
            texts = category[language]
            assert len(texts["nouns"]) >= 2 and len(texts["asks"]) >= 2 and len(texts["about"]) >= 3
            said, asked = ({text.lower() for text in texts[name]} for name in ("nouns", "asks"))
            assert asked - said, f"no lexical gap in {category['path']}, {language}"
        assert set(category["attributes"].values()) <= set(words["values"])
    assert simulator._brand_sells().sum(0).min() >= 3
    for values in [*words["values"].values(), words["genders"], words["styles"]]:
        assert all(value[name] for value in values for name in ("key", "en", "zh", "asks_en", "asks_zh"))


def test_events_tell_one_story(shop):
    events = simulator._collect(shop.truth, n_days=3, requests_per_day=30)
    assert events.event_id.is_unique
    assert events.equals(events.sort_values(["ts", "event_id"], ignore_index=True))
    key = ["request_id", "item_id"]
    pairs = {kind: set(map(tuple, events.loc[events.kind == kind, key].to_numpy())) for kind in events.kind.unique()}
    assert pairs["purchase"] <= pairs["cart"] <= pairs["click"] <= pairs["impression"]
    pages = events[events.kind == "impression"].groupby("request_id")
    assert (pages.size() == 10).all() and (pages.position.sum() == 55).all() and (pages.item_id.nunique() == 10).all()
    searched = events[events.kind == "search"].set_index("request_id").ts
    assert (events.ts >= searched[events.request_id].to_numpy()).all() and events.ts.min() >= START
    times = events[events.kind != "search"].pivot(index=key, columns="kind", values="ts")
    for before, after in (("impression", "click"), ("click", "cart"), ("cart", "purchase")):
        both = times[[before, after]].dropna()
        assert len(both) and (both[before] < both[after]).all()


def test_dirt_is_where_the_list_says(shop):
    dirt = shop.truth.dirt
    expected = {"products": 2000, "users": 500, "events": len(shop.events)}
    for kind, rate in DIRT.items():
        rows = dirt[dirt.kind == kind]
        n = expected[rows.table.iloc[0]]
        sd = np.sqrt(n * rate * (20 if kind == "anonymous" else 1))  # sessions go anonymous as a whole
        assert abs(len(rows) - n * rate) < 5 * sd, kind
    products, events = (table.drop_duplicates().set_index(key) for table, key in ((shop.products, "item_id"), (shop.events, "event_id")))
    for kind, column in (("brand missing", "brand"), ("price missing", "price"), ("description missing", "description")):
        assert products.loc[dirt.key[dirt.kind == kind], column].isna().all()
        assert products[column].isna().sum() == (dirt.kind == kind).sum()
    clock = dirt[dirt.kind == "clock in seconds"]
    assert (events.ts.loc[clock.key].to_numpy() == clock.value.astype("int64").to_numpy() // 1000).all()
    strangers = events.item_id.notna() & ~events.item_id.isin(products.index)
    assert set(events.index[strangers]) == set(dirt.key[dirt.kind == "unknown item"])
    assert shop.events.duplicated().sum() == (dirt.kind == "event twice").sum()
    spelled = dirt[dirt.kind == "brand spelling"]
    assert (products.brand.loc[spelled.key].str.strip().str.casefold().to_numpy() == spelled.value.str.casefold().to_numpy()).all()


def test_robots_click_everything(shop):
    robots = shop.truth.dirt.query("kind == 'robot'").key
    events = shop.events.drop_duplicates("event_id")
    for session in robots:
        kinds = events[events.session_id == session].kind.value_counts()
        assert kinds["click"] >= 0.95 * kinds["impression"] and kinds["search"] >= 15


def test_same_seed_same_shop_and_other_seed_another(small):
    again = simulate(seed=3, n_items=200, n_users=30, n_days=2, requests_per_day=20)
    other = simulate(seed=4, n_items=200, n_users=30, n_days=2, requests_per_day=20)
    for name in tables.TABLES:
        pd.testing.assert_frame_equal(small.tables()[name], again.tables()[name])
        assert not small.tables()[name].equals(other.tables()[name])


def test_utility_is_a_probability_and_rows_are_independent(small):
    truth, requests = small.truth, small.truth.requests(60, seed=1)
    utility = truth.utility(requests)
    assert utility.shape == (60, len(truth.item_ids)) and utility.min() >= 0 and utility.max() < 1
    order = np.random.default_rng(0).permutation(60)
    assert np.allclose(truth.utility(requests.iloc[order]), utility[order], atol=1e-14)
    best = np.take_along_axis(utility, pd.Index(truth.item_ids).get_indexer(truth.oracle(requests).ravel()).reshape(60, 10), axis=1)
    assert (best[:, 0] == utility.max(1)).all() and (np.diff(best, axis=1) <= 0).all()


def test_nothing_is_wanted_before_its_launch(shop):
    truth = shop.truth
    late = truth.items.listed_ts.to_numpy() > START + 5 * 86_400_000
    assert late.any()
    requests = truth.requests(20, seed=0, day=2)
    assert (truth.utility(requests)[:, late] == 0).all() and np.isneginf(truth.logging_scores(requests)[:, late]).all()
    assert (truth.utility(truth.requests(20, seed=0, day=40))[:, late] > 0).all()


def test_requests_do_not_collide(small):
    draws = [small.truth.requests(50, seed=seed, day=day) for seed in (0, 1) for day in (0, 1)]
    assert pd.concat(draws).request_id.is_unique
    assert all(((d.ts - START) // 86_400_000 >= day).all() for d, day in zip(draws, (0, 1, 0, 1)))
    pd.testing.assert_frame_equal(draws[0], small.truth.requests(50, seed=0))
    assert len(small.truth.requests(0, seed=0)) == 0


def test_logged_propensities_are_exact(small):
    truth, requests = small.truth, small.truth.requests(30, seed=2, day=1)
    pages, propensities = truth.logging_pages(requests, seed=0, n_candidates=40)
    scores = truth.logging_scores(requests)
    best = np.sort(np.argsort(-scores, axis=1)[:, :40], axis=1)
    place = np.array([[list(truth.item_ids[row]).index(item) for item in page] for row, page in zip(best, pages)])
    assert np.allclose(propensities, page_propensities(np.take_along_axis(scores, best, axis=1), place), atol=1e-8)


def test_respond_repeats_itself_and_takes_any_page_length(small):
    truth, requests = small.truth, small.truth.requests(40, seed=2)
    pages = truth.oracle(requests, k=4)
    unknown = np.full(pages.shape, np.nan)
    first, second = (truth.respond(requests, pages, unknown, "oracle", seed=5) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert (first.kind == "impression").sum() == 160 and first.propensity.isna().all() and set(first.policy) == {"oracle"}
    assert not first.equals(truth.respond(requests, pages, unknown, "oracle", seed=6))
    pd.testing.assert_frame_equal(first, tables.check("events", first, "clean"))


def test_respond_refuses_what_is_not_of_this_shop(small):
    truth, requests = small.truth, small.truth.requests(2, seed=0)
    pages = truth.oracle(requests, k=3)
    with pytest.raises(ValueError, match=r"2 requests, k"):
        truth.respond(requests, pages, np.ones((2, 2)), "x", 0)
    pages[1, 1] = "i999999"
    with pytest.raises(ValueError, match="item 'i999999' is not of this shop"):
        truth.respond(requests, pages, np.ones((2, 3)), "x", 0)
    with pytest.raises(ValueError, match="user 'nobody' is not of this shop"):
        truth.utility(requests.assign(user_id="nobody"))


def test_clicks_weighted_by_propensity_are_unbiased():
    """Summed over places, weighted clicks estimate utility times total examination, for any candidate set."""
    truth = simulate(seed=5, n_items=120, n_users=2, n_days=1, requests_per_day=1, settings=Settings(accident=0.0)).truth
    n, ask = 30_000, truth.requests(1, seed=0, day=40)
    requests = ask.iloc[np.zeros(n, dtype=int)].reset_index(drop=True).assign(request_id=[f"r{i}" for i in range(n)])
    scores = truth.logging_scores(ask)[0]
    candidates = np.argsort(-scores)[:12]
    tile = np.tile(scores[candidates], (n, 1))
    drawn = simulator.plackett_luce(tile, 5, np.random.default_rng(1))
    propensities = page_propensities(tile, drawn)
    log = truth.respond(requests, truth.item_ids[candidates[drawn]], propensities, "old", seed=1)
    clicks = log[log.kind == "click"]
    weight = 1 / clicks.propensity
    estimate = weight.groupby(clicks.item_id).sum().reindex(truth.item_ids[candidates], fill_value=0).to_numpy() / n
    error = np.sqrt((weight**2).groupby(clicks.item_id).sum().reindex(truth.item_ids[candidates], fill_value=0).to_numpy()) / n
    expected = truth.utility(ask)[0, candidates] * (1 / np.arange(1, 6)).sum()
    assert (np.abs(estimate - expected) < 5 * error + 1e-3).all()


def test_ids_do_not_depend_on_the_place_of_a_row():
    rng = np.random.default_rng(0)
    columns = [np.array([f"{prefix}{i}" for i in rng.integers(0, 50, 500)], dtype=object) for prefix in "ab"]
    order = rng.permutation(500)
    ids = simulator._hash_ids("e", *columns)
    assert (simulator._hash_ids("e", *(column[order] for column in columns)) == ids[order]).all()
    assert len(set(ids)) == len(set(zip(*columns)))
    assert len(set(simulator._hash_ids("e", *columns[::-1])) & set(ids)) == 0


def test_profiles_tell_something_about_taste_and_not_all(shop):
    users = shop.truth.users
    profile = pd.get_dummies(users[["age", "gender", "region"]], dtype=float).to_numpy()
    taste = users.filter(regex="^style_").to_numpy()
    fitted = profile @ np.linalg.lstsq(profile, taste, rcond=None)[0]
    explained = 1 - ((taste - fitted) ** 2).sum() / ((taste - taste.mean(0)) ** 2).sum()
    assert 0.1 < explained < 0.7


def test_sizes_and_switches_that_are_refused():
    for argument in ({"n_items": 10}, {"n_users": 1}, {"n_days": 0}, {"requests_per_day": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(argument))} must be at least"):
            simulate(**argument)
    with pytest.raises(ValueError, match="choose from"):
        simulate(settings=dataclasses.replace(Settings(), examination="telepathy"))


def clicks_by_page_and_place(**law) -> tuple[int, np.ndarray]:
    """Most clicks on one page, and clicks by place, of people who read as the law says."""
    sizes = {"seed": 3, "n_items": 300, "n_users": 30, "n_days": 2, "requests_per_day": 400}
    truth = simulate(**sizes, settings=Settings(**law)).truth
    asked = truth.requests(2000, seed=1)
    clicks = truth.respond(asked, *truth.logging_pages(asked, seed=1), "old", seed=1).query("kind == 'click'")
    return clicks.groupby("request_id").size().max(), np.bincount(clicks["position"].astype(int), minlength=11)[1:]


def test_a_cascade_ends_with_what_is_wanted_and_trust_clicks_the_first_place():
    most, by_cascade = clicks_by_page_and_place(examination="cascade", accident=0)
    assert most == 1
    most, by_network = clicks_by_page_and_place(examination="dbn", accident=0, patience=1, satisfied=1)
    assert most == 1 and (by_network == by_cascade).all()  # a cascade is a network without a doubt
    most, _ = clicks_by_page_and_place(examination="dbn", accident=0, satisfied=0.3)
    assert most > 1
    _, plain = clicks_by_page_and_place()
    _, trusting = clicks_by_page_and_place(trust=0.2)
    more = trusting - plain
    assert more[0] > 200 and more[0] > 3 * more[1:].max() and (more >= 0).all()


def test_a_changed_truth_is_noticed(small, tmp_path):
    write_shop(small, tmp_path / "shop")
    assert load_truth(tmp_path / "shop").seed == 3
    with open(tmp_path / "shop" / "truth" / "world.json", "a") as file:
        file.write(" ")
    with pytest.raises(artefacts.ArtefactError, match="world.json"):
        load_truth(tmp_path / "shop")
    with pytest.raises(artefacts.ArtefactError):
        load_truth(tmp_path / "nowhere")
