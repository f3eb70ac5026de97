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
from counting import Calls
from heard import Heard

from unet_nbtrain import event_files
from unet_nbtrain import tensorboard_logger as tensorboard_room
from unet_nbtrain.events import Observers
from unet_nbtrain.history import History
from unet_nbtrain.loggers import HistoryFiles, ProgressBar, RunLog, TensorBoardLogger
from unet_nbtrain.records import best_row
from unet_nbtrain.run_log import configure_logging, describe_run, epoch_line, is_on_console
from unet_nbtrain.tensorboard_logger import prediction_sheet, scalars

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
    "What TensorBoard shows: run -> tag -> points (step, value); pictures without a value"
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    reader, shown = EventMultiplexer().AddRunsFromDirectory(str(log_dir)).Reload(), {}
    for run, kinds in reader.Runs().items():
        shown[run] = {tag: [(event.step, event.value) for event in reader.Scalars(run, tag)] for tag in kinds["scalars"]}
        shown[run] |= {tag: [(event.step, None) for event in reader.Images(run, tag)] for tag in kinds["images"]}
    return shown


def steps(log_dir, tag="Loss"):
    "The steps of a tag, which must be the same in both runs"
    train, val = ([step for step, _ in run[tag]] for run in map(read_back(log_dir).get, ("train", "validation")))
    assert train == val
    return val


def doubled(log_dir):
    "Tags of which a step is shown twice"
    return [(run, tag) for run, tags in read_back(log_dir).items() for tag, points in tags.items() if len({step for step, _ in points}) < len(points)]


# TensorBoard


def test_every_number_of_a_row_arrives(tmp_path):
    trainer = Trainer(TensorBoardLogger(tmp_path), epochs=3)
    trainer.train()
    shown = read_back(tmp_path)
    assert set(shown) == {"train", "validation"}
    assert set(shown["train"]) == {"Loss", "Dice", "LearningRate", "Time/seconds_per_epoch", "Time/images_per_second"}
    assert set(shown["validation"]) == {"Loss", "Dice", "DicePerClass/0", "DicePerClass/2", "Best/Loss", "Best/Dice"}
    assert [value for _, value in shown["validation"]["Loss"]] == pytest.approx([2.0, 1.0, 2 / 3])
    assert all([step for step, _ in points] == [1, 2, 3] for tags in shown.values() for points in tags.values())


@pytest.mark.parametrize("resumed_from", [0, 1, 3, 6])
def test_no_step_is_doubled_after_a_crash_and_a_resume(tmp_path, resumed_from):
    "The process dies after epoch 6 (no goodbye), and goes on from an earlier checkpoint: each step once, the new values"
    trainer = Trainer(TensorBoardLogger(tmp_path), epochs=8)
    trainer.train(stop_after=6)
    trainer.observers[0]._close()
    again = Trainer(TensorBoardLogger(tmp_path), epochs=8)
    again.current_epoch = resumed_from
    time.sleep(0.01)
    again.train()
    assert steps(tmp_path) == list(range(1, 9)) and not doubled(tmp_path)


def test_the_best_epoch_is_never_one_that_a_run_went_back_behind(tmp_path):
    trainer = Trainer(TensorBoardLogger(tmp_path))
    trainer.tell("on_run_start")
    for epoch, loss in ((1, 3.0), (2, 1.0), (2, 2.5), (3, 2.0), (4, 9.0)):
        trainer.history.truncate(epoch - 1)
        trainer.history.append({"epoch": epoch, "val": {"loss": loss}})
        trainer.tell("on_epoch_end", trainer.history.rows[-1])
    trainer.tell("on_run_end", "done")
    assert read_back(tmp_path)["validation"]["Best/Loss"] == [(1, 3.0), (2, 2.5), (3, 2.0), (4, 2.0)]


