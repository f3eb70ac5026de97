"""Faults of resuming: rows 105 to 115 of the fault table, and 73 and 75: the wrong file, the wrong trainer, another world."""

import logging
import math
import pickle
import zipfile

import pytest
import torch
from ckpttools import Net, contents, equal, message_of, trainer_in
from torch import nn

from unet_nbtrain import create_scheduler
from unet_nbtrain.checkpoint import CheckpointFolder, load_file, save_file

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_HERE = {}


def improving(trainer):
    """The same trainer, to which each epoch seems better than the one before"""
    trainer.early_stopping.value_of = lambda row: 1 / row["epoch"]
    return trainer


@pytest.fixture
def run(tmp_path):
    """The checkpoints of a run of three epochs, each with a regular file"""
    improving(trainer_in(tmp_path / "run", save_every_n_epochs=1)).train(3)
    return CheckpointFolder(tmp_path / "run" / "checkpoints")


def replaced(path, data):
    """A new file under a name: the names of one epoch are one file, so it is never written into"""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def test_073_written_on_a_gpu_and_read_without_one(run, monkeypatch, tmp_path):
    """Simulated: the file says that its tensors were on a CUDA device"""
    state = load_file(run.last)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(state, tmp_path / "cuda.pth")
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "cuda.pth") as archive:
        assert b"cuda:0" in archive.read("cuda/data.pkl")
    trainer = trainer_in(tmp_path / "new")
    trainer.load_checkpoint(tmp_path / "cuda.pth")
    assert trainer.current_epoch == 3 and next(trainer.model.parameters()).device.type == "cpu"


def test_075_another_number_of_devices(run, tmp_path):
    """A wrapper's prefix, in the file or in the model"""
    weights = load_file(run.last)["model_state_dict"]
    torch.save({"model_state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "wrapped.pth")
    for model in (Net(), nn.DataParallel(Net())):
        trainer = trainer_in(tmp_path / "new", model)
        trainer.load_checkpoint(tmp_path / "wrapped.pth")
        assert equal(list(trainer.state_dict()["model_state_dict"].values()), list(weights.values()))


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "zeros", "zip", "text", "missing"])
def test_105_the_newest_is_bad(run, tmp_path, caplog, damage):
    """Last, then the one before, then the best, each refusal with its reason in the log"""
    raw = run.last.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 8
    bad = {"bit": bytes(flipped), "cut": raw[:-1000], "empty": b"", "zeros": bytes(len(raw)), "text": b"<html>404</html>"}
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "another archive")
    bad["zip"] = (tmp_path / "other.zip").read_bytes()
    for broken, expected in ((run.last, run.previous), (run.previous, run.best)):
        if damage == "missing":
            broken.unlink()
        else:
            replaced(broken, bad[damage])
        caplog.clear()
        state, path = run.load_newest()
        assert path == expected and str(broken) in caplog.text and f"Using {expected.name}" in caplog.text
    trainer = trainer_in(tmp_path / "run")
    assert len(trainer.train(4, resume="last")) == 4


def snapshot(trainer):
    return pickle.dumps([trainer.current_epoch, trainer.global_step, trainer.history.state_dict(), trainer.early_stopping.state_dict()]), [
        tensor.clone() for tensor in trainer.model.state_dict().values()
    ]


@pytest.mark.parametrize("other", ["classes", "width", "optimizer", "scheduler", "groups"])
def test_106_another_trainer(run, tmp_path, other):
    """A table of what is in the file and what is here; weights, optimizer, schedule and history are untouched"""
    options = {}
    if other == "optimizer":
        options["optimizer"] = "sgd"
    model = Net(n_classes=3) if other == "classes" else Net(width=8) if other == "width" else Net()
    if other == "groups":
        options["optimizer"] = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    if other == "scheduler":
        scheduled = trainer_in(tmp_path / "run", save_every_n_epochs=1)
        scheduled.scheduler = create_scheduler(scheduled.optimizer, "step", step_size=2)
        scheduled.train(1)
    trainer = trainer_in(tmp_path / "new", model, **options)
    if other == "scheduler":
        trainer.scheduler = create_scheduler(trainer.optimizer, "cosine", T_max=4)
    trainer.history.append({"epoch": 1, "train": {"loss": 1.0}, "val": {"loss": 1.0}})
    before, rates = snapshot(trainer), [group["lr"] for group in trainer.optimizer.param_groups]
    message = message_of(trainer.load_checkpoint, run.last)
    after = snapshot(trainer)
    assert before[0] == after[0] and equal(before[1], after[1]) and not trainer.optimizer.state
    assert rates == [group["lr"] for group in trainer.optimizer.param_groups]
    assert str(run.last) in message and "in the file" in message and "now" in message and "strict=False" in message
    words = {"classes": "layers.3.weight", "width": "layers.0.weight", "optimizer": "SGD", "scheduler": "CosineAnnealingLR", "groups": "tensors in its groups"}
    assert words[other] in message


