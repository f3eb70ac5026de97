"""Optimizers, schedulers and early stopping against plain PyTorch, hand-computed sequences and a ten-line reference."""

import copy
import io
import json
import math
import random
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from unet_nbtrain.early_stopping import BestWeights, EarlyStopping
from unet_nbtrain.optimizers import check_keywords, create_optimizer, pick_by_name
from unet_nbtrain.schedulers import (
    UNITS,
    WarmUp,
    create_scheduler,
    rescale_schedule,
    scheduler_length,
    scheduler_unit,
    step_scheduler,
)

NAN, INF = math.nan, math.inf


pytestmark = pytest.mark.usefixtures("one_thread")


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))


def train(model, optimizer, steps=5, seed=1):
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        loss = (model(images) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# --- optimizers

RAW = {
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "rmsprop": (torch.optim.RMSprop, {}),
}
EXTRA = {
    "adam": {"betas": (0.8, 0.99), "amsgrad": True},
    "adamw": {"eps": 1e-6},
    "sgd": {"momentum": 0.5, "nesterov": True},
    "rmsprop": {"momentum": 0.3, "centered": True},
}


@pytest.mark.parametrize("weight_decay", [None, 0.1])
@pytest.mark.parametrize("extra", [False, True], ids=["defaults", "keywords"])
@pytest.mark.parametrize("name", RAW)
def test_equals_raw_torch_bit_for_bit(name, extra, weight_decay):
    kind, options = RAW[name]
    keywords = EXTRA[name] if extra else {}
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    ours = net()
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    a = train(ours, create_optimizer(ours, name.upper(), lr=0.05, weight_decay=weight_decay, **keywords))
    b = train(theirs, kind(theirs.parameters(), lr=0.05, **(options | keywords | decay)))
    assert same(a, b)
    assert not torch.equal(ours[0].weight, start[0].weight)


def test_the_documents_call_and_the_defaults():
    optimizer = create_optimizer(net(), "adam", lr=1e-4)
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 1e-4
    assert type(create_optimizer(net())) is torch.optim.AdamW
    assert create_optimizer(net()).defaults["lr"] == 1e-3
    assert create_optimizer(net(), " AdamW ").defaults["weight_decay"] == 0.01


def test_fused_only_where_it_can_be():
    model = net()
    for name in ("adam", "adamw", "sgd"):
        assert create_optimizer(model, name).defaults["fused"] is True
        assert create_optimizer(model, name, fused=False).defaults["fused"] is False
        assert create_optimizer(model, name, foreach=True).defaults["fused"] is None
        assert create_optimizer(model, name, differentiable=True).defaults["fused"] is None
    model.complex_one = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    assert create_optimizer(model).defaults["fused"] is None
    assert create_optimizer(net().to("meta")).defaults["fused"] is None


@pytest.mark.parametrize("name", RAW)
def test_save_load_continue(name):
    """Made anew with the same call, loaded from a file, and the next steps are the same; fused ones too."""
    model = net()
    optimizer = create_optimizer(model, name, lr=0.01, decay_norm_and_bias=False, weight_decay=0.1)
    train(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = net()
    resumed = create_optimizer(other, name, lr=0.5, decay_norm_and_bias=False)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert [group["name"] for group in resumed.param_groups] == ["decay", "no_decay"]
    assert same(train(model, optimizer, seed=2), train(other, resumed, seed=2))


def test_fused_state_goes_where_the_parameters_are():
    model = net()
    optimizer = create_optimizer(model, "adam")
    train(model, optimizer)
    other = net().double()
    loaded = create_optimizer(other, "adam")
    loaded.load_state_dict(optimizer.state_dict())
    assert {s["exp_avg"].dtype for s in loaded.state.values()} == {torch.float64}
    loss = other(torch.rand(1, 1, 8, 8, dtype=torch.float64)).sum()
    loss.backward()
    loaded.step()
    assert all(p.isfinite().all() for p in other.parameters())


def test_groups_split_every_trainable_parameter_once():
    model = net()
    model[3].weight.requires_grad_(False)
    decay, rest = create_optimizer(model, decay_norm_and_bias=False, weight_decay=0.2).param_groups
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.2)
    assert (rest["name"], rest["weight_decay"]) == ("no_decay", 0.0)
    assert [id(p) for p in decay["params"]] == [id(model[0].weight)]
    assert {id(p) for p in rest["params"]} == {id(p) for p in (model[0].bias, *model[1].parameters(), model[3].bias)}


def test_a_group_that_would_be_empty_is_left_out():
    groups = create_optimizer(nn.Linear(2, 2, bias=False), decay_norm_and_bias=False).param_groups
    assert [group["name"] for group in groups] == ["decay"]
    assert "name" not in create_optimizer(net()).param_groups[0]


def test_frozen_parameters_stay():
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = create_optimizer(model, "sgd", lr=1.0, weight_decay=0.5)
    assert len(optimizer.param_groups[0]["params"]) == 4
    train(model, optimizer)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("lr", [NAN, INF, -INF, -1e-9, "1e-3", None, True, [1e-3], torch.tensor([1.0, 2.0])])
def test_rates_that_are_none(lr):
    with pytest.raises(ValueError, match=r"^lr="):
        create_optimizer(net(), "adam", lr=lr)
    if lr is not None:
        with pytest.raises(ValueError, match=r"^weight_decay="):
            create_optimizer(net(), "adam", weight_decay=lr)


def test_rates_that_are_fine():
    import numpy as np

    for lr in (0, 1, 1e-3, np.float32(0.5), np.float64(0.5), torch.tensor(0.1)):
        assert create_optimizer(net(), "adam", lr=lr).param_groups[0]["lr"] == lr


def test_errors_of_create_optimizer():
    with pytest.raises(ValueError, match=r"optimizer 'adamm' is not known. Did you mean 'adam'\? Known: adam, adamw, sgd"):
        create_optimizer(net(), "adamm")
    with pytest.raises(ValueError, match="Known: adam"):
        create_optimizer(net(), torch.optim.Adam)
    with pytest.raises(TypeError, match="'adam' does not take 'momentum'.*It takes: lr, betas, eps"):
        create_optimizer(net(), "adam", momentum=0.9)
    with pytest.raises(TypeError, match="does not take 'nestrov'. Did you mean 'nesterov'"):
        create_optimizer(net(), "sgd", nestrov=True)
    with pytest.raises(ValueError, match="Sequential are frozen"):
        create_optimizer(net().requires_grad_(False))
    with pytest.raises(ValueError, match="ReLU are missing"):
        create_optimizer(nn.ReLU())
    with pytest.raises(ValueError, match="the model itself"):
        create_optimizer(net().parameters())


def test_helpers():
    assert pick_by_name("x", " B ", {"a": 1, "b": 2}) == 2
    with pytest.raises(ValueError, match=r"^x 3 is not known. Known: a\.$"):
        pick_by_name("x", 3, {"a": 1})
    check_keywords("f", lambda a, b: None, ["b"], without=["a"])
    with pytest.raises(TypeError, match=r"^f does not take 'a'. It takes: b\.$"):
        check_keywords("f", lambda a, b: None, ["a"], without=["a"])


@pytest.mark.parametrize("name, argument, values", [
    ("adam", "betas", [0.9, ("a", 0.9), (1.0, 0.9), (0.9,), None]), ("adamw", "eps", ["x", -1, NAN]),
    ("sgd", "momentum", ["a", 5, 1, -1, None]), ("sgd", "dampening", ["a", NAN, 2]), ("rmsprop", "alpha", ["a", 2, 1.0]),
])  # fmt: skip
def test_numbers_of_an_optimizer_that_make_no_sense(name, argument, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{argument}=.*: {argument} must be "):
            create_optimizer(net(), name, **{argument: value})


# --- schedulers


def an_optimizer(lr=1.0):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)


def rates(scheduler, units, metrics=None):
    """The rate of each unit; a warning of torch about the order of steps is an error."""
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(units):
            seen.append(scheduler.optimizer.param_groups[0]["lr"])
            scheduler.optimizer.step()
            scheduler.step(*([] if metrics is None else [metrics[i]]))
    return seen


ROOT = 0.25 * 2**0.5
BY_HAND = {
    "cosine": ({"T_max": 4}, [1, 0.5 + ROOT, 0.5, 0.5 - ROOT, 0]),
    "Cosine": ({"T_max": 2, "eta_min": 0.5}, [1, 0.75, 0.5]),
    "step": ({"step_size": 2}, [1, 1, 0.1, 0.1, 0.01]),
    "exponential": ({}, [1, 0.95, 0.9025, 0.857375]),
    "EXPONENTIAL": ({"gamma": 0.5}, [1, 0.5, 0.25]),
    "polynomial": ({"total_iters": 2, "power": 2}, [1, 0.25, 0, 0]),
    "poly": ({"total_iters": 4}, [1, 0.75**0.9, 0.5**0.9, 0.25**0.9, 0]),
    "cosine_restarts": ({"T_0": 2}, [1, 0.5, 1, 0.5, 1]),
    "onecycle": (
        {"total_steps": 5, "pct_start": 0.5, "anneal_strategy": "linear", "div_factor": 4, "final_div_factor": 1},
        [0.25, 0.75, 0.85, 0.55, 0.25],  # up by 0.5 a step to the peak at 1.5, then down by 0.3 a step
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_sequences_by_hand(name):
    kwargs, expected = BY_HAND[name]
    assert rates(create_scheduler(an_optimizer(), name, **kwargs), len(expected)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "kwargs, metrics, expected",
    [
        ({"patience": 2, "factor": 0.1}, [6, 5, 5, 5, 5, 4, 4], [1, 1, 1, 1, 1, 0.1, 0.1]),
        ({"patience": 0, "factor": 0.5}, [1, 1, 1, 0.5, 1], [1, 1, 0.5, 0.25, 0.25]),
        ({"patience": 0, "factor": 0.5, "mode": "max"}, [1, 2, 2, 3, 1], [1, 1, 1, 0.5, 0.5]),
        ({"patience": 0, "factor": 0.5, "cooldown": 1}, [1, 1, 1, 1, 1], [1, 1, 0.5, 0.5, 0.25]),
        ({"patience": 0, "factor": 0.5, "min_lr": 0.4}, [1, 1, 1, 1], [1, 1, 0.5, 0.4]),
    ],
)
def test_plateau_by_hand(kwargs, metrics, expected):
    scheduler = create_scheduler(an_optimizer(), "plateau", **kwargs)
    assert rates(scheduler, len(metrics), metrics) == pytest.approx(expected)


def test_the_documents_calls_give_torchs_own_objects():
    plateau = create_scheduler(an_optimizer(), "plateau", patience=10, factor=0.5)
    assert type(plateau) is lr_scheduler.ReduceLROnPlateau
    assert (plateau.patience, plateau.factor, plateau.mode) == (10, 0.5, "min")
    assert type(create_scheduler(an_optimizer(), "cosine", T_max=100)) is lr_scheduler.CosineAnnealingLR
    assert type(create_scheduler(an_optimizer())) is lr_scheduler.ReduceLROnPlateau
    step = create_scheduler(an_optimizer(), "step")
    assert (step.step_size, step.gamma) == (30, 0.1)


@pytest.mark.parametrize("name, argument, values", [
    ("plateau", "patience", ["a", -1, 1.5, None]), ("plateau", "factor", ["a", 0, -0.5, 1, NAN]), ("plateau", "cooldown", ["a", -1]),
    ("plateau", "threshold", ["a", NAN]), ("plateau", "min_lr", ["a", -1, [-1]]), ("cosine", "eta_min", ["a", -1]),
    ("step", "gamma", ["0.9", -1, 0]), ("exponential", "gamma", [NAN, INF]), ("polynomial", "power", [-1, "a"]),
    ("onecycle", "max_lr", [-1, "a", None, [NAN]]), ("onecycle", "div_factor", [0, -25]), ("step", "step_size", [None, 2.5]),
])  # fmt: skip
def test_numbers_of_a_schedule_that_make_no_sense(name, argument, values):
    """None of them trains: a rate below zero goes uphill, and text is found after the first epochs."""
    lengths = {"cosine": {"T_max": 9}, "polynomial": {"total_iters": 9}, "onecycle": {"total_steps": 9}}.get(name, {})
    for value in values:
        with pytest.raises(ValueError, match=rf"^{argument}=.*: {argument} must be a "):
            create_scheduler(an_optimizer(), name, **lengths, **{argument: value})


def test_numbers_of_a_schedule_that_are_fine():
    assert create_scheduler(an_optimizer(), "step", gamma=1.5).gamma == 1.5  # a search for a rate
    assert create_scheduler(an_optimizer(), "plateau", patience=0, min_lr=[0.1]).min_lrs == [0.1]
    assert create_scheduler(an_optimizer(), "onecycle", max_lr=[0.1], total_steps=None, epochs=2, steps_per_epoch=3).total_steps == 6


ALL = {
    "plateau": {"patience": 2, "factor": 0.5, "cooldown": 1}, "cosine": {"T_max": 30}, "step": {"step_size": 7},
    "exponential": {}, "onecycle": {"total_steps": 41}, "cosine_restarts": {"T_0": 6, "T_mult": 2},
    "polynomial": {"total_iters": 33},
}
LOSS = [max(0.2, 1 - 0.05 * i) + 0.01 * (i % 3) for i in range(60)]


def metrics_of(name, shift=0):
    return None if name != "plateau" else [9.0] * shift + LOSS


@pytest.mark.parametrize("warmup", [1, 4, 9])
@pytest.mark.parametrize("name", ALL)
def test_warm_up_comes_before_and_changes_nothing_after(name, warmup):
    plain = rates(create_scheduler(an_optimizer(), name, **ALL[name]), 25, metrics_of(name))
    late = rates(create_scheduler(an_optimizer(), name, warmup=warmup, **ALL[name]), warmup + 25, metrics_of(name, warmup))
    assert late[:warmup] == pytest.approx([plain[0] * (k + 1) / (warmup + 1) for k in range(warmup)])
    assert late[warmup:] == plain


def test_warm_up_hides_its_metrics_from_the_plateau():
    scheduler = create_scheduler(an_optimizer(), "plateau", warmup=2, patience=1, factor=0.5)
    assert rates(scheduler, 7, [1, 1, 9, 9, 9, 9, 9]) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 0.5, 0.5])
    assert scheduler.inner.best == 9


def test_warm_up_of_several_groups():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [p], "lr": 1.0}, {"params": [q], "lr": 0.1}])
    scheduler = create_scheduler(optimizer, "exponential", gamma=0.5, warmup=1)
    seen = []
    for _ in range(3):
        seen.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert seen == [[0.5, 0.05], [1.0, 0.1], [0.5, 0.05]]


