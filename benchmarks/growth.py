"""Whether a training becomes slower or larger as it goes on: 100,000 steps with panel, history, TensorBoard and bar.

    python -m benchmarks.growth [--steps 100000] [--out benchmarks/results/growth.md]

Once in long epochs, where steps add up, and once in many short ones, where the history grows. benchmarks/README.md says how to read it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from unet_nbtrain.trainer import UNetTrainer

from .cases import CASES, Batches, Instant, loader_of, make_batches, one_thread, resident_mb, tell, unseen
from .pairs import spread
from .stretches import watched
from .tables import RESULTS, circumstances, table, write

SHAPES = {"long epochs": (1000, 10), "many short epochs": (200, 2)}  # Training and validation steps
POINTS = 20  # Lines of the table
HEADS = ("epochs", "steps of each", "steps in all", "a step at the end over one at the beginning", "an epoch likewise", "resident memory, MB")
COURSE = ("step", "epoch", "us/step within the epoch", "us/step of the whole epoch", "us/step of the yardstick", "resident MB")


class Point(NamedTuple):
    "What was seen at the end of an epoch; costs in processor microseconds a step"

    step: int
    epoch: int
    epoch_cost: float
    loop: float
    yardstick: float
    memory: float


class Yardstick:
    "A few steps of the raw loop, as a measure of how fast the machine is just now"

    def __init__(self, steps=100):
        torch.manual_seed(0)
        self.model, self.batch, self.steps = nn.Conv2d(3, 1, 1), make_batches(CASES["conv1"], 1)[0], steps
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def __call__(self):
        "Microseconds a step just now, on the processor clock of this thread, since others may be writing a file meanwhile"
        images, masks = self.batch
        began = time.thread_time()
        for _ in range(self.steps):
            self.optimizer.zero_grad(set_to_none=True)
            nn.functional.binary_cross_entropy_with_logits(self.model(images), masks).backward()
            self.optimizer.step()
        return (time.thread_time() - began) / self.steps * 1e6


class Record:
    "An observer that notes at every so many epochs what the last one cost, all observers included, and the memory"

    def __init__(self, case, every, clock):
        self.case, self.every, self.clock, self.yardstick = case, every, clock, Yardstick()
        self.began, self.points = None, []

    def on_epoch_end(self, trainer, row):
        ended = Instant.now()
        if self.began is not None and trainer.current_epoch % self.every == 0:
            third, last = self.clock[:2]
            self.points.append(Point(
                trainer.global_step, trainer.current_epoch, ended.since(self.began).cpu / self.case.steps * 1e6,
                last.since(third).cpu / (self.case.train - 3) * 1e6, self.yardstick(), resident_mb(),
            ))
        self.clock.clear()
        self.began = Instant.now()


def run(case):
    "One training with everything on, in the background as in a notebook; returns the points"
    with tempfile.TemporaryDirectory() as folder, unseen():
        clock, batches = [], make_batches(case)
        train, val = loader_of(Batches(batches, case.train, clock)), loader_of(Batches(batches[::-1], case.val))
        trainer = UNetTrainer(case.model(), train, val, nn.BCEWithLogitsLoss(), device="cpu", run_dir=folder)
        record = Record(case, max(case.epochs // 200, 1), clock)
        watched(trainer, case.epochs, lambda panel: record)
    return record.points


def ends(points):
    "The first tenth of the points and the last"
    size = max(len(points) // 10, 1)
    return points[:size], points[-size:]


def growth(points, cost):
    "Each point at the end over one at the beginning, by a cost"
    early, late = ends(points)
    return [cost(b) / cost(a) for a, b in zip(early, late)]


def summary(name, case, points):
    "A line of the first table"
    early, late = ends(points)
    memory = statistics.median(p.memory for p in late) - statistics.median(p.memory for p in early)
    return [
        name, f"{case.train} + {case.val}", points[-1].step, spread(growth(points, lambda p: p.loop / p.yardstick), "{:.3f}"),
        spread(growth(points, lambda p: p.epoch_cost / p.yardstick), "{:.3f}"), f"{memory:+.1f}",
    ]


def course(points):
    "The lines of a table of points: medians over stretches of the run"
    size = -(-len(points) // POINTS)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    middle = [Point(*(statistics.median(column) for column in zip(*stretch))) for stretch in stretches]
    return [[f"{p.step:.0f}", f"{p.epoch:.0f}", f"{p.loop:.0f}", f"{p.epoch_cost:.0f}", f"{p.yardstick:.0f}", f"{p.memory:.1f}"] for p in middle]


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.md")
    arguments = parser.parse_args(words)
    one_thread()
    rows, parts = [], []
    for name, (train, val) in SHAPES.items():
        case = replace(CASES["conv1"], train=train, val=val, epochs=arguments.steps // train)
        tell(f"{name}: {case.epochs} of {train} + {val} steps")
        points = run(case)
        rows.append(summary(name, case, points))
        parts += [f"## {name}", table(COURSE, course(points))]
        words = "One 1x1 convolution, batch 2, 8x8; panel open, bar, TensorBoard, history and checkpoints after each epoch."
        text = write(arguments.out, "Does it grow?", circumstances(), words, "## growth", table(HEADS, rows), *parts)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
