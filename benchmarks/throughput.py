"""Images a second in a small training as people do it: a U-Net on the demo images, with their augmentation.

    python -m benchmarks.throughput [--pairs 4] [--epochs 6] [--out benchmarks/results/throughput.md]

The raw loops, ours, and ours with the panel open take turns on the same loaders; benchmarks/README.md says how to read the table.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from unet_nbtrain.dataset import demo_dataloaders
from unet_nbtrain.unet_model import UNet

from . import loops
from .cases import Case, fit, one_thread, tell
from .overhead import mean_step
from .pairs import spread, take_turns
from .tables import RESULTS, circumstances, sentence, table, write

CASE = Case(
    "demo", "a U-Net of 16 channels, depth 3, on 64 + 16 demo images of 128x128, batch 8, light augmentation, no workers",
    lambda: UNet(3, 1, width=16, depth=3), batch=8, pixels=128, train=8, val=2, epochs=6, loaders=lambda: demo_dataloaders(64, 16, 128),
)
CONTESTANTS = {"raw_again": loops.raw, "raw_fused": loops.raw_fused, "raw_usual": loops.raw_usual, "ours": loops.ours, "ours_panel": loops.ours_panel}
HEADS = ("trainer", "images a second", "wall over raw", "CPU over raw")


def images_per_second(fit):
    "Images of training and validation in a second of the steady epochs"
    return fit.case.batch * 1e6 / mean_step(fit, "wall")


def row_of(pairs):
    "A line of the table"
    speed = spread([images_per_second(fit) for fit in pairs.fits], "{:.1f}")
    return [pairs.name, speed, spread(pairs.ratios("raw", partial(mean_step, clock="wall")), "{:.3f}"), spread(pairs.ratios("raw", mean_step), "{:.3f}")]


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=CASE.epochs)
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.md")
    arguments = parser.parse_args(words)
    one_thread()
    case = replace(CASE, epochs=arguments.epochs)
    tell(case.words)
    results = take_turns(CONTESTANTS, {"raw": loops.raw}, partial(fit, case=case), arguments.pairs)
    loss = {name: statistics.fmean(fit.rows[-1]["val"]["loss"] for fit in o.fits) for name, o in results.items()}
    words = sentence(f"{case.words}; {case.epochs} epochs, {arguments.pairs} pairs a line; all epochs but the first count")
    same = "Validation loss after the last epoch: " + ", ".join(f"{name} {value:.5f}" for name, value in loss.items()) + "."
    print(write(arguments.out, "Images a second", circumstances(), words, "## demo", table(HEADS, map(row_of, results.values())), same))
    return 0


if __name__ == "__main__":
    sys.exit(main())
