"""A checkpoint and an image, as people have them: formats, sizes, wrappers, old files; and the numbers of the trainer again."""

import copy
import errno
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unet_nbtrain import UNet, UNetTrainer, create_loss_function, demo_dataloaders
from unet_nbtrain.checkpoint import CheckpointError, save_file
from unet_nbtrain.dataset import create_dataloaders
from unet_nbtrain.demo_data import draw_cells
from unet_nbtrain.evaluation import evaluate, folder_loader
from unet_nbtrain.image_files import read_mask
from unet_nbtrain.inference import UNetPredictor, find_checkpoint
from unet_nbtrain.predict_folder import find_images, name_outputs, predict_folder
from unet_nbtrain.predictions import SampleKeeper
from unet_nbtrain.restore import best_model
from unet_nbtrain.thumbnails import WorstSample

SIZES = [(40, 40), (33, 57), (64, 31), (1, 1), (7, 120)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_folder(folder, n_classes=1, count=6, size=40):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        image, mask = draw_cells(index, size=size, n_classes=n_classes)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask * np.uint8(255 if n_classes == 1 else 1)).save(folder / "masks" / f"{index}.png")
    return folder / "images", folder / "masks"


def trained(folder, loaders, n_classes=1, **options):
    """A short run; the trainer, with its best weights"""
    torch.manual_seed(0)
    model = UNet(loaders[0].dataset.n_channels, n_classes, width=4, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    trainer = UNetTrainer(model, *loaders, optimizer=optimizer, device="cpu", run_dir=folder, observers=[], **options)
    trainer.train(12)
    return trainer


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    home = tmp_path_factory.mktemp("binary")
    loaders = create_dataloaders(*write_folder(home), batch_size=2, val=[4, 5], augment=None, num_workers=0)
    return trained(home / "run", loaders), home


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    home = tmp_path_factory.mktemp("classes")
    names = ["background", "round", "long"]
    loaders = create_dataloaders(
        *write_folder(home, 3), batch_size=2, val=[4, 5], n_classes=3, augment=None, num_workers=0, image_size=(32, 24),
        normalize="dataset", class_names=names,
    )  # fmt: skip
    return trained(home / "run", loaders, 3), home


def by_hand(model, sample):
    """Probabilities (C, H, W) of the model itself"""
    with torch.no_grad():
        logits = model.eval()(sample[None])[0]
    return (logits.sigmoid() if len(logits) == 1 else logits.softmax(0)).numpy()


# The same as in training


def test_a_validation_image_gives_what_the_model_gives_for_the_sample_of_the_loader(binary):
    trainer, home = binary
    predictor = UNetPredictor(home / "run" / "checkpoints" / "best_model.pth", device="cpu")
    for index in range(2):
        direct = by_hand(trainer.model, trainer.val_loader.dataset[index][0])
        found = predictor.predict_single(home / "images" / f"{4 + index}.png")
        assert np.array_equal(found.probabilities, direct)
        assert found.mask.dtype == np.uint8 and np.array_equal(found.mask, direct[0] > 0.5)


def test_several_classes_resized_and_normalised(classes):
    trainer, home = classes
    predictor = UNetPredictor(home / "run", device="cpu")
    assert predictor.preprocessing["image_size"] == [32, 24] and len(predictor.preprocessing["mean"]) == 3
    assert predictor.preprocessing["class_names"] == ["background", "round", "long"]
    direct = torch.from_numpy(by_hand(trainer.model, trainer.val_loader.dataset[0][0]))
    back = nn.functional.interpolate(direct[None], (40, 40), mode="bilinear", antialias=True)[0].numpy()
    found = predictor.predict_single(home / "images" / "4.png")
    assert np.array_equal(found.probabilities, back) and np.array_equal(found.mask, back.argmax(0))
    assert found.probabilities.shape == (3, 40, 40) and np.allclose(found.probabilities.sum(0), 1, atol=1e-5)
    assert "round" in repr(found) or "background" in repr(found)


@pytest.mark.parametrize("kind", ["binary", "classes"])
def test_evaluate_equals_the_validation_of_the_trainer(request, kind):
    trainer, home = request.getfixturevalue(kind)
    best = trainer.history.best["val"]
    for model in (home / "run", trainer.model, UNetPredictor(home / "run", device="cpu")):
        found = evaluate(model, trainer.val_loader, device="cpu", criterion=trainer.criterion)
        np.testing.assert_equal(found, best)
    assert best["dice"] > 0.3


@pytest.mark.parametrize("kind", ["binary", "classes"])
def test_folders_are_read_as_in_training(request, kind):
    trainer, home = request.getfixturevalue(kind)
    predictor = UNetPredictor(home / "run", device="cpu")
    loader = folder_loader(predictor, home / "images", home / "masks", only=[4, 5], batch_size=2)
    for ours, theirs in zip(loader, trainer.val_loader, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and ours[1].dtype == theirs[1].dtype
    assert evaluate(predictor, loader)["dice"] == pytest.approx(trainer.history.best["val"]["dice"], nan_ok=True, abs=0)


# Formats and sizes


@pytest.mark.parametrize("size", SIZES)
def test_any_size_comes_back(binary, classes, size, tmp_path):
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / "black.png")
    for trainer, home in (binary, classes):
        found = UNetPredictor(home / "run", device="cpu").predict_single(tmp_path / "black.png")
        assert found.mask.shape == size and found.probabilities.shape == (trainer.n_classes, *size)
        assert found.overlay().size == size[::-1]


def test_formats(binary, tmp_path):
    """What every format keeps of one grey picture gives one and the same mask"""
    _, home = binary
    grey = np.random.default_rng(0).integers(0, 256, (30, 44), dtype=np.uint8)
    picture = Image.fromarray(grey)
    picture.save(tmp_path / "grey.png")
    picture.save(tmp_path / "grey.bmp")
    picture.save(tmp_path / "grey.gif")
    picture.convert("RGB").save(tmp_path / "rgb.tif")
    rgba = np.dstack([grey] * 3 + [np.full_like(grey, 77)])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    np.save(tmp_path / "float.npy", grey.astype(np.float32) / 255)
    predictor = UNetPredictor(home / "run", device="cpu")
    wanted = predictor.predict_single(grey).probabilities
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    for file in files:
        assert np.allclose(predictor.predict_single(file).probabilities, wanted, atol=1e-6), file.name


def test_forms_of_an_array(binary):
    _, home = binary
    predictor = UNetPredictor(home / "run", device="cpu")
    rgb = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    first = np.moveaxis(rgb, 2, 0)
    wanted = predictor.predict_single(rgb).probabilities
    forms = [first, rgb.astype(np.uint16) * 257, rgb / np.float32(255), rgb / np.float64(255), torch.from_numpy(first / np.float32(255))]
    forms += [torch.from_numpy(rgb.copy()), torch.from_numpy(first / np.float32(255)).requires_grad_()]
    for form in forms:
        assert np.allclose(predictor.predict_single(form).probabilities, wanted, atol=1e-6)
    half = predictor.predict_single(torch.from_numpy(first / np.float32(255)).bfloat16())
    assert np.allclose(half.probabilities, wanted, atol=0.05)


def test_what_cannot_be_read_is_named(binary, tmp_path):
    _, home = binary
    predictor = UNetPredictor(home / "run", device="cpu")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:50])
    for name in ("broken.png", "torn.png", "lost.png"):
        with pytest.raises(ValueError, match=name):
            predictor.predict_single(tmp_path / name)
    np.save(tmp_path / "four.npy", np.zeros((4, 5, 5), np.uint8))
    with pytest.raises(ValueError, match=r"four\.npy.*4 channels.*3"):
        predictor.predict_single(tmp_path / "four.npy")
    with pytest.raises(ValueError, match=r"255.*\[0, 1\]"):
        predictor.predict_single(np.full((5, 5), 255.0))


