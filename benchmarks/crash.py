"""A training that is killed again and again, and what is lost by it: `kill -9`, a new process, `resume='last'`, until the run is complete.

    python -m benchmarks.crash --kills 1000 [--workers 0 2] [--seed 0] [--out benchmarks/results/crash.md]

A server that has PyTorch imported forks the trainees, each in a session of its own. Of the kills, some come from outside at a random
instant, the others strike at a certain call, just before or after it: fsync, rename and link (saving), unlink (deleting), a batch of the
validation. Each complete run is compared with one that nobody disturbed, bit for bit. The exit code is 1 if anything differs.
"""

import argparse
import json
import math
import mmap
import os
import platform
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import date
from pathlib import Path

import torch
import torch._dynamo  # Once, here, and not in every trainee: the first optimizer would import it
import torch.utils.tensorboard
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from torch import nn

from unet_nbtrain import UNetTrainer, create_optimizer, create_scheduler, demo_dataloaders
from unet_nbtrain.history import History
from unet_nbtrain.loggers import HistoryFiles, RunLog, TensorBoardLogger

EPOCHS, EVERY, BATCHES = 4, 3, 7  # Epochs of a run, steps between two saves, batches of an epoch
SCHEDULES = ("onecycle", "plateau")
CALLS = ("fsync", "replace", "link", "unlink", "validation")
PHASES = ("start", "train", "val", "save", "delete", "end")
LIMIT = 60  # Seconds after which a trainee counts as hung
ORPHANED = 10  # Seconds after which no process of a killed trainee may be alive
TIMES = ("seconds", "images_per_second", "data_wait")


class Net(nn.Module):
    """Batch norm, whose buffers must come back too, and dropout, whose randomness must go on where it was."""

    def __init__(self):
        super().__init__()
        self.n_classes = 1
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(6, 1, 1))

    def forward(self, images):
        return self.layers(images)


# The trainee


class Recorder:
    """Writes each loss and rate as it comes; what a killed process has written stays in the file."""

    def __init__(self, path, board):
        self.file, self.board = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), board

    def write(self, **line):
        os.write(self.file, ("\n" + json.dumps({"pid": os.getpid(), **line})).encode())  # A line that a kill cuts short stands alone

    def on_run_start(self, trainer):
        stray = [p.name for p in trainer.run_dir.rglob("*") if "tmp" in p.name and str(os.getpid()) not in p.name]
        self.write(kind="start", step=trainer.global_step, stray=stray)
        self.board.phase("train")

    def on_batch_end(self, trainer, loss):
        self.board.phase(trainer.phase)
        where = [trainer.current_epoch, trainer.batch]
        self.write(kind=trainer.phase, where=where, step=trainer.global_step, loss=float(loss).hex(), lr=trainer.learning_rate.hex())
        if trainer.phase == "val":
            self.board.passed("validation")

    def on_run_end(self, trainer, reason):
        self.board.phase("end")
        self.write(kind="end", reason=reason, step=trainer.global_step)


def noted(text):
    """What trainees have written, without lines that a kill has cut short: nothing was saved yet of such a batch, and it comes again"""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


class Board:
    """What trainee and server share: one byte each for the phase of the loop and for the disk; and where the trainee ends itself."""

    def __init__(self, plan=None):
        self.memory, self.plan, self.left = mmap.mmap(-1, 2), plan, 0
        if plan:
            self.left = plan["count"]

    def phase(self, name):
        self.memory[0] = PHASES.index(name)

    def disk(self, name):
        self.memory[1] = PHASES.index(name) if name else 0

    def read(self):
        return PHASES[self.memory[1] or self.memory[0]]

    def passed(self, call):
        if self.plan and self.plan["call"] == call:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, name, phase):
        """Have a function of `os` tell what it does; the plan says at which of its calls this process ends, before or after it"""
        inner = getattr(os, name)

        def call(*args, **kwargs):
            self.disk(phase)
            before = self.plan and self.plan["before"]
            if before:
                self.passed(name)
            result = inner(*args, **kwargs)
            if not before:
                self.passed(name)
            self.disk(None)
            return result

        setattr(os, name, call)


