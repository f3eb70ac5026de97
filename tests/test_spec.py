"""The user's document, docs/training-pipeline.md, as a test: every Python block runs as it stands, and does what it says.

What is replaced, and nothing else: the package name before the modules, `cuda` by `cpu` where there is no card, the number
of epochs, and the two ellipses that stand for arguments.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nbtools import ROOT
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import unet_nbtrain
from unet_nbtrain import UNet, UNetTrainer, create_optimizer, create_scheduler, demo_dataloaders, get_augmentation_pipeline

DOCUMENT = ROOT / "docs" / "training-pipeline.md"
ORIGINAL = ROOT.parent / "shared" / "spec" / "training-pipeline.md"


def blocks():
    """`{heading: code}` of the fenced Python blocks; a heading has one block at most."""
    found, heading = {}, None
    for part in re.finditer(r"^#+ (?P<heading>[^\n]+)$|^```(?P<kind>\w+)\n(?P<code>.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S):
        if part["heading"]:
            heading = part["heading"].strip()
        elif part["kind"] == "python":
            assert heading not in found, f"two blocks under {heading!r}"
            found[heading] = part["code"]
    return found


def runnable(code):
    """The code with the replacements that the head of this file lists."""
    code = re.sub(r"\bfrom (trainer|unet_model|dataset|inference) import", r"from unet_nbtrain.\1 import", code)
    code = re.sub(r"num_epochs=\d+", "num_epochs=2", code)
    code = code.replace("create_dataloaders(...)", "create_dataloaders('images', 'masks')").replace("val_loader, ...)", "val_loader)")
    return code if torch.cuda.is_available() else code.replace("device='cuda'", "device='cpu'")


def write_images(folder, n=6):
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i, (image, mask) in enumerate(demo_dataloaders(n_train=n, n_val=1, size=32, batch_size=1, augment=None)[0]):
        Image.fromarray((image[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray((mask[0, 0].numpy() * 255).astype(np.uint8)).save(folder / "masks" / f"{i}.png")
    Image.open(folder / "images" / "0.png").save(folder / "test_image.jpg")


@pytest.fixture
def scene(tmp_path, monkeypatch, one_thread):
    """What a reader of the document has at hand when he comes to a block: data, a model, a trainer that has trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    write_images(tmp_path)
    train_loader, val_loader = demo_dataloaders(n_train=6, n_val=4, size=32, batch_size=2)
    model = UNet(3, 1, width=4, depth=2)
    optimizer = create_optimizer(model, "adam", lr=1e-3)
    scheduler = create_scheduler(optimizer, "plateau", patience=10, factor=0.5)
    parts = dict(model=model, train_loader=train_loader, val_loader=val_loader, optimizer=optimizer, scheduler=scheduler)
    trainer = UNetTrainer(**parts, device="cpu", early_stopping_patience=5)
    history = trainer.train(2)
    known = "UNetTrainer", "create_loss_function", "create_optimizer", "create_scheduler", "get_augmentation_pipeline"
    names = {name: getattr(unet_nbtrain, name) for name in known}
    names["criterion"] = names["create_loss_function"](1)
    dataset = train_loader.dataset
    return names | parts | dict(torch=torch, nn=nn, DataLoader=DataLoader, dataset=dataset, trainer=trainer, history=history, custom_loss_value=0.25)


def run(heading, scene):
    exec(compile(runnable(blocks()[heading]), f"{DOCUMENT.name}: {heading}", "exec"), scene)
    return scene


def basic(scene, out):
    assert scene["model"].get_model_size() == sum(p.numel() for p in scene["model"].parameters()) > 17_000_000
    assert len(scene["history"]["train_losses"]) == 2 and scene["trainer"].current_epoch == 2
    assert isinstance(scene["criterion"], nn.Module) and type(scene["optimizer"]) is torch.optim.Adam
    assert any(Path("runs").glob("*/checkpoints/best_model.pth"))


def advanced(scene, out):
    trainer = scene["trainer"]
    assert trainer.early_stopping.patience == 15 and trainer.save_every_n_epochs == 5
    assert scene["scheduler"].patience == 10 and scene["scheduler"].factor == 0.5
    assert sorted(p.name for p in Path("models/checkpoints").iterdir())[0] == "best_model.pth"
    assert any(Path("logs/training").rglob("events.out.tfevents.*"))
    assert len(scene["history"]) == 2 and scene["history"] is trainer.history


def losses(scene, out):
    criterion = scene["criterion"]
    logits, target = torch.randn(2, 4, 8, 8), torch.randint(4, (2, 8, 8))
    weights = torch.tensor([1.0, 2.0, 1.5, 3.0])
    assert torch.allclose(criterion(logits, target), nn.functional.cross_entropy(logits, target, weights))
    binary = unet_nbtrain.create_loss_function(n_classes=1, class_weights=scene["pos_weight"])
    logits, target = logits[:, :1], (target[:, None] > 1).float()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor([2.0]))
    assert torch.allclose(binary(logits, target), expected)


def tracking(scene, out):
    dice = max(row["val"]["dice"] for row in scene["history"].rows)
    assert f"Best validation Dice: {dice:.4f}" in out and "Training epochs: 2" in out
    assert f"Final training loss: {scene['history'].rows[-1]['train']['loss']:.4f}" in out
    lines = scene["plt"].gca().get_lines()
    assert [list(line.get_ydata()) for line in lines] == [scene["history"]["train_losses"], scene["history"]["val_losses"]]
    scene["plt"].close("all")


