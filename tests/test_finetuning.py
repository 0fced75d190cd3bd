"""Fine-tuning: what a reader of the notebook need not see. All models are two tiny layers, made here."""

import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from ecomrec.data.artefacts import ArtefactError, write_json
from ecomrec.model.finetuning import (
    KINDS,
    ListLoss,
    Training,
    fine_tune,
    mine_negatives,
    open_model,
    save_model,
    score_pairs,
    sparse_vectors,
    training_lists,
    tuned_scores,
)
from ecomrec.model.losses import distillation_loss, graded_loss
from ecomrec.model.text import EncoderError

COLOURS, THINGS = ["red", "blue", "green", "white", "black"], ["shoe", "hat", "lamp", "chair", "cup", "desk"]
MODELS = [("bi_encoder", "bert"), ("cross_encoder", "bert"), ("sparse_encoder", "bert"), ("bi_encoder", "gpt2"),
          ("cross_encoder", "gpt2")]
TINY = Training(epochs=3, learning_rate=3e-3, lists=2, list_size=6, max_tokens=16, precision="float32")
TEXTS = pd.Series({f"{colour}_{thing}": f"{colour} {thing}" for colour in COLOURS for thing in THINGS})


def judge(query: str) -> list[dict]:
    """The product that the query names is right, those of its colour are half right."""
    colour = query.split()[0]
    grades = {item: 2 if text == query else 1 for item, text in TEXTS.items() if text.split()[0] == colour}
    return [{"query_id": query, "query": query, "item_id": item, "grade": grade} for item, grade in grades.items()]


