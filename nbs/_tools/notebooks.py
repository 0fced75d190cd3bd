"""Execute notebooks on fresh kernels, clean them, and note which code their outputs belong to.

    python nbs/_tools/notebooks.py              all notebooks, in reading order
    python nbs/_tools/notebooks.py NB [NB ...]  only these
    python nbs/_tools/notebooks.py --stale      only those whose code changed since their outputs were made
    python nbs/_tools/notebooks.py --clean      clean them, execute nothing
    python nbs/_tools/notebooks.py --run RUN NB store the outputs of a finished run of an experiment, execute nothing
    python nbs/_tools/notebooks.py --check      change nothing; exit 1 if one is not clean or its outputs are stale
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
# The order of reading. Imports run the same way: a module uses only what comes before it.
STAGES = ("evaluate", "data", "model", "search", "feedback", "serve", "optimise", "trust")
OPENS_WITH = {"tutorials": ("start_here",)}
_DIRECTIVE = re.compile(r"\s*#\s*\|\s*(.*)")


def reading_order(path: Path) -> tuple:
    """Sort key of a notebook: tutorials, the stages, what stands on top (lab, cli), experiments, the front page."""
    folder = path.relative_to(NBS).parts[0] if path.parent != NBS else ""
    places = ("tutorials", *STAGES, "", "experiments", "applications")
    first = OPENS_WITH.get(folder, ())
    return (path.name == "index.ipynb", places.index(folder), path.stem not in first, str(path))


def notebooks() -> list[Path]:
    """Every notebook of the tree in reading order; folders that start with _ or . hold none."""
    found = (p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))
    return sorted(found, key=reading_order)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def directives(source: str) -> dict[str, str]:
    """The `#| name: value` lines at the top of a cell."""
    found = {}
    for line in source.splitlines():
        match = _DIRECTIVE.match(line)
        if match is None:
            break
        name, _, value = match[1].strip().partition(" ")
        found[name.rstrip(":")] = value.strip()
    return found


def shown(cell: nbformat.NotebookNode) -> tuple[str, list]:
    """What a reader sees of a code cell: its source without directives, and its outputs; empty where hidden."""
    flags = directives(cell.source)
    if "hide" in flags or "default_exp" in flags:
        return "", []
    source = "\n".join(line for line in cell.source.splitlines() if not _DIRECTIVE.match(line)).strip("\n")
    if "hide_input" in flags or flags.get("echo") == "false":
        source = ""
    outputs = [] if "hide_output" in flags or flags.get("output") == "false" else cell.outputs
    return source, outputs


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code cells' sources, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources, ensure_ascii=False).encode()).hexdigest()


def cleaned(notebook: nbformat.NotebookNode) -> str:
    """The notebook's text as `nbdev_clean` writes it."""
    from execnb.nbio import dict2nb, nb2str
    from nbdev.clean import clean_nb

    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    keys = settings["DEFAULT"]
    clean = dict2nb(json.loads(nbformat.writes(notebook)))
    clean_nb(
        clean,
        allowed_metadata_keys=keys["allowed_metadata_keys"].split(),
        allowed_cell_metadata_keys=keys["allowed_cell_metadata_keys"].split(),
    )
    return nb2str(clean)


def execute(path: Path, skip: tuple[str, ...] = (), timeout: int = 3600) -> nbformat.NotebookNode:
    """Run a notebook on a fresh kernel in its own folder and return it with its outputs.

    Args:
        path: The notebook.
        skip: Directives of cells to leave out, e.g. `slow`.
        timeout: Seconds that one cell may take.
    """
    notebook = read(path)
    if skip:
        run = [c for c in notebook.cells if c.cell_type == "code" and not set(skip) & directives(c.source).keys()]
        notebook.cells = run
    with tempfile.TemporaryDirectory() as profile:
        # A reader's own IPython start-up files and history are no part of a notebook.
        before, os.environ["IPYTHONDIR"] = os.environ.get("IPYTHONDIR"), profile
        try:
            where = {"metadata": {"path": str(path.parent)}}
            # Sockets in the file system: two kernels that start at once cannot race for a port.
            local = Config({"KernelManager": {"transport": "ipc", "ip": f"{profile}/kernel"}})
            client = NotebookClient(notebook, timeout=timeout, resources=where, coalesce_streams=True, config=local)
            client.execute()
        finally:
            os.environ.pop("IPYTHONDIR")
            if before is not None:
                os.environ["IPYTHONDIR"] = before
    return notebook


