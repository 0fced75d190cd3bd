"""Every acknowledged event is there, once and whole, whatever is killed; and gone when it is to be forgotten."""

import asyncio
import hashlib
import itertools
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.engine.base import Transaction
from writers import EVENT, NOON, PROCESSES, append_for_ever, batch_of, open_and_append, strike_under

from ecomrec.data.logs import read_log
from ecomrec.data.sources import load
from ecomrec.data.tables import CONTRACTS, KINDS, TableError, check
from ecomrec.feedback import store as module
from ecomrec.feedback.store import EventError, Store, StoreError, StoreFull, StoreGone, _by_contract, _exact, checked_rows

FEWER = settings(max_examples=settings().max_examples // 4)  # each looks at a whole table
KILLS = [10, pytest.param(100, marks=pytest.mark.slow)]


@pytest.fixture
def shop(address, tmp_path):
    with Store(address, tmp_path / "keys", patience=60) as store:
        yield store


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def used(request, tmp_path_factory):
    """A store for many examples, each of which empties it first."""
    folder = tmp_path_factory.mktemp("used")
    with Store(folder / "shop.db" if request.param == "sqlite" else request.getfixturevalue("postgres").database(), folder / "keys", room=10**6) as store:
        yield store


def emptied(store: Store) -> Store:
    with store._engine.begin() as connection:
        connection.execute(sa.delete(module._EVENTS))
    for kind in store.counts:
        store.counts[kind] = 0
    return store


def as_table(rows: list[dict]) -> pd.DataFrame:
    """Rows as the store should give them back."""
    return check("events", pd.DataFrame(rows)).sort_values(["ts", "event_id"], ignore_index=True)


# What is let in

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
ids = words.filter(bool)
numbers = st.floats(allow_nan=False, allow_infinity=False)
wholes = st.integers(1, 2**53 - 1)
users = st.integers(0, 5).map(lambda number: "u" + hashlib.md5(bytes([number])).hexdigest())
others = {"user_id": users, "request_id": words, "surface": words, "query": words, "item_id": words, "position": wholes, "propensity": numbers,
          "policy": words, "price": numbers, "quantity": wholes, "stars": numbers, "device": words}
events = st.fixed_dictionaries(
    {"event_id": ids, "ts": st.integers(NOON, NOON + 5), "session_id": ids, "kind": st.sampled_from(KINDS)},
    optional={name: values | st.none() for name, values in others.items()},
)
anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3) | st.lists(st.integers(), max_size=2) | st.datetimes() | st.dictionaries(st.text(max_size=2), st.integers(), max_size=1)


@given(st.lists(st.dictionaries(st.sampled_from([*CONTRACTS["events"], "foreign"]), anything) | st.builds(lambda event, odd: event | odd, events, st.dictionaries(st.sampled_from(list(others)), anything, max_size=1)), max_size=3))
def test_whatever_comes_is_rows_by_the_contract_or_one_error(rows):
    try:
        checked = checked_rows(rows)
    except EventError as error:
        assert str(error).startswith(("events", "table events"))
    else:
        assert [list(row) for row in checked] == [list(CONTRACTS["events"])] * len(rows)
        kinds = {"text": str, "ts": int, "integer": int, "number": float}
        assert all(value is None or type(value) is kinds[CONTRACTS["events"][name].kind] for row in checked for name, value in row.items())


@given(st.lists(events, min_size=1, max_size=3))
def test_the_fast_check_and_the_contract_agree(rows):
    assert [_exact(row) for row in rows] == _by_contract(pd.DataFrame(rows, dtype=object)) == checked_rows(rows)


