#!/usr/bin/env bash
# Build the wheel, install it into an empty environment and use it there, outside the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

mkdir "$tmp/source"
cp -r settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE unet_nbtrain "$tmp/source"
.venv/bin/python -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir "$tmp/dist" "$tmp/source"
.venv/bin/python -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt "$tmp"/dist/*.whl

cd "$tmp"
venv/bin/python - << 'PY'
from importlib.metadata import distributions

import unet_nbtrain
from unet_nbtrain import TrainerPanel, UNet, UNetTrainer

assert "site-packages" in unet_nbtrain.__file__, unet_nbtrain.__file__
for name in unet_nbtrain.__all__:
    getattr(unet_nbtrain, name)
names = {d.metadata["Name"].lower() for d in distributions()}
development = {"nbdev", "fastcore", "jupyterlab", "pytest", "nbclient", "nbconvert", "playwright", "scikit-learn"} & names
assert not development, f"a user's environment got {development}"
print(f"unet_nbtrain {unet_nbtrain.__version__} works among {len(names)} packages")
PY
venv/bin/unet-nbtrain --help > /dev/null
