"""The Python blocks of README.md, typed one after the other into one session, as a reader does.

What is replaced, and nothing else: the widths and the numbers of epochs by small ones, the name of the run, and "after some
epochs" by an epoch. Where a block wants the same model and loaders as then, they are those of the first training.
"""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
from nbtools import ROOT
from PIL import Image

from unet_nbtrain import UNet
from unet_nbtrain.demo_data import draw_cells

RUN = "runs/2026-01-31_12-00-00"
SMALLER = {"width=32": "width=4, depth=1", "width=16": "width=4, depth=1", "width=8, depth=2": "width=4, depth=1",
           "num_epochs=50": "num_epochs=5", "n_train=64": "n_train=16",
           "panel.history": "panel.trainer.train(1)\npanel.history"}  # fmt: skip
ANEW = "model, loaders = UNet(n_channels=3, n_classes=1, width=4, depth=1), demo_dataloaders(n_train=16, n_val=8, size=64, batch_size=4)\n"


def draw(folder, count, n_classes):
    for kind in ("images", "masks"):
        Path(folder, kind).mkdir(parents=True)
    for i in range(1, count + 1):
        for kind, pixels in zip(("images", "masks"), draw_cells(i, size=64, n_classes=n_classes), strict=True):
            Image.fromarray(pixels).save(Path(folder, kind, f"{i}.png"))


@pytest.mark.usefixtures("one_thread")
def test_the_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw("data", 8, 1)
    draw("camvid", 6, 6)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save("new_image.png")
    session = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    for number, code in enumerate(blocks, 1):
        for words, smaller in SMALLER.items():
            code = code.replace(words, smaller)
        if RUN in code:
            code = code.replace(RUN, str(session["trainer"].run_dir))
        code = ANEW * ("resume=" in code) + code
        exec(compile(code, f"block {number} of README.md", "exec"), session)
    for thread in threading.enumerate():
        if thread.name == "unet-trial":
            thread.join(60)  # A process that ends amid its computing would be aborted
    assert number == 9
    assert session["history"].best["epoch"] >= 1 and len(session["trainer"].history) == 5
    assert session["panel"].trainer.criterion.class_weights.shape == (11,)
    assert Path("new_image_mask.png").is_file() and isinstance(session["model"], UNet)
