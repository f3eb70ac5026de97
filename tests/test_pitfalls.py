"""What users of other trainers have suffered, one test a mishap: the whole trainer, through its public face, on tiny data."""

import csv
import gc
import json
import math
import multiprocessing
import os
import signal
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from unet_nbtrain import EarlyStopping, UNetTrainer, create_loss_function, create_optimizer, create_scheduler
from unet_nbtrain.loggers import HistoryFiles

NAN, INF = math.nan, math.inf
VOID = 255

pytestmark = pytest.mark.usefixtures("one_thread")


# Tiny parts


class Net(nn.Module):
    """Two convolutions; no batch norm, so that a batch in parts is the batch, and dropout where randomness is wanted."""

    def __init__(self, n_classes=1, dropout=0.0, n_channels=1):
        super().__init__()
        self.n_classes = n_classes
        self.layers = nn.Sequential(nn.Conv2d(n_channels, 4, 3, padding=1), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(4, n_classes, 1))

    def forward(self, images):
        return self.layers(images)


class Fixed(nn.Module):
    """The image itself as logits, times a weight of one that is trained with a rate of zero: scores can be computed by hand."""

    def __init__(self, n_classes=1):
        super().__init__()
        self.n_classes, self.scale = n_classes, nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images * self.scale


def data(n=10, n_classes=1, void=0.0, seed=0, size=8):
    """Images and masks that have something to do with each other; a share of the pixels is void, more of it in later images."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 1, size, size, generator=random)
    masks = (images[:, 0] * max(n_classes, 2)).long().clamp(max=max(n_classes, 2) - 1)
    amount = void * torch.linspace(0.2, 1.8, n).view(n, 1, 1)
    masks[torch.rand(masks.shape, generator=random) < amount] = VOID
    return images, masks.unsqueeze(1).float() if n_classes == 1 else masks


def batches(images, masks, size=2):
    return list(zip(images.split(size), masks.split(size), strict=True))


def net(n_classes=1, dropout=0.0, n_channels=1):
    torch.manual_seed(1)
    return Net(n_classes, dropout, n_channels)


def sgd(model, lr=0.5, **options):
    return create_optimizer(model, "sgd", lr=lr, momentum=0.0, fused=False, **options)


def trainer_of(tmp_path, model=None, train=None, val=None, kind=UNetTrainer, name="run", **options):
    """A trainer that writes into a folder of this test and shows nothing."""
    model = net() if model is None else model
    train = batches(*data()) if train is None else train
    val = batches(*data(5, getattr(model, "n_classes", 1), seed=1)) if val is None else val
    optimizer = options.pop("optimizer", None) or sgd(model, lr=0.0 if isinstance(model, Fixed) else 0.5)
    return kind(model, train, val, optimizer=optimizer, device="cpu", run_dir=tmp_path / name, **({"observers": ()} | options))


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def last(tmp_path, name="run"):
    """The last checkpoint: the weights at the end of training, whatever weights the model carries then."""
    return torch.load(tmp_path / name / "checkpoints" / "last.pth", weights_only=True)


def last_weights(tmp_path, name="run"):
    return torch.cat([w.flatten() for w in last(tmp_path, name)["model_state_dict"].values()])


class Scripted(UNetTrainer):
    """Validations whose metrics are written down beforehand; what is missing in the script is as measured."""

    script = ()

    def validate_epoch(self):
        return super().validate_epoch() | self.script[self.current_epoch]


def scripted(tmp_path, **columns):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return type("Scripted", (Scripted,), {"script": rows})


class At:
    """An observer that does something at one training batch of the run, counted from 1."""

    def __init__(self, batch, do):
        self.batch, self.do, self.count = batch, do, 0

    def on_batch_end(self, trainer, loss):
        self.count += trainer.phase == "train"
        if self.count == self.batch and trainer.phase == "train":
            self.do(trainer)


class Breaking(Net):
    """A model that raises at one forward pass, once."""

    def __init__(self, at, error=RuntimeError):
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def forward(self, images):
        self.calls += 1
        if self.calls == self.at:
            self.seen = weakref.ref(images)
            raise self.error("a broken step")
        return super().forward(images)


# Dice and other metrics


def hand_dice(images, masks):
    predicted, true = images[:, 0] > 0, masks[:, 0] > 0
    return 2 * (predicted & true).sum().item() / (predicted.sum() + true.sum()).item()


def test_dice_is_pooled_and_not_averaged_over_batches(tmp_path):
    """fastai's, smp's and Composer's means of batches change with the batch size (fastai#2267, medpy#132)."""
    images, masks = data(7, seed=3)
    images = images - 0.7
    masks[2:5, :, 2:] = 0
    found = []
    for size in (1, 2, 3, 7):
        trainer = trainer_of(tmp_path, Fixed(), val=batches(images, masks, size), name=str(size))
        found.append(trainer.validate_epoch())
    assert {row["dice"] for row in found} == {hand_dice(images, masks)}
    means = [sum(hand_dice(*batch) for batch in batches(images, masks, size)) / -(-7 // size) for size in (1, 2, 3)]
    assert all(abs(mean - found[0]["dice"]) > 1e-3 for mean in means)


def test_the_loss_of_an_epoch_is_weighted_by_images(tmp_path):
    """A last batch of one image counted as much as a full one (Lightning#2924, catalyst#799, nolearn#247)."""
    images, masks = data(5, seed=2)
    images[4] *= 9
    each = nn.BCEWithLogitsLoss(reduction="none")(images, masks).mean((1, 2, 3))
    trainer = trainer_of(tmp_path, Fixed(), batches(images, masks, 2), batches(images, masks, 4))
    row = trainer.train(1).rows[0]
    assert row["val"]["loss"] == pytest.approx(each.mean().item(), rel=1e-6)
    assert row["train"]["loss"] == pytest.approx(each.mean().item(), rel=1e-6)
    assert abs((each[:4].mean() + each[4]) / 2 - each.mean()) > 1e-3


def test_the_loss_of_an_epoch_is_weighted_by_valid_pixels(tmp_path):
    """With void pixels an image is worth what it has of valid ones; else half-empty images count double."""
    images, masks = data(5, void=0.5, seed=2)
    loss = nn.BCEWithLogitsLoss(reduction="none")(images, masks)[masks != VOID].mean()
    for size in (1, 2, 5):
        criterion = create_loss_function(1, ignore_index=VOID)
        trainer = trainer_of(tmp_path, Fixed(), val=batches(images, masks, size), criterion=criterion, name=str(size))
        assert trainer.validate_epoch()["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_nothing_there_and_nothing_found_is_no_score(tmp_path):
    """Empty masks scored 1 flatter, scored 0 punish; MONAI makes 0 of a mean of nothing (#7504)."""
    images = torch.full((4, 1, 8, 8), -1.0)
    empty = torch.zeros(4, 1, 8, 8)
    trainer = trainer_of(tmp_path, Fixed(), val=batches(images, empty))
    trainer.early_stopping = EarlyStopping(9, monitor="dice")
    row = trainer.train(1).rows[0]
    assert math.isnan(row["val"]["dice"]) and math.isnan(row["val"]["dice_per_image"]) and row["val"]["accuracy"] == 1
    assert row["best"] is False and trainer.early_stopping.best_epoch is None
    trainer.history.save(tmp_path / "history.json")
    assert json.loads((tmp_path / "history.json").read_text())["rows"][0]["val"]["dice"] is None


def test_false_positives_on_an_empty_image_are_not_hidden(tmp_path):
    """MONAI drops images without an object by default, and with them their false alarms (#4160, #4052)."""
    images, masks = torch.full((4, 1, 8, 8), -1.0), torch.zeros(4, 1, 8, 8)
    images[:2, :, :4], masks[:2, :, :4] = 1, 1
    right = trainer_of(tmp_path, Fixed(), val=batches(images, masks), name="a").validate_epoch()
    images[3, :, 0, :3] = 1
    wrong = trainer_of(tmp_path, Fixed(), val=batches(images, masks), name="b").validate_epoch()
    assert right["dice"] == right["dice_per_image"] == 1
    assert wrong["dice"] == 2 * 64 / (2 * 64 + 3) and wrong["dice_per_image"] == pytest.approx(2 / 3)


def test_validation_drops_nothing(tmp_path):
    """milesial's drop_last in validation never scores the last image, and few images give no validation at all."""
    from unet_nbtrain import demo_dataloaders

    _, val = demo_dataloaders(n_train=2, n_val=5, size=16, batch_size=4)
    assert [len(batch[0] if isinstance(batch, (list, tuple)) else batch["image"]) for batch in val] == [4, 1]
    _, few = demo_dataloaders(n_train=2, n_val=1, size=16, batch_size=4)
    assert len(few) == 1
    trainer = trainer_of(tmp_path, train=batches(*data(1), 8), val=batches(*data(1), 8))
    assert [row["val"]["loss"] > 0 for row in trainer.train(2).rows] == [True, True]


def test_a_loader_without_a_batch_is_told(tmp_path):
    """drop_last with fewer images than a batch: an epoch of nothing, and a mean of nothing."""
    images, masks = data(3)
    nothing = DataLoader(TensorDataset(images, masks), batch_size=4, drop_last=True)
    for name, loaders in {"train": {"train": nothing}, "val": {"val": nothing}}.items():
        with pytest.raises(ValueError, match="no batch.*drop_last"):
            trainer_of(tmp_path, **loaders, name=name).train(1)


def test_ignored_pixels_are_masked_and_not_made_a_class_of_zero(tmp_path):
    """smp zeroed the ignored class and took it into the mean (#546); 255 with 6 classes raised in torchmetrics (#2849)."""
    _, masks = data(4, n_classes=6, seed=4)
    logits = nn.functional.one_hot(masks, 6).movedim(3, 1).float()
    for ignored in (VOID, 3):
        hidden = masks.clone()
        hidden[:, :2] = ignored
        wrong = logits.clone()
        wrong[:, :, :2] = torch.rand(4, 6, 2, 8, generator=torch.Generator().manual_seed(0))
        criterion = create_loss_function(6, ignore_index=ignored)
        metrics = trainer_of(tmp_path, Fixed(6), val=batches(wrong, hidden), criterion=criterion).validate_epoch()
        assert metrics["accuracy"] == 1
        if ignored == VOID:
            assert metrics["dice"] == 1 and metrics["per_class"]["dice"] == [1] * 6


def test_ignored_pixels_change_neither_weights_nor_scores(tmp_path):
    """What the images hold under the ignored pixels of a model that sees one pixel at a time: the same run to the last bit."""
    images, masks = data(6, n_classes=3, void=0.4)
    other = torch.where((masks == VOID).unsqueeze(1), 7.0, images)
    runs = []
    for name, pixels in {"a": images, "b": other}.items():
        torch.manual_seed(2)
        model = nn.Conv2d(1, 3, 1)
        model.n_classes = 3
        criterion = create_loss_function(3, [1.0, 2.0, 0.5], "ce_dice", ignore_index=VOID)
        trainer = trainer_of(tmp_path, model, batches(pixels, masks), batches(pixels, masks), criterion=criterion, name=name)
        rows = trainer.train(2).rows
        runs.append((repr([(row["train"], row["val"]) for row in rows]), last_weights(tmp_path, name).tolist()))
    assert runs[0] == runs[1]


def test_one_channel_has_a_threshold_and_background_is_no_class(tmp_path):
    """milesial takes the argmax of one channel, which is 0 everywhere; a mean with background lifts 0.46 to 0.88."""
    images, masks = data(4, seed=5)
    perfect = (masks - 0.5) * 8
    assert trainer_of(tmp_path, Fixed(), val=batches(perfect, masks)).validate_epoch()["dice"] == 1
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0] = 1
    mask = torch.zeros(1, 8, 8, dtype=torch.long)
    mask[0, 0, :4] = 1
    metrics = trainer_of(tmp_path, Fixed(2), val=[(logits, mask)], criterion=create_loss_function(2)).validate_epoch()
    assert metrics["dice"] == 0 and metrics["per_class"]["dice"][0] > 0.9


def test_scores_are_not_rounded(tmp_path):
    """Composer compares Dice rounded to 0.01 %, so the last gains are no gains."""
    images, masks = data(3, seed=3, size=32)
    trainer = trainer_of(tmp_path, Fixed(), val=batches(images - 0.7, masks))
    dice = trainer.train(1).rows[0]["val"]["dice"]
    assert dice == hand_dice(images - 0.7, masks) and dice != round(dice, 6)


@pytest.mark.parametrize("n_classes", [1, 3])
@pytest.mark.parametrize("name", ["dice", "tversky"])
def test_false_positives_of_an_absent_class_are_not_free(name, n_classes):
    """smp gives classes that are absent from the batch a loss of zero: whatever is predicted there is free."""
    logits = torch.zeros(2, n_classes, 8, 8, requires_grad=True)
    create_loss_function(n_classes, name=name)(logits, torch.zeros(2, 8, 8, dtype=torch.long)).backward()
    assert (logits.grad[:, -1] > 0).all()


@pytest.mark.parametrize("name", ["bce", "focal", "dice", "tversky", "bce_dice"])
def test_a_loss_does_not_grow_with_the_batch(name):
    """fastai's Dice loss sums over the batch by default: twice the batch is twice the learning rate."""
    images, masks = data(3)
    loss = create_loss_function(1, name=name, **({"smooth": 0} if "dice" in name or name == "tversky" else {}))
    doubled = loss(torch.cat([images, images]), torch.cat([masks, masks]))
    assert doubled.item() == pytest.approx(loss(images, masks).item(), rel=1e-6)


def test_dice_sums_in_float32(tmp_path):
    """A sum over 256 x 256 pixels exceeds 65,504: in float16 the Dice loss is NaN (milesial#479)."""
    logits = torch.full((1, 1, 300, 300), 5.0, dtype=torch.float16)
    loss = create_loss_function(1, name="dice")(logits, torch.ones(1, 300, 300))
    assert loss.dtype == torch.float32 and 0 < loss.item() < 0.01


# Schedules and early stopping, inside a real training


def learning_rates(trainer, epochs):
    return [row["lr"] for row in trainer.train(epochs).rows]


def cosine(k, total, start=0.5):
    return start * (1 + math.cos(math.pi * min(k, total) / total)) / 2


def test_cosine_and_warm_up_by_hand(tmp_path):
    """The rate of a row is the rate that its epoch was trained with, and not the next one (Lightning#4655, #5455)."""
    trainer = trainer_of(tmp_path)
    trainer.scheduler = create_scheduler(trainer.optimizer, "cosine", T_max=5, warmup=3)
    climb = [0.5 * (k + 1) / 4 for k in range(3)]
    assert learning_rates(trainer, 11) == pytest.approx(climb + [cosine(k, 5) for k in range(8)], abs=1e-12)


def test_a_schedule_of_steps_moves_once_a_step(tmp_path):
    """Ten batches in groups of four are three steps, not ten: a schedule stepped per batch would be at its end too early."""
    model = net()
    optimizer = sgd(model)
    schedule = create_scheduler(optimizer, "polynomial", total_iters=12, power=1.0, unit="step")
    seen = []
    watch = type("Watch", (), {"on_batch_end": lambda self, t, loss: seen.append(t.learning_rate) if t.phase == "train" else None})()
    trainer = trainer_of(tmp_path, model, train=batches(*data(20)), optimizer=optimizer, scheduler=schedule, observers=[watch])
    trainer.accumulate_gradients = 4
    rows = trainer.train(2).rows
    steps = [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 6]
    assert seen == pytest.approx([0.5 * (1 - k / 12) for k in steps])
    assert trainer.global_step == 6 and [row["epoch"] for row in rows] == [1, 2]


def test_plateau_by_hand(tmp_path):
    """Stepped once a validation, with the fresh loss; patience 1 lets one bad epoch pass and cuts at the second."""
    losses = [5, 4, 4, 4, 4, 3, 3.5, 3.5]
    trainer = trainer_of(tmp_path, kind=scripted(tmp_path, loss=losses))
    trainer.scheduler = create_scheduler(trainer.optimizer, "plateau", patience=1, factor=0.1)
    expected = [0.5, 0.5, 0.5, 0.5, 0.05, 0.05, 0.05, 0.05]
    assert learning_rates(trainer, 8) == pytest.approx(expected) and trainer.learning_rate == pytest.approx(0.005)


@pytest.mark.parametrize("warmup", [0, 2])
def test_plateau_has_a_direction_of_its_own(tmp_path, warmup):
    """With mode='max' it must watch a score and not the loss; here the loss rises for ever, and Dice is stuck from epoch 3 on."""
    kind = scripted(tmp_path, loss=[2, 3, 4, 5, 6, 7, 8, 9], dice=[0.1, 0.2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    trainer = trainer_of(tmp_path, kind=kind)
    trainer.scheduler = create_scheduler(trainer.optimizer, "plateau", patience=1, factor=0.1, mode="max", warmup=warmup)
    rates = learning_rates(trainer, 8)
    assert rates[2:] == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05, 0.005])


def test_plateau_skips_a_validation_without_a_number(tmp_path):
    """A NaN is no bad epoch: three of them must not cut the rate."""
    trainer = trainer_of(tmp_path, kind=scripted(tmp_path, loss=[5, NAN, NAN, NAN, 4, 4, 4]))
    trainer.scheduler = create_scheduler(trainer.optimizer, "plateau", patience=1, factor=0.1)
    assert learning_rates(trainer, 7) == pytest.approx([0.5] * 7) and trainer.learning_rate == pytest.approx(0.05)


SCHEDULES = {
    "plateau": {"patience": 1, "factor": 0.5, "cooldown": 1}, "cosine": {"T_max": 6}, "step": {"step_size": 2},
    "exponential": {"gamma": 0.7}, "onecycle": {"total_steps": 31}, "cosine_restarts": {"T_0": 2},
    "polynomial": {"total_iters": 6}, "warmed": {"T_max": 4, "warmup": 2},
}


def with_schedule(tmp_path, name, folder, **options):
    model = net(dropout=0.3)
    optimizer = create_optimizer(model, "sgd", lr=0.2)
    schedule = create_scheduler(optimizer, {"warmed": "cosine"}.get(name, name), **SCHEDULES[name])
    return trainer_of(tmp_path, model, optimizer=optimizer, scheduler=schedule, name=folder, **options)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_after_a_resume_is_not_off_by_one(tmp_path, name):
    """Poutyne saves the optimizer before the schedule has moved: epoch 3 ran at .000854 and not .000500. Keras, Lightning#15462."""
    kind = scripted(tmp_path, loss=[5] * 7)
    rows = with_schedule(tmp_path, name, "whole", kind=kind).train(7).rows
    with_schedule(tmp_path, name, "cut", kind=kind).train(2)
    with_schedule(tmp_path, name, "cut", kind=kind).train(4, resume="last")
    resumed = with_schedule(tmp_path, name, "cut", kind=kind).train(7, resume="last").rows
    assert len({row["lr"] for row in rows}) > 1
    assert [row["lr"] for row in resumed] == [row["lr"] for row in rows]
    assert [row["train"]["loss"] for row in resumed] == [row["train"]["loss"] for row in rows]
    assert torch.equal(last_weights(tmp_path, "whole"), last_weights(tmp_path, "cut"))


@pytest.mark.parametrize("name", ["plateau", "onecycle", "warmed"])
def test_a_resume_in_the_middle_of_an_epoch_needs_no_metric(tmp_path, name):
    """On resume no fresh metric exists yet; Lightning#14699 and timm#871 stepped the plateau all the same."""
    rows = with_schedule(tmp_path, name, "whole").train(4).rows
    first = with_schedule(tmp_path, name, "cut", observers=[At(8, lambda t: t.run.stop())])
    first.train(4)
    assert first.current_epoch == 1 and last(tmp_path, "cut")["batch"] == 3
    second = with_schedule(tmp_path, name, "cut")
    assert [row["lr"] for row in second.train(4, resume="last").rows] == [row["lr"] for row in rows]
    assert torch.equal(last_weights(tmp_path, "whole"), last_weights(tmp_path, "cut"))


def test_training_on_does_not_restart_the_schedule(tmp_path):
    """A second fit() of Lightning builds optimizer and schedule anew: Adam empty, the rate back at its start."""
    trainer = trainer_of(tmp_path)
    trainer.scheduler = create_scheduler(trainer.optimizer, "exponential", gamma=0.5)
    optimizer, schedule = trainer.optimizer, trainer.scheduler
    trainer.train(2)
    trainer.train(2)
    assert trainer.optimizer is optimizer and trainer.scheduler is schedule
    assert trainer.history["learning_rates"] == [0.5, 0.25, 0.125, 0.0625]


def test_training_past_the_end_of_a_schedule(tmp_path):
    """A cosine climbs again after its end, and a one-cycle raises; here both stay where they have arrived."""
    for name in ("cosine", "onecycle"):
        trainer = with_schedule(tmp_path, name, name)
        rates = [row["lr"] for row in trainer.train(9).rows]
        assert rates[7] == rates[8] == min(rates)


def test_a_changed_rate_is_not_lost(tmp_path):
    """Nobody rebases the schedule: the next step of a restarting cosine brings the old rate back, and a resume forgets it."""
    trainer = with_schedule(tmp_path, "cosine_restarts", "run")
    trainer.train(1)
    trainer.set("lr", trainer.learning_rate / 2)
    trainer.train(2)
    resumed = with_schedule(tmp_path, "cosine_restarts", "run")
    resumed.train(5, resume="last")
    assert resumed.history["learning_rates"] == pytest.approx([0.2, 0.05, 0.1, 0.05, 0.1])
    assert any(event["kind"] == "set" for event in resumed.history.events)


def test_early_stopping_at_the_epoch_computed_by_hand(tmp_path):
    """Best at epoch 3, patience 3: the validations 4, 5 and 6 are no better, and the run ends after the sixth."""
    trainer = trainer_of(tmp_path, kind=scripted(tmp_path, loss=[3, 2.5, 1, 1, 2, 1.5, 0.1, 0.1]), early_stopping_patience=3)
    history = trainer.train(8)
    assert len(history.rows) == 6 and trainer.early_stopping.best_epoch == 3
    assert trainer.early_stopping.counter >= trainer.early_stopping.patience
    assert "3 validations in a row" in trainer.run.reason and "epoch 3" in trainer.run.reason
    assert [row["best"] for row in history.rows] == [True, True, True, False, False, False]


def test_slow_progress_adds_up_to_min_delta(tmp_path):
    """HF moves the best with every gain: +0.004 an epoch under a threshold of 0.01 ends at epoch 4 while still rising."""
    trainer = trainer_of(tmp_path, kind=scripted(tmp_path, dice=[0.5 + 0.004 * k for k in range(12)]))
    trainer.early_stopping = EarlyStopping(3, 0.01, monitor="dice")
    assert len(trainer.train(12).rows) == 12 and trainer.early_stopping.best_epoch == 10


def test_patience_goes_on_in_the_next_call(tmp_path):
    """Keras forgets counter and best at every fit: whoever trains two epochs at a time never stops."""
    trainer = trainer_of(tmp_path, kind=scripted(tmp_path, loss=[1, 2, 2, 2, 0, 0]), early_stopping_patience=3)
    for epochs in (2, 1):
        trainer.train(epochs)
    assert trainer.early_stopping.counter == 2 and trainer.early_stopping.best == 1
    assert len(trainer.train(3).rows) == 4


def test_the_counter_survives_a_resume(tmp_path):
    """Keras, Composer, MONAI, Poutyne: a run that is interrupted often enough never stops."""
    kind = scripted(tmp_path, loss=[1, 2, 2, 2, 0, 0])
    trainer_of(tmp_path, kind=kind, early_stopping_patience=3).train(3)
    resumed = trainer_of(tmp_path, kind=kind, early_stopping_patience=3)
    assert len(resumed.train(6, resume="last").rows) == 4 and resumed.early_stopping.best_epoch == 1


def test_nan_is_never_the_best_and_a_first_nan_freezes_nothing(tmp_path):
    """Nothing is less than NaN: a run whose first validation is NaN keeps that as its best in several trainers."""
    trainer = trainer_of(tmp_path, kind=scripted(tmp_path, loss=[NAN, 3, NAN, 2, -INF]), early_stopping_patience=9)
    rows = trainer.train(5).rows
    assert [row["best"] for row in rows] == [False, True, False, True, False]
    assert trainer.best_val_loss == 2 and trainer.history.best["epoch"] == 4


def test_best_weights_are_copies_and_come_back_at_every_kind_of_end(tmp_path):
    """References in place of copies, and a restore only where the stop was triggered (keras#12511, Lightning#1415)."""
    kept = {}

    class Keep:
        def on_epoch_end(self, trainer, row):
            kept[row["epoch"]] = weights(trainer).clone()

    ends = {"all": ([3, 1, 2, 2], None, None), "patience": ([3, 1, 2, 2], 2, None), "stop": ([3, 1, 2, 2], None, At(18, lambda t: t.run.stop()))}
    for name, (losses, patience, at) in ends.items():
        observers = [Keep(), *([at] if at else [])]
        options = {"early_stopping_patience": patience, "observers": observers, "name": name}
        trainer = trainer_of(tmp_path, kind=scripted(tmp_path, loss=losses), **options)
        trainer.train(4)
        assert torch.equal(weights(trainer), kept[2]) and not torch.equal(kept[2], kept[3]), name
        best = torch.load(tmp_path / name / "checkpoints" / "best_model.pth", weights_only=True)["model_state_dict"]
        assert torch.equal(torch.cat([w.flatten() for w in best.values()]), kept[2])


def test_the_best_weights_survive_a_resume(tmp_path):
    """Best at epoch 2, interrupted after epoch 3, nothing better afterwards: the model of the end is that of epoch 2."""
    kind = scripted(tmp_path, loss=[3, 1, 2, 2, 2])
    whole = trainer_of(tmp_path, kind=kind, name="whole")
    whole.train(5)
    trainer_of(tmp_path, kind=kind).train(3)
    resumed = trainer_of(tmp_path, kind=kind)
    history = resumed.train(5, resume="last")
    assert torch.equal(weights(resumed), weights(whole)) and not torch.equal(weights(resumed), last_weights(tmp_path))
    assert history.best["epoch"] == 2 and resumed.best_val_loss == 1


# Accumulation and clipping, by hand


@pytest.mark.parametrize("void", [0.0, 0.5])
@pytest.mark.parametrize("n_classes", [1, 3])
@pytest.mark.parametrize("images", [24, 22, 17])
def test_accumulation_equals_the_large_batch(tmp_path, images, n_classes, void):
    """k small batches are one large one, also in the last, shorter group and with void pixels; others divide by k regardless."""
    pixels, masks = data(images, n_classes, void)
    found = []
    for name, size, group in (("small", 2, 4), ("large", 8, 1)):
        model = net(n_classes)
        criterion = create_loss_function(n_classes, ignore_index=VOID if void else None)
        trainer = trainer_of(tmp_path, model, batches(pixels, masks, size), criterion=criterion, optimizer=sgd(model), name=name)
        trainer.accumulate_gradients = group
        trainer.train(3)
        found.append((last_weights(tmp_path, name), trainer.global_step))
    assert found[0][1] == found[1][1] == 9
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5, rtol=0)
    assert not torch.allclose(found[0][0], torch.cat([p.flatten() for p in net(n_classes).parameters()]), atol=1e-3)


@pytest.mark.parametrize("clip", [1e-3, 0.05, 1e3])
@pytest.mark.parametrize("group", [1, 3])
def test_clipping_equals_steps_by_hand(tmp_path, group, clip):
    """The norm of the whole, averaged gradient is clipped once a step, over all parameters together."""
    pixels, masks = data(8)
    trainer = trainer_of(tmp_path, train=batches(pixels, masks))
    trainer.gradient_clip_norm, trainer.accumulate_gradients = clip, group
    trainer.train(2)
    model = net()
    for images, labels in 2 * batches(pixels, masks, 2 * group):
        grads = torch.autograd.grad(nn.functional.binary_cross_entropy_with_logits(model(images), labels), list(model.parameters()))
        norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads)).item()
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.5 * g * min(1.0, clip / (norm + 1e-6))
    by_hand = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(last_weights(tmp_path), by_hand, atol=1e-6, rtol=0)


