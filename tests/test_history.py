"History, files and text: what the notebooks cannot show (processes that die, hostile files, random data, imports)."
import copy
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from unet_nbtrain import history as history_room
from unet_nbtrain.files import Settled, atomic_write, csv_rows, csv_text, to_json, to_plain
from unet_nbtrain.history import History
from unet_nbtrain.records import without_copies
from unet_nbtrain.text import html_table, shown_positions


def same(a, b):
    "Equality of plain data in which NaN equals NaN and types matter"
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes() or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and a == b


NAMES = ["loss", "dice", "dice_0", "dice_1", "dice__1", "hd_95", "hd.95", "per_class", "a,b", 'q"', "[x]", "_", "0", "x_", "train_x", "é", "=1"]
VALUES = [0.1, -0.0, 5e-324, 1e308, math.nan, 3, -7, 2**70, True, False, "", "text", "1.5", "nan", "True", "=A1", "x\ny", "[1]", "é,\"", {}, []]


def random_row(rng, epoch):
    "A row with awkward names and values, nested as users nest them"
    def leaf():
        return rng.choice([*VALUES, rng.random(), rng.gauss(0, 1) * 10 ** rng.randint(-300, 300)])

    def phase():
        metrics = {name: leaf() for name in rng.sample(NAMES, rng.randint(0, 5)) if name != "per_class"}
        if rng.random() < 0.6:
            metrics["per_class"] = {name: [leaf() for _ in range(rng.randint(0, 4))] for name in rng.sample(NAMES, 2)}
        return metrics

    row = {"epoch": epoch, "train": phase(), "val": phase(), "lr": rng.random(), "best": rng.random() < 0.3}
    return {**row, **{f"{name}!": leaf() for name in rng.sample(NAMES, 2)}}


@pytest.mark.parametrize("seed", range(60))
def test_round_trips_of_random_histories(tmp_path, seed):
    "JSON, CSV, state and pickle give back what went in; CSV bit for bit, JSON except that infinities become NaN"
    rng = random.Random(seed)
    history = History()
    history.class_names = rng.choice([None, [], ["background", "<cell>", "é\n\"x\""]])
    for epoch in range(1, rng.randint(2, 7)):
        history.append(random_row(rng, epoch))
        history.mark(rng.choice(["set", "pause", "mine"]), epoch - 0.5, epoch * 10, rng.choice(["", "<b>", "é\n"]))
    rows = history.state_dict()["rows"]
    assert same(sorted(map(str, rows)), sorted(map(str, to_plain(history.rows))))

    loaded = History.load(history.save(tmp_path / "h.json"))
    assert same(loaded.state_dict() | {"class_names": None}, history.state_dict() | {"class_names": None})
    assert loaded.class_names == (history.class_names or None)

    by_epoch = {row["epoch"]: row for row in History.from_csv(history.to_csv(tmp_path / "h.csv")).rows}
    for row in rows:
        assert same_unordered(by_epoch[row["epoch"]], row)

    other = History()
    other.load_state_dict(history.state_dict())
    other.class_names = history.class_names
    for clone in (other, history.snapshot(), pickle.loads(pickle.dumps(history)), copy.deepcopy(history)):
        assert same(clone.state_dict(), history.state_dict())


def same_unordered(a, b):
    "As `same`; a table of several rows has one order of columns, so the order of keys may differ"
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_unordered(a[key], b[key]) for key in a)
    return same(a, b)


def test_infinity_survives_csv_and_becomes_nan_in_json(tmp_path):
    history = History()
    history.append({"epoch": 1, "val": {"loss": math.inf, "dice": -math.inf}})
    assert History.from_csv(history.to_csv(tmp_path / "h.csv")).column("val.loss") == [math.inf]
    assert math.isnan(History.load(history.save(tmp_path / "h.json")).column("val.loss")[0])
    json.loads((tmp_path / "h.json").read_text(), parse_constant=pytest.fail)


