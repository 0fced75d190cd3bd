"""The lab: what it keeps, what it refuses, and that a run survives being killed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ecomrec import lab
from ecomrec.data.artefacts import writing

TOY = [
    "import json, os, time\nfrom pathlib import Path\nimport numpy as np, pandas as pd\nfrom ecomrec import lab",
    "n = 50  # how many\nrate = 1.0  # of what\nname = ''\nproducts = None\nsource = 'shop'\nseeds = [0]\n"
    "columns = {}\nwish = ''",
    "run = lab.current('toy', {'n': n, 'seeds': seeds})",
    "def draw(system):\n    values = np.random.default_rng(seeds[0]).random(n) * rate + (system == 'new')\n"
    "    ids = [f'q {i}' for i in range(n)]\n"
    "    return pd.DataFrame({'query_id': ids, 'system': system, 'metric': 'ndcg@10', 'value': values})",
    "old = run.cached('old', lambda: draw('old'))",
    "if wish == 'fail':\n    raise KeyError('no such luck')\nif wish == 'die':\n    os._exit(1)\n"
    "if 'TOY_WAITS' in os.environ:\n    time.sleep(600)",
    "both = pd.concat([old, run.cached('new', lambda: draw('new'))])",
    "run.per_query(both)\nmeans = both.groupby('system', sort=False)['value'].mean()\n"
    "if wish != 'nothing':\n    run.metrics({f'{system}/ndcg@10': mean for system, mean in means.items()})",
    "print(json.dumps(means.to_dict()))",
]
PROSE = "# A toy with \\$5\n\nIts mean is $\\bar x = \\frac{1}{n}\\sum_i x_i$.\n\n```mermaid\ngraph LR\n  A --> B\n```"


def write_toy(folder: Path, *more: str, prose: str = PROSE) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in [*TOY, *more]]
    cells[1].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(prose), *cells])
    notebook.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "toy.ipynb")


class Bench:
    """A folder with the toy experiment and its runs."""

    def __init__(self, folder: Path):
        self.folder, self.root, self.experiments = folder, folder / "runs", folder / "experiments"
        write_toy(self.experiments)

    def run(self, root: Path | None = None, **parameters) -> Path:
        return lab.run("toy", parameters, root=root or self.root, experiments=self.experiments, progress=False)

    def resolve(self, **parameters) -> dict:
        return lab.resolve("toy", parameters, experiments=self.experiments)

    def hash(self, **parameters) -> str:
        return lab.fingerprint("toy", self.resolve(**parameters), self.experiments)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def done(bench) -> Path:
    return bench.run()


def test_a_relative_data_folder_is_the_callers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ECOMREC_DATA", "my/data")
    write_toy(tmp_path / "experiments", f"assert os.environ['ECOMREC_DATA'] == {str(tmp_path.resolve() / 'my/data')!r}")
    folder = lab.run("toy", {}, root=tmp_path / "runs", experiments=tmp_path / "experiments", progress=False)
    assert (folder / "metrics.json").exists()


# What a recorder keeps


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(json_values, st.text(max_size=100))
def test_json_comes_back_and_is_made_once(value, key):
    recorder, calls = lab.RunRecorder("toy"), []
    for _ in range(2):
        assert recorder.cached(key, lambda: calls.append(1) or value) == value
    assert len(calls) == 1


@settings(max_examples=40)
@given(hnp.arrays(st.sampled_from([np.float32, np.int64, np.bool_]), hnp.array_shapes(min_dims=0, min_side=0)))
def test_arrays_come_back_to_the_bit(array):
    back = lab.RunRecorder("toy").cached("array", lambda: array)
    assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes()


def test_tables_series_and_dicts_of_them_come_back():
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", None], "c": pd.to_datetime([1, 2])})
    frame.index = pd.Index(["q", "r"], name="query_id")
    given_ = {"frame": frame, "series": frame["a"].rename(None), "named": frame["a"], "array": np.eye(2)}
    given_["plain"] = [1, {"k": None}]
    back = lab.RunRecorder("toy").cached("all", lambda: given_)
    pd.testing.assert_frame_equal(back["frame"], frame)
    pd.testing.assert_series_equal(back["series"], given_["series"])
    pd.testing.assert_series_equal(back["named"], given_["named"])
    assert np.array_equal(back["array"], np.eye(2)) and back["plain"] == given_["plain"] and list(back) == list(given_)


def test_keys_that_look_alike_are_kept_apart():
    recorder = lab.RunRecorder("toy")
    keys = ["a b", "a_b", "a/b", "../a", "a" * 200, "a" * 201, "跑步鞋", ""]
    assert [recorder.cached(key, lambda: key) for key in keys] == keys
    assert [recorder.cached(key, lambda: "other") for key in keys] == keys
    assert len(list((recorder.folder / "parts").iterdir())) == len(keys)


@pytest.mark.parametrize("value", [{1, 2}, object(), {"array": np.eye(2), "what": object()}, np.array([object()])])
def test_what_cannot_be_kept_without_pickle_leaves_nothing(value):
    recorder = lab.RunRecorder("toy")
    with pytest.raises((TypeError, ValueError)):
        recorder.cached("part", lambda: value)
    assert list((recorder.folder / "parts").iterdir()) == []


@pytest.mark.parametrize(
    "bad", [{}, {"a": np.nan}, {"a": np.inf}, {"a": True}, {"a": "1"}, {"a": {"b": 1}}, {1: 1.0}, {"a": None}]
)
def test_metrics_are_flat_finite_numbers(bad):
    recorder = lab.RunRecorder("toy")
    with pytest.raises(lab.RunError, match="metrics"):
        recorder.metrics(bad)
    assert list(recorder.folder.iterdir()) == []


def test_numpy_numbers_become_plain_ones():
    recorder = lab.RunRecorder("toy")
    recorder.metrics({"a": np.float32(0.5), "b": np.int64(3), "c": 0})
    assert json.loads((recorder.folder / "result.json").read_text()) == {"a": 0.5, "b": 3, "c": 0}


@pytest.mark.parametrize("change", [{"value": np.nan}, {"value": np.inf}, {"user_id": "u"}, {"query_id": None}])
def test_per_query_refuses_what_cannot_be_compared(change):
    row = {"query_id": "q", "system": "bm25", "metric": "mrr", "value": 1.0} | change
    frame = pd.DataFrame([{key: value for key, value in row.items() if value is not None}])
    with pytest.raises(lab.RunError, match="per_query"):
        lab.RunRecorder("toy").per_query(frame)


@given(st.text())
def test_trec_ids_have_no_spaces_and_can_be_read_back(text):
    written = lab._trec_id(text)
    assert not re.search(r"\s", written) and unquote(written) == text


def test_trec_files_are_read_alike_by_an_authority():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(0)
    pairs = pd.DataFrame({"query_id": np.repeat(["a b", "c"], 20), "item_id": [f"i{i}" for i in range(20)] * 2})
    pairs["score"], pairs["grade"] = rng.integers(0, 5, 40) / 4, rng.integers(0, 4, 40)
    recorder = lab.RunRecorder("toy")
    recorder.trec(pairs, pairs)
    with open(recorder.folder / "run.trec") as run, open(recorder.folder / "qrels.trec") as qrels:
        run, qrels = pytrec_eval.parse_run(run), pytrec_eval.parse_qrel(qrels)
    assert set(run) == set(qrels) == {"a%20b", "c"} and all(len(items) == 20 for items in run.values())
    lines = (recorder.folder / "run.trec").read_text().splitlines()
    ranks = pd.Series({tuple(line.split()[0:3:2]): int(line.split()[3]) for line in lines})
    best = pairs.sort_values(["score", "item_id"], ascending=False).groupby("query_id").head(1)
    assert all(ranks[lab._trec_id(q), i] == 1 for q, i in zip(best["query_id"], best["item_id"]))


def test_a_recorder_refuses_the_folder_of_another_experiment(monkeypatch, tmp_path):
    monkeypatch.setenv(lab.RUN_VARIABLE, str(tmp_path / "relevance-0123456789ab"))
    with pytest.raises(lab.RunError, match="relevance-0123456789ab"):
        lab.current("toy")


# Parameters


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("n", "7", 7),
        ("rate", "1e-3", 0.001),
        ("rate", "2", 2.0),
        ("name", "on", "on"),
        ("name", "2024-01-01", "2024-01-01"),
        ("name", "007", "007"),
        ("name", "跑步鞋", "跑步鞋"),
        ("seeds", "3", [3]),
        ("seeds", "[1, 2]", [1, 2]),
        ("columns", "{products: {title: name}}", {"products": {"title": "name"}}),
        ("columns", "{1: 0}", {"1": 0}),
        ("products", "null", None),
    ],
)
def test_values_from_the_command_line(bench, name, text, value):
    known = lab.defaults("toy", bench.experiments)
    found = bench.resolve(**{name: lab.read_value(text, known[name])})[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"m": 1}, "no parameter 'm'.*it has: n, rate, name, products, source, seeds, columns, wish"),
        ({"n": "many"}, "'n' is 'many'"),
        ({"n": True}, "'n' is True"),
        ({"columns": [1]}, "'columns' is \\[1\\]"),
        ({"products": "nowhere.csv"}, "'products': there is no nowhere.csv"),
        ({"source": "corus"}, "'source': there is no corus.*known set.*chorus"),
    ],
)
def test_wrong_parameters_are_refused_with_the_way_out(bench, parameters, message):
    with pytest.raises(lab.RunError, match=message):
        bench.run(**parameters)


def test_no_yaml_is_refused(tmp_path, bench):
    with pytest.raises(lab.RunError, match="is no YAML"):
        lab.read_value("{a: [")
    for text in ("- a", "a: ["):
        (tmp_path / "p.yaml").write_text(text)
        with pytest.raises(lab.RunError, match="p.yaml"):
            lab.resolve("toy", file=tmp_path / "p.yaml", experiments=bench.experiments)


def test_what_is_given_wins_over_the_file_and_a_file_may_lie_beside_the_notebook(bench):
    (bench.experiments / "toy.demo.yaml").write_text("n: 3\nrate: 2.5\n")
    found = lab.resolve("toy", {"n": 4}, file="toy.demo.yaml", experiments=bench.experiments)
    assert (found["n"], found["rate"]) == (4, 2.5)


def test_relative_paths_are_the_callers(bench, tmp_path, monkeypatch):
    (tmp_path / "p.csv").write_text("item_id,title\n1,shoe\n")
    monkeypatch.chdir(tmp_path)
    assert bench.resolve(products="p.csv")["products"] == str((tmp_path / "p.csv").resolve())
    assert bench.resolve(source=".")["source"] == str(tmp_path.resolve())
    (tmp_path / "shop").mkdir()
    assert bench.resolve(source="shop")["source"] == "shop"  # a known set wins over a folder of that name


@pytest.mark.parametrize("cell", ["n = 1 + 1", "n, m = 1, 2", "import os"])
def test_parameters_must_be_plain(tmp_path, cell):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbformat.write(notebook, tmp_path / "odd.ipynb")
    with pytest.raises(lab.RunError, match="0 cells are tagged"):
        lab.defaults("odd", tmp_path)
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "odd.ipynb")
    with pytest.raises(lab.RunError, match="NAME = CONSTANT"):
        lab.defaults("odd", tmp_path)


def test_every_experiment_of_the_project_has_readable_parameters(root):
    found = sorted(path.stem for path in (root / "nbs" / "experiments").glob("*.ipynb"))
    for name in found:
        assert "source" in lab.defaults(name) and "seeds" in lab.defaults(name)
        for file in (root / "nbs" / "experiments").glob(f"{name}.*.yaml"):
            assert lab.resolve(name, file=file)


# What makes two runs the same run


def test_the_hash_covers_what_can_change_a_number(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    first = bench.hash()
    assert bench.hash(n=50, seeds=0) == first
    assert len({first, bench.hash(n=51), bench.hash(seeds=[1]), bench.hash(name="x")}) == 4
    write_toy(bench.experiments, prose="# Other words")
    assert bench.hash() == first
    write_toy(bench.experiments, "1 + 1")
    assert bench.hash() != first
    write_toy(bench.experiments)
    monkeypatch.setattr(lab, "_package_source", lambda: "other code")
    assert bench.hash() != first


def test_the_hash_covers_the_content_of_folders(tmp_path):
    bench, hashes = Bench(tmp_path), []
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name / "truth").mkdir(parents=True)
        (tmp_path / name / "truth" / "x.json").write_text(text)
        hashes.append(bench.hash(source=str(tmp_path / name)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_known_sets_are_pinned(bench):
    inputs = lab._inputs(bench.resolve(source="chorus"))
    assert inputs["source"] and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in inputs["source"].values())


# Runs


def test_a_run_leaves_what_it_promises(done, bench):
    assert done.is_absolute() and re.fullmatch("toy-[0-9a-f]{12}", done.name)
    left = {"run.json", "run.ipynb", "report.html", "per_query.parquet", "metrics.json"}
    assert {path.name for path in done.iterdir()} - {".lock"} == left
    about = json.loads((done / "run.json").read_text())
    assert about["parameters"] == bench.resolve() and about["seeds"] == [0] and about["hash"] in done.name
    assert about["commit"] is None or re.fullmatch("[0-9a-f]{40}", about["commit"])
    assert about["hardware"]["memory_bytes"] > about["peak_memory_bytes"] > 1e7


def test_a_finished_run_is_not_repeated_but_again_repeats_it(bench):
    folder = bench.run(n=5)
    (folder / "mark").write_text("")
    assert bench.run(n=5) == folder and (folder / "mark").exists()
    before = (folder / "metrics.json").read_bytes()
    lab.run("toy", {"n": 5}, again=True, root=bench.root, experiments=bench.experiments, progress=False)
    assert not (folder / "mark").exists() and (folder / "metrics.json").read_bytes() == before


def test_bare_papermill_computes_the_same_numbers(bench, done, tmp_path, monkeypatch):
    monkeypatch.delenv(lab.RUN_VARIABLE, raising=False)
    command = ["papermill", str(bench.experiments / "toy.ipynb"), str(tmp_path / "out.ipynb"), "-p", "n", "50"]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True, cwd=tmp_path)
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    printed = json.loads(next(output.text for output in cells[-1].outputs if output.output_type == "stream"))
    metrics = json.loads((done / "metrics.json").read_text())
    assert {f"{system}/ndcg@10": value for system, value in printed.items()} == metrics
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


@pytest.mark.parametrize(
    ("wish", "message"),
    [("fail", "KeyError: 'no such luck'"), ("die", "its kernel died"), ("nothing", "without handing in metrics")],
)
def test_a_notebook_that_fails_leaves_no_metrics(bench, wish, message):
    with pytest.raises(lab.NotebookError, match=message) as failed:
        bench.run(wish=wish)
    folder = failed.value.notebook.parent
    assert failed.value.notebook.name == "run.ipynb" and failed.value.notebook.exists()
    assert not (folder / "metrics.json").exists() and (folder / "parts").is_dir()
    with pytest.raises(lab.RunError, match="did not finish"):
        lab.find_run(folder)


def test_killed_midway_it_is_locked_before_and_resumes_after(bench, tmp_path):
    code = "from ecomrec import lab; lab.run('toy', {'n': 9}, None, False, 'runs', 'experiments', False)"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TOY_WAITS": "1"}, cwd=bench.folder)
    folder = bench.root / f"toy-{bench.hash(n=9)}"
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob("parts/old-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() is None and list(folder.glob("parts/old-*"))
        with pytest.raises(lab.RunError, match="another process"):
            bench.run(n=9)
    finally:
        process.kill()  # SIGKILL; the kernel notices that it is alone and ends too
        process.wait()
    part = next(folder.glob("parts/old-*")).stat().st_mtime_ns
    assert part and not (folder / "metrics.json").exists()
    assert bench.run(n=9) == folder
    about = json.loads((folder / "run.json").read_text())
    assert about["resumed"] and about["reused_parts"] == 1  # "old" was there, "new" was not
    whole = bench.run(root=tmp_path, n=9)
    assert json.loads((whole / "run.json").read_text())["reused_parts"] == 0
    assert (whole / "metrics.json").read_bytes() == (folder / "metrics.json").read_bytes()


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_ends_where_it_would_have_ended(bench, tmp_path, kills):
    rng, n, killed = random.Random(kills), 20, 0
    while killed < kills:
        n += 1
        whole, finished = bench.run(root=tmp_path, n=n), False
        while not finished:
            code = f"from ecomrec import lab; lab.run('toy', {{'n': {n}}}, None, False, 'runs', 'experiments', False)"
            process = subprocess.Popen([sys.executable, "-c", code], cwd=bench.folder)
            folder = bench.root / whole.name
            changed = lambda: folder.stat().st_mtime_ns if folder.exists() else 0
            before = changed()
            while process.poll() is None and changed() == before:
                time.sleep(0.01)
            try:
                process.wait(4 * rng.random() if killed < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            assert process.wait() in (0, -signal.SIGKILL)
            finished = process.returncode == 0
        assert (whole / "metrics.json").read_bytes() == (folder / "metrics.json").read_bytes()


def test_run_json_holds_no_path_of_this_machine(bench, tmp_path):
    file = tmp_path / "my products.csv"
    file.write_text("item_id,title\n1,shoe\n")
    folder = bench.run(root=tmp_path / "{odd} runs", n=2, products=str(file))
    assert folder.parent.name == "{odd} runs"
    text = (folder / "run.json").read_text()
    about = json.loads(text)
    assert about["parameters"]["products"] == "my products.csv"
    assert list(about["inputs"]["products"]) == ["my products.csv"]
    assert str(tmp_path) not in text and str(Path.home()) + "/" not in text and str(bench.folder) not in text


# Afterwards


def test_a_run_is_found_by_folder_name_and_experiment(bench, done):
    for said in (done, str(done), done.name):
        assert lab.find_run(said, bench.root) == done
    latest = bench.run(n=6, rate=0.5)
    assert lab.find_run("toy", bench.root) == latest
    with pytest.raises(lab.RunError, match="did you mean 'toy'"):
        lab.find_run("tov", bench.root)
    with pytest.raises(lab.RunError, match="there is none yet"):
        lab.find_run("toy", bench.root / "empty")


def test_leaderboard_shows_what_differs(bench, done):
    bench.run(n=6, rate=0.5)
    table = lab.leaderboard("toy", root=bench.root)["toy: ndcg@10"]
    assert {"n", "rate", "old", "new"} <= set(table) and "source" not in table and done.name in table.index
    with pytest.raises(lab.RunError, match="did you mean 'ndcg@10'"):
        lab.leaderboard("toy", "ndgc@10", bench.root)
    assert lab.leaderboard("toy", root=bench.root / "empty") == {} and lab.runs(root=bench.root / "empty").empty


def test_compare_pairs_what_both_have(bench, done):
    other = bench.run(n=6, rate=0.5)
    table = lab.compare(done, other)
    assert list(table.index) == [("old", "ndcg@10"), ("new", "ndcg@10")] and (table["n"] == 6).all()
    a, b = (pd.read_parquet(folder / "per_query.parquet").query("system == 'old'") for folder in (done, other))
    expected = (b.set_index("query_id")["value"] - a.set_index("query_id")["value"]).dropna()
    assert table.loc[("old", "ndcg@10"), "difference"] == pytest.approx(expected.mean())
    assert (table["low"] <= table["difference"]).all() and (table["difference"] <= table["high"]).all()
    assert table["p_holm"].between(0, 1).all()


def test_compare_refuses_runs_with_nothing_in_common(bench, done, tmp_path):
    copy = tmp_path / done.name
    shutil.copytree(done, copy)
    frame = pd.read_parquet(copy / "per_query.parquet")
    frame.assign(query_id="other " + frame["query_id"]).to_parquet(copy / "per_query.parquet")
    with pytest.raises(lab.RunError, match="nothing|no query_id"):
        lab.compare(done, copy)
    (copy / "per_query.parquet").unlink()
    with pytest.raises(lab.RunError, match="keeps no numbers per query"):
        lab.compare(done, copy)


def test_a_saved_run_feeds_the_docs(bench, done):
    target = lab.save_run(done, experiments=bench.experiments)
    digest = done.name.rpartition("-")[2]
    assert {path.name for path in target.iterdir()} == {f"{digest}.run.json", f"{digest}.metrics.json"}
    found = lab.results_table("toy", experiments=bench.experiments, n=50)
    assert list(found.table.index) == ["old", "new"] and list(found.table.columns) == ["ndcg@10"]
    lines = found._repr_markdown_().splitlines()
    assert lines[:2] == ["| system | ndcg@10 |", "| --- | --- |"] and lines[2].startswith("| old | 0.")
    nothing = lab.results_table("toy", experiments=bench.experiments, n=51)
    assert nothing.table.empty and nothing._repr_markdown_().startswith("No run of 'toy' with {'n': 51} is saved yet")
    with pytest.raises(lab.RunError, match="did you mean 'ndcg@10'"):
        lab.results_table("toy", ["ndgc@10"], experiments=bench.experiments)


def test_a_saved_number_shows_its_interval_and_its_spread(tmp_path):
    folder = tmp_path / "results" / "toy"
    folder.mkdir(parents=True)
    about = {"hash": "0" * 12, "parameters": {"source": "shop"}, "started": "2026-01-01T00:00:00+00:00", "seconds": 1.0}
    metrics = {"a/mrr": 0.5, "b/mrr": 0.25, "b/mrr_low": 0.2, "b/mrr_high": 0.3, "b/mrr_sd": 0.01, "c/map": 1}
    lab.write_json(folder / f"{'0' * 12}.run.json", about)
    lab.write_json(folder / f"{'0' * 12}.metrics.json", metrics)
    table = lab.results_table("toy", ["mrr", "map"], experiments=tmp_path, source="shop").table
    assert table["mrr"].to_dict() == {"a": "0.500", "b": "0.250 [0.200, 0.300] ± 0.010", "c": ""}
    assert table["map"].to_dict() == {"a": "", "b": "", "c": "1.000"}


# The report


def test_the_report_is_readable_by_itself(done):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: `make system` installs it")
    from playwright.sync_api import sync_playwright

    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags.split())
        page, asked, wrong = browser.new_page(viewport={"width": 1000, "height": 800}), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto((done / "report.html").as_uri(), wait_until="load")
        page.wait_for_selector("mjx-container svg", state="attached", timeout=60_000)
        page.wait_for_selector("pre.mermaid svg g", state="attached", timeout=60_000)
        assert page.title().startswith("A toy") and page.locator("mjx-container").count() == 1
        assert page.locator("mjx-merror, [data-mjx-error], .error-icon").count() == 0
        code = page.locator(".jp-CodeCell .jp-Cell-inputWrapper").first
        assert not code.is_visible()
        page.get_by_role("button", name="code").click()
        assert code.is_visible()
        browser.close()
    assert wrong == [] and [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def square(number: int) -> dict[str, int]:
    return {"square": number**2}


def test_steps_kept_by_content_serve_other_runs_and_run_side_by_side(tmp_path):
    steps = {f"square {n}": (n,) for n in range(4)}
    first = lab.RunRecorder("toy", {}, tmp_path / "toy-1").cached_many(steps, square, workers=2)
    assert first == {f"square {n}": {"square": n**2} for n in range(4)}
    places = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".cache").iterdir()}
    assert len(places) == 4
    again = lab.RunRecorder("toy", {}, tmp_path / "toy-2").cached_many(steps | {"square 9": (9,)}, square, workers=1)
    assert again["square 9"] == {"square": 81} and first.items() <= again.items()
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".cache").iterdir()}
    assert places.items() <= now.items() and len(now) == 5


def test_a_folder_that_failed_half_way_is_not_kept_and_a_damaged_one_is_made_again(tmp_path):
    recorder = lab.RunRecorder("toy", {}, tmp_path / "toy-1")

    def fails(folder):
        with writing(folder) as half:
            (half / "half").write_text("half")
            raise KeyboardInterrupt

    def works(folder):
        with writing(folder) as half:
            (half / "model").write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        recorder.kept("model", fails, content=("v1",))
    assert [path for path in (tmp_path / ".cache").iterdir()] == []
    made = recorder.kept("model", works, content=("v1",))
    assert recorder.kept("model", fails, content=("v1",)) == made
    (made / "model").write_text("wrong")
    assert (recorder.kept("model", works, content=("v1",)) / "model").read_text() == "whole"


def test_memory_of_child_processes_counts():
    before = lab._memory_held()
    holds = "held = b'1' * 200_000_000; print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    assert lab._memory_held() - before > 190e6
    child.communicate(b"\n")


@pytest.mark.parametrize("lost", ["manifest.json", "index.json", "0.json"])
def test_a_part_that_lost_a_file_is_computed_again(tmp_path, lost):
    recorder = lab.RunRecorder("toy", {}, tmp_path / "toy-1")
    assert recorder.cached("part", lambda: 1) == 1
    (next((recorder.folder / "parts").iterdir()) / lost).unlink()
    assert recorder.cached("part", lambda: 2) == 2


def test_content_hash_sees_every_change(tmp_path):
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    others = [frame.assign(b=["x", "z"]), frame.rename(columns={"a": "c"}), frame[::-1], frame["a"], np.arange(2), 1, "1"]
    hashes = [lab.content_hash(frame), *map(lab.content_hash, others)]
    assert len(set(hashes)) == len(hashes) and lab.content_hash(frame.copy()) == hashes[0]
    assert lab.content_hash("a", "b") != lab.content_hash("ab")