def test_a_long_run_in_an_empty_folder_looks_at_each_row_a_few_times(tmp_path, monkeypatch):
    "All rows are written anew, each with the best one of its time, and not by looking at all rows for each"
    looked = []
    monkeypatch.setattr(tensorboard_room, "best_row", lambda rows: looked.append(len(rows)) or best_row(rows))
    trainer = Trainer(TensorBoardLogger(tmp_path))
    for epoch, loss in enumerate([3.0, math.nan, 1.0, 2.0] * 10, 1):
        trainer.history.append({"epoch": epoch, "val": {"loss": loss + 1 / epoch}})
    trainer.current_epoch = trainer.total_epochs = 40
    trainer.train()
    shown = [value for _, value in read_back(tmp_path)["validation"]["Best/Loss"]]
    wanted = []
    for epoch in range(1, 41):
        past = trainer.history.snapshot()
        past.truncate(epoch)
        wanted.append(past.best["val"]["loss"])
    assert shown == pytest.approx(wanted) and sum(looked) < 2.5 * 40


def test_three_sessions_in_one_second(tmp_path):
    "Event files of one second are told apart and read in order"
    for finished in (0, 2, 4):
        trainer = Trainer(TensorBoardLogger(tmp_path), epochs=finished + 3)
        trainer.current_epoch = finished
        trainer.train()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("threads", [0, 2])
def test_all_of_an_epoch_is_in_the_files_when_the_next_observer_hears_of_it(tmp_path, monkeypatch, threads):
    "Without a thread; and with PyTorch's, one for each file, where a version of TensorBoard does not tell which file it writes"
    if threads:
        monkeypatch.setattr(event_files, "_EventFile", None)
        monkeypatch.setattr(tensorboard_room, "end_thread", lambda writer: vars(writer.file_writer.event_writer).pop("_file_name") and event_files.end_thread(writer))
    before, seen = set(threading.enumerate()), []

    class Look:
        def on_epoch_end(self, trainer, row):
            seen.append((len(set(threading.enumerate()) - before), steps(tmp_path), steps(tmp_path, "Dice")))

    Trainer(TensorBoardLogger(tmp_path), Look(), epochs=3).train()
    assert seen == [(threads, [1], [1]), (threads, [1, 2], [1, 2]), (threads, [1, 2, 3], [1, 2, 3])]
    assert set(threading.enumerate()) == before


def test_custom_metrics_and_odd_names_travel(tmp_path):
    told = scalars({**row(1, **{"hd.95": 3.0, "a/b": 1, "note": "text", "flag": True}), "data_wait": 0.25, "extra": "x", "mine": 2})
    val = told["validation"]
    assert val["hd.95"] == 3.0 and val["a/b"] == 1.0 and val["flag"] == 1.0 and "note" not in val
    assert told["train"]["Time/data_wait"] == 0.25 and told["train"]["Run/mine"] == 2.0
    assert all(isinstance(value, float) for tags in told.values() for value in tags.values())
    logger = TensorBoardLogger(tmp_path)
    logger.on_run_start(Trainer())
    logger.on_epoch_end(Trainer(), row(1, **{"hd.95": 3.0, "a/b": 1}))
    logger.on_run_end(Trainer(), "")
    assert read_back(tmp_path)["validation"]["hd.95"] == [(1, 3.0)]


def test_class_names_make_safe_tags_that_never_collide(tmp_path):
    names = ["a b", "a/b", "", "Straße", "x" * 500, "<b>&", "a b"]
    values = [i / 10 for i in range(9)]
    tags = scalars({"epoch": 1, "val": {"per_class": {"dice": values, "iou": values, "recall": values}}}, names)["validation"]
    assert len(tags) == 18 and sorted(tags.values()) == sorted(values * 2)
    assert tags["DicePerClass/3_Straße"] == 0.3 and tags["DicePerClass/0_a_b"] == 0.0 and tags["IoUPerClass/8"] == 0.8
    assert all(tag.count("/") == 1 and len(tag) < 60 and not set(tag) & set(" <>&") for tag in tags)


def test_a_loss_that_is_not_a_number_is_shown_as_such(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.on_run_start(Trainer())
    logger.on_epoch_end(Trainer(), row(1, loss=math.nan))
    logger.on_run_end(Trainer(), "")
    assert math.isnan(read_back(tmp_path)["validation"]["Loss"][0][1])


@pytest.mark.parametrize("n_classes", [1, 4])
def test_the_sheet_of_predictions(n_classes):
    "Any dtype and device layout, masks with or without a channel, ignored pixels, many channels: a small sheet of at most four rows"
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, max(n_classes, 2), (6, 300, 520), generator=generator)
    masks[:, :9] = 255
    logits = torch.nn.functional.one_hot(masks % 5 % max(n_classes, 2), max(n_classes, 2)).permute(0, 3, 1, 2).float() * 8 - 4
    logits = logits[:, 1:] if n_classes == 1 else logits
    for channels in (1, 2, 3, 7):
        images = torch.randn(6, channels, 300, 520, generator=generator)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            sheet = prediction_sheet((images.to(dtype), masks[:, None] if channels == 3 else masks, logits.to(dtype).requires_grad_()), ignore_index=255)
            assert sheet.shape == (4 * 100 + 3 * 4, 4 * 174 + 3 * 4, 3) and sheet.dtype == "uint8"
    assert prediction_sheet((images, masks, logits[:, :, :7])) is None


