"""What 5,000 updates of the panel leave behind: in the kernel, in the browser, on the wire, and in pyplot.

    python -m benchmarks.panel_memory [--updates 5000] [--rate 25]

A training is going on in JupyterLab, and the panel is painted again and again, text and curves in turn as it does by itself, but faster.
What the kernel sends is counted at the browser's end. The first tenth is not counted: it fills caches. About five minutes.
"""

import argparse
import json

from .panel_tools import begin, opened, setup, table, verdict, write

PAINT = """import gc, json, sys, threading
from pathlib import Path
def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6
def resident():
    "The least within two seconds: what a training step allocates comes and goes"
    gc.collect()
    return min((time.sleep(0.05), now())[1] for _ in range(40))
class Many:
    changed, sizes = 0, []
    def go(self, count, rate):
        watcher, widgets = panel._watcher, panel._widgets
        for i in range(count):
            began, before = time.monotonic(), widgets.picture.value
            panel._paint(i % 2 == 0)
            if i % 2 == 0:
                self.sizes.append(len(widgets.picture.value))
                self.changed += widgets.picture.value != before
            time.sleep(max(0, 1 / rate - (time.monotonic() - began)))
        Path(f"painted_{count}").touch()
many = Many()
panel._pump.close(); panel._pump.thread.join()"""
GO = "before, many.changed, many.sizes = resident(), 0, []; threading.Thread(target=many.go, args=({count}, {rate})).start()"
KERNEL = """pyplot = sys.modules.get("matplotlib.pyplot")
print(json.dumps({"grown": resident() - before, "largest": max(many.sizes), "pictures": many.changed, "epochs": len(panel.history), "figures": pyplot.get_fignums() if pyplot else []}))"""


def paint(lab, cell, count):
    """Let the kernel paint so often, and wait for the last of it"""
    lab.run_cell(cell)
    while not (lab.server.root / f"painted_{count}").exists():
        lab.page.wait_for_timeout(200)
    lab.page.wait_for_timeout(1000)


def measure(updates, rate):
    warm = max(50, updates // 10)
    cells = [setup(images=1024, size=64, width=8, epochs=100_000), PAINT, GO.format(count=warm, rate=rate), GO.format(count=updates, rate=rate), KERNEL]
    with opened(cells) as lab:
        begin(lab)
        lab.run_cell(1)
        paint(lab, 2, warm)
        heap, messages, sent = lab.heap(), lab.messages, lab.bytes
        paint(lab, 3, updates)
        messages, sent = lab.messages - messages, lab.bytes - sent
        grown = lab.heap() - heap
        kernel = json.loads(lab.output(4))
    return kernel, grown, messages / updates, sent / updates


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=25, help="updates a second")
    arguments = parser.parse_args()
    kernel, heap, messages, sent = measure(arguments.updates, arguments.rate)
    rows = [
        ["memory of the kernel", f"{kernel['grown']:+.1f} MB", "5 MB", kernel["grown"] < 5],
        ["heap of the page, after the collection of garbage", f"{heap:+.1f} MB", "30 MB", heap < 30],
        ["largest picture", f"{kernel['largest'] / 1000:.1f} kB", "60 kB", kernel["largest"] < 60_000],
        ["bytes an update, everything the browser got", f"{sent / 1000:.1f} kB", "60 kB", sent < 60_000],
        ["messages an update", f"{messages:.2f}", "1.1", messages <= 1.1],
        ["figures open in pyplot", len(kernel["figures"]), "0", not kernel["figures"]],
    ]
    met = all(row[-1] for row in rows)
    about = f"{arguments.updates:,} updates of an open panel in JupyterLab in the middle of a training, {kernel['pictures']:,} of them with new curves. "
    about += f"The messages count everything: also the numbers of the {kernel['epochs']:,} epochs that ended meanwhile, and the still for the saved notebook."
    write("panel_memory", "What updates leave behind", about, table(["what", "measured", "bound", "met"], [[*row[:-1], verdict(row[-1])] for row in rows]))
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
