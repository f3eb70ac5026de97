"""Everything that only a graphics card can show, in under ten minutes and without a network.

    python -m benchmarks.gpu [--budget 560] [--only modes loops …] [--out benchmarks/results/gpu.md]
    python -m benchmarks.gpu --dry-run --out /tmp/gpu.md        (every part, small, on the CPU: no figures, only that it runs)

Each part runs in a process of its own with a limit of its own; what it has measured by then is kept, and the others go on. The table
is written anew after each part. Needs torch alone; torchmetrics and lightning are used where they are installed.

    floor     what the arithmetic and the memory of this card allow, measured; the work of the network, counted
    safety    no value read from the card in a step; pause; exact resume; a batch that does not fit
    modes     images a second and peak memory, each mode, batch 2 to 64, the most wanted first
    loops     our trainer, the hand-tuned loop with the same options, and Lightning, in turns

The network is the classic U-Net (64 channels, bilinear, 3 channels in, 1 class) at 512x512. Images come as bytes from pinned
memory, as a fast loader gives them; losses, counts for Dice and gradient norms are on, files and displays off.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import nn

from unet_nbtrain.metrics import SegmentationMetrics
from unet_nbtrain.trainer import UNetTrainer
from unet_nbtrain.unet_model import UNet
from unet_nbtrain.verify import verify_resume

THEIRS = {2: ("4.2", "8.5"), 4: ("6.8", "14.2"), 8: ("12.1", "22.7"), 16: ("out of memory", "-")}  # GB, images a second
SHARES = {"floor": 0.06, "safety": 0.16, "modes": 0.43, "loops": 0.35}  # Of the time
MODES = {
    "bf16": {"amp": "bf16"},
    "tf32": {"amp": False},
    "bf16, checkpoint='auto'": {"amp": "bf16", "checkpoint": "auto"},
    "bf16, checkpoint='sliced'": {"amp": "bf16", "checkpoint": "sliced"},
    "bf16, cuda_graph": {"amp": "bf16", "cuda_graph": True},
    "bf16, channels_last=False": {"amp": "bf16", "channels_last": False},
}
COMPILED = {  # Each size is compiled anew, so few of them come first
    "bf16, compiled": {"amp": "bf16", "compile": "default"},
    "bf16, compiled, checkpoint='auto'": {"amp": "bf16", "compile": "default", "checkpoint": "auto"},
    "bf16, compile='max'": {"amp": "bf16", "compile": "max"},
}
ORDER = 16, 64, 8, 2, 4, 32  # Batch sizes, those that are asked for first
FIRST = [("bf16, compiled", 16), *(("bf16", size) for size in ORDER), ("bf16, checkpoint='sliced'", 64), ("bf16, checkpoint='sliced'", 16)]
FIRST += [("bf16, checkpoint='auto'", 16), ("bf16, checkpoint='auto'", 64), ("bf16, cuda_graph", 2), ("bf16, compiled", 64), ("tf32", 16)]


class Set:
    """How large everything is: as promised, or small enough for a processor."""

    def __init__(self, dry, seconds):
        self.dry, self.end = dry, time.monotonic() + seconds
        self.device = torch.device("cpu" if dry else "cuda")
        self.pixels, self.width, self.depth = (16, 2, 1) if dry else (512, 64, 4)
        self.batches = (2, 4) if dry else ORDER
        self.warm, self.steps = (1, 2) if dry else (4, 12)

    def left(self):
        return self.end - time.monotonic()

    def model(self):
        torch.manual_seed(0)
        return UNet(3, 1, width=self.width, depth=self.depth)


class Ready(list):
    """Batches that lie ready in pinned memory; `batch_size` as a DataLoader has it."""

    def __init__(self, at, size, count):
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (size, 3, at.pixels, at.pixels), dtype=torch.uint8, generator=draw)
        masks = (images[:, 0] > 127).to(torch.uint8)
        pair = (images, masks) if at.dry else (images.pin_memory(), masks.pin_memory())
        super().__init__([pair] * count)
        self.batch_size = size


class Unsaved(UNetTrainer):
    """Our trainer without its files, which benchmarks.overhead and benchmarks.crash are about."""

    def _save(self, path=None, also=()):
        return Path("nowhere")

    def _save_epoch(self, best):
        pass


def now(at):
    """A mark in the card's own time"""
    if at.dry:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(at, first, last):
    """Milliseconds between two marks"""
    if at.dry:
        return (last - first) * 1e3
    last.synchronize()
    return first.elapsed_time(last)


