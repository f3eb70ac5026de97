"""What every trainer of the comparison gets: the same weights, the same batches, the same sums to gather, and a clock."""

import gc
import io
import os
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from unet_nbtrain.dataset import demo_dataloaders
from unet_nbtrain.unet_model import UNet

LEARNING_RATE = 1e-3
NAMES = ("loss", "dice", "iou", "accuracy")


@dataclass(frozen=True)
class Case:
    "A model, the shape of its batches, and how many of them make an epoch"

    name: str
    words: str
    model: object
    batch: int
    pixels: int
    train: int
    val: int
    epochs: int
    clip: float | None = None  # Largest norm of the gradient
    loaders: object = None  # Makes the loaders for training and validation, where noise will not do

    @property
    def steps(self):
        return self.train + self.val


CASES = {
    case.name: case
    for case in (
        Case("conv1", "one 1x1 convolution", lambda: nn.Conv2d(3, 1, 1), batch=2, pixels=8, train=100, val=10, epochs=6),
        Case("tiny", "U-Net of 4 channels, depth 2", lambda: UNet(3, 1, width=4, depth=2), batch=2, pixels=16, train=20, val=4, epochs=6),
        Case("small", "U-Net of 8 channels, depth 4", lambda: UNet(3, 1, width=8, depth=4), batch=8, pixels=64, train=5, val=1, epochs=4),
    )
}
DEMO = Case(
    "demo", "a U-Net of 16 channels, depth 3, on 64 + 16 demo images of 128x128, batch 8, light augmentation, no workers",
    lambda: UNet(3, 1, width=16, depth=3), batch=8, pixels=128, train=8, val=2, epochs=6, loaders=lambda: demo_dataloaders(64, 16, 128),
)


def describe(case):
    "The case in words"
    clipped = "not clipped" if case.clip is None else f"clipped to the norm {case.clip:g}"
    return (f"{case.words}, batch {case.batch}, {case.pixels}x{case.pixels}, ({case.train} training + {case.val} validation steps) "
            f"x {case.epochs} epochs, gradients {clipped}")


# Time


class Instant(NamedTuple):
    "A moment, or a duration, on both clocks"

    cpu: float  # Of all threads of the process
    wall: float

    @classmethod
    def now(cls):
        return cls(time.process_time(), time.perf_counter())

    def since(self, other):
        return Instant(self.cpu - other.cpu, self.wall - other.wall)


# Data


class Batches(Dataset):
    """Collated batches in memory; item i is a whole batch (images, masks).

    Where a clock is given, the third and the last batch note when they are fetched. Between the two lie the same number of steps
    for every trainer, also for one that fetches a batch ahead, and nothing that happens once an epoch.
    """

    def __init__(self, batches, length, clock=None):
        self.batches, self.length, self.clock = batches, length, clock

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if i >= self.length:
            raise IndexError(i)
        if self.clock is not None and (i == 2 or i == self.length - 1):
            self.clock.append(Instant.now())
        return self.batches[i % len(self.batches)]


def make_batches(case, count=16):
    "Noise, and as its mask the places where a blurred copy of it is bright"
    draw = torch.Generator().manual_seed(1)
    images = [torch.randn(case.batch, 3, case.pixels, case.pixels, generator=draw) for _ in range(count)]
    return [(x, (F.avg_pool2d(x.mean(1, keepdim=True), 3, 1, 1) > 0.1).float()) for x in images]


def loader_of(batches):
    "A plain loader in fixed order without workers"
    return DataLoader(batches, batch_size=None, shuffle=False, num_workers=0)


# Numbers


