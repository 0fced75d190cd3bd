"""How many events a second become features, and in how much memory (Linux): our pandas, DuckDB, and pandas written by hand?

    python tests/benchmarks/preparation.py                  1, 4 and 16 million events; prints a table and writes results/preparation.json
    python tests/benchmarks/preparation.py --millions 1     smaller

Every cell runs in a process of its own: it reads clean Parquet tables, computes all features of what was shown, and writes them.
The simulator's own speed stands beside. Only ratios within one run mean anything on another machine.
"""

import argparse
import datetime
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from ecomrec.data import features, relations
from ecomrec.data.artefacts import write_json
from ecomrec.data.cleaning import clean
from ecomrec.data.simulator import simulate
from ecomrec.data.sources import Tables
from ecomrec.lab import _hardware, _versions

RESULTS = Path(__file__).resolve().parent / "results"
ENGINES = ("by hand", "pandas", "duckdb")
WHOLE = 4  # millions of events that are simulated at most; more are copies with other people
DAY = features.DAY


def peak_gb() -> float:
    """The most memory that this process has held; ru_maxrss would count the process that started it."""
    return round(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e6, 3)


def make_log(folder: Path, millions: int) -> None:
    """Write clean tables of about so many million events; print how many there are, and what simulating them took, as JSON."""
    few, began = min(millions, WHOLE), time.perf_counter()
    shop = simulate(seed=0, n_users=2000 * few, n_days=30, requests_per_day=2650 * few)
    seconds, peak = time.perf_counter() - began, peak_gb()
    simulated = len(shop.events)
    tables, _ = clean(Tables("simulated", **shop.tables()))
    folder.mkdir(parents=True)
    tables.products.to_parquet(folder / "products.parquet", index=False)
    copies = {"users": ("user_id",), "events": ("user_id", "session_id", "request_id", "event_id")}
    for name, ids in copies.items():
        table = getattr(tables, name)
        parts = [table.assign(**{column: table[column] + f"-{copy}" for column in ids}) for copy in range(max(1, millions // WHOLE))]
        pd.concat(parts, ignore_index=True).to_parquet(folder / f"{name}.parquet", index=False)
    print(json.dumps({"events": len(tables.events) * max(1, millions // WHOLE), "simulated": simulated, "seconds": round(seconds, 2), "peak_gb": peak}))


def by_engine(folder: Path, engine: str, target: Path) -> None:
    """Features as the package makes them."""
    events, products, users = (relations.read(folder / f"{name}.parquet", engine) for name in ("events", "products", "users"))
    pages, shown = (relations.settle(relations.nw.from_native(make(events))) for make in (features.requests_of, features.examples))
    relations.write(relations.nw.from_native(features.feature_table(pages, shown, events, products, users)), target)


def before(facts: pd.DataFrame, moments: pd.DataFrame, key: str, when: str, columns: list[str]) -> pd.DataFrame:
    """Running sums of facts strictly before each moment: sums in the order of time, then the last one before, by merge_asof."""
    facts = facts.sort_values(when, kind="stable")
    sums = facts[[key, when]].assign(**facts.groupby(key)[columns].cumsum())
    moments = moments.drop_duplicates([key, when]).sort_values(when)
    return pd.merge_asof(moments, sums, on=when, by=key, allow_exact_matches=False).fillna({name: 0 for name in columns})


def last_before(facts: pd.DataFrame, moments: pd.DataFrame, key: str, when: str, name: str) -> pd.DataFrame:
    """Time of the last fact strictly before each moment."""
    facts = facts[[key, when]].drop_duplicates().sort_values(when).assign(**{name: lambda t: t[when]})
    return pd.merge_asof(moments.drop_duplicates([key, when]).sort_values(when), facts, on=when, by=key, allow_exact_matches=False)


def rounded(values):
    return np.floor(np.asarray(values, dtype=float) * 1e6 + 0.5) / 1e6


def by_hand(folder: Path, target: Path) -> None:
    """The same features as somebody writes them who knows pandas and needs no other engine."""
    events, products, users = (pd.read_parquet(folder / f"{name}.parquet") for name in ("events", "products", "users"))
    begin = events.groupby("request_id")["ts"].min().rename("ts").reset_index()
    pages = events.drop_duplicates("request_id")[["request_id", "user_id", "query", "device"]].merge(begin, on="request_id")
    shown = events[events["kind"] == "impression"][["request_id", "item_id", "position", "propensity"]].drop_duplicates(["request_id", "item_id"])
    done = events[events["kind"].isin(["click", "purchase"])]
    done = done[["request_id", "item_id"]].assign(clicked=(done["kind"] == "click").astype(int), bought=(done["kind"] == "purchase").astype(int))
    shown = shown.merge(done.groupby(["request_id", "item_id"], as_index=False).max(), how="left").fillna({"clicked": 0, "bought": 0})
    # ids as numbers
    products = products.assign(item=pd.factorize(products["item_id"], sort=True)[0], kind_of=pd.factorize(products["category"].fillna(""), sort=True)[0],
                               brand_of=pd.factorize(products["brand"].fillna(""), sort=True)[0], cents=np.floor(products["price"].fillna(0) * 100 + 0.5).astype("int64"))
    item_of = pd.Series(products["item"].to_numpy(), products["item_id"])
    kind_of, brand_of = (products.sort_values("item")[name].to_numpy() for name in ("kind_of", "brand_of"))
    acts = events[events["item_id"].notna()]
    acts = pd.DataFrame({
        "item": item_of[acts["item_id"]].to_numpy(), "ts": acts["ts"].to_numpy(), "day": acts["ts"].to_numpy() // DAY, "kind": acts["kind"].to_numpy(dtype=object),
        "user_id": acts["user_id"].to_numpy(dtype=object), "query": acts["query"].to_numpy(dtype=object), "stars": acts["stars"].to_numpy(dtype=float),
        "cents": np.floor(acts["price"].fillna(0).to_numpy() * 100 + 0.5).astype("int64"), "quantity": acts["quantity"].fillna(1).to_numpy(dtype="int64"),
    })
    who = pd.Index(pd.unique(pd.concat([events["user_id"], pages["user_id"]]).dropna()))
    asks = pd.Index(pd.unique(pd.concat([events["query"], pages["query"]]).dropna()))
    pages = pages.assign(user=who.get_indexer(pages["user_id"]), asked=asks.get_indexer(pages["query"]), day=pages["ts"] // DAY)
    table = shown.merge(pages, on="request_id")
    table["item"] = item_of[table["item_id"]].to_numpy()
    table["category"], table["brand"] = kind_of[table["item"]], brand_of[table["item"]]
    # items and categories, as of midnight
    counts = ["shown", "clicked", "liked", "bought", "votes", "tenths"]
    for name, kinds in {"shown": ["impression"], "clicked": ["click"], "liked": ["click", "cart", "purchase"], "bought": ["purchase"], "votes": ["rating"]}.items():
        acts[name] = acts["kind"].isin(kinds).astype("int64")
    acts["tenths"] = np.floor(acts["stars"].fillna(0) * 10 + 0.5).astype("int64")
    acts["seen"] = np.where((acts["cents"] > 0) & acts["kind"].isin(["impression", "click", "cart", "purchase"]), acts["ts"] // 60_000 * 2**36 + acts["cents"], 0)
    daily = acts.groupby(["item", "day"], as_index=False).agg({name: "sum" for name in counts} | {"seen": "max"})
    read = pd.DataFrame({"item": products["item"], "day": products["snapshot_ts"].fillna(0) // DAY, "votes": products["n_ratings"].fillna(0).astype("int64"), "listed": (products["cents"] > 0).astype("int64"),
                         "list_cents": products["cents"], "seen": np.where(products["cents"] > 0, products["snapshot_ts"].fillna(0) // 60_000 * 2**36 + products["cents"], 0)})
    read["tenths"] = np.floor(products["rating"].fillna(0) * 10 + 0.5).astype("int64") * read["votes"]
    read = read.astype("int64")
    already = before(daily, read[["item", "day"]], "item", "day", ["votes", "tenths"]).set_index("item").loc[read["item"]]
    fresh = read["votes"].to_numpy() > already["votes"].to_numpy()
    for name in ("votes", "tenths"):
        read[name] = np.where(fresh, read[name] - already[name].to_numpy(), 0)
    cells = pd.concat([daily.assign(listed=0, list_cents=0), read.assign(shown=0, clicked=0, liked=0, bought=0)], ignore_index=True)
    first, fade = cells.loc[cells["liked"] > 0, "day"].min(), math.log(2) / 7.0
    cells["fresh"] = cells["liked"] * np.exp((cells["day"] - first) * fade)
    cells["category"] = kind_of[cells["item"]]
    asked = table[["item", "category", "day"]].drop_duplicates()
    of_item = before(cells, asked, "item", "day", [*counts, "fresh"])
    cells = cells.sort_values("day", kind="stable")
    cells["seen"] = cells.groupby("item")["seen"].cummax().astype("Int64")  # a float has too few digits
    of_item = pd.merge_asof(of_item.sort_values("day"), cells[["item", "day", "seen"]], on="day", by="item", allow_exact_matches=False).fillna({"seen": 0})

    def ordinary(moments):
        sums = ["shown", "clicked", "bought", "votes", "tenths", "listed", "list_cents"]
        so_far = before(cells.groupby(["category", "day"], as_index=False)[sums].sum(), moments[["category", "day"]], "category", "day", sums)
        return pd.DataFrame({"category": so_far["category"], "day": so_far["day"], "mean_cents": so_far["list_cents"] / so_far["listed"].clip(lower=1),
                             "mean_stars": (so_far["tenths"] / 10 + 4.0) / (so_far["votes"] + 1), "mean_click": (so_far["clicked"] + 1) / (so_far["shown"] + 20),
                             "mean_purchase": (so_far["bought"] + 1) / (so_far["clicked"] + 10)})

    def level(price, mean):
        known = (price > 0) & (mean > 0)
        return rounded(np.log(np.where(known, price, 1.0) / np.where(known, mean, 1.0)))

    of_item = of_item.merge(ordinary(asked), on=["category", "day"])
    price = (of_item["seen"].astype("int64") % 2**36).astype(float)
    fades = np.exp((of_item["day"] - first) * fade)
    table = table.merge(pd.DataFrame({
        "item": of_item["item"], "day": of_item["day"], "price": rounded(price / 100), "price_level": level(price.to_numpy(), of_item["mean_cents"].to_numpy()),
        "rating": rounded((of_item["tenths"] / 10 + 20 * of_item["mean_stars"]) / (of_item["votes"] + 20)), "votes": of_item["votes"].astype("int64"),
        "popularity": rounded(np.log(1 + np.where(of_item["fresh"] > 0, of_item["fresh"] / fades, 0))),
        "click_rate": rounded((of_item["clicked"] + 20 * of_item["mean_click"]) / (of_item["shown"] + 20)),
        "purchase_rate": rounded((of_item["bought"] + 5 * of_item["mean_purchase"]) / (of_item["clicked"] + 5)),
    }), on=["item", "day"])
    # shoppers, to the millisecond
    liked = acts[(acts["liked"] > 0) & acts["user_id"].notna()]
    liked = pd.DataFrame({"user": who.get_indexer(liked["user_id"]), "item": liked["item"], "ts": liked["ts"], "day": liked["day"], "cents": liked["cents"],
                          "interest": 1, "orders": liked["bought"], "spent": liked["cents"] * liked["quantity"] * liked["bought"]})
    liked["category"], liked["brand"] = kind_of[liked["item"]], brand_of[liked["item"]]
    liked = liked.merge(ordinary(liked)[["category", "day", "mean_cents"]], on=["category", "day"])
    liked["level"] = np.floor(level(liked["cents"].to_numpy(dtype=float), liked["mean_cents"].to_numpy()) * 1e6 + 0.5).astype("int64")
    named = pages.loc[pages["user"] >= 0, ["user", "ts"]]
    of_user = before(liked, named, "user", "ts", ["interest", "orders", "spent", "level"])
    of_user = of_user.merge(last_before(liked, named, "user", "ts", "last")).merge(last_before(liked[liked["orders"] > 0], named, "user", "ts", "last_order"))
    table = table.merge(of_user, on=["user", "ts"], how="left")
    for key, wide in (("category", len(kind_of)), ("brand", len(brand_of)), ("item", len(item_of))):
        pair, mine = table["user"] * 2**31 + table[key], liked.assign(pair=liked["user"] * 2**31 + liked[key])
        asked = pd.DataFrame({"pair": pair, "ts": table["ts"]})[pair.isin(mine["pair"].unique())]
        so_far = before(mine, asked, "pair", "ts", ["interest", "orders"])
        if key == "category":
            so_far = so_far.merge(last_before(mine[mine["orders"] > 0], asked, "pair", "ts", "last_order"), on=["pair", "ts"])
        so_far = so_far.rename(columns={name: f"{key}_{name}" for name in ("interest", "orders", "last_order")})
        table = table.assign(pair=pair).merge(so_far, on=["pair", "ts"], how="left").drop(columns="pair")
    # queries
    clicks = acts[(acts["clicked"] > 0) & acts["query"].notna()]
    clicks = pd.DataFrame({"asked": asks.get_indexer(clicks["query"]), "item": clicks["item"], "day": clicks["day"], "clicks": 1})
    clicks["pair"] = clicks["asked"] * 2**31 + clicks["item"]
    of_query = before(clicks.groupby(["asked", "day"], as_index=False)["clicks"].sum(), pages.loc[pages["asked"] >= 0, ["asked", "day"]], "asked", "day", ["clicks"])
    table = table.merge(of_query.rename(columns={"clicks": "query_clicks"}), on=["asked", "day"], how="left").assign(pair=lambda t: t["asked"] * 2**31 + t["item"])
    of_pair = before(clicks.groupby(["pair", "day"], as_index=False)["clicks"].sum(), table.loc[table["pair"].isin(clicks["pair"].unique()), ["pair", "day"]], "pair", "day", ["clicks"])
    table = table.merge(of_pair.rename(columns={"clicks": "item_clicks"}), on=["pair", "day"], how="left")
    # who, when, and the crosses
    known = users.set_index("user_id")[["age", "gender", "region", "joined_ts"]].reindex(pages["user_id"])
    here = ~(known["joined_ts"].to_numpy(dtype=float, na_value=0) > pages["ts"].to_numpy())
    turn = {"hour": pages["ts"] % DAY / DAY, "weekday": (pages["ts"] // DAY + 3) % 7 / 7, "season": pages["ts"] // DAY % 365.25 / 365.25}
    when = {f"{name}_{side}": rounded(getattr(np, side)(part * (2 * math.pi))) for name, part in turn.items() for side in ("sin", "cos")}
    person = {name: known[name].where(here).to_numpy() for name in ("age", "gender", "region")}
    table = table.merge(pd.DataFrame({"request_id": pages["request_id"], "phone": pages["device"].isin(["phone", "mobile"]).astype("int64"), **when, **person}), on="request_id")
    count = lambda name: table[name].fillna(0).to_numpy()
    days = lambda name: rounded((table["ts"] - table[name]) / DAY)
    usual = rounded(count("level") / 1e6 / (count("interest") + 3))
    gap = table["price_level"].to_numpy() - usual
    by_item = products.sort_values("item")
    listed = by_item["listed_ts"].to_numpy(dtype=float, na_value=np.nan)[table["item"]]
    said = by_item["attributes"].fillna("")
    made_for = np.select([said.str.contains('"gender": ?"women"'), said.str.contains('"gender": ?"men"')], ["female", "male"], "")[table["item"]]
    out = pd.DataFrame({
        **{name: table[name] for name in ("request_id", "item_id", "position", "propensity", "clicked", "bought", *features.CONTEXT, "age", "gender", "region")},
        "interest": count("interest"), "orders": count("orders"), "spent": rounded(count("spent") / 100), "days_since_interest": days("last"), "days_since_order": days("last_order"), "usual_level": usual,
        **{name: table[name] for name in features.ITEM[:-1]}, "days_on_sale": rounded(np.where(listed <= table["ts"], (table["ts"] - listed) / DAY, np.nan)),
        "category_taste": rounded(count("category_interest") / (count("interest") + 3)), "brand_taste": rounded(count("brand_interest") / (count("interest") + 3)), "seen": count("item_interest"),
        "bought_before": count("item_orders"), "days_since_category": days("category_last_order"), "dearer": rounded(np.maximum(gap, 0)), "cheaper": rounded(np.maximum(-gap, 0)),
        "other_gender": (table["gender"].notna() & (made_for != "") & (table["gender"].fillna("") != made_for)).astype("int64"), "query_share": rounded(count("item_clicks") / (count("query_clicks") + 3)),
    })
    out.to_parquet(target, compression="zstd", index=False)


def one_cell(folder: Path, engine: str, target: Path) -> None:
    """Measure one engine in this process; print seconds and peak memory as JSON."""
    began = time.perf_counter()
    by_hand(folder, target) if engine == "by hand" else by_engine(folder, engine, target)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": round(seconds, 3), "peak_gb": peak_gb()}))


def differing(one: Path, two: Path) -> dict[str, int]:
    """Cells that differ between two tables of features, by column."""
    key = ["request_id", "item_id"]
    left, right = (pd.read_parquet(path).sort_values(key, ignore_index=True) for path in (one, two))
    if not left[key].equals(right[key]):
        return {"rows": abs(len(left) - len(right)) or len(left)}
    counts = {}
    for name in left.columns.drop(key):
        a, b = (table[name].astype("float64") if pd.api.types.is_numeric_dtype(table[name]) else table[name] for table in (left, right))
        counts[name] = int((~((a == b) | (a.isna() & b.isna()))).sum())
    return {name: n for name, n in counts.items() if n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 4, 16], help="sizes in million events")
    parser.add_argument("--make", nargs=2, metavar=("FOLDER", "MILLIONS"), help=argparse.SUPPRESS)
    parser.add_argument("--cell", nargs=3, metavar=("FOLDER", "ENGINE", "TARGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        return make_log(Path(arguments.make[0]), int(arguments.make[1]))
    if arguments.cell:
        folder, engine, target = arguments.cell
        return one_cell(Path(folder), engine, Path(target))
    cells, simulated = [], []
    asked = lambda *words: json.loads(subprocess.run([sys.executable, __file__, *map(str, words)], check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory(prefix="ecomrec-bench-") as place:
        for millions in arguments.millions:
            folder = Path(place, "log")
            made = asked("--make", folder, millions)
            events = made["events"]
            if millions <= WHOLE:
                simulated.append({"events": made["simulated"], "seconds": made["seconds"], "peak_gb": made["peak_gb"]})
                print("simulated:", simulated[-1], file=sys.stderr)
            engines = ENGINES if millions <= WHOLE else ("duckdb",)  # in memory, 16 million need more than a laptop has
            for engine in engines:
                said = asked("--cell", folder, engine, f"{place}/{engine}.parquet")
                cells.append({"engine": engine, "events": events, **said, "events_per_second": round(events / said["seconds"])})
                print(cells[-1], file=sys.stderr)
            if millions == min(arguments.millions):
                different = {engine: differing(Path(place, "pandas.parquet"), Path(place, f"{engine}.parquet")) for engine in ("by hand", "duckdb")}
                print(f"cells that differ from our pandas: {different}", file=sys.stderr)
                assert not any(different.values()), different
            shutil.rmtree(folder)
    table = pd.DataFrame(cells)
    print(table.to_string(index=False))
    seconds = table.pivot(index="events", columns="engine", values="seconds").dropna()
    ratios = pd.DataFrame({"pandas / by hand": seconds["pandas"] / seconds["by hand"], "pandas / duckdb": seconds["pandas"] / seconds["duckdb"]}).round(2)
    print(ratios)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if arguments.millions == [1, 4, 16]:
        record = {"cells": cells, "simulator": simulated, "ratios": ratios.reset_index().to_dict("records"), "when": when, "hardware": _hardware(), "versions": {name: _versions().get(name) for name in ("python", "pandas", "numpy")}}
        write_json(RESULTS / "preparation.json", record)


if __name__ == "__main__":
    main()
