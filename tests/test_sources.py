"""Downloads against a server on loopback, foreign formats, and what can be wrong with a user's files."""

import functools
import hashlib
import http.server
import os
import threading

import pandas as pd
import pytest

from ecomrec.data import sources
from ecomrec.data.sources import Source, SourceError, fetch, load
from ecomrec.data.tables import TableError

FILES = {"a/products.parquet": b"one" * 1000, "b/second.bin": b"two" * 1000}


class _Handler(http.server.SimpleHTTPRequestHandler):
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
    monkeypatch.setitem(sources.SOURCES, "toy", Source("a toy", "none", "nowhere", files=pins))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(tmp_path))) as httpd:
        httpd.asked, httpd.bodies, httpd.broken = [], dict(FILES), set()
        httpd.base = f"http://127.0.0.1:{httpd.server_address[1]}/"
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
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
    with pytest.raises(SourceError, match="second.bin: the SHA-256 differs"):
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


def test_a_damaged_cache_is_mended(server, tmp_path):
    paths = fetch("toy", server.base)
    paths[0].write_bytes(b"damaged")
    fetch("toy", server.base)
    assert paths[0].read_bytes() == FILES["a/products.parquet"]


def test_sets_without_pins_say_where_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("ECOMREC_DATA", str(tmp_path))
    with pytest.raises(SourceError, match="esci-data"):
        load("esci")


def test_the_esci_fixture_reads():
    if not sources.is_available("esci_sample"):
        pytest.skip("the ESCI sample is not in ECOMREC_DATA")
    tables = load("esci_sample", stage="clean")
    assert len(tables.products) == len(tables.judgements) == 16 and set(tables.judgements["grade"]) <= {0, 1, 2, 3}


def test_the_full_esci_and_wands_are_recognised_by_their_files(tmp_path):
    esci, wands = tmp_path / "esci", tmp_path / "wands"
    esci.mkdir(), wands.mkdir()
    pd.DataFrame({"product_id": ["B1", "B1"], "product_locale": ["us", "jp"], "product_title": ["Shoe", "靴"], "product_description": [None, None],
                  "product_bullet_point": ["light", None], "product_brand": ["x", "y"]}).to_parquet(esci / "shopping_queries_dataset_products.parquet")
    pd.DataFrame({"query_id": [1, 2], "query": ["shoe", "靴"], "product_id": ["B1", "B1"], "product_locale": ["us", "jp"],
                  "esci_label": ["E", "S"]}).to_parquet(esci / "shopping_queries_dataset_examples.parquet")
    (wands / "product.csv").write_text("product_id\tproduct_name\tproduct_description\tcategory hierarchy\tproduct_features\trating_count\taverage_rating\n7\tSofa\tsoft\tHome / Sofas\tcolour:red\t3\t4.5\n")
    (wands / "query.csv").write_text("query_id\tquery\tquery_class\n0\tNA sofa\tSofas\n")
    (wands / "label.csv").write_text("id\tquery_id\tproduct_id\tlabel\n0\t0\t7\tPartial\n")
    read = load(str(esci), stage="clean")
    assert read.products["item_id"].tolist() == ["us:B1", "jp:B1"] and read.judgements["grade"].tolist() == [3, 2]
    assert read.products["description"].tolist()[0] == "light"
    read = load(str(wands), stage="clean")
    assert read.judgements["grade"].tolist() == [1] and read.products["category"].tolist() == ["Home > Sofas"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_every_format_gives_the_same_table(tmp_path, suffix):
    frame = pd.DataFrame({"sku": ["NA", "2"], "name": ["跑步鞋", "null"]})
    path = tmp_path / f"products{suffix}"
    {".csv": lambda: frame.to_csv(path, index=False), ".tsv": lambda: frame.to_csv(path, sep="\t", index=False),
     ".parquet": lambda: frame.to_parquet(path), ".jsonl": lambda: frame.to_json(path, orient="records", lines=True)}[suffix]()
    read = load("files", products=path, columns={"products": {"item_id": "sku", "title": "name"}}, stage="clean").products
    assert read["item_id"].tolist() == ["NA", "2"] and read["title"].tolist() == ["跑步鞋", "null"]


@pytest.mark.parametrize("content, message", [
    ("", "cannot be read as csv"), ("sku\n", "columns maps 'title' to 'name'"), ("sku,name\n1,\n", "column title, row 0"),
])
def test_a_wrong_products_file_is_named(tmp_path, content, message):
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises((SourceError, TableError), match=message) as caught:
        load("files", products=path, columns={"products": {"item_id": "sku", "title": "name"}}, stage="clean")
    assert "p.csv" in str(caught.value)


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
