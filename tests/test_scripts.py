"""The commands of the Makefile and what stands behind them, on small made-up notebooks."""

import os
import shutil
import subprocess
import sys

import demo
import nbformat
import nbrun
import pytest
import readme
import tests as all_tests
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbtools import ROOT


@pytest.fixture(autouse=True)
def environment_as_it_was(monkeypatch):
    """`nbrun` changes the environment of its process, which a script may and a test may not."""
    for name in ("PATH", "JUPYTER_PREFER_ENV_PATH", "JUPYTER_PLATFORM_DIRS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def notebook(*sources):
    return new_notebook(cells=[new_code_cell(source) for source in sources])


def test_a_notebook_runs_in_the_kernel_of_this_environment(tmp_path, monkeypatch, capsys):
    """Even where the user has a kernel of the same name in the home folder, which Jupyter would otherwise take."""
    spec = tmp_path / "data" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "other", "language": "python"}')
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    nb = notebook("import os, sys\nprint(sys.executable, os.getcwd())", "#| eval: false\n1 / 0", "6 * 7")
    nb.cells[1].outputs = [new_output("stream", text="kept")]
    assert nbrun.run_notebook(nb, tmp_path, skip=lambda cell: "eval: false" in cell.source) is None
    assert nb.cells[0].outputs[0].text.split() == [sys.executable, str(tmp_path)]
    assert nb.cells[1].outputs[0].text == "kept"
    assert nb.cells[2].outputs[0].data["text/plain"] == "42"
    assert "cell 2 of 2: 6 * 7" in capsys.readouterr().out


def test_the_error_of_a_cell_comes_back_as_text(tmp_path):
    nb = notebook("x = 1", "x / 0", "x = 3")
    error = nbrun.run_notebook(nb, tmp_path)
    assert "x / 0" in error and "ZeroDivisionError" in error
    assert nb.cells[2].execution_count is None


def row(epoch, loss, dice, best):
    part = {"loss": loss, "dice": dice, "iou": dice / (2 - dice)}
    return {"epoch": epoch, "train": part, "val": {**part, "dice": dice / 2}, "lr": 0.1, "seconds": 1.0, "best": best}


def test_the_table_of_the_demo():
    head, train, val = demo.table(row(3, 0.25, 0.8, True)).splitlines()
    assert head.split() == ["loss", "Dice", "IoU"]
    assert train.split() == ["training", "0.2500", "0.8000", "0.6667"]
    assert val.split() == ["validation", "0.2500", "0.4000", "0.6667"]


def test_the_newest_run_is_found(tmp_path):
    for age, name in enumerate(["b", "a"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "history.json").write_text("{}")
        os.utime(tmp_path / name / "history.json", (1e9 - age, 1e9 - age))
    (tmp_path / "c").mkdir()
    assert demo.newest_run(tmp_path).name == "b"
    with pytest.raises(SystemExit, match="no run"):
        demo.newest_run(tmp_path / "c")


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="


def test_the_readme_follows_the_directives(tmp_path):
    nb = notebook("#| hide\nsecret = 1", "#| echo: false\nshown('only its output')", "#| eval: false\npip_install()", "picture()",
                  "import nbdev; nbdev.nbdev_export()")  # fmt: skip
    nb.cells.insert(0, new_markdown_cell("# made up\n\n![panel](../docs/panel.png)"))
    nb.cells[2].outputs = [new_output("execute_result", {"text/plain": "an output"}), new_output("stream", name="stderr", text="noise")]
    nb.cells[4].outputs = [new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})]
    nbformat.write(nb, tmp_path / "index.ipynb")
    text, pictures = readme.render(tmp_path / "index.ipynb")
    assert "# made up" in text and "](docs/panel.png)" in text
    assert "an output" in text and "pip_install()" in text and "picture()" in text
    assert not any(word in text for word in ("secret", "shown", "#|", "nbdev_export", "noise"))
    assert list(pictures) == ["docs/images/readme_3_0.png"]
    assert "](docs/images/readme_3_0.png)" in text


def make(*args, cwd, **env):
    return subprocess.run(["make", *args], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)


