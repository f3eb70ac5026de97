"""Take the pictures of the panel for docs/images: every tab and state, light and dark, at 1x and 2x.

    python scripts/screenshots.py            all of them
    python scripts/screenshots.py light 2    one theme at one scale
"""

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from lab import Lab, Server  # noqa: E402

IMAGES, MOST_BYTES = ROOT / "docs" / "images", 150_000
CELLS = [
    """import torch
from unet_nbtrain import History, TrainerPanel, UNet, demo_dataloaders
torch.manual_seed(0)
record = History()
for epoch in range(1, 13):
    loss = 0.2 + 0.5 * 0.75**epoch
    record.append({"epoch": epoch, "train": {"loss": loss}, "val": {"loss": 1.1 * loss, "dice": 1 - loss, "iou": 0.9 - loss}, "lr": 1e-3, "seconds": 4.0})
record.save("runs/monday/history.json")
loaders = demo_dataloaders(n_train=48, n_val=12, size=96, batch_size=4)
def new_panel(name, **options):
    return TrainerPanel(UNet(3, 1, width=12, depth=3), loaders, num_epochs=12, run_dir=f"runs/{name}", device="cpu", early_stopping_patience=5, **options)
panel = new_panel("cells")""",
    "panel.show()",
    "panel.stop().wait(60), panel.wait(60)",
    """later = new_panel("cells")
later.show()""",
    """bad = [(images, masks * 255) for images, masks in loaders[0]]
failing = TrainerPanel(UNet(3, 1, width=8), (bad, loaders[1]), num_epochs=3, device="cpu", run_dir="runs/failing")
failing.show()
failing.start()""",
]


def save_small(data, path):
    """The screenshot as a PNG in as many colours as fit into the limit; one with photographs as WebP."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    tries = [(".png", {"colors": 256}), (".png", {"colors": 128}), *((".webp", {"quality": quality}) for quality in (85, 75, 65, 55))]
    for suffix, options in tries:
        found = suffix, _encoded(image, **options)
        if len(found[1]) <= MOST_BYTES:
            break
    for old in (".png", ".jpg", ".webp"):
        path.with_suffix(old).unlink(missing_ok=True)
    path.with_suffix(found[0]).write_bytes(found[1])


def _encoded(image, colors=None, quality=None):
    out = io.BytesIO()
    if colors:
        image.quantize(colors, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    else:
        image.save(out, "webp", quality=quality, method=6)
    return out.getvalue()


class Session:
    """One theme at one scale"""

    def __init__(self, lab, theme, scale):
        self.lab, self.name = lab, f"{theme}_{scale}x"

    def panel(self, index):
        return self.lab.page.locator(".unt-panel").nth(index)

    def shot(self, name, index=0):
        self.lab.page.wait_for_timeout(900)
        self.lab.page.evaluate("document.activeElement.blur()")
        save_small(self.panel(index).screenshot(), IMAGES / f"panel_{name}_{self.name}")

    def tab(self, title, index=0):
        self.panel(index).locator(".lm-TabBar-tab", has_text=title).click()
        self.panel(index).scroll_into_view_if_needed()
        self.lab.page.wait_for_timeout(700)

    def until(self, text, index=0):
        self.panel(index).get_by_text(text).first.wait_for(timeout=120_000)

    def press(self, text, index=0):
        self.panel(index).locator("button.widget-button", has_text=text).first.click()


def tour(session):
    """From Start to the end, by the buttons"""
    lab = session.lab
    lab.run_cell(0)
    lab.run_cell(1)
    session.until("Start")
    session.shot("1_ready")
    session.press("Start")
    session.until("3 of 12 done")
    session.tab("Settings")
    field = session.panel(0).get_by_label("learning rate")
    field.fill("3e-4")
    field.press("Enter")
    session.until("after step")
    patience = session.panel(0).get_by_label("patience")
    patience.fill("soon")
    patience.press("Enter")
    session.until("must be a whole number")
    session.shot("5_settings")
    session.tab("Curves")
    session.press("Save")
    session.until("6 of 12 done")
    session.panel(0).get_by_label("behind").select_option("monday")
    session.shot("2_training")
    session.press("Pause")
    session.until("Paused after step")
    session.shot("3_paused")
    session.tab("Predictions")
    session.shot("4_predictions")
    session.tab("Numbers")
    session.shot("6_numbers")
    session.tab("Data")
    session.shot("8_data")
    session.tab("Log")
    session.shot("9_log")
    session.press("Stop")
    session.until("The best weights are in the model")
    lab.page.wait_for_timeout(2000)  # At the end of a run the panel is rendered anew, once
    session.tab("Checkpoints")
    session.shot("7_checkpoints")
    session.tab("Curves")
    session.shot("10_finished")
    lab.run_cell(3)
    session.until("Resume", 1)
    session.shot("11_new_kernel", 1)
    lab.run_cell(4)
    session.until("Traceback", 2)
    session.shot("12_failed", 2)
    lab.page.evaluate("() => { jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart() }")
    session.until("kernel is gone")
    session.panel(0).scroll_into_view_if_needed()
    session.shot("13_kernel_gone")
    lab.wait_until_ready()  # A kernel that is just starting cannot be shut down


def main():
    wanted = sys.argv[1:]
    IMAGES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        for theme in wanted[:1] or ["light", "dark"]:
            for scale in [int(text) for text in wanted[1:2]] or [1, 2]:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
                    root = Path(home) / "work"
                    root.mkdir()
                    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
                    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS], metadata=kernel)
                    nbformat.write(book, root / "panel.ipynb")
                    os.environ.setdefault("OMP_NUM_THREADS", "1")
                    server = Server(root, Path(home) / "home", theme == "dark")
                    lab = Lab(playwright, server, theme == "dark", scale)
                    try:
                        lab.page.set_viewport_size({"width": 1320, "height": 1400})
                        lab.open("panel.ipynb")
                        tour(Session(lab, theme, scale))
                    finally:
                        lab.close()
                        server.close()
    shutil.copy(IMAGES / "panel_2_training_light_2x.png", IMAGES / "panel.png")  # The one at the top of the README


if __name__ == "__main__":
    main()