def test_tensors_and_numpy_scalars_become_plain_and_pass_weights_only(tmp_path):
    history = History()
    history.append({"epoch": np.int64(1), "val": {"loss": torch.tensor(0.5), "dice": np.float64(0.25), "ok": np.bool_(True),
                                                   "per_class": {"dice": torch.tensor([0.5, 0.25])}, "n": np.arange(2)}})
    row = history.rows[0]
    assert row["val"] == {"loss": 0.5, "dice": 0.25, "ok": True, "per_class": {"dice": [0.5, 0.25]}, "n": [0, 1]}
    assert {type(row["epoch"]), type(row["val"]["loss"]), type(row["val"]["dice"]), type(row["val"]["ok"])} == {int, float, bool}
    torch.save(history.state_dict(), tmp_path / "state.pth")
    assert torch.load(tmp_path / "state.pth", weights_only=True) == history.state_dict()


def test_state_shares_nothing_and_bad_state_changes_nothing():
    history = History()
    history.append({"epoch": 1, "val": {"per_class": {"dice": [0.5]}}})
    state = history.state_dict()
    state["rows"][0]["val"]["per_class"]["dice"][0] = 9
    assert history.rows[0]["val"]["per_class"]["dice"] == [0.5]
    for bad in ({"rows": [], "events": [], "class_names": "ab"}, {"rows": [], "events": [], "class_names": [1]}, None, [], {}, {"rows": [], "events": None}, {"rows": [{"epoch": 2}, {"epoch": 1}], "events": []},
                {"rows": [{"epoch": True}], "events": []}, {"rows": [], "events": [{"kind": ""}]}, {"rows": [], "events": [[]]}):
        with pytest.raises((ValueError, TypeError)):
            history.load_state_dict(bad)
        assert history["epochs"] == [1]


def mutated(text, rng):
    "A damaged copy of a file's bytes"
    data = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            del data[place : place + rng.randint(1, 40)]
        elif kind == 2:
            data[place:place] = rng.choice([b"[" * 5000, b"null", b"NaN", b"1e999", b'"', b"{}", b"\x00", b"9" * 5000])
        else:
            data = data[: max(place, 1)]
        data = data or bytearray(b"x")
    return bytes(data)


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_hostile_files_raise_only_value_errors_that_name_the_file(tmp_path, kind):
    "3,000 damaged files: each is read as a valid history or refused in words; nothing else happens"
    history = History()
    for epoch in range(1, 5):
        history.append({"epoch": epoch, "val": {"loss": 1 / epoch, "per_class": {"dice": [0.5, math.nan]}}, "lr": 1e-3, "note": "a"})
        history.mark("set", epoch, epoch, "x")
    history.class_names = ["ground", "cell"]
    path = tmp_path / f"h.{kind}"
    read = History.load if kind == "json" else History.from_csv
    (history.save if kind == "json" else history.to_csv)(path)
    whole, rng, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(1500):
        path.write_bytes(mutated(whole, rng))
        try:
            found = read(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error)) < 600
        else:
            str(found), found._repr_html_(), found.columns()
            assert found.class_names is None or all(isinstance(name, str) for name in found.class_names)
            assert found["epochs"] == sorted(set(found["epochs"]))
    assert refused > 700


def test_missing_and_oversized_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "no.json")
    monkeypatch.setattr("unet_nbtrain.files._MAX_BYTES", 10)
    (tmp_path / "big.json").write_text("[" + "1," * 20 + "1]")
    with pytest.raises(ValueError, match="43 bytes, far more"):
        History.load(tmp_path / "big.json")


