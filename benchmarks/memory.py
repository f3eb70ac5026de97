"""What a training needs: the memory of each lever at 512x512, counted without a graphics card.

    python -m benchmarks.memory [--out benchmarks/results/memory.md] [--sizes 2 8 16 32 64]

The step of our trainer, with the options as a user sets them, runs on tensors that have a shape but no numbers
(FakeTensorMode), so it takes seconds and allocates nothing. Every store that an operation makes is counted from its birth to
its death, rounded to the 512 bytes of PyTorch's allocator. What a card needs beside that: the CUDA context (0.3 to 0.6 GB),
workspaces of the convolutions, and what fragmentation wastes. benchmarks.gpu measures all of it where there is a card.

Compiled rows are an estimate: the compiler's own partition of the step, every convolution's and every reduction's result and what
goes into or comes out of them counted, and elementwise chains between them taken as fused.
"""

import argparse
import contextlib
import gc
import platform
import weakref
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unet_nbtrain.epoch import EpochMeter
from unet_nbtrain.trainer import UNetTrainer
from unet_nbtrain.unet_model import UNet

SIZES = 2, 8, 16, 32, 64
LEVERS = {
    "fp32": {},
    "fp32, checkpoint=[0]": {"checkpoint": [0]},
    "fp32, checkpoint='auto'": {"checkpoint": "auto"},
    "fp32, checkpoint='all'": {"checkpoint": "all"},
    "bf16": {"amp": "bf16"},
    "bf16, checkpoint=[0]": {"amp": "bf16", "checkpoint": [0]},
    "bf16, checkpoint=[0, 1]": {"amp": "bf16", "checkpoint": [0, 1]},
    "bf16, checkpoint='auto'": {"amp": "bf16", "checkpoint": "auto"},
    "bf16, checkpoint='all'": {"amp": "bf16", "checkpoint": "all"},
    "bf16, checkpoint='sliced'": {"amp": "bf16", "checkpoint": "sliced"},
}
COMPILED = {
    "bf16, compiled": {"amp": "bf16", "compile": "default"},
    "bf16, compiled, checkpoint='auto'": {"amp": "bf16", "compile": "default", "checkpoint": "auto"},
    "bf16, compiled, memory_budget=0.2": {"amp": "bf16", "compile": "default", "memory_budget": 0.2},
}
THEIRS = {2: "4.2", 4: "6.8", 8: "12.1", 16: "out of memory"}  # The user's table: fp32, a card of 16 GB
_BLOCK = 512  # Bytes; PyTorch's allocator gives out no less


