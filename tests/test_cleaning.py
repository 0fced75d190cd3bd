"""What the cleaning plan must keep, and what its audit may say."""

from dataclasses import replace

import duckdb
import narwhals as nw
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomrec.data.cleaning import PLAN, PlanError, Rule, against_truth, apply_rule, clean, clean_frames, compare_plans, load_plan, save_plan
from ecomrec.data.relations import forget, to_pandas
from ecomrec.data.simulator import load_truth
from ecomrec.data.sources import Tables, folder, is_available, load
from ecomrec.data.tables import TableError, check, empty

DAY = 86_400_000


def _tables(**events):
    products = check("products", pd.DataFrame({"item_id": ["a", "b"], "title": ["Shoe", "Sock"], "category": ["x", "x"], "price": [10.0, 20.0]}))
    frame = pd.DataFrame({"event_id": ["1", "2"], "ts": [1_700_000_000_000] * 2, "session_id": ["s", "t"], "kind": ["search", "click"], "item_id": [None, "a"]} | events)
    return Tables("toy", products, events=check("events", frame))


@pytest.fixture(scope="module")
def shop():
    return load("shop")


def test_cleaning_does_not_depend_on_the_order_of_the_file(shop):
    shuffled = replace(shop, **{t: getattr(shop, t).sample(frac=1, random_state=1) for t in ("products", "events", "users", "judgements")})
    (one, audit), (two, other) = clean(shop), clean(shuffled)
    for table in ("products", "events", "users", "judgements"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(two, table))
    columns = ["rule", "rows_in", "rows_out", "cells_changed"]
    pd.testing.assert_frame_equal(audit.table()[columns], other.table()[columns])


def test_the_audit_adds_up(shop):
    tables, audit = clean(shop)
    for table in ("products", "events"):
        lines = audit.table()[[f" {table}(" in rule for rule in audit.table()["rule"]]]
        assert lines["rows_in"].iloc[0] == len(getattr(shop, table)) and lines["rows_out"].iloc[-1] == len(getattr(tables, table))
        assert (lines["rows_in"].iloc[1:].to_numpy() == lines["rows_out"].iloc[:-1].to_numpy()).all()


def test_the_input_is_not_changed(shop):
    before = shop.events.copy()
    clean(shop)
    pd.testing.assert_frame_equal(before, shop.events)


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_tiny_tables_pass(rows):
    tables = _tables()
    cleaned, _ = clean(replace(tables, products=tables.products[:1], events=tables.events[:rows]))
    assert len(cleaned.events) == rows
    assert clean(Tables("none", empty("products")))[0].products.empty


def test_an_anonymous_search_without_item_is_kept():
    assert len(clean(_tables())[0].events) == 2


@settings(max_examples=25)
@given(st.lists(st.integers(-5000, 5000), min_size=3, max_size=20))
def test_events_within_a_year_of_the_middle_stay(days):
    n = len(days)
    ts = [1_700_000_000_000 + 40_000 * i + day * DAY for i, day in enumerate(days)]
    tables = _tables(event_id=list(map(str, range(n))), ts=ts, session_id=[f"s{i}" for i in range(n)], kind=["click"] * n, item_id=["a"] * n)
    try:
        kept = set(clean(tables)[0].events["ts"])
    except TableError as error:
        assert error.column == "ts"
    else:
        middle = pd.Series(ts).median()
        assert kept == {t for t in ts if abs(t - middle) <= 9 * 365 * DAY}