def test_warm_up_fills_a_tensor_rate_in_place():
    rate = torch.tensor(1.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=rate, foreach=False, capturable=False)
    held = optimizer.param_groups[0]["lr"]
    create_scheduler(optimizer, "step", warmup=3)
    assert optimizer.param_groups[0]["lr"] is held and held.item() == 0.25


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def cos_between(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def restarts(k, length=6):
    """A cosine of 6 units, then one of 12, then one of 24: SGDR, Loshchilov and Hutter 2017."""
    while k >= length:
        k, length = k - length, 2 * length
    return cos_between(1, 0, k / length)


def one_cycle(k, steps=41, share=0.3):
    """Cosine up from 1/25 to 1, then down to 1/250000; the last step is number 40."""
    top = share * steps - 1
    return cos_between(1 / 25, 1, k / top) if k <= top else cos_between(1, 1 / 25 / 1e4, (k - top) / (steps - 1 - top))


def plateau(values, patience=2, factor=0.5, cooldown=1, threshold=1e-4):
    """The rates before each of the values, by the rules of the manual: bad values are counted, not during a cooldown."""
    rate, best, bad, rest, seen = 1.0, INF, 0, 0, []
    for value in values:
        seen.append(rate)
        better = value < best * (1 - threshold)
        best, bad = (value, 0) if better else (best, bad + 1)
        if rest:
            rest, bad = rest - 1, 0
        if bad > patience:
            rate, bad, rest = rate * factor, 0, cooldown
    return seen


FORMULAS = {
    "plateau": lambda k: plateau(LOSS[: k + 1])[k],
    "cosine": lambda k: cos_between(1, 0, min(k, 30) / 30),
    "step": lambda k: 0.1 ** (k // 7),
    "exponential": lambda k: 0.95**k,
    "onecycle": lambda k: one_cycle(min(k, 40)),
    "cosine_restarts": restarts,
    "polynomial": lambda k: (1 - min(k, 33) / 33) ** 0.9,
}


def formula(name, warmup, units):
    """The rates by hand: a climb in equal steps, then the formula, and from the end of the schedule on its last rate."""
    climb = [FORMULAS[name](0) * (k + 1) / (warmup + 1) for k in range(warmup)]
    return (climb + [FORMULAS[name](k) for k in range(units)])[:units]


def lived(scheduler, start, end, warmup=0):
    """The rates of the units from `start` to `end` as a training lives them, all units reported and one of them right."""
    seen, unit = [], scheduler_unit(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(start, end):
            seen.append(scheduler.optimizer.param_groups[0]["lr"])
            scheduler.optimizer.step()
            value = LOSS[k - warmup] if k >= warmup else 9.0
            assert [step_scheduler(scheduler, asked, value) for asked in UNITS].count(True) <= 1
            assert unit == scheduler_unit(scheduler)
    return seen


@pytest.mark.parametrize("unit", [None, "step", "epoch"])
@pytest.mark.parametrize("warmup", [0, 1, 9])
@pytest.mark.parametrize("name", ALL)
def test_every_schedule_equals_its_formula(name, warmup, unit):
    """Also far past its end, and in whatever unit it is stepped."""
    if name == "plateau" and unit:
        pytest.skip("a plateau has one unit")
    scheduler = create_scheduler(an_optimizer(), name, warmup=warmup, unit=unit, **ALL[name])
    assert lived(scheduler, 0, 55, warmup) == pytest.approx(formula(name, warmup, 55), abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 9])
@pytest.mark.parametrize("name", ALL)
def test_state_round_trip_from_each_unit(name, warmup):
    """Optimizer and scheduler through a file after each unit: the rest of the rates to the last bit."""
    whole = lived(create_scheduler(an_optimizer(), name, warmup=warmup, **ALL[name]), 0, 50, warmup)
    for cut in range(50):
        first = create_scheduler(an_optimizer(), name, warmup=warmup, **ALL[name])
        start = lived(first, 0, cut, warmup)
        saved = through_a_file({"optimizer": first.optimizer.state_dict(), "scheduler": first.state_dict()})
        second = create_scheduler(an_optimizer(lr=7.0), name, warmup=warmup, **ALL[name])
        second.optimizer.load_state_dict(saved["optimizer"])
        second.load_state_dict(saved["scheduler"])
        assert start + lived(second, cut, 50, warmup) == whole, cut


@pytest.mark.parametrize("warmup", [0, 9])
@pytest.mark.parametrize("name", ALL)
def test_a_changed_rate_goes_on_from_each_unit(name, warmup):
    """After each unit: all later rates are 0.3 times what they would have been, also after a resume, and twice is 0.09."""
    whole = formula(name, warmup, 50)
    for cut in range(0, 45, 1 if warmup else 2):
        first = create_scheduler(an_optimizer(), name, warmup=warmup, **ALL[name])
        start = lived(first, 0, cut, warmup)
        rescale_schedule(first, first.optimizer, 0.3)
        saved = through_a_file({"optimizer": first.optimizer.state_dict(), "scheduler": first.state_dict()})
        second = create_scheduler(an_optimizer(), name, warmup=warmup, **ALL[name])
        second.optimizer.load_state_dict(saved["optimizer"])
        second.load_state_dict(saved["scheduler"])
        changed = [0.3 * rate for rate in whole[cut:]]
        assert lived(first, cut, 50, warmup) == pytest.approx(changed, rel=1e-9, abs=1e-15), cut
        middle = lived(second, cut, 46, warmup)
        rescale_schedule(second, second.optimizer, 0.3)
        twice = [0.09 * rate for rate in whole[46:]]
        assert start + middle + lived(second, 46, 50, warmup) == pytest.approx(whole[:cut] + changed[: 46 - cut] + twice, abs=1e-12)


FOREIGN = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [3, 8, 20], gamma=0.5),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=7),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=5),
    "eta_min": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=0.2),
    "eta_min of restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5, eta_min=0.2),
    "one-cycle of three phases": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=40, three_phase=True),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.2, anneal_epochs=8),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=6), lr_scheduler.CosineAnnealingLR(o, T_max=20)], milestones=[6]
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=6), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "warm-up of a lambda": lambda o: WarmUp(lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)), 5),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_changed_rate_of_other_schedules(name):
    """Two groups whose rates differ: each keeps its share."""

    def groups():
        one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        return torch.optim.SGD([{"params": [one], "lr": 1.0}, {"params": [two], "lr": 0.1}], momentum=0.9)

    def steps(schedule, count):
        seen = []
        for _ in range(count):
            seen += [group["lr"] for group in schedule.optimizer.param_groups]
            schedule.optimizer.step()
            schedule.step()
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own SequentialLR warns about itself
        whole = steps(FOREIGN[name](groups()), 30)
        for cut in range(30):
            schedule = FOREIGN[name](groups())
            start = steps(schedule, cut)
            rescale_schedule(schedule, schedule.optimizer, 0.5)
            assert schedule.get_last_lr() == [group["lr"] for group in schedule.optimizer.param_groups]
            assert start + steps(schedule, 30 - cut) == pytest.approx(whole[: 2 * cut] + [0.5 * r for r in whole[2 * cut :]], rel=1e-9), cut


