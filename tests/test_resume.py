"""A run that was interrupted and continued is the run that was not: every bit, from every step, whatever the loader and its workers.

`FULL=1` tries every one of the first 40 steps with every number of workers; otherwise every third, and a few with workers.
"""

import sys
import os
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from unet_nbtrain import EarlyStopping, UNetTrainer, create_optimizer, create_scheduler
from unet_nbtrain.guard import FiniteGuard
from unet_nbtrain.sampling import make_loader

FULL = os.environ.get("FULL") == "1"
EPOCHS, BATCHES = 4, 12
STEPS = range(1, 41)

pytestmark = pytest.mark.usefixtures("one_thread")


class Pictures(Dataset):
    """As people write it: random flips, noise and brightness from the three global generators, and no thought of resuming."""

    def __init__(self, n=24):
        random_ = torch.Generator().manual_seed(0)
        self.images, self.reads = torch.rand(n, 1, 8, 8, generator=random_), 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        image = self.images[index] * np.random.uniform(0.8, 1.2) + 0.05 * torch.rand(1, 8, 8)
        image = image.flip(-1) if random.random() < 0.5 else image
        return image.float(), (image > 0.5).float()


class Net(nn.Module):
    """Batch norm and dropout, for which order and randomness matter."""

    def __init__(self):
        super().__init__()
        self.n_classes = 1
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(4, 1, 1))

    def forward(self, images):
        return self.layers(images)


def plain(workers=0, shuffle=True):
    return DataLoader(Pictures(), batch_size=2, shuffle=shuffle, num_workers=workers)


def ours(workers=0):
    return make_loader(Pictures(), 2, True, 3, workers)


class Stop:
    """Stops a run at an optimizer step; or in the validation, at its first batch after that step"""

    def __init__(self, step, phase="train"):
        self.step, self.phase = step, phase

    def on_batch_end(self, trainer, loss):
        if trainer.phase == self.phase and trainer.global_step >= self.step and not trainer.run.pending:
            trainer.run.stop()


def trainer_of(folder, loader, val=None, observers=()):
    torch.manual_seed(1)
    model = Net()
    optimizer = create_optimizer(model, "adamw", lr=1e-2)
    trainer = UNetTrainer(
        model, loader, val or plain(shuffle=False), optimizer=optimizer, scheduler=create_scheduler(optimizer, "cosine", T_max=EPOCHS),
        device="cpu", run_dir=folder, observers=observers, ema_decay=0.9,
    )  # fmt: skip
    trainer.early_stopping = EarlyStopping(patience=4)
    return trainer


TIMES = {"seconds", "images_per_second", "data_wait"}


