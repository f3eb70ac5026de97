"""Faults of the disk: rows 78 to 88 of the fault table, and 23: full, forbidden, gone, shared with another run."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch
from ckpttools import Net, Told, contents, equal, full_disk, message_of, trainer_in

from unet_nbtrain import checkpoint, disk
from unet_nbtrain.checkpoint import CheckpointFolder, load_file, save_file

pytestmark = pytest.mark.usefixtures("one_thread")


def state(epoch):
    return {"model_state_dict": Net().state_dict(), "epoch": epoch}


def test_023_two_runs_in_one_folder(tmp_path):
    """The second trainer is refused with a sentence, in this process and from another one; a dead one's lock stops nobody"""
    inside = threading.Event(), threading.Event()

    class Hold:
        def on_batch_end(self, trainer, loss):
            inside[0].set()
            inside[1].wait(20)

    first = trainer_in(tmp_path, observers=[Hold()])
    run = first.start(1)
    assert inside[0].wait(20)
    try:
        message = message_of(trainer_in(tmp_path).train, 1, kind=RuntimeError)
        assert str(tmp_path) in message and str(os.getpid()) in message and "run_dir" in message
        code = f"from unet_nbtrain.disk import FolderLock; FolderLock({str(tmp_path / 'checkpoints')!r}).take()"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"in use by process {os.getpid()}" in other.stderr
    finally:
        inside[1].set()
        run.wait(20)
    assert run.state == "finished" and not (tmp_path / "checkpoints" / "run.lock").exists()
    (tmp_path / "checkpoints" / "run.lock").write_text(json.dumps({"pid": 2**22 + 1, "host": "elsewhere"}))
    assert len(trainer_in(tmp_path).train(1)) == 1


def test_078_full_at_every_byte(tmp_path, monkeypatch):
    """At fifty places of the file: the old files whole, no temporary one, and a message with path, needed and free bytes"""
    folder = CheckpointFolder(tmp_path)
    for epoch in (1, 2):
        folder.save(state(epoch))
    before, size = contents(tmp_path), folder.last.stat().st_size
    for room in [int(size * i / 50) for i in range(50)]:
        with monkeypatch.context() as patch:
            full_disk(patch, room)
            message = message_of(folder.save, state(3), also=[folder.best])
        assert contents(tmp_path) == before
        assert str(folder.last) in message and "the disk is full" in message and "needed:" in message and "free there:" in message
    assert load_file(folder.last)["epoch"] == 2
    folder.save(state(3))
    assert load_file(folder.last)["epoch"] == 3


def test_078_room_is_taken_before_a_byte_is_written(tmp_path, monkeypatch):
    called = []

    def refuse(handle, offset, length):
        called.append(length)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(checkpoint, "_write", lambda state, file: called.append("write"))
    message = message_of(save_file, state(1), tmp_path / "a.pth")
    assert len(called) == 1 and f"needed: {called[0]:,} bytes" in message and list(tmp_path.iterdir()) == []


def test_078_a_real_full_disk(tmp_path):
    """A file system of its own, of one megabyte, where this machine lets us make one"""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        save_file(state(1), place / "last.pth")
        used = shutil.disk_usage(place).used
        message = message_of(save_file, {"model_state_dict": {"w": torch.zeros(500_000)}}, place / "last.pth")
        assert "the disk is full" in message and "needed: 2,0" in message
        assert shutil.disk_usage(place).used == used and load_file(place / "last.pth")["epoch"] == 1
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_078_training_goes_on_and_the_best_file_is_caught_up(tmp_path, monkeypatch):
    """The disk is full when the best epoch is written; later it is not, and the best file is that of the best epoch"""
    told, kept = Told(), {}

    class Fill:
        def on_epoch_start(self, trainer):
            if trainer.current_epoch == 1:
                trainer._finish_writing()
                full_disk(monkeypatch, 100)
            if trainer.current_epoch == 2:
                trainer._finish_writing()
                monkeypatch.undo()

        def on_epoch_end(self, trainer, row):
            if trainer.current_epoch == 2:
                kept.update({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})

    trainer = trainer_in(tmp_path, observers=[Fill(), told])
    trainer.early_stopping.value_of = lambda row: {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0}[row["epoch"]]
    history = trainer.train(4)
    assert len(history) == 4 and len(told) == 1 and "the disk is full" in told[0]
    assert [event["kind"] for event in history.events].count("problem") == 1
    best = load_file(tmp_path / "checkpoints" / "best_model.pth")
    assert best["early_stopping"]["best_epoch"] == 2 and equal(dict(best["model_state_dict"]), kept)
    resumed = trainer_in(tmp_path)
    resumed.load_checkpoint(tmp_path / "checkpoints" / "last.pth")
    assert equal(dict(resumed.best_weights.state_dict()), kept)