def test_averaged_weights_equal_a_sequence_by_hand(tmp_path):
    """After the first step the average is the weights, then decay * average + (1 - decay) * weights after each step."""
    seen = []
    watch = type("Watch", (), {"on_batch_end": lambda self, t, loss: seen.append(weights(t).clone()) if t.phase == "train" else None})()
    pixels, masks = data(9)
    trainer = trainer_of(tmp_path, train=batches(pixels, masks), ema_decay=0.8, observers=[watch])
    row = trainer.train(2).rows[-1]
    average = seen[0]
    for now in seen[1:]:
        average = 0.8 * average + 0.2 * now
    state = last(tmp_path)
    raw = torch.cat([w.flatten() for w in state["training_model_state_dict"].values()])
    assert torch.equal(raw, seen[-1]) and len(seen) == 10
    assert torch.allclose(last_weights(tmp_path), average, atol=1e-6) and not torch.allclose(raw, average, atol=1e-4)
    model = net()
    model.load_state_dict(state["model_state_dict"])
    assert row["val"]["loss"] == pytest.approx(trainer_of(tmp_path, model, name="other").validate_epoch()["loss"], rel=1e-6)


def test_averaged_weights_survive_a_resume(tmp_path):
    """Without the average in the checkpoint the resumed run begins a new one, and its best weights are others."""
    options = {"train": batches(*data(9)), "ema_decay": 0.8}
    trainer_of(tmp_path, name="whole", **options).train(3)
    trainer_of(tmp_path, observers=[At(7, lambda t: t.run.stop())], **options).train(3)
    trainer_of(tmp_path, **options).train(3, resume="last")
    one, two = last(tmp_path), last(tmp_path, "whole")
    for key in ("model_state_dict", "training_model_state_dict"):
        assert all(torch.equal(one[key][name], two[key][name]) for name in two[key])