@pytest.mark.parametrize("rows, column, row", [
    ([EVENT, EVENT | {"event_id": None}], "event_id", 1),
    ([EVENT | {"session_id": ""}], "session_id", 0),
    ([EVENT, EVENT, EVENT | {"ts": 1_764_000_000}], "ts", 2),
    ([EVENT | {"ts": "yesterday"}], "ts", 0),
    ([EVENT | {"kind": "stare"}], "kind", 0),
    ([EVENT | {"user_id": "anna@example.com"}], "user_id", 0),
    ([EVENT | {"position": 1.5}], "position", 0),
    ([EVENT | {"position": 2**53}], "position", 0),
    ([EVENT | {"price": float("inf")}], "price", 0),
    ([EVENT | {"price": {"EUR": 7}}], "price", 0),
    ([EVENT | {"item_id": "i\0"}], "item_id", 0),
    ([EVENT | {"item_id": "i" * 513}], "item_id", 0),
    ([EVENT | {"query": "\ud83d"}], "query", 0),
    ([EVENT | {"query": b"shoes"}], "query", 0),
])
def test_a_fault_is_named_and_nothing_of_its_batch_is_kept(tmp_path, rows, column, row):
    with Store(tmp_path / "shop.db", tmp_path / "keys") as store:
        with pytest.raises(EventError) as caught:
            store.append(rows)
        assert (caught.value.column, caught.value.row) == (column, row) and "anna" not in str(caught.value)
        with pytest.raises(EventError):
            store.append(pd.DataFrame(rows, dtype=object))
        assert store.events().empty and store.append([]) == 0


HOSTILE = ["'; DROP TABLE events; --", "%(query)s %s :query ?", "\u202eesrever\u2066", "👟🏿‍♀️", "a\u0301 ≠ á", "\x01\x1b[31m\x7f\r\n\t", "../../etc/passwd", "<script>alert(1)</script>",
           "\ufeff\uffff\U0010ffff", "NaN", "null", "{}", "\\x00", "x" * 512]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_kept_to_the_letter(shop, text):
    event = EVENT | {name: text for name in ("event_id", "session_id", "request_id", "surface", "query", "item_id", "policy", "device")}
    shop.append([event, EVENT | {"query": "a\0b" + text * 50}])
    pd.testing.assert_frame_equal(shop.events(), as_table([event, EVENT | {"query": "a\0b" + text * 50}]))


# Once

@FEWER
@given(pool=st.lists(events, max_size=6, unique_by=lambda event: event["event_id"]), data=st.data())
def test_any_batching_order_and_repetition_leaves_the_same_events(used, pool, data):
    store, batches = emptied(used), data.draw(st.lists(st.lists(st.sampled_from(pool), max_size=5), max_size=5)) if pool else []
    answers = [store.submit(batch) for batch in [*batches, pool]]
    assert sum(len(answer.result(60)) for answer in answers) == len(pool)
    assert store.counts == {"new": len(pool), "repeated": sum(map(len, batches)), "different": 0}
    pd.testing.assert_frame_equal(store.events(), as_table(pool) if pool else module.empty("events"))


@FEWER
@given(first=events, later=st.lists(events, min_size=1, max_size=4))
def test_an_id_keeps_its_first_event(used, first, later):
    store, later = emptied(used), [event | {"event_id": first["event_id"]} for event in later]
    assert store.append([first]) == 1 and store.append(later) == 0
    assert store.counts["different"] == sum(_exact(event) != _exact(first) for event in later)
    pd.testing.assert_frame_equal(store.events(), as_table([first]))


