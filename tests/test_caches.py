"""Decoded once, by whoever reads: caches that all processes share and that never give wrong pixels; batches in one piece; augmentation on the device."""

import errno
import logging
import multiprocessing
import os
import py_compile
import sys
import time
from importlib.util import spec_from_file_location
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import Operations
from imagetools import save
from torch import nn
from torch.utils.data import DataLoader, Subset

from unet_nbtrain import UNetTrainer, create_dataloaders, create_optimizer
from unet_nbtrain.augmentation import get_augmentation_pipeline
from unet_nbtrain.batch_augmentation import BatchAugmentation
from unet_nbtrain.dataset import SegmentationDataset
from unet_nbtrain.demo_data import draw_cells
from unet_nbtrain.feeding import Feed
from unet_nbtrain.image_cache import DiskCache, MemoryStore
from unet_nbtrain.sampling import ResumableBatchSampler, SampleKey, make_loader

needs_workers = pytest.mark.skipif(sys.platform == "win32", reason="worker processes are tested on POSIX systems")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Thirteen drawn images with masks; an `images` and a `masks` folder"
    folder = tmp_path_factory.mktemp("cells")
    for i in range(13):
        image, mask = draw_cells(i, size=32)
        save(folder / "images" / f"{i}.png", image)
        save(folder / "masks" / f"{i}.png", mask * 255)
    return folder / "images", folder / "masks"


def train_loader(folders, **options):
    return create_dataloaders(*folders, **{"batch_size": 4, "val": [0], "augment": None, "num_workers": 0, "seed": 1} | options)[0]


@pytest.fixture
def decodings(monkeypatch, tmp_path):
    "Counts the images that any process decodes: `decodings()` is how many since it was last asked"
    import unet_nbtrain.stored_pairs as room

    log, read, seen = tmp_path / "decoded", room.read_image, [0]
    log.touch()

    def noted(source, n_channels):
        with log.open("ab") as file:
            file.write(b".")
        return read(source, n_channels)

    def count():
        before, seen[0] = seen[0], log.stat().st_size
        return seen[0] - before

    monkeypatch.setattr(room, "read_image", noted)
    return count


def batches(loader):
    return [(images.clone(), masks.clone()) for images, masks in loader]


def same(left, right):
    return len(left) == len(right) > 0 and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(left, right))


# Each file is decoded once


