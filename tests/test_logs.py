"""Reading logs: every line becomes events or a reject, whatever the size of the pieces and however broken the file."""

import json
import zipfile

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomrec.data import sources
from ecomrec.data.artefacts import ArtefactError, verify
from ecomrec.data.logs import LogError, ingest, pieces, read_log
from ecomrec.data.tables import TableError

OWN = {"columns": {"ts": "when", "kind": "what", "item_id": "which", "user_id": "who"}, "actions": {"look": "click"}}


def written(folder, name: str, text: str | bytes):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows(n: int) -> list[dict]:
    return [{"when": 1740996000000 + n, "what": "look", "which": f"i{n}", "who": f"u{n % 3}"} for n in range(n)]


@given(
    lines=st.lists(st.sampled_from([
        *(json.dumps(row) for row in rows(4)), "{", "7", "[]", "null", '{"when": null, "what": "look"}', '{"when": "soon", "what": "look"}',
        '{"when": 1e400, "what": "look"}', '{"when": 1740996000000, "what": "look", "which": 90071992547409931}',
        '{"when": 1740996000000, "what": "look", "quantity": 1%s}' % ("0" * 30), '{"when": 1740996000000, "what": "dance"}', '{"when": 1740996000000}', "", "\x00", '"鞋"',
        '{"when": 1740996000000, "what": {"a": 1}}',
    ]), max_size=20),
    size=st.integers(2, 9),
)
def test_every_line_is_an_event_or_a_reject_in_pieces_of_any_size(lines, size, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("log"), "log.jsonl", "\n".join(lines))
    whole = read_log(path, most_malformed=1, **OWN)
    told = [line for line in lines if line.strip()]
    assert len(whole.events) + len(whole.rejects) == len(told) == whole.n_lines
    assert whole.rejects["line"].is_monotonic_increasing and whole.rejects["reason"].str.len().gt(0).all()
    small = read_log(path, most_malformed=1, rows=size, **OWN)
    for name in ("events", "products", "users", "rejects"):
        pd.testing.assert_frame_equal(getattr(small, name), getattr(whole, name))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "ndjson", "parquet"])
def test_own_files_hold_the_same_in_every_format(suffix, tmp_path):
    frame, path = pd.DataFrame(rows(50)), tmp_path / f"log.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(path)
    elif suffix.endswith("sv"):
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    else:
        frame.to_json(path, orient="records", lines=True)
    events = read_log(path, rows=7, **OWN).events
    assert events["item_id"].tolist() == frame["which"].tolist() and events["ts"].tolist() == frame["when"].tolist()
    assert events["kind"].eq("click").all() and events["session_id"].equals(events["user_id"]) and events["event_id"].is_unique


def test_strange_cells_are_read(tmp_path):
    long, mixed = "x" * 1_000_000, "👟 跑步鞋 ﷺ"
    text = f'when,what,which,who\n1740996000000,look,"{long}",a\n1740996000001,look,"{mixed}","a\nb"\n1740996000002,look,,\n'
    events = read_log(written(tmp_path, "log.csv", "\ufeff" + text), **OWN).events
    assert events["item_id"].tolist()[:2] == [long, mixed] and events["user_id"].tolist()[1] == "a\nb"
    assert events["item_id"].isna().tolist()[2] and events["session_id"].notna().all()


def test_broken_rows_of_csv_are_named_by_line(tmp_path):
    text = b"when,what,which,who\n1740996000000,look,i1,a\n1,2\n1740996000000,look,i\xff,a\n1740996000000,look,\"i\"1,a\nNaN,look,i1,a\n"
    log = read_log(written(tmp_path, "log.csv", text), most_malformed=1, **OWN)
    assert len(log.events) == 1 and log.rejects["line"].tolist() == [3, 4, 5, 6] and log.rejects["malformed"].all()


@pytest.mark.parametrize("text", ["", "when,what,which,who\n"])
def test_an_empty_log_is_no_error(text, tmp_path):
    assert read_log(written(tmp_path, "log.csv", text), **OWN).events.empty
    ingest(tmp_path / "log.csv", tmp_path / "tables", **OWN)
    assert sources.load(str(tmp_path / "tables")).events.empty


