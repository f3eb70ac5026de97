"""The ways to compute a training: what they must leave as it was, and what they may not do to a run."""

import copy
import gc
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from heard import Heard
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.memory import Stores, peak_bytes
from unet_nbtrain import UNet, UNetTrainer, tally, thumbnails, verify_resume
from unet_nbtrain.batch_size import auto_batch
from unet_nbtrain.losses import create_loss_function
from unet_nbtrain.ways import Moment, Whole, captured, compiled, difference

ROOT = Path(__file__).resolve().parents[1]
FULL = pytest.mark.skipif(os.environ.get("FULL") != "1", reason="takes a compiler and minutes; FULL=1")


def loader(count=10, size=4, classes=2):
    draw = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(count, 1, 16, 16, generator=draw), torch.randint(0, classes, (count, 16, 16), generator=draw))
    return DataLoader(data, batch_size=size)


class Dropping(UNet):
    """Draws random numbers in each level"""

    def __init__(self):
        super().__init__(1, 1, width=4, depth=2)
        for block in (self.stem, *self.downs, *(up.conv for up in self.ups)):
            block.append(nn.Dropout2d(0.2))


def small():
    return UNet(1, 1, width=2, depth=1)


def trained(tmp_path, name="run", epochs=2, model=Dropping, step=None, **settings):
    torch.manual_seed(0)
    trainer = UNetTrainer(model(), loader(), loader(6), device="cpu", run_dir=tmp_path / name, observers=[], **settings)
    if step is not None:
        trainer.observers.add(step)
    trainer.train(epochs)
    return trainer


def numbers(trainer):
    return [v for row in trainer.history.rows for part in ("train", "val") for v in (row[part]["loss"], row[part]["dice"])]


def same(one, other):
    a, b = one.model.state_dict(), other.model.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a) and numbers(one) == numbers(other)


@pytest.fixture
def light_compiler(monkeypatch):
    """A compiler that takes functions apart and puts them together again; the calls that compiled something are counted"""
    compiled = []
    torch._dynamo.reset()

    def compile_(function, mode=None, dynamic=None):
        def backend(graph, inputs):
            compiled.append([tuple(t.shape) for t in inputs if torch.is_tensor(t) and t.ndim == 4 and t.shape[-1] == 16])
            return graph.forward

        return torch._dynamo.optimize(backend, dynamic=dynamic)(function)

    monkeypatch.setattr(torch, "compile", compile_)
    return compiled


# ---- recomputing
@pytest.mark.parametrize("settings", [{"checkpoint": "auto"}, {"checkpoint": "all"}, {"checkpoint": [0]}, {"checkpoint": ["stem", "ups.0"]}], ids=str)
@pytest.mark.parametrize("amp", [False, "bf16"])
def test_recomputing_changes_no_bit(tmp_path, settings, amp):
    plain, thrifty = trained(tmp_path, "plain", amp=amp), trained(tmp_path, "thrifty", amp=amp, **settings)
    assert same(plain, thrifty)
    assert thrifty.model.stem[1].num_batches_tracked == 6, "two epochs of three batches"
    assert thrifty.model.recomputed == frozenset() and "forward" not in vars(thrifty.model.stem), "it ends with the run"


def test_sliced_is_the_same_up_to_rounding(tmp_path):
    plain, thrifty = (trained(tmp_path, name, model=small, checkpoint=name) for name in ("none", "sliced"))
    assert torch.allclose(torch.tensor(numbers(plain)), torch.tensor(numbers(thrifty)), atol=1e-3)
    assert not same(plain, thrifty), "the slices were not used"
    assert thrifty.model.stem[1].num_batches_tracked == 6


