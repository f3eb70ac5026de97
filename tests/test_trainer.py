"""Features of a whole training through the public API: averages, kept checkpoints, endings, settings, class names."""

import contextlib
import math
import signal
import threading
import time

import pytest
import torch
from counting import MADE_ON_HOST, Operations

from unet_nbtrain import EarlyStopping, SegmentationMetrics, UNet, UNetPredictor, UNetTrainer, create_scheduler, demo_dataloaders, evaluate
from unet_nbtrain.guard import FiniteGuard

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def loaders():
    return demo_dataloaders(n_train=8, n_val=4, size=32, batch_size=4)


@pytest.fixture
def make(loaders, tmp_path):
    """A trainer in a folder of its own; the same name is the same folder"""

    def make(name="run", seed=0, data=loaders, model=None, **options):
        torch.manual_seed(seed)
        model = model or UNet(3, 1, width=4, depth=2)
        return UNetTrainer(model, *data, **{"device": "cpu", "run_dir": tmp_path / name, "observers": []} | options)

    return make


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Watch:
    """Calls a function after each batch of training"""

    def __init__(self, act):
        self.act = act

    def on_batch_end(self, trainer, loss):
        if trainer.phase == "train":
            self.act(trainer)


# Averaged weights


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_follows_the_steps_by_hand(make, accumulate):
    decay, seen = 0.7, []
    trainer = make(ema_decay=decay, accumulate_gradients=accumulate)

    def follow(trainer):
        if trainer._at_boundary:
            seen.append(state_of(trainer.model))

    trainer.observers.add(Watch(follow))
    trainer.train(3)
    expected = seen[0]
    for weights in seen[1:]:
        expected = {name: decay * old + (1 - decay) * weights[name] for name, old in expected.items()}
    average = trainer.averaged.module.state_dict()
    assert len(seen) == trainer.global_step == 6 // accumulate
    floats = [name for name, tensor in average.items() if tensor.is_floating_point()]
    assert floats and all(torch.allclose(average[name], expected[name], atol=1e-6) for name in floats)


def test_scores_are_those_of_the_average_and_so_is_the_best_file(make, loaders):
    trainer = make(ema_decay=0.5)
    best = trainer.train(4).best
    saved = torch.load(trainer.checkpoint_dir / "best_model.pth")
    fresh = UNet(**saved["model_config"]).eval()
    fresh.load_state_dict(saved["model_state_dict"])
    metrics = SegmentationMetrics(1)
    with torch.no_grad():
        for images, masks in loaders[1]:
            metrics.update(fresh(images), masks)
    assert metrics.compute()["dice"] == pytest.approx(best["val"]["dice"], abs=1e-12)
    assert not equal(saved["model_state_dict"], saved["training_model_state_dict"])


def test_a_training_without_average_is_not_touched_by_the_feature(make):
    plain, averaged = make("plain"), make("averaged", ema_decay=0.9)
    plain.train(3), averaged.train(3)
    last = [torch.load(o.checkpoint_dir / "last.pth") for o in (plain, averaged)]
    assert equal(last[0]["model_state_dict"], last[1]["training_model_state_dict"])
    assert plain.history["train_losses"] == averaged.history["train_losses"]


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_an_averaged_run_resumes_exactly(make, step):
    whole = make("whole", ema_decay=0.8)
    whole.train(3)
    part = make("part", ema_decay=0.8)
    part.observers.add(Watch(lambda trainer: trainer.global_step == step and trainer.run.stop()))
    part.train(3)
    again = make("part", seed=9, ema_decay=0.8)
    again.train(3, resume="last")
    files = [torch.load(o.checkpoint_dir / "last.pth") for o in (whole, again)]
    assert all(equal(files[0][key], files[1][key]) for key in ("model_state_dict", "training_model_state_dict"))
    assert files[0]["averaged_steps"] == files[1]["averaged_steps"] == 6
    assert whole.history["val_losses"] == again.history["val_losses"]
    assert whole.history.column("grad_norm") == again.history.column("grad_norm")


# Kept checkpoints


def names(trainer, kind):
    return sorted(int(path.stem.split("_")[1]) for path in trainer.checkpoint_dir.glob(f"{kind}_*.pth"))


