"""What the measurements of the panel share: JupyterLab with a notebook in it, the machine in words, and tables as files."""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["PROBE", "Kernel", "Lab", "Server", "begin", "faults", "machine", "npm_file", "opened", "setup", "spread", "table", "verdict", "whole_flow", "write"]
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))
from comms import Kernel, whole_flow  # noqa: E402
from lab import PROBE, Lab, Server, chromium, faults, npm_file  # noqa: E402

PACKAGES = ("torch", "ipykernel", "ipywidgets", "jupyterlab", "notebook", "matplotlib")

# A training that goes on until it is stopped. One thread for PyTorch leaves the other core to the server and the browser.
SETUP = """import time, torch
from unet_nbtrain import TrainerPanel, UNet, demo_dataloaders
torch.set_num_threads({threads})
torch.manual_seed(0)
loaders = demo_dataloaders(n_train={images}, n_val=8, size={size}, batch_size=4)
panel = TrainerPanel(UNet(3, 1, width={width}, depth=3), loaders, num_epochs={epochs}, run_dir="runs/{name}", device="cpu", early_stopping_patience=None)
panel.show()"""


def setup(threads=1, images=64, size=96, width=16, epochs=1000, name="first"):
    """The first cell: a small U-Net on drawn images, and its panel"""
    return SETUP.format(threads=threads, images=images, size=size, width=width, epochs=epochs, name=name)


@contextmanager
def opened(cells, app="lab", dark=False, scale=1):
    """A browser that looks at a notebook of these cells, nothing run yet"""
    from playwright.sync_api import sync_playwright

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, sync_playwright() as playwright:
        root = Path(home) / "work"
        root.mkdir()
        server = Server(root, Path(home) / "home", dark)
        lab = Lab(playwright, server, dark, scale)
        try:
            server.write("panel.ipynb", cells)
            lab.open("panel.ipynb", app)
            yield lab
        finally:
            lab.close()
            server.close()


def begin(lab):
    """Run the first cell, press Start, and wait until the training is under way"""
    lab.run_cell(0)
    lab.button("Start").wait_for(timeout=60_000)
    lab.panel().scroll_into_view_if_needed()
    lab.button("Start").click()
    lab.until(lambda: lab.badge() in ("training", "validating"), "badge 'training'", 60)


def machine():
    """The machine and what runs on it, as a line for a table"""
    names = [f"{name} {found}" for name in PACKAGES if (found := _version(name))]
    browser = subprocess.run([chromium(), "--version"], capture_output=True, text=True).stdout.split()[:2] if chromium() else []
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg()[:2])
    cores = f"{os.cpu_count()} shared cores, no GPU, load {load} over the last one and five minutes"
    return f"{cores}; {platform.system()} {platform.machine()}, Python {platform.python_version()}, {', '.join(names)}, {' '.join(browser)}; {date.today()}."


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def table(heads, rows):
    """Markdown"""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def write(name, title, *parts):
    """A file in benchmarks/results, printed too"""
    text = "\n\n".join([f"# {title}", *parts, machine()]) + "\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def spread(values, unit="ms"):
    """Median, 95th percentile and largest, as texts"""
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return [f"{number:.0f} {unit}" for number in (statistics.median(ordered), p95, ordered[-1])]


def verdict(met):
    """For the last column"""
    return "yes" if met else "**no**"
