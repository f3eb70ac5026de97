"""What a trainer costs beside the raw loop, in instructions instead of time: a figure that no neighbour on the machine can move.

    python -m benchmarks.instructions [--cases tiny] [--only raw ours …] [--peers | --peers ignite …] [--out benchmarks/results/instructions.md]

Needs valgrind (Linux; `apt install valgrind`). benchmarks/README.md says what such a figure is worth.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import environment, peers
from .cases import CASES, describe, fit, one_thread, tell
from .overhead import BASES, OURS, find
from .tables import RESULTS, circumstances, sentence, table, write

SLOWER = 60  # So many times as long takes a fit that is counted; every clock that Python shows goes slower by as much
EPOCHS = (3, 6)  # Of two fits, whose difference is steady epochs alone
VALGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")
COLUMNS = ("trainer", "thousand instructions a step", "over raw", "over raw_fused", "thousand more than raw_fused")


def slow_clocks():
    "What is throttled by time, such as a bar or a file, must get its usual share of a fit that is counted"

    def slowed(clock):
        start = clock()
        return lambda: start + (clock() - start) / SLOWER

    for name in ("monotonic", "perf_counter", "process_time", "thread_time", "time"):
        setattr(time, name, slowed(getattr(time, name)))


def count(case, name, epochs, python):
    "Instructions of a process that makes one fit"
    words = [*VALGRIND, str(python), "-m", "benchmarks.instructions", "--count", name, "--cases", case, "--epochs", str(epochs)]
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(environment.ROOT)])
    settings = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONPATH": paths}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | settings)
    found = re.search(r"I +refs: +([\d,]+)", done.stderr)
    if done.returncode or not found:
        raise RuntimeError(f"{name}, {epochs} epochs of {case}: {done.stderr.strip()[-500:]}")
    tell(f"  {name}, {epochs} epochs: {found[1]}")
    return int(found[1].replace(",", ""))


def per_step(case, names, python):
    "Thousands of instructions a step in steady epochs, by name; two processes count at a time"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {name: [pool.submit(count, case, name, epochs, python) for epochs in EPOCHS] for name in names}
        steps = (EPOCHS[1] - EPOCHS[0]) * CASES[case].steps
        return {name: (long.result() - short.result()) / steps / 1e3 for name, (short, long) in found.items()}


def report(case, costs):
    "Heading and table of a case"
    raw, fused = (costs[base] for base in BASES)
    rows = [[name, f"{o:.1f}", f"{o / raw:.3f}", f"{o / fused:.3f}", f"{o - fused:+.1f}"] for name, o in sorted(costs.items(), key=lambda item: item[1])]
    return "\n\n".join([f"## {case}", sentence(describe(CASES[case])), table(COLUMNS, rows)])


def arguments_of(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["conv1", "tiny"])
    parser.add_argument("--only", nargs="+", choices=OURS, default=["raw_saving", "ours_bar", "ours"])
    parser.add_argument("--peers", nargs="*", choices=peers.PACKAGES, help="other libraries; without names, all")
    parser.add_argument("--out", type=Path, default=RESULTS / "instructions.md")
    parser.add_argument("--count", help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words=None):
    arguments = arguments_of(words)
    if arguments.count:
        slow_clocks()
        one_thread()
        return not fit(find(arguments.count), CASES[arguments.cases[0]], epochs=arguments.epochs).rows
    others = list(peers.PACKAGES) if arguments.peers == [] else arguments.peers or []
    python = environment.python() if others else sys.executable
    parts = []
    for case in arguments.cases:
        tell(describe(CASES[case]))
        names = dict.fromkeys([*BASES, *arguments.only, *others])
        parts.append(report(case, per_step(case, names, python)))
        text = write(arguments.out, "Instructions beside the raw loop", circumstances(peers.PACKAGES[name] for name in others), *parts)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
