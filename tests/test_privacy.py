"""What is sealed opens where it was sealed and nowhere else, and never again once its key is destroyed."""

import hashlib
import hmac
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from writers import PROCESSES, seal_for_ever

from ecomrec.data.privacy import FieldChanged, KeyDestroyed, Keyring, KeyringError


@pytest.fixture(scope="module")
def keyring(tmp_path_factory):
    keyring = Keyring(tmp_path_factory.mktemp("keys"))
    yield keyring
    keyring.close()


def test_names_are_hashed_as_the_standards_say(tmp_path):
    keyring = Keyring(tmp_path)
    master = (tmp_path / "master.key").read_bytes()
    secret = hmac.digest(bytes(32), master, "sha256")  # RFC 5869: extract, then the first block of expand
    naming = hmac.digest(secret, b"ecomrec names\x01", "sha256")
    assert keyring.pseudonym("安娜") == "u" + hmac.new(naming, "user\0安娜".encode(), hashlib.sha256).hexdigest()[:32]


@given(text=st.text(st.characters(codec="utf-8")), owner=st.text(st.characters(codec="utf-8"), min_size=1), place=st.text(st.characters(codec="utf-8")), data=st.data())
def test_any_text_comes_back_and_any_flipped_bit_is_refused(keyring, text, owner, place, data):
    sealed = keyring.encrypt(owner, place, text)
    assert keyring.decrypt(owner, place, sealed) == text
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    changed = bytearray(sealed)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(KeyDestroyed if bit < 64 else FieldChanged):  # the first 8 bytes name the key
        keyring.decrypt(owner, place, bytes(changed))


@pytest.mark.parametrize("length", [0, 7, 8, 20, 35])
def test_a_field_cut_short_is_refused(keyring, length):
    with pytest.raises(KeyringError):
        keyring.decrypt("anna", "query", keyring.encrypt("anna", "query", "shoes")[:length])


def test_whoever_opens_a_new_folder_at_once_gets_the_same_keys(tmp_path):
    for round in range(100):
        together = threading.Barrier(8)

        def opened(number: int) -> tuple:
            together.wait()
            keyring = Keyring(tmp_path / str(round))
            return keyring.id, keyring.pseudonym("anna"), keyring.encrypt("anna", "query", str(number))

        with ThreadPoolExecutor(8) as crowd:
            found = list(crowd.map(opened, range(8)))
        assert len({(name, pseudonym) for name, pseudonym, _ in found}) == 1
        assert Keyring(tmp_path / str(round)).decrypt_all([("anna", "query", sealed) for _, _, sealed in found]) == [str(number) for number in range(8)]
        assert sorted(path.name for path in (tmp_path / str(round)).iterdir() if "db-" not in path.name) == ["keys.db", "master.key"]


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_what_was_sealed_opens_after_any_kill(tmp_path, kills):
    rng, told = random.Random(kills), tmp_path / "told"
    told.touch()
    for life in range(kills):
        size, wanted = told.stat().st_size, rng.randrange(1, 4_000)
        process = PROCESSES.Process(target=seal_for_ever, args=(tmp_path / "keys", told, life))
        process.start()
        while told.stat().st_size < size + wanted:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    handed_out = [line.split() for line in told.read_text().splitlines()]
    opened = Keyring(tmp_path / "keys").decrypt_all([(owner, "query", bytes.fromhex(sealed)) for owner, sealed in handed_out])
    assert len(handed_out) >= kills and opened == [owner for owner, _ in handed_out]


def test_a_destroyed_key_is_gone_for_every_process_and_from_every_file(tmp_path):
    keyring, other = Keyring(tmp_path), Keyring(tmp_path)
    owners = [keyring.pseudonym(str(number)) for number in range(1_000)]
    sealed = keyring.encrypt_all([(owner, "query", "shoes") for owner in owners])
    wrapped = dict(sqlite3.connect(tmp_path / "keys.db").execute("SELECT owner, wrapped FROM data_keys"))
    victims = owners[::7]
    assert other.destroy(*victims) == len(victims) and other.destroy(victims[0]) == 0
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not [owner for owner in victims if owner.encode() in files or wrapped[owner] in files]
    assert keyring.decrypt_all(zip(owners, ["query"] * 1_000, sealed)) == [None if number % 7 == 0 else "shoes" for number in range(1_000)]
    with pytest.raises(KeyDestroyed):
        keyring.decrypt(victims[0], "query", sealed[0])


def test_a_reader_that_holds_the_journal_is_told_of(tmp_path):
    keyring = Keyring(tmp_path)
    sealed = keyring.encrypt("anna", "query", "shoes")
    keyring._database.execute("PRAGMA busy_timeout = 10")
    reader = sqlite3.connect(tmp_path / "keys.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM data_keys").fetchone()
    with pytest.raises(KeyringError, match="destroy them again"):
        keyring.destroy("anna")
    assert keyring.decrypt_all([("anna", "query", sealed)]) == [None]
    reader.execute("COMMIT")
    assert keyring.destroy("anna") == 0


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "master.key").write_bytes(b"short"), "holds 5 bytes"),
    (lambda f: (f / "master.key").unlink(), "is missing"),
    (lambda f: (f / "master.key").write_bytes(bytes(32)), "do not belong together"),
    (lambda f: (f / "master.key").chmod(0o640), "others than its owner"),
    (lambda f: (f / "keys.db").write_bytes(b"no database" * 1_000), "cannot be used"),
])
def test_a_damaged_keyring_is_refused(tmp_path, damage, message):
    Keyring(tmp_path).close()
    damage(tmp_path)
    with pytest.raises(KeyringError, match=message):
        Keyring(tmp_path)


def test_a_key_moved_to_another_owner_is_refused(tmp_path):
    keyring = Keyring(tmp_path)
    keyring.encrypt_all([("anna", "query", "shoes"), ("bert", "query", "tent")])
    with sqlite3.connect(tmp_path / "keys.db") as database:
        database.execute("UPDATE data_keys SET wrapped = (SELECT wrapped FROM data_keys WHERE owner = 'bert') WHERE owner = 'anna'")
    with pytest.raises(KeyringError, match="key of anna is damaged"):
        keyring.encrypt("anna", "query", "boots")


def test_only_its_owner_reads_the_keyring(tmp_path):
    Keyring(tmp_path / "keys").encrypt("anna", "query", "shoes")
    shutil.copytree(tmp_path / "keys", tmp_path / "copy")
    modes = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "keys", *(tmp_path / "keys").iterdir()]}
    assert modes.pop("keys") == 0o700 and set(modes.values()) == {0o600} and {"master.key", "keys.db"} <= modes.keys()
