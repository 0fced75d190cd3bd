"""Build the docs site: every notebook as it is stored, and a reference page for every module.

    python nbs/_docs/build.py [--draft] [OUT]     default _site
"""

import argparse
import importlib
import inspect
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "_tools"))

from notebooks import NBS, ROOT, STAGES, notebooks, read, shown  # noqa: E402

SECTIONS = {
    "tutorials": ("Tutorials", "Begin here."),
    "evaluate": ("Evaluate", "What is true, and how sure are we?"),
    "data": ("Data", "The shop's records, from raw to ready."),
    "model": ("Model", "One equation."),
    "search": ("Search", "From vectors to a page."),
    "feedback": ("Feedback", "From the page back to the model."),
    "serve": ("Serve", "The door to the outside."),
    "optimise": ("Optimise", "Better, smaller, faster."),
    "trust": ("Trust", "Private, federated, fair."),
    "lab": ("Lab", "Run a notebook with parameters, record it, compare runs."),
    "experiments": ("Experiments", "Parametrised, one story each."),
    "applications": ("Applications", "The same package on other tables."),
}
# Files outside nbs/ that the notebooks may link to, and their place on the site.
PROJECT = {
    "README.zh.md": ("project/readme_zh.md", "中文"),
    "data/README.md": ("project/data_card.md", "The bundled shop"),
    "CONTRIBUTING.md": ("project/contributing.md", "Contributing"),
    "CHANGELOG.md": ("project/changelog.md", "Changelog"),
}
_LINK = re.compile(r"\]\((?![a-z]+:|#|/)([^)\s#]+)((?:#[^)\s]*)?)\)")


def stage(folder: Path) -> None:
    """Lay out the site's sources in an empty folder."""
    pages: dict[str, list[tuple[str, str, str]]] = {}
    for path in notebooks():
        place = path.relative_to(NBS)
        section = place.parts[0] if len(place.parts) > 1 else "lab"
        notebook = read(path)
        if place.name != "index.ipynb":
            pages.setdefault(section, []).append((f"/{place.with_suffix('').as_posix()}", *title(notebook)))
        _stage_notebook(notebook, path, folder / place)
    links = []
    for source, (target, name) in PROJECT.items():
        if (ROOT / source).exists():
            text = _LINK.sub(lambda m: _link(m, (ROOT / source).parent), (ROOT / source).read_text(encoding="utf-8"))
            _write(folder / target, text)
            links.append((f"/{target.removesuffix('.md')}", name))
    tree = ["```{toctree}", *(f"{name} <{page}>" for page, name in links), "```"]
    _write(folder / "project/index.md", "\n".join(["# Project", "", *tree]))
    for section, entries in pages.items():
        name, line = SECTIONS[section]
        rows = [f"**[{heading}]({page}.ipynb)**  \n{question}\n" for page, heading, question in entries]
        tree = ["```{toctree}", ":hidden:", *(page for page, _, _ in entries), "```"]
        _write(folder / section / "index.md", "\n".join([f"# {name}", "", line, "", *rows, *tree]))
    _stage_reference(folder / "api")
    _write_front(folder / "index.ipynb", [*(s for s in SECTIONS if s in pages), "api", "project"])


def title(notebook) -> tuple[str, str]:
    """A notebook's heading and the question in the first quoted line below it."""
    text = "\n".join(cell.source for cell in notebook.cells[:4] if cell.cell_type == "markdown")
    heading, question = re.search(r"^# (.+)$", text, re.MULTILINE), re.search(r"^> (.+)$", text, re.MULTILINE)
    return heading[1].strip() if heading else "Untitled", question[1].strip() if question else ""


def _stage_notebook(notebook, source: Path, target: Path) -> None:
    """Copy a notebook without directives, hidden cells and hidden outputs."""
    kept = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            code, outputs = shown(cell)
            if not code and not outputs:
                continue
            cell.source, cell.outputs = code or "pass", outputs  # of a cell without code the reader would drop the output too
            if not code:
                cell.metadata["tags"] = [*cell.metadata.get("tags", []), "remove-input"]
        elif cell.cell_type == "markdown":
            cell.source = _LINK.sub(lambda m: _link(m, source.parent), cell.source)
        kept.append(cell)
    notebook.cells = kept
    _write(target, json.dumps(notebook, ensure_ascii=False))
    for picture in source.parent.glob("*.png"):
        shutil.copy(picture, target.parent)


