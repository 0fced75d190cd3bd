"""The wheel holds all that the package needs and works without the repository."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".git", ".venv", "_site", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*cache", ".hypothesis")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The package unpacked from a wheel that was built without a network from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(folder / "tree")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder / "unpacked")
    return folder / "unpacked"


def files(folder: Path) -> set[Path]:
    """Files below a folder, relative to it, but for caches."""
    found = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    return {p for p in found if not {"__pycache__", ".ipynb_checkpoints", "_bundled"} & set(p.parts)}


def test_holds_modules_and_package_data(wheel):
    assert files(ROOT / "ecomrec") - files(wheel / "ecomrec") == set()
    assert Path("__init__.py") in files(wheel / "ecomrec")


def test_holds_experiments_scripts_and_shop(wheel):
    bundled = wheel / "ecomrec/_bundled"
    for folder in ("nbs/experiments", "nbs/_static", "data/shop"):
        ours = files(ROOT / folder)
        assert ours
        assert ours == files(bundled / folder)


def test_names_its_licence_and_command(wheel):
    (about,) = wheel.glob("ecomrec-*.dist-info")
    assert re.search(r"^License(-Expression)?: Apache-2.0$", (about / "METADATA").read_text(), re.MULTILINE)
    assert any("Apache License" in p.read_text() for p in about.rglob("LICENSE"))
    assert "ecomrec=ecomrec.cli:main" in (about / "entry_points.txt").read_text().replace(" ", "")


def test_works_from_anywhere(wheel, tmp_path):
    code = """
import importlib, pathlib, sys
import ecomrec
folder = pathlib.Path(ecomrec.__file__).parent
assert folder == pathlib.Path(sys.argv[1]) / "ecomrec", folder
for path in sorted(folder.rglob("*.py")):
    parts = path.relative_to(folder).with_suffix("").parts
    if not any(part[0] == "_" for part in parts):
        importlib.import_module(".".join(("ecomrec", *parts)))
from ecomrec.data import sources
from ecomrec.data.cleaning import clean
shop, _ = clean(sources.load("shop"))
products = shop.products.head(50)
page = ecomrec.Engine.from_products(products).search(products["title"].iloc[0], k=3)
assert len(page) == 3
print("works")
"""
    environment = os.environ | {"PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(wheel)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "works"
