"""How long does a query take to become a vector, by precision, and how much of nDCG@10 does each keep?

    python tests/benchmarks/query_encoder.py                    both shops; prints tables and writes results/query_encoder.json
    python tests/benchmarks/query_encoder.py --sources shop     one of them
    python tests/benchmarks/query_encoder.py --cache FOLDER     keep the products' vectors there for the next time

One thread, single queries, warm, the median over the judged queries. The products' vectors, always exact, take minutes of Chorus.
Only ratios within one run mean anything on another machine.
"""

import argparse
import datetime
import importlib.metadata
import os
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from threadpoolctl import threadpool_limits

from ecomrec.data import sources
from ecomrec.data.artefacts import content_hash, write_json
from ecomrec.data.cleaning import clean
from ecomrec.lab import _hardware, _versions
from ecomrec.model.text import DEFAULT_ENCODER, embed, load_encoder, product_text
from ecomrec.search.index import DenseIndex
from ecomrec.search.query_encoder import QueryEncoder, choose_query_encoder

RESULTS = Path(__file__).resolve().parent / "results"
SOURCES = ("shop", "chorus")
PACKAGES = ("torch", "onnxruntime", "onnx", "tokenizers", "sentence-transformers", "numpy")


def index(encoder, products: pd.DataFrame, cache: Path | None) -> DenseIndex:
    """The exact vectors of a catalogue, from the cache if they are there."""
    texts = product_text(products)
    if cache is None:
        return DenseIndex.build(products["item_id"], embed(encoder, texts, precision="float32", progress=True))
    folder = cache / content_hash(texts, encoder.max_seq_length, DEFAULT_ENCODER)
    if not folder.exists():
        index(encoder, products, None).save(folder)
    return DenseIndex.load(folder)


def loading(encoder: QueryEncoder) -> tuple[float, float]:
    """Seconds that loading takes, verified, and MB of the saved folder."""
    with tempfile.TemporaryDirectory() as place:
        encoder.save(Path(place) / "saved")
        began = time.perf_counter()
        QueryEncoder.load(Path(place) / "saved")
        seconds = time.perf_counter() - began
        return round(seconds, 2), round(sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file()) / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), help="what to measure on (default: both)")
    parser.add_argument("--cache", type=Path, help="folder for the products' vectors")
    arguments = parser.parse_args()
    load, encoder, cells, chosen = os.getloadavg()[0], load_encoder(device="cpu"), [], {}
    if load > 0.5:
        print(f"Other processes are at work (load {load:.1f}): repeat this on a quiet machine.\n")
    for source in arguments.sources:
        if not sources.is_available(source):
            print(f"{source} is not here: fetch it with `ecomrec data fetch {source}`\n")
            continue
        tables, _ = clean(sources.load(source))
        print(f"{source}: {len(tables.products)} products", file=sys.stderr)
        dense = index(encoder, tables.products, arguments.cache)
        with threadpool_limits(limits=1):
            choice = choose_query_encoder(encoder, dense, tables.judgements)
        table = choice.table.assign(ratio=choice.table.loc["torch", "ms"] / choice.table["ms"])
        chosen[source] = choice.encoder.precision
        seconds, megabytes = loading(choice.encoder)
        print(f"{source}\n{table.round(4).to_string()}\n{choice}\nloaded and verified in {seconds} s, {megabytes} MB\n")
        cells += [{"source": source, **row} for row in table.round(4).reset_index().to_dict("records")]
    if set(chosen) == set(SOURCES):
        versions = _versions() | {name: importlib.metadata.version(name) for name in PACKAGES}
        record = {
            "cells": cells, "chosen": chosen, "checkpoint": DEFAULT_ENCODER, "load_before": round(load, 2),
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "hardware": _hardware(),
            "versions": {name: versions[name] for name in ("python", *PACKAGES)},
        }
        write_json(RESULTS / "query_encoder.json", record)


if __name__ == "__main__":
    main()
