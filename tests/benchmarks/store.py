"""How many events a second does the store acknowledge, and how long does each sender wait?

    python tests/benchmarks/store.py            SQLite, and PostgreSQL where it is installed; prints a table and writes results/store.json
    python tests/benchmarks/store.py --seconds 1    shorter

Senders are threads that each wait for their answer before they send again; users are drawn from ten thousand, every event has a query to seal.
"alone" is the same without shared commits. Only ratios within one run mean anything on another machine: most of it is the disk's fsync.
"""

import argparse
import datetime
import itertools
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd

from ecomrec.data.artefacts import write_json
from ecomrec.feedback import store as module
from ecomrec.feedback.store import Store
from ecomrec.lab import _hardware, _versions

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import postgres  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
CELLS = [(1, 1), (8, 1), (32, 1), (1, 20), (8, 20), (1, 1_000)]  # senders, events in a batch


def batches(store: Store, sender: int, size: int):
    """Endless batches of new events."""
    rng, users = np.random.default_rng(sender), [store.pseudonym(str(number)) for number in range(10_000)]
    for number in itertools.count():
        who = users[rng.integers(len(users))]
        one = {
            "ts": 1_764_000_000_000 + number, "user_id": who, "session_id": f"s{sender}", "request_id": f"r{sender}-{number}", "surface": "search", "kind": "impression",
            "query": "trail running shoes", "policy": "v1", "device": "phone",
        }
        yield [one | {"event_id": f"{sender}-{size}-{number}-{n}", "item_id": f"i{n}", "position": n + 1, "propensity": 0.5} for n in range(size)]


def measured(address: str | Path, keys: Path, senders: int, size: int, seconds: float) -> dict[str, float]:
    """Events a second, and milliseconds that a sender waits."""
    waits, done = [], threading.Event()

    with Store(address, keys, room=10**6) as store:
        sources = [batches(store, sender, size) for sender in range(senders)]
        store.append(next(sources[0]))  # tables and files are warm

        def send(source) -> None:
            for batch in source:
                began = time.perf_counter()
                store.append(batch)
                waits.append(time.perf_counter() - began)
                if done.is_set():
                    return

        threads = [threading.Thread(target=send, args=(source,)) for source in sources]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        done.set()
        for thread in threads:
            thread.join()
        taken = time.perf_counter() - began
    p50, p99 = (1e3 * np.percentile(waits, [50, 99])).round(2).tolist()
    return {"events_per_second": round(len(waits) * size / taken), "p50_ms": p50, "p99_ms": p99}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each cell (default: 5)")
    parser.add_argument("--output", type=Path, default=RESULTS / "store.json", help="where the numbers go")
    arguments = parser.parse_args()
    server = None if postgres.missing() else postgres.Postgres()
    cells, group = [], module._GROUP
    try:
        for (senders, size), shared in itertools.product(CELLS, (True, False)):
            if not shared and senders == 1:
                continue  # nobody to share with
            module._GROUP = group if shared else 0
            for database in ("SQLite", "PostgreSQL") if server else ("SQLite",):
                with tempfile.TemporaryDirectory(prefix="ecomrec-bench-") as place:
                    address = Path(place, "shop.db") if database == "SQLite" else server.database()
                    said = measured(address, Path(place, "keys"), senders, size, arguments.seconds)
                cells.append({"database": database, "senders": senders, "batch": size, "commits": "shared" if shared else "alone", **said})
                print(cells[-1], file=sys.stderr)
    finally:
        if server:
            server.close()
    print(pd.DataFrame(cells).to_string(index=False))
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = {name: _versions().get(name) for name in ("python", "pandas")}
    write_json(arguments.output, {"cells": cells, "when": when, "hardware": _hardware(), "versions": versions})


if __name__ == "__main__":
    main()
