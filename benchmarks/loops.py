"""The contestants that need nothing but PyTorch and this package: the loop by hand, lean and as people write it, and ours."""

import sys
from functools import partial

import torch
from torch import nn

from unet_nbtrain.loggers import ProgressBar
from unet_nbtrain.trainer import UNetTrainer

from .cases import NAMES, Counts
from .stretches import Switch, alternating, watched

STRETCHES = 160  # Of a training in which the panel is at work and still by turns, beside the first one, in which it begins


def raw(work, after=lambda model, optimizer: None, **adam):
    "The lean loop: sums stay on the device, nothing is read in a step; `after` is called when an epoch is over"
    model, criterion, optimizer = work.model, work.criterion, work.optimizer(**adam)
    parameters, counts = list(model.parameters()), Counts()
    for _ in range(work.epochs):
        model.train()
        for images, masks in work.train:
            optimizer.zero_grad(set_to_none=True)
            logits = model(images)
            loss = criterion(logits, masks)
            loss.backward()
            if work.clip:
                nn.utils.clip_grad_norm_(parameters, work.clip)
            optimizer.step()
            counts.update(logits, masks, loss)
        train = counts.compute()
        model.eval()
        with torch.no_grad():
            for images, masks in work.val:
                logits = model(images)
                counts.update(logits, masks, criterion(logits, masks))
        val = counts.compute()
        after(model, optimizer)
        work.mark(train, val)


raw_fused = partial(raw, fused=True)


def raw_saving(work):
    "The fused loop that writes a checkpoint after each epoch, as scripts do: `torch.save`, which nobody asks to wait for the disk"
    path = work.folder + ".pth"
    raw_fused(work, lambda model, optimizer: torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path))


def _scores(logits, masks):
    "Dice, IoU and accuracy of one batch, as in a tutorial"
    predicted = (torch.sigmoid(logits) > 0.5).float()
    both = (predicted * masks).sum()
    dice = (2 * both + 1e-6) / (predicted.sum() + masks.sum() + 1e-6)
    iou = (both + 1e-6) / (predicted.sum() + masks.sum() - both + 1e-6)
    return dice.item(), iou.item(), (predicted == masks).float().mean().item()


def raw_usual(work):
    "As people write it: `loss.item()` and the scores of each batch as numbers, and a tqdm bar that shows them"
    from tqdm import tqdm

    model, criterion, optimizer = work.model, work.criterion, work.optimizer()
    for epoch in range(work.epochs):
        model.train()
        train, val = [], []
        bar = tqdm(work.train, desc=f"epoch {epoch + 1}", file=sys.stderr)
        for images, masks in bar:
            optimizer.zero_grad()
            logits = model(images)
            loss = criterion(logits, masks)
            loss.backward()
            if work.clip:
                nn.utils.clip_grad_norm_(model.parameters(), work.clip)
            optimizer.step()
            train.append((loss.item(), *_scores(logits, masks)))
            bar.set_postfix(loss=train[-1][0], dice=train[-1][1])
        model.eval()
        with torch.no_grad():
            for images, masks in tqdm(work.val, desc="validation", file=sys.stderr):
                logits = model(images)
                val.append((criterion(logits, masks).item(), *_scores(logits, masks)))
        work.mark(_means(train), _means(val))


def _means(rows):
    return dict(zip(NAMES, (sum(column) / len(rows) for column in zip(*rows))))


class Marks:
    "An observer that notes the end of each epoch, and the weights after the last one, before the best ones come back"

    def __init__(self, work):
        self.work = work

    def on_epoch_end(self, trainer, row):
        self.work.mark(row["train"], row["val"])
        if trainer.current_epoch == self.work.epochs:
            self.work.keep_weights()


class Turns(Marks):
    "An observer that turns a switch every so many epochs, and notes the end of each such stretch in place of the epoch's"

    def __init__(self, work, switch):
        super().__init__(work)
        self.switch, self.length, self.order = switch, max(work.epochs // (STRETCHES + 1), 1), iter(alternating(STRETCHES // 2))

    def on_epoch_end(self, trainer, row):
        if trainer.current_epoch % self.length == 0:
            super().on_epoch_end(trainer, row)
            self.switch.turn(next(self.order, False))


def trainer_of(work, **options):
    "`UNetTrainer` by default options; the loss is given because a bare convolution has no `n_classes`"
    return UNetTrainer(
        work.model, work.train, work.val, work.criterion, device="cpu", run_dir=work.folder, gradient_clip_norm=work.clip, **options
    )


def ours(work, **options):
    "The trainer in this thread: history, control, bar, TensorBoard, log files, and a checkpoint of everything after each epoch"
    trainer = trainer_of(work, **options)
    trainer.observers.add(Marks(work))
    trainer.train(work.epochs)


def ours_bar(work):
    "The same with the bar alone: no TensorBoard, no log files; checkpoints as always"
    ours(work, observers=[ProgressBar()])


def ours_loop(work):
    "The same with PyTorch's default AdamW in place of the fused one"
    ours(work, optimizer=work.optimizer())


def ours_panel(work):
    "The trainer in the background and the panel open: its pump runs and paints, as in a notebook, but there is no browser to send to"
    watched(trainer_of(work), work.epochs, lambda panel: Marks(work))


def ours_turned(work):
    "The same, where the panel is at work and still by turns; the marks are those of the stretches, not of the epochs"
    watched(trainer_of(work), work.epochs, lambda panel: Turns(work, Switch(panel)))
