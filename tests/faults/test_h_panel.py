"""What people do with a panel, without a browser: the buttons are pressed as a front end presses them. Numbers are those of the fault table."""

import threading
import time

import ipywidgets as widgets
import pytest
import torch
from process_parts import At, batches, new_trainer

from unet_nbtrain import History, TrainerPanel
from unet_nbtrain.watcher import BatchTrace, Watcher

pytestmark = pytest.mark.usefixtures("one_thread")
SECONDS = 60
ELSEWHERE = {100: "tests/test_interrupts.py::test_interrupts_leave_a_training_in_the_background_alone"}


@pytest.fixture
def panels():
    """Panels that end with the test"""
    made = []

    def make(trainer, num_epochs=3):
        panel = TrainerPanel(trainer=trainer, num_epochs=num_epochs)
        made.append(panel)
        panel.show()
        return panel

    yield make
    for panel in made:
        if panel.trainer.run is not None:
            panel.trainer.run.stop()
            panel.trainer.run.wait(SECONDS)
        panel._pump.close()
        panel._pump.thread.join(SECONDS)


def slow(folder, *observers, **options):
    """A trainer whose steps take long enough to be caught in the act"""
    return new_trainer(str(folder), At("on_batch_end", 0, lambda trainer: time.sleep(0.005)), *observers, **options)


def until(condition, what):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.01)


def press(panel, name):
    panel.controls[name].click()


def finished(folder):
    return torch.load(folder / "checkpoints" / "last.pth", weights_only=True)


def words(panel):
    """All markup of a panel"""
    found, line = [], [panel._widgets.box]
    while line:
        part = line.pop()
        line += getattr(part, "children", ())
        found.append(part.value if isinstance(part, widgets.HTML) else "")
    return " ".join(found)


def test_099_pressed_twice(tmp_path, panels):
    """The second start is the run that is there; a second pause and a second stop change nothing"""
    panel = panels(slow(tmp_path), num_epochs=1000)
    runs = [panel.start(), panel.start()]
    assert runs[0] is runs[1]
    with pytest.raises(RuntimeError, match="already (running|idle|paused). Stop it first"):
        panel.trainer.start(1)
    assert panel.pause().wait(SECONDS) and panel.pause().wait(SECONDS) and panel.trainer.run.state == "paused"
    assert panel.start() is runs[0] and panel.trainer.run.state == "paused"
    assert panel.stop().wait(SECONDS) and runs[0].wait(SECONDS)
    late = panel.stop()
    assert late.done and not late.ok and "has ended" in late.message


def test_099_stopped_before_the_first_batch(tmp_path, panels):
    trainer = slow(tmp_path)
    panel = panels(trainer)
    run = panel.start()
    assert run.stop().wait(SECONDS) and run.wait(SECONDS) and run.exception is None
    assert trainer.global_step <= 2 and finished(tmp_path)["global_step"] == trainer.global_step
    trainer.train(2 - trainer.current_epoch)
    assert trainer.global_step == 10


@pytest.mark.parametrize("phase", ["train", "val"])
def test_099_paused_during_validation_and_saving(tmp_path, panels, phase):
    """A pause in the validation holds there; while paused a save is made; the epoch is counted once"""
    asked = []
    ask = At("on_batch_end", 3, lambda trainer: trainer.phase == phase and not asked and asked.extend([trainer.run.save(), trainer.run.pause()]))
    trainer = slow(tmp_path, ask)
    panel = panels(trainer)
    run = panel.start()
    until(lambda: run.state == "paused", "pause")
    assert trainer.phase == phase and all(command.ok for command in asked)
    assert panel.save().wait(SECONDS) and finished(tmp_path)["global_step"] == trainer.global_step
    press(panel, "primary")
    assert run.wait(SECONDS) and trainer.history["epochs"] == [1, 2, 3] and trainer.global_step == 15


def test_099_resumed_after_an_error(tmp_path, panels):
    """The message of the error is in the panel, and Continue goes on from the last good state"""
    trainer, broken = slow(tmp_path), [True]
    step = trainer.training_step

    def training_step(images, masks):
        if broken and trainer.global_step == 7:
            broken.clear()
            raise RuntimeError("a <broken> image")
        return step(images, masks)

    trainer.training_step = training_step
    panel = panels(trainer)
    run = panel.start()
    assert run.wait(SECONDS) and run.state == "failed" and isinstance(run.exception, RuntimeError)
    until(lambda: "a &lt;broken&gt; image" in words(panel), "message in the panel")
    assert "<broken>" not in words(panel)
    press(panel, "primary")
    until(lambda: panel.trainer.run is not run, "new run")
    assert panel.trainer.run.wait(SECONDS) and trainer.history["epochs"] == [1, 2, 3] and trainer.global_step == 15


