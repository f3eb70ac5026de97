"""The U-Net against a second implementation, a formula for its parameters, and sizes that nobody would choose."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from unet_nbtrain.unet_model import UNet, Up

FORMS = pytest.mark.parametrize("bilinear", [True, False], ids=["bilinear", "transposed"])


pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(model):
    """The model with random running statistics and scales, so that a wrongly wired normalisation shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


# --- the number of parameters, from the text of the paper and not from the code


def expected_parameters(channels, classes, bilinear, width, depth):
    """Two kernels without bias and two normalisations a block; see the widespread implementation's block sizes."""

    def block(a, mid, b):
        return 9 * a * mid + 2 * mid + 9 * mid * b + 2 * b

    half = 2 if bilinear else 1
    total = block(channels, width, width)
    for level in range(1, depth + 1):
        out = width * 2**level // (half if level == depth else 1)
        total += block(width * 2 ** (level - 1), out, out)
    for level in range(depth, 0, -1):
        joined, skip = width * 2**level, width * 2 ** (level - 1)
        out = skip if level == 1 else skip // half
        total += block(joined, joined // 2 if bilinear else out, out)
        total += 0 if bilinear else 4 * joined * skip + skip
    return total + width * classes + classes


def test_the_two_well_known_numbers():
    with torch.device("meta"):
        assert UNet(3, 1).get_model_size() == 17_262_977 == expected_parameters(3, 1, True, 64, 4)
        assert UNet(3, 1, bilinear=False).get_model_size() == 31_037_633 == expected_parameters(3, 1, False, 64, 4)


@FORMS
@pytest.mark.parametrize("width", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8])
def test_parameters_by_formula(width, depth, bilinear):
    with torch.device("meta"):
        model = UNet(2, 5, bilinear=bilinear, width=width, depth=depth)
    assert model.get_model_size() == expected_parameters(2, 5, bilinear, width, depth)
    assert model.get_model_size() == sum(p.numel() for p in model.parameters())


# --- a second implementation: the widespread one, written down again