def test_a_changed_rate_of_a_plateau_keeps_its_counters_and_its_limit():
    scheduler = create_scheduler(an_optimizer(), "plateau", patience=1, factor=0.1, min_lr=0.02)
    assert rates(scheduler, 2, [5, 5]) == [1, 1]
    rescale_schedule(scheduler, scheduler.optimizer, 0.5)
    assert (scheduler.num_bad_epochs, scheduler.best, scheduler.min_lrs) == (1, 5, [0.02])
    assert rates(scheduler, 5, [5, 5, 5, 5, 5]) == pytest.approx([0.5, 0.05, 0.05, 0.02, 0.02])


def test_a_changed_rate_of_a_stranger_and_of_none():
    """Of a scheduler that shows no bases only the rates can change; groups without a schedule keep their proportions."""
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": r} for r in (1.0, 0.1)])
    for scheduler in (None, Counting("epoch")):
        rescale_schedule(scheduler, optimizer, 2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [4.0, 0.4]
    assert vars(Counting("epoch")) == {"unit": "epoch", "calls": []}
    for ratio in (0, -1.0, NAN, INF):
        with pytest.raises(ValueError, match="^ratio="):
            rescale_schedule(None, optimizer, ratio)
    assert optimizer.param_groups[0]["lr"] == 4.0


def test_a_changed_rate_that_is_a_tensor_is_filled_in_place():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=torch.tensor(1.0), foreach=False)
    held = optimizer.param_groups[0]["lr"]
    scheduler = create_scheduler(optimizer, "cosine", T_max=4)
    rescale_schedule(scheduler, optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] is held and held.item() == 0.5
    assert [float(rate) for rate in scheduler.base_lrs] == [0.5]


