"""What a user hands to a trainer: each slip is named before any work, with what would be right. Numbers are those of the fault table."""

import logging
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from unet_nbtrain import EarlyStopping, UNetTrainer, create_loss_function, create_optimizer, create_scheduler

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self, n_classes=1, outputs=None):
        super().__init__()
        self.n_classes, self.layer = n_classes, nn.Conv2d(1, outputs or n_classes, 3, padding=1)

    def forward(self, images):
        return self.layer(images)


def data(n=10, n_classes=1):
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))
    masks = (images[:, 0] * max(n_classes, 2)).long()
    return images, masks[:, None].float() if n_classes == 1 else masks


def batches(n=10, n_classes=1):
    images, masks = data(n, n_classes)
    return list(zip(images.split(2), masks.split(2), strict=True))


@pytest.fixture
def make(tmp_path):
    """A trainer of five batches that writes into a folder of this test"""

    def make(model=None, train=None, val=None, **options):
        n_classes = getattr(model, "n_classes", 1)
        train, val = train or batches(10, n_classes), val or batches(4, n_classes)
        return UNetTrainer(model or Net(), train, val, **{"device": "cpu", "run_dir": tmp_path / "run", "observers": []} | options)

    return make


def nothing_was_written(tmp_path):
    return not (tmp_path / "run").exists()


@pytest.mark.parametrize("lr", [math.nan, math.inf, -1.0, 0, "1e-3", True])
def test_001_a_learning_rate_that_is_none(make, tmp_path, lr):
    with pytest.raises(ValueError, match="lr must be a number, greater than 0"):
        make(lr=lr)
    trainer = make()
    with pytest.raises(ValueError, match=r"lr must be .*; got"):
        trainer.set("lr", lr)
    assert trainer.learning_rate == 1e-3 and nothing_was_written(tmp_path)
    if lr != 0:
        with pytest.raises(ValueError, match="lr must be a finite number"):
            create_optimizer(Net(), lr=lr)


@pytest.mark.parametrize("epochs", [0, -1, 2.5, "3", None, True])
def test_002_a_number_of_epochs_that_is_none(make, tmp_path, epochs):
    trainer = make()
    for begin in (trainer.train, trainer.start):
        with pytest.raises(ValueError, match="epochs must be a whole number, at least 1; got"):
            begin(epochs)
    assert nothing_was_written(tmp_path) and trainer.run is None
    assert len(trainer.train(np.int64(1))) == 1


def test_003_patience_and_min_delta(make, tmp_path):
    for patience in (0, -1, 1.5, "5"):
        with pytest.raises(ValueError, match="patience=.*whole number of validations, 1 or more"):
            make(early_stopping_patience=patience)
    with pytest.raises(ValueError, match="min_delta must be a number, at least 0; got -1"):
        make(min_delta=-1)
    assert nothing_was_written(tmp_path)


@pytest.mark.parametrize(("option", "word", "meant"), [("optimizer", "adamm", "adam"), ("scheduler", "platau", "plateau"), ("criterion", "dise", "dice")])
def test_004_a_name_that_is_misspelt(make, option, word, meant):
    with pytest.raises(ValueError, match=f"(?i)'{word}'.*did you mean '{meant}'.*known"):
        make(**{option: word})


def test_005_a_keyword_of_another_schedule():
    optimizer = create_optimizer(Net())
    with pytest.raises(TypeError, match="'step' does not take 'T_max'. It takes: step_size, gamma"):
        create_scheduler(optimizer, "step", T_max=3)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_006_a_schedule_that_is_shorter_than_the_training(make):
    """The rate stays at the end of the schedule; it never climbs again, and nothing runs over its length"""
    with pytest.raises(ValueError, match=r"total_steps=num_epochs \* len\(train_loader\)"):
        make(scheduler="onecycle")
    for name, options in {"onecycle": {"total_steps": 6}, "cosine": {"T_max": 1}}.items():
        model = Net()
        optimizer = create_optimizer(model)
        trainer = make(model, optimizer=optimizer, scheduler=create_scheduler(optimizer, name, **options))
        rates = trainer.train(4)["learning_rates"]
        assert rates[2] == rates[3] == min(rates) and trainer.current_epoch == 4


def test_007_a_metric_that_does_not_exist(make):
    with pytest.raises(ValueError, match="'dise' is not known. Did you mean 'dice'.*Known: loss, dice"):
        EarlyStopping(3, monitor="dise")
    trainer = make()
    trainer.early_stopping = EarlyStopping(3, monitor="surface", mode="min")
    with pytest.raises(ValueError, match="no metric 'surface'; it has: loss, dice, iou"):
        trainer.train(2)
    trainer.early_stopping = EarlyStopping(3, monitor="dice")
    assert len(trainer.train(1)) == 1