@pytest.mark.parametrize("monitor", ["loss", "dice"])
def test_top_k_are_the_best_by_what_is_monitored(make, monitor):
    trainer = make(save_top_k=3)
    trainer.early_stopping = EarlyStopping(monitor=monitor)
    trainer.train(7)
    column = trainer.history.column(f"val.{monitor}")
    order = sorted(range(7), key=lambda i: (column[i] if monitor == "loss" else -column[i], i))
    assert names(trainer, "top") == sorted(i + 1 for i in order[:3])
    for number in names(trainer, "top"):
        assert torch.load(trainer.checkpoint_dir / f"top_{number:04d}.pth")["epoch"] == number


def test_regular_checkpoints_are_kept_as_long_as_wished(make):
    trainer = make(save_every_n_epochs=2, keep_epochs=2)
    trainer.train(7)
    assert names(trainer, "epoch") == [4, 6]
    trainer.set("keep_epochs", None)
    trainer.train(3)
    assert names(trainer, "epoch") == [4, 6, 8, 10]


def test_a_resumed_run_keeps_the_same_top(make):
    whole, part = make("whole", save_top_k=2), make("part", save_top_k=2)
    whole.train(6)
    part.train(3)
    again = make("part", save_top_k=2, seed=5)
    again.train(6, resume="last")
    assert names(whole, "top") == names(again, "top")


def test_a_link_never_changes_with_the_file_it_was_made_of(make):
    trainer = make(save_every_n_epochs=1)
    trainer.train(1)
    first = (trainer.checkpoint_dir / "epoch_0001.pth").read_bytes()
    trainer.train(2)
    assert (trainer.checkpoint_dir / "epoch_0001.pth").read_bytes() == first


# Endings


def stop(trainer):
    trainer.run.stop()


def interrupt(trainer):
    signal.raise_signal(signal.SIGINT)


def fail(trainer):
    trainer.criterion = None


def no_memory(trainer):
    def criterion(logits, masks):
        raise torch.OutOfMemoryError("simulated")

    trainer.criterion = criterion


@pytest.mark.parametrize("how", [stop, interrupt, fail, no_memory])
@pytest.mark.parametrize("ema", [None, 0.6])
def test_best_weights_are_restored_at_every_ending(make, how, ema):
    trainer = make(ema_decay=ema)
    trainer.observers.add(Watch(lambda trainer: trainer.global_step == 5 and how(trainer)))
    try:
        trainer.train(50)
    except (TypeError, torch.OutOfMemoryError):
        assert how in (fail, no_memory)
    best = torch.load(trainer.checkpoint_dir / "best_model.pth")
    assert trainer.current_epoch == 2 and best["epoch"] in (1, 2)
    assert equal(best["model_state_dict"], state_of(trainer.model))
    assert not trainer.model.training and torch.is_grad_enabled() and len(trainer.history) == 2


def test_a_finished_run_is_extended_as_if_it_had_never_ended(make):
    whole, parts = make("whole"), make("parts")
    whole.train(6)
    for epochs in (1, 2, 3):
        parts.train(epochs)
    a, b = (torch.load(o.checkpoint_dir / "last.pth") for o in (whole, parts))
    assert equal(a["model_state_dict"], b["model_state_dict"]) and a["global_step"] == b["global_step"] == 12
    assert whole.history["train_losses"] == parts.history["train_losses"]


# Settings


def test_the_threshold_counts_from_the_next_pass_on(make):
    trainer = make()
    trainer.train(2)
    trainer.set("threshold", 0.999)
    strict = trainer.validate_epoch()
    trainer.set("threshold", 0.001)
    lax = trainer.validate_epoch()
    assert lax["recall"] > 0.9 > strict["recall"] and lax["loss"] == strict["loss"]
    assert torch.load(trainer.save_checkpoint(trainer.checkpoint_dir / "x.pth"))["threshold"] == 0.001


def test_clip_norm_and_gradient_norm_in_the_history(make):
    free, clipped = make("free"), make("clipped", gradient_clip_norm=1e-3)
    free.train(1), clipped.train(1)
    assert free.history.rows[0]["grad_norm"] == pytest.approx(clipped.history.rows[0]["grad_norm"], rel=0.5)
    assert clipped.history.rows[0]["grad_norm"] > 1e-3, "the norm is measured before clipping"