@pytest.mark.parametrize("cut", [2, 5, 12])
def test_warm_up_restores_the_rates_in_any_order_of_loading(cut):
    """Constructed on an optimizer that was loaded already: torch would keep the rate of the construction."""
    whole = rates(create_scheduler(an_optimizer(), "exponential", warmup=5), 20)
    first = create_scheduler(an_optimizer(), "exponential", warmup=5)
    start = rates(first, cut)
    optimizer = an_optimizer()
    optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second = create_scheduler(optimizer, "exponential", warmup=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert start + rates(second, 20 - cut) == whole


def test_the_unit_survives_a_resume():
    """Saved as one unit and made anew as another: the saved one goes on, with and without warm-up."""
    for saved, other in (("step", None), (None, "step"), ("step", "epoch")):
        for warmup in (0, 3):
            first = create_scheduler(an_optimizer(), "cosine", T_max=10, unit=saved, warmup=warmup)
            second = create_scheduler(an_optimizer(), "cosine", T_max=10, unit=other, warmup=warmup)
            second.load_state_dict(through_a_file(first.state_dict()))
            assert scheduler_unit(second) == (saved or "epoch")


def test_units():
    opt = an_optimizer()
    expected = {"plateau": "metric", "onecycle": "step"}
    for name, kwargs in ALL.items():
        for warmup in (0, 3):
            scheduler = create_scheduler(an_optimizer(), name, warmup=warmup, **kwargs)
            assert scheduler_unit(scheduler) == expected.get(name, "epoch")
    assert scheduler_unit(lr_scheduler.CyclicLR(opt, 0.1, 1.0)) == "step"
    assert scheduler_unit(lr_scheduler.LambdaLR(opt, lambda k: 1.0)) == "epoch"
    assert scheduler_unit(create_scheduler(opt, "onecycle", total_steps=5, unit="epoch")) == "epoch"
    assert scheduler_unit(create_scheduler(opt, "cosine", T_max=5, unit="step", warmup=2)) == "step"
    assert scheduler_unit(type("Mine", (), {"unit": "metric"})()) == "metric"
    with pytest.raises(ValueError, match="Mine.unit is 'batch'.*step, epoch, metric"):
        scheduler_unit(type("Mine", (), {"unit": "batch"})())


class Counting:
    """A scheduler that notes what it was called with."""

    def __init__(self, unit):
        self.unit, self.calls = unit, []

    def step(self, *args):
        self.calls.append(args)


@pytest.mark.parametrize("unit", UNITS)
def test_stepped_once_per_unit(unit):
    scheduler = Counting(unit)
    told = [step_scheduler(scheduler, asked, 0.5) for asked in ("step", "step", "metric", "epoch")]
    assert told == [asked == unit for asked in ("step", "step", "metric", "epoch")]
    assert scheduler.calls == {"step": [(), ()], "epoch": [()], "metric": [(0.5,)]}[unit]


def test_a_metric_scheduler_needs_a_fresh_finite_value():
    scheduler = Counting("metric")
    for value in (None, NAN, INF, -INF):
        assert step_scheduler(scheduler, "metric", value) is False
    assert step_scheduler(scheduler, "metric", 0.0) is True and scheduler.calls == [(0.0,)]
    assert step_scheduler(None, "step") is False
    with pytest.raises(ValueError, match="unit='batch'"):
        step_scheduler(scheduler, "batch")


def test_nan_metrics_do_not_count_for_the_plateau():
    scheduler = create_scheduler(an_optimizer(), "plateau", patience=0, factor=0.5)
    for value in (1.0, NAN, None, NAN):
        step_scheduler(scheduler, "metric", value)
    assert scheduler.num_bad_epochs == 0 and scheduler.optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("name, length", [("cosine", 30), ("onecycle", 40), ("polynomial", 33)])
@pytest.mark.parametrize("warmup", [0, 5])
def test_a_schedule_holds_at_its_end(name, length, warmup):
    scheduler = create_scheduler(an_optimizer(), name, warmup=warmup, **ALL[name])
    assert scheduler_length(scheduler) == length + warmup
    seen = []
    for _ in range(60):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        step_scheduler(scheduler, scheduler_unit(scheduler))
    plain = rates(create_scheduler(an_optimizer(), name, warmup=warmup, **ALL[name]), length + warmup)
    assert seen[: length + warmup] == plain
    assert len(set(seen[length + warmup :])) == 1 and seen[-1] < 1e-4
    assert scheduler_length(create_scheduler(an_optimizer(), "plateau", warmup=2)) is None


def test_a_sequence_of_schedules_holds_at_its_end():
    """Warm-up and cosine put together with torch's own SequentialLR, as many recipes do it: no second climb."""
    optimizer = an_optimizer()
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)]
    scheduler = lr_scheduler.SequentialLR(optimizer, parts, milestones=[5])
    assert scheduler_length(scheduler) == 15
    seen = lived(scheduler, 0, 40)
    assert seen[5] == 1.0 and max(seen[15:]) < 1e-12
    open_end = lr_scheduler.SequentialLR(optimizer, [parts[1], lr_scheduler.StepLR(optimizer, 3)], milestones=[5])
    assert scheduler_length(open_end) is None


