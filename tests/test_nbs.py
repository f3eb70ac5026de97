"""Every notebook runs as written, and its examples run again on the module that it exports.

`nbdev_test` runs what is written in the notebook and never imports the exported file. A name that only the notebook
imports, or a module changed by hand, passes there and fails here. `NB_FLAGS="slow cuda"` turns the flagged cells on.
After `nbdev_test`, `NBDEV_TESTED=1` leaves out the first of the two runs; notebooks without a module, which have no second, stay in.
"""

import importlib
import os
import sys
import threading
import time

import pytest
from conftest import forget_the_past
from nbtools import Cell, CellError, Notebook, notebooks, run_cells, skip_flags

DONE = os.environ.get("NBDEV_TESTED") == "1"  # `nbdev_test` has just run them all as they are written
AS_WRITTEN = [pytest.param(nb, id=str(nb)) for nb in notebooks() if not (DONE and nb.default_exp)]
EXPORTING = [pytest.param(nb, id=str(nb)) for nb in notebooks(module_only=True)]


@pytest.fixture(autouse=True)
def as_in_a_kernel(monkeypatch, tmp_path):
    """An empty working folder, inline figures, a small heap, and afterwards no figure and no thread that keeps the process alive."""
    forget_the_past()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    before = set(threading.enumerate())
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    deadline = time.monotonic() + 5
    while left := [t.name for t in threading.enumerate() if t not in before and not t.daemon]:
        assert time.monotonic() < deadline, f"threads that still run and are not daemons: {left}"
        time.sleep(0.05)


def run(nb, cells, namespace=()):
    """Run the cells; a failure shows the cell and nothing of this runner."""
    try:
        run_cells(nb, cells, namespace)
    except CellError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.mark.parametrize("nb", AS_WRITTEN)
def test_as_written(nb):
    run(nb, nb.runnable(skip_flags()))


@pytest.mark.parametrize("nb", EXPORTING)
def test_on_module(nb):
    module = importlib.import_module(f"unet_nbtrain.{nb.default_exp}")
    public = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    run(nb, nb.runnable(skip_flags(), exported=False), public)


def cells(*texts):
    "Code cells of a notebook that exists only here"
    return [Cell(i, "code", text) for i, text in enumerate(texts, 1)]


def test_an_error_names_notebook_and_cell():
    with pytest.raises(CellError, match=r"07_made_up, cell 2:(?s:.*)1 == 2(?s:.*)AssertionError: no"):
        run_cells("07_made_up", cells("x = 1", "assert x == 2 or 1 == 2, 'no'", "never = 1"))


def test_an_error_shows_no_frames_of_the_runner():
    with pytest.raises(CellError) as caught:
        run_cells("nb", cells("def f(): return 1 / 0", "f()"))
    assert "ZeroDivisionError" in str(caught.value)
    assert "interactiveshell" not in str(caught.value)


def test_a_syntax_error_names_the_cell():
    with pytest.raises(CellError, match="nb, cell 1"):
        run_cells("nb", cells("x ="))


def test_cells_share_one_loop_in_the_main_thread():
    ns = run_cells(
        "nb",
        cells(
            "import asyncio, threading\nran = []\nasync def later(): ran.append(1)\ntask = asyncio.create_task(later())",
            "await asyncio.sleep(0)\nassert ran == [1]",
            "main = threading.current_thread() is threading.main_thread()",
        ),
    )
    assert ns["main"] is True


def test_magics_and_the_prefilled_namespace():
    assert run_cells("nb", cells("%precision 3\ny = x + 1"), {"x": 1})["y"] == 2


def test_cells_that_are_left_out(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    sources = ["#| default_exp made_up", "#| export\na = 1", "b = 2", "#| slow\nc = 3", "#| eval: false\nd = 4",
               "#| hide\ne = 5", "#| hide\nimport nbdev; nbdev.nbdev_export()", ""]
    path = tmp_path / "00_made_up.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(s) for s in sources]), path)
    nb = Notebook(path)
    assert nb.default_exp == "made_up"
    assert [c.number for c in nb.runnable({"slow"})] == [2, 3, 6]
    assert [c.number for c in nb.runnable()] == [2, 3, 4, 6]
    assert [c.number for c in nb.runnable({"slow"}, exported=False)] == [3, 6]


def test_flags_come_from_settings_and_environment(monkeypatch):
    monkeypatch.delenv("NB_FLAGS", raising=False)
    assert skip_flags() == {"slow", "cuda"}
    monkeypatch.setenv("NB_FLAGS", "slow")
    assert skip_flags() == {"cuda"}
