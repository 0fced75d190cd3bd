"""The experiments themselves, with their small sizes: what `make demo` runs must run, and give the same numbers twice (`make soak`)."""

import json
import multiprocessing
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from ecomrec import lab
from ecomrec.data import sources

SMALL = {
    "biased_logs": {"sizes": [400]},
    "closed_loop": {"requests_per_round": 1500, "held_out_requests": 100, "rounds": 3},
    "preparation": {"held_out_requests": 60, "engine": "duckdb"},
    "next_item": {"epochs": 2},
    "personalised": {"epochs": 1, "ablate": False},
    "relevance": {"max_tokens": 16, "rungs": ["ltr"]},
    "ablations": {"parts": ["negatives"]},
}
SHORT = {"adapt": False, "tuned_epochs": 0, "seeds": [0], "epochs": 1, "dim": 16, "ablate": False}  # of personalised


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def demo(name):
    return lab.home() / "nbs" / "experiments" / f"{name}.demo.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_whole_demo_repeats_to_the_last_digit(name, tmp_path):
    once, again = (metrics(lab.run(name, {}, file=demo(name), root=tmp_path / side, progress=False)) for side in ("once", "again"))  # far from what the first one cached
    assert once == again


@pytest.mark.parametrize("name", SMALL)
def test_the_demo_runs(name, tmp_path):
    folder = lab.run(name, SMALL[name], file=demo(name), root=tmp_path, progress=False)
    first = metrics(folder)
    unit = "user" if name in ("next_item", "personalised") else "query"
    for kept in ("run.json", "run.ipynb", "report.html", f"per_{unit}.parquet"):
        assert (folder / kept).is_file()
    assert (folder / "engine/manifest.json").is_file() == (name in ("closed_loop", "relevance"))
    if name == "closed_loop":
        assert first["random/ndcg@10"] < first["first_round/ndcg@10"] < first["corrected/ndcg@10"] < first["oracle/ndcg@10"] == 1
        assert first["oracle/regret"] == 0 < first["best_candidates/regret"] < first["random/regret"]
        assert first["gate/broken_promoted"] == 0 and first["gate/broken_tried"] == 22 and first["gate/honest_tried"] == 3
        assert {"naive/ndcg@10[round=3]", "skyline/regret[round=1]", "corrected/regret[page=served]", "prices/forgotten"} <= set(first)
    elif name == "biased_logs":
        corrected = ("ips", "denoised_shown", "availability")
        assert first["old/ndcg@10[policy=bad]"] < first["naive/ndcg@10[policy=bad]"] < min(first[f"{arm}/ndcg@10[policy=bad]"] for arm in corrected)
        assert first["random/ndcg@10"] < first["skyline/ndcg@10[policy=bad]"] < first["best_candidates/ndcg@10"] < first["oracle/ndcg@10"] == 1
        assert first["old/ndcg@10[policy=bad]"] < first["random/ndcg@10"] < first["old/ndcg@10[policy=mediocre]"] < first["old/ndcg@10[policy=good]"]
        assert first["skyline/repeats[policy=bad]"] < first["naive/repeats[policy=bad]"]
    elif name == "preparation":
        assert min(first[f"{kind}/{metric}"] for kind in ("duplicates", "clocks", "impossible_values", "unknown_keys", "robots") for metric in ("precision", "recall")) >= 0.99
        assert first["model/price_error[gap=random]"] < first["median/price_error[gap=random]"] < first["constant/price_error[gap=random]"]
        assert first["random/ndcg@10[gap=random]"] < first["drop/ndcg@10[gap=random]"] < first["complete/ndcg@10[gap=random]"] and first["trees/auc"] > 0.6
    elif name == "next_item":
        systems = ("popularity", "item_knn", "ease", "als", "co_occurrence", "ids", "attributes", "mixture")
        assert {f"{system}/{metric}@{k}" for system in systems for metric in ("recall", "ndcg") for k in (5, 10, 20)} <= set(first)
        assert 0 < first["random/ndcg@10"] < 0.1 and {"attributes/ndcg@10[order=shuffled]", "attributes/refitted_ndcg@10", "mixture/ndcg@10[cold=0]"} <= set(first)
        assert all(0 <= first[f"{system}/ndcg@10"] <= first[f"{system}/recall@20"] <= 1 for system in systems)
    elif name == "personalised":
        systems = ("random", "popularity", "co_occurrence", "single_task", "naive", "shopper", "mixture", "skyline", "oracle")
        assert {f"{system}/ndcg@10[task={task}]" for system in systems for task in ("search", "personalised", "recommend")} <= set(first)
        for task in ("search", "personalised"):
            assert first[f"random/ndcg@10[task={task}]"] < first[f"zero_shot/ndcg@10[task={task}]"] < first[f"shopper/ndcg@10[task={task}]"] < first[f"oracle/ndcg@10[task={task}]"] == 1
        assert first["popularity/recall@10[task=personalised,cold=items]"] == 0 < first["shopper/recall@10[task=personalised,cold=items]"]
    elif name == "ablations":
        rows = ("base", "another_seed=1", "zero_shot", "negatives=mined", "negatives=unfiltered")
        assert first["random/inner_ndcg@10"] < min(first[f"{row}/inner_ndcg@10"] for row in rows) and "base/inner_ndcg@10[typo=1]" in first
    else:
        assert first["random/judged_ndcg@10"] < min(first[f"{rung}/judged_ndcg@10"] for rung in ("bm25", "zero_shot", "hybrid"))
        assert {"hybrid/judged_ndcg@10[language=zh]", "hybrid/judged_ndcg@10[language=en]", "hybrid/kappa"} <= set(first)


