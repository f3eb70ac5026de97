"""Where there are no widgets, no IPython, or Colab's own front end, the same cells run: with a bar and a picture, without an error."""

import subprocess
import sys

import pytest
from comms import Kernel

PANEL = """
import torch
from unet_nbtrain import TrainerPanel, UNet, demo_dataloaders
torch.set_num_threads(1)
loaders = demo_dataloaders(n_train=8, n_val=4, size=32, batch_size=2)
panel = TrainerPanel(UNet(3, 1, width=4, depth=2), loaders, num_epochs=2, device="cpu", run_dir={run!r})
panel.show()
"""
MISSING = "import sys\nsys.modules['ipywidgets'] = None\n"
COLAB = """
import sys, types
asked = []
output = types.ModuleType("google.colab.output")
output.enable_custom_widget_manager = lambda: asked.append(1)
sys.modules |= {"google": types.ModuleType("google"), "google.colab": types.ModuleType("google.colab"), "google.colab.output": output}
"""


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()


def test_a_script_without_widgets_and_without_a_notebook(tmp_path):
    """Neither ipywidgets nor IPython: the epochs are told on the screen, the curves are a file"""
    code = MISSING + "sys.modules['IPython'] = None\n" + PANEL.format(run=str(tmp_path / "run"))
    code += "panel.start(); panel.wait(); print(panel.history.summary()); panel.show(); panel.report()\n"
    code += "print(panel.controls['primary'].description, 'ipywidgets' in [name for name, module in sys.modules.items() if module])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 epochs" in done.stdout and "False" in done.stdout and "Traceback" not in done.stderr
    assert "epoch 2/2" in done.stderr
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000 and (tmp_path / "run" / "report.html").is_file()


def test_a_notebook_without_widgets(kernel, tmp_path):
    """A bar, and the curves with the table, which follow the training; show() again gives another view"""
    kernel.run(MISSING + PANEL.format(run=str(tmp_path / "run")))
    kernel.until(lambda: any("unt-still" in data.get("text/html", "") for _, data in kernel.displays), "a still")
    assert any("panel.start()" in data.get("text/plain", "") for _, data in kernel.displays)
    assert not any("application/vnd.jupyter.widget-view+json" in data for _, data in kernel.displays)
    kernel.run("panel.start().wait(60)")
    kernel.until(lambda: any("2 of 2 epochs done" in data.get("text/plain", "") for kind, data in kernel.displays if kind == "update_display_data"), "end")
    last = [data["text/html"] for kind, data in kernel.displays if "unt-still" in data.get("text/html", "")][-1]
    assert "data:image/png" in last and last.count("<tr") == 3
    assert any("batch" in data.get("text/plain", "") for kind, data in kernel.displays if "text/html" not in data)
    kernel.run("panel.show()")
    assert kernel.run("panel.set('lr', 1e-4).ok") == "True"


def test_colab_is_asked_for_newer_widgets_and_gets_updates(kernel, tmp_path):
    kernel.run(COLAB + PANEL.format(run=str(tmp_path / "run")))
    assert kernel.run("len(asked) == (int(__import__('ipywidgets').__version__[0]) >= 8)") == "True"
    kernel.until(lambda: any("application/vnd.jupyter.widget-view+json" in data for _, data in kernel.displays), "the panel")
    kernel.click("Start")
    kernel.until(lambda: ">finished<" in kernel.markup(), "badge 'finished'", 60)
    assert "2 of 2 done" in kernel.markup()
