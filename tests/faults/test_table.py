"""Every row of the fault table has a test, or a line that says why this machine cannot produce it.

A test of row 7 is called `test_007_…`. A file of this folder may have `NOT_HERE = {90: "why"}`, and `ELSEWHERE = {100: "tests/file.py::test"}`
for what is tested outside of this folder.
"""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = range(1, 125)
PENDING = frozenset()  # Rows whose tests are being written; empty in the end


def functions(path):
    return [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def notes(path, name):
    """The dictionary of that name in a file, if it has one"""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    return {}


FILES = sorted(path for path in HERE.glob("test_*.py") if path.name != Path(__file__).name)
TESTED = {int(found[1]) for path in FILES for name in functions(path) if (found := re.match(r"test_(\d{3})_", name))}
NOT_HERE = {row: why for path in FILES for row, why in notes(path, "NOT_HERE").items()}
ELSEWHERE = {row: where for path in FILES for row, where in notes(path, "ELSEWHERE").items()}


def test_every_row_is_accounted_for():
    missing = sorted(set(ROWS) - TESTED - NOT_HERE.keys() - ELSEWHERE.keys() - PENDING)
    assert not missing, f"rows of the fault table without a test or a reason: {missing}"
    assert TESTED | NOT_HERE.keys() | ELSEWHERE.keys() | PENDING <= set(ROWS)


def test_nothing_is_pending_that_is_done():
    done = sorted(PENDING & (TESTED | NOT_HERE.keys() | ELSEWHERE.keys()))
    assert not done, f"take these rows out of PENDING: {done}"


def test_reasons_are_sentences():
    assert all(isinstance(why, str) and len(why.split()) >= 5 for why in NOT_HERE.values())
    assert not NOT_HERE.keys() & TESTED, "a row has a test and a reason why it has none"


@pytest.mark.parametrize("row", sorted(ELSEWHERE))
def test_what_is_said_to_be_elsewhere_is_there(row):
    path, _, name = ELSEWHERE[row].partition("::")
    assert name.startswith("test_") and name in functions(HERE.parents[1] / path)
