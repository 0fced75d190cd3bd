"""How long does a shopper wait for a page of `ecomrec serve`, and how many pages does it answer in a second?

    python tests/benchmarks/serving.py                  both shops, caches off and on; prints a table and writes results/serving.json
    python tests/benchmarks/serving.py --seconds 3      the same, shorter and noisier
    python tests/benchmarks/serving.py --sources shop   only the simulated shop
    python tests/benchmarks/serving.py --minutes 0      without the minutes at half of the load, and the memory before and after

The service runs in a process of its own on the loopback interface, with keys, the log of pages and all; wrk (Debian) asks it. Queries are unique, users
are drawn from the shop (Chorus has none: strangers). wrk itself needs a part of the processors that the service would have. Only ratios within one run
mean anything on another machine. "Caches off": no page and no query's vector is used again; the vectors of what a shopper asked before are part of her history.
"""

import argparse
import contextlib
import datetime
import hashlib
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
import psutil

from ecomrec.data import sources
from ecomrec.data.artefacts import MANIFEST, home, write_json
from ecomrec.data.cleaning import clean
from ecomrec.lab import _hardware, _versions
from ecomrec.model.text import embed
from ecomrec.search.engine import Engine, learn_order
from ecomrec.search.voice import learn_voice

RESULTS = Path(__file__).resolve().parent / "results"
COMMAND = [sys.executable, "-c", "import sys; from ecomrec.cli import main; sys.exit(main())"]
PACKAGES = ("python", "torch", "fastapi", "uvicorn", "SQLAlchemy", "numpy", "pandas")
CLIENTS = (1, 8)


def engine_folder(source: str) -> Path:
    """A run's folder with the engine of a source, built once and kept in the cache folder of the repository; where there is a log, with all that one can teach."""
    made = hashlib.sha256(inspect.getsource(engine_folder).encode()).hexdigest()[:12]  # of another recipe it would be another engine
    run = home() / ".cache" / "serving" / f"{source}-{made}"
    if not (run / "engine" / MANIFEST).exists():
        print(f"building the engine of {source}", file=sys.stderr)
        shop = clean(sources.load(source))[0]
        engine = Engine.from_products(shop.products)
        if shop.events is not None:  # the first half of the log teaches the shopper model, the second half the order of what all voices say
            before = shop.events["ts"] < shop.events["ts"].median()
            examined, encode = 1 / np.log2(np.arange(2, 34)), lambda texts: embed(engine.encoder, texts)
            voice = learn_voice(shop.products, shop.users, shop.events[before], engine.dense.vectors, encode, examined, progress=False)
            engine = Engine.from_products(shop.products, users=shop.users, events=shop.events[before], voice=voice, vectors=engine.dense.vectors)
            learn_order(engine, shop.events[~before], examined, progress=False)
        engine.quicken(shop.judgements)
        engine.save(run / "engine")
    write_json(run / "metrics.json", {"built": 1})
    return run


def asked(engine: Engine, n: int, seed: int) -> dict[str, list[str]]:
    """Bodies of requests by endpoint, "path<TAB>body": unique queries from the words of titles, users and products drawn from the shop."""
    rng, titles, items = np.random.default_rng(seed), engine.products["title"].tolist(), engine.products["item_id"].tolist()
    users, queries = [None, *engine.users], {}
    while len(queries) < n:
        words = titles[rng.integers(len(titles))].split()
        start = rng.integers(max(1, len(words) - 1))
        queries[" ".join(words[start : start + rng.integers(1, 4)] + [str(len(queries))] * (len(queries) > 2 * len(titles)))[:200]] = None
    who = lambda: users[rng.integers(len(users))]
    page = lambda: {"user_id": who(), "k": 24, "facets": ["category", "brand", "price"]}
    product = lambda: items[rng.integers(len(items))]
    made = {
        "search": [{"query": query, **page()} for query in queries], "recommend": [page() for _ in queries], "similar": [{"item_id": product(), **page()} for _ in queries],
        "suggest": [{"prefix": query[: rng.integers(1, 8)]} for query in queries],
        "events": [[{"event_id": f"{seed}-{number}-{rng.integers(2**62)}", "kind": "click", "item_id": product(), "user_id": who(), "position": 1}] for number in range(n)],
    }
    return {name: [f"/{name}\t{json.dumps(body, ensure_ascii=False)}" for body in bodies] for name, bodies in made.items()}


