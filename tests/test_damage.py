"""Saved things that were damaged: one typed error each, no crash, no silent wrong load."""

import json
import shutil
import struct

import numpy as np
import pytest

from ecomrec.data.artefacts import MANIFEST, ArtefactError, sha256
from ecomrec.data.cleaning import clean
from ecomrec.data.simulator import simulate
from ecomrec.data.sources import Tables
from ecomrec.model.text import embed, load_encoder, product_text
from ecomrec.model.training import Schedule
from ecomrec.search.engine import Engine
from ecomrec.search.explain import linear_ranker
from ecomrec.search.voice import learn_voice


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An engine with all that one can hold, saved."""
    shop = clean(Tables("toy", **simulate(5, n_items=120, n_users=30, n_days=6, requests_per_day=120).tables()))[0]
    encoder = load_encoder()
    vectors = embed(encoder, product_text(shop.products))
    voice = learn_voice(shop.products, shop.users, shop.events, vectors, lambda texts: embed(encoder, texts), schedule=Schedule(epochs=1), progress=False)
    ranker = linear_ranker({"words": 1.0, "shopper": 0.1, "co_occurrence": 0.2, "dearer": -0.1})
    engine = Engine.from_products(shop.products, users=shop.users, events=shop.events, vectors=vectors, voice=voice, rankers={"search": ranker})
    engine.quicken()
    folder = tmp_path_factory.mktemp("saved") / "engine"
    engine.save(folder)
    assert len(Engine.load(folder).search("running shoes", user=engine.users[0]))
    return folder


HOWS = ("flip", "cut", "missing", "swapped", "foreign", "header")


def damaged(rng: np.random.Generator, folder, how: str) -> str:
    """Damage one file of a folder in one way; says which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and (how != "header" or path.suffix == ".safetensors"))
    file = files[rng.integers(len(files))]
    data = file.read_bytes()
    if how == "flip":
        place = int(rng.integers(len(data)))
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :])
    elif how == "cut":
        file.write_bytes(data[: rng.integers(len(data))])
    elif how == "missing":
        file.unlink()
    elif how == "swapped":
        other = next(path for path in rng.permutation(files) if path.read_bytes() != data)
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif how == "header":  # longer than the file, and all checksums fit
        file.write_bytes(struct.pack("<Q", len(data) << int(rng.integers(40))) + data[8:])
        signed(folder)
    else:
        (folder / f"foreign-{rng.integers(1000)}.bin").write_bytes(data[:100])
    return f"{how} {file.relative_to(folder)}"


def check_damages(whole, tmp_path, n: int) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "engine"
    shutil.copytree(whole, folder)
    for number in range(n):
        what = damaged(rng, folder, HOWS[number % len(HOWS)])
        try:
            Engine.load(folder)
        except ArtefactError:
            pass
        else:
            pytest.fail(f"{what}: it was loaded")
        for path in (path for path in folder.rglob("*") if path.is_file()):
            origin = whole / path.relative_to(folder)
            if not origin.exists():
                path.unlink()
        for origin in (path for path in whole.rglob("*") if path.is_file()):
            copy = folder / origin.relative_to(whole)
            if not copy.exists() or copy.stat().st_size != origin.stat().st_size or copy.read_bytes() != origin.read_bytes():
                shutil.copyfile(origin, copy)
    assert len(Engine.load(folder).products)


def test_damaged_engines_are_refused(whole, tmp_path):
    check_damages(whole, tmp_path, 200)


@pytest.mark.slow
def test_thousands_of_damages_are_refused(whole, tmp_path):
    check_damages(whole, tmp_path, 2000)


def signed(folder) -> None:
    """Give every manifest below a folder, and its own, the checksums of what is there now."""
    for manifest in sorted(folder.rglob(MANIFEST), key=lambda path: -len(path.parts)):
        files = sorted(path for path in manifest.parent.rglob("*") if path.is_file() and path != manifest)
        manifest.write_text(json.dumps({path.relative_to(manifest.parent).as_posix(): sha256(path) for path in files}))


def hostile(whole) -> list[tuple[str, bytes]]:
    """Files that were made by somebody else, whose checksums fit."""
    huge = struct.pack("<Q", 2**62)
    header = json.dumps({"vectors": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**60]}}).encode()
    cases = [("vectors.safetensors", huge), ("vectors.safetensors", struct.pack("<Q", len(header)) + header), ("follows.safetensors", b""), ("products.parquet", b"PAR1" + bytes(50) + b"PAR1"),
             ("config.json", b"[]"), ("config.json", b"{}"), ("config.json", b'{"kind": "Engine"}'), ("config.json", b"\xff\xfe"), ("memory/histories.parquet", b""), ("memory/memory.json", b"{}"),
             ("words/items.json", b"[]"), ("ranker-search/config.json", b'{"names": []}'), ("voice/voice.json", b"null"), ("voice/model/config.json", b'{"n_items": -1}')]
    return [(name, data) for name, data in cases if (whole / name).exists()]


def test_files_of_strangers_with_right_checksums_are_one_typed_error(whole, tmp_path):
    tried = hostile(whole)
    assert len(tried) == 14
    for number, (name, data) in enumerate(tried):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(data)
        signed(folder)
        with pytest.raises(ArtefactError, match="save it again|not an engine"):
            Engine.load(folder)
        shutil.rmtree(folder)
