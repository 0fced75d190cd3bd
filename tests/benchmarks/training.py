"""How many pairs of a query and a product does the training of a bi-encoder read in a second?

    python tests/benchmarks/training.py                all cells; prints a table and writes results/training.json
    python tests/benchmarks/training.py --seconds 5    the same, shorter and noisier
    python tests/benchmarks/training.py --checkpoint F another encoder: a folder, or a name on the hub

Every cell runs in a process of its own. Only ratios within one run mean anything on another machine.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset

from ecomrec.data import sources
from ecomrec.data.artefacts import write_json
from ecomrec.data.cleaning import clean
from ecomrec.lab import _hardware, _versions
from ecomrec.model.finetuning import Training, fine_tune, open_model, training_lists
from ecomrec.model.losses import graded_loss
from ecomrec.model.text import DEFAULT_ENCODER, has_bfloat16, product_text

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("python", "torch", "transformers", "sentence-transformers", "numpy")
WARM_UP = 3  # steps; the first ones allocate memory


def shop_lists(settings: Training) -> Dataset:
    """Lists of the bundled shop's queries with the text of its products."""
    tables, _ = clean(sources.load("shop"))
    judged = tables.judgements.query("locale == 'en'").astype({"grade": int})
    return training_lists(judged, product_text(tables.products).set_axis(tables.products["item_id"]), settings)


def step_seconds(checkpoint: str, lists: Dataset, settings: Training, n_steps: int) -> float:
    """Mean time of a training step, in seconds, without what comes before the steps.

    Args:
        checkpoint: As in `open_model`.
        lists: From `training_lists`; repeated as often as the steps need.
        settings: As in `fine_tune`.
        n_steps: How many steps to measure, after `WARM_UP` others.
    """
    began = []

    def timed(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        began.append(time.perf_counter())
        return graded_loss(scores, labels)

    n_lists = (WARM_UP + n_steps + 1) * settings.lists  # a step lasts until the next one computes its loss
    rows = [place % len(lists) for place in range(n_lists)]
    fine_tune(open_model("bi_encoder", checkpoint, settings.max_tokens), lists.select(rows), settings, objective=timed)
    return (began[-1] - began[WARM_UP]) / n_steps


def measure(cell: dict, lists: Dataset, seconds: float, checkpoint: str = DEFAULT_ENCODER) -> dict:
    """One cell of the table, measured in this process.

    Args:
        cell: "precision" and "lists" (queries in one step); what else it says is passed on.
        lists: From `training_lists`.
        seconds: How long to measure, about.
        checkpoint: As in `open_model`.
    Returns:
        The cell with "steps", "pairs_per_second" and "peak_memory_mib" (of the process, or of the GPU).
    """
    size = len(lists["docs"][0])
    settings = Training(precision=cell["precision"], lists=cell["lists"], list_size=size)
    n_steps = max(2, math.ceil(seconds / step_seconds(checkpoint, lists, settings, 2)))
    mean = step_seconds(checkpoint, lists, settings, n_steps)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)
    return cell | {"steps": n_steps, "pairs_per_second": settings.lists * size / mean, "peak_memory_mib": round(peak)}


def product_ratio(device: str = "cpu", n_times: int = 20) -> float:
    """How many times as fast a bare product of an encoder layer's shape is in bfloat16: what no training step can exceed."""
    seconds = {}
    for kind in (torch.float32, torch.bfloat16):
        left, right = torch.ones(6144, 384, dtype=kind, device=device), torch.ones(384, 1536, dtype=kind, device=device)
        times = []
        for _ in range(n_times):
            began = time.perf_counter()
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        seconds[kind] = sorted(times)[n_times // 2]
    return seconds[torch.float32] / seconds[torch.bfloat16]


def cells() -> list[dict]:
    """What is measured on this machine; bfloat16 only where a processor has it."""
    found = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        precisions = ["float32"] + ["bfloat16"] * has_bfloat16(device)
        shapes = [(1, 8), (2, 8)] if device == "cpu" else [(os.cpu_count(), n_lists) for n_lists in (8, 32, 128)]
        for threads, n_lists in shapes:
            for precision in precisions:
                found.append({"device": device, "threads": threads, "lists": n_lists, "precision": precision})
    return found


def in_a_process(cell: dict, seconds: float, checkpoint: str) -> dict:
    """Measure a cell with its own number of threads, which a process settles when it starts."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(cell["threads"]))
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cell["device"] == "cpu" else {}
    environment = os.environ | threads | hidden | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--seconds", str(seconds), "--checkpoint", checkpoint, "--cell", json.dumps(cell)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def markdown(rows: list[dict]) -> str:
    """The cells as a table, each with its ratio to float32 in the same place."""
    frame = pd.DataFrame(rows)
    place = ["device", "threads", "lists"]
    exact = frame[frame["precision"] == "float32"].set_index(place)["pairs_per_second"]
    lines = [
        "| device | threads | lists a step | precision | pairs/s | ratio to float32 | peak memory, MiB |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for row in rows:
        ratio = row["pairs_per_second"] / exact[tuple(row[key] for key in place)]
        shown = [*(row[key] for key in place), row["precision"], f"{row['pairs_per_second']:.0f}", f"{ratio:.2f}"]
        lines.append("| " + " | ".join(map(str, [*shown, row["peak_memory_mib"]])) + " |")
    return "\n".join(lines)


def report(rows: list[dict], load: float, checkpoint: str = DEFAULT_ENCODER) -> dict:
    """What is written down: the numbers, and what they were measured on.

    Args:
        rows: From `measure`.
        load: Of the machine before, in processes that want to run.
        checkpoint: What was trained.
    """
    versions = _versions()
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "date": datetime.date.today().isoformat(),
        "load_before": round(load, 2),
        "checkpoint": checkpoint,
        "settings": dataclasses.asdict(Training()),
        "hardware": _hardware() | gpu,
        "versions": {name: versions[name] for name in PACKAGES if name in versions},
        "product_ratio": round(product_ratio("cuda" if gpu else "cpu"), 2) if has_bfloat16() or gpu else None,
        "cells": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="how long each cell is measured (default: 20)")
    parser.add_argument("--checkpoint", default=DEFAULT_ENCODER, help="the encoder (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.json", help="where the numbers go")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(arguments.cell, shop_lists(Training()), arguments.seconds, arguments.checkpoint)))
        return
    if not has_bfloat16():
        print("This processor has no bfloat16, so only float32 is measured on it.\n")
    load, rows = os.getloadavg()[0], []
    if load > 0.5:
        print(f"Other processes are at work (load {load:.1f}): repeat this on a quiet machine.\n")
    for cell in cells():
        print(f"measuring {cell}", file=sys.stderr)
        rows.append(in_a_process(cell, arguments.seconds, arguments.checkpoint))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    done = report(rows, load, arguments.checkpoint)
    write_json(arguments.output, done)
    print(markdown(rows))
    if done["product_ratio"]:
        print(f"\nA bare matrix product is {done['product_ratio']} times as fast in bfloat16 here: no training step can gain more.")


if __name__ == "__main__":
    main()