@pytest.mark.parametrize(
    "code, words",
    [
        (errno.EDQUOT, "your quota on this disk is used up"),
        (errno.EIO, "the disk reports an error"),
        (errno.EROFS, "the disk can only be read"),
        (errno.EACCES, "you are not allowed to write there"),
    ],
    ids=["EDQUOT", "EIO", "EROFS", "EACCES"],
)
def test_079_other_refusals(tmp_path, monkeypatch, code, words):
    save_file(state(1), tmp_path / "a.pth")
    with monkeypatch.context() as patch:
        full_disk(patch, 3000, code)
        message = message_of(save_file, state(2), tmp_path / "a.pth")
    assert words in message and str(tmp_path / "a.pth") in message
    assert load_file(tmp_path / "a.pth")["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_079_a_name_that_is_too_long(tmp_path):
    message = message_of(save_file, state(1), tmp_path / ("x" * 300 + ".pth"))
    assert "the name is longer than this disk allows" in message and list(tmp_path.iterdir()) == []


def test_080_the_folder_is_deleted_during_the_training(tmp_path):
    class Delete:
        def on_epoch_end(self, trainer, row):
            if trainer.current_epoch == 1:
                trainer._finish_writing()
                shutil.rmtree(tmp_path / "checkpoints")

    trainer_in(tmp_path, observers=[Delete()]).train(2)
    assert load_file(tmp_path / "checkpoints" / "last.pth")["epoch"] == 2


def test_081_the_temporary_folder_of_the_system_is_not_used(tmp_path, monkeypatch):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    seen, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append((a, b)), real(a, b))[1])
    save_file(state(1), tmp_path / "run" / "a.pth")
    assert [os.path.dirname(a) for a, b in seen] == [str(tmp_path / "run")]


def test_082_no_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path)
    for epoch in (1, 2):
        folder.save(state(epoch), also=[folder.best])
    found = {name: load_file(tmp_path / name)["epoch"] for name in contents(tmp_path)}
    assert found == {"best_model.pth": 2, "last.prev.pth": 1, "last.pth": 2}


def test_083_a_target_that_another_process_has_open(tmp_path, monkeypatch):
    """Simulated: the rename is refused twice, as on Windows, and works then; or it is refused for good"""
    save_file(state(1), tmp_path / "a.pth")
    refusals, real = [2], os.replace

    def replace(source, target):
        refusals[0] -= 1
        if refusals[0] >= 0:
            raise PermissionError(errno.EACCES, "in use")
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(disk, "_TRIES", 4)
    save_file(state(2), tmp_path / "a.pth")
    assert load_file(tmp_path / "a.pth")["epoch"] == 2
    refusals[0] = 99
    assert "not allowed" in message_of(save_file, state(3), tmp_path / "a.pth")
    assert load_file(tmp_path / "a.pth")["epoch"] == 2 and len(contents(tmp_path)) == 1


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_084_modes_respect_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_file(state(1), tmp_path / "a.pth", also=[tmp_path / "b.pth"])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def test_085_old_temporary_files_are_swept(tmp_path):
    """Those of dead processes, and those with our own number from before a restart; nothing that is not ours"""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    gone = [folder / f"last.pth.tmp-{child.pid}", folder / f"last.pth.tmp-{os.getpid()}", tmp_path / f".history.json.1.tmp-{child.pid}"]
    stays = [folder / "notes.tmp", folder / "model.tmp-old", folder / "last.pth.tmp-1"]
    for path in gone + stays:
        path.write_bytes(b"half")
    trainer_in(tmp_path).train(1)
    assert not any(path.exists() for path in gone) and all(path.exists() for path in stays)


def test_086_old_files_go_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    """With the disk full in epoch 3 the regular files of before stay; the one that a run came from stays too"""
    class Fill:
        def on_epoch_start(self, trainer):
            trainer._finish_writing()
            if trainer.current_epoch == 2:
                full_disk(monkeypatch, 100)

    trainer_in(tmp_path, observers=[Fill()], save_every_n_epochs=1, keep_epochs=2).train(4)
    monkeypatch.undo()
    names = set(contents(tmp_path / "checkpoints"))
    assert {"epoch_0001.pth", "epoch_0002.pth", "best_model.pth"} <= names and "epoch_0004.pth" not in names
    again = trainer_in(tmp_path, save_every_n_epochs=1, keep_epochs=1)
    again.train(5, resume=tmp_path / "checkpoints" / "epoch_0001.pth")
    assert {"epoch_0001.pth", "epoch_0005.pth"} == {name for name in contents(tmp_path / "checkpoints") if name.startswith("epoch")}


def test_087_a_reader_sees_whole_files_only(tmp_path):
    """Another thread loads the newest file again and again while it is replaced"""
    folder, done, seen = CheckpointFolder(tmp_path), threading.Event(), []
    folder.save(state(0))

    def read():
        while not done.is_set():
            seen.append(torch.load(folder.last)["epoch"])

    reader = threading.Thread(target=read)
    reader.start()
    for epoch in range(1, 40):
        folder.save(state(epoch))
    done.set()
    reader.join()
    assert seen == sorted(seen) and all(type(epoch) is int for epoch in seen) and seen


def test_088_a_clock_that_goes_backwards(tmp_path):
    """The newest file is known by its name, not by its time"""
    folder = CheckpointFolder(tmp_path)
    for epoch in (1, 2):
        folder.save(state(epoch), also=[folder.numbered("epoch", epoch)])
    for path, age in ((folder.last, 9000), (folder.previous, 0)):
        os.utime(path, (time.time() - age,) * 2)
    assert folder.load_newest()[0]["epoch"] == 2
    for path in (folder.last, folder.previous):
        path.unlink()  # The names of one epoch are one file
        path.write_bytes(b"")
    os.utime(folder.numbered("epoch", 2), (0, 0))
    assert folder.load_newest()[1] == folder.numbered("epoch", 2)
