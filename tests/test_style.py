"""The rules of taste (gates.py) hold in every module and notebook, and each rule is able to fail."""

import re
import subprocess
import sys

import gates
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbtools import PACKAGE, ROOT, Notebook, notebooks

MODULES = [pytest.param(path, id=path.stem) for path in sorted(PACKAGE.glob("*.py")) if path.stem != "_modidx"]
ESSAYS = [pytest.param(nb, id=str(nb)) for nb in notebooks(module_only=True)]
ALL = [pytest.param(nb, id=str(nb)) for nb in notebooks()]


def report(where, *findings):
    """Fail with all findings of a file in one message."""
    told = [finding for rule in findings for finding in rule]
    if told:
        pytest.fail(f"{where}: {len(told)} finding(s)\n  " + "\n  ".join(told), pytrace=False)


@pytest.mark.parametrize("path", MODULES)
def test_module(path):
    source = path.read_text(encoding="utf-8")
    report(path.name, gates.sizes(source), gates.habits(source), gates.documentation(source))


@pytest.mark.parametrize("nb", ESSAYS)
def test_essay(nb):
    report(nb, gates.shape(nb), gates.each_cell(nb), gates.rows(nb), gates.timed(nb), gates.prose(nb), gates.checked(nb))


@pytest.mark.parametrize("nb", ALL)
def test_what_is_stored(nb):
    report(nb, gates.title(nb), gates.stored(nb, nb.path.stat().st_size))


def test_ruff():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Each rule can fail


def body(n, indent="    "):
    return "".join(f"{indent}x = {i}\n" for i in range(n))


@pytest.mark.parametrize(
    "source, told",
    [
        ("x = 1\n" * 301, "301 lines"),
        ("def f():\n" + body(50), r"f\(\) has 51 lines"),
        ("class A:\n" + body(200), "class A has 201 lines"),
        ("class UNetTrainer:\n" + body(250), "class UNetTrainer has 251 lines"),
        (f"class A:\n    def __init__(self, {', '.join(f'a{i}' for i in range(16))}, *, b=1): pass", "takes 17 arguments"),
    ],
)
def test_sizes_can_fail(source, told):
    assert_only(gates.sizes(source), told)


@pytest.mark.parametrize(
    "source",
    ["x = 1\n" * 300, "def f():\n" + body(49), "class UNetTrainer:\n" + body(249),
     f"class A:\n    def __init__(self, {', '.join(f'a{i}' for i in range(15))}, *, b=1): pass"],
)  # fmt: skip
def test_sizes_at_the_limit_pass(source):
    assert list(gates.sizes(source)) == []


@pytest.mark.parametrize(
    "source, told",
    [
        ("from os import *", "star import from os"),
        ("def f():\n    print(1)", r"line 2: print\(\)"),
        ("import contextlib\nwith contextlib.suppress(Exception): f()", r"suppress\(Exception\)"),
        ("try: f()\nexcept: pass", "broad except"),
        ("try: f()\nexcept Exception: pass", "broad except"),
        ("try: f()\nexcept (ValueError, Exception): pass", "broad except"),
        ("try: f()\nexcept BaseException as e: told = str(e)", "broad except"),
        ("try: f()\nexcept Exception as e: log.warning('%s', e)", "broad except"),
        ("try: f()\nexcept Exception as e: told = f'{e}'", "broad except"),
    ],
)
def test_habits_can_fail(source, told):
    assert_only(gates.habits(source), told)


@pytest.mark.parametrize(
    "handler",
    ["except ValueError: pass", "except Exception: raise", "except BaseException as e: raise OSError() from e",
     "except Exception: log.warning('no', exc_info=True)", "except Exception: log.exception('no')",
     "except BaseException as e: self.exception = e", "except Exception as e: answer(error=e)", "except Exception as e: return e",
     "except Exception as e: error, reason = e, str(e)"],
)  # fmt: skip
def test_habits_let_pass_what_hands_the_error_on(handler):
    assert list(gates.habits(f"def g():\n    try: f()\n    {handler}")) == []