@pytest.mark.parametrize("checkpoint", ["all", "sliced"])
def test_out_of_memory_is_split_while_recomputing(tmp_path, checkpoint, monkeypatch):
    """The memory runs out in the backward pass, when a block is computed again"""
    import unet_nbtrain.recompute as recompute
    import unet_nbtrain.sliced as sliced

    struck = []

    def strike(real):
        def narrow(*args, **kwargs):
            if not struck:
                struck.append(1)
                raise torch.OutOfMemoryError("out of memory")
            return real(*args, **kwargs)

        return narrow

    monkeypatch.setattr(recompute, "still_statistics", strike(recompute.still_statistics))
    monkeypatch.setattr(sliced, "_second_back", strike(sliced._second_back))
    trainer = trained(tmp_path, model=small, checkpoint=checkpoint)
    assert struck and trainer.parts_per_batch == 2 and trainer.global_step == 6
    assert all(m.track_running_stats for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d))
    assert trainer.model.stem[1].num_batches_tracked == 12, "two epochs of three batches in two parts; the first try was undone"


def test_a_resume_goes_on_recomputing(tmp_path):
    trainer = trained(tmp_path, epochs=1, checkpoint="all", ema_decay=0.9)
    assert verify_resume(trainer, steps=4).exact
    assert trainer.averaged.module.recomputed == frozenset()


def test_levels_are_refused_for_other_models(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))
    trainer = UNetTrainer(model, loader(), loader(), create_loss_function(1), device="cpu", run_dir=tmp_path, observers=[], checkpoint="auto")
    with pytest.raises(ValueError, match="Of this Sequential name the parts to recompute"):
        trainer.train(1)
    trainer.checkpoint = ["0"]
    trainer.train(1)
    assert trainer.current_epoch == 1


# ---- compiling
def test_a_compiled_run_is_the_plain_run(tmp_path, light_compiler):
    plain, fast = trained(tmp_path, "plain", epochs=4), trained(tmp_path, "fast", epochs=4, compile="default")
    assert list(plain.model.state_dict()) == list(fast.model.state_dict())
    assert torch.allclose(torch.tensor(numbers(plain)), torch.tensor(numbers(fast)), atol=1e-5)
    assert len(light_compiler) == 2, f"one for training, one for validation, none for the last, shorter batch: {light_compiler}"


def counting(monkeypatch):
    graphs, real = [], torch.compile

    def backend(graph, inputs):
        import torch._functorch.config as functorch

        graphs.append((weakref.ref(graph), functorch.activation_memory_budget))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, mode=None, dynamic=None: real(function, backend=backend, dynamic=dynamic))
    torch._dynamo.reset()
    return graphs


def test_every_shape_is_compiled_and_nothing_of_it_stays(monkeypatch):
    graphs = counting(monkeypatch)
    whole = Whole(small(), create_loss_function(1))
    for size in range(1, 13):
        compiled(whole.forward, dynamic=False)(torch.rand(size, 1, 16, 16), torch.randint(0, 2, (size, 16, 16)))
        assert len(graphs) == size
    del whole
    gc.collect()
    assert [size for size, (graph, _) in enumerate(graphs, 1) if graph() is not None] == []


def test_a_run_does_not_use_what_was_compiled_for_another(tmp_path, monkeypatch):
    graphs, models = counting(monkeypatch), []
    for name, settings in (("all", {}), ("auto", {"checkpoint": "auto"}), ("some", {"memory_budget": 0.3})):
        models.append(weakref.ref(trained(tmp_path, name, epochs=1, model=small, compile="default", **settings).model))
    assert [budget for _, budget in graphs] == [1.0, 1.0, 0.7, 0.7, 0.3, 0.3]
    gc.collect()
    assert all(one() is None for one in (*models, *(graph for graph, _ in graphs)))


def test_a_compiler_that_compiles_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    heard = Heard()
    trained(tmp_path, epochs=1, model=small, compile="default", step=heard)
    assert heard.problems == ["compile='default' did not work here (nothing was compiled). The run goes on plainly: the same results, more slowly."]


def test_ways_are_compared_on_a_device_without_double_precision(monkeypatch):
    class OnTheProcessor(torch.Tensor):
        def double(self):
            return self.as_subclass(torch.Tensor).to(torch.float64)

    def no_double(tensor):
        raise TypeError("the MPS framework doesn't support float64")

    whole = Whole(small(), create_loss_function(1))
    monkeypatch.setattr(torch.Tensor, "double", no_double)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.as_subclass(OnTheProcessor))
    assert difference(whole, whole, loader().dataset[:4], list(whole.parameters()), Moment(whole)) == (0.0, 0.0)


