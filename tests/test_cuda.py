"""What only a graphics card can show. Everything here is skipped where there is none; see CONTRIBUTING.md for how to run it."""

import contextlib
import copy
import gc
import itertools
import logging
import os
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from unet_nbtrain import UNet, UNetPredictor, UNetTrainer, create_loss_function, verify_resume
from unet_nbtrain.batch_size import auto_batch, try_size
from unet_nbtrain.core import Carrier, move
from unet_nbtrain.enlarge import enlarge
from unet_nbtrain.epoch import averaged_model, follow
from unet_nbtrain.guard import FiniteGuard, is_out_of_memory
from unet_nbtrain.quick_step import quick_step
from unet_nbtrain.trial import find_rate, try_one_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def data(count=24, channels=1, size=32, kind=torch.float32):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, size, size), generator=draw, dtype=torch.uint8)
    masks = (images[:, 0] > 127).to(torch.uint8)
    return TensorDataset(images if kind == torch.uint8 else images / 255, masks)


def loaders(count=24, batch=4, workers=0, **options):
    made = [DataLoader(data(n, **options), batch_size=batch, shuffle=n == count, num_workers=workers, pin_memory=True) for n in (count, 6)]
    return made


class Dropping(UNet):
    """Draws random numbers in each level"""

    def __init__(self, width=4, depth=2, channels=1):
        super().__init__(channels, 1, width=width, depth=depth)
        for block in (self.stem, *self.downs, *(up.conv for up in self.ups)):
            block.append(nn.Dropout2d(0.1))


def trainer(tmp_path, name="run", model=Dropping, load=None, kind=UNetTrainer, observers=(), **settings):
    torch.manual_seed(0)
    train, val = load or loaders()
    return kind(model(), train, val, device="cuda", run_dir=tmp_path / name, observers=list(observers), **settings)


def trained(tmp_path, name="run", epochs=2, **settings):
    made = trainer(tmp_path, name, **settings)
    made.train(epochs)
    return made


def state(made):
    return {name: value.detach().cpu().clone() for name, value in made.model.state_dict().items()}


def losses(made):
    return [row[part]["loss"] for row in made.history.rows for part in ("train", "val")]


def assert_near(one, other, by):
    assert losses(one) == pytest.approx(losses(other), rel=by)
    a, b = state(one), state(other)
    far = [name for name in a if a[name].is_floating_point() and not torch.allclose(a[name], b[name], rtol=by, atol=by)]
    assert not far


class Told:
    def __init__(self):
        self.texts = []

    def on_problem(self, trainer, text):
        self.texts.append(text)


class Strict:
    """From the third training step to the last but two, waiting for the card is an error"""

    def __init__(self):
        self.steps = 0

    def on_batch_end(self, trainer, loss):
        if trainer.phase == "train":
            self.steps += 1
            if trainer.batch in (2, trainer.num_batches - 2):
                torch.cuda.set_sync_debug_mode("error" if trainer.batch == 2 else "default")


MODES = [
    {},
    {"amp": False},
    {"amp": "fp16"},
    {"gradient_clip_norm": 1.0},
    {"accumulate_gradients": 2},
    {"ema_decay": 0.9},
    {"channels_last": False},
    {"checkpoint": "auto"},
    {"checkpoint": "sliced"},
    {"save_every_n_minutes": 10},
    {"optimizer": "adam"},
    {"optimizer": "sgd"},
]


def watched(tmp_path, **settings):
    """Trained under watch; how many steps there were"""
    made = trainer(tmp_path, observers=[strict := Strict()], **settings)
    run = made.start(2)
    run.wait(120)
    torch.cuda.set_sync_debug_mode("default")
    assert run.exception is None, run.traceback
    return strict.steps


LOSSES = [{"criterion": name} for name in ("focal", "dice", "tversky", "bce_dice")]


@pytest.mark.parametrize("settings", [*MODES, *LOSSES], ids=str)
def test_no_value_is_read_in_a_step(tmp_path, settings):
    assert watched(tmp_path, load=loaders(240), **settings) == 120


