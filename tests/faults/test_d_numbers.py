"""Numbers that are none: they reach neither weights nor files, and they are told. Numbers are those of the fault table."""

import json
import math

import pytest
import torch
from heard import Heard
from torch import nn

from unet_nbtrain import EarlyStopping, UNet, UNetTrainer, create_optimizer, create_scheduler, demo_dataloaders
from unet_nbtrain.checkpoint import load_file
from unet_nbtrain.plots import plot_history

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_HERE = {61: "fp16 with its gradient scaler needs a GPU; the scaler's own skips are PyTorch's"}
LOADERS = demo_dataloaders(n_train=16, n_val=4, size=32, batch_size=4, augment=None)


class Before:
    """Does something to the trainer when a training batch of a number is done"""

    def __init__(self, batch, do):
        self.batch, self.do, self.count = batch, do, 0

    def on_batch_end(self, trainer, loss):
        self.count += trainer.phase == "train"
        if self.count == self.batch and trainer.phase == "train":
            self.do(trainer)


class Broken(torch.utils.data.Dataset):
    """The images of a loader, with one pixel that is no number, perhaps only for a while"""

    def __init__(self, value=math.nan, at=(6,)):
        self.pairs, self.value, self.at = LOADERS[0].dataset, value, at

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        image, mask = self.pairs[index]
        if index in self.at:
            image = image.clone()
            image[0, 3, 3] = self.value
        return image, mask


@pytest.fixture
def make(tmp_path):
    def make(*observers, train=LOADERS[0], model=None, name="run", **options):
        torch.manual_seed(0)
        model = model or UNet(3, 1, width=4, depth=2)
        options.setdefault("optimizer", create_optimizer(model, lr=1e-3))
        return UNetTrainer(model, train, LOADERS[1], device="cpu", run_dir=tmp_path / name, observers=observers, **options)

    return make


def broken_loader(**options):
    return torch.utils.data.DataLoader(Broken(**options), batch_size=4)


def state_of(trainer):
    tensors = [*trainer.model.state_dict().values(), *(v for s in trainer.optimizer.state.values() for v in s.values())]
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def all_finite(folder):
    files = [load_file(path) for path in folder.glob("*.pth")]
    assert files
    parts = [part for state in files for key, part in state.items() if key.endswith("model_state_dict")]
    return all(tensor.isfinite().all() for part in parts for tensor in part.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"accumulate_gradients": 2}, {"ema_decay": 0.9}, {"gradient_clip_norm": 1.0}], ids=str)
def test_058_a_batch_that_is_no_number(make, value, options):
    """Weights, batch norm, moments and averages after the bad step are bit for bit those from before it; its images are named"""
    states, heard = {}, Heard()
    bad, group = (1, 2) if "accumulate_gradients" in options else (2, 1)
    notes = [Before(n, lambda t, n=n: states.__setitem__(n, state_of(t))) for n in (group * bad - group, group * bad)]
    trainer = make(*notes, heard, train=broken_loader(value=value), **options)
    history = trainer.train(1)
    if bad > 1:
        assert torch.equal(*states.values())
    assert state_of(trainer).isfinite().all() and history.rows[0]["skipped_steps"] == 1
    assert math.isfinite(history.rows[0]["train"]["loss"]) and all_finite(trainer.checkpoint_dir)
    assert len(heard.problems) == 1 and "Its images: " in heard.problems[0] and " 6" in heard.problems[0]
    assert f"Step {bad} (epoch 1" in heard.problems[0]