def test_ordinary_logs_survive():
    years = [1_700_000_000_000 + day * DAY for day in range(1095)]
    n = len(years)
    tables = _tables(event_id=list(map(str, range(n))), ts=years, session_id=[f"s{i}" for i in range(n)], kind=["click"] * n, item_id=["a"] * n)
    assert len(clean(tables)[0].events) == n
    wide = 3 * 48
    tables = _tables(event_id=list(map(str, range(wide))), ts=[1_700_000_000_000] * wide, session_id=["s"] * wide, kind=["impression"] * wide,
                     item_id=["a"] * wide, request_id=[f"r{i // 48}" for i in range(wide)], position=[i % 48 + 1 for i in range(wide)])
    assert len(clean(tables)[0].events) == wide
    basket = _tables(kind=["purchase"] * 2, item_id=["a"] * 2, session_id=["s"] * 2, price=[5.0, 4.0], quantity=[1, 3])
    assert len(clean(basket)[0].events) == 2


@pytest.mark.parametrize("rule", [
    Rule("blank", "products", ("n_ratings",), "x", {"when": "outside", "low": 0, "high": 5}), Rule("fill", "products", ("n_ratings",), "x", {"by": "category"}),
    Rule("fill", "products", ("n_ratings",), "x", {"value": 0}),
])
def test_whole_numbers_with_gaps_are_changed_and_counted(rule):
    tables = _tables()
    products = tables.products.assign(n_ratings=pd.array([9, None], dtype="Int64"))
    _, audit = clean(replace(tables, products=products), [rule])
    assert audit.table()["cells_changed"].tolist() == [1]


def test_a_price_is_filled_from_its_category_or_from_all():
    products = check("products", pd.DataFrame({"item_id": list("abcd"), "title": "x", "category": ["p", "p", "p", "q"], "price": [1.0, 3.0, -1.0, None]}))
    by_hand = [*PLAN, Rule("fill", "products", ("price",), "price unknown", {"by": "category"})]
    assert clean(Tables("toy", products), by_hand)[0].products["price"].tolist() == [1.0, 3.0, 2.0, 2.0]
    assert clean(Tables("toy", products))[0].products["price"].isna().tolist() == [False, False, True, True]  # not by default: a later price would tell


@pytest.mark.parametrize("rule", [
    Rule("erase", "events", ("ts",), "x"), Rule("drop", "events", ("time",), "x", {"when": "missing"}), Rule("drop", "events", ("ts",), "x", {"when": "odd"}),
])
def test_a_rule_that_cannot_run_is_named(rule):
    with pytest.raises(ValueError, match="cannot be run") as caught:
        clean(_tables(), [rule])
    assert str(rule) in str(caught.value)


def test_the_plan_is_plain_data():
    assert len({str(rule) for rule in PLAN}) == len(PLAN) and all(rule.why for rule in PLAN)


def test_a_column_without_a_value_stays_text(shop):
    tables, _ = clean(replace(shop, products=shop.products.assign(brand=pd.Series(pd.NA, index=shop.products.index, dtype="str"))))
    assert tables.products["brand"].eq("unknown").all()


def test_a_note_counts_and_changes_nothing(shop):
    note = Rule("note", "events", ("user_id",), "nobody", {"when": "missing"})
    (noted, audit), (plain, _) = clean(shop, [note, *PLAN]), clean(shop)
    assert audit.table()["rows_found"].iloc[0] == shop.events["user_id"].isna().sum() > 0 and audit.table()["examples"].iloc[0]
    for table in ("products", "users", "events"):
        pd.testing.assert_frame_equal(getattr(noted, table), getattr(plain, table))


def test_a_plan_is_kept_and_compared(tmp_path):
    save_plan(PLAN, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == PLAN and compare_plans(PLAN, PLAN) == ""
    changed = [*PLAN[1:], Rule("note", "events", ("kind",), "sent back", {"when": "is", "value": "return"})]
    assert compare_plans(PLAN, changed).splitlines() == [f"-{PLAN[0]}", "+note events(kind, when=is, value=return)"]
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="a plan is a list of rules"):
        load_plan(tmp_path / "plan.json")


