"""What the trainer costs beside the raw PyTorch loop: same weights, same batches, same final weights, in alternating pairs.

    python -m benchmarks.overhead [--pairs 9] [--out benchmarks/results/overhead.md]

Processor time decides, since machines are shared: the ratio of each pair, then median and quartiles over the pairs.
The raw loop is the lean one: fused optimizer, the sums for Dice gathered on the device, no number read in a step.
"""

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from unet_nbtrain.metrics import SegmentationMetrics
from unet_nbtrain.trainer import UNetTrainer
from unet_nbtrain.unet_model import UNet

CASES = {
    "1x1 convolution, batch 2, 8x8": (lambda: nn.Conv2d(3, 1, 1), 2, 8, 200),
    "U-Net of 4 channels, depth 2, batch 2, 16x16": (lambda: UNet(3, 1, width=4, depth=2), 2, 16, 60),
    "U-Net of 8 channels, depth 4, batch 8, 64x64": (lambda: UNet(3, 1, width=8, depth=4), 8, 64, 8),
}


def batches(size, pixels, count):
    """Random images and masks, collated beforehand: the loader costs the same in both loops, and little."""
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(size, 3, pixels, pixels, generator=draw) for _ in range(count)]
    return [(x, (x[:, :1] > 0.5).float()) for x in images]


def new_model(make):
    torch.manual_seed(0)
    model = make()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def raw_loop(make, train, val, epochs):
    """As a careful person writes it by hand"""
    model, optimizer = new_model(make)
    criterion = nn.BCEWithLogitsLoss()
    for _ in range(epochs):
        for loader, training in ((train, True), (val, False)):
            model.train(training)
            metrics, total = SegmentationMetrics(1), torch.zeros((), dtype=torch.float64)
            with torch.set_grad_enabled(training):
                for images, masks in loader:
                    logits = model(images)
                    loss = criterion(logits, masks)
                    if training:
                        loss.backward()
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                    total += loss.detach() * len(images)
                    metrics.update(logits.detach(), masks)
            metrics.compute(), total.item()
    return model


def our_trainer(make, train, val, epochs):
    """By default options, with history and control; checkpoints are written, the bar and the log files are off"""
    model, optimizer = new_model(make)
    with tempfile.TemporaryDirectory() as folder:
        options = {"criterion": nn.BCEWithLogitsLoss(), "optimizer": optimizer, "device": "cpu", "run_dir": folder, "observers": []}
        trainer = UNetTrainer(model, train, val, **options)
        trainer.train(epochs)
        trainer._recall_last()
    return model


def seconds(loop, *args):
    began = time.process_time()
    model = loop(*args)
    return time.process_time() - began, torch.cat([p.detach().flatten() for p in model.parameters()])


def measure(name, pairs):
    """A line of the table"""
    make, size, pixels, count = CASES[name]
    train, val, epochs = batches(size, pixels, count), batches(size, pixels, max(count // 10, 1)), 4
    steps, ratios, extra, difference = epochs * count, [], [], 0.0
    for pair in range(pairs + 1):
        order = (raw_loop, our_trainer) if pair % 2 else (our_trainer, raw_loop)
        result = {loop: seconds(loop, make, train, val, epochs) for loop in order}
        (raw, raw_weights), (ours, our_weights) = result[raw_loop], result[our_trainer]
        difference = max(difference, (raw_weights - our_weights).abs().max().item())
        if pair:  # The first pair warms up
            ratios.append(ours / raw)
            extra.append((ours - raw) / steps * 1e6)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"| {name} | {middle:.2f} [{low:.2f}, {high:.2f}] | {statistics.median(extra):.0f} | {difference:.0e} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [measure(name, arguments.pairs) for name in CASES]
    text = (
        "# The trainer beside the raw loop\n\n"
        f"Processor time, {arguments.pairs} alternating pairs, one thread, torch {torch.__version__}, {platform.machine()}. "
        "The whole fit counts, with its checkpoint each epoch.\n\n"
        "| case | ours / raw: median [quartiles] | more per step, microseconds | largest difference of weights |\n|---|---|---|---|\n"
        + "\n".join(lines) + "\n"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
