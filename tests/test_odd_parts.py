"""Models, data sets and schedules as people write them, which are not quite as a trainer expects: the run is kept all the same."""

import argparse
import math
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from unet_nbtrain import UNet, UNetTrainer, create_optimizer, create_scheduler, demo_dataloaders, verify_resume
from unet_nbtrain.checkpoint import load_file

pytestmark = pytest.mark.usefixtures("one_thread")
LOADERS = demo_dataloaders(n_train=16, n_val=4, size=32, batch_size=4, augment=None)


def net(**options):
    torch.manual_seed(0)
    return UNet(3, 1, width=4, depth=1, **options)


@pytest.fixture
def make(tmp_path):
    def make(model=None, train=None, *observers, name="run", **options):
        return UNetTrainer(model or net(), train or LOADERS[0], LOADERS[1], **{"device": "cpu", "run_dir": tmp_path / name, "observers": observers} | options)

    return make


class StopAt:
    def __init__(self, step):
        self.step = step

    def on_batch_end(self, trainer, loss):
        if trainer.phase == "train" and trainer.global_step == self.step:
            trainer.run.stop()


def weights(trainer, file="last.pth"):
    return torch.cat([tensor.flatten().double() for tensor in load_file(trainer.checkpoint_dir / file)["model_state_dict"].values()])


def rows(trainer):
    times = ("seconds", "images_per_second", "data_wait")
    return repr([{key: value for key, value in row.items() if key not in times} for row in trainer.history.rows])


def broken_data(at=6):
    pairs = [tuple(o.clone() for o in pair) for pair in LOADERS[0].dataset]
    pairs[at][0][0, 3, 3] = math.nan
    return DataLoader(pairs, batch_size=4)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_resume_at_a_bad_batch_is_as_if_nothing_had_happened(make, step):
    """Before it, at it, after it; the bad step is counted once and told once"""
    whole, part = make(train=broken_data(), name="whole"), make(None, broken_data(), StopAt(step), name="part")
    whole.train(2)
    part.train(2)
    resumed = make(train=broken_data(), name="part")
    resumed.train(2, resume="last")
    assert torch.equal(weights(whole), weights(resumed)) and rows(whole) == rows(resumed)
    assert [row["skipped_steps"] for row in resumed.history.rows] == [1, 1]
    assert len([event for event in resumed.history.events if "has a loss or a gradient" in event["text"]]) == 2
    assert verify_resume(make(train=broken_data(), name="verify")).exact


def test_a_bad_first_batch_does_not_end_the_run(make):
    trainer = make(train=broken_data(0))
    assert trainer.train(1).rows[0]["skipped_steps"] == 1
    with pytest.raises(ValueError, match="NaN or infinite"):
        make(train=broken_data(0), name="strict", on_nonfinite="raise").train(1)


@pytest.mark.parametrize(
    "config", [argparse.Namespace(width=4), {"block": nn.Conv2d}, "resnet34", [1, 2], {1: "one"}, {"width": 4}], ids=lambda value: type(value).__name__
)
def test_a_config_of_any_kind(make, config):
    model = net()
    model.config = config
    trainer = make(model)
    trainer.train(1)
    state = load_file(trainer.checkpoint_dir / "last.pth")
    assert state["model_config"] == (config if config == {"width": 4} else None)
    assert len(make().train(2, resume="last")) == 2


def test_a_schedule_that_remembers_a_function(make, caplog):
    class Own(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer):
            self.shape = lambda epoch: 0.5**epoch
            super().__init__(optimizer)

        def get_lr(self):
            return [rate * self.shape(self.last_epoch) for rate in self.base_lrs]

    def with_own(name):
        model = net()
        optimizer = create_optimizer(model, lr=0.01)
        return make(model, name=name, optimizer=optimizer, scheduler=Own(optimizer))

    whole, part = with_own("whole"), with_own("part")
    whole.train(3)
    part.train(1)
    resumed = with_own("part")
    resumed.train(3, resume="last")
    assert torch.equal(weights(whole), weights(resumed)) and whole.history["learning_rates"] == resumed.history["learning_rates"]
    assert caplog.text.count("cannot hold 'shape' of the schedule") <= 1


