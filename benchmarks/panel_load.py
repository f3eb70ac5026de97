"""What an open panel takes from the training: waiting for the interpreter lock, and throughput, in alternating stretches of one training.

    python -m benchmarks.panel_load [--pairs 120] [--without-browser] [--loads launch-bound]

The panel is open and works, or it is open and holds still: it hears of nothing and paints nothing. The two take turns every half
second, within one long epoch of the same steps, so that no file is written meanwhile and nothing but the panel differs. The speed of a
shared machine drifts by some percent within ten seconds, by less within one, and hardly within a half. Few stretches have a picture, so
what counts is the sum over all of them. Once in a bare kernel, once in a notebook that Chromium looks at.

Linux's scheduler tells how long the training thread computed and how long it was ready but had no core (`/proc/thread-self/schedstat`).
What is left of the wall time is waiting, and in a training step without a disk or workers that is the interpreter lock. Other programs
on the machine disturb the ready time most; *throughput* is therefore given by wall time and without the ready time. About ten minutes.
"""

import argparse
import json
import statistics
import tempfile

from .panel_tools import ROOT, Kernel, opened, table, verdict, write
from .stretches import alternating

LOADS = {"launch-bound": (4, 32, 2, 100), "convolution-bound": (16, 96, 4, 6)}  # Width, pixels, batch, steps of a stretch
CELL = f"""import json, sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.stretches import in_one_epoch"""


def in_notebook(call):
    """The result of a call of `in_one_epoch`, in a notebook that a browser looks at"""
    with opened([CELL, f"found = {call}", "print(json.dumps(found))"]) as lab:
        lab.run_cell(0)
        lab.cell(1).scroll_into_view_if_needed()
        lab.run_cell(1)
        return json.loads(lab.output(2))


def in_kernel(call):
    """The same in a kernel whose messages nobody paints"""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        kernel = Kernel(home)
        try:
            kernel.run(CELL)
            return json.loads(kernel.run(f"json.dumps({call})", timeout=600)[1:-1])
        finally:
            kernel.close()


def measure(place, load, pairs):
    """A line of the table; the first pair warms up"""
    width, pixels, size, steps = LOADS[load]
    found = list(zip(alternating(pairs + 1), place(f"in_one_epoch({width}, {pixels}, {size}, {steps}, {pairs + 1}, '{load}')")))[2:]
    ratios = [ratio_of(found, cost) for cost in (lambda r: r["wall"], lambda r: r["wall"] - r["ready"], lambda r: r["computed"])]
    waits = {shown: share_of([r for s, r in found if s is shown], lambda r: r["wall"] - r["computed"] - r["ready"]) for shown in (True, False)}
    more, ratio = waits[True] - waits[False], ratios[1][0]
    met = more <= 1 and ratio >= 0.98
    step = 1000 * statistics.median(r["wall"] for s, r in found if not s) / steps
    own = share_of([r for s, r in found if s], lambda r: r["panel"])
    words = [f"{step:.1f} ms", f"{own:.1f} %", f"{waits[False]:.2f} %", f"{waits[True]:.2f} %", f"{more:+.2f}", *(text for _, text in ratios)]
    return [load, {in_kernel: "bare kernel", in_notebook: "JupyterLab"}[place], *words, verdict(met)], met


def share_of(stretches, cost):
    """Percent of the wall time of stretches"""
    return 100 * sum(map(cost, stretches)) / sum(r["wall"] for r in stretches)


def ratio_of(found, cost):
    """What all stretches without the panel cost over what those with it do; as a number, and in words with the quartiles of the pairs"""
    off, on = ([cost(r) for shown, r in found if shown is wanted] for wanted in (False, True))
    pairs = [a / b for a, b in zip(off, on)]
    low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
    return sum(off) / sum(on), f"{sum(off) / sum(on):.3f} [{low:.3f}, {high:.3f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--without-browser", action="store_true")
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=list(LOADS))
    arguments = parser.parse_args()
    places = [in_kernel] if arguments.without_browser else [in_kernel, in_notebook]
    found = [measure(place, load, arguments.pairs) for place in places for load in arguments.loads]
    about = (
        f"{arguments.pairs} alternating pairs of stretches of about half a second, in one training. *Waits*: share of the training thread's wall time in which it neither computed nor was ready to, that is, waited for the "
        "interpreter lock; at most 1 more is wanted. *Panel's own work*: processor time of its thread, part of which needs that lock; an upper bound of the waiting on a quiet "
        "machine. *Throughput*: steps a second with the panel, divided by those while it holds still, over all stretches [quartiles of the pairs], by wall time, "
        "by wall time less the time in which other programs had the cores, and by processor time of the thread; the second is to be at least 0.98."
    )
    heads = ["training", "where", "a step", "panel's own work", "waits, no panel", "waits, panel", "more", "throughput, wall", "throughput, less ready time", "processor time", "met"]
    write("panel_load", "What an open panel takes from the training", about, table(heads, [row for row, _ in found]))
    return 0 if all(met for _, met in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