@pytest.mark.parametrize("name", ["auto", "focal", "dice", "tversky", "sum"])
@pytest.mark.parametrize("classes", [1, 3])
def test_no_value_is_read_with_ignored_pixels(tmp_path, classes, name):
    images, masks = data(160).tensors
    masks = torch.where(torch.rand(masks.shape) < 0.3, 255, masks.long())
    load = [DataLoader(TensorDataset(images, masks), batch_size=4, pin_memory=True)] * 2
    name = {1: "bce_dice", 3: "ce_dice"}[classes] if name == "sum" else name
    criterion = create_loss_function(classes, name=name, ignore_index=255)
    assert watched(tmp_path, load=load, model=lambda: UNet(1, classes, width=4, depth=1), criterion=criterion) == 80


# ---- parts
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_quick_step_is_the_optimizers_own(kind, amsgrad, found):
    torch.manual_seed(0)
    one = UNet(1, 1, width=4, depth=1).to(CUDA, memory_format=torch.channels_last)
    other = copy.deepcopy(one)
    optimizers = [kind(model.parameters(), lr=1e-2, weight_decay=0.1, amsgrad=amsgrad, fused=True) for model in (one, other)]
    for step in range(4):
        for a, b in zip(one.parameters(), other.parameters()):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        flag = None if found is None or step == 0 else torch.full((), found, device=CUDA)
        quick_step(optimizers[0], flag)
        if flag is not None:
            optimizers[1].grad_scale, optimizers[1].found_inf = None, flag
        optimizers[1].step()
        if flag is not None:
            del optimizers[1].grad_scale, optimizers[1].found_inf
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    for a, b in zip(one.parameters(), other.parameters()):
        assert all(torch.equal(optimizers[0].state[a][name], optimizers[1].state[b][name]) for name in optimizers[0].state[a])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(64, 96), (63, 95), (64, 95)])
def test_enlarged_as_on_the_processor(kind, size):
    torch.manual_seed(0)
    small, way = torch.randn(3, 8, 32, 48).to(kind), torch.randn(3, 8, *size)
    exact = small.float().clone().requires_grad_()
    (enlarge(exact, size) * way).sum().backward()
    grads = []
    for _ in range(3):
        x = small.to(CUDA, memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cuda", kind if kind != torch.float32 else torch.bfloat16):
            y = enlarge(x, size)
        (y.float() * way.to(CUDA)).sum().backward()
        grads.append(x.grad)
    by = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[kind]
    assert y.dtype == kind and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(y.float().cpu(), enlarge(exact, size), rtol=by, atol=by) and torch.allclose(grads[0].float().cpu(), exact.grad, rtol=by, atol=10 * by)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("layout", [True, False])
def test_a_batch_is_carried(pinned, layout):
    carry, busy = Carrier(CUDA, channels_last=layout), torch.rand(3000, 3000, device=CUDA)
    for _ in range(20):
        images, masks = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), torch.randint(0, 2, (4, 64, 64), dtype=torch.uint8)
        given = (images.pin_memory(), masks.pin_memory()) if pinned else (images, masks)
        busy = busy @ busy / 3000
        x, y = carry(*given)
        assert torch.allclose(x.cpu(), move(images, masks, torch.device("cpu"))[0]) and torch.equal(y.cpu(), masks)
        assert x.is_contiguous(memory_format=torch.channels_last) is layout


def test_a_batch_that_is_computed_on_the_card(tmp_path):
    """The copy must not overtake the computing of what is copied"""
    carry, busy = Carrier(CUDA), torch.rand(4000, 4000, device=CUDA)
    for turn in range(5):
        images = torch.full((1, 1, 256, 256), -1.0, device=CUDA)
        for _ in range(20):
            busy = busy @ busy / 4000
        images.fill_(turn).add_(busy[0, 0].isnan())
        x, _ = carry(images, torch.zeros(1, 256, 256, dtype=torch.uint8))
        assert x.unique().tolist() == [turn]


