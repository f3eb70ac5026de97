"""The metrics against two independent references (sets of pixels, scikit-learn), and what a notebook cannot show of them."""

import io
import math
import warnings

import numpy as np
import pytest
import torch
from counting import WAITING, Operations
from sklearn.metrics import accuracy_score, jaccard_score, precision_recall_fscore_support

from unet_nbtrain.metrics import SegmentationMetrics, dice_score, match_target, segmentation_counts

SCORES = ("dice", "iou", "precision", "recall", "accuracy", "dice_per_image")
PER_CLASS = ("dice", "iou", "precision", "recall")
MASK_DTYPES = (torch.float32, torch.float64, torch.uint8, torch.int64, torch.int16, torch.float16)


# Random problems


def make_case(seed):
    """A random data set in uneven batches: `(settings, [(logits, target), ...])`."""
    rng = np.random.default_rng(seed)
    n_classes = int(rng.choice([1, 1, 2, 3, 4, 7]))
    ignore_index = [None, None, 255, -1, max(n_classes - 1, 0), n_classes + 1][rng.integers(6)]
    settings = {"n_classes": n_classes, "ignore_index": ignore_index, "background": bool(rng.integers(2))}
    if n_classes == 1:
        settings["threshold"] = float(rng.choice([0.5, 0.5, 0.2, 0.9]))
    h, w = (int(n) for n in rng.integers(1, 14, 2))
    sizes = rng.integers(1, 4, rng.integers(1, 4))
    return settings, [make_batch(rng, int(n), h, w, n_classes, ignore_index) for n in sizes]


def make_batch(rng, n, h, w, n_classes, ignore_index):
    labels = rng.integers(0, max(n_classes, 2), (n, h, w)) if rng.random() < 0.8 else np.zeros((n, h, w), dtype=int)
    truth = np.eye(max(n_classes, 2))[labels].transpose(0, 3, 1, 2)
    skill = rng.choice([0.0, 1.0, 4.0])
    logits = rng.normal(size=(n, n_classes, h, w)) + skill * (truth[:, -n_classes:] - 0.5)
    if rng.random() < 0.15:
        logits = logits.round()  # ties between classes, and logits exactly at the threshold
    if rng.random() < 0.15:
        logits = np.full_like(logits, -3.0)  # nothing predicted
    if ignore_index is not None:
        labels = np.where(rng.random(labels.shape) < rng.choice([0.1, 1.0], p=[0.9, 0.1]), ignore_index, labels)
    logits = torch.from_numpy(logits).to([torch.float32, torch.float16, torch.bfloat16, torch.float64][rng.integers(4)])
    dtypes = [d for d in MASK_DTYPES if labels.min() >= 0 or d != torch.uint8]
    if labels.max() <= 1 and labels.min() >= 0:
        dtypes.append(torch.bool)
    target = torch.from_numpy(labels).to(dtypes[rng.integers(len(dtypes))])
    if n_classes == 1 and rng.integers(2):
        target = target.unsqueeze(1)
    return logits, target


def predictions(logits, target, n_classes, threshold=0.5, ignore_index=None, **_):
    """Predicted and true class of every asked pixel of each image, in float64 numpy."""
    logits, target = logits.double().numpy(), target.double().numpy().reshape(len(logits), *logits.shape[2:])
    if n_classes == 1:
        predicted = (1 / (1 + np.exp(-logits[:, 0])) > threshold).astype(int)
    else:
        predicted = logits.argmax(1)
    asked = np.ones_like(target, dtype=bool) if ignore_index is None else target != ignore_index
    return [(p[a], t[a].astype(int)) for p, t, a in zip(predicted, target, asked, strict=True)]


# Reference 1: sets of pixel positions


def ratio(a, b):
    return a / b if b else math.nan


def mean(values):
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else math.nan


