"""`kill -9` and resume, a few times of the many that `python -m benchmarks.crash --kills 1000` does; and that its checks can fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KILLS = os.environ.get("KILLS", "20")

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="sessions are looked up in /proc")


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    """No unreadable run, no bit of difference, at most one save interval lost, no stray file, no process left"""
    command = [sys.executable, "-m", "benchmarks.crash", "--kills", KILLS, "--out", str(tmp_path / "crash.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "crash.md").read_text().splitlines() if line.startswith("| ")]
    head, *counted = rows
    for row in counted:
        found = dict(zip(head, row, strict=True))
        assert int(found["kills"]) == int(KILLS) // 2 and int(found["runs completed"]) >= 1 and int(found["lost"]) <= 3
        assert {found[name] for name in ("unreadable", "differing", "stray", "alive", "hung")} == {"0"}


def lines(*found):
    return [{"pid": pid, "kind": kind, "where": [0, step], "step": step, "loss": loss, "lr": "0x1p-3"} for pid, kind, step, loss in found]


@pytest.fixture
def crash(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import crash

    return crash


def test_one_other_bit_is_seen(crash):
    import torch

    whole, same = lines((1, "train", 1, "0x1.0p-1"), (1, "train", 2, "0x1.1p-1")), torch.tensor([1.0, -0.0])
    assert not list(crash.differences(whole, crash.losses(whole)))
    repeated = [*whole, *lines((2, "train", 2, "0x1.1000000000001p-1"))]
    assert "batch ('train', 0, 2)" in next(crash.differences(repeated, crash.losses(whole)))
    assert "only in one" in next(crash.differences(whole[:1], crash.losses(whole)))
    assert crash.bits({"a": same}) != crash.bits({"a": torch.tensor([1.0, 0.0])}) and crash.bits(same) != crash.bits(same.double())


def test_a_line_that_a_kill_cut_short_is_left_out(crash, tmp_path):
    path = tmp_path / "a.lines"
    recorder = crash.Recorder(path, None)
    recorder.write(kind="train", step=1)
    os.write(recorder.file, b'\n{"pid": 7, "kind": "tr')
    recorder.write(kind="train", step=2)
    os.close(recorder.file)
    assert [(line["kind"], line["step"]) for line in crash.noted(path.read_text())] == [("train", 1), ("train", 2)]


def test_steps_that_are_done_again_are_counted(crash):
    start = [{"pid": 1, "kind": "start", "step": 0}, {"pid": 2, "kind": "start", "step": 3}, {"pid": 3, "kind": "start", "step": 3}]
    steps = lines((1, "train", 4, ""), (1, "train", 5, ""))
    assert crash.lost_steps([start[0], *steps, start[1], start[2]]) == [2, 0]


def test_a_process_that_stays_is_found(crash):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        assert crash.alive_sessions()[process.pid] == 1
    finally:
        process.kill()
        process.wait()
    assert crash.alive_sessions()[process.pid] == 0


