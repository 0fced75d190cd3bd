"""The service, what saves and what trains, killed at random moments: nothing that was acknowledged is lost, nothing half-written is read."""

import asyncio
import json
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
import pytest
from safetensors.torch import load_file
from writers import PROCESSES, batch_of, save_for_ever, serve_for_ever, strike_under, train_once

from ecomrec.data.tables import check
from ecomrec.feedback.store import Store
from ecomrec.search.engine import Engine
from ecomrec.search.recipe import Recipe
from ecomrec.serve.service import _most_connections

KILLS = [10, pytest.param(100, marks=pytest.mark.slow)]
WORDS = {"words": 0.5, "attributes": 0.5, "vectors": 0.0}


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> list[Path]:
    """Two small saved engines."""
    folder = tmp_path_factory.mktemp("engines")
    for number in (40, 60):
        products = pd.DataFrame({"item_id": [f"i{n}" for n in range(number)], "title": [f"running shoes {n}" for n in range(number)], "price": 20.0})
        Engine.from_products(products, recipe=Recipe(candidates=WORDS, order=WORDS)).save(folder / str(number))
    return [folder / "40", folder / "60"]


class Served:
    """A service in a process of its own, and what its clients heard.

    Threads send batches of events, each until it is acknowledged; one asks for pages.
    """

    def __init__(self, saved: Path, address, folder: Path, threads: int, room: int = 10_000):
        self.arguments, self.said, self.place = (saved, address, folder), folder / "said", ("127.0.0.1", 0)
        self.room, self.acknowledged, self.statuses, self.pages, self.done = room, [], [], [], threading.Event()
        (folder / "state").mkdir()
        self.start()
        self.crowd = ThreadPoolExecutor(threads + 1)
        self.running = [self.crowd.submit(self._send, thread) for thread in range(threads)] + [self.crowd.submit(self._look)]

    def start(self) -> None:
        self.said.write_text("")
        self.process = PROCESSES.Process(target=serve_for_ever, args=(*self.arguments, self.said, self.room))
        self.process.start()
        deadline = time.monotonic() + 60
        while not self.said.read_text().endswith("\n"):
            assert self.process.is_alive() and time.monotonic() < deadline
            time.sleep(0.005)
        url = urlsplit(self.said.read_text().strip())
        self.place = url.hostname, url.port

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def _ask(self, line: list, path: str, body: object) -> int:
        """Status of the answer, 0 if there was none."""
        try:
            if not line or line[0].port != self.place[1]:
                line[:] = [HTTPConnection(*self.place, timeout=60)]
            line[0].request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = line[0].getresponse()
            answer.read()
            return answer.status
        except (OSError, HTTPException):
            line.clear()
            return 0

    def _send(self, thread: int) -> None:
        line, number = [], 0
        while not self.done.is_set():
            name = f"0-{thread}-{number // 8}-{number}"
            status = self._ask(line, "/events", batch_of(name))
            self.statuses.append(status)
            if status == 200:
                self.acknowledged.append(name)
                number += 1
            else:
                assert status in (0, 503)
                self.done.wait(0.02)

    def _look(self) -> None:
        line = []
        while not self.done.is_set():
            self.pages.append((time.monotonic(), self._ask(line, "/search", {"query": "shoes", "k": 5})))
            self.done.wait(0.01)

    def wait(self, condition) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline and not [thread for thread in self.running if thread.done()]
            time.sleep(0.002)

    def end(self) -> None:
        self.done.set()
        assert [thread.result() for thread in self.running] == [None] * len(self.running)
        self.crowd.shutdown()
        self.process.terminate()
        self.process.join(60)
        assert self.process.exitcode == 0

    def assert_whole(self) -> None:
        """Every acknowledged batch is in the store, once; what else is there is whole too."""
        _, address, folder = self.arguments
        with Store(address, folder / "keys") as store:
            there = store.events()
            there = there[~there["kind"].isin(["search", "impression"])].reset_index(drop=True)
            names = sorted(there["event_id"].str.rpartition(".")[0].unique())
            assert len(set(self.acknowledged)) == len(self.acknowledged) and set(self.acknowledged) <= set(names)
            sent = [event | {"user_id": event["user_id"] and store.pseudonym(event["user_id"])} for name in names for event in batch_of(name)]
            pd.testing.assert_frame_equal(there, check("events", pd.DataFrame(sent)).sort_values(["ts", "event_id"], ignore_index=True))


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_service_starts_again_by_itself_and_has_lost_nothing(engines, address, tmp_path, kills):
    served = Served(engines[0], address, tmp_path, threads=4)
    strike_under(served, kills, 60, lambda: (served.kill(), served.start()))
    assert 0 in served.statuses and len(served.acknowledged) > kills
    served.assert_whole()