def test_pictures_stay_cheap(tmp_path, monkeypatch):
    "A sheet that takes 20 ms is drawn after the first of 30 quick epochs and at the end"
    calls = []

    def slow(batch, *args, **kwargs):
        time.sleep(0.02)
        calls.append(batch)
        return torch.zeros(4, 4, 3, dtype=torch.uint8).numpy()

    monkeypatch.setattr("unet_nbtrain.tensorboard_logger.prediction_sheet", slow)
    trainer = Trainer(TensorBoardLogger(tmp_path), epochs=30)
    trainer.val_batch = "the batch"
    trainer.train()
    drawn = [step for step, _ in read_back(tmp_path)["validation"]["Predictions"]]
    assert drawn[0] == 1 and drawn[-1] == 30 and len(drawn) <= 3 and set(calls) == {"the batch"}
    trainer.observers = [TensorBoardLogger(tmp_path / "none", images=False)]
    trainer.current_epoch = 0
    trainer.history = History()
    trainer.train()
    assert len(calls) == len(drawn) and "Predictions" not in read_back(tmp_path / "none")["validation"]


def test_a_real_run_and_its_resume(tmp_path, one_thread):
    "Two epochs, two more in another session: both phases under one tag, pictures, settings, and no step twice"
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams import metadata
    from torch.utils.data import DataLoader, TensorDataset

    from unet_nbtrain.trainer import UNetTrainer
    from unet_nbtrain.unet_model import UNet

    images = torch.rand(8, 1, 32, 32)
    train, val = (DataLoader(TensorDataset(part, (part > 0.6).float()), batch_size=2) for part in images.split((4, 4)))
    before = set(threading.enumerate())

    def trainer():
        return UNetTrainer(UNet(1, 1, width=4, depth=2), train, val, run_dir=tmp_path, device="cpu", seed=3)

    trainer().train(3)
    trainer().train(5, resume=tmp_path / "checkpoints" / "last.pth")
    shown = read_back(tmp_path / "tensorboard")
    assert set(shown) == {"train", "validation"} and not doubled(tmp_path / "tensorboard")
    for tag in ("Loss", "Dice", "IoU", "Accuracy"):
        assert steps(tmp_path / "tensorboard", tag) == [1, 2, 3, 4, 5]
    assert {"LearningRate", "Time/seconds_per_epoch", "Time/images_per_second", "Time/data_wait", "GradientNorm"} <= set(shown["train"])
    assert not any("Memory" in tag for tag in shown["train"])
    assert {1, 3, 5} <= {step for step, _ in shown["validation"]["Predictions"]}
    content = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload().PluginRunToTagToContent("hparams")["validation"]
    told = metadata.parse_session_start_info_plugin_data(content["_hparams_/session_start_info"]).hparams
    assert told["seed"].number_value == 3 and told["model"].string_value == "UNet" and told["batch_size"].number_value == 2
    assert set(threading.enumerate()) == before
    history = History.load(tmp_path / "history.json")
    assert [value for _, value in shown["validation"]["Loss"]] == pytest.approx(history["val_losses"])