# Resume


class Noted(Dataset):
    """Samples that write down their index when they are fetched."""

    def __init__(self, n=10):
        self.images, self.masks = data(n)
        self.seen = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.seen.append(i)
        return self.images[i], self.masks[i]


def shuffled(samples, size=2):
    return DataLoader(samples, size, shuffle=True)


@pytest.mark.parametrize("at", [1, 4, 5, 7, 10, 13])
def test_a_resume_repeats_nothing_and_skips_nothing(tmp_path, at):
    """Lightning#850 repeats the epoch, #5325 skips its rest, #20775 runs a step twice; Keras replays what was done."""
    whole, first, second = Noted(), Noted(), Noted()
    trainer = trainer_of(tmp_path, net(dropout=0.5), shuffled(whole), name="whole")
    rows = trainer.train(3).rows
    trainer_of(tmp_path, net(dropout=0.5), shuffled(first), observers=[At(at, lambda t: t.run.stop())]).train(3)
    state = last(tmp_path)
    assert (state["epoch"], state["batch"], state["global_step"]) == ((at - 1) // 5, (at - 1) % 5 + 1, at)
    resumed = trainer_of(tmp_path, net(dropout=0.5), shuffled(second))
    again = resumed.train(3, resume="last").rows
    assert first.seen == whole.seen[: 2 * at] and len(whole.seen) == 30
    assert second.seen == whole.seen[2 * at :]
    assert [(row["train"], row["val"]) for row in again] == [(row["train"], row["val"]) for row in rows]
    assert torch.equal(last_weights(tmp_path), last_weights(tmp_path, "whole"))


def test_a_checkpoint_lies_between_two_steps(tmp_path):
    """A checkpoint within a group of accumulated batches loses their gradients (HF#17157)."""
    positions = []

    class Look:
        def on_batch_end(self, trainer, loss):
            if trainer.phase == "train":
                state = last(tmp_path)
                positions.append((state["batch"], state["global_step"]))

    trainer = trainer_of(tmp_path, train=batches(*data(20)), observers=[Look(), At(6, lambda t: t.run.stop())])
    trainer.accumulate_gradients, trainer.save_every_n_steps = 4, 1
    trainer.train(2)
    assert positions == [(0, 0)] * 4 + [(4, 1)] * 4
    assert (last(tmp_path)["batch"], last(tmp_path)["global_step"], trainer.run.state) == (8, 2, "finished")
    resumed = trainer_of(tmp_path, train=batches(*data(20)))
    resumed.accumulate_gradients = 4
    resumed.train(2, resume="last")
    whole = trainer_of(tmp_path, train=batches(*data(20)), name="whole")
    whole.accumulate_gradients = 4
    whole.train(2)
    assert torch.equal(last_weights(tmp_path), last_weights(tmp_path, "whole"))


def test_validation_does_not_touch_the_training(tmp_path):
    """Validation that draws from the training's randomness: other validation images, another model."""

    class Drawing(Noted):
        def __getitem__(self, i):
            torch.rand(3)
            return super().__getitem__(i)

    found = []
    for name, val in {"a": shuffled(Noted(4)), "b": shuffled(Drawing(9), 4), "c": batches(*data(1))}.items():
        trainer_of(tmp_path, net(dropout=0.5), shuffled(Noted()), val, name=name).train(3)
        found.append(last_weights(tmp_path, name))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_caller_s_own_random_numbers_do_not_matter(tmp_path):
    """Two runs of one seed are one run, whatever was drawn before; another seed is another run."""
    found = []
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        model, loader = net(dropout=0.5), shuffled(Noted())
        torch.manual_seed(len(found))
        torch.rand(5)
        trainer_of(tmp_path, model, loader, name=name, seed=seed).train(2)
        found.append(last_weights(tmp_path, name))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_workers_do_not_matter_and_may_change_at_a_resume(tmp_path):
    """Randomness of augmentation that belongs to a worker process: another number of workers is another training."""
    from unet_nbtrain import demo_dataloaders

    def loaders(workers):
        train, val = demo_dataloaders(n_train=8, n_val=2, size=16, batch_size=2, num_workers=workers)
        return {"train": train, "val": val}

    for name, workers in {"none": 0, "two": 2}.items():
        trainer_of(tmp_path, net(1, 0.5, n_channels=3), **loaders(workers), name=name).train(2)
    trainer_of(tmp_path, net(1, 0.5, n_channels=3), **loaders(2), name="mixed", observers=[At(6, lambda t: t.run.stop())]).train(2)
    trainer_of(tmp_path, net(1, 0.5, n_channels=3), **loaders(0), name="mixed").train(2, resume="last")
    assert torch.equal(last_weights(tmp_path, "none"), last_weights(tmp_path, "two"))
    assert torch.equal(last_weights(tmp_path, "none"), last_weights(tmp_path, "mixed"))


def test_a_torn_checkpoint_does_not_end_the_run(tmp_path):
    """Files that were overwritten in place are lost with the write that broke (Lightning#688, timm#98): the one before is there."""
    trainer = trainer_of(tmp_path)
    trainer.train(3)
    path = tmp_path / "run" / "checkpoints" / "last.pth"
    path.write_bytes(path.read_bytes()[:-300])
    resumed = trainer_of(tmp_path)
    history = resumed.train(4, resume="last")
    assert [row["epoch"] for row in history.rows] == [1, 2, 3, 4]
    whole = trainer_of(tmp_path, name="whole")
    whole.train(4)
    assert torch.equal(last_weights(tmp_path), last_weights(tmp_path, "whole"))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")], ids=["DataParallel", "compile"])
def test_checkpoints_have_plain_names(tmp_path, wrap):
    """`module.` and `_orig_mod.` in the keys keep a checkpoint from loading elsewhere (nanoGPT#325, timm#2003)."""
    model = net()
    wrapped = wrap(model)
    trainer_of(tmp_path, wrapped, optimizer=sgd(model), criterion=nn.BCEWithLogitsLoss()).train(1)
    state = torch.load(tmp_path / "run" / "checkpoints" / "final_model.pth")["model_state_dict"]
    assert list(state) == list(net().state_dict())
    Net().load_state_dict(state)
    plain = trainer_of(tmp_path, criterion=nn.BCEWithLogitsLoss())
    plain.load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pth")
    assert torch.equal(weights(plain), last_weights(tmp_path)) and plain.current_epoch == 1


def test_tables_have_no_epoch_twice_after_a_resume(tmp_path):
    """Logs that append on resume show epochs twice, and those that start anew lose the first ones."""
    folder = tmp_path / "run"
    trainer_of(tmp_path, observers=[HistoryFiles(folder)], save_every_n_epochs=1).train(4)
    resumed = trainer_of(tmp_path, observers=[HistoryFiles(folder)])
    resumed.train(5, resume=folder / "checkpoints" / "epoch_0002.pth")
    with open(folder / "history.csv", newline="") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in json.loads((folder / "history.json").read_text())["rows"]] == [1, 2, 3, 4, 5]