class Bad(Dataset):
    """One image with a NaN"""

    def __init__(self, at):
        self.at, (self.images, self.masks) = at, data(48).tensors

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] * (float("nan") if index == self.at else 1), self.masks[index]


@pytest.mark.parametrize("amp", ["bf16", "fp16", False])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_a_bad_batch_changes_nothing(tmp_path, amp, optimizer):
    load = [DataLoader(Bad(22), batch_size=4), DataLoader(data(6), batch_size=4)]
    told = Told()
    made = trained(tmp_path, epochs=1, load=load, observers=[told], amp=amp, optimizer=optimizer)
    assert all(value.isfinite().all() for value in state(made).values())
    assert made.history.rows[0]["skipped_steps"] == 1 and made.global_step == 12
    assert any("batch 6)" in text for text in told.texts)
    assert torch.isfinite(torch.tensor(losses(made))).all()


def test_many_bad_batches_are_told_and_ended(tmp_path):
    images, masks = data(160).tensors
    load = [DataLoader(TensorDataset(images * float("nan"), masks), batch_size=4), DataLoader(data(6), batch_size=4)]
    made = trainer(tmp_path, load=load)
    with pytest.raises((RuntimeError, FloatingPointError, ValueError)):
        made.train(1)
    assert all(value.isfinite().all() for value in state(made).values())


def test_the_guard_knows_without_asking():
    model = UNet(1, 1, width=2, depth=1).to(CUDA)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = FiniteGuard(model, optimizer)
    for turn, scale in enumerate((1.0, float("inf"), 1.0)):
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.rand(1, 1, 8, 8, device=CUDA)).mean().mul(scale).backward()
        if turn:
            torch.cuda.set_sync_debug_mode("error")
        try:
            verdict = guard.judge(optimizer)
            guard.step(optimizer, verdict)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (verdict.known is None) is (turn > 0)
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters())) is (scale == 1.0)
        optimizer.zero_grad()


# ---- runs
RESUMED = [{}, {"amp": False}, {"amp": "fp16"}, {"ema_decay": 0.9, "accumulate_gradients": 2}, {"checkpoint": "auto"}, {"optimizer": "sgd"}]


@pytest.mark.parametrize("settings", RESUMED, ids=str)
def test_exact_resume(tmp_path, settings):
    report = verify_resume(trainer(tmp_path, deterministic=True, **settings), steps=8)
    assert report.exact, str(report)


def test_exact_resume_with_workers_and_bytes(tmp_path):
    report = verify_resume(trainer(tmp_path, load=loaders(workers=2, kind=torch.uint8), deterministic=True), steps=8)
    assert report.exact, str(report)


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_that_stepped_before_its_model_came_to_the_card(tmp_path, fused):
    model = Dropping()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    model(torch.rand(2, 1, 16, 16)).mean().backward()
    optimizer.step()
    made = trained(tmp_path, epochs=1, model=lambda: model, optimizer=optimizer)
    assert {value.device.type for entry in optimizer.state.values() for name, value in entry.items() if name != "step"} == {"cuda"}
    assert made.global_step == 6


def test_bytes_and_floats_train_alike(tmp_path):
    one = trained(tmp_path, "bytes", load=loaders(kind=torch.uint8), deterministic=True)
    other = trained(tmp_path, "floats", load=loaders(), deterministic=True)
    assert_near(one, other, 1e-4)


FULL = pytest.mark.skipif(os.environ.get("FULL") != "1", reason="minutes of searching for kernels; FULL=1")
QUICK = [{"cuda_graph": True}, {"compile": "default"}, {"compile": "default", "checkpoint": "auto"}, pytest.param({"compile": "max"}, marks=FULL)]