def test_a_log_without_a_truth_is_judged_by_its_clicks(tmp_path):
    shop = sources.folder("shop")
    for table in ("products", "users", "events"):
        (tmp_path / f"{table}.parquet").write_bytes((shop / f"{table}.parquet").read_bytes())
    own = {table: str(tmp_path / f"{table}.parquet") for table in ("products", "events")}
    found = metrics(lab.run("personalised", own | SHORT | {"source": "files"}, file=demo("personalised"), root=tmp_path / "runs", progress=False))
    assert not [key for key in found if key.startswith("skyline")] and 0 < found["shopper/ndcg@10[task=search]"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("name, options", {"closed_loop": {}, "personalised": SHORT}.items())
def test_the_log_of_a_real_search_goes_through(name, options, tmp_path):
    if not sources.is_available("ubi"):
        pytest.skip("the UBI log is not in ECOMREC_DATA")
    found = metrics(lab.run(name, options | {"source": "ubi"}, root=tmp_path, progress=False))
    assert "oracle/regret" not in found and (found.get("log/clicks", 0) > 500 or 0 <= found["shopper/ndcg@10[task=search]"] <= 1)


def own_files(folder, n_queries: int, grade) -> dict[str, str]:
    """A small shop and judgements of its first queries, as CSV files."""
    things, colours = ["shoe", "hat", "lamp", "chair", "cup", "desk"], ["red", "blue", "green", "white"]
    rows = [(f"{colour}-{thing}", f"{colour} {thing}", thing) for thing in things for colour in colours]
    pd.DataFrame([row[:2] for row in rows], columns=["item_id", "title"]).to_csv(folder / "products.csv", index=False)
    judged = [(thing, item, grade(colour)) for thing in things[:n_queries] for item, colour, own in
              ((item, title.split()[0], kind) for item, title, kind in rows) if own == thing]
    pd.DataFrame(judged, columns=["query", "item_id", "grade"]).to_csv(folder / "judgements.csv", index=False)
    return {"products": str(folder / "products.csv"), "judgements": str(folder / "judgements.csv")}


def test_one_judged_query_is_too_few_and_says_so(tmp_path):
    with pytest.raises(lab.NotebookError, match="judgements: 1 queries have a grade above 0; 5 folds need as many"):
        lab.run("relevance", own_files(tmp_path, 1, lambda colour: int(colour == "red")), root=tmp_path, progress=False)


def test_equal_grades_are_measured_without_trees(tmp_path):
    files = own_files(tmp_path, 6, lambda colour: 2)
    folder = lab.run("relevance", files | {"rungs": ["ltr"]}, root=tmp_path, progress=False)
    found = metrics(folder)
    assert found["hybrid/judged_ndcg@10"] == pytest.approx(1) == found["random/judged_ndcg@10"] and "ltr/judged_ndcg@10" not in found
    assert "trees have nothing to learn" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_messy_file_of_ones_own_is_asked_about(tmp_path):
    rng = np.random.default_rng(0)
    lines = [f"user-{row} " + " ".join(f"item/{item}" for item in rng.integers(0, 30, 6)) for row in range(60)]
    lines += ["", "one item/3", "nobody", "long " + " ".join(f"item/{place % 30}" for place in range(10_000))]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "a.json").write_text(json.dumps({f"item/{i}": [f"brand {i % 4}"] for i in range(20)} | {"never seen": ["x"]}))
    small = {"source": str(tmp_path / "log.txt"), "attributes": str(tmp_path / "a.json"), "epochs": 1, "dim_ids": 8, "dim_attributes": 8, "seeds": [0]}
    found = metrics(lab.run("next_item", small, root=tmp_path / "runs", progress=False))
    assert 0 < found["attributes/recall@20"] <= 1 and found["random/ndcg@10"] > 0.05
    (tmp_path / "log.txt").write_text("user-1 a b c\nuser-1 d\n")
    with pytest.raises(lab.NotebookError, match="line 2: user 'user-1' has a line already, 1"):
        lab.run("next_item", small | {"attributes": ""}, root=tmp_path / "runs", progress=False)


