"""The panel in a kernel of each version of ipykernel and ipywidgets, over comms, without a browser.

    python -m benchmarks.panel_versions [--cache build/panel_versions] [--kernels 6.29.5 7.4.0] [--widgets 7.7.1]

Each version lies in a folder of its own (`pip install --target`), which comes before the installed packages. The flow is that of
tests/comms.py: show, Start, a cell meanwhile, Pause, another learning rate, another tab, Resume, Save, Pause while a cell is busy, a second
show(), Stop, the still of the saved notebook, the best weights in the model. About three minutes, and one for pip at first.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .panel_tools import Kernel, table, whole_flow, write


KERNELS, WIDGETS = ("6.29.5", "7.0.0", "7.3.0", "7.4.0"), ("7.7.1", "8.1.9")
BESIDE = {"ipywidgets==7.7.1": ["ipython_genutils"]}  # What it needs and nothing else here does


def folder_of(cache, name, version):
    """The folder with this version of a package, filled at the first time"""
    folder = Path(cache).resolve() / f"{name}-{version}"
    if not folder.is_dir():
        wanted = [f"{name}=={version}", *BESIDE.get(f"{name}=={version}", [])]
        unready = folder.with_suffix(".unready")
        subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--target", unready, *wanted], check=True)
        unready.rename(folder)
    return folder


def try_pair(cache, kernel_version, widgets_version):
    """A line of the table, and whether all went well"""
    paths = [folder_of(cache, "ipykernel", kernel_version), folder_of(cache, "ipywidgets", widgets_version)]
    with tempfile.TemporaryDirectory() as home:
        kernel, began = Kernel(home, paths), time.monotonic()
        try:
            assert kernel.run("__import__('ipykernel').__version__, __import__('ipywidgets').__version__") == str((kernel_version, widgets_version))
            took = whole_flow(kernel, Path(home))
            said, good = "passed", True
        except AssertionError as error:
            took, said, good = {}, f"**failed**: {str(error)[:200]}", False
        finally:
            kernel.close()
    times = [f"{took[name]:.2f} s" if name in took else "after the cell" if good else "" for name in ("pause", "pause, busy")]
    return [kernel_version, widgets_version, said, *times, f"{time.monotonic() - began:.0f} s"], good


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", default="build/panel_versions")
    parser.add_argument("--kernels", nargs="+", default=KERNELS)
    parser.add_argument("--widgets", nargs="+", default=WIDGETS)
    arguments = parser.parse_args()
    found = [try_pair(arguments.cache, kernel, widgets) for kernel in arguments.kernels for widgets in arguments.widgets]
    about = (
        "The whole flow of tests/comms.py in a kernel of these versions, without a browser. *Pause*: from the click to the badge. *Busy*: while a cell "
        "computes in pure Python; kernels without subshells handle clicks after the cell."
    )
    write("panel_versions", "Versions", about, table(["ipykernel", "ipywidgets", "flow", "pause", "pause, busy", "took"], [row for row, _ in found]))
    return 0 if all(good for _, good in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