WRITER = """
import sys
from unet_nbtrain.history import History
history = History()
for epoch in range(1, 400): history.append({"epoch": epoch, "val": {"loss": 1 / epoch, "dice": 0.5}})
print("ready", flush=True)
while True:
    history.append({"epoch": len(history) + 1, "val": {"loss": 0.5}})
    history.save(sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_killed_while_saving_leaves_a_whole_file(tmp_path):
    "A process that does nothing but save is killed 12 times at random moments; the file is always whole"
    path, rng = tmp_path / "history.json", random.Random(0)
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 + rng.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(History.load(path)) >= 399


def test_a_failed_write_keeps_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "a.txt", "old")
    for name in ("fsync", "replace"):
        def fail(*args):
            raise OSError(28, "No space left on device")
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space left"):
                atomic_write(path, "new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]


def test_writing_goes_through_fsync_of_file_and_folder(tmp_path, monkeypatch):
    "A mutation check for power loss: the file is on disk before it gets its name, the name before we return"
    calls = []
    real = {"fsync": os.fsync, "replace": os.replace}
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync dir" if os.path.isdir(f"/proc/self/fd/{fd}") else "fsync"), real["fsync"](fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), real["replace"](a, b))[1])
    atomic_write(tmp_path / "a.txt", "x")
    assert calls == ["fsync", "replace", "fsync dir"]


def test_two_threads_may_write_one_file(tmp_path):
    path = tmp_path / "a.json"
    def write(letter):
        for _ in range(30):
            atomic_write(path, letter * 5000)
    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("a" * 5000, "b" * 5000)
    assert os.listdir(tmp_path) == ["a.json"]


def test_readers_never_see_half_a_change():
    "truncate and append while readers look: rows stay gapless and marks never run ahead of a truncation"
    history, wrong, done = History(), [], threading.Event()

    def watch():
        while not done.is_set():
            view = history.snapshot()
            epochs = view["epochs"]
            if epochs != list(range(1, len(epochs) + 1)) or any(e["epoch"] > len(epochs) for e in view.events):
                wrong.append((epochs, view.events))
    readers = [threading.Thread(target=watch) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(300):
        history.append({"epoch": len(history) + 1})
        history.mark("save", len(history), turn)
        if turn % 7 == 6:
            history.truncate(len(history) - 3)
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_csv_is_read_by_a_plain_csv_reader(tmp_path):
    "The columns are those that people expect, also for a reader that knows nothing of us"
    history = History()
    history.append({"epoch": 1, "train": {"loss": 0.5}, "val": {"loss": 0.1 + 0.2, "dice": 0.9, "per_class": {"dice": [1.0, math.nan]}}, "lr": 1e-3})
    table = np.genfromtxt(history.to_csv(tmp_path / "h.csv"), delimiter=",", names=True)
    assert table.dtype.names == ("epoch", "train_loss", "val_loss", "val_dice", "val_dice_0", "val_dice_1", "lr")
    assert float(table["val_loss"]) == 0.1 + 0.2 and np.isnan(table["val_dice_1"])


def test_csv_columns_never_collide():
    "A metric that imitates a per-class column keeps its own identity"
    rows = [{"epoch": 1, "train": {}, "val": {"dice": 0.5, "dice_1": 0.25, "per_class": {"dice": [0.75, 0.125]}}}]
    header = csv_text(rows).splitlines()[0]
    assert header.count("val_dice_1") == 1
    assert csv_rows(csv_text(rows))[0]["val"] == rows[0]["val"]


def test_json_line_is_one_line_for_any_text():
    for text in ("a\nb", "\u2028", "\x00", "\udc80", "é"):
        assert "\n" not in to_json({"x": text})
        assert json.loads(to_json({"x": text}).encode())["x"] == text


def test_html_escapes_everything():
    evil = "<img src=x onerror=alert(1)>\"'&"
    page = html_table([evil], [[evil]], 0, [evil])
    assert "<img" not in page and page.count("&lt;img") == 3


@pytest.mark.parametrize("count", [0, 1, 16, 17, 40])
def test_shown_positions_are_in_order_and_complete(count):
    for keep in [None, *range(count)]:
        places = shown_positions(count, keep)
        numbers = [place for place in places if place is not None]
        assert numbers == sorted(set(numbers)) and (keep is None or keep in numbers)
        for a, b, c in zip(places, places[1:], places[2:]):
            assert b is not None or c > a + 1
        assert all(b == a + 1 for a, b in zip(places, places[1:]) if a is not None and b is not None)


def test_the_record_needs_neither_torch_nor_numpy():
    "history, files and text import the standard library only"
    code = ("import sys, types, importlib.util, pathlib\n"
            "root = pathlib.Path(sys.argv[1]); package = types.ModuleType('unet_nbtrain'); package.__path__ = [str(root)]\n"
            "sys.modules['unet_nbtrain'] = package\n"
            "import unet_nbtrain.history\n"
            "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'matplotlib', 'IPython', 'tensorboard', 'tqdm', 'PIL'}))")
    root = os.path.dirname(sys.modules["unet_nbtrain.history"].__file__)
    out = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Classes


def with_classes(names=None, **scores):
    history = History()
    history.class_names = names
    for epoch, best in ((1, True), (2, True), (3, False)):
        history.append({"epoch": epoch, "val": {"loss": 1.0, "dice": 0.1 * epoch, "iou": math.nan, "per_class": scores}, "best": best})
    return history


def cells(table):
    "The table as rows of words, without what says where it is from"
    return [line.split() for line in str(table).splitlines()[:-1]]


def test_the_table_of_classes_is_that_of_the_best_epoch_unless_told_otherwise():
    history = with_classes(["a", "b", "c"], dice=[0.9, math.nan, 0.5], iou=[0.8, None, 1 / 3])
    assert cells(history.class_table()) == [
        ["class", "Dice", "IoU"], ["a", "0.9000", "0.8000"], ["b", "\u2014", "\u2014"], ["c", "0.5000", "0.3333"], ["mean", "0.2000", "\u2014"]]
    assert "epoch 2" in str(history.class_table()) and "epoch 3" in str(history.class_table(3))
    assert cells(history.class_table(3))[-1] == ["mean", "0.3000", "\u2014"]
    page = history.class_table()._repr_html_()
    assert page.count("<tr>") == 5 and "\u2014" in page


@pytest.mark.parametrize(("names", "shown"), [
    (None, ["class 0", "class 1"]), ([], ["class 0", "class 1"]), (["a"], ["a", "class 1"]), (["a", "b", "c"], ["a", "b"])])
def test_names_that_are_too_few_or_too_many(names, shown):
    table = str(with_classes(names, dice=[0.5, 0.25]).class_table())
    assert [line[2:].split("  ")[0].rstrip() for line in table.splitlines()[1:3]] == shown


def test_one_class_and_odd_scores():
    assert cells(with_classes(None, dice=[0.5]).class_table())[1] == ["foreground", "0.5000"]
    assert cells(with_classes(["ground", "cell"], dice=[0.5]).class_table())[1] == ["cell", "0.5000"]
    assert cells(with_classes(None, dice=[0.5], hd=[], mine=["x", 2]).class_table())[1:3] == [["class", "0", "0.5000", "\u2014", "\u2014"], ["class", "1", "\u2014", "\u2014", "2.0000"]]
    evil = with_classes(["<img src=x>", "b"], dice=[0.5, 0.5]).class_table()._repr_html_()
    assert "<img" not in evil and "&lt;img" in evil
    for bad in (with_classes(None), with_classes(None, dice=0.5), with_classes(None, dice=[])):
        with pytest.raises(ValueError, match="epoch 2 has no scores per class"):
            bad.class_table()
    with pytest.raises(ValueError, match="no epoch 7. It has the epochs 1 to 3"):
        with_classes(None, dice=[0.5]).class_table(7)


def test_per_class_scores_are_columns():
    history = with_classes(None, dice=[0.5, math.nan])
    assert {"val.per_class.dice.0", "val.per_class.dice.1"} <= set(history.columns())
    assert history.column("val.per_class.dice.0") == [0.5] * 3


# Plots

PLOT = """
import sys
from unet_nbtrain.history import History
history = History()
for epoch in range(1, 4):
    history.append({"epoch": epoch, "train": {"loss": 1 / epoch}, "val": {"loss": 1 / epoch, "dice": 0.5, "mine": 3.0}, "lr": 0.1})
