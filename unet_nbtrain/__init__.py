"""Train U-Nets inside a Jupyter notebook.

The public names come from this package: `from unet_nbtrain import TrainerPanel, UNet, demo_dataloaders`.
Each is loaded when it is first used, so that `import unet_nbtrain` costs nothing and a training script without a
notebook never loads widgets or plots.
"""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module it lives in.
_HOME = {
    "SegmentationMetrics": "metrics",
    "create_loss_function": "losses",
    "UNet": "unet_model",
    "get_augmentation_pipeline": "augmentation",
    "create_dataloaders": "dataset",
    "demo_dataloaders": "dataset",
    "describe_masks": "mask_report",
    "create_optimizer": "optimizers",
    "create_scheduler": "schedulers",
    "History": "history",
    "EarlyStopping": "early_stopping",
    "configure_logging": "run_log",
    "UNetPredictor": "inference",
    "evaluate": "evaluation",
    "UNetTrainer": "trainer",
    "verify_resume": "verify",
    "auto_batch": "batch_size",
    "TrainerPanel": "panel",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name):
    """Import a public name on first use (PEP 562) and keep it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public names: {', '.join(sorted(_HOME))}.")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
