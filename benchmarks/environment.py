"""An environment of its own for the other libraries, made once and kept among the user's caches; never the project's."""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

from .cases import tell

ROOT = Path(__file__).parent.parent
WANTED = (ROOT / "benchmarks" / "peers.txt", ROOT / "constraints.txt")


def place():
    "Where the environment for these pins and this Python is, or will be"
    pins = b"".join(path.read_bytes() for path in WANTED) + sys.version.encode()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "unet_nbtrain" / f"peers-{hashlib.sha256(pins).hexdigest()[:12]}"


def python():
    "The interpreter of the environment, which is made if it is not there: some minutes and some gigabytes"
    folder = place()
    found, done = folder / ("Scripts" if os.name == "nt" else "bin") / "python", folder / "complete"
    if not done.exists():
        tell(f"Installing the other libraries into {folder}, once; this takes some minutes.")
        venv.create(folder, with_pip=True, clear=True)
        peers, constraints = map(str, WANTED)
        subprocess.run([found, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", constraints, "torch"], check=True)
        subprocess.run([found, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", constraints, "-r", peers], check=True)
        done.touch()
    return found


def is_here():
    "Whether this interpreter is that of the environment"
    return Path(sys.prefix).resolve() == place().resolve()


def run_again(module, words):
    "Run a module of this repository in the environment; returns its exit code"
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    return subprocess.run([python(), "-m", module, *words], env=os.environ | {"PYTHONPATH": paths}).returncode