first = "matplotlib" in sys.modules
figure = history.plot("mine", log=True, dpi=40)
figure.savefig(sys.argv[1])
print(first, "matplotlib.pyplot" in sys.modules, [ax.get_title(loc="left") for ax in figure.axes], "_repr_png_" in dir(figure))
import matplotlib.pyplot as plt
print(plt.get_fignums())
"""


def test_plot_loads_matplotlib_at_its_first_call_and_never_pyplot(tmp_path):
    done = subprocess.run([sys.executable, "-c", PLOT, str(tmp_path / "a.png")], capture_output=True, text=True)
    assert done.stdout == "False False ['Loss (log)', 'mine', 'Learning rate'] True\n[]\n", done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_misspelt_metric_in_a_plot_lists_the_columns():
    history = with_classes(None, dice=[0.5])
    with pytest.raises(KeyError, match="val.dise.*val.dice"):
        history.plot("dise")
    assert len(History().plot("dise", dpi=20).axes) == 3


# Long runs


def long_history(count):
    history = History()
    history.load_state_dict({"rows": [{"epoch": epoch, "val": {"loss": 1 / epoch}} for epoch in range(1, count + 1)], "events": []})
    return history


def test_a_save_makes_the_text_of_new_rows_only(tmp_path, monkeypatch):
    "The text of old rows is kept, as long as they are the same rows: not after a rewind, and not in a copy that goes its own way"
    made = []
    monkeypatch.setattr(history_room, "to_json", lambda value: made.append(value) or to_json(value))
    history = long_history(50)
    history.mark("set", 1, 1, "lr")
    history.save(tmp_path / "h.json")
    for epoch in (51, 52):
        made.clear()
        history.append({"epoch": epoch, "val": {"loss": 0.5}})
        history.save(tmp_path / "h.json")
        assert made == [history.rows[-1], []], "the new row, and the names of the classes"
    other = pickle.loads(pickle.dumps(history))
    for record in (history, other, copy.deepcopy(history)):
        for count in (52, 49, 49, 60, 48):
            record.truncate(48)
            for epoch in range(49, count + 1):
                record.append({"epoch": epoch, "val": {"loss": 7.0 + count}})
            assert History.load(record.save(tmp_path / "h.json")).rows == record.rows and len(record) == count
    assert (tmp_path / "h.json").read_text() == History.load(tmp_path / "h.json").save(tmp_path / "new.json").read_text()


def test_a_long_history_is_not_built_row_by_row(monkeypatch):
    "`append` makes a new tuple each time: 20,000 of them took seconds"
    monkeypatch.setattr(History, "append", lambda *args: pytest.fail("a tuple for each row"))
    assert long_history(300)["epochs"] == list(range(1, 301))


def test_rows_are_lent_to_one_thread_only(tmp_path):
    "While one thread reads without copies, another gets copies; what was lent is a list of its own, and passes through `files.to_plain` as plain data"
    history, found = long_history(2), []

    def read():
        thread = threading.Thread(target=lambda: found.append(history.state_dict()["rows"]))
        thread.start()
        thread.join()
        return history.state_dict()["rows"]

    lent = without_copies(read)
    history.append({"epoch": 3})
    assert type(lent) is Settled and len(lent) == 2 and lent[0] is history.rows[0]
    assert type(found[0]) is list and found[0] == lent and found[0][0] is not history.rows[0] and found[0][0]["val"] is not history.rows[0]["val"]
    assert type(history.state_dict()["rows"]) is list and type(to_plain(lent)) is list