# Saved masks


def test_a_saved_mask_is_read_again(binary, classes, tmp_path):
    for trainer, home in (binary, classes):
        found = UNetPredictor(home / "run", device="cpu").predict_single(home / "images" / "0.png")
        path = found.save(tmp_path / "deep" / f"{trainer.n_classes}.png")
        assert np.array_equal(read_mask(path, trainer.n_classes), found.mask)


def test_colours_of_the_training_masks_are_those_of_the_saved_ones(tmp_path):
    model = UNet(1, 3, width=4, depth=1)
    image = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    for colors in (["#000000", "#ff0000", "#00ff00"], {"#000000": 0, "#ff0000": 1, "#00ff00": 2}, [[0, 0, 0], [255, 0, 0], [0, 255, 0]]):
        found = UNetPredictor(model=model, preprocessing={"colors": colors}).predict_single(image)
        picture = np.asarray(Image.open(found.save(tmp_path / "mask.png")).convert("RGB"))
        assert np.array_equal(picture, np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]])[found.mask])


# The model


def test_a_wrapped_model_is_the_model(binary):
    trainer, home = binary
    image = np.random.default_rng(2).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    plain = UNetPredictor(model=trainer.model).predict_single(image).probabilities
    compiled = torch.compile(copy.deepcopy(trainer.model), backend="eager")
    for wrapped in (nn.DataParallel(copy.deepcopy(trainer.model)), compiled):
        assert np.array_equal(UNetPredictor(model=wrapped, device="cpu").predict_single(image).probabilities, plain)
        state = {"model_state_dict": wrapped.state_dict(), "model": "UNet", "model_config": trainer.model.config}
        file = save_file(state, home / "wrapped.pth")
        assert np.array_equal(UNetPredictor(file, device="cpu").predict_single(image).probabilities, plain)