def test_one_cycle_peaks_at_the_optimizers_rate():
    scheduler = create_scheduler(an_optimizer(lr=0.3), "onecycle", epochs=4, steps_per_epoch=25)
    seen = rates(scheduler, 100 - 1)
    assert max(seen) == pytest.approx(0.3, rel=1e-3) and seen[0] == pytest.approx(0.3 / 25)
    assert max(rates(create_scheduler(an_optimizer(), "onecycle", total_steps=100, max_lr=2.0), 99)) > 1.99


@pytest.mark.parametrize(
    "name, kwargs, error, words",
    [
        ("cosine", {}, ValueError, r"needs T_max: the epochs .*T_max=num_epochs\.$"),
        ("cosine", {"unit": "step"}, ValueError, r"needs T_max: the steps .*T_max=num_epochs \* len\(train_loader\)"),
        ("onecycle", {"unit": "epoch"}, ValueError, r"all epochs, usually total_steps=num_epochs\.$"),
        ("onecycle", {}, ValueError, r"needs total_steps.*num_epochs \* len\(train_loader\)"),
        ("onecycle", {"epochs": 3}, ValueError, "needs total_steps"),
        ("cosine_restarts", {}, ValueError, "needs T_0"),
        ("poly", {"total_iters": None}, ValueError, "needs total_iters"),
        ("cosine", {"T_max": 0}, ValueError, "^T_max=0"),
        ("cosine", {"T_max": 10.5}, ValueError, "^T_max=10.5"),
        ("step", {"step_size": 0}, ValueError, "^step_size=0"),
        ("step", {"warmup": -1}, ValueError, "^warmup=-1"),
        ("step", {"warmup": 0.5}, ValueError, "^warmup=0.5"),
        ("step", {"unit": "metric"}, ValueError, "'step' or 'epoch'"),
        ("plateau", {"unit": "epoch"}, ValueError, "use 'metric'"),
        ("platau", {}, ValueError, "Did you mean 'plateau'.*Known: plateau, cosine, step"),
        ("cosine", {"patience": 3}, TypeError, "scheduler 'cosine' does not take 'patience'.*T_max, eta_min"),
        ("plateau", {"last_epoch": 3}, TypeError, "does not take 'last_epoch'"),
    ],
)
def test_errors_of_create_scheduler(name, kwargs, error, words):
    optimizer = an_optimizer()
    with pytest.raises(error, match=words):
        create_scheduler(optimizer, name, **kwargs)
    assert optimizer.param_groups[0]["lr"] == 1.0 and "initial_lr" not in optimizer.param_groups[0]