def reference(settings, batches):
    images = [image for batch in batches for image in predictions(*batch, **settings)]
    n_classes = settings["n_classes"]
    shown = [1] if n_classes == 1 else list(range(n_classes))
    counted = [c for c in shown if n_classes == 1 or c > 0 or settings["background"]]

    def positions(classes, side):
        return {c: {(i, k) for i, image in enumerate(images) for k in np.flatnonzero(image[side] == c)} for c in classes}

    predicted, true = positions(shown, 0), positions(shown, 1)
    scores = {
        "dice": {c: ratio(2 * len(predicted[c] & true[c]), len(predicted[c]) + len(true[c])) for c in shown},
        "iou": {c: ratio(len(predicted[c] & true[c]), len(predicted[c] | true[c])) for c in shown},
        "precision": {c: ratio(len(predicted[c] & true[c]), len(predicted[c])) for c in shown},
        "recall": {c: ratio(len(predicted[c] & true[c]), len(true[c])) for c in shown},
    }
    per_image = []
    for i in range(len(images)):
        p, t = ({c: {k for k in side[c] if k[0] == i} for c in counted} for side in (predicted, true))
        per_image.append(mean([ratio(2 * len(p[c] & t[c]), len(p[c]) + len(t[c])) for c in counted]))
    return {
        **{name: mean([score[c] for c in counted]) for name, score in scores.items()},
        "accuracy": ratio(sum((p == t).sum() for p, t in images), sum(t.size for _, t in images)),
        "dice_per_image": mean(per_image),
        "per_class": {name: list(score.values()) for name, score in scores.items()},
    }


# Reference 2: scikit-learn