class Masked(nn.Module):
    """A model with a mask of minus infinity, as attention has, and a buffer that is assigned anew"""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.n_classes, self.module = 1, nn.Conv2d(3, 1, 3, padding=1)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * images.detach().mean()
        return self.module(images) + self.mask.softmax(0)[1] + self.mean

    def get_extra_state(self):
        return {"note": "kept"}

    def set_extra_state(self, state):
        self.note = state["note"]


def test_infinite_masks_new_buffers_extra_state_and_a_part_called_module(make):
    """Its weights have the prefix that wrappers give; its files are written, and it skips a bad batch without a trace"""
    good = DataLoader([pair for i, pair in enumerate(LOADERS[0].dataset) if i // 4 != 1], batch_size=4)
    met, whole = make(Masked(), broken_data(), name="met"), make(Masked(), good, name="whole")
    for trainer in (met, whole):
        trainer.train(1)
    finite = [w[w.isfinite()] for w in map(lambda t: torch.cat([v.flatten().double() for v in load_file(t.checkpoint_dir / "last.pth")["model_state_dict"].values() if torch.is_tensor(v)]), (met, whole))]
    assert torch.equal(*finite)
    resumed = make(Masked(), broken_data(), name="met")
    assert len(resumed.train(2, resume="last")) == 2 and resumed.model.note == "kept"


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Rprop, torch.optim.Adagrad, torch.optim.NAdam])
def test_optimizers_of_every_kind_can_be_resumed(make, kind):
    def with_kind(name):
        model = net()
        return make(model, name=name, optimizer=kind(model.parameters(), lr=1e-3))

    whole, part = with_kind("whole"), with_kind("part")
    whole.train(2)
    part.train(1)
    resumed = with_kind("part")
    resumed.train(2, resume="last")
    assert torch.equal(weights(whole), weights(resumed))


class Own(Dataset):
    """A data set as in a tutorial: `preprocessing` is a function, and generators hide in a list of transforms"""

    def __init__(self, hidden=True):
        self.preprocessing = lambda image: image * 1.0
        self.transforms = [{"rng": np.random.default_rng(3), "other": (random.Random(4),)}] if hidden else []

    def __len__(self):
        return 12

    def __getitem__(self, index):
        image, mask = LOADERS[0].dataset[index]
        for transform in self.transforms:
            image = image * (0.5 + transform["rng"].random()) + transform["other"][0].random()
        return self.preprocessing(image).float(), mask


@pytest.mark.parametrize("step", [2, 4])
def test_generators_that_hide_in_transforms(make, step):
    whole, part = make(train=DataLoader(Own(), 4, shuffle=True), name="whole"), make(None, DataLoader(Own(), 4, shuffle=True), StopAt(step), name="part")
    whole.train(2)
    part.train(2)
    resumed = make(train=DataLoader(Own(), 4, shuffle=True), name="part")
    resumed.train(2, resume="last")
    assert torch.equal(weights(whole), weights(resumed)) and load_file(resumed.checkpoint_dir / "last.pth")["data"] is None


def test_the_best_weights_move_to_another_folder(make, tmp_path):
    """Continued elsewhere and stopped there before a new best: the best file is there too"""
    first = make(name="first", lr=1e-3)
    first.train(1)
    second = make(None, None, StopAt(6), name="second")
    second.train(4, resume=first.checkpoint_dir / "last.pth")
    third = make(name="second")
    third.train(3, resume="last")
    best = load_file(third.checkpoint_dir / "best_model.pth")
    assert third.best_weights.available and best["early_stopping"]["best_epoch"] is not None


@pytest.mark.parametrize("when", ["load", "begin"])
def test_an_interrupt_while_a_file_is_loaded(make, when, monkeypatch):
    """It is a stop like any other: the run is taken over whole, and stops at once"""
    part = make(None, None, StopAt(3), name="part")
    part.train(2)
    resumed = make(name="part")
    place = "_load_position" if when == "load" else "_take_folder"
    original = getattr(resumed, place)
    monkeypatch.setattr(resumed, place, lambda *args: (signal.raise_signal(signal.SIGINT), original(*args))[1])
    resumed.train(2, resume="last")
    assert resumed.run.reason == "stopped by a command" and resumed.global_step == 3
    monkeypatch.undo()
    whole = make(name="whole")
    whole.train(2)
    resumed.train(2 - resumed.current_epoch)
    assert torch.equal(weights(whole), weights(resumed))


