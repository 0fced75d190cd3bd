"""How much faster is an epoch of the sequence model than plain PyTorch doing the same work, and how soon is it as good?

    python tests/benchmarks/next_item.py             all of it; prints a table and writes results/next_item.json (minutes)
    python tests/benchmarks/next_item.py --epochs 0  the epochs alone, without the race to a validation nDCG
    python tests/benchmarks/next_item.py --source F  another source, as in the experiment next_item

Plain PyTorch: histories padded to rows of 50, `nn.TransformerEncoder` with a causal mask, loss on the targets that are no padding, float32
`cross_entropy` over all items, batches of 256; the bare steps are timed on some batches and scaled. Ours: a whole epoch as it is trained, with packing,
clipping and averaged weights; packed rows, attention beside a filter, the softmax in pieces. Both 64 wide, two layers, ids alone, the same optimiser and
learning rate, two threads. In the race plain PyTorch takes batches of 128, so that both make about as many steps an epoch. Only ratios within one run mean anything on another machine.
"""

import argparse
import datetime
import json
import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecomrec.data.artefacts import write_json
from ecomrec.data.sequences import Questions, Split, leave_last_out, load_sequences
from ecomrec.lab import _hardware, _versions
from ecomrec.model.baselines import quality_of, target_ranks
from ecomrec.model.shopper import Shopper, config_of, train_shopper
from ecomrec.model.text import has_bfloat16
from ecomrec.model.training import Schedule, train

RESULTS = Path(__file__).resolve().parent / "results"
LENGTH, ROWS, DIM = 50, 256, 64


