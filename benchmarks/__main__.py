"""All measurements one after the other, each in a process of its own: `make bench`, or `python -m benchmarks [names …]`.

About an hour on two quiet cores, most of it for the other libraries. The killing of `benchmarks.crash` and the measurements on a
card (`benchmarks.gpu`) are not among them.
"""

import importlib.util
import os
import subprocess
import sys
import time

ORDER = {
    "overhead": ["--peers", "--panel", "60"],  # First, while the machine is cool and nothing has been written
    "throughput": [],
    "growth": [],
    "saving": [],
    "data": [],
    "memory": [],
}


def main(names):
    here = [name for name in ORDER if importlib.util.find_spec(f"benchmarks.{name}")]
    if unknown := set(names) - set(here):
        sys.exit(f"No measurement is called {', '.join(sorted(unknown))}. There are: {', '.join(here)}.")
    failed = []
    for name in names or here:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *ORDER[name]], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        failed += [name] * bool(code)
        print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)
    return f"Failed: {', '.join(failed)}" if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