def everything(trainer):
    """All that a run leaves behind, but for times."""
    state = torch.load(trainer.checkpoint_dir / "last.pth", weights_only=True)
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in trainer.history.rows]
    kept = ("model_state_dict", "training_model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "early_stopping", "global_step", "epoch")
    return {name: state[name] for name in kept} | {"rows": rows}


def bits(value):
    """Nested values with tensors as bytes, to be compared by `==`; a NaN equals itself then."""
    if isinstance(value, dict):
        return {name: bits(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    return value.numpy().tobytes() if torch.is_tensor(value) else repr(value)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run of each loader gives without interruption."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for make in (plain, ours):
        trainer = trainer_of(tmp_path_factory.mktemp("whole"), make())
        trainer.train(EPOCHS)
        assert trainer.global_step == EPOCHS * BATCHES
        found[make] = bits(everything(trainer))
    torch.set_num_threads(threads)
    return found


def interrupted(folder, make, stops, workers=(0, 0), phase="train"):
    """A run that is stopped at each of these steps and continued by a new trainer each time."""
    for place, step in enumerate(stops):
        trainer = trainer_of(folder, make(workers[min(place, 1)]), observers=[Stop(step, phase)])
        trainer.train(EPOCHS, resume="last" if place else None)
        assert trainer.global_step == step
        np.random.seed(step), random.seed(step)
    trainer = trainer_of(folder, make(workers[1]))
    trainer.train(EPOCHS, resume="last")
    return bits(everything(trainer))


@pytest.mark.parametrize("step", STEPS if FULL else STEPS[::3])
def test_from_every_step_of_an_unmodified_data_set(undisturbed, tmp_path, step):
    assert interrupted(tmp_path, plain, [step]) == undisturbed[plain]


@pytest.mark.parametrize("step", STEPS if FULL else [5, 20])
def test_from_every_step_of_our_loader(undisturbed, tmp_path, step):
    assert interrupted(tmp_path, ours, [step]) == undisturbed[ours]


@pytest.mark.parametrize("make", [plain, ours])
@pytest.mark.parametrize("workers", [(0, 2), (2, 0)])
@pytest.mark.parametrize("step", STEPS if FULL else [11])
def test_the_number_of_workers_may_change(undisturbed, tmp_path, make, workers, step):
    assert interrupted(tmp_path, make, [step], workers) == undisturbed[make]


class OneBroken(Pictures):
    """The ninth image is NaN, so that the step that gets it is a bad one."""

    def __getitem__(self, index):
        image, mask = super().__getitem__(index)
        return (image * float("nan") if index == 8 else image), mask


@pytest.mark.parametrize("stop", [3, 6, 11, 17])
def test_from_among_steps_of_which_only_the_device_knows_whether_they_were_bad(tmp_path, monkeypatch, stop):
    """As on a card: there the verdicts of the steps so far are tensors, and are in the file beside the losses."""
    monkeypatch.setattr(FiniteGuard, "_known", lambda self, flag, optimizer: None)
    monkeypatch.setattr(FiniteGuard, "_lowered", lambda self: torch.zeros_like(self._fresh))

    def make():
        return DataLoader(OneBroken(), batch_size=2)

    whole = trainer_of(tmp_path / "whole", make())
    whole.train(EPOCHS)
    assert [row["skipped_steps"] for row in whole.history.rows] == [1] * EPOCHS
    part = trainer_of(tmp_path / "part", make(), observers=[Stop(stop)])
    part.train(EPOCHS)
    verdicts = torch.load(part.checkpoint_dir / "last.pth", weights_only=True)["meter"]["loss"]["verdicts"]
    assert [float(verdict) for verdict in verdicts] == [float(step == 4) for step in range(stop % BATCHES)]
    gone_on = trainer_of(tmp_path / "part", make())
    gone_on.train(EPOCHS, resume="last")
    assert bits(everything(gone_on)) == bits(everything(whole))


def test_ten_times_within_one_epoch(undisturbed, tmp_path):
    assert interrupted(tmp_path, plain, range(14, 24)) == undisturbed[plain]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("step", [12, 36])
def test_in_the_middle_of_a_validation(undisturbed, tmp_path, step):
    """Without a warning of PyTorch, which misses the steps of the other process where the first thing to come here is a schedule"""
    assert interrupted(tmp_path, plain, [step], phase="val") == undisturbed[plain]


def test_another_seed_is_another_run(undisturbed, tmp_path):
    """The comparison can fail"""
    trainer = trainer_of(tmp_path, plain())
    trainer.seed = 1
    trainer.train(EPOCHS)
    assert bits(everything(trainer)) != undisturbed[plain]


def test_at_batch_100_000_no_earlier_sample_is_read():
    from unet_nbtrain.feeding import Feed

    class Long(Pictures):
        def __len__(self):
            return 200_010

        def __getitem__(self, index):
            return super().__getitem__(index % 24)

    for loader in (DataLoader(Long(), batch_size=2, shuffle=True), make_loader(Long(), 2, True)):
        feed = Feed(loader, 0)
        assert len(list(feed.batches(3, 100_000))) == 5
        assert loader.dataset.reads == 10
        feed.close()


def small(folder, epochs=None, lr=1e-2, weight_decay=0.01, **options):
    """A trainer without observers, on fixed batches; with a cosine over so many epochs, if any"""
    torch.manual_seed(1)
    model, batches = Net(), [(torch.rand(2, 1, 8, 8), torch.zeros(2, 8, 8))] * 2
    optimizer = create_optimizer(model, lr=lr, weight_decay=weight_decay)
    schedule = epochs and create_scheduler(optimizer, "cosine", T_max=epochs, warmup=1)
    return UNetTrainer(model, batches, list(batches), optimizer=optimizer, scheduler=schedule, device="cpu", run_dir=folder, observers=[], **options)


def test_more_epochs_after_the_end_of_the_schedule_are_told_to_learn_nothing(tmp_path, caplog):
    trainer = small(tmp_path, epochs=3)
    trainer.train(4)
    assert caplog.text == ""
    trainer.train(2)
    assert [row["lr"] for row in trainer.history.rows[4:]] == [0, 0]
    assert "has ended, and the learning rate stays at 0: nothing will be learned" in caplog.text
    caplog.clear()
    trainer.set("lr", 1e-3)
    trainer.scheduler = create_scheduler(trainer.optimizer, "cosine", T_max=2, eta_min=1e-4)
    trainer.train(2)
    assert trainer.history.rows[-1]["lr"] > 0 and "learned" not in caplog.text


def test_a_learning_rate_that_is_not_taken_is_told(tmp_path, caplog):
    small(tmp_path, epochs=5).train(3)
    again = small(tmp_path, epochs=5, lr=5e-2, weight_decay=0.5)
    again.train(4, resume="last")
    assert "learning rate of 0.01 (given now: 0.05)" in caplog.text and "weight decay of 0.01 (given now: 0.5)" in caplog.text
    assert again.history.rows[-1]["lr"] < 1e-2 and again.optimizer.param_groups[0]["weight_decay"] == 0.01
    caplog.clear()
    small(tmp_path, epochs=5, lr=5e-2).train(5, resume="last")
    assert "rate of 0.01" in caplog.text and "decay" not in caplog.text


@pytest.mark.parametrize("options", [{}, {"epochs": 5}, {"lr": 5e-2}, {"epochs": 5, "gradient_clip_norm": 0.5}])
def test_the_same_lines_as_then_are_not_worth_a_word(tmp_path, caplog, options):
    """A rate that a schedule or somebody at the panel has lowered is not one that was given otherwise"""
    small(tmp_path, **options).train(2)
    trainer = small(tmp_path, **options)
    trainer.train(3, resume="last")
    trainer.set("lr", 1e-4)
    trainer.train(1)
    small(tmp_path, **options).train(5, resume="last")
    assert "given now" not in caplog.text


# Begun anew in the folder of another run


def fails():
    raise RuntimeError("before the first step")


def aside(folder):
    """What was put aside: names, and the weights of the best model"""
    place = folder / "checkpoints" / "replaced"
    return sorted(path.name for path in place.glob("*")), (place / "best_model.pth").read_bytes()


@pytest.mark.parametrize("loaded", [False, True], ids=["resume", "load_checkpoint"])
def test_a_run_that_comes_from_elsewhere_puts_the_one_that_is_there_aside(tmp_path, loaded):
    """Two attempts from one file, in one folder: the first attempt is still there. Its own files move nothing"""
    trainer_of(tmp_path / "first", ours()).train(1)
    trainer_of(tmp_path / "second", ours()).train(2, resume=tmp_path / "first" / "checkpoints" / "last.pth")
    best, source = ((tmp_path / name / "checkpoints" / "best_model.pth").read_bytes() for name in ("second", "first"))
    assert not (tmp_path / "second" / "checkpoints" / "replaced").exists()
    again = trainer_of(tmp_path / "second", ours())
    if loaded:
        again.load_checkpoint(tmp_path / "first" / "checkpoints" / "last.pth")
        again.train(1)
    else:
        again.train(3, resume=tmp_path / "first")
    assert aside(tmp_path / "second")[1] == best and (tmp_path / "first" / "checkpoints" / "best_model.pth").read_bytes() == source
    assert (tmp_path / "second" / "checkpoints" / "best_model.pth").exists()
    trainer_of(tmp_path / "second", ours()).train(4, resume=tmp_path / "second" / "checkpoints" / "last.pth")
    assert aside(tmp_path / "second")[1] == best


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_a_run_that_goes_on_from_its_own_folder_moves_nothing(tmp_path, monkeypatch):
    """By a relative path, from another directory than the one in which it was loaded; by a link that lies in the folder"""
    trainer_of(tmp_path / "run", ours()).train(1)
    folder = tmp_path / "run" / "checkpoints"
    monkeypatch.chdir(tmp_path)
    moved = trainer_of(tmp_path / "run", ours())
    moved.load_checkpoint("run/checkpoints/last.pth")
    monkeypatch.chdir(folder)
    moved.train(1)
    (tmp_path / "elsewhere.pth").write_bytes((folder / "last.pth").read_bytes())
    (folder / "link.pth").symlink_to(tmp_path / "elsewhere.pth")
    trainer_of(tmp_path / "run", ours()).train(3, resume=folder / "link.pth")
    assert not (folder / "replaced").exists()


def files_in(folder):
    """The contents of all checkpoints of a folder and the folders in it"""
    return {path.read_bytes() for path in folder.rglob("*.pth")}


@pytest.mark.parametrize("way", ["folder", "last.pth", "epoch_0002.pth", "load_checkpoint"])
def test_going_on_with_the_run_that_was_put_aside_loses_no_file(tmp_path, caplog, way):
    """Both lines stay, also where it goes on from an older file, and the second time"""
    scripted(tmp_path, 3, 2, 1, 4).train(4)
    scripted(tmp_path, 8, 7).train(2)
    place = tmp_path / "checkpoints"
    best = aside(tmp_path)[1]
    for turn in (1, 2):
        before, again = files_in(place), scripted(tmp_path, 3, 2, 1, 4, 0.5, 6)
        caplog.clear()
        if way == "load_checkpoint":
            again.load_checkpoint(place / "replaced" / "last.pth")
            again.train(1)
        else:
            again.train(5, resume=place / "replaced" / (way if "." in way else ""))
        assert before <= files_in(place) and f"which is now {place / f'replaced_{turn}'}" in caplog.text
        assert best_in(place)[0] == again.history.best["epoch"]
    assert (place / "replaced_1" / "best_model.pth").read_bytes() == best


class FirstFile:
    """Whether there is a file when a run begins"""

    def on_run_start(self, trainer):
        self.is_there = (trainer.checkpoint_dir / "last.pth").exists()


def test_a_run_that_came_from_elsewhere_has_a_file_before_its_first_step(tmp_path):
    trainer_of(tmp_path / "first", ours()).train(1)
    trainer_of(tmp_path / "second", ours(), observers=[look := FirstFile()]).train(2, resume=tmp_path / "first")
    assert look.is_there


def test_a_fine_tuning_in_the_same_object_puts_the_first_run_aside(tmp_path):
    trainer = trainer_of(tmp_path, ours())
    trainer.train(1)
    best = (tmp_path / "checkpoints" / "best_model.pth").read_bytes()
    trainer.load_checkpoint(tmp_path / "checkpoints" / "best_model.pth", strict=False)
    trainer.train(1)
    assert aside(tmp_path)[1] == best


def test_a_second_run_in_a_folder_puts_the_first_one_aside(tmp_path, caplog):
    """A cell that was run twice: the first run is still there, whole, and can be gone on with"""
    trainer_of(tmp_path, ours()).train(2)
    (tmp_path / "history.json").write_text("{}")
    (tmp_path / "checkpoints" / "mine.pth").write_bytes(b"mine")
    best, last = ((tmp_path / "checkpoints" / name).read_bytes() for name in ("best_model.pth", "last.pth"))
    second = trainer_of(tmp_path, ours(), observers=[Stop(1)])
    second.train(2)
    assert aside(tmp_path) == (["best_model.pth", "final_model.pth", "history.json", "last.prev.pth", "last.pth"], best)
    assert (tmp_path / "checkpoints" / "replaced" / "last.pth").read_bytes() == last
    there = {path.name for path in (tmp_path / "checkpoints").glob("*.pth")}
    assert there == {"last.pth", "last.prev.pth", "final_model.pth", "mine.pth"} and not (tmp_path / "history.json").exists()
    assert [record.getMessage().count("replaced") for record in caplog.records if "earlier run" in record.getMessage()] == [2]
    third = trainer_of(tmp_path / "third", ours())
    third.train(resume=tmp_path / "checkpoints" / "replaced")
    assert third.current_epoch == 2 and third.global_step == 2 * BATCHES


def test_a_trainer_puts_nothing_of_its_own_aside(tmp_path):
    """Stopped, or failed, before its first step and started again; gone on; a loop of its own"""
    trainer_of(tmp_path, ours()).train(1)
    trainer = trainer_of(tmp_path, ours())
    trainer.train_epoch = fails
    for _ in range(3):
        with pytest.raises(RuntimeError, match="before the first step"):
            trainer.train(1)
    kept = aside(tmp_path)
    del trainer.train_epoch
    trainer.train(2)
    trainer.train(1)
    other = trainer_of(tmp_path, ours())
    other.current_epoch = 3
    other.train(1)
    trainer_of(tmp_path, ours()).train(2, resume="last")
    assert aside(tmp_path) == kept


def test_starting_by_mistake_twice_does_not_push_out_the_good_run(tmp_path):
    trainer_of(tmp_path, ours()).train(1)
    for _ in range(3):
        trainer_of(tmp_path, ours(), observers=[Stop(2)]).train(1)
    assert trainer_of(tmp_path / "again", ours()).train(resume=tmp_path / "checkpoints" / "replaced")["epochs"] == [1]


def best_in(folder):
    """The best epoch that the best file knows, and how many rows its history has"""
    state = torch.load(folder / "best_model.pth", weights_only=True)
    return state["early_stopping"]["best_epoch"], len(state["history"]["rows"])


class Scripted(UNetTrainer):
    """Validation losses as one wants them"""

    def validate_epoch(self):
        return super().validate_epoch() | {"loss": self.losses[self.current_epoch]}


def scripted(folder, *losses, **options):
    trainer = small(folder, save_every_n_epochs=2, **options)
    trainer.__class__, trainer.losses = Scripted, losses
    return trainer


@pytest.mark.parametrize("same", [False, True], ids=["another trainer", "the same one"])
@pytest.mark.parametrize("losses, best", [((3, 2, 1.5, 1.4), 4), ((3, 2, 8, 9), 2)], ids=["better than then", "worse"])
def test_going_back_within_a_folder_puts_aside_what_came_after(tmp_path, losses, best, same):
    """The best file is that of the history, and that of the first line, better or not, is still there"""
    first = scripted(tmp_path, 3, 2, 1, 0.5, 0.4)
    first.train(5)
    folder, whole = tmp_path / "checkpoints", (tmp_path / "checkpoints" / "best_model.pth").read_bytes()
    again = first if same else scripted(tmp_path)
    again.load_checkpoint(folder / "epoch_0002.pth")
    again.losses = losses
    again.train(2)
    assert aside(tmp_path) == (["best_model.pth", "epoch_0004.pth", "final_model.pth", "last.prev.pth", "last.pth"], whole)
    assert best_in(folder)[0] == again.history.best["epoch"] == best and best_in(folder / "replaced") == (5, 5)
    assert torch.load(folder / "last.pth", weights_only=True)["epoch"] == 4
    again.train(resume=folder / "last.pth")
    assert best_in(folder / "replaced") == (5, 5) and len(again.history) == 4


@pytest.mark.parametrize("broken", ["", "last.pth"], ids=["killed before last", "last is torn"])
def test_going_on_from_the_newest_file_moves_nothing(tmp_path, broken):
    """Also where the best file is of the epoch after it, since the run was killed between the two"""
    scripted(tmp_path, 3, 2).train(2)
    folder = tmp_path / "checkpoints"
    older = {name: (folder / name).read_bytes() for name in ("last.pth", "last.prev.pth")}
    scripted(tmp_path, 3, 2, 1).train(3, resume="last")
    for name, content in older.items():
        (folder / name).write_bytes(b"torn" if name == broken else content)
    again = scripted(tmp_path, 3, 2, 1)
    again.train(3, resume="last")
    assert not (folder / "replaced").exists() and best_in(folder) == (3, 3) and len(again.history) == 3


def test_another_seed_is_told(tmp_path, caplog):
    small(tmp_path).train(1)
    small(tmp_path).train(2, resume="last")
    assert "seed" not in caplog.text
    small(tmp_path, seed=7).train(3, resume="last")
    assert "the seed" in caplog.text and "may not repeat" in caplog.text


class Adaptive(nn.Module):
    """A loss whose scale follows the losses before"""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, logits, masks):
        loss = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], masks)
        if torch.is_grad_enabled():
            self.scale.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.scale