@pytest.mark.parametrize(("monitor", "mode"), [("dice", "min"), ("loss", "max"), ("per_class.iou.1", "min")])
def test_008_the_wrong_direction(monitor, mode):
    with pytest.raises(ValueError, match=f"mode='{mode}' contradicts monitor='{monitor}'.*Leave mode out"):
        EarlyStopping(3, monitor=monitor, mode=mode)
    assert EarlyStopping(3, monitor=monitor).mode != mode


def test_009_class_weights_of_another_number():
    with pytest.raises(ValueError, match="class_weights has 2 values, but n_classes=3 needs one for each class"):
        create_loss_function(3, class_weights=[1, 2])
    with pytest.raises(ValueError, match="n_classes=1 needs one number"):
        create_loss_function(1, class_weights=[1, 2])


def test_010_no_weight_for_what_there_is(make):
    """All weights zero are refused; weights of zero for all pixels of an epoch leave the weights of the model alone"""
    with pytest.raises(ValueError, match="class_weights must be .* not all zero"):
        create_loss_function(3, class_weights=[0, 0, 0])
    images, background = data(4)[0], torch.zeros(4, 8, 8).long()
    model = Net(3)
    before = model.layer.weight.clone()
    trainer = make(model, [(images, background)], batches(4, 3), criterion=create_loss_function(3, class_weights=[0, 1, 1]), lr=0.1, amp=False)
    trainer.optimizer = create_optimizer(model, "sgd", lr=0.1)
    with pytest.raises(ValueError, match="No pixel of the training masks counts: .* class has the weight 0"):
        trainer.train(1)
    assert torch.equal(model.layer.weight, before) and trainer.current_epoch == 0


def test_011_cross_entropy_over_one_class(make, tmp_path):
    for criterion in (nn.CrossEntropyLoss(), nn.NLLLoss()):
        with pytest.raises(ValueError, match="does not fit n_classes=1.*loss 0 for ever.*'bce'"):
            make(criterion=criterion)
    with pytest.raises(ValueError, match="'ce' does not fit n_classes=1"):
        make(criterion="ce")
    assert nothing_was_written(tmp_path)


@pytest.mark.parametrize(("n_classes", "outputs"), [(3, 2), (3, 4), (1, 2)])
def test_012_a_model_with_other_outputs_than_classes(make, n_classes, outputs):
    model = Net(n_classes, outputs)
    before = model.layer.weight.clone()
    trainer = make(model, batches(10, n_classes), batches(4, n_classes))
    with pytest.raises(ValueError, match=rf"n_classes={n_classes} needs logits of shape \(N, {n_classes}, H, W\), got \(2, {outputs}, 8, 8\)"):
        trainer.train(1)
    assert torch.equal(model.layer.weight, before) and trainer.global_step == 0 and trainer.run.state == "failed"


@pytest.mark.parametrize("norm", [0, -1, math.nan, "1"])
def test_013_a_clip_norm_that_is_none(make, norm):
    with pytest.raises(ValueError, match="gradient_clip_norm must be a number, greater than 0, or None"):
        make(gradient_clip_norm=norm)
    trainer = make(gradient_clip_norm=2.0)
    with pytest.raises(ValueError, match="gradient_clip_norm"):
        trainer.gradient_clip_norm = norm
    assert trainer.gradient_clip_norm == 2.0


def test_014_accumulation(make):
    for number in (0, -1, 1.5):
        with pytest.raises(ValueError, match="accumulate_gradients must be a whole number, at least 1"):
            make(accumulate_gradients=number)
    trainer = make(accumulate_gradients=100)
    trainer.train(2)
    assert trainer.global_step == 2, "more batches than the epoch has: one step an epoch"


@pytest.mark.parametrize("name", ["save_every_n_epochs", "save_every_n_steps", "save_every_n_minutes", "save_top_k", "keep_epochs"])
def test_015_a_save_every_nothing(make, name):
    with pytest.raises(ValueError, match=f"{name} must be .*, or None; got 0"):
        make(**{name: 0})


@pytest.mark.parametrize("device", ["gpu", "tpu", "cuda:77", None, 3])
def test_016_a_device_that_is_not_here(make, device):
    with pytest.raises(ValueError, match=r"device=.* is not .*Use 'auto' or one of: .*cpu"):
        make(device=device)


