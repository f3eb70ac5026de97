"""What a training asks of its process: freed memory stays while it lasts and goes back afterwards, whatever happens."""

import os
import subprocess
import sys

import pytest
import torch

from unet_nbtrain import process
from unet_nbtrain.trainer import UNetTrainer
from unet_nbtrain.unet_model import UNet

FRESH = """
import os, resource, torch
from unet_nbtrain.process import kept_memory

def step():
    blocks = [torch.ones(megabytes, 2**18) for megabytes in (8, 24, 100)]
    return sum(block[0, 0].item() for block in blocks)

def faults():
    found = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        step()
        found.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
    return min(found)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

usual = faults()
before = resident()
with kept_memory():
    kept, held = faults(), resident()
print(usual, kept, before, held, resident())
"""
glibc = pytest.mark.skipif(process._allocator() is None, reason="glibc does not allocate here, or somebody has tuned it")


@glibc
def test_a_fresh_process_asks_for_its_pages_again_and_again_unless_they_are_kept():
    """130 MB are touched a step; what was freed is there again for the next one, and goes back at the end."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120, check=True)
    usual, kept, before, held, after = map(int, done.stdout.split())
    assert usual > 10_000 and kept < 50
    assert held > before + 100 and after < before + 20


class Noted:
    """Stands for the setting of the process, and notes when it is changed and put back."""

    def __init__(self):
        self.calls = []

    def change(self):
        self.calls.append("kept")
        return lambda: self.calls.append("put back")


class Looking:
    def __init__(self, noted, fail=False):
        self.noted, self.fail, self.seen = noted, fail, []

    def on_batch_end(self, trainer, loss):
        self.seen.append(list(self.noted.calls))
        if self.fail:
            trainer.model.register_forward_pre_hook(broken)


def broken(*args):
    raise RuntimeError("broken model")


def trainer_of(tmp_path, monkeypatch, fail=False):
    torch.manual_seed(0)
    noted = Noted()
    monkeypatch.setattr(process, "_memory", process._Shared(noted.change))
    batches = [(torch.rand(2, 3, 16, 16), torch.ones(2, 16, 16)) for _ in range(3)]
    looking = Looking(noted, fail)
    trainer = UNetTrainer(UNet(3, 1, width=4, depth=2), batches, batches, device="cpu", run_dir=tmp_path / "run", observers=[looking])
    return trainer, noted, looking


@pytest.mark.parametrize("aside", [False, True])
def test_a_training_keeps_freed_memory_as_long_as_it_lasts_unless_it_is_beside_a_notebook(tmp_path, monkeypatch, aside):
    trainer, noted, looking = trainer_of(tmp_path, monkeypatch)
    assert trainer.start(2).wait(60) if aside else trainer.train(2)
    assert looking.seen and all(calls == ([] if aside else ["kept"]) for calls in looking.seen)
    assert noted.calls == ([] if aside else ["kept", "put back"])


def test_a_training_that_fails_gives_the_memory_back_too(tmp_path, monkeypatch):
    trainer, noted, looking = trainer_of(tmp_path, monkeypatch, fail=True)
    with pytest.raises(RuntimeError, match="broken model"):
        trainer.train(2)
    assert len(looking.seen) == 1 and noted.calls == ["kept", "put back"]


@glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_an_allocator_that_somebody_has_tuned_is_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert process._allocator() is None
    with process.kept_memory():
        assert os.environ[name] == "1"
