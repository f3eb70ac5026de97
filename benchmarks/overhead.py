"""What a trainer costs beside the raw PyTorch loop: same weights, same batches, same numbers and the same final weights, in turns.

    python -m benchmarks.overhead [--cases conv1 tiny small] [--pairs 8] [--only raw_again ours …] [--peers | --peers lightning …]
                                  [--clip 1.0] [--panel 60] [--out benchmarks/results/overhead.md]

benchmarks/README.md says how to read the tables. With `--peers` it runs in an environment of its own, made at first use.
"""

import argparse
import math
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import environment, loops, peers
from .apart import Apart
from .cases import CASES, NAMES, describe, one_thread, tell
from .pairs import is_void, spread, take_turns
from .tables import RESULTS, circumstances, sentence, table, write

BASES = ("raw", "raw_fused")
OURS = {
    "raw_again": loops.raw, "raw_fused": loops.raw_fused, "raw_saving": loops.raw_saving, "raw_usual": loops.raw_usual,
    "ours": loops.ours, "ours_bar": loops.ours_bar, "ours_loop": loops.ours_loop,
}
FUSED = {"raw_fused", "raw_saving", "ours", "ours_bar"}  # Who had the fused AdamW; the others had the loop, which is PyTorch's default on a CPU
DEFAULTS = {  # What one gets who does not choose an optimizer; the others want to be given one
    "ours": "this", "ours_bar": "this", "keras": "RMSprop", "fastai": "its own Adam", "skorch": "SGD", "hf_trainer": "AdamW, fused",
}
BY_DESIGN = {"raw_usual": "means over batches, not the epoch's", "keras": "its epsilon stands in another place"}
AGREE = 1e-5  # Numbers and weights of equal work may differ by so much


# What a fit costs


def epoch_step(fit, clock="cpu"):
    "Microseconds a step in the median steady epoch, with all that is done once an epoch"
    return statistics.median(fit.epochs(clock)) / fit.case.steps * 1e6


def each_epoch_step(fit):
    "The same for each steady epoch"
    return [seconds / fit.case.steps * 1e6 for seconds in fit.epochs("cpu")]


def mean_step(fit, clock="cpu"):
    "Microseconds a step over all steady epochs, with what happens now and then"
    return statistics.fmean(fit.epochs(clock)) / fit.case.steps * 1e6


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
    "The same for all fits of a contestant against the raw loop beside it that has the same optimizer"
    base = pairs.bases["raw_fused" if pairs.name in FUSED else "raw"]
    found = [apart(fit, near[0]) for fit, near in zip(pairs.fits, base)]
    return tuple(max(column) for column in zip(*found))


def verdict(name, difference):
    "A difference in a table, with a word where it is too large"
    text = f"{difference:.0e}"
    return text if difference <= AGREE else f"{text}: {BY_DESIGN.get(name, '**not the same work**')}"


# The tables


def optimizer_of(name):
    "What a contestant had, and in brackets what it has by default, where it has one"
    had = "AdamW of Keras" if name == "keras" else "AdamW, fused" if name in FUSED else "AdamW, loop"
    return f"{had} (default: {DEFAULTS[name]})" if name in DEFAULTS else had


def costs_of(pairs):
    "A line of the first table"
    step, loop = epoch_step, loop_step
    return [
        spread(pairs.ratios("raw", step), "{:.3f}"), spread(pairs.ratios("raw_fused", step), "{:.3f}"),
        spread(pairs.differences("raw", step), "{:.0f}"), spread(pairs.differences("raw_fused", step), "{:.0f}"),
        spread(pairs.differences("raw_fused", loop), "{:.0f}"),
    ]


def rest_of(pairs):
    "A line of the second table"
    numbers, weights = (verdict(pairs.name, o) for o in unequal(pairs))
    wall = spread(pairs.ratios("raw", partial(epoch_step, clock="wall")), "{:.3f}")
    best = f"{pairs.best('raw', each_epoch_step):.3f}"
    return [optimizer_of(pairs.name), wall, best, f"{statistics.median(pairs.differences('raw', once)):.0f}", numbers, weights]


COSTS = (
    "trainer", "CPU over raw", "CPU over raw_fused", "us/step more than raw", "us/step more than raw_fused", "of that within the epoch",
)
REST = ("trainer", "optimizer", "wall over raw", "best epochs over raw", "ms once a fit more than raw", "numbers differ by", "weights differ by")


def report(case, results):
    "Heading, circumstances and tables of a case"
    live = sorted((o for o in results.values() if o.fits), key=lambda o: statistics.median(o.ratios("raw", epoch_step)))
    if not live:
        raise SystemExit("Nobody came to the end: " + "; ".join(f"{name}: {o.error}" for name, o in results.items()))
    bases = [near for o in live for near in o.bases["raw"]]
    step = statistics.median(epoch_step(fit) for near in bases for fit in near)
    busy = statistics.median(fit.total("wall") / fit.total("cpu") for near in bases for fit in near)
    lines = [sentence(describe(case)), f"The raw loop takes {step:.0f} us a step; its wall time is {busy:.2f} of its CPU time."]
    if results.get("raw_again") in live:
        again = statistics.median(results["raw_again"].differences("raw", epoch_step))
        lines.append(f"It differs from itself by {again:+.1f} us a step: " + ("**this run is void**." if is_void(again, step) else "the run stands."))
    lines.append(f"{min(len(o.fits) for o in live)} pairs a line.")
    lines += [f"{name} did not run: {o.error[:200]}" for name, o in results.items() if o.error]
    return "\n\n".join([
        f"## {case.name}", " ".join(lines), table(COSTS, [[o.name, *costs_of(o)] for o in live]),
        f"### {case.name}: circumstances", table(REST, [[o.name, *rest_of(o)] for o in live]),
    ])


