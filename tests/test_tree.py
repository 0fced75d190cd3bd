"""The tree keeps its promises: what is generated is fresh, imports run downhill, every link leads somewhere."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "nbs/_tools"
sys.path.insert(0, str(TOOLS))

from notebooks import NBS, STAGES, code_hash, directives, notebooks, problems, read, store  # noqa: E402

PACKAGE = ROOT / "ecomrec"
FOUND = notebooks()
NAMES = [p.relative_to(NBS).as_posix() for p in FOUND]
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if not any(part[0] == "_" for part in p.relative_to(PACKAGE).parts)]
each_notebook = pytest.mark.parametrize("path", FOUND, ids=NAMES)


def exported_name(path: Path) -> str | None:
    """The module that a notebook exports, without the package's name."""
    for cell in read(path).cells:
        if cell.cell_type == "code" and "default_exp" in directives(cell.source):
            return directives(cell.source)["default_exp"]
    return None


def code_cells(path: Path) -> list[str]:
    """Sources of the code cells, without lines that only IPython understands."""
    cells = (c.source for c in read(path).cells if c.cell_type == "code")
    plain = ("\n".join("" if re.match(r"\s*[%!?]", line) else line for line in source.splitlines()) for source in cells)
    return [source for source in plain if not source.startswith("\n%%")]


HOME = {exported_name(path): path for path in FOUND if exported_name(path)}


def height(module: str) -> tuple[int, str]:
    """Where a module stands in the order of the notebooks: its stage, then its notebook's number."""
    folder = module.split(".")[0]
    stage = STAGES.index(folder) if folder in STAGES else len(STAGES)
    return stage, HOME[module].name[:2] if module in HOME else "99"


def imported(source: str, module: str) -> set[str]:
    """Modules of the package that a module's source imports, anywhere in it, without the package's name."""
    found, package = set(), ["ecomrec", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        found |= {name.removeprefix("ecomrec.") for name in names if name.startswith("ecomrec.")}
    return {"search.engine" if name == "Engine" else name for name in found} & set(HOME)


def uphill(module: str, source: str) -> list[str]:
    return sorted(other for other in imported(source, module) if other != module and height(other) >= height(module))


@each_notebook
def test_stored_notebook_is_clean_and_its_outputs_belong_to_its_code(path):
    assert not problems(path)


@each_notebook
def test_notebook_is_of_readable_size(path):
    assert len(read(path).cells) <= 80
    assert path.stat().st_size <= 500_000


@each_notebook
def test_markdown_is_drawn_alike_by_jupyterlab_github_and_the_site(path):
    text = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    assert not re.search(r"^:::", text, re.MULTILINE)


@each_notebook
def test_links_lead_somewhere(path):
    text = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    prose = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)[^)]*\)", prose)
    assert [t for t in targets if not (path.parent / unquote(t)).exists()] == []


def test_notebooks_and_modules_say_the_same(tmp_path):
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "ecomrec", ignore=shutil.ignore_patterns("__pycache__", "_bundled"))
    ignored = shutil.ignore_patterns("_static", "_docs", "_tools", "results", ".ipynb_checkpoints")
    shutil.copytree(NBS, tmp_path / "nbs", ignore=ignored)
    for module in MODULES:  # what no notebook writes again is missed below
        (tmp_path / module.relative_to(ROOT)).unlink()
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    fresh = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "ecomrec").rglob("*.py")}
    here = {p.relative_to(ROOT): p.read_text() for p in PACKAGE.rglob("*.py") if "_bundled" not in p.parts}
    fresh.pop(Path("ecomrec/_modidx.py")), here.pop(Path("ecomrec/_modidx.py"), None)
    differ = sorted(str(p) for p in fresh.keys() | here.keys() if fresh.get(p) != here.get(p))
    assert not differ, "run nbdev_export; a module without a notebook must go"


def test_every_module_has_a_notebook_of_its_name():
    modules = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in MODULES}
    assert modules == set(HOME)
    for module, path in HOME.items():
        expected = path.relative_to(NBS).with_suffix("").as_posix().replace("/", ".")
        assert re.sub(r"(^|\.)\d\d_", r"\1", expected) == module


