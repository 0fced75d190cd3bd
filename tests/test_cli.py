"""The command as a terminal sees it: what goes to stdout, what to stderr, and which status it ends with."""

import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import nbformat
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomrec import lab
from ecomrec.cli import _as_text, main
from ecomrec.data import sources
from ecomrec.data.artefacts import ArtefactError
from ecomrec.data.tables import TableError

COMMAND = [sys.executable, "-c", "import sys; from ecomrec.cli import main; sys.exit(main())"]
IMPORTS = "import os, sys, time\nimport pandas as pd\nfrom ecomrec import lab"
PARAMETERS = 'products = None\nlabel = ""\nstops = ""'
STEPS = """
print("printed to stdout"); print("printed to stderr", file=sys.stderr)
if stops == "error":
    raise KeyError("no such column")
if stops == "wait":
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(600)
run = lab.current("count", {"products": products, "label": label})
wanted = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
thrifty = wanted.items() <= os.environ.items()
run.metrics({"count/rows": len(pd.read_csv(products)), "count/thrifty": int(thrifty), "count/label": len(label)})
"""


@pytest.fixture(scope="module")
def experiments(tmp_path_factory) -> Path:
    """A folder with one experiment, which counts the rows of a CSV file."""
    folder = tmp_path_factory.mktemp("experiments")
    cells = [nbformat.v4.new_code_cell(source) for source in (IMPORTS, PARAMETERS, STEPS)]
    cells[1].metadata["tags"] = ["parameters"]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "count.ipynb")
    return folder