def test_058_as_if_the_batch_had_never_been(make):
    """A run that meets a bad batch ends like one over the other batches alone, batch norm included"""
    good = [pair for i, pair in enumerate(LOADERS[0].dataset) if i // 4 != 1]
    whole = make(train=torch.utils.data.DataLoader(good, batch_size=4), name="whole")
    met = make(train=broken_loader())
    for trainer in (whole, met):
        trainer.train(1)
    assert met.global_step == 4 and whole.global_step == 3
    last = [load_file(trainer.checkpoint_dir / "last.pth") for trainer in (whole, met)]
    assert all(map(torch.equal, *(state["model_state_dict"].values() for state in last)))
    assert last[0]["history"]["rows"][0]["train"] == last[1]["history"]["rows"][0]["train"]


@pytest.mark.filterwarnings("error::UserWarning")
def test_058_the_very_first_step_with_a_schedule_that_counts_steps(make):
    """The schedule counts it, and PyTorch does not warn that no step was made before"""
    model = UNet(3, 1, width=4, depth=2)
    optimizer = create_optimizer(model, lr=1e-3)
    schedule = create_scheduler(optimizer, "step", step_size=4, gamma=0.5, unit="step")
    trainer = make(train=broken_loader(at=(0,)), model=model, optimizer=optimizer, scheduler=schedule)
    assert trainer.train(1).rows[0]["skipped_steps"] == 1 and trainer.global_step == 4
    assert trainer.learning_rate == 5e-4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_059_a_gradient_that_is_no_number(make, value):
    """The loss is fine, one gradient is not; a clip by norm would have spread it over all"""
    model = UNet(3, 1, width=4, depth=2)
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient * value if len(calls) == 2 else gradient

    next(model.parameters()).register_hook(hook)
    trainer = make(model=model, gradient_clip_norm=1.0)
    row = trainer.train(1).rows[0]
    assert row["skipped_steps"] == 1 and state_of(trainer).isfinite().all() and math.isfinite(row["grad_norm"])


def poison_weight(trainer):
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[0] = math.nan


def poison_buffer(trainer):
    next(b for b in trainer.model.buffers() if b.is_floating_point())[0] = math.nan


def poison_moment(trainer):
    next(iter(trainer.optimizer.state.values()))["exp_avg"].view(-1)[0] = math.nan


def poison_average(trainer):
    with torch.no_grad():
        next(trainer.averaged.module.parameters()).view(-1)[0] = math.nan


POISON = {"weight": poison_weight, "batch norm": poison_buffer, "moment": poison_moment, "average": poison_average}


@pytest.mark.parametrize("batch", [2, 8], ids=["amid an epoch", "at its end"])
@pytest.mark.parametrize("where", POISON)
def test_060_nan_in_the_state_itself(make, where, batch):
    """It is in no file, and the run goes back to one without it and on with half the rate"""
    trainer = make(Before(batch, POISON[where]), Heard(), ema_decay=0.9)
    history = trainer.train(4)
    assert [row["epoch"] for row in history.rows] == [1, 2, 3, 4] and all(map(math.isfinite, history["val_losses"]))
    assert all_finite(trainer.checkpoint_dir) and state_of(trainer).isfinite().all()
    assert (trainer.checkpoint_dir / "final_model.pth").exists()


class ScriptedLoss(nn.BCEWithLogitsLoss):
    """A loss that is no number in one call"""

    calls = 0

    def forward(self, logits, masks):
        self.calls += 1
        return super().forward(logits, masks) * (math.nan if self.calls == self.bad else 1.0)


@pytest.mark.parametrize("where", ["image", "mask", "loss", "validation"])
def test_060_injected_from_outside(make, where):
    """With those above, eight places: never saved, never best"""
    loss, train = ScriptedLoss(), LOADERS[0]
    loss.bad = {"loss": 3, "validation": 5}.get(where)
    if where in ("image", "mask"):
        pairs = [tuple(o.clone() for o in pair) for pair in LOADERS[0].dataset]
        pairs[9][0 if where == "image" else 1][0, 1, 1] = math.nan
        train = torch.utils.data.DataLoader(pairs, batch_size=4)
    trainer = make(train=train, criterion=loss)
    trainer.train(2)
    assert all_finite(trainer.checkpoint_dir) and state_of(trainer).isfinite().all()
    best = trainer.early_stopping.best_epoch
    assert where != "validation" or (best == 2 and math.isnan(trainer.history["val_losses"][0]))


@pytest.mark.parametrize("policy, reached", [("skip", 2), ("rollback", 2), ("raise", 0)])
def test_060_what_the_policy_says(make, policy, reached):
    trainer = make(Heard(), train=broken_loader(), on_nonfinite=policy)
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="Its images: .*6.* The trainer is back at its last checkpoint"):
            trainer.train(2)
    else:
        trainer.train(2)
    assert trainer.current_epoch == reached and trainer.learning_rate == (5e-4 if policy == "rollback" else 1e-3)
    assert all_finite(trainer.checkpoint_dir)


