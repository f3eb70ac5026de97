"""What a trainer costs beside the raw PyTorch loop: same weights, same batches, same numbers and the same final weights, in turns.

    python -m benchmarks.overhead [--cases conv1 tiny small] [--pairs 8] [--only ours ours_panel …] [--peers lightning …]
                                  [--clip 1.0] [--out benchmarks/results/overhead.md]

benchmarks/README.md says how to read the table. With `--peers` it runs in an environment of its own, which it makes at first use.
"""

import argparse
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import loops
from .cases import CASES, NAMES, describe, fit, one_thread, tell
from .pairs import is_void, spread, take_turns
from .tables import RESULTS, environment, table, write

OURS = {"raw_again": loops.raw, "raw_usual": loops.raw_usual, "ours": loops.ours, "ours_loop": loops.ours_loop}
BASES = {"raw": loops.raw, "raw_fused": loops.raw_fused}
OPTIMIZERS = {"raw_fused": "AdamW, fused", "ours": "AdamW, fused"}  # The others have AdamW as PyTorch gives it, a loop over the tensors
AGREE = 1e-5  # Numbers and weights of equal work may differ by so much
HEADS = (
    "trainer", "optimizer", "CPU over raw", "CPU over raw_fused", "wall over raw", "best epochs", "us/step over raw", "us/step over raw_fused",
    "in the loop: us/step over raw_fused", "once a fit: ms", "numbers differ", "weights differ",
)


# What a fit costs


def epoch_step(fit, clock="cpu"):
    "Microseconds a step in the median steady epoch, all that is done once an epoch included"
    return statistics.median(fit.epochs(clock)) / fit.case.steps * 1e6


def epoch_steps(fit):
    "The same for each steady epoch"
    return [seconds / fit.case.steps * 1e6 for seconds in fit.epochs("cpu")]


def loop_step(fit):
    "Microseconds a training step within an epoch, without anything that is done once an epoch"
    return statistics.median(fit.loops("cpu")) / (fit.case.train - 3) * 1e6


def once(fit):
    "Milliseconds of the fit that are in no steady epoch: making the trainer, the first epoch's surplus, the end"
    return (fit.total("cpu") - statistics.median(fit.epochs("cpu")) * fit.case.epochs) * 1e3


# Equal work


def apart(fit, other):
    "Largest difference in loss, Dice, IoU or accuracy of any epoch, and largest difference of a final weight"
    pairs = [(a[phase], b[phase]) for a, b in zip(fit.rows, other.rows, strict=True) for phase in ("train", "val")]
    numbers = max(abs(float(a[name]) - float(b[name])) for a, b in pairs for name in NAMES)
    return numbers, (fit.weights - other.weights).abs().max().item()


def unequal(pairs):
    "The same for all fits of a contestant against the raw loop beside it"
    found = [apart(fit, near[0]) for fit, near in zip(pairs.fits, pairs.bases["raw"])]
    return tuple(max(column) for column in zip(*found))


# The table


def row_of(pairs):
    "A line of the table"
    if pairs.error or not pairs.fits:
        return [pairs.name, f"did not run: {pairs.error}"[:160].replace("|", "/")] + [""] * (len(HEADS) - 2)
    numbers, weights = (f"{o:.0e}" if o <= AGREE else f"**{o:.0e}**" for o in unequal(pairs))
    return [
        pairs.name,
        OPTIMIZERS.get(pairs.name, "AdamW, loop"),
        spread(pairs.ratios("raw", epoch_step), "{:.3f}"),
        spread(pairs.ratios("raw_fused", epoch_step), "{:.3f}"),
        spread(pairs.ratios("raw", partial(epoch_step, clock="wall")), "{:.3f}"),
        f"{pairs.best('raw', epoch_steps):.3f}",
        spread(pairs.differences("raw", epoch_step), "{:.0f}"),
        spread(pairs.differences("raw_fused", epoch_step), "{:.0f}"),
        spread(pairs.differences("raw_fused", loop_step), "{:.0f}"),
        f"{statistics.median(pairs.differences('raw', once)):.0f}",
        numbers,
        weights,
    ]


def report(case, results, rounds):
    "Heading, circumstances and table of a case"
    bases = [near for pairs in results.values() for near in pairs.bases["raw"]]
    step = statistics.median(epoch_step(fit) for near in bases for fit in near)
    busy = statistics.median(fit.total("wall") / fit.total("cpu") for near in bases for fit in near)
    lines = [f"The raw loop takes {step:.0f} us a step; its wall time is {busy:.2f} of its CPU time; {rounds} pairs a line."]
    if "raw_again" in results:
        again = statistics.median(results["raw_again"].differences("raw", epoch_step))
        verdict = "**this run is void**" if is_void(again, step) else "the run stands"
        lines.append(f"The raw loop differs from itself by {again:+.1f} us a step: {verdict}.")
    rows = [row_of(pairs) for pairs in sorted(results.values(), key=lambda o: o.fits and statistics.median(o.ratios("raw", epoch_step)) or 1e9)]
    return "\n\n".join([f"## {case.name}: {describe(case)}", " ".join(lines), table(HEADS, rows)])


def measure(case, contestants, rounds):
    "All contestants on one case; returns its part of the file"
    tell(describe(case))
    results = take_turns(contestants, BASES, lambda contestant: fit(contestant, case), rounds)
    return report(case, results, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", default=["raw_again", "raw_fused", "raw_usual", "ours", "ours_loop"])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--clip", type=float, help="clip the gradients of everybody to this norm; default not at all")
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.md")
    arguments = parser.parse_args()
    one_thread()
    known = OURS | {"raw_fused": loops.raw_fused}
    contestants = {name: known[name] for name in arguments.only}
    cases = [replace(CASES[name], clip=arguments.clip) for name in arguments.cases]
    parts = [measure(case, contestants, arguments.pairs) for case in cases]
    print(write(arguments.out, "Trainers beside the raw loop", environment(), *parts))


if __name__ == "__main__":
    main()