GOOD = '''
@dataclass
class Row:
    "A row"
    loss: float  # Mean over the pixels

    def scaled(
        self,
        by: tuple = (
            1.0,
        ),  # The factor
        *more: int,  # Others
    ) -> float:
        "Scaled"

    def on_epoch_end(self, trainer, row):
        "Observers share one contract"


def _private(x): pass
'''


@pytest.mark.parametrize(
    "was, now, told",
    [
        ('    "A row"\n', "", "Row: no docstring"),
        ("  # Mean over the pixels", "", "Row: field loss has no docment"),
        ('        "Scaled"', "        pass", "Row.scaled: no docstring"),
        (") -> float:", "):", "Row.scaled: no annotation of what it returns"),
        ("*more: int", "*more", "Row.scaled: parameter more has no annotation"),
        ("  # The factor", "", "Row.scaled: parameter by has no docment"),
        ("  # Others", "", "Row.scaled: parameter more has no docment"),
        ('        "Observers share one contract"', "        pass", "Row.on_epoch_end: no docstring"),
        ("def _private(x): pass", 'def public(x: int) -> int:\n    "Doc"', "public: parameter x has no docment"),
        ("def _private(x): pass", "class Public:\n    'Doc'\n    def __init__(self, x): pass  # Ok", "parameter x has no annotation"),
    ],
)
def test_documentation_can_fail(was, now, told):
    assert list(gates.documentation(GOOD)) == []
    assert was in GOOD
    assert_only(gates.documentation(GOOD.replace(was, now)), told)


def test_methods_that_a_public_class_inherits_are_public():
    hidden = 'class _Base:\n    "Doc"\n    def save(self) -> None: pass\n'
    assert list(gates.documentation(hidden)) == []
    assert_only(gates.documentation(hidden + 'class Own(_Base):\n    "Doc"\n'), "_Base.save: no docstring")
    again = 'class Own(_Base):\n    "Doc"\n    def save(self) -> None: "Doc"\n'
    assert list(gates.documentation(hidden + again)) == []


def test_two_parameters_on_a_line_have_no_docment():
    source = 'def f(\n    a: int, b: int,  # Both\n) -> int:\n    "Doc"\n'
    assert len(list(gates.documentation(source))) == 2


def assert_only(findings, told):
    """Exactly one finding, and it says `told`."""
    found = list(findings)
    assert len(found) == 1 and re.search(told, found[0]), found


@pytest.fixture
def essay(tmp_path):
    """Writes a notebook: `m` markdown, `E` an exported function, `I` exported imports, `x` an example, `h` hidden code."""
    made = {"m": "Some words of prose.", "E": '#| export\ndef twice(x): return 2 * x', "I": "#| export\nimport os",
            "x": "assert twice(2) == 4", "h": "#| hide\nsecret = 1"}  # fmt: skip

    def write(letters, **texts):
        new = [new_markdown_cell("# made up\n\n> For a test"), new_code_cell("#| default_exp made_up")]
        for letter in letters:
            text = {**made, **texts}[letter]
            new.append(new_markdown_cell(text) if letter == "m" else new_code_cell(text))
        new.append(new_code_cell("#| hide\nimport nbdev; nbdev.nbdev_export()"))
        nbformat.write(new_notebook(cells=new), tmp_path / "00_made_up.ipynb")
        return Notebook(tmp_path / "00_made_up.ipynb")

    return write


LONG = "mImEmxxmxxmxxm" + "xmxm" * 5
ESSAY_RULES = gates.shape, gates.each_cell, gates.rows, gates.timed, gates.prose, gates.checked


def test_a_good_essay_passes(essay):
    nb = essay(LONG)
    assert [finding for rule in ESSAY_RULES for finding in rule(nb)] == []