def test_a_compiled_run_with_averages_resumes_exactly(tmp_path, light_compiler):
    trainer = trained(tmp_path, epochs=1, model=small, compile="default", ema_decay=0.5)
    assert verify_resume(trainer, steps=4).exact
    assert copy.deepcopy(trainer.model).state_dict().keys() == trainer.model.state_dict().keys()
    file = torch.load(trainer.checkpoint_dir / "last.pth", weights_only=False)
    assert not any("_orig_mod" in name for name in file["model_state_dict"])


def test_a_compiled_run_splits_when_the_memory_is_full(tmp_path, light_compiler):
    class Full(nn.Module):
        def forward(self, x):
            if len(x) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return x

    def model():
        made = UNet(1, 1, width=2, depth=1)
        made.stem.insert(0, Full())
        return made

    assert trained(tmp_path, model=model, compile="default").parts_per_batch == 2


@pytest.mark.parametrize("when", ["compiling", "first call", "backward"])
def test_without_a_compiler_the_run_goes_on(tmp_path, monkeypatch, when):
    def broken(function, **options):
        if when == "compiling":
            raise RuntimeError("no compiler here\nand a long story")

        def call(images, masks):
            loss, *rest = function(images, masks)
            if when == "first call":
                raise OSError("no compiler here")
            loss.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("no compiler here")))
            return loss, *rest

        return call

    monkeypatch.setattr(torch, "compile", broken)
    heard = Heard()
    trainer = trained(tmp_path, "fallback", compile="default", step=heard)
    assert same(trainer, trained(tmp_path, "plain")), "the attempt left a trace"
    expected = "compile='default' did not work here ({}: no compiler here). The run goes on plainly: the same results, more slowly."
    assert heard.problems == [expected.format("OSError" if when == "first call" else "RuntimeError")]


def test_a_compiler_that_computes_something_else_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda x, y: (lambda out: (out[0] * 0.9, *out[1:]))(function(x, y)))
    heard = Heard()
    assert same(trained(tmp_path, "wrong", compile="max", step=heard), trained(tmp_path, "plain"))
    assert len(heard.problems) == 1 and "its loss differs by 10.0% and its gradient differs by 10.0%" in heard.problems[0]


def test_recomputing_takes_over_where_the_compiler_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: (_ for _ in ()).throw(RuntimeError("none")))
    seen = []

    class Look:
        def on_batch_end(self, trainer, loss):
            seen.append(trainer.model.recomputed)

    trained(tmp_path, compile="default", checkpoint="auto", step=Look())
    assert set(seen) == {frozenset({0, 1, 2})}


def test_a_training_step_of_ones_own_is_called(tmp_path, light_compiler):
    class Own(UNetTrainer):
        def training_step(self, images, masks):
            loss, logits = super().training_step(images, masks)
            return 2 * loss, logits

    heard = Heard()
    own = Own(UNet(1, 1, width=2, depth=1), loader(), loader(), device="cpu", run_dir=tmp_path, observers=[heard], compile="default")
    own.train(1)
    assert light_compiler == [] and len(heard.problems) == 1 and "A training_step of your own is called as it is" in heard.problems[0]


def as_if_captured(monkeypatch, capture):
    """A stand-in for the capture, and no other way in training"""

    def kinds(self):
        return ("captured",) if torch.is_grad_enabled() and self.parts_per_batch == 1 and "captured" not in self._failed else ()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(UNetTrainer, "_kinds", kinds)


def test_a_captured_step_is_copied_and_used_for_full_batches(tmp_path, monkeypatch):
    """With a stand-in for the capture: its outputs lie in memory that the next call overwrites, as on a card"""
    calls = []

    def capture(module, samples, **options):
        static = {}

        def run(images, masks):
            calls.append(len(images))
            loss, *rest = module(images, masks)
            flat = [rest[0], *rest[1]]
            for place, value in enumerate(flat):
                static.setdefault(place, value.clone()).copy_(value)
            return loss, static[0], (static[1], static[2])

        return run

    as_if_captured(monkeypatch, capture)
    assert same(trained(tmp_path, "captured", cuda_graph=True), trained(tmp_path, "plain"))
    assert calls == [4] * 5, "one rehearsal and two full batches in each of two epochs"


