"""Fits in processes of their own: what a contestant does to its process (its allocator, its caches, its imports) reaches nobody else."""

import multiprocessing
from dataclasses import replace

import torch

from .cases import CASES, fit, one_thread


def _serve(line, find):
    "In the process of a contestant: fits, one after the other, until nothing is asked for any more"
    one_thread()
    while (order := line.recv()) is not None:
        name, case, changes = order
        try:
            done = fit(find(name), replace(CASES[case], **changes))
            line.send(replace(done, case=None, weights=done.weights.numpy()))
        except Exception as error:
            line.send(f"{type(error).__name__}: {error}")


class Apart:
    "Calls make fits: `apart(name)` is one of that contestant, in its process; close it at the end."

    def __init__(self, find, case, **changes):
        self.find, self.case, self.changes, self.lines = find, case, changes, {}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for line, process in self.lines.values():
            line.send(None)
            process.join()

    def __call__(self, name):
        if name not in self.lines:
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, self.find), daemon=True)
            process.start()
            self.lines[name] = ours, process
        line, _ = self.lines[name]
        line.send((name, self.case, self.changes))
        done = line.recv()
        if isinstance(done, str):
            raise RuntimeError(done)
        return replace(done, case=replace(CASES[self.case], **self.changes), weights=torch.from_numpy(done.weights))