def test_106_another_loss_or_other_data_is_told(run, tmp_path, caplog):
    trainer = trainer_in(tmp_path / "new", criterion="bce_dice")
    trainer.train_loader = trainer.train_loader[:2]
    trainer.load_checkpoint(run.last)
    assert "under other conditions" in caplog.text and "the loss" in caplog.text and "batches an epoch" in caplog.text
    assert trainer.current_epoch == 3


def test_107_more_epochs_than_planned(tmp_path):
    """A cosine that was planned for three epochs does not climb again in the ones after"""
    options = {"optimizer": "sgd"}
    first = trainer_in(tmp_path, **options)
    first.scheduler = create_scheduler(first.optimizer, "cosine", T_max=3)
    first.train(3)
    second = trainer_in(tmp_path, **options)
    second.scheduler = create_scheduler(second.optimizer, "cosine", T_max=3)
    rates = second.train(6, resume="last")["learning_rates"]
    assert len(rates) == 6 and all(a >= b for a, b in zip(rates, rates[1:]))


def test_108_a_finished_or_stopped_run(tmp_path):
    """Nothing is left to do, and nothing is done: the reason says so, and no file is lost"""
    trainer_in(tmp_path).train(2)
    again = trainer_in(tmp_path)
    assert len(again.train(2, resume="last")) == 2 and again.run.reason == "all 2 epochs done"
    impatient = trainer_in(tmp_path / "b", early_stopping_patience=1)
    impatient.early_stopping.value_of = lambda row: float(row["epoch"])
    impatient.train(9)
    stopped = trainer_in(tmp_path / "b", early_stopping_patience=1)
    assert len(stopped.train(9, resume="last")) == 2 and "did not improve" in stopped.run.reason
    assert load_file(tmp_path / "b" / "checkpoints" / "last.pth")["epoch"] == 2


def test_109_newer_and_older_formats(run, tmp_path):
    state = torch.load(run.last)
    torch.save(state | {"version": 99}, tmp_path / "new.pth")
    assert "written by a newer unet_nbtrain (format 99" in message_of(load_file, tmp_path / "new.pth")
    for name in ("parts", "norms", "parts_per_batch", "nonfinite_in_a_row"):
        del state[name]
    save_file(state, tmp_path / "old.pth")
    trainer = trainer_in(tmp_path / "new")
    trainer.load_checkpoint(tmp_path / "old.pth")
    assert trainer.current_epoch == 3 and trainer.parts_per_batch == 1


