"""What data, loaders and their workers do wrong (faults 25 to 49, 70, 71, 94, 95): said by name, and nothing is lost."""

import math
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from heard import Heard
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data._utils import worker

from unet_nbtrain import UNet, UNetTrainer, create_dataloaders
from unet_nbtrain.feeding import Feed
from unet_nbtrain.image_files import read_image, read_mask
from unet_nbtrain.sampling import make_loader
from unet_nbtrain.sources import BadSample

NOT_HERE = {}  # Number of a fault -> why this machine cannot produce it

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self, n_classes=1, n_channels=1):
        super().__init__()
        self.n_classes, self.layer = n_classes, nn.Conv2d(n_channels, n_classes, 3, padding=1)

    def forward(self, images):
        return self.layer(images)


class Samples(Dataset):
    """Images with names; `act(index)` may raise, sleep or kill, and may give another sample."""

    def __init__(self, act=lambda index: None, n=8):
        self.act, self.n = act, n

    def __len__(self):
        return self.n

    def name_of(self, index):
        return f"cell_{index}.png"

    def __getitem__(self, index):
        other = self.act(index)
        return other if other is not None else (torch.full((1, 8, 8), index / 8), torch.ones(1, 8, 8))


def loader_of(act=lambda index: None, n=8, **options):
    return DataLoader(Samples(act, n), **{"batch_size": 2, **options})


def trainer_of(tmp_path, train=None, val=None, model=None, **options):
    torch.manual_seed(0)
    train, val = loader_of() if train is None else train, loader_of(n=2) if val is None else val
    return UNetTrainer(model or Net(), train, val, device="cpu", run_dir=tmp_path / "run", **{"observers": [], **options})


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def broken(*indices, error=None):
    def act(index):
        if index in indices:
            raise error or OSError("image file is truncated")

    return act


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def folders(tmp_path, n=4, size=16):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for i in range(n):
            Image.fromarray(np.full((size, size), i * (kind == "images") + (kind == "masks"), np.uint8)).save(tmp_path / kind / f"{i}.png")
    return tmp_path / "images", tmp_path / "masks"


def test_025_an_empty_data_set(tmp_path):
    with pytest.raises(ValueError, match="at least one sample"):
        make_loader(Samples(n=0), 2, True)
    with pytest.raises(ValueError, match="no batch"):
        trainer_of(tmp_path, val=[]).train(1)


def test_026_fewer_samples_than_a_batch(tmp_path):
    with pytest.raises(ValueError, match="drop_last"):
        trainer_of(tmp_path, loader_of(batch_size=100, drop_last=True)).train(1)


def test_027_a_last_batch_of_one_and_batch_norm_at_one_pixel(tmp_path):
    model = Net()
    model.layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Upsample((8, 8)), nn.Conv2d(1, 1, 1))
    trainer = trainer_of(tmp_path, loader_of(n=7), model=model)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        trainer.train(1)
    assert trainer.global_step == 3
    trainer.train_loader = loader_of()
    assert len(trainer.train(1)) == 1 and trainer.global_step == 4


def test_028_images_without_masks_are_listed(tmp_path):
    images, masks = folders(tmp_path)
    (masks / "2.png").unlink()
    with pytest.raises(ValueError, match=r"2\.png"):
        create_dataloaders(images, masks)


