"""The loop: killed at any moment it ends where it would have ended; processes and pieces change nothing."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from writers import split_of

from ecomrec.data.artefacts import ArtefactError
from ecomrec.model.shopper import config_of, train_shopper
from ecomrec.model.training import Schedule, TrainingError, train

SCRIPT = """
import os
import sys
import numpy as np
from dataclasses import replace
from pathlib import Path
from scipy.sparse import csr_array
sys.path.insert(0, {tests!r})
from test_sequences import whole_of
from ecomrec.data.sequences import cut_in_time, leave_last_out
from ecomrec.model.shopper import config_of, train_shopper
from ecomrec.model.training import Schedule
import torch

rng = np.random.default_rng(0)
whole = whole_of([rng.integers(0, 10, 6).tolist() for _ in range(400)])
if {receipts}:  # visits, times, habits, the trend, attributes, kinds
    n = len(whole.items)
    whole = replace(
        whole, ts=np.tile(np.array([0, 0, 1, 2, 3, 3]), 400) * 86_400_000, session=np.arange(n) // 2, kind=rng.integers(0, 2, n), attributes=csr_array(np.eye(10, 4, dtype=np.float32)),
    )
    split = cut_in_time(whole, 2 * 86_400_000, 3 * 86_400_000)
else:
    split = leave_last_out(whole)
config = config_of(split.train, dim=16, heads=2, dropout={dropout})
assert not {receipts} or (config.habit and config.trend and config.n_kinds and config.n_attributes)
schedule = Schedule(epochs={epochs}, patience=9, save_every=0.05, precision={precision!r})
own_disk = sys.argv[1] + os.environ.get("RANK", "0")
model, log = train_shopper(split, config, schedule, folder=own_disk, rows_per_batch=2, progress=False)
if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
    model.save_pretrained(sys.argv[2])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def script(folder, dropout: float = 0.5, epochs: int = 6, precision: str = "auto", receipts: bool = False) -> str:
    path = folder / "script.py"
    path.write_text(SCRIPT.format(tests=os.path.dirname(__file__), dropout=dropout, epochs=epochs, precision=precision, receipts=receipts))
    return str(path)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("receipts", [pytest.param(False, marks=pytest.mark.slow), True])
def test_kill_9_in_the_middle_of_an_epoch_changes_nothing(tmp_path, receipts):
    command = [sys.executable, script(tmp_path, epochs=12 if receipts else 6, receipts=receipts)]
    subprocess.run([*command, tmp_path / "a", tmp_path / "whole"], check=True)
    for _ in range(2):  # killed twice, at moments that the clock chooses
        process = subprocess.Popen([*command, tmp_path / "b", tmp_path / "resumed"])
        deadline = time.monotonic() + 60
        while not (tmp_path / "b0" / "manifest.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "resumed").exists()
    subprocess.run([*command, tmp_path / "b", tmp_path / "resumed"], check=True)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_two_processes_equal_one(tmp_path):
    path = script(tmp_path, dropout=0.0, epochs=2, precision="float32")
    subprocess.run([sys.executable, path, tmp_path / "a", tmp_path / "one"], check=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for epochs in (1, 2):  # the second run goes on with what only the first process can read
        path = script(tmp_path, dropout=0.0, epochs=epochs, precision="float32")
        subprocess.run([*torchrun, path, tmp_path / "b", tmp_path / "two"], check=True, capture_output=True)
    assert not (tmp_path / "b1").exists()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    exact = [name for name in one if one[name].is_floating_point()]
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in exact)


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    split, schedule = split_of(0), Schedule(epochs=1)
    train_shopper(split, config_of(split.train, dim=8), schedule, folder=tmp_path / "run", progress=False)
    for other in (Schedule(epochs=1, seed=1), Schedule(epochs=1, learning_rate=0.1)):
        with pytest.raises(TrainingError, match="holds a training of other data, settings or another model"):
            train_shopper(split, config_of(split.train, dim=8), other, folder=tmp_path / "run", progress=False)
    state = tmp_path / "run" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtefactError, match="checksum"):
        train_shopper(split, config_of(split.train, dim=8), schedule, folder=tmp_path / "run", progress=False)


def test_more_epochs_go_on_where_fewer_ended(tmp_path):
    split = split_of(0)
    config = config_of(split.train, dim=8)
    whole, log = train_shopper(split, config, Schedule(epochs=4, patience=4), progress=False)
    train_shopper(split, config, Schedule(epochs=2, patience=4), folder=tmp_path / "run", progress=False)
    more, again = train_shopper(split, config, Schedule(epochs=4, patience=4), folder=tmp_path / "run", progress=False)
    assert log.drop(columns="seconds").equals(again.drop(columns="seconds"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), more.state_dict().values()))


def test_another_model_or_other_data_in_the_same_folder_is_refused(tmp_path):
    split = split_of(0)
    config = config_of(split.train, dim=8)
    train_shopper(split, config, Schedule(epochs=1), folder=tmp_path / "run", progress=False)
    other_data = replace(split, train=split.train.keep(split.train.items != 3))
    for changed, options in [((split, replace(config, dropout=0.1)), {}), ((split, replace(config, heads=1)), {}), ((other_data, config), {}), ((split, config), {"masked": False})]:
        with pytest.raises(TrainingError, match="holds a training of other data"):
            train_shopper(*changed, Schedule(epochs=1), folder=tmp_path / "run", progress=False, **options)
    with pytest.raises(TrainingError, match="other data"):
        text = np.ones((10, 3), np.float32)
        train_shopper(split, replace(config, text=3), Schedule(epochs=1), folder=tmp_path / "run", text=text, progress=False)


def test_more_patience_goes_on_and_fewer_epochs_than_done_are_refused(tmp_path):
    x, y, fall = torch.randn(8, 2), torch.tensor([0, 1] * 4), iter([0.3, 0.2, 0.4, 0.1, 0.1])

    def go(**settings):
        torch.manual_seed(0)
        loss_of = lambda m, b: (nn.functional.cross_entropy(m(b["x"]), b["y"]), 8)
        return train(nn.Linear(2, 2), lambda epoch: [{"x": x, "y": y}], loss_of, lambda m: next(fall), Schedule(**settings), tmp_path / "run", progress=False)

    assert len(go(epochs=9, patience=1)) == 2
    assert go(epochs=9, patience=2)["valid"].tolist() == [0.3, 0.2, 0.4, 0.1, 0.1]
    with pytest.raises(TrainingError, match="has 5 epochs already, more than the 2"):
        go(epochs=2, patience=2)


def test_patience_ends_it_and_the_best_is_kept():
    quality = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    model, kept = nn.Linear(2, 2), []

    def validate(judged):
        kept.append({name: value.clone() for name, value in judged.state_dict().items()})
        return next(quality)

    x, y = torch.randn(8, 2), torch.tensor([0, 1] * 4)
    log = train(model, lambda epoch: [{"x": x, "y": y}], lambda m, b: (nn.functional.cross_entropy(m(b["x"]), b["y"]), 8), validate, Schedule(epochs=9, patience=2), progress=False)
    assert log["valid"].tolist() == [0.1, 0.3, 0.2, 0.25] and torch.equal(model.weight, kept[1]["weight"])


@pytest.mark.parametrize("field, value", [("learning_rate", 0), ("average", 1.0), ("clip", 0), ("accumulate", 0), ("patience", 0), ("precision", "int8")])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        Schedule(**{field: value})