class Stores(TorchDispatchMode):
    """Counts the stores of all tensors that operations make while this is on: `live` bytes now, and their `peak`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _see(self, store):
        if store._cdata not in self._sizes:
            self._sizes[store._cdata] = size = -(-store.nbytes() // _BLOCK) * _BLOCK
            self.live += size
            weakref.finalize(store, self._gone, store._cdata)

    def _gone(self, key):
        self.live -= self._sizes.pop(key)


def batch(size, pixels):
    return torch.rand(size, 3, pixels, pixels), torch.rand(size, 1, pixels, pixels)


def trainer_with(options, **shape):
    """A trainer with these options, and its settings in force as in a run; its guard would look at numbers, and there are none."""
    loader = [batch(1, 16)]
    stays = patch.object(UNet, "to", lambda model, *args, **kwargs: model)
    with patch("unet_nbtrain.state.FiniteGuard"), patch("unet_nbtrain.state.shared_samples", return_value=""), stays:
        trainer = UNetTrainer(UNet(3, 1, **shape), loader, loader, device="cpu", observers=[], **{"amp": False} | options)
        trainer._adopt_optimizer()
    trainer.model.train()
    return trainer


def step(trainer, images, masks):
    """One training step: forward with loss and counts, backward, optimizer."""
    loss, *_ = trainer._forward(images, masks, EpochMeter())
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


def peak_bytes(options, size, pixels=512, fake=True, **shape):
    """The most bytes that are live at once in the second step, when the optimizer has its moments."""
    with FakeTensorMode() if fake else contextlib.nullcontext(), Stores() as stores:
        trainer = trainer_with(options, **shape)
        images, masks = batch(size, pixels)
        for _ in range(2):
            stores.peak = stores.live
            step(trainer, images, masks)
        peak = stores.peak
        del trainer, images, masks
    gc.collect()
    return peak


# ---- compiled: the partition that the compiler makes, and what of it has to exist
def partition(options, size, pixels, **shape):
    """The forward and the backward graph of the compiled step, as the compiler cuts them, with shapes."""
    from torch._dynamo.backends.common import aot_autograd
    from functorch.compile import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import select_decomp_table

    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    with FakeTensorMode():
        trainer = trainer_with(options, **shape)
        images, masks = batch(size, pixels)
        backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table())
        with trainer._options():
            run = torch.compile(trainer._whole(0.5).forward, backend=backend, dynamic=False)
            run(images, masks)[0].backward()
        fixed = sum(p.nbytes for p in trainer.model.parameters()) + images.nbytes + masks.nbytes
    return graphs, fixed


def _bytes(node):
    return sum(t.numel() * t.element_size() for t in tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor))


_REAL = ("convolution", "var_mean", "sum", "max_pool", "low_memory", "offsets", "mm", "cat")


def live_peak(graph, held=0):
    """The largest sum of results that exist at once, in the order of the graph; elementwise operations are fused into what uses them."""
    nodes = list(graph.nodes)
    outputs = {o for o in tree_leaves(nodes[-1].args) if isinstance(o, torch.fx.Node)}
    feeds = {a for n in nodes if "convolution" in str(n.target) for a in n.all_input_nodes}
    real = {n for n in nodes if n.op == "placeholder" or n in outputs or n in feeds or any(word in str(n.target) for word in _REAL)}
    sources, last = {}, {}
    for place, node in enumerate(nodes):
        sources[node] = {node} if node in real else set().union(*[sources[a] for a in node.all_input_nodes])
        for used in set().union(*[sources[a] for a in node.all_input_nodes]) if node in real or node.op == "output" else ():
            last[used] = place
    live, peak = held, held
    for place, node in enumerate(nodes):
        live += _bytes(node) if node in real and node.op != "placeholder" and "getitem" not in str(node.target) else 0
        peak = max(peak, live)
        live -= sum(_bytes(n) for n in last if last[n] == place and "getitem" not in str(n.target))
    return peak


def compiled_peak(options, size, pixels=512, **shape):
    """Estimate of the peak of a compiled step, and the exact bytes that it keeps between forward and backward."""
    (forward, backward), fixed = partition(options, size, pixels, **shape)
    inputs = [n for n in backward.nodes if n.op == "placeholder"]
    weights = {tuple(n.meta["val"].shape) for n in forward.nodes if n.op == "placeholder" and n.meta["val"].ndim in (1, 4) and n.meta["val"].shape[-1] < 16}
    kept = sum(_bytes(n) for n in inputs if tuple(n.meta["val"].shape) not in weights)
    moments = 2 * sum(_bytes(n) for n in forward.nodes if n.op == "placeholder" and tuple(n.meta["val"].shape) in weights)
    return moments + fixed + live_peak(backward, held=kept), kept


def measure(sizes=SIZES, pixels=512, levers=LEVERS, compiled=COMPILED, **shape):
    """Rows (name, bytes for each batch size, bytes for each image more); compiled ones are estimated from two sizes."""
    rows = []
    for name, options in levers.items():
        peaks = {n: peak_bytes(options, n, pixels, **shape) for n in sizes}
        few, many = min(sizes), max(sizes)
        rows.append((name, peaks, (peaks[many] - peaks[few]) / max(many - few, 1)))
    for name, options in compiled.items():
        two, more = (compiled_peak(options, n, pixels, **shape)[0] for n in (2, 4))
        slope = (more - two) / 2
        rows.append((name + " (estimate)", {n: two + (n - 2) * slope for n in sizes}, slope))
    return rows


def table(rows, sizes):
    head = "| options | " + " | ".join(f"batch {n}" for n in sizes) + " | GB an image |\n|" + "---|" * (len(sizes) + 2)
    theirs = "| *the user's table, measured on a card* | " + " | ".join(THEIRS.get(n, "-") for n in sizes) + " | about 1.3 |"
    lines = [f"| {name} | " + " | ".join(f"{peaks[n] / 1e9:.2f}" for n in sizes) + f" | {slope / 1e9:.3f} |" for name, peaks, slope in rows]
    return "\n".join([head, theirs, *lines])


def check(rows):
    """What is promised: batch 16 in 6.5 GB, batch 64 in 12.1 GB, of GB = 10^9 bytes."""
    peaks = {name: peaks for name, peaks, _ in rows}
    for name in ("bf16, checkpoint='auto'", "bf16, checkpoint='all'"):
        assert peaks[name][16] <= 6.5e9, (name, peaks[name][16])
    assert peaks["bf16, checkpoint='sliced'"][64] <= 12.1e9, peaks["bf16, checkpoint='sliced'"][64]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/results/memory.md")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    asked = parser.parse_args()
    rows = measure(asked.sizes, asked.pixels, width=asked.width)
    explained = __doc__.split("\n\n", 2)[2].strip()
    text = (
        f"# Memory of a training step\n\nClassic U-Net ({asked.width} channels, bilinear, 3 channels in, 1 class), {asked.pixels}x{asked.pixels}, AdamW, "
        f"GB of 10^9 bytes, torch {torch.__version__}, {platform.machine()}. Peak of the second step; the CUDA context and workspaces come on top.\n\n"
        f"{table(rows, asked.sizes)}\n\n{explained}\n"
    )
    Path(asked.out).write_text(text, encoding="utf-8")
    print(text)
    if asked.pixels == 512 and asked.width == 64 and {16, 64} <= set(asked.sizes):
        check(rows)


if __name__ == "__main__":
    main()