FULL_DISK = """
import logging, resource, signal, sys, threading
sys.path.insert(0, sys.argv[2])
from heard import Heard
from test_loggers import Observers, TensorBoardLogger, Trainer, row, steps
logging.disable(logging.CRITICAL)
threading.excepthook = lambda args: None
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trainer, before = Trainer(), set(threading.enumerate())
trainer.observers = observers = Observers([TensorBoardLogger(sys.argv[1]), told := Heard()])
observers.notify("on_run_start", trainer)
most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2500, most[1]))
for epoch in range(1, 60):
    trainer.history.append(row(epoch))
    observers.notify("on_epoch_end", trainer, row(epoch))
    if told.problems and sys.argv[3] == "free":
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
observers.notify("on_run_end", trainer, "done")
left = set(threading.enumerate()) - before
assert len(observers) == 2 and not left and len(told.problems) == 1 and "tried each minute" in told.problems[0], (told.problems, left)
if sys.argv[3] == "free":
    assert steps(sys.argv[1]) == list(range(1, 60))
"""


@pytest.mark.skipif(os.name != "posix", reason="a limit on the size of files")
@pytest.mark.parametrize("later", ["full", "free"])
def test_a_full_disk_is_told_once_and_asked_again(tmp_path, later):
    "The files may not grow past 2,500 bytes: no thread is left, and where there is room again at the end of the run, nothing is missing"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path), os.path.dirname(__file__), later], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    before, trainer = set(threading.enumerate()), Trainer()
    trainer.observers = observers = Observers([TensorBoardLogger(tmp_path / "file"), told := Heard()])
    observers.notify("on_run_start", trainer)
    observers.notify("on_epoch_end", trainer, row(1))
    observers.notify("on_run_end", trainer, "done")
    assert len(observers) == 2 and len(told.problems) == 1 and set(threading.enumerate()) == before


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_loggers import Trainer, TensorBoardLogger, RunLog, HistoryFiles
folder = sys.argv[1]
class First:
    def on_epoch_end(self, trainer, row): self.began = time.monotonic()
class Last:
    def on_epoch_end(self, trainer, row): print(row["epoch"], first.began, time.monotonic(), flush=True)
