"""The shop's page in a real browser: search, filter, click, buy, see it change; by keyboard, in two languages, for everyone."""

import http.server
import re
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlparse

import pandas as pd
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe

from ecomrec.data import sources
from ecomrec.data.cleaning import clean
from ecomrec.feedback.store import Store
from ecomrec.search.engine import Engine
from ecomrec.search.explain import linear_ranker
from ecomrec.search.recipe import Recipe
from ecomrec.serve.door import Keys, log_to
from ecomrec.serve.service import Service, create_app

WORDS = {"words": 0.5, "attributes": 0.5, "vectors": 0.0}
EVIL = "<img src=x onerror=alert(1)> <script>document.title='x'</script> red shoes"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small engine with a log, whose pages go by taste, in a folder."""
    shop = clean(sources.load("shop"))[0]
    products = shop.products.head(400)
    evil = products.head(1).assign(item_id="evil", parent_id=None, title=EVIL, brand="<b>Bold</b>", image="https://elsewhere.example/x.png")
    events = shop.events[shop.events["item_id"].isin(products["item_id"]) | (shop.events["kind"] == "search")]
    taste = {"seen": 0.2, "bought_before": 0.6, "brand_taste": 1.0, "category_taste": 1.0}
    rankers = {"home": linear_ranker({"popularity": 0.01, **taste}), "search": linear_ranker({"words": 0.5, "attributes": 0.5, **taste})}
    folder = tmp_path_factory.mktemp("engine") / "engine"
    Engine.from_products(pd.concat([products, evil]), recipe=Recipe(candidates=WORDS, order=WORDS), users=shop.users, events=events, rankers=rankers).save(folder)
    return folder


class Running:
    """A service that listens on a free port of the loopback interface."""

    def __init__(self, saved: Path, folder: Path, auth: bool = False):
        self.store = Store(folder / "events.sqlite", folder / "keys")
        self.service, self.keys = Service(lambda: Engine.load(saved), self.store, folder / "erased.json"), Keys({}) if auth else None
        self.key = self.keys.add("first") if auth else ""
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        log_to(open("/dev/null", "w"))
        self.server = uvicorn.Server(uvicorn.Config(create_app(self.service, self.keys, rate=1e6), log_config=None, access_log=False))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def kept(self) -> pd.DataFrame:
        while self.service.log.waiting:
            self.service.log.flush()
        return self.store.events()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.store.close()


@pytest.fixture(scope="module")
def shop(saved, tmp_path_factory):
    running = Running(saved, tmp_path_factory.mktemp("shop"))
    yield running
    running.close()


@pytest.fixture
def visit(chromium, shop, tmp_path):
    """Opens the page, and fails the test for whatever went wrong on it: errors, failed requests, requests to the outside."""
    contexts, wrong = [], []

    def opened(running: Running = shop, width: int = 1280, height: int = 900, scheme: str = "light", locale: str = "en-US", ready: str = ".card", **more):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, locale=locale, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") and "401" not in m.text and "REFUSED" not in m.text else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: wrong.append(f"asked {r.url}") if urlparse(r.url).hostname != "127.0.0.1" else None)
        page.on("dialog", lambda d: wrong.append(f"dialog {d.message}"))
        page.goto(running.address)
        page.locator(ready).first.wait_for()
        return page

    yield opened
    for number, context in enumerate(contexts):
        for page in context.pages:
            page.screenshot(path=tmp_path / f"page-{number}.png", full_page=True)
        context.close()
    assert wrong == []


def settled(page) -> None:
    page.locator("#cards:not(.waiting)").wait_for(state="attached")


def search(page, query: str) -> None:
    page.locator("#query").fill(query)
    page.locator("#query").press("Enter")
    page.locator("#title", has_text=query).wait_for()
    settled(page)


def titles(page) -> list[str]:
    return page.locator(".card h2").all_inner_texts()


def test_search_filter_click_buy_and_see_the_page_change(visit, shop):
    page = visit()
    page.locator("#user").select_option(index=0)
    search(page, "running shoes")
    everything = page.locator("#count").inner_text()
    first = page.locator("#facets fieldset", has=page.locator("legend", has_text="Brand")).locator("label").first
    brand, n = first.locator("span").first.inner_text(), int(first.locator(".n").inner_text())
    first.click()
    page.locator("#clear").wait_for()
    settled(page)
    assert page.locator("#count").inner_text() != everything and n > 0
    assert {text.split(" · ")[0] for text in page.locator(".card .kind").all_inner_texts()} == {brand}
    page.locator("#clear").click()
    page.locator("#count", has_text=everything).wait_for()
    page.locator("#user").select_option(index=3)
    user = page.locator("#user").input_value()
    settled(page)
    before = titles(page)
    chosen = page.locator(".card").nth(min(6, len(before) - 1))
    title = chosen.locator("h2").inner_text()
    for button, told in (("View", "Viewed"), ("Add to cart", "In the cart"), ("Buy", "Bought")):
        page.locator(".card", has=page.locator("h2", has_text=title)).get_by_role("button", name=button).click()
        page.locator("#noted", has_text=told).wait_for()
        assert title in page.locator("#noted").inner_text()
    after = titles(page)
    assert after != before and after.index(title) < before.index(title)
    assert "you chose" in page.locator(".card", has=page.locator("h2", has_text=title)).locator(".why").inner_text()
    done = shop.kept().query("kind in ['click', 'cart', 'purchase']")
    assert sorted(done["kind"]) == ["cart", "click", "purchase"] and set(done["user_id"]) == {shop.store.pseudonym(user)} and done["position"].notna().all()
    assert set(done["request_id"]) <= set(shop.kept().query("kind == 'impression'")["request_id"]) and set(done["query"]) == {"running shoes"}


def test_paging_sorting_and_similar_products(visit):
    page = visit()
    search(page, "shoes")
    first = titles(page)
    page.locator("#after").click()
    page.locator("#where", has_text="Page 2").wait_for()
    assert not set(first) & set(titles(page)) and page.evaluate("document.activeElement.id") == "results"
    page.locator("#before").click()
    page.locator("#where", has_text="Page 1").wait_for()
    assert titles(page) == first
    page.locator("#sort").select_option("price")
    page.wait_for_timeout(100)
    settled(page)
    prices = [float(text.strip("€").replace(",", "")) for text in page.locator(".card .price").all_inner_texts()]
    assert prices == sorted(prices) and len(prices) > 5
    title = titles(page)[0]
    page.locator(".card").first.get_by_role("button", name="Similar").click()
    page.locator("#title", has_text=f"Like {title}").wait_for()
    assert title not in titles(page)


def test_everything_goes_by_keyboard(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    box = page.locator("#query")
    assert page.evaluate("document.activeElement.id") == "query" and box.get_attribute("aria-expanded") == "false"
    page.keyboard.type("run")
    page.locator("#suggestions li").first.wait_for()
    assert box.get_attribute("aria-expanded") == "true"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    active = page.locator(f"#{box.get_attribute('aria-activedescendant')}")
    assert active.get_attribute("aria-selected") == "true" and page.locator("#suggestions [aria-selected=true]").count() == 1
    text = active.inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#suggestions").is_hidden() and box.input_value() == "run"
    page.keyboard.press("ArrowDown")
    page.locator("#suggestions li").first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator("#title", has_text=text).wait_for()
    assert box.input_value() == text and page.locator("#suggestions").is_hidden()
    button = page.locator(".card").nth(1).get_by_role("button", name="Add to cart")
    settled(page)
    button.focus()
    page.keyboard.press("Enter")
    page.locator("#noted", has_text="In the cart").wait_for()
    assert page.evaluate("document.activeElement.id").startswith("cart-")  # where it was
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_titles_from_strangers_are_letters(visit):
    page = visit()
    search(page, "red shoes <b>x</b>")
    search(page, "onerror alert img")
    assert EVIL in titles(page)
    assert page.locator(".card img, .card script, main b b").count() == 0 and page.title() != "x"
    assert page.locator("#title").inner_text() == "“onerror alert img”"


def test_in_chinese(visit):
    page = visit(locale="zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh"
    search(page, "跑步鞋")
    assert "件商品" in page.locator("#count").inner_text() and len(titles(page)) > 3
    assert any(any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in page.locator(".why").all_inner_texts())
    page.locator("#language").click()
    page.locator("#count", has_text="products").wait_for()
    assert page.evaluate("document.documentElement.lang") == "en"
    leftover = page.evaluate("[...document.querySelectorAll('[data-say],[data-name],label,legend,button')].map(e => e.textContent + (e.ariaLabel || '')).filter(t => /[\\u4e00-\\u9fff]/.test(t) && t !== '中文')")
    assert [text for text in leftover if not any(title in text for title in titles(page))] == []


def test_every_word_is_there_in_both_languages():
    text = (Path(__file__).parents[1] / "ecomrec/serve/page/words.js").read_text(encoding="utf-8")
    found = [set(re.findall(r'(?:^|[\s,{])"?([a-z_-]+)"?: "', part)) for part in text.split("zh: {")]
    assert found[0] == found[1] and len(found[0]) > 40


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_screen(visit, width, height, scheme):
    page = visit(width=width, height=height, scheme=scheme, locale="zh-CN" if scheme == "dark" else "en-US", bypass_csp=True)  # axe is put in by the test, not by the page
    for query in ("", "running shoes", "xyzzy"):
        if query:
            search(page, query)
        page.locator("#query").fill("run" if query else "")
        if query == "running shoes":
            page.locator("#suggestions li").first.wait_for()
            page.locator("#narrow").evaluate("one => one.open = true")
            page.locator(".card").nth(1).get_by_role("button").last.click()
            page.locator("#noted:not(:empty)").wait_for()
        found = Axe().run(page).response["violations"]
        assert [(one["id"], one["impact"], [node["html"][:120] for node in one["nodes"]]) for one in found] == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_key_is_asked_for_once_and_kept_in_this_tab_only(visit, saved, tmp_path):
    running = Running(saved, tmp_path, auth=True)
    page = visit(running, ready="dialog[open]")
    page.locator("#key").fill("wrong")
    page.keyboard.press("Enter")
    page.locator("#wrong", has_text="not known").wait_for()
    page.locator("#key").fill(running.key)
    page.keyboard.press("Enter")
    page.locator(".card").first.wait_for()
    page.reload()
    page.locator(".card").first.wait_for()
    assert page.locator("dialog[open]").count() == 0 and running.key not in page.content() and running.key not in page.url
    assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []
    running.close()


def test_a_service_that_is_gone_is_said(visit, saved, tmp_path):
    running = Running(saved, tmp_path)
    page = visit(running)
    running.close()
    page.locator("#query").fill("hat")
    page.keyboard.press("Enter")
    page.locator("#wrong", has_text="cannot be reached").wait_for()
    assert page.locator(".card").count() > 0  # what was there stays


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Another site."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<p>elsewhere</p>")

    def log_message(self, *_):
        pass


def test_another_site_can_neither_ask_nor_frame_the_shop(chromium, shop):
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{site.server_port}/")
    ask = "async address => { try { const said = await fetch(address + 'recommend', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{}'}); return await said.text(); } catch (error) { return error.name; } }"
    assert page.evaluate(ask, shop.address) == "TypeError"
    before = len(shop.kept())
    page.evaluate("async address => { try { await fetch(address + 'events', {method: 'POST', mode: 'no-cors', body: '[{\"event_id\": \"x\", \"kind\": \"click\", \"item_id\": \"evil\"}]'}); } catch {} }", shop.address)
    page.evaluate("address => new Promise(done => { const frame = document.createElement('iframe'); frame.onload = done; frame.src = address; document.body.append(frame); })", shop.address)
    assert "cards" not in "".join(frame.content() for frame in page.frames[1:] if frame.url.startswith("http"))
    assert len(shop.kept()) == before
    context.close()
    site.shutdown()
    site.server_close()
