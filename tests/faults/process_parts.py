"""The training of the tests on processes: the same here, in processes that are killed, and in kernels."""

import torch
from torch import nn

from unet_nbtrain import UNetTrainer
from unet_nbtrain.loggers import HistoryFiles, RunLog, TensorBoardLogger


class Net(nn.Module):
    """Two convolutions and dropout"""

    def __init__(self):
        super().__init__()
        self.n_classes, self.layer = 1, nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Dropout(0.2), nn.Conv2d(3, 1, 1))

    def forward(self, images):
        return self.layer(images)


images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
batches = [(part, (part > 0.5).float()) for part in images.split(2)]


def new_trainer(folder, *observers, **options):
    torch.manual_seed(1)
    return UNetTrainer(Net(), batches, batches[:2], device="cpu", run_dir=folder, observers=observers, **options)


def logged(folder, *before, owed=5.0):
    """With the loggers; the row of a short epoch is in `history.json` after `owed` seconds at longest, that of a long one at once"""
    files = HistoryFiles(folder)
    files.pace.longest = owed
    return new_trainer(folder, *before, TensorBoardLogger(folder + "/tensorboard"), files, RunLog(folder + "/log.jsonl"))


class At:
    """An observer that does something at an event, from some step on"""

    def __init__(self, event, step, do):
        self.step, self.do = step, do
        setattr(self, event, self.hear)

    def hear(self, trainer, *args):
        if trainer.global_step >= self.step:
            self.do(trainer)