def trainer_for(folder, schedule, workers, observers):
    """Everything that has a state: augmentation, dropout, batch norm, schedule, average, early stopping, retention"""
    torch.manual_seed(5)
    model = Net()
    train, val = demo_dataloaders(n_train=2 * BATCHES, n_val=4, size=16, batch_size=2, num_workers=workers)
    optimizer = create_optimizer(model, "adamw", lr=0.01)
    extra = {"total_steps": EPOCHS * BATCHES} if schedule == "onecycle" else {"patience": 0, "factor": 0.5}
    return UNetTrainer(
        model, train, val, optimizer=optimizer, scheduler=create_scheduler(optimizer, schedule, **extra), device="cpu", run_dir=folder,
        early_stopping_patience=20, save_every_n_epochs=1, save_every_n_steps=EVERY, keep_epochs=2, save_top_k=2, ema_decay=0.9,
        gradient_clip_norm=1.0, observers=observers,
    )  # fmt: skip


def train(folder, schedule, workers, tensorboard, board):
    """One process of a run: from the newest checkpoint if there is one"""
    torch.set_num_threads(1)
    for name, phase in {"fsync": "save", "replace": "save", "link": "save", "unlink": "delete"}.items():
        board.watch(name, phase)
    loggers = [HistoryFiles(folder), RunLog(folder / "log.jsonl")]
    loggers += [TensorBoardLogger(folder / "tensorboard", images=False)] if tensorboard else []
    recorder = Recorder(folder.with_suffix(".lines"), board)
    trainer = trainer_for(folder, schedule, workers, [*loggers, recorder])
    begun = any((folder / "checkpoints").glob("*.pth"))
    trainer.train(EPOCHS, resume="last" if begun else None)


def trainee(folder, *args):
    """A forked process that trains and leaves; what goes wrong stands in a file beside the run's folder"""
    code = 1
    try:
        os.setsid()
        with open(folder.with_suffix(".out"), "a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        train(folder, *args)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# The server


def fork(folder, schedule, workers, tensorboard, board):
    pid = os.fork()
    if pid == 0:
        trainee(folder, schedule, workers, tensorboard, board)
    return pid


def wait(pid, kill_after):
    """The exit status of a trainee, and whether it hung; it is killed after so many seconds (never: infinity)"""
    end, limit = time.monotonic() + kill_after, time.monotonic() + LIMIT
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status, False
        now = time.monotonic()
        if now >= min(end, limit):
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1], now >= limit
        time.sleep(0.001)


def alive_sessions():
    """The sessions of all processes that are not zombies, counted"""
    found = Counter()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                found[int(fields[3])] += 1
    return found


def new_plan(choice, usual):
    """Where the next kill strikes: from outside after some time, or at a call of the trainee's"""
    if choice.random() < 0.5:
        return None, choice.uniform(0, usual)
    call = choice.choice(CALLS)
    most = {"fsync": 16, "replace": 24, "link": 12, "unlink": 10, "validation": 4}[call]
    return {"call": call, "count": choice.randint(1, most), "before": choice.random() < 0.5}, math.inf