class Clock:
    """A mark after each training step"""

    def __init__(self, at):
        self.at, self.marks = at, []

    def on_batch_end(self, trainer, loss):
        if trainer.phase == "train":
            self.marks.append(now(self.at))

    def step_ms(self):
        """Median step after the warm-up; groups of four, since one step may end while the next is being launched"""
        marks, group = self.marks[self.at.warm :], 1 if self.at.dry else 4
        return statistics.median(between(self.at, a, b) / group for a, b in zip(marks[::group], marks[group::group]))


class Told:
    """What the trainer had to report"""

    def __init__(self):
        self.texts = []

    def on_problem(self, trainer, text):
        self.texts.append(text)


def trainer_for(at, size, options, count=None, kind=Unsaved, observers=()):
    count = count or at.warm + at.steps + 1
    train, val = Ready(at, size, count), Ready(at, size, 1)
    return kind(at.model(), train, val, device=at.device, observers=list(observers), **options)


def cleared(at):
    gc.collect()
    if not at.dry:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def gigabytes(at):
    """Peak of the tensors, and of what PyTorch took from the card for them"""
    return (0.0, 0.0) if at.dry else (torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9)


# ---- the floor
def times(at, work, repeats=5):
    """Median milliseconds of a piece of work"""
    work(), work()
    taken = []
    for _ in range(repeats):
        first = now(at)
        work()
        taken.append(between(at, first, now(at)))
    return statistics.median(taken)


