"""The number of a notebook is the import order: a module knows only lower numbers, and only the libraries its room allows.

Two rooms may share a number; then neither knows the other.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from nbtools import PACKAGE, ROOT, notebooks

import unet_nbtrain

ORDER = {nb.default_exp: nb.order for nb in notebooks(module_only=True)}
NOT_A_ROOM = {"__init__", "__main__", "_modidx"}

# What a room may import beside the standard library and lower rooms. A room that is not listed may use torch and numpy.
ALLOWED = {
    "text": set(),
    "file_names": set(),
    "pairing": set(),
    "raster": {"numpy", "PIL"},
    "colors": {"numpy"},
    "image_files": {"numpy"},
    "mask_picture": {"numpy", "PIL"},
    "mask_summary": {"torch"},
    "transforms": {"torch", "numpy", "PIL"},
    "stored_pairs": {"torch", "numpy", "PIL"},
    "disk": set(),
    "records": set(),
    "pace": set(),
    "history": set(),
    "control": set(),
    "settings": set(),
    "run_log": {"torch", "numpy"},
    "event_files": {"google_crc32c", "tensorboard"},
    "tensorboard_logger": {"torch", "numpy", "tensorboard"},
    "loggers": {"torch", "numpy", "tqdm"},
    "figures": {"matplotlib"},
    "curves": {"numpy", "matplotlib"},
    "inference": {"torch", "numpy", "PIL"},
    "plots": {"torch", "numpy", "PIL", "matplotlib"},
    "widgets": {"ipywidgets", "IPython", "traitlets"},
    "controls": set(),
    "predictions": {"numpy", "PIL"},
    "tabs": set(),
    "report": {"torch", "numpy", "matplotlib"},
    "settings_form": set(),
    "view": set(),
    "watcher": {"torch", "numpy"},
    "display": {"PIL"},
    "panel": {"torch"},
}


def imported(source, package="unet_nbtrain"):
    """Every dotted name that a module of `package` imports, at any depth; relative imports are made absolute."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            if base in (package, "torch.utils"):
                found |= {f"{base}.{alias.name}" for alias in node.names}
            else:
                found.add(base)
    return found


def wrong_rooms(name, source, order):
    """The own modules that `name` imports although they do not come before it."""
    own = {o.split(".")[1] for o in imported(source) if o.startswith("unet_nbtrain.")}
    return sorted(room for room in own if order.get(room, 1000) >= order[name])


def wrong_libraries(name, source):
    """The libraries that `name` imports although its room does not allow them."""
    allowed = ALLOWED.get(name, {"torch", "numpy"})
    found = {"tensorboard" if o.startswith("torch.utils.tensorboard") else o.split(".")[0] for o in imported(source)}
    return sorted(found - allowed - set(sys.stdlib_module_names) - {"unet_nbtrain"})


def modules():
    return [path for path in sorted(PACKAGE.glob("*.py")) if path.stem not in NOT_A_ROOM]


def test_every_module_has_its_notebook():
    """A renamed `default_exp` leaves the old module in place: nbdev does not delete it."""
    assert {path.stem for path in modules()} == set(ORDER)


def test_file_names_tell_the_module_and_its_number():
    for nb in notebooks(module_only=True):
        assert nb.path.stem == f"{nb.order:02d}_{nb.default_exp}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_module_imports_only_lower_numbers(path):
    wrong = wrong_rooms(path.stem, path.read_text(encoding="utf-8"), ORDER)
    assert not wrong, f"{path.name} (number {ORDER[path.stem]}) imports {wrong}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_a_module_imports_only_what_its_room_allows(path):
    wrong = wrong_libraries(path.stem, path.read_text(encoding="utf-8"))
    assert not wrong, f"{path.name} imports {wrong}"