def test_an_old_checkpoint_without_data_and_threshold(binary):
    trainer, home = binary
    state = torch.load(home / "run" / "checkpoints" / "best_model.pth", weights_only=True)
    old = save_file({name: state[name] for name in ("model_state_dict", "model", "model_config")}, home / "old.pth")
    predictor = UNetPredictor(old, device="cpu")
    assert predictor.threshold == 0.5 and predictor.preprocessing["class_names"] is None and predictor.preprocessing["n_channels"] == 3
    new = UNetPredictor(home / "run", device="cpu").predict_single(home / "images" / "4.png")
    assert np.array_equal(predictor.predict_single(home / "images" / "4.png").mask, new.mask)


def test_the_document_alone(binary):
    """Bare weights under the document's key, as its own snippet writes them, need the model"""
    trainer, home = binary
    torch.save({"model_state_dict": trainer.model.state_dict()}, home / "bare.pth")
    with pytest.raises(CheckpointError, match=r"bare\.pth.*model=my_model"):
        UNetPredictor(home / "bare.pth")
    given = UNet(3, 1, width=4, depth=2)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    predictor = UNetPredictor(home / "bare.pth", model=given, device="cpu")
    image = home / "images" / "5.png"
    assert np.array_equal(predictor.predict_single(image).probabilities, UNetPredictor(model=trainer.model).predict_single(image).probabilities)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())


