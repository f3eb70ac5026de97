"""Commands in any order from eight threads at once: none is lost, nothing hangs, and the state is the one that the rules predict.

The answers are written down in the order in which they are given. A model of the state machine that knows only the rules takes the
commands in this order and must give the same answers. FULL=1 does a thousand sequences where the suite does two hundred.
"""

import os
import random
import threading
import time

import pytest
import torch
from torch import nn

from unet_nbtrain import UNetTrainer
from unet_nbtrain.control import Command, Run

FULL = os.environ.get("FULL") == "1"
THREADS, SECONDS = 8, 60
NAMES = ["pause"] * 5 + ["resume"] * 8 + ["save"] * 3 + ["set"] * 3 + ["stop"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Rules:
    """The state machine as it is described, without threads or queues"""

    MOVES = {"pause": "paused", "resume": "running", "stop": "stopping"}

    def __init__(self):
        self.states = ["running"]

    @property
    def state(self):
        return self.states[-1]

    def answer(self, name, args):
        """Whether a command is obeyed; it may bring a new state"""
        if name == "set":
            return args[1] > 0
        if name == "save" or self.MOVES[name] == self.state:
            return True
        if self.state == "stopping":
            return False
        self.states.append(self.MOVES[name])
        return True


@pytest.fixture
def answers(monkeypatch):
    """All answers, in the order in which they are given"""
    given, settle = [], Command.settle

    def noted(command, ok, step, message=""):
        if not command.done:
            given.append((command, ok, step))
        settle(command, ok, step, message)

    monkeypatch.setattr(Command, "settle", noted)
    return given


def storm(run, choice, count):
    """Eight threads that send commands; all commands that were sent, the last one a stop"""
    sent, ready = [[] for _ in range(THREADS)], threading.Barrier(THREADS)

    def send(mine, dice):
        ready.wait(SECONDS)
        for _ in range(count):
            name = dice.choice(NAMES)
            mine.append(run.set("lr", dice.choice([-1.0, 0.1, 0.2])) if name == "set" else getattr(run, name)())
            if dice.random() < 0.2:
                mine[-1].wait(0.001)

    threads = [threading.Thread(target=send, args=(mine, random.Random(choice.random()))) for mine in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a thread that sends commands hangs"
    return [*sum(sent, []), run.stop()]


def check(run, commands, answers, states):
    """Every command was answered once; the rules give the same answers in this order, and the same states on the way"""
    assert run.wait(SECONDS), f"the run hangs: {run}"
    assert all(command.done for command in commands), [command for command in commands if not command.done]
    assert sorted(map(id, commands)) == sorted(id(command) for command, _, _ in answers)
    rules, last = Rules(), 0
    for command, ok, step in answers:
        if step is None:  # The run was over before its turn came
            assert ok == (command.name == "stop" and "had ended" in command.message), command
            assert rules.state == "stopping"
            continue
        assert ok == rules.answer(command.name, command.args), (command, rules.state)
        assert step >= last and (command.message or ok), command
        last = step
    assert states == [*rules.states, "finished"] and rules.state == "stopping"
    assert run.state == "finished" and not run.requests and not run.pending


def loop(run, saved, ending=0.0):
    """The fast stand-in for a training: steps without work, and an ending that takes its time"""

    def set_rate(name, value):
        if value <= 0:
            raise ValueError("a rate is greater than 0")

    run.begin()
    actions, step = {"save": lambda: saved.append(None), "set": set_rate}, 0
    while not run.pending or run.obey(step, actions):
        step += 1
        if step % 50 == 0:
            time.sleep(0)
    time.sleep(ending)
    run.finish("stopped by a command")


@pytest.mark.parametrize("block", range(10))
def test_random_commands_against_a_fast_loop(answers, block):
    for seed in range(100 if FULL else 20):
        choice, states, saved = random.Random(f"{block}-{seed}"), [], []
        run = Run(on_state=states.append)
        worker = threading.Thread(target=loop, args=(run, saved, choice.choice([0, 0.002])), daemon=True)
        if choice.random() < 0.5:
            worker.start()
            commands = storm(run, choice, choice.randint(1, 6))
        else:  # The commands are there before the loop begins
            commands = storm(run, choice, choice.randint(1, 6))
            worker.start()
        check(run, commands, answers, states)
        worker.join(SECONDS)
        assert not worker.is_alive()
        taken = sum(command.name == "save" and step is not None for command, _, step in answers)
        assert len(saved) == taken
        answers.clear()


class Heard:
    """What the observers of a run hear of its state"""

    def on_state_change(self, trainer, state):
        self.states.append(state)


def test_random_commands_against_a_real_trainer(answers, tmp_path):
    data = torch.rand(6, 1, 8, 8).split(2)
    batches = [(images, (images > 0.5).float()) for images in data]
    model = nn.Conv2d(1, 1, 1)
    model.n_classes = 1
    trainer, found = UNetTrainer(model, batches, batches[:1], device="cpu", run_dir=tmp_path, observers=[Heard()]), []
    for seed in range(30 if FULL else 6):
        before = trainer.global_step
        (heard,) = trainer.observers
        heard.states = []
        run = trainer.start(100_000)
        commands = storm(run, random.Random(seed), 4)
        check(run, commands, answers, heard.states)
        assert run.exception is None, run.traceback
        assert trainer.global_step >= before and trainer.learning_rate in (0.1, 0.2, 1e-3)
        found.append(torch.load(trainer.checkpoint_dir / "last.pth")["global_step"] == trainer.global_step)
        answers.clear()
    assert all(found) and not [thread for thread in threading.enumerate() if thread.name == "unet-train" and thread.is_alive()]


def test_the_rules_can_fail(answers):
    """A control that forgets a command, or that resumes a run which is stopping, is found"""
    states = []
    run = Run(on_state=states.append)
    commands = [run.pause(), run.resume(), run.stop()]
    loop(run, [])
    check(run, commands, answers, states)
    forgotten = Command("save")
    with pytest.raises(AssertionError):
        check(run, [*commands, forgotten], answers, states)
    refused = Command("pause")
    refused.settle(False, 5, "busy")
    with pytest.raises(AssertionError):
        check(run, commands, answers[:3], ["running", "paused", "stopping", "finished"])
    with pytest.raises(AssertionError):
        check(run, [*commands[:2], refused, commands[2]], [*answers[:2], answers[-1], answers[2]], states)
