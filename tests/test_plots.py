"Plots, overlays and scales: threads, styles, extreme data, and that a blit shows what a full draw shows."
import io
import math
import random
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from unet_nbtrain.history import History
from unet_nbtrain.overlays import compare_labels, image_dice, overlay_errors, to_labels
from unet_nbtrain.plots import LiveCurves, plot_history, plot_samples, save_png
from unet_nbtrain.scales import clear_spot, fit_range, fit_right, mark_texts, thin


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def a_run(epochs, loss=lambda e: 0.9 ** e + 0.1, dice=lambda e: 1 - 0.6 / e, lr=lambda e: 1e-3):
    history = History()
    for epoch in range(1, epochs + 1):
        row = {"train": {"loss": loss(epoch), "dice": dice(epoch)}, "val": {"loss": 1.1 * loss(epoch), "dice": dice(epoch)}}
        history.append({"epoch": epoch, **row, "lr": lr(epoch)})
    return history


def a_trace(epochs, per_epoch, loss=lambda e: 0.9 ** e + 0.1):
    x = np.arange(1, int(epochs * per_epoch) + 1) / per_epoch
    return x.tolist(), (np.vectorize(loss)(x) * (1 + 0.1 * np.sin(37 * x))).tolist()


NAN, INF = math.nan, math.inf
EXTREMES = {
    "nothing": (a_run(0), ((), ())),
    "one batch": (a_run(0), ([0.01], [0.7])),
    "one epoch": (a_run(1), a_trace(1.2, 10)),
    "two epochs": (a_run(2), a_trace(2, 3)),
    "many epochs": (a_run(300), a_trace(300, 10)),
    "a hundred thousand batches": (a_run(20), a_trace(20, 5000)),
    "all NaN": (a_run(5, lambda e: NAN, lambda e: NAN, lambda e: NAN), ([0.5, 1.0], [NAN, NAN])),
    "all infinite": (a_run(5, lambda e: INF), ([0.5, 1.0], [INF, -INF])),
    "seven decades": (a_run(12, lambda e: 10 ** (3 - 0.6 * e)), a_trace(12, 20, lambda e: 10 ** (3 - 0.6 * e))),
    "constant": (a_run(5, lambda e: 0.5, lambda e: 0.5), ([1, 2], [0.5, 0.5])),
    "zero": (a_run(5, lambda e: 0.0, lambda e: 0.0, lambda e: 0.0), ([1, 2], [0.0, 0.0])),
    "negative": (a_run(5, lambda e: -e, lambda e: -0.1), ([1, 2], [-3, -4])),
    "huge": (a_run(5, lambda e: 1e300 * e, lr=lambda e: 1e-30), ([1, 2], [1e300, 1e308])),
    "tiny": (a_run(5, lambda e: 5e-324 * e, lr=lambda e: 5e-324), ([1, 2], [1e-320, 0])),
    "explodes": (a_run(5, lambda e: 1e30 if e == 4 else 0.5), ([1, 2, 3], [0.5, 1e38, NAN])),
    "gaps": (a_run(9, lambda e: NAN if e % 2 else 1 / e, lambda e: NAN if e % 3 else 0.5), a_trace(9, 3, lambda e: NAN if e > 5 else 1.0)),
    "no metrics": (History(), ((), ())),
    "uneven trace": (a_run(3), ([0.1, 0.2, 0.3], [0.5, 0.4])),
}
EXTREMES["no metrics"][0].append({"epoch": 3})


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_data_are_drawn_without_a_warning(name):
    "Live and finished, from nothing to 1e300: a picture of the same size, and neither error nor warning"
    history, trace = EXTREMES[name][0].snapshot(), EXTREMES[name][1]
    for event in ("set", "resumed", "problem", "save", "pause"):
        history.mark(event, 0.5 * len(history), 7, "text with $dollars$ and <tags> and \\frac{")
    with warnings.catch_warnings(record=True) as told:  # Not as errors: those would hit whatever else happens in the process
        warnings.simplefilter("always")
        live = LiveCurves(dpi=50)
        pictures = [live.png(history, trace), live.png(history, trace), save_png(plot_history(history, trace, dpi=50))]
    assert not [str(warning.message) for warning in told if not issubclass(warning.category, ResourceWarning)]
    assert {pixels(png).shape for png in pictures} == {(155, 525, 3)}
    assert pictures[0] == pictures[1] and (live.full_draws, live.blits) == (1, 1)


