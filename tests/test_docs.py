"""Every page of the docs site in a real browser: no error, no request to the outside, formulas and diagrams drawn."""

import functools
import http.server
import importlib
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "nbs/_tools"))

from notebooks import NBS, directives, notebooks, read  # noqa: E402

DRAWN = """() => {
  const formulas = [...document.querySelectorAll(".math")].every(e => e.querySelector("mjx-container svg"));
  const diagrams = [...document.querySelectorAll("pre.mermaid")].every(e => e.querySelector("svg g"));
  return document.readyState === "complete" && formulas && diagrams;
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built afresh: a broken link or a docstring that cannot be read fails here."""
    out = tmp_path_factory.mktemp("docs") / "_site"
    done = subprocess.run([sys.executable, str(NBS / "_docs/build.py"), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def address(site):
    """The site served on a free port of the loopback interface."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def tab(chromium):
    """A page, and what went wrong on it: console errors, exceptions, failed requests and requests to the outside."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page, wrong = context.new_page(), []
    page.on("console", lambda m: wrong.append(f"{page.url}: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: wrong.append(f"{page.url} exception: {e}"))
    page.on("response", lambda r: wrong.append(f"{page.url} got {r.status} for {r.url}") if r.status >= 400 else None)
    aborted = "net::ERR_ABORTED"  # what was still loading when the test went on to the next page
    page.on("requestfailed", lambda r: wrong.append(f"{page.url} could not get {r.url}") if r.failure != aborted else None)
    page.on("request", lambda r: wrong.append(f"{page.url} asked {r.url}") if outside(r.url) else None)
    yield page, wrong
    context.close()


def outside(url: str) -> bool:
    parts = urlparse(url)
    return parts.scheme not in ("file", "data", "blob", "about") and parts.hostname != "127.0.0.1"


def pages(site: Path) -> list[str]:
    return sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html") if "_static" not in p.parts)


def test_every_notebook_has_its_page_and_shows_no_directive(site):
    for path in notebooks():
        page = site / path.relative_to(NBS).with_suffix(".html")
        assert page.exists()
        assert not re.search(r'<span class="c1">\s*#\s*\|', page.read_text(encoding="utf-8"))


def test_reference_holds_every_public_name(site):
    for path in notebooks():
        exported = [directives(c.source).get("default_exp") for c in read(path).cells if c.cell_type == "code"]
        for module in filter(None, exported):
            text = (site / f"api/{module}.html").read_text(encoding="utf-8")
            names = getattr(importlib.import_module(f"ecomrec.{module}"), "__all__", [])
            assert [n for n in names if f'id="ecomrec.{module}.{n}"' not in text] == []


def test_every_page_opens_cleanly_and_is_drawn(site, address, tab):
    page, wrong = tab
    found = pages(site)
    formulas = diagrams = 0
    for name in found:
        page.goto(f"{address}/{name}", wait_until="load")
        page.wait_for_function(DRAWN, timeout=60_000)
        assert page.locator("mjx-merror, [data-mjx-error], pre.mermaid svg .error-icon").count() == 0, name
        assert page.locator("h1").first.inner_text().strip(), name
        formulas += page.locator("mjx-container").count()
        diagrams += page.locator("pre.mermaid > svg").count()
    assert wrong == []
    assert len(found) > len(notebooks())
    assert formulas > 0 and diagrams > 0


def test_front_page_and_a_notebook_open_from_a_folder(site, tab):
    page, wrong = tab
    formula = next(name for name in pages(site) if 'class="math' in (site / name).read_text(encoding="utf-8"))
    for name in ("index.html", formula):
        page.goto((site / name).as_uri(), wait_until="load")
        page.wait_for_function(DRAWN, timeout=60_000)
    assert page.locator("mjx-container svg").count() > 0
    assert wrong == []


def test_search_finds_ndcg(address, tab):
    page, wrong = tab
    page.goto(f"{address}/search.html?q=ndcg", wait_until="load")
    page.wait_for_selector("#search-results ul.search li a", timeout=60_000)
    found = page.locator("#search-results ul.search li a").all_inner_texts()
    assert any("metrics" in text.lower() for text in found), found
    assert wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_diagrams_follow_the_theme(address, chromium, scheme):
    context = chromium.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{address}/index.html", wait_until="load")
    page.wait_for_function(DRAWN, timeout=60_000)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    context.close()


def test_nothing_is_wider_than_a_phone(site, address, chromium):
    context = chromium.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    too_wide = []
    for name in pages(site):
        page.goto(f"{address}/{name}", wait_until="load")
        if page.evaluate("document.documentElement.scrollWidth > window.innerWidth + 1"):
            too_wide.append(name)
    context.close()
    assert too_wide == []
