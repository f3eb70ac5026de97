#!/usr/bin/env bash
# nbdev 3 exports and cleans the very same bytes as the pinned nbdev 2. It needs an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

.venv/bin/python -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install -qq --disable-pip-version-check 'nbdev>=3.3.26,<4'
mkdir "$tmp/was" "$tmp/now"
cp -r settings.ini pyproject.toml nbs unet_nbtrain "$tmp/was"
rm -rf "$tmp"/was/*/__pycache__ "$tmp/was/nbs/runs" "$tmp/was/nbs/.ipynb_checkpoints"
cp -r "$tmp/was/." "$tmp/now"
(cd "$tmp/now" && PATH="$tmp/venv/bin:$PATH" && nbdev-export && nbdev-clean)
cd "$tmp"
diff -r --brief --exclude=__pycache__ was now || { diff -ru --exclude=__pycache__ was now | cut -c -160 | head -60; exit 1; }
"$tmp/venv/bin/python" -m pip list --format=freeze 2> /dev/null | grep '^nbdev='
