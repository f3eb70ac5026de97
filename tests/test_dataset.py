"""Data as people have it: other suffixes, formats, sizes, damage; and loaders that give the same bits however they are run."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import Calls
from imagetools import save
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from unet_nbtrain.augmentation import get_augmentation_pipeline
from unet_nbtrain.core import natural_key
from unet_nbtrain.dataset import SegmentationDataset, create_dataloaders, demo_dataloaders
from unet_nbtrain.demo_data import draw_cells
from unet_nbtrain.image_files import read_header, read_image, read_labels, read_mask
from unet_nbtrain.mask_report import describe_masks
from unet_nbtrain.pairing import pair_files
from unet_nbtrain.sampling import ResumableBatchSampler, SampleKey, default_workers, make_loader
from unet_nbtrain.splits import split_positions

DATA = Path(__file__).resolve().parents[1] / "../shared/data"
needs_workers = pytest.mark.skipif(sys.platform == "win32", reason="worker processes are tested on POSIX systems")


def cells(folder, count=6, image=".png", mask=".png", suffix="", size=32, scale=255, n_classes=1):
    "A folder of drawn images and masks; the two folders"
    for i in range(count):
        picture, labels = draw_cells(i, size=size, n_classes=n_classes)
        save(folder / "images" / f"img_{i}{image}", picture)
        save(folder / "masks" / f"img_{i}{suffix}{mask}", labels * scale)
    return folder / "images", folder / "masks"


def bits(loader, epoch, start=0):
    "The batches of an epoch"
    loader.batch_sampler.set_epoch(epoch, start)
    return [(image.clone(), mask.clone()) for image, mask in loader]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(left, right)
    )


# Folders as people have them


@pytest.mark.parametrize("suffix", ["", "_mask", "_masks", "_label", "_labels", "_seg", "_gt"])
@pytest.mark.parametrize(
    "image, mask", [(".png", ".png"), (".jpg", ".gif"), (".TIF", ".npy"), (".bmp", ".tiff"), (".npy", ".bmp")]
)
def test_suffixes_and_formats(tmp_path, image, mask, suffix):
    train, val = create_dataloaders(
        *cells(tmp_path, image=image, mask=mask, suffix=suffix), val=[0], batch_size=2, augment=None
    )
    assert train.dataset.n_channels == 3 and len(train.dataset) == 5 and val.dataset.names == [f"img_0{image}"]
    picture, labels = draw_cells(0, size=32)
    got_image, got_mask = val.dataset[0]
    assert torch.equal(got_mask[0], torch.from_numpy(labels).float())
    wanted = torch.from_numpy(picture).permute(2, 0, 1) / 255
    assert (got_image - wanted).abs().mean() < (0.03 if image == ".jpg" else 1e-6)


def test_another_suffix_and_one_folder(tmp_path):
    images, _ = cells(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        path.rename(images / f"{path.stem}-outline.png")
    assert len(pair_files(images, images, mask_suffix="-outline")) == 6
    with pytest.raises(ValueError, match="mask_suffix"):
        pair_files(images, images)


def test_natural_order_decides_positions(tmp_path):
    images, masks = cells(tmp_path, count=12)
    _, val = create_dataloaders(images, masks, val=range(10, 12))
    assert val.dataset.names == ["img_10.png", "img_11.png"]
    assert sorted(["10.png", "9.png", "1.png"], key=natural_key) == ["1.png", "9.png", "10.png"]


def test_lists_of_files_in_any_order(tmp_path):
    images, masks = cells(tmp_path, suffix="_seg")
    listed = sorted(images.iterdir(), reverse=True), [str(p) for p in masks.iterdir()]
    assert pair_files(*listed) == pair_files(images, masks)


def test_the_first_five_of_many_are_named(tmp_path):
    images, masks = cells(tmp_path, count=9)
    for i in range(7):
        (masks / f"img_{i}.png").unlink()
    save(masks / "other.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(
        ValueError,
        match=r"without mask \(7\): img_0.png, img_1.png, img_2.png, img_3.png, img_4.png, ….*image \(1\): other.png",
    ):
        create_dataloaders(images, masks)


def test_hidden_files_and_other_files_are_left_aside(tmp_path):
    images, masks = cells(tmp_path)
    (images / "._img_0.png").write_bytes(b"rubbish")
    (images / "Thumbs.db").write_bytes(b"rubbish")
    (masks / ".DS_Store").write_bytes(b"rubbish")
    assert len(pair_files(images, masks)) == 6


def test_two_files_with_one_stem_are_not_guessed_at(tmp_path):
    images, masks = cells(tmp_path)
    save(images / "img_0.jpg", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"img_0\.(jpg|png) and .*img_0\.(jpg|png)"):
        pair_files(images, masks)


@pytest.mark.parametrize("wrong", ["nowhere", "empty"])
def test_a_missing_or_empty_folder(tmp_path, wrong):
    images, _ = cells(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=f"masks: .*{wrong}"):
        create_dataloaders(images, tmp_path / wrong)


# Kinds of images


GREY = (np.arange(24, dtype=np.uint8) * 10).reshape(4, 6)
COLOR = np.stack([GREY, GREY // 3, 255 - GREY], -1)


@pytest.mark.parametrize(
    "name, picture, channels",
    [
        ("grey.png", GREY, 1),
        ("color.png", COLOR, 3),
        ("rgba.png", np.dstack([COLOR, GREY]), 3),
        ("la.png", Image.fromarray(np.dstack([GREY, GREY])), 1),
        ("one_bit.png", Image.fromarray(GREY > 100), 1),
        ("palette.png", Image.fromarray(COLOR).quantize(24), 3),
        ("cmyk.jpg", Image.fromarray(COLOR).convert("CMYK"), 3),
        ("deep.png", GREY.astype(np.uint16) * 257, 1),
        ("deep.tif", GREY.astype(np.uint16) * 257, 1),
        ("wide.tif", GREY.astype(np.int32) * 257, 1),
        ("float.tif", (GREY / 255).astype(np.float32), 1),
        ("grey.gif", GREY, 1),
        ("deep.npy", GREY.astype(np.uint16) * 257, 1),
        ("double.npy", GREY / 255, 1),
        ("chw.npy", np.moveaxis(np.pad(COLOR, ((0, 1), (0, 0), (0, 0))), 2, 0), 3),
    ],
)
def test_kinds_of_images_come_out_in_unit_range(tmp_path, name, picture, channels):
    path = save(tmp_path / name, picture)
    assert (
        read_header(path)[2] == channels == len(read_image(path))
        and read_header(path)[:2] == read_image(path).shape[1:]
    )
    height, width, _ = read_header(path)
    image = SegmentationDataset([path], [np.zeros((height, width), np.uint8)])[0][0]
    assert image.dtype == torch.float32 and image.shape == (channels, height, width)
    if name.split(".")[0] in ("grey", "la", "deep", "wide", "float", "double"):
        assert torch.allclose(image[0], torch.from_numpy(GREY / 255).float(), atol=1e-6)
    if name in ("color.png", "rgba.png", "palette.png"):
        assert torch.allclose(image, torch.from_numpy(COLOR / 255).float().permute(2, 0, 1), atol=1e-6)


def test_grey_and_color_in_one_folder(tmp_path):
    images, masks = cells(tmp_path)
    save(images / "img_0.png", draw_cells(0, size=32)[0][..., 0])
    train, val = create_dataloaders(images, masks, val=["img_0"], augment=None)
    assert train.dataset.n_channels == val.dataset.n_channels == 3
    image = val.dataset[0][0]
    assert image.shape[0] == 3 and torch.equal(image[0], image[1])


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_tags_of_photos(tmp_path, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    photo = np.zeros((16, 32, 3), np.uint8)
    photo[:8] = 255
    path = save(tmp_path / "photo.jpg", photo, exif=exif, quality=95)
    image = read_image(path)
    assert read_header(path)[:2] == image.shape[1:] == ((16, 32) if tag < 5 else (32, 16))
    bright = image[0] > 128
    half = {
        1: bright[:8],
        2: bright[:8],
        3: bright[8:],
        4: bright[8:],
        5: bright[:, :8],
        6: bright[:, 8:],
        7: bright[:, 8:],
        8: bright[:, :8],
    }[tag]
    assert half.all() and bright.sum() == half.size


def test_orientation_tags_of_tiffs(tmp_path):
    rows = np.repeat(np.arange(16, dtype=np.uint8), 32).reshape(16, 32)
    assert np.array_equal(read_image(save(tmp_path / "turned.tif", rows, tiffinfo={0x0112: 3}))[0], rows[::-1, ::-1])
    with pytest.raises(ValueError, match=r"sideways\.tif: .*upright"):
        read_header(save(tmp_path / "sideways.tif", rows, tiffinfo={0x0112: 6}))


# Damage


def damage(path, how):
    whole = path.read_bytes()
    path.write_bytes(
        {"cut": whole[: len(whole) * 2 // 3], "tail": whole[:-20], "empty": b"", "html": b"<html>404</html>"}[how]
    )


@pytest.mark.parametrize("how", ["cut", "tail", "empty", "html"])
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_damaged_file_is_named_when_the_loaders_are_made(tmp_path, kind, how):
    images, masks = cells(tmp_path)
    damage(tmp_path / kind / "img_3.png", how)
    with pytest.raises(ValueError, match=f"{kind}.img_3.png"):
        create_dataloaders(images, masks)


@pytest.mark.parametrize("extension", [".jpg", ".tif", ".gif", ".bmp", ".npy"])
def test_damage_in_other_formats(tmp_path, extension):
    path = save(tmp_path / f"x{extension}", np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    damage(path, "cut")
    with pytest.raises(ValueError, match=f"x{extension}: "):
        read_image(path)


def test_code_in_a_numpy_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"evil\.npy"):
        read_image(tmp_path / "evil.npy")
    assert not (tmp_path / "owned").exists()


@needs_workers
def test_a_damaged_file_in_a_worker_is_named(tmp_path):
    images, masks = cells(tmp_path)
    train, _ = create_dataloaders(images, masks, val=[0], cache=False, num_workers=1, augment=None)
    damage(images / "img_3.png", "cut")
    with pytest.raises(ValueError, match=r"img_3\.png"):
        list(train)


def test_sizes_that_do_not_fit(tmp_path):
    images, masks = cells(tmp_path)
    save(images / "img_2.png", np.zeros((20, 24), np.uint8))
    with pytest.raises(ValueError, match=r"images.img_2\.png and img_2\.png: the image is 20 x 24 .*its mask 32 x 32"):
        create_dataloaders(images, masks)
    save(masks / "img_2.png", np.zeros((20, 24), np.uint8))
    with pytest.raises(
        ValueError, match=r"2 different sizes.*32 x 32 \(4 images\), 20 x 24 \(1 images\).*crop=.*image_size="
    ):
        create_dataloaders(images, masks, val=[0])
    for options, shape in [({"image_size": 24}, (24, 24)), ({"crop": (28, 36)}, (28, 36))]:
        train, _ = create_dataloaders(images, masks, val=[0], **options)
        assert {tuple(image.shape[-2:]) for batch in train for image in batch} == {shape}
    train, val = create_dataloaders(images, masks, batch_size=1, val=[0, 2])
    assert val.batch_sampler.batch_size == 1 and len(list(train)) == 4


# Masks


def palette_image(labels, colors):
    image = Image.fromarray(labels).convert("P")
    image.putpalette(sum(map(list, colors), []))
    return image


LABELS = (np.arange(24).reshape(4, 6) % 4).astype(np.uint8)


@pytest.mark.parametrize(
    "name, labels",
    [
        ("l.png", LABELS),
        ("l.gif", LABELS),
        ("l.tif", LABELS),
        ("l.npy", LABELS.astype(np.int64)),
        ("float.npy", LABELS.astype(np.float32)),
        ("i16.png", LABELS.astype(np.uint16)),
        ("i32.tif", LABELS.astype(np.int32)),
        ("palette.png", palette_image(LABELS, [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)])),
        ("palette.gif", palette_image(LABELS, [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)])),
        ("grey_palette.png", palette_image(LABELS, [(0, 0, 0), (80, 80, 80), (160, 160, 160), (240, 240, 240)])),
        ("rgb.png", np.dstack([LABELS] * 3)),
        ("rgba.png", np.dstack([LABELS] * 3 + [LABELS * 0 + 255])),
        ("la.png", Image.fromarray(np.dstack([LABELS, LABELS * 0 + 255]))),
    ],
)
def test_class_indices_of_every_kind(tmp_path, name, labels):
    path = save(tmp_path / name, labels)
    assert np.array_equal(read_labels(path), LABELS) and np.array_equal(read_mask(path, n_classes=4), LABELS)
    with pytest.raises(ValueError, match=f"{name}: labels outside 0 to 2: 3 \\(25.0%\\)"):
        read_mask(path, n_classes=3)
    assert np.array_equal(read_mask(path, foreground=[1, 3]), LABELS % 2)


def test_a_jpeg_mask_shows_its_histogram(tmp_path):
    path = save(tmp_path / "mask.jpg", draw_cells(0, size=64)[1] * 255, quality=60)
    with pytest.raises(ValueError, match=r"mask\.jpg: \d+ values, .*0 \([\d.]+%\).*range\(128, 256\)"):
        read_mask(path)
    truth = draw_cells(0, size=64)[1]
    assert (read_mask(path, foreground=range(128, 256)) != truth).mean() < 0.01


def test_colors_are_refused_with_advice(tmp_path):
    with pytest.raises(ValueError, match=r"color\.png: the mask is in colour.*class indices"):
        read_mask(save(tmp_path / "color.png", COLOR), n_classes=3)


def test_ignored_pixels_reach_the_batch(tmp_path):
    images, masks = cells(tmp_path, n_classes=3, scale=1)
    for path in masks.iterdir():
        labels = np.array(Image.open(path))
        labels[:4] = 255
        save(path, labels)
    train, val = create_dataloaders(images, masks, n_classes=3, ignore_index=255, augment="heavy", val=[0])
    seen = {int(v) for _, mask in bits(train, 0) + bits(val, 0) for v in mask.unique()}
    assert seen == {0, 1, 2, 255} and train.dataset.ignore_index == 255
    with pytest.raises(ValueError, match=r"img_\d\.png: labels outside 0 to 2: 255.*ignore_index \(now None\)"):
        create_dataloaders(images, masks, n_classes=3)


def test_one_class_masks_with_ignored_pixels():
    mask = np.array([[0, 7, 255]])
    image, target = SegmentationDataset([np.zeros((1, 3), np.uint8)], [mask], ignore_index=255)[0]
    assert target.dtype == torch.float32 and target.tolist() == [[[0, 1, 255]]]


# The same bits however it is run


@pytest.fixture(scope="module")
def odd_cells(tmp_path_factory):
    "Images of an odd size, so that threads split them unevenly"
    return cells(tmp_path_factory.mktemp("odd"), count=11, size=183)


def loader_of(folders, **options):
    return create_dataloaders(
        *folders, **{"batch_size": 3, "val": [0], "augment": "heavy", "num_workers": 0, "seed": 4} | options
    )[0]


@needs_workers
def test_workers_and_cache_do_not_change_the_bits(odd_cells):
    alone, read = loader_of(odd_cells), loader_of(odd_cells, cache=False)
    crew = loader_of(odd_cells, num_workers=2)
    for epoch in (0, 1, 5):
        wanted = bits(alone, epoch)
        assert same(wanted, bits(crew, epoch)) and same(wanted, bits(read, epoch))
    assert same(bits(crew, 5, start=2), wanted[2:])
    assert not same(bits(alone, 0), bits(alone, 1))


def test_the_number_of_threads_does_not_change_the_bits(odd_cells):
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(bits(loader_of(odd_cells, image_size=(131, 97)), 2))
    torch.set_num_threads(before)
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_every_batch_of_an_epoch_can_be_the_first(odd_cells):
    loader = loader_of(odd_cells, crop=64)
    wanted = bits(loader, 7)
    assert len(wanted) == len(loader) == 4 and len(wanted[-1][0]) == 1
    for start in range(5):
        assert same(bits(loader, 7, start), wanted[start:])


def test_an_epoch_leaves_global_randomness_and_the_cache_alone(odd_cells):
    loader = loader_of(odd_cells, augment="heavy")
    torch.manual_seed(11)
    before, kept = torch.get_rng_state(), [image.copy() for image, _ in map(loader.dataset.arrays, range(10))]
    numpy_state = np.random.get_state()[1].copy()
    bits(loader, 0)
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(numpy_state, np.random.get_state()[1])
    assert all(np.array_equal(a, loader.dataset.arrays(i)[0]) for i, a in enumerate(kept))


def test_seeds_differ_and_repeat(odd_cells):
    assert same(bits(loader_of(odd_cells), 1), bits(loader_of(odd_cells), 1))
    assert not same(bits(loader_of(odd_cells), 1), bits(loader_of(odd_cells, seed=5), 1))


def test_validation_is_whole_and_plain(odd_cells):
    _, val = create_dataloaders(*odd_cells, batch_size=4, val=slice(6, None), crop=32, augment="heavy")
    first, second = bits(val, 0), bits(val, 9)
    assert same(first, second) and sum(len(image) for image, _ in first) == 5 and first[0][0].shape[-2:] == (183, 183)


# Keys, samplers, splits


def test_sample_keys_travel(tmp_path):
    for key in (SampleKey(0, 0), SampleKey(2**40, 12)):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            copy = pickle.loads(pickle.dumps(key, protocol))
            assert copy == key and copy.epoch == key.epoch and type(copy) is SampleKey


@needs_workers
def test_any_data_set_takes_the_keys():
    data = TensorDataset(torch.arange(10) * 2)
    for workers in (0, 2):
        loader = make_loader(data, 4, shuffle=True, seed=3, num_workers=workers)
        passes = [[int(v) for (batch,) in loader for v in batch] for _ in range(3)]
        assert passes == [[2 * i for i in loader.batch_sampler.order(epoch)] for epoch in range(3)]


def test_skipping_is_cheap():
    "Ten batches of a million images after 124,990 that are skipped: no call for each of these"
    sampler = ResumableBatchSampler(1_000_000, 8, shuffle=True)
    sampler.set_epoch(3, start_batch=124_990)
    with Calls() as called:
        batches = list(sampler)
    assert len(batches) == 10 and 0 < len(called) < 1000


@pytest.mark.parametrize("n, fraction, expected", [(2, 0.01, 1), (30, 0.2, 6), (5, 0.99, 4), (3, 0.5, 2)])
def test_fractions(n, fraction, expected):
    train, val = split_positions([f"{i}.png" for i in range(n)], fraction)
    assert len(val) == expected and sorted(train + val) == list(range(n)) and val == sorted(val)


@pytest.mark.parametrize(
    "val",
    [
        range(2, 4),
        [2, 3],
        (3, 2),
        [np.int64(2), 3],
        slice(2, 4),
        [-8, -7],
        ["c2.png", "c3"],
        ["c3.png", "c2.png", "c2"],
        np.array([2, 3]),
    ],
    ids=str,
)
def test_positions_and_names(val):
    names = [f"c{i}.png" for i in range(10)]
    assert split_positions(names, val)[1] == [2, 3]


@pytest.mark.parametrize("val", [0.0, 1.0, -0.5, [], range(10), ["c77"], [10], [-11], 3, "c2", [0.5]], ids=str)
def test_splits_that_are_refused(val):
    with pytest.raises(ValueError, match="^val[ =]"):
        split_positions([f"c{i}.png" for i in range(10)], val)


def test_no_image_is_on_both_sides(odd_cells):
    for seed in range(5):
        train, val = create_dataloaders(*odd_cells, val=0.3, seed=seed)
        assert not set(train.dataset.names) & set(val.dataset.names) and len(train.dataset) + len(val.dataset) == 11


def test_default_workers_depend_on_the_work(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["fork", "spawn"])
    found = {}
    for cuda in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        found[cuda] = [default_workers(reads, augments) for reads in (True, False) for augments in (True, False)]
    assert found == {False: [4, 4, 0, 0], True: [4, 4, 4, 0]}
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["forkserver", "fork"])
    assert default_workers(True, True) == 4 and default_workers(False, True) == 0
    for platform in ("darwin", "win32"):
        monkeypatch.setattr("sys.platform", platform)
        assert default_workers(True, True) == 0


# Worker processes


@needs_workers
def test_workers_outlive_an_interrupt_and_use_one_thread():
    loader = make_loader(Threads(), 1, shuffle=False, num_workers=2)
    batches = iter(loader)
    first = [next(batches), next(batches)]
    pids = [worker.pid for worker in batches._workers]
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    assert all(int(batch) == 1 for batch in [*first, *batches]) and len(first) == 2
    del batches, loader
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


class Threads(torch.utils.data.Dataset):
    "How many threads PyTorch uses where the sample is made"

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.get_num_threads()


ORPHAN = """
import multiprocessing, os, sys, time
from unet_nbtrain.sampling import start_worker