def test_the_checkpoint_of_a_failure_stays(tmp_path):
    """Lightning's OnExceptionCheckpoint removes its file at the end of the next run that goes well."""
    trainer = trainer_of(tmp_path, Breaking(20))
    with pytest.raises(RuntimeError, match="a broken step"):
        trainer.train(4)
    files = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"last.pth", "best_model.pth"} <= files and "final_model.pth" not in files
    assert last(tmp_path)["epoch"] == 2
    trainer.train(1)
    assert files < {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}


def test_more_epochs_after_the_end(tmp_path):
    """2 + 2 epochs are 4 epochs: also for momentum, which Lightning's second fit() empties (#2823, nnUNet#1848)."""
    found = {}
    for name, parts in {"once": [4], "twice": [2, 2]}.items():
        model = net(dropout=0.5)
        trainer = trainer_of(tmp_path, model, shuffled(Noted()), optimizer=create_optimizer(model, lr=0.01), name=name)
        for epochs in parts:
            history = trainer.train(epochs)
        found[name] = repr([(row["epoch"], row["train"], row["val"]) for row in history.rows]), last_weights(tmp_path, name).tolist()
    assert found["once"] == found["twice"]


# In a notebook


def test_an_interrupt_ends_in_good_order(tmp_path):
    """Lightning raises SystemExit, Keras, HF and Poutyne lose the history, fastai forgets the best weights."""
    before = signal.getsignal(signal.SIGINT)
    trainer = trainer_of(tmp_path, observers=[At(8, lambda t: os.kill(os.getpid(), signal.SIGINT))])
    history = trainer.train(5)
    assert [row["epoch"] for row in history.rows] == [1] and trainer.run.state == "finished"
    assert signal.getsignal(signal.SIGINT) is before
    assert last(tmp_path)["batch"] == 3 and trainer.best_weights.available
    resumed = trainer_of(tmp_path)
    resumed.train(3, resume="last")
    trainer_of(tmp_path, name="whole").train(3)
    assert torch.equal(last_weights(tmp_path), last_weights(tmp_path, "whole"))


