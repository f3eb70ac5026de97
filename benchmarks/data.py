"""What it costs to get a batch: decoding, caches, workers, augmentation; and our loader beside indexing of ready tensors.

    python -m benchmarks.data [--images 64] [--size 256] [--rounds 9] [--out benchmarks/results/data.md]

Ready tensors are what a training could be given at best: all images as float32 (N, 3, H, W) and all masks as float32 (N, 1, H, W) in memory,
shuffled by `torch.randperm`, a batch by `images[index], masks[index]`. Our loader gives tensors of the same shapes, dtypes and values, from
8-bit pixels. Both are measured in turns, by processor time without workers, and each epoch is one round.
"""

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from unet_nbtrain import create_dataloaders, get_augmentation_pipeline
from unet_nbtrain.batch_augmentation import BatchAugmentation
from unet_nbtrain.demo_data import draw_cells
from unet_nbtrain.feeding import Feed
from unet_nbtrain.image_files import read_image, read_mask

BATCH = 8


def write_images(folder, count, size):
    """Drawn images with the noise of a camera, which a PNG cannot compress away; the two folders."""
    noise = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for i in range(count):
        image, mask = draw_cells(i, size=size)
        grainy = np.clip(image + noise.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(folder / "images" / f"{i:03}.png")
        Image.fromarray(mask * 255).save(folder / "masks" / f"{i:03}.png")
    return folder / "images", folder / "masks"


def train_loader(folders, **options):
    """The training loader over all images but one."""
    return create_dataloaders(*folders, **{"batch_size": BATCH, "val": [0], "augment": None, "num_workers": 0, "cache": True} | options)[0]


def timed(epoch):
    """Wall and processor seconds of one epoch, given as a loader or as a function that begins one."""
    wall, own = time.perf_counter(), time.process_time()
    for images, masks in epoch() if callable(epoch) else epoch:
        assert len(images) == len(masks)
    return time.perf_counter() - wall, time.process_time() - own


def by_turns(epochs, rounds):
    """`{name: [(wall, own), ...]}`: one round of each, again and again, after one to warm up."""
    for epoch in epochs.values():
        timed(epoch)
    found = {name: [] for name in epochs}
    for _ in range(rounds):
        for name, epoch in epochs.items():
            found[name].append(timed(epoch))
    return found


def feed_epochs(loader, feeds):
    """The epochs of a loader as the trainer gets them."""
    feed, counter = Feed(loader, 0), iter(range(10**6))
    feeds.append(feed)
    return lambda: feed.batches(next(counter))


def ratios(folders, loader, rounds):
    """Our loader, alone and through the trainer's feed, against ready tensors."""
    dataset, feeds = loader.dataset, []
    pairs = [dataset[i] for i in range(len(dataset))]
    images, masks = (torch.stack(o).contiguous() for o in zip(*pairs))

    def ready():
        for index in torch.randperm(len(images)).split(BATCH):
            yield images[index], masks[index]

    disk = train_loader(folders, cache=folders[0].parent / "cache")
    epochs = {
        "ready float32 tensors, indexed": ready,
        "the same once more": ready,
        "DataLoader over a TensorDataset": DataLoader(TensorDataset(images, masks), batch_size=BATCH, shuffle=True),
        "our loader, cache=True": loader,
        "our loader, through the trainer's feed": feed_epochs(loader, feeds),
        "our loader, cache='disk'": disk,
        "our loader, cache='disk', through the feed": feed_epochs(disk, feeds),
    }
    found = by_turns(epochs, rounds)
    for feed in feeds:
        feed.close()
    base, rows = found["ready float32 tensors, indexed"], []
    for name, times in found.items():
        own = [mine[1] / theirs[1] for mine, theirs in zip(times, base, strict=True)]
        wall = [mine[0] / theirs[0] for mine, theirs in zip(times, base, strict=True)]
        best = min(o for _, o in times) / len(dataset) * 1e6
        rows.append((name, f"{best:.0f}", spread(own), spread(wall)))
    return rows


def spread(values):
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def decoding(folders):
    """Microseconds of processor time for reading and decoding one file."""
    rows = []
    for name, read, folder in (("image", read_image, folders[0]), ("mask", read_mask, folders[1])):
        files = sorted(folder.iterdir())
        times = []
        for file in files:
            began = time.process_time()
            read(file)
            times.append(time.process_time() - began)
        size = statistics.mean(file.stat().st_size for file in files)
        rows.append((f"read and decode one {name} ({size / 1000:.0f} kB PNG)", f"{min(times) * 1e6:.0f}", f"{statistics.median(times) * 1e6:.0f}"))
    return rows


def loading(folders, rounds):
    """Microseconds of wall time for an image, by where it comes from and who reads it."""
    rows = []
    for workers in (0, 1, 2):
        loaders = {name: train_loader(folders, num_workers=workers, cache=cache) for name, cache in {"files, decoded each time": False, "memory": True}.items()}
        loaders["disk cache, first epoch"] = loaders["disk cache, later epochs"] = train_loader(folders, num_workers=workers, cache=folders[0].parent / f"cache{workers}")
        for name, loader in loaders.items():
            first = "first" in name
            if workers and not first:
                timed(loader)
            times = [timed(loader) for _ in range(1 if first else rounds)]
            wall, own = (min(o[i] for o in times) / len(loader.dataset) * 1e6 for i in (0, 1))
            rows.append((name, str(workers), f"{wall:.0f}", f"{own:.0f}"))
    return rows


def augmenting(loader, device):
    """Milliseconds for an image: one by one in the loader, and as a batch on the device."""
    images, masks = next(iter(loader))
    there, rows = [o.to(device) for o in (images, masks)], []
    for strength in ("light", "medium", "heavy"):
        pipeline = get_augmentation_pipeline(strength=strength)
        whole, one, batch = BatchAugmentation(pipeline), [], []
        for i in range(6):
            one.append(seconds_of(device, lambda p=pipeline, i=i: [p(*pair, i) for pair in zip(images, masks)]))
            batch.append(seconds_of(device, lambda w=whole, i=i: w(*there, 0, i)))
        rows.append((strength, *(f"{statistics.median(times[1:]) / len(images) * 1000:.2f}" for times in (one, batch))))
    return rows


def seconds_of(device, call):
    """Wall seconds of a call, what it left to do on the device included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def report(args, tables, device, seconds):
    cuda = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    busy = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"""# Getting a batch

{args.images} images of {args.size} x {args.size} pixels in colour with masks, batches of {BATCH}, one thread, {platform.machine()}, {os.cpu_count()} cores{busy}, {cuda}, torch {torch.__version__}, {date.today()}. Measured in {seconds:.0f} s.

## Beside ready tensors

A shuffled epoch without workers and augmentation. *Ready tensors*: all images as float32 (N, 3, H, W) and all masks as float32 (N, 1, H, W) in memory, a batch by `images[index], masks[index]`. The others give tensors of the same shapes, dtypes and values. Ratios over {args.rounds} rounds in turns: median [quartiles]. The second row shows what the measurement itself is worth.

{tables["ratios"]}

## Decoding

Microseconds of processor time.

{tables["decoding"]}

## Where an image comes from

Microseconds for an image with its mask, the best of several epochs: by the clock, and processor time of the process that trains. Workers are kept from epoch to epoch. The clock means little where the load is higher than the cores.

{tables["loading"]}

## Augmentation

Milliseconds for an image, by the clock: one by one on the CPU, and a whole batch on `{device}`.

{tables["augmenting"]}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("unet_nbtrain").setLevel(logging.ERROR)
    device, began, tables = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.time(), {}
    with tempfile.TemporaryDirectory() as folder:
        folders = write_images(Path(folder), args.images + 1, args.size)
        loader = train_loader(folders)
        tables["ratios"] = table(["an epoch", "us of processor an image, best", "processor time / ready", "wall time / ready"], ratios(folders, loader, args.rounds))
        tables["decoding"] = table(["", "best", "median"], decoding(folders))
        tables["loading"] = table(["from", "workers", "wall", "training process"], loading(folders, 3))
        tables["augmenting"] = table(["strength", "one by one", "a batch of 8"], augmenting(loader, device))
    text = report(args, tables, device, time.time() - began)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