@settings(FEWER, max_examples=FEWER.max_examples // 2)
@given(pool=st.lists(events, max_size=6, unique_by=lambda event: event["event_id"]))
def test_exports_are_the_same_events(used, tmp_path_factory, pool):
    store, folder = emptied(used), tmp_path_factory.mktemp("exports")
    store.append(pool)
    pd.testing.assert_frame_equal(pd.read_parquet(store.export(folder / "events.parquet")), store.events())
    read = read_log(store.export_ubi(folder / "events.ndjson"), "ubi")
    assert read.rejects.empty
    pd.testing.assert_frame_equal(read.events, store.events())
    assert {made.sha256 for made in store.artefacts()} >= {module.sha256(folder / name) for name in ("events.parquet", "events.ndjson")}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_the_demo_shop_goes_in_and_out(shop):
    log = load("shop").events.query(f"kind in {list(KINDS)} and ts > {NOON - 10**12}").drop_duplicates("event_id").head(4_000)
    log = log.assign(user_id=log["user_id"].map(shop.pseudonym, na_action="ignore"))
    assert shop.append(log) == len(log)
    expected = check("events", log).sort_values(["ts", "event_id"], ignore_index=True)
    pd.testing.assert_frame_equal(shop.events(), expected)
    somebody, moment = expected["user_id"].dropna().iloc[0], int(expected["ts"].iloc[2_000])
    pd.testing.assert_frame_equal(shop.events(user_id=somebody), expected[expected["user_id"] == somebody].reset_index(drop=True))
    pd.testing.assert_frame_equal(shop.events(since=moment), expected[expected["ts"] >= moment].reset_index(drop=True))


def test_a_failed_export_leaves_the_old_file(shop, tmp_path):
    shop.append([EVENT])
    before = shop.export(tmp_path / "events.parquet").read_bytes()
    with pytest.raises(ZeroDivisionError):
        shop._export(tmp_path / "events.parquet", lambda half, pieces: half.write_bytes(b"half") / 0)
    (made,) = shop.artefacts()
    assert (tmp_path / "events.parquet").read_bytes() == before and made.sha256 == hashlib.sha256(before).hexdigest()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# The writer


def lose_commits(monkeypatch, lost) -> None:
    """Let the answers of some commits be lost; the next of `lost` says whether this one's is."""
    commit = Transaction.commit

    def commits(self) -> None:
        commit(self)
        if next(lost):
            raise sa.exc.OperationalError("COMMIT", {}, Exception("the answer was lost"))

    monkeypatch.setattr(Transaction, "commit", commits)


@pytest.mark.filterwarnings("ignore:transaction already deassociated")  # the loss is made by hand
def test_a_commit_whose_answer_is_lost_is_repeated_without_harm(shop, monkeypatch):
    lose_commits(monkeypatch, itertools.cycle([True, False]))
    anna = shop.pseudonym("anna")
    assert shop.append([EVENT | {"user_id": anna, "query": "shoes"}, EVENT | {"event_id": "e2"}]) == 2 == len(shop.events()), "nobody has heard of them yet"
    shop.derived("model", "shopper")
    gone = shop.erase(anna)
    assert gone[:2] == (2, True) and [made.path for made in gone.derived] == [str(Path("shopper").absolute())] and shop.artefacts()[0].forgotten == 1
    shop.derived("model", "shopper")  # trained again
    assert shop.artefacts()[0].forgotten == 0


@pytest.mark.filterwarnings("ignore:transaction already deassociated")  # the loss is made by hand
def test_what_nobody_has_heard_of_is_new_when_it_is_sent_again_and_nothing_else(tmp_path, monkeypatch):
    with Store(tmp_path / "shop.db", tmp_path / "keys", patience=0.2) as store:
        store.append([EVENT])
        both, away = [EVENT, EVENT | {"event_id": "e2"}], [True]
        lose_commits(monkeypatch, (bool(away) for _ in itertools.count()))
        with pytest.raises(StoreGone):
            store.append(both)
        away.clear()
        assert store.submit([both[1] | {"query": "another"}]).result(60) == set(), "not what is stored under this id"
        assert store.submit(both).result(60) == {"e2"} and store.submit(both).result(60) == set()
        assert len(store.events()) == 2 and store.counts == {"new": 2, "different": 1, "repeated": 3}


def test_one_spoilt_batch_spoils_no_other(shop, monkeypatch):
    insert, held = module.insert_new, threading.Event()

    def picky(connection, keyring, batches):
        held.wait(60)
        if any(row["event_id"] == "bad" for batch in batches for row in batch):
            raise StoreError("a row that the database refuses")
        return insert(connection, keyring, batches)

    monkeypatch.setattr(module, "insert_new", picky)
    answers = {name: shop.submit([EVENT | {"event_id": name}, EVENT | {"event_id": f"{name}!"}]) for name in ("a", "b", "bad", "c")}
    held.set()
    with pytest.raises(StoreError, match="refuses"):
        answers.pop("bad").result(60)
    assert [len(answer.result(60)) for answer in answers.values()] == [2, 2, 2] and len(shop.events()) == 6


def test_what_can_never_be_written_is_told_alone_also_behind_an_empty_batch(shop, monkeypatch):
    insert, held = module.insert_new, threading.Event()

    def refusing(connection, keyring, batches):
        held.wait(60)
        if any(batches):
            raise StoreError("the keyring is locked")
        return insert(connection, keyring, batches)

    monkeypatch.setattr(module, "insert_new", refusing)
    first, empty, full = shop.submit([EVENT]), shop.submit([]), shop.submit([EVENT | {"event_id": "e2"}])
    held.set()
    assert empty.result(60) == set()
    for refused in (first, full):
        with pytest.raises(StoreError, match="locked"):
            refused.result(60)


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database or disk is full"), sqlite3.DatabaseError("database disk image is malformed")])
def test_an_erasure_is_done_also_where_the_file_cannot_be_written_anew(tmp_path, error):
    def full(connection, cursor, statement, *_):
        if statement == "VACUUM":
            raise error

    with Store(tmp_path / "shop.db", tmp_path / "keys") as store:
        anna = store.pseudonym("anna")
        store.append([EVENT | {"user_id": anna}])
        assert store.overwrite(), "nothing was removed"
        sa.event.listen(store._engine, "before_cursor_execute", full)
        gone = store.erase(anna)
        assert gone.rows == 1 and not gone.overwritten and not len(store.events()) and not store.erase(anna).overwritten
    with Store(tmp_path / "shop.db", tmp_path / "keys") as store:
        sa.event.listen(store._engine, "before_cursor_execute", full)
        assert not store.erase(anna).overwritten  # the file knows what was left when the last process ended
        sa.event.remove(store._engine, "before_cursor_execute", full)
        assert store.erase(anna).overwritten


def test_the_half_of_a_killed_export_is_swept_by_a_later_one(tmp_path):
    half = tmp_path / ".events.parquet.0badc0de.half"
    half.write_bytes(b"what shoppers typed")
    os.utime(half, (time.time() - 90_000,) * 2)
    with Store(tmp_path / "shop.db", tmp_path / "keys") as store:
        store.export(tmp_path / "events.parquet")
    assert not half.exists()


def test_beyond_the_bound_the_sender_is_told_and_nothing_acknowledged_is_lost(tmp_path):
    with Store(tmp_path / "shop.db", tmp_path / "keys", room=10, patience=60) as store:
        lock = sqlite3.connect(tmp_path / "shop.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        held = [store.submit([EVENT | {"event_id": f"{number}-{n}"} for n in range(2)]) for number in range(5)]
        with pytest.raises(StoreFull, match="10 events wait to be written and 10 may"):
            store.append([EVENT])
        assert store.waiting == 10 and not any(answer.done() for answer in held)
        lock.execute("ROLLBACK")
        assert [len(answer.result(60)) for answer in held] == [2] * 5 and store.waiting == 0
        assert store.append([EVENT | {"event_id": str(number)} for number in range(50)]) == 50, "a large batch goes in when nobody waits"
        assert len(store.events()) == 60


def test_closing_writes_what_waits(tmp_path):
    with Store(tmp_path / "shop.db", tmp_path / "keys") as store:
        answers = [store.submit([EVENT | {"event_id": str(number)}]) for number in range(500)]
    assert all(len(answer.result(0)) == 1 for answer in answers)
    with Store(tmp_path / "shop.db", tmp_path / "keys") as store:
        assert len(store.events()) == 500


def test_whoever_stops_waiting_for_an_answer_stops_nobody_else(tmp_path):
    async def impatient(store: Store) -> set[str]:
        waiting = asyncio.wrap_future(store.submit([EVENT]))
        waiting.cancel()
        return await asyncio.wrap_future(store.submit([EVENT | {"event_id": "e2"}]))

    with Store(tmp_path / "shop.db", tmp_path / "keys") as store:
        assert asyncio.run(impatient(store)) == {"e2"} and len(store.events()) == 2


# The schema

def test_migrations_end_where_the_tables_are(shop):
    with shop._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": module._VERSION, "compare_type": True})
        assert compare_metadata(context, module._METADATA) == []


def test_processes_that_open_a_new_store_at_once_find_one(address, tmp_path):
    crowd = [PROCESSES.Process(target=open_and_append, args=(address, tmp_path / "keys", str(number))) for number in range(6)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(60)
    with Store(address, tmp_path / "keys") as store:
        assert [process.exitcode for process in crowd] == [0] * 6 and len(store.events()) == 6


NEXT = '''
import sqlalchemy as sa
from alembic import op
revision, down_revision = "0002", "0001"
def upgrade():
    op.add_column("events", sa.Column("basket_id", sa.Text))
    op.execute("UPDATE events SET basket_id = session_id")
    {then}
'''


def test_an_old_schema_is_migrated_whole_or_not_at_all_and_a_newer_one_refused(address, tmp_path, monkeypatch):
    open_and_append(address, tmp_path / "keys", "e1")
    later = shutil.copytree(module._MIGRATIONS, tmp_path / "100% later")
    monkeypatch.setattr(module, "_MIGRATIONS", later)
    (later / "versions/0002_baskets.py").write_text(NEXT.format(then="raise RuntimeError('the power failed')"))
    with pytest.raises(RuntimeError, match="power"):
        Store(address, tmp_path / "keys")
    monkeypatch.undo()
    open_and_append(address, tmp_path / "keys", "e2")  # still the old one

    monkeypatch.setattr(module, "_MIGRATIONS", later)
    (later / "versions/0002_baskets.py").write_text(NEXT.format(then="pass"))
    with Store(address, tmp_path / "keys") as store, store._engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT event_id, basket_id FROM events ORDER BY event_id").all() == [("e1", "s1"), ("e2", "s1")]
    monkeypatch.undo()
    with pytest.raises(StoreError, match="schema 0002, and this ecomrec knows up to 0001; install the newer version"):
        Store(address, tmp_path / "keys")


def test_what_is_no_store_of_ours_is_left_alone(address, tmp_path):
    open_and_append(address, tmp_path / "keys", "e1")
    with pytest.raises(StoreError, match="was made with keyring"):
        Store(address, tmp_path / "other keys")
    (tmp_path / "thesis.db").write_text("my thesis" * 1_000)
    with pytest.raises(StoreError, match="refuses .file is not a database"):
        Store(tmp_path / "thesis.db", tmp_path / "keys")
    assert (tmp_path / "thesis.db").read_text() == "my thesis" * 1_000
    with sqlite3.connect(tmp_path / "theirs.db") as theirs:
        theirs.execute("CREATE TABLE events (talk TEXT)")
    with pytest.raises(StoreError, match="events already exists"):
        Store(tmp_path / "theirs.db", tmp_path / "keys")
    assert [row[1] for row in theirs.execute("PRAGMA table_info(events)")] == ["talk"]
    with pytest.raises(StoreGone, match="cannot be reached") as caught:
        Store("postgresql://anna:secret@127.0.0.1:9/shop", tmp_path / "keys")
    assert "secret" not in str(caught.value)


def test_a_query_that_was_moved_or_changed_is_refused(shop):
    anna = shop.pseudonym("anna")
    shop.append([EVENT | {"event_id": name, "user_id": anna, "query": name} for name in ("e1", "e2")])
    with shop._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE events SET query = (SELECT query FROM events WHERE event_id = 'e1') WHERE event_id = 'e2'")
    with pytest.raises(StoreError, match="events.query e2 of .* was changed, or moved here from another place"):
        shop.events()


def test_a_keyring_that_cannot_be_written_refuses_events_and_loses_none(tmp_path):
    with Store(tmp_path / "shop.db", tmp_path / "keys") as store:
        store.keyring._database.execute("PRAGMA busy_timeout = 10")
        other = sqlite3.connect(tmp_path / "keys/keys.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="keys.db: cannot be used .database is locked"):
            store.append([EVENT | {"query": "shoes"}])
        assert store.append([EVENT | {"event_id": "e2"}]) == 1, "it has nothing to seal"
        other.execute("ROLLBACK")
        assert store.append([EVENT | {"query": "shoes"}]) == 1 and len(store.events()) == 2


# Forgetting

def random_events(store: Store, n: int, n_users: int, seed: int) -> tuple[list[str], list[dict]]:
    """Users, and events of theirs with ids in no order, as a shop has them."""
    rng = random.Random(seed)
    names = [store.pseudonym(str(number)) for number in range(n_users)]
    return names, [
        EVENT | {"event_id": f"{rng.getrandbits(128):032x}", "ts": NOON + rng.randrange(10**9), "user_id": rng.choice(names), "query": f"secret{rng.getrandbits(64):016x}", "session_id": f"s{rng.getrandbits(64):016x}"}
        for _ in range(n)
    ]


def test_no_byte_of_a_forgotten_user_is_left_in_the_files(tmp_path):
    with Store(tmp_path / "shop.db", tmp_path / "keys") as store:
        names, rows = random_events(store, 6_000, 60, seed=0)
        for start in range(0, len(rows), 50):
            store.append(rows[start : start + 50])
        store.put_users(pd.DataFrame({"user_id": names, "age": 34, "gender": "female", "region": "secretly"}))
        for name in names[::6]:
            hers = {row["session_id"] for row in rows if row["user_id"] == name}
            before = b"".join(path.read_bytes() for path in tmp_path.glob("shop.db*"))
            assert name.encode() in before and all(session.encode() in before for session in hers) and b"secret" not in before
            gone = store.erase(name)
            after = b"".join(path.read_bytes() for folder in (tmp_path, tmp_path / "keys") for path in folder.iterdir() if path.is_file())
            assert gone.rows == len(hers) + 1 and gone.key_destroyed and gone.overwritten
            assert name.encode() not in after and not [session for session in hers if session.encode() in after]
        kept = [row for row in rows if row["user_id"] not in names[::6]]
        pd.testing.assert_frame_equal(store.events(), as_table(kept))


def test_erasure_takes_what_she_did_before_she_logged_in_and_leaves_the_others(shop):
    anna, bert = shop.pseudonym("anna"), shop.pseudonym("bert")
    shop.append([
        EVENT | {"event_id": "1", "query": "before"}, EVENT | {"event_id": "2", "user_id": anna, "query": "after"}, EVENT | {"event_id": "3", "session_id": "s2", "query": "nobody"},
        EVENT | {"event_id": "4", "session_id": "s1", "user_id": bert, "query": "same browser"},
    ])
    shop.put_users(pd.DataFrame({"user_id": [anna, bert], "age": [34, 35]}))
    assert shop.erase(anna)[:2] == (3, True) and shop.erase(anna)[:3] == (0, False, [])
    assert shop.events()["query"].tolist() == ["nobody", "same browser"] and shop.users()["age"].tolist() == [35]
    assert anna not in shop.keyring and bert in shop.keyring
    assert shop.append([EVENT | {"event_id": "5", "user_id": anna, "query": "again"}]) == 1
    assert shop.events(user_id=anna)["query"].tolist() == ["again"]


@pytest.mark.parametrize("call", [lambda s: s.erase("anna"), lambda s: s.events(user_id="anna"), lambda s: s.erase(None)])
def test_a_name_in_the_clear_is_refused_where_a_pseudonym_belongs(tmp_path, call):
    with Store(tmp_path / "shop.db", tmp_path / "keys") as store, pytest.raises(ValueError, match="no pseudonym") as caught:
        call(store)
    assert "anna" not in str(caught.value)


def test_what_may_hold_her_events_is_listed(shop, tmp_path):
    anna, bert = shop.pseudonym("anna"), shop.pseudonym("bert")
    shop.append([EVENT | {"event_id": str(n), "ts": NOON + n, "user_id": anna if n in (4, 6) else bert} for n in range(10)])
    spans = {"whole": (0, 2**63 - 1), "before": (NOON, NOON + 3), "between": (NOON + 5, NOON + 5), "first": (NOON + 4, NOON + 4), "after": (NOON + 7, NOON + 9)}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/manifest.json").write_text("{}")
    for name, span in spans.items():
        shop.derived("model", tmp_path / name, *span)
    shop.derived("model", tmp_path / "model")
    assert {Path(made.path).name for made in shop.erase(anna).derived} == {"whole", "between", "first", "model"}
    made = {Path(made.path).name: made for made in shop.artefacts()}
    assert made["whole"].forgotten == 1 and made["before"].forgotten == 0 and made["model"].sha256 == hashlib.sha256(b"{}").hexdigest()
    shop.derived("model", tmp_path / "whole")  # trained again
    assert {Path(made.path).name: made.forgotten for made in shop.artefacts()}["whole"] == 0


def test_what_users_told_may_be_in_anything_made_since_they_joined(shop):
    anna = shop.pseudonym("anna")
    shop.put_users(pd.DataFrame({"user_id": [anna], "age": [34], "joined_ts": [NOON]}))
    shop.derived("model", "old", until=NOON - 1)
    shop.derived("model", "new", until=NOON + 1)
    assert [Path(made.path).name for made in shop.erase(anna).derived] == ["new"]


def test_who_is_forgotten_while_an_export_runs_is_found_in_it(shop, tmp_path):
    anna = shop.pseudonym("anna")
    shop.append([EVENT | {"user_id": anna}])
    found = []

    def write(half: Path, pieces) -> None:
        list(pieces)
        found.append(shop.erase(anna))
        half.write_text("hers")

    shop._export(tmp_path / "events", write)
    assert [made.path for made in found[0].derived] == [str(tmp_path / "events")] and shop.artefacts()[0].forgotten == 1
    shop.export(tmp_path / "events")
    assert shop.artefacts()[0].forgotten == 0


def test_an_erasure_says_while_a_reader_keeps_the_bytes(tmp_path):
    with Store(tmp_path / "shop.db", tmp_path / "keys") as store:
        anna = store.pseudonym("anna")
        store.append([EVENT | {"user_id": anna}])
        reader = sqlite3.connect(tmp_path / "shop.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM events").fetchall()
        assert not store.erase(anna).overwritten
        journal = (tmp_path / "shop.db-wal").stat().st_size
        assert not store.overwrite() and (tmp_path / "shop.db-wal").stat().st_size == journal, "a try costs no space"
        writer = sqlite3.connect(tmp_path / "shop.db", timeout=3, isolation_level=None)
        with ThreadPoolExecutor(1) as beside:
            tried = beside.submit(store.overwrite)
            while not tried.done():
                writer.execute("BEGIN IMMEDIATE")  # nor patience: who writes is not held up by the store's ten seconds
                writer.execute("COMMIT")
            assert not tried.result()
        reader.execute("COMMIT")
        assert store.erase(anna).overwritten


def test_no_row_is_written_under_a_key_that_another_process_destroys(address, tmp_path):
    done, counts = threading.Event(), []
    with Store(address, tmp_path / "keys", patience=60) as one, Store(address, tmp_path / "keys", patience=60) as other:
        anna = one.pseudonym("anna")

        def keep_appending(thread: int) -> None:
            number = 0
            while not done.is_set():
                one.append([EVENT | {"event_id": f"{thread}-{number}", "user_id": anna, "query": "shoes"}])
                number += 1

        with ThreadPoolExecutor(3) as crowd:
            running = [crowd.submit(keep_appending, thread) for thread in range(3)]
            while sum(count > 0 for count in counts) < 15:
                counts.append(other.erase(anna).rows)
                assert other.events()["query"].notna().all(), "every row that is there can be read"
            done.set()
            assert [thread.result() for thread in running] == [None] * 3


# Killed

def assert_whole(store: Store, acknowledged: list[str]) -> None:
    """Every acknowledged batch is there, once; what else is there is whole too."""
    there = store.events()
    names = sorted(there["event_id"].str.rpartition(".")[0].unique())
    assert len(set(acknowledged)) == len(acknowledged) and set(acknowledged) <= set(names)
    pd.testing.assert_frame_equal(there, as_table([event for name in names for event in batch_of(name)]))


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_writer_loses_and_tears_nothing(address, tmp_path, kills):
    rng, told = random.Random(kills), tmp_path / "told"
    told.touch()
    for life in range(kills):
        size, wanted = told.stat().st_size, rng.randrange(1, 2_000)
        process = PROCESSES.Process(target=append_for_ever, args=(address, tmp_path / "keys", told, life))
        process.start()
        while told.stat().st_size < size + wanted:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(rng.random() / 100)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with Store(address, tmp_path / "keys") as store:
        acknowledged = told.read_text().splitlines()
        assert len(acknowledged) > kills
        assert_whole(store, acknowledged)


class Load:
    """Threads that append to a store, note what was acknowledged, and hear of everything that was not."""

    def __init__(self, store: Store, threads: int):
        self.store, self.acknowledged, self.refused, self._done = store, [], [], threading.Event()
        self._crowd = ThreadPoolExecutor(threads)
        self._running = [self._crowd.submit(self._keep_appending, thread) for thread in range(threads)]

    def _keep_appending(self, thread: int) -> None:
        number = 0
        while not self._done.is_set():
            name = f"0-{thread}-{number // 8}-{number}"
            try:
                self.store.append(batch_of(name))
                self.acknowledged.append(name)
                number += 1
            except (StoreFull, StoreGone) as error:
                self.refused.append(type(error))
                self._done.wait(0.02)

    def wait(self, condition) -> None:
        while not condition():
            assert not [thread for thread in self._running if thread.done()]
            time.sleep(0.002)

    def end(self) -> None:
        self._done.set()
        assert [thread.result() for thread in self._running] == [None] * len(self._running)
        self._crowd.shutdown()


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_server_loses_and_tears_nothing(postgres, tmp_path, kills):
    with Store(postgres.database(), tmp_path / "keys", patience=120) as store:
        load = Load(store, threads=4)
        strike_under(load, kills, 40, lambda: (postgres.kill(), postgres.start()))
        assert load.refused == []
        assert_whole(store, load.acknowledged)


@pytest.mark.parametrize("seconds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_server_that_is_gone_for_a_while_is_waited_for_up_to_the_bound(postgres, tmp_path, seconds):
    with Store(postgres.database(), tmp_path / "keys", room=30, patience=120) as store:
        load = Load(store, threads=20)
        load.wait(lambda: len(load.acknowledged) >= 100)
        postgres.stop()
        ends = time.monotonic() + seconds
        load.wait(lambda: load.refused.count(StoreFull) >= 20 and time.monotonic() > ends)
        assert store.waiting == 30 and not store.ready()
        stood = len(load.acknowledged)
        postgres.start()
        load.wait(lambda: len(load.acknowledged) >= stood + 100)
        load.end()
        assert set(load.refused) == {StoreFull} and store.ready()
        assert_whole(store, load.acknowledged)


def test_patience_ends_and_says_so(postgres, tmp_path):
    with Store(postgres.database(), tmp_path / "keys", patience=0.2) as store:
        store.append(batch_of("0-0-0-0"))
        postgres.stop()
        try:
            with pytest.raises(StoreGone, match="cannot be reached.*nothing was acknowledged, send it again"):
                store.append(batch_of("0-0-0-1"))
            for read in (store.events, store.users, store.artefacts, lambda: store.erase(store.pseudonym("anna"))):
                with pytest.raises(StoreGone):
                    read()
            assert store.waiting == 0
        finally:
            postgres.start()
        assert store.append(batch_of("0-0-0-1")) == 3
        assert_whole(store, ["0-0-0-0", "0-0-0-1"])


# Users

def test_what_users_told_is_sealed_and_replaced(shop):
    anna, bert = sorted([shop.pseudonym("anna"), shop.pseudonym("bert")])
    told = pd.DataFrame({"user_id": [anna, bert], "age": [34.5, np.nan], "gender": ["female", None], "region": ["Zürich", "上海"], "joined_ts": [NOON, None]})
    shop.put_users(told.assign(age=20, region="elsewhere"))
    assert shop.put_users(told) == 2 and shop.put_users(told.head(0)) == 0
    pd.testing.assert_frame_equal(shop.users(), check("users", told))
    with shop._engine.connect() as connection:
        assert "Zürich" not in str(connection.exec_driver_sql("SELECT * FROM users").all())
    with pytest.raises(TableError, match="column user_id, row 1: is no pseudonym"):
        shop.put_users(pd.DataFrame({"user_id": [anna, "bert"]}))
    with pytest.raises(TableError, match="age, row 0: 400.0 breaks"):
        shop.put_users(pd.DataFrame({"user_id": [anna], "age": [400]}))