def work_of_the_network(at):
    """Floating-point operations of forward and backward of one image, and the bytes that its convolutions read and write in bf16."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    moved = []

    def note(module, inputs, output):
        moved.append(3 * 2 * (inputs[0].numel() + output.numel()))  # Forward, gradient of input, gradient of weight; 2 bytes each

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = at.model()
        for part in model.modules():
            if isinstance(part, nn.Conv2d):
                part.register_forward_hook(note)
        model(torch.rand(2, 3, at.pixels, at.pixels)).sum().backward()
    return counter.get_total_flops() / 2, sum(moved) / 2


def floor(at, found):
    n, store = (64, 2**16) if at.dry else (8192, 2**31)
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        square = torch.randn(n, n, device=at.device, dtype=dtype)
        found[f"{name} TFLOP/s"] = 2 * n**3 / times(at, partial(torch.mm, square, square)) / 1e9
    a = torch.empty(store, dtype=torch.uint8, device=at.device)
    b = torch.empty_like(a)
    found["copy TB/s"] = 2 * store / times(at, partial(b.copy_, a)) / 1e9
    flops, moved = work_of_the_network(at)
    found["GFLOP an image"], found["GB an image, convolutions in bf16"] = flops / 1e9, moved / 1e9
    arithmetic, bytes_ = flops / found["bf16 TFLOP/s"] / 1e9, moved / found["copy TB/s"] / 1e9
    found["floor, images/s in bf16"] = 1e3 / (arithmetic + bytes_)
    found["floor by arithmetic alone"] = 1e3 / arithmetic


# ---- throughput and memory of each mode
def one_mode(at, options, size):
    cleared(at)
    clock, told = Clock(at), Told()
    began = time.monotonic()
    trainer = trainer_for(at, size, options, observers=[clock, told])
    trainer.train(1)
    allocated, reserved = gigabytes(at)
    ms = clock.step_ms()
    return {
        "images/s": size / ms * 1e3, "ms": ms, "GB": allocated, "GB reserved": reserved, "seconds in all": time.monotonic() - began,
        "loss": trainer.history.rows[-1]["train"]["loss"], "parts": trainer.parts_per_batch, "told": told.texts,
    }  # fmt: skip


def modes(at, found):
    "Of each mode and size, the most wanted first, as long as there is time"
    every = MODES if at.dry else MODES | COMPILED
    names = [name for name in every if not (at.dry and "graph" in name)]
    first = [] if at.dry else FIRST
    for name, size in [*first, *((name, size) for name in names for size in at.batches if (name, size) not in first)]:
        options = every[name]
        if at.left() < (0.5 if at.dry else 55 if "compile" in options else 12):  # A compiler takes its time, and so does the search for kernels
            continue
        row = found.setdefault(name, {})
        try:
            row[str(size)] = one_mode(at, options | {"on_oom": "raise"}, size)
        except (RuntimeError, MemoryError) as error:
            row[str(size)] = {"error": "out of memory" if "out of memory" in str(error) else f"{type(error).__name__}: {str(error)[:200]}"}
        yield


# ---- our trainer beside other loops, with the same options
def on_their_way(at, loader):
    """Batches on the device, each copied by a stream of its own while the one before it is computed"""
    layout = torch.preserve_format if at.dry else torch.channels_last
    side = None if at.dry else torch.cuda.Stream()

    def fetched(pair):
        with contextlib.nullcontext() if at.dry else torch.cuda.stream(side):
            return [part.to(at.device, non_blocking=True) for part in pair]

    waiting = fetched(loader[0])
    for following in [*loader[1:], None]:
        images, masks = waiting
        if not at.dry:
            torch.cuda.current_stream().wait_stream(side)
            images.record_stream(torch.cuda.current_stream())
            masks.record_stream(torch.cuda.current_stream())
        waiting = fetched(following) if following is not None else None
        yield images.to(torch.float32, memory_format=layout).div_(255), masks


def raw_loop(at, size, compiled):
    """As an expert writes it: bf16, channels last, fused AdamW, next batch on its way, counts on the card, nothing read in a step"""
    model = at.model().to(at.device, memory_format=torch.preserve_format if at.dry else torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    criterion, metrics, total = nn.BCEWithLogitsLoss(), SegmentationMetrics(1), torch.zeros((), device=at.device)
    clock, run = Clock(at), torch.compile(model, dynamic=False) if compiled and not at.dry else model
    for x, y in on_their_way(at, Ready(at, size, at.warm + at.steps + 1)):
        with torch.autocast(at.device.type, torch.bfloat16):
            logits = run(x)
            loss = criterion(logits, y[:, None].to(logits.dtype))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        metrics.update(logits.detach(), y)
        clock.marks.append(now(at))
    return clock.step_ms()


def our_loop(at, size, compiled):
    return one_mode(at, {"amp": "bf16", "compile": "default" if compiled and not at.dry else "off"}, size)["ms"]


def lightning_loop(at, size, compiled):
    """Lightning with the same precision, layout and optimizer, and torchmetrics where it is installed"""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            model = at.model().to(memory_format=torch.preserve_format if at.dry else torch.channels_last)
            self.model = torch.compile(model, dynamic=False) if compiled and not at.dry else model
            self.criterion, self.dice = nn.BCEWithLogitsLoss(), None
            with contextlib.suppress(ImportError):
                from torchmetrics.classification import BinaryF1Score

                self.dice = BinaryF1Score(validate_args=False)

        def training_step(self, batch, index):
            images, masks = batch
            x = images.to(torch.float32, memory_format=torch.preserve_format if at.dry else torch.channels_last).div_(255)
            logits = self.model(x)
            loss = self.criterion(logits, masks[:, None].to(logits.dtype))
            self.log("loss", loss, on_step=False, on_epoch=True)
            if self.dice is not None:
                self.dice.update(logits.detach()[:, 0], masks)
                self.log("dice", self.dice, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    class Marks(pl.Callback):
        clock = Clock(at)

        def on_train_batch_end(self, *args):
            self.clock.marks.append(now(at))

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    marks = Marks()
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu" if at.dry else "gpu", devices=1, precision="bf16-mixed", callbacks=[marks], **quiet)
    loader = torch.utils.data.DataLoader(Ready(at, size, at.warm + at.steps + 1), batch_size=None)
    trainer.fit(Module(), loader)
    return marks.clock.step_ms()


LOOPS = {"our trainer": our_loop, "hand-tuned loop": raw_loop, "Lightning": lightning_loop}


def loops(at, found):
    "All loops in turns, uncompiled and compiled, as long as there is time"
    torch.backends.cudnn.benchmark = not at.dry
    size, taken = at.batches[0], {}
    for _ in range(1 if at.dry else 3):
        for compiled in (False, True):
            row = found.setdefault(f"batch {size}, {'compiled' if compiled else 'uncompiled'}", {})
            for name, loop in LOOPS.items():
                times = taken.setdefault((name, compiled), [])
                if at.left() < (1 if at.dry else 15 if times or not compiled else 55):
                    continue
                cleared(at)
                try:
                    times.append(loop(at, size, compiled))
                    row[name] = {"ms": statistics.median(times), "images/s": size / statistics.median(times) * 1e3, "turns": len(times)}
                    row[name]["ours takes, of its time"] = statistics.median(a / b for a, b in zip(taken["our trainer", compiled], times))
                except ImportError:
                    row[name] = {"error": "not installed"}
                except Exception as error:
                    logging.warning("%s", name, exc_info=True)
                    row[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
                yield


# ---- what must be true on a card
class Strict:
    """From the third step to the ninth, reading a value from the card is an error"""

    def __init__(self, at):
        self.at, self.steps = at, 0

    def on_batch_end(self, trainer, loss):
        self.steps += 1
        if not self.at.dry and self.steps in (2, 9):
            torch.cuda.set_sync_debug_mode("error" if self.steps == 2 else "default")


def no_reads(at):
    cleared(at)
    try:
        trainer_for(at, at.batches[0], {"amp": "bf16"}, count=12, observers=[Strict(at)]).train(1)
    except RuntimeError as error:
        where = [line.strip() for line in traceback.format_exc().splitlines() if "unet_nbtrain" in line]
        return f"{str(error)[:120]} {where[-1:] or ''}"
    finally:
        if not at.dry:
            torch.cuda.set_sync_debug_mode("default")
    return "none in 7 steps"


def pause(at, rounds=5):
    """Milliseconds from the call of pause() to the paused state, and of one step"""
    cleared(at)
    clock = Clock(at)
    trainer = trainer_for(at, at.batches[0], {"amp": "bf16"}, count=10_000, observers=[clock])
    run, waits = trainer.start(1), []
    limit = time.monotonic() + 40
    while len(clock.marks) < at.warm + 9 and time.monotonic() < limit and not run.ended:
        time.sleep(0.01)
    for _ in range(rounds):
        began = time.perf_counter()
        run.pause().wait(20)
        while run.state != "paused" and time.perf_counter() - began < 20:
            time.sleep(0.001)
        waits.append((time.perf_counter() - began) * 1e3)
        run.resume().wait(20)
        time.sleep(0.2)
    run.stop()
    run.wait(60)
    return {"median ms": statistics.median(waits), "largest ms": max(waits), "a step, ms": clock.step_ms() if len(clock.marks) > at.warm + 8 else None}


def exact(at):
    cleared(at)
    made = trainer_for(at, 2, {"amp": "bf16", "deterministic": True}, count=8, kind=UNetTrainer)
    return str(verify_resume(made, steps=4)).splitlines()[0]


class Narrow(nn.Module):
    """On a dry run there is no card to fill: more than two images do not fit"""

    def __init__(self, model):
        super().__init__()
        self.model, self.n_classes = model, 1

    def forward(self, x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory (pretended)")
        return self.model(x)


def too_large(at):
    """A batch that does not fit: the card's memory limited to what a quarter of it needs"""
    cleared(at)
    size, told = (4, Told()) if at.dry else (16, Told())
    trainer = trainer_for(at, size, {"amp": "bf16"}, count=6, observers=[told])
    if at.dry:
        trainer = Unsaved(Narrow(at.model()), trainer.train_loader, trainer.val_loader, device="cpu", observers=[told])
    else:
        torch.cuda.set_per_process_memory_fraction(min(1.0, 7e9 / torch.cuda.get_device_properties(0).total_memory))
    try:
        trainer.train(1)
    finally:
        if not at.dry:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return f"finished in {trainer.parts_per_batch} parts; loss {trainer.history.rows[-1]['train']['loss']:.4f}; told: {(told.texts or ['nothing'])[0][:90]} …"