def sklearn_per_class(predicted, true, shown):
    """Scores of each class; NaN where scikit-learn would divide 0 by 0 and fill something in."""
    options = {"labels": shown, "average": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, f1, _ = precision_recall_fscore_support(true, predicted, zero_division=np.nan, **options)
        iou = jaccard_score(true, predicted, zero_division=0, **options)
    occurs = [c in predicted or c in true for c in shown]
    return {"dice": np.where(occurs, f1, np.nan), "iou": np.where(occurs, iou, np.nan), "precision": precision, "recall": recall}


def sklearn_scores(settings, batches):
    images = [image for batch in batches for image in predictions(*batch, **settings)]
    predicted, true = (np.concatenate([image[side] for image in images]) for side in (0, 1))
    if not true.size:
        return None
    shown = [1] if settings["n_classes"] == 1 else list(range(settings["n_classes"]))
    first = 0 if settings["n_classes"] == 1 or settings["background"] else 1
    scores = sklearn_per_class(predicted, true, shown)
    one_by_one = [mean(sklearn_per_class(p, t, shown)["dice"][first:]) for p, t in images if t.size]
    return {
        **{name: mean(score[first:]) for name, score in scores.items()},
        "accuracy": accuracy_score(true, predicted),
        "dice_per_image": mean(one_by_one),
        "per_class": {name: score.tolist() for name, score in scores.items()},
    }


def run(settings, batches):
    metrics = SegmentationMetrics(**settings)
    for logits, target in batches:
        metrics.update(logits, target)
    return metrics.compute()


def assert_close(found, wanted, context):
    assert found == pytest.approx(wanted, abs=1e-6, nan_ok=True), context


@pytest.mark.parametrize("seed", range(500))
def test_against_references(seed):
    settings, batches = make_case(seed)
    found = run(settings, batches)
    assert set(found) == {*SCORES, "per_class"} and all(isinstance(found[name], float) for name in SCORES)
    for source, wanted in (("sets", reference(settings, batches)), ("scikit-learn", sklearn_scores(settings, batches))):
        for name in SCORES if wanted else ():
            assert_close(found[name], wanted[name], (name, settings, source))
        for name in PER_CLASS if wanted else ():
            assert len(found["per_class"][name]) == settings["n_classes"]
            assert_close(found["per_class"][name], wanted["per_class"][name], (name, settings, source))


def test_cases_are_worth_something():
    """The random cases hold what they should: every kind of trouble, and scores that are not all alike."""
    cases = [make_case(seed) for seed in range(500)]
    results = [run(*case) for case in cases]
    assert {settings["n_classes"] for settings, _ in cases} == {1, 2, 3, 4, 7}
    assert {logits.dtype for _, batches in cases for logits, _ in batches} >= {torch.float16, torch.bfloat16}
    assert {target.dtype for _, batches in cases for _, target in batches} == {*MASK_DTYPES, torch.bool}
    assert sum(len({len(logits) for logits, _ in batches}) > 1 for _, batches in cases) > 100
    assert sum(settings["n_classes"] == 2 for settings, _ in cases) > 50
    assert sum(settings["ignore_index"] is not None for settings, _ in cases) > 200
    assert sum(len(batches) > 1 and len(batches[-1][0]) < len(batches[0][0]) for _, batches in cases) > 50
    assert sum(any((target == 0).all() for _, target in batches) for _, batches in cases) > 50
    assert sum(any(map(math.isnan, result["per_class"]["dice"])) for result in results) > 50
    assert sum(math.isnan(result["dice"]) for result in results) > 10
    assert sum(math.isnan(result["accuracy"]) for result in results) > 2
    assert len({round(result["dice"], 6) for result in results}) > 300
    assert sum(result["dice"] != result["dice_per_image"] for result in results) > 300


# Exactness


@pytest.mark.parametrize("n_classes", [1, 3])
def test_grouping_into_batches_changes_nothing(n_classes):
    torch.manual_seed(0)
    logits, target = torch.randn(11, n_classes, 9, 10), torch.randint(0, max(n_classes, 2), (11, 9, 10))
    results = []
    for size in (1, 2, 3, 4, 11):
        results.append(run({"n_classes": n_classes}, zip(logits.split(size), target.split(size), strict=True)))
    dice_per_image = results[0]["dice_per_image"]
    for result in results:
        assert result.pop("dice_per_image") == pytest.approx(dice_per_image, abs=1e-14)
    assert results.count(results[0]) == 5


def test_large_counts_are_exact():
    """One image beyond 2**24 pixels, where float32 sums of ones stop growing; and an epoch beyond it."""
    side = 4097
    logits, target = torch.ones(1, 1, side, side), torch.ones(1, side, side, dtype=torch.uint8)
    target[0, 0, 0] = 0
    classes, pixels = segmentation_counts(logits, target, 1)
    assert classes.tolist() == [[[side**2 - 1, side**2, side**2 - 1]]]
    assert pixels.tolist() == [[side**2 - 1, side**2, 0]]
    metrics = SegmentationMetrics(1)
    metrics.add(classes=torch.tensor([[2**40, 2**40 + 1, 2**40]]), pixels=torch.tensor([2**40, 2**40 + 1, 0]),
                images=torch.tensor(0), dice_sum=torch.tensor(0.0).double())
    assert metrics.compute()["dice"] == 2**41 / (2**41 + 1)


def test_threshold_between_half_precision_numbers():
    """The threshold is not rounded to the logits' dtype: the half closest to it may lie on either side."""
    for threshold in (0.3, 0.7, 0.9):
        cut = math.log(threshold / (1 - threshold))
        around = torch.tensor(cut).half()
        values = torch.stack([around, around.nextafter(around + 1), around.nextafter(around - 1)])
        wanted = int((values.double() > cut).sum())
        counts, _ = segmentation_counts(values.view(1, 1, 1, 3), torch.ones(1, 1, 3), 1, threshold)
        assert counts[0, 0, 0] == wanted


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_and_strides(layout):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 12, 10).contiguous(memory_format=layout)
    target = torch.randint(0, 4, (3, 10, 12)).transpose(1, 2)
    classes, pixels = segmentation_counts(logits, target, 4)
    again, _ = segmentation_counts(logits.contiguous(), target.contiguous(), 4)
    assert torch.equal(classes, again) and pixels[:, 0].sum() == (logits.argmax(1) == target).sum()
    view = logits[:, :1, ::2, 1:]
    assert torch.equal(segmentation_counts(view, target[:, ::2, 1:] > 1, 1)[0],
                       segmentation_counts(view.contiguous(), (target[:, ::2, 1:] > 1).float(), 1)[0])


