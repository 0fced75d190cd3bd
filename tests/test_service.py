"""The service from outside: what it answers, what it keeps, what it refuses, and what it does when things break."""

import asyncio
import io
import itertools
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from ecomrec.data import sources
from ecomrec.data.cleaning import clean
from ecomrec.feedback.store import Store, StoreFull, StoreGone
from ecomrec.search.engine import Engine
from ecomrec.search.recipe import Recipe
from ecomrec.serve import service as module
from ecomrec.serve.door import MOST_BYTES, Caller, Keys, Refused, log_to
from ecomrec.serve.service import Door, PageLog, ServeError, Service, ToRecommend, ToSearch, UbiSaid, create_app, event_rows, keys_of

WORDS = {"words": 0.5, "attributes": 0.5, "vectors": 0.0}
PAGES = {"/search": {"query": "running shoes"}, "/recommend": {}, "/similar": {"item_id": "ITEM"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small engine with a log and without an encoder, in a folder."""
    shop = clean(sources.load("shop"))[0]
    products = shop.products.head(300)
    events = shop.events[shop.events["item_id"].isin(products["item_id"]) | (shop.events["kind"] == "search")]
    folder = tmp_path_factory.mktemp("engine") / "engine"
    Engine.from_products(products, recipe=Recipe(candidates=WORDS, order=WORDS), users=shop.users, events=events).save(folder)
    return folder


class Shop:
    """A service, its keys, and a client with the first of them."""

    def __init__(self, saved: Path, folder: Path, store=Store, rate: float = 1e6, load=None, **options):
        self.store = store(folder / "events.sqlite", folder / "keys")
        self.service = Service(load or (lambda: Engine.load(saved)), self.store, folder / "erased.json", **options)
        self.keys = Keys({})
        self.key, self.other = self.keys.add("first", admin=True), self.keys.add("partner", tenant="acme")
        self.app = create_app(self.service, self.keys, rate)
        self.client = TestClient(self.app, base_url="http://127.0.0.1", headers=self.head(self.key), raise_server_exceptions=False)
        self.item = self.service.engine.products["item_id"].iloc[0]

    def head(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def post(self, path: str, body=None, key: str | None = None, **more):
        return self.client.post(path, json=body, headers=None if key is None else self.head(key), **more)

    def click(self, user: str | None = "anna", number: int = 1, **more) -> dict:
        return {"event_id": f"e{number}", "kind": "click", "user_id": user, "item_id": self.item} | more

    def kept(self) -> pd.DataFrame:
        """All events, once the page log has written what waits."""
        while self.service.log.waiting:
            self.service.log.flush()
        with self.service.log.writing:
            return self.store.events()

    def close(self) -> None:
        self.service.close()
        self.store.close()


@pytest.fixture
def shop(saved, tmp_path):
    made = Shop(saved, tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def open_shop(saved, tmp_path_factory):
    """One for tests that leave nothing behind."""
    made = Shop(saved, tmp_path_factory.mktemp("open"))
    yield made
    made.close()


def bodies(shop: Shop) -> dict[str, dict]:
    return {path: {name: shop.item if value == "ITEM" else value for name, value in body.items()} for path, body in PAGES.items()}


# Pages


def test_every_surface_answers_with_a_page_and_the_log_keeps_what_was_shown(shop):
    for path, body in bodies(shop).items():
        said = shop.post(path, body | {"k": 5, "offset": 5, "user_id": "anna", "session_id": "s1", "device": "phone", "facets": ["brand", "price"], "explain": True}).json()
        surface = {"/search": "search", "/recommend": "home", "/similar": "similar"}[path]
        log = shop.kept().query("request_id == @said['request_id']").set_index("event_id")
        shown = log[log["kind"] == "impression"].sort_values("position")
        assert [item["position"] for item in said["items"]] == [6, 7, 8, 9, 10] == shown["position"].tolist()
        assert [item["item_id"] for item in said["items"]] == shown["item_id"].tolist()
        assert shown["propensity"].tolist() == [item["propensity"] for item in said["items"]]
        assert set(shown["policy"]) == {said["policy"]} == {shop.service.engine.version}
        assert set(log["surface"]) == {surface} and set(log["device"]) == {"phone"} and set(log["session_id"]) == {"s1"}
        assert set(log["user_id"]) == {shop.store.pseudonym("anna")} and "anna" not in log.to_string()
        assert (log["kind"] == "search").sum() == (surface == "search")
        assert said["total"] >= 10 and {"brand", "price"} == set(said["facets"])
        for item in said["items"]:
            assert sum(why["contribution"] for why in item["reasons"]) == pytest.approx(item["score"], abs=1e-6)


def test_pages_of_one_query_follow_each_other_without_overlap(open_shop):
    pages = [open_shop.post("/search", {"query": "shoes", "k": 10, "offset": offset}).json() for offset in (0, 10)]
    ids = [item["item_id"] for page in pages for item in page["items"]]
    assert len(ids) == len(set(ids)) == 20 and pages[0]["request_id"] != pages[1]["request_id"]


def test_a_facet_can_be_sent_back_as_a_filter(open_shop):
    first = open_shop.post("/search", {"query": "shoes", "facets": ["price", "brand"]}).json()
    price, brand = (first["facets"][name][0] for name in ("price", "brand"))
    cheap = open_shop.post("/search", {"query": "shoes", "k": 100, "filters": {"price": price["value"]}}).json()
    assert cheap["items"] and all(price["value"]["low"] <= item["price"] <= price["value"]["high"] for item in cheap["items"])
    of_brand = open_shop.post("/search", {"query": "shoes", "k": 100, "filters": {"brand": [brand["value"]]}}).json()
    assert {item["brand"] for item in of_brand["items"]} == {brand["value"]}


def test_exploring_pages_are_drawn_anew_and_their_propensities_logged(shop):
    pages = [shop.post("/search", {"query": "shoes", "k": 5, "explore": 1.0}).json() for _ in range(8)]
    assert len({tuple(item["item_id"] for item in page["items"]) for page in pages}) > 1
    shown = shop.kept().query("kind == 'impression'")
    assert shown["propensity"].between(0, 1, inclusive="right").all() and (shown["propensity"] < 1).any()


def test_pictures_are_there_for_everybody_and_nothing_else_of_the_disk(open_shop, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.svg").write_text("<svg/>")
    (tmp_path / "secret").write_text("secret")
    client = TestClient(create_app(open_shop.service, Keys({}), images=tmp_path / "pictures"), base_url="http://127.0.0.1")
    assert "cache-control" not in client.get("/images/a.svg").headers and client.get("/images/a.svg").text == "<svg/>" and client.get("/images/a.svg").headers["content-security-policy"].startswith("default-src 'none'")
    assert {client.get(f"/images/{path}").status_code for path in ("b.svg", "../secret", "%2e%2e/secret", "..%2fsecret", "")} <= {401, 404}


def test_suggestions_begin_as_typed(open_shop):
    found = open_shop.post("/suggest", {"prefix": "sho", "k": 3}).json()["suggestions"]
    assert 0 < len(found) <= 3 and all("sho" in text.casefold() for text in found)


def test_known_users_are_named_to_their_own_shop_only(open_shop):
    users = open_shop.client.get("/users").json()["users"]
    assert 0 < len(users) <= 50 and all(open_shop.store.pseudonym(user) in open_shop.service.engine.users for user in users)
    assert open_shop.client.get("/users", headers=open_shop.head(open_shop.other)).json() == {"users": []}


# Events


def test_an_event_changes_the_next_page_and_the_delay_is_measured(shop):
    before = shop.post("/recommend", {"user_id": "anna", "k": 50}).json()
    bought = [shop.click(number=number, kind="purchase", item_id=item["item_id"], price=9.5) for number, item in enumerate(before["items"][20:24])]
    assert shop.post("/events", bought).json() == {"kept": 4, "known": 0}
    after = shop.post("/recommend", {"user_id": "anna", "k": 50}).json()
    assert [item["item_id"] for item in before["items"]] != [item["item_id"] for item in after["items"]]
    assert shop.post("/recommend", {"k": 50}).json()["items"] == before["items"]  # nobody else's page changed
    assert shop.service.meters.registry.get_sample_value("ecomrec_event_visible_seconds_count") == 1


def test_an_event_is_kept_once_however_often_it_is_sent(shop):
    events = [shop.click(number=number) for number in (1, 2, 2)]
    assert shop.post("/events", events).json() == {"kept": 2, "known": 1}
    assert shop.post("/events", events[:1]).json() == {"kept": 0, "known": 1}
    assert sorted(shop.kept()["event_id"]) == ["e1", "e2"]


def test_an_event_of_a_clock_that_is_ahead_is_known_to_the_next_page_and_kept_as_it_was_sent(shop):
    ahead = time.time_ns() // 1_000_000 + 120_000
    assert shop.post("/events", [shop.click("anna", ts=ahead)]).json()["kept"] == 1
    for again in (False, True):
        if again:
            assert shop.post("/reload").status_code == 200
        told = shop.service.engine.memory.histories(shop.store.pseudonym("anna"), time.time_ns() // 1_000_000)
        assert (told["item"] >= 0).sum() == 1 and shop.kept()["ts"].tolist() == [ahead]


def test_ubi_is_read_like_a_ubi_log(shop):
    event = {"action_name": "add_to_cart", "query_id": "q1", "client_id": "anna", "session_id": "s1", "timestamp": "2025-11-03T10:15:00.250Z", "event_attributes": {"object": {"object_id": shop.item, "extra": [1, {"a": None}]}, "position": {"ordinal": 4}}}
    query = {"query_id": "q1", "client_id": "anna", "session_id": "s1", "user_query": "跑步鞋", "timestamp": 1_762_164_899_000, "query_attributes": {}}
    assert shop.post("/events", event).json() == {"kept": 1, "known": 0}
    assert shop.post("/events", [query, event]).json() == {"kept": 1, "known": 1}
    log = shop.kept().set_index("kind")
    assert log.loc["cart", ["item_id", "position", "ts", "request_id"]].tolist() == [shop.item, 5, 1_762_164_900_250, "q1"]
    assert log.loc["search", "query"] == "跑步鞋" and set(log["user_id"]) == {shop.store.pseudonym("anna")}


def test_nobody_can_try_guesses_on_the_id_of_a_ubi_document(shop):
    document = {"timestamp": "2025-11-03T10:15:00Z", "query_id": "q1", "client_id": "anna@example.com", "user_query": "a secret wish"}
    assert [shop.post("/events", document).json() for _ in range(2)] == [{"kept": 1, "known": 0}, {"kept": 0, "known": 1}]
    assert shop.post("/events", [shop.click(event_id="ubi-of-their-own")]).json()["kept"] == 1
    own, name = sorted(shop.kept()["event_id"], key=len)
    assert own == "ubi-of-their-own"
    told = UbiSaid(**document).row()["event_id"]  # what everybody can compute
    assert name == f"ubi-{shop.store.keyring.pseudonym(told, 'event')}" and told not in name


@pytest.mark.parametrize(("change", "field"), [
    ({"action_name": "wave"}, "0.action_name"), ({"timestamp": "yesterday"}, "0.timestamp"), ({"timestamp": 5}, "0.timestamp"), ({"timestamp": True}, "0.timestamp"),
    ({"event_attributes": {"object": {"object_id": 5}}}, "0.event_attributes"), ({"event_attributes": {"object": "x"}}, "0.item_id"), ({"event_attributes": None}, "0.item_id"),
    ({"event_attributes": {"object": {"object_id": "a"}, "position": {"ordinal": -5}}}, "0.event_attributes"), ({"event_attributes": {"object": {"object_id": "a"}, "position": {"ordinal": True}}}, "0.event_attributes"), ({"query_id": ""}, "0.query_id"), ({"clicked": 1}, "0.clicked"),
    ({"timestamp": "9999-12-31T23:59:59Z"}, "0.timestamp"), ({"timestamp": "0001-01-01T00:00:00+14:00"}, "0.timestamp"), ({"event_attributes": {"object": {"object_id": "a\x00b"}}}, "0.event_attributes"),
])
def test_a_fault_of_a_ubi_document_is_named(open_shop, change, field):
    good = {"action_name": "item_click", "query_id": "q1", "timestamp": "2025-11-03T10:15:00Z", "event_attributes": {"object": {"object_id": "a"}}}
    answer = open_shop.post("/events", [good | change])
    assert answer.status_code == 422 and answer.json()["field"] == field and answer.json()["error"], answer.json()


def test_a_ubi_document_holds_no_infinity(open_shop):
    answer = open_shop.client.post("/events", content=b'{"query_id": "q1", "timestamp": "2025-11-03T10:15:00Z", "query_attributes": {"weights": [1, {"a": 1e999}]}}', headers={"content-type": "application/json"})
    assert answer.status_code == 422 and answer.json()["field"] == "0.query_attributes"


def test_a_search_for_nothing_is_logged_as_the_front_page_that_it_is(shop):
    for query in ("", "  ", "!?"):
        assert shop.post("/search", {"query": query, "k": 2}).json()["note"]
    assert set(shop.kept()["surface"]) == {"home"} and set(shop.kept()["kind"]) == {"impression"}


def test_notes_and_reasons_are_in_the_language_that_was_asked_for(open_shop):
    said = open_shop.post("/search", {"query": "runing shoes", "language": "zh", "explain": True, "k": 3}).json()
    assert "已显示" in said["note"] and any("含有" in why["text"] for item in said["items"] for why in item["reasons"])


def test_one_bad_event_keeps_all_of_a_batch_out(shop):
    answer = shop.post("/events", [shop.click(number=1), shop.click(number=2, item_id=None)])
    assert answer.status_code == 422 and answer.json()["field"] == "1.item_id"
    future = shop.post("/events", [shop.click(number=3, ts=time.time_ns() // 1_000_000 + 3_600_000)])
    assert future.status_code == 422 and "future" in future.json()["error"]
    assert shop.kept().empty


def test_what_happened_is_known_after_a_restart(saved, tmp_path):
    first = Shop(saved, tmp_path)
    first.post("/events", [first.click(number=number, kind="purchase") for number in range(3)])
    page = first.post("/recommend", {"user_id": "anna", "k": 20}).json()["items"]
    first.close()
    second = Shop(saved, tmp_path)
    assert second.post("/recommend", {"user_id": "anna", "k": 20}).json()["items"] == page
    second.close()


# Who


def test_without_a_key_only_the_page_and_its_health_are_open(open_shop):
    bare = TestClient(open_shop.app, base_url="http://127.0.0.1")
    for path in ("/", "/shop.js", "/shop.css", "/healthz", "/readyz", "/openapi.json"):
        assert bare.get(path).status_code == 200, path
    closed = [("POST", path) for path in ("/search", "/recommend", "/similar", "/suggest", "/events", "/reload")] + [("DELETE", "/users/anna"), ("GET", "/users"), ("GET", "/metrics"), ("POST", "/"), ("GET", "/nothing"), ("GET", "/../events.sqlite")]
    for method, path in closed:
        for head in ({}, open_shop.head("wrong"), open_shop.head(""), {"Authorization": f"Basic {open_shop.key}"}, {"Authorization": open_shop.key}, open_shop.head(open_shop.key[:-1])):
            answer = bare.request(method, path, headers=head, content=b"{}")
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (method, path, head)
            assert set(answer.json()) == {"error"}


def test_another_key_neither_reads_nor_erases_a_user_of_the_same_name(shop):
    shop.post("/events", [shop.click("anna", 1, session_id="s", request_id="r")])
    assert shop.post("/events", [shop.click("anna", 1, session_id="s", request_id="r")], key=shop.other).json() == {"kept": 1, "known": 0}  # nor takes her event's id
    log = shop.kept()
    assert log["user_id"].nunique() == log["session_id"].nunique() == log["request_id"].nunique() == 2
    page = shop.post("/search", {"query": "shoes", "k": 1}, key=shop.other).json()
    shop.post("/events", [shop.click("anna", 2, request_id=page["request_id"])], key=shop.other)
    assert shop.kept()["request_id"].str.endswith(page["request_id"]).sum() == 3 and shop.kept()["request_id"].nunique() == 3  # search, impression, click: one page
    for key in (shop.other, shop.keys.add("chief", tenant="acme", admin=True)):
        assert shop.client.get("/users", headers=shop.head(key)).json() == {"users": []}
    for key in (None, shop.other):
        shop.post("/recommend", {"user_id": "anna"}, key=key)
    assert shop.client.delete("/users/anna", headers=shop.head(shop.other)).json()["rows"] > 1
    assert (shop.kept()["user_id"] == shop.store.pseudonym("anna")).sum() >= 1
    assert shop.client.delete("/users/anna", headers=shop.head(shop.other)).status_code == 404
    known = shop.client.get("/users").json()["users"][0]
    assert shop.client.delete(f"/users/{known}", headers=shop.head(shop.other)).status_code == 404
    assert shop.store.pseudonym(known) in shop.service.engine.users
    for forged in ("acme\x1fanna", "shop\x1fanna"):
        assert shop.post("/recommend", {"user_id": forged}).status_code == 422


def test_a_key_that_is_not_an_admins_leaves_the_model_alone(open_shop):
    assert open_shop.post("/reload", key=open_shop.other).status_code == 403
    assert open_shop.post("/reload").json()["policy"] == open_shop.service.engine.version


def test_a_flood_is_refused_and_told_when_to_come_again(saved, tmp_path):
    shop = Shop(saved, tmp_path, rate=0.01)
    shop.app.user_middleware  # built at the first request
    answers = [shop.post("/suggest", {"prefix": "a"}) for _ in range(20)]
    assert [answer.status_code for answer in answers] == [200] + [429] * 19
    assert int(answers[-1].headers["retry-after"]) >= 50 and answers[-1].json()["error"]
    assert shop.post("/suggest", {"prefix": "a"}, key=shop.other).status_code == 200  # the flood is not theirs
    wrong = [TestClient(shop.app, base_url="http://127.0.0.1").post("/search", headers=shop.head("guess")).status_code for _ in range(5)]
    assert wrong == [401] + [429] * 4
    shop.close()


def test_a_page_elsewhere_cannot_ask_under_its_own_name(open_shop):
    app = create_app(open_shop.service, None, hosts=["127.0.0.1", "localhost"])
    assert TestClient(app, base_url="http://127.0.0.1").get("/users").status_code == 200
    assert TestClient(app, base_url="http://shop.evil.example").get("/users").status_code == 400
    client = TestClient(app, base_url="http://127.0.0.1")
    assert client.post("/search", content=b'{"query": "a"}', headers={"Content-Type": "text/plain"}).status_code == 422
    for head in ({"Origin": "http://evil.example"}, {"Origin": "http://127.0.0.1:8080"}, {"Origin": "null"}, {"Origin": "http://["}, {"Sec-Fetch-Site": "cross-site"}):
        for ask in (partial(client.post, "/search", json={"query": "a"}), partial(client.post, "/reload"), partial(client.delete, "/users/anna")):
            answer = ask(headers=head)
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert client.post("/search", json={"query": "a"}, headers={"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_erasure_takes_everything_and_is_remembered(saved, tmp_path):
    shop = Shop(saved, tmp_path)
    known = shop.client.get("/users").json()["users"][0]
    hers, stranger = shop.post("/recommend", {"user_id": known, "k": 20}).json()["items"], shop.post("/recommend", {"k": 20}).json()["items"]
    shop.post("/events", [shop.click(known, 1), shop.click("bob", 2)])
    shop.post("/search", {"query": "shoes", "user_id": known})  # what she typed is sealed under a key of her own
    shop.kept()
    waits = shop.post("/search", {"query": "hat", "user_id": known, "k": 3}).json()["items"]
    done = shop.client.delete(f"/users/{known}").json()
    assert done["rows"] > 1 + len(waits) and done["key_destroyed"] and done["forgotten"]
    heard = io.StringIO()
    log_to(heard)
    for _ in range(2):
        assert shop.store.pseudonym(known) not in set(shop.kept()["user_id"].dropna())
        assert shop.store.pseudonym("bob") in set(shop.kept()["user_id"])
        assert known not in shop.client.get("/users").json()["users"]
        assert hers != stranger and shop.post("/recommend", {"user_id": known, "k": 20}).json()["items"] == stranger
        shop.client.delete(f"/users/{known}")
        assert shop.post("/reload").status_code == 200  # the saved model knows her still
    assert known not in (tmp_path / "erased.json").read_text()
    assert [line["users"] for line in map(json.loads, heard.getvalue().splitlines()) if line["event"] == "model still holds erased users"] == [1, 1]
    shop.close()


@pytest.mark.parametrize("back", ["before", "after"])
def test_erased_while_a_model_loads_is_erased_and_whoever_comes_back_is_somebody_new(saved, tmp_path, back):
    opening, go_on, opened = threading.Event(), threading.Event(), []

    def load() -> Engine:
        engine = Engine.load(saved)
        opened.append(engine)
        if len(opened) > 1:
            opening.set()
            go_on.wait(30)
        return engine

    shop = Shop(saved, tmp_path, load=load)
    known = shop.client.get("/users").json()["users"][0]
    shop.post("/events", [shop.click(known, 1)])
    reloading = threading.Thread(target=lambda: shop.post("/reload"))
    reloading.start()
    assert opening.wait(30)
    assert shop.client.delete(f"/users/{known}").json()["forgotten"]
    if back == "before":
        shop.post("/events", [shop.click(known, 2)])
    go_on.set()
    reloading.join()
    assert shop.service.engine is opened[1] and (shop.store.pseudonym(known) in opened[1].users) == (back == "before")
    shop.post("/events", [shop.click(known, 2)])  # sent again, it is the same one
    told = shop.service.engine.memory.histories(shop.store.pseudonym(known), time.time_ns())
    assert len(told) == 1 and len(shop.kept().query("user_id.notna()")) == 1
    shop.close()


def test_after_an_erasure_the_file_is_written_anew_and_until_that_succeeds(saved, tmp_path, monkeypatch):
    erased, done, heard = threading.Event(), threading.Event(), io.StringIO()
    ways = itertools.chain([lambda store: 1 / 0, lambda store: False], itertools.repeat(Store.overwrite))

    def overwrite(store: Store) -> bool:
        erased.wait(60)
        if found := next(ways)(store):
            done.set()
        return found

    monkeypatch.setattr(module, "OVERWRITING", 0.01)
    monkeypatch.setattr(Store, "overwrite", overwrite)
    removed = lambda: sqlite3.connect(tmp_path / "events.sqlite").execute("PRAGMA user_version").fetchone()[0]
    log_to(heard)
    shop = Shop(saved, tmp_path)
    shop.post("/events", [shop.click("anna")])
    assert removed() == 0 and shop.client.delete("/users/anna").json()["rows"] == 1 and removed() != 0
    erased.set()
    assert done.wait(60) and removed() == 0
    shop.close()
    assert [line.get("type") for line in map(json.loads, heard.getvalue().splitlines()) if line["event"] == "file not written anew"] == ["ZeroDivisionError", None]


@pytest.mark.parametrize("told", ["", "[", "\xff", "null", "7", "[1]", '"abc"', '["u0"]', '{"anna": 1}', '{"u%s": true}' % ("0" * 32)])
def test_a_damaged_list_of_who_was_erased_is_named(saved, shop, tmp_path, told):
    (tmp_path / "list.json").write_bytes(told.encode("latin-1"))
    with pytest.raises(ServeError, match="list.json: is not the list of who was erased"):
        Service(lambda: Engine.load(saved), shop.store, tmp_path / "list.json")


def test_a_model_of_the_stores_own_log_knows_and_forgets_the_same_shoppers(saved, tmp_path):
    first = Shop(saved, tmp_path)
    first.post("/events", [first.click("anna", number, kind="purchase") for number in range(3)] + [first.click("bob", 9)])
    log = pd.read_parquet(first.store.export(tmp_path / "log.parquet"))
    first.close()
    own = tmp_path / "own"
    Engine.from_products(Engine.load(saved).products, recipe=Recipe(candidates=WORDS, order=WORDS), events=log).save(own)
    shop = Shop(own, tmp_path)
    anna, forever = shop.store.pseudonym("anna"), time.time_ns()
    assert set(shop.service.engine.users) == {anna, shop.store.pseudonym("bob")} and len(shop.service.engine.memory.histories(anna, forever)) == 3  # each once
    assert not shop.client.get("/users").json()["users"]  # nobody's name is known
    shop.store.derived("model", own, until=shop.service.engine.until)
    done = shop.client.delete("/users/anna").json()
    assert done["forgotten"] and str(own) in done["derived"] and shop.service.engine.users == [shop.store.pseudonym("bob")]
    shop.post("/events", [shop.click("anna", 10)])  # back again, and a model of that knows her
    Engine.from_products(Engine.load(saved).products, recipe=Recipe(candidates=WORDS, order=WORDS), events=pd.read_parquet(shop.store.export(tmp_path / "log.parquet"))).save(own)
    for _ in range(2):
        assert shop.post("/reload").status_code == 200
        assert set(shop.service.engine.users) == {anna, shop.store.pseudonym("bob")} and len(shop.service.engine.memory.histories(anna, forever)) == 1
    shop.close()


def test_what_a_model_holds_and_tells_of_nobody_is_forgotten_too(saved, tmp_path):
    first = Shop(saved, tmp_path)
    first.post("/events", [first.click("anna", 1, kind="rating", stars=5), first.click("bob", 2)])
    old = pd.read_parquet(first.store.export(tmp_path / "log.parquet"))
    own, anna, bob = tmp_path / "own", first.store.pseudonym("anna"), first.store.pseudonym("bob")
    made_of = lambda log: Engine.from_products(Engine.load(saved).products, recipe=Recipe(candidates=WORDS, order=WORDS), events=log).save(own)
    made_of(old)
    first.store.erase(anna)  # the model alone holds her now
    first.store.derived("model", own, until=int(old["ts"].max()))
    first.close()
    shop, heard = Shop(own, tmp_path), io.StringIO()
    held = lambda: set(shop.service.engine.memory.whole_log()["user_id"].dropna())
    assert held() == {anna, bob} and anna not in shop.service.engine.users
    done = shop.client.delete("/users/anna").json()
    assert done["forgotten"] and done["rows"] == 0 and str(own) in done["derived"]
    assert shop.client.delete("/users/anna").status_code == 404 and held() == {bob}
    log_to(heard)
    shop.post("/events", [shop.click("anna", 3)])
    new = pd.read_parquet(shop.store.export(tmp_path / "log.parquet"))
    for log, left in ((old, {bob}), (pd.concat([old[old["user_id"] == anna], new]), {bob}), (new, {anna, bob})):
        made_of(log)
        assert shop.post("/reload").status_code == 200 and held() == left
    assert [line["users"] for line in map(json.loads, heard.getvalue().splitlines()) if line["event"] == "model still holds erased users"] == [1, 1]
    shop.close()


def test_whoever_joins_again_is_known_to_the_next_model(saved, tmp_path):
    shop, own = Shop(saved, tmp_path), tmp_path / "own"
    anna = shop.store.pseudonym("anna")
    shop.post("/events", [shop.click("anna", 1), shop.click("bob", 9)])
    assert shop.client.delete("/users/anna").json()["rows"] == 1
    old = pd.read_parquet(shop.store.export(tmp_path / "log.parquet"))
    shop.post("/events", [shop.click("anna", 2)])
    new = pd.read_parquet(shop.store.export(tmp_path / "log.parquet"))
    for joined, known, log in itertools.chain(*([(1, False, log), (None, False, log), (time.time_ns() // 1_000_000, True, log)] for log in (old, new))):
        shop.store.put_users(pd.DataFrame({"user_id": [anna], "age": [30], "joined_ts": [joined]}))
        Engine.from_products(Engine.load(saved).products, recipe=Recipe(candidates=WORDS, order=WORDS), users=shop.store.users(), events=log).save(own)
        shop.service.load = lambda: Engine.load(own)
        assert shop.post("/reload").status_code == 200 and (anna in shop.service.engine.memory.people) == known
    shop.close()


def test_what_comes_after_an_erasure_is_known_although_a_model_was_just_reading_it(saved, tmp_path, monkeypatch):
    shop, reading, go_on, acts = Shop(saved, tmp_path), threading.Event(), threading.Event(), Store.acts
    anna = shop.store.pseudonym("anna")
    shop.post("/events", [shop.click("anna", 1)])

    def held_up(store: Store, since: int):
        reading.set()
        go_on.wait(60)
        return acts(store, since)

    monkeypatch.setattr(Store, "acts", held_up)
    with ThreadPoolExecutor(1) as beside:
        reloading = beside.submit(shop.post, "/reload")
        assert reading.wait(60) and shop.client.delete("/users/anna").json()["rows"] == 1
        shop.post("/events", [shop.click("anna", 2)])
        go_on.set()
        assert reloading.result().status_code == 200
    assert len(shop.service.engine.memory.histories(anna, time.time_ns())) == 1
    shop.close()


def test_whoever_is_known_to_the_model_alone_is_told_of_it(saved, tmp_path):
    shop = Shop(saved, tmp_path)
    shop.store.derived("model", saved, until=shop.service.engine.until)
    known = shop.client.get("/users").json()["users"][0]
    assert shop.client.delete(f"/users/{known}").json() == {"rows": 0, "key_destroyed": False, "forgotten": True, "derived": [str(saved)]}
    shop.store.derived("model", saved, until=shop.service.engine.until)  # opened again, it is the same model
    assert [made.forgotten for made in shop.store.artefacts()] == [1]
    shop.close()


def test_an_erasure_needs_no_file_of_the_model(saved, tmp_path):
    shop = Shop(shutil.copytree(saved, tmp_path / "model"), tmp_path)
    known = shop.client.get("/users").json()["users"][0]
    shutil.rmtree(tmp_path / "model")
    assert shop.client.delete(f"/users/{known}").json()["forgotten"] and shop.client.delete(f"/users/{known}").status_code == 404
    shop.close()


def test_whom_a_model_knew_that_came_in_during_the_erasure_stays_erased(saved, tmp_path, monkeypatch):
    shop = Shop(saved, tmp_path)
    known, erase = shop.client.get("/users").json()["users"][0], shop.store.erase
    engine = Engine.load(saved)
    shop.service.load = lambda: Engine.from_products(engine.products, recipe=Recipe(candidates=WORDS, order=WORDS))
    assert shop.post("/reload").status_code == 200 and not shop.service.engine.users
    shop.service.load = lambda: Engine.load(saved)
    monkeypatch.setattr(shop.store, "erase", lambda *args, **more: (shop.service.reload(), erase(*args, **more))[1])
    assert shop.client.delete(f"/users/{known}").status_code == 404  # when it was asked nobody knew her
    assert shop.post("/reload").status_code == 200 and shop.store.pseudonym(known) not in shop.service.engine.users
    shop.close()


def test_counters_are_made_anew_after_midnight(shop, monkeypatch):
    shop.post("/events", [shop.click(f"u{number}", number, kind="purchase") for number in range(9)])
    told = shop.post("/recommend", {"k": 30}).json()["items"]
    shop.service.read_counters()
    row, memory = int(shop.service.engine.catalogue.rows.get_loc(shop.item)), shop.service.engine.memory
    before = memory.counters["popularity"][row]
    tomorrow = time.time_ns() // 1_000_000 + 86_400_000
    monkeypatch.setattr("ecomrec.serve.service._this_moment", lambda: tomorrow)
    shop.kept()
    shop.service.read_counters()
    assert memory.counters["popularity"][row] > before and not memory.later
    assert shop.post("/recommend", {"k": 30}).json()["items"][0]["item_id"] == shop.item != told[0]["item_id"]


def test_erasures_hold_up_no_event(shop, monkeypatch):
    begun, go_on, erase = threading.Event(), threading.Event(), shop.store.erase
    monkeypatch.setattr(shop.store, "erase", lambda *args, **more: (begun.set(), go_on.wait(60), erase(*args, **more))[2])
    erasing = [threading.Thread(target=lambda name=name: shop.client.delete(f"/users/{name}")) for name in ("anna", "bob", "carl")]
    for thread in erasing:
        thread.start()
    assert begun.wait(60)
    assert shop.post("/events", [shop.click("dora")]).json() == {"kept": 1, "known": 0}
    go_on.set()
    for thread in erasing:
        thread.join()


def test_names_with_slashes_and_letters_of_any_kind_can_be_erased(shop):
    for number, name in enumerate(("a/b", "跑 步", "a?b#c", "é" * 60)):
        shop.post("/events", [shop.click(name, number)])
        assert shop.client.delete(f"/users/{quote(name, safe='')}").json()["rows"] == 1, name


# What is refused


@pytest.mark.parametrize(("path", "body", "status", "field"), [
    ("/search", {"query": "x" * 513}, 422, "query"), ("/search", {"query": "a", "k": 101}, 422, "k"), ("/search", {"query": "a", "k": 0}, 422, "k"), ("/search", {"query": "a", "k": "5"}, 422, "k"),
    ("/search", {"query": "a", "k": 5.5}, 422, "k"), ("/search", {"query": "a", "k": True}, 422, "k"), ("/search", {"query": None}, 422, "query"), ("/search", {}, 422, "query"), ("/search", [], 422, "body"),
    ("/search", {"query": "a", "nope": 1}, 422, "nope"), ("/search", {"query": "a", "filters": {"colour": "red"}}, 422, "filters"), ("/search", {"query": "a", "filters": {"price": {"low": 5, "high": 1}}}, 422, "filters"),
    ("/search", {"query": "a", "filters": {"price": "cheap"}}, 422, "filters"), ("/search", {"query": "a", "sort": "title"}, 422, "sort"), ("/search", {"query": "a", "facets": ["colour"]}, 422, "facets"),
    ("/search", {"query": "a\x00b"}, 422, "query"), ("/search", {"query": "a", "user_id": "a\nb"}, 422, "user_id"), ("/search", {"query": "a", "explore": -1}, 422, "explore"), ("/search", {"query": "a", "k": 10**30}, 422, "k"),
    ("/similar", {"item_id": "car"}, 404, "item_id"), ("/similar", {}, 422, "item_id"), ("/events", [], 422, "body"), ("/events", {}, 422, None), ("/events", [{"event_id": "1", "kind": "wave"}], 422, "0.kind"),
    ("/events", [{"event_id": "1", "kind": "click", "item_id": "a", "price": -1}], 422, "0.price"), ("/events", [1], 422, None), ("/events", "x", 422, None), ("/suggest", {"prefix": 5}, 422, "prefix"),
    ("/search", {"query": "a", "diversity": 0.5}, 422, "diversity"), ("/search", {"query": "shoes", "explore": 1e-9}, 422, "explore"), ("/search", {"query": "a", "diversity": 0.5, "explore": 0.5}, 422, None),
])
def test_what_may_not_be_asked_is_refused_with_its_name(open_shop, path, body, status, field):
    answer = open_shop.post(path, body)
    assert answer.status_code == status and answer.json()["error"], answer.text
    assert field is None or answer.json()["field"] == field
    assert "Traceback" not in answer.text and ".py" not in answer.text and "pydantic" not in answer.text


@pytest.mark.parametrize("body", [b'{"query": NaN}', b'{"query": "a", "explore": Infinity}', b'{"query": "a", "explore": 1e999}', b'{"query": "a"', b"\xff\xfe", b'{"query": "\\ud800"}', b"", b'{"query": "a", "filters": ' + b'{"a":' * 17 + b"1" + b"}" * 18])
def test_what_is_no_json_is_refused(open_shop, body):
    answer = open_shop.client.post("/search", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["error"]


def test_bodies_are_refused_from_one_byte_above_the_limit_also_when_they_do_not_say_how_long_they_are(open_shop):
    def of(size: int) -> bytes:
        return b'{"query": "a"' + b" " * (size - 14) + b"}"

    pieces = lambda body: (body[start : start + 1000] for start in range(0, len(body), 1000))
    head = {"Content-Type": "application/json"}
    assert open_shop.client.post("/search", content=of(MOST_BYTES), headers=head).status_code == 200
    assert open_shop.client.post("/search", content=pieces(of(MOST_BYTES)), headers=head).status_code == 200
    for body in (of(MOST_BYTES + 1), pieces(of(MOST_BYTES + 1)), pieces(of(10 * MOST_BYTES))):
        answer = open_shop.client.post("/search", content=body, headers=head)
        assert answer.status_code == 413 and "65536" in answer.json()["error"]


HOSTILE = ["'; DROP TABLE events; --", "\" OR 1=1", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "../../../../etc/passwd", "..\\..\\windows", "%00", "\x01\x02\x1b[31m", "\u202eabc\u202d", "\u200b\u200d\ufeff", "𝕏𐍈💣👩‍👩‍👧‍👦", "a\u0300" * 100,
           "{{7*7}}", "${jndi:ldap://x}", "\r\nX-Injected: 1", "`rm -rf /`", "' || pg_sleep(10) || '", "\uffff\ufffe", "ﷺ" * 50, "跑" * 512, "/" * 300, "(" * 200, "*", "a" * 512, "\t \u3000", "None", "null", "-1", "1e309", "__proto__", "نص عربي"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_only_text(open_shop, text):
    name = "".join(letter for letter in text if letter >= " " and letter != "\x7f")[:128]
    asks = [("/search", {"query": text, "user_id": name, "session_id": name, "explain": True}), ("/search", {"query": "a", "filters": {"brand": name}}), ("/suggest", {"prefix": text}), ("/similar", {"item_id": name}),
            ("/events", [{"event_id": name, "kind": "click", "item_id": name, "user_id": name, "session_id": name, "query": text}])]
    for path, body in asks:
        answer = open_shop.post(path, body)
        assert answer.status_code in ((404,) if path == "/similar" else (200,)), (path, answer.text)
        assert "x-injected" not in answer.headers and answer.headers["content-type"] == "application/json"
    log = open_shop.kept()
    assert name in set(log["item_id"].dropna()) and text in set(log["query"].dropna())
    if "%" not in name and ".." not in name:  # which the client would decode twice, or resolve
        assert open_shop.client.delete(f"/users/{quote(name, safe='')}").json()["rows"] >= 1


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=512), k=st.integers(1, 100), offset=st.integers(0, 500))
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_any_query_gets_a_page(open_shop, text, k, offset):
    answer = open_shop.post("/search", {"query": text, "k": k, "offset": offset, "explain": True})
    assert answer.status_code == 200 and len(answer.json()["items"]) <= k


def test_every_answer_has_the_head_that_browsers_need_and_no_cookie(open_shop):
    for answer in (open_shop.client.get("/"), open_shop.post("/search", {"query": "a"}), open_shop.post("/search", {}), open_shop.client.get("/nothing"), open_shop.post("/search", {}, key="x"), open_shop.client.get("/shop.js")):
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["frame-ancestors"] == "'none'" and "unsafe" not in str(policy)
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
        assert "set-cookie" not in answer.headers and "server" not in answer.headers


def test_methods_and_paths_that_do_not_exist_are_said_in_the_same_form(open_shop):
    for method, path, status in (("GET", "/search", 405), ("PUT", "/events", 405), ("GET", "/nothing", 404), ("GET", "/..%2f..%2fservice.py", 404), ("GET", "/%2e%2e/service.py", 404), ("POST", "/", 405)):
        answer = open_shop.client.request(method, path)
        assert answer.status_code == status and set(answer.json()) == {"error"}, (method, path, answer.status_code)


# What the log knows


def test_logs_and_numbers_hold_nothing_about_anybody(saved, tmp_path):
    shop, heard, secret = Shop(saved, tmp_path), io.StringIO(), "Zebulon-Quixote"
    log_to(heard)
    shop.post("/search", {"query": secret, "user_id": secret, "session_id": secret, "device": "x"})
    shop.post("/search", {"query": secret, secret: 1})
    shop.post("/events", [shop.click(secret, query=secret)])
    shop.post("/similar", {"item_id": secret})
    shop.client.delete(f"/users/{secret}")
    shop.client.get(f"/{secret}")
    shop.post("/search", {"query": "a"}, key=secret)
    shop.service.engine.search = lambda *args, **options: {}[secret]
    answer = shop.post("/search", {"query": secret, "k": 3})
    assert answer.status_code == 500 and set(answer.json()) == {"error", "id"}
    numbers = shop.client.get("/metrics").text
    line = json.loads(heard.getvalue().splitlines()[-1])
    assert line["id"] == answer.json()["id"] and line["type"] == "KeyError" and line["places"]
    for text in (heard.getvalue(), numbers, answer.text):
        assert secret not in text and secret.lower() not in text.lower() and shop.key not in text and shop.store.pseudonym(secret) not in text
    assert 'ecomrec_requests_total{endpoint="/search",status="500"} 1.0' in numbers
    shop.close()


# When things break


class Broken(Store):
    """A store that can be gone, or full."""

    error = None

    def submit(self, events) -> Future:
        if isinstance(self.error, StoreFull):
            raise self.error
        if self.error:
            failed = Future()
            failed.set_exception(self.error)
            return failed
        return super().submit(events)

    def erase(self, user_id, known=None, overwrite=True):
        if self.error:
            raise self.error
        return super().erase(user_id, known, overwrite)


@pytest.mark.parametrize("error", [StoreGone("gone"), StoreFull("full")])
def test_pages_go_on_without_the_store_and_events_are_refused_until_it_is_back(saved, tmp_path, error):
    shop = Shop(saved, tmp_path, store=Broken)
    shop.service.log.most, shop.service.log.pause = 30, 0.01
    shop.store.error = error
    pages = [shop.post("/search", {"query": "shoes", "k": 9}) for _ in range(5)]
    assert [page.status_code for page in pages] == [200] * 5
    refused = shop.post("/events", [shop.click()])
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert shop.client.delete("/users/anna").status_code == 503
    assert shop.client.get("/readyz").status_code == 200
    shop.store.error = None
    shop.kept()
    dropped = shop.service.log.dropped
    shown = (shop.kept()["kind"].isin(["search", "impression"])).sum()
    assert 0 < dropped < 50 and shown + dropped == 50
    assert f"ecomrec_dropped_rows {dropped}.0" in shop.client.get("/metrics").text
    assert shop.post("/events", [shop.click()]).json() == {"kept": 1, "known": 0}
    shop.close()


def test_too_many_at_once_hear_when_to_come_again(saved, tmp_path):
    shop = Shop(saved, tmp_path, threads=1, cache=0)
    shop.service.pages.most = 2
    going, search = threading.Event(), shop.service.engine.search
    shop.service.engine.search = lambda *args, **options: (going.wait(30), search(*args, **options))[1]
    answers = []
    askers = [threading.Thread(target=lambda: answers.append(shop.post("/search", {"query": "shoes"}))) for _ in range(6)]
    with shop.client:
        for asker in askers:
            asker.start()
        while len(answers) < 4:
            time.sleep(0.01)
        assert {answer.status_code for answer in answers} == {503} and all("retry-after" in answer.headers for answer in answers)
        assert shop.client.get("/healthz").status_code == 200  # the loop is free
        going.set()
        for asker in askers:
            asker.join()
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503, 503]
    shop.store.close()


def test_rows_that_can_never_be_kept_do_not_hold_up_the_others():
    kept = []

    def keep(rows: list[dict]) -> None:
        if any(row["bad"] for row in rows):
            raise ValueError("never")
        kept.extend(rows)

    log_to(io.StringIO())
    log = PageLog(keep, pause=0.01)
    for bad in (False, True, False):
        log.put([{"bad": bad, "user_id": None}])
        while log.waiting:
            time.sleep(0.001)
        log.flush()
    log.close()
    assert len(kept) + log.dropped == 3 and log.dropped >= 1


def test_many_pages_that_wait_are_written_without_a_pause():
    kept = []
    log = PageLog(kept.extend, pause=1e6)
    log.put([{"user_id": None}] * 14_000)
    deadline = time.monotonic() + 60
    while len(kept) < 14_000 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(kept) == 14_000 and not log.dropped
    log.close()


# New models


def test_a_new_model_is_swapped_in_without_losing_a_request_and_knows_what_happened_meanwhile(saved, tmp_path):
    other = tmp_path / "other"
    engine = Engine.load(saved)
    engine.remove([engine.products["item_id"].iloc[-1]])
    engine.save(other)
    folders, opening, go_on = [saved, other], threading.Event(), threading.Event()

    def load() -> Engine:
        if len(folders) == 1:
            opening.set()
            go_on.wait(30)
        return Engine.load(folders.pop(0))

    shop = Shop(saved, tmp_path, load=load)
    with shop.client:
        answers, done = [], threading.Event()

        def ask() -> None:
            while not done.is_set():
                answers.append(shop.post("/search", {"query": "shoes", "k": 3}))

        asking = threading.Thread(target=ask)
        asking.start()
        reloading = threading.Thread(target=lambda: answers.append(shop.post("/reload")))
        reloading.start()
        assert opening.wait(30)
        assert shop.post("/events", [shop.click(number=number, kind="purchase") for number in range(3)]).status_code == 200
        assert shop.post("/reload").status_code == 409
        go_on.set()
        reloading.join()
        while answers[-1].json().get("policy") != Engine.load(other).version:
            time.sleep(0.01)
        done.set()
        asking.join()
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["policy"] for answer in answers}) == 2
        assert len(shop.service.engine.memory.histories(shop.store.pseudonym("anna"), time.time_ns())) >= 3
        assert f'ecomrec_model_info{{policy="{shop.service.engine.version}"}} 1.0' in shop.client.get("/metrics").text
    shop.store.close()


def damaged(engine: Engine, how: str) -> Engine:
    if how == "empty":
        engine.recommend = lambda *args, **options: Engine.recommend(engine, k=1, filters={"price": (1e9, None)})
    if how == "nan":
        def of_nan(*args, **options):
            page = Engine.search(engine, *args, **options)
            page.items["score"] = np.inf
            return page
        engine.search = of_nan
    if how == "nameless":
        engine.version = ""
    if how == "crash":
        engine.search = lambda *args, **options: 1 / 0
    return engine


@pytest.mark.parametrize(("how", "reason"), [("empty", "finds nothing"), ("nan", "no finite number"), ("nameless", "no version"), ("crash", "ZeroDivisionError"), ("missing", "manifest.json")])
def test_a_model_that_fails_its_check_never_serves(saved, tmp_path, how, reason):
    kinds = ["", how]
    log_to(io.StringIO())
    shop = Shop(saved, tmp_path, load=lambda: damaged(Engine.load(saved if kinds[0] != "missing" else tmp_path), kinds.pop(0)))
    before = shop.post("/search", {"query": "shoes"}).json()["items"]
    answer = shop.post("/reload")
    assert answer.status_code == 409 and reason in answer.json()["error"] and "goes on" in answer.json()["error"]
    assert shop.post("/search", {"query": "shoes"}).json()["items"] == before
    assert shop.service.meters.registry.get_sample_value("ecomrec_model_loads_total", {"result": "refused"}) == 1
    shop.close()


# The cache


def test_a_cached_page_is_a_page_of_its_own_and_forgotten_when_something_happens(shop):
    pages = [shop.post("/search", {"query": "shoes", "user_id": "bob", "session_id": session}).json() for session in "ab"]
    assert pages[0]["items"] == pages[1]["items"] and pages[0]["request_id"] != pages[1]["request_id"]
    kept = shop.kept()
    assert set(kept["request_id"]) == {page["request_id"] for page in pages} and set(kept["session_id"]) == {"a", "b"}
    assert shop.post("/search", {"query": "shoes", "user_id": "bob", "k": 3}).json()["items"] == pages[0]["items"][:3]
    anonymous = [shop.post("/search", {"query": "hat"}).json() for _ in range(2)]
    assert shop.service.meters.registry.get_sample_value("ecomrec_pages_from_cache_total") >= 1
    assert anonymous[0]["items"] == anonymous[1]["items"]
    fresh = lambda: [shop.post("/search", {"query": "hat", "user_id": "bob"}) and shop.service.meters.registry.get_sample_value("ecomrec_pages_from_cache_total") for _ in range(2)]
    shop.service.log.put = lambda rows: None  # that a page was asked for is news, too
    first = fresh()
    shop.post("/events", [shop.click("bob")])
    after = fresh()
    assert first[1] == first[0] + 1 and after[0] == first[1]


def test_the_cache_has_a_bound_and_can_be_left_out(saved, tmp_path):
    for number, size in enumerate((3, 0)):
        shop = Shop(saved, tmp_path / str(number), cache=size) if (tmp_path / str(number)).mkdir() is None else None
        for k in range(1, 8):
            shop.post("/search", {"query": "shoes", "k": k})
        assert len(shop.service.cache) == size
        shop.close()


# The interface as it is described


@pytest.fixture(scope="module")
def described(open_shop):
    log_to(io.StringIO())

    async def app(scope, receive, send):  # each request of schemathesis begins and ends an app, and the shop must go on
        while scope["type"] == "lifespan":
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
        await open_shop.app(scope, receive, send)

    refused = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]  # by default without 413: a list that is too long may be a body that is too large
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=schemathesis.Config.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": refused}}}))


ENDPOINTS = [("POST", path) for path in ("/search", "/recommend", "/similar", "/suggest", "/events", "/reload")] + [("DELETE", "/users/{user_id}")] + [("GET", path) for path in ("/users", "/healthz", "/readyz", "/metrics")]
# What is well formed may still not exist here: a column, a product, a user. And a body may break a rule between two fields.
NOT_OURS = [positive_data_acceptance]


def try_out(described, shop: Shop, method: str, path: str, n: int) -> int:
    """Send n requests, half of them ill-formed where anything can be, hold each answer against the description, and count them."""
    operation, empty = described[path][method], method == "GET" or path == "/reload"  # nothing in these can be ill-formed
    modes = [GenerationMode.POSITIVE, *[GenerationMode.NEGATIVE] * (not empty)]
    sent = 0
    for mode in modes:
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=n // len(modes), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def hold(case):
            nonlocal sent
            sent += 1
            case.call_and_validate(headers=shop.head(shop.key), excluded_checks=NOT_OURS)

        hold()
    return sent


@pytest.mark.parametrize("n", [100, pytest.param(1200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_interface_is_as_described(described, open_shop, method, path, n):
    assert try_out(described, open_shop, method, path, n) == (1 if path in ("/healthz", "/readyz") else n)  # in these two nothing can be varied


def test_every_example_of_the_description_is_answered(open_shop):
    paths = open_shop.client.get("/openapi.json").json()
    assert {"/search", "/recommend", "/similar", "/suggest", "/events", "/reload", "/users/{user_id}", "/healthz", "/readyz", "/metrics"} <= set(paths["paths"])
    for name in ("ToSearch", "ToCompare", "ToSuggest"):
        shown = paths["components"]["schemas"][name]["properties"]
        assert any(field.get("examples") for field in shown.values())
    body = {name: field["examples"][0] for name, field in paths["components"]["schemas"]["ToSearch"]["properties"].items() if field.get("examples")}
    assert open_shop.post("/search", body).status_code == 200


# The process


@pytest.fixture
def process(saved, tmp_path):
    """`ecomrec serve` on the small engine, in a process of its own: its address and key."""
    run = tmp_path / "runs" / "small-000000000000"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text("{}")
    (run / "engine").symlink_to(saved)
    command = [sys.executable, "-c", "import sys; from ecomrec.cli import main; sys.exit(main())", "serve", str(run), "--port", "0", "--state", str(tmp_path / "state"), "--keyring", str(tmp_path / "keyring")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        address, first = running.stdout.readline().strip(), running.stdout.readline()
        yield running, address, first.split()[-1], tmp_path / "state"
        if running.poll() is None:
            running.kill()


def asked(address: str, path: str, key: str, body: object) -> dict:
    head = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urlopen(Request(address + path, json.dumps(body).encode(), head), timeout=60) as answer:
        return json.load(answer)


def test_the_command_serves_keeps_reloads_at_a_signal_and_ends_cleanly(process):
    running, address, key, state = process
    assert address.startswith("http://127.0.0.1:")
    assert asked(address, "events", key, [{"event_id": "1", "kind": "click", "item_id": "a", "user_id": "anna"}]) == {"kept": 1, "known": 0}
    assert asked(address, "search", key, {"query": "shoes", "k": 1})["items"]
    running.send_signal(signal.SIGHUP)
    line = json.loads(running.stderr.readline())
    assert line["event"] == "model served"
    running.terminate()
    rest = running.stderr.read()
    assert running.wait(60) == 0 and "Traceback" not in rest and key not in rest
    assert key not in (state / "api_keys.json").read_text() and keys_of(state / "api_keys.json")[1] is None
    with Store(state / "events.sqlite", state.parent / "keyring") as store:
        assert sorted(store.events()["kind"]) == ["click", "impression", "search"]  # what waited was written at the end
        assert [made.kind for made in store.artefacts()] == ["model"]  # it knows shoppers: whoever is erased is told so
    assert state.stat().st_mode & 0o077 == 0


def test_a_request_that_takes_too_long_is_given_up(open_shop):
    async def forever(scope, receive, send):
        while True:
            await receive()

    async def slowly():
        await asyncio.sleep(3600)

    told = []

    async def send(message):
        told.append(message)

    scope = {"type": "http", "method": "POST", "path": "/search", "headers": [(b"host", b"127.0.0.1")], "client": ("127.0.0.1", 1), "query_string": b"", "server": ("127.0.0.1", 80), "scheme": "http"}
    asyncio.run(Door(forever, open_shop.service, None, 100.0, seconds=0.05)(scope, slowly, send))
    assert told[0]["status"] == 503 and b"too long" in told[1]["body"]


def test_rows_of_a_batch_are_named_by_their_place():
    good = UbiSaid(query_id="q", timestamp="2025-11-03T10:15:00Z", user_query="hat")
    with pytest.raises(Refused) as caught:
        event_rows([good, good.model_copy(update={"timestamp": "x"})], 1_762_164_900_000, str)
    assert caught.value.field == "1.timestamp"


def test_the_service_is_used_from_python_as_over_http(shop):
    page = json.loads(shop.service.page(ToSearch(query="shoes", k=3), Caller("x")))
    assert page["items"] == shop.post("/search", {"query": "shoes", "k": 3}).json()["items"]
    assert json.loads(shop.service.page(ToRecommend(k=2), Caller("x")))["items"]