def test_110_files_of_others(tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.save({"epoch": 7, "model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, tmp_path / "document.pth")
    trainer = trainer_in(tmp_path / "new")
    trainer.load_checkpoint(tmp_path / "document.pth")
    assert equal(dict(trainer.model.state_dict()), dict(model.state_dict())) and trainer.current_epoch == 0
    for key, origin in (("pytorch-lightning_version", "Lightning"), ("network_weights", "nnU-Net")):
        torch.save({key: "2.6", "state_dict": model.state_dict(), "epoch": 3}, tmp_path / "foreign.pth")
        message = message_of(load_file, tmp_path / "foreign.pth")
        assert f"as files of {origin} do" in message and "'state_dict'" in message
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    message = message_of(load_file, tmp_path / "bare.pth")
    assert "has no 'model_state_dict'" in message and "model.load_state_dict(torch.load(…))" in message
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    message = message_of(load_file, tmp_path / "whole.pth")
    assert "(torch.nn.modules.linear.Linear)" in message and "torch.load(…, weights_only=False)" in message and "\x1b" not in message
    assert f"is a folder. Name one of its files: {tmp_path / 'bare.pth'}, " in message_of(load_file, tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds a list" in message_of(load_file, tmp_path / "list.pth")


class StopAt:
    def __init__(self, step):
        self.step = step

    def on_batch_end(self, trainer, loss):
        if trainer.global_step == self.step:
            trainer.run.stop()


def test_111_resumed_at_every_step(tmp_path):
    """Twelve steps, stopped and resumed after each of them, against twelve in one go"""
    trainer_in(tmp_path / "whole").train(3)
    for step in range(1, 13):
        trainer_in(tmp_path / "cut", observers=[StopAt(step)]).train(3, resume="last" if step > 1 else None)
    trainer_in(tmp_path / "cut").train(3, resume="last")
    whole, cut = (load_file(tmp_path / name / "checkpoints" / "last.pth") for name in ("whole", "cut"))
    for key in ("model_state_dict", "optimizer_state_dict", "early_stopping", "epoch", "global_step"):
        assert equal(whole[key], cut[key]), key
    assert equal([row["val"] for row in whole["history"]["rows"]], [row["val"] for row in cut["history"]["rows"]])


def test_112_killed_between_best_and_last(run, tmp_path):
    """The best file is one epoch ahead of last: the epoch is repeated and gives the same best weights"""
    ahead, last = load_file(run.best), load_file(run.numbered("epoch", 2))
    assert ahead["epoch"] == 3 and last["epoch"] == 2
    save_file(last, run.last)
    improving(trainer_in(tmp_path / "run")).train(3, resume="last")
    assert equal(load_file(run.best)["model_state_dict"], ahead["model_state_dict"])


def test_113_back_to_an_earlier_file(run, tmp_path):
    """The later files belong to a future that is given up; history and files go on from the earlier one"""
    trainer = improving(trainer_in(tmp_path / "run", save_every_n_epochs=1, keep_epochs=9))
    trainer.train(2, resume=run.numbered("epoch", 1))
    assert [row["epoch"] for row in trainer.history.rows] == [1, 2] and load_file(run.last)["epoch"] == 2
    assert run.numbers("epoch") == [1, 2] and load_file(run.best)["epoch"] == 2


def test_114_no_step_twice_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from unet_nbtrain.loggers import TensorBoardLogger

    trainer_in(tmp_path, observers=[TensorBoardLogger(tmp_path / "tb")], save_every_n_epochs=1).train(4)
    resumed = trainer_in(tmp_path, observers=[TensorBoardLogger(tmp_path / "tb")])
    resumed.train(5, resume=tmp_path / "checkpoints" / "epoch_0002.pth")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), tag


def test_115_another_version_is_told_and_not_refused(run, tmp_path, caplog):
    save_file(load_file(run.last) | {"torch": "1.99.0"}, tmp_path / "old.pth")
    trainer = trainer_in(tmp_path / "new")
    with caplog.at_level(logging.WARNING):
        trainer.load_checkpoint(tmp_path / "old.pth")
    assert "1.99.0" in caplog.text and "PyTorch" in caplog.text and trainer.current_epoch == 3


@pytest.mark.parametrize("place", ["weights", "buffer", "optimizer", "average"])
def test_060_bad_numbers_never_reach_a_file(tmp_path, place):
    """Refused by name before the disk is touched; the run's own save tells it as a problem"""
    trainer = trainer_in(tmp_path, ema_decay=0.5)
    trainer.train(1)
    trainer._name_folders()
    trainer._recall_last()
    before = contents(tmp_path / "checkpoints")
    tensors = {
        "weights": trainer.model.layers[0].weight,
        "buffer": trainer.model.layers[1].running_var,
        "optimizer": trainer.optimizer.state[trainer.model.layers[0].weight]["exp_avg"],
        "average": trainer.averaged.module.layers[0].weight,
    }
    with torch.no_grad():
        tensors[place].view(-1)[0] = math.nan
    message = message_of(trainer.save_checkpoint, tmp_path / "mine.pth")
    assert "holds NaN or infinity" in message and not (tmp_path / "mine.pth").exists()
    logging.disable(logging.CRITICAL)
    assert trainer._save() is None
    trainer._save_aside()
    trainer._close_writer()
    logging.disable(logging.NOTSET)
    assert contents(tmp_path / "checkpoints") == before
    assert [event["kind"] for event in trainer.history.events][-2:] == ["problem", "problem"]