def test_029_image_and_mask_of_different_size(tmp_path):
    images, masks = folders(tmp_path)
    Image.new("L", (20, 16), 1).save(masks / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: the image is 16 x 16 pixels and its mask 16 x 20"):
        create_dataloaders(images, masks)


@pytest.mark.parametrize("workers", [0, 2])
def test_030_mixed_sizes_in_a_batch(tmp_path, workers):
    def act(index):
        return (torch.zeros(1, 8, 12), torch.ones(1, 8, 12)) if index == 5 else None

    trainer = trainer_of(tmp_path, loader_of(act, num_workers=workers))
    with pytest.raises(ValueError, match=r"cell_4\.png: \(1, 8, 8\).*cell_5\.png: \(1, 8, 12\)"):
        trainer.train(1)
    assert torch.load(trainer.checkpoint_dir / "last.pth")["batch"] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_031_a_damaged_image_is_left_out_and_named(tmp_path, workers):
    heard = Heard()
    trainer = trainer_of(tmp_path, loader_of(broken(5), num_workers=workers), observers=[heard])
    rows = trainer.train(2).rows
    assert [row["bad_samples"] for row in rows] == [1, 1] and trainer.global_step == 8
    assert [text for text in heard.problems if "cell_5.png (sample 5): OSError: image file is truncated" in text] == heard.problems[:1] and len(heard.problems) == 1
    assert [event["kind"] for event in trainer.history.events] == ["problem"]


@pytest.mark.parametrize("workers", [0, 2])
def test_031_a_damaged_image_ends_the_run_if_wanted(tmp_path, workers):
    trainer = trainer_of(tmp_path, loader_of(broken(5), num_workers=workers), on_bad_sample="raise")
    with pytest.raises(BadSample, match=r"cell_5\.png \(sample 5\): OSError: image file is truncated.*batch 3 of epoch 1") as caught:
        trainer.train(1)
    assert isinstance(caught.value.__cause__, OSError) and trainer.global_step == 2
    trainer.train_loader = loader_of()
    assert len(trainer.train(1, resume="last")) == 1 and trainer.global_step == 4


def test_031_a_batch_of_damaged_images_does_not_come(tmp_path):
    """And the run is the same when it is interrupted after it"""
    results = []
    for stop in (None, 4):
        trainer = trainer_of(tmp_path / str(stop), loader_of(broken(2, 3)))
        if stop:
            trainer.observers.add(type("Stop", (), {"on_batch_end": lambda self, t, loss, stop=stop: t.global_step == stop and t.run.stop()})())
        trainer.train(2)
        if stop:
            trainer = trainer_of(tmp_path / str(stop), loader_of(broken(2, 3)))
            trainer.train(2, resume="last")
        assert trainer.global_step == 6 and [row["bad_samples"] for row in trainer.history.rows] == [2, 2]
        results.append(torch.load(trainer.checkpoint_dir / "last.pth")["model_state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(*(result.values() for result in results), strict=True))


def test_031_a_first_batch_of_damaged_images_is_an_error(tmp_path):
    with pytest.raises(BadSample, match=r"None of the last 2 samples .* cell_0\.png"):
        trainer_of(tmp_path, loader_of(broken(0, 1))).train(1)


def test_031_a_first_batch_of_validation_may_be_damaged(tmp_path):
    """By then the training images have been read, so the disk is there"""
    trainer = trainer_of(tmp_path, val=loader_of(broken(0, 1), n=4))
    trainer.train(2)
    assert [row["bad_samples"] for row in trainer.history.rows] == [2, 2] and math.isfinite(trainer.history["val_losses"][0])


def test_032_a_png_without_its_end(tmp_path):
    picture = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(picture).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:-12])
    try:
        assert (read_image(tmp_path / "b.png") == picture).all()
    except ValueError as error:
        assert "b.png" in str(error)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_033_a_file_that_is_no_image(tmp_path, content):
    images, masks = folders(tmp_path)
    (images / "3.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"3\.png"):
        create_dataloaders(images, masks)


def test_034_a_decompression_bomb(tmp_path):
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png")


def test_035_kinds_of_images(tmp_path):
    kinds = {"I;16": 1, "CMYK": 3, "RGBA": 3, "P": 3, "1": 1}
    for kind, channels in kinds.items():
        path = tmp_path / f"{channels}.{'tif' if kind in ('CMYK', 'I;16') else 'png'}"
        Image.new(kind, (6, 4)).save(path)
        assert read_image(path).shape[1:] == (4, 6), kind


def test_036_a_mask_with_a_palette(tmp_path):
    mask = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    mask.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", 3).tolist() == [[0, 1], [2, 1]]


def test_037_a_mask_with_unexpected_values(tmp_path):
    images, masks = folders(tmp_path)
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(masks / "1.png")
    with pytest.raises(ValueError, match=r"1\.png"):
        train, _ = create_dataloaders(images, masks, n_classes=3, val=0.25)
        list(train)


def test_038_a_label_that_the_model_does_not_have(tmp_path):
    batch = [(torch.zeros(2, 1, 8, 8), torch.full((2, 8, 8), 7))]
    with pytest.raises(ValueError, match="values 7"):
        trainer_of(tmp_path, batch, batch, Net(3)).train(1)


def test_039_a_mask_of_ignored_pixels_only(tmp_path):
    masks = torch.zeros(4, 8, 8, dtype=torch.long)
    masks[:2] = 255
    data = DataLoader(TensorDataset(torch.rand(4, 1, 8, 8), masks), batch_size=2)
    trainer = trainer_of(tmp_path, data, data, Net(3), criterion=nn.CrossEntropyLoss(ignore_index=255))
    row = trainer.train(1).rows[0]
    assert math.isfinite(row["train"]["loss"]) and all(w.isfinite().all() for w in weights(trainer))


def test_040_pixels_that_are_not_numbers(tmp_path):
    with pytest.raises(ValueError, match="NaN or infinite"):
        trainer_of(tmp_path, [(torch.full((2, 1, 8, 8), math.nan), torch.ones(2, 1, 8, 8))]).train(1)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float64, torch.int64])
