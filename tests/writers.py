"""What runs in processes that tests kill. It imports little: each of them starts with it."""

import hashlib
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ecomrec.data.privacy import Keyring
from ecomrec.feedback.store import Store

NOON = 1_764_000_000_000
EVENT = {"event_id": "e1", "ts": NOON, "session_id": "s1", "kind": "click", "item_id": "i7", "position": 1}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ecomrec.feedback.store"])  # once; the import takes longer than the appends


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
