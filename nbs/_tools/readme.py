"""Write README.md from nbs/index.ipynb.

    python nbs/_tools/readme.py          write it
    python nbs/_tools/readme.py --check  change nothing; exit 1 if it is stale
"""

import argparse
import base64
import re
import sys
from posixpath import normpath

from notebooks import NBS, ROOT, read, shown

README = ROOT / "README.md"
PICTURES = NBS / "_static" / "readme"
NOTE = "<!-- Written from nbs/index.ipynb by nbs/_tools/readme.py: edit the notebook. -->\n\n"
_LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)")
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def from_root(markdown: str) -> str:
    """Links that were relative to nbs/ made relative to the repository's root; code blocks stay as they are."""
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda m: m[1] + normpath(f"nbs/{m[2]}"), part) for part in parts[::2]]
    return "".join(parts)


def render() -> dict:
    """All files that the front page becomes: README.md and its pictures, {path: bytes}."""
    parts, files = [], {}
    for cell in read(NBS / "index.ipynb").cells:
        if cell.cell_type == "markdown":
            parts.append(from_root(cell.source))
            continue
        source, outputs = shown(cell) if cell.cell_type == "code" else ("", [])
        if source:
            parts.append(f"```python\n{source}\n```")
        for output in outputs:
            data = output.get("data", {})
            if "image/png" in data:
                picture = PICTURES / f"figure_{len(files) + 1}.png"
                files[picture] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure {len(files)}]({picture.relative_to(ROOT).as_posix()})")
            elif "text/markdown" in data:
                parts.append(from_root(data["text/markdown"].strip()))
            elif "text/html" in data:
                parts.append(plain_html(data["text/html"]))
            else:
                text = output.get("text") or data.get("text/plain", "")
                parts.append(f"```text\n{text.rstrip()}\n```")
    files[README] = (NOTE + "\n\n".join(parts) + "\n").encode()
    return files


def plain_html(html: str) -> str:
    """A table as GitHub draws it: without styles, indentation and empty lines, which would end the block."""
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    html = re.sub(r' (?:style|class|border)="[^"]*"', "", html)
    return "\n".join(line.strip() for line in html.splitlines() if line.strip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    files = render()
    old = {path for path in PICTURES.glob("*.png") if path not in files}
    if parser.parse_args().check:
        stale = [p for p, content in files.items() if not p.exists() or p.read_bytes() != content] + sorted(old)
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run python nbs/_tools/readme.py")
        return 1 if stale else 0
    for path in old:
        path.unlink()
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
