"""What the panel says is so: of runs that were refused or given up, of another training, of the weights in the model."""

import time

import pytest
import torch

from unet_nbtrain import TrainerPanel, UNet, demo_dataloaders
from unet_nbtrain.checkpoint import CheckpointError
from unet_nbtrain.watcher import Pump, Watcher

LOADERS = demo_dataloaders(n_train=8, n_val=4, size=32, batch_size=2, augment=None)


class Slow:
    """A training that lasts"""

    def on_batch_end(self, trainer, loss):
        time.sleep(0.02)


class Falling(UNet):
    """A model whose outputs are NaN from when somebody says so, in training or in validation"""

    bad_training = bad_validation = False

    def forward(self, x):
        return super().forward(x) * (float("nan") if (self.bad_training if self.training else self.bad_validation) else 1)


def new_panel(folder, model=None, num_epochs=500, **options):
    torch.manual_seed(0)
    return TrainerPanel(model or UNet(3, 1, width=4, depth=2), LOADERS, num_epochs=num_epochs, device="cpu", run_dir=folder, **options)


def until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.01)


def end(*panels):
    for panel in panels:
        if panel.trainer.run is not None:
            panel.trainer.run.stop()
            assert panel.trainer.run.wait(60)


@pytest.fixture
def running(tmp_path):
    panel = new_panel(tmp_path / "run")
    panel.trainer.observers.add(Slow())
    panel.start()
    until(lambda: len(panel.history) >= 2, "second epoch")
    panel.save().wait(60)
    yield panel
    end(panel)


def test_a_refused_resume_leaves_the_trainer_as_it_was(running, tmp_path):
    """Else the next Continue would go on from the checkpoint of then, over what the first run has written since"""
    second = new_panel(tmp_path / "run")
    for start in (lambda: second.start(), lambda: second.trainer.start(5)):
        with pytest.raises(RuntimeError, match="in use by another trainer"):
            start()
        second._paint(False)
        assert second.trainer.current_epoch == second.trainer.global_step == second.trainer.total_epochs == len(second.history) == 0
    end(running)
    second._paint(False)
    assert len(second._shown[1]) == len(running.history)  # What is shown before the Resume is what is there by now
    second.start()
    end(second)
    assert [row["epoch"] for row in second.history.rows][: len(running.history)] == [row["epoch"] for row in running.history.rows]