def test_too_much_damage_stops_early_and_leaves_what_was_there(tmp_path):
    good = written(tmp_path, "good.jsonl", "\n".join(map(json.dumps, rows(20))))
    ingest(good, tmp_path / "tables", **OWN)
    before = verify(tmp_path / "tables")
    bad = written(tmp_path, "bad.jsonl", "\n".join([*map(json.dumps, rows(20)), *["{"] * 5000]))
    with pytest.raises(LogError, match=r"of \d+ lines cannot be read, more than most_malformed=1.0%; line 21: no line of this kind"):
        ingest(bad, tmp_path / "tables", rows=100, **OWN)
    assert verify(tmp_path / "tables") == before and sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl", "tables"]
    assert sum(piece.n_lines for piece in _until_it_fails(bad)) < 300
    with pytest.raises(ArtefactError, match="no saved folder"):
        ingest(good, tmp_path, **OWN)


def _until_it_fails(path):
    try:
        yield from pieces(path, rows=100, **OWN)
    except LogError:
        return


def test_what_cannot_be_read_is_said(tmp_path):
    log = written(tmp_path, "log.csv", "when,what\n1740996000000,look\n")
    for error, message, path, form, options in (
        (LogError, "there is no such file", tmp_path / "none.csv", "own", {}),
        (LogError, "form 'ubi2' is not known; choose from ubi, otto", log, "ubi2", {}),
        (LogError, "cannot be read as ubi", written(tmp_path, "log.zip", "no zip"), "ubi", {}),
        (LogError, "cannot be read as own", written(tmp_path, "log.parquet", "no parquet"), "own", {}),
        (TableError, "columns maps 'ts' to 'wen', which the file lacks; it has when, what", log, "own", {"columns": {"ts": "wen"}}),
        (TableError, "'time' is no column of ours", log, "own", {"columns": {"time": "when"}}),
        (TableError, "column ts: the column is missing", log, "own", {"columns": {"kind": "what"}}),
    ):
        with pytest.raises(error, match=message):
            read_log(path, form, **options)


def test_a_query_of_ubi_gets_its_session_from_events_that_come_pieces_later(tmp_path):
    queries = [{"query_id": f"q{n}", "user_query": f"shoe {n}", "client_id": "ann", "timestamp": "2025-03-03T10:00:00.000+0000"} for n in range(30)]
    events = [{"query_id": f"q{n}", "action_name": "search", "session_id": f"s{n}", "client_id": "ann", "timestamp": 1740996000027} for n in range(20)]
    path = written(tmp_path, "ubi.ndjson", "\n".join(f"ubi_x\t{json.dumps(line)}" for line in [*queries, *events]))
    for size in (3, 1000):
        log = read_log(path, "ubi", rows=size)
        sessions = log.events.set_index("request_id")["session_id"]
        assert sessions.to_dict() == {f"q{n}": f"s{n}" if n < 20 else "ann" for n in range(30)}
        assert log.events["ts"].eq(1740996000000).all() and (log.rejects["reason"] == "this search was read already").sum() == 20


def test_real_logs_read_as_their_makers_describe_them(real_data):
    with zipfile.ZipFile(real_data / "ubi/log_events.zip") as archive:
        said = [json.loads(line.partition(b"\t")[2]) for line in archive.read(archive.namelist()[0]).splitlines()]
    log = read_log(real_data / "ubi/log_events.zip", "ubi")
    assert (log.events["kind"] == "search").sum() == sum("action_name" not in line for line in said) == 4130
    assert log.events["kind"].value_counts()[["click", "cart", "purchase"]].tolist() == [832, 425, 414]
    assert len(log.events) + len(log.rejects) == len(said) and not log.rejects["malformed"].any()
    both = sources.load("ubi")
    assert both.events["ts"].between(1.7e12, 1.8e12).all() and both.events["position"].min() == 1
    otto = sources.load("otto_sample")
    assert len(otto.events) == 862 and otto.events["session_id"].nunique() == 20 and otto.rejects.empty
    retail = sources.load("online_retail")
    assert len(retail.events) == 541_909 and len(retail.users) == 4372 and retail.events["event_id"].duplicated().sum() == 6007
    assert round(retail.events["user_id"].isna().mean(), 2) == 0.25 and (retail.events["kind"] == "return").sum() == 10_624
    journey = sources.load("completejourney")
    assert len(journey.events) == 75_000 and journey.users["age"].notna().sum() > 500 and journey.products["category"].str.contains(" > ").any()
