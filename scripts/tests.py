"""Run all tests: the notebooks, the commands and the benchmarks beside everything else, and then, alone on the machine, those with a kernel or a browser.

    python scripts/tests.py

One process would take half as long again. The exit code is 0 if all tests passed.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BESIDE, ALONE = ["tests/test_nbs.py", "tests/test_cli.py", "tests/test_benchmarks.py"], ["tests/test_kernel.py", "tests/test_browser.py"]
REST = ["tests", *(f"--ignore={name}" for name in BESIDE + ALONE)]


def start(files, output=None):
    """pytest on these files; those that run beside others get one thread for PyTorch, and are not asked for browser tests."""
    environment = os.environ | ({"OMP_NUM_THREADS": "1", "REQUIRE_BROWSER": "0"} if files != ALONE else {})
    return subprocess.Popen([sys.executable, "-m", "pytest", *files], cwd=ROOT, env=environment, stdout=output, stderr=output)


def main():
    with tempfile.TemporaryFile() as kept:
        beside = start(BESIDE, kept)
        try:
            codes = [start(REST).wait(), beside.wait()]
        finally:
            beside.kill()
        kept.seek(0)
        sys.stdout.write(kept.read().decode(errors="replace"))
        sys.stdout.flush()
    codes.append(start(ALONE).wait())
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
