"""From raw tables to features: two engines give the same rows, and bad input is told or mended, never lost."""

import json

import numpy as np
import pandas as pd
import pytest

from ecomrec.cli import main
from ecomrec.data import sources, tables
from ecomrec.data.cleaning import PLAN, PlanError, Rule
from ecomrec.data.preparation import prepare
from ecomrec.data.relations import ENGINES
from ecomrec.data.sources import SourceError
from ecomrec.data.tables import TableError

NOON = 1_750_000_000_000


def raw(n=6, **change):
    """Small raw tables: n products, and a page with a click for each of them."""
    items = [f"i{i}" for i in range(n)]
    products = pd.DataFrame({"item_id": items, "title": [f"Thing number {i}" for i in range(n)], "category": "x", "brand": "b", "price": [10.0 + i for i in range(n)]})
    rows = [
        {"event_id": f"{kind[0]}{i}", "ts": NOON + 60_000 * i + 10 * step, "session_id": f"s{i}", "request_id": f"r{i}", "user_id": "u", "surface": "search", "kind": kind, "query": "thing",
         "item_id": None if kind == "search" else items[i], "position": None if kind == "search" else 1, "price": None if kind == "search" else 10.0 + i}
        for i in range(n) for step, kind in enumerate(("search", "impression", "click"))
    ]
    columns = ["event_id", "ts", "session_id", "request_id", "user_id", "surface", "kind", "query", "item_id", "position", "price"]
    return {"products": products, "events": pd.DataFrame(rows, columns=columns).astype({"ts": "int64"})} | change


def put(folder, frames):
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    return folder


def prepared(tmp_path, frames, **options):
    """The five tables as both engines write them, held to be the same, and the audit."""
    source, out = put(tmp_path / "raw", frames), {}
    for engine in ENGINES:
        audit = prepare(source, tmp_path / engine, engine, **options)
        out[engine] = {name: pd.read_parquet(tmp_path / engine / f"{name}.parquet") for name in (*tables.TABLES, "features")}
    for name in out["pandas"]:  # a column without any value is read back in another type
        plain = [table.astype(object).where(table.notna(), None) for table in (out["pandas"][name], out["duckdb"][name])]
        pd.testing.assert_frame_equal(*plain, check_exact=True)
    assert json.loads((tmp_path / "pandas" / "audit.json").read_text()) == json.loads((tmp_path / "duckdb" / "audit.json").read_text())
    return out["pandas"], audit


def test_engines_agree_on_the_bundled_shop(tmp_path):
    shop = {name: pd.read_parquet(sources.folder("shop") / f"{name}.parquet") for name in tables.TABLES}
    out, audit = prepared(tmp_path, shop)
    for name in tables.TABLES:
        assert tables.check(name, out[name], "clean")[tables.KEYS[name]].equals(out[name].sort_values(tables.KEYS[name])[tables.KEYS[name]])
    assert len(out["features"]) == (out["events"]["kind"] == "impression").sum() > 30_000
    assert out["features"][["request_id", "item_id"]].apply(tuple, axis=1).is_monotonic_increasing


@pytest.mark.parametrize("n", [0, 1, 6])
def test_empty_tables_and_one_row_pass(tmp_path, n):
    frames = raw(max(n, 1))
    frames["events"] = frames["events"].head(3 * n)
    out, _ = prepared(tmp_path, frames)
    assert len(out["features"]) == n and len(out["events"]) == 3 * n and out["users"].empty
    none, _ = prepared(tmp_path / "none", {name: frame.head(0) for name, frame in raw(1).items()})
    assert none["features"].empty and none["products"].empty


