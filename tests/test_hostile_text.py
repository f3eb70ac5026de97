"""Names and messages may hold markup: files, classes, runs, metrics, exceptions. Whatever shows them shows text and runs nothing."""

import html
import logging
import re
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from unet_nbtrain import TrainerPanel, UNet, UNetTrainer, create_dataloaders
from unet_nbtrain.display import _still_html
from unet_nbtrain.report import report_of_run
from unet_nbtrain.view import spoken

EVIL = "<img src=x onerror=alert(1)>"
TAG = re.compile(r"<\s*(img\s+src=x|script)", re.IGNORECASE)


class Trainer(UNetTrainer):
    """With a metric of its own, an odd name, and a last epoch that fails"""

    fails = False

    def validate_epoch(self):
        if self.fails:
            raise OSError(f"{EVIL} cannot be read")
        return {**super().validate_epoch(), EVIL: 0.5}


def loaders(folder):
    """Two classes with markup in their names, and files with markup in theirs"""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(6):
        picture = torch.zeros(16, 16, dtype=torch.uint8)
        picture[:8, : 4 + number] = 1
        Image.fromarray((picture * 200).numpy()).save(folder / "images" / f"{number}{EVIL}.png")
        Image.fromarray(picture.numpy()).save(folder / "masks" / f"{number}{EVIL}.png")
    return create_dataloaders(folder / "images", folder / "masks", batch_size=2, val=0.34, n_classes=2, class_names=[EVIL, f"b{EVIL}"], num_workers=0)


def widgets_of(box):
    yield box
    for child in getattr(box, "children", ()):
        yield from widgets_of(child)


def markup_of(panel):
    """The markup of every widget, and all plain text beside it"""
    found = list(widgets_of(panel._widgets.box))
    return "".join(str(one.value) for one in found if type(one).__name__ == "HTML")


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def evil(tmp_path):
    """A panel that has seen two epochs, a change, a problem and its end by an exception, with every tab painted"""
    logging.disable(logging.CRITICAL)
    trainer = Trainer(UNet(1, 2, width=4, depth=2), *loaders(tmp_path / "data"), device="cpu", run_dir=tmp_path / "runs" / f"run{EVIL}".replace("/", ""))
    panel = TrainerPanel(trainer=trainer, num_epochs=2)
    panel.show()
    panel.start()
    assert panel.wait(60)
    panel.set("lr", 1e-4)
    trainer._report(f"The file {EVIL} was left out.")
    trainer.fails = True
    panel.train_more(1)
    assert until(lambda: trainer.run.state == "failed")
    panel.form.fields["patience"].value = EVIL
    panel.add_tab(f"Mine {EVIL}", lambda: html.escape(EVIL))
    panel._pump.close()
    panel._pump.thread.join(30)
    panel._paint(True, everything=True)
    yield panel
    logging.disable(logging.NOTSET)


def test_markup_in_names_is_text_everywhere(evil, tmp_path):
    shown = markup_of(evil)
    escaped = html.escape(EVIL)
    assert not TAG.search(shown), shown[max(0, TAG.search(shown).start() - 200) :][:400]
    wanted = {"numbers": f"<th>{escaped}</th>", "class": f"b{escaped}", "run": f"run{escaped}", "exception": f"OSError: {escaped} cannot be read",
              "problem": f"The file {escaped} was left out.", "setting": f"got {html.escape(repr(EVIL))}", "worst": "worst of all: "}  # fmt: skip
    assert [name for name, text in wanted.items() if text not in shown] == []
    assert re.search(rf"worst of all: \d{re.escape(escaped)}", shown)

    pages = {"report": evil.report(tmp_path / "a.html").read_text(), "from the folder": report_of_run(evil.trainer.run_dir, tmp_path / "b.html").read_text()}
    history = evil.history
    pages |= {"history": history._repr_html_(), "classes": history.class_table()._repr_html_(), "still": _still_html(b"", history, spoken(evil._shown[0]))}
    pages |= {phase: report._repr_html_() for phase, report in evil._check.reports.items()}
    for name, page in pages.items():
        assert not TAG.search(str(page)), name
    assert all(escaped in pages[name] for name in ("report", "from the folder", "classes", "train"))


def test_the_search_for_markup_can_fail():
    assert TAG.search(f"<td>{EVIL}</td>") and TAG.search("<SCRIPT>") and not TAG.search(html.escape(EVIL))
    assert not TAG.search('<img alt="curves" src="data:image/png;base64,">') and Path(EVIL).name