@pytest.mark.parametrize("kills", KILLS)
def test_events_of_a_service_survive_kills_of_its_database(engines, postgres, tmp_path, kills):
    served = Served(engines[0], postgres.database(), tmp_path, threads=4)
    strike_under(served, kills, 40, lambda: (postgres.kill(), postgres.start()))
    assert {status for _, status in served.pages} == {200} and len(served.acknowledged) > kills
    served.assert_whole()


@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_while_the_database_is_gone_pages_go_on_and_events_are_held_to_the_bound(engines, postgres, tmp_path, seconds):
    served = Served(engines[0], postgres.database(), tmp_path, threads=24, room=30)
    served.wait(lambda: len(served.acknowledged) >= 100)
    postgres.stop()
    time.sleep(0.1)  # answers that are under way
    gone, stood = time.monotonic(), len(served.acknowledged)
    served.wait(lambda: time.monotonic() > gone + seconds and served.statuses.count(503) >= 20)
    back, before, refused = time.monotonic(), len(served.acknowledged), served.statuses.count(503)
    postgres.start()
    served.wait(lambda: len(served.acknowledged) >= before + 100)
    served.end()
    assert before == stood and refused >= 1 and 0 not in served.statuses
    meanwhile = [status for when, status in served.pages if gone < when < back]
    assert len(meanwhile) > 1 and {status for _, status in served.pages} == {200}
    served.assert_whole()


async def send_until_kept(place: tuple[str, int], name: str) -> int:
    """Send a batch until it is acknowledged; returns how often it was refused."""
    body, refused = json.dumps(batch_of(name)).encode(), 0
    while True:
        reader, writer = await asyncio.open_connection(*place)
        writer.write(b"POST /events HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        head, _, said = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        if head.split()[1] == b"200":
            return refused
        assert head.split()[1] == b"503" and b"retry-after" in head.lower() and json.loads(said)["error"]
        refused += 1
        await asyncio.sleep(1)


def test_a_crowd_that_waits_for_the_database_shuts_nobody_out_of_the_pages(engines, postgres, tmp_path):
    _most_connections()  # of this process too, as the service does for its own
    served = Served(engines[0], postgres.database(), tmp_path, threads=1)
    served.wait(lambda: len(served.acknowledged) >= 1)
    postgres.stop()
    names = [f"crowd-{number}" for number in range(1_500)]

    async def crowd() -> list[int]:
        senders = [asyncio.create_task(send_until_kept(served.place, name)) for name in names]
        await asyncio.sleep(3)
        postgres.start()
        return await asyncio.gather(*senders)

    refused = asyncio.run(crowd())
    served.acknowledged += names
    served.end()
    assert sum(refused) > 1_000 and {status for _, status in served.pages} == {200}
    served.assert_whole()


@pytest.mark.parametrize("kills", KILLS)
def test_of_two_versions_one_is_there_whenever_a_save_is_killed(engines, tmp_path, kills):
    rng, folder = random.Random(kills), tmp_path / "engine"
    Engine.load(engines[0]).save(folder)
    found = set()
    for _ in range(kills):
        process = PROCESSES.Process(target=save_for_ever, args=(folder, engines))
        process.start()
        for _ in range(rng.randrange(1, 4)):  # so many saves
            before = folder.stat().st_ino
            while folder.stat().st_ino == before:
                assert process.is_alive()
                time.sleep(0.001)
        time.sleep(rng.random() / 10)
        process.kill()
        process.join()
        engine = Engine.load(folder)
        found.add(len(engine.search("running shoes", k=100)) and len(engine.products))
    assert found == {40, 60}


def stamp(folder: Path) -> int:
    """When the last checkpoint of a training was written; 0 where there is none, or it takes the place of another right now."""
    try:
        return (folder / "training" / "manifest.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("kills", KILLS)
def test_a_training_that_is_killed_ends_where_it_would_have_ended(tmp_path, kills):
    rng, killed, seed = random.Random(kills), 0, 0
    while killed < kills:
        whole, torn = tmp_path / f"whole {seed}", tmp_path / f"torn {seed}"
        for folder in (whole, torn):
            while not (folder / "model").exists():
                process = PROCESSES.Process(target=train_once, args=(folder, seed))
                process.start()
                if folder is whole:
                    process.join()
                before = stamp(folder)
                while process.is_alive() and stamp(folder) == before:
                    time.sleep(0.001)
                process.join(rng.random() / 2)
                if process.is_alive():
                    process.kill()
                    killed += 1
                process.join()
                assert process.exitcode in (0, -signal.SIGKILL)
        one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, torn))
        assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
        seed += 1