@given(st.lists(st.tuples(st.sampled_from("uvwx"), st.sampled_from("abcd")), max_size=30), st.integers(1, 4))
def test_a_core_is_the_largest_part_in_which_everybody_has_enough(pairs, k):
    rule, columns = Rule("core", "events", ("user_id", "item_id"), "", {"k": k}), ["user_id", "item_id"]
    frame = pd.DataFrame(pairs, columns=columns, dtype="str").assign(event_id=[f"{i:03}" for i in range(len(pairs))])
    kept = apply_rule(frame, rule)
    assert all(kept[column].value_counts().ge(k).all() for column in columns)
    for row in set(frame["event_id"]) - set(kept["event_id"]):  # whoever came back alone would have too few again
        again = pd.concat([kept, frame[frame["event_id"] == row]])
        assert k > 1 and any(again[column].value_counts().lt(k).any() for column in columns)
    assert set(apply_rule(frame.iloc[::-1], rule)["event_id"]) == set(kept["event_id"])


def test_planted_dirt_is_found_and_nothing_else(shop):
    kinds = against_truth(shop, load_truth(folder("shop")).dirt)
    assert (kinds.loc[["duplicates", "clocks", "impossible values", "unknown keys"], ["precision", "recall"]] >= 0.99).all(axis=None)
    assert (kinds.loc["robots", ["precision", "recall"]] >= 0.95).all() and (kinds["planted"] > 0).all()


def test_converted_prices_are_the_true_ones(shop):
    dirt, products = load_truth(folder("shop")).dirt, clean(shop)[0].products.set_index("item_id")
    wrong = dirt[dirt["kind"].isin(["price in cents", "price in yuan"])]
    assert products["price"][wrong["key"]].to_numpy() == pytest.approx(wrong["value"].astype(float).to_numpy(), abs=0.01)
    assert set(products["currency"]) == {"EUR"}


def test_what_is_listed_twice_becomes_one_and_its_events_follow():
    tables = _tables(item_id=["b", "a"])
    both = tables.products.assign(title=["Blue Running Shoes 42", "42 blue running shoes - new"], price=[10.0, 10.05], parent_id=["p", "q"], description="light")
    judged = check("judgements", pd.DataFrame({"query_id": "q", "query": "shoes", "item_id": ["a", "b"], "grade": [3, 3]}))
    merged, audit = clean(replace(tables, products=both, judgements=judged))
    assert merged.products["item_id"].tolist() == ["a"] and merged.events["item_id"].tolist() == ["a", "a"] and len(merged.judgements) == 1
    told = audit.table()[[" judgements(" in rule for rule in audit.table()["rule"]]]
    assert told["rows_found"].tolist() == [1, 1] and told["rows_out"].tolist() == [2, 1]  # one that follows, one that is the same now
    assert audit.table().query("rows_found > 0 and rule.str.startswith('merge')")["examples"].tolist() == ["b = a"]
    unknown = ({"price": [10.0, None]}, {"parent_id": [None, None]}, {"description": [None, "light"]})  # what is not known is no evidence
    for change in ({"title": ["Blue Running Shoes 42", "Blue Running Shoes 43"]}, {"price": [10.0, 12.0]}, {"parent_id": ["p", "p"]}, {"description": ["x", "y"]}, *unknown):
        assert len(clean(replace(tables, products=both.assign(**change)))[0].products) == 2


def test_which_of_two_rows_with_one_key_stays_does_not_depend_on_the_file():
    rows = pd.DataFrame({"item_id": [f"i{i % 50}" for i in range(150)], "title": "x", "price": [float(i) for i in range(150)]})
    rule = Rule("dedupe", "products", ("item_id",), "listed twice")
    one, other = (apply_rule(table, rule) for table in (rows, rows.iloc[::-1]))
    pd.testing.assert_frame_equal(one, other)
    by_duckdb, _ = clean_frames({"products": nw.from_native(duckdb.from_df(rows.sample(frac=1, random_state=0)))}, [rule])
    assert to_pandas(by_duckdb["products"])["price"].tolist() == one["price"].tolist()
    forget()