class Counts:
    "Loss, Dice, IoU and accuracy of an epoch from sums on the device, as lean as they can be had; the host reads once an epoch"

    def __init__(self):
        self.sums, self.pixels, self.batches = None, 0, 0

    def update(self, logits, masks, loss):
        predicted, true = logits.detach() > 0, masks > 0.5
        new = (predicted & true).sum(), predicted.sum(), true.sum(), loss.detach()
        if self.sums is None:
            self.sums = [o.clone() for o in new]
        else:
            for total, o in zip(self.sums, new):
                total += o
        self.pixels, self.batches = self.pixels + masks.numel(), self.batches + 1

    def compute(self):
        "The four numbers; then all begins anew"
        both, predicted, true, loss = (float(o) for o in self.sums)
        either, pixels, batches = predicted + true - both, self.pixels, self.batches
        self.__init__()
        return {"loss": loss / batches, "dice": 2 * both / max(predicted + true, 1), "iou": both / max(either, 1),
                "accuracy": (pixels - either + both) / pixels}


# A fit


@dataclass
class Work:
    "What a contestant gets: train `model` on `train` and `val` for `epochs`, and call `mark(row)` at the end of each"

    case: Case
    folder: str
    clock: list = field(default_factory=list)
    marks: list = field(default_factory=list)
    rows: list = field(default_factory=list)
    weights: torch.Tensor | None = None  # Where the model does not keep the last weights to the end

    def __post_init__(self):
        torch.manual_seed(0)
        case = self.case
        self.model, self.criterion, self.epochs, self.clip = case.model(), nn.BCEWithLogitsLoss(), case.epochs, case.clip
        if case.loaders is not None:
            self.train, self.val = case.loaders()
            return
        batches = make_batches(case, min(16, case.train))
        self.train_data, self.val_data = Batches(batches, case.train, self.clock), Batches(batches[::-1], case.val)
        self.train, self.val = loader_of(self.train_data), loader_of(self.val_data)

    def optimizer(self, **options):
        "AdamW as PyTorch gives it; on a CPU that is a loop over the tensors"
        return torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, **options)

    def mark(self, train=None, val=None):
        "An epoch is over, its numbers are known"
        self.marks.append(Instant.now())
        self.rows.append({"train": train, "val": val})

    def keep_weights(self):
        self.weights = flat(self.model)


def flat(model):
    "All parameters in one vector"
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


@dataclass
class Fit:
    "What a fit cost, in seconds, and what came of it"

    began: Instant
    ended: Instant
    marks: list
    clock: list
    rows: list
    weights: torch.Tensor
    case: Case

    def epochs(self, clock):
        "Steady epochs, that is all but the first"
        return [getattr(after.since(before), clock) for before, after in zip(self.marks, self.marks[1:])]

    def loops(self, clock):
        "The training steps alone, from the third to the last fetched batch of each steady epoch"
        pairs = zip(self.clock[2::2], self.clock[3::2])
        return [getattr(last.since(third), clock) for third, last in pairs]

    def total(self, clock):
        return getattr(self.ended.since(self.began), clock)


class Terminal(io.StringIO):
    "A stream that bars take for a terminal"

    def isatty(self):
        return True


@contextmanager
def unseen():
    "What is printed goes to a stream that is taken for a terminal, and is dropped"
    with redirect_stderr(Terminal()) as shown, redirect_stdout(shown):
        yield


def fit(contestant, case, **changes):
    "One fit of a fresh model, from the construction of the trainer to its end; returns a `Fit`"
    with tempfile.TemporaryDirectory() as folder, unseen():
        work = Work(replace(case, **changes), os.path.join(folder, "run"))  # No neighbours, which a panel would list
        gc.collect()
        began = Instant.now()
        contestant(work)
        ended = Instant.now()
    weights = flat(work.model) if work.weights is None else work.weights
    return Fit(began, ended, work.marks, work.clock, work.rows, weights, work.case)


def one_thread():
    "PyTorch on one thread, as the tables are made"
    torch.set_num_threads(1)


def resident_mb():
    "Resident memory of this process in MB; NaN where /proc is not there"
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return float("nan")


def tell(text):
    "Progress for whoever waits, not part of any table"
    print(text, file=sys.__stderr__, flush=True)