def test_041_types_of_images(tmp_path, kind):
    data = [(torch.ones(2, 1, 8, 8, dtype=kind), torch.ones(2, 1, 8, 8))]
    assert len(trainer_of(tmp_path, data, data).train(1)) == 1


def test_042_channels_that_the_model_does_not_take(tmp_path):
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 1 channels"):
        trainer_of(tmp_path, model=Net(n_channels=3)).train(1)


def test_043_sizes_that_cannot_be_halved(tmp_path):
    data = [(torch.rand(2, 1, 19, 23), torch.ones(2, 1, 19, 23))]
    assert len(trainer_of(tmp_path, data, data, UNet(1, 1, width=4, depth=2)).train(1)) == 1


def test_044_other_things_in_a_sample(tmp_path):
    def as_dict(index):
        return {"image": torch.zeros(1, 8, 8), "mask": torch.ones(1, 8, 8), "name": str(index)}

    assert len(trainer_of(tmp_path, loader_of(as_dict), loader_of(lambda i: (torch.zeros(1, 8, 8), torch.ones(1, 8, 8), i))).train(1)) == 1
    with pytest.raises(TypeError, match="NoneType"):
        trainer_of(tmp_path, DataLoader([None] * 4)).train(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_045_a_mistake_in_the_data_set_is_never_skipped(tmp_path, workers):
    heard = Heard()
    trainer = trainer_of(tmp_path, loader_of(broken(5, error=KeyError("label")), num_workers=workers), observers=[heard])
    with pytest.raises(KeyError, match="label"):
        trainer.train(1)
    assert any("cell_5.png (sample 5): KeyError" in text and "batch 3 of epoch 1" in text for text in heard.problems)
    assert "in act" in trainer.run.traceback and torch.load(trainer.checkpoint_dir / "last.pth")["batch"] == 2


def test_045_a_loader_without_indices_is_named_by_its_batch(tmp_path):
    class Loader:
        def __iter__(self):
            yield torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)
            raise OSError("no route to host")

    with pytest.raises(BadSample, match="OSError in batch 2 of epoch 1: no route to host"):
        trainer_of(tmp_path, Loader()).train(1)