def double(channels, out, mid=None):
    mid = mid or out
    first = [nn.Conv2d(channels, mid, 3, padding=1, bias=False), nn.BatchNorm2d(mid), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(mid, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class ClassicUp(nn.Module):
    def __init__(self, joined, out, bilinear):
        super().__init__()
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = double(joined, out, joined // 2)
        else:
            self.up = nn.ConvTranspose2d(joined, joined // 2, kernel_size=2, stride=2)
            self.conv = double(joined, out)

    def forward(self, below, skip):
        return self.conv(torch.cat([skip, self.up(below)], dim=1))


class Classic(nn.Module):
    """Depth 4, even sizes only: floor pooling, enlarging by two."""

    def __init__(self, channels, classes, bilinear, width):
        super().__init__()
        half, w = 2 if bilinear else 1, width
        self.inc = double(channels, w)
        self.down1, self.down2 = double(w, 2 * w), double(2 * w, 4 * w)
        self.down3, self.down4 = double(4 * w, 8 * w), double(8 * w, 16 * w // half)
        self.up1, self.up2 = ClassicUp(16 * w, 8 * w // half, bilinear), ClassicUp(8 * w, 4 * w // half, bilinear)
        self.up3, self.up4 = ClassicUp(4 * w, 2 * w // half, bilinear), ClassicUp(2 * w, w, bilinear)
        self.outc = nn.Conv2d(w, classes, kernel_size=1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(self.pool(x1))
        x3 = self.down2(self.pool(x2))
        x4 = self.down3(self.pool(x3))
        x = self.up1(self.down4(self.pool(x4)), x4)
        return self.outc(self.up4(self.up3(self.up2(x, x3), x2), x1))


@FORMS
def test_equals_the_classic_network_for_even_sizes(bilinear):
    ours, classic = noisy(UNet(3, 2, bilinear=bilinear, width=4)), Classic(3, 2, bilinear, 4).eval()
    weights = list(ours.state_dict().values())
    assert [w.shape for w in weights] == [w.shape for w in classic.state_dict().values()]
    classic.load_state_dict(dict(zip(classic.state_dict(), weights)))
    for size in [(16, 16), (32, 48), (80, 16)]:
        images = torch.rand(2, 3, *size)
        assert torch.equal(ours(images), classic(images))


@FORMS
def test_equals_the_classic_network_in_training(bilinear):
    ours, classic = UNet(1, 1, bilinear=bilinear, width=2), Classic(1, 1, bilinear, 2)
    classic.load_state_dict(dict(zip(classic.state_dict(), ours.state_dict().values())))
    images = torch.rand(2, 1, 32, 32)
    for model in (ours, classic):
        model(images).square().sum().backward()
    for a, b in zip(ours.parameters(), classic.parameters()):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(ours.buffers(), classic.buffers()):
        assert torch.equal(a, b)


# --- sizes


@FORMS
@pytest.mark.parametrize("height", [1, 2, 3, 5, 16, 17, 31])
@pytest.mark.parametrize("width", [1, 2, 7, 15, 16, 33])
def test_any_size(height, width, bilinear):
    model = UNet(2, 3, bilinear=bilinear, width=2, depth=4).eval()
    out = model(torch.rand(2, 2, height, width))
    assert out.shape == (2, 3, height, width)
    assert out.isfinite().all()


@FORMS
@pytest.mark.parametrize("depth", [1, 2, 3, 6, 8])
def test_any_depth(depth, bilinear):
    model = UNet(1, 1, bilinear=bilinear, width=1, depth=depth).eval()
    for size in [(1, 1), (5, 9), (64, 31)]:
        assert model(torch.rand(1, 1, *size)).shape == (1, 1, *size)


@FORMS
@pytest.mark.parametrize("size", [(15, 17), (1, 9), (33, 2)])
def test_odd_sizes_train(size, bilinear):
    model = UNet(1, 1, bilinear=bilinear, width=2, depth=2).train()
    model(torch.rand(2, 1, *size)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@FORMS
def test_no_border_pixel_is_dropped(bilinear):
    """Pooling that rounds down would lose the last row and column of an odd size."""
    model = noisy(UNet(1, 1, bilinear=bilinear, width=4, depth=3))
    image = torch.rand(1, 1, 17, 17)
    changed = image.clone()
    changed[..., -1, -1] += 5
    deep = model.downs[2](model.pool(model.downs[1](model.pool(model.downs[0](model.pool(model.stem(image)))))))
    other = model.downs[2](model.pool(model.downs[1](model.pool(model.downs[0](model.pool(model.stem(changed)))))))
    assert deep.shape[-2:] == (3, 3)
    assert not torch.equal(deep[..., 2, 2], other[..., 2, 2])


def test_an_empty_batch_gives_an_empty_batch():
    assert UNet(1, 2, width=2, depth=1).eval()(torch.rand(0, 1, 8, 8)).shape == (0, 2, 8, 8)


# --- gradients, dtypes, layouts


@FORMS
def test_every_parameter_gets_a_gradient(bilinear):
    model = UNet(3, 2, bilinear=bilinear, width=4, depth=3)
    model(torch.rand(2, 3, 32, 24)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_the_image_gets_a_gradient_and_is_not_changed():
    """The ReLU works in place: it must not reach back into the image."""
    images = torch.rand(2, 1, 16, 16, requires_grad=True)
    before = images.detach().clone()
    UNet(1, 1, width=2, depth=2)(images).sum().backward()
    assert torch.equal(images, before) and images.grad.abs().sum() > 0


def test_logits_not_probabilities():
    out = UNet(1, 1, width=4, depth=2)(10 * torch.randn(4, 1, 32, 32))
    assert out.min() < 0


def test_double_autocast_and_channels_last():
    model = noisy(UNet(3, 2, width=4, depth=2))
    images = torch.rand(2, 3, 32, 32)
    expected = model(images)
    assert copy.deepcopy(model).double()(images.double()).dtype == torch.float64
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images).dtype == torch.bfloat16


# --- rebuilt, copied, traced


@FORMS
def test_config_rebuilds_the_model(bilinear):
    model = noisy(UNet(2, 3, bilinear=bilinear, width=3, depth=2))
    config = json.loads(json.dumps(model.config))
    assert config == {"n_channels": 2, "n_classes": 3, "bilinear": bilinear, "width": 3, "depth": 2}
    assert list(config) == ["n_channels", "n_classes", "bilinear", "width", "depth"]
    again = UNet(**config).eval()
    again.load_state_dict(model.state_dict())
    images = torch.rand(1, 2, 9, 9)
    assert torch.equal(model(images), again(images))
    assert (again.n_channels, again.n_classes) == (2, 3)


def test_config_is_plain_python_for_numpy_arguments():
    import numpy as np

    config = UNet(np.int64(1), np.int32(2), width=np.int64(4), depth=np.int8(1)).config
    assert {type(value) for value in config.values()} == {int, bool}


def test_copy_and_pickle():
    model = UNet(1, 1, width=2, depth=1).eval()
    image = torch.rand(1, 1, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(image), model(image)) and twin.config == model.config


@FORMS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_for_one_size_works_for_others(bilinear):
    model = noisy(UNet(1, 2, bilinear=bilinear, width=4, depth=3))
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.rand(1, 1, 16, 16))
        for size in [(16, 16), (33, 17), (1, 1), (40, 9)]:
            images = torch.rand(2, 1, *size)
            assert torch.equal(traced(images), model(images))


@pytest.mark.skipif(not hasattr(torch.export.Dim, "AUTO"), reason="torch.export.Dim.AUTO is newer than this torch")
def test_exported_with_dynamic_sizes():
    model = noisy(UNet(1, 2, width=2, depth=2))
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(model, (torch.rand(2, 1, 32, 32),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    images = torch.rand(3, 1, 33, 21)
    assert torch.allclose(exported.module()(images), model(images), atol=1e-5)


# --- errors


@pytest.mark.parametrize("name", ["n_channels", "n_classes", "width", "depth"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True])
def test_arguments_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=rf"^{name}={value!r}: {name} is .* whole number"):
        UNet(**{"n_channels": 3, "n_classes": 1, "width": 4, "depth": 2, name: value})


def test_too_deep_and_positional_width():
    with pytest.raises(ValueError, match="depth=9.*from 1 to 8"):
        UNet(3, 1, depth=9)
    with pytest.raises(ValueError, match="bilinear=64.*width"):
        UNet(3, 1, 64)


@pytest.mark.parametrize(
    "images, words",
    [
        (torch.rand(2, 1, 8, 8), r"1 channels.*\(2, 1, 8, 8\).*takes 3.*UNet\(n_channels=1"),
        (torch.rand(3, 8, 8), r"\(3, 8, 8\): expected \(N, 3, H, W\)"),
        (torch.rand(2, 3, 0, 8), r"H, W >= 1"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"torch.uint8: expected floats.*255"),
        (torch.rand(1, 3, 4, 3), r"one image of 4x3.*depth=2.*batch"),
    ],
)
def test_images_that_do_not_fit(images, words):
    with pytest.raises(ValueError, match=words):
        UNet(3, 1, width=2, depth=2)(images)


def test_the_check_for_one_small_image_is_exact():
    """Refused are just those sizes that torch would refuse."""
    model = UNet(1, 1, width=2, depth=2)
    for size in [(1, 1), (1, 4), (4, 4), (5, 4), (1, 5), (8, 8)]:
        image = torch.rand(1, 1, *size)
        inner = model.downs[1], model.downs[0], model.stem
        try:
            inner[0](model.pool(inner[1](model.pool(inner[2](image.expand(1, 1, *size))))))
            fits = True
        except ValueError:
            fits = False
        if fits:
            assert model(image).shape == image.shape
        else:
            with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
                model(image)
        assert model(torch.rand(2, 1, *size)).shape == (2, 1, *size)
        assert copy.deepcopy(model).eval()(image).shape == image.shape


def test_up_meets_the_skip():
    for bilinear in (True, False):
        for h, w in [(1, 1), (2, 5), (7, 8)]:
            below = torch.rand(1, 4, (h + 1) // 2, (w + 1) // 2)
            assert Up(4, 3, 2, bilinear).eval()(below, torch.rand(1, 3, h, w)).shape == (1, 2, h, w)
