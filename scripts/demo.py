"""Run the quick start in a real kernel, without a browser, and say what came out of it and where it lies."""

import math
import sys
from pathlib import Path

from nbrun import read, run_notebook, write

from unet_nbtrain.history import History

ROOT = Path(__file__).resolve().parents[1]
QUICK_START = ROOT / "nbs" / "20_quick_start.ipynb"
DEMO = ROOT / "demo"


def newest_run(folder):
    """The run that was written last; exits where there is none."""
    found = sorted(folder.glob("*/history.json"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else sys.exit(f"The notebook ran, but no run with a history.json lies in {folder}.")


def table(row):
    """Loss, Dice and IoU of a history row for people, training above validation."""
    lines = [f"{'':12}{'loss':>8}{'Dice':>8}{'IoU':>8}"]
    for part, name in (("train", "training"), ("val", "validation")):
        numbers = (row[part].get(key, math.nan) for key in ("loss", "dice", "iou"))
        lines.append(f"{name:12}" + "".join(f"{number:8.4f}" for number in numbers))
    return "\n".join(lines)


def products(run):
    """What the demo leaves, as `{name: path}`."""
    return {
        "notebook": DEMO / "quick_start.ipynb",
        "curves": run / "curves.png",
        "checkpoint": run / "checkpoints" / "best_model.pth",
        "TensorBoard": run / "tensorboard",
        "history": run / "history.json",
    }


def main():
    DEMO.mkdir(exist_ok=True)
    print(f"Running {QUICK_START.relative_to(ROOT)} in a kernel; it trains for about a minute.", flush=True)
    nb = read(QUICK_START)
    error = run_notebook(nb, DEMO)
    write(nb, DEMO / "quick_start.ipynb")
    if error:
        sys.exit(f"{error}\nThe notebook up to this error: {DEMO / 'quick_start.ipynb'}")
    run = newest_run(DEMO / "runs")
    history = History.load(run / "history.json")
    best = history.best
    print(f"\nBest epoch: {best['epoch']} of {len(history.rows)}\n{table(best)}\n")
    missing = []
    for name, path in products(run).items():
        print(f"{name:12}{path.relative_to(ROOT)}")
        if not path.exists():
            missing.append(str(path))
    if missing:
        sys.exit(f"Missing: {', '.join(missing)}")
    print("\nNext: `make lab` opens the same notebook with its buttons; `.venv/bin/tensorboard --logdir demo/runs` shows the curves.")


if __name__ == "__main__":
    main()