def of_run(path: Path, run: Path) -> nbformat.NotebookNode:
    """An experiment's notebook with the outputs of a run's folder, made by the same code."""
    notebook, executed = read(path), read(run / "run.ipynb")
    cells = [cell for cell in executed.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    if [cell.source for cell in cells] != [cell.source for cell in notebook.cells]:
        raise SystemExit(f"{run.name} was made by other code than {path.name} holds now: run the experiment again")
    for cell, done in zip(notebook.cells, cells):
        if cell.cell_type == "code":
            cell.outputs = done.outputs
    return notebook


def store(path: Path, notebook: nbformat.NotebookNode) -> list[str]:
    """Write an executed notebook, clean, with its code's hash; return what its outputs should not have said."""
    complaints = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        # Warnings and progress go to whoever runs it, not to whoever reads it.
        for output in [o for o in cell.outputs if o.get("name") == "stderr"]:
            complaints.append(f"cell {number} wrote to stderr: {output.text.strip()[-300:]}")
        # A bar drawn as a widget cannot be drawn on a page without asking the outside for a script.
        widget = "application/vnd.jupyter.widget-view+json"
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and widget not in o.get("data", {})]
        if any(str(place) in json.dumps(cell.outputs) for place in (ROOT, Path.home())):
            complaints.append(f"cell {number} shows a path of this machine")
    notebook.metadata.pop("widgets", None)
    notebook.metadata["ecomrec"] = {"code": code_hash(notebook)}
    _write(path, cleaned(notebook))
    return complaints


def problems(path: Path) -> list[str]:
    """What CI refuses in a stored notebook."""
    notebook, found = read(path), []
    if path.read_text(encoding="utf-8") != cleaned(notebook):
        found.append("is not clean: run nbdev_clean")
    stored = notebook.metadata.get("ecomrec", {}).get("code")
    if stored is None:
        found.append("does not say which code its outputs belong to: run make notebooks")
    elif stored != code_hash(notebook):
        found.append("holds outputs of other code than its own: run make notebooks")
    if any(o.output_type == "error" for c in notebook.cells if c.cell_type == "code" for o in c.outputs):
        found.append("holds the output of a failed cell")
    return found


def _write(path: Path, text: str) -> None:
    half = path.with_name(f".{path.name}.part")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def _stale(path: Path) -> bool:
    notebook = read(path)
    return notebook.metadata.get("ecomrec", {}).get("code") != code_hash(notebook)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="*", type=Path)
    how = parser.add_mutually_exclusive_group()
    for flag in ("--stale", "--clean", "--check"):
        how.add_argument(flag, action="store_true")
    how.add_argument("--run", type=Path)
    args = parser.parse_args()
    paths = sorted((p.resolve() for p in args.notebook), key=reading_order) or notebooks()
    failed = 0
    for path in paths:
        name = path.relative_to(ROOT)
        if args.check:
            for problem in problems(path):
                failed += 1
                print(f"{name} {problem}")
        elif args.run:
            print(name, *store(path, of_run(path, args.run)), sep="\n    ")
        elif args.clean:
            _write(path, cleaned(read(path)))
        elif not args.stale or _stale(path):
            began = time.perf_counter()
            try:
                complaints = store(path, execute(path))
            except CellExecutionError as error:
                failed += 1
                print(f"{name} FAILED, left as it was\n{error}", file=sys.stderr)
                continue
            print(f"{name}  {time.perf_counter() - began:.0f} s", *complaints, sep="\n    ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