def test_a_loss_with_numbers_of_its_own_goes_on(tmp_path):
    """Bit for bit; a file without them loads"""
    whole = small(tmp_path / "whole", criterion=Adaptive()).train(4)
    small(tmp_path / "parts", criterion=Adaptive()).train(2)
    parts = small(tmp_path / "parts", criterion=Adaptive())
    parts.train(4, resume="last")
    assert parts.history["train_losses"] == whole["train_losses"]
    file = tmp_path / "parts" / "checkpoints" / "last.pth"
    state = torch.load(file, weights_only=True)
    del state["criterion_state_dict"]
    torch.save(state, file)
    small(tmp_path / "old", criterion=Adaptive()).load_checkpoint(file)


@pytest.mark.parametrize("change", [
    lambda model: [parameter.data.zero_() for parameter in model.parameters()],
    lambda model: nn.utils.vector_to_parameters(0 * nn.utils.parameters_to_vector(model.parameters()), model.parameters()),
], ids=["data", "vector"])  # fmt: skip
def test_weights_that_were_changed_behind_the_back_of_autograd_stay(tmp_path, change):
    trainer = small(tmp_path)
    trainer.train(2)
    change(trainer.model)
    trainer._recall_last()
    assert all((parameter == 0).all() for parameter in trainer.model.parameters())