@pytest.mark.parametrize("module", sorted(HOME))
def test_imports_run_downhill(module):
    assert not uphill(module, (PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def test_an_uphill_import_is_seen_however_it_is_written():
    modules = sorted(HOME, key=height)
    low, high = modules[0], modules[-1]
    folder, _, name = high.rpartition(".")
    package = f"ecomrec.{folder}" if folder else "ecomrec"
    written = [f"import ecomrec.{high}", f"from ecomrec.{high} import x", f"def f():\n    from {package} import {name}"]
    written.append(f"from {'.' * (low.count('.') + 1)}{high} import x")
    assert [uphill(low, source) for source in written] == [[high]] * 4
    assert uphill(high, f"import ecomrec.{low}") == []


def test_package_does_not_need_its_development_tools():
    tools = r"^\s*(?:from|import) (nbdev|execnb|fastcore|pytest|hypothesis|obp|sphinx|playwright)\b"
    assert [str(p) for p in PACKAGE.rglob("*.py") if re.search(tools, p.read_text(), re.MULTILINE)] == []


def unsafe(source: str) -> list[str]:
    """Calls and imports that could run what a file or a stranger says, with their lines."""
    found, tree = [], ast.parse(source)
    meant = {alias.asname: alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}]
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            found += [f"{node.lineno}: from {node.module} import {name}" for name in names if (node.module, name) in {("yaml", "load"), ("torch", "load"), ("joblib", "load"), ("pandas", "read_pickle")}]
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            first, dot, rest = called.partition(".")
            called = meant.get(first, first) + dot + rest
            wrong = called in {"eval", "exec", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen"} or called.rpartition(".")[2] in {"read_pickle", "to_pickle", "unsafe_load", "full_load"}
            wrong |= called in {"yaml.load", "yaml.load_all", "joblib.load"} or (called == "torch.load" and given.get("weights_only") != "True")
            wrong |= given.get("allow_pickle", "False") != "False" and called.rpartition(".")[2] == "load" or given.get("shell", "False") != "False"
            found += [f"{node.lineno}: {called}"] * wrong
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_package_runs_nothing_that_it_reads(path):
    assert unsafe(path.read_text(encoding="utf-8")) == []


def test_what_would_run_what_it_reads_is_seen():
    bad = ["import pickle", "from pickle import loads", "import dill as d", "eval('1')", "exec(text)", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f)", "yaml.load(f, Loader=yaml.SafeLoader)", "yaml.unsafe_load(f)",
           "pd.read_pickle(f)", "joblib.load(f)", "np.load(f, allow_pickle=True)", "subprocess.run(x, shell=True)", "from yaml import load", "os.system('ls')", "import torch as t; t.load(f)", "import yaml as y; y.load(f)", "np.load(f, allow_pickle=trusted)"]
    assert [source for source in bad if not unsafe(source)] == []
    good = ["model.eval()", "yaml.safe_load(f)", "torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "np.load(f)", "json.load(f)", "re.compile('x')", "connection.execute(q)"]
    assert [source for source in good if unsafe(source)] == []


def test_nobody_imports_a_star():
    scripts = [p for folder in (PACKAGE, ROOT / "tests", TOOLS, NBS / "_docs") for p in folder.rglob("*.py")]
    sources = [(p, p.read_text()) for p in scripts] + [(p, source) for p in FOUND for source in code_cells(p)]
    stars = [
        str(path)
        for path, source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert stars == []


def test_no_function_or_class_stands_in_two_notebooks():
    places = defaultdict(set)
    for path in FOUND:
        for source in code_cells(path):
            for node in ast.parse(source).body:
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    places[node.name].add(path.relative_to(NBS).as_posix())
    assert {name: sorted(where) for name, where in places.items() if len(where) > 1} == {}


def test_readme_is_fresh():
    checked = subprocess.run([sys.executable, str(TOOLS / "readme.py"), "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_changed_cell_makes_stored_outputs_stale(tmp_path):
    path = tmp_path / "page.ipynb"
    notebook = read(FOUND[-1])
    store(path, notebook)
    assert problems(path) == []
    text = path.read_text()
    notebook.cells.append(nbformat.v4.new_code_cell("1 + 1", execution_count=3))
    assert code_hash(notebook) != notebook.metadata.ecomrec.code
    nbformat.write(notebook, path)
    assert path.read_text() != text
    found = " ".join(problems(path))
    assert "not clean" in found and "other code" in found


def test_wanted_versions_are_pinned():
    def names(text: str) -> set[str]:
        return {re.split(r"[\[<>=!~]", item)[0].lower().replace("_", "-") for item in text.split()}

    wanted = re.findall(r"^(?:dev_)?requirements = (.*)$", (ROOT / "settings.ini").read_text(), re.MULTILINE)
    pins = re.findall(r"^(\S+==\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert names(" ".join(wanted)) - names(" ".join(pins)) == set()