def analysis(scene, out):
    stats = scene["trainer_stats"]
    assert stats["total_parameters"] == sum(p.numel() for p in scene["model"].parameters())
    assert stats["best_dice_score"] == min(scene["history"]["val_losses"]) and stats["epochs_trained"] == 2
    assert stats["early_stopped"] is False and "Model Statistics" in out


def instability(scene, out):
    assert scene["optimizer"].param_groups[0]["lr"] == 1e-3 and scene["scheduler"].T_max == 100
    limits = []
    clip = nn.utils.clip_grad_norm_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda p, limit, *a, **k: limits.append(limit) or clip(p, limit, *a, **k))
        scene["trainer"].train(1)
    assert limits == [0.5] * 3, "the clip norm is live: it holds for the steps that follow"


def memory(scene, out):
    steps = scene["trainer"].global_step
    scene["trainer"].train(1)
    assert scene["trainer"].global_step == steps + 1, "three batches in one group of at most four"
    assert scene["train_loader"].batch_size == 2 and len(next(iter(scene["train_loader"]))[0]) == 2


def overfitting(scene, out):
    assert scene["trainer"].early_stopping.patience == 10 and scene["trainer"].save_every_n_epochs == 2
    image, mask = torch.rand(3, 32, 32), (torch.rand(1, 32, 32) > 0.5).float()
    changed, labels = scene["stronger_augmentation"](image, mask, seed=1)
    assert changed.shape == image.shape and not torch.equal(changed, image) and set(labels.unique().tolist()) <= {0.0, 1.0}
    light = get_augmentation_pipeline(is_training=True, strength="light")
    assert scene["stronger_augmentation"] != light


def custom(scene, out):
    trainer = scene["CustomTrainer"](scene["model"], scene["train_loader"], scene["val_loader"], device="cpu")
    history = trainer.train(2)
    assert [metrics["custom_loss"] for metrics in history["train_metrics"]] == [0.25, 0.25]
    assert history.column("train.custom_loss") == [0.25, 0.25] and 0 <= history["train_metrics"][0]["dice"] <= 1


def parallel(scene, out):
    if torch.cuda.device_count() == 1:
        pytest.skip("one card, which cannot pass for two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        run("Multi-GPU Training", scene)
    assert isinstance(scene["trainer"].model, nn.DataParallel)
    scene["trainer"].train(1)
    saved = torch.load(scene["trainer"].checkpoint_dir / "last.pth")["model_state_dict"]
    assert not any(name.startswith("module.") for name in saved)


def resumption(scene, out):
    checkpoint = scene["checkpoint"]
    assert {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict"} <= set(checkpoint) and checkpoint["epoch"] == 50
    assert checkpoint["scheduler_state_dict"]["patience"] == 10
    fresh = UNet(3, 1, width=4, depth=2)
    fresh.load_state_dict(checkpoint["model_state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), scene["model"].parameters()))


def data(scene, out):
    images, masks = next(iter(scene["train_loader"]))
    assert images.shape[1:] == (3, 32, 32) and set(masks.unique().tolist()) <= {0.0, 1.0}
    assert len(scene["history"]) == 2 and scene["trainer"].train_loader is scene["train_loader"]


def inference(scene, out):
    prediction = scene["predictions"]
    assert prediction.mask.shape == (32, 32) and set(np.unique(prediction.mask)) <= {0, 1}
    assert prediction.probabilities.shape == (1, 32, 32)
    image = torch.from_numpy(np.array(Image.open("test_image.jpg"))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = scene["model"].eval()(image).sigmoid()[0].numpy()
    assert np.allclose(prediction.probabilities, expected, atol=1e-6)
    assert np.array_equal(prediction.mask, expected[0] > 0.5)


CHECKS = {
    "Basic Training Setup": basic,
    "Advanced Configuration": advanced,
    "Custom Loss Functions": losses,
    "Performance Tracking": tracking,
    "Model Analysis": analysis,
    "Training Instability": instability,
    "Memory Issues": memory,
    "Overfitting": overfitting,
    "Custom Training Loops": custom,
    "Multi-GPU Training": parallel,
    "Training Resumption": resumption,
    "With Dataset Pipeline": data,
    "With Inference Pipeline": inference,
}


def test_every_python_block_has_its_check():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert list(blocks()) == list(CHECKS) and len(CHECKS) == text.count("```python") == 13


@pytest.mark.skipif(not ORIGINAL.is_file(), reason=f"{ORIGINAL} is not here to compare with")
def test_the_document_is_the_users_own():
    assert DOCUMENT.read_bytes() == ORIGINAL.read_bytes()


@pytest.mark.parametrize("heading", CHECKS)
def test_block(heading, scene, capsys):
    run(heading, scene)
    CHECKS[heading](scene, capsys.readouterr().out)


def test_replacements_leave_the_rest_alone():
    assert runnable("history = trainer.train(num_epochs=100)") == "history = trainer.train(num_epochs=2)"
    assert runnable("from trainer import UNetTrainer") == "from unet_nbtrain.trainer import UNetTrainer"
    changed = [line for code in blocks().values() for line, new in zip(code.splitlines(), runnable(code).splitlines()) if line != new]
    expected = r"num_epochs=|from (trainer|unet_model|dataset|inference) import|device='cuda'|create_dataloaders\(\.\.\.\)|val_loader, \.\.\.\)"
    assert changed and all(re.search(expected, line) for line in changed)