def test_an_empty_plot_says_what_it_waits_for():
    live = LiveCurves(dpi=50)
    empty = live.png(History())
    hints = [hint.get_text() for hint in live._curves.hints]
    assert hints[:2] == ["waiting for the first batch", "after the first epoch"]
    live.png(History(), ([0.1], [0.7]))
    assert [hint.get_text() for hint in live._curves.hints][:2] == ["", "after the first epoch"]
    live.png(*EXTREMES["all NaN"])
    assert [hint.get_text() for hint in live._curves.hints][:2] == ["no finite loss", "no finite value"]
    assert (pixels(empty) < 200).any()


def test_every_blit_equals_a_full_draw():
    "A run is replayed in small steps with every kind of change; each picture is compared with one drawn in full"
    whole, (x, y) = a_run(12), a_trace(12, 30)
    live, rng = LiveCurves(dpi=40), random.Random(0)
    history, done, compared = History(), 0, 0
    for now in sorted(rng.uniform(0, 12) for _ in range(60)):
        while done < int(now):
            history.append(whole.rows[done])
            done += 1
        if rng.random() < 0.15:
            history.mark(rng.choice(["set", "problem", "save"]), now, 1, "x")
        upto = int(now * 30)
        blits = live.blits
        png = live.png(history, (x[:upto], y[:upto]), total_epochs=12)
        if live.blits > blits:
            compared += 1
            live._parts = None
            assert live.png(history, (x[:upto], y[:upto]), total_epochs=12) == png
    assert compared > 20


def with_classes(epochs, classes, names=None):
    "A run with scores per class; the last class occurs in every third epoch only"
    history = History()
    history.class_names = names
    for epoch in range(1, epochs + 1):
        scores = [1 - (i + 1) / (classes + 1) * 0.9 ** epoch for i in range(classes)]
        scores[-1] = scores[-1] if epoch % 3 == 1 else NAN
        val = {"loss": 1 / epoch, "dice": 0.5, "iou": 0.4, "per_class": {"dice": scores, "iou": scores}}
        history.append({"epoch": epoch, "train": {"loss": 1 / epoch, "dice": 0.6}, "val": val, "lr": 1e-3})
    return history


@pytest.mark.parametrize(("epochs", "classes"), [(0, 2), (1, 1), (1, 3), (2, 2), (500, 4), (12, 11), (6, 30)])
def test_the_axes_of_the_classes(epochs, classes):
    "From nothing to 500 epochs and 30 classes: each line is its column, every class of the first 14 is named, nothing warns"
    history = with_classes(epochs, classes, [f"name {i}" for i in range(classes)])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure = plot_history(history, metric=("dice", "iou"), classes="iou", dpi=40)
        save_png(figure)
    assert not [str(warning.message) for warning in told if not issubclass(warning.category, ResourceWarning)]
    assert [ax.get_title(loc="left") for ax in figure.axes][1:] == ["Dice", "IoU", "IoU of each class", "Learning rate"]
    each, lines = figure.axes[3], figure.axes[3].get_lines()
    assert len(lines) == (classes if epochs else 0)
    for i, line in enumerate(lines):
        np.testing.assert_equal(line.get_ydata(), history.column(f"val.per_class.iou.{i}"))
    if epochs == 500:
        assert [line.get_markevery() for line in lines] == [21, 21, 21, 1]
    texts = [text.get_text() for text in each.get_legend().get_texts()]
    assert texts == ([f"name {i}" for i in range(min(classes, 14))] + ["and 16 more"] * (classes == 30) if epochs else [])
    looks = {(str(line.get_color()), line.get_linestyle()) for line in lines[:25]}
    assert len(looks) == len(lines[:25])


