"""The notebooks are clean, the package is exactly their export, and README.md is the rendered `nbs/index.ipynb`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbtools import ROOT

EXPORT_AND_CLEAN = """
from nbdev.doclinks import nbdev_export
from nbdev.clean import nbdev_clean
nbdev_export.__wrapped__()
nbdev_clean.__wrapped__()
"""


def copy_project(to):
    """A copy of what nbdev needs, so that a test never writes into the working tree."""
    quiet = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs")
    for folder in ("nbs", "unet_nbtrain"):
        shutil.copytree(ROOT / folder, to / folder, ignore=quiet)
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, to)
    return to


def export_and_clean(project):
    """`nbdev_export && nbdev_clean` there, in a process of its own: nbdev remembers the first configuration it read."""
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    done = subprocess.run([sys.executable, "-c", EXPORT_AND_CLEAN], cwd=project, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def contents(project):
    """Relative name -> bytes, of notebooks and modules."""
    files = [*project.glob("nbs/*.ipynb"), *project.glob("unet_nbtrain/*.py")]
    return {path.relative_to(project).as_posix(): path.read_bytes() for path in files}


def differences(before, after):
    """Names of the files that differ or exist on one side only."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path)


def test_export_and_clean_change_nothing(project):
    before = contents(project)
    export_and_clean(project)
    changed = differences(before, contents(project))
    assert not changed, f"run `nbdev_export && nbdev_clean`: {changed}"


def test_the_table_of_paces_has_what_the_rooms_ask_for():
    """In `09_pace`: each `Pace(share=...)` of the package, by its room and its share."""
    table = (ROOT / "nbs" / "09_pace.ipynb").read_text(encoding="utf-8")
    told = sorted((room, float(share) / 100) for room, share in re.findall(r"\| `(\w+)`: [^|]+\| ([\d.]+) % \|", table))
    asked = [(path.stem, float(share)) for path in ROOT.glob("unet_nbtrain/*.py") for share in re.findall(r"\bPace\(share=([\d.]+)", path.read_text(encoding="utf-8"))]
    assert told == sorted(asked)


def test_a_module_changed_by_hand_is_found(project):
    module = project / "unet_nbtrain" / "core.py"
    module.write_text(module.read_text(encoding="utf-8") + "\n# by hand\n", encoding="utf-8")
    before = contents(project)
    export_and_clean(project)
    assert differences(before, contents(project)) == ["unet_nbtrain/core.py"]


def test_a_dirty_notebook_is_found(project):
    path = project / "nbs" / "00_core.ipynb"
    nb = nbformat.read(path, as_version=4)
    next(cell for cell in nb.cells if cell.cell_type == "code").execution_count = 7
    nbformat.write(nb, path)
    before = contents(project)
    export_and_clean(project)
    assert "nbs/00_core.ipynb" in differences(before, contents(project))


def test_a_lost_version_is_found(project):
    init = project / "unet_nbtrain" / "__init__.py"
    init.write_text(init.read_text(encoding="utf-8").replace('__version__ = "', '__version__ = "9.'), encoding="utf-8")
    before = contents(project)
    export_and_clean(project)
    assert differences(before, contents(project)) == ["unet_nbtrain/__init__.py"]


def readme(*args):
    return subprocess.run([sys.executable, ROOT / "scripts" / "readme.py", *map(str, args)], capture_output=True, text=True, timeout=120)


def test_readme_and_contributing_are_up_to_date():
    done = readme("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_readme_changed_by_hand_is_found(tmp_path):
    other = tmp_path / "README.md"
    other.write_text((ROOT / "README.md").read_text(encoding="utf-8") + "by hand\n", encoding="utf-8")
    done = readme("--check", "--to", other)
    assert done.returncode == 1
    assert "by hand" in done.stdout


def test_pictures_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / Path(target)).exists(), target
