"""What happens to the process in which a training runs: killed, stopped, interrupted, ended. Numbers are those of the fault table."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from process_parts import At, logged, new_trainer

from unet_nbtrain.events import EVENTS
from unet_nbtrain.history import History

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
]

HERE = str(Path(__file__).parent)
COMMON = f"""
import os, signal, sys, threading, time
import torch
sys.path.insert(0, {HERE!r})
from process_parts import At, RunLog, logged, new_trainer
torch.set_num_threads(1)
"""


def start(code, *arguments):
    """A process of its own, with those parts"""
    return subprocess.Popen([sys.executable, "-c", COMMON + code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last(folder):
    return torch.load(Path(folder) / "checkpoints" / "last.pth", weights_only=True)


def weights(folder):
    return torch.cat([tensor.flatten() for tensor in last(folder)["model_state_dict"].values()])


def undisturbed(folder, epochs):
    new_trainer(str(folder)).train(epochs)
    return weights(folder)


def board_steps(folder):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    shown = EventMultiplexer().AddRunsFromDirectory(str(folder / "tensorboard")).Reload()
    return [[event.step for event in shown.Scalars(run, "Loss")] for run in ("train", "validation")]


KILLED_BEFORE_THE_LOGGERS = """
kill = At("on_epoch_end", 15, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))
logged(sys.argv[1], kill).train(5)
"""


def test_089_killed_between_the_checkpoint_and_the_loggers(tmp_path):
    """Epoch 3 is in the checkpoint and nowhere else: it comes back at the next start, once. benchmarks/crash.py has the random kills."""
    process = start(KILLED_BEFORE_THE_LOGGERS, tmp_path)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and last(tmp_path)["epoch"] == 3
    assert len(History.load(tmp_path / "history.json")) == 2 and board_steps(tmp_path) == [[1, 2], [1, 2]]
    seen = []
    look = At("on_epoch_start", 0, lambda trainer: seen.append(History.load(tmp_path / "history.json")["epochs"]))
    trainer = logged(str(tmp_path))
    trainer.observers.add(look)
    trainer.train(5, resume="last")
    assert seen[0] == [1, 2, 3] and History.load(tmp_path / "history.json")["epochs"] == [1, 2, 3, 4, 5]
    assert board_steps(tmp_path) == [[1, 2, 3, 4, 5]] * 2
    assert torch.equal(weights(tmp_path), undisturbed(tmp_path / "whole", 5))


def test_089_many_resumes_and_no_step_twice(tmp_path):
    """Runs that are resumed from their end or from their own past: TensorBoard and the tables show each epoch once"""
    logged(str(tmp_path)).train(1)
    for epochs in (3, 3, 5):
        logged(str(tmp_path)).train(epochs, resume="last")
    logged(str(tmp_path)).train(4, resume=tmp_path / "checkpoints" / "best_model.pth")
    epochs = History.load(tmp_path / "history.json")["epochs"]
    assert epochs == sorted(set(epochs)) and board_steps(tmp_path) == [epochs] * 2
    assert History.from_csv(tmp_path / "history.csv")["epochs"] == epochs


def test_090_power_loss(tmp_path, monkeypatch):
    """Not to be produced here, but its remedy is an order of calls: the file is on the disk before its name is, and then the folder"""
    calls, places = [], {}

    def noted(name):
        inner = getattr(os, name)

        def call(target, *args, **kwargs):
            what = places.get(target) or ("folder" if isinstance(target, int) and os.path.isdir(f"/proc/self/fd/{target}") else "file")
            calls.append((name, what if name == "fsync" else Path(args[0]).name))
            return inner(target, *args, **kwargs)

        return call

    trainer = new_trainer(str(tmp_path))
    trainer.train(1)
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    trainer.save_checkpoint(tmp_path / "checkpoints" / "last.pth")
    assert calls.index(("fsync", "file")) < calls.index(("replace", "last.pth")) < len(calls) - 1 - calls[::-1].index(("fsync", "folder"))


TERMINATED = """
tell = At("on_batch_end", 7, lambda trainer: print(trainer.global_step, flush=True))
new_trainer(sys.argv[1], tell, At("on_batch_end", 1, lambda trainer: time.sleep(0.02)), save_every_n_steps=2).train(1000)
"""


def test_091_terminated(tmp_path):
    """SIGTERM, as a cluster or a kernel's shutdown sends it: the run ends, the newest checkpoint is at most one interval old, and goes on"""
    process = start(TERMINATED, tmp_path)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    done = max([7, *map(int, out.split())])
    step = last(tmp_path)["global_step"]
    assert process.returncode != 0 or step >= done
    assert step >= done - 2
    epochs = step // 5 + 2
    resumed = new_trainer(str(tmp_path))
    resumed.train(epochs, resume="last")
    assert resumed.current_epoch == epochs and torch.equal(weights(tmp_path), undisturbed(tmp_path / "whole", epochs))