@needs_workers
@pytest.mark.parametrize("workers, persistent", [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("fed", [False, True], ids=["loader", "feed"])
def test_the_second_epoch_decodes_nothing(folders, tmp_path, decodings, workers, persistent, fed):
    dataset = train_loader(folders, cache=tmp_path / "cache").dataset
    assert decodings() == 0 and not dataset.cached
    loader = DataLoader(dataset, batch_sampler=ResumableBatchSampler(12, 4, True), num_workers=workers, persistent_workers=persistent)
    feed = Feed(loader, 0)
    counts = []
    for epoch in range(3):
        assert len(list(feed.batches(epoch) if fed else loader)) == 3
        counts.append(decodings())
    feed.close()
    assert counts == [12, 0, 0]
    again = train_loader(folders, cache=tmp_path / "cache", num_workers=None)
    assert again.dataset.cached and again.num_workers == (0 if not torch.cuda.is_available() else again.num_workers)
    assert len(list(again)) == 3 and decodings() == 0


def test_all_ways_give_the_same_bits(folders, tmp_path):
    options = {"augment": "heavy", "normalize": "dataset", "crop": 24, "foreground_crops": 0.5}
    wanted = batches(train_loader(folders, cache=True, **options))
    for cache in (False, tmp_path / "cache", tmp_path / "cache", str(tmp_path / "cache")):
        assert same(batches(train_loader(folders, cache=cache, **options)), wanted)


def test_other_options_and_changed_files_are_decoded_anew(folders, tmp_path, decodings):
    copies = []
    for folder in folders:
        copies.append(tmp_path / folder.name)
        copies[-1].mkdir()
        for file in folder.iterdir():
            (copies[-1] / file.name).write_bytes(file.read_bytes())
    options = {"cache": tmp_path / "cache", "val": [0]}
    for more in ({}, {"image_size": 16}, {"foreground": 0}, {"ignore_index": -1}, {"n_classes": 300}):
        loader = train_loader(copies, **options, **more)
        decodings()
        assert len(list(loader)) == 3 and decodings() == 12, more
    loader = train_loader(copies, **options)
    before = batches(loader)
    assert decodings() == 0
    mask = copies[1] / "5.png"
    about = mask.stat()
    content = bytearray(mask.read_bytes())
    save(mask, draw_cells(77, size=32)[1] * 255)
    mask.write_bytes(mask.read_bytes().ljust(len(content), b"\0"))
    os.utime(mask, ns=(about.st_atime_ns, about.st_mtime_ns))
    loader.batch_sampler.set_epoch(0)
    assert not same(batches(loader), before) and decodings() == 1


# Damage, full disks, several processes


def test_whatever_is_damaged_is_decoded_again(folders, tmp_path, decodings, caplog):
    wanted = batches(train_loader(folders, cache=False))
    train_loader(folders, cache=tmp_path / "cache").dataset.arrays(0)
    list(train_loader(folders, cache=tmp_path / "cache"))
    entries = sorted((tmp_path / "cache").iterdir())
    assert len(entries) == 12
    for i, path in enumerate(entries):
        content = bytearray(path.read_bytes())
        content[(i * 311) % len(content)] ^= 1 << i % 8
        path.write_bytes([content, content[: i * 40], b"", b"unetimg1" + bytes(100)][i % 4])
    decodings()
    with caplog.at_level(logging.WARNING):
        assert same(batches(train_loader(folders, cache=tmp_path / "cache")), wanted)
    assert decodings() == 12 and sum("is damaged" in record.message for record in caplog.records) == 1
    assert same(batches(train_loader(folders, cache=tmp_path / "cache")), wanted) and decodings() == 0


@pytest.mark.parametrize("target", ["os.replace", "pathlib.Path.mkdir", "os.scandir", "shutil.disk_usage"])
def test_a_disk_that_refuses_ends_nothing(folders, tmp_path, monkeypatch, caplog, target):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    wanted = batches(train_loader(folders, cache=False))
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(target, fail)
        assert same(batches(train_loader(folders, cache=tmp_path / "cache")), wanted)
    assert 1 <= sum("no longer written" in record.message for record in caplog.records) <= 2
    assert not (tmp_path / "cache").is_dir() or list((tmp_path / "cache").iterdir()) == []


def kept_in(cache, folders):
    "A data set of all thirteen images that keeps them in a folder"
    return SegmentationDataset(*([folder / f"{i}.png" for i in range(13)] for folder in folders), cache=cache)


def test_a_cache_that_may_only_be_read_is_used(folders, tmp_path, decodings, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    wanted, missing = list(kept_in(tmp_path / "cache", folders)), kept_in(tmp_path / "cache", folders)._key(3)
    for target in ("os.utime", "os.unlink", "pathlib.Path.unlink", "os.replace"):
        monkeypatch.setattr(target, refuse)
    monkeypatch.setattr("os.access", lambda path, mode: mode == os.R_OK)
    decodings()
    with caplog.at_level(logging.WARNING):
        full = kept_in(tmp_path / "cache", folders)
        assert full.cached and "(13 of 13 are there)" in full.whereabouts
        assert same(list(full), wanted) and decodings() == 0 and not caplog.records
        (tmp_path / "cache" / f"{missing}.unetimg").rename(tmp_path / "elsewhere")
        lacking = kept_in(tmp_path / "cache", folders)
        assert not lacking.cached and "(12 of 13 are there)" in lacking.whereabouts
        assert same(list(lacking), wanted) and same(list(lacking), wanted) and decodings() == 2
    assert len(caplog.records) == 1 and "it is read-only here. Training goes on, and decodes again what is not there." in caplog.text


def test_entries_of_others_are_used_and_new_ones_kept(folders, tmp_path, decodings, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    wanted = list(kept_in(tmp_path / "cache", folders))
    sorted((tmp_path / "cache").iterdir())[3].unlink()
    monkeypatch.setattr("os.utime", refuse)
    decodings()
    assert same(list(kept_in(tmp_path / "cache", folders)), wanted) and decodings() == 1
    again = kept_in(tmp_path / "cache", folders)
    assert again.cached and same(list(again), wanted) and decodings() == 0 and not caplog.records


@needs_workers
def test_too_many_open_files_cost_no_entry(folders, tmp_path, decodings, caplog):
    import resource

    wanted, data = list(kept_in(tmp_path / "cache", folders)), kept_in(tmp_path / "cache", folders)
    entries, limits, keys = sorted((tmp_path / "cache").iterdir()), resource.getrlimit(resource.RLIMIT_NOFILE), [data._key(i) for i in range(13)]
    decodings()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        found = [data._disk.get(key) for key in keys]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found == [None] * 13 and sorted((tmp_path / "cache").iterdir()) == entries
    assert len(caplog.records) == 1 and "cannot be opened (Too many open files). It stays there" in caplog.text
    assert same(list(data), wanted) and decodings() == 0


def fill(folders, cache, results):
    "What a process sees of two epochs, by its sums; run in a process of its own"
    loader = train_loader(folders, cache=cache)
    results.put([float(images.sum()) + float(masks.sum()) for _ in range(2) for images, masks in loader])


def starve(folders, cache, results):
    "The same where no file may have more than 2,000 bytes: an entry has 4,288"
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
    fill(folders, cache, results)


@needs_workers
def test_a_disk_that_becomes_full_within_a_file(folders, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=starve, args=(folders, tmp_path / "cache", results))
    process.start()
    told = results.get(timeout=60)
    process.join()
    fill(folders, False, results)
    assert told == results.get(timeout=60) and process.exitcode == 0 and list((tmp_path / "cache").iterdir()) == []


@needs_workers
def test_processes_share_a_cache_while_both_fill_it(folders, tmp_path, decodings):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    crew = [context.Process(target=fill, args=(folders, tmp_path / "cache", results)) for _ in range(3)]
    for process in crew:
        process.start()
    told = [results.get(timeout=60) for _ in crew]
    for process in crew:
        process.join()
    fill(folders, False, results)
    assert told == [results.get(timeout=60)] * 3 and 12 <= decodings() - 24 <= 36
    loader = train_loader(folders, cache=tmp_path / "cache")
    assert loader.dataset.cached and same(batches(loader), batches(train_loader(folders, cache=False)))
    assert all(path.suffix == ".unetimg" for path in (tmp_path / "cache").iterdir())


def test_another_decoder_is_another_key(folders, tmp_path, decodings, monkeypatch):
    list(train_loader(folders, cache=tmp_path / "cache"))
    monkeypatch.setattr("unet_nbtrain.stored_pairs.PIL.__version__", "0.0.1")
    from unet_nbtrain.stored_pairs import _decoder

    _decoder.cache_clear()
    decodings()
    assert len(list(train_loader(folders, cache=tmp_path / "cache"))) == 3 and decodings() == 12
    monkeypatch.undo()
    _decoder.cache_clear()


@pytest.mark.parametrize("kind", [".py", ".pyc"])
def test_what_a_former_version_decoded_is_not_used(folders, tmp_path, monkeypatch, kind):
    import unet_nbtrain.stored_pairs as room

    def use(version, change):
        "Decode from here on with the rooms in a folder, in which a function is another one"
        (tmp_path / version).mkdir()
        for name in room._DECODERS:
            path = tmp_path / version / f"{name}.py"
            path.write_text(Path(room.__file__).with_name(path.name).read_text().replace("def _stretched(image):\n", change))
            py_compile.compile(path, path.with_suffix(".pyc"))
        monkeypatch.setattr(room, "find_spec", lambda name: spec_from_file_location(name, tmp_path / version / f"{name.split('.')[-1]}{kind}"))
        room._decoder.cache_clear()

    use("former", "def _stretched(image):\n    return 1, 1\n")
    list(train_loader(folders, cache=tmp_path / "cache"))
    assert train_loader(folders, cache=tmp_path / "cache").dataset.cached
    use("present", "def _stretched(image):\n")
    assert not train_loader(folders, cache=tmp_path / "cache").dataset.cached
    monkeypatch.undo()
    room._decoder.cache_clear()


def test_a_folder_never_grows_beyond_its_limit(tmp_path):
    cache, arrays = DiskCache(tmp_path, limit=100_000), [np.zeros(9_000, np.uint8)]
    for round_ in range(5):
        keys = [f"{round_ * 100 + i:032x}" for i in range(8)]
        cache = DiskCache(tmp_path, limit=100_000)
        cache.make_room(keys, 8 * 9_100)
        for key in keys:
            cache.put(key, arrays)
        assert all(cache.get(key) for key in keys) and sum(path.stat().st_size for path in tmp_path.iterdir()) <= 100_000


def test_memory_travels_as_a_handle_and_not_as_pixels():
    store = MemoryStore()
    for i in range(50):
        store.append([np.full((3, 256, 256), i, np.uint8), np.zeros((256, 256), np.uint8)])
    sent = ForkingPickler.dumps(store)
    assert len(sent) < 50_000 and all(block.is_shared() for block in store._blocks) and len(store._blocks) == 1
    assert int(store[17][0][0, 0, 0]) == 17


# Batches in one piece


@pytest.mark.parametrize("n_classes", [1, 3])
def test_a_batch_in_one_piece_has_the_bits_of_its_samples(n_classes):
    images, masks = zip(*(draw_cells(i, size=32, n_classes=n_classes) for i in range(6)))
    data = SegmentationDataset(images, masks, n_classes, normalize="dataset", augment=get_augmentation_pipeline(strength="heavy"), crop=24, seed=3)
    for epoch in (0, 2):
        keys = [SampleKey(i, epoch) for i in (4, 1, 5)]
        whole, labels = data.__getitems__(keys).batch
        assert all(torch.equal(whole[i], data[key][0]) and torch.equal(labels[i], data[key][1]) for i, key in enumerate(keys))


def test_a_subset_keeps_the_epoch_in_whole_batches(folders):
    data = train_loader(folders, augment="medium").dataset
    feed = Feed(make_loader(Subset(data, [5, 3, 8]), 2, False), 0)
    epochs = [[images for images, _ in feed.batches(epoch)] for epoch in (0, 1)]
    feed.close()
    assert torch.equal(epochs[1][0][1], data[SampleKey(3, 1)][0]) and not torch.equal(epochs[0][0], epochs[1][0])


def test_a_subclass_is_asked_sample_by_sample(folders):
    class Darker(SegmentationDataset):
        def __getitem__(self, index):
            image, mask = super().__getitem__(index)
            return image / 2, mask

    plain = train_loader(folders).dataset
    darker = Darker(plain.images, plain.masks)
    assert torch.equal(next(iter(make_loader(darker, 4, False)))[0], next(iter(make_loader(plain, 4, False)))[0] / 2)
    assert next(iter(DataLoader(darker, batch_size=4)))[0].max() <= 0.5


def test_a_broken_file_leaves_the_rest_of_its_batch(folders, tmp_path):
    images, masks = ([tmp_path / kind / f"{i}.png" for i in range(4)] for kind in ("images", "masks"))
    for source, files in zip(folders, (images, masks)):
        for i, file in enumerate(files):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes((source / f"{i}.png").read_bytes())
    data = SegmentationDataset(images, masks, cache=tmp_path / "cache")
    images[2].write_bytes(images[2].read_bytes()[:-40])
    told, feed = [], Feed(make_loader(data, 4, False), 0, tell=lambda text, about_data: told.append(text))
    assert [len(batch[0]) for batch in feed.batches(0)] == [3] and feed.bad_samples == 1 and "2.png" in told[0]
    feed.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "Folders of 65 images of 256 x 256 with masks, quick to write"
    folder = tmp_path_factory.mktemp("large")
    pixels = np.random.default_rng(0).integers(0, 256, (65, 256, 256, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        save(folder / "images" / f"{i}.npy", image)
        save(folder / "masks" / f"{i}.npy", image[..., 0] // 128)
    return folder / "images", folder / "masks"


@pytest.mark.parametrize("fed", [False, True], ids=["loader", "feed"])
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_cached_image_is_written_once_into_its_place_in_the_batch(large, tmp_path, fed, kind):
    """As cheap as ready tensors, which `benchmarks.data` measures: for each image and mask one copy, for each image one division, for each batch two new tensors."""
    loader = train_loader(large, batch_size=8, cache=True if kind == "memory" else tmp_path / "cache")
    feed = Feed(loader, 0)
    for epoch in range(2):
        with Operations() as done:
            for batch in feed.batches(epoch) if fed else loader:
                assert batch[0].shape == (8, 3, 256, 256) and batch[0].dtype == torch.float32 and batch[1].shape == (8, 1, 256, 256)
    feed.close()
    free = {"detach", "unbind", "lift_fresh", "randperm", "random_", "_local_scalar_dense", "_record_function_enter_new", "_record_function_exit"}
    work = {name: n for name, n in done.counts.items() if name not in free}
    seed = 0 if fed else 1  # PyTorch's loader draws one for its workers
    assert work == {"copy_": 128, "div_": 64, "empty": 16 + seed}


# Augmentation on the device


def test_the_device_augments_as_often_and_as_much_as_the_loader():
    "The shares of what is done, over 600 images: a column of light shows where it went, and how bright it is"
    image, mask = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    image[0, 1, 2], mask[0, 1, 2] = 0.5, 1
    pipeline = get_augmentation_pipeline(strength="light")
    single = [pipeline(image, mask, seed) for seed in range(600)]
    whole = BatchAugmentation(pipeline)
    many = [whole(image.expand(60, -1, -1, -1), mask.expand(60, -1, -1, -1), 0, batch) for batch in range(10)]
    together = [pair for images, masks in many for pair in zip(images, masks)]
    for places in ([int(m.argmax()) for _, m in o] for o in (single, together)):
        counts = np.bincount(places, minlength=256)
        assert (counts > 0).sum() == 8 and counts[counts > 0].min() > 40 and counts.max() < 115
    levels = [torch.tensor([float(i.max()) for i, _ in o]) for o in (single, together)]
    assert abs(levels[0].mean() - levels[1].mean()) < 0.01 and abs(levels[0].std() - levels[1].std()) < 0.01


def test_labels_are_exact_and_the_margin_is_marked():
    labels = torch.randint(0, 5, (6, 40, 48)) * 1000
    augment = BatchAugmentation(get_augmentation_pipeline(strength="heavy", ignore_index=-7))
    found = {int(v) for batch in range(4) for v in augment(torch.rand(6, 2, 40, 48), labels, 0, batch)[1].unique()}
    assert found == {-7, 0, 1000, 2000, 3000, 4000}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_classes = 1
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(4, 1, 1))

    def forward(self, images):
        return self.layers(images)


class StopAt:
    def __init__(self, step):
        self.step = step

    def on_batch_end(self, trainer, loss):
        if trainer.phase == "train" and trainer.global_step >= self.step and not trainer.run.pending:
            trainer.run.stop()


def trained(folder, loaders, stop=None, resume=None):
    "The weights and the history after three epochs, or after a stop"
    torch.manual_seed(1)
    model = Net()
    trainer = UNetTrainer(
        model, *loaders, optimizer=create_optimizer(model, "adamw", lr=1e-2), device="cpu", run_dir=folder, observers=[StopAt(stop)] if stop else [],
    )  # fmt: skip
    trainer.train(3, resume=resume)
    times = {"seconds", "images_per_second", "data_wait"}
    return [o.numpy().tobytes() for o in model.state_dict().values()], repr([{k: v for k, v in row.items() if k not in times} for row in trainer.history.rows])


@pytest.mark.parametrize("where", ["loader", "device"])
@pytest.mark.parametrize("kind", ["memory", "disk", "none"])
def test_a_run_resumes_exactly_with_every_cache(folders, tmp_path, one_thread, kind, where):
    cache = {"memory": True, "disk": tmp_path / "cache", "none": False}[kind]

    def loaders():
        return create_dataloaders(*folders, batch_size=4, val=[0], augment="medium", normalize="dataset", num_workers=0, cache=cache, augment_on=where)

    whole = trained(tmp_path / "whole", loaders())
    trained(tmp_path / "parts", loaders(), stop=2)
    trained(tmp_path / "parts", loaders(), stop=7, resume="last")
    assert trained(tmp_path / "parts", loaders(), resume="last") == whole


def test_the_trainer_augments_training_batches_only(folders, tmp_path, one_thread):
    loaders = create_dataloaders(*folders, batch_size=4, val=[0], augment="medium", num_workers=0, augment_on="device")
    seen, transform = [], loaders[0].dataset.batch_transform
    assert loaders[0].dataset.augment is None and loaders[1].dataset.batch_transform is None
    loaders[0].dataset.batch_transform = lambda *batch: (seen.append(batch[2:]), transform(*batch))[1]
    trained(tmp_path, loaders)
    assert seen == [(epoch, batch) for epoch in range(3) for batch in range(3)]


def test_a_foreign_augmentation_stays_in_the_loader(folders):
    with pytest.raises(ValueError, match="augment_on='loader'"):
        create_dataloaders(*folders, augment=lambda image, mask, seed: (image, mask), augment_on="device")
    with pytest.raises(ValueError, match="augment_on='gpu'"):
        create_dataloaders(*folders, augment_on="gpu")


# The waiting that the panel shows


class Slow(torch.utils.data.Dataset):
    "Twelve images that take their time to be read; and how long that really was"

    def __init__(self, seconds):
        self.seconds, self.taken = seconds, []

    def __len__(self):
        return 12

    def __getitem__(self, index):
        began = time.perf_counter()
        time.sleep(self.seconds)
        self.taken.append(time.perf_counter() - began)
        return torch.full((3, 8, 8), index / 12), torch.ones(1, 8, 8)


class Busy(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.n_classes, self.layer = seconds, 1, nn.Conv2d(3, 1, 1)

    def forward(self, images):
        time.sleep(self.seconds if self.training else 0)
        return self.layer(images)


@pytest.mark.parametrize("reading, training", [(0.05, 0.0), (0.0, 0.05)], ids=["the loader is slow", "the model is slow"])
def test_the_share_of_waiting_for_data_is_true(tmp_path, one_thread, reading, training):
    model, data = Busy(training), Slow(reading)
    loader = DataLoader(data, batch_size=1)
    one = [next(iter(loader))]
    trainer = UNetTrainer(model, loader, one, optimizer=create_optimizer(model, "sgd", lr=1e-3), device="cpu", run_dir=tmp_path, observers=[])
    trainer.train(1)
    data.taken.clear()
    trainer.train(1)
    row = trainer.history.rows[-1]
    assert len(data.taken) == 12
    if reading:
        assert 0.99 * sum(data.taken) <= row["data_wait"] * row["seconds"] <= row["seconds"] and row["data_wait"] > 0.5
    else:
        assert row["data_wait"] * row["seconds"] <= row["seconds"] - 12 * training + 0.01
