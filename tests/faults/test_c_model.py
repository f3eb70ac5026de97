"""What a model may give that a training cannot use. Numbers are those of the fault table."""

import pytest
import torch
from heard import Heard
from torch import nn

from unet_nbtrain import UNet, UNetTrainer, create_loss_function

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(n_classes=1):
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = (images * max(n_classes, 2)).long()
    return list(zip(images.split(2), (masks.float() if n_classes == 1 else masks[:, 0]).split(2), strict=True))


class Net(nn.Module):
    """A convolution whose output goes through a function of the test"""

    def __init__(self, change=lambda logits: logits, n_classes=1):
        super().__init__()
        torch.manual_seed(0)
        self.n_classes, self.layer, self.change = n_classes, nn.Conv2d(1, n_classes, 3, padding=1), change

    def forward(self, images):
        return self.change(self.layer(images))


@pytest.fixture
def make(tmp_path):
    def make(model, observer=None, **options):
        data = batches(model.n_classes)
        return UNetTrainer(model, data, data, device="cpu", run_dir=tmp_path / "run", observers=[observer] if observer else [], **options)

    return make


@pytest.mark.parametrize("change", [lambda o: [o, o], lambda o: (o,), lambda o: {"out": o}], ids=["list", "tuple", "dict"])
def test_050_outputs_that_are_no_tensor(make, change):
    with pytest.raises(TypeError, match=r"gave a (list|tuple|dict), not logits. Override training_step"):
        make(Net(change)).train(1)


def test_050_deep_supervision_by_an_own_training_step(make):
    """What the sentence advises works"""

    class Deep(UNetTrainer):
        def training_step(self, images, masks):
            first, second = self.model(images)
            return self.criterion(first, masks) + 0.5 * self.criterion(second, masks), first

    data = batches()
    trainer = Deep(Net(lambda o: [o, o]), data, data, device="cpu", run_dir=make(Net()).run_dir, observers=[])
    assert len(trainer.train(1)) == 1


@pytest.mark.parametrize(
    "change, n_classes, told",
    [(torch.sigmoid, 1, True), (lambda o: o.softmax(1), 3, True), (lambda o: o, 1, False), (lambda o: o, 3, False), (lambda o: o * 0, 1, False),
     (lambda o: o.sigmoid() / 9, 1, False), (torch.sigmoid, 3, False)],
)  # fmt: skip
def test_051_probabilities_instead_of_logits(make, change, n_classes, told):
    """A small net whose outputs happen to lie between 0 and 0.1 is not accused"""
    heard = Heard()
    make(Net(change, n_classes), heard).train(1)
    assert len([text for text in heard.problems if "The loss expects logits" in text and "take it out" in text]) == told


@pytest.mark.parametrize("n_classes", [1, 3])
def test_052_a_missing_channel_is_never_broadcast(make, n_classes):
    with pytest.raises(ValueError, match="shape"):
        make(Net(lambda o: o[:, 0], n_classes)).train(1)


@pytest.mark.parametrize("n_classes", [1, 3])
def test_053_another_size_than_the_masks(make, n_classes):
    with pytest.raises(ValueError, match="shape") as caught:
        make(Net(lambda o: o[..., ::2, ::2], n_classes)).train(1)
    assert "4, 4" in str(caught.value) and "8, 8" in str(caught.value)


@pytest.mark.parametrize("change", [torch.Tensor.detach, lambda o: (o > 0).float()], ids=["detach", "threshold"])
def test_054_an_output_without_gradient(make, change):
    with pytest.raises(ValueError, match="The loss has no gradient, so nothing can be learned. Does the model end in argmax"):
        make(Net(change)).train(1)


def test_055_parameters_that_take_no_part(make):
    model = Net()
    model.unused = nn.Linear(3, 3)
    before = model.unused.weight.clone()
    assert len(make(model, gradient_clip_norm=1.0, accumulate_gradients=2).train(2)) == 2
    assert torch.equal(model.unused.weight, before)


@pytest.mark.parametrize("n_classes", [1, 3])
@pytest.mark.parametrize("name", ["dice", "tversky"])
def test_056_sums_that_float16_cannot_hold(name, n_classes):
    """300 x 300 pixels are more than 65504, the largest number of float16"""
    logits = torch.full((1, n_classes, 300, 300), 4.0, dtype=torch.float16)
    masks = torch.ones(1, 300, 300).long()
    loss = create_loss_function(n_classes, name=name)(logits, masks[:, None].float() if n_classes == 1 else masks)
    assert loss.isfinite() and loss.dtype == torch.float32


def test_057_the_user_makes_another_model_meanwhile(make):
    """A cell that is run again binds the name to a new model; the training keeps its own"""
    model = UNet(1, 1, width=2, depth=1)
    kept = {}

    class Rebinding:
        def on_epoch_end(self, trainer, row):
            nonlocal model
            kept.setdefault("own", trainer.model)
            model = UNet(1, 1, width=2, depth=1)

    trainer = make(model, Rebinding())
    trainer.train(3)
    assert trainer.model is kept["own"] and trainer.model is not model