@pytest.mark.parametrize("shapes", [[4, 4, 3], [4, 4, 1], [3, 4, 4], [(1, 16), (1, 20), (1, 16)]], ids=str)
def test_only_batches_of_the_captured_shape_are_replayed(tmp_path, monkeypatch, shapes):
    """A graph copies what it is given into its own memory: a batch of 3 would raise, and a batch of 1 would silently fill it"""
    made = []

    def capture(module, samples, **options):
        static = [sample.clone() for sample in samples]
        made.append(static[0].shape[0])

        def run(*inputs):
            for own, given in zip(static, inputs):
                assert own.shape == given.shape
                own.copy_(given)
            return module(*static)

        return run

    as_if_captured(monkeypatch, capture)
    draw, told = torch.Generator().manual_seed(0), Heard()
    sizes = [shape if isinstance(shape, tuple) else (shape, 16) for shape in shapes]
    batches = [(torch.rand(n, 1, h, 16, generator=draw), torch.randint(0, 2, (n, h, 16), generator=draw)) for n, h in sizes]
    losses = []
    for graph in (False, True):
        torch.manual_seed(0)
        trainer = UNetTrainer(small(), batches, batches, device="cpu", run_dir=tmp_path / str(graph), observers=[told], cuda_graph=graph)
        trainer.train(2)
        losses.append(numbers(trainer))
    assert losses[0] == losses[1] and told.problems == []
    assert made == ([3, 4] if shapes[0] == 3 else [sizes[0][0]]), "the first shape, or a larger one after a short beginning"


def test_a_split_gives_back_the_memory_of_the_graph(tmp_path, monkeypatch):
    pools, alive, struck = [], [], []

    class Pool:
        """What a graph keeps; held in a cycle, as the autograd function of a graph is"""

        def __init__(self):
            self.myself = self

    def capture(module, samples, **options):
        pool = Pool()
        pools.append(weakref.ref(pool))
        return lambda *inputs, pool=pool: module(*inputs)

    class Full(nn.Module):
        def forward(self, x):
            if len(x) == 2 and self.training and not struck:
                struck.append(1)
                raise torch.OutOfMemoryError("out of memory")
            return x

    class Look:
        def on_problem(self, trainer, text):
            alive.append(pools[0]() is not None)

    def model():
        made = small()
        made.stem.insert(0, Full())
        return made

    as_if_captured(monkeypatch, capture)
    gc.disable()
    try:
        assert trained(tmp_path, epochs=1, model=model, cuda_graph=True, step=Look()).parts_per_batch == 2
    finally:
        gc.enable()
    assert alive == [False], "when the split is told, and so before any part of it is computed"


class Failing:
    """A `torch.cuda.graph` whose end raises before it leaves its stream, as the real one does"""

    modes, streams = [], ["usual"]

    def __init__(self, graph, pool=None, capture_error_mode="global"):
        self.modes.append(capture_error_mode)

    def __enter__(self):
        self.streams.append("of the capture")

    def __exit__(self, *error):
        raise RuntimeError("operation failed due to a previous error during capture")


class Stream:
    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.before = Failing.streams[-1]

    def __exit__(self, *error):
        Failing.streams.append(self.before)


def test_a_capture_that_fails_leaves_everything_as_it_was(monkeypatch):
    def capture(module, samples, **options):
        with torch.cuda.graph("graph", pool=None):
            return module(*samples)

    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Failing.streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", Stream)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    whole = Whole(small(), create_loss_function(1))
    with pytest.raises(RuntimeError, match="during capture"):
        captured(whole, whole.forward, *loader().dataset[:4])
    assert Failing.modes == ["thread_local"] and torch.cuda.graph is Failing
    assert Failing.streams == ["usual", "of the capture", "usual"]


@pytest.mark.parametrize("version, told", [("2.12.1", True), ("2.13.0", False)])
def test_an_older_torch_may_hold_memory_back_after_a_capture_that_failed(tmp_path, monkeypatch, version, told):
    def capture(*args, **options):
        raise RuntimeError("no capture here")

    as_if_captured(monkeypatch, capture)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    heard = Heard()
    trained(tmp_path, epochs=1, model=small, cuda_graph=True, step=heard)
    assert len(heard.problems) == 1 and ("restart the kernel" in heard.problems[0]) is told


