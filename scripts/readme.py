"""Write README.md from nbs/index.ipynb and the table of rooms in CONTRIBUTING.md, or say with --check how they differ.

Cells with `#| hide` are left out, `#| echo: false` hides the code and keeps its output. Pictures among the outputs become
files in docs/images/. The notebook's links are relative to nbs/, those of the README to the project.
"""

import argparse
import difflib
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r"^#\s*\|.*\n?", re.MULTILINE)


def has(cell, directive):
    """Whether a code cell carries the directive, spaces aside."""
    return any(re.fullmatch(rf"#\s*\|\s*{directive}\s*", line) for line in cell.source.splitlines())


def prepare(nb):
    """The notebook as readers of the README see it; changes `nb`."""
    nb.cells = [cell for cell in nb.cells if cell.cell_type == "markdown" or not (has(cell, "hide") or "nbdev_export(" in cell.source)]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", "](")
        else:
            cell.metadata["tags"] = ["no-input"] if has(cell, r"echo:\s*false") else []
            cell.source = DIRECTIVE.sub("", cell.source)
            cell.outputs = [out for out in cell.outputs if out.output_type != "stream" or out.name != "stderr"]
    nb.metadata["language_info"] = {"name": "python"}  # what the code blocks are marked with
    return nb


def render(path):
    """The text of the README, and its pictures as {relative name: bytes}."""
    config = Config(TagRemovePreprocessor={"enabled": True, "remove_input_tags": {"no-input"}})
    resources = {"output_files_dir": "docs/images", "unique_key": "readme"}
    text, resources = MarkdownExporter(config=config).from_notebook_node(prepare(nbformat.read(path, as_version=4)), resources)
    text = re.sub(r"\n{3,}", "\n\n", text)
    text = "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"
    return text, resources.get("outputs", {})


def with_rooms(text):
    """CONTRIBUTING.md with a fresh table of the notebooks that export a module: number, name, what the second line says."""
    rows = ["| number | room | |", "|---|---|---|"]
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        if any(re.match(r"#\s*\|\s*default_exp", cell.source) for cell in cells):
            number, name = path.stem.split("_", 1)
            about = next((line[2:] for line in cells[0].source.splitlines() if line.startswith("> ")), "")
            rows.append(f"| {number} | `{name}` | {about} |")
    return re.sub(r"(<!-- rooms:.*?-->\n).*?(<!-- /rooms -->)", lambda m: m[1] + "\n".join(rows) + "\n" + m[2], text, flags=re.DOTALL)


def wanted(readme):
    """All files that this script writes, as {path: bytes}."""
    text, pictures = render(ROOT / "nbs" / "index.ipynb")
    contributing = ROOT / "CONTRIBUTING.md"
    rooms = with_rooms(contributing.read_text(encoding="utf-8"))
    return {readme: text.encode(), contributing: rooms.encode(), **{ROOT / name: data for name, data in pictures.items()}}


def differences(files):
    """What --check prints; empty when all is well."""
    for path, new in files.items():
        old = path.read_bytes() if path.exists() else b""
        if old != new and path.suffix == ".md":
            lines = old.decode().splitlines(), new.decode().splitlines()
            yield from difflib.unified_diff(*lines, path.name, f"{path.name}, from the notebooks", lineterm="")
        elif old != new:
            yield f"{path.name} is missing or differs"


def write(readme=ROOT / "README.md"):
    """Write whatever has changed."""
    for path, new in wanted(readme).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != new:
            path.write_bytes(new)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is not up to date")
    parser.add_argument("--to", type=Path, default=ROOT / "README.md", help="the README (default: README.md)")
    args = parser.parse_args()
    if not args.check:
        return write(args.to)
    told = list(differences(wanted(args.to)))
    print(*told, sep="\n", end="\n" if told else "")
    sys.exit("Not up to date: run `make readme`." if told else 0)


if __name__ == "__main__":
    main()