@pytest.mark.parametrize("settings", QUICK, ids=str)
@pytest.mark.parametrize("amp", [False, "bf16"])
def test_quick_ways_train_like_the_plain_one(tmp_path, settings, amp):
    torch._dynamo.reset()
    plain, told = trained(tmp_path, "plain", amp=amp, load=loaders(26), model=lambda: UNet(1, 1, width=4, depth=2)), Told()
    quick = trained(tmp_path, "quick", amp=amp, load=loaders(26), observers=[told], model=lambda: UNet(1, 1, width=4, depth=2), **settings)
    assert told.texts == []
    assert losses(quick) == pytest.approx(losses(plain), rel=2e-3 if amp is False else 3e-2)


def test_a_step_is_captured_beside_a_thread_that_pins(tmp_path):
    """The loader's thread asks for pinned memory all the time, of ever new sizes"""
    told = Told()
    load = loaders(80, workers=2)
    load[0].collate_fn = more_and_more
    made = trained(tmp_path, epochs=2, load=load, cuda_graph=True, observers=[told])
    assert told.texts == [] and made.global_step == 40 and made._failed == frozenset()


SIZES = itertools.count(1)


def more_and_more(samples):
    images, masks = torch.utils.data.default_collate(samples)
    return {"image": images, "mask": masks, "other": torch.zeros(next(SIZES) * 2**20, dtype=torch.uint8)}


def test_a_captured_step_and_a_short_batch_of_a_list(tmp_path):
    batches, told = [(images, masks) for images, masks in loaders(9)[0]], Told()
    pair = [batches, batches[:1]]
    plain = trained(tmp_path, "plain", load=pair, amp=False, model=lambda: UNet(1, 1, width=4, depth=2))
    quick = trained(tmp_path, "quick", load=pair, amp=False, model=lambda: UNet(1, 1, width=4, depth=2), cuda_graph=True, observers=[told])
    assert told.texts == [] and losses(quick) == pytest.approx(losses(plain), rel=2e-3)


def test_a_capture_that_fails_leaves_the_stream(tmp_path):
    class Asking(nn.Module):
        def forward(self, x):
            float(x.sum())  # Waits for the card, which no capture allows
            return x

    def model():
        made = UNet(1, 1, width=4, depth=1)
        made.stem.insert(0, Asking())
        return made

    before, told = torch.cuda.current_stream(), Told()
    made = trained(tmp_path, epochs=1, model=model, cuda_graph=True, observers=[told])
    assert len(told.texts) == 1 and "The captured step (CUDA graph) did not work here" in told.texts[0]
    assert torch.cuda.current_stream() == before and made.global_step == 6


