"""The panel in real JupyterLab and Notebook 7 with Chromium, as a person uses it. Screenshots stay in tests/shots/ to be looked at."""

import importlib.util
import os
import re
import signal
import time
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter

from lab import Lab, Server, chromium, faults, npm_file

ROOT = Path(__file__).resolve().parents[1]
SHOTS = Path(__file__).parent / "shots"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium() is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """One server and one page for all tests"""
    sync_api = pytest.importorskip("playwright.sync_api")
    root = tmp_path_factory.mktemp("work")
    SHOTS.mkdir(exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        server = Server(root, tmp_path_factory.mktemp("home") / "jupyter")
        lab = Lab(playwright, server)
        try:
            yield lab
        finally:
            lab.close()
            server.close()


SETUP = """import time, torch
from unet_nbtrain import TrainerPanel, UNet, demo_dataloaders
torch.manual_seed(0)
loaders = demo_dataloaders(n_train=24, n_val=4, size=64, batch_size=4)
panel = TrainerPanel(UNet(3, 1, width=8, depth=2), loaders, num_epochs=500, run_dir="runs/{name}", device="cpu", early_stopping_patience=400)
panel.show()"""
EPOCHS = "print(len(panel.history))"


@pytest.fixture
def opened(lab, request):
    """The page with a notebook of its own: the first cell has a panel, the others are given by the test; its kernel ends with the test"""
    name = request.node.name.split("[")[0]

    def open_(*cells, app="lab", first=SETUP):
        lab.server.write(f"{name}.ipynb", [first.format(name=name), *cells])
        lab.open(f"{name}.ipynb", app)
        lab.run_cell(0)
        lab.button("Start").wait_for(timeout=60_000)
        lab.panel().scroll_into_view_if_needed()
        return lab

    yield open_
    for kernel in lab.server.api("/api/kernels"):
        lab.server.api(f"/api/kernels/{kernel['id']}", "DELETE")


def begin(lab, epochs=1):
    lab.button("Start").click()
    lab.until(lambda: lab.badge() in ("training", "validating"), "badge 'training'")
    lab.until(lambda: done(lab) >= epochs, f"{epochs} finished epochs", 60)


def done(lab):
    """Finished epochs, as the panel says"""
    return int(re.search(r"(\d+) of \d+ done", lab.panel().inner_text())[1])


def shot(lab, name):
    lab.page.evaluate("document.activeElement.blur()")
    lab.page.wait_for_timeout(500)
    lab.panel().screenshot(path=SHOTS / f"{name}.png")


SAME_WEIGHTS = """best = torch.load(panel.trainer.checkpoint_dir / "best_model.pth")["model_state_dict"]
print("best weights in the model:", all(torch.equal(a, b) for a, b in zip(best.values(), model.state_dict().values())))"""


def test_the_quick_start_by_mouse(lab):
    """Its own cells, down to the panel; two more ask the trainer"""
    notebook = nbformat.read(ROOT / "nbs" / "20_quick_start.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[], execution_count=None)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in ("print('step', panel.trainer.global_step)", SAME_WEIGHTS)]
    nbformat.write(notebook, lab.server.root / "quick_start.ipynb")
    cells = [cell.source for cell in notebook.cells]
    lab.open("quick_start.ipynb")
    for index in range(next(i for i, source in enumerate(cells) if "panel.show()" in source and "TrainerPanel(" in source) + 1):
        if lab.cell(index).locator(".jp-InputPrompt").count():
            lab.run_cell(index)
    lab.button("Start").wait_for(timeout=60_000)
    lab.panel().scroll_into_view_if_needed()
    shot(lab, "1_ready")
    empty = lab.picture()
    begin(lab, 0)
    lab.until(lambda: lab.picture() != empty, "change of the curves")

    began = lab.page.evaluate("performance.now()")
    assert lab.output(cells.index("1 + 1")).strip() == "2"
    assert lab.page.evaluate("performance.now()") - began < 1000
    lab.until(lambda: done(lab) >= 1, "finished epoch")

    def step():
        return int(re.search(r"step (\d+)", lab.output(len(cells) - 2))[1])

    lab.panel().scroll_into_view_if_needed()
    shot(lab, "2_training")
    lab.button("Pause").click()
    lab.until(lambda: lab.badge() == "paused", "badge 'paused'")
    shot(lab, "3_paused")
    steps = step()
    lab.page.wait_for_timeout(1500)
    assert step() == steps

    lab.button("Resume").click()
    lab.until(lambda: lab.badge() in ("training", "validating"), "badge 'training'")
    lab.until(lambda: step() > steps, "further step")
    lab.until(lambda: done(lab) >= 2, "second epoch", 60)
    lab.button("Stop").click()
    lab.until(lambda: lab.badge() == "finished", "badge 'finished'")
    lab.until(lambda: "The best weights are in the model" in lab.panel().inner_text(), "last words")
    shot(lab, "4_finished")
    assert "best weights in the model: True" in lab.output(len(cells) - 1)


BUSY = "end = time.time() + 6\nwhile time.time() < end: sum(range(2000))"


def test_busy_cell_second_view_and_reload(opened):
    """A click is heard while a cell computes; two views show the same; a reload in the middle loses nothing"""
    lab = opened(BUSY, "panel.show()", EPOCHS)
    begin(lab)
    lab.run_cell(1, wait=False)
    lab.page.wait_for_timeout(1000)
    lab.panel().scroll_into_view_if_needed()
    assert not lab.panel().locator(".unt-gone, .unt-stale").locator("visible=true").count()
    lab.button("Pause").click()
    assert lab.until(lambda: lab.badge() == "paused", "badge 'paused' while a cell is busy") < 4
    lab.wait_until_ready()

    lab.run_cell(2)
    views = lab.page.locator(".unt-panel")
    lab.until(lambda: views.count() == 2, "second view")
    views.nth(1).locator("button.widget-button", has_text="Resume").click()
    for view in range(2):
        lab.until(lambda view=view: views.nth(view).locator(".unt-badge").inner_text() in ("training", "validating"), f"'training' in view {view}")
    lab.until(lambda: done(lab) >= 3, "third epoch", 60)

    lab.save()
    began = time.monotonic()
    lab.page.reload()
    lab.wait_until_ready()
    connected = time.monotonic()
    lab.button("Pause").wait_for(timeout=30_000)
    lab.until(lambda: lab.panel().locator("img.unt-plot").evaluate("image => image.naturalWidth") > 800, "curves")
    assert time.monotonic() - connected < 3, f"{time.monotonic() - connected:.1f} s after the kernel was connected"
    print(f"back {time.monotonic() - began:.1f} s after the reload")
    assert done(lab) >= 3 and int(lab.output(3)) >= 3
    lab.button("Pause").click()
    lab.until(lambda: lab.badge() == "paused", "badge 'paused' after the reload")


def test_saved_without_a_kernel(opened):
    """In JupyterLab, in nbconvert's HTML, and where only the outputs of the file are looked at"""
    lab = opened("panel.stop().wait(), panel.wait()", "time.sleep(0.5)")
    begin(lab, 2)
    lab.run_cell(1)
    lab.until(lambda: lab.badge() == "finished", "badge 'finished'")
    lab.run_cell(2)
    lab.page.wait_for_timeout(1000)
    lab.save()
    for kernel in lab.server.api("/api/kernels"):
        lab.server.api(f"/api/kernels/{kernel['id']}", "DELETE")
    file = lab.server.root / "test_saved_without_a_kernel.ipynb"
    book = nbformat.read(file, as_version=4)
    panel, still = (output["data"] for output in book.cells[0].outputs)
    assert {"image/png", "text/plain"} <= set(panel) and "finished" in panel["text/plain"]
    assert "data:image/png;base64" in still["text/html"] and still["text/html"].count("<tr>") >= 3

    assert "Error displaying widget" not in (page := HTMLExporter().from_notebook_node(book)[0])
    other = lab.another()
    try:
        (lab.server.root / "page.html").write_text(page, encoding="utf-8")
        for address in (f"file://{lab.server.root}/page.html", lab.server.address(file.name)):
            other.page.goto(address)
            stays = other.page.locator(".unt-still")
            stays.locator("img").wait_for(timeout=60_000)
            assert stays.locator("img").evaluate("image => image.naturalWidth") > 800
            assert stays.locator("tr").count() >= 3 and "finished" in stays.inner_text()
    finally:
        other.page.close()


CONTROLS = "button, input, select"
DEAD = f"""() => [...document.querySelector('.unt-panel').querySelectorAll('{CONTROLS}')].filter(at => {{
  const style = getComputedStyle(at);
  at.focus();
  return style.pointerEvents === 'none' && style.filter !== 'none' && document.activeElement !== at;
}}).map(at => at.textContent.trim() || at.tagName)"""


def test_the_kernel_is_restarted(opened):
    """One that stands still has no news and is not given up; one that is restarted leaves a panel that is seen to be dead; a new one offers to go on"""
    lab = opened("import os; print(os.getpid())")
    begin(lab, 2)
    stale, gone = (lab.panel().locator(name) for name in (".unt-stale", ".unt-gone"))
    kernel = int(lab.output(1))
    assert not stale.is_visible() and not gone.is_visible()
    os.kill(kernel, signal.SIGSTOP)
    try:
        lab.until(stale.is_visible, "words about missing news")
        assert not gone.is_visible() and lab.page.evaluate(DEAD) == []
    finally:
        os.kill(kernel, signal.SIGCONT)
    lab.until(lambda: not stale.is_visible(), "news")
    lab.page.evaluate("() => { jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart() }")
    lab.until(gone.is_visible, "words about a kernel that is gone")
    assert not stale.is_visible() and "Run the cell again" in gone.inner_text()
    dead = lab.page.evaluate(DEAD)
    assert {"Pause", "Stop", "Save"} <= set(dead) and len(dead) == lab.panel().locator(CONTROLS).count(), dead
    shot(lab, "7_kernel_gone")
    lab.wait_until_ready()
    lab.run_cell(0)
    lab.button("Resume").wait_for(timeout=60_000)
    assert "This folder has a run of" in lab.panel().inner_text()
    lab.button("Resume").click()
    lab.until(lambda: lab.badge() in ("training", "validating"), "badge 'training'")
    lab.until(lambda: done(lab) >= 3, "third epoch")


FOCUSED = """() => {
  const at = document.activeElement, style = getComputedStyle(at), tab = at.closest('[role=tab]');
  const seen = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0 || style.boxShadow !== 'none';
  const border = at.closest('.widget-text, .widget-dropdown, .widget-select, .widget-slider, .jupyter-widgets');
  const label = at.labels?.[0]?.textContent || at.getAttribute('aria-label') || at.textContent || '';
  return {what: (tab ? 'tab ' : at.tagName.toLowerCase() + ' ') + label.trim().split('\\n')[0], seen, inside: !!at.closest('.unt-panel')};
}"""


def walk(lab, first="Pause", most=40):
    """What Tab reaches inside the panel, from its first control on, and what of it has no visible focus"""
    lab.button(first).focus()
    reached, unseen = [], []
    for _ in range(most):
        at = lab.page.evaluate(FOCUSED)
        if not at["inside"]:
            break
        reached.append(at["what"])
        unseen += [] if at["seen"] else [at["what"]]
        lab.page.keyboard.press("Tab")
    return reached, unseen


def test_keyboard_alone_in_the_dark(opened):
    """Every control is reached by Tab, seen to have the focus, and works"""
    lab = opened()
    lab.dark()
    try:
        lab.button("Start").focus()
        lab.page.keyboard.press("Space")
        lab.until(lambda: done(lab) >= 2, "second epoch", 60)
        reached, unseen = walk(lab)
        for wanted in ("button Pause", "button Stop", "button Save", "tab Curves", "select score", "select smoothing"):
            assert any(what.startswith(wanted) for what in reached), (wanted, reached)
        assert not unseen, unseen

        lab.panel().locator("[role=tab]").first.focus()
        for key in ("ArrowRight", "ArrowRight", "Enter"):
            lab.page.keyboard.press(key)
        lab.until(lambda: lab.panel().get_by_label("learning rate").is_visible(), "tab with the settings")
        reached, unseen = walk(lab)
        assert sum(what.startswith("input ") for what in reached) >= 8 and any("Apply" in what for what in reached), reached
        assert not unseen, unseen
        lab.panel().get_by_label("learning rate").focus()
        lab.page.keyboard.press("Control+a")
        lab.page.keyboard.type("4e-4")
        lab.page.keyboard.press("Enter")
        lab.until(lambda: "0.0004" in lab.panel().inner_text() and "at step" in lab.panel().inner_text() or "after step" in lab.panel().inner_text(), "new learning rate")

        lab.button("Pause").focus()
        lab.page.keyboard.press("Enter")
        lab.until(lambda: lab.badge() == "paused", "badge 'paused'")
        shot(lab, "5_dark_settings")

        lab.tab("Predictions")
        epoch = lab.panel().get_by_role("spinbutton", name="epoch", exact=True)
        lab.until(lambda: epoch.is_visible() and int(epoch.input_value()) == done(lab), "newest epoch")
        reached, unseen = walk(lab, "Resume")
        assert "input epoch" in reached and not unseen and not any("div" in what for what in reached), (reached, unseen)
        epoch.focus()
        lab.page.keyboard.press("ArrowDown")
        name = f"Epoch {done(lab) - 1}:"
        lab.until(lambda: name in (lab.panel().locator("img.unt-photo").get_attribute("title") or ""), f"picture '{name}'")
        knob, rail = (lab.panel().locator(f".unt-scrub .noUi-{part}").bounding_box() for part in ("handle", "base"))
        lab.page.mouse.move(knob["x"] + knob["width"] / 2, knob["y"] + knob["height"] / 2)
        lab.page.mouse.down()
        lab.page.mouse.move(rail["x"], knob["y"] + 5, steps=5)
        lab.page.mouse.up()
        lab.until(lambda: epoch.input_value() == "1", "first epoch by the mouse")
        shot(lab, "5_dark_predictions")
    finally:
        lab.dark(False)


FOCUS = "() => { const at = document.activeElement; return at === document.body ? 'nowhere' : at.closest('.unt-panel') ? at.innerText.trim() || at.tagName : at.closest('.cm-editor') ? 'a cell' : at.className }"


def test_the_focus_is_not_lost_with_a_button(opened):
    """To the button that takes its place, also when the panel is rendered anew at the end; from a cell it takes nothing"""
    lab = opened("1 + 1")

    def focus():
        return lab.page.evaluate(FOCUS)

    begin(lab)
    lab.button("Stop").focus()
    lab.page.keyboard.press("Space")
    lab.until(lambda: lab.badge() == "finished" and lab.button("Continue").is_enabled(), "end")
    lab.page.wait_for_timeout(2500)
    assert focus() == "Continue", focus()
    lab.page.keyboard.press("Space")
    lab.until(lambda: lab.badge() in ("training", "validating"), "badge 'training'")
    lab.until(lambda: focus() == "Pause", "focus on Pause")
    lab.button("Stop").focus()
    lab.output(1)
    lab.cell(1).locator(".cm-content").click()
    lab.button("Stop").dispatch_event("click")
    lab.until(lambda: lab.badge() == "finished", "end")
    lab.page.wait_for_timeout(2500)
    assert focus() == "a cell", focus()


@pytest.mark.network
def test_axe_finds_no_serious_fault(opened):
    """In each tab, light and dark, while a training is paused: its own colours and words are all there"""
    axe = npm_file("axe-core@4", "axe.min.js")
    if axe is None:
        pytest.skip("npm cannot fetch axe-core")
    lab = opened()
    begin(lab, 2)
    lab.button("Pause").click()
    lab.until(lambda: lab.badge() == "paused", "badge 'paused'")
    lab.page.evaluate(axe)
    found = []
    for dark in (False, True):
        lab.dark(dark)
        for title in lab.panel().locator(".lm-TabBar-tab").all_inner_texts():
            lab.tab(title)
            lab.page.wait_for_timeout(400)
            found += [(title, dark, *fault) for fault in faults(lab.page) if fault[0] in ("serious", "critical")]
    lab.dark(False)
    assert not found, found


EVIL = "<img src=x onerror=window.untHit=1><script>window.untHit=2</script>"
HOSTILE = '''EVIL = """''' + EVIL + '''"""
import numpy as np, time, torch
from pathlib import Path
from PIL import Image
from unet_nbtrain import TrainerPanel, UNet, create_dataloaders
name = EVIL.replace("/", "")
for number in range(6):
    for kind, top in (("images", 255), ("masks", 2)):
        Path("evil", kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, top, (32, 32)).astype("uint8")).save(f"evil/{{kind}}/{{number}}{{name}}.png")
loaders = create_dataloaders("evil/images", "evil/masks", batch_size=2, val=0.34, n_classes=2, class_names=[EVIL, "b" + EVIL], num_workers=0)
class Net(UNet):
    def forward(self, x):
        if self.training and Path("fail").exists():
            raise RuntimeError(EVIL)
        return super().forward(x)
panel = TrainerPanel(Net(loaders[0].dataset.n_channels, 2, width=4, depth=2), loaders, num_epochs=500, run_dir=f"runs/{{name}}", device="cpu")
panel.show()'''


def test_markup_in_names_is_shown_and_not_run(opened):
    """In file names, class names, the name of the run, and an exception"""
    lab = opened("panel.show()", first=HOSTILE)
    begin(lab, 1)
    lab.tab("Numbers")
    lab.until(lambda: "<img src=x" in lab.panel().inner_text(), "class name as text")
    (lab.server.root / "fail").touch()
    lab.until(lambda: lab.badge() == "failed", "badge 'failed'")
    for title in lab.panel().locator(".lm-TabBar-tab").all_inner_texts():
        lab.tab(title)
        lab.page.wait_for_timeout(150)
    lab.panel().locator("summary", has_text="Traceback").click()
    assert f"RuntimeError: {EVIL}" in lab.panel().inner_text()
    lab.run_cell(1)
    lab.page.wait_for_timeout(500)
    assert lab.page.evaluate("window.untHit") is None and not lab.dialogs
    assert lab.page.locator("img[src=x]").count() == 0 and lab.page.locator(".jp-OutputArea script").count() == 0


def test_notebook_7(opened):
    """The same panel in the other application"""
    if importlib.util.find_spec("notebook") is None:
        pytest.skip("needs the package notebook")
    lab = opened(BUSY, EPOCHS, app="notebook")
    begin(lab)
    lab.button("Pause").click()
    lab.until(lambda: lab.badge() == "paused", "badge 'paused'")
    lab.button("Resume").click()
    lab.run_cell(1, wait=False)
    lab.page.wait_for_timeout(1000)
    lab.button("Pause").click()
    assert lab.until(lambda: lab.badge() == "paused", "badge 'paused' while a cell is busy") < 4
    lab.wait_until_ready()
    lab.reload()
    lab.button("Resume").wait_for(timeout=30_000)
    lab.button("Resume").click()
    lab.until(lambda: lab.badge() in ("training", "validating"), "badge 'training' after the reload")
    shot(lab, "6_notebook_7")
    lab.button("Stop").click()
    lab.until(lambda: lab.badge() == "finished", "badge 'finished'")
    assert int(lab.output(2)) >= 1