def test_luxury_a_long_log_and_a_patient_shopper_survive_the_plan():
    prices = [10.0 * 1.05 ** (i % 20 - 10) for i in range(60)] + [200.0, 400.0]
    products = check("products", pd.DataFrame({"item_id": [f"i{i:02}" for i in range(62)], "title": [f"Thing number {i}" for i in range(62)], "category": "x", "price": prices}))
    months = [1_300_000_000_000 + i * 30 * DAY for i in range(168)]  # fourteen years
    pages = [1_700_000_000_000 + i * 45_000 for i in range(16)]  # sixteen pages, one every 45 seconds
    ts = [*months, *pages]
    events = pd.DataFrame({"event_id": [f"e{i:03}" for i in range(len(ts))], "ts": ts, "session_id": [f"s{i}" for i in range(168)] + ["patient"] * 16,
                           "request_id": [f"r{i}" for i in range(len(ts))], "kind": "search"})
    cleaned, audit = clean(Tables("toy", products, events=check("events", events)))
    assert len(cleaned.events) == len(ts) and cleaned.products["price"].tolist() == products["price"].tolist()


@pytest.mark.parametrize("name", ["completejourney", "online_retail", "ubi", "chorus"])
def test_no_real_catalogue_is_merged_or_rescaled_by_default(name, real_data):
    if not is_available(name):
        pytest.skip(f"{name} is not in ECOMREC_DATA")
    raw = load(name)
    cleaned, audit = clean(replace(raw, events=None, users=None, judgements=None))
    found = audit.table().set_index("rule")["rows_found"]
    assert not found[[rule for rule in found.index if rule.startswith(("merge", "rescale", "convert"))]].any()
    assert len(cleaned.products) >= 0.99 * len(raw.products)


@pytest.mark.parametrize("rule", [
    Rule("drop", "events", ("ts",), "no condition"), Rule("fill", "products", ("price",), "no way"), Rule("drop", "events", ("item_id",), "x", {"when": "unknown", "known_in": "catalogue"}),
    Rule("drop", "product", ("price",), "no such table", {"when": "missing"}), Rule("blank", "products", ("title",), "a text is not positive", {"when": "not_positive"}),
])
def test_options_that_cannot_be_used_are_told(rule):
    with pytest.raises(PlanError, match="rule '"):
        clean(_tables(), [rule])


def test_a_model_predicts_what_a_median_cannot(shop):
    products = clean(shop)[0].products.dropna(subset="price").reset_index(drop=True)
    gaps = products.index % 7 == 0
    holes = replace(shop, products=products.assign(price=products["price"].where(~gaps)), events=None, users=None, judgements=None)
    error = {}
    for name, options in {"median": {"by": "category"}, "model": {"using": ["category", "brand", "rating", "n_ratings"]}}.items():
        filled, audit = clean(holes, [Rule("fill", "products", ("price",), "unknown", options)])
        assert audit.table()["cells_changed"].tolist() == [gaps.sum()] and filled.products["price"].notna().all()
        error[name] = (filled.products["price"] / products["price"])[gaps].sub(1).abs().mean()
    assert error["model"] < 0.8 * error["median"]


def test_outliers_are_told_by_group_and_without_spread_there_are_none(shop):
    rule = Rule("blank", "products", ("price",), "in cents", {"when": "outlier", "by": "category", "limit": 6})
    products = clean(shop)[0].products
    prices = products["price"].where(products.index != 7, products["price"] * 100)
    _, audit = clean(Tables("toy", products.assign(price=prices)), [rule])
    assert audit.table()["rows_found"].tolist() == [1] and audit.table()["examples"].iloc[0].startswith(products["item_id"].iloc[7])
    same = products.head(3).assign(price=[5.0, 5.0, 9.0], category="x")
    assert clean(Tables("toy", same), [rule])[1].table()["rows_found"].tolist() == [0]
