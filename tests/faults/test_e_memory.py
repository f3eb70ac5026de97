"""A device or a machine that is full. Numbers are those of the fault table."""

import gc
import os
import resource
import weakref

import pytest
import torch
from heard import Heard
from torch import nn

from unet_nbtrain import UNet, UNetTrainer, create_optimizer, demo_dataloaders, passes
from unet_nbtrain.checkpoint import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_HERE = {
    72: "a device-side assert needs a GPU; it makes every later call fail, also those that would save",
    74: "another program that takes the GPU's memory needs a GPU; to the training it looks like row 68",
}
LOADERS = demo_dataloaders(n_train=16, n_val=6, size=32, batch_size=4, augment=None)


class Cramped(nn.Module):
    """A model without room for more than some images at once, in the forward or in the backward pass"""

    def __init__(self, room, where="forward", dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.n_classes, self.room, self.where, self.seen = 1, room, where, []
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Dropout2d(dropout), nn.Conv2d(4, 1, 1))

    def forward(self, images):
        full = len(images) > self.room and (self.where != "validation" or not self.training)
        if full:
            self.seen.append(weakref.ref(images))
        if full and self.where != "backward":
            raise torch.OutOfMemoryError(f"no room for {len(images)} images")
        logits = self.layers(images)
        if full:
            logits.register_hook(self._overflow)
        return logits

    def _overflow(self, gradient):
        raise torch.OutOfMemoryError("no room for a gradient")


@pytest.fixture
def make(tmp_path):
    def make(model, *observers, name="run", **options):
        optimizer = create_optimizer(model, "sgd", lr=0.1, momentum=0.0)
        return UNetTrainer(model, *LOADERS, optimizer=optimizer, device="cpu", run_dir=tmp_path / name, observers=observers, **options)

    return make


def weights(trainer):
    state = load_file(trainer.checkpoint_dir / "last.pth")
    return torch.cat([tensor.flatten() for tensor in state["model_state_dict"].values()])


def test_068_what_was_freed_goes_back_to_the_system(make, monkeypatch):
    """A training that keeps its memory would leave none for oneDNN, which maps its code by itself"""
    given = []
    monkeypatch.setattr(passes, "give_back", lambda: given.append(tight.parts_per_batch))
    tight = make(Cramped(1))
    tight.train(1)
    assert given == [1, 2]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("where", ["forward", "backward", "validation"])
@pytest.mark.parametrize("room, parts", [(2, 2), (1, 4)])
def test_068_the_batch_is_split_and_the_gradient_is_the_same(make, room, parts, where, accumulate):
    heard = Heard()
    roomy, tight = make(Cramped(100), name="roomy", accumulate_gradients=accumulate), make(Cramped(room, where), heard, accumulate_gradients=accumulate)
    for trainer in (roomy, tight):
        trainer.train(2)
    found = (tight.parts_per_batch, tight.val_parts_per_batch)
    assert found == ((1, parts) if where == "validation" else (parts, 1)) and tight.global_step == roomy.global_step
    assert torch.allclose(weights(roomy), weights(tight), atol=1e-6)
    for a, b in zip(roomy.history.rows, tight.history.rows):
        assert a["val"]["dice"] == pytest.approx(b["val"]["dice"]) and a["train"]["loss"] == pytest.approx(b["train"]["loss"], abs=1e-6)
    assert len(heard.problems) == (2 if parts == 4 else 1) and "The memory was full with 4 images" in heard.problems[0]
    means = "training goes on as it was" if where == "validation" else "batch norm sees the smaller parts"
    assert means in heard.problems[0] and "batch_size" in heard.problems[0]


def test_068_the_split_is_remembered_and_a_resume_is_exact(make):
    whole, part = make(Cramped(2, dropout=0.5), name="whole"), make(Cramped(2, dropout=0.5), name="part")
    whole.train(3)
    part.train(1)
    resumed = make(Cramped(2, dropout=0.5), name="part")
    resumed.train(3, resume="last")
    assert load_file(resumed.checkpoint_dir / "last.pth")["parts_per_batch"] == 2
    assert torch.equal(weights(whole), weights(resumed))


def test_068_a_validation_that_does_not_fit_changes_nothing_in_training(make):
    """Batch norm over one image and one pixel would raise, were training split like the validation"""
    heard, plain, tight = Heard(), Cramped(100), Cramped(2, "validation")
    for model in (plain, tight):
        model.layers[1] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Upsample(32))
    whole, split = make(plain, name="whole"), make(tight, heard, name="split")
    whole.train(2)
    split.train(1)
    resumed = make(tight, heard, name="split")
    resumed.train(2, resume="last")
    assert torch.equal(weights(whole), weights(resumed)) and len(heard.problems) == 1
    assert load_file(resumed.checkpoint_dir / "last.pth")["val_parts_per_batch"] == 2


