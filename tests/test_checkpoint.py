"""Checkpoints under attack: flipped bits, cuts, mutations, hostile pickles, and a saver with one part taken out."""

import io
import os
import pickle
import random
import struct
import threading
import zipfile
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from ckpttools import Net, contents, equal, message_of, trainer_in

from unet_nbtrain import checkpoint, contents as contents_room, disk, files as files_room, history as history_room
from unet_nbtrain.checkpoint import CheckpointError, CheckpointFolder, load_file, save_file
from unet_nbtrain.files import QuickPickle
from unet_nbtrain.loggers import HistoryFiles
from unet_nbtrain.writer import HostCopy

pytestmark = pytest.mark.usefixtures("one_thread")
FULL = os.environ.get("FULL") == "1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training of two epochs: `last.pth` and the generation before it"""
    folder = tmp_path_factory.mktemp("run")
    trainer_in(folder).train(2)
    return folder / "checkpoints"


@pytest.fixture
def copy(run, tmp_path):
    """A copy of that folder, to be broken"""
    for name, data in contents(run).items():
        (tmp_path / name).write_bytes(data)
    return CheckpointFolder(tmp_path)


# Damage by accident


def test_every_flipped_bit_is_found_and_the_generation_before_is_taken(copy):
    raw, before = copy.last.read_bytes(), torch.load(copy.previous)
    chance = random.Random(0)
    for count in range(1000 if FULL else 300):
        place, bad = chance.randrange(8 * len(raw)), bytearray(raw)
        bad[place // 8] ^= 1 << place % 8
        copy.last.write_bytes(bad)
        message = message_of(load_file, copy.last)
        assert str(copy.last) in message and ("damaged" in message or "torn" in message)
        if count % 50 == 0:
            state, path = copy.load_newest()
            assert path == copy.previous and equal(state, before)


def test_every_cut_is_found_and_the_generation_before_is_taken(copy):
    raw, before = copy.last.read_bytes(), torch.load(copy.previous)
    chance = random.Random(1)
    cuts = [0, 1, len(raw) - 1, len(raw) - contents_room._LENGTH, *(chance.randrange(len(raw)) for _ in range(196 if FULL else 56))]
    for count, cut in enumerate(cuts):
        copy.last.write_bytes(raw[:cut])
        assert "torn" in message_of(load_file, copy.last)
        if count % 20 == 0:
            state, path = copy.load_newest()
            assert path == copy.previous and equal(state, before)


def test_blocks_of_zeros_and_exchanged_blocks_are_found(copy):
    raw, chance = copy.last.read_bytes(), random.Random(2)
    for _ in range(200 if FULL else 40):
        bad, (a, b) = bytearray(raw), (512 * chance.randrange(len(raw) // 512) for _ in range(2))
        bad[a : a + 512] = bytes(512) if chance.random() < 0.5 else raw[b : b + 512]
        if bytes(bad) != raw:
            copy.last.write_bytes(bad)
            message_of(load_file, copy.last)


# Damage on purpose, with the checksums put right


def rewritten(path, change):
    """The archive again, with one part changed, every checksum right, and no seal"""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    change(parts)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return out.getvalue()


def changed_pickle(chance):
    def change(parts):
        name = next(name for name in parts if name.endswith("data.pkl"))
        data = bytearray(parts[name])
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        parts[name] = bytes(data)

    return change


def changed_parts(chance):
    def change(parts):
        name = chance.choice(list(parts))
        kind = chance.randrange(4)
        if kind == 0:
            del parts[name]
        elif kind == 1:
            parts[name] = parts[name][: len(parts[name]) // 2]
        elif kind == 2:
            parts[name] = parts[name] + b"\0" * 1000
        else:
            other = chance.choice(list(parts))
            parts[name], parts[other] = parts[other], parts[name]

    return change


def changed_bytes(raw, chance):
    """The file with its directory, its headers or any byte overwritten"""
    bad = bytearray(raw)
    start = raw.rfind(b"PK\x01\x02") if chance.random() < 0.5 else 0
    for _ in range(chance.choice([1, 4, 16])):
        bad[chance.randrange(start, len(bad))] = chance.randrange(256)
    return bytes(bad)


def test_mutated_files_are_refused_or_named_and_never_half_taken(copy, tmp_path, caplog):
    """Whatever is read in spite of a change has no seal, and a warning says so; a trainer takes over all of it or nothing"""
    raw, chance, trainer = copy.last.read_bytes(), random.Random(3), trainer_in(tmp_path / "other")
    start = deepcopy(trainer.state_dict())
    for count in range(500 if FULL else 200):
        kind = count % 3
        data = changed_bytes(raw, chance) if kind == 0 else rewritten(copy.last, (changed_pickle if kind == 1 else changed_parts)(chance))
        path = tmp_path / f"bad{count}.pth"
        path.write_bytes(data)
        caplog.clear()
        try:
            trainer.load_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            assert equal(trainer.state_dict()["model_state_dict"], start["model_state_dict"]) and trainer.global_step == start["global_step"]
        else:
            assert data == raw or "has no seal" in caplog.text, path
            trainer = trainer_in(tmp_path / "other")
        path.unlink()


WRONG = [None, -1, "text", [1], {"a": 1}, 1.5, True, float("nan"), torch.ones(2), 10**30, ()]


def test_entries_of_a_wrong_kind_are_refused_and_nothing_changes(copy, tmp_path):
    state = torch.load(copy.last)
    refused = 0
    for key in state.keys() - {"parts"}:
        for value in WRONG if FULL else WRONG[:6]:
            if type(value) is type(state[key]) or value is None:
                continue
            trainer = trainer_in(tmp_path / "other")
            torch.save(state | {key: value}, tmp_path / "bad.pth")
            try:
                trainer.load_checkpoint(tmp_path / "bad.pth")
            except CheckpointError:
                refused += 1
                assert trainer.global_step == 0 and not trainer.optimizer.state and len(trainer.history) == 0
    assert refused > 100


@pytest.mark.parametrize("key", ["epoch", "global_step", "batch", "seconds", "meter", "history", "early_stopping", "settings", "optimizer_state_dict"])
def test_a_missing_entry_is_named(copy, tmp_path, key):
    state = torch.load(copy.last)
    del state[key]
    torch.save(state, tmp_path / "bad.pth")
    if key == "history":
        assert load_file(tmp_path / "bad.pth")["epoch"] == 2
    else:
        assert f"lacks {key!r}" in message_of(load_file, tmp_path / "bad.pth")


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Evaluates(Runs):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


class Builds(Runs):
    def __reduce__(self):
        return pickle.loads, (pickle.dumps(Runs(self.path)),)


@pytest.mark.parametrize("hostile", [Runs, Evaluates, Builds])
@pytest.mark.parametrize("place", ["weights", "entry", "key", "bare", "legacy"])
def test_hostile_pickles_run_nothing(tmp_path, hostile, place):
    evil, path = hostile(tmp_path / "ran"), tmp_path / "evil.pth"
    states = {"weights": {"model_state_dict": {"w": evil}}, "entry": {"model_state_dict": {}, "x": [evil]}, "key": {"model_state_dict": {}, (1, evil): 1}}
    if place == "bare":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(states.get(place, states["entry"]), path, _use_new_zipfile_serialization=place != "legacy")
    message = message_of(load_file, path)
    assert str(path) in message and not (tmp_path / "ran").exists()
    assert "could run code" in message or "torn or not" in message


# The saver with one part taken out: each check below fails then


def recorded(monkeypatch, folder):
    """The calls of one save, in their order"""
    calls = []
    for name in ("fsync", "link", "replace"):
        real = getattr(disk.os, name)
        monkeypatch.setattr(disk.os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda state, file: (calls.append("write"), write(state, file))[1])
    CheckpointFolder(folder).save({"model_state_dict": {}, "epoch": 2})
    monkeypatch.undo()
    return calls


ORDER = ["write", "fsync", "link", "replace", "replace", "fsync"]


def test_the_order_of_a_save(monkeypatch, tmp_path):
    """Bytes on the disk before any name, the generation before kept before the name changes, the folder at last"""
    CheckpointFolder(tmp_path).save({"model_state_dict": {}, "epoch": 1})
    assert recorded(monkeypatch, tmp_path) == ORDER


def without_fsync(monkeypatch):
    def write_whole(path, write, needed=0, previous=None, also=()):
        step = disk._step(path)
        with disk.io_open(step, "xb") as file:
            write(file)
        if previous and path.exists():
            disk._link(path, previous)
        disk.os.replace(step, path)

    monkeypatch.setattr(disk, "io_open", open, raising=False)
    monkeypatch.setattr(checkpoint, "write_whole", write_whole)


def without_rename(monkeypatch):
    def write_whole(path, write, needed=0, previous=None, also=()):
        with open(path, "wb") as file:
            write(file)
        return path

    monkeypatch.setattr(checkpoint, "write_whole", write_whole)


def test_mutant_no_fsync(monkeypatch, tmp_path):
    CheckpointFolder(tmp_path).save({"model_state_dict": {}, "epoch": 1})
    without_fsync(monkeypatch)
    calls = recorded(monkeypatch, tmp_path)
    assert calls != ORDER and "fsync" not in calls


def old_survives_a_failed_write(monkeypatch, path):
    save_file({"model_state_dict": {}, "epoch": 1}, path)
    real = checkpoint._write

    def breaks(state, file):
        real(state, file)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", breaks)
        message_of(save_file, {"model_state_dict": {}, "epoch": 2}, path)
    return load_file(path)["epoch"] == 1


def test_mutant_no_rename(monkeypatch, tmp_path):
    assert old_survives_a_failed_write(monkeypatch, tmp_path / "a.pth")
    without_rename(monkeypatch)
    assert not old_survives_a_failed_write(monkeypatch, tmp_path / "b.pth")


def flip_is_found(path):
    save_file({"model_state_dict": {"w": torch.arange(100.0)}}, path)
    raw = bytearray(path.read_bytes())
    raw[raw.find(torch.arange(100.0).numpy().tobytes()) + 50] ^= 4
    path.write_bytes(raw)
    try:
        load_file(path)
    except CheckpointError:
        return True
    return False


def test_mutant_no_checksum(monkeypatch, tmp_path):
    assert flip_is_found(tmp_path / "a.pth")
    monkeypatch.setattr(checkpoint, "check_archive", lambda path: True)
    assert not flip_is_found(tmp_path / "b.pth")


def resumed_equals_uninterrupted(folder, forget=None):
    """Stop after five steps, resume in another trainer; the weights and the history as if nothing had happened"""
    whole = trainer_in(folder / "whole", early_stopping_patience=9)
    whole.train(3)

    class Stop:
        def on_batch_end(self, trainer, loss):
            if trainer.global_step == 5:
                trainer.run.stop()

    first = trainer_in(folder / "cut", observers=[Stop()], early_stopping_patience=9)
    first.train(3)
    path = folder / "cut" / "checkpoints" / "last.pth"
    if forget:
        state = torch.load(path)
        save_file({key: value for key, value in state.items() if key != forget}, path)
    second = trainer_in(folder / "cut", early_stopping_patience=9)
    try:
        second.train(3, resume=path)
    except CheckpointError:
        return False
    first_rows, second_rows = ([{k: v for k, v in row.items() if k in ("epoch", "train", "val", "lr", "grad_norm", "best")} for row in t.history.rows] for t in (whole, second))
    last = [torch.load(folder / name / "checkpoints" / "last.pth") for name in ("whole", "cut")]
    keys = ("model_state_dict", "optimizer_state_dict", "early_stopping", "global_step", "epoch")
    return equal(first_rows, second_rows) and all(equal(last[0][key], last[1][key]) for key in keys)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    assert resumed_equals_uninterrupted(tmp_path)


@pytest.mark.parametrize("field", ["optimizer_state_dict", "global_step", "epoch", "batch", "meter", "norms", "early_stopping", "history", "settings", "train_metrics"])
def test_mutant_one_field_forgotten(tmp_path, field):
    """Such a file is refused by the saver itself, or, where it could be read, the comparison notices"""
    try:
        survived = resumed_equals_uninterrupted(tmp_path, forget=field)
    except CheckpointError as error:
        survived = repr(field) not in str(error)
    assert not survived


# Beside the training


def test_files_beside_the_training_are_those_of_the_training_thread(tmp_path):
    """Every file of every epoch, written by the thread, holds the state of its own epoch and not of a later one"""
    seen = []

    class Look:
        def on_epoch_end(self, trainer, row):
            seen.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})

    trainer = trainer_in(tmp_path, observers=[Look()], save_every_n_epochs=1)
    trainer.train(5)
    files = [load_file(tmp_path / "checkpoints" / f"epoch_{number:04d}.pth") for number in range(1, 6)]
    assert [state["epoch"] for state in files] == [1, 2, 3, 4, 5] and [len(state["history"]["rows"]) for state in files] == [1, 2, 3, 4, 5]
    assert all(equal(dict(state["model_state_dict"]), weights) for state, weights in zip(files, seen, strict=True))
    assert not any(thread.name == "unet-writer" for thread in threading.enumerate())


def steps_of_an_epoch(folder, rows, monkeypatch):
    """How often the walks over a state take a step in the third epoch after so many, with everything written"""
    steps, seen = Counter(), []

    def count(place, name):
        original = getattr(place, name)

        def counted(*args, **options):
            steps[name, place.__name__] += 1
            return original(*args, **options)

        monkeypatch.setattr(place, name, counted)

    def walk(*args):
        for found in original_walk(*args):
            steps["walk"] += 1
            yield found

    class Look:
        def on_epoch_end(self, trainer, row):
            trainer._writer.flush()
            seen.append(Counter(steps))

    original_walk = contents_room.walk
    files = HistoryFiles(folder)
    files.pace.longest = 0.0  # As with long epochs: the file is written after each
    trainer = trainer_in(folder, observers=[files, Look()])
    trainer.history.load_state_dict({"rows": [{"epoch": i, "val": {"loss": 1.0, "of": [1, 2]}} for i in range(1, rows + 1)], "events": []})
    trainer.current_epoch = rows
    with monkeypatch.context() as monkeypatch:
        for place, name in ((checkpoint, "to_plain"), (files_room, "to_plain"), (HostCopy, "_tensor"), (history_room, "to_json")):
            count(place, name)
        monkeypatch.setattr(checkpoint, "walk", walk)
        monkeypatch.setattr(contents_room, "walk", walk)
        trainer.train(3)
    assert trainer.history.rows[-1]["epoch"] == rows + 3
    return trainer, seen[2] - seen[1]


def test_the_end_of_an_epoch_does_not_walk_over_the_rows_of_earlier_ones(tmp_path, monkeypatch):
    """Copying, checking and writing take as many steps after 400 epochs as after 4; the file has plain lists, and so has the state for users"""
    (few, wanted), (many, found) = (steps_of_an_epoch(tmp_path / str(rows), rows, monkeypatch) for rows in (4, 400))
    assert found == wanted and len(found) == 5 and min(found.values()) > 0
    for trainer, state in ((o, s) for o in (few, many) for s in (load_file(o.checkpoint_dir / "last.pth"), o.state_dict())):
        record = state["history"]
        assert type(record["rows"]) is list and type(record["events"]) is list and repr(record["rows"]) == repr(trainer.history.rows)
        assert record["rows"][0] is not trainer.history.rows[0]
    torch.save(many.state_dict()["history"], tmp_path / "record.pth")
    assert repr(torch.load(tmp_path / "record.pth", weights_only=True)["rows"]) == repr(many.history.rows)


def test_the_quick_pickler_writes_the_same_bytes():
    buffers = [io.BytesIO(), io.BytesIO()]
    weight = torch.ones(3)
    state = {"w": weight, "same": weight[1:], "rows": [{"epoch": 1, "val": {"loss": 0.5}, "best": True}], "shape": weight.shape, "kind": weight.dtype}
    for buffer, options in zip(buffers, ({}, {"pickle_module": QuickPickle})):
        torch.save(state, buffer, **options)
    assert buffers[0].getvalue() == buffers[1].getvalue()


def test_fine_tuning_takes_what_fits_and_begins_anew(run, tmp_path):
    trainer = trainer_in(tmp_path, Net(n_classes=3), criterion=torch.nn.CrossEntropyLoss())
    trainer.train_loader = trainer.val_loader = [(images, masks[:, 0].long()) for images, masks in trainer.train_loader]
    assert "layers.3.weight" in message_of(trainer.load_checkpoint, run / "last.pth")
    left = trainer.load_checkpoint(run / "last.pth", strict=False)
    assert left == ["layers.3.weight", "layers.3.bias"] and trainer.current_epoch == 0 and not trainer.optimizer.state
    assert torch.equal(trainer.model.layers[0].weight, torch.load(run / "last.pth")["model_state_dict"]["layers.0.weight"])
    assert len(trainer.train(1)) == 1


def test_a_bomb_and_a_tensor_that_claims_too_much(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    assert "declares 50,000,000 bytes" in message_of(load_file, tmp_path / "bomb.pth")
    torch.save({"model_state_dict": {"w": torch.ones(4)}}, tmp_path / "plain.pth")

    def grow(parts):
        name = next(name for name in parts if name.endswith("data.pkl"))
        assert parts[name].count(b"K\x04\x85") == 1
        parts[name] = parts[name].replace(b"K\x04\x85", b"J" + struct.pack("<i", 10**8) + b"\x85")

    (tmp_path / "grown.pth").write_bytes(rewritten(tmp_path / "plain.pth", grow))
    message = message_of(load_file, tmp_path / "grown.pth")
    assert "claims 100,000,000 elements" in message or "not resizable" in message  # Newer versions of PyTorch refuse it themselves


def test_a_state_that_somebody_saves_with_torch_itself_loads_safely(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.train(1)
    torch.save(trainer.state_dict(), tmp_path / "own.pth")
    assert equal(torch.load(tmp_path / "own.pth", weights_only=True)["model_state_dict"], dict(trainer.model.state_dict()))


@contextmanager
def _costs(pace, seconds):
    "As if it took so long"
    yield
    pace.spent(seconds)


def test_the_file_with_which_a_run_begins_counts_for_the_pace_of_the_next(tmp_path, monkeypatch):
    "On a clock that stands still nothing is due after it: the best of two short epochs waits, and is on the disk at the end"
    monkeypatch.setattr("unet_nbtrain.pace.time", SimpleNamespace(monotonic=lambda: 1000.0))
    monkeypatch.setattr("unet_nbtrain.pace.Pace.measured", lambda pace: _costs(pace, 0.01))
    there = []

    class Look:
        def on_epoch_end(self, trainer, row):
            there.append((trainer._writer.pace.rest, trainer._writer.is_busy, (tmp_path / "checkpoints" / "best_model.pth").exists()))

    trainer_in(tmp_path, observers=[Look()]).train(2)
    assert there == [(4.0, True, False)] * 2 and (tmp_path / "checkpoints" / "best_model.pth").exists()
