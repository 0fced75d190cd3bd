"""What runs in processes that tests kill."""

import hashlib
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ecomrec.data.privacy import Keyring
from ecomrec.feedback.store import Store

NOON = 1_764_000_000_000
EVENT = {"event_id": "e1", "ts": NOON, "session_id": "s1", "kind": "click", "item_id": "i7", "position": 1}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ecomrec.feedback.store", "ecomrec.serve.service", "ecomrec.search.engine"])  # once; the imports take longer than the work


def batch_of(name: str) -> list[dict]:
    """Three events that a name determines."""
    digest = hashlib.md5(name.rpartition("-")[0].encode()).hexdigest()
    one = EVENT | {"session_id": digest, "query": f"search {name}"}
    return [one | {"event_id": f"{name}.{n}", "ts": NOON + n, "user_id": f"u{digest}" if n else None, "price": 0.1 + n} for n in range(3)]


def open_and_append(address: str | Path, keys: Path, name: str) -> None:
    with Store(address, keys) as store:
        store.append([EVENT | {"event_id": name}])


def append_for_ever(address: str | Path, keys: Path, told: Path, life: int) -> None:
    """Append from four threads, and write down what was acknowledged."""
    store, file = Store(address, keys, patience=60), os.open(told, os.O_WRONLY | os.O_APPEND)

    def keep_appending(thread: int) -> None:
        number = 0
        while True:
            name = f"{life}-{thread}-{number // 8}-{number}"
            store.append(batch_of(name))
            os.write(file, f"{name}\n".encode())
            number += 1

    with ThreadPoolExecutor(4) as crowd:
        list(crowd.map(keep_appending, range(4)))


def seal_for_ever(folder: Path, told: Path, life: int) -> None:
    """Seal for one new owner after the other, and write down what was handed out."""
    keyring, file, number = Keyring(folder), os.open(told, os.O_WRONLY | os.O_APPEND), 0
    while True:
        owner = f"{life}-{number}"
        os.write(file, f"{owner} {keyring.encrypt(owner, 'query', owner).hex()}\n".encode())
        number += 1


def strike_under(load, kills: int, most: int, strike: Callable[[], object]) -> None:
    """Strike at random moments while a load is acknowledged, at most so many apart; then it must go on by itself, and ends."""
    rng = random.Random(kills)
    for _ in range(kills):
        goal = len(load.acknowledged) + rng.randrange(1, most)
        load.wait(lambda: len(load.acknowledged) >= goal)
        time.sleep(rng.random() / 50)
        strike()
    goal = len(load.acknowledged) + 4
    load.wait(lambda: len(load.acknowledged) >= goal)
    load.end()


def serve_for_ever(saved: Path, address: str | Path, folder: Path, said: Path, room: int = 10_000) -> None:
    """A service of a saved engine without keys; the first line of `said` is its address."""
    from ecomrec.search.engine import Engine
    from ecomrec.serve.service import serve

    sys.stdout = open(said, "w", encoding="utf-8")
    sys.stderr = open(os.devnull, "w", encoding="utf-8")
    serve(lambda: Engine.load(saved), Store(address, folder / "keys", room=room, patience=60), folder / "state", port=0, auth=False, rate=1e6)


def save_for_ever(folder: Path, origins: list[Path]) -> None:
    """Save one engine over the other, without end."""
    from ecomrec.search.engine import Engine

    engines = [Engine.load(origin) for origin in origins]
    while True:
        for engine in engines:
            engine.save(folder)


def train_once(folder: Path, seed: int) -> None:
    """A small training with a checkpoint after each epoch, which ends with its weights beside them."""
    from ecomrec.model.shopper import config_of, train_shopper
    from ecomrec.model.training import Schedule

    split = split_of(seed)
    model, _ = train_shopper(split, config_of(split.train, dim=8), Schedule(epochs=12, seed=seed, patience=100, save_every=0.0), folder=folder / "training", progress=False)
    model.save_pretrained(folder / "model")


def split_of(seed: int):
    """Made-up histories to train on."""
    import numpy as np

    from ecomrec.data.sequences import Sequences, leave_last_out

    histories = np.random.default_rng(seed).integers(0, 10, (60, 6))
    starts = np.arange(61) * 6
    return leave_last_out(Sequences(histories.ravel(), starts, np.array([f"u{number:02d}" for number in range(60)], object), np.array(list("abcdefghij"), object)))
