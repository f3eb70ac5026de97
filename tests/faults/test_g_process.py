"""What happens to the process in which a training runs: killed, stopped, interrupted, ended. Numbers are those of the fault table."""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Forked, new_server
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


@pytest.fixture(scope="module")
def server():
    process = new_server()
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait(60)


@pytest.fixture
def start(server, tmp_path):
    """Run code in a process of its own; the folder of the test is its argument"""
    return lambda code: Forked(server, code, [tmp_path], tmp_path / "printed")


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
def kill(trainer):
    while torch.load(trainer.checkpoint_dir / "last.pth")["epoch"] < 3:  # Epochs may be saved beside the training
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


logged(sys.argv[1], At("on_epoch_end", 15, kill), owed=0.0).train(5)
"""


def test_089_killed_between_the_checkpoint_and_the_loggers(tmp_path, start):
    """Epoch 3 is in the checkpoint and nowhere else: it comes back at the next start, once. benchmarks/crash.py has the random kills."""
    assert start(KILLED_BEFORE_THE_LOGGERS).wait() == -signal.SIGKILL and last(tmp_path)["epoch"] == 3
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


def test_091_terminated(tmp_path, start):
    """SIGTERM, as a cluster or a kernel's shutdown sends it: the run stops, saves its last step, and can go on from there"""
    process = start(TERMINATED)
    process.until_it_prints()
    process.send(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    done = max(int(line) for line in process.text().splitlines() if line.isdecimal())
    step = last(tmp_path)["global_step"]
    assert step >= done
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
run = trainer.start(100_000{resume})
while trainer.global_step < {step}:
    time.sleep(0.01)
"""


def test_093_the_kernel_is_restarted_and_shut_down(tmp_path):
    """While it runs: at most one save interval is lost. While it is paused: nothing."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(cwd=str(tmp_path))

    def steps(code):
        reply = client.execute_interactive(COMMON + code, user_expressions={"it": "trainer.global_step"}, timeout=60, output_hook=print)
        assert reply["content"]["status"] == "ok", reply["content"]
        return int(reply["content"]["user_expressions"]["it"]["data"]["text/plain"])

    run = str(tmp_path / "run")
    try:
        done = steps(IN_A_KERNEL.format(run=run, step=9, resume=""))
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=60)
        saved = last(run)["global_step"]
        assert saved >= done - 2
        paused = steps(IN_A_KERNEL.format(run=run, step=saved + 3, resume=", resume='last'") + "\nassert run.pause().wait(30)")
        assert paused > saved
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    assert last(run)["global_step"] == paused
    epochs = paused // 5 + 2
    new_trainer(run).train(epochs, resume="last")
    assert torch.equal(weights(run), undisturbed(tmp_path / "whole", epochs))


LEFT = """
trainer = logged(sys.argv[1])
run = trainer.start(100_000)
while trainer.global_step < 20:
    time.sleep(0.01)
print("leaving")
"""


def test_096_the_interpreter_ends_while_a_training_runs(tmp_path, start):
    process = start(LEFT)
    assert process.wait() == 0 and process.text().strip() == "leaving"
    saved = last(tmp_path)["epoch"]
    logged(str(tmp_path)).train(saved + 1, resume="last")
    assert History.load(tmp_path / "history.json")["epochs"] == list(range(1, saved + 2))


ASLEEP = """
tell = At("on_batch_end", 3, lambda trainer: (print(trainer.global_step, flush=True), time.sleep(0.02)))
new_trainer(sys.argv[1], tell, RunLog(sys.argv[1] + "/log.jsonl"), save_every_n_minutes=60).train(8)
"""


def test_097_stopped_and_continued(tmp_path, start):
    """SIGSTOP and SIGCONT, as a laptop that sleeps: the run goes on as if nothing had been, and nobody cries about a hang"""
    process = start(ASLEEP)
    process.until_it_prints()
    process.send(signal.SIGSTOP)
    time.sleep(2)
    process.send(signal.SIGCONT)
    assert process.wait() == 0
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