def test_068_what_cannot_be_split_ends_the_run_and_keeps_it(make):
    trainer = make(Cramped(0), name="none")
    with pytest.raises(torch.OutOfMemoryError, match="no room for 1 images"):
        trainer.train(1)
    saved = load_file(trainer.checkpoint_dir / "last.pth")
    assert trainer.run.state == "failed" and saved["global_step"] == 0 and saved["parts_per_batch"] == trainer.parts_per_batch == 1
    trainer.model.room = 100
    assert len(trainer.train(1)) == 1 and trainer.parts_per_batch == 1
    strict = make(Cramped(2), name="strict", on_oom="raise")
    with pytest.raises(torch.OutOfMemoryError, match="no room for 4 images"):
        strict.train(1)
    assert strict.parts_per_batch == 1


@pytest.mark.parametrize("room, parts", [(2, 2), (0, 1)])
def test_068_the_words_of_onednn_may_mean_a_full_memory(make, room, parts):
    """It does not say why it could not create a primitive: if smaller parts do not help, its own error ends the run"""

    class Wordless(Cramped):
        def forward(self, images):
            if len(images) > self.room:
                raise RuntimeError("could not create a primitive")
            return super().forward(images)

    trainer = make(Wordless(room))
    if room:
        assert len(trainer.train(1)) == 1
    else:
        with pytest.raises(RuntimeError, match="^could not create a primitive$"):
            trainer.train(1)
    assert trainer.parts_per_batch == parts


def test_068_in_the_optimizer_s_own_step(make):
    """Half of the weights may have moved: the run ends with those of its last file"""
    trainer = make(Cramped(100))
    trainer.train(1)
    before = weights(trainer)

    def full(*args, **options):
        with torch.no_grad():
            next(trainer.model.parameters()).add_(1)
        raise torch.OutOfMemoryError("no room for moments")

    step, trainer.optimizer.step = trainer.optimizer.step, full
    with pytest.raises(torch.OutOfMemoryError, match="no room for moments"):
        trainer.train(1)
    trainer.optimizer.step = step
    assert torch.equal(weights(trainer), before)
    assert len(trainer.train(1)) == 2


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("aside", [False, True], ids=["in the cell", "in the background"])
def test_069_fifty_of_them_leave_no_memory_behind(make, aside):
    """Neither the traceback nor the trainer holds a tensor of a failed step; each is tried in a process that goes on"""
    model = Cramped(2)
    trainer, sizes = make(model, on_oom="raise"), []
    for _ in range(50):
        if aside:
            run = trainer.start(1)
            assert run.wait(60) and isinstance(run.exception, torch.OutOfMemoryError)
        else:
            with pytest.raises(torch.OutOfMemoryError):
                trainer.train(1)
        sizes.append(resident())
    gc.collect()
    assert len(model.seen) == 50 and not any(image() is not None for image in model.seen[:-1])
    assert sizes[-1] - sizes[9] < 8 * 2**20
    model.room = 100
    assert len(trainer.train(1)) == 1


def test_069_the_error_in_a_cell_holds_no_batch(make):
    model = Cramped(2)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        make(model, on_oom="raise").train(1)
    gc.collect()
    assert model.seen[0]() is None and caught.value.__context__ is None and caught.value.__cause__ is None


def test_076_too_many_open_files(make):
    """A checkpoint cannot be opened, which is told; the training goes on, and the next one is written"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    heard = Heard()

    class Closing:
        def on_epoch_start(self, trainer):
            trainer._finish_writing()  # A file is written beside the next epoch, and would meet either limit
            if trainer.current_epoch == 1:
                free = os.dup(0)
                os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free if trainer.current_epoch == 1 else soft, hard))

    trainer = make(UNet(3, 1, width=2, depth=1), Closing(), heard)
    try:
        trainer.train(4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert trainer.current_epoch == 4 and load_file(trainer.checkpoint_dir / "last.pth")["epoch"] == 4
    assert any("too many open files" in text and "untouched" in text for text in heard.problems)


def test_077_another_number_of_threads_is_told(make, caplog):
    trainer = make(UNet(3, 1, width=2, depth=1))
    trainer.train(1)
    torch.set_num_threads(2)
    try:
        make(UNet(3, 1, width=2, depth=1)).load_checkpoint(trainer.checkpoint_dir / "last.pth")
    finally:
        torch.set_num_threads(1)
    assert "may not repeat bit for bit" in caplog.text and "threads of PyTorch" in caplog.text