@pytest.fixture
def checkout(tmp_path):
    """A folder in which only the installation is real enough to be asked."""
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def fake_python(path, version):
    """A stand-in for an interpreter of another version that makes environments holding itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!/bin/sh\necho \"$0 $*\" >> {path.parent}/calls\n"
        f"case \"$1 $2\" in\n  --version*) echo Python {version};;\n"
        f"  -c*) exec {sys.executable} -c \"import sys; sys.version_info = {tuple(map(int, version.split('.')))}; $2\";;\n"
        f"  '-m venv') mkdir -p .venv/bin && cp \"$0\" .venv/bin/python;;\n"
        f"  '-m pip') case \"$3\" in --version) exit 0;; esac;;\nesac\n"
    )
    path.chmod(0o755)
    return path


def test_an_old_python_is_told_apart(checkout):
    done = make("demo", f"PYTHON={fake_python(checkout / 'bin' / 'python', '3.9.18')}", cwd=checkout)
    assert done.returncode != 0
    assert "Python 3.9.18 is too old: Python 3.10 or later is needed" in done.stdout
    assert "make demo PYTHON=" in done.stdout
    assert not (checkout / ".venv").exists()


def test_a_missing_python_is_told(checkout):
    done = make("test", "PYTHON=python3.99", cwd=checkout)
    assert done.returncode != 0
    assert "There is no python3.99 here" in done.stdout


def test_it_installs_once_and_again_when_the_requirements_change(checkout):
    python = fake_python(checkout / "bin" / "python", "3.10.0")

    def installs():
        assert make("install", f"PYTHON={python}", cwd=checkout).returncode == 0
        return sum("pip install" in line for path in checkout.rglob("calls") for line in path.read_text().splitlines())

    assert installs() == 1
    assert installs() == 1
    os.utime(checkout / "constraints.txt", (4e9, 4e9))
    assert installs() == 2


BROWSER_TESTS = {
    "skips": "import pytest\n@pytest.mark.browser\ndef test_it(): pytest.skip('no Chromium')",
    "skips_whole": "import pytest\npytest.importorskip('no_such_playwright')",
    "passes": "import pytest\n@pytest.mark.browser\ndef test_it(): pass",
}


@pytest.mark.parametrize(
    "kind, required, code, told",
    [
        ("skips", "1", 1, "must not be skipped (REQUIRE_BROWSER=1)"),
        ("skips_whole", "1", 1, "no browser test ran"),
        ("passes", "1", 0, "2 passed"),
        ("skips", "0", 0, "1 passed, 1 skipped"),
        ("skips_whole", "0", 0, "1 passed, 1 skipped"),
    ],
)
def test_no_browser_test_goes_missing_where_one_is_required(tmp_path, kind, required, code, told):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = browser: needs a browser")
    (tmp_path / "test_browser.py").write_text(BROWSER_TESTS[kind])
    (tmp_path / "test_other.py").write_text("def test_other(): pass")
    env = {**os.environ, "REQUIRE_BROWSER": required}
    done = subprocess.run([sys.executable, "-m", "pytest"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout
    assert told in done.stdout


@pytest.mark.parametrize(
    "browser, broken, good",
    [("passes", None, True), ("skips", None, False), ("skips_whole", None, False), ("passes", "test_nbs.py", False), ("passes", "test_rest.py", False)],
)
def test_the_parts_of_the_suite_make_one_result(tmp_path, monkeypatch, capfd, browser, broken, good):
    """Each part may fail it, and only the part with the browser is asked for browser tests."""
    for name in ("test_nbs.py", "test_rest.py"):
        (tmp_path / name).write_text(f"def test_it(): assert {name != broken}")
    (tmp_path / "test_browser.py").write_text(BROWSER_TESTS[browser])
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = browser: needs a browser")
    parts = {"ROOT": tmp_path, "BESIDE": ["test_nbs.py"], "REST": ["test_rest.py"], "ALONE": ["test_browser.py"]}
    for name, value in parts.items():
        monkeypatch.setattr(all_tests, name, value)
    monkeypatch.setenv("REQUIRE_BROWSER", "1")
    assert (all_tests.main() == 0) is good, capfd.readouterr().out
