"""Saved folders are whole or absent, whatever happens."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ecomrec.data.artefacts import MANIFEST, ArtefactError, recovered, verify, write_json, writing


@pytest.fixture
def saved(tmp_path):
    with writing(tmp_path / "model") as half:
        (half / "part").mkdir()
        (half / "part" / "weights.bin").write_bytes(bytes(range(256)))
        write_json(half / "config.json", {"version": 1})
    return tmp_path / "model"


def test_what_was_saved_verifies(saved):
    assert set(verify(saved)) == {"config.json", "part/weights.bin"}


def test_every_flipped_byte_is_found(saved):
    rng = random.Random(0)
    files = [saved / name for name in verify(saved)]
    for _ in range(50):
        path = rng.choice(files)
        good = path.read_bytes()
        spot = rng.randrange(len(good))
        path.write_bytes(good[:spot] + bytes([good[spot] ^ 1 << rng.randrange(8)]) + good[spot + 1 :])
        with pytest.raises(ArtefactError, match=path.name):
            verify(saved)
        path.write_bytes(good)
    assert verify(saved)


@pytest.mark.parametrize("damage", [
    lambda f: (f / "config.json").unlink(),
    lambda f: (f / "extra").write_text("x"),
    lambda f: (f / MANIFEST).unlink(),
    lambda f: (f / MANIFEST).write_text("{"),
    lambda f: (f / MANIFEST).write_text("[]"),
    lambda f: (f / "part" / "weights.bin").write_bytes(b""),
])
def test_missing_foreign_and_truncated_files_are_found(saved, damage):
    damage(saved)
    with pytest.raises(ArtefactError):
        verify(saved)


def test_a_failing_writer_leaves_the_old_folder_and_nothing_else(saved):
    with pytest.raises(RuntimeError):
        with writing(saved) as half:
            (half / "config.json").write_text("{")
            raise RuntimeError
    assert json.loads((saved / "config.json").read_text()) == {"version": 1} and verify(saved)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_writer_killed_between_its_two_renames_loses_nothing(saved):
    before = verify(saved)
    os.replace(saved, saved.with_name(f".{saved.name}.killed.old"))
    with pytest.raises(ArtefactError, match="no readable manifest"):
        verify(saved)  # a reader moves nothing: another process may be writing
    assert verify(recovered(saved)) == before and not recovered(saved.with_name("never")).exists()


def test_what_a_killed_writer_moved_aside_is_swept_and_never_comes_back(saved):
    left = saved.with_name(f".{saved.name}.killed.old")
    shutil.copytree(saved, left)
    with writing(saved) as half:
        write_json(half / "config.json", {"version": 2})
    shutil.rmtree(saved)
    assert not left.exists() and not recovered(saved).exists()


def test_the_half_of_a_killed_writer_is_swept_a_day_later_and_not_before(saved):
    long_ago, recent, foreign = (saved.with_name(f".{saved.name}.{name}") for name in ("long.half", "now.half", "backup"))
    for half, age in ((long_ago, 90_000), (recent, 80_000), (foreign, 90_000)):
        half.mkdir()
        os.utime(half, (time.time() - age,) * 2)
    with writing(saved) as half:
        write_json(half / "config.json", {"version": 2})
    assert not long_ago.exists() and recent.exists() and foreign.exists()


def test_json_is_whole_after_a_refused_write(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", [float("inf")])
    assert json.loads((tmp_path / "a.json").read_text()) == [1] and len(list(tmp_path.iterdir())) == 1


def test_a_killed_writer_leaves_no_incomplete_folder(tmp_path):
    script = (
        "import sys\nfrom ecomrec.data.artefacts import writing\nprint('go', flush=True)\n"
        "for i in range(10**6):\n    with writing(sys.argv[1]) as half:\n"
        "        (half / 'x').write_text(str(i) * 1000)\n"
    )
    target = tmp_path / "model"
    writer = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
    writer.stdout.readline()
    while not target.exists():
        time.sleep(0.001)
    time.sleep(0.05)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    last = target if target.exists() else next(tmp_path.glob(".*.old"))
    assert verify(last), "the last complete version is there, in place or, between two renames, as .old"


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: (p.mkdir(), (p / "thesis.txt").write_text("mine"))])
def test_what_is_not_ours_is_never_replaced(tmp_path, make):
    target = tmp_path / "target"
    make(target)
    with pytest.raises(ArtefactError, match="nothing was touched"):
        with writing(target) as half:
            (half / "x").write_text("new")
    text = target.read_text() if target.is_file() else (target / "thesis.txt").read_text()
    assert text == "mine" and [p.name for p in tmp_path.iterdir()] == ["target"]