def test_the_scale_of_the_loss_can_be_chosen():
    falling, flat, negative = a_run(9, lambda e: 10.0 ** -e), a_run(9), a_run(9, lambda e: -e)
    scales = {None: ["log", "linear", "linear"], True: ["log", "log", "linear"], False: ["linear"] * 3}
    for log, wanted in scales.items():
        assert [plot_history(history, log=log, dpi=20).axes[0].get_yscale() for history in (falling, flat, negative)] == wanted


def test_a_score_with_dots_in_its_name_has_axes_too():
    history = with_classes(5, 3)
    figure = plot_history(history, metric="per_class.dice.1", dpi=30)
    lines = [line.get_ydata().tolist() for line in figure.axes[1].get_lines()]
    assert history.column("val.per_class.dice.1") in lines and figure.axes[1].get_title(loc="left") == "per_class.dice.1"
    assert LiveCurves(dpi=30, metric="per_class.dice.1").png(history).startswith(b"\x89PNG")
    assert [len(plot_history(history, metric=names, dpi=20).axes) for names in ((), ("dice", "dice"), ("loss", "dice", "iou"))] == [2, 3, 4]


def test_the_legend_names_batches_only_where_there_are_some():
    texts = [[text.get_text() for text in plot_history(a_run(2), trace, dpi=20).axes[0].get_legend().get_texts()] for trace in (None, a_trace(2, 3))]
    assert texts == [["train", "validation"], ["train", "validation", "each batch"]]


def test_a_new_run_in_the_same_object_starts_afresh():
    live = LiveCurves(dpi=40)
    first = live.png(a_run(2), a_trace(2, 10))
    live.png(a_run(200, lambda e: 10 ** (2 - e / 20)), a_trace(200, 10))
    assert live._curves.axes[0].get_yscale() == "log"
    assert live._curves.right > 190
    again = live.png(a_run(2), a_trace(2, 10))
    assert live._curves.axes[0].get_yscale() == "linear" and live._curves.right < 5
    assert pixels(first).shape == pixels(again).shape


def test_a_rewound_history_is_drawn_anew():
    live, history = LiveCurves(dpi=40), a_run(8)
    before = live.png(history)
    history.truncate(5)
    for epoch in (6, 7, 8):
        history.append({"epoch": epoch, "train": {"loss": 0.9}, "val": {"loss": 0.9, "dice": 0.1}})
    assert live.png(history) != before
    assert live._curves.lines["val.loss"].get_ydata()[-1] == 0.9


STYLES = """
import sys, hashlib
import numpy as np
import matplotlib
from matplotlib import style
from unet_nbtrain.history import History
from unet_nbtrain.plots import LiveCurves, plot_history, plot_samples, save_png
history = History()
for e in range(1, 9):
    history.append({"epoch": e, "train": {"loss": 1 / e, "dice": 1 - 0.5 / e}, "val": {"loss": 1.1 / e, "dice": 0.9 - 0.5 / e}, "lr": 0.1 / e})
history.mark("set", 3, 1, "lr")
image, mask = np.linspace(0, 1, 1024).reshape(1, 32, 32), np.eye(32)
def sums():
    pictures = [LiveCurves(dpi=40).png(history), save_png(plot_samples([image], [mask], [mask.T * 0.9], dpi=40))]
    return [hashlib.sha256(png).hexdigest() for png in pictures]
want = sums()
different = []
for name in set(style.available) - {"classic"}:  # It also changes how letters are hinted, which no artist can set
    with style.context(name):
        during = dict(matplotlib.rcParams)
        if sums() != want: different.append(name)
        assert dict(matplotlib.rcParams) == during, name
with matplotlib.rc_context({"savefig.bbox": "tight", "figure.constrained_layout.use": True, "axes.autolimit_mode": "round_numbers", "figure.dpi": 33,
                            "image.cmap": "jet", "image.origin": "lower", "axes.titlelocation": "right", "text.parse_math": True, "axes.grid": False}):
    if sums() != want: different.append("own")
print(len(style.available), different, "matplotlib.pyplot" in sys.modules)
"""


