"""The options of the loaders: groups, statistics, crops on the foreground, padding that counts nowhere, any channels."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unet_nbtrain.crops import RandomCrop, class_places
from unet_nbtrain.dataset import SegmentationDataset, create_dataloaders
from unet_nbtrain.demo_data import draw_cells
from unet_nbtrain.losses import create_loss_function
from unet_nbtrain.metrics import SegmentationMetrics
from unet_nbtrain.sampling import SampleKey
from unet_nbtrain.splits import split_positions
from unet_nbtrain.transforms import prepare_image

DATA = Path(__file__).resolve().parents[1] / "../shared/data"
needs_workers = pytest.mark.skipif(sys.platform == "win32", reason="worker processes are tested on POSIX systems")
CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Twelve images of three sizes with masks of classes 0, 1, 2, of four patients; an `images` and a `masks` folder"
    root = tmp_path_factory.mktemp("sizes")
    for i in range(12):
        size = (48, 61, 50)[i % 3]
        image, mask = draw_cells(i, size=size, n_classes=3)
        save(root / "images" / f"p{i // 3}_{i % 3}.png", image[: size - i % 2])
        save(root / "masks" / f"p{i // 3}_{i % 3}.png", mask[: size - i % 2])
    return root / "images", root / "masks"


def loaders(folders, **options):
    defaults = {"batch_size": 4, "n_classes": 3, "augment": None, "val": 0.25, "num_workers": 0}
    return create_dataloaders(*folders, **defaults | options)


def batches(loader, epoch, start=0):
    loader.batch_sampler.set_epoch(epoch, start)
    return [(image.clone(), mask.clone()) for image, mask in loader]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(left, right, strict=True))


# Splits by group


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("groups", [r"^p(\d+)_", lambda name: name[:2], {f"p{i // 3}_{i % 3}": i // 3 for i in range(12)}, [i // 3 for i in range(12)]])
def test_no_patient_is_on_both_sides(folders, groups, seed):
    train, val = (o.dataset for o in loaders(folders, crop=32, groups=groups, seed=seed))
    assert len(train) == 9 and len(val) == 3
    assert not {name[:2] for name in train.names} & {name[:2] for name in val.names}


def test_a_group_that_a_list_would_cut_is_named(folders):
    with pytest.raises(ValueError, match="1 of the groups on both sides: 3.*too good"):
        loaders(folders, crop=32, groups=r"p(\d)_", val=["p3_0", "p3_1"])
    with pytest.raises(ValueError, match="says nothing of 12 of 12 images: p0_0.png, .*"):
        loaders(folders, crop=32, groups=r"patient(\d)_")


def test_the_fraction_is_met_as_near_as_half_a_group():
    random = np.random.default_rng(0)
    for case in range(40):
        sizes = random.integers(1, 12, size=random.integers(2, 30))
        members = np.repeat(np.arange(len(sizes)), sizes)
        names, fraction = [f"{i}.png" for i in range(len(members))], float(random.uniform(0.05, 0.6))
        train, val = split_positions(names, fraction, seed=case, groups=members)
        assert not set(members[train]) & set(members[val]) and len(val) and len(train)
        if len(sizes) > 3:
            assert abs(len(val) - max(1, round(fraction * len(names)))) <= sizes.max() / 2 + 0.5 or len(set(members[val])) == 1


def test_groups_keep_their_side_when_images_are_added():
    def sides(names):
        return {name.split("_")[0] for i, name in enumerate(names) if i in set(split_positions(names, 0.3, groups=r"^(p\d+)_")[1])}

    names = [f"p{i}_{k}.png" for i in range(20) for k in range(4)]
    assert len(sides(names) ^ sides(names + ["p3_9.png"])) <= 2


def test_a_folder_for_validation(folders, tmp_path):
    image, mask = draw_cells(77, size=40, n_classes=3)
    save(tmp_path / "vi/a.png", image)
    save(tmp_path / "vm/a_mask.png", mask)
    train, val = loaders(folders, crop=32, val=(tmp_path / "vi", str(tmp_path / "vm")))
    assert len(train.dataset) == 12 and val.dataset.names == ["a.png"] and torch.equal(val.dataset[0][1], torch.from_numpy(mask).long())
    with pytest.raises(ValueError, match="12 images are in the training and in the validation folder"):
        loaders(folders, crop=32, val=tuple(folders))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        loaders(folders, crop=32, val=(tmp_path / "nowhere", tmp_path / "vm"))
    assert loaders(folders, crop=32, val=("p0_0", "p3_2.png"))[1].dataset.names == ["p0_0.png", "p3_2.png"]


# Normalisation


@pytest.mark.parametrize("cache", [True, False])
def test_statistics_are_those_of_numpy_over_the_training_images(folders, cache):
    train, val = (o.dataset for o in loaders(folders, crop=32, normalize="dataset", cache=cache, augment="heavy"))
    pixels = np.concatenate([np.asarray(Image.open(path)).reshape(-1, 3) for path in train.images]) / 255
    assert np.allclose(train.mean, pixels.mean(0), rtol=1e-12) and np.allclose(train.std, pixels.std(0), rtol=1e-12)
    assert (val.mean, val.std) == (train.mean, train.std) and val.preprocessing == train.preprocessing
    whole = np.moveaxis(np.asarray(Image.open(val.images[0])), 2, 0)
    expected = (whole / 255 - pixels.mean(0)[:, None, None]) / pixels.std(0)[:, None, None]
    assert np.allclose(val[0][0].numpy(), expected, atol=1e-5) and torch.equal(val[0][0], prepare_image(whole, train.mean, train.std))


def test_each_file_is_decoded_once(folders, monkeypatch):
    import unet_nbtrain.stored_pairs as room

    seen, read = [], room.read_image
    monkeypatch.setattr(room, "read_image", lambda source, n: (seen.append(source), read(source, n))[1])
    train, val = loaders(folders, crop=32, normalize="dataset", cache=True)
    for epoch in range(2):
        batches(train, epoch), batches(val, epoch)
    assert len(seen) == len(set(seen)) == 12


def test_augmentation_sees_images_between_0_and_1(folders):
    seen = []

    def look(image, mask, seed):
        seen.append((float(image.min()), float(image.max())))
        return image, mask

    batches(loaders(folders, crop=32, normalize=(0.5, 0.1), augment=look)[0], 0)
    assert len(seen) == 9 and all(0 <= low <= high <= 1 for low, high in seen)


def test_a_constant_channel_stays_finite():
    image = np.stack([np.full((9, 9), 7), np.arange(81).reshape(9, 9)]).astype(np.uint8)
    data = SegmentationDataset([image], [np.zeros((9, 9), np.uint8)], normalize="dataset")
    assert data.std[0] == 1 and data[0][0].isfinite().all() and data[0][0][0].abs().max() < 1e-6


# Crops on the foreground


def rare(count=6, size=128):
    "Images of noise whose masks have one spot of class 1 and one pixel of class 2"
    masks = np.zeros((count, size, size), np.uint8)
    for i in range(count):
        masks[i, 20 + 9 * i : 25 + 9 * i, 30:35], masks[i, 100, 110 - i] = 1, 2
    return list(np.random.default_rng(0).integers(0, 255, (count, size, size), dtype=np.uint8)), list(masks)


@pytest.mark.parametrize("share", [0.0, 0.33, 1.0])
@pytest.mark.parametrize("cache", [True, False])
def test_the_share_of_crops_on_the_foreground(share, cache):
    data = SegmentationDataset(*rare(), 3, crop=RandomCrop((24, 24), share), cache=cache)
    masks = torch.stack([data[SampleKey(i, epoch)][1] for i in range(6) for epoch in range(120)]).flatten(1)
    chance = np.mean([(SegmentationDataset(*rare(), 3, crop=24)[SampleKey(i, e)][1] > 0).any() for i in range(6) for e in range(120)])
    assert abs((masks > 0).any(1).float().mean() - (share + (1 - share) * chance)) < 0.05
    found = [(masks == label).any(1).float().mean() for label in (1, 2)]
    assert share == 0 or min(found) > 0.4 * share


def test_kept_places_change_nothing():
    kept, read = (SegmentationDataset(*rare(), 3, crop=RandomCrop((24, 24), 0.5), cache=cache) for cache in (True, False))
    keys = [SampleKey(i, epoch) for i in range(6) for epoch in range(20)]
    assert all(torch.equal(kept[key][0], read[key][0]) and torch.equal(kept[key][1], read[key][1]) for key in keys)
    assert max(p.nbytes for p in class_places(np.ones((2000, 2000), np.uint8)).values()) == 1024


# Padding


@pytest.mark.parametrize("n_classes", [1, 3])
@pytest.mark.parametrize("loss", ["auto", "dice", "focal", "tversky"])
def test_padded_pixels_change_neither_loss_nor_metrics(folders, n_classes, loss):
    _, val = loaders(folders, n_classes=n_classes, foreground=[1, 2] if n_classes == 1 else None, pad=(64, 80), ignore_index=-1)
    images, masks = next(iter(val))
    margin = masks.reshape(len(masks), 1, 64, 80) == -1
    sizes = [o.shape[-2] * o.shape[-1] for o in (val.dataset.arrays(i)[1] for i in range(3))]
    assert images.shape == (3, 3, 64, 80) and (~margin).sum((1, 2, 3)).tolist() == sizes
    logits = torch.randn(3, n_classes, 64, 80, generator=torch.Generator().manual_seed(0))
    flipped = torch.where(margin, -7 * logits, logits)
    criterion = create_loss_function(n_classes, name=loss, ignore_index=-1)
    assert torch.equal(criterion(logits, masks), criterion(flipped, masks))
    results = []
    for predicted in (logits, flipped):
        metrics = SegmentationMetrics(n_classes, ignore_index=-1)
        metrics.update(predicted, masks)
        results.append(metrics.compute())
    assert repr(results[0]) == repr(results[1]) and results[0]["accuracy"] > 0
    cut = SegmentationMetrics(n_classes, ignore_index=-1)
    for i in range(3):
        rows, columns = (~margin[i, 0]).any(1), (~margin[i, 0]).any(0)
        cut.update(logits[i : i + 1][:, :, rows][..., columns], masks[i : i + 1][..., rows, :][..., columns])
    assert cut.compute()["iou"] == pytest.approx(results[0]["iou"], abs=1e-12)


def test_the_largest_size_holds_all(folders):
    train, val = loaders(folders, pad="largest", ignore_index=-1)
    assert {tuple(image.shape[-2:]) for loader in (train, val) for image, _ in loader} == {(61, 61)}
    train, val = loaders(folders, pad="largest", ignore_index=-1, crop=32)
    assert {tuple(image.shape[-2:]) for image, _ in train} == {(32, 32)} and next(iter(val))[0].shape[-2:] == (61, 61)
    assert {int(v) for _, mask in train for v in mask.unique()} == {0, 1, 2}


def test_a_label_below_0_survives_augmentation(folders):
    train, _ = loaders(folders, pad="largest", ignore_index=-100, augment="heavy")
    assert {int(v) for _, mask in train for v in mask.unique()} == {-100, 0, 1, 2}


def test_validation_of_different_sizes_comes_one_by_one(folders):
    train, val = loaders(folders, crop=32, val=["p0_0", "p0_1"])
    assert [tuple(image.shape) for image, _ in val] == [(1, 3, 48, 48), (1, 3, 60, 61)]
    assert loaders(folders, crop=32, val=["p0_0", "p2_0"])[1].batch_sampler.batch_size == 4


# Any number of channels


@pytest.mark.parametrize("channels, dtype", [(2, np.uint16), (4, np.float32), (6, np.uint8), (12, np.uint16)])
def test_any_number_of_channels(tmp_path, channels, dtype):
    random = np.random.default_rng(0)
    for i in range(5):
        cube = random.integers(0, 256, (channels, 40, 44 + i))
        scale = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[dtype]
        save(tmp_path / "images" / f"{i}.npy", (cube * scale).astype(dtype))
        save(tmp_path / "masks" / f"{i}.png", (cube[0] > 128).astype(np.uint8))
    train, val = create_dataloaders(tmp_path / "images", tmp_path / "masks", 2, [0], crop=(24, 32), normalize="dataset", augment="heavy")
    for image, mask in train:
        assert image.shape[1:] == (channels, 24, 32) and mask.shape[1:] == (1, 24, 32) and image.isfinite().all()
    assert train.dataset.n_channels == channels == len(train.dataset.mean) and val.dataset[0][0].shape == (channels, 40, 44)
    assert abs(torch.cat([train.dataset[i][0].flatten() for i in range(4)]).mean()) < 0.5
    small, _ = create_dataloaders(tmp_path / "images", tmp_path / "masks", 2, [0], image_size=16, augment=None)
    assert next(iter(small))[0].shape == (2, channels, 16, 16)


# The same bits however it is run


ODD = {"crop": (37, 41), "foreground_crops": 0.5, "normalize": "dataset", "augment": "heavy", "ignore_index": -1, "pad": "largest"}


@needs_workers
@pytest.mark.parametrize("options", [ODD, ODD | {"crop": None}, {"image_size": 45, "normalize": (0.4, 0.2), "augment": "medium"}], ids=["crop", "pad", "resize"])
def test_workers_cache_and_start_do_not_change_the_bits(folders, options):
    alone = loaders(folders, **options)[0]
    wanted = batches(alone, 3)
    assert same(wanted, batches(loaders(folders, **options, cache=False)[0], 3))
    crew = loaders(folders, **options | {"num_workers": 2})[0]
    assert same(wanted, batches(crew, 3)) and same(wanted[2:], batches(crew, 3, start=2)) and not same(wanted, batches(alone, 4))
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    assert same(wanted, batches(alone, 3))
    torch.set_num_threads(threads)


SAMPLE = """
import hashlib, json, sys
from unet_nbtrain.dataset import create_dataloaders
from unet_nbtrain.sampling import SampleKey
options = json.loads(sys.argv[3])
train, _ = create_dataloaders(sys.argv[1], sys.argv[2], 4, 0.25, n_classes=3, num_workers=0, **options)
image, mask = train.dataset[SampleKey(5, 7)]
print(hashlib.sha256(image.numpy().tobytes() + mask.numpy().tobytes()).hexdigest())
"""


def test_a_sample_is_the_same_in_another_process(folders):
    import hashlib

    image, mask = loaders(folders, **ODD)[0].dataset[SampleKey(5, 7)]
    here = hashlib.sha256(image.numpy().tobytes() + mask.numpy().tobytes()).hexdigest()
    done = subprocess.run([sys.executable, "-c", SAMPLE, *map(str, folders), json.dumps(ODD)], capture_output=True, text=True)
    assert done.stdout.strip() == here, done.stderr


# Options are checked first


@pytest.mark.parametrize(
    "options, told",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"n_classes": 0}, "n_classes=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"cache": "yes"}, "cache='yes'.*'auto'"),
        ({"crop": 25.6}, "crop=25.6.*whole number"),
        ({"image_size": (64, 0)}, r"image_size=\(64, 0\)"),
        ({"pad": "max", "ignore_index": -1}, "pad='max': use 'largest'"),
        ({"pad": 20, "ignore_index": -1}, "pad=20: the images have up to 61 x 61"),
        ({"pad": 64}, "pad=64 needs ignore_index"),
        ({"pad": 64, "image_size": 64, "ignore_index": -1}, "Leave one of the two out"),
        ({"foreground_crops": 1.5, "crop": 32}, "foreground_crops=1.5"),
        ({"foreground": 1}, "foreground=1 is for n_classes=1"),
        ({"n_classes": 1, "ignore_index": 1}, "ignore_index=1 with one class"),
        ({"normalize": "imagenet"}, "normalize='imagenet': use None, 'dataset'"),
        ({"normalize": ((123.7,) * 3, (58.4,) * 3)}, "Divide by 255"),
        ({"normalize": ([0.5] * 2, [0.5] * 2), "crop": 32}, "2 means.*3 channels"),
        ({"class_names": ["a", "b"]}, "list of 3 names"),
        ({"colors": ["#000000"] * 3}, "Each colour has one class"),
        ({"colors": ["#000000", "#111111", "#222222", "#333333"]}, r"colors has the classes \[3\], but n_classes=3"),
        ({"augment": "strong"}, "light, medium, heavy"),
        ({"groups": r"p\d"}, "0 groups in brackets"),
        ({"val": 6}, "val=6 is a single value"),
        ({}, "3 different sizes|different sizes.*crop=256.*pad='largest'"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_told_before_anything_is_decoded(folders, monkeypatch, options, told):
    monkeypatch.setattr("unet_nbtrain.stored_pairs.read_image", None)
    with pytest.raises(ValueError, match=told):
        loaders(folders, **options)


def test_preprocessing_is_plain_data(folders):
    options = {"class_names": ("bg", "round", "long"), "normalize": "dataset", "image_size": (40, 48), "ignore_index": np.int64(255)}
    found = loaders(folders, **options)[1].dataset.preprocessing
    assert json.loads(json.dumps(found)) == found and list(found) == [
        "n_channels", "n_classes", "image_size", "mean", "std", "foreground", "ignore_index", "colors", "class_names"
    ]  # fmt: skip
    assert (found["n_channels"], found["n_classes"], found["image_size"], found["ignore_index"]) == (3, 3, [40, 48], 255)
    assert found["class_names"] == ["bg", "round", "long"] and len(found["mean"]) == 3 and found["colors"] is None is found["foreground"]


def test_masks_in_colour_reach_the_batch(tmp_path):
    table = np.array([(0, 0, 0), (255, 0, 0), (0, 128, 255)], np.uint8)
    for i in range(4):
        image, mask = draw_cells(i, size=32, n_classes=3)
        save(tmp_path / "images" / f"{i}.png", image)
        save(tmp_path / "masks" / f"{i}.png", table[mask])
    for colors in ([tuple(map(int, o)) for o in table], {"#000000": 0, "#ff0000": 1, "#0080ff": 2}):
        _, val = create_dataloaders(tmp_path / "images", tmp_path / "masks", val=[1], n_classes=3, colors=colors, augment=None)
        assert torch.equal(val.dataset[0][1], torch.from_numpy(draw_cells(1, size=32, n_classes=3)[1]).long())
        assert len(val.dataset.preprocessing["colors"]) == 3 and "#ff0000" in val.dataset.preprocessing["colors"]


# Real images


def test_camvid():
    if not (DATA / "camvid").is_dir():
        pytest.skip(f"the data set camvid is not in {DATA}")
    folders = DATA / "camvid/images", DATA / "camvid/masks"
    train, val = create_dataloaders(
        *map(str, folders), 4, n_classes=11, ignore_index=11, val=range(40, 52), class_names=CAMVID, crop=256, augment="medium", normalize="dataset"
    )
    assert len(train.dataset) == 40 and len(val.dataset) == 12 and val.dataset.class_names == CAMVID and len(train) == 10
    images, masks = next(iter(train))
    assert images.shape == (4, 3, 256, 256) and masks.shape == (4, 256, 256) and int(masks.max()) <= 11 and abs(images.mean()) < 1
    whole, labels = next(iter(val))
    assert whole.shape == (4, 3, 360, 480) and labels.dtype == torch.int64 and 11 in labels.unique().tolist()