def safety(at, found):
    checks = {"values read from the card": no_reads, "pause": pause, "exact resume, deterministic=True": exact, "a batch that does not fit": too_large}
    for name, check in checks.items():
        try:
            found[name] = check(at)
        except Exception as error:
            logging.warning("%s", name, exc_info=True)
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        yield


# ---- the table
PARTS = {"floor": floor, "safety": safety, "modes": modes, "loops": loops}


def cell(entry, ceiling):
    if not entry or "error" in entry:
        return (entry or {}).get("error", "not reached")
    share = f", {entry['images/s'] / ceiling:.0%}" if ceiling else ""
    return f"{entry['images/s']:.0f}/s, {entry['GB']:.2f} GB{share}" + (" *" if entry["told"] else "")


def table(found, dry):
    sizes = sorted({int(n) for row in found.get("modes", {}).values() for n in row} | {2, 4, 8, 16})
    ceiling = found.get("floor", {}).get("floor, images/s in bf16")
    lines = ["| mode | " + " | ".join(f"batch {n}" for n in sizes) + " |", "|" + "---|" * (len(sizes) + 1)]
    lines.append("| *the user's table (another card)* | " + " | ".join(f"{THEIRS[n][1]}/s, {THEIRS[n][0]} GB" if n in (2, 4, 8) else "out of memory" if n == 16 else "-" for n in sizes) + " |")
    for name, row in found.get("modes", {}).items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(str(n)), ceiling if not dry else None) for n in sizes) + " |")
    told = sorted({text for row in found.get("modes", {}).values() for entry in row.values() for text in entry.get("told", ())})
    return "\n".join(lines) + ("\n\n\\* " + "\n\\* ".join(told) if told else "")


