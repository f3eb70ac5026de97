"""Interrupts of a real kernel at random moments: a stop in good order, and nothing is done twice, left out or left behind.

FULL=1 interrupts twenty times where the suite does six times.
"""

import os
import random
import time
from pathlib import Path

import pytest
from test_kernel import Kernel

FULL = os.environ.get("FULL") == "1"
TIMES = 20 if FULL else 6

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="child processes are looked up in /proc")

SETUP = """
import logging, time, torch
from torch import nn
from unet_nbtrain import UNetTrainer, demo_dataloaders

logging.disable(logging.CRITICAL)
torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_classes, self.pause = 1, {pause}
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))

    def forward(self, images):
        time.sleep(self.pause)
        return self.layers(images)


class Notes:
    def __init__(self):
        self.batches, self.starts = [], []

    def on_run_start(self, trainer):
        self.starts.append(trainer.global_step)
        print("begun", flush=True)

    def on_batch_end(self, trainer, loss):
        if trainer.phase == "train":
            self.batches.append(7 * trainer.current_epoch + trainer.batch - 1)


notes = Notes()
train, val = demo_dataloaders(n_train=14, n_val=4, size=16, batch_size=2, num_workers={workers})
trainer = UNetTrainer(Net(), train, val, device="cpu", run_dir={run!r}, observers=[notes], save_every_n_steps=2)
"""


class Interrupted(Kernel):
    """A kernel whose printed text is kept, so that one knows when the training has begun"""

    def __init__(self, cwd):
        self.printed = ""
        super().__init__(cwd)

    def _hear(self, message):
        super()._hear(message)
        if message["msg_type"] == "stream":
            self.printed += message["content"]["text"]

    def begin(self, code):
        """Run a cell up to the moment when the training says that it has begun"""
        self.printed = ""
        identity = self.send(code)
        self.until(lambda: "begun" in self.printed, "beginning of the training", 60)
        return identity

    def reply(self, identity, seconds=60):
        while True:
            reply = self.client.get_shell_msg(timeout=seconds)
            if reply["parent_header"].get("msg_id") == identity:
                return reply["content"]

    def children(self):
        """The processes that the kernel has started and that are alive"""
        mine, found = self.run("__import__('os').getpid()"), set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if fields[1] == mine and fields[0] != "Z":
                    found.add(entry.name)
        return found

    def until_childless(self, before):
        self.until(lambda: self.children() <= before, "end of the worker processes", 30)


@pytest.fixture
def kernel(tmp_path):
    kernel = Interrupted(tmp_path)
    yield kernel
    kernel.close()


def is_in_order(kernel):
    """Each batch of the training was done once, in order, and the files are those of this moment"""
    assert kernel.run("notes.batches == list(range(len(notes.batches)))") == "True", kernel.run("notes.batches")
    assert kernel.run("trainer.global_step == len(notes.batches)") == "True"
    assert kernel.run("torch.load(trainer.checkpoint_dir / 'last.pth')['global_step'] == trainer.global_step") == "True"
    assert kernel.run("torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu')") == "(True, False, False)"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupt_at_any_moment_is_a_stop(kernel, tmp_path, workers):
    kernel.run(SETUP.format(workers=workers, run=str(tmp_path / "run"), pause=0.005))
    before, choice = kernel.children(), random.Random(workers)
    for i in range(TIMES // 2):
        identity = kernel.begin("history = trainer.train(1000)")
        time.sleep(choice.uniform(0, 0.8))
        kernel.manager.interrupt_kernel()
        assert kernel.reply(identity)["status"] == "ok"
        assert kernel.run("trainer.run.state, trainer.run.reason") == "('finished', 'stopped by a command')"
        assert int(kernel.run("len(notes.starts)")) == i + 1
        is_in_order(kernel)
        kernel.until_childless(before)
    assert kernel.run("len(notes.batches) > 0 and notes.starts == sorted(notes.starts)") == "True"
    assert not [path.name for path in (tmp_path / "run").rglob("*") if "tmp" in path.name]


@pytest.mark.parametrize("workers", [0, 2] if FULL else [2])
def test_a_second_interrupt_breaks_off_and_harms_no_file(kernel, tmp_path, workers):
    kernel.run(SETUP.format(workers=workers, run=str(tmp_path / "run"), pause=0.3))
    before, choice, broken = kernel.children(), random.Random(workers), 0
    for _ in range(TIMES // 3):
        identity = kernel.begin("history = trainer.train(1000)")
        time.sleep(choice.uniform(0.1, 0.6))
        kernel.manager.interrupt_kernel()
        time.sleep(choice.uniform(0, 0.2))
        kernel.manager.interrupt_kernel()
        reply = kernel.reply(identity)
        broken += reply["status"] == "error"
        assert reply["status"] == "ok" or reply["ename"] == "KeyboardInterrupt"
        assert kernel.run("trainer.run.ended and all(p.grad is None for p in trainer.model.parameters())") == "True"
        assert kernel.run("[type(torch.load(path)).__name__ for path in trainer.checkpoint_dir.glob('*.pth')]").count("'dict'") >= 1
        kernel.until_childless(before)
    assert broken, "no cell was broken off"
    kernel.run("setattr(trainer.model, 'pause', 0)")
    assert kernel.run("len(trainer.train(1)) >= 1") == "True"
    is_in_order(kernel)
    assert not [path.name for path in (tmp_path / "run").rglob("*") if "tmp" in path.name]


def test_interrupts_leave_a_training_in_the_background_alone(kernel, tmp_path):
    """The interrupt goes to the whole process group, so to the workers too; they stay the same processes"""
    kernel.run(SETUP.format(workers=2, run=str(tmp_path / "run"), pause=0.005))
    before, choice = kernel.children(), random.Random(5)
    identity = kernel.begin("run = trainer.start(100_000)\nrun.wait(60)")
    time.sleep(1)
    kernel.manager.interrupt_kernel()
    assert kernel.reply(identity)["ename"] == "KeyboardInterrupt"
    workers = kernel.children() - before
    assert len(workers) in (2, 4)
    for _ in range(TIMES // 2):
        identity = kernel.send("time.sleep(60)")
        time.sleep(choice.uniform(0.3, 0.6))
        kernel.manager.interrupt_kernel()
        assert kernel.reply(identity)["ename"] == "KeyboardInterrupt"
        goal = f"trainer.global_step > {kernel.run('trainer.global_step')} + 7"
        kernel.until(lambda goal=goal: kernel.run(goal) == "True", "further steps", 30)
    assert kernel.run("run.state") == "'running'" and workers <= kernel.children()
    assert kernel.run("run.stop().wait(30)") == "True" and kernel.run("run.wait(30)") == "True"
    is_in_order(kernel)
    kernel.until_childless(before)
