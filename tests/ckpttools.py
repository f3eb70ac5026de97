"""What the tests of checkpoints share: a tiny training, a disk that fills up at a given byte, and looks at folders and messages."""

import errno
import io
import logging

import torch
from torch import nn

from unet_nbtrain import UNetTrainer, disk
from unet_nbtrain.checkpoint import CheckpointError


class Net(nn.Module):
    """Two convolutions and a batch norm: parameters and buffers"""

    def __init__(self, n_classes=1, width=4):
        super().__init__()
        self.n_classes = n_classes
        self.layers = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, n_classes, 1))

    def forward(self, images):
        return self.layers(images)


def batches(n=8, size=2):
    random = torch.Generator().manual_seed(0)
    images = torch.rand(n, 1, 8, 8, generator=random)
    return list(zip(images.split(size), (images > 0.5).float().split(size), strict=True))


def trainer_in(folder, model=None, **options):
    """A trainer that writes into a folder; four batches an epoch"""
    torch.manual_seed(0)
    options = {"device": "cpu", "run_dir": folder, "observers": [], "criterion": nn.BCEWithLogitsLoss()} | options
    return UNetTrainer(model or Net(), batches(), batches(4), **options)


def equal(a, b):
    """Whether two nested states are the same, bit for bit; NaN is NaN"""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


def message_of(call, *args, kind=CheckpointError, **kwargs):
    """The text of the error that a call raises; no error is a failure"""
    logging.disable(logging.CRITICAL)
    try:
        call(*args, **kwargs)
    except kind as error:
        return str(error)
    finally:
        logging.disable(logging.NOTSET)
    raise AssertionError(f"no {kind.__name__} was raised")


def contents(folder):
    """Name -> bytes of all files of a folder"""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


class Told(list):
    """An observer that keeps the problems it is told"""

    def on_problem(self, trainer, message):
        self.append(message)


class _Filling(io.FileIO):
    room, code = None, errno.ENOSPC

    def write(self, data):
        data = memoryview(data).cast("B")
        fits = data[: max(0, _Filling.room - self.tell())]
        if len(fits) < len(data):
            super().write(fits)
            raise OSError(_Filling.code, "the disk says no")
        return super().write(data)


def full_disk(monkeypatch, room, code=errno.ENOSPC):
    """From now on no new file of the package can be longer than `room` bytes, and nobody says so beforehand"""
    _Filling.room, _Filling.code = room, code

    def opened(path, mode="r", **options):
        return _Filling(path, "xb") if mode == "xb" else open(path, mode, **options)

    monkeypatch.setattr(disk, "open", opened, raising=False)
    monkeypatch.setattr(disk, "_reserve", lambda file, needed: None)