def test_the_model_is_no_optimizer():
    with pytest.raises(ValueError, match="Linear.*create_optimizer"):
        create_scheduler(nn.Linear(1, 1), "step")
    with pytest.raises(ValueError, match="^warmup=0"):
        WarmUp(lr_scheduler.StepLR(an_optimizer(), 1), 0)


# --- early stopping


def reference(values, patience, min_delta, sign):
    """(best epoch, counter) after each value, and the epoch of the stop: the rules in ten lines."""
    best, best_epoch, counter, told, stop = None, None, 0, [], None
    for epoch, value in enumerate(values, 1):
        good = not (math.isnan(value) or math.isinf(value))
        if good and (best is None or sign * value < sign * best - min_delta):
            best, best_epoch, counter = value, epoch, 0
        else:
            counter += 1
        told.append((best_epoch, counter))
        stop = stop or (epoch if counter >= patience else None)
    return told, stop


@pytest.mark.parametrize("seed", range(200))
def test_random_sequences_equal_the_reference(seed):
    rng = random.Random(seed)
    special = [NAN, INF, -INF, 0.5, 0.5]
    values = [rng.choice(special) if rng.random() < 0.2 else round(rng.random(), 2) for _ in range(40)]
    patience, min_delta = rng.randint(1, 8), rng.choice([0, 0, 0.05, 0.3])
    monitor, sign = rng.choice([("loss", 1), ("dice", -1)])
    told, stop = reference(values, patience, min_delta, sign)
    stopper, mine, stopped, cut = EarlyStopping(patience, min_delta, monitor=monitor), [], None, rng.randint(0, 39)
    for epoch, value in enumerate(values, 1):
        new_best = stopper.update(value, epoch)
        mine.append((stopper.best_epoch, stopper.counter))
        stopped = stopped or (epoch if stopper.should_stop else None)
        assert new_best == (stopper.best_epoch == epoch)
        assert bool(stopper.reason) == stopper.should_stop
        if epoch == cut:
            resumed = EarlyStopping(monitor=monitor)
            resumed.load_state_dict(json.loads(json.dumps(stopper.state_dict(), allow_nan=False)))
            stopper = resumed
    assert (mine, stopped) == (told, stop)


