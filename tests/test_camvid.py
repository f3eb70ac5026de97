"""Real street scenes with eleven classes, from a notebook's point of view: weights, names, ignored pixels."""

import pytest
import torch
from nbtools import ROOT

from unet_nbtrain import SegmentationMetrics, UNet, UNetTrainer, create_dataloaders, create_loss_function, describe_masks

CAMVID = ROOT.parent / "shared" / "data" / "camvid"
NAMES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
IGNORED = 11

pytestmark = [
    pytest.mark.skipif(not CAMVID.is_dir(), reason=f"the street scenes are not in {CAMVID}"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def loaders():
    options = dict(n_classes=11, ignore_index=IGNORED, val=range(40, 52), class_names=NAMES, image_size=(90, 120), batch_size=8)
    return create_dataloaders(CAMVID / "images", CAMVID / "masks", augment="light", num_workers=0, **options)


def test_report_knows_the_classes(loaders):
    report = describe_masks(loaders[0])
    assert report["pairs"] == 40 and "sky" in str(report)
    weights = report.class_weights()
    assert weights.shape == (11,) and weights.dtype == torch.float32 and bool((weights > 0).all())
    shares = [report["classes"][k] for k in range(11)]
    rare, common = (f(range(11), key=shares.__getitem__) for f in (min, max))
    assert weights[rare] == weights.max() and weights[common] == weights.min()


def test_trains_with_class_weights_and_prints_the_names(loaders, tmp_path):
    torch.manual_seed(0)
    criterion = create_loss_function(11, class_weights=describe_masks(loaders[0]).class_weights(), ignore_index=IGNORED)
    trainer = UNetTrainer(UNet(3, 11, width=8, depth=3), *loaders, criterion=criterion, device="cpu", run_dir=tmp_path, observers=[], lr=3e-3)
    history = trainer.train(3)
    assert history["train_losses"][-1] < history["train_losses"][0]
    table = str(history.class_table()).splitlines()
    assert all(any(line.strip().startswith(name) for line in table) for name in NAMES)
    assert trainer.ignore_index == IGNORED
    assert len(history.best["val"]["per_class"]["dice"]) == 11


@pytest.mark.parametrize("loss", ["ce", "dice", "ce_dice", "focal", "tversky"])
def test_flipping_ignored_pixels_changes_nothing(loaders, loss):
    torch.manual_seed(1)
    images, masks = next(iter(loaders[1]))
    ignored = masks == IGNORED
    assert 0 < ignored.float().mean() < 0.5, "the scenes have unlabelled pixels"
    logits = torch.randn(len(images), 11, *masks.shape[1:])
    flipped = torch.where(ignored[:, None], -100 * logits.roll(1, 1), logits)
    weights = torch.rand(11) + 0.5
    criterion = create_loss_function(11, class_weights=weights, name=loss, ignore_index=IGNORED)
    assert criterion(logits, masks) == criterion(flipped, masks)
    results = []
    for each in (logits, flipped):
        metrics = SegmentationMetrics(11, ignore_index=IGNORED)
        metrics.update(each, masks)
        results.append(metrics.compute())
    assert str(results[0]) == str(results[1])


def test_the_ignored_pixels_of_the_images_matter_to_nobody_but_the_network(loaders, tmp_path):
    """One 1x1 convolution sees each pixel alone: pixels that are ignored leave no trace in its training"""
    losses = []
    for value in (0.0, 1.0):
        data = []
        for loader in loaders:
            images, masks = next(iter(torch.utils.data.DataLoader(loader.dataset, batch_size=4)))
            images = torch.where((masks == IGNORED)[:, None], value, images)
            data.append(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, masks), batch_size=2))
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 11, 1)
        criterion = create_loss_function(11, ignore_index=IGNORED)
        trainer = UNetTrainer(model, *data, criterion=criterion, device="cpu", run_dir=tmp_path / str(value), observers=[], amp=False)
        trainer.train(2)
        losses.append((trainer.history["train_losses"], trainer.history["val_metrics"]))
    assert str(losses[0]) == str(losses[1])