def child(guard, path):
    parent = os.getppid()
    open(path + ".up", "w").close()
    while os.getppid() == parent:
        time.sleep(0.01)
    if guard:
        start_worker(0)
    open(path, "w").close()

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    for guard in (True, False):
        multiprocessing.Process(target=child, args=(guard, f"{sys.argv[1]}/{guard}")).start()
    time.sleep(60)
"""


@needs_workers
def test_a_worker_whose_parent_is_gone_leaves(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(tmp_path)])
    wait_for(lambda: (tmp_path / "True.up").exists() and (tmp_path / "False.up").exists())
    parent.kill()
    parent.wait()
    wait_for(lambda: (tmp_path / "False").exists())
    time.sleep(0.3)
    assert not (tmp_path / "True").exists()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


# Demo data and the report


@pytest.mark.parametrize("size, count", [(64, 16), (128, 16), (512, 6)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_predicting_cells_everywhere_scores_under_0_4(size, count, seed):
    share = np.mean([(draw_cells(i, size, seed=seed)[1] > 0).mean() for i in range(count)])
    assert 0.08 < share < 0.25 and 2 * share / (1 + share) < 0.4


def test_demo_loaders():
    train, val = demo_dataloaders(n_train=10, n_val=3, size=48, n_classes=3, batch_size=4, seed=2)
    assert [len(images) for images, _ in train] == [4, 4, 2] and [len(images) for images, _ in val] == [3]
    images, masks = next(iter(val))
    assert images.shape == (3, 3, 48, 48) and masks.shape == (3, 48, 48) and masks.dtype == torch.int64
    assert train.dataset.n_classes == 3 and train.dataset.n_channels == 3 and val.dataset.name_of(2) == "val_2"
    assert not torch.equal(val.dataset[0][0], demo_dataloaders(4, 3, 48, 3, seed=3)[1].dataset[0][0])


def test_the_report_on_loaders_and_folders(tmp_path):
    images, masks = cells(tmp_path)
    train, val = create_dataloaders(images, masks, val=[0, 1])
    whole, parts = describe_masks(images, masks), [describe_masks(train), describe_masks(val)]
    assert whole["pairs"] == 6 == sum(part["pairs"] for part in parts) and train.batch_sampler.epoch == 0
    share = np.average([part["classes"][1] for part in parts], weights=[4, 2])
    assert (
        np.isclose(whole["classes"][1], share)
        and set(whole["values"]) == {0, 255}
        and set(parts[0]["values"]) == {0, 1}
    )
    plain = DataLoader([{"image": image, "mask": mask} for image, mask in val.dataset], batch_size=2)
    assert describe_masks(plain)["classes"] == parts[1]["classes"]


# Real images


def real(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"the data set {name} is not in {DATA}")
    return DATA / name / "images", DATA / name / "masks"


def test_isbi_membranes():
    images, masks = real("isbi2012")
    train, val = create_dataloaders(images, masks, batch_size=2, val=range(24, 30), foreground=0, augment="medium")
    assert (
        len(train.dataset) == 24
        and val.dataset.names == [f"{i}.png" for i in range(24, 30)]
        and val.dataset.n_channels == 1
    )
    batch, target = next(iter(train))
    assert batch.shape == target.shape == (2, 1, 512, 512) and set(target.unique().tolist()) == {0, 1}
    assert 0.15 < describe_masks(val)["classes"][1] < 0.25
    assert "pass its value as foreground" in describe_masks(images, masks)["warnings"][0]


def test_camvid_classes():
    images, masks = real("camvid")
    upright = get_augmentation_pipeline(upright=True, ignore_index=11)
    train, val = create_dataloaders(
        images, masks, 4, range(40, 52), n_classes=11, ignore_index=11, crop=(240, 320), augment=upright
    )
    batch, target = next(iter(train))
    assert batch.shape == (4, 3, 240, 320) and target.shape == (4, 240, 320) and target.dtype == torch.int64
    assert len(val.dataset) == 12 and next(iter(val))[0].shape == (4, 3, 360, 480)
    assert describe_masks(val)["warnings"] == [] and set(describe_masks(val)["values"]) == set(range(12))
    with pytest.raises(ValueError, match=r"0001TP_\d+\.png: labels outside 0 to 10: 11"):
        create_dataloaders(images, masks, n_classes=11)
