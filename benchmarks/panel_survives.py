"""How soon the panel is back after a reload, in JupyterLab and Notebook 7, and what axe-core finds in each of its tabs.

    python -m benchmarks.panel_survives [--reloads 5]

Each reload comes in the middle of a training. *Connected* is when the page has drawn the notebook and reached the kernel, which is the work of the
front end; *back* is when the panel shows its curves and all epochs so far, and its buttons answer. axe-core comes from npm and looks at the panel in
each tab, light and dark; without npm that part is left out. About two minutes. What else the panel survives is tested in tests/test_browser.py.
"""

import argparse
import re
import statistics
import time
from collections import Counter

from .panel_tools import begin, faults, npm_file, opened, setup, table, verdict, write

WHOLE = """() => {
  const panel = document.querySelector('.unt-panel');
  return panel?.querySelector('img.unt-plot')?.naturalWidth > 800 && /\\d+ of \\d+ done/.test(panel.textContent);
}"""


def epochs(lab):
    return int(re.search(r"(\d+) of \d+ done", lab.panel().inner_text())[1])


def reloaded(lab):
    """Seconds from the reload to the connection, from there to the panel, and to the effect of a click"""
    before = epochs(lab)
    lab.save()
    began = time.monotonic()
    lab.page.reload()
    lab.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
    lab.wait_until_ready()
    connected = time.monotonic()
    lab.page.wait_for_function(WHOLE, timeout=60_000)
    back = time.monotonic()
    assert epochs(lab) >= before, (epochs(lab), before)
    for text, badges in (("Pause", ("paused",)), ("Resume", ("training", "validating"))):
        lab.button(text).click()
        lab.until(lambda badges=badges: lab.badge() in badges, f"badge {badges}")
    return connected - began, back - connected, back - began


def reloads(app, count):
    """A line of the table"""
    with opened([setup(images=24, size=64, width=8)], app) as lab:
        begin(lab)
        lab.until(lambda: epochs(lab) >= 2, "second epoch", 60)
        found = [reloaded(lab) for _ in range(count)]
    connected, more, whole = (statistics.median(column) for column in zip(*found))
    name = {"lab": "JupyterLab", "notebook": "Notebook 7"}[app]
    return [name, count, f"{connected:.1f} s", f"{more:.2f} s", f"{max(row[1] for row in found):.2f} s", f"{whole:.1f} s", verdict(more < 3)], more < 3


def accessibility():
    """A line for each tab, and whether no serious fault was found; nothing without npm"""
    axe = npm_file("axe-core@4", "axe.min.js")
    if axe is None:
        return None
    lines, good = [], True
    with opened([setup(images=24, size=64, width=8)]) as lab:
        begin(lab)
        lab.until(lambda: epochs(lab) >= 2, "second epoch", 60)
        lab.button("Pause").click()
        lab.until(lambda: lab.badge() == "paused", "badge 'paused'")
        lab.page.evaluate(axe)
        for title in lab.panel().locator(".lm-TabBar-tab").all_inner_texts():
            lab.tab(title)
            cells = []
            for dark in (False, True):
                lab.dark(dark)
                lab.page.wait_for_timeout(500)
                found = Counter(impact for impact, *_ in faults(lab.page))
                good &= not found["serious"] + found["critical"]
                cells.append(", ".join(f"{number} {impact}" for impact, number in found.items()) or "none")
            lines.append([title, *cells])
    return lines, good


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reloads", type=int, default=5)
    arguments = parser.parse_args()
    found = [reloads(app, arguments.reloads) for app in ("lab", "notebook")]
    seen = accessibility()
    heads = ["front end", "reloads", "connected", "panel after that", "slowest", "from the reload", "under 3 s after the connection"]
    parts = ["Medians. The page is reloaded in the middle of a training; the panel has to show its curves and all epochs, and Pause and Resume have to work.", table(heads, [row for row, _ in found])]
    if seen:
        parts += ["## Accessibility", "What axe-core finds in the panel:", table(["tab", "light", "dark"], seen[0])]
    write("panel_survives", "Reloads and accessibility", *parts)
    return 0 if all(met for _, met in found) and (seen is None or seen[1]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