def test_the_users_style_changes_nothing_and_pyplot_is_never_imported():
    "Under every style that matplotlib has but one, the pictures have the same bytes; and drawing changes no setting"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", STYLES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, rest = done.stdout.split(" ", 1)
    assert int(count) > 15
    assert rest.strip() == "[] False"


def test_drawing_beside_pyplot_in_another_thread():
    "The main thread makes pyplot figures while a thread draws live curves; both get what they would get alone"
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    history, trace = a_run(6), a_trace(6, 20)
    want, got = LiveCurves(dpi=40).png(history, trace), []

    def draw():
        for _ in range(8):
            got.append(LiveCurves(dpi=40).png(history, trace))

    def picture():
        figure, axes = plt.subplots(figsize=(2, 1))
        axes.plot([1, 2, 3])
        out = io.BytesIO()
        plt.savefig(out, metadata={"Software": None})
        plt.close(figure)
        return out.getvalue()

    mine, thread, interval = picture(), threading.Thread(target=draw), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        seen = [picture() for _ in range(10)]
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert set(seen) == {mine} and set(got) == {want} and len(got) == 8
    assert not plt.get_fignums()


def test_reading_a_history_that_grows():
    "A writer appends while a thread draws: no error, and the last picture shows the last row"
    history, live, failed, done = History(), LiveCurves(dpi=40), [], threading.Event()

    def draw():
        try:
            while not done.is_set():
                live.png(history)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    for row in a_run(150).rows:
        history.append(row)
        history.mark("set", row["epoch"], 1, "x")
        time.sleep(0.002)
    done.set()
    thread.join()
    assert not failed
    live.png(history)
    assert live._curves.lines["train.loss"].get_xdata()[-1] == 150


def test_artists_do_not_pile_up():
    "After 60 changes of the background the figure has as many parts as after 20"
    live, history, counts = LiveCurves(dpi=20), a_run(10), []
    for turn in range(60):
        state = history.state_dict()
        history.load_state_dict({**state, "events": state["events"][-6:]})
        history.mark("set" if turn % 2 else "problem", turn % 10, turn, "x")
        live.png(history)
        counts.append(sum(len(ax.get_children()) for ax in live._curves.axes))
    assert live.full_draws == 60
    assert max(counts[40:]) <= max(counts[10:20])


def test_the_parts_laid_over_each_other_are_the_figure():
    "Before the first batch, with everything in it, and after the axis of the loss alone was drawn anew"
    live, run, (x, y) = LiveCurves(dpi=60), a_run(5), a_trace(5.5, 30)
    run.mark("set", 2.5, 9, "lr 0.1 -> 0.01")
    for history, trace in ((History(), ((), ())), (run, (x, y)), (run, (x, [*y[:-30], *[9.0] * 30]))):
        live.png(history, trace, total_epochs=50)
        curves = live._curves
        parts = live._background[..., :3]
        curves.legend.set_animated(False)
        curves.canvas.draw()
        curves.legend.set_animated(True)
        assert np.array_equal(parts, np.array(curves.canvas.buffer_rgba())[..., :3])
    assert live.full_draws == 3 and curves.axes[0].get_ylim()[1] > 8


def test_the_dark_filter_keeps_text_and_lines_apart():
    "The CSS filter of the panel, invert(.87) hue-rotate(180deg): the ground becomes dark, blue stays bluish, vermillion reddish"
    turned = np.array([[-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856]])

    def dark(rgb):
        inverted = 255 * 0.87 + np.asarray(rgb, float) * (1 - 2 * 0.87)
        return np.clip(turned @ inverted, 0, 255)

    ground, blue, red = dark([255, 255, 255]), dark([0x00, 0x72, 0xB2]), dark([0xD5, 0x5E, 0x00])
    assert ground.max() < 40
    assert blue[2] > blue[0] + 40 and red[0] > red[2] + 40
    assert min(blue.max(), red.max()) > ground.max() + 100
    png = pixels(LiveCurves(dpi=40).png(a_run(3)))
    assert (png[0] == 255).all() and (png[:, 0] == 255).all()