def test_many_classes():
    """Beyond 256 classes the index no longer fits the small integers of the fast path."""
    torch.manual_seed(0)
    logits = torch.randn(2, 300, 16, 16)
    target = logits.argmax(1)
    assert target.max() > 256
    classes, pixels = segmentation_counts(logits, target, 300)
    assert pixels.tolist() == [[256, 256, 0]] * 2
    assert torch.equal(classes[..., 0], classes[..., 1]) and torch.equal(classes[..., 0], classes[..., 2])


# Values that are no class


@pytest.mark.parametrize("value", [-1, 4, 7, 255, -100, 2**40])
def test_unknown_labels_are_told(value):
    target = torch.zeros(2, 5, 5, dtype=torch.int64)
    target[1, :2, 0] = value
    with pytest.raises(ValueError, match=r"^2 mask pixels.*n_classes=4.*ignore_index"):
        run({"n_classes": 4}, [(torch.randn(2, 4, 5, 5), target)])
    assert run({"n_classes": 4, "ignore_index": value}, [(torch.randn(2, 4, 5, 5), target)])["accuracy"] >= 0


@pytest.mark.parametrize("value", [255, 2, 0.5, -1])
def test_unknown_values_of_a_binary_mask_are_told(value):
    target = torch.zeros(2, 1, 5, 5)
    target[0, 0, 0, :3] = value
    with pytest.raises(ValueError, match="^3 mask pixels.*0 to 1"):
        run({"n_classes": 1}, [(torch.randn(2, 1, 5, 5), target)])
    run({"n_classes": 1, "ignore_index": value}, [(torch.randn(2, 1, 5, 5), target)])


def test_fractional_and_nan_labels_are_no_class():
    target = torch.tensor([[[0.0, 1.0, 1.5, math.nan]]])
    _, pixels = segmentation_counts(torch.randn(1, 3, 1, 4), target, 3)
    assert pixels[0, 1:].tolist() == [2, 2]
    _, pixels = segmentation_counts(torch.randn(1, 3, 1, 4), target, 3, ignore_index=-1)
    assert pixels[0, 1:].tolist() == [2, 2]


@pytest.mark.parametrize("n_classes", [1, 4])
def test_ignored_pixels_change_nothing(n_classes):
    torch.manual_seed(0)
    logits, target = torch.randn(3, n_classes, 8, 8), torch.randint(0, max(2, n_classes), (3, 8, 8))
    ignored = torch.rand(3, 8, 8) < 0.3
    target[ignored] = 255
    other = torch.where(ignored.unsqueeze(1), -10 * torch.randn_like(logits), logits)
    settings = {"n_classes": n_classes, "ignore_index": 255}
    assert run(settings, [(logits, target)]) == run(settings, [(other, target)])


# Shapes, dtypes, settings


@pytest.mark.parametrize(
    ("n_classes", "logits", "target", "words"),
    [
        (1, (2, 1, 4, 4), (2, 4, 5), "do not fit"),
        (1, (2, 1, 4, 4), (1, 4, 4), "do not fit"),
        (1, (2, 1, 4, 4), (4, 4), "do not fit"),
        (1, (2, 1, 4, 4), (1, 1, 4, 4), "do not fit"),
        (1, (2, 3, 4, 4), (2, 4, 4), "n_classes=1 needs"),
        (1, (2, 4, 4), (2, 4, 4), "n_classes=1 needs"),
        (4, (2, 1, 4, 4), (2, 4, 4), "n_classes=4 needs"),
        (4, (2, 4, 4, 4), (2, 1, 4, 4), r"target\[:, 0\]"),
        (4, (2, 4, 4, 4), (2, 4, 4, 4), r"argmax\(1\)"),
        (4, (2, 4, 4, 4), (2, 4, 4, 1), "do not fit"),
    ],
)
def test_wrong_shapes(n_classes, logits, target, words):
    with pytest.raises(ValueError, match=words):
        SegmentationMetrics(n_classes).update(torch.zeros(logits), torch.zeros(target))


