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

from .panel_tools import Kernel, opened, table, verdict, write

LOADS = {"launch-bound": (4, 32, 2, 100), "convolution-bound": (16, 96, 4, 6)}  # Width, pixels, batch, steps of a stretch
MEASURE = """
import json, time, torch
from unet_nbtrain import TrainerPanel, UNet
from unet_nbtrain.trainer import UNetTrainer
torch.set_num_threads(1)

class Switch:
    "In the place of what the panel's thread calls to paint; turned off, the panel hears nothing and paints nothing"
    def __init__(self, pump, trainer):
        self.pump, self.trainer, self.painter, self.on, self.rest = pump, trainer, pump.painter, True, 0.0
        pump.painter = self
    def __call__(self, with_picture):
        if self.on:
            self.painter(with_picture)
    def alive(self):
        return self.on and self.painter.alive()
    def busy(self):
        return self.on and self.painter.busy()
    def turn(self, on):
        if on == self.on:
            return
        self.on = on
        if on:
            self.trainer.observers.add(self.pump.watcher)
            self.pump.pictures.postpone(self.rest)
            self.pump.watcher.bell.set()  # It sleeps while nothing is to be done
        else:
            self.trainer.observers.remove(self.pump.watcher)
            self.rest = self.pump.pictures.rest

class Stretches:
    def __init__(self, order, steps, switch):
        self.order, self.steps, self.switch, self.took = order, steps, switch, []
    def _look(self):
        with open("/proc/thread-self/schedstat") as file:
            computed, ready, _ = map(int, file.read().split())
        with open(f"/proc/self/task/{self.switch.pump.thread.native_id}/schedstat") as file:
            panel = int(file.read().split()[0])
        return time.monotonic_ns(), computed, ready, panel
    def on_batch_end(self, trainer, loss):
        if trainer.phase == "train" and trainer.batch % self.steps == 1:
            if trainer.batch > 1:
                self.took.append([b - a for a, b in zip(self.begun, self._look())])
            if len(self.took) < len(self.order):
                self.switch.turn(self.order[len(self.took)])
            self.begun = self._look()

def measure(width, pixels, size, steps, order, name):
    torch.manual_seed(0)
    images = [torch.rand(size, 3, pixels, pixels) for _ in range(20)]
    count = steps * len(order) + 2
    train = [(x, (x[:, :1] > 0.5).float()) for x in (images * (1 + count // 20))[:count]]
    trainer = UNetTrainer(UNet(3, 1, width=width, depth=2), train, train[:2], device="cpu", run_dir=f"runs/{name}")
    panel = TrainerPanel(trainer=trainer, num_epochs=1)
    panel.show()
    stretches = Stretches(order, steps, Switch(panel._pump, trainer))
    trainer.observers.add(stretches)
    panel.start().wait()
    panel._pump.close()
    return [dict(zip(("wall", "computed", "ready", "panel"), (number / 1e9 for number in one))) for one in stretches.took]
"""


def in_notebook(call):
    """The result of a call of `measure`, in a notebook that a browser looks at"""
    with opened([MEASURE, f"found = {call}", "print(json.dumps(found))"]) as lab:
        lab.run_cell(0)
        lab.cell(1).scroll_into_view_if_needed()
        lab.run_cell(1)
        return json.loads(lab.output(2))


def in_kernel(call):
    """The same in a kernel whose messages nobody paints"""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        kernel = Kernel(home)
        try:
            kernel.run(MEASURE)
            return json.loads(kernel.run(f"json.dumps({call})", timeout=600)[1:-1])
        finally:
            kernel.close()


def measure(place, load, pairs):
    """A line of the table; the first pair warms up"""
    width, pixels, size, steps = LOADS[load]
    order = [shown for pair in range(pairs + 1) for shown in ((True, False) if pair % 2 else (False, True))]
    found = list(zip(order, place(f"measure({width}, {pixels}, {size}, {steps}, {order}, '{load}')")))[2:]
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
