"""The panel in a real kernel, driven over its comms as a front end does, without a browser."""
import os
import shutil
import statistics
import subprocess
import sys
import time

import pytest

from comms import BUSY, BUSY_SECONDS, Kernel, open_panel, whole_flow


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()


def test_buttons_steer_a_training(kernel, tmp_path):
    open_panel(kernel, tmp_path)
    kernel.click("Start")
    kernel.until(lambda: kernel.button("Pause"), "Pause button")
    kernel.until(lambda: ">training<" in kernel.markup(), "badge 'training'")

    waits = []
    for _ in range(3):
        began = time.monotonic()
        assert kernel.run("1 + 1") == "2"
        waits.append(time.monotonic() - began)
    assert statistics.median(waits) < 1, waits

    kernel.click("Pause")
    kernel.until(lambda: ">paused<" in kernel.markup(), "badge 'paused'")
    steps = kernel.run("panel.trainer.global_step")
    time.sleep(0.5)
    assert kernel.run("panel.trainer.global_step") == steps

    kernel.click("Resume")
    kernel.until(lambda: int(kernel.run("panel.trainer.global_step")) > int(steps), "further step")
    kernel.until(lambda: int(kernel.run("panel.trainer.current_epoch")) >= 1, "finished epoch")
    kernel.click("Stop")
    kernel.until(lambda: kernel.button("Continue"), "Continue button")
    best = "torch.load(panel.trainer.checkpoint_dir / 'best_model.pth')['model_state_dict']"
    same = f"all(map(torch.equal, {best}.values(), panel.trainer.model.state_dict().values()))"
    assert kernel.run(same) == "True"


def test_what_the_saved_notebook_keeps(kernel, tmp_path):
    open_panel(kernel, tmp_path)
    kernel.until(lambda: kernel.displays, "display of the panel")
    shown = kernel.displays[0][1]
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(shown)
    kernel.run("setattr(panel, 'num_epochs', 1)")
    kernel.run("panel.start().wait(60)")

    def refreshed(part):
        return [data for kind, data in kernel.displays if kind == "update_display_data" and part in data]

    kernel.until(lambda: refreshed("image/png"), "refreshed picture")
    final = refreshed("image/png")[-1]
    assert final["image/png"] != shown["image/png"]
    assert "finished, 1 of 1 epochs done" in final["text/plain"]
    still = refreshed("text/html")[-1]["text/html"]
    assert "unt-still" in still and "data:image/png;base64" in still and "<table" in still


def test_click_works_while_a_cell_is_busy(kernel, tmp_path):
    """JupyterLab sends clicks to a subshell; with our opt-out they are handled although a cell runs.

    The cell computes until the training has paused, so the order of events is tested and not the speed of the machine.
    """
    open_panel(kernel, tmp_path)
    subshell = kernel.new_subshell()
    kernel.click("Start", subshell)
    kernel.until(lambda: kernel.button("Pause"), "Pause button")
    kernel.until(lambda: ">training<" in kernel.markup(), "badge 'training'")
    identity = kernel.send(BUSY)
    time.sleep(0.5)
    kernel.click("Pause", subshell)
    kernel.wait_for(identity, BUSY_SECONDS + 30)
    assert kernel.run("paused_meanwhile") == "True", "the click was handled only after the cell"
    kernel.until(lambda: ">paused<" in kernel.markup(), "badge 'paused'")
    assert kernel.run("panel.trainer.global_step - step") == "0"


def test_interrupt_leaves_background_training_alone(kernel, tmp_path):
    """The interrupt goes to the whole process group; our loader's workers ignore it"""
    open_panel(kernel, tmp_path, workers=1)
    identity = kernel.send("panel.start()\ntime.sleep(30)")
    kernel.until(lambda: ">training<" in kernel.markup(), "badge 'training'", 40)
    kernel.manager.interrupt_kernel()
    reply = kernel.client.get_shell_msg(timeout=10)
    while reply["parent_header"].get("msg_id") != identity:
        reply = kernel.client.get_shell_msg(timeout=10)
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    steps = int(kernel.run("panel.trainer.global_step"))
    time.sleep(7)  # PyTorch notices dead workers after five seconds
    assert kernel.run("panel.trainer.run.state") == "'running'"
    assert int(kernel.run("panel.trainer.global_step")) > steps
    kernel.run("panel.stop().wait(30)")


