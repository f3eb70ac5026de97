"Loggers: TensorBoard files after crashes and resumes, the bar's cost and honesty, logs that survive, lazy imports."
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch

from unet_nbtrain.history import History
from unet_nbtrain.loggers import HistoryFiles, ProgressBar, RunLog, TensorBoardLogger, describe_run, epoch_line, scalars

logging.getLogger("tensorboard").setLevel(logging.ERROR)


class Trainer:
    "What an observer may read, and a loop that calls it"

    def __init__(self, *observers, epochs=4, train=5, val=2):
        self.observers, self.total_epochs, self.history, self.sizes = observers, epochs, History(), (train, val)
        self.train_loader, self.val_loader = range(train), range(val)
        self.current_epoch = self.global_step = self.batch = 0
        self.phase, self.num_batches, self.learning_rate, self.device = "idle", None, 1e-3, torch.device("cpu")

    def tell(self, event, *args):
        for observer in self.observers:
            if hasattr(observer, event):
                getattr(observer, event)(self, *args)

    def train(self, reason="done", stop_after=None):
        self.tell("on_run_start")
        while self.current_epoch < self.total_epochs:
            self.tell("on_epoch_start")
            for phase, count in zip(("train", "val"), self.sizes):
                self.phase, self.num_batches = phase, count
                for batch in range(1, count + 1):
                    self.batch = batch
                    self.global_step += phase == "train"
                    self.tell("on_batch_end", torch.tensor(0.5))
            self.current_epoch, self.batch, self.phase = self.current_epoch + 1, 0, "idle"
            self.history.append(row(self.current_epoch))
            self.tell("on_epoch_end", self.history.rows[-1])
            if self.current_epoch == stop_after:
                return
        self.tell("on_run_end", reason)


def row(epoch, **more):
    val = {"loss": 2.0 / epoch, "dice": 0.5, "per_class": {"dice": [0.9, math.nan, 0.5]}, **more}
    return {"epoch": epoch, "train": {"loss": 1.0 / epoch, "dice": 0.4}, "val": val, "lr": 0.1, "seconds": 1.5, "images_per_second": 9.0, "best": True}


def read_back(log_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(log_dir)).Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def steps(log_dir, tag="Loss/val"):
    return [step for step, _ in read_back(log_dir)[tag]]


# TensorBoard


def test_every_number_of_a_row_arrives(tmp_path):
    trainer = Trainer(TensorBoardLogger(tmp_path), epochs=3)
    trainer.train()
    shown = read_back(tmp_path)
    assert set(shown) == {"Loss/train", "Loss/val", "Dice/train", "Dice/val", "DicePerClass/val_0", "DicePerClass/val_2", "LearningRate",
                          "Time/epoch", "Time/images_per_second"}
    assert [value for _, value in shown["Loss/val"]] == pytest.approx([2.0, 1.0, 2 / 3])
    assert all([step for step, _ in points] == [1, 2, 3] for points in shown.values())


@pytest.mark.parametrize("resumed_from", [0, 1, 3, 6])
def test_no_step_is_doubled_after_a_crash_and_a_resume(tmp_path, resumed_from):
    "The process dies after epoch 6 (no goodbye), and goes on from an earlier checkpoint: each step once, the new values"
    trainer = Trainer(TensorBoardLogger(tmp_path), epochs=8)
    trainer.train(stop_after=6)
    trainer.observers[0]._writer.close()
    again = Trainer(TensorBoardLogger(tmp_path), epochs=8)
    again.current_epoch = resumed_from
    time.sleep(0.01)
    again.train()
    assert steps(tmp_path) == list(range(1, 9))


def test_three_sessions_in_one_second(tmp_path):
    "Event files of one second are told apart and read in order"
    for finished in (0, 2, 4):
        trainer = Trainer(TensorBoardLogger(tmp_path), epochs=finished + 3)
        trainer.current_epoch = finished
        trainer.train()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


def test_custom_metrics_and_odd_names_travel(tmp_path):
    told = scalars({**row(1, **{"hd.95": 3.0, "a/b": 1, "note": "text", "flag": True}), "data_wait": 0.25, "extra": "x"})
    assert told["hd.95/val"] == 3.0 and told["a/b/val"] == 1.0 and told["flag/val"] == 1.0 and told["Run/data_wait"] == 0.25
    assert all(isinstance(value, float) for value in told.values()) and "note/val" not in told
    logger = TensorBoardLogger(tmp_path)
    logger.on_run_start(Trainer())
    logger.on_epoch_end(Trainer(), row(1, **{"hd.95": 3.0, "a/b": 1}))
    logger.on_run_end(None, "")
    assert read_back(tmp_path)["hd.95/val"] == [(1, 3.0)]