def test_a_resume_that_fails_lets_the_folder_go(tmp_path):
    """The next one takes it"""
    panel = new_panel(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.pth").write_bytes(b"torn")
    with pytest.raises(CheckpointError):
        panel.trainer.start(resume="last")
    assert new_panel(tmp_path / "run", num_epochs=1).start(resume=False).wait(60)


def test_the_rate_that_is_told_when_a_run_gives_up(tmp_path):
    """It is the optimizer's, and no mark is left of rates that went with what was tried"""
    model = Falling(3, 1, width=4, depth=2)
    panel = new_panel(tmp_path / "run", model, num_epochs=2, on_nonfinite="rollback")
    assert panel.start().wait(60)
    model.bad_training = True
    run = panel.train_more(3)
    assert run.wait(60) and run.exception is not None
    assert panel.trainer.learning_rate == 0.001 and "checkpoint, with 0.001." in str(run.exception)
    assert [event["text"] for event in panel.history.events if event["kind"] == "set"] == []


def text_of(panel, name="message"):
    panel._paint(True, True)
    return panel._widgets.html[name].value


def test_a_training_beside_is_told_and_can_be_stopped(running, tmp_path):
    """The cell was run twice: without this the first training cannot be reached any more"""
    second = new_panel(tmp_path / "run")
    assert "Another training of this kernel is going on: run, " in text_of(second) and "Resume goes on" not in text_of(second)
    primary, other = second.controls["primary"], second.controls["other"]
    assert primary.disabled and "uses this folder" in primary.tooltip and not other.disabled and other.layout.display is None
    assert "Another training" in text_of(new_panel(tmp_path / "elsewhere")) and "Another training" not in text_of(running)
    other.click()
    assert running.trainer.run.wait(60)
    assert "Another training" not in text_of(second) and "Resume goes on from last.pth" in text_of(second)
    assert not primary.disabled and other.disabled and other.layout.display == "none"


def test_what_is_said_of_the_weights_in_the_model(tmp_path):
    """Of the best ones only where they are there"""
    model = Falling(3, 1, width=4, depth=2)
    model.bad_validation = True
    panel = new_panel(tmp_path / "nan", model, num_epochs=1)
    assert panel.start().wait(60)
    assert "There is no best epoch: the last weights are in the model." in text_of(panel)
    panel = new_panel(tmp_path / "run", num_epochs=2, save_every_n_epochs=1)
    assert panel.start().wait(60)
    assert f"The best weights are in the model, those of epoch {panel.history.best['epoch']}." in text_of(panel)
    panel.rewind("epoch_0001.pth")
    assert "The model is as in epoch_0001.pth." in text_of(panel)
    panel.load_best()
    assert "The best weights are in the model." in text_of(panel)
    with torch.no_grad():
        next(panel.trainer.model.parameters()).zero_()
    assert "in the model" not in text_of(panel)


def test_a_run_that_has_done_all_its_epochs(tmp_path):
    """Nothing is left to resume, and what is shown counts no further than it can; Train on goes on from its end"""
    assert new_panel(tmp_path / "run", num_epochs=2).start().wait(60)
    panel = new_panel(tmp_path / "run", num_epochs=2)
    assert "This folder has a run of 2 epochs. All of it is done." in text_of(panel)
    assert panel.controls["primary"].disabled and not panel.controls["more"].disabled
    panel.num_epochs = 1
    assert panel.start().wait(60)  # As a cell does that is run again
    assert "2 of 2 done" in text_of(panel, "header") and "nothing is left to do, all 2 epochs done" in panel._widgets.buttons.note.value
    panel = new_panel(tmp_path / "run", num_epochs=2)
    panel._widgets.buttons.more.value = 1
    panel.controls["more"].click()
    assert panel.trainer.run.wait(60) and [row["epoch"] for row in panel.history.rows] == [1, 2, 3]
    assert "Started" not in panel._widgets.buttons.note.value or text_of(panel) and "Started" not in panel._widgets.buttons.note.value


def test_problems_of_an_earlier_run_are_for_the_log(tmp_path):
    panel = new_panel(tmp_path / "run", num_epochs=1)
    panel._watcher.on_problem(panel.trainer, "Something of before")
    assert "Something of before" in text_of(panel)
    assert panel.start().wait(60)
    assert "Something of before" not in text_of(panel) and panel._watcher.problems == ["Something of before"]


def test_a_field_follows_and_can_be_sent_again(tmp_path):
    panel = new_panel(tmp_path / "run", num_epochs=1)
    form, trainer = panel.form, panel.trainer
    field = form.fields["lr"]
    field.value = "0.002"
    form.paint(trainer, 1)
    panel.set("lr", 0.096)  # As another button does
    form.paint(trainer, 1)
    assert field.value == "0.096" and form.apply() and trainer.learning_rate == 0.096
    field.value = "0.002"
    assert trainer.learning_rate == 0.002


@pytest.mark.parametrize("press", ["rewind", "primary"])
def test_a_press_that_is_refused_is_told_once(tmp_path, press, caplog):
    """Beside the buttons, and not below as well"""
    first = new_panel(tmp_path / "run", num_epochs=1)
    first.start().wait(60)
    panel = new_panel(tmp_path / "run", num_epochs=2)
    panel._paint(False)
    for file in (tmp_path / "run" / "checkpoints").glob("*.pth"):
        file.write_bytes(b"no checkpoint")
    panel.controls[press].click()
    panel._paint(False)
    said = panel._widgets.buttons.note.value
    assert "Not done" in said and "unt-wrong" in said and "is torn" in said and "is torn" not in text_of(panel), (said, text_of(panel))
    assert not panel._watcher.problems and "A button of the panel failed" in caplog.text


def test_masks_that_cannot_be_right_are_told_once(tmp_path):
    bad = [(image, mask * 255) for images, masks in LOADERS[0] for image, mask in zip(images, masks)]
    panel = TrainerPanel(UNet(3, 1, width=4, depth=2), (torch.utils.data.DataLoader(bad, 2), LOADERS[1]), device="cpu", run_dir=tmp_path / "run")
    panel._check.begin()
    assert panel._check.wait(30) and panel._check.error is not None
    panel._paint(False)
    assert text_of(panel).count("cannot be right") == 1
    panel.controls["primary"].click()
    panel._paint(False)
    assert "Not done (start)" in panel._widgets.buttons.note.value and "cannot be right" not in text_of(panel)


def test_the_first_numbers_are_drawn_at_once():
    """However long the empty picture before them has taken; from then on pictures have their pace"""
    drawn, watcher = [], Watcher()
    pump = Pump(drawn.append, watcher)
    for rows in (False, True, True):
        pump.pictures.postpone(60)
        pump.late.postpone(60)
        watcher.new_rows = rows
        pump._paint(False, False)
    assert drawn == [False, True, False]
