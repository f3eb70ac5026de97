"""Every control of the panel in every state: what can be pressed, why not, what it does, and that a change survives a resume."""

import time

import pytest
import torch

from unet_nbtrain import TrainerPanel, UNet, demo_dataloaders
from unet_nbtrain.settings_form import FIELDS

LOADERS = demo_dataloaders(n_train=8, n_val=4, size=32, batch_size=2, augment=None)
VALUES = {"lr": "2e-4", "epochs": "7", "patience": "3", "min_delta": "0.01", "gradient_clip_norm": "1.5", "accumulate_gradients": "2",
          "threshold": "0.4", "save_every_n_epochs": "2", "save_every_n_minutes": "9"}  # fmt: skip


class Slow:
    """Gives a person time to press something"""

    def on_batch_end(self, trainer, loss):
        time.sleep(0.02)


def new_panel(folder, **options):
    torch.manual_seed(0)
    options = {"num_epochs": 500, "device": "cpu", "run_dir": folder, "observers": [Slow()], **options}
    return TrainerPanel(UNet(3, 1, width=4, depth=2), LOADERS, **options)


def until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.01)


@pytest.fixture
def panel(tmp_path):
    panel = new_panel(tmp_path / "run")
    panel.show()
    yield panel
    if panel.trainer.run is not None:
        panel.trainer.run.stop()
        panel.trainer.run.wait(60)
    panel._pump.close()
    panel._pump.thread.join(60)


def pressable(panel):
    panel._paint(False)
    return {name for name, button in panel.controls.items() if not button.disabled}


def note(panel):
    return panel._widgets.buttons.note.value


def test_what_can_be_pressed_in_each_state_and_why_not(panel):
    """A button that cannot be pressed says why as its tooltip"""
    controls = panel.controls
    assert pressable(panel) == {"primary"}
    assert all("no training going on" in controls[name].tooltip for name in ("stop", "save")) and "no best epoch" in controls["best"].tooltip
    assert "no checkpoint" in controls["rewind"].tooltip and "Press Start" in controls["more"].tooltip

    controls["primary"].click()
    until(lambda: "Started: the first batch is through" in note(panel), "answer to Start")
    assert pressable(panel) == {"primary", "stop", "save"} and controls["primary"].description == "Pause"
    assert all("Stop it first" in controls[name].tooltip for name in ("best", "rewind")) and "under Settings" in controls["more"].tooltip

    controls["primary"].click()
    until(lambda: "Paused after step" in note(panel), "answer to Pause")
    assert pressable(panel) == {"primary", "stop", "save"} and controls["primary"].description == "Resume"
    controls["save"].click()
    until(lambda: "Saved after step" in note(panel), "answer to Save")
    controls["primary"].click()
    until(lambda: panel.trainer.current_epoch >= 2, "second epoch")
    controls["stop"].click()
    until(lambda: panel.trainer.run.ended, "end")
    until(lambda: pressable(panel) == {"primary", "best", "more", "rewind"}, "calm buttons")
    assert all("no training going on" in controls[name].tooltip for name in ("stop", "save")) and controls["primary"].description == "Continue"


def test_a_start_is_heard_at_once_and_answered_by_the_first_batch(tmp_path):
    """From the press on the panel says 'starting', through the look at the masks and until a batch is through"""

    class Patient:
        def on_run_start(self, trainer):
            until(lambda: "starting" in seen, "painted 'starting'")

    panel, seen = new_panel(tmp_path / "run", observers=[Patient()], num_epochs=1), []
    paint, head = panel._paint, panel._widgets.html["header"]
    panel._paint = lambda *args, **options: (paint(*args, **options), seen.append("starting") if ">starting …<" in head.value else None)
    panel.show()
    panel.controls["primary"].click()
    panel.wait(60)
    until(lambda: ">finished<" in head.value, "end")
    assert "starting" in seen and "start" not in panel._asked.pending()
    panel._pump.close()


def test_the_epochs_after_the_end(panel):
    """Continue for some more epochs, go back to a checkpoint, load the best; after an early stop 'Continue anyway'"""
    panel.num_epochs = 2
    panel.start()
    assert panel.wait(60)
    panel._widgets.buttons.more.value = 1
    until(lambda: "more" in pressable(panel), "Train on")
    panel.controls["more"].click()
    assert panel.wait(60) and panel.trainer.current_epoch == 3
    panel._paint(False, everything=True)
    panel._menu.menu.value = "best_model.pth"
    panel.controls["rewind"].click()
    assert "Rewound: best_model.pth" in panel._asked.line and panel.trainer.current_epoch <= 3
    panel.controls["best"].click()
    assert panel._asked.line.startswith("Best weights loaded")

    panel.set("patience", 1)
    panel.set("min_delta", 100.0)
    panel.train_more(20)
    assert panel.wait(60) and panel.trainer.early_stopping.should_stop
    panel._paint(False)
    assert panel.controls["primary"].description == "Continue anyway"
    before = panel.trainer.current_epoch
    panel.controls["primary"].click()
    until(lambda: panel.trainer.run.ended and panel.trainer.current_epoch > before, "epoch more")


def test_every_setting_is_a_mark_a_row_and_survives_a_resume(tmp_path):
    """Typed while a run goes on: applied, marked, told in the log, saved, and there again in a new process's panel"""
    assert set(VALUES) == set(FIELDS)
    panel = new_panel(tmp_path / "run")
    panel.show()
    panel.start()
    until(lambda: panel.trainer.global_step > 0, "first step")
    for name, text in VALUES.items():
        panel.form.fields[name].value = text
    until(lambda: len(panel.trainer.changed_settings) == len(VALUES), "all changes")
    assert panel.stop().wait(60) and panel.wait(60)
    panel._pump.close()
    marks = [event["text"] for event in panel.history.events if event["kind"] == "set"]
    assert [text.split()[0] for text in marks] == list(VALUES)
    panel._paint(True, everything=True)
    log = panel._widgets.tabs._tabs[6][0]._html.value
    assert all(text.split()[0] in log for text in marks) and "lr 0.001 → 0.0002" in log

    later = new_panel(tmp_path / "run")
    later.trainer.load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pth")
    later.form.paint(later.trainer)
    there = {"lr": later.trainer.learning_rate, "epochs": later.trainer.total_epochs, "patience": later.trainer.early_stopping.patience, "min_delta": later.trainer.early_stopping.min_delta}
    there |= {name: getattr(later.trainer, name) for name in VALUES if name not in there}
    assert there == {name: float(text) for name, text in VALUES.items()}
    assert [event["text"] for event in later.history.events if event["kind"] == "set"] == marks


def test_a_wrong_value_changes_nothing(panel):
    """Neither the wrong one nor, by Apply, the right ones beside it"""
    panel.form.fields["patience"].value = "soon"
    panel.form._lines["lr"].field.unobserve_all()
    panel.form.fields["lr"].value = "5e-4"
    assert panel.form.apply() is False
    assert panel.trainer.learning_rate == 1e-3 and panel.trainer.changed_settings == {} and not panel.history.events
    panel.form.fields["patience"].value = "4"
    assert panel.form.apply() is True and panel.trainer.learning_rate == 5e-4 and panel.trainer.early_stopping.patience == 4
