"""The explorer where it is used: a notebook in JupyterLab, in a real browser."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

from ecomrec.serve.explorer import card_html

SHOP = """from ecomrec.data import sources
from ecomrec.data.cleaning import clean
from ecomrec.search.engine import Engine
from ecomrec.search.explain import linear_ranker
from ecomrec.search.recipe import Recipe
from ecomrec.serve.explorer import explore

shop = clean(sources.load("shop"))[0]
products = shop.products.head(300)
products.loc[products.index[0], "title"] = "<img src=x onerror=alert(1)> zwieback"
events = shop.events[shop.events["item_id"].isin(products["item_id"]) | (shop.events["kind"] == "search")]
words = {"words": 0.5, "attributes": 0.5, "vectors": 0.0}
taste = {"brand_taste": 1.0, "category_taste": 1.0, "bought_before": 1.0, "popularity": 0.01}
rankers = {"home": linear_ranker(taste), "search": linear_ranker({"words": 1.0, **taste})}
engine = Engine.from_products(products, recipe=Recipe(candidates=words, order=words), users=shop.users, events=events, rankers=rankers)
explorer = explore(engine, k=6)
explorer"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free port, with one notebook: its address."""
    if shutil.which("chromium") is None:
        pytest.skip("no chromium here: `make system` installs it")
    folder, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SHOP)], metadata={"kernelspec": kernel}), folder / "shop.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    with open(folder / "log", "w") as log, subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log) as server:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/api?token={token}").close()
                break
            except URLError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/lab/tree/shop.ipynb?reset&token={token}"
        server.terminate()


def test_search_filter_click_buy_and_see_the_page_change_in_jupyterlab(chromium, lab, tmp_path):
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(120_000)
    wrong = []
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.goto(lab)
    page.locator(".jp-NotebookPanel .jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    cards = page.locator(".jp-OutputArea .widget-gridbox > .widget-vbox")
    cards.first.wait_for()
    assert cards.count() == 6
    box, user = page.locator(".jp-OutputArea .widget-text input"), page.locator(".jp-OutputArea .widget-dropdown select").first
    told = page.locator(".jp-OutputArea .widget-vbox > .widget-html").first

    def shown(change) -> list[str]:
        """What the cards say once a change has reached the kernel and come back."""
        before = cards.all_inner_texts()
        change()
        for _ in range(1200):
            now = cards.all_inner_texts()
            if now and now != before and page.locator(".jp-NotebookPanel-toolbar [data-status=idle]").count():
                page.wait_for_timeout(500)
                if cards.all_inner_texts() == now:  # not in the middle of a change
                    return now
            page.wait_for_timeout(100)
        raise AssertionError("nothing has changed")

    stranger = cards.all_inner_texts()
    mine = shown(lambda: user.select_option(index=2))
    assert mine != stranger
    found = shown(lambda: (box.fill("running shoes"), box.press("Enter")))
    assert sum("running shoes" in text.lower() for text in found) >= 3
    facet = page.locator(".jp-OutputArea .widget-select-multiple select").nth(1)
    brand = facet.locator("option").nth(1).inner_text().rpartition(" (")[0]
    narrowed = shown(lambda: facet.select_option(index=1))
    assert all(brand in text for text in narrowed)
    all_again = shown(lambda: facet.select_option([]))
    title = cards.nth(5).locator("b").first.inner_text().partition(". ")[2]
    after = shown(lambda: cards.nth(5).get_by_role("button", name="View").click())
    told.get_by_text("View:").wait_for()
    place = next(number for number, text in enumerate(after) if title in text)
    after = shown(lambda: cards.nth(place).get_by_role("button", name="Buy").click())
    told.get_by_text("Buy:").wait_for()
    assert [title in text for text in after].index(True) < [title in text for text in all_again].index(True)
    shown(lambda: (box.fill("zwieback"), box.press("Enter")))
    assert "<img src=x onerror=alert(1)> zwieback" in cards.first.inner_text() and cards.locator("img").count() == 0
    page.screenshot(path=tmp_path / "explorer.png")
    page.close()
    assert wrong == []


@pytest.mark.parametrize("text", ["<b>", "\"'><script>", "&amp;", "</div>", "javascript:alert(1)"])
def test_a_card_escapes_every_text(text):
    item = {name: text for name in ("title", "brand", "category", "currency", "item_id")} | {"rank": 1, "price": 1.0, "rating": 5.0}
    shown = card_html(item, [text], text)
    for tag in ("<b>", "<script>"):
        assert shown.count(tag) == card_html(item | {name: "x" for name in ("title", "brand", "category", "currency", "item_id")}, ["x"], "x").count(tag)
    assert shown.count("</div>") == shown.count("<div")