@contextlib.contextmanager
def serving(run: Path, *options: str) -> Iterator[tuple[str, str, psutil.Process, float]]:
    """`ecomrec serve` on a run: its address, key and process, and the seconds until its first page."""
    with tempfile.TemporaryDirectory() as state:
        began = time.perf_counter()
        command = [*COMMAND, "serve", str(run), "--port", "0", "--state", state, "--keyring", f"{state}/keyring", "--rate", "1000000", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            address, key = process.stdout.readline().strip(), process.stdout.readline().split()[-1]
            head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            with urlopen(Request(f"{address}search", b'{"query": "shoes"}', head), timeout=60) as answer:
                answer.read()
            yield address, key, psutil.Process(process.pid), time.perf_counter() - began
            process.terminate()
            rest = process.stderr.read()
            if "failed" in rest:
                print(rest[-3000:], file=sys.stderr)


def wrk(address: str, key: str, bodies: Path, clients: int, seconds: float, pause: float = 0) -> dict[str, float]:
    """What wrk measures: requests, seconds, errors, and milliseconds that a request took: p50, p95, p99, most."""
    threads = min(clients, 2)
    command = ["wrk", "-t", str(threads), "-c", str(clients), "-d", f"{max(1, round(seconds))}s", "--timeout", "30s", "-s", str(RESULTS.parent / "serving.lua"), address]
    done = subprocess.run([*command, "--", str(bodies), key, str(round(pause)), str(threads)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(run: Path, engine: Engine, cached: bool, seconds: float) -> tuple[list[dict], float, int]:
    """All endpoints with one and several clients, the seconds from the command to the first page, and the rows of pages that the log had no room for."""
    rows, seeds = [], itertools.count(1)
    with serving(run, *[] if cached else ["--no-cache"]) as (address, key, _, start), tempfile.TemporaryDirectory() as folder:
        for clients in CLIENTS:
            for endpoint, lines in asked(engine, 20_000, next(seeds)).items():
                bodies = Path(folder) / f"{endpoint}.txt"
                bodies.write_text("\n".join(lines) + "\n", encoding="utf-8")
                said = wrk(address, key, bodies, clients, seconds)
                rows.append({"endpoint": endpoint, "clients": clients, "cached": cached, "per_second": round(said["requests"] / said["seconds"], 1), **said})
                print(rows[-1], file=sys.stderr)
        with urlopen(Request(f"{address}metrics", headers={"Authorization": f"Bearer {key}"}), timeout=60) as answer:
            dropped = int(float(re.search(r"^ecomrec_dropped_rows (\S+)", answer.read().decode(), re.MULTILINE)[1]))
    return rows, start, dropped


def soaked(run: Path, engine: Engine, minutes: float, per_second: float) -> dict[str, float]:
    """Memory during minutes at about a given load of all endpoints, of one process that is at work: before them come the full load for two fifths as long, until what is held of the last
    events, queries and pages has reached its bounds, and the given load for a tenth as long."""
    with serving(run) as (address, key, process, _), tempfile.TemporaryDirectory() as folder:
        lines = [line for several in zip(*asked(engine, 40_000, 99).values()) for line in several]
        bodies = Path(folder) / "mixed.txt"
        bodies.write_text("\n".join(lines) + "\n", encoding="utf-8")
        pause = 1000 * CLIENTS[-1] / per_second
        first = process.memory_info().rss
        wrk(address, key, bodies, CLIENTS[-1], 24 * minutes)
        with ThreadPoolExecutor(1) as crowd:
            asking, held = crowd.submit(wrk, address, key, bodies, CLIENTS[-1], 67 * minutes, pause), []
            for _ in range(11):
                time.sleep(6 * minutes)
                held.append(process.memory_info().rss)
    return {"minutes": minutes, "first_mib": round(first / 2**20, 1), "rss_mib": [round(rss / 2**20, 1) for rss in held], "change": round(held[-1] / held[0] - 1, 4), **asking.result()}


def table(source: str, rows: list[dict]) -> str:
    """The cells of a source as a table."""
    lines = [f"\n{source}", "| endpoint | clients | caches | p50 ms | p95 ms | p99 ms | requests/s | errors |", "|---|---:|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        lines.append(f"| {row['endpoint']} | {row['clients']} | {'on' if row['cached'] else 'off'} | {row['p50']:.1f} | {row['p95']:.1f} | {row['p99']:.1f} | {row['per_second']:.0f} | {row['errors']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="how long each cell is measured (default: 10)")
    parser.add_argument("--minutes", type=float, default=10, help="how long memory is watched, in ten steps; 0 for not (default: 10)")
    parser.add_argument("--sources", nargs="+", default=["shop", "chorus"], help="whose engines (default: shop chorus)")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.json", help="where the numbers go")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("there is no wrk here: `make system` installs it")
    load, found = os.getloadavg()[0], {}
    if load > 0.5:
        print(f"Other processes are at work (load {load:.1f}): repeat this on a quiet machine.\n")
    for source in arguments.sources:
        if not sources.is_available(source):
            print(f"{source} is not here: ecomrec data fetch {source}\n")
            continue
        run = engine_folder(source)
        began = time.perf_counter()
        engine = Engine.load(run / "engine")
        load_seconds = time.perf_counter() - began
        off, start, dropped = measured(run, engine, False, arguments.seconds)
        on, _, more = measured(run, engine, True, arguments.seconds)
        found[source] = {"date": datetime.date.today().isoformat(), "load_before": round(load, 2), "seconds": arguments.seconds, "products": len(engine.products), "seconds_to_load": round(load_seconds, 2), "seconds_to_first_page": round(start, 1), "dropped_rows": {"caches off": dropped, "caches on": more}, "cells": off + on}
        print(f"{table(source, off + on)}\n\nloaded in {load_seconds:.1f} s, first page {start:.1f} s after the command; rows of pages that were not kept: {dropped:,}, with caches {more:,}")
        if arguments.minutes:
            several = pd.DataFrame(off).query("clients > 1")["per_second"]
            found[source]["soak"] = soaked(run, engine, arguments.minutes, len(several) / (1 / several).sum() / 2)
            print(f"memory: {found[source]['soak']}")
    versions = _versions()
    before = json.loads(arguments.output.read_text(encoding="utf-8"))["sources"] if arguments.output.exists() else {}
    write_json(arguments.output, {"hardware": _hardware(), "versions": {name: versions[name] for name in PACKAGES if name in versions}, "sources": before | found})


if __name__ == "__main__":
    main()
