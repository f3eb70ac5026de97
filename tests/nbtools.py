"""What the tests know about notebooks: where they are, what a cell is, and how to run cells as a kernel does."""

import asyncio
import atexit
import os
import re
import sys
import traceback
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
PACKAGE = ROOT / "unet_nbtrain"
_DIRECTIVE = re.compile(r"#\s*\|\s*(\S+)\s*(.*)")
_INTERNALS = ("/IPython/", "/asyncio/", "/tests/nbtools.py")


@dataclass(frozen=True)
class Cell:
    """One cell; `number` counts from 1, as a person does who looks for it."""

    number: int
    kind: str
    text: str

    @cached_property
    def directives(self) -> dict[str, str]:
        """The `#| word rest` lines at the top of a code cell, as `{word: rest}`; a colon after the word is dropped."""
        found = {}
        for line in self.text.splitlines() if self.kind == "code" else ():
            match = _DIRECTIVE.match(line.strip())
            if match:
                found[match[1].rstrip(":")] = match[2].strip()
            elif line.strip():
                break
        return found

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are neither blank nor directives."""
        return [line for line in self.text.splitlines() if line.strip() and not self._is_directive(line)]

    def _is_directive(self, line):
        return self.kind == "code" and bool(_DIRECTIVE.match(line.strip()))

    @property
    def is_markdown(self) -> bool:
        return self.kind == "markdown"

    @property
    def is_export(self) -> bool:
        return bool(self.directives.keys() & {"export", "exports", "exporti"})

    @property
    def is_housekeeping(self) -> bool:
        """`#| default_exp` and the closing call that exports: no part of the essay, and never run by a test."""
        return "default_exp" in self.directives or "nbdev_export(" in self.text

    @property
    def is_example(self) -> bool:
        """Code for the reader: neither exported nor hidden."""
        return self.kind == "code" and not (self.is_export or self.is_housekeeping or "hide" in self.directives)


class Notebook:
    """A notebook as its cells; `default_exp` is the module it exports, or None."""

    def __init__(self, path):
        self.path = Path(path)
        self.raw = nbformat.read(self.path, as_version=4)
        self.cells = [Cell(i, cell.cell_type, cell.source) for i, cell in enumerate(self.raw.cells, 1)]

    def __repr__(self):
        return self.path.stem

    @property
    def default_exp(self):
        return next((c.directives["default_exp"] for c in self.cells if "default_exp" in c.directives), None)

    @property
    def order(self):
        """The number in the file name, which is the import order; None for `index`."""
        match = re.match(r"(\d+)_", self.path.name)
        return int(match[1]) if match else None

    def runnable(self, skip_flags=frozenset(), exported=True):
        """The code cells that a test runs, with or without the exported ones."""
        for cell in self.cells:
            off = cell.directives.get("eval", "").lower() == "false" or skip_flags & cell.directives.keys()
            if cell.kind == "code" and cell.lines and not (off or cell.is_housekeeping) and (exported or not cell.is_export):
                yield cell


def notebooks(module_only=False):
    """All notebooks of the project in import order; with `module_only`, those that export a module."""
    found = [Notebook(path) for path in sorted(NBS.glob("*.ipynb"))]
    return [nb for nb in found if nb.default_exp] if module_only else found


def skip_flags():
    """Directives that switch a cell off: `tst_flags` of settings.ini less those in the environment variable NB_FLAGS."""
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return frozenset(ini["DEFAULT"]["tst_flags"].split()) - set(os.environ.get("NB_FLAGS", "").split())


class CellError(AssertionError):
    """A cell failed; the message names notebook and cell and shows the cell's own frames only."""


class _Shell(InteractiveShell):
    def enable_gui(self, gui=None):
        pass  # `%matplotlib inline` asks for it; the base class refuses

    def _showtraceback(self, etype, evalue, stb):
        pass  # the error is raised instead of printed


def _own_frames(error):
    "The traceback without the frames of IPython and of this runner"
    told = traceback.TracebackException.from_exception(error)
    link = told
    while link:
        kept = [frame for frame in link.stack if not any(part in frame.filename for part in _INTERNALS)]
        link.stack = traceback.StackSummary.from_list(kept)
        link = link.__cause__ or link.__context__
    return "".join(told.format())


def run_cells(
    name,  # What to call the notebook in an error
    cells,  # The cells to run, in order
    namespace=(),  # Names that exist before the first cell
):
    """Run code cells in a fresh namespace, on one event loop in the main thread, as a kernel does; return the namespace.

    Raises `CellError` for the first cell that fails.
    """
    main = sys.modules["__main__"]
    _Shell.clear_instance()
    shell = _Shell.instance()
    shell.history_manager.enabled = False
    shell.user_ns.update(namespace)

    async def run_all():
        for cell in cells:
            try:
                code = shell.transform_cell(cell.text)
            except SyntaxError as error:
                raise CellError(f"{name}, cell {cell.number}: {error}\n\n{cell.text}") from None
            result = await shell.run_cell_async(cell.text, transformed_cell=code)
            error = result.error_before_exec or result.error_in_exec
            if error is not None:
                raise CellError(f"{name}, cell {cell.number}:\n\n{cell.text}\n\n{_own_frames(error)}")

    try:
        asyncio.run(run_all())
        return dict(shell.user_ns)
    finally:
        sys.modules["__main__"] = main
        shell.atexit_operations()
        atexit.unregister(shell.atexit_operations)
        _Shell.clear_instance()