def test_masks_that_fit_are_returned_without_a_copy():
    logits, mask = torch.zeros(2, 1, 4, 5), torch.zeros(2, 4, 5)
    assert match_target(logits, mask, 1) is mask
    squeezed = match_target(logits, logits, 1)
    assert squeezed.shape == (2, 4, 5) and squeezed.data_ptr() == logits.data_ptr()


def test_wrong_types_and_settings():
    with pytest.raises(TypeError, match="must be floats"):
        match_target(torch.zeros(1, 1, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2), 1)
    for n_classes in (0, -1, "1", None, 2.5):
        with pytest.raises(ValueError, match="n_classes must be 1"):
            SegmentationMetrics(n_classes)
    for threshold in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            SegmentationMetrics(1, threshold)
    for wrong in ({"ignore_index": 1.5}, {"ignore_index": "255"}, {"ignore_index": [255]}, {"background": "no"}):
        with pytest.raises(ValueError, match="ignore_index is a whole number or None, and background True or False"):
            SegmentationMetrics(3, **wrong)


def test_a_refused_batch_leaves_the_sums_alone():
    metrics = SegmentationMetrics(1)
    metrics.update(torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2))
    before = metrics.compute()
    with pytest.raises(ValueError, match="do not fit"):
        metrics.update(torch.ones(1, 1, 2, 2), torch.ones(1, 2, 3))
    assert metrics.compute() == before


# State


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_state_round_trip_in_the_middle(seed):
    """Saved after any batch, to a file, and resumed in a new object: bit for bit the same."""
    settings, batches = make_case(seed)
    whole = run(settings, batches)
    for cut in range(len(batches) + 1):
        first, resumed = SegmentationMetrics(**settings), SegmentationMetrics(**settings)
        for batch in batches[:cut]:
            first.update(*batch)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for batch in batches[cut:]:
            resumed.update(*batch)
        assert repr(resumed.compute()) == repr(whole)


def test_state_does_not_change_afterwards():
    metrics = SegmentationMetrics(3)
    metrics.update(torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4)))
    state = metrics.state_dict()
    copy = {name: value.clone() for name, value in state.items()}
    metrics.update(torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4)))
    metrics.reset()
    assert all(torch.equal(state[name], copy[name]) for name in copy)


def test_state_of_another_problem_is_refused():
    for bad in (SegmentationMetrics(3).state_dict(), {}, {"classes": torch.zeros(1, 3)}):
        with pytest.raises(ValueError, match="n_classes=1"):
            SegmentationMetrics(1).load_state_dict(bad)


def test_reset_starts_anew():
    settings, batches = make_case(7)
    metrics = SegmentationMetrics(**settings)
    for _ in range(3):
        metrics.reset()
        for batch in batches:
            metrics.update(*batch)
    assert repr(metrics.compute()) == repr(run(settings, batches))


def test_inference_mode_and_gradients_mix():
    """Batches counted inside and outside of inference mode, and logits that carry gradients, add up."""
    logits, target = torch.randn(4, 1, 6, 6, requires_grad=True), torch.randint(0, 2, (4, 6, 6))
    mixed = SegmentationMetrics(1)
    with torch.inference_mode():
        mixed.update(logits[:1].detach(), target[:1])
    mixed.update(logits[1:3], target[1:3])
    with torch.no_grad():
        mixed.update(logits[3:], target[3:])
    assert mixed.compute()["dice"] == run({"n_classes": 1}, [(logits, target)])["dice"]
    assert not any(value.requires_grad for value in mixed.state_dict().values())


def test_autocast_does_not_round_the_counts():
    logits, target = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run({"n_classes": 3}, [(logits, target)]), run({"n_classes": 1}, [(logits[:, :1], target > 1)])
    assert inside == (run({"n_classes": 3}, [(logits, target)]), run({"n_classes": 1}, [(logits[:, :1], target > 1)]))


# No waiting for the device