def test_046_a_data_set_that_became_shorter(tmp_path):
    trainer = trainer_of(tmp_path, loader_of(broken(7), n=8), on_bad_sample="raise")
    with pytest.raises(BadSample):
        trainer.train(1)
    with pytest.raises(ValueError, match="ended after 2 batches, but 3 of epoch 1 were done before"):
        trainer_of(tmp_path, loader_of(n=4)).train(1, resume="last")


@pytest.mark.skipif("spawn" not in multiprocessing.get_all_start_methods(), reason="no spawn")
def test_047_a_data_set_that_cannot_be_sent(tmp_path):
    trainer = trainer_of(tmp_path, loader_of(lambda index: None, num_workers=1, multiprocessing_context="spawn"))
    with pytest.raises(ValueError, match="'spawn'.*num_workers=0"):
        trainer.train(1)
    assert trainer.global_step == 0 and not multiprocessing.active_children()


def test_048_files_that_vanish(tmp_path):
    """One is left out; all of them is a drive that went away, and the run can go on when it is back"""
    gone = []
    train = loader_of(lambda i: broken(*gone, error=FileNotFoundError(2, "gone"))(i), n=40, batch_size=4)
    trainer = trainer_of(tmp_path, train)
    trainer.observers.add(type("Away", (), {"on_batch_end": lambda self, t, loss: t.global_step == 5 and gone.extend(range(40))})())
    with pytest.raises(BadSample, match="None of the last 12 samples .*disk or network drive"):
        trainer.train(1)
    assert trainer.global_step == 5 and torch.load(trainer.checkpoint_dir / "last.pth")["batch"] == 5
    trainer = trainer_of(tmp_path, loader_of(n=40, batch_size=4))
    assert "bad_samples" not in trainer.train(1, resume="last").rows[0] and trainer.global_step == 10


def hang(index):
    if index == 5 and not os.environ.get("NO_HANG"):
        time.sleep(600)


def test_049_a_loader_that_hangs_is_told_and_can_be_stopped(tmp_path):
    heard = Heard()
    trainer = trainer_of(tmp_path, loader_of(hang, num_workers=2), observers=[heard])
    trainer.watchdog_seconds = 0.5
    run = trainer.start(1)
    until(lambda: heard.problems)
    assert "batch 3 of epoch 1 of the training data (cell_4.png, cell_5.png)" in heard.problems[0] and "2 worker processes" in heard.problems[0]
    began = time.monotonic()
    assert run.stop().wait(30) and run.wait(30) and time.monotonic() - began < 20
    assert run.state == "finished" and trainer.global_step == 2 and torch.load(trainer.checkpoint_dir / "last.pth")["batch"] == 2
    until(lambda: not multiprocessing.active_children())
    assert not [thread for thread in threading.enumerate() if thread.name == "unet-watchdog"] and len(heard.problems) == 1


def test_049_a_slow_sample_without_workers_is_told_twice(tmp_path):
    heard, gate = Heard(), threading.Event()
    trainer = trainer_of(tmp_path, loader_of(lambda i: gate.wait(60) and None if i == 5 else None), observers=[heard])
    trainer.watchdog_seconds = 0.2
    run = trainer.start(1)
    until(lambda: heard.problems)
    gate.set()
    assert run.wait(30) and run.state == "finished"
    assert "num_workers=0" in heard.problems[0] and "is over" in heard.problems[1] and len(heard.problems) == 2


def dies(lives, number):
    def act(index):
        if index == 5 and lives > 0:
            lives.sub_(1)
            os.kill(os.getpid(), number)

    return act


