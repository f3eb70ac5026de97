"""Ours and the others in processes of their own: what one does to its process (its allocator, its caches, its imports) reaches nobody else."""

import multiprocessing
from contextlib import suppress
from dataclasses import replace

import torch

from .cases import CASES, DEMO, fit, one_thread

_ALL = CASES | {DEMO.name: DEMO}


def _serve(line, find):
    "In the process of a contestant: fits, one after the other, until nothing is asked for any more or nobody is left to ask"
    one_thread()
    with suppress(EOFError, BrokenPipeError):
        while (order := line.recv()) is not None:
            line.send(_answer(find, *order))


def _answer(find, name, case, changes):
    "A fit, or its error in words"
    try:
        done = fit(find(name), replace(_ALL[case], **changes))
        return replace(done, case=None, weights=done.weights.numpy())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Apart:
    """Calls make fits: `apart(name)` is one of that contestant. Ours share one process, all others another; before its first there, each
    warms up with a fit as short as the case has it.

    How fast a process is depends on where its memory happens to lie; `renew` ends both, and the next fits have new ones.
    """

    def __init__(self, find, case, **changes):
        self.find, self.case, self.changes, self.lines, self.warm = find, case, changes, {}, set()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.renew()

    def renew(self):
        for line, process in self.lines.values():
            line.send(None)
            process.join()
        self.lines, self.warm = {}, set()

    def __call__(self, name):
        if name not in self.warm:
            self.warm.add(name)
            self._fit(name, self.changes | {"epochs": _ALL[self.case].epochs})
        return self._fit(name, self.changes)

    def _fit(self, name, changes):
        line = self._line("ours" if name.startswith("ours") else "others")
        line.send((name, self.case, changes))
        done = line.recv()
        if isinstance(done, str):
            raise RuntimeError(done)
        return replace(done, case=replace(_ALL[self.case], **changes), weights=torch.from_numpy(done.weights))

    def _line(self, family):
        if family not in self.lines:
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, self.find), daemon=True)
            process.start()
            self.lines[family] = ours, process
        return self.lines[family][0]