@pytest.mark.parametrize(
    "letters, texts, rule, told",
    [
        ("mImEmxxx", {}, gates.shape, "11 cells, wanted 30 to 90"),
        (LONG + "mx" * 30, {}, gates.shape, "97 cells"),
        ("mEm" + "xxxm" * 10 + "x", {}, gates.shape, "of the cells are markdown"),
        (LONG, {"E": "#| export\n" + "x = 1\n" * 40}, gates.shape, r"words for 41 exported lines: 1\.\d a line"),
        ("mE", {"E": "#| export\n" + "x = 1\n" * 51}, gates.each_cell, "51 exported lines"),
        ("mx", {"x": "x = 1\n" * 11}, gates.each_cell, "an example of 11 lines"),
        ("mx", {"x": "x = 1  # one"}, gates.each_cell, "a comment in an example"),
        ("mE", {"E": "#| export\nimport os\ndef f(): pass"}, gates.each_cell, "a cell of their own"),
        ("mIEEm", {}, gates.rows, "more than 2 exported cells in a row"),
        ("mIEhEm", {}, gates.rows, "more than 2 exported cells in a row"),
        ("mxxxhx", {}, gates.rows, "more than 3 example cells in a row"),
        ("mx", {"x": "assert time.perf_counter() - began < 5"}, gates.timed, "asserts a duration"),
        ("mxh", {"x": "ms = {}\nms['a'] = timeit.timeit('f()')\nassert max(ms.values()) < 2"}, gates.timed, "duration .ms"),
        ("mx", {"x": "for i in 1, 2:\n    ms = time.process_time() - i\nassert ms < 9"}, gates.timed, "duration .ms"),
        ("mx", {"x": "def took(): return time.process_time()\nlate = took() - 3\nassert late < 1"}, gates.timed, "duration .late"),
        ("xEx", {}, gates.prose, "no markdown beside twice"),
        ("mIEx", {}, gates.prose, "no markdown beside twice"),
        ("xEx", {"E": "#| export\nLIMIT = 3", "x": "assert LIMIT"}, gates.prose, "no markdown beside LIMIT"),
        ("mEmxx", {}, gates.checked, "2 checks of twice"),
        ("mEm", {"E": "#| export\nLIMIT = 3"}, gates.checked, "no check of LIMIT"),
    ],
)
def test_essay_rules_can_fail(essay, letters, texts, rule, told):
    assert_only(rule(essay(letters, **texts)), told)


def test_the_logger_may_stand_beside_the_imports(essay):
    assert list(gates.each_cell(essay("mE", E="#| export\nimport logging\n_log = logging.getLogger(__name__)"))) == []


def test_markdown_that_names_it_may_stand_above_the_pair(essay):
    assert list(gates.prose(essay("mIEx", m="Doubling is `twice`."))) == []


def test_the_form_of_the_first_and_the_last_cell(essay):
    nb = essay(LONG)
    nb.cells = nb.cells[1:-1] + [nb.cells[2]]
    first, last = gates.shape(nb)
    assert "`# title`" in first and "nbdev_export()" in last


def test_stored_errors_and_bytes_can_fail(essay):
    nb = essay(LONG)
    assert list(gates.stored(nb, 400_000)) == []
    nb.raw.cells[5].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
    large, error = gates.stored(nb, 400_001)
    assert "400 kB" in large and error.startswith("cell 6")


@pytest.mark.parametrize(
    "example, count",
    [
        ("assert True", 0),
        ("assert twice(1) == 2", 1),
        ("a = twice(1)\nb = [a, 1]\nassert b[0] == 2", 1),
        ("for x, y in [(1, 2), (2, 4), (3, 6)]:\n    assert twice(x) == y", 3),
        ("for x in range(3):\n    assert twice(x) == 2 * x", 1),
        ("def check(x, y):\n    assert x == y\ncheck(twice(1), 2)\ncheck(twice(2), 4)", 2),
        ("import torch\ntorch.testing.assert_close(twice(1), 2)", 1),
        ("twice(log)\nassert log == [1]\nassert len(log) == 1", 2),
        ("with twice(1) as two:\n    assert two == 2", 1),
        ("log = []\nlog.append(twice(1))\nassert log == [2]", 1),
        ("class Mine:\n    f = twice\nassert Mine.f(1) == 2", 1),
        ("#| slow\nassert twice(1) == 2", 0),
        ("#| eval: false\nassert twice(1) == 2", 0),
    ],
)
def test_how_checks_are_counted(essay, example, count):
    assert gates.count_checks(essay("mEmx", x=example), {"twice"})["twice"] == count