def _link(match: re.Match, folder: Path) -> str:
    """A link out of nbs/ leads to that file's page on the site; a link to a folder, to its section's page."""
    target = (folder / match[1]).resolve()
    for source, (page, _) in PROJECT.items():
        if target == ROOT / source:
            return f"](/{page}{match[2]})"
    if target == ROOT / "README.md":
        return "](/index.ipynb)"
    if target.is_relative_to(NBS):
        place = target.relative_to(NBS)
        if target.is_dir() and place.as_posix() in SECTIONS:
            return f"](/{place.as_posix()}/index.md)"
        return f"](/{place.as_posix()}{match[2]})"
    return match[0]


def _stage_reference(folder: Path) -> None:
    """One page for each module, with every public name on it."""
    home = {}
    for path in notebooks():
        for cell in read(path).cells:
            module = re.match(r"\s*#\|\s*default_exp\s+(\S+)", cell.source)
            if module:
                home[f"ecomrec.{module[1]}"] = path
    tree = ["# API", "", "Every public name of every module, from its docstring.", ""]
    for module, path in home.items():
        page = f"{module.removeprefix('ecomrec.')}"
        members = list(getattr(importlib.import_module(module), "__all__", []))
        lines = [module, "=" * len(module), "", f":doc:`Derived, shown and tested in its notebook "
                 f"</{path.relative_to(NBS).with_suffix('').as_posix()}>`.", "", f".. currentmodule:: {module}", ""]
        callables = [n for n in members if documented(getattr(sys.modules[module], n))]
        if callables:
            lines += [".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in callables), ""]
        for name in sorted(members, key=lambda name: name not in callables):
            lines += _directive(module, name)
        _write(folder / f"{page}.rst", "\n".join(lines))
        tree += [f"- [{module}]({page}.rst): " + ", ".join(f"`{name}`" for name in members)]
    tree += ["", "```{toctree}", ":hidden:", *(m.removeprefix("ecomrec.") for m in home), "```"]
    _write(folder / "index.md", "\n".join(tree))


def documented(value) -> bool:
    """Whether a docstring belongs to the name itself: a function or class, not an instance of one."""
    return inspect.isclass(value) or inspect.isroutine(value)


def _directive(module: str, name: str) -> list[str]:
    value = getattr(sys.modules[module], name)
    if inspect.isclass(value):
        return [f".. autoclass:: {name}", "   :members:", ""]
    if documented(value):
        return [f".. autofunction:: {name}", ""]
    lines, text = [f".. py:data:: {name}", f"   :type: {type(value).__name__}"], repr(value)
    return [*lines, *([f"   :value: {text}"] if len(text) <= 100 and "\n" not in text else []), ""]


def _write_front(path: Path, sections: list[str]) -> None:
    """Add the site's table of contents to the front page."""
    front = json.loads(path.read_text(encoding="utf-8"))
    tree = "\n".join(["```{toctree}", ":hidden:", "", *(f"{section}/index" for section in sections), "```"])
    front["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": tree})
    _write(path, json.dumps(front, ensure_ascii=False))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def build(out: Path, draft: bool = False) -> int:
    """Build the site into a folder, which is replaced; return Sphinx's status. Only a draft may have broken links."""
    from sphinx.cmd.build import main as sphinx

    with tempfile.TemporaryDirectory() as temporary:
        source, site = Path(temporary) / "source", Path(temporary) / "site"
        source.mkdir()
        stage(source)
        options = ["-b", "html", "-c", str(HERE), "-d", f"{temporary}/doctrees", "-q", *([] if draft else ["-W"])]
        status = sphinx([*options, str(source), str(site)])
        if status == 0:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(site, out, ignore=shutil.ignore_patterns(".buildinfo"))
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "_site")
    parser.add_argument("--draft", action="store_true", help="warn of broken links instead of failing")
    args = parser.parse_args()
    sys.exit(build(args.out.absolute(), args.draft))