def test_the_rules_can_fail():
    order = {"core": 0, "losses": 2, "trainer": 15}
    assert wrong_rooms("losses", "from .trainer import UNetTrainer", order) == ["trainer"]
    assert wrong_rooms("losses", "def f():\n    import unet_nbtrain.trainer", order) == ["trainer"]
    assert wrong_rooms("losses", "from . import losses, trainer", order) == ["losses", "trainer"]
    assert wrong_rooms("losses", "from unet_nbtrain.nowhere import x", order) == ["nowhere"]
    assert wrong_rooms("losses", "from unet_nbtrain import UNet", order) == ["UNet"]
    assert wrong_rooms("trainer", "from .core import move\nimport torch", order) == []
    assert wrong_libraries("trainer", "import os, torch\nfrom matplotlib.figure import Figure") == ["matplotlib"]
    assert wrong_libraries("trainer", "def f():\n    from torch.utils.tensorboard import SummaryWriter") == ["tensorboard"]
    assert wrong_libraries("trainer", "from torch.utils import tensorboard") == ["tensorboard"]
    assert wrong_libraries("history", "import torch.nn, json") == ["torch"]
    assert wrong_libraries("control", "import numpy as np, threading") == ["numpy"]
    assert wrong_libraries("core", "from fastcore.all import *\nimport nbdev.export") == ["fastcore", "nbdev"]
    assert wrong_libraries("display", "import ipywidgets") == ["ipywidgets"]
    assert wrong_libraries("widgets", "import ipywidgets\nfrom IPython.display import display") == []


def loaded_after(code):
    """Which of the heavy libraries a fresh interpreter has loaded after `code`, run outside the repository."""
    heavy = ["matplotlib", "ipywidgets", "tensorboard", "IPython", "torch", "nbdev", "fastcore", "pandas", "scipy", "cv2", "sklearn"]
    code = f"import sys; {code}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(ROOT.anchor), timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after("import unet_nbtrain") == set()


def test_a_training_without_a_notebook_loads_torch_and_no_other_library_of_size():
    """Also not those that somebody has installed beside it, such as pandas, SciPy or OpenCV."""
    assert loaded_after("from unet_nbtrain import UNetTrainer, UNet, create_dataloaders, create_optimizer") <= {"torch"}


def test_the_import_loads_no_module_of_the_package():
    """Half a millisecond beyond torch, therefore: a module comes with the first of its names that is used."""
    code = "import sys, torch; before = set(sys.modules); import unet_nbtrain; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(ROOT.anchor), timeout=120)
    assert done.stdout.split() == ["unet_nbtrain"], done.stderr


def test_the_rooms_below_the_panel_load_no_plots_and_no_widgets():
    """The trainer and all that it uses: a training without a notebook needs no widgets, and TensorBoard only once it logs."""
    heavy = {room for room, allowed in ALLOWED.items() if allowed & {"matplotlib", "IPython", "ipywidgets"}}
    for path in sorted(modules(), key=lambda path: ORDER[path.stem]):
        own = {name.split(".")[1] for name in imported(path.read_text(encoding="utf-8")) if name.startswith("unet_nbtrain.")}
        heavy |= {path.stem} if own & heavy else set()
    rooms = [f"unet_nbtrain.{room}" for room, order in ORDER.items() if order < ORDER["panel"] and room not in heavy]
    assert loaded_after(f"import {', '.join(rooms)}") <= {"torch"}


def test_the_public_names_are_listed():
    assert {"UNet", "UNetTrainer", "TrainerPanel", "__version__"} <= set(unet_nbtrain.__all__) <= set(dir(unet_nbtrain))


@pytest.mark.parametrize("name", unet_nbtrain._HOME)
def test_a_public_name_resolves(name):
    module = importlib.import_module(f"unet_nbtrain.{unet_nbtrain._HOME[name]}")
    assert getattr(unet_nbtrain, name) is getattr(module, name)
    assert name in module.__all__


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'UNett'.*TrainerPanel.*UNetTrainer"):
        unet_nbtrain.UNett  # noqa: B018
    with pytest.raises(ImportError):
        from unet_nbtrain import Nothing  # noqa: F401