class Runs:
    """Runs of one number of workers, and what was found wrong with them"""

    def __init__(self, root, workers, choice, references):
        self.root, self.workers, self.choice, self.references = root, workers, choice, references
        self.kills, self.runs, self.lost, self.stray, self.left = 0, 0, [], 0, 0
        self.unreadable, self.differing, self.hung = 0, 0, 0
        self.phases, self.sessions, self.problems = Counter(), {}, []

    def run(self, kills):
        """One run, with at most so many kills, to its end"""
        index, self.runs = self.runs, self.runs + 1
        schedule, tensorboard = SCHEDULES[index % 2], index % 8 == 7
        folder = self.root / f"{self.workers}_{index:04d}"
        usual, struck = self.references[schedule]["seconds"], 0
        for attempt in range(10_000):
            plan, seconds = new_plan(self.choice, usual) if struck < kills else (None, math.inf)
            board = Board(plan)
            pid = fork(folder, schedule, self.workers, tensorboard, board)
            status, hung = wait(pid, seconds)
            self.sessions[pid] = time.monotonic()
            if hung:
                self.hung += 1
                return self.say(folder, f"hung in phase {board.read()}, attempt {attempt}")
            if os.WIFSIGNALED(status):
                struck, self.kills = struck + 1, self.kills + 1
                self.phases[board.read()] += 1
            elif os.WEXITSTATUS(status):
                self.unreadable += 1
                return self.say(folder, "could not go on: " + folder.with_suffix(".out").read_text()[-1500:])
            else:
                break
        self.check(folder, schedule, tensorboard)

    def say(self, folder, text):
        self.problems.append(f"{folder.name}: {text}")
        print(self.problems[-1], file=sys.stderr, flush=True)

    def check(self, folder, schedule, tensorboard):
        """A complete run beside the one that nobody disturbed"""
        lines = noted(folder.with_suffix(".lines").read_text())
        reference, before = self.references[schedule], len(self.problems)
        for text in differences(lines, reference["losses"]):
            self.say(folder, text)
        mine = content(folder)
        for name, wanted in reference["content"].items():
            if mine.get(name) != wanted:
                self.say(folder, f"{name} differs from the undisturbed run")
        if tensorboard and (text := board_fault(folder)):
            self.say(folder, text)
        self.differing += len(self.problems) > before
        self.lost += lost_steps(lines)
        stray = [name for line in lines if line["kind"] == "start" for name in line["stray"]]
        stray += [p.name for p in folder.rglob("*") if "tmp" in p.name]
        if stray:
            self.stray += len(stray)
            self.say(folder, f"temporary files left: {sorted(set(stray))[:4]}")
        if len(self.problems) == before:
            forget(folder)

    def sample_orphans(self, patient=False):
        """Processes of killed trainees that are alive too long after; `patient` waits until each had its time"""
        end = time.monotonic() + ORPHANED
        while True:
            now, found = time.monotonic(), alive_sessions()
            late = {s: found[s] for s, when in self.sessions.items() if found[s] and (patient or now - when > ORPHANED)}
            if not late or not patient or now >= end:
                break
            time.sleep(0.1)
        self.left += sum(late.values())
        for session in late:
            self.problems.append(f"{late[session]} processes of session {session} are alive {now - self.sessions[session]:.0f} s after the kill")
            del self.sessions[session]
        self.sessions = {s: when for s, when in self.sessions.items() if now - when <= ORPHANED}

    def row(self, seconds):
        phases = ", ".join(f"{name} {self.phases[name]}" for name in PHASES if self.phases[name])
        cells = [self.workers, self.kills, phases, self.runs, self.unreadable, self.differing, max(self.lost, default=0), self.stray, self.left, self.hung]
        return "| " + " | ".join(map(str, cells)) + f" | {seconds:.0f} |"

    def is_bad(self):
        return bool(self.problems) or max(self.lost, default=0) > EVERY


# What is compared


def bits(value):
    """A value as text that differs if a single bit does"""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.contiguous().numpy().tobytes().hex()}"
    if isinstance(value, dict):
        return {str(key): bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(item) for item in value]
    return value.hex() if isinstance(value, float) else repr(value)


def content(folder):
    """All that must be equal at the end: the checkpoints, and the history in its file"""
    found = {}
    checkpoints = folder / "checkpoints"
    for path in sorted(checkpoints.glob("*.pth")):
        state = torch.load(path, weights_only=True)
        state.pop("seconds", None)
        state["history"] = plain_rows(state["history"]["rows"])
        if path.name == "last.prev.pth":  # Which generation that is depends on where the run was cut
            continue
        found |= {f"{path.name}[{key!r}]": bits(value) for key, value in state.items()}
    return found | {"history.json": bits(plain_rows(History.load(folder / "history.json").rows))}


