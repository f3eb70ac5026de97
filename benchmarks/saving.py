"""What saving costs the training: the checkpoint after each epoch, against a plain `torch.save` that waits for the disk.

    python -m benchmarks.saving [--epochs 4] [--out benchmarks/results/saving.md]

The classic U-Net with 31 million parameters and AdamW: 372 MB a file. benchmarks/README.md says how to read the table.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from unet_nbtrain.trainer import UNetTrainer
from unet_nbtrain.unet_model import UNet

from .cases import Batches, Case, loader_of, make_batches, one_thread, tell, unseen
from .pairs import spread
from .tables import RESULTS, circumstances, sentence, table, write

CASE = Case("saving", "the U-Net with transposed convolutions and 31 million parameters, batch 1, 64x64",
            lambda: UNet(3, 1, bilinear=False), batch=1, pixels=64, train=24, val=1, epochs=4)


class Watch:
    "An observer that notes how long each step took, and how long the training stood still between the last batch of an epoch and its end"

    def __init__(self):
        self.steps, self.gaps, self.gaps_cpu, self.last = [], [], [], None

    def add(self, other):
        "What another one saw, too"
        self.steps, self.gaps, self.gaps_cpu = self.steps + other.steps, self.gaps + other.gaps, self.gaps_cpu + other.gaps_cpu

    def on_batch_end(self, trainer, loss):
        now = time.perf_counter()
        if trainer.phase == "train" and self.last is not None and trainer.batch > 1:
            self.steps.append((trainer._writer.is_busy, now - self.last))
        self.last, self.last_cpu = now, time.thread_time()

    def on_epoch_end(self, trainer, row):
        self.gaps.append(time.perf_counter() - self.last)
        self.gaps_cpu.append(time.thread_time() - self.last_cpu)


class Unsaved(UNetTrainer):
    "A trainer that saves nothing after an epoch"

    def _save_epoch(self, best):
        "Nothing"


def run(kind, epochs, folder):
    "A training of some epochs; the watch that saw it, its wall time, and the trainer"
    torch.manual_seed(0)
    train, val = (loader_of(Batches(make_batches(CASE, 4), length)) for length in (CASE.train, CASE.val))
    with unseen():
        trainer, watch = kind(CASE.model(), train, val, device="cpu", run_dir=folder), Watch()
        trainer.observers.add(watch)
        trainer.train(1)  # Allocates the memory for copies
        watch.__init__()
        began = time.perf_counter()
        trainer.train(epochs)
    return watch, time.perf_counter() - began, trainer


def durable_save(state, path):
    "`torch.save` that is on the disk when it returns, and whole or absent after a crash: wall seconds and processor seconds of this thread"
    began, began_cpu = time.perf_counter(), time.thread_time()
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return time.perf_counter() - began, time.thread_time() - began_cpu


def ms(values):
    return spread([value * 1e3 for value in values], "{:.0f}")


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=CASE.epochs)
    parser.add_argument("--out", type=Path, default=RESULTS / "saving.md")
    arguments = parser.parse_args(words)
    one_thread()
    with tempfile.TemporaryDirectory() as name:
        folder, plain, watch, plain_wall, wall = Path(name), Watch(), Watch(), 0.0, 0.0
        for turn in range(2):
            tell("without saving")
            found, seconds, _ = run(Unsaved, arguments.epochs, folder / f"unsaved_{turn}")
            plain.add(found)
            plain_wall += seconds
            tell("saving after each epoch")
            found, seconds, trainer = run(UNetTrainer, arguments.epochs, folder / f"saved_{turn}")
            watch.add(found)
            wall += seconds
        tell("torch.save")
        state = trainer.state_dict()
        state.pop("training_model_state_dict", None)  # The model carries its best weights now, as it did not during the run
        saves = [durable_save(state, folder / "plain.pth") for _ in range(arguments.epochs)]
        size = (folder / "plain.pth").stat().st_size / 1e6
    print(write(arguments.out, "What saving costs", circumstances(), report(2 * arguments.epochs, size, plain, plain_wall, watch, wall, saves)))
    return 0


def report(epochs, size, plain, plain_wall, watch, wall, saves):
    "The table and what follows from it"
    waits, cpus = [o for o, _ in saves], [o for _, o in saves]
    beside, alone = ([seconds for busy, seconds in watch.steps if busy is which] for which in (True, False))
    rows = [
        ["torch.save, fsync, rename", ms(waits), ms(cpus), ""],
        ["ours, after each epoch", ms(watch.gaps), ms(watch.gaps_cpu), f"{statistics.median(watch.gaps) / statistics.median(waits):.2f}"],
        ["the end of an epoch without saving", ms(plain.gaps), ms(plain.gaps_cpu), f"{statistics.median(plain.gaps) / statistics.median(waits):.2f}"],
    ]
    still, mean = sum(watch.gaps) / wall, statistics.fmean(watch.gaps)
    lines = [
        f"Standing still for it takes {still:.2%} of the wall time here, where an epoch takes {wall / epochs:.1f} s; 1 % where it takes {mean / 0.01:.1f} s.",
        f"A training step takes {ms([s for _, s in plain.steps])} ms in the run without saving"
        + (f", {ms(beside)} ms while a file is being written" if beside else "") + (f", {ms(alone)} ms while none is" if alone else "") + ".",
        f"The whole run took {wall / plain_wall:.3f} of the wall time of the one without saving, its last file included.",
    ]
    words = sentence(f"{CASE.words}; {CASE.train} training steps and {CASE.val} validation step an epoch, {epochs} epochs; a file has {size:.0f} MB")
    heads = ("what", "the training thread waits, ms", "CPU of the training thread, ms", "wait over torch.save")
    return "\n\n".join([words, "## saving", table(heads, rows), " ".join(lines)])


if __name__ == "__main__":
    sys.exit(main())
