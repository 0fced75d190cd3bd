"""Downloads against a server on loopback, foreign formats, and what can be wrong with a user's files."""

import hashlib
import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from ecomrec.data import sources
from ecomrec.data.sources import Source, SourceError, fetch, load
from ecomrec.data.tables import TableError

COMMAND = [sys.executable, "-c", "import sys; from ecomrec.cli import main; sys.exit(main())"]
FILES = {"a/products.parquet": b"one" * 1000, "b/second.bin": b"two" * 1000}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.server.bodies.get(self.path.lstrip("/"))
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path in self.server.broken else body)

    def log_message(self, *_):
        """Keep the test's output clean."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOMREC_DATA", str(tmp_path / "cache"))
    pins = {path: hashlib.sha256(body).hexdigest() for path, body in FILES.items()}
    monkeypatch.setitem(sources.SOURCES, "toy", Source("a toy", "none", "nowhere", "second.bin", files=pins))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as httpd:
        httpd.asked, httpd.bodies, httpd.broken = [], dict(FILES), set()
        httpd.base = f"http://127.0.0.1:{httpd.server_address[1]}/"
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield httpd
        httpd.shutdown()


def _kept(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


def test_files_are_fetched_once_and_a_warm_cache_asks_nobody(server, tmp_path):
    assert [p.read_bytes() for p in fetch("toy", server.base)] == list(FILES.values())
    assert len(server.asked) == 2 and sources.is_available("toy")
    fetch("toy", "http://127.0.0.1:1/")
    assert len(server.asked) == 2 and _kept(tmp_path) == ["products.parquet", "second.bin"]


def test_a_changed_file_is_refused_and_not_kept(server, tmp_path):
    server.bodies["b/second.bin"] = b"something else"
    with pytest.raises(SourceError, match="second.bin: its SHA-256 differs"):
        fetch("toy", server.base)
    assert _kept(tmp_path) == ["products.parquet"]


def test_a_broken_download_goes_on_with_the_next_file(server, tmp_path):
    server.broken.add("/b/second.bin")
    with pytest.raises(SourceError, match="second.bin"):
        fetch("toy", server.base)
    assert _kept(tmp_path) == ["products.parquet"]
    server.broken.clear()
    fetch("toy", server.base)
    assert server.asked.count("/a/products.parquet") == 1 and _kept(tmp_path) == ["products.parquet", "second.bin"]


def test_a_missing_file_and_no_server_say_what_to_do(server, tmp_path):
    del server.bodies["a/products.parquet"]
    for base in (server.base, "http://127.0.0.1:1/"):
        with pytest.raises(SourceError, match="put products.parquet there yourself"):
            fetch("toy", base)
    assert _kept(tmp_path) == []


def test_a_wrong_file_is_named_and_left_alone(server, tmp_path):
    paths = fetch("toy", server.base)
    paths[0].write_bytes(b"somebody's own")
    with pytest.raises(SourceError, match="products.parquet: its SHA-256 differs from the pinned .*; move it away"):
        fetch("toy", server.base)
    assert paths[0].read_bytes() == b"somebody's own" and len(server.asked) == 2


def test_a_folder_that_cannot_be_written_says_so(server, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(SourceError, match="cannot be downloaded into"):
        fetch("toy", server.base)


def test_sets_without_pins_say_where_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("ECOMREC_DATA", str(tmp_path))
    with pytest.raises(SourceError, match="esci-data"):
        load("esci")


def test_the_esci_fixture_reads():
    if not sources.is_available("esci_sample"):
        pytest.skip("the ESCI sample is not in ECOMREC_DATA")
    tables = load("esci_sample", stage="clean")
    assert len(tables.products) == len(tables.judgements) == 16 and set(tables.judgements["grade"]) <= {0, 1, 2, 3}


def _esci(folder, letter="S"):
    folder.mkdir(exist_ok=True)
    pd.DataFrame({
        "product_id": ["B1", "B1"], "product_locale": ["us", "jp"], "product_title": ["Shoe", "靴"],
        "product_description": [None, None], "product_bullet_point": ["light", None], "product_brand": ["x", "y"],
    }).to_parquet(folder / "shopping_queries_dataset_products.parquet")
    pd.DataFrame({
        "query_id": [1, 2], "query": ["shoe", "靴"], "product_id": ["B1", "B1"], "product_locale": ["us", "jp"],
        "esci_label": ["E", letter],
    }).to_parquet(folder / "shopping_queries_dataset_examples.parquet")


def _wands(folder, label="Partial"):
    folder.mkdir(exist_ok=True)
    sofa = {
        "product_id": "7", "product_name": "Sofa", "product_description": "soft", "category hierarchy": "Home / Sofas",
        "product_features": "colour:red", "rating_count": "3", "average_rating": "4.5",
    }
    (folder / "product.csv").write_text("\t".join(sofa) + "\n" + "\t".join(sofa.values()) + "\n")
    (folder / "query.csv").write_text("query_id\tquery\tquery_class\n0\tNA sofa\tSofas\n")
    (folder / "label.csv").write_text(f"id\tquery_id\tproduct_id\tlabel\n0\t0\t7\t{label}\n")


def test_the_full_esci_is_recognised_by_its_files(tmp_path):
    _esci(tmp_path / "esci")
    read = load(str(tmp_path / "esci"), stage="clean")
    assert read.products["item_id"].tolist() == ["us:B1", "jp:B1"] and read.judgements["grade"].tolist() == [3, 2]
    assert read.products["description"].tolist()[0] == "light"
    _esci(tmp_path / "esci", letter="X")
    with pytest.raises(TableError, match="examples.parquet: table judgements, column grade, row 1: grade X is not in"):
        load(str(tmp_path / "esci"))


def test_wands_is_recognised_by_its_files(tmp_path):
    _wands(tmp_path / "wands")
    read = load(str(tmp_path / "wands"), stage="clean")
    assert read.judgements[["query", "grade"]].to_numpy().tolist() == [["NA sofa", 1]]
    assert read.products["category"].tolist() == ["Home > Sofas"] and read.products["n_ratings"].tolist() == [3]
    _wands(tmp_path / "wands", label="Perhaps")
    with pytest.raises(TableError, match="label.csv: table judgements, column grade, row 0: grade Perhaps is not in"):
        load(str(tmp_path / "wands"))


def test_a_known_set_in_the_users_cache_needs_no_name_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOMREC_DATA", str(tmp_path))
    assert not sources.is_available("wands")
    _wands(tmp_path / "wands")
    assert sources.is_available("wands") and len(load("wands").products) == 1


def test_chorus_reads_as_its_makers_describe_it(real_data):
    tables = load("chorus", stage="clean")
    assert len(tables.products) == 19_406 and tables.judgements["query_id"].nunique() == 135
    assert tables.judgements["grade"].value_counts().sort_index().tolist() == [1853, 238, 105, 1472]
    assert tables.products["price"].dropna().between(0.01, 100_000).all() and tables.products["listed_ts"].notna().any()
    assert len(sources.raters().dropna()) == 3_188 and len(tables.files) == 6


@pytest.mark.parametrize("damage", [
    lambda f: (f / "shopping_queries_dataset_products.parquet").unlink(),
    lambda f: (f / "shopping_queries_dataset_products.parquet").write_bytes(b"PAR1"),
    lambda f: pd.DataFrame({"product_id": ["a"]}).to_parquet(f / "shopping_queries_dataset_products.parquet"),
])
def test_damaged_folders_are_named(tmp_path, damage):
    _esci(tmp_path / "esci")
    damage(tmp_path / "esci")
    with pytest.raises(SourceError, match="esci: "):
        load(str(tmp_path / "esci"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_every_format_gives_the_same_table(tmp_path, suffix):
    frame = pd.DataFrame({"sku": ["NA", "2"], "name": ["跑步鞋", "null"]})
    path = tmp_path / f"products{suffix}"
    {".csv": lambda: frame.to_csv(path, index=False), ".tsv": lambda: frame.to_csv(path, sep="\t", index=False),
     ".parquet": lambda: frame.to_parquet(path),
     ".jsonl": lambda: frame.to_json(path, orient="records", lines=True)}[suffix]()
    names = {"products": {"item_id": "sku", "title": "name"}}
    read = load("files", products=path, columns=names, stage="clean").products
    assert read["item_id"].tolist() == ["NA", "2"] and read["title"].tolist() == ["跑步鞋", "null"]


@pytest.mark.parametrize("content, message", [
    ("", "cannot be read as csv"),
    ("sku\n", "columns maps 'title' to 'name'"),
    ("sku,name\n1,\n", "column title, row 0"),
])
def test_a_wrong_products_file_is_named(tmp_path, content, message):
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises((SourceError, TableError), match=message) as caught:
        load("files", products=path, columns={"products": {"item_id": "sku", "title": "name"}}, stage="clean")
    assert "p.csv" in str(caught.value)


def _own(tmp_path, judged, **options):
    (tmp_path / "p.csv").write_text("item_id,title\n007,Shoe\n7,Sock\n")
    (tmp_path / "j.csv").write_text(judged)
    return load("files", products=tmp_path / "p.csv", judgements=tmp_path / "j.csv", **options)


@pytest.mark.parametrize("judged, options, message", [
    ("query,item_id,grade\nq,007,4\nq,7,5\n", {"grades": {4: 1}}, "column grade, row 1: grade 5 is not in grades"),
    ("query,item_id,grade\nq,007,1\nq,8,1\n", {}, "column item_id, row 1: product '8' is not in the catalogue"),
    ("query,item_id,grade\nq,007,1\nq,007,2\n", {}, "row 1: 'q' with '007' stands more than once"),
    ("query,item_id,grade\nq,007,good\n", {}, "column grade, row 0: 'good' is not of kind integer"),
    ("query,item_id,grade\nq,007,-1\n", {}, "column grade, row 0"),
    ("query,item_id\nq,007\n", {}, "column grade: the column is missing; found query, item_id"),
    ("query,item_id,grade\nq,007,1\n", {"columns": {"judgements": {"titel": "query"}}}, "'titel' is no column of ours"),
])
def test_wrong_judgements_are_named_with_file_row_and_column(tmp_path, judged, options, message):
    with pytest.raises(TableError, match=message) as caught:
        _own(tmp_path, judged, **options)
    assert caught.value.where.endswith("j.csv") and caught.value.table == "judgements"


def test_ids_stay_what_they_are(tmp_path):
    assert _own(tmp_path, "query,item_id,grade\nq,007,1\nq,7,0\n").judgements["item_id"].tolist() == ["007", "7"]


@pytest.mark.parametrize("ours", ["good", -1, 1.5, None])
def test_grades_that_are_none_are_refused(tmp_path, ours):
    with pytest.raises(SourceError, match="is no grade"):
        _own(tmp_path, "query,item_id,grade\nq,007,1\n", grades={1: ours})


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_times_of_a_log_may_be_datetimes(tmp_path, suffix):
    times = pd.to_datetime(["2026-01-01T00:00:00.5Z", "2026-01-02T00:00:00Z"], format="ISO8601")
    log = pd.DataFrame({"id": ["a", "b"], "at": times, "visit": "s", "what": ["search", "click"], "sku": [None, 7.0]})
    path = tmp_path / f"log{suffix}"
    {".csv": lambda: log.to_csv(path, index=False), ".parquet": lambda: log.to_parquet(path),
     ".jsonl": lambda: log.to_json(path, orient="records", lines=True, date_format="iso")}[suffix]()
    (tmp_path / "p.csv").write_text("item_id,title\n7,Sock\n")
    names = {"events": {"event_id": "id", "ts": "at", "session_id": "visit", "kind": "what", "item_id": "sku"}}
    read = load("files", products=tmp_path / "p.csv", events=path, columns=names, stage="clean").events
    assert read["ts"].tolist() == [1_767_225_600_500, 1_767_312_000_000]
    assert suffix == ".csv" or read["item_id"].tolist()[1] == "7"


def test_unknown_formats_tables_and_folders_are_named(tmp_path):
    (tmp_path / "p.xlsx").write_text("")
    with pytest.raises(SourceError, match="known are .csv"):
        load("files", products=tmp_path / "p.xlsx")
    with pytest.raises(SourceError, match="are no tables"):
        load("files", products=tmp_path / "p.csv", columns={"items": {}})
    with pytest.raises(SourceError, match="holds none of products.parquet"):
        load(str(tmp_path))
    with pytest.raises(SourceError, match="give products=PATH"):
        load("files")


def test_fingerprints_change_with_the_file(tmp_path):
    pd.DataFrame({"item_id": ["a"], "title": ["x"]}).to_parquet(tmp_path / "products.parquet")
    before = load(str(tmp_path)).files
    pd.DataFrame({"item_id": ["a"], "title": ["y"]}).to_parquet(tmp_path / "products.parquet")
    assert before.keys() == load(str(tmp_path)).files.keys() and before != load(str(tmp_path)).files


def test_nothing_is_written_into_a_read_source(tmp_path):
    pd.DataFrame({"item_id": ["a"], "title": ["x"]}).to_parquet(tmp_path / "products.parquet")
    load(str(tmp_path))
    assert os.listdir(tmp_path) == ["products.parquet"]


def test_own_files_run_through_the_relevance_experiment(tmp_path):
    things, colours = ["shoe", "sock", "lamp", "desk", "cup"], ["red", "blue", "green"]
    shop = [(f"00{i}", f"{colour} {thing}") for i, (thing, colour) in enumerate(itertools.product(things, colours))]
    pd.DataFrame(shop, columns=["sku", "name"]).to_csv(tmp_path / "products.csv", index=False)
    judged = [(thing, sku, 4 if thing in name else 1) for thing in things for sku, name in shop[::2]]
    pd.DataFrame(judged, columns=["words", "sku", "stars"]).to_csv(tmp_path / "judged.csv", index=False)
    (tmp_path / "mapping.yaml").write_text(
        "columns:\n  products: {item_id: sku, title: name}\n  judgements: {query: words, item_id: sku, grade: stars}\n"
        "grades: {1: 0, 2: 1, 3: 2, 4: 3}\nfolds: 4\n"
    )
    command = "run relevance -f mapping.yaml -p products products.csv -p judgements judged.csv".split()
    command += ["-p", "rungs", "[bi_encoder]", "-p", "epochs", "1", "-p", "list_size", "4", "-p", "workers", "1"]
    done = subprocess.run(
        [*COMMAND, *command], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"ECOMREC_RUNS": str(tmp_path / "runs")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((Path(done.stdout.splitlines()[-1]) / "metrics.json").read_text())
    assert metrics["bm25/judged_ndcg@10"] == pytest.approx(1)
    assert metrics["random/judged_ndcg@10"] < 1