@pytest.mark.parametrize("settings", [{"accumulate_gradients": 2}, {"checkpoint": "all"}, {"checkpoint": ["stem"]}], ids=str)
def test_a_step_that_cannot_be_captured_is_told_when_the_run_begins(caplog, settings):
    trainer = UNetTrainer(small(), loader(), loader(), device="cpu", observers=[], cuda_graph=True, **settings)
    trainer.device = torch.device("cuda")
    trainer._adopt_optimizer()
    name, value = next(iter(settings.items()))
    assert trainer._kinds() == () and f"cuda_graph=True does nothing with {name}={value!r}" in caplog.text


def test_a_setting_that_ends_the_capture_in_a_run_is_told_once(tmp_path):
    heard = Heard()
    trainer = UNetTrainer(small(), loader(), loader(), device="cpu", observers=[heard], cuda_graph=True)
    trainer._adopt_optimizer()
    trainer.device, trainer.phase, trainer._silent, trainer.parts_per_batch = torch.device("cuda"), "train", "", 2
    for _ in range(2):
        trainer._quick(*loader(2).dataset[:2], 0.5)
    assert heard.problems == ["cuda_graph=True does nothing while a batch goes through in 2 parts."]


@pytest.mark.parametrize("batches, way, counted", [("small", "plain", 3), ("large", "plain", 0), ("small", "whole", 1)])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_counted_for_the_metrics_is_not_counted_again_for_the_worst_image(tmp_path, monkeypatch, batches, way, counted, parts):
    """Small batches wait to be counted together, so there each image is counted for itself; the same image is the worst in any case"""
    counts, seen = thumbnails.segmentation_counts, []
    monkeypatch.setattr(thumbnails, "segmentation_counts", lambda logits, *args: (seen.append(len(logits)), counts(logits, *args))[1])
    monkeypatch.setattr(tally, "_SMALL", tally._SMALL if batches == "small" else 0)
    torch.manual_seed(0)
    trainer = UNetTrainer(small(), loader(), loader(10), device="cpu", run_dir=tmp_path, observers=[])
    trainer.parts_per_batch, trainer.worst = parts, thumbnails.WorstSample()
    if way == "whole":  # As a compiled way does: full batches with their counts, the last one plainly
        trainer._ways = {}
        trainer._quick = lambda x, y, threshold: trainer._whole(threshold)(x, y) if len(x) == 4 // parts else None
    trainer.validate_epoch()
    images, masks = loader(10).dataset.tensors
    dice = thumbnails.dice_of_each(counts(trainer.model(images), masks, 1)[0])
    assert trainer.worst.found.dice == dice.min() and trainer.worst.found.name == f"sample {dice.argmin()}"
    assert len(seen) == counted * parts


@FULL
def test_the_real_compiler(tmp_path):
    settings = {"compile": "default", "checkpoint": "auto"}
    plain, fast = trained(tmp_path, "plain"), trained(tmp_path, "fast", **settings)
    assert torch.allclose(torch.tensor(numbers(plain)), torch.tensor(numbers(fast)), atol=1e-3)
    assert fast._failed == frozenset() and verify_resume(fast, steps=4).exact


@FULL
def test_no_compiler_on_the_machine(tmp_path):
    """A process whose C++ compiler does not exist"""
    code = (
        "import logging, sys; logging.basicConfig(level=logging.WARNING); sys.path.insert(0, 'tests');"
        f"from test_modes import *; t = trained(Path({str(tmp_path)!r}), compile='default'); assert t._failed == {{'compiled'}}, t._failed"
    )
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("did not work here") == 1


