"""Image files for tests."""

import numpy as np
from PIL import Image


def save(path, array, **options):
    "Write an array or a Pillow image as a file"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".npy":
        np.save(path, array)
    else:
        (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path