class Plain(nn.Module):
    """The textbook model: padded rows, PyTorch's own layers, the plain loss."""

    def __init__(self, n_items: int):
        super().__init__()
        self.items = nn.Embedding(n_items + 1, DIM, padding_idx=0)  # 0 is padding
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, DIM))
        nn.init.normal_(self.items.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(DIM, 2, 4 * DIM, dropout=0.5, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("later", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def encode(self, item: Tensor) -> Tensor:
        return self.encoder(self.drop(self.items(item) + self.place), mask=self.later)  # padding comes last: nobody sees it

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        asked = batch["target"] > 0
        z = self.encode(batch["item"])[asked]
        return F.cross_entropy(z @ self.items.weight[1:].T, batch["target"][asked] - 1), int(asked.sum())

    @torch.inference_mode()
    def scores(self, asked: Questions) -> np.ndarray:
        item = torch.as_tensor(padded([asked.history.history(row) for row in range(len(asked))]))
        z = self.encode(item)[torch.arange(len(item)), (item > 0).sum(dim=1) - 1]
        return (z @ self.items.weight[1:].T).numpy()


def padded(histories: list[np.ndarray]) -> np.ndarray:
    """The last `LENGTH` items of each history from the left, codes from 1."""
    rows = np.zeros((len(histories), LENGTH), np.int64)
    for row, history in enumerate(histories):
        some = history[-LENGTH:]
        rows[row, : len(some)] = some + 1
    return rows


def plain_batches(split: Split, seed: int, size: int = ROWS):
    """Inputs and targets of the padded rows, some at a time, in a new order each epoch."""
    histories = [split.train.history(row) for row in range(len(split.train)) if split.train.lengths[row] > 1]
    item, target = padded([history[:-1] for history in histories]), padded([history[1:] for history in histories])
    item, target = torch.as_tensor(item), torch.as_tensor(target)

    def batches(epoch: int) -> list[dict[str, Tensor]]:
        order = torch.as_tensor(np.random.default_rng([seed, epoch]).permutation(len(item)))
        return [{"item": item[rows], "target": target[rows]} for rows in order.split(size)]

    return batches


def plain_seconds(model: nn.Module, batches: list, n: int) -> float:
    """Seconds of a whole epoch, from the mean step of the first n of its batches."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    model.train()
    times = []
    for place in range(min(n, len(batches))):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        model.loss(batches[place])[0].backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    return float(np.mean(times[2:]) * len(batches))


def epochs_of(split: Split, n: int) -> dict[str, float]:
    """Seconds an epoch, of each way."""
    torch.manual_seed(0)
    found = {"plain PyTorch": plain_seconds(Plain(len(split.train.item_ids)), plain_batches(split, 0)(0), n)}
    unasked = replace(split, valid=split.valid.take(np.arange(0)))  # nothing is validated, so only training is timed
    config = config_of(split.train, n_attributes=0, dim=DIM)
    for precision in ("float32", *(["bfloat16"] if has_bfloat16() else [])):
        log = train_shopper(unasked, config, Schedule(epochs=3, precision=precision), progress=False)[1]
        found[f"ours, {precision}"] = float(log["seconds"].iloc[1:].mean())
    return found


def race(split: Split, goal: float, epochs: int) -> dict[str, dict[str, float]]:
    """Seconds of training steps until the validation nDCG@10 is there, of both; and the best that was seen."""
    torch.manual_seed(0)
    schedule = Schedule(epochs=epochs, patience=epochs)
    plain = Plain(len(split.train.item_ids))
    logs = {
        "ours": train_shopper(split, config_of(split.train, n_attributes=0, dim=DIM), schedule)[1],
        "plain PyTorch": train(plain, plain_batches(split, 0, ROWS // 2), Plain.loss, lambda model: quality_of(model.scores, split.valid, True), schedule),
    }
    found = {}
    for name, log in logs.items():
        there = log.index[log["valid"] >= goal]
        reached = float(log["seconds"].iloc[: there[0] + 1].sum()) if len(there) else None
        found[name] = {"seconds": reached, "epochs": int(there[0]) + 1 if len(there) else None, "best": float(log["valid"].max()), "all seconds": float(log["seconds"].sum())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="beauty", help="as in the experiment next_item (default: beauty)")
    parser.add_argument("--batches", type=int, default=50, help="batches of 256 histories that are timed (default: 50)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of the race; 0 leaves it out (default: 12)")
    parser.add_argument("--goal", type=float, default=0.06, help="validation nDCG@10 of the race (default: .06)")
    parser.add_argument("--output", type=Path, default=RESULTS / "next_item.json", help="where the numbers go")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"Other processes are at work (load {load:.1f}): repeat this on a quiet machine.\n")
    split = leave_last_out(load_sequences(arguments.source))
    model = Shopper(config_of(split.train, n_attributes=0, dim=DIM)).eval()
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    target_ranks(model.scores, split.test, True)
    ranking, memory = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before / 2**20
    epochs = epochs_of(split, arguments.batches)
    plain = epochs["plain PyTorch"]
    rows = [{"what": f"an epoch, {name}", "seconds": seconds, "times faster": plain / seconds} for name, seconds in epochs.items()]
    rows.append({"what": f"full ranking of {len(split.test):,} users", "seconds": ranking, "times faster": plain / ranking})
    table = pd.DataFrame(rows).set_index("what").round(2)
    print(table.to_string(), f"\nfull ranking takes {ranking / plain:.0%} of a plain epoch, and {memory:.0f} MiB at its peak")
    found = race(split, arguments.goal, arguments.epochs) if arguments.epochs else {}
    for name, end in found.items():
        reached = f"after {end['seconds']:.0f} s, {end['epochs']} epochs" if end["seconds"] is not None else f"not in {arguments.epochs} epochs, {end['all seconds']:.0f} s"
        print(f"validation nDCG@10 of {arguments.goal}: {name} {reached}; best {end['best']:.4f}")
    versions = _versions()
    write_json(arguments.output, {
        "date": datetime.date.today().isoformat(), "load_before": round(load, 2), "threads": torch.get_num_threads(), "source": arguments.source,
        "hardware": _hardware(), "versions": {name: versions[name] for name in ("python", "torch", "numpy") if name in versions},
        "ranking_peak_mebibytes": round(memory), "rows": json.loads(table.reset_index().to_json(orient="records")), "goal": arguments.goal, "race": found,
    })


if __name__ == "__main__":
    main()