def plain_rows(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def losses(lines):
    """What was recorded of each batch, by phase, epoch and batch; validation at a rate is compared too"""
    found = {}
    for line in lines:
        if line["kind"] in ("train", "val"):
            found.setdefault((line["kind"], *line["where"]), []).append((line["step"], line["loss"], line["lr"]))
    return found


def differences(lines, reference):
    """How the losses and rates of a run, repeated batches included, differ from the undisturbed ones"""
    mine = losses(lines)
    if mine.keys() != reference.keys():
        yield f"the batches {sorted(mine.keys() ^ reference.keys())[:4]} are only in one of the runs"
    for where in mine.keys() & reference.keys():
        if wrong := [found for found in mine[where] if found != reference[where][0]]:
            yield f"batch {where}: (step, loss, rate) was {wrong[0]}, undisturbed {reference[where][0]}"


def lost_steps(lines):
    """For each start but the first: the steps that the process before had done and that are done again"""
    lost, done, owner = [], None, None
    for line in lines:
        if line["kind"] == "start":
            if owner is not None:
                lost.append(done - line["step"])
            owner = line["pid"]
        done = line["step"]
    return lost


def board_fault(folder):
    """What is wrong with the numbers in TensorBoard's files: each epoch must be there once, with the loss of the history"""
    shown = EventMultiplexer().AddRunsFromDirectory(str(folder / "tensorboard")).Reload()
    rows = History.load(folder / "history.json").rows
    for run, phase in {"train": "train", "validation": "val"}.items():
        found = [(event.step, event.value) for event in shown.Scalars(run, "Loss")]
        wanted = [(row["epoch"], row[phase]["loss"]) for row in rows]
        if [step for step, _ in found] != [step for step, _ in wanted] or any(abs(a[1] - b[1]) > 1e-6 for a, b in zip(found, wanted)):
            return f"TensorBoard shows {found} in {run}, the history has {wanted}"
    return ""


def forget(folder):
    """Remove the files of a run with which nothing is wrong"""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for path in folder.parent.glob(f"{folder.name}*"):
        path.rmdir() if path.is_dir() else path.unlink()


def reference_of(root, schedule):
    """A run that nobody disturbs"""
    folder = root / f"reference_{schedule}"
    began = time.monotonic()
    status, hung = wait(fork(folder, schedule, 0, False, Board()), math.inf)
    if hung or status:
        raise RuntimeError("The undisturbed run failed: " + folder.with_suffix(".out").read_text()[-3000:])
    seconds = time.monotonic() - began
    lines = noted(folder.with_suffix(".lines").read_text())
    return {"seconds": seconds, "losses": losses(lines), "content": content(folder)}


def measure(root, workers, kills, seed, references):
    """So many kills with one number of workers"""
    runs, began, choice = Runs(root, workers, random.Random(f"{seed}-{workers}"), references), time.monotonic(), random.Random(seed)
    while runs.kills < kills:
        runs.run(min(kills - runs.kills, choice.randint(2, 8)))
        runs.sample_orphans()
    runs.sample_orphans(patient=True)
    return runs, runs.row(time.monotonic() - began)


HEAD = """# Killed and resumed

{kills} times `kill -9` of a training, each followed by `resume='last'` in a new process, until the run is complete: {epochs} epochs of
{batches} steps, a save every {every} steps and after each epoch, retention (`save_top_k`, `keep_epochs`), augmentation, dropout,
batch norm, one-cycle or plateau schedule, averaged weights, early stopping. Half of the kills come at a random instant, half at a
call of fsync, rename, link or unlink, or in the validation. *Differing*: complete runs in which any bit of a loss, a rate, the history,
the weights, the optimizer or another entry of a checkpoint is not that of an undisturbed run. *Lost*: most steps done again after one
kill. *Stray*: temporary files after a next start. *Alive*: processes {orphaned} s after the kill.

| workers | kills | while in | runs completed | unreadable | differing | lost | stray | alive | hung | seconds |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        references = {schedule: reference_of(root, schedule) for schedule in SCHEDULES}
        share = -(-options.kills // len(options.workers))
        found = [measure(root, workers, share, options.seed, references) for workers in options.workers]
    total = sum(runs.kills for runs, _ in found)
    text = HEAD.format(kills=f"{total:,}", epochs=EPOCHS, batches=BATCHES, every=EVERY, orphaned=ORPHANED)
    text += "\n".join(row for _, row in found) + "\n\n"
    text += f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, {date.today()}.\n"
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    problems = [problem for runs, _ in found for problem in runs.problems]
    print("\n".join(problems), file=sys.stderr)
    return int(any(runs.is_bad() for runs, _ in found))


if __name__ == "__main__":
    sys.exit(main())