def test_a_loss_that_is_not_a_number_is_shown_as_such(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.on_run_start(Trainer())
    logger.on_epoch_end(Trainer(), row(1, loss=math.nan))
    logger.on_run_end(None, "")
    assert math.isnan(read_back(tmp_path)["Loss/val"][0][1])


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from test_loggers import Trainer, TensorBoardLogger, RunLog, HistoryFiles
folder = sys.argv[1]
class Slow:
    def on_epoch_end(self, trainer, row): print(row["epoch"], flush=True)
Trainer(TensorBoardLogger(folder + "/tb"), RunLog(folder + "/log.jsonl"), HistoryFiles(folder), Slow(), epochs=10**6).train()
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_after_kill_9_everything_that_was_reported_is_on_disk(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 25:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(History.load(tmp_path / "history.json")) >= 25
    assert steps(tmp_path / "tb")[:25] == list(range(1, 26))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[:26]]
    assert [line["event"] for line in lines] == ["run_start"] + ["epoch"] * 25
    resumed = Trainer(TensorBoardLogger(tmp_path / "tb"), RunLog(tmp_path / "log.jsonl"), epochs=22)
    resumed.current_epoch = 20
    resumed.train()
    assert steps(tmp_path / "tb") == list(range(1, 23))


# The bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_over_both_phases_of_every_epoch():
    screen = Terminal()
    Trainer(ProgressBar(stream=screen, interval=0), epochs=2).train()
    drawn = [part for part in screen.getvalue().split("\r") if "batch/s" in part and "loss" in part]
    assert [part.split("%")[0].split()[-1] for part in drawn] == [f"{round(100 * n / 7 - 0.01)}" for n in range(1, 8)] * 2
    assert sum("val loss" in part for part in drawn) == 4
    lines = [part for part in screen.getvalue().replace("\r", "\n").split("\n") if part.startswith("epoch") and "lr" in part]
    assert lines == [epoch_line(row(epoch), 2) for epoch in (1, 2)]


def test_the_bar_of_a_resumed_epoch_starts_where_it_was_left():
    screen, trainer = Terminal(), Trainer()
    bar = ProgressBar(stream=screen, interval=0)
    bar.on_run_start(trainer)
    trainer.phase, trainer.batch = "train", 3
    bar.on_epoch_start(trainer)
    assert "3/7" in screen.getvalue()
    trainer.batch = 4
    bar.on_batch_end(trainer, torch.tensor(0.25))
    assert "4/7" in screen.getvalue() and "loss 0.2500" in screen.getvalue()
    bar.on_run_end(trainer, "")


def test_a_loader_without_a_length_has_a_bar_without_an_end():
    screen, trainer = Terminal(), Trainer(epochs=1)
    trainer.train_loader = iter(range(5))
    trainer.observers = [ProgressBar(stream=screen, interval=0)]
    trainer.train()
    assert "5batch" in screen.getvalue() and "/7" not in screen.getvalue()


def test_the_loss_is_read_at_most_once_in_an_interval():
    "The whole point: a loss on a GPU is waited for twice a second, not at every batch"

    class Loss:
        reads = 0

        def __float__(self):
            Loss.reads += 1
            return 0.5

    screen, trainer, loss = Terminal(), Trainer(), Loss()
    bar = ProgressBar(stream=screen, interval=0.05)
    bar.on_run_start(trainer)
    bar.on_epoch_start(trainer)
    start = time.monotonic()
    while time.monotonic() - start < 0.5:
        bar.on_batch_end(trainer, loss)
    bar.on_run_end(trainer, "")
    assert 1 <= Loss.reads <= 11
    silent = ProgressBar(stream=io.StringIO())
    silent.on_run_start(trainer)
    silent.on_epoch_start(trainer)
    silent.on_batch_end(trainer, None)


def test_a_batch_costs_about_a_microsecond():
    trainer, loss, costs = Trainer(), torch.tensor(0.5), {}
    for name, stream in (("bar", Terminal()), ("lines", io.StringIO())):
        bar = ProgressBar(stream=stream, interval=3600)
        bar.on_run_start(trainer)
        bar.on_epoch_start(trainer)
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(20_000):
                bar.on_batch_end(trainer, loss)
            best = min(best, (time.perf_counter() - start) / 20_000)
        bar.on_run_end(trainer, "")
        costs[name] = best
    assert max(costs.values()) < 3e-6, costs


def test_silent_in_a_notebooks_background_thread_only(monkeypatch):
    "IPython with a kernel, simulated: a thread says nothing, the main thread does"
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    texts = {}

    def train(name):
        out = io.StringIO()
        Trainer(ProgressBar(stream=out), epochs=1).train()
        texts[name] = out.getvalue()

    thread = threading.Thread(target=train, args=("thread",))
    thread.start()
    thread.join()
    train("main")
    assert texts["thread"] == "" and texts["main"].startswith("epoch 1/1")
    shell = None
    thread = threading.Thread(target=train, args=("script",))
    thread.start()
    thread.join()
    assert texts["script"].startswith("epoch 1/1")


def test_no_thread_stays_behind():
    before = set(threading.enumerate())
    Trainer(ProgressBar(stream=Terminal(), interval=0), epochs=2).train()
    assert set(threading.enumerate()) == before


def test_problems_and_states_are_told():
    screen, trainer = Terminal(), Trainer()
    bar = ProgressBar(stream=screen, interval=3600)
    bar.on_run_start(trainer)
    bar.on_epoch_start(trainer)
    bar.on_state_change(trainer, "paused")
    bar.on_problem(trainer, "batch 3 was skipped")
    assert "paused" in screen.getvalue() and "! batch 3 was skipped\n" in screen.getvalue()
    bar.on_run_end(trainer, "stopped")
    bar.on_run_end(trainer, "stopped")


def test_observers_of_a_run_that_never_began():
    "A run may fail before its first epoch: every observer takes on_run_end alone"
    trainer = Trainer()
    ProgressBar().on_run_end(trainer, "failed")
    ProgressBar().on_problem(trainer, "x")
    ProgressBar().on_state_change(trainer, "failed")
    TensorBoardLogger("nowhere").on_run_end(trainer, "failed")
    assert not os.path.exists("nowhere")


# Files and logs


def test_history_files_hold_the_marks_of_the_end(tmp_path):
    trainer = Trainer(HistoryFiles(tmp_path), epochs=2)
    trainer.history.mark("resumed", 0, 0, "x")
    trainer.train(stop_after=2)
    trainer.history.mark("stop", 2, 10, "by hand")
    trainer.tell("on_run_end", "stopped")
    assert [event["kind"] for event in History.load(tmp_path / "history.json").events] == ["resumed", "stop"]
    assert len(History.from_csv(tmp_path / "history.csv")) == 2


def test_a_slow_picture_is_drawn_seldom_and_at_the_end(tmp_path):
    drawn = []

    def picture(history):
        drawn.append(len(history))
        time.sleep(0.02)
        return b"png"

    Trainer(HistoryFiles(tmp_path, picture), epochs=20).train()
    assert drawn[0] == 1 and drawn[-1] == 20 and len(drawn) <= 4
    assert (tmp_path / "curves.png").read_bytes() == b"png"


def test_the_log_survives_torn_lines_and_any_text(tmp_path):
    path, trainer = tmp_path / "deep" / "log.jsonl", Trainer()
    log = RunLog(path)
    for number, message in enumerate(["a\nb", "\udc80", "é\u2028", '"', "\x00"]):
        log.on_problem(trainer, message)
        with open(path, "ab") as file:
            file.write(b'{"torn": ' * (number % 2))
    log.on_problem(trainer, "last")
    good, torn = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            good.append(json.loads(line)["message"])
        except ValueError:
            torn += bool(line)
    assert good == ["a\nb", "\udc80", "é\u2028", '"', "\x00", "last"] and torn == 2


def test_lines_of_several_threads_stay_whole(tmp_path):
    log, trainer = RunLog(tmp_path / "log.jsonl"), Trainer()
    threads = [threading.Thread(target=lambda n=n: [log.on_problem(trainer, f"{n}" * 500) for _ in range(50)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = [json.loads(line)["message"] for line in log.path.read_text().splitlines()]
    assert sorted(messages) == sorted(f"{n}" * 500 for n in range(4) for _ in range(50))


def test_levels_for_people(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, logger="unet_nbtrain.loggers")
    Trainer(RunLog(tmp_path / "a.jsonl", level="info"), epochs=1).train("stopped by you")
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    caplog.clear()
    strict = RunLog(tmp_path / "b.jsonl", level=logging.ERROR)
    Trainer(strict, epochs=1).train()
    strict.on_problem(Trainer(), "x")
    assert not caplog.records and len(strict.path.read_text().splitlines()) == 4
    for bad in ("LOUD", None, 1.5):
        with pytest.raises(ValueError, match="is not a level"):
            RunLog(tmp_path / "c.jsonl", level=bad)


def test_nothing_is_printed_unless_the_program_asks_for_logging(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[2]); from test_loggers import *\n"
            "log = RunLog(sys.argv[1]); log.on_problem(Trainer(), 'hot')")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "log.jsonl"), os.path.dirname(__file__)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_start_of_a_log_tells_settings_but_no_paths(tmp_path):
    trainer = Trainer()
    trainer.model, trainer.seed, trainer.gradient_clip_norm, trainer.run_dir = torch.nn.Linear(1, 1), 7, None, tmp_path
    told = describe_run(trainer)
    assert told["model"] == "Linear" and told["seed"] == 7 and "gradient_clip_norm" not in told
    assert (told["train_batches"], told["val_batches"]) == (5, 2)
    assert str(tmp_path) not in json.dumps(told) and os.getcwd() not in json.dumps(told)


def test_heavy_libraries_are_imported_when_a_run_starts():
    code = ("import sys\nfrom unet_nbtrain.loggers import *\n"
            "bar, board = ProgressBar(), TensorBoardLogger('x')\n"
            "print(sorted({m.split('.')[0] for m in sys.modules} & {'tqdm', 'tensorboard', 'matplotlib', 'ipywidgets', 'IPython'}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = subprocess.run([sys.executable, "-c", "import sys, torch; print('tqdm' in sys.modules)"], capture_output=True, text=True)
    allowed = ["['tqdm']\n", "[]\n"] if loaded.stdout == "True\n" else ["[]\n"]
    assert done.stdout in allowed, done.stderr
