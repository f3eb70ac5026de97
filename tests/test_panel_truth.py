"""What the panel says is so: of runs that were refused or given up, of another training, of the weights in the model."""

import time

import pytest
import torch

from unet_nbtrain import TrainerPanel, UNet, demo_dataloaders
from unet_nbtrain.checkpoint import CheckpointError

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