# ---- layout
def test_a_resume_in_another_layout(tmp_path):
    first = trained(tmp_path, epochs=1)
    torch.manual_seed(0)
    other = UNetTrainer(Dropping(), loader(), loader(6), device="cpu", run_dir=tmp_path / "run", observers=[], channels_last=True)
    other.train(2, resume="last")
    weight = other.model.downs[0][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and other.current_epoch == 2
    assert other.optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert first.history.rows == other.history.rows[:1]


# ---- batch size
@FULL
def test_auto_batch_with_modes(light_compiler):
    trainer = UNetTrainer(UNet(1, 1, width=2, depth=1), loader(), loader(), device="cpu", observers=[], compile="default", checkpoint=[0])
    found = auto_batch(trainer, most=2)
    assert found.largest == 2 and light_compiler, "the compiled step was tried"
    assert trainer.model.recomputed == frozenset() and trainer._ways is None


def test_auto_batch_leaves_no_tensor_behind():
    import gc

    trainer = UNetTrainer(UNet(1, 1, width=2, depth=1), loader(), loader(), device="cpu", observers=[])
    auto_batch(trainer, most=1)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    before = tensors()
    auto_batch(trainer, most=2)
    assert tensors() <= before


# ---- the counting of memory
def test_counted_by_hand():
    """One convolution without bias: every store that its step makes can be written down"""
    with Stores() as stores:
        weight = torch.zeros(8, 4, 1, 1, requires_grad=True)  # 128 bytes, counted as 512
        x = torch.zeros(1, 4, 32, 32)  # 16 KiB
        y = torch.nn.functional.conv2d(x, weight)  # 32 KiB
        kept = stores.live
        loss = y.sum()  # 512
        del y
        assert stores.live == 512 + 2**14 + 512, "the sum does not need what it summed"
        loss.backward()  # The gradient of y is an expanded scalar that the convolution lays out: 32 KiB
        assert weight.grad is not None
        assert stores.live == 512 + 2**14 + 512 + 512
    assert kept == 512 + 2**14 + 2**15
    assert 2**14 + 2**15 + 2 * 512 <= stores.peak <= 2**14 + 2 * 2**15 + 5 * 512


def test_without_numbers_the_count_is_that_with_numbers():
    """A real step of a small network, counted in the same way"""
    for options in ({"checkpoint": "all"}, {"amp": "bf16"}):
        fake, real = (peak_bytes(options, 4, 32, fake=fake, width=8, depth=1) for fake in (True, False))
        assert abs(fake - real) <= 0.03 * real, (options, fake, real)


def test_levers_save_what_is_said():
    plain, thrifty, sliced = (peak_bytes({"checkpoint": checkpoint}, 8, 64, width=16, depth=1) for checkpoint in ("none", "all", "sliced"))
    assert thrifty < 0.75 * plain and sliced < 0.8 * thrifty, (plain, thrifty, sliced)


def test_the_gpu_benchmark_runs_dry(tmp_path):
    out = tmp_path / "gpu.md"
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = out.read_text(encoding="utf-8")
    assert "error" not in text.replace("| Lightning | error: not installed |", "") and "Parts that failed" not in text, text
    for line in ("| *the user's table (another card)* | 8.5/s, 4.2 GB |", "none in 7 steps", "A resume is exact", "finished in 2 parts"):
        assert line in text, text


logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


def test_a_mode_that_does_nothing_here_is_told(tmp_path, caplog):
    trained(tmp_path, cuda_graph=True)
    assert "cuda_graph=True is for CUDA; on cpu" in caplog.text


def test_a_way_may_be_changed_from_a_switch_to_a_word(tmp_path):
    trainer = UNetTrainer(UNet(1, 1, width=4, depth=2), loader(), loader(6), device="cpu", run_dir=tmp_path / "run", observers=[], channels_last=True)
    assert trainer.set("channels_last", "auto") == "channels_last True → auto"
    assert [event["text"] for event in trainer.history.events] == ["channels_last True → auto"]


def test_a_number_without_end_is_refused_and_ends_no_run(tmp_path):
    trainer = UNetTrainer(UNet(1, 1, width=4, depth=2), loader(), loader(6), device="cpu", run_dir=tmp_path / "run", observers=[])
    run = trainer.start(10_000)
    asked = run.set("epochs", 10**400)
    assert not asked.wait(30) and "epochs must be a whole number" in asked.message
    assert run.state == "running" and run.stop().wait(30) and run.wait(30)