def test_017_a_precision_that_the_device_has_not(make):
    with pytest.raises(ValueError, match="amp='fp16' needs a GPU.*amp='bf16'"):
        make(amp="fp16")
    with pytest.raises(ValueError, match="amp='int8' is not known"):
        make(amp="int8")


def test_018_an_optimizer_with_nothing_to_train(make, tmp_path):
    with pytest.raises(ValueError, match="parameters of another model. Make it after the model"):
        make(optimizer=create_optimizer(Net()))
    model = Net()
    trainer = make(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="All 2 parameters of the optimizer are frozen"):
        trainer.train(1)
    with pytest.raises(ValueError, match="All parameters of the Net are frozen"):
        make(model)
    assert nothing_was_written(tmp_path)
    model.layer.bias.requires_grad_(True)
    before = model.layer.weight.clone()
    trainer.train(1)
    assert torch.equal(model.layer.weight, before)


class Stream(IterableDataset):
    def __iter__(self):
        yield from batches(6)


@pytest.mark.parametrize("name", ["train_loader", "val_loader"])
def test_019_a_loader_that_is_none(tmp_path, name):
    def with_it(loader):
        loaders = {"train_loader": batches(4), "val_loader": batches(4)} | {name: loader}
        return UNetTrainer(Net(), **loaders, device="cpu", run_dir=tmp_path / "run", observers=[])

    dataset = TensorDataset(*data(4))
    wrong = {"empty after one epoch": iter(batches(4)), r"DataLoader\(dataset": dataset, "create_dataloaders": "images/", "is a int": 5, "a Tensor": data(4)[0]}
    for words, loader in wrong.items():
        with pytest.raises(TypeError, match=f"{name}.*{words}"):
            with_it(loader)
    for empty in ([], DataLoader(dataset, 8, drop_last=True)):
        with pytest.raises(ValueError, match=f"{name} has no batch.*drop_last"):
            with_it(empty)
    assert nothing_was_written(tmp_path)
    assert len(with_it(DataLoader(Stream(), batch_size=None)).train(2)) == 2


def test_020_validation_on_the_training_images(make, caplog):
    loader = batches(4)
    with caplog.at_level(logging.WARNING):
        assert len(make(None, loader, loader).train(1)) == 1
    assert "the same samples" in caplog.text
    caplog.clear()
    make()
    assert not caplog.records


@pytest.mark.parametrize("folder", ["file", "file/in", "a\0b", "x" * 300, "/proc/nowhere"])
def test_021_a_folder_into_which_nothing_can_be_written(make, tmp_path, folder):
    (tmp_path / "file").write_text("mine")
    trainer = make(checkpoint_dir=tmp_path / folder)
    before = trainer.model.layer.weight.clone()
    for begin in (trainer.train, trainer.start):
        with pytest.raises(ValueError, match="checkpoint_dir=.*cannot be used: .*choose another folder"):
            begin(1)
    assert (tmp_path / "file").read_text() == "mine" and torch.equal(trainer.model.layer.weight, before)
    trainer.checkpoint_dir = tmp_path / "good" / "deep"
    assert len(trainer.train(1)) == 1 and {p.name for p in trainer.checkpoint_dir.iterdir()} >= {"last.pth", "best_model.pth"}


def test_022_settings_that_change_while_it_runs(make):
    class Changes:
        def on_batch_end(self, trainer, loss):
            if trainer.phase == "train" and trainer.global_step == 3:
                self.asked = [trainer.run.set("lr", 0.02), trainer.run.set("epochs", 3), trainer.run.set("batch_size", 4)]

    watch = Changes()
    trainer = make(observers=[watch])
    trainer.train(1)
    assert [command.ok for command in watch.asked] == [True, True, False] and watch.asked[0].step == 3
    assert "'batch_size' is not a setting" in watch.asked[2].message
    marks = [(mark["step"], mark["text"]) for mark in trainer.history.events if mark["kind"] == "set"]
    assert marks == [(3, "lr 0.001 → 0.02"), (3, "epochs 1 → 3")] and trainer.current_epoch == 3
    assert torch.load(trainer.checkpoint_dir / "last.pth")["settings"] == {"lr": 0.02, "epochs": 3}


def test_024_a_seed_that_is_none(make, tmp_path):
    for seed in (None, 1.5, "7", True):
        with pytest.raises(TypeError, match="seed=.*give a whole number"):
            make(seed=seed)
    assert nothing_was_written(tmp_path)
    for seed in (2**63, 2**80, -1, np.int64(5)):
        trainer = make(seed=seed, run_dir=tmp_path / str(seed))
        trainer.train(1)
        assert torch.load(trainer.checkpoint_dir / "last.pth")["seed"] == int(seed)