def test_odd_values_become_audited_changes_and_nothing_is_lost(tmp_path):
    frames = raw(8)
    products, events = frames["products"], frames["events"]
    products["brand"] = None  # a column without any value
    products.loc[[0, 1, 2, 3], "price"] = [np.nan, np.inf, -np.inf, -1.0]
    products.loc[4, "title"] = "鞋" * 300_000  # about a megabyte
    products.loc[5, "title"] = "Schuh 👟 обувь 跑步鞋 مرحبا \u202e x"
    events.loc[[1, 4], "ts"] = [0, 4_102_444_800_000 - 1]  # the years 1970 and 2099
    events = pd.concat([events, events.tail(2)]).sample(frac=1, random_state=0)  # unsorted, and two sent twice
    out, audit = prepared(tmp_path, {"products": products, "events": events})
    found = audit.table().set_index("rule")["rows_found"]
    assert found[[rule for rule in found.index if rule.startswith("drop events(ts")]].sum() == 2
    assert found[[rule for rule in found.index if rule.startswith("dedupe events")]].sum() == 2
    assert found[[rule for rule in found.index if "not_finite" in rule and "products" in rule]].sum() + found[[rule for rule in found.index if "not_positive" in rule and "products" in rule]].sum() == 3
    assert len(out["events"]) == len(events) - 4 and len(out["products"]) == 8
    assert out["products"]["price"].isna().sum() == 4 and np.isfinite(out["products"]["price"].dropna()).all()
    assert out["products"]["title"].str.len().max() == 300_000 and out["products"]["title"].str.contains("👟").any()
    assert set(out["products"]["brand"]) == {"unknown"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change, message", [
    ({"products": raw()["products"].assign(price="dear")}, "column price"),
    ({"products": raw()["products"].drop(columns="title")}, "column title.*the column is missing"),
    ({"events": raw()["events"].assign(ts=None)}, "column ts"),
    ({"events": raw()["events"].assign(ts=1_000)}, "column ts"),  # a whole log in 1970: no middle to tell it by
    ({"events": raw()["events"].assign(kind="wink")}, "column kind"),
    ({"products": pd.concat([raw()["products"]] * 2).assign(price=[1.0 + i for i in range(12)])}, None),
])
def test_what_cannot_be_mended_is_named_and_nothing_is_written(tmp_path, engine, change, message):
    source = put(tmp_path / "raw", raw(**change))
    if message is None:  # two prices for one id: the first stays
        assert prepare(source, tmp_path / "out", engine).table()["rows_out"].iloc[-1] == 6
        return
    with pytest.raises(TableError, match=message):
        prepare(source, tmp_path / "out", engine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_that_are_not_whole_are_refused_where_whole_ones_belong(tmp_path, engine):
    frames = raw()
    frames["events"]["quantity"] = 1.5
    with pytest.raises(TableError, match="column quantity"):
        prepare(put(tmp_path / "raw", frames), tmp_path / "out", engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_later_reading_of_the_catalogue_does_not_change_an_earlier_page(tmp_path, engine):
    """Through cleaning too: no rule of the default plan lets one product's later price into another's earlier features."""
    made = []
    for price in (11.0, 900.0):
        frames = raw(8)
        frames["products"]["snapshot_ts"] = [0] * 5 + [NOON + 9 * 86_400_000] * 3
        frames["products"].loc[5:, "price"] = price
        frames["products"].loc[0, "price"] = None
        frames["events"] = frames["events"][frames["events"]["item_id"].isna() | (frames["events"]["item_id"] < "i5")].assign(price=None)
        prepare(put(tmp_path / f"raw{price}", frames), tmp_path / f"out{price}", engine)
        made.append(pd.read_parquet(tmp_path / f"out{price}" / "features.parquet"))
    pd.testing.assert_frame_equal(*made)


@pytest.mark.parametrize("engine", ENGINES)
def test_files_engines_and_plans_that_do_not_exist(tmp_path, engine):
    with pytest.raises(SourceError, match="events.parquet: there is no such file"):
        prepare(put(tmp_path / "half", {"products": raw()["products"]}), tmp_path / "out", engine)
    source = put(tmp_path / "raw", raw())
    (tmp_path / "raw" / "users.parquet").write_text("no parquet")
    with pytest.raises(SourceError, match="users.parquet: cannot be read as Parquet"):
        prepare(source, tmp_path / "out", engine)
    (tmp_path / "raw" / "users.parquet").unlink()
    with pytest.raises(SourceError, match="engine 'polars' is not known"):
        prepare(source, tmp_path / "out", "polars")
    with pytest.raises(PlanError, match="cannot be run"):
        prepare(source, tmp_path / "out", engine, [Rule("erase", "events", ("ts",), "x")])
    assert not (tmp_path / "out").exists()


def test_what_stood_there_stays_when_the_next_run_fails(tmp_path):
    source = put(tmp_path / "raw", raw())
    prepare(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(PlanError):
        prepare(source, tmp_path / "out", plan=[*PLAN, Rule("erase", "events", ("ts",), "x")])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_command_takes_a_plan_and_says_what_is_wrong_in_a_line(tmp_path, capsys):
    command = ["data", "prepare", "-i", str(put(tmp_path / "raw", raw())), "-o", str(tmp_path / "out")]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out") and "rows_found" in said.err
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(json.loads((tmp_path / "out" / "plan.json").read_text())[:3]))
    assert main([*command, "--plan", str(plan), "-e", "duckdb"]) == 0 and len(json.loads((tmp_path / "out" / "audit.json").read_text())) == 3
    plan.write_text("{}")
    capsys.readouterr()
    assert main([*command, "--plan", str(plan)]) == 2 and "a plan is a list of rules" in capsys.readouterr().err
    assert main([*command[:2], "-i", str(tmp_path), "-o", str(tmp_path / "other")]) == 2 and "there is no such file" in capsys.readouterr().err
