"""Half precision needs a gradient scaler, which has a memory of its own; on the CPU it does what it does on a card."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from unet_nbtrain import UNet, UNetTrainer
from unet_nbtrain.trial import Twin

pytestmark = pytest.mark.usefixtures("one_thread")


def loader(count):
    draw = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(count, 1, 16, 16, generator=draw), torch.randint(0, 2, (count, 16, 16), generator=draw)), batch_size=4)


@pytest.fixture
def make(tmp_path):
    def make(count=8, model=None, **options):
        torch.manual_seed(0)
        trainer = UNetTrainer(model or UNet(1, 1, width=2, depth=1), loader(count), loader(4), device="cpu", run_dir=tmp_path, observers=[], **options)
        trainer.scaler = torch.amp.GradScaler("cpu")
        return trainer

    return make


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_run_after_an_error_within_the_optimizer_goes_on(make, monkeypatch):
    trainer = make()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.optim.AdamW, "step", full)
        trainer.train(1)
    trainer.train(1)
    assert trainer.global_step == 2 and trainer.scaler.get_scale() == 2**16


def test_a_batch_is_split_where_the_memory_is_full_in_clipping(make, monkeypatch):
    trainer, clip, hits = make(gradient_clip_norm=1.0), torch.nn.utils.clip_grad_norm_, []

    def once(*given):
        hits.append(1)
        return full() if len(hits) == 1 else clip(*given)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", once)
    trainer.train(1)
    assert trainer.parts_per_batch == 2 and trainer.global_step == 2 and len(hits) == 3


def test_gradients_that_are_never_finite_end_the_run(make):
    model = UNet(1, 1, width=2, depth=1)
    model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    trainer = make(count=4 * 41, model=model)
    with pytest.raises(FloatingPointError, match="NaN or infinite at any scale"):
        trainer.train(3)


def test_a_scale_that_is_being_looked_for_ends_nothing(make):
    model, steps = UNet(1, 1, width=2, depth=1), []
    model.head.weight.register_hook(lambda gradient: steps.append(1) or gradient * (math.inf if len(steps) < 12 else 1))
    trainer = make(count=4 * 12, model=model)
    trainer.train(1)
    assert trainer.scaler.get_scale() == 2.0**5 and len(trainer.history.rows) == 1


def test_trials_are_scaled_like_the_training(make):
    gradients = []

    def criterion(logits, masks):
        logits.register_hook(gradients.append)
        return F.binary_cross_entropy_with_logits(logits.squeeze(1), masks.float())

    trainer = make(criterion=criterion)
    twin, batch = Twin(trainer), next(iter(trainer.train_loader))
    scaled = twin.step(batch)
    trainer.scaler = None
    assert Twin(trainer).step(batch) == scaled
    assert torch.equal(gradients[0], 2**16 * gradients[1])