def test_099_shown_again_and_two_panels_on_one_trainer(tmp_path, panels):
    """Any number of views of one run: one thread each panel, and both panels say the same"""
    trainer = slow(tmp_path)
    first, second = panels(trainer, 1000), panels(trainer, 1000)
    pumps = [thread for thread in threading.enumerate() if thread.name == "unet-panel" and thread.is_alive()]
    first.show()
    first.show()
    assert [thread for thread in threading.enumerate() if thread.name == "unet-panel" and thread.is_alive()] == pumps
    run = first.start()
    assert second.start() is run
    until(lambda: run.state == "running", "beginning")
    press(second, "primary")
    until(lambda: run.state == "paused", "pause by the second panel")
    until(lambda: {panel.controls["primary"].description for panel in (first, second)} == {"Resume"}, "Resume on both")
    press(first, "stop")
    assert run.wait(SECONDS)
    until(lambda: not {panel.controls["primary"].description for panel in (first, second)} & {"Start", "Pause", "Resume"}, "end on both")


def test_101_a_panel_for_a_run_that_is_over(tmp_path, panels):
    """Opened after the end, by the same trainer or by a new one from the file: the epochs are there"""
    trainer = new_trainer(str(tmp_path))
    trainer.train(2)
    panel = panels(trainer)
    until(lambda: panel.controls["primary"].description not in ("Start", "Pause", "Resume") and panel._widgets.picture.value, "state and picture")
    again = new_trainer(str(tmp_path))
    again.load_checkpoint(tmp_path / "checkpoints" / "last.pth")
    reopened = panels(again)
    assert len(reopened.history) == 2 and reopened.start().wait(SECONDS)
    assert again.history["epochs"][:3] == [1, 2, 3]


def test_102_a_picture_that_cannot_be_drawn(tmp_path, panels, monkeypatch, caplog):
    """Neither the curves of the panel nor the picture at the end stop a training"""

    def fail(*args, **kwargs):
        raise RuntimeError("no display")

    trainer = new_trainer(str(tmp_path))
    panel = panels(trainer)
    monkeypatch.setattr("matplotlib.figure.Figure.draw", fail)
    run = panel.start()
    assert run.wait(SECONDS) and run.exception is None and len(trainer.history) == 3
    assert finished(tmp_path)["epoch"] == 3
    until(lambda: "no display" in caplog.text, "traceback in the log")


def test_103_a_million_batches_and_a_long_history():
    """Memory and text stay bounded: the trace keeps some thousand points, the table its ends and its best"""
    loss, trace, most = torch.tensor(0.5), BatchTrace(), 0
    for i in range(1_000_000):
        trace.add(i / 1000, loss)
        most = max(most, len(trace._new)) if i % 500 == 0 else most
    x, y = trace.read()
    assert most <= 4000 and 1000 < len(x) == len(y) <= 4000 and x == sorted(x) and x[-1] > 990
    history = History()
    history.load_state_dict({"rows": [{"epoch": i, "train": {"loss": 1 / i}, "val": {"loss": 1 / i}} for i in range(1, 3001)], "events": []})
    assert len(history._repr_html_()) < 30_000 and "3000" in history.table()


def nowhere(*args, **kwargs):
    """To a front end that has gone"""
    raise RuntimeError("the page is closed")


def test_104_the_page_is_gone(tmp_path, panels, caplog):
    """Messages that nobody takes end neither the training nor the panel, and nothing piles up for them"""
    trainer = new_trainer(str(tmp_path))
    panel = panels(trainer, 40)
    parts = [*panel._widgets.html.values(), *panel.controls.values(), panel._widgets.picture]
    for part in parts:
        part.send_state = nowhere
    run = panel.start()
    assert run.wait(SECONDS) and run.exception is None and len(trainer.history) == 40
    until(lambda: "the page is closed" in caplog.text, "attempt to reach the page")
    assert panel._pump.thread.is_alive() and finished(tmp_path)["epoch"] == 40
    watcher = Watcher()
    watcher.trace = BatchTrace(limit=100)
    for i in range(10_000):
        trainer.phase = "train"
        watcher.on_batch_end(trainer, torch.tensor(float(i)))
    assert len(watcher.trace._new) <= 101 and len(batches) == 5