JUDGED = pd.DataFrame([row for query in TEXTS.iloc[::3] for row in judge(query)])
POPULAR = pd.DataFrame([  # what is red is right, whatever was asked: even a new head learns that
    {"query_id": query, "query": query, "item_id": item, "grade": 2 * item.startswith("red")}
    for query in TEXTS.iloc[::3] for item in TEXTS.index
])
QUERIES, DOCS = ["red shoe", "blue hat", "red shoe"], ["red shoe", "green lamp", "black cup"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Folders as transformers writes them, with the heads that those two learned their language with."""
    folder = tmp_path_factory.mktemp("checkpoints")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS, *THINGS, "##s", *letters]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    made = {
        "bert": BertForMaskedLM(BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=64,
        )),
        "gpt2": GPT2LMHeadModel(GPT2Config(
            vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3,
            pad_token_id=0,
        )),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in made}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def collated(model, queries: list[str], docs: list[list[str]]) -> list:
    """What the trainer's collator makes of lists."""
    if isinstance(model, CrossEncoder):
        return [queries, docs]
    return [model.preprocess(list(column)) for column in (queries, *zip(*docs))]


def mean_loss(model, lists: Dataset) -> float:
    """Over all lists, without dropout."""
    loss = ListLoss(model.eval(), graded_loss, TINY.temperature if isinstance(model, SentenceTransformer) else 1.0)
    with torch.no_grad():
        return loss(collated(model, lists["query"][:], lists["docs"][:]), torch.tensor(lists["labels"][:])).item()


def loss_and_gradients(
    model, queries: list[str], docs: list[list[str]], labels: list[list[float]], objective=graded_loss, cached_texts=0
) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one step, without dropout."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.zero_grad()
    loss = ListLoss(model, objective, cached_texts=cached_texts)(collated(model, queries, docs), torch.tensor(labels))
    loss.backward()
    return loss.item(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


# Killed


def train_here(
    kind: str, checkpoint: Path, change: dict, folder: Path | None, result: Path, pause_at: int | None,
) -> None:
    """What a process of its own does: train twelve steps, or wait at one of them to be killed."""
    torch.set_num_threads(1)
    found = []

    def objective(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found.append(sorted(path.name for path in folder.glob("checkpoint-*")) if folder else [])
        if len(found) == pause_at:
            (result / "paused").touch()
            time.sleep(600)
        return graded_loss(scores, labels)

    settings = replace(TINY, **change)
    model = open_model(kind, str(checkpoint), settings.max_tokens, device="cpu")
    lists = training_lists(JUDGED, TEXTS, settings).select(range(24))
    fine_tune(model, lists, settings, objective, folder=folder, save_every=2)
    save_model(model, result / "model")
    write_json(result / "end.json", {"found": found, "scores": score_pairs(model, QUERIES, DOCS).tolist()})


@pytest.fixture(scope="module")
def processes():
    """Starts real processes, each from one that has trained nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ecomrec.model.finetuning"])  # once; the import takes longer than the training

    def start(*arguments) -> multiprocessing.Process:
        arguments[4].mkdir()
        process = context.Process(target=train_here, args=arguments)
        process.start()
        return process

    return start


@pytest.mark.parametrize(
    "kind, change",
    [("bi_encoder", {}), ("cross_encoder", {}), ("sparse_encoder", {}), ("bi_encoder", {"lora_rank": 4})],
    ids=["bi_encoder", "cross_encoder", "sparse_encoder", "LoRA"],
)
def test_a_killed_training_goes_on_and_ends_where_it_would_have_ended(processes, checkpoints, tmp_path, kind, change):
    what, folder = (kind, checkpoints["bert"], change), tmp_path / "training"
    straight = processes(*what, None, tmp_path / "straight", None)
    killed = processes(*what, folder, tmp_path / "killed", 6)
    while killed.is_alive() and not (tmp_path / "killed" / "paused").exists():
        time.sleep(0.02)
    assert (folder / "checkpoint-4" / "trainer_state.json").exists()
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and not (tmp_path / "killed" / "model").exists()

    half = folder / "checkpoint-6"  # as if it had died while it wrote this one
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half a")
    (half / "trainer_state.json").write_text('{"global_st')
    resumed = processes(*what, folder, tmp_path / "resumed", None)
    for process in (straight, resumed):
        process.join()
        assert process.exitcode == 0
    ends = [json.loads((tmp_path / name / "end.json").read_text()) for name in ("straight", "resumed")]
    assert len(ends[0]["found"]) == 12
    assert len(ends[1]["found"]) == 8 and ends[1]["found"][0] == ["checkpoint-4"]
    assert ends[0]["scores"] == ends[1]["scores"]
    saved = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("straight", "resumed")]
    assert saved[0] == saved[1] and not folder.exists()


# Every kind


@pytest.mark.parametrize("kind, family", MODELS)
def test_a_model_learns_and_plain_sentence_transformers_opens_it(checkpoints, tmp_path, kind, family):
    model = open_model(kind, str(checkpoints[family]), TINY.max_tokens, device="cpu")
    lists = training_lists(POPULAR, TEXTS, replace(TINY, epochs=8))
    before = mean_loss(model, lists)
    log = fine_tune(model, lists, TINY)
    assert mean_loss(model, lists) < 0.9 * before and np.isfinite(log["loss"].dropna()).all()
    folder = tmp_path / "model"
    save_model(model, folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert not any(path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK") for path in files)  # pickle, zip

    expected = score_pairs(model, QUERIES, DOCS, precision="float32")
    opened = {"bi_encoder": SentenceTransformer, "cross_encoder": CrossEncoder, "sparse_encoder": SparseEncoder}[kind](
        str(folder), device="cpu"
    )
    if kind == "cross_encoder":
        found = opened.predict(list(zip(QUERIES, DOCS)), activation_fn=torch.nn.Identity())
    elif kind == "bi_encoder":
        queries, docs = (opened.encode(texts, normalize_embeddings=True) for texts in (QUERIES, DOCS))
        found = (queries * docs).sum(axis=1)
    else:
        found = (opened.encode(QUERIES).to_dense() * opened.encode(DOCS).to_dense()).sum(1).numpy()
    assert np.allclose(found, expected, atol=1e-5) and np.ptp(expected) > 0.01
    again = open_model(kind, str(folder), TINY.max_tokens, device="cpu")
    assert not changed(weights(model), weights(again))
    assert np.allclose(score_pairs(again, QUERIES, DOCS, precision="float32"), expected, atol=1e-5)

    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b" ")
    with pytest.raises(ArtefactError, match="config.json"):
        open_model(kind, str(folder))


def test_a_bi_encoder_can_become_another_kind_without_a_word(checkpoints, tmp_path, caplog):
    save_model(open_model("bi_encoder", str(checkpoints["bert"]), 16, device="cpu"), tmp_path / "bi")
    logger = logging.getLogger("sentence_transformers.base.model")
    level = logger.level
    with caplog.at_level(logging.WARNING):
        cross = open_model("cross_encoder", str(tmp_path / "bi"), 16, device="cpu")
        sparse = open_model("sparse_encoder", str(tmp_path / "bi"), 16, device="cpu")
    assert isinstance(cross, CrossEncoder) and isinstance(sparse, SparseEncoder)
    assert not caplog.records and logger.level == level


def test_equal_pairs_and_texts_are_scored_alike_in_any_company(checkpoints):
    for kind, family in MODELS:
        model = open_model(kind, str(checkpoints[family]), 16, device="cpu")
        scores = score_pairs(model, QUERIES * 2, DOCS * 2, batch_size=2)
        assert scores.dtype == np.float32 and np.array_equal(scores[:3], scores[3:])
    model = open_model("sparse_encoder", str(checkpoints["bert"]), 16, device="cpu")
    vectors = sparse_vectors(model, [*QUERIES, ""])
    assert vectors.shape == (4, 53) and vectors.min() >= 0 and np.array_equal(*vectors[[0, 2]].toarray())


def test_one_call_trains_and_scores(checkpoints):
    asked = JUDGED[["query", "item_id"]].head(4)
    result = tuned_scores("bi_encoder", str(checkpoints["bert"]), JUDGED, TEXTS, asked, TINY, whole=True)
    rows = result["queries"][[0] * 4] * result["items"][TEXTS.index.get_indexer(asked["item_id"])]
    assert asked["query"].nunique() == 1 and np.allclose(result["scores"], rows.sum(axis=1), atol=1e-5)


# The ways to train


@pytest.mark.parametrize("cached_texts", [1, 2, 100])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradient_caching_changes_neither_loss_nor_gradient(checkpoints, family, cached_texts):
    model = open_model("bi_encoder", str(checkpoints[family]), 16, device="cpu")
    docs = [DOCS, DOCS[::-1], ["red hat", "", "white desk"]]
    step = (QUERIES, docs, [[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    loss, gradients = loss_and_gradients(model, *step)
    cached_loss, cached_gradients = loss_and_gradients(model, *step, cached_texts=cached_texts)
    assert cached_loss == pytest.approx(loss, abs=1e-6)
    assert gradients.keys() == cached_gradients.keys() and max(float(g.abs().max()) for g in gradients.values()) > 0.01
    for name in gradients:
        assert torch.allclose(gradients[name], cached_gradients[name], rtol=1e-4, atol=1e-6), name


def test_checkpoints_of_another_training_are_refused(checkpoints, tmp_path):
    settings, lists = replace(TINY, epochs=1), training_lists(JUDGED, TEXTS, replace(TINY, epochs=1))
    (tmp_path / "kept").mkdir()
    others = [(settings, lists.select(range(4))), (replace(settings, learning_rate=1e-3), lists)]

    def stop(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(open_model("bi_encoder", str(checkpoints["bert"]), 16), lists, settings, folder=tmp_path / "kept", watch=stop)
    for other, rows in others:
        with pytest.raises(ValueError, match="kept holds checkpoints of another training"):
            fine_tune(open_model("bi_encoder", str(checkpoints["bert"]), 16), rows, other, folder=tmp_path / "kept")
    with pytest.raises(ValueError, match="of another training"):
        fine_tune(open_model("cross_encoder", str(checkpoints["bert"]), 16), lists, settings, folder=tmp_path / "kept")
    fine_tune(open_model("bi_encoder", str(checkpoints["bert"]), 16), lists, settings, folder=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_folder_with_other_files_is_not_touched(checkpoints, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are no checkpoints of ours"):
        fine_tune(open_model("bi_encoder", str(checkpoints["bert"]), 16), training_lists(JUDGED, TEXTS, TINY), TINY, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "precious"]


def test_a_teacher_gives_the_labels(checkpoints):
    teacher = pd.DataFrame(np.arange(len(TEXTS) * JUDGED["query_id"].nunique()).reshape(-1, len(TEXTS)) / 7.0,
                           sorted(JUDGED["query_id"].unique()), TEXTS.index)
    lists = training_lists(JUDGED.assign(grade=0), TEXTS, TINY, teacher=teacher)
    item_of = {text: item for item, text in TEXTS.items()}
    for row in lists:
        assert row["labels"] == pytest.approx([teacher.at[row["query"], item_of[doc]] for doc in row["docs"]])
    asked = JUDGED[["query", "item_id"]].head(3)
    taught, graded = (tuned_scores("bi_encoder", str(checkpoints["bert"]), JUDGED, TEXTS, asked, TINY, teacher=one)["log"]["loss"]
                      for one in (teacher, None))
    assert taught.iloc[0] != graded.iloc[0]


@pytest.mark.parametrize("kind, family", MODELS)
def test_lora_leaves_plain_weights_and_changes_only_matrices(checkpoints, tmp_path, kind, family):
    model = open_model(kind, str(checkpoints[family]), 16, device="cpu")
    before = weights(model)
    fine_tune(model, training_lists(JUDGED, TEXTS, TINY), replace(TINY, lora_rank=4))
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    moved = changed(before, weights(model))
    layers = {name for name in before if (".layer." in name or ".h." in name) and before[name].dim() == 2}
    assert layers <= moved and not any("embeddings" in name or "norm" in name.lower() for name in moved)
    assert all(name.endswith("weight") and before[name].dim() == 2 for name in moved)
    assert all(weight.requires_grad for weight in model.parameters())
    save_model(model, tmp_path / "model")
    assert not list((tmp_path / "model").rglob("*adapter*"))
    again = open_model(kind, str(tmp_path / "model"), 16, device="cpu")
    assert not changed(weights(model), weights(again))


@pytest.mark.parametrize("kind, family", MODELS)
def test_frozen_layers_stay_and_the_others_move(checkpoints, kind, family):
    model = open_model(kind, str(checkpoints[family]), 16, device="cpu")
    before = weights(model)
    fine_tune(model, training_lists(JUDGED, TEXTS, TINY), replace(TINY, frozen_layers=1))
    moved = changed(before, weights(model))
    lower = ("_embeddings", ".wte", ".wpe", ".layer.0.", ".h.0.")
    frozen = {name for name in before if any(part in name for part in lower)}
    free = {name for name in before if (".layer.1." in name or ".h.1." in name) and before[name].dim() == 2}
    assert len(frozen) > 10 and not moved & frozen
    assert len(free) >= 4 and free <= moved
    again = open_model(kind, str(checkpoints[family]), 16, device="cpu")  # the last of its two layers always learns
    fine_tune(again, training_lists(JUDGED, TEXTS, TINY), replace(TINY, frozen_layers=3))
    assert not changed(weights(model), weights(again))


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_everything(checkpoints, kind):
    def trained(seed: int) -> dict[str, torch.Tensor]:
        settings = replace(TINY, seed=seed, epochs=1)
        model = open_model(kind, str(checkpoints["bert"]), 16, seed, device="cpu")
        fine_tune(model, training_lists(JUDGED, TEXTS, settings), settings)
        return weights(model)

    first = trained(0)
    torch.manual_seed(7)  # what was drawn before does not matter
    assert not changed(first, trained(0))
    assert changed(first, trained(1))


def test_both_precisions_train_float32_weights(checkpoints):
    ends = {}
    for precision in ("float32", "bfloat16"):
        model = open_model("bi_encoder", str(checkpoints["bert"]), 16, device="cpu")
        lists = training_lists(POPULAR, TEXTS, replace(TINY, epochs=8))
        before = mean_loss(model, lists)
        fine_tune(model, lists, replace(TINY, precision=precision))
        assert mean_loss(model, lists) < before
        ends[precision] = weights(model)
        assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in model.parameters())
        untrained = open_model("bi_encoder", str(checkpoints["bert"]), 16, device="cpu")
        untrained.load_state_dict(model.state_dict())  # the same weights, never wrapped in bfloat16 by a trainer
        assert np.allclose(model.encode(DOCS), untrained.encode(DOCS), atol=1e-6)
    assert changed(ends["float32"], ends["bfloat16"])


def test_a_teachers_scores_can_be_the_labels(checkpoints):
    lists = training_lists(POPULAR, TEXTS, replace(TINY, epochs=8))
    model = open_model("bi_encoder", str(checkpoints["bert"]), 16, device="cpu")
    before = mean_loss(model, lists)
    fine_tune(model, lists, TINY, distillation_loss)
    assert mean_loss(model, lists) < before


def test_watch_is_asked_at_the_end_and_lists_without_labels_are_refused(checkpoints):
    model = open_model("bi_encoder", str(checkpoints["bert"]), 16, device="cpu")
    lists, training = training_lists(JUDGED, TEXTS, replace(TINY, epochs=1)), []
    log = fine_tune(model, lists, TINY, watch=lambda model: {"training": training.append(model.training) or 1.0})
    assert training == [False] and log["training"].dropna().index.tolist() == [log.index.max()]
    with pytest.raises(ValueError, match="column 'labels' is missing"):
        fine_tune(model, lists.remove_columns("labels"), TINY)


# Lists


@st.composite
def catalogues(draw) -> tuple[pd.DataFrame, pd.Series, dict[str, list[str]], Training]:
    """A few products, grades for some of them, mined negatives, and sizes."""
    items = [f"i{n}" for n in range(draw(st.integers(1, 20)))]
    judged = [
        {"query_id": query, "query": f"words of {query}", "item_id": item, "grade": draw(st.integers(0, 3))}
        for query in ("q0", "q1", "q2")[: draw(st.integers(1, 3))]
        for item in draw(st.lists(st.sampled_from(items), min_size=1, unique=True))
    ]
    negatives = {"q0": draw(st.lists(st.sampled_from(items), unique=True))}
    settings = Training(epochs=draw(st.integers(1, 3)), list_size=draw(st.integers(2, 9)), seed=draw(st.integers(0, 9)))
    return pd.DataFrame(judged), pd.Series({item: f"text of {item}" for item in items}), negatives, settings


@given(catalogues())
def test_every_list_is_what_it_says(case):
    judged, texts, negatives, settings = case
    grades = {query: group.set_index("item_id")["grade"] for query, group in judged.groupby("query_id")}
    useful = {f"words of {query}": mine for query, mine in grades.items() if mine.max() > 0}
    if not useful:
        with pytest.raises(ValueError, match="no query has a product with a grade above 0"):
            training_lists(judged, texts, settings, negatives)
        return
    lists = training_lists(judged, texts, settings, negatives)
    assert sorted(lists["query"]) == sorted([*useful] * settings.epochs)
    item_of = {text: item for item, text in texts.items()}
    for row in lists:
        docs, labels = row["docs"], np.array(row["labels"])
        assert len(docs) == len(labels) == settings.list_size and np.nanmax(labels) > 0
        offered = [item_of[doc] for doc in docs if doc]
        assert len(set(offered)) == len(offered)
        mine = useful[row["query"]]
        assert labels[: len(offered)].tolist() == [mine.get(item, 0) for item in offered]
        assert np.isnan(labels[len(offered) :]).all() and set(docs[len(offered) :]) <= {""}
        good = min(int((mine > 0).sum()), settings.list_size // 2)
        assert sum(mine.get(item, 0) > 0 for item in offered) == good
        assert len(offered) == min(settings.list_size, good + int((mine == 0).sum()) + len(texts) - len(mine))
    assert training_lists(judged, texts, settings, negatives).to_list()[0]["docs"] == lists[0]["docs"]


@given(catalogues(), st.integers(0, 2**31), st.floats(0.1, 2), st.integers(1, 8))
def test_mined_negatives_are_high_unjudged_and_not_too_high(case, seed, margin, depth):
    judged, texts, _, settings = case
    queries = sorted(judged["query_id"].unique())
    scores = np.random.default_rng(seed).random((len(queries), len(texts)))
    mined = mine_negatives(scores, judged, queries, texts.index, depth, margin)
    for query, row in zip(queries, scores):
        mine, row = judged[judged["query_id"] == query].set_index("item_id")["grade"], pd.Series(row, texts.index)
        if not (mine > 0).any():
            assert query not in mined
            continue
        allowed = row[~row.index.isin(mine.index) & (row < margin * row[mine.index[mine > 0]].median())]
        assert set(mined[query]) <= set(allowed.index) and len(mined[query]) <= depth
        assert row[mined[query]].is_monotonic_decreasing
        unjudged_above = row.drop(mine.index).sort_values(ascending=False).index[:depth]
        assert set(allowed.index) & set(unjudged_above) <= set(mined[query])
    if any((group["grade"] > 0).any() for _, group in judged.groupby("query_id")):
        lists = training_lists(judged, texts, settings, mined)
        taken = {f"words of {query}": {texts[item] for item in items} for query, items in mined.items()}
        labelled = [(row["query"], *pair) for row in lists for pair in zip(row["docs"], row["labels"])]
        assert all(label == 0 for query, doc, label in labelled if doc in taken[query])


def test_negatives_are_mined_from_negative_scores_too():
    judged = pd.DataFrame({"query_id": "q", "item_id": ["good"], "grade": [1]})
    scores = np.array([[-10.0, -10.2, -10.9, -1.0]])  # right, nearly as good, surely worse, better
    items = ["good", "near", "worse", "better"]
    assert mine_negatives(scores, judged, ["q"], items) == {"q": ["worse"]}
    for shift in (0.0, 10.0):  # the relevant product's own score may be 0
        assert mine_negatives(scores + shift, judged, ["q"], items, margin=np.inf) == {"q": ["better", "near", "worse"]}
    with pytest.raises(ValueError, match="item_ids: 'good' is missing"):
        mine_negatives(scores[:, 1:], judged, ["q"], items[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", [graded_loss, distillation_loss])
def test_padding_changes_neither_loss_nor_gradient(checkpoints, kind, objective):
    model = open_model(kind, str(checkpoints["bert"]), 16, device="cpu")
    docs, labels, nan = [DOCS, DOCS[::-1]], [[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]], float("nan")
    loss, gradients = loss_and_gradients(model, QUERIES[:2], docs, labels, objective)
    padded = [row + ["", ""] for row in docs], [row + [nan, nan] for row in labels]
    padded_loss, padded_gradients = loss_and_gradients(model, QUERIES[:2], *padded, objective)
    assert padded_loss == pytest.approx(loss, rel=1e-5) and gradients.keys() == padded_gradients.keys()
    for name in gradients:
        assert torch.allclose(gradients[name], padded_gradients[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_catalogue_smaller_than_a_list_can_be_learned(checkpoints, kind):
    model = open_model(kind, str(checkpoints["bert"]), 16, device="cpu")
    texts = TEXTS[TEXTS.str.startswith("red ") | TEXTS.str.startswith("blue ")]
    judged = JUDGED[JUDGED["item_id"].isin(texts.index)]
    lists = training_lists(judged, texts, replace(TINY, list_size=20, epochs=5))
    assert all(np.isnan(row["labels"]).sum() >= 8 for row in lists)
    before = weights(model)
    log = fine_tune(model, lists, TINY)
    assert np.isfinite(log["loss"].dropna()).all() and changed(before, weights(model))
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_one_judged_product_is_enough(checkpoints):
    judged = JUDGED.head(1)
    lists = training_lists(judged, TEXTS, replace(TINY, epochs=10))
    assert len(lists) == 10 and all(sum(row["labels"]) == judged["grade"].item() for row in lists)
    model = open_model("bi_encoder", str(checkpoints["bert"]), 16, device="cpu")
    before = weights(model)
    log = fine_tune(model, lists, TINY)
    assert np.isfinite(log["loss"]).all() and changed(before, weights(model))


def test_where_all_grades_are_equal_the_others_count_as_irrelevant():
    lists = training_lists(JUDGED.assign(grade=3), TEXTS, TINY)
    assert all(sorted(row["labels"]) == [0.0] * 3 + [3.0] * 3 for row in lists)
    everything = pd.DataFrame({"query_id": "q", "query": "red", "item_id": TEXTS.index, "grade": 3})
    row = training_lists(everything, TEXTS, TINY)[0]  # nothing is left that could count as irrelevant
    assert row["labels"][:3] == [3.0] * 3 and np.isnan(row["labels"][3:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_title_and_a_very_long_description(checkpoints, kind):
    empty, long = JUDGED["item_id"].iloc[:2]
    texts = TEXTS.astype(object)
    texts[empty], texts[long] = "", "red shoe, size 42. " * 5300
    assert len(texts[long]) > 100_000
    judged = JUDGED[JUDGED["item_id"].isin([empty, long])].assign(grade=1)
    lists = training_lists(judged, texts, replace(TINY, list_size=4, epochs=5))
    docs = {doc for row in lists for doc in row["docs"]}
    assert "" in docs and max(len(doc) for doc in docs) == 20 * TINY.max_tokens
    model = open_model(kind, str(checkpoints["bert"]), TINY.max_tokens, device="cpu")
    some = [("red", texts[long])] if kind == "cross_encoder" else [texts[long]]
    assert model.preprocess(some)["input_ids"].shape == (1, TINY.max_tokens)
    log = fine_tune(model, lists, TINY)
    assert np.isfinite(log["loss"].dropna()).all()
    scores = score_pairs(model, ["red"] * 3, [texts[long], texts[long][:1000], ""])
    assert scores[0] == scores[1] and np.isfinite(scores).all()


def test_a_judged_product_without_text_is_named():
    gone = JUDGED["item_id"].iloc[7]
    with pytest.raises(ValueError, match=f"texts: none for item '{gone}', which is judged"):
        training_lists(JUDGED, TEXTS.drop(gone), TINY)
    with pytest.raises(ValueError, match=f"texts: item '{gone}' has more than one"):
        training_lists(JUDGED, pd.concat([TEXTS, TEXTS[[gone]]]), TINY)
    with pytest.raises(ValueError, match="teacher: no row for query"):
        training_lists(JUDGED, TEXTS, TINY, teacher=pd.DataFrame(0.0, index=["another"], columns=TEXTS.index))
    for name in ("frozen_layers", "lora_rank", "cached_texts"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, not -1"):
            Training(**{name: -1})


# What is no checkpoint


def spoil(folder: Path, how: str) -> None:
    """Damage a checkpoint."""
    file = folder / "model.safetensors"
    if how in ("empty", "configuration only"):
        for path in folder.iterdir():
            if how == "empty" or path.name != "config.json":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif how == "pickle":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
    elif how == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    elif how == "other shape":
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | {"hidden_size": 16, "n_embd": 16})
    elif how in ("layer missing", "head missing"):
        parts = [".1."] if how == "layer missing" else ["classifier.", "score.", "cls.predictions.transform."]
        kept = {name: weight for name, weight in load_file(file).items() if not any(part in name for part in parts)}
        assert len(kept) < len(load_file(file))
        save_file(kept, file, metadata={"format": "pt"})
    elif how == "larger tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["swiftfoot", "softsole"])
        tokenizer.save_pretrained(folder)
    elif how == "no tokenizer":
        for path in [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
            path.unlink()


FLAWS = {
    "empty": "neither modules.json nor config.json|Unrecognized model",
    "configuration only": "model.safetensors",
    "pickle": "model.safetensors",
    "cut short": "cannot be opened .*header",
    "other shape": r"weights have another shape than config.json says, the first is .* for \(",
    "layer missing": r"1[26] weights are missing in the file, the first is .*\.1\.att",
    "larger tokenizer": "its tokenizer has 55 word pieces and its embedding table 53 rows",
    "no tokenizer": "its tokenizer knows no word",
}


@pytest.fixture(scope="module")
def saved(checkpoints, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Every kind as `save_model` writes it, without the manifest, which would notice all that is done to it."""
    place, folders = tmp_path_factory.mktemp("saved"), {}
    for kind, family in MODELS:
        folders[kind, family] = place / f"{kind}_{family}"
        save_model(open_model(kind, str(checkpoints[family]), 16, device="cpu"), folders[kind, family])
        (folders[kind, family] / "manifest.json").unlink()
    return folders


@pytest.mark.parametrize("how", FLAWS)
@pytest.mark.parametrize("kind, family", MODELS)
def test_what_is_no_checkpoint_is_refused_and_named(checkpoints, saved, tmp_path, kind, family, how):
    for name, source in {"plain": checkpoints[family], "saved": saved[kind, family]}.items():
        shutil.copytree(source, tmp_path / name)
        assert open_model(kind, str(tmp_path / name), 16, device="cpu") is not None
        spoil(tmp_path / name, how)
        with pytest.raises(EncoderError, match=FLAWS[how]) as refused:
            open_model(kind, str(tmp_path / name), 16, device="cpu")
        assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize("kind, family", [pair for pair in MODELS if pair[0] != "bi_encoder"])
def test_a_head_may_be_new_but_a_saved_one_must_be_whole(saved, tmp_path, kind, family):
    head = {"cross_encoder": r"classifier|score", "sparse_encoder": r"cls\.predictions"}[kind]
    new = open_model(kind, str(saved["bi_encoder", family]), 16, device="cpu")
    assert any(part in name for name in weights(new) for part in ("classifier", "score", "cls.predictions"))
    shutil.copytree(saved[kind, family], tmp_path / "headless")
    spoil(tmp_path / "headless", "head missing")
    with pytest.raises(EncoderError, match=f"weights are missing in the file, the first is ({head})"):
        open_model(kind, str(tmp_path / "headless"), 16, device="cpu")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_cross_encoder_is_no_bi_encoder(saved, family):
    with pytest.raises(EncoderError, match=r"this is a cross-encoder \((Bert|GPT2)ForSequenceClassification\)"):
        open_model("bi_encoder", str(saved["cross_encoder", family]))


def test_a_head_of_three_classes_scores_nothing(tmp_path, checkpoints):
    three = AutoModelForSequenceClassification.from_pretrained(checkpoints["bert"], num_labels=3)
    three.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoints["bert"]).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="its head tells 3 classes apart"):
        open_model("cross_encoder", str(tmp_path))


def test_a_gpt_whose_tokenizer_pads_nothing_pads_with_its_end(checkpoints, tmp_path):
    shutil.copytree(checkpoints["gpt2"], tmp_path / "gpt")
    words = {"<end>": 0, **{word: place + 1 for place, word in enumerate(["red", "blue", "shoe", "hat"])}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>").save_pretrained(tmp_path / "gpt")
    write_json(tmp_path / "gpt/config.json", json.loads((tmp_path / "gpt/config.json").read_text()) | {"pad_token_id": None})
    model = open_model("cross_encoder", str(tmp_path / "gpt"), 16, device="cpu")
    texts = ["red", "red shoe blue hat"]
    together, alone = score_pairs(model, texts, texts), [score_pairs(model, [text], [text])[0] for text in texts]
    assert np.allclose(together, alone, atol=1e-6)
    with pytest.raises(EncoderError, match="no padding token"):
        open_model("bi_encoder", str(tmp_path / "gpt"))


@pytest.mark.parametrize("kind, family", MODELS)
def test_a_saved_model_reads_as_far_as_it_is_told(saved, kind, family):
    assert open_model(kind, str(saved[kind, family]), 5, device="cpu").max_seq_length == 5


def test_a_gpt_fills_no_masks_and_a_name_may_be_unknown(checkpoints):
    with pytest.raises(EncoderError, match="sparse_encoder .*gpt2.*cannot be opened"):
        open_model("sparse_encoder", str(checkpoints["gpt2"]))
    for kind in KINDS:
        with pytest.raises(EncoderError, match="/no/such/folder"):
            open_model(kind, "/no/such/folder/anywhere")


# The benchmark


@pytest.fixture(scope="module")
def benchmark_script(root):
    spec = importlib.util.spec_from_file_location("training_benchmark", root / "tests" / "benchmarks" / "training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_says_how_to_use_it(benchmark_script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        benchmark_script.main()
    assert ended.value.code == 0 and "--seconds" in capsys.readouterr().out


def test_the_benchmark_measures_and_reports(benchmark_script, checkpoints, root):
    lists = Dataset.from_list(training_lists(JUDGED, TEXTS, TINY).to_list())
    cells = [{"device": "cpu", "threads": 1, "lists": 2, "precision": name} for name in ("float32", "bfloat16")]
    rows = [benchmark_script.measure(cell, lists, 0.01, str(checkpoints["bert"])) for cell in cells]
    assert all(row["pairs_per_second"] > 0 and row["steps"] >= 2 and row["peak_memory_mib"] > 0 for row in rows)
    table = benchmark_script.markdown(rows).splitlines()
    assert len(table) == 4 and "| float32 |" in table[2] and table[2].split("|")[6].strip() == "1.00"
    text = json.dumps(benchmark_script.report(rows, 0.5))
    assert json.loads(text)["cells"] == rows and str(root) not in text and str(Path.home()) not in text
