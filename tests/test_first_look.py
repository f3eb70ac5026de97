"""What a training says at its beginning about data that it could only stumble over later."""

import pytest
import torch
from heard import Heard

from unet_nbtrain import UNet, UNetTrainer


def batches(scale=1.0, shape=(2, 3, 16, 16)):
    torch.manual_seed(0)
    return [(scale * torch.rand(shape), torch.ones(2, 1, 16, 16)) for _ in range(2)]


class Stream(list):
    "A class that nobody knows is read by replay, from front to end"


def trainer_of(tmp_path, train, val):
    torch.manual_seed(0)
    return UNetTrainer(UNet(3, 1, width=4, depth=1), train, val, run_dir=tmp_path / "run", device="cpu", observers=[Heard()])


def told(trainer):
    return [text for heard in trainer.observers for text in getattr(heard, "problems", ()) if "divide" in text]


@pytest.mark.parametrize("scales", [(255, 1), (1, 255), (255, 255), (1, 1)])
def test_images_of_another_scale_are_told_once_for_each_kind_of_data(tmp_path, scales):
    """Floats in 0 … 255 were trained on in silence; a file that is predicted later is read as [0, 1]"""
    trainer = trainer_of(tmp_path, *map(batches, scales))
    trainer.train(2)
    names = [name for name, scale in zip(("training", "validation"), scales) if scale > 1]
    assert sorted(text.split("first ")[1].split()[0] for text in told(trainer)) == names


def test_whole_numbers_are_told_and_bytes_are_not(tmp_path):
    x, y = batches(255)[0]
    trainer = trainer_of(tmp_path, [(x.byte(), y)], [(x.int(), y)])
    trainer.train(1)
    assert len(told(trainer)) == 1 and "torch.int32" in told(trainer)[0]


@pytest.mark.parametrize("wrong", ["channels last", "values"])
def test_wrong_validation_data_is_found_before_the_first_epoch(tmp_path, wrong):
    """It came to light after the first epoch, perhaps a night, and without a word about which data it was"""
    bad = batches(shape=(2, 16, 16, 3)) if wrong == "channels last" else [(x, 255 * y) for x, y in batches()]
    trainer = trainer_of(tmp_path, batches(), bad)
    with pytest.raises(ValueError, match="first validation batch"):
        trainer.train(1)
    assert trainer.global_step == 0


def test_a_stream_is_looked_at_when_its_turn_has_come(tmp_path):
    val = Stream((x, 255 * y) for x, y in batches())
    trainer = trainer_of(tmp_path, batches(), val)
    with pytest.raises(ValueError, match="first validation batch"):
        trainer.train(1)
    assert trainer.global_step == 2