def test_an_interrupted_trainer_trains_on(tmp_path):
    """After an interrupt the next run of Ignite and MONAI returns at once and trains nothing; Lightning's Adam is empty."""
    found = {}
    for name, observers in {"whole": [], "cut": [At(8, lambda t: os.kill(os.getpid(), signal.SIGINT))]}.items():
        model = net(dropout=0.5)
        trainer = trainer_of(tmp_path, model, shuffled(Noted()), optimizer=create_optimizer(model), observers=observers, name=name)
        trainer.train(2)
        if observers:
            assert trainer.current_epoch == 1
            trainer.train(1)
        found[name] = [row["epoch"] for row in trainer.history.rows], last_weights(tmp_path, name).tolist()
    assert found["whole"] == found["cut"]


@pytest.mark.parametrize("at", [3, 6, 14])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_trainer_can_run_again_after_any_exception(tmp_path, at, error):
    """Ignite's engine keeps its broken generator, and the next run() is silently over. Batch 6 is in the validation."""
    torch.manual_seed(1)
    trainer = trainer_of(tmp_path, Breaking(at, error))
    with pytest.raises(error, match="a broken step"):
        trainer.train(3)
    assert trainer.run.state == "failed" and trainer.run.exception is not None
    history = trainer.train(3 - trainer.current_epoch)
    assert [row["epoch"] for row in history.rows] == [1, 2, 3]
    assert trainer.global_step == 15