def test_the_share_of_waiting_is_that_of_the_card(tmp_path):
    """Reading takes time in the same thread, while the card has more to do than that"""

    class Slow(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            time.sleep(0.005)
            return torch.rand(1, 32, 32), torch.zeros(32, 32, dtype=torch.long)

    class Busy:
        def on_batch_end(self, trainer, loss):
            torch.cuda._sleep(int(1e8))  # Some 50 ms

    load = [DataLoader(Slow(), batch_size=2), loaders()[1]]
    idle, busy = (trained(tmp_path, str(len(watch)), load=load, observers=watch).history.rows[-1]["data_wait"] for watch in ([], [Busy()]))
    assert busy < 0.1 < idle


def test_a_captured_run_resumes_exactly(tmp_path):
    report = verify_resume(trainer(tmp_path, deterministic=True, cuda_graph=True), steps=8)
    assert report.exact, str(report)


def test_a_captured_run_hears_a_new_rate_and_draws_new_numbers(tmp_path):
    class Slower:
        def on_batch_end(self, trainer, loss):
            if trainer.global_step == 3:
                trainer.run.set("lr", 1e-12)

    made = trained(tmp_path, epochs=1, cuda_graph=True, observers=[Slower(), told := Told()], optimizer="sgd")
    weights = {name: value for name, value in state(made).items() if "running" not in name and "num_batches" not in name}
    other = trained(tmp_path, "other", epochs=1, observers=[Slower()], optimizer="sgd")
    assert told.texts == [] and made.optimizer.param_groups[0]["lr"] == pytest.approx(1e-12)
    assert all(torch.allclose(weights[name], state(other)[name], atol=2e-2) for name in weights)


def test_recomputing_saves_memory_and_changes_no_bit(tmp_path):
    peaks, states = [], []
    for name in ("none", "auto", "sliced"):
        gc.collect(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        made = trained(tmp_path, name, epochs=1, load=loaders(8, channels=3, size=256), model=lambda: Dropping(16, 3, 3), checkpoint=name, deterministic=True)
        peaks.append(torch.cuda.max_memory_allocated())
        states.append(state(made))
        del made
    assert peaks[0] > 1.3 * peaks[1] and peaks[0] > 1.5 * peaks[2]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@contextlib.contextmanager
def no_more_than(bytes_):
    """The card as if it were smaller"""
    gc.collect(), torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + bytes_) / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def wide(tmp_path, name="run", count=16, batch=8, size=256, **settings):
    return trainer(tmp_path, name, load=loaders(count, batch, channels=3, size=size), model=lambda: Dropping(16, 3, 3), **settings)


def test_a_batch_that_does_not_fit_is_split(tmp_path):
    gc.collect(), torch.cuda.reset_peak_memory_stats()
    wide(tmp_path, "whole").train(1)
    peak, told = torch.cuda.max_memory_reserved(), Told()
    made = wide(tmp_path, observers=[told])
    with no_more_than(0.6 * peak):
        made.train(2)
    assert made.parts_per_batch in (2, 4, 8) and len(made.history.rows) == 2
    assert "The memory was full with 8 images" in told.texts[0]


def test_a_batch_that_never_fits_is_told_and_the_memory_is_free(tmp_path):
    made = wide(tmp_path, count=4, batch=1, size=512)
    before = torch.cuda.memory_allocated()
    with no_more_than(1e8), pytest.raises(RuntimeError, match="out of memory"):
        made.train(1)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 3e7
    made.train(1)
    assert len(made.history.rows) == 1


def test_pause_save_stop_from_another_thread(tmp_path):
    made = trainer(tmp_path, load=loaders(400))
    run = made.start(50)
    for _ in range(3):
        run.pause().wait(20)
        assert run.state == "paused"
        step = made.global_step
        time.sleep(0.05)
        assert made.global_step == step
        run.set("lr", 5e-4).wait(20)
        run.resume().wait(20)
        run.save().wait(20)
    run.stop()
    run.wait(60)
    assert run.exception is None and (made.checkpoint_dir / "last.pth").exists()
    again = trainer(tmp_path, load=loaders(400))
    again.load_checkpoint(made.checkpoint_dir / "last.pth")
    assert again.global_step == made.global_step


def test_trials_leave_no_trace(tmp_path):
    made = trained(tmp_path, epochs=1)
    gc.collect(), torch.cuda.empty_cache()
    before, memory, random = state(made), torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    said = try_one_batch(made)
    find_rate(made)
    found = auto_batch(made, most=16)
    gc.collect()
    assert all(torch.equal(before[name], value) for name, value in state(made).items())
    assert torch.equal(random, torch.cuda.get_rng_state())
    assert torch.cuda.memory_allocated() - memory < 1e6
    assert found.largest == 16 and all(one.memory > 0 for one in found.tried) and str(said)


def test_auto_batch_finds_the_edge(tmp_path):
    made = wide(tmp_path, count=8, batch=2)
    memory = torch.cuda.memory_allocated()
    with no_more_than(2e9):
        found = auto_batch(made, most=256)
    gc.collect()
    assert 4 < found.largest < 256 and torch.cuda.memory_allocated() - memory < 1e6


def test_a_tried_batch_has_room_for_an_average_and_for_gathered_gradients(tmp_path):
    wide, sample = (lambda: UNet(1, 1, width=64, depth=3)), data(1).tensors
    plain = trainer(tmp_path, model=wide)
    size = sum(p.numel() * p.element_size() for p in plain.model.parameters())
    need = {}
    for options in ({}, {"ema_decay": 0.9}, {"accumulate_gradients": 2}):
        need[str(options)] = try_size(trainer(tmp_path, model=wide, **options), sample, 1).memory
    bare, averaged, gathered = need.values()
    assert averaged - bare > 0.8 * size and gathered >= bare


def test_nothing_stays_on_the_card(tmp_path):
    gc.collect(), torch.cuda.empty_cache()
    before = None
    for turn in range(4):
        made = trained(tmp_path, f"run{turn}", epochs=1, cuda_graph=turn % 2 == 0)
        del made
        gc.collect()
        before = torch.cuda.memory_allocated() if before is None else before
    assert torch.cuda.memory_allocated() - before < 2e6


def test_a_file_of_the_card_opens_without_one(tmp_path):
    made = trained(tmp_path, epochs=1)
    found = torch.load(made.checkpoint_dir / "best_model.pth", map_location="cpu", weights_only=True)
    assert all(value.device.type == "cpu" for value in found["model_state_dict"].values())
    on_cpu = UNetTrainer(Dropping(), *loaders(), device="cpu", run_dir=tmp_path / "cpu", observers=[])
    on_cpu.load_checkpoint(made.checkpoint_dir / "last.pth")
    on_cpu.train(1)
    assert on_cpu.global_step == 12


def test_predictions_are_those_of_the_cpu(tmp_path):
    made = trained(tmp_path, model=lambda: UNet(1, 1, width=4, depth=2))
    image = data(1, size=70).tensors[0][0, 0].mul(255).to(torch.uint8).numpy()
    with contextlib.suppress(ImportError):
        a, b = (UNetPredictor(made.checkpoint_dir / "best_model.pth", device=device).predict_single(image) for device in ("cuda", "cpu"))
        assert (a.mask != b.mask).mean() < 0.01


def test_an_average_of_weights_lies_on_the_card(tmp_path):
    made = trained(tmp_path, ema_decay=0.9)
    assert all(value.device.type == "cuda" for value in made.averaged.module.state_dict().values())


def test_an_average_of_weights_passes_over_a_bad_step_and_costs_few_kernels(tmp_path):
    images, masks = data(16).tensors
    images[8:12] = torch.nan
    batches = list(zip(images.split(4), masks.split(4)))
    model = trained(tmp_path, epochs=1, load=(batches, batches[:1]), ema_decay=0.5).averaged
    assert model.n_averaged == 3 and all(value.isfinite().all() for value in model.state_dict().values())
    one, other, new = averaged_model(model), averaged_model(model), copy.deepcopy(model)
    torch._foreach_mul_(list(new.parameters()), 3.0)
    follow(one, new, 0.9, torch.ones((), device=CUDA))
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        follow(one, new, 0.9, torch.zeros((), device=CUDA))
    follow(other, new, 0.9)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(one.parameters(), other.parameters()))
    assert 0 < sum(event.count for event in seen.key_averages()) < 80


def test_an_engine_that_is_not_found_means_a_full_card():
    error = RuntimeError("FIND was unable to find an engine to execute this computation")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    if free < 0.8 * total:
        pytest.skip("somebody else is at work on the card")
    assert not is_out_of_memory(error)
    block = torch.empty(int(0.6 * total), dtype=torch.uint8, device=CUDA)
    assert is_out_of_memory(error)
    del block  # The cache of PyTorch is not in use
    assert not is_out_of_memory(error)
    torch.cuda.empty_cache()


def test_the_last_weights_wait_in_main_memory(tmp_path):
    whole, made = trained(tmp_path, "whole", 3), trained(tmp_path, "parts", 2)
    assert all(value.device.type == "cpu" for value in made._last_weights.weights.values())
    made.train(1)
    assert losses(made) == losses(whole)


def test_all_observers(tmp_path):
    logging.disable(logging.NOTSET)
    torch.manual_seed(0)
    made = UNetTrainer(Dropping(), *loaders(), device="cuda", run_dir=tmp_path / "run")
    made.train(2)
    assert (tmp_path / "run" / "history.json").exists() and made.device == CUDA
