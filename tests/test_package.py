"""What a user installs: the wheel holds the modules, the licence and the command, and nothing of the workshop."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser

import pytest
from nbtools import PACKAGE, ROOT

SOURCES = ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def call(*args, cwd):
    """Run this Python there, without what pytest put on its path; returns standard output."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source, to):
    call("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", to, source, cwd=source)
    return next(to.glob("*.whl"))


def contents(wheel):
    """Name -> bytes; RECORD follows from the others."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a package is made of, since a build leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel):
    found = contents(wheel)
    return email.message_from_bytes(found[next(name for name in found if name.endswith(".dist-info/METADATA"))])


@pytest.fixture(scope="module")
def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def test_the_wheel_holds_the_modules_and_nothing_else(wheel):
    found = contents(wheel)
    assert {name for name in found if ".dist-info/" not in name} == {f"unet_nbtrain/{path.name}" for path in PACKAGE.glob("*.py")}
    assert any(name.endswith("/LICENSE") for name in found)


def test_the_command_is_installed(wheel):
    found = contents(wheel)
    points = found[next(name for name in found if name.endswith("entry_points.txt"))].decode()
    assert "[console_scripts]\nunet-nbtrain = unet_nbtrain.cli:main" in points


def test_metadata_comes_from_settings(metadata, settings):
    assert metadata["Name"].replace("-", "_") == settings["lib_name"]
    assert metadata["Version"] == settings["version"]
    assert metadata["Requires-Python"] == f">={settings['min_python']}"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"] == settings["description"]
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_a_user_gets_no_development_tools(metadata):
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {line.split(">")[0].split("=")[0].strip() for line in required}
    assert names == {"torch", "numpy", "pillow", "ipywidgets", "matplotlib", "tensorboard", "google-crc32c", "tqdm"}


def test_the_source_distribution_builds_the_same_wheel(source, wheel, tmp_path):
    call("-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})", cwd=source)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    assert contents(build_wheel(unpacked, tmp_path / "again")) == contents(wheel)


def test_the_installed_wheel_works_outside_the_repository(wheel, tmp_path, settings):
    call("-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    code = """if True:
        import sys; sys.path.insert(0, "site")
        import unet_nbtrain
        print(unet_nbtrain.__file__, unet_nbtrain.__version__)
        for name in unet_nbtrain.__all__: getattr(unet_nbtrain, name)
    """
    where, version = call("-c", code, cwd=tmp_path).split()
    assert where.startswith(str(tmp_path)) or where.startswith("site")
    assert version == settings["version"]