def listed(part):
    text = []
    for name, value in part.items():
        if isinstance(value, dict):
            value = "; ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in value.items())
        text.append(f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |")
    return "\n".join(["| what | value |", "|---|---|", *text])


def write(out, found, dry):
    device = "CPU, dry run: the figures mean nothing" if dry else f"{found.get('device', 'a card')}"
    text = [f"# One graphics card\n\n{device}; torch {torch.__version__}. Images a second in training, peak GB of tensors, share of the floor.\n"]
    text += [table(found, dry), "\n## The floor\n", listed(found.get("floor", {})), "\n## Beside other loops\n"]
    for case, row in found.get("loops", {}).items():
        text += [f"\n### {case}\n", listed(row)]
    text += ["\n## What must be true\n", listed(found.get("safety", {}))]
    if found.get("failed"):
        text += ["\n## Parts that failed\n", listed(found["failed"])]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(text) + "\n", encoding="utf-8")


def run_part(name, at, keep):
    """One part; `keep` gets what there is after each piece of it"""
    found = {}
    pieces = PARTS[name](at, found)
    for _ in pieces or ():
        keep(found)
    keep(found)
    return found


def in_a_process(name, seconds):
    """A part in a process of its own: what it had measured when it ended, or was ended"""
    with tempfile.TemporaryDirectory() as home:
        kept = Path(home) / "found.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--budget", str(seconds), "--json", str(kept)]
        try:
            code = subprocess.run(command, timeout=seconds + 12).returncode
            trouble = f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            trouble = f"ended after {seconds + 12:.0f} seconds"
        return (json.loads(kept.read_text()) if kept.exists() else {}), trouble


def one_part(asked):
    """In the process of a part"""

    def keep(found):
        fresh = asked.json.with_suffix(".new")
        fresh.write_text(json.dumps(found))
        fresh.replace(asked.json)

    run_part(asked.part, Set(False, asked.budget), keep)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=560, help="seconds in all")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.md"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        return one_part(asked)
    if not asked.dry_run and not torch.cuda.is_available():
        parser.error("There is no CUDA card here. --dry-run shows that every part runs.")
    began, found = time.monotonic(), {"device": "" if asked.dry_run else torch.cuda.get_device_name(0), "failed": {}}
    for name in asked.only:
        seconds = min(SHARES[name] * asked.budget, asked.budget - 15 - (time.monotonic() - began))
        if seconds < 10 and not asked.dry_run:
            found["failed"][name] = "no time was left"
        elif asked.dry_run:
            found[name] = run_part(name, Set(True, seconds), lambda found: None)
        else:
            found[name], trouble = in_a_process(name, seconds)
            found["failed"] |= {name: trouble} if trouble else {}
        write(asked.out, found, asked.dry_run)
    print(asked.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