def test_a_new_rate_scales_what_the_schedule_does_later(make):
    rates = {}
    for factor in (1, 0.1):
        trainer = make(f"x{factor}")
        trainer.scheduler = create_scheduler(trainer.optimizer, "cosine", T_max=6, warmup=2)
        trainer.train(1)
        trainer.set("lr", trainer.learning_rate * factor)
        trainer.train(5)
        rates[factor] = trainer.history["learning_rates"]
    assert rates[0.1][0] == rates[1][0]
    assert rates[0.1][1:] == pytest.approx([0.1 * rate for rate in rates[1][1:]])


def test_unknown_keywords_are_refused_with_the_known_ones(make):
    with pytest.raises(TypeError, match="does not take 'clip'.*gradient_clip_norm"):
        make(clip=1.0)
    with pytest.raises(ValueError, match="ema_decay must be a number, greater than 0 and smaller than 1, or None; got 1.5"):
        make(ema_decay=1.5)


# Mixed precision on the CPU


def test_bf16_trains_close_to_full_precision(make):
    full, half = make("full"), make("half", amp="bf16")
    full.train(3), half.train(3)
    assert half.val_batch[2].dtype == torch.bfloat16
    assert half.history["train_losses"] == pytest.approx(full.history["train_losses"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


# Class names


def test_class_names_travel_from_the_data_to_history_and_checkpoint(make):
    data = demo_dataloaders(n_train=4, n_val=2, size=32, n_classes=3, batch_size=2)
    for loader in data:
        loader.dataset.class_names = ["background", "round", "long"]
    trainer = make(data=data, model=UNet(3, 3, width=4, depth=2))
    trainer.train(1)
    assert trainer.history.class_names == ["background", "round", "long"]
    table = str(trainer.history.class_table())
    assert all(name in table for name in ("background", "round", "long"))
    saved = torch.load(trainer.checkpoint_dir / "best_model.pth")
    assert saved["data"]["class_names"] == ["background", "round", "long"] and saved["data"]["n_classes"] == 3


def test_a_loader_that_is_not_ours_is_enough(make):
    images = torch.rand(6, 3, 16, 16)
    data = torch.utils.data.TensorDataset(images, (images[:, :1] > 0.5).float())
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    trainer = make(data=(loader, loader))
    trainer.train(2)
    saved = torch.load(trainer.checkpoint_dir / "last.pth")
    assert saved["data"] is None and math.isfinite(trainer.history["val_losses"][-1])


def test_validation_samples_are_at_hand_after_the_run(make):
    trainer = make()
    trainer.train(1)
    images, masks, logits = trainer.val_batch
    assert len(images) == len(masks) == len(logits) == 4 and not logits.requires_grad
    with torch.no_grad():
        assert torch.allclose(trainer.model(images), logits, atol=1e-5)


IN_A_STEP = [{}, {"gradient_clip_norm": 1.0}, {"ema_decay": 0.9}, {"accumulate_gradients": 2}, *({"criterion": name} for name in ("focal", "dice", "tversky", "bce_dice"))]


@pytest.mark.parametrize("options", IN_A_STEP, ids=str)
def test_no_step_reads_a_number_or_makes_a_tensor_of_one(tmp_path, options):
    """What is read is read once an epoch, and so is what is made: four times as many steps do no more of it"""
    found = []
    for n_train in (16, 64):
        train, val = demo_dataloaders(n_train=n_train, n_val=4, size=32, batch_size=4)
        trainer = UNetTrainer(UNet(3, 1, width=4, depth=1), train, val, device="cpu", run_dir=tmp_path / str(n_train), observers=[], **options)
        trainer.train_loader, trainer.val_loader = list(train), list(val)
        with Operations() as done:
            trainer.train(1)
        found.append((done.counts["_local_scalar_dense"], done.counts[MADE_ON_HOST]))
    assert found[0] == found[1] and found[0][0] > 0


class Blind:
    """As on a card: whether a step was good is known to the device alone"""

    def on_run_start(self, trainer):
        trainer._guard._view = None


def test_the_average_costs_a_step_a_few_operations_however_many_tensors_there_are(make, loaders):
    found = {}
    for options in ({}, {"ema_decay": 0.9}):
        for epochs in (2, 4):
            trainer = make(f"{epochs}{options}", data=list(map(list, loaders)), observers=[Blind()], **options)
            with Operations() as done:
                trainer.train(epochs)
            found[len(options), epochs] = sum(count for name, count in done.counts.items() if name != "detach")
    more_steps = 2 * len(loaders[0])
    assert (found[1, 4] - found[1, 2]) - (found[0, 4] - found[0, 2]) < 12 * more_steps


def test_an_average_that_would_begin_with_a_bad_step_of_which_only_the_device_knows_holds_good_numbers(make, loaders):
    (images, masks), *rest = [tuple(batch.clone() for batch in pair) for pair in loaders[0]]
    images, broken = images.float(), images.float() * math.nan
    watch = Watch(lambda trainer: setattr(trainer, "ema_decay", 0.5))
    trainer = make(data=([(images, masks), (broken, masks), (images, masks)], loaders[1]), observers=[Blind(), watch])
    trainer.train(1)
    assert trainer.history.rows[0]["skipped_steps"] == len(trainer.history.events) == 1
    assert all(value.isfinite().all() for value in state_of(trainer.averaged.module).values())


def test_a_mask_of_infinities_among_the_buffers_is_no_bad_number_to_the_average(make):
    model = UNet(3, 1, width=4, depth=1)
    model.register_buffer("seen", torch.tensor([0.0, -math.inf]))
    trainer = make(model=model, ema_decay=0.9)
    trainer.train(2)
    assert trainer.averaged.module.seen.tolist() == [0.0, -math.inf] and not trainer.history.events


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no room")], ids=["interrupt", "full memory"])
def test_the_norm_of_a_step_that_is_done_again_counts_once(make, loaders, monkeypatch, error):
    """Broken off between the look at the length of the gradient and the step itself"""
    judge, calls, seen = FiniteGuard.judge, [], []

    def breaks(guard, *args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return judge(guard, *args, **options)

    monkeypatch.setattr(FiniteGuard, "judge", breaks)
    trainer = make(gradient_clip_norm=1.0, observers=[Watch(lambda trainer: seen.append((trainer.global_step, trainer._norms.weight)))])
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(1)
    if trainer.current_epoch == 0:
        trainer.train(1)
    assert len(calls) == 3 and seen == [(1, 1), (2, 2)]


class SetAtEpoch:
    """A command that comes when the second epoch begins"""

    def __init__(self, name, value):
        self.command, self.seen = (name, value), []

    def on_epoch_start(self, trainer):
        if trainer.current_epoch == 1:
            trainer.run.set(*self.command)

    def on_batch_end(self, trainer, loss):
        if trainer.phase == "train":
            self.seen.append(trainer._train_meter.threshold)


def test_a_threshold_that_is_set_before_the_first_batch_counts_from_there(make):
    make(observers=[watch := SetAtEpoch("threshold", 0.3)]).train(2)
    assert watch.seen == [0.5, 0.5, 0.3, 0.3]


# Ends and beginnings that cross each other


def test_a_run_that_was_stopped_before_its_first_step_begins_anew_in_silence(make):
    trainer = make()
    run = trainer.start(1)
    run.stop()
    run.wait()
    assert trainer.global_step == 0
    trainer.start(1).wait()
    assert trainer.global_step == 2 and not [event for event in trainer.history.events if event["kind"] == "problem"]


def test_two_threads_start_one_trainer_and_one_run_begins(make):
    for turn in range(4):
        trainer, barrier, refused = make(f"door{turn}"), threading.Barrier(2), []

        def start(trainer=trainer, barrier=barrier, refused=refused):
            barrier.wait()
            try:
                trainer.start(1)
            except RuntimeError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        trainer.run.wait()
        assert len(refused) == 1 and "trainer.run.wait()" in refused[0]
        assert trainer.run.exception is None and len(trainer.history) == 1


def test_an_average_that_is_switched_off_after_the_last_step_is_evaluated_after_a_resume_too(make):
    """The setting takes effect with the next step, so the validation in between is that of the average"""

    def switch_off(trainer):
        if trainer.batch == trainer.num_batches and trainer.current_epoch == 0:
            trainer.run.set("ema_decay", None)

    class StopInValidation:
        def on_batch_end(self, trainer, loss):
            if trainer.phase == "val":
                trainer.run.stop()

    data = demo_dataloaders(n_train=8, n_val=8, size=32, batch_size=4)
    whole, part = (make(name, data=data, ema_decay=0.7, observers=[Watch(switch_off)]) for name in ("whole", "part"))
    part.observers.add(StopInValidation())
    whole.train(2)
    part.train(2)
    assert len(part.history) == 0
    resumed = make("part", data=data, ema_decay=0.7)
    resumed.train(2, resume="last")
    assert resumed.history["val_losses"] == whole.history["val_losses"]


def test_fewer_epochs_than_are_done_end_with_the_present_one(make):
    trainer = make()
    trainer.observers.add(Watch(lambda trainer: trainer.current_epoch == 2 and trainer.run.set("epochs", 1)))
    trainer.train(5)
    assert len(trainer.history) == 3 and trainer.run.reason == "all 3 epochs done"


def test_an_epoch_goes_on_with_larger_batches(make, loaders):
    """The trainer that was stopped, and a new one that resumes: neither is stuck at a batch which there is no more"""
    small = demo_dataloaders(n_train=8, n_val=4, size=32, batch_size=1)
    trainer = make(data=small)
    trainer.observers.add(Watch(lambda trainer: trainer.global_step == 5 and trainer.run.stop()))
    trainer.train(1)
    resumed = make(data=loaders)
    resumed.train(1, resume="last")
    trainer.train_loader = loaders[0]
    trainer.train(1)
    for one in (trainer, resumed):
        assert one.global_step == 7 and len(one.history) == 1
        assert [event["text"][:25] for event in one.history.events if event["kind"] == "problem"] == ["The loader has 2 batches,"]


def test_epochs_that_were_added_are_still_wanted_after_the_run_went_back(make):
    def poison(trainer):
        if trainer.global_step == 3 and trainer.total_epochs == 2:
            trainer.run.set("epochs", 4)
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(math.nan)

    trainer = make(on_nonfinite="rollback")
    trainer.observers.add(Watch(poison))
    trainer.train(2)
    assert any("went back" in event["text"] for event in trainer.history.events) and len(trainer.history) == 4


# Other cells, and the model that is trained


class Modes:
    """The modes of all parts of the model, as the steps of a run leave them"""

    def __init__(self):
        self.found = set()

    def on_batch_end(self, trainer, loss):
        time.sleep(0.002)
        self.found.add((trainer.phase, *{part.training for part in trainer.model.modules()}))


def test_who_asks_the_model_while_it_trains_does_not_disturb_it(make, loaders):
    """Masks and metrics come from a copy: each step trains, each validation evaluates, the numbers are those of a training alone"""
    rows = []
    for asking in (False, True):
        trainer = make(str(asking), observers=[modes := Modes()])
        run = trainer.start(4)
        while asking and not run.ended:
            assert 0 <= evaluate(trainer.model, loaders[1])["dice"] <= 1
            UNetPredictor(model=trainer.model).predict_single(torch.zeros(3, 32, 32))
        run.wait()
        rows.append((trainer.history["train_losses"], trainer.history["val_losses"]))
        assert modes.found == {("train", True), ("val", False)}
    assert rows[0] == rows[1]


@pytest.mark.parametrize("when", ["before", "in a pause"])
def test_gradients_that_somebody_left_are_not_learned_from(make, loaders, when):
    images, _ = next(iter(loaders[0]))

    class Trying:
        def on_state_change(self, trainer, state):
            if state == "paused":
                (1000 * trainer.model.eval()(images)).mean().backward()
                trainer.run.resume()

    plain, tried = make("plain", observers=[first := PauseOnce()]), make("tried", observers=[second := PauseOnce(), Trying()])
    if when == "before":
        first.done = second.done = True
        (1000 * tried.model.eval()(images)).mean().backward()
    else:
        plain.observers.add(ResumeAtOnce())
    plain.train(2), tried.train(2)
    assert plain.history["train_losses"] == tried.history["train_losses"] and equal(state_of(plain.model), state_of(tried.model))


class PauseOnce:
    done = False

    def on_batch_end(self, trainer, loss):
        if not self.done:
            self.done = trainer.run.pause()


class ResumeAtOnce:
    def on_state_change(self, trainer, state):
        if state == "paused":
            trainer.run.resume()


def test_an_average_of_a_model_that_keeps_a_feature_map(make):
    class Keeping(UNet):
        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    plain, keeping = make("plain", ema_decay=0.9), make("keeping", model=Keeping(3, 1, width=4, depth=2), ema_decay=0.9)
    keeping.model.load_state_dict(plain.model.state_dict())
    plain.train(2), keeping.train(2)
    assert equal(state_of(plain.averaged.module), state_of(keeping.averaged.module))
