"""Other libraries for training, each doing the work of `loops.raw`: a module for each, with a function `fit(work)`.

Their bars, loggers and files are off, and their numbers are gathered by the same lean `Counts` as in the raw loop, which favours them.
The optimizer is PyTorch's AdamW as it comes, but for Keras, which takes only its own.
"""

import importlib
import logging
import os
import warnings
from functools import cache

import torch

PACKAGES = {
    "lightning": "lightning", "ignite": "pytorch-ignite", "fastai": "fastai", "accelerate": "accelerate", "monai": "monai",
    "keras": "keras", "skorch": "skorch", "poutyne": "poutyne", "hf_trainer": "transformers",
}

_kept = []  # Operators live as long as the library object that declares them


@cache
def load(name):
    "The function `fit` of a peer; raises whatever its import raises"
    os.environ |= {"KERAS_BACKEND": "torch", "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    _mend_torchvision()
    module = importlib.import_module(f"{__name__}.{name}")
    for logger in ("lightning.pytorch", "ignite", "transformers"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return module.fit


def late(name):
    "A peer that is imported when it first takes part, so that an import that fails is that peer's failure alone"
    return lambda work: load(name)(work)


def _mend_torchvision():
    """Let torchvision be imported beside a PyTorch for which it was not built, by naming the two operators that it looks for.

    fastai imports it; nothing of it is used here.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