def environment(**changes: str) -> dict[str, str]:
    """The environment without what the command sets itself, and with the changes."""
    ours = ("OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "TOKENIZERS_PARALLELISM", "ECOMREC_RUNS", "ECOMREC_RUN")
    return {key: value for key, value in os.environ.items() if key not in ours} | changes


def said(*arguments: str) -> tuple[int, str]:
    """Exit status and stdout of a command in this process."""
    with redirect_stdout(StringIO()) as out:
        status = main(arguments)
    return status, out.getvalue()


def test_run_prints_its_folder_and_takes_paths_from_where_the_caller_stands(experiments, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/things.csv").write_text("item_id\na\nb\nc\n")
    command = [*COMMAND, "run", "count", "--experiments", str(experiments), "-p", "products", "things.csv", "-p", "label", "跑步鞋=1"]
    done = subprocess.run(command, cwd=tmp_path / "here", env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.parent == tmp_path / "here/runs"
    assert json.loads((folder / "metrics.json").read_text()) == {"count/rows": 3, "count/thrifty": 1, "count/label": 5}
    assert "printed to" not in done.stdout


def test_failed_run_ends_with_1_and_says_where_to_look(experiments, tmp_path):
    runs = tmp_path / "elsewhere"
    command = [*COMMAND, "run", "count", "--experiments", str(experiments), "-p", "stops", "error"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(ECOMREC_RUNS=str(runs)), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (folder,) = runs.iterdir()
    last = done.stderr.strip().splitlines()[-1]
    assert "KeyError" in last and "no such column" in last and str(folder / "run.ipynb") in last
    assert 'File "' not in done.stderr
    assert (folder / "run.ipynb").exists() and not (folder / "metrics.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_stopped_run_is_no_finished_run(experiments, tmp_path):
    command = [*COMMAND, "run", "count", "--experiments", str(experiments), "-p", "stops", "wait"]
    folder = tmp_path / "runs"
    with subprocess.Popen(
        command, env=environment(ECOMREC_RUNS=str(folder)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        heard = ""
        while "waiting" not in heard and process.poll() is None:
            heard += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert "waiting" in heard, heard
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("ecomrec: stopped") and "KeyboardInterrupt" not in err
    assert out == "" and not list(folder.glob("*/metrics.json")), err


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.text(st.characters(codec="utf-8"), max_size=8), max_size=4))
def test_parameters_arrive_as_they_were_typed(pairs):
    words = [word for pair in pairs.items() for word in ("-p", *pair)]
    with patch.object(lab, "run", return_value="folder") as run, patch.object(lab, "defaults", return_value={}):
        with patch.object(lab, "read_value", side_effect=lambda text, default=None: text):
            assert said("run", "count", *words, "--again") == (0, "folder\n")
    assert run.call_args.args == ("count", pairs)
    assert run.call_args.kwargs["again"] is True


FORESEEN = [
    lab.RunError("no such\nrun"),
    sources.SourceError("no such set"),
    TableError("twice", "products", "item_id", 3, "things.csv"),
    ArtefactError("damaged"),
]


@pytest.mark.parametrize("error", FORESEEN, ids=lambda error: type(error).__name__)
def test_foreseen_error_is_one_line(error, capsys):
    with patch.object(lab, "leaderboard", side_effect=error):
        assert main(["runs"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"ecomrec: {' '.join(str(error).split())}\n"


def test_error_that_nobody_foresaw_keeps_its_traceback():
    with patch.object(lab, "leaderboard", side_effect=ZeroDivisionError("ours")), pytest.raises(ZeroDivisionError):
        main(["runs"])


@pytest.mark.parametrize("line", ["bogus", "run", "search relevance", "search relevance shoes -k many", "compare one", "data fetch", "runs --bogus"])
def test_what_cannot_be_parsed_ends_with_2(line, capsys):
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Error" in captured.err


def test_terminal_without_chinese_is_no_error(tmp_path):
    command = [*COMMAND, "runs", "跑步鞋"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(PYTHONIOENCODING="ascii"), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"No finished run of ??? yet" in done.stdout


@given(st.lists(st.tuples(st.text(max_size=90), st.floats(allow_nan=True), st.integers()), min_size=1, max_size=5))
def test_every_row_is_one_line(rows):
    table = pd.DataFrame(rows, columns=["title", "price", "n"])
    text = _as_text(table, width=60)
    assert len(text.split("\n")) == len(table) + 1
    assert text.split("\n")[0].split() == ["title", "price", "n"]


@pytest.fixture(scope="module")
def kept_engine(tmp_path_factory) -> Path:
    """The folder of a finished run that kept an engine."""
    from ecomrec import Engine
    from ecomrec.search.engine import Recipe

    folder = tmp_path_factory.mktemp("runs") / "shoes-0123456789ab"
    products = pd.DataFrame({"item_id": ["a", "b", "c"], "title": ["Running shoes", "Dance shoes", "红色跑步鞋"], "price": [49.9, 80.0, 12.5]})
    words = {"words": 1.0, "attributes": 0.0, "vectors": 0.0}
    folder.mkdir()
    Engine.from_products(products, recipe=Recipe(candidates=words, order=words)).save(folder / "engine")
    (folder / "run.json").write_text("{}")
    (folder / "metrics.json").write_text("{}")
    return folder


def test_search_asks_the_engine_of_a_run(kept_engine, monkeypatch):
    monkeypatch.setenv("ECOMREC_RUNS", str(kept_engine.parent))
    for run in (str(kept_engine), kept_engine.name, "shoes"):
        status, out = said("search", run, "running shoes")
        assert status == 0
        assert "Running shoes" in out and "49.9" in out and "Dance shoes" in out
    assert "Dance shoes" not in said("search", "shoes", "running shoes", "-k", "1")[1]
    assert "红色跑步鞋" in said("search", "shoes", "跑步鞋")[1]
    assert said("search", "shoes", "teapot")[1].startswith("0 results")


def test_damaged_engine_is_refused(kept_engine, capsys):
    table = kept_engine / "engine/products.parquet"
    whole = table.read_bytes()
    table.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert main(["search", str(kept_engine), "shoes"]) == 2
    finally:
        table.write_bytes(whole)
    assert "products.parquet" in capsys.readouterr().err


def test_data_list_says_what_is_here(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ECOMREC_DATA", str(tmp_path))
    assert main(["data", "list"]) == 0
    captured = capsys.readouterr()
    here = {line.split()[0]: line.split()[-1] for line in captured.out.splitlines()[1:]}
    assert here.keys() == sources.SOURCES.keys()
    assert here["shop"] == "True" and here["chorus"] == "False"
    assert str(tmp_path) in captured.err


def test_unknown_set_is_refused_before_anything_is_downloaded():
    with patch.object(sources, "fetch") as fetch:
        assert main(["data", "fetch", "chorus", "corus"]) == 2
    fetch.assert_not_called()


def test_data_fetch_prints_the_files(tmp_path):
    with patch.object(sources, "fetch", side_effect=lambda name: [tmp_path / name / "1.json", tmp_path / name / "2.json"]):
        status, out = said("data", "fetch", "chorus", "esci_sample")
    assert status == 0
    assert out.splitlines() == [str(tmp_path / name / file) for name in ("chorus", "esci_sample") for file in ("1.json", "2.json")]


def test_data_fetch_needs_a_name_even_if_everything_is_here():
    assert main(["data", "fetch"]) == 2