@pytest.mark.parametrize("at", [3, 6])
def test_what_was_entered_is_left_after_an_exception(tmp_path, at):
    """fastai's autocast has no `finally`: an interrupt leaves it on for the whole kernel."""
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    trainer = trainer_of(tmp_path, Breaking(at), amp="bf16")
    with pytest.raises(RuntimeError):
        trainer.train(1)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
    assert not trainer.model.training and all(p.grad is None for p in trainer.model.parameters())
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (deterministic, benchmark)


def test_a_background_run_does_not_inherit_the_cell_s_grad_mode(tmp_path):
    """A cell that shows predictions under no_grad, or has switched gradients off, must not stop the training thread."""
    trainer = trainer_of(tmp_path)
    with torch.no_grad():
        run = trainer.start(2)
        assert run.wait(30)
    assert run.exception is None and len(trainer.history.rows) == 2
    trainer_of(tmp_path, name="here").train(2)
    assert torch.equal(last_weights(tmp_path), last_weights(tmp_path, "here"))


def test_training_off_the_main_thread_leaves_signals_alone(tmp_path):
    """signal.signal() outside of the main thread raises (Lightning#9590)."""
    before, errors = signal.getsignal(signal.SIGINT), []

    def work():
        try:
            trainer_of(tmp_path).train(1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert not errors and signal.getsignal(signal.SIGINT) is before and last(tmp_path)["epoch"] == 1


def test_a_failed_background_run_holds_no_batch(tmp_path):
    """The traceback of an exception keeps every frame alive, and with it the memory of the batch (ipython#11572, fastai)."""
    trainer = trainer_of(tmp_path, Breaking(3))
    run = trainer.start(2)
    assert run.wait(30) and run.state == "failed"
    assert "a broken step" in run.traceback and run.exception.__traceback__ is None
    gc.collect()
    trainer.train_loader, trainer.val_loader, images = None, None, trainer.model.seen
    gc.collect()
    assert images() is None


def test_a_stop_leaves_no_worker_behind(tmp_path):
    """Interrupted loaders leave hanging or dead worker processes (pytorch#22924, mmdetection#410)."""
    images, masks = data(12)
    loaders = [DataLoader(TensorDataset(images, masks), 2, num_workers=2, persistent_workers=keep) for keep in (True, False)]
    trainer = trainer_of(tmp_path, train=loaders[0], val=loaders[1], observers=[At(2, lambda t: t.run.stop())])
    trainer.train(1)
    gc.collect()
    assert trainer.run.state == "finished" and trainer.global_step == 2
    for child in multiprocessing.active_children():
        child.join(5)
    assert not multiprocessing.active_children()


def test_an_unfinished_epoch_is_no_row(tmp_path):
    """skorch leaves a row without losses for the epoch that was interrupted (#387)."""
    trainer = trainer_of(tmp_path, observers=[At(7, lambda t: t.run.stop())])
    history = trainer.train(3)
    assert [row["epoch"] for row in history.rows] == [1]
    assert all(math.isfinite(history.rows[0][phase]["loss"]) for phase in ("train", "val"))
    assert any(event["kind"] == "stop" for event in history.events)
    trainer.train(1)
    assert [row["epoch"] for row in history.rows] == [1, 2]


def test_an_observer_that_fails_does_not_end_the_training(tmp_path):
    """A logger's full disk or a closed page is no reason to lose a night (fastai#3844 crashes in its own plot)."""

    def fail(trainer):
        raise OSError("no space left")

    trainer = trainer_of(tmp_path, observers=[At(2, fail)])
    assert len(trainer.train(2).rows) == 2 and trainer.run.exception is None


# After an error, and at the edges of settings


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [3, 6, 7])
def test_an_exception_within_a_group_loses_no_batch(tmp_path, at, error):
    """The gathered gradients are dropped, but the batches count as done: their images are skipped when the run goes on."""
    for name, broken in {"whole": 10**9, "cut": at}.items():
        torch.manual_seed(1)
        trainer = trainer_of(tmp_path, Breaking(broken, error), batches(*data(20)), name=name)
        trainer.accumulate_gradients = 4
        if name == "cut":
            with pytest.raises(error):
                trainer.train(1)
        trainer.train(1)
    assert trainer.global_step == 3
    assert torch.equal(last_weights(tmp_path, "whole"), last_weights(tmp_path, "cut"))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_switches_gradients_on(tmp_path, off):
    """A cell that has switched gradients off: `element 0 of tensors does not require grad`."""
    trainer = trainer_of(tmp_path)
    with off():
        assert len(trainer.train(1)) == 1 and not torch.is_grad_enabled()


def test_a_rate_after_a_schedule_has_arrived_at_zero(tmp_path):
    """ZeroDivisionError: value / self.learning_rate."""
    trainer = trainer_of(tmp_path)
    trainer.scheduler = create_scheduler(trainer.optimizer, "polynomial", total_iters=2, power=1.0)
    trainer.train(3)
    trainer.set("lr", 0.1)
    assert trainer.learning_rate == 0.1


def test_plateau_and_one_class_watched(tmp_path):
    """KeyError 'per_class.dice.0' in _plateau_metric; EarlyStopping.value_of({'val': val}) knows dotted names."""
    trainer = trainer_of(tmp_path)
    trainer.early_stopping = EarlyStopping(3, monitor="per_class.dice.0")
    trainer.scheduler = create_scheduler(trainer.optimizer, "plateau", mode="max")
    trainer.train(2)