@pytest.mark.parametrize("resumed", [False, True], ids=["the same trainer", "resumed"])
def test_060_the_rate_is_halved_once_for_an_image(make, resumed):
    """Not again in each run that goes on; an older file does not know, and loads"""
    trainer = make(train=broken_loader(), on_nonfinite="rollback")
    trainer.train(1)
    for epochs in (2, 3):
        if resumed:
            trainer = make(train=broken_loader(), on_nonfinite="rollback")
            trainer.train(epochs, resume="last")
        else:
            trainer.train(1)
    assert trainer.learning_rate == 5e-4 and trainer.current_epoch == 3
    state = load_file(trainer.checkpoint_dir / "last.pth")
    torch.save({key: value for key, value in state.items() if key not in ("gone_back", "images_are_bad")}, trainer.checkpoint_dir / "old.pth")
    make().load_checkpoint(trainer.checkpoint_dir / "old.pth")


def test_060_going_back_keeps_what_was_set_meanwhile(make):
    """All but the rate, in the trainer and in the files after that; also what had another value in the file it went back to"""
    def first(trainer):
        trainer.set("gradient_clip_norm", 2.0)
        trainer._save()

    def then(trainer):
        for name, value in {"gradient_clip_norm": 0.5, "patience": 7}.items():
            trainer.set(name, value)

    trainer = make(Before(1, first), Before(2, then), Heard(), train=broken_loader(at=(14,)), on_nonfinite="rollback")
    trainer.train(1)
    wanted = {"gradient_clip_norm": 0.5, "patience": 7, "lr": 5e-4}
    assert trainer.changed_settings == wanted and trainer.gradient_clip_norm == 0.5 and trainer.early_stopping.patience == 7
    assert load_file(trainer.checkpoint_dir / "last.pth")["settings"] == wanted


@pytest.mark.parametrize("watched", ["monitor", "plateau"])
def test_062_a_metric_that_is_not_there_does_not_cost_the_epoch(make, watched):
    """It is told in words, and the file has the epoch's training"""
    trainer = make(scheduler="plateau")
    if watched == "monitor":
        trainer.early_stopping = EarlyStopping(5, monitor="per_class.dice.7")
    else:
        trainer.early_stopping = EarlyStopping(5, monitor="dice")
        trainer.validate_epoch = lambda: {"dice": 0.5}
    with pytest.raises(ValueError, match="has no metric 'per_class.dice.7'" if watched == "monitor" else "plateau schedule watches the validation 'loss'"):
        trainer.train(2)
    state = load_file(trainer.checkpoint_dir / "last.pth")
    assert trainer.global_step == state["global_step"] == 4 and state["train_metrics"] is not None
    again = make(scheduler="plateau")
    again.early_stopping = EarlyStopping(5, monitor=trainer.early_stopping.monitor if watched == "plateau" else "loss")
    if watched == "plateau":
        again.train(1, resume="last")
        assert again.global_step == 4 and len(again.history) == 1


def test_062_a_validation_that_never_is_a_number(make):
    """Never the best, and yet each epoch is saved and the last weights are there"""
    class Blind(UNetTrainer):
        def validate_epoch(self):
            return super().validate_epoch() | {"loss": math.nan}

    trainer = make()
    trainer.__class__ = Blind
    trainer.early_stopping = EarlyStopping(patience=3)
    trainer.train(10)
    assert trainer.current_epoch == 3 and "not a finite number" in trainer.run.reason
    assert load_file(trainer.checkpoint_dir / "last.pth")["epoch"] == 3
    assert not (trainer.checkpoint_dir / "best_model.pth").exists() and trainer.early_stopping.best_epoch is None