def test_save_png_is_deterministic_and_restores_the_figure(tmp_path):
    figure = plot_history(a_run(4))
    first = save_png(figure, tmp_path / "a" / "curves.png", dpi=70)
    assert figure.dpi == 200 and pixels(first).shape[:2] == (217, 735)
    assert (tmp_path / "a" / "curves.png").read_bytes() == first == save_png(figure, dpi=70)
    data, size = figure._repr_png_()
    assert size == {"width": 1050, "height": 310} and pixels(data).shape[:2] == (620, 2100)


@pytest.mark.parametrize("seed", range(20))
def test_thin_keeps_every_peak(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(801, 20_000))
    x, y = np.arange(count) / 7, rng.standard_normal(count)
    y[rng.integers(0, count, count // 5)] = np.nan
    most = int(rng.choice([10, 100, 800]))
    thin_x, thin_y = thin(x, y, most)
    assert len(thin_x) == len(thin_y) <= most
    assert np.nanmin(thin_y) == np.nanmin(y) and np.nanmax(thin_y) == np.nanmax(y)
    assert (np.diff(thin_x) >= 0).all() and set(thin_x) <= set(x)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_always_contain_the_data_and_settle(seed):
    rng = np.random.default_rng(seed)
    old, moves, values = None, 0, []
    for step in range(400):
        values.append(math.exp(-step / 60) + 0.05 * rng.random() + 0.01)
        new = fit_range(old, np.array(values))
        low, high = new.limits()
        assert low <= min(values) and max(values) <= high
        moves, old = moves + (new is not old), new
    assert moves < 40
    right = None
    for x in np.linspace(0.01, 50, 500):
        right = fit_right(right, x, total=50)
        assert right >= x
    assert abs(right - 51.5) < 1


def test_labels_do_not_lie_on_curves_when_there_is_room():
    x = np.linspace(0, 1, 200)
    for curve in (0.9 - 0.8 * x, 0.1 + 0.8 * x, 0.5 + 0.2 * np.sin(6 * x)):
        for at in range(0, 200, 20):
            cx, cy = clear_spot((x[at], curve[at]), np.column_stack([x, curve]), upwards=at % 40 == 0)
            near = np.abs(x - cx) < 0.09
            assert (np.abs(curve[near] - cy) > 0.05).all() or cy == 0.5


def test_mark_texts_of_a_long_run_never_touch():
    rng = random.Random(1)
    events = [{"kind": "set", "epoch": x, "text": "lr 1e-3 -> 3e-4"} for x in sorted(rng.uniform(0, 100) for _ in range(300))]
    places = [x for x, _, _ in mark_texts(events, 103)]
    assert places[0] == events[-1]["epoch"] and 2 <= len(places) <= 5
    assert all(a - b > 0.2 * 103 for a, b in zip(places, places[1:]))


def test_image_dice_agrees_with_sets():
    rng = np.random.default_rng(0)
    for _ in range(50):
        truth, found = rng.integers(0, 3, (2, 9, 9))
        scores = []
        for label in (1, 2):
            a, b = set(zip(*np.nonzero(truth == label))), set(zip(*np.nonzero(found == label)))
            scores += [2 * len(a & b) / (len(a) + len(b))] if a | b else []
        assert abs(image_dice(truth, found) - np.mean(scores)) < 1e-12
        cases = compare_labels(truth, found)
        assert sum(c.sum() for c in cases.values()) == ((truth > 0) | (found > 0)).sum()


def test_tensors_of_every_kind_become_labels_and_pictures():
    import torch

    truth = torch.zeros(2, 1, 16, 16)
    truth[:, :, 4:9, 4:9] = 1
    want = save_png(plot_samples(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), truth, truth, dpi=40))
    for kind in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64):
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        assert save_png(plot_samples(images, truth.to(kind), truth[:, 0].to(kind), dpi=40)) == want
    scores = torch.cat([1 - truth, truth], 1).requires_grad_()
    assert (to_labels(scores[0]) == to_labels(truth[0])).all()
    assert (overlay_errors(None, truth[0], scores[0]) == overlay_errors(None, truth[0], truth[0])).all()