@pytest.mark.parametrize(
    "options, values, counters",
    [
        ({}, [3, 2, 2, 1, 5], [0, 0, 1, 0, 1]),
        ({"min_delta": 0.5}, [3, 2.5, 2.4, 1.8, 1.8], [0, 1, 0, 0, 1]),
        ({"monitor": "dice"}, [3, 2, 2, 4, 5], [0, 1, 2, 0, 0]),
        ({"monitor": "dice", "min_delta": 1}, [0, 1, 1.5, 2], [0, 1, 0, 1]),
        ({}, [NAN, NAN, 1, NAN, 0.5], [1, 2, 0, 1, 0]),
        ({"start_epoch": 4}, [1, 2, NAN, 2, 2, 0, 1], [0, 0, 0, 1, 2, 0, 1]),
        ({"monitor": "mine", "mode": "max"}, [-3, -2, -2.5], [0, 0, 1]),
    ],
)
def test_counters_by_hand(options, values, counters):
    stopper = EarlyStopping(patience=99, **options)
    assert [(stopper.update(value, epoch), stopper.counter)[1] for epoch, value in enumerate(values, 1)] == counters


def test_the_documents_expression_without_patience():
    stopper = EarlyStopping()
    for epoch in range(1, 500):
        stopper.update(1.0, epoch)
    assert (stopper.counter >= stopper.patience) is False
    assert stopper.should_stop is False and stopper.reason == ""


def test_values_of_other_types():
    import numpy as np

    stopper = EarlyStopping()
    assert stopper.update(torch.tensor(0.5), 1) is True and type(stopper.best) is float
    assert stopper.update(np.float32(0.25), np.int64(2)) is True and type(stopper.best_epoch) is int
    assert stopper.update(1, 3) is False
    json.dumps(stopper.state_dict(), allow_nan=False)


def test_changed_live():
    stopper = EarlyStopping(patience=3)
    for epoch, value in enumerate([1, 2, 2], 1):
        stopper.update(value, epoch)
    assert not stopper.should_stop
    stopper.patience = 2
    assert stopper.should_stop and "2 validations in a row" in stopper.reason
    stopper.patience = None
    assert not stopper.should_stop and stopper.patience == INF
    stopper.min_delta = 0.5
    assert stopper.update(0.6, 4) is False and stopper.update(0.4, 5) is True
    for name, value in [("patience", 0), ("min_delta", -1), ("start_epoch", 0.5)]:
        with pytest.raises(ValueError, match=f"^{name}="):
            setattr(stopper, name, value)


def test_reasons():
    stopper = EarlyStopping(patience=1, min_delta=0.25, monitor="dice")
    stopper.update(0.5, 3)
    stopper.update(0.6, 4)
    assert stopper.reason == (
        "The validation dice did not improve by more than 0.25 in 1 validation in a row: best 0.5 in epoch 3."
    )
    hopeless = EarlyStopping(patience=2)
    hopeless.update(NAN, 1)
    hopeless.update(NAN, 2)
    assert hopeless.reason == "The validation loss was not a finite number in 2 validations in a row."


@pytest.mark.parametrize("patience", [0, -1, 2.0, "3", NAN, True])
def test_a_patience_that_is_none(patience):
    with pytest.raises(ValueError, match="^patience="):
        EarlyStopping(patience)


def test_other_errors_of_early_stopping():
    for min_delta in (-0.1, NAN, INF, "0"):
        with pytest.raises(ValueError, match="^min_delta="):
            EarlyStopping(3, min_delta)
    with pytest.raises(ValueError, match="'val_loss' is not known. Did you mean 'loss'.*mode="):
        EarlyStopping(monitor="val_loss")
    with pytest.raises(ValueError, match="mode='up'"):
        EarlyStopping(mode="up")
    with pytest.raises(ValueError, match=r"watches 'loss' \(min\).*'dice' \(max\)"):
        EarlyStopping(monitor="dice").load_state_dict(EarlyStopping().state_dict())