@pytest.mark.parametrize("ignore_index", [None, 0, 255])
@pytest.mark.parametrize("n_classes", [1, 4])
def test_update_never_reads_the_device(n_classes, ignore_index):
    metrics = SegmentationMetrics(n_classes, ignore_index=ignore_index)
    logits, target = torch.randn(2, n_classes, 8, 8), torch.randint(0, max(2, n_classes), (2, 8, 8))
    with Operations() as update:
        metrics.update(logits, target)
        metrics.update(logits.half(), target.float())
    assert "stack" in update.counts or "cat" in update.counts
    assert not WAITING & update.counts.keys()
    with Operations() as compute:
        metrics.compute()
    assert "_local_scalar_dense" in compute.counts


@pytest.mark.parametrize("ignore_index", [None, 0, 255])
@pytest.mark.parametrize("n_classes", [1, 4])
def test_update_works_without_values(n_classes, ignore_index):
    """The meta device has shapes and no values: reading one raises. It also takes the path that a GPU takes."""
    metrics = SegmentationMetrics(n_classes, ignore_index=ignore_index)
    for dtype in (torch.float32, torch.uint8, torch.int64):
        metrics.update(torch.empty(2, n_classes, 8, 8, device="meta"), torch.empty(2, 8, 8, dtype=dtype, device="meta"))
    assert {value.device.type for value in metrics.state_dict().values()} == {"meta"}


def test_the_paths_of_cpu_and_gpu_agree(monkeypatch):
    """The GPU's way to find the predicted class, taken on the CPU, gives the same counts."""
    from unet_nbtrain import metrics as module

    torch.manual_seed(0)
    for logits in (torch.randn(3, 5, 7, 9), torch.randn(3, 5, 7, 9).round(), torch.zeros(3, 5, 7, 9)):
        target = torch.randint(0, 5, (3, 7, 9))
        fast = segmentation_counts(logits, target, 5)[0]
        monkeypatch.setattr(module, "_predicted_class", lambda logits: logits.argmax(1))
        assert torch.equal(segmentation_counts(logits, target, 5)[0], fast)
        monkeypatch.undo()


def test_the_number_of_operators_does_not_grow():
    metrics = SegmentationMetrics(4)
    counts = []
    for _ in range(5):
        with Operations() as update:
            metrics.update(torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8)))
        counts.append(update.counts.total())
    assert counts[1] == counts[4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n_classes", [1, 4])
def test_on_a_gpu(n_classes):
    logits, target = torch.randn(5, n_classes, 33, 40), torch.randint(0, max(2, n_classes), (5, 33, 40))
    on_cpu, on_gpu = SegmentationMetrics(n_classes, ignore_index=0), SegmentationMetrics(n_classes, ignore_index=0)
    on_cpu.update(logits, target)
    logits, target = logits.cuda(), target.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu.update(logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found, wanted = on_gpu.compute(), on_cpu.compute()
    assert {name: found[name] for name in SCORES} == pytest.approx({name: wanted[name] for name in SCORES}, nan_ok=True)
    assert found["per_class"]["dice"] == pytest.approx(wanted["per_class"]["dice"], nan_ok=True)


def test_an_image_without_pixels_and_a_batch_without_images():
    metrics = SegmentationMetrics(4)
    metrics.update(torch.zeros(0, 4, 8, 8), torch.zeros(0, 8, 8, dtype=torch.long))
    assert math.isnan(metrics.compute()["accuracy"])
    binary = SegmentationMetrics(1)
    binary.update(torch.zeros(0, 1, 8, 8), torch.zeros(0, 8, 8))
    assert math.isnan(binary.compute()["dice"])


def test_dice_of_nothing_is_nan_whatever_the_dtype():
    for dtype in (torch.int64, torch.float32):
        assert dice_score(*torch.zeros(3, 1, dtype=dtype)).isnan().all()


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (3, 1, 8, 8)])
def test_masks_of_another_size_are_not_called_one_hot(shape):
    """One channel for one class is as it should be; "these look one-hot: use target.argmax(1)" made zeros of the masks"""
    with pytest.raises(ValueError, match=r"expected \(2, 8, 8\)$"):
        match_target(torch.zeros(2, 1, 8, 8), torch.ones(shape), 1)