def find(name):
    "A contestant by its name"
    return {**OURS, "raw": loops.raw, "ours_panel": loops.ours_panel, "ours_turned": loops.ours_turned}.get(name) or peers.late(name)


def turns(case, names, bases, rounds):
    "`take_turns` with ours in one process and the others in another, new ones for each round"
    with Apart(find, case.name, clip=case.clip) as apart:
        return take_turns({name: name for name in names}, {base: base for base in bases}, apart, rounds, apart.renew)


PANEL = ("trainer", "CPU over ours", "wall over ours", "us/step more than ours", "CPU over ours, pair by pair")


def neighbours(fit, clock):
    """Stretches of a fit beside each other, in seconds, by the name of their line: (still, at work) and (still, still).

    They come as still, at work, at work, still; the first fifth is left out, in which a panel builds its figures.
    """
    took = fit.epochs(clock)
    rounds = list(zip(*[iter(took)] * 4))[len(took) // 20 :]
    at_work = [pair for a, b, c, d in rounds for pair in ((a, b), (d, c))]
    return {"ours_again": [(before[-1], after[0]) for before, after in zip(rounds, rounds[1:])], "ours_panel": at_work}


def panel_row(name, cpu, wall, steps):
    "A line of the panel's table, from pairs of stretches of so many steps: the first of a pair is the base"
    ratio, by_wall = (sum(b for _, b in pairs) / sum(a for a, _ in pairs) for pairs in (cpu, wall))
    more = statistics.fmean(b - a for a, b in cpu) / steps * 1e6
    return [name, f"{ratio:.3f}", f"{by_wall:.3f}", f"{more:.1f}", spread([b / a for a, b in cpu], "{:.3f}")]


def alone(case, name, **changes):
    "A fit in a new process"
    with Apart(find, case.name, clip=case.clip, **changes) as apart:
        return apart(name)


def panel_report(case, seconds, rounds):
    "The open panel against the same one that holds still, by turns within one training"
    epoch = statistics.median(alone(case, "ours").epochs("wall"))
    length = max(math.ceil(seconds / epoch / loops.STRETCHES), 1)
    fits = [alone(case, "ours_turned", epochs=length * (loops.STRETCHES + 1)) for _ in range(rounds)]
    pairs = {name: [[pair for fit in fits for pair in neighbours(fit, clock)[name]] for clock in ("cpu", "wall")] for name in ("ours_again", "ours_panel")}
    steps = length * case.steps
    rows = [panel_row(name, cpu, wall, steps) for name, (cpu, wall) in pairs.items()]
    words = (f"{rounds} trainings of {loops.STRETCHES} stretches of {steps} steps, in which the open panel is at work or holds still; {len(pairs['ours_panel'][0])} pairs of neighbours. "
             "Ratios of what all stretches took; on the right the median of the pairs. `ours_again`: still, beside still.")
    return "\n\n".join([f"### {case.name}: the panel open", words, table(PANEL, rows)])


def measure(case, contestants, rounds, panel):
    "All contestants on one case; gives its parts of the file"
    tell(describe(case))
    yield report(case, turns(case, contestants, BASES, rounds))
    if panel:
        tell("with the panel open")
        yield panel_report(case, panel, max(rounds // 4, 1))


def arguments_of(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--only", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--peers", nargs="*", choices=peers.PACKAGES, help="other libraries; without names, all")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--clip", type=float, help="clip everybody's gradients to this norm; default not at all, as is ours")
    parser.add_argument("--panel", type=float, default=0, metavar="SECONDS", help="also measure the open panel, in trainings of so many seconds")
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.md")
    arguments = parser.parse_args(words)
    arguments.peers = list(peers.PACKAGES) if arguments.peers == [] else arguments.peers or []
    return arguments


def main(words=None):
    arguments = arguments_of(words)
    if arguments.peers and not environment.is_here():
        return environment.run_again("benchmarks.overhead", sys.argv[1:] if words is None else words)
    one_thread()
    contestants = [*arguments.only, *arguments.peers]
    cases = [replace(CASES[name], clip=arguments.clip) for name in arguments.cases]
    parts = []
    for part in (part for case in cases for part in measure(case, contestants, arguments.pairs, arguments.panel)):
        parts.append(part)  # Written after each, so that a run that is broken off has not been for nothing
        text = write(arguments.out, "Trainers beside the raw loop", circumstances(peers.PACKAGES[name] for name in arguments.peers), *parts)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
