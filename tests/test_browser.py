"""The quick start in real JupyterLab with Chromium, as a person uses it. Screenshots stay in tests/shots/ to be looked at."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest

from lab import Lab, Server, chromium

ROOT = Path(__file__).resolve().parents[1]
SHOTS = Path(__file__).parent / "shots"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def playwright():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        yield playwright


@pytest.fixture
def lab(playwright, tmp_path, request):
    """JupyterLab on a copy of the quick start; two more cells ask the trainer"""
    dark = getattr(request, "param", "light") == "dark"
    root = tmp_path / "work"
    root.mkdir()
    notebook = nbformat.read(ROOT / "nbs" / "20_quick_start.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[], execution_count=None)
    asks = ["print('step', panel.trainer.global_step)", SAME_WEIGHTS, "import time\nend = time.time() + 8\nwhile time.time() < end: sum(range(2000))"]
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in asks]
    nbformat.write(notebook, root / "quick_start.ipynb")
    SHOTS.mkdir(exist_ok=True)
    server = Server(root, tmp_path / "home", dark)
    lab = Lab(playwright, server, dark)
    lab.cells = [cell.source for cell in notebook.cells]
    try:
        lab.open("quick_start.ipynb")
        yield lab
    finally:
        lab.close()
        server.close()
        shutil.rmtree(tmp_path, ignore_errors=True)


SAME_WEIGHTS = """best = torch.load(panel.trainer.checkpoint_dir / "best_model.pth")["model_state_dict"]
print("best weights in the model:", all(torch.equal(a, b) for a, b in zip(best.values(), model.state_dict().values())))"""


def number_of(lab, start):
    return next(i for i, source in enumerate(lab.cells) if source.startswith(start))


def show_panel(lab):
    """Run the quick start's cells down to the one that shows the panel"""
    last = next(i for i, source in enumerate(lab.cells) if "panel.show()" in source and "TrainerPanel(" in source)
    for index in range(last + 1):
        if lab.cell(index).locator(".jp-InputPrompt").count():
            lab.run_cell(index)
    lab.button("Start").wait_for(timeout=60_000)
    lab.panel().scroll_into_view_if_needed()


def answer(lab, index):
    lab.run_cell(index)
    return lab.cell(index).locator(".jp-OutputArea-output").last.inner_text()


def step(lab):
    return int(re.search(r"step (\d+)", answer(lab, number_of(lab, "print('step'")))[1])


def shot(lab, name):
    lab.page.evaluate("document.activeElement.blur()")
    lab.page.wait_for_timeout(1000)  # At the end of a run the panel is rendered anew, once
    lab.panel().screenshot(path=SHOTS / f"{name}.png")


def test_a_training_by_mouse(lab):
    show_panel(lab)
    shot(lab, "1_ready")
    empty = lab.picture()
    lab.button("Start").click()
    lab.until(lambda: lab.badge() in ("training", "validating"), "badge 'training'")
    lab.until(lambda: lab.picture() != empty, "change of the curves")

    kernel_free = number_of(lab, "1 + 1")
    began = lab.page.evaluate("performance.now()")
    assert answer(lab, kernel_free).strip() == "2"
    assert lab.page.evaluate("performance.now()") - began < 1000
    lab.until(lambda: "1 of" in lab.panel().inner_text() or "2 of" in lab.panel().inner_text(), "finished epoch")

    lab.panel().scroll_into_view_if_needed()
    shot(lab, "2_training")
    lab.button("Pause").click()
    lab.until(lambda: lab.badge() == "paused", "badge 'paused'")
    shot(lab, "3_paused")
    steps = step(lab)
    lab.page.wait_for_timeout(1500)
    assert step(lab) == steps

    lab.button("Resume").click()
    lab.until(lambda: lab.badge() in ("training", "validating"), "badge 'training'")
    assert step(lab) >= steps
    lab.until(lambda: step(lab) > steps, "further step")
    lab.until(lambda: re.search(r"[4-9] of 12", lab.panel().inner_text()), "fourth epoch", 60)
    shot(lab, "4_training_later")
    lab.button("Stop").click()
    lab.until(lambda: lab.badge() == "finished", "badge 'finished'")
    lab.until(lambda: "The best weights are in the model" in lab.panel().inner_text(), "last words")
    shot(lab, "5_finished")
    assert "best weights in the model: True" in answer(lab, number_of(lab, "best = torch.load"))


def test_a_click_is_heard_while_a_cell_is_busy_and_after_a_reload(lab):
    show_panel(lab)
    lab.button("Start").click()
    lab.until(lambda: lab.badge() in ("training", "validating"), "badge 'training'")
    lab.run_cell(number_of(lab, "import time"), wait=False)
    lab.page.wait_for_timeout(1000)
    lab.panel().scroll_into_view_if_needed()
    lab.button("Pause").click()
    assert lab.until(lambda: lab.badge() == "paused", "badge 'paused' while a cell is busy") < 4
    lab.page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'", timeout=30_000)
    lab.reload()
    lab.button("Resume").wait_for(timeout=30_000)
    assert lab.badge() == "paused"
    lab.button("Resume").click()
    lab.until(lambda: lab.badge() in ("training", "validating"), "badge 'training' after the reload")


@pytest.mark.parametrize("lab", ["dark"], indirect=True)
def test_dark_theme_and_keyboard(lab):
    show_panel(lab)
    lab.button("Start").focus()
    lab.page.keyboard.press("Space")
    lab.until(lambda: re.search(r"[3-9] of 12", lab.panel().inner_text()), "third epoch", 60)
    lab.button("Pause").focus()
    lab.page.keyboard.press("Enter")
    lab.until(lambda: lab.badge() == "paused", "badge 'paused'")
    shot(lab, "6_dark")