def test_a_rollback_at_a_rate_of_zero(make):
    """A warm-up begins with it: the run goes back, and leaves the rate alone"""
    model = net()
    optimizer = create_optimizer(model, lr=0.0)
    trainer = make(model, broken_data(1), optimizer=optimizer, on_nonfinite="rollback")
    assert len(trainer.train(1)) == 1 and trainer.learning_rate == 0.0


def test_nothing_is_loaded_into_a_running_trainer(make):
    trainer = make()
    trainer.train(1)
    run = trainer.start(500)
    with pytest.raises(RuntimeError, match="Stop it before a file is loaded"):
        trainer.load_checkpoint(trainer.checkpoint_dir / "best_model.pth")
    answer = run.set(["lr"], 1)
    assert answer.wait(30) is False and run.state in ("idle", "running")
    assert run.stop().wait(30) and run.wait(30) and run.exception is None


def test_a_schedule_of_another_length_is_told(make, caplog):
    model = net()
    optimizer = create_optimizer(model)
    make(model, optimizer=optimizer, scheduler=create_scheduler(optimizer, "cosine", T_max=100)).train(2)
    assert "The schedule is made for 100 epochs, and the training has 2." in caplog.text


# Losses that give something else than a number with a gradient, and batches that are no tensors

BCE = nn.BCEWithLogitsLoss()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda loss: loss.item(), TypeError, r"is a float, .* without \.item\(\)"),
        (lambda loss: np.float32(loss.item()), TypeError, r"is a float32, .* without \.item\(\)"),
        (lambda loss: (loss, 1), TypeError, "is a tuple, .* wrapped"),
        (lambda loss: None, TypeError, "is None, .* without a return"),
        (lambda loss: loss.expand(2, 3), ValueError, r"has the shape \(2, 3\), .* loss\.mean\(\)"),
    ],
    ids=["float", "NumPy", "tuple", "None", "many"],
)
def test_a_loss_that_no_step_can_be_made_of(make, change, error, words):
    calls = []

    def odd(logits, masks):
        calls.append(1)
        return BCE(logits, masks) if len(calls) == 1 else change(BCE(logits, masks))

    trainer = make(criterion=odd)
    with pytest.raises(error, match=f"The loss of batch 2 of the training of epoch 1 {words}"):
        trainer.train(1)
    trainer.criterion = BCE
    assert len(trainer.train(1)) == 1


@pytest.mark.parametrize(
    "change, words",
    [(lambda loss, out: loss, "returned a Tensor .* must return two"), (lambda loss, out: None, "returned None"), (lambda loss, out: (out, loss), "logits first"),
     (lambda loss, out: (loss, [out]), "returned a list as logits"), (lambda loss, out: (loss, out, 1), "returned 3 things"), (lambda loss, out: (0.5, out), "loss .* is a float")],
)  # fmt: skip
def test_a_training_step_that_returns_something_else(make, change, words):
    trainer = make()
    trainer.training_step = lambda images, masks: change(BCE(out := trainer.model(images), masks), out)
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        trainer.train(1)
    assert "batch 1 of the training of epoch 1" in str(caught.value)


def as_arrays(samples):
    return tuple(np.stack([sample[i].numpy() for sample in samples]) for i in (0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_arrays_train_as_the_tensors_they_hold(make, workers):
    data = LOADERS[0].dataset
    plain, arrays = (make(train=DataLoader(data, 4, collate_fn=o, num_workers=workers), name=str(o is None)) for o in (None, as_arrays))
    plain.train(1), arrays.train(1)
    assert torch.equal(weights(plain), weights(arrays)) and rows(plain) == rows(arrays)


def test_a_batch_of_something_else_is_named(make):
    batches = [next(iter(LOADERS[0])), {"image": [1, 2], "mask": "a.png"}]
    with pytest.raises(TypeError, match=r"a dict {'image': list, 'mask': str}.*batch 2 of the training data"):
        make(train=batches).train(1)
