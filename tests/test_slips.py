"""Slips of the hand: what was meant is known, and said in a sentence at once."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from unet_nbtrain import TrainerPanel, UNet, UNetTrainer

BATCHES = [(torch.rand(2, 3, 16, 16), torch.ones(2, 1, 16, 16))]


def trainer_of(tmp_path=None, kind=UNetTrainer, **options):
    return kind(UNet(3, 1, width=4, depth=1), BATCHES, BATCHES, device="cpu", observers=(), run_dir=tmp_path and tmp_path / "run", **options)


def panel_of(**options):
    return TrainerPanel(UNet(3, 1, width=4, depth=1), (BATCHES, BATCHES), device="cpu", **options)


# Attributes


def test_settings_that_live_elsewhere_can_be_assigned():
    """They made new attributes, which nobody read"""
    trainer = trainer_of()
    trainer.lr, trainer.min_delta, trainer.early_stopping_patience = 0.5, 0.1, 3
    assert trainer.learning_rate == trainer.lr == 0.5
    assert (trainer.early_stopping.patience, trainer.early_stopping.min_delta) == (trainer.patience, trainer.min_delta) == (3, 0.1)
    assert trainer.changed_settings == {"lr": 0.5, "min_delta": 0.1, "patience": 3}
    with pytest.raises(ValueError, match="patience must be"):
        trainer.patience = 0


@pytest.mark.parametrize("name, meant", [("save_every_n_epoch", "save_every_n_epochs"), ("gradient_clip", "gradient_clip_norm"), ("amp", "settled when it is made")])
def test_an_attribute_that_nobody_reads_is_refused_before_a_run(tmp_path, name, meant):
    trainer = trainer_of(tmp_path)
    setattr(trainer, name, 1)
    with pytest.raises(AttributeError, match=meant):
        trainer.train(1)
    assert trainer.global_step == 0
    delattr(trainer, name)
    assert len(trainer.train(1)) == 1


class Mine(UNetTrainer):
    lr = "my own"

    def __init__(self, *args, **options):
        self.thresholds = [0.3, 0.5]
        super().__init__(*args, **options)
        self.gradient_clip = 1


def test_a_class_of_somebodys_own_may_have_any_attribute(tmp_path):
    trainer = trainer_of(tmp_path, Mine)
    trainer.note = "the third try"
    assert len(trainer.train(1)) == 1 and trainer.lr == "my own"


# Parts


@pytest.mark.parametrize(
    "options, told",
    [
        ({"criterion": nn.BCEWithLogitsLoss}, r"criterion=BCEWithLogitsLoss\(\)"),
        ({"criterion": 5}, "criterion is a int"),
        ({"criterion": [nn.BCEWithLogitsLoss()]}, "criterion is a list"),
        ({"criterion": nn.BCEWithLogitsLoss(reduction="none")}, "reduction='mean'"),
        ({"optimizer": torch.optim.Adam}, r"optimizer=Adam\(model.parameters\(\)\)"),
        ({"optimizer": 5}, "optimizer is a int"),
        ({"scheduler": StepLR}, r"scheduler=StepLR\(optimizer"),
        ({"scheduler": 5}, "scheduler is a int"),
        ({"scheduler": lambda epoch: 0.1}, "scheduler is a function"),
    ],
)
def test_a_part_that_is_none_is_refused_when_it_is_given_or_before_the_run(tmp_path, options, told):
    with pytest.raises((TypeError, ValueError), match=told):
        trainer_of(**options)
    trainer = trainer_of(tmp_path)
    vars(trainer).update(options)
    with pytest.raises((TypeError, ValueError), match=told):
        trainer.train(1)
    assert trainer.run is None


def test_names_of_parts_are_taken_after_the_construction_too(tmp_path):
    """`'str' object has no attribute 'param_groups'`"""
    trainer = trainer_of(tmp_path)
    trainer.criterion, trainer.optimizer, trainer.scheduler = "dice", "adam", "step"
    trainer.train(1)
    assert type(trainer.optimizer) is torch.optim.Adam and type(trainer.scheduler) is StepLR and callable(trainer.criterion)


# The panel


@pytest.mark.parametrize("number", [0, "5", None, -3, 2.5, True])
def test_a_panel_refuses_what_is_no_number_of_epochs(number):
    """It was taken, and the panel logged tracebacks for ever after"""
    with pytest.raises(ValueError, match="num_epochs must be a whole number, at least 1"):
        panel_of(num_epochs=number)


def test_a_panel_wants_a_trainer_that_was_made():
    with pytest.raises(TypeError, match="trainer is UNetTrainer: give a trainer that was made"):
        TrainerPanel(trainer=UNetTrainer)


def test_start_of_a_panel_takes_no_number():
    """start(7) meant resume=True, and trained the epochs of the panel"""
    panel = panel_of(num_epochs=1)
    with pytest.raises(TypeError, match="num_epochs"):
        panel.start(7)
    assert panel.trainer.run is None


@pytest.mark.parametrize("wrong", [(5, str), (None, str), ("A", 5)])
def test_a_wrong_tab_leaves_the_others(wrong):
    """The list had it and the widget did not, so each later tab was refused too"""
    panel = panel_of(num_epochs=1)
    before = len(panel._widgets.tabs.widget.children)
    with pytest.raises(TypeError, match="function that gives its markup"):
        panel.add_tab(*wrong)
    panel.add_tab("Mine", lambda: "x")
    assert len(panel._widgets.tabs.widget.children) == before + 1 and panel._widgets.tabs.widget.get_title(before) == "Mine"


SCRIPT = """
import time
import torch
from unet_nbtrain import TrainerPanel, UNet

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        time.sleep(0.2)
        for _ in range(300):
            x = torch.rand(3, 64, 64)
        return x, torch.ones(1, 64, 64)

loader = torch.utils.data.DataLoader(Slow(), batch_size=4)
panel = TrainerPanel(UNet(3, 1, width=16), (loader, loader), device="cpu")
panel.show()
"""


def test_a_script_that_ends_with_a_panel_ends_well(tmp_path):
    """terminate called without an active exception: the trial was at work in C++ when the interpreter went"""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