@pytest.mark.parametrize("times", [1, 5])
def test_092_interrupts_during_a_save(tmp_path, monkeypatch, times):
    """The first one stops in good order, more of them break off; no file suffers"""
    fsync, left = os.fsync, [times]

    def interrupted(handle):
        while left[0]:
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGINT)
        fsync(handle)

    trainer = new_trainer(str(tmp_path), save_every_n_steps=2)
    trainer.train(1)
    monkeypatch.setattr(os, "fsync", interrupted)
    try:
        trainer.train(2)
        assert times == 1 and trainer.run.reason == "stopped by a command"
    except KeyboardInterrupt:
        assert times == 5
    monkeypatch.undo()
    files = list((tmp_path / "checkpoints").glob("*.pth"))
    assert {"last.pth", "last.prev.pth", "best_model.pth"} <= {path.name for path in files}
    assert all("model_state_dict" in torch.load(path, weights_only=True) for path in files)
    trainer.train(3 - trainer.current_epoch)
    assert torch.equal(weights(tmp_path), undisturbed(tmp_path / "whole", 3))
    assert not [path.name for path in tmp_path.rglob("*") if "tmp" in path.name]


IN_A_KERNEL = """
trainer = new_trainer({run!r}, save_every_n_steps=2)
run = trainer.start(100_000)
while trainer.global_step < 9:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("state", ["running", "paused"])
def test_093_the_kernel_is_restarted(tmp_path, state):
    """Paused: nothing is lost. Running: at most one save interval."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(cwd=str(tmp_path))

    def value(code, before=""):
        reply = client.execute_interactive(before, user_expressions={"it": code}, timeout=60, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"]
        return reply["content"]["user_expressions"]["it"]["data"]["text/plain"]

    try:
        wait = "\nassert run.pause().wait(30)" if state == "paused" else ""
        done = int(value("trainer.global_step", COMMON + IN_A_KERNEL.format(run=str(tmp_path / "run")) + wait))
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=60)
        saved = last(tmp_path / "run")["global_step"]
        assert saved >= done if state == "paused" else saved >= done - 2
        code = COMMON + f"trainer = new_trainer({str(tmp_path / 'run')!r})\ntrainer.train({saved // 5 + 2}, resume='last')"
        assert int(value("trainer.current_epoch", code)) == saved // 5 + 2
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert torch.equal(weights(tmp_path / "run"), undisturbed(tmp_path / "whole", saved // 5 + 2))


LEFT = """
trainer = logged(sys.argv[1])
run = trainer.start(100_000)
while trainer.global_step < 20:
    time.sleep(0.01)
print("leaving")
"""


def test_096_the_interpreter_ends_while_a_training_runs(tmp_path):
    process = start(LEFT, tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "leaving" in out
    assert "Fatal" not in err and "Traceback" not in err, err
    saved = last(tmp_path)["epoch"]
    logged(str(tmp_path)).train(saved + 1, resume="last")
    assert History.load(tmp_path / "history.json")["epochs"] == list(range(1, saved + 2))


ASLEEP = """
tell = At("on_batch_end", 3, lambda trainer: (print(trainer.global_step, flush=True), time.sleep(0.02)))
new_trainer(sys.argv[1], tell, RunLog(sys.argv[1] + "/log.jsonl"), save_every_n_minutes=60).train(8)
"""


def test_097_stopped_and_continued(tmp_path):
    """SIGSTOP and SIGCONT, as a laptop that sleeps: the run goes on as if nothing had been, and nobody cries about a hang"""
    process = start(ASLEEP, tmp_path)
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode == 0
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "problem" not in events and events.count("run_end") == 1
    assert torch.equal(weights(tmp_path), undisturbed(tmp_path / "whole", 8))


class Failing:
    """An observer that raises in one of its methods, each time it is called"""

    def __init__(self, event):
        self.calls = 0
        setattr(self, event, self.fail)

    def fail(self, trainer, *args):
        self.calls += 1
        raise OSError("the disk of the logger is full")


class Hears:
    def __init__(self):
        self.problems = []

    def on_problem(self, trainer, message):
        self.problems.append(message)


@pytest.mark.parametrize("event", EVENTS)
def test_098_an_observer_that_raises(tmp_path, caplog, event):
    """It is switched off, its traceback is in the log, it is told once, and the training is the same as without it"""
    failing, hears = Failing(event), Hears()
    trainer = new_trainer(str(tmp_path), Failing("on_epoch_start"), failing, hears)
    with caplog.at_level(logging.ERROR):
        trainer.train(3)
    assert failing.calls == 1 and list(trainer.observers) == [hears] and trainer.run.exception is None
    assert sum(f"Failing failed in {event}" in message for message in hears.problems) in ({1, 2} if event == "on_epoch_start" else {1})
    told = [record for record in caplog.records if f"failed in {event}" in record.getMessage()]
    assert told and "the disk of the logger is full" in (told[0].exc_text or logging.Formatter().formatException(told[0].exc_info))
    assert torch.equal(weights(tmp_path), undisturbed(tmp_path / "whole", 3))


def test_098_an_observer_that_asks_for_the_end_gets_it(tmp_path):
    """KeyboardInterrupt and SystemExit are no failures of an observer"""
    stop = At("on_batch_end", 3, lambda trainer: sys.exit(3))
    with pytest.raises(SystemExit):
        new_trainer(str(tmp_path), stop).train(2)
    assert last(tmp_path)["global_step"] == 3
