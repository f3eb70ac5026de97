"""Feeds: what a loader's owner set stays as it is, and what is random is a function of the place in the run."""

import random
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, get_worker_info

from unet_nbtrain.feeding import Feed
from unet_nbtrain.sampling import make_loader


class Numbers(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item(), getattr(index, "epoch", -1)], dtype=torch.float64)


class OwnGenerator(Numbers):
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __getitem__(self, index):
        return torch.tensor([index, self.rng.random()], dtype=torch.float64)


class Keyed(Numbers):
    seeds_itself = True


class Stream(IterableDataset):
    def __iter__(self):
        return (torch.rand(2) for _ in range(7))


def mixing(samples):
    return torch.stack(samples) * random.random()


def remember(worker_id):
    get_worker_info().dataset.seen = type(get_worker_info().dataset).__name__


def taken(loader, epoch=0, start=0):
    feed, found = Feed(loader, 5), []
    try:
        for batch in feed.batches(epoch, start):
            found.append(batch.numpy().tobytes())
            torch.rand(2), random.random(), np.random.rand()
    finally:
        feed.close()
    return found


def states():
    "Of the three global generators"
    _, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), rest


def sampler_of(n):
    return torch.utils.data.WeightedRandomSampler(torch.ones(n), 2 * n)


LOADERS = {
    "shuffle": lambda w: DataLoader(Numbers(), batch_size=5, shuffle=True, num_workers=w),
    "kept workers": lambda w: DataLoader(Numbers(), batch_size=5, shuffle=True, num_workers=w, persistent_workers=w > 0),
    "ours": lambda w: make_loader(Numbers(), 5, True, 1, w),
    "replacement": lambda w: DataLoader(Numbers(), batch_size=5, sampler=sampler_of(12), num_workers=w),
    "collate": lambda w: DataLoader(Numbers(), batch_size=5, collate_fn=mixing, num_workers=w),
    "no batches": lambda w: DataLoader(Numbers(), batch_size=None, shuffle=True, num_workers=w),
    "subset": lambda w: DataLoader(Subset(Numbers(), [3, 1, 8, 9]), batch_size=3, shuffle=True, num_workers=w),
    "two": lambda w: DataLoader(ConcatDataset([Numbers(), Subset(Numbers(), [4, 2])]), batch_size=5, shuffle=True, num_workers=w),
    "own generator": lambda w: DataLoader(OwnGenerator(), batch_size=5, shuffle=True, num_workers=w),
}


@pytest.mark.parametrize("name", LOADERS)
def test_any_batch_of_any_epoch_with_any_number_of_workers(name):
    whole = taken(LOADERS[name](0), 2)
    assert taken(LOADERS[name](0), 2, 1) == whole[1:] and taken(LOADERS[name](2), 2, 1) == whole[1:]
    assert taken(LOADERS[name](0), 3) != whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_replayed(workers):
    loader = DataLoader(Stream(), batch_size=2, num_workers=workers)
    whole = taken(loader, 1)
    assert taken(loader, 1, 2) == whole[2:] and taken(loader, 2) != whole


@pytest.mark.parametrize("name", LOADERS)
def test_loader_and_random_numbers_of_the_user_stay_as_they_are(name):
    loader = LOADERS[name](0)
    before, expected = str(vars(loader)), states()
    feed = Feed(loader, 5)
    assert list(feed.batches(1))
    feed.close()
    assert str(vars(loader)) == before and states() == expected


def test_a_subset_does_not_lose_the_epoch():
    feed = Feed(make_loader(Subset(Keyed(), [5, 3]), 2, False), 0)
    assert next(feed.batches(7))[:, [0, 4]].tolist() == [[5, 7], [3, 7]]
    feed.close()
    feed = Feed(DataLoader(Keyed(), batch_size=2), 0)
    assert next(feed.batches(7))[:, [0, 4]].tolist() == [[0, 7], [1, 7]]
    feed.close()


class Asks(Numbers):
    seen = ""

    def __getitem__(self, index):
        return torch.tensor([self.seen == "Asks", type(get_worker_info().dataset) is Asks])


def test_a_worker_finds_its_own_data_set():
    feed = Feed(DataLoader(Asks(), batch_size=12, num_workers=1, worker_init_fn=remember), 0)
    assert next(iter(feed.batches(0))).all()
    feed.close()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_workers(method):
    loader = DataLoader(TensorDataset(torch.arange(6)), batch_size=2, num_workers=1, multiprocessing_context=method)
    feed = Feed(loader, 0)
    assert [batch[0].tolist() for batch in feed.batches(0, 1)] == [[2, 3], [4, 5]]
    feed.close()


def test_kept_workers_are_the_same_in_the_next_epoch():
    feed = Feed(LOADERS["kept workers"](1), 0)
    pids = []
    for epoch in range(2):
        for _ in feed.batches(epoch):
            pids.append(feed._source._iterator._workers[0].pid)
    feed.close()
    assert len(set(pids)) == 1 and feed._source._iterator is None
    assert not [thread for thread in threading.enumerate() if thread.name == "unet-watchdog"]


def test_names_of_the_samples_of_a_batch():
    feed = Feed(DataLoader(Numbers(), batch_size=5, shuffle=True), 0)
    given = [batch[:, 0].int().tolist() for batch in feed.batches(1)]
    assert [feed.samples(1, i) for i in range(3)] == [[f"sample {i}" for i in batch] for batch in given]
    fresh = Feed(DataLoader(Numbers(), batch_size=5, shuffle=True), 0)
    assert fresh.samples(1, 2) == feed.samples(1, 2) and fresh.samples(1, 9) == []
    feed.close()


class Rare(Numbers):
    "Draws now and then, in one way"

    def __init__(self, draw):
        self.draw = draw

    def __getitem__(self, index):
        return torch.tensor([index, self.draw() if index in (5, 9) else 0.5], dtype=torch.float64)


DRAWS = {"python": random.random, "gauss": lambda: random.gauss(0, 1), "numpy": np.random.rand, "randn": np.random.randn, "torch": lambda: torch.rand(()).item()}


@pytest.mark.parametrize("outside", [lambda: None, np.random.randn, lambda: np.random.randn(2), lambda: random.gauss(0, 1)])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_data_set_that_draws_now_and_then_is_found_out(draw, outside):
    "Whatever was drawn outside before, also where the second number of a pair waits there"

    def made():
        return DataLoader(Rare(DRAWS[draw]), batch_size=2)

    whole = taken(made())
    outside()
    expected = states()
    feed = Feed(made(), 5)
    found = [batch.numpy().tobytes() for batch in feed.batches(0)]
    feed.close()
    now = states()
    assert found == whole and all(taken(made(), 0, start) == whole[start:] for start in range(6))
    assert now == expected