def test_063_a_loss_that_explodes(make):
    """Weights of 1e30 are finite, but the files stay those from before"""
    heard = Heard()
    trainer = make(Before(9, lambda t: t.set("lr", 1e30)), heard)
    trainer.train(6)
    assert trainer.current_epoch == 6 and trainer.learning_rate == 5e-4
    weights = [state for path in trainer.checkpoint_dir.glob("*.pth") for state in load_file(path)["model_state_dict"].values()]
    assert max(tensor.abs().max().item() for tensor in weights) < 1e3
    assert "goes on with a learning rate of 0.0005" in heard.problems[-1]


def test_063_when_going_back_does_not_help(make):
    """The rate in the file is mad already: after five times the run ends in words, with the last good weights"""
    trainer = make(Before(8, lambda t: t.set("lr", 1e30)), Heard())
    with pytest.raises(FloatingPointError, match="went back 5 times .* Look for broken images, lower the learning rate"):
        trainer.train(6)
    assert trainer.current_epoch == 2 and state_of(trainer).abs().max() < 1e3
    trainer.set("lr", 1e-3)
    assert len(trainer.train(1)) == 3


def test_064_ties_and_rounding_at_min_delta():
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    assert [stopping.update(value, i) for i, value in enumerate([1.0, 0.9, 0.9 - 1e-12, 0.8], 1)] == [True, False, True, False]
    equal = EarlyStopping(patience=2)
    assert [equal.update(0.5, i) for i in (1, 2, 3)] == [True, False, False] and equal.should_stop


def test_065_a_gradient_of_zero_is_told(make):
    class Zero(nn.BCEWithLogitsLoss):
        def forward(self, logits, masks):
            return super().forward(logits, masks) * 0

    heard = Heard()
    make(heard, criterion=Zero()).train(2)
    assert [text for text in heard.problems if "nothing is learned" in text] == heard.problems and len(heard.problems) == 1


def test_066_nan_in_the_history(make, tmp_path):
    trainer = make()
    trainer.history.append({"epoch": 1, "train": {"loss": 1.0}, "val": {"loss": math.nan, "dice": math.inf}, "lr": 0.1})
    trainer.history.append({"epoch": 2, "train": {"loss": 0.5}, "val": {"loss": 0.5, "dice": 0.5}, "lr": 0.1})
    trainer.history.save(tmp_path / "history.json")
    text = (tmp_path / "history.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and json.loads(text)
    figure = plot_history(trainer.history)
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_067_counts_do_not_overflow():
    """More pixels than int32 or float32 can count, by merging the sums of many passes"""
    from unet_nbtrain import SegmentationMetrics

    metrics = SegmentationMetrics(1)
    ones = torch.ones(1, 1, 64, 64)
    metrics.update(ones, ones)
    large = {name: value * (2**40 if value.dtype == torch.int64 else 1) for name, value in metrics.state_dict().items()}
    metrics.load_state_dict(large)
    metrics.update(-ones, ones)
    n = 64 * 64 * 2**40
    assert metrics.compute()["dice"] == pytest.approx(2 * n / (2 * n + 64 * 64), abs=1e-15)


@pytest.mark.parametrize("value", [1e25, -3.4e38])
def test_060_a_huge_number_in_one_image_is_named_and_stepped_over(make, value):
    """Loss and gradients are finite, but the variance of batch norm is not: a float TIFF's value for no data, for example"""
    images, masks = torch.rand(12, 3, 16, 16), torch.randint(0, 2, (12, 1, 16, 16)).float()
    images[5] = value
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, masks), batch_size=4)
    trainer = make(heard := Heard(), train=data)
    history = trainer.train(2)
    assert len(history) == 2 and [row["skipped_steps"] for row in history.rows] == [1, 1]
    assert any("sample 5" in text and "running statistics" in text for text in heard.problems)
    assert all(o.isfinite().all() for o in trainer.model.state_dict().values() if o.is_floating_point())


def test_060_a_bad_batch_does_not_stay_in_the_numbers_of_a_loss(make):
    class Running(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, logits, masks):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks)
            self.scale.mul_(0.9).add_(0.1 * loss.detach())
            return loss / self.scale

    trainer = make(train=broken_loader(), criterion=Running())
    history = trainer.train(2)
    assert len(history) == 2 and history.rows[0]["skipped_steps"] == 1 and 0 < trainer.criterion.scale < 1