def test_value_of_a_row():
    row = {"epoch": 1, "train": {"iou": 1.0}, "val": {"loss": 0.5, "dice": None, "per_class": {"dice": [1.0]}}}
    assert EarlyStopping().value_of(row) == 0.5
    assert math.isnan(EarlyStopping(monitor="dice").value_of(row))
    assert EarlyStopping().value_of({"epoch": 1, "train": {"loss": 1}}) is None
    with pytest.raises(ValueError, match=r"no metric 'iou'; it has: loss, dice, per_class.dice.0\.$"):
        EarlyStopping(monitor="iou").value_of(row)
    with pytest.raises(ValueError, match="no metric 'per_class'"):
        EarlyStopping(monitor="per_class", mode="max").value_of(row)


def test_one_class_can_be_watched():
    per_class = {"dice": [0.99, 0.5, None, NAN], "iou": (0.98, 0.4)}
    row = {"val": {"loss": 0.5, "per_class": per_class, "times": {"loss": 3}}}
    for name, mode, value in [("per_class.dice.1", "max", 0.5), ("per_class.iou.0", "max", 0.98), ("times.loss", "min", 3)]:
        stopper = EarlyStopping(2, monitor=name)
        assert stopper.mode == mode and stopper.value_of(row) == value
    for name in ("per_class.dice.2", "per_class.dice.3"):
        stopper = EarlyStopping(2, monitor=name)
        assert math.isnan(stopper.value_of(row)) and stopper.update(stopper.value_of(row), 1) is False
    for name in ("per_class.dice.4", "per_class.dice", "per_class.dice.-1", "dice.1"):
        with pytest.raises(ValueError, match="no metric.*per_class.dice.0, per_class.dice.1"):
            EarlyStopping(2, monitor=name).value_of(row)
    with pytest.raises(ValueError, match="mode="):
        EarlyStopping(2, monitor="per_class.surface.1")
    other = EarlyStopping(monitor="per_class.dice.1")
    other.load_state_dict(json.loads(json.dumps(EarlyStopping(3, monitor="per_class.dice.1").state_dict())))
    assert other.patience == 3


# --- best weights


def test_best_weights_are_copies_and_reuse_their_memory():
    model, best = net(), BestWeights()
    assert not best.available
    with pytest.raises(RuntimeError, match="No best weights"):
        best.restore(model)
    best.keep(model)
    kept, places = copy.deepcopy(best.state_dict()), [t.data_ptr() for t in best.state_dict().values()]
    train(model, create_optimizer(model, lr=0.1))
    assert same(list(kept.values()), list(best.state_dict().values()))
    assert not same(list(kept.values()), list(model.state_dict().values()))
    best.restore(model)
    assert same(list(kept.values()), list(model.state_dict().values()))
    train(model, create_optimizer(model, lr=0.1))
    best.keep(model)
    assert [t.data_ptr() for t in best.state_dict().values()] == places
    assert same(list(best.state_dict().values()), list(model.state_dict().values()))


def test_best_weights_unwrap():
    model, best = net(), BestWeights()
    best.keep(nn.DataParallel(model))
    assert list(best.state_dict()) == list(model.state_dict())
    other = net()
    best.restore(nn.DataParallel(other))
    assert same(list(other.state_dict().values()), list(model.state_dict().values()))


def test_best_weights_of_another_model_take_new_memory():
    best = BestWeights()
    best.keep(nn.Linear(2, 2))
    wide = nn.Linear(3, 2).double()
    best.keep(wide)
    assert best.state_dict()["weight"].shape == (2, 3) and best.state_dict()["weight"].dtype == torch.float64
    other = nn.Linear(3, 2).double()
    best.restore(other)
    assert torch.equal(other.weight, wide.weight)


def test_a_copy_that_is_cut_short_leaves_none(monkeypatch):
    """Half new and half old weights would be worse than none."""
    model, best = net(), BestWeights()
    best.keep(model)
    weights = dict(model.state_dict())
    weights["3.weight"] = torch.zeros(4, 1, 1, 1, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        best.load_state_dict(weights)
    assert not best.available


def test_who_asks_in_the_midst_of_a_copy_gets_whole_weights(monkeypatch):
    """The training thread keeps, and a cell asks: not for none, and not for half new and half old ones."""
    best, found, copy_all = BestWeights(), [], torch._foreach_copy_
    best.load_state_dict({"a": torch.zeros(3), "b": torch.zeros(3)})
    asking = threading.Thread(target=lambda: found.append((best.available, best.copied())))

    def halting(targets, sources):
        copy_all(targets[:1], sources[:1])
        asking.start()
        asking.join(0.2)
        assert asking.is_alive()
        copy_all(targets[1:], sources[1:])

    monkeypatch.setattr(torch, "_foreach_copy_", halting)
    best.load_state_dict({"a": torch.ones(3), "b": torch.ones(3)})
    asking.join(10)
    [(available, weights)] = found
    assert available and weights["a"].tolist() == weights["b"].tolist() == [1, 1, 1]


def test_best_weights_through_a_file():
    model, best = net(), BestWeights()
    best.keep(model)
    other = BestWeights()
    other.load_state_dict(through_a_file(best.state_dict()))
    fresh = net()
    other.restore(fresh)
    assert same(list(fresh.state_dict().values()), list(model.state_dict().values()))
    other.load_state_dict({})
    assert not other.available