def test_interrupt_of_a_blocking_training_is_a_stop(kernel, tmp_path):
    open_panel(kernel, tmp_path)
    identity = kernel.send("history = panel.trainer.train(500)")
    time.sleep(3)
    kernel.manager.interrupt_kernel()
    reply = kernel.client.get_shell_msg(timeout=10)
    while reply["parent_header"].get("msg_id") != identity:
        reply = kernel.client.get_shell_msg(timeout=10)
    assert reply["content"]["status"] == "ok"
    assert kernel.run("panel.trainer.run.reason") == "'stopped by a command'"
    steps = int(kernel.run("panel.trainer.global_step"))
    assert steps > 0 and kernel.run("torch.load(panel.trainer.checkpoint_dir / 'last.pth')['global_step']") == str(steps)


def test_the_oldest_versions(tmp_path):
    """All that a person does, in ipykernel 6.29 with ipywidgets 7.7.1; `python -m benchmarks.panel_versions` does it in eight pairs"""
    packages = tmp_path / "packages"
    wanted = ["ipykernel==6.29.5", "ipywidgets==7.7.1", "ipython_genutils"]
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--target", str(packages)]
    if subprocess.run([*pip, *wanted]).returncode:
        pytest.skip("pip cannot fetch these versions")
    kernel = Kernel(tmp_path, [packages])
    try:
        assert kernel.run("__import__('ipykernel').__version__, __import__('ipywidgets').__version__") == "('6.29.5', '7.7.1')"
        assert "pause, busy" not in whole_flow(kernel, tmp_path)
    finally:
        kernel.close()
        shutil.rmtree(packages, ignore_errors=True)


def test_last_words_of_a_kernel(kernel, tmp_path):
    """A kernel that is shut down in an orderly way says so in the panel, and its buttons are dead"""
    open_panel(kernel, tmp_path)
    kernel.click("Start")
    kernel.until(lambda: ">training<" in kernel.markup(), "badge 'training'")
    kernel.manager.request_shutdown()
    kernel.until(lambda: "The kernel has ended" in kernel.markup(), "last words")
    kernel.until(lambda: all(s["disabled"] for s in kernel.models.values() if s.get("tooltip") == "The kernel has ended."), "dead buttons")


UPDATES = """
import gc, torch
from unet_nbtrain import TrainerPanel, UNet, demo_dataloaders
loaders = demo_dataloaders(n_train=8, n_val=4, size=64, batch_size=4)
panel = TrainerPanel(UNet(3, 1, width=8, depth=2), loaders, num_epochs=3, device="cpu", run_dir={run!r})
panel.trainer.train(3)

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

panel.show()
panel._pump.close(); panel._pump.thread.join()

def paint(count):
    for i in range(count):
        panel._watcher.trace.add(0.001 * (i % 900), torch.tensor(0.5 + 0.1 * (i % 7)))
        panel._paint(i % 2 == 0)

panel._watcher.trace.limit = 200
paint({warm})
before = resident()
paint({count})
grown, picture = resident() - before, len(panel._widgets.picture.value)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_updates_do_not_pile_up(kernel, tmp_path):
    """5,000 updates with PANEL_UPDATES=5000; CI does fewer. One picture stays below 60 kB, an update is one message"""
    count = int(os.environ.get("PANEL_UPDATES", "150"))
    kernel.run(UPDATES.format(run=str(tmp_path / "run"), warm=max(60, count // 10), count=count), timeout=1200)
    kernel.drain(2)
    painted = count + max(60, count // 10)
    assert min(painted, 500) / 4 < kernel.updates <= 1.1 * painted + 60, kernel.updates  # The first painting fills everything
    assert float(kernel.run("grown")) < 5
    assert int(kernel.run("picture")) < 60_000
    assert kernel.run("'matplotlib.pyplot' in __import__('sys').modules and __import__('matplotlib.pyplot').pyplot.get_fignums()") in ("False", "[]")
