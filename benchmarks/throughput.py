"""Images a second in a small training as people do it: a U-Net on the demo images, with their augmentation.

    python -m benchmarks.throughput [--pairs 4] [--epochs 6] [--out benchmarks/results/throughput.md]

The raw loops, ours, and ours with the panel open take turns on the same loaders; benchmarks/README.md says how to read the table.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

from .apart import Apart
from .cases import DEMO, one_thread, tell
from .overhead import find, mean_step
from .pairs import spread, take_turns
from .tables import RESULTS, circumstances, sentence, table, write

CONTESTANTS = ("raw_again", "raw_fused", "raw_usual", "ours", "ours_panel")
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
    parser.add_argument("--epochs", type=int, default=DEMO.epochs)
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.md")
    arguments = parser.parse_args(words)
    one_thread()
    tell(DEMO.words)
    with Apart(find, "demo", epochs=arguments.epochs) as apart:
        results = take_turns({name: name for name in CONTESTANTS}, {"raw": "raw"}, apart, arguments.pairs, apart.renew)
    loss = {name: statistics.fmean(fit.rows[-1]["val"]["loss"] for fit in o.fits) for name, o in results.items()}
    words = sentence(f"{DEMO.words}; {arguments.epochs} epochs, {arguments.pairs} pairs a line; all epochs but the first count")
    same = "Validation loss after the last epoch: " + ", ".join(f"{name} {value:.5f}" for name, value in loss.items()) + "."
    print(write(arguments.out, "Images a second", circumstances(), words, "## demo", table(HEADS, map(row_of, results.values())), same))
    return 0


if __name__ == "__main__":
    sys.exit(main())
