"""Tables as Markdown, with the machine and the versions above them, and back from Markdown for the notebook."""

import importlib.metadata
import os
import platform
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def processor():
    "The kind of processor, as the system names it"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def load():
    "How many processes want to run, on average over the last minute"
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def versions(packages=()):
    "Versions of Python, PyTorch and the packages that are here"
    known = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in packages:
        try:
            known[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{name} {version}" for name, version in known.items())


def circumstances(packages=()):
    "One line that says where the numbers come from"
    return f"{date.today()}, {processor()}, {os.cpu_count()} cores, one thread; {versions(packages)}; load at the end {load()}."


def sentence(text):
    "With a capital letter and a full stop"
    return text[:1].upper() + text[1:] + "."


def table(heads, rows):
    "A Markdown table"
    line = "| " + " | ".join(heads) + " |"
    return "\n".join([line, "|" + "---|" * len(heads), *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def write(path, title, *parts):
    "A file of results; returns its text"
    text = "\n\n".join([f"# {title}", *parts]) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text


def read_tables(path):
    "All tables of a file: `{heading above it: [row as a dict of column and text, …]}`; empty where there is no file"
    tables, heading, heads = {}, "", None
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if line.startswith("#"):
            heading = line.lstrip("#").strip()
        if cells is None:
            heads = None
        elif heads is None:
            heads = cells
            tables.setdefault(heading, [])
        elif set("".join(cells)) != {"-"}:
            tables[heading].append(dict(zip(heads, cells)))
    return tables


def numbers(text):
    "`median [low, high]` as three floats, a lone number three times"
    parts = [float(o) for o in text.replace("[", " ").replace("]", " ").replace(",", " ").split()]
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else (parts[0],) * 3
