"""The simulated shop: the bundled copy, its card, and what must hold of any such shop."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ecomrec.data import artefacts, behaviour, simulator, sources, tables
from ecomrec.data.pages import page_propensities
from ecomrec.data.behaviour import DAY, START, Settings
from ecomrec.data.simulator import DIRT, load_truth, simulate, write_shop

SHOP = Path(__file__).parents[1] / "data" / "shop"
TRUTH = ("items", "users", "queries", "purchases", "raters", "dirt")


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
    again = shop.truth.dirt.key[shop.truth.dirt.kind == "product in other words"]
    products = shop.products.drop_duplicates()
    assert len(products) == 2000 + len(again) and products.item_id.is_unique and again.isin(products.item_id).all()
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
    words = behaviour.lexicon()
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
    truth = dataclasses.replace(shop.truth, purchases=None)
    events, after = simulator._collect(truth, n_days=25, requests_per_day=30, progress=False)
    assert events.event_id.is_unique
    assert events.equals(events.sort_values(["ts", "event_id"], ignore_index=True))
    key = ["request_id", "item_id"]
    pairs = {kind: set(map(tuple, events.loc[events.kind == kind, key].to_numpy())) for kind in events.kind.unique()}
    assert pairs["return"] | pairs["rating"] <= pairs["purchase"] <= pairs["cart"] <= pairs["click"] <= pairs["impression"]
    bought = events[(events.kind == "purchase")].sort_values(["ts", "user_id", "item_id"])
    assert bought[["user_id", "item_id", "ts"]].to_numpy().tolist() == after.purchases.to_numpy().tolist()
    assert set(events.surface) == set(tables.SURFACES) and events[events["query"].notna()].surface.eq("search").all()
    assert events[events.kind == "rating"].stars.between(1, 5).all() and events[events.kind != "rating"].stars.isna().all()
    assert events[events.kind.isin(["return", "rating"])].ts.max() < START + 25 * DAY
    pages = events[events.kind == "impression"].groupby("request_id")
    assert (pages.size() == 10).all() and (pages.position.sum() == 55).all() and (pages.item_id.nunique() == 10).all()
    searched = events[events.kind == "search"].set_index("request_id").ts
    on_search = events[events.surface == "search"]
    assert (on_search.ts >= searched[on_search.request_id].to_numpy()).all() and events.ts.min() >= START
    times = events[events.kind != "search"].pivot(index=key, columns="kind", values="ts")
    for before, after in (("impression", "click"), ("click", "cart"), ("cart", "purchase"), ("purchase", "return"), ("purchase", "rating")):
        both = times[[before, after]].dropna()
        assert len(both) and (both[before] < both[after]).all()


def test_dirt_is_where_the_list_says(shop):
    dirt = shop.truth.dirt
    expected = {"products": 2000, "users": 500, "events": len(shop.events)}
    priced = shop.events.price.notna().mean()
    for kind, rate in DIRT.items():
        rows = dirt[dirt.kind == kind]
        n = expected[rows.table.iloc[0]]
        clustered = {"anonymous": 20, "paid less than nothing": 1 / priced}  # whole sessions; only events with a price
        sd = np.sqrt(n * rate * clustered.get(kind, 1))
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


def test_robots_click_everything_or_nothing(shop):
    robots = shop.truth.dirt.query("kind == 'robot'").key
    events, clickers = shop.events.drop_duplicates("event_id"), 0
    for session in robots:
        kinds = events[events.session_id == session].kind.value_counts()
        assert kinds["search"] >= 20 and (kinds.get("click", 0) == 0 or kinds["click"] >= 0.95 * kinds["impression"])
        clickers += kinds.get("click", 0) > 0
    assert 0 < clickers < len(robots)


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
    late = truth.items.listed_ts.to_numpy() > START + 5 * DAY
    assert late.any()
    requests = truth.requests(20, seed=0, day=2)
    assert (truth.utility(requests)[:, late] == 0).all() and np.isneginf(truth.logging_scores(requests)[:, late]).all()
    assert (truth.utility(truth.requests(20, seed=0, day=40))[:, late] > 0).all()


def test_requests_do_not_collide(small):
    draws = [small.truth.requests(50, seed=seed, day=day) for seed in (0, 1) for day in (0, 1)]
    assert pd.concat(draws).request_id.is_unique
    assert all(((d.ts - START) // DAY == day).all() for d, day in zip(draws, (0, 1, 0, 1)))
    pd.testing.assert_frame_equal(draws[0], small.truth.requests(50, seed=0))
    assert len(small.truth.requests(0, seed=0)) == 0


def test_logged_propensities_are_exact(small):
    truth, requests = small.truth, small.truth.requests(30, seed=2, day=1)
    pages, propensities = truth.logging_pages(requests, seed=0, n_candidates=40)
    scores = truth.logging_scores(requests)
    best = np.sort(np.argsort(-scores, axis=1)[:, :40], axis=1)
    place = np.array([[list(truth.item_ids[row]).index(item) for item in page] for row, page in zip(best, pages)])
    assert np.allclose(propensities, page_propensities(np.take_along_axis(scores, best, axis=1), place), atol=1e-8)


def test_every_surface_is_answered_and_similar_ones_follow_clicks(small):
    truth, asked = small.truth, small.truth.requests(150, seed=7, day=1, surface=None)
    assert set(asked.surface) == {"search", "home"} and (asked["query"].isna() == (asked.surface == "home")).all()
    first = truth.respond(asked, *truth.logging_pages(asked, seed=1), "old", seed=1)
    assert set(first.loc[first.kind == "search", "surface"]) == {"search"}
    more = truth.similar(first, seed=2, share=1.0)
    clicks = first[first.kind == "click"]
    assert 0 < len(more) <= len(clicks) and set(map(tuple, more[["session_id", "anchor"]].to_numpy())) <= set(map(tuple, clicks[["session_id", "item_id"]].to_numpy()))
    pages, propensities = truth.logging_pages(more, seed=2)
    second = truth.respond(more, pages, propensities, "old", seed=2)
    assert (second.kind != "search").all() and (pages != more.anchor.to_numpy()[:, None]).all()
    assert not set(second.event_id) & set(first.event_id) and not set(second.request_id) & set(first.request_id)
    with pytest.raises(ValueError, match="Truth.similar"):
        truth.requests(1, seed=0, surface="similar")
    with pytest.raises(ValueError, match="surface 'shelf' is not known"):
        truth.utility(asked.assign(surface="shelf"))


def test_memory_is_of_the_days_before_and_depends_on_nothing_else(small):
    """Utility follows from requests and purchases alone: in one go as day by day, whatever else was asked between."""
    truth = dataclasses.replace(small.truth, purchases=None)
    asked = pd.concat([truth.requests(40, seed=3, day=day) for day in range(4)], ignore_index=True)
    who, what = asked.user_id.iloc[0], truth.items.item_id[truth.items.category == 0].iloc[0]
    bought = pd.DataFrame({"kind": "purchase", "user_id": [who], "item_id": [what], "ts": [START + DAY + 5]})
    after = truth.remember(bought)
    mine = asked.assign(user_id=who)
    changed = (truth.utility(mine) != after.utility(mine)).any(axis=1)
    assert not changed[mine.ts < START + 2 * DAY].any() and changed[mine.ts >= START + 2 * DAY].any()
    others = asked[asked.user_id != who]
    assert (truth.utility(others) == after.utility(others)).all()
    whole = after.utility(asked)
    for day in range(4):
        rows = ((asked.ts - START) // DAY == day).to_numpy()
        assert np.array_equal(after.utility(asked[rows].reset_index(drop=True)), whole[rows])


def test_shoppers_come_after_they_joined_and_prices_move_after_the_first_week(shop):
    events = simulator._collect(dataclasses.replace(shop.truth, purchases=None), n_days=12, requests_per_day=60, progress=False)[0]
    joined = shop.truth.users.set_index("user_id").joined_ts
    known = events[events.user_id.notna()]
    assert (joined[known.user_id].to_numpy() <= known.ts).all() and (joined > START).sum() > 30
    paid = events[events.kind.isin(["click", "cart"])]
    usual = shop.truth.items.set_index("item_id").price[paid.item_id].to_numpy()
    first_week = (paid.ts < START + 7 * DAY).to_numpy()
    assert (paid.price.to_numpy() == usual)[first_week].all() and (paid.price.to_numpy() != usual)[~first_week].mean() > 0.8


def test_no_input_table_depends_on_the_truth(tmp_path, shop):
    """The four tables are read, cleaned and described without the truth's folder, and nothing that is given away by order or id correlates with it."""
    write_shop(shop, tmp_path / "shop")
    whole = sources.load(str(tmp_path / "shop"))
    for path in (tmp_path / "shop" / "truth").iterdir():
        path.unlink()
    (tmp_path / "shop" / "truth").rmdir()
    without = sources.load(str(tmp_path / "shop"))
    for name in tables.TABLES:
        pd.testing.assert_frame_equal(getattr(whole, name), getattr(without, name))
    for table, key, hidden in ((shop.truth.items, "item_id", ("quality", "promotion", "style")), (shop.truth.users, "user_id", ("budget", "activity", "style_0", "brand_0"))):
        order = table[key].str.slice(1).astype(int)
        assert all(abs(order.corr(table[name], method="spearman")) < 4 / np.sqrt(len(table)) for name in hidden)
    inputs = {column for frame in shop.tables().values() for column in frame}
    secrets = {column for name in ("items", "users", "queries") for column in getattr(shop.truth, name)} - inputs
    assert {"quality", "promotion", "budget", "style_0", "guess"} <= secrets


def test_other_laws_change_the_log_alone():
    sizes = {"seed": 3, "n_items": 200, "n_users": 30, "n_days": 2, "requests_per_day": 20}
    plain, other = simulate(**sizes), simulate(**sizes, settings=Settings(habit=3.0, eta=0.5, plan=0.1))
    for name in ("products", "users", "judgements"):
        pd.testing.assert_frame_equal(plain.tables()[name], other.tables()[name])
    assert not plain.events.equals(other.events)


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
