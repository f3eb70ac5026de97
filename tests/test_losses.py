"""The losses against independent numpy formulas, and what a notebook cannot show: precision, gradients, no waiting."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from counting import MADE_ON_HOST, WAITING, Operations
from torch import nn

from unet_nbtrain.losses import CompoundLoss, OverlapLoss, PixelLoss, SegmentationLoss, create_loss_function
from unet_nbtrain.metrics import SegmentationMetrics

NAMES = {1: ("auto", "bce", "focal", "dice", "tversky", "bce_dice"), 4: ("auto", "ce", "focal", "dice", "tversky", "ce_dice")}
ALL = [(n, name) for n, names in NAMES.items() for name in names]
WEIGHTS = {1: [2.5], 4: [0.5, 2.0, 1.5, 3.0]}


def make_batch(n_classes, seed=0, ignore_index=None, shape=(3, 7, 6)):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(shape[0], n_classes, *shape[1:]))
    labels = rng.integers(0, max(n_classes, 2), shape)
    if ignore_index is not None:
        labels[rng.random(shape) < 0.3] = ignore_index
    return torch.from_numpy(logits), torch.from_numpy(labels)


# The formulas once more, in numpy and float64


def numpy_loss(name, logits, labels, n_classes, weights=None, ignore_index=None, **options):
    x, y = logits.numpy().astype(float), labels.numpy().reshape(len(logits), *logits.shape[2:])
    asked = np.ones(y.shape, dtype=bool) if ignore_index is None else y != ignore_index
    if n_classes == 1:
        foreground = 1 / (1 + np.exp(-x[:, 0]))
        p = np.stack([1 - foreground, foreground])
    else:
        e = np.exp(x - x.max(1, keepdims=True))
        p = np.moveaxis(e / e.sum(1, keepdims=True), 1, 0)
    p, y = p[:, asked], y[asked]
    if name in ("auto", "bce", "ce"):
        return pixel_mean(p, y, n_classes, weights, 0)
    if name == "focal":
        return pixel_mean(p, y, n_classes, weights, options.get("gamma", 2))
    if name == "dice":
        return overlap_mean(p, y, n_classes, weights, 0.5, 0.5, **options)
    if name == "tversky":
        return overlap_mean(p, y, n_classes, weights, **{"alpha": 0.3, "beta": 0.7, **options})
    dice_weight = options.pop("dice_weight", 1.0)
    dice = overlap_mean(p, y, n_classes, weights if n_classes > 1 else None, 0.5, 0.5, **options)
    return pixel_mean(p, y, n_classes, weights, 0) + dice_weight * dice


def pixel_mean(p, y, n_classes, weights, gamma):
    costs, ws = [], []
    for k, label in enumerate(y):
        right = p[label, k]
        costs.append(-math.log(right) * (1 - right) ** gamma)
        if weights is None:
            ws.append(1.0)
        else:
            ws.append(weights[label] if n_classes > 1 else [1.0, weights[0]][label])
    total = len(ws) if n_classes == 1 else sum(ws)
    return sum(c * w for c, w in zip(costs, ws, strict=True)) / total if total else 0.0


def overlap_mean(p, y, n_classes, weights, alpha, beta, smooth=1.0, squared=False, background=False):
    classes = range(0 if background else 1, max(n_classes, 2))
    losses, ws = [], []
    for c in classes:
        t = (y == c).astype(float)
        tp, true, size = (p[c] * t).sum(), t.sum(), (p[c] ** 2 if squared else p[c]).sum()
        extra = smooth if true else max(len(y), 1)
        losses.append(1 - (2 * tp + extra) / (2 * tp + 2 * alpha * (size - tp) + 2 * beta * (true - tp) + extra))
        ws.append(weights[c] if weights is not None and n_classes > 1 else 1.0)
    return float(np.average(losses, weights=ws))


OPTIONS = {
    "focal": [{}, {"gamma": 0.5}, {"gamma": 5}],
    "dice": [{}, {"smooth": 10.0}, {"squared": True}],
    "tversky": [{}, {"alpha": 0.9, "beta": 0.1}, {"smooth": 0.0}],
    "bce_dice": [{}, {"dice_weight": 0.25}],
    "ce_dice": [{}, {"dice_weight": 3.0, "background": True, "smooth": 2.0}],
}
GRID = [
    (n, name, weighted, ignore, options)
    for (n, name), weighted, ignore in itertools.product(ALL, (False, True), (None, 0, 255, -1))
    for options in OPTIONS.get(name, [{}])
    if not (weighted and n == 1 and name in ("dice", "tversky"))
]


@pytest.mark.parametrize(("n_classes", "name", "weighted", "ignore_index", "options"), GRID)
def test_against_numpy(n_classes, name, weighted, ignore_index, options):
    weights = WEIGHTS[n_classes] if weighted else None
    loss = create_loss_function(n_classes, weights, name, ignore_index, **options)
    assert (loss.n_classes, loss.ignore_index) == (n_classes, ignore_index)
    for seed in range(3):
        logits, labels = make_batch(n_classes, seed, ignore_index)
        wanted = numpy_loss(name, logits, labels, n_classes, weights, ignore_index, **options)
        assert loss(logits, labels).item() == pytest.approx(wanted, rel=1e-6, abs=1e-7)
        found = loss(logits.float(), labels)
        assert found.dtype == torch.float32 and found.shape == ()
        assert found.item() == pytest.approx(numpy_loss(name, logits.float(), labels, n_classes, weights, ignore_index, **options), rel=1e-5)


def test_the_grid_is_large():
    assert len(GRID) > 100 and len({(name, *options) for _, name, _, _, options in GRID}) > 12


@pytest.mark.parametrize("seed", range(5))
def test_same_as_torch_to_the_last_bit(seed):
    torch.manual_seed(seed)
    one, four = torch.randn(2, 1, 9, 8), torch.randn(2, 4, 9, 8)
    mask, labels = torch.randint(0, 2, (2, 1, 9, 8)).float(), torch.randint(0, 4, (2, 9, 8))
    assert torch.equal(create_loss_function(1)(one, mask), nn.BCEWithLogitsLoss()(one, mask))
    assert torch.equal(create_loss_function(4)(four, labels), nn.CrossEntropyLoss()(four, labels))


def test_weighted_is_the_weighted_mean_of_torch():
    logits, labels = make_batch(4, ignore_index=255)
    weights = torch.tensor(WEIGHTS[4], dtype=torch.float64)
    wanted = F.cross_entropy(logits, labels, weight=weights, ignore_index=255)
    assert create_loss_function(4, weights, ignore_index=255)(logits, labels).item() == pytest.approx(wanted.item(), rel=1e-6)
    logits, labels = make_batch(1)
    wanted = F.binary_cross_entropy_with_logits(logits[:, 0], labels.double(), pos_weight=torch.tensor(2.5))
    assert create_loss_function(1, [2.5])(logits, labels).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_deterministic_mode_gives_the_same(n_classes, name):
    """In deterministic mode the plain case goes the long way round; the number may differ by rounding only."""
    logits, labels = make_batch(n_classes)
    usual = create_loss_function(n_classes, name=name)(logits, labels)
    torch.use_deterministic_algorithms(True)
    try:
        assert create_loss_function(n_classes, name=name)(logits, labels).item() == pytest.approx(usual.item(), rel=1e-12)
    finally:
        torch.use_deterministic_algorithms(False)


# Masks of every shape and dtype


@pytest.mark.parametrize("name", NAMES[1])
def test_binary_masks_of_any_shape_and_dtype(name):
    loss = create_loss_function(1, name=name)
    logits, labels = make_batch(1)
    wanted = loss(logits, labels)
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.float32, torch.float64):
        assert torch.equal(loss(logits, labels.to(dtype)), wanted)
        assert torch.equal(loss(logits, labels.to(dtype).unsqueeze(1)), wanted)


@pytest.mark.parametrize("name", NAMES[4])
def test_class_masks_of_any_dtype(name):
    loss = create_loss_function(4, name=name, ignore_index=-1)
    logits, labels = make_batch(4)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.float32):
        assert torch.equal(loss(logits, labels.to(dtype)), loss(logits, labels))


def test_an_unsigned_mask_is_not_wrapped_around():
    """In torch `uint8 mask == -1` is true for 255. Here 255 stays 255: no class, and told."""
    logits, labels = make_batch(4)
    labels[0, 0, 0] = 255
    with pytest.raises(ValueError, match="no class"):
        create_loss_function(4, ignore_index=-1)(logits, labels.to(torch.uint8))


@pytest.mark.parametrize(
    ("n_classes", "logits", "target", "words"),
    [
        (1, (2, 1, 4, 4), (2, 4, 5), "do not fit"),
        (1, (2, 1, 4, 4), (1, 4, 4), "do not fit"),
        (1, (2, 2, 4, 4), (2, 4, 4), "n_classes=1 needs"),
        (4, (2, 1, 4, 4), (2, 4, 4), "n_classes=4 needs"),
        (4, (2, 4, 4, 4), (2, 1, 4, 4), r"target\[:, 0\]"),
        (4, (2, 4, 4, 4), (2, 4, 4, 4), "one-hot"),
    ],
)
def test_wrong_shapes(n_classes, logits, target, words):
    for name in NAMES[n_classes]:
        with pytest.raises(ValueError, match=words):
            create_loss_function(n_classes, name=name)(torch.zeros(logits), torch.zeros(target))


@pytest.mark.parametrize("label", [4, -1, -100, 255])
@pytest.mark.parametrize("name", NAMES[4])
def test_labels_that_are_no_class_are_told(name, label):
    logits, labels = make_batch(4)
    labels[0, 0, 0] = label
    for weights in (None, WEIGHTS[4]):
        with pytest.raises(ValueError, match="no class.*0 to 3"):
            create_loss_function(4, weights, name)(logits, labels)
    assert create_loss_function(4, name=name, ignore_index=label)(logits, labels).isfinite()


@pytest.mark.parametrize("name", NAMES[4])
def test_fractions_between_classes_are_no_class(name):
    logits, labels = make_batch(4)
    between = labels.float()
    between[0, 0, 0] = 1.5
    for dtype in (torch.float32, torch.float64, torch.float16):
        with pytest.raises(ValueError, match="no class"):
            create_loss_function(4, name=name)(logits, between.to(dtype))


def test_other_errors_inside_a_loss_are_passed_on():
    class Broken(SegmentationLoss):
        def score(self, logits, target, valid):
            raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Broken(1)(*make_batch(1))


# Ignored pixels


WEIGHTED = [(n, name, weighted) for n, name in ALL for weighted in (False, True) if not (weighted and n == 1 and name in ("dice", "tversky"))]
FLIPS = {"negated": lambda x: -30 * x, "shuffled": lambda x: x.flip(0), "infinite": lambda x: x / 0, "nan": lambda x: x * math.nan}


@pytest.mark.parametrize("flip", FLIPS)
@pytest.mark.parametrize("ignore_index", [0, 1, 255, -1])
@pytest.mark.parametrize(("n_classes", "name", "weighted"), WEIGHTED)
def test_ignored_pixels_change_nothing(n_classes, name, weighted, ignore_index, flip):
    """Whatever stands in the logits of ignored pixels: the loss, its gradient and the metrics stay, to the last bit."""
    loss = create_loss_function(n_classes, WEIGHTS[n_classes] if weighted else None, name, ignore_index)
    logits, labels = make_batch(n_classes, ignore_index=ignore_index)
    ignored = (labels == ignore_index).unsqueeze(1).expand_as(logits)
    leaf, other = logits.clone().requires_grad_(), torch.where(ignored, FLIPS[flip](logits), logits).requires_grad_()
    first, second = loss(leaf, labels), loss(other, labels)
    first.backward()
    second.backward()
    assert torch.equal(first, second) and torch.equal(leaf.grad, other.grad)
    assert (other.grad[ignored] == 0).all() and (leaf.grad[~ignored] != 0).all()
    scores = []
    for x in (leaf, other):
        metrics = SegmentationMetrics(n_classes, ignore_index=ignore_index)
        metrics.update(x, labels)
        scores.append(repr(metrics.compute()))
    assert scores[0] == scores[1] and not torch.equal(leaf, other)


@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_a_pixel_that_is_not_ignored_does_count(n_classes, name):
    """The other side of the test above: one flipped pixel that counts changes the loss."""
    loss = create_loss_function(n_classes, name=name, ignore_index=255)
    logits, labels = make_batch(n_classes, ignore_index=255)
    labels[0, 0, 0] = 1
    other = logits.clone()
    other[0, :, 0, 0] *= -30
    assert loss(logits, labels) != loss(other, labels)


@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_cutting_ignored_pixels_out_gives_the_same(n_classes, name):
    """A batch with a border of ignored pixels is worth what the batch without the border is worth."""
    loss = create_loss_function(n_classes, name=name, ignore_index=9)
    logits, labels = make_batch(n_classes, shape=(2, 8, 9))
    framed = torch.full_like(labels, 9)
    framed[:, 2:-1, 1:-3] = labels[:, 2:-1, 1:-3]
    inner = loss(logits[:, :, 2:-1, 1:-3], labels[:, 2:-1, 1:-3])
    assert loss(logits, framed).item() == pytest.approx(inner.item(), rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_a_batch_of_ignored_pixels_is_worth_nothing(n_classes, name, weighted):
    if weighted and n_classes == 1 and name in ("dice", "tversky"):
        pytest.skip("nothing to weigh")
    loss = create_loss_function(n_classes, WEIGHTS[n_classes] if weighted else None, name, ignore_index=255)
    logits, labels = make_batch(n_classes)
    leaf = logits.float().requires_grad_()
    value = loss(leaf, torch.full_like(labels, 255))
    value.backward()
    assert value.item() == 0 and (leaf.grad == 0).all()


def test_weights_of_zero_for_all_that_is_there():
    """torch divides 0 by 0 here."""
    logits, _ = make_batch(4)
    leaf = logits.requires_grad_()
    value = create_loss_function(4, [0, 1, 1, 1])(leaf, torch.zeros(3, 7, 6, dtype=torch.long))
    value.backward()
    assert value.item() == 0 and (leaf.grad == 0).all()


# Gradients


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_gradients_are_right(n_classes, name, ignore_index):
    logits, labels = make_batch(n_classes, ignore_index=ignore_index, shape=(2, 2, 3))
    loss = create_loss_function(n_classes, name=name, ignore_index=ignore_index)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (logits.requires_grad_(),))


@pytest.mark.parametrize(("n_classes", "name"), [(n, name) for n, name in ALL if "dice" in name or name == "tversky"])
def test_false_positives_of_an_absent_class_cost(n_classes, name):
    """No free pass: the gradient pushes every false positive down, about as hard as cross-entropy does."""
    size = 128
    logits = torch.full((2, n_classes, size, size), -2.0 if n_classes == 1 else 0.0)
    logits.requires_grad_()
    labels = torch.zeros(2, size, size, dtype=torch.long)
    if n_classes > 1:
        labels[:, : size // 2] = 1  # classes 2 and 3 are absent
    overlap = create_loss_function(n_classes, name=name)
    overlap = getattr(overlap, "overlap", overlap)
    overlap(logits, labels).backward()
    wrong = logits.grad[:, -1]
    assert (wrong > 0).all()
    plain = logits.detach().clone().requires_grad_()
    create_loss_function(n_classes)(plain, labels).backward()
    assert wrong.mean() > 0.05 * plain.grad[:, -1].mean()


def test_the_cost_of_an_absent_class_grows_with_its_false_positives():
    empty = torch.zeros(1, 10, 10)
    values = []
    for n in range(0, 101, 20):
        logits = torch.full((100,), -30.0)
        logits[:n] = 30
        values.append(OverlapLoss(1)(logits.view(1, 1, 10, 10), empty).item())
    assert values[0] == pytest.approx(0, abs=1e-6) and values == sorted(values) and len(set(values)) == 6
    assert values[-1] == pytest.approx(0.5)


@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_a_step_down_the_gradient_helps(n_classes, name):
    loss = create_loss_function(n_classes, name=name)
    logits, labels = make_batch(n_classes)
    logits.requires_grad_()
    values = []
    for _ in range(60):
        value = loss(logits, labels)
        (grad,) = torch.autograd.grad(value, logits)
        values.append(value.item())
        logits = (logits - grad / grad.norm()).detach().requires_grad_()
    assert values[-1] < 0.3 * values[0]


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_half_logits_are_summed_in_float32(n_classes, name, dtype):
    """512 x 512 pixels: sums pass 65,504, the largest float16, and 256, where bfloat16 stops counting by ones."""
    logits, labels = make_batch(n_classes, shape=(1, 512, 512))
    low = logits.to(dtype)
    loss = create_loss_function(n_classes, name=name)
    leaf = low.clone().requires_grad_()
    value = loss(leaf, labels)
    value.backward()
    assert value.dtype == torch.float32 and leaf.grad.dtype == dtype and leaf.grad.isfinite().all()
    assert value.item() == pytest.approx(loss(low.double(), labels).item(), rel=1e-4)


@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_under_autocast(n_classes, name):
    loss = create_loss_function(n_classes, name=name, ignore_index=255)
    images, (_, labels) = torch.randn(3, 3, 32, 32), make_batch(n_classes, ignore_index=255, shape=(3, 32, 32))
    model = nn.Conv2d(3, n_classes, 3, padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
        inside = loss(logits, labels)
    outside = loss(logits.float(), labels)
    inside.backward()
    assert logits.dtype == torch.bfloat16 and inside.dtype == torch.float32
    assert torch.equal(inside, outside) and model.weight.grad.isfinite().all()


@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_autocast_to_float16_sums_in_float32(n_classes, name):
    """300 x 300 pixels under fp16: 90,000 ones are more than float16 can hold; the sums must not be made there."""
    loss = create_loss_function(n_classes, name=name, ignore_index=255)
    logits, labels = make_batch(n_classes, shape=(1, 300, 300))
    labels[:] = 1
    with torch.autocast("cpu", dtype=torch.float16):
        inside = loss(logits.half(), labels)
    assert inside.dtype == torch.float32 and inside.isfinite()
    assert inside.item() == pytest.approx(loss(logits.half().double(), labels).item(), rel=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 80.0, 1e4])
@pytest.mark.parametrize("n_classes", [1, 4])
def test_certain_pixels_have_finite_gradients(n_classes, scale, gamma):
    logits, labels = make_batch(n_classes)
    for name in NAMES[n_classes]:
        options = {"gamma": gamma} if name == "focal" else {}
        leaf = (scale * logits).float().requires_grad_()
        value = create_loss_function(n_classes, name=name, **options)(leaf, labels)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all()


def test_nothing_predicted_and_nothing_smoothed():
    for options in ({"beta": 0.0}, {"alpha": 0.0}, {"alpha": 0.0, "beta": 0.0}):
        leaf = torch.full((1, 1, 4, 4), -200.0, requires_grad=True)
        value = OverlapLoss(1, smooth=0.0, **options)(leaf, torch.ones(1, 4, 4))
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all()


# By name


def test_names_and_their_classes():
    assert isinstance(create_loss_function(1), PixelLoss) and isinstance(create_loss_function(4), PixelLoss)
    assert isinstance(create_loss_function(4, name="tversky"), OverlapLoss)
    assert isinstance(create_loss_function(4, name="ce_dice"), CompoundLoss)
    for n_classes, name in ALL:
        loss = create_loss_function(n_classes, name=name, ignore_index=3)
        assert isinstance(loss, SegmentationLoss) and (loss.n_classes, loss.ignore_index) == (n_classes, 3)
        assert f"n_classes={n_classes}" in repr(loss) and "ignore_index=3" in repr(loss)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: create_loss_function(4, name="crossentropy"), "known are auto, bce, ce, focal, dice"),
        (lambda: create_loss_function(4, name="ce_dise"), "did you mean 'ce_dice'"),
        (lambda: create_loss_function(4, name="focl"), "did you mean 'focal'"),
        (lambda: create_loss_function(4, name=None), "unknown loss None"),
        (lambda: create_loss_function(3, ignore_index=1.5), "ignore_index are whole numbers.* got 3 and 1.5"),
        (lambda: create_loss_function(1, ignore_index=[255]), r"ignore_index are whole numbers.* got 1 and \[255\]"),
        (lambda: create_loss_function("1"), "n_classes and ignore_index are whole numbers.* got '1' and None"),
        (lambda: create_loss_function(None), "n_classes and ignore_index are whole numbers"),
        (lambda: create_loss_function(3, name="dice", background="no"), "background must be True or False, got 'no'"),
        (lambda: create_loss_function(1, name="ce"), "use 'bce'"),
        (lambda: create_loss_function(1, name="ce_dice"), "use 'bce_dice'"),
        (lambda: create_loss_function(4, name="bce"), "use 'ce'"),
        (lambda: create_loss_function(4, name="bce_dice"), "use 'ce_dice'"),
        (lambda: create_loss_function(4, name="ce", gamma=2), "no option 'gamma'; its options are: none"),
        (lambda: create_loss_function(4, name="dice", smoth=2), "did you mean 'smooth'"),
        (lambda: create_loss_function(4, name="dice", alpha=0.3), "no option 'alpha'.*smooth=1.0"),
        (lambda: create_loss_function(0), "n_classes must be 1"),
        (lambda: create_loss_function(1, [1.0, 2.0]), "has 2 values, but n_classes=1 needs one number"),
        (lambda: create_loss_function(4, [1.0, 2.0]), "has 2 values, but n_classes=4 needs one for each class"),
        (lambda: create_loss_function(2, [1.0, -2.0]), "not negative"),
        (lambda: create_loss_function(2, [1.0, math.nan]), "finite"),
        (lambda: create_loss_function(2, [0.0, 0.0]), "not all zero"),
        (lambda: create_loss_function(1, [2.0], "dice"), "nothing to weigh"),
        (lambda: create_loss_function(1, [2.0], "tversky"), "'bce_dice' takes a weight.*'tversky' a larger beta"),
        (lambda: create_loss_function(1, name="bce_dice", background=True), "leave class_weights and background out"),
        (lambda: create_loss_function(2, [1.0, 0.0], "dice"), "every foreground class"),
        (lambda: create_loss_function(2, name="focal", gamma=-1), "gamma"),
        (lambda: create_loss_function(2, name="ce_dice", dice_weight=math.inf), "dice_weight"),
    ],
)
def test_wrong_settings(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_weights_of_any_kind():
    logits, labels = make_batch(4)
    kinds = (WEIGHTS[4], tuple(WEIGHTS[4]), np.array(WEIGHTS[4]), torch.tensor(WEIGHTS[4]), torch.tensor(WEIGHTS[4]).half())
    values = {create_loss_function(4, weights)(logits, labels).item() for weights in kinds}
    assert len(values) == 1
    ones = {create_loss_function(1, w)(*make_batch(1)).item() for w in (2.5, [2.5], torch.tensor(2.5), np.float64(2.5))}
    assert len(ones) == 1


def test_weights_are_copied_and_move_with_the_module():
    weights = torch.tensor(WEIGHTS[4])
    loss = create_loss_function(4, weights, "ce_dice")
    weights.zero_()
    assert loss.class_weights.tolist() == WEIGHTS[4]
    moved = loss.to("meta")
    assert all(buffer.is_meta for buffer in moved.buffers()) and len(list(moved.buffers())) == 3
    assert not list(moved.parameters())
    fresh = create_loss_function(4, [1.0, 1.0, 1.0, 1.0], "ce_dice")
    fresh.load_state_dict(create_loss_function(4, WEIGHTS[4], "ce_dice").state_dict())
    assert fresh.overlap.class_weights.tolist() == WEIGHTS[4]


# No waiting for the device


@pytest.mark.parametrize("ignore_index", [None, 255])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_nothing_is_read_from_the_device(n_classes, name, weighted, ignore_index):
    """On the CPU no operator that reads; the meta device takes the GPU's way."""
    if weighted and n_classes == 1 and name in ("dice", "tversky"):
        pytest.skip("nothing to weigh")
    loss = create_loss_function(n_classes, WEIGHTS[n_classes] if weighted else None, name, ignore_index)
    logits, labels = make_batch(n_classes, ignore_index=ignore_index)
    logits.requires_grad_()
    with Operations() as recorder:
        loss(logits, labels).backward()
    assert len(recorder.counts) > 2 and not (WAITING | {MADE_ON_HOST}) & recorder.counts.keys()
    with Operations() as reading:
        loss(logits, labels).item()
    assert "_local_scalar_dense" in reading.counts
    ghost = loss.to("meta")(logits.detach().to("meta").requires_grad_(), labels.to("meta"))
    ghost.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("n_classes", "name"), ALL)
def test_on_a_gpu(n_classes, name, deterministic):
    loss = create_loss_function(n_classes, name=name, ignore_index=255)
    logits, labels = make_batch(n_classes, ignore_index=255)
    on_cpu = loss(logits, labels).item()
    loss, leaf, labels = loss.cuda(), logits.cuda().requires_grad_(), labels.cuda()
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(leaf, labels)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert value.item() == pytest.approx(on_cpu, rel=1e-6)
