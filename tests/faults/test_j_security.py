"""Faults of security, as far as they concern files: rows 116 to 124 of the fault table."""

import json
import os
import pickle
import socket
import zipfile

import pytest
import torch
from ckpttools import Net, message_of, trainer_in

from unet_nbtrain import History, UNetPredictor
from unet_nbtrain.checkpoint import CheckpointFolder, load_file, save_file

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_HERE = {120: "markup in names is shown by the panel, the tables and the reports, and is tested with them"}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("door", ["load_checkpoint", "resume", "folder", "predictor", "fine-tune"])
def test_116_a_hostile_pickle_runs_nothing(tmp_path, door):
    """Refused through every door, and never tried again with less care"""
    path = tmp_path / "checkpoints" / "last.pth"
    path.parent.mkdir()
    torch.save({"model_state_dict": Net().state_dict(), "epoch": 1, "history": Evil(tmp_path / "ran")}, path)
    trainer = trainer_in(tmp_path)
    calls = {
        "load_checkpoint": lambda: trainer.load_checkpoint(path),
        "fine-tune": lambda: trainer.load_checkpoint(path, strict=False),
        "resume": lambda: trainer.train(1, resume="last"),
        "folder": lambda: trainer.train(1, resume=tmp_path),
        "predictor": lambda: UNetPredictor(path),
    }
    assert "could run code" in message_of(calls[door])
    assert not (tmp_path / "ran").exists() and trainer.global_step == 0


def test_117_sizes_that_cannot_be(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(20_000_000))
    assert "could fill the memory" in message_of(load_file, tmp_path / "bomb.pth")
    torch.save({"model_state_dict": {"w": torch.ones(1).expand(10**6, 10**6)}}, tmp_path / "stride.pth")
    assert "claims 1,000,000,000,000 elements" in message_of(load_file, tmp_path / "stride.pth")
    save_file({"model_state_dict": {"w": torch.ones(9)}}, tmp_path / "a.pth")
    raw = bytearray((tmp_path / "a.pth").read_bytes())
    place = raw.rfind(b"PK\x01\x02")
    raw[place + 24 : place + 28] = (2**31).to_bytes(4, "little")
    (tmp_path / "b.pth").write_bytes(raw)
    assert str(tmp_path / "b.pth") in message_of(load_file, tmp_path / "b.pth")


def test_117_nested_without_end(tmp_path):
    data = b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b"."
    torch.save({"model_state_dict": {}, "x": 1}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "deep.pth", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)
    assert str(tmp_path / "deep.pth") in message_of(load_file, tmp_path / "deep.pth")
    assert "nested too deeply" in message_of(save_file, {"model_state_dict": {}, "x": nested(200)}, tmp_path / "mine.pth")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", ["a\0b.pth", "x" * 300 + ".pth", "CON\0.pth"])
def test_118_names_that_no_disk_takes(tmp_path, name):
    """A sentence, and no file under a shortened name, as a NUL makes one in PyTorch"""
    message = message_of(save_file, {"model_state_dict": {}}, tmp_path / name)
    assert "could not be written" in message and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a:b.pth", "two\nlines.pth", "<b>.pth", "späte Zeit.pth"])
def test_118_odd_names_are_taken_as_they_are(tmp_path, name):
    save_file({"model_state_dict": {}, "epoch": 1}, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name] and load_file(tmp_path / name)["epoch"] == 1


def test_119_a_link_out_of_the_run(tmp_path):
    """A save replaces the link and not what it points at; a temporary name that is a link is not followed"""
    outside = tmp_path / "precious.txt"
    outside.write_text("mine")
    folder = CheckpointFolder(tmp_path / "run")
    folder.folder.mkdir()
    folder.last.symlink_to(outside)
    (folder.folder / f"last.pth.tmp-{os.getpid()}").symlink_to(outside)
    folder.save({"model_state_dict": {}, "epoch": 1})
    assert outside.read_text() == "mine" and not folder.last.is_symlink() and load_file(folder.last)["epoch"] == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"rows": 1}', '{"format": "unet_nbtrain.history", "version": 1, "rows": [{"epoch": -1}], "events": []}', "NaN", ""])
def test_121_a_hostile_history(tmp_path, text):
    (tmp_path / "history.json").write_text(text)
    assert str(tmp_path / "history.json") in message_of(History.load, tmp_path / "history.json", kind=ValueError)


def test_122_nothing_listens(tmp_path, monkeypatch):
    """A training opens no port; TensorBoard is started by the user, on 127.0.0.1"""
    opened = []
    monkeypatch.setattr(socket.socket, "bind", lambda *args: opened.append(args))
    trainer_in(tmp_path).train(1)
    assert opened == []


def test_123_no_secrets_and_no_paths_in_a_checkpoint(tmp_path, monkeypatch):
    """Neither the environment nor where the files lie"""
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-of-the-environment")
    trainer_in(tmp_path).train(1)
    for path in (tmp_path / "checkpoints").iterdir():
        raw = path.read_bytes()
        assert b"s3cr3t" not in raw and str(tmp_path).encode() not in raw and os.path.expanduser("~").encode() + b"/" not in raw
        plain = {key: value for key, value in load_file(path).items() if not key.endswith("state_dict") and key not in ("meter", "norms")}
        assert json.dumps(plain) and pickle.dumps(plain)


def test_124_a_picture_that_unpacks_to_gigabytes(tmp_path):
    """The limit is on pixels, before anything is decoded"""
    import struct
    import zlib

    from unet_nbtrain.image_files import read_image

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    message = message_of(read_image, tmp_path / "bomb.png", kind=Exception)
    assert "bomb.png" in message and "60" in message
