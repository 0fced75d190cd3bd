"""Every notebook runs on a fresh kernel. Experiments are run with their small sizes by test_experiments."""

import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "nbs/_tools"))

from notebooks import NBS, directives, execute, notebooks, read  # noqa: E402

FOUND = [p for p in notebooks() if p.relative_to(NBS).parts[0] not in ("experiments", "applications")]
FOUND.sort(key=lambda path: path.stem != "05_adaptation")  # the longest one first, or a process waits for it in the end


def skipped_cells() -> tuple[str, ...]:
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return tuple(settings["DEFAULT"]["tst_flags"].split())


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=[path.relative_to(NBS).as_posix() for path in paths])


def runs(path, skip=()):
    executed = execute(path, skip, timeout=1800)  # a cell that hangs; slow processors need ten minutes for one
    assert not [o for cell in executed.cells for o in cell.get("outputs", []) if o.output_type == "error"]


@named(FOUND)
def test_runs(path):
    runs(path, skipped_cells())


@pytest.mark.slow
@named([path for path in FOUND if any("slow" in directives(cell.source) for cell in read(path).cells if cell.cell_type == "code")])
def test_runs_with_its_slow_cells(path):
    runs(path)