def test_the_model_of_the_caller_stays_as_it_was(binary):
    trainer, _ = binary
    model = copy.deepcopy(trainer.model).train()
    model.downs[0].eval()
    modes, weights = [o.training for o in model.modules()], copy.deepcopy(model.state_dict())
    UNetPredictor(model=model).predict_single(np.zeros((16, 16, 3), np.uint8))
    evaluate(model, trainer.val_loader, criterion=nn.BCEWithLogitsLoss())
    with pytest.raises(ValueError, match="channels"):
        UNetPredictor(model=model).predict_single(np.zeros((2, 16, 16), np.uint8))
    assert [o.training for o in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_foreign_model_without_attributes():
    model = nn.Conv2d(3, 2, 1)
    found = UNetPredictor(model=model, class_names=["a", "b"]).predict_single(np.zeros((5, 6, 3), np.uint8))
    assert found.probabilities.shape == (2, 5, 6) and ("a " in repr(found) or "b " in repr(found))
    with pytest.raises(TypeError, match=r"logits of shape"):
        UNetPredictor(model=nn.Flatten()).predict_single(np.zeros((5, 6, 3), np.uint8))


def test_predictions_follow_a_model_that_is_trained_on():
    model = UNet(1, 1, width=4, depth=1)
    predictor, image = UNetPredictor(model=model), np.full((8, 8), 99, np.uint8)
    before = predictor.predict_single(image).probabilities
    with torch.no_grad():
        model.head.bias += 1
    assert (predictor.predict_single(image).probabilities > before).all()


def test_find_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pth").touch()
    with pytest.raises(CheckpointError, match=r"checkpoints/last\.pth"):
        UNetPredictor(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        UNetPredictor(tmp_path / "none.pth")


# Evaluation


def test_ignored_pixels_do_not_count(classes):
    trainer, home = classes
    images, masks = next(iter(trainer.val_loader))
    unknown = masks.clone()
    unknown[:, :, :12] = 255
    loss = create_loss_function(3, ignore_index=255)
    found = evaluate(home / "run", [(images, unknown)], device="cpu", criterion=loss)
    flipped = unknown.clone()
    with torch.no_grad():
        logits = trainer.model.eval()(images)
    seen = (unknown != 255).numpy()
    assert found["accuracy"] == pytest.approx((logits.argmax(1).numpy() == masks.numpy())[seen].mean(), abs=1e-12)
    assert found["loss"] == pytest.approx(loss(logits, flipped).item(), abs=1e-6)


def test_an_uneven_last_batch_counts_by_its_size(binary):
    trainer, home = binary
    loader = demo_dataloaders(n_train=2, n_val=5, size=32, batch_size=2)[1]
    whole = demo_dataloaders(n_train=2, n_val=5, size=32, batch_size=5)[1]
    criterion = create_loss_function(1)
    small, large = (evaluate(trainer.model, o, criterion=criterion) for o in (loader, whole))
    assert small["dice"] == large["dice"] and small["loss"] == pytest.approx(large["loss"], abs=1e-6)


def test_evaluate_takes_no_gradients_and_dicts(binary):
    trainer, _ = binary
    images, masks = next(iter(trainer.val_loader))
    found = evaluate(trainer.model, [{"image": images, "mask": masks}], criterion=lambda logits, masks: (logits * 0).sum())
    assert found["loss"] == 0 and torch.is_grad_enabled()
    assert found["dice"] == pytest.approx(evaluate(trainer.model, [(images, masks)])["dice"], nan_ok=True)


# Folders


def test_nothing_is_overwritten(binary, tmp_path):
    _, home = binary
    rng = np.random.default_rng(3)
    for folder, names in (("a", ("1.png", "1.bmp", "2.png", "1_mask.png")), ("b", ("1.png", "1_2.png"))):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / folder / name)
    sources = [tmp_path / "a", tmp_path / "a" / "1_mask.png", tmp_path / "b"]
    images = find_images(sources)
    before = {image: image.read_bytes() for image in images}
    assert len(images) == 6
    for out in (tmp_path / "out", tmp_path / "a"):
        assert len({str(path).casefold() for path in name_outputs(images, out)}) == 6
        result = predict_folder(UNetPredictor(home / "run", device="cpu"), sources, out, overlay=True)
        assert len(set(result.masks.values())) == 6 and not result.failed
        assert {image: image.read_bytes() for image in images} == before


def test_what_concerns_one_image_alone_does_not_end_the_others(tmp_path, monkeypatch):
    """A name that is too long with what is put behind it, and an image for which the memory is too small; a full disk ends the work"""
    (tmp_path / "in").mkdir()
    for name, size in (("a", 8), ("b" * 245, 8), ("c", 99), ("d", 8)):
        Image.fromarray(np.zeros((size, size), np.uint8)).save(tmp_path / "in" / f"{name}.png")

    class Small(nn.Conv2d):
        def forward(self, x):
            if x.shape[-1] > 50:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    predictor = UNetPredictor(model=Small(1, 1, 1), preprocessing={"n_channels": 1})
    result = predict_folder(predictor, tmp_path / "in", tmp_path / "out", overlay=True, probabilities=True)
    assert [image.stem for image in result.masks] == ["a", "d"] and len(result.failed) == 2
    long, large = result.failed.values()
    assert "name too long" in long.lower() and "c.png: the memory is too small" in large

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("unet_nbtrain.inference.atomic_write", full)
    with pytest.raises(OSError, match="No space"):
        predict_folder(predictor, tmp_path / "in", tmp_path / "more")


def test_folders_are_checked_as_in_training(binary, tmp_path):
    _, home = binary
    predictor, exif = UNetPredictor(home / "run", device="cpu"), Image.Exif()
    exif[0x112] = 3
    for patient in ("p1", "p2"):
        for kind, options in (("images", {"exif": exif} if patient == "p2" else {}), ("masks", {})):
            (tmp_path / kind / patient).mkdir(parents=True)
            Image.fromarray(np.eye(32, dtype=np.uint8)).save(tmp_path / kind / patient / "1.png", **options)
    folders = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(ValueError, match="orientation tags"):
        folder_loader(predictor, *folders)
    with pytest.raises(ValueError, match=r"only names '1', which 2 images are called: p1/1\.png, p2/1\.png"):
        folder_loader(predictor, *folders, only=["1"])
    for only in (["p1/1.png"], [0, 0, "p1/1"], [True, False]):
        assert len(folder_loader(predictor, *folders, only=only).dataset) == 1


def test_labels_and_ignored_values_are_kept_as_they_are():
    """Above 256 classes, and above 32767 for pixels that count nowhere"""
    logits, masks = torch.zeros(1, 300, 4, 4), torch.full((1, 4, 4), 65535)
    logits[:, 299] = 1
    masks[:, 0] = 299
    images, worst, keeper = torch.zeros(1, 1, 4, 4), WorstSample(), SampleKeeper()
    worst.begin()
    worst.look(images, masks, logits, ignore_index=65535)
    worst.end()
    keeper._keep(SimpleNamespace(val_batch=(images, masks, logits), threshold=0.5, ignore_index=65535, worst=worst), 1)
    for mask, labels in ((worst.found.mask, worst.found.labels), (keeper.masks[0], keeper.frames[0].labels[0])):
        assert np.array_equal(mask, masks[0].numpy()) and (labels == 299).all()


def test_a_model_from_memory_knows_how_its_images_were_prepared(classes, caplog):
    trainer, home = classes
    image, wanted = home / "images" / "4.png", UNetPredictor(home / "run", device="cpu")
    for model in (trainer.model, best_model(trainer), nn.DataParallel(copy.deepcopy(trainer.model)), pickle.loads(pickle.dumps(trainer.model))):
        found = UNetPredictor(model=model, device="cpu")
        assert found.preprocessing == wanted.preprocessing
        assert np.array_equal(found.predict_single(image).probabilities, wanted.predict_single(image).probabilities)
    assert not caplog.records and "trained_with" not in trainer.model.state_dict()
    UNetPredictor(model=nn.Conv2d(1, 1, 1))
    assert "neither normalised nor resized" in caplog.text and len(caplog.records) == 1
    UNetPredictor(model=nn.Conv2d(1, 1, 1), preprocessing={"mean": [0.5], "std": [0.1]})
    assert len(caplog.records) == 1


def test_a_loader_that_prepares_otherwise_is_told(classes, binary, caplog):
    trainer, home = classes
    options = dict(batch_size=2, val=[4, 5], augment=None, num_workers=0)
    folders = home / "images", home / "masks"
    evaluate(home / "run", trainer.val_loader, device="cpu")
    assert not caplog.records
    evaluate(home / "run", create_dataloaders(*folders, n_classes=3, image_size=(32, 24), **options)[1], device="cpu")
    assert len(caplog.records) == 1 and "mean is [" in caplog.text and "and None for the loader" in caplog.text and "image_size" not in caplog.text
    home = binary[1]
    inverted = create_dataloaders(home / "images", home / "masks", foreground=0, **options)[1]
    with pytest.raises(ValueError, match=r"foreground is None for the model and 0 for the loader.*background for the other"):
        evaluate(home / "run", inverted, device="cpu")


def test_an_old_file_that_is_taken_before_that_of_the_newest_run_is_told(tmp_path, monkeypatch, caplog):
    """`checkpoints/best_model.pth` is there from another day, and the training of today made a folder of its own in runs/"""
    monkeypatch.chdir(tmp_path)
    asked = Path("checkpoints/best_model.pth")
    for path, day in ((asked, 1.6e9), (Path("runs/today/checkpoints/best_model.pth"), 1.7e9)):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (day, day))
    assert find_checkpoint(asked) == asked
    assert f"Taken is {asked}, as it was asked for. A newer one is {path}." in caplog.text
    caplog.clear()
    os.utime(asked, (1.8e9, 1.8e9))
    assert find_checkpoint(asked) == asked and not caplog.records
