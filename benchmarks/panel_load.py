"""What an open panel takes from the training: waiting for the interpreter lock, and throughput, in alternating pairs.

    python -m benchmarks.panel_load [--pairs 7] [--without-browser]

The same steps with the panel shown and without it, in a bare kernel and in a notebook that Chromium looks at. Linux's scheduler tells how long
the training thread computed and how long it was ready but had no core (`/proc/thread-self/schedstat`). What is left of the wall time is waiting,
and in a training step without a disk or workers that is the interpreter lock. Between the first and the last batch of one long epoch, so
that no file is written meanwhile. Other programs on the machine disturb the ready time most; *throughput* is therefore given by wall time and
without the ready time. About nine minutes with seven pairs.
"""

import argparse
import json
import statistics
import tempfile

from .panel_tools import Kernel, opened, table, verdict, write

LOADS = {"launch-bound": (4, 32, 2, 900), "convolution-bound": (16, 96, 4, 80)}  # Width, pixels, batch, steps
MEASURE = """
import json, time, torch
from IPython.display import clear_output
from unet_nbtrain import TrainerPanel, UNet
from unet_nbtrain.trainer import UNetTrainer
torch.set_num_threads(1)

class Stretch:
    pump = None
    def _look(self):
        with open("/proc/thread-self/schedstat") as file:
            computed, ready, _ = map(int, file.read().split())
        panel = 0
        if self.pump:
            with open(f"/proc/self/task/{self.pump.native_id}/schedstat") as file:
                panel = int(file.read().split()[0])
        return time.monotonic_ns(), computed, ready, panel
    def on_batch_end(self, trainer, loss):
        if trainer.phase == "train" and trainer.batch == 1:
            self.begun = self._look()
        elif trainer.phase == "train" and trainer.batch == trainer.num_batches:
            self.took = [b - a for a, b in zip(self.begun, self._look())]

def measure(width, pixels, size, steps, show, name):
    torch.manual_seed(0)
    images = [torch.rand(size, 3, pixels, pixels) for _ in range(20)]
    train = [(x, (x[:, :1] > 0.5).float()) for x in (images * (1 + steps // 20))[:steps]]
    stretch = Stretch()
    trainer = UNetTrainer(UNet(3, 1, width=width, depth=2), train, train[:2], device="cpu", run_dir=f"runs/{name}")
    trainer.observers.add(stretch)
    if show:
        panel = TrainerPanel(trainer=trainer, num_epochs=1)
        panel.show()
        stretch.pump = panel._pump.thread
        time.sleep(1)
        panel.start().wait()
        time.sleep(1)
        panel._pump.close()
        clear_output()
    else:
        time.sleep(1)
        trainer.start(1).wait()
    return dict(zip(("wall", "computed", "ready", "panel"), (number / 1e9 for number in stretch.took)))
"""


def in_notebook(calls):
    """The results of calls of `measure`, in a notebook that a browser looks at"""
    with opened([MEASURE, *(f"found = {call}" for call in calls), "print(json.dumps(found))"]) as lab:
        lab.run_cell(0)
        for index in range(len(calls)):
            lab.cell(index + 1).scroll_into_view_if_needed()
            lab.run_cell(index + 1)
            yield json.loads(lab.output(len(calls) + 1))


def in_kernel(calls):
    """The same in a kernel whose messages nobody paints"""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        kernel = Kernel(home)
        try:
            kernel.run(MEASURE)
            for call in calls:
                yield json.loads(kernel.run(f"json.dumps({call})", timeout=600)[1:-1])
        finally:
            kernel.close()


def measure(place, load, pairs):
    """A line of the table"""
    width, pixels, size, steps = LOADS[load]
    order = [shown for pair in range(pairs) for shown in ((True, False) if pair % 2 else (False, True))]
    calls = [f"measure({width}, {pixels}, {size}, {steps}, {shown}, '{load}_{i}')" for i, shown in enumerate(order)]
    found = list(zip(order, place(calls)))
    shares = {shown: [100 * (r["wall"] - r["computed"] - r["ready"]) / r["wall"] for s, r in found if s == shown] for shown in (True, False)}
    walls, works, computed = ([] for _ in range(3))
    for i in range(0, len(found), 2):
        pair = dict(found[i : i + 2])
        walls.append(pair[False]["wall"] / pair[True]["wall"])
        works.append((pair[False]["wall"] - pair[False]["ready"]) / (pair[True]["wall"] - pair[True]["ready"]))
        computed.append(pair[False]["computed"] / pair[True]["computed"])
    waits = {shown: statistics.median(values) for shown, values in shares.items()}
    more, ratio = waits[True] - waits[False], statistics.median(works)
    met = more <= 1 and ratio >= 0.98
    step = 1000 * statistics.median(r["wall"] for s, r in found if not s) / steps
    own = 100 * statistics.median(r["panel"] / r["wall"] for s, r in found if s)
    words = [f"{step:.1f} ms", f"{own:.1f} %", f"{waits[False]:.2f} %", f"{waits[True]:.2f} %", f"{more:+.2f}", ratio_text(walls), ratio_text(works), ratio_text(computed)]
    return [load, {in_kernel: "bare kernel", in_notebook: "JupyterLab"}[place], *words, verdict(met)], met


def ratio_text(values):
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--without-browser", action="store_true")
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=list(LOADS))
    arguments = parser.parse_args()
    places = [in_kernel] if arguments.without_browser else [in_kernel, in_notebook]
    found = [measure(place, load, arguments.pairs) for place in places for load in arguments.loads]
    about = (
        f"{arguments.pairs} alternating pairs. *Waits*: share of the training thread's wall time in which it neither computed nor was ready to, that is, waited for the "
        "interpreter lock; at most 1 more is wanted. *Panel's own work*: processor time of its thread, part of which needs that lock; an upper bound of the waiting on a quiet "
        "machine. *Throughput*: steps a second with the panel, divided by those without it, median [quartiles], by wall time, "
        "by wall time less the time in which other programs had the cores, and by processor time of the thread; the second is to be at least 0.98."
    )
    heads = ["training", "where", "a step", "panel's own work", "waits, no panel", "waits, panel", "more", "throughput, wall", "throughput, less ready time", "processor time", "met"]
    write("panel_load", "What an open panel takes from the training", about, table(heads, [row for row, _ in found]))
    return 0 if all(met for _, met in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