first, each, paced = First(), HistoryFiles(folder), HistoryFiles(folder + "/paced")
each.pace.longest, paced.pace.longest = 0.0, 0.2  # As with long epochs, and as with short ones
Trainer(first, TensorBoardLogger(folder + "/tb"), RunLog(folder + "/log.jsonl"), each, paced, Last(), epochs=10**6).train()
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_after_kill_9_everything_that_was_reported_is_on_disk(tmp_path):
    "`history.json` of short epochs may be behind, but by no more than the longest rest of its pace"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True)
    began, ended = {}, {}
    for line in process.stdout:
        epoch, *times = map(float, line.split())
        began[epoch], ended[epoch] = times
        if epoch >= 25 and began[epoch] > ended[1] + 0.6:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(History.load(tmp_path / "history.json")) >= epoch
    paced = len(History.load(tmp_path / "paced" / "history.json"))
    assert paced >= epoch or began[epoch] < ended[paced] + 0.2
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


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["bar", "lines"])
def test_a_batch_between_two_drawings_costs_a_look_at_the_clock(stream):
    "A thousand batches: each calls the bar and the clock and nothing else, and nothing is written"
    trainer, loss = Trainer(), torch.tensor(0.5)
    bar = ProgressBar(stream=stream, interval=3600)
    bar.on_run_start(trainer)
    bar.on_epoch_start(trainer)
    written = stream.tell()
    with Calls() as called:
        for _ in range(1000):
            bar.on_batch_end(trainer, loss)
    assert 1000 <= len(called) <= 2001 and stream.tell() == written
    bar.on_run_end(trainer, "")


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
    caplog.set_level(logging.DEBUG, logger="unet_nbtrain")
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
    code = ("import sys, torch\nby_torch = {m.split('.')[0] for m in sys.modules}\nfrom unet_nbtrain.loggers import *\n"
            "bar, board = ProgressBar(), TensorBoardLogger('x')\n"
            "print(sorted({m.split('.')[0] for m in sys.modules} & {'tqdm', 'tensorboard', 'matplotlib', 'ipywidgets', 'IPython'} - (by_torch & {'tqdm'})))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# Logging for people


CONSOLE = """
import logging, sys
if "root" in sys.argv:
    logging.basicConfig(level=logging.INFO, format="ROOT %(message)s")
if "file" in sys.argv:
    logging.getLogger().addHandler(logging.FileHandler(sys.argv[1]))
root = logging.getLogger()
before = root.level, list(root.handlers), root.disabled
from unet_nbtrain.run_log import configure_logging, is_on_console
for _ in range(3):
    logger = configure_logging("INFO")
logging.getLogger("unet_nbtrain.trainer").info("word one")
logging.getLogger("unet_nbtrain").debug("detail")
logging.getLogger("other").info("word two")
assert is_on_console()
configure_logging(None)
logging.getLogger("unet_nbtrain.trainer").info("word three")
assert (root.level, root.handlers, root.disabled) == before and not logger.handlers and logger.propagate
"""


PROGRAMS = "plain", "root", "file", "root file"
FORKING = """
import os, sys, torch
code, folder, *programs = sys.argv[1:]
for program in programs:
    if os.fork() == 0:
        sys.argv = ["", f"{folder}/{program}.log", *program.split()]
        os.dup2(os.open(f"{folder}/{program}.err", os.O_WRONLY | os.O_CREAT), 2)
        exec(code)
        break
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    "Four programs with their output in a folder, forked by one that has imported PyTorch for all"
    folder = tmp_path_factory.mktemp("programs")
    subprocess.run([sys.executable, "-c", FORKING, CONSOLE, folder, *PROGRAMS], check=True)
    return folder


@pytest.mark.parametrize("root", PROGRAMS)
def test_no_line_twice_and_the_root_logger_untouched(programs, root):
    "A plain program, one with a console handler on the root, one with a file handler there, one with both"
    shown = (programs / f"{root}.err").read_text()
    lines = shown.splitlines()
    assert [line.endswith("word one") for line in lines].count(True) == 1 and "detail" not in shown
    wanted = 3 if "root" in root else 1
    assert len(lines) == wanted and all(line.startswith("ROOT") == ("root" in root) for line in lines)
    if "file" in root:
        assert (programs / f"{root}.log").read_text().splitlines().count("word one") == 1


def test_records_go_to_a_file_as_lines_of_json(tmp_path):
    path = tmp_path / "deep" / "train.jsonl"
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    try:
        for _ in range(2):
            logger = configure_logging("DEBUG", file=path)
        logging.getLogger("unet_nbtrain.x").debug("a\nb %s", "\udc80")
        assert is_on_console(logging.DEBUG) and len(logger.handlers) == 2
        with pytest.raises(ValueError, match="is not a level"):
            configure_logging("LOUD")
        with pytest.raises(OSError):
            configure_logging(file=tmp_path)
        assert len(logger.handlers) == 2
    finally:
        configure_logging(None)
    logging.getLogger("unet_nbtrain.x").warning("after")
    [line] = path.read_text().splitlines()
    assert {key: json.loads(line)[key] for key in ("level", "logger", "message")} == {"level": "DEBUG", "logger": "unet_nbtrain.x", "message": "a\nb \udc80"}
    assert not logger.handlers and (root.level, root.handlers) == before


def test_the_bar_leaves_its_lines_to_a_log_on_the_screen(tmp_path, capsys):
    "Each epoch and each problem is told once, with and without the log"
    for log in (False, True):
        try:
            if log:
                configure_logging()
            trainer = Trainer(ProgressBar(), RunLog(tmp_path / "log.jsonl"), epochs=2)
            trainer.train()
            trainer.tell("on_problem", "one image is broken")
            Trainer(ProgressBar(), epochs=1).train()
        finally:
            configure_logging(None)
        text = capsys.readouterr().err
        assert [text.count(words) for words in ("epoch 1/2", "epoch 2/2", "one image is broken", "epoch 1/1")] == [1, 1, 1, 1]


def test_a_bar_in_a_cell_is_one_output_that_is_replaced(monkeypatch):
    "A kernel's stream and shell, simulated: the drawings replace each other, only lines are printed"
    told = []

    def publish(data, metadata, *, transient, update):
        told.append((data["text/plain"], transient["display_id"], update))

    shell = types.SimpleNamespace(kernel=object(), display_pub=types.SimpleNamespace(publish=publish))
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    out = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    Trainer(ProgressBar(stream=out, interval=0), epochs=3).train("all done")
    assert out.getvalue().splitlines() == [epoch_line(row(epoch), 3) for epoch in (1, 2, 3)]
    assert len(told) > 20 and [update for _, _, update in told] == [False] + [True] * (len(told) - 1)
    assert len({name for _, name, _ in told}) == 1 and told[-1][0] == "all done" and all(text for text, _, _ in told)