@pytest.fixture
def tiny(tmp_path) -> dict:
    """Parameters of a small shop and an encoder of two layers that knows its words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"red blue green white shoe hat lamp chair cup desk".split()]
    BertTokenizerFast({word: number for number, word in enumerate(words)}).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path / "bert")
    files = own_files(tmp_path, 6, lambda colour: "white green blue red".split().index(colour))
    return files | {"encoder": str(tmp_path / "bert"), "fields": ["title"], "epochs": 1, "list_size": 4, "max_tokens": 8}


def test_a_killed_search_goes_on_and_ends_where_it_would_have_ended(tiny, tmp_path):
    small = tiny | {"parts": ["learning_rate"], "trials": 4, "folds": 2, "inner": 2, "workers": 1}
    straight = lab.run("ablations", small, root=tmp_path / "straight", progress=False)
    options = {"root": tmp_path / "killed", "progress": False}
    process = multiprocessing.get_context("spawn").Process(target=lab.run, args=("ablations", small), kwargs=options)
    process.start()
    try:
        told = lambda: "".join(path.read_text() for path in (tmp_path / "killed").glob("*/checkpoints/search.journal"))
        deadline = time.monotonic() + 300
        while '"state":1' not in told() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)  # until a trial is complete
        assert process.is_alive() and '"state":1' in told()
    finally:
        process.kill()  # the kernel notices that it is alone and ends too
        process.join()
    time.sleep(3)
    assert told().count('"state":1') < 4
    resumed = lab.run("ablations", small, **options)
    assert json.loads((resumed / "run.json").read_text())["resumed"] and metrics(resumed) == metrics(straight)
    assert {"search=best/inner_ndcg@10", "search=cross_fitted/inner_ndcg@10_p"} <= set(metrics(resumed))


def test_every_rung_is_climbed_by_a_tiny_encoder(tiny, tmp_path):
    found = metrics(lab.run("relevance", tiny | {"adapt": True, "folds": 4}, root=tmp_path, progress=False))
    finders = ("bm25", "zero_shot", "adapted", "bi_encoder", "sparse", "engine", "untuned_hybrid", "hybrid", "best")
    rungs = (*finders, "random", "decoder", "cross_encoder", "ltr")
    assert all(0.4 < found[f"{rung}/judged_ndcg@10"] <= 1 for rung in rungs)
    assert [found.get(f"{rung}/recall@100") for rung in rungs] == [1] * 9 + [None] * 4  # 24 products, and a hundred may come in


def test_a_part_made_in_another_precision_is_not_taken(tmp_path, monkeypatch):
    for half in (False, True):
        monkeypatch.setattr("ecomrec.model.text.has_bfloat16", lambda device: half)
        recorder = lab.RunRecorder("made", folder=tmp_path / "runs/made")
        assert [recorder.cached("part", lambda: value, content=("same",)) for value in (half, "again")] == [half, half]


@pytest.mark.slow
def test_search_on_real_products_keeps_its_level(tmp_path):
    if not sources.is_available("chorus"):
        pytest.skip("Chorus is not in ECOMREC_DATA")
    found = metrics(lab.run("relevance", {"source": "chorus", "seeds": [0, 1, 2]}, root=tmp_path, progress=False))
    assert abs(found["random/judged_ndcg@10"] - 0.588) <= 0.001
    assert found["bm25/judged_ndcg@10"] >= 0.81 and found["zero_shot/judged_ndcg@10"] >= 0.90
    assert found["hybrid/judged_ndcg@10"] >= 0.92 and found["hybrid/recall@100"] >= 0.92
    assert found["best/judged_ndcg@10"] >= 0.92 and found["best/over_zero_shot_p"] < 0.05 and found["hybrid/over_zero_shot"] > 0


@pytest.mark.slow
def test_ten_rounds_keep_what_they_promise(tmp_path):
    found = metrics(lab.run("closed_loop", {"drifts": [], "learners": []}, root=tmp_path, progress=False))
    gap, spread = found["corrected_minus_naive/ndcg@10"], found["corrected_minus_naive/ndcg@10_sd"]
    assert gap >= 0.02 and gap > 2 * spread and found["corrected/ndcg@10"] < found["best_candidates/ndcg@10"]
    assert found["corrected/share_of_skyline"] >= 0.5 and found["gate/broken_promoted"] == 0 < found["gate/broken_tried"]


def test_a_log_without_a_truth_is_trained_tried_and_estimated(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for table in ("products", "events"):
        shutil.copy(sources.folder("shop") / f"{table}.parquet", folder)
    found = metrics(lab.run("closed_loop", {"source": str(folder)}, root=tmp_path, progress=False))
    assert found["gate/promoted"] == 1 and found["log/clicks"] > 100 and "oracle/ndcg@10" not in found