@pytest.mark.parametrize("background", [False, True])
def test_070_a_killed_worker_changes_nothing(tmp_path, background):
    heard, results = Heard(), []
    for deaths in (0, 2):
        lives = torch.tensor(deaths).share_memory_()
        trainer = trainer_of(tmp_path / str(deaths), loader_of(dies(lives, signal.SIGKILL), num_workers=2, shuffle=True), observers=[heard])
        run = trainer.start(2) if background else trainer.train(2) and trainer.run
        assert run.wait(60) and run.state == "finished", run.traceback
        results.append((trainer.history["train_losses"], [w.numpy().tobytes() for w in weights(trainer)]))
    assert results[0] == results[1] and len(heard.problems) == 2 and all("SIGKILL" in text for text in heard.problems)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_071_workers_that_die_each_time(tmp_path, number):
    """SIGBUS is what a worker gets when /dev/shm is full"""
    lives = torch.tensor(99).share_memory_()
    trainer = trainer_of(tmp_path, loader_of(dies(lives, number), num_workers=1))
    with pytest.raises(RuntimeError, match=rf"died 3 times in a row \(killed by {number.name}\).*batch [23] of epoch 1.*/dev/shm has .* MB.*fewer workers"):
        trainer.train(1)
    assert torch.load(trainer.checkpoint_dir / "last.pth")["batch"] == trainer.global_step in (1, 2) and not multiprocessing.active_children()


class Doomed:
    """A process that starts workers again and again; the worker of a number kills it when it has come to a place, and goes on when it is gone"""

    def __init__(self, number=0, place=""):
        fork = multiprocessing.get_context("fork")
        self.number, self.place, self.forks, self.up = number, place, 0, fork.Event()
        self.process = fork.Process(target=self.run)
        self.process.start()

    def run(self):
        os.setpgid(0, 0)
        self.pid = os.getpid()
        os.register_at_fork(before=self.count, after_in_child=lambda: self.come_to("first line"))
        worker.MP_STATUS_CHECK_INTERVAL = 0.2  # Seconds after which an idle worker looks for its parent; PyTorch has 5
        loader = DataLoader(TensorDataset(torch.zeros(64, 1)), num_workers=4, multiprocessing_context="fork", worker_init_fn=lambda _: self.come_to("init"))
        feed = Feed(loader, 0)
        self.up.set()
        while True:
            for _ in feed.batches(0):
                pass

    def count(self):
        self.forks += 1

    def come_to(self, place):
        if (self.forks, self.place) == (self.number, place):
            os.kill(self.pid, signal.SIGKILL)
            while os.getppid() == self.pid:
                time.sleep(0.002)


def members(group):
    """The processes of a group that still do something"""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, its_group = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state not in "ZX":
            found.append(int(pid))
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_094_a_parent_that_is_killed_while_workers_start():
    """When one of them has not come to its first line, when it has looked for its parent but PyTorch has not yet, and at any moment"""
    doomed = [Doomed(number, place) for number in (1, 2, 4) for place in ("first line", "init")]
    for attempt in range(int(os.environ.get("KILLS", "3"))):
        doomed.append(Doomed())
        assert doomed[-1].up.wait(20)
        time.sleep(0.02 + 0.04 * attempt)
        doomed[-1].process.kill()
    for one in doomed:
        one.process.join(20)
        assert one.process.exitcode == -signal.SIGKILL
    assert os.getpid() in members(os.getpgrp())
    until(lambda: not any(members(one.process.pid) for one in doomed), 20)
    for one in doomed:
        one.process.close()


def never_up(worker_id):
    time.sleep(600)


def test_095_workers_that_never_come_up(tmp_path):
    """A fork of a process with threads can inherit a lock that nobody will open: the worker stands still before its first line"""
    heard = Heard()
    trainer = trainer_of(tmp_path, loader_of(num_workers=1, worker_init_fn=never_up), observers=[heard])
    trainer.watchdog_seconds = 0.5
    run = trainer.start(1)
    until(lambda: heard.problems)
    assert "batch 1 of epoch 1" in heard.problems[0]
    assert run.stop().wait(30) and run.wait(30) and run.state == "finished"
    until(lambda: not multiprocessing.active_children())
