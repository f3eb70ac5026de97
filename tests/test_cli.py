"""The shell command as a shell sees it: real processes, their streams, signals and exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unet_nbtrain
from unet_nbtrain import cli, dataset
from unet_nbtrain.demo_data import draw_cells
from unet_nbtrain.disk import FolderLock

EPOCHS = 15
START = [sys.executable, "-c", "import sys, torch; torch.set_num_threads(1); from unet_nbtrain.cli import main; sys.exit(main())"]

# Many lines in one process, since importing torch takes longer than refusing an argument
MANY = """
import io, json, sys, traceback
from contextlib import redirect_stderr, redirect_stdout
from unet_nbtrain.cli import main
told = []
for line in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(line)
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
    told.append([code, out.getvalue(), err.getvalue()])
json.dump(told, sys.stdout)
"""


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def shell(*arguments, cwd):
    return subprocess.run([*START, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment(), timeout=120)


def write_pairs(folder, count=12, size=32):
    """Images and masks of 0 and 255, as a person has them"""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        image, mask = draw_cells(index, size=size)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask * np.uint8(255)).save(folder / "masks" / f"{index}.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("cli")
    write_pairs(home / "data")
    return home


def training(run, *more):
    """A small training, with paths relative to the home folder"""
    line = "train --images data/images --masks data/masks --val 8:12 --width 4 --depth 2 --batch-size 2 --device cpu"
    return [*line.split(), "--epochs", EPOCHS, "--run-dir", run, *more]


@pytest.fixture(scope="module")
def whole(home):
    """A training that nobody interrupted"""
    done = shell(*training("whole"), cwd=home)
    assert done.returncode == 0, done.stderr
    return done


def history(run):
    return json.loads((run / "history.json").read_text())["rows"]


def result(done):
    """The JSON line, after checking that standard output has nothing else"""
    lines = done.stdout.splitlines()
    assert len(lines) == 1 and done.stdout.endswith("\n"), done.stdout
    return json.loads(lines[0])


def test_the_result_is_one_line_of_json(home, whole):
    told, rows = result(whole), history(home / "whole")
    assert {"val_dice", "val_iou", "best_epoch", "epochs", "run_dir"} <= set(told)
    best = min(rows, key=lambda row: row["val"]["loss"])
    assert told["epochs"] == EPOCHS == len(rows) and told["best_epoch"] == best["epoch"]
    assert told["val_dice"] == best["val"]["dice"] and told["val_iou"] == best["val"]["iou"]
    assert (home / told["run_dir"] / "checkpoints" / "best_model.pth").is_file()


def test_what_a_person_sees_is_on_standard_error(home, whole):
    assert "best_model.pth" in whole.stderr and "val Dice" in whole.stderr and "Traceback" not in whole.stderr
    assert {"arguments.json", "curves.png", "history.csv", "history.json", "log.jsonl", "tensorboard"} <= set(os.listdir(home / "whole"))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_as_if_nothing_had_happened(home, whole, sent):
    run, name = home / sent.name, sent.name
    process = subprocess.Popen([*START, *map(str, training(name))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home, env=environment())
    try:
        until_epochs(run, 2, process)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    told = result(subprocess.CompletedProcess([], 0, out, err))
    assert 2 <= told["epochs"] < EPOCHS and "stopped by a command" in err
    state = torch.load(run / "checkpoints" / "last.pth", weights_only=True)
    assert state["epoch"] == told["epochs"] and state["global_step"] > 0

    elsewhere = home / "elsewhere" / name
    elsewhere.mkdir(parents=True)
    done = shell("resume", run, "--quiet", cwd=elsewhere)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert result(done)["epochs"] == EPOCHS
    assert losses(run) == losses(home / "whole")
    assert same_weights(run, home / "whole")


def until_epochs(run, count, process):
    """Until so many are in the log, which has each at once"""
    end, log = time.monotonic() + 60, run / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b'"event": "epoch"') >= count):
        assert process.poll() is None and time.monotonic() < end, "the training ended before it could be interrupted"
        time.sleep(0.01)


def losses(run):
    return [(row["epoch"], row["train"]["loss"], row["val"]["loss"], row["val"]["dice"]) for row in history(run)]


def same_weights(*runs):
    first, second = (torch.load(run / "checkpoints" / "last.pth", weights_only=True)["model_state_dict"] for run in runs)
    return all(torch.equal(first[name], second[name]) for name in first | second)


def test_version(home):
    done = shell("--version", cwd=home)
    assert done.returncode == 0 and done.stdout == f"unet-nbtrain {unet_nbtrain.__version__}\n"


# What is wrong -> words of the sentence. `{home}` is the folder with the data.
WRONG_VALUES = {
    "--epochs 0": "epochs must be a whole number, at least 1; got 0",
    "--epochs 1.5": "invalid int value: '1.5'",
    "--lr -1": "lr must be a number, greater than 0; got -1.0",
    "--lr 0": "greater than 0; got 0.0",
    "--lr nan": "lr must be a number",
    "--batch-size 0": "--batch-size 0: give a whole number, 1 or more",
    "--batch-size -3": "1 or more",
    "--width 0": "width=0",
    "--depth 9": "from 1 to 8",
    "--patience 0": "--patience 0",
    "--clip 0": "gradient_clip_norm must be",
    "--workers -1": "0 or more",
    "--classes 0": "--classes 0",
    "--classes 2": "labels outside 0 to 1: 255",
    "--seed 99999999999999999999999": "--seed",
    "--optimizer best": "adam, adamw, sgd, rmsprop",
    "--loss best": "bce_dice",
    "--augment much": "invalid choice: 'much'",
    "--device tpu7": "Use 'auto' or one of: cpu",
    "--foreground 7": "none of the 12 masks has it. They hold 0 (",
    "--crop 0": "crop=0: use a whole number",
    "--image-size -2": "image_size=-2",
    "--val 0:12": "training and validation both need at least one",
    "--val 12:8": "is not a range",
    "--val lost.png": "'lost.png'",
    "--mask-suffix _zz": "_zz",
    "--run-dir {home}/file": "is a file",
    "--run-dir {home}/file/run": "{home}/file",
    "--resume": "--resume needs --run-dir",
    "--resume --run-dir {home}/new": "holds no checkpoint",
    "--resume --overwrite --run-dir {home}/whole": "not both",
    "--run-dir {home}/whole": "holds a run already",
    "--class-weights much": "write balanced, or numbers",
    "--class-weights 1 2": "--class-weights has 2 numbers for --classes 1",
    "--classes 3 --class-names a b": "--class-names has 2 entries for --classes 3",
    "--classes 2 --colors red green": "write colours as '#ff8000'",
    "--colors nowhere.txt": "nowhere.txt",
    "--foreground-crops 0.5": "give their size with --crop",
    "--crop 16 --foreground-crops 1.5": "from 0",
    "--image-size 8 8 8": "one number, or height and width",
    "--group (": "is not a regular expression",
    "--accumulate 0": "accumulate_gradients must be",
    "--ema 1": "ema_decay must be",
    "--top-k 0": "save_top_k must be",
    "--save-every 0": "save_every_n_epochs must be",
    "--save-every-minutes 0": "save_every_n_minutes must be a number, greater than 0",
    "--save-every-minutes nan": "save_every_n_minutes must be",
    "--save-every-steps 0": "save_every_n_steps must be a whole number, at least 1",
    "--on-nonfinite hope": "invalid choice: 'hope' (choose from",
    "--on-bad-sample hope": "invalid choice: 'hope'",
    "--on-oom rollback": "invalid choice: 'rollback'",
    "--warmup -1": "--warmup -1",
    "--warmup 1": "takes all of --epochs 1",
    "--schedule onecycle --warmup 1 --epochs 4": "one-cycle climbs by itself",
    "--weight-decay -1": "--weight-decay -1.0: give a number",
    "--schedule best": "invalid choice: 'best'",
    "--amp fp16": "needs a GPU",
    "--log-level loud": "invalid choice: 'loud'",
    "--monitor beauty": "beauty",
    "--monitor per_class.dice.7": "--monitor per_class.dice.7: The validation has no metric 'per_class.dice.7'; it has: loss, dice",
    "--images {home}/empty": "no images in {home}/empty",
    "--images {home}/nowhere": "{home}/nowhere",
    "--images {home}/file": "is not a folder",
    "--masks {home}/empty": "no images in {home}/empty",
    "--images {home}/broken": "{home}/broken/0.png",
}


@pytest.fixture(scope="module")
def refused(home, whole):
    """What became of each wrong line: exit code, standard output, standard error; and what was there before and after"""
    (home / "file").write_text("a file")
    (home / "empty").mkdir()
    shutil.copytree(home / "data" / "images", home / "broken")
    (home / "broken" / "0.png").write_bytes(b"no picture")
    (home / "moved").mkdir()
    for folder, text in (("moved", json.dumps(moved(home))), ("torn", '{"command": "tr'), ("odd", "[1]")):
        shutil.copytree(home / "whole", home / folder, dirs_exist_ok=True)
        (home / folder / "arguments.json").write_text(text)
    shutil.copytree(home / "whole", home / "cut")
    for checkpoint in (home / "cut" / "checkpoints").iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    (home / "cut" / "history.json").write_bytes((home / "cut" / "history.json").read_bytes()[:1000])
    data = "train --images data/images --masks data/masks --width 4 --depth 2 --epochs 1 --device cpu --quiet"
    lines = {text: [*data.split(), *text.format(home=home).split()] for text in WRONG_VALUES}
    lines |= {text: text.format(home=home).split() for text in [*RESUMES, ""]}
    before = set(os.listdir(home))
    done = subprocess.run([sys.executable, "-c", MANY], input=json.dumps(list(lines.values())), capture_output=True, text=True, cwd=home, env=environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, json.loads(done.stdout), strict=True)), set(os.listdir(home)) - before


def moved(home):
    saved = json.loads((home / "whole" / "arguments.json").read_text())
    assert Path(saved["images"]) == home / "data" / "images", "paths are written down in full"
    return saved | {"images": str(home / "gone" / "images")}


RESUMES = {
    "resume {home}/moved": "{home}/gone/images",
    "resume {home}/torn": "arguments.json cannot be read",
    "resume {home}/odd": "arguments.json cannot be read",
    "resume {home}/cut": "No checkpoint can be loaded",
    "resume {home}/empty": "has no arguments.json",
    "resume {home}/nowhere": "has no arguments.json",
    "resume {home}/whole --epochs 0": "epochs must be a whole number, at least 1; got 0",
    "resume {home}/whole --patience 0": "--patience 0",
    "report {home}/nowhere": "There is no folder {home}/nowhere",
    "report {home}/file": "There is no folder {home}/file",
    "report {home}/empty": "{home}/empty has no history.json",
    "report {home}/cut": "{home}/cut/history.json is damaged or cut off",
    "report {home}/whole --out {home}": "--out {home} is a folder",
    "report {home}/whole --out {home}/file/report.html": "{home}/file",
    "predict {home}/nowhere.pth data/images --out {home}/masks": "nowhere.pth does not exist",
    "predict {home}/data data/images --out {home}/masks": "holds no checkpoint",
    "predict {home}/whole {home}/nowhere --out {home}/masks": "{home}/nowhere is not there",
    "predict {home}/whole {home}/empty --out {home}/masks": "no images in {home}/empty",
    "predict {home}/whole data/images --out {home}/file": "{home}/file",
    "predict {home}/whole data/images --out {home}/masks --threshold 2": "between 0 and 1",
    "evaluate {home}/whole --images data/images --masks {home}/empty": "{home}/empty",
    "evaluate {home}/whole --images data/images --masks data/masks --only lost.png": "'lost.png'",
    "evaluate {home}/whole --images data/images --masks data/masks --only 5:2": "--only '5:2' is not a range",
    "evaluate {home}/whole --images data/images --masks data/masks --only 2": "--only '2' must be positions",
    "evaluate {home}/whole --images data/images --masks data/masks --foreground 3": "foreground=[3]: none of the 12 masks has it",
    "evaluate {home}/whole --images data/images --masks data/masks --ignore-index 255": "Is 255 the foreground?",
    "evaluate {home}/whole --images data/images --masks data/masks --only 9:99": "only names 87 that are not among the 12 images: 12, 13",
}


@pytest.mark.parametrize("text", [*WRONG_VALUES, *RESUMES])
def test_what_is_wrong_is_one_sentence(home, refused, text):
    code, out, err = refused[0][text]
    assert code == 2 and out == "", (code, out, err)
    assert {**WRONG_VALUES, **RESUMES}[text].format(home=home) in err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("unet-nbtrain")


def test_a_wrong_value_leaves_nothing_behind(refused):
    assert not refused[1]


def test_no_command_is_a_wrong_command(refused):
    code, out, err = refused[0][""]
    assert code == 2 and out == "" and "COMMAND" in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(home):
    shutil.copytree(home / "data" / "images", home / "locked")
    (home / "locked" / "3.png").chmod(0)
    done = shell(*training("locked_run"), "--images", "locked", cwd=home)
    assert done.returncode == 2 and done.stdout == "" and "3.png" in done.stderr and "Traceback" not in done.stderr


def test_a_moved_folder_can_be_named(home, refused):
    done = shell("resume", "moved", "--images", "data/images", "--epochs", EPOCHS + 1, "--quiet", cwd=home)
    assert done.returncode == 0 and result(done)["epochs"] == EPOCHS + 1, done.stderr


# Other ways in, and a report


def test_the_module_is_the_command_too(home):
    done = subprocess.run([sys.executable, "-m", "unet_nbtrain.cli"], capture_output=True, text=True, cwd=home, env=environment(), timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("usage: unet-nbtrain") and "COMMAND" in done.stderr


def test_python_m_trains(home):
    line = [sys.executable, "-m", "unet_nbtrain", *map(str, training("by_module", "--epochs", 1, "--quiet"))]
    done = subprocess.run(line, capture_output=True, text=True, cwd=home, env=environment(), timeout=120)
    assert done.returncode == 0 and result(done)["epochs"] == 1 and done.stderr == "", done.stderr


def test_the_report_is_one_file(home, whole, inside):
    shutil.copytree(home / "whole", home / "told")
    done = shell("report", "told", cwd=home)
    assert done.returncode == 0 and result(done) == {"report": "told/report.html", "run_dir": "told"}, done.stderr
    page = (home / "told" / "report.html").read_text()
    assert page.startswith("<!doctype html>") and 'src="data:image/png;base64,' in page and f"The best epoch is {result(whole)['best_epoch']} of {EPOCHS}" in page
    assert not any(word in page for word in ('src="http', "<script", "<link")), "the report needs something beside itself"
    code, out, err = inside("report", "told", "--out", "pages/x.html", "--quiet")
    assert code == 0 and err == "" and json.loads(out)["report"] == "pages/x.html" and (home / "pages" / "x.html").is_file()


# In this process: what an accident does, and what a run remembers


@pytest.fixture
def inside(home, monkeypatch, capsys):
    """The command, called in the home folder: `inside(*arguments)` gives exit code, standard output and standard error; `.trainers` made so far"""
    make = cli.make_trainer

    def call(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    def keep(arguments):
        call.trainers.append(make(arguments))
        for observer in call.observers:
            call.trainers[-1].observers.add(observer)
        return call.trainers[-1]

    call.trainers, call.observers = [], []
    monkeypatch.chdir(home)
    monkeypatch.setattr(cli, "make_trainer", keep)
    return call


ACCIDENTS = {"on_nonfinite": "rollback", "on_bad_sample": "raise", "on_oom": "raise", "save_every_n_minutes": 2.5, "save_every_n_steps": 3}


def test_settings_for_accidents_reach_the_trainer_and_the_one_that_goes_on(home, inside):
    options = "--on-nonfinite rollback --on-bad-sample raise --on-oom raise --save-every-minutes 2.5 --save-every-steps 3".split()
    assert inside(*training("careful", "--epochs", 1, "--quiet", *options))[0] == 0
    assert inside("resume", "careful", "--epochs", 2, "--quiet")[0] == 0
    for trainer in inside.trainers:
        assert {name: getattr(trainer, name) for name in ACCIDENTS} == ACCIDENTS
    saved = json.loads((home / "careful" / "arguments.json").read_text())
    assert saved["on_oom"] == "raise" and saved["save_every_minutes"] == 2.5 and saved["save_every_steps"] == 3


def break_images(monkeypatch):
    "One image cannot be read, once the training has begun"
    good = dataset.SegmentationDataset._window

    def broken(self, key):
        if key == 1 and hasattr(key, "epoch"):
            raise OSError("the file is cut off")
        return good(self, key)

    monkeypatch.setattr(dataset.SegmentationDataset, "_window", broken)


def fill_memory(monkeypatch):
    "Two images at once are too many, in training"
    forward = unet_nbtrain.UNet.forward

    def too_large(self, images):
        if self.training and len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, images)

    monkeypatch.setattr(unet_nbtrain.UNet, "forward", too_large)


def spoil_numbers(monkeypatch):
    "Every output of one batch is NaN, in training"
    forward, count = unet_nbtrain.UNet.forward, iter(range(10**6))

    def spoiled(self, images):
        return forward(self, images) * (float("nan") if self.training and next(count) == 2 else 1.0)

    monkeypatch.setattr(unet_nbtrain.UNet, "forward", spoiled)


@pytest.mark.parametrize(
    "accident, option, goes_on, told",
    [
        (break_images, "--on-bad-sample", "skip", "the file is cut off"),
        (fill_memory, "--on-oom", "split", "the memory is too small"),
        (spoil_numbers, "--on-nonfinite", "skip", "NaN or infinite"),
    ],
)
def test_an_accident_ends_the_run_only_where_that_was_asked_for(home, inside, monkeypatch, accident, option, goes_on, told):
    name, more = accident.__name__, ("--workers", 0, "--quiet", "--epochs", 1)
    with monkeypatch.context() as while_it_lasts:
        accident(while_it_lasts)
        code, out, err = inside(*training(name, *more, option, goes_on))
        assert code == 0 and json.loads(out)["epochs"] == 1 and "Traceback" not in err
    assert '"event": "problem"' in (home / name / "log.jsonl").read_text(), "nothing happened"
    assert inside(*training(f"{name}_ends", *more, option, "raise"))[0] == 0
    accident(monkeypatch)
    code, out, err = inside("resume", f"{name}_ends", "--epochs", 3, "--quiet")
    assert code == 1 and json.loads(out)["epochs"] == 1 and told in err.splitlines()[-1] and "Traceback" not in err


class StopAt:
    """Plans 4 epochs and stops the run, when epoch 2 is over, as somebody at a panel might"""

    def on_epoch_end(self, trainer, row):
        if row["epoch"] == 2 and trainer.total_epochs == 3:
            trainer.run.set("epochs", 4)
            trainer.run.stop()


def test_a_run_goes_on_to_what_was_planned_last(home, inside):
    assert inside(*training("planned", "--epochs", 1, "--quiet"))[0] == 0
    inside.observers.append(StopAt())
    code, out, err = inside("resume", "planned", "--epochs", 3, "--quiet")
    assert code == 0 and json.loads(out)["epochs"] == 2
    code, out, err = inside("resume", "planned", "--quiet")
    assert code == 0 and json.loads(out)["epochs"] == 4, err


def test_a_finished_run_says_so_in_one_sentence(home, inside, whole):
    shutil.copytree(home / "whole", home / "finished")
    before = losses(home / "finished")
    for line in (["resume", "finished"], training("finished", "--resume")):
        code, out, err = inside(*line)
        assert code == 0 and json.loads(out)["epochs"] == EPOCHS
        assert err == f"finished is finished: all {EPOCHS} epochs are done; use it with unet-nbtrain predict, or train on with a total of more than {EPOCHS}: --epochs {2 * EPOCHS}.\n"
        assert losses(home / "finished") == before and same_weights(home / "finished", home / "whole")
    code, out, err = inside("resume", "finished", "--epochs", EPOCHS + 1)
    assert code == 0 and json.loads(out)["epochs"] == EPOCHS + 1 and "is finished" not in err


def test_a_run_out_of_patience_says_so_and_can_be_given_more(home, inside):
    """Its weights do not move, so no epoch after the first is better; the loss would differ by what batch norm has seen"""
    code, out, err = inside(*training("patience", "--epochs", 9, "--lr", 1e-12, "--monitor", "dice", "--patience", 2, "--quiet"))
    ended = json.loads(out)["epochs"]
    assert code == 0 and ended < 9
    code, out, err = inside("resume", "patience")
    assert code == 0 and json.loads(out)["epochs"] == ended and len(err.splitlines()) == 1
    assert "is finished: the validation dice did not improve" in err and "--patience" in err
    code, out, err = inside("resume", "patience", "--patience", 99, "--quiet")
    assert code == 0 and json.loads(out)["epochs"] == 9
    assert json.loads((home / "patience" / "arguments.json").read_text())["patience"] == 99


@pytest.mark.parametrize("word", ["--resume", "--overwrite"])
def test_a_folder_in_which_a_training_is_at_work_is_left_alone(home, inside, whole, word):
    folder = home / f"at_work{word}"
    shutil.copytree(home / "whole", folder)
    lock = FolderLock(folder / "checkpoints")
    assert lock.take()
    before = sorted(path for path in folder.rglob("*"))
    code, out, err = inside(*training(folder, word))
    assert code == 2 and out == "" and "is in use by" in err and len(err.splitlines()) == 1
    assert sorted(path for path in folder.rglob("*")) == before and not inside.trainers
    lock.release()


# A folder that holds a run


def test_a_run_is_replaced_only_by_name(home, whole):
    shutil.copytree(home / "whole", home / "kept")
    (home / "kept" / "notes.txt").write_text("mine")
    before = (home / "kept" / "history.json").read_bytes()
    refused = shell(*training("kept", "--epochs", 1), cwd=home)
    assert refused.returncode == 2 and refused.stdout == "" and "--overwrite" in refused.stderr
    wrong = shell(*training("kept", "--overwrite", "--foreground", 7), cwd=home)
    assert wrong.returncode == 2 and (home / "kept" / "history.json").read_bytes() == before
    done = shell(*training("kept", "--overwrite", "--epochs", 1, "--quiet"), cwd=home)
    assert done.returncode == 0 and result(done)["epochs"] == 1 and len(history(home / "kept")) == 1
    assert (home / "kept" / "notes.txt").is_file() and not json.loads((home / "kept" / "arguments.json").read_text())["resume"]


def test_a_run_of_an_older_version_is_resumed(home, whole):
    """Its arguments.json knows nothing of later options, and has --image-size as one number"""
    shutil.copytree(home / "whole", home / "older")
    then = "command quiet images masks mask_suffix val foreground classes ignore_index image_size crop augment workers epochs batch_size width depth lr"
    then += " optimizer loss schedule monitor patience clip device seed run_dir resume"
    saved = json.loads((home / "whole" / "arguments.json").read_text())
    (home / "older" / "arguments.json").write_text(json.dumps({name: saved[name] for name in then.split()} | {"image_size": 32}))
    done = shell("resume", "older", "--epochs", EPOCHS + 1, "--quiet", cwd=home)
    assert done.returncode == 0 and result(done)["epochs"] == EPOCHS + 1, done.stderr


@pytest.fixture(scope="module")
def several(home):
    """A training of three classes with nearly all options, in a folder of its own"""
    for kind in ("images", "kinds"):
        (home / "several" / kind).mkdir(parents=True)
    for index in range(12):
        image, mask = draw_cells(index, size=32, n_classes=3)
        Image.fromarray(image).save(home / "several" / "images" / f"p{index // 3}_{index}.png")
        Image.fromarray(mask).save(home / "several" / "kinds" / f"p{index // 3}_{index}_L.png")
    (home / "several" / "names.txt").write_text("background\nround\nlong\n")
    line = "train --images several/images --masks several/kinds --mask-pattern {name}_L --group ^(p\\d+)_ --val 0.25 --classes 3 --class-names several/names.txt"
    line += " --class-weights balanced --crop 16 --foreground-crops 0.5 --normalize --width 4 --depth 2 --batch-size 2 --accumulate 2 --epochs 4 --device cpu"
    line += " --schedule polynomial --warmup 1 --weight-decay 0.01 --optimizer sgd --loss ce_dice --monitor dice --ema 0.9 --top-k 2 --save-every 2 --amp off"
    done = shell(*line.split(), "--log-level", "info", "--run-dir", "three", cwd=home)
    assert done.returncode == 0, done.stderr
    return done


def test_several_classes_have_names(home, several):
    told = result(several)
    assert list(told["per_class_dice"]) == ["background", "round", "long"] and told["epochs"] == 4
    best = max(history(home / "three"), key=lambda row: row["val"]["dice"])
    assert told["val_dice"] == best["val"]["dice"] and told["per_class_dice"]["round"] == best["val"]["per_class"]["dice"][1]
    before, after = several.stderr.split("epoch 1/4", 1) if "epoch 1/4" in several.stderr else several.stderr.split("1/4", 1)
    assert all(name in before and name in after for name in ("background", "round", "long")), several.stderr


def test_a_run_with_the_later_options_is_resumed(home, several):
    shutil.copytree(home / "three", home / "three_more")
    (home / "several" / "names.txt").rename(home / "several" / "renamed.txt")
    done = shell("resume", "three_more", "--epochs", 5, "--quiet", cwd=home)
    (home / "several" / "renamed.txt").rename(home / "several" / "names.txt")
    assert done.returncode == 0 and result(done)["epochs"] == 5 and done.stderr == "", done.stderr
    assert list(result(done)["per_class_dice"]) == ["background", "round", "long"]


def test_evaluate_gives_the_numbers_of_the_training(home, several, whole):
    done = shell(*"evaluate whole --images data/images --masks data/masks --only 8:12 --batch-size 2".split(), cwd=home)
    assert done.returncode == 0 and result(done)["val_dice"] == result(whole)["val_dice"], done.stderr
    assert result(done)["images"] == 4 and "per_class_dice" not in result(done)
    done = shell(*"evaluate three --images several/images --masks several/kinds --mask-pattern {name}_L".split(), cwd=home)
    assert done.returncode == 0 and list(result(done)["per_class_dice"]) == ["background", "round", "long"], done.stderr
    assert "round" in done.stderr and result(done)["images"] == 12


def test_a_full_memory_is_met_with_the_options_that_there_are(home, whole, inside, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    for name in ("UNetPredictor", "make_trainer"):
        monkeypatch.setattr(cli, name, full)
    code, _, err = inside("predict", "whole", "data", "--out", "none")
    assert code == 1 and err == "unet-nbtrain: the memory is too small for this. Use --device cpu.\n"
    assert "Lower --batch-size, or use --device cpu." in inside("evaluate", "whole", "--images", "a", "--masks", "b")[2]
    assert "Lower --batch-size or --crop or --image-size or --width, or" in inside(*training("full"))[2]


def test_predict_does_not_replace_drawn_masks(home, whole, inside):
    (home / "mixed").mkdir()
    for kind, end in (("images", ""), ("masks", "_mask")):
        for index in range(2):
            shutil.copy(home / "data" / kind / f"{index}.png", home / "mixed" / f"{index}{end}.png")
    drawn = (home / "mixed" / "0_mask.png").read_bytes()
    line = "predict whole mixed --out mixed --quiet".split()
    code, out, err = inside(*line)
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert "0_mask.png" in err and "2 such files" in err and "--overwrite" in err
    assert (home / "mixed" / "0_mask.png").read_bytes() == drawn and len(os.listdir(home / "mixed")) == 4
    assert inside(*line, "--overwrite")[0] == 0 and (home / "mixed" / "0_mask.png").read_bytes() != drawn
    assert inside(*line)[0] == 0


def test_predict_goes_on_after_a_broken_image(home, several):
    shutil.copytree(home / "several" / "images", home / "new")
    (home / "new" / "p0_1.png").write_bytes(b"no picture")
    done = shell(*"predict three new data/images/0.png --out found --overlay --probabilities".split(), cwd=home)
    assert done.returncode == 1 and result(done) == {"images": 13, "failed": 1, "out": "found"}
    assert "new/p0_1.png" in done.stderr and "Traceback" not in done.stderr
    assert len(list((home / "found").glob("*_mask.png"))) == len(list((home / "found").glob("*_overlay.png"))) == 12
    mask = np.asarray(Image.open(home / "found" / "p0_0_mask.png"))
    assert np.array_equal(mask, np.load(home / "found" / "p0_0_probabilities.npy").argmax(0))
    quiet = shell(*"predict three/checkpoints/best_model.pth new --out quiet --quiet".split(), cwd=home)
    assert quiet.returncode == 1 and len(quiet.stderr.splitlines()) == 1 and "p0_1.png" in quiet.stderr


CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"
NAMES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()


@pytest.mark.skipif(not CAMVID.is_dir(), reason="the CamVid images are not at ../shared/data/camvid")
def test_camvid_trains_with_class_weights(tmp_path):
    line = f"train --images {CAMVID}/images --masks {CAMVID}/masks --val 40:52 --classes 11 --ignore-index 11 --class-weights balanced --class-names"
    more = "--image-size 72 96 --width 8 --depth 3 --batch-size 4 --epochs 2 --device cpu --workers 0 --augment light --run-dir run"
    done = shell(*line.split(), *NAMES, *more.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = result(done)
    assert list(told["per_class_dice"]) == NAMES and told["epochs"] == 2
    first, last = (history(tmp_path / "run")[i]["train"]["loss"] for i in (0, -1))
    assert last < first and any(value for value in told["per_class_dice"].values())
    table = [line.split() for line in done.stderr.split("best: epoch")[1].splitlines()]
    assert [row[0] for row in table if row and row[0] in NAMES] == NAMES, done.stderr


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "polynomial --warmup 1", "exponential"])
def test_a_schedule_goes_on_to_the_new_last_epoch(home, inside, schedule):
    """From where it goes on, a run has the rates of one that was planned so; where nothing is planned anew, those that it had"""
    name = schedule.split()[0]
    more = ("--schedule", *schedule.split(), "--quiet")
    assert inside(*training(f"{name}_long", "--epochs", 5, *more))[0] == 0
    assert inside(*training(f"{name}_more", "--epochs", 3, *more))[0] == 0
    (shutil.copytree(home / f"{name}_more", home / f"{name}_same"), shutil.copytree(home / f"{name}_more", home / f"{name}_again"))
    before = torch.load(home / f"{name}_same" / "checkpoints" / "last.pth")
    code, out, err = inside("resume", f"{name}_same", "--epochs", 3)
    after = torch.load(home / f"{name}_same" / "checkpoints" / "last.pth")
    assert code == 0 and before["scheduler_state_dict"] == after["scheduler_state_dict"]
    for line in (["resume", f"{name}_more", "--epochs", 5], training(f"{name}_again", "--epochs", 5, *more[:-1], "--resume")):
        code, out, err = inside(*line)
        assert code == 0 and json.loads(out)["epochs"] == 5 and "learned" not in err and "given now" not in err
    long, *longer = ([row["lr"] for row in history(home / f"{name}_{one}")] for one in ("long", "more", "again"))
    assert longer[0][3:] == longer[1][3:] == long[3:] and min(long[3:]) > 0
    ended = [torch.load(home / f"{name}_{one}" / "checkpoints" / "last.pth")["scheduler_state_dict"] for one in ("more", "long")]
    assert ended[0] == ended[1]


def test_a_stopped_run_of_new_length_keeps_it(home, inside):
    assert inside(*training("length", "--epochs", 2, "--schedule", "cosine", "--quiet"))[0] == 0

    class Once:
        def on_epoch_end(self, trainer, row):
            if row["epoch"] == 3 and trainer.total_epochs == 5:
                trainer.run.stop()

    inside.observers.append(Once())
    assert json.loads(inside("resume", "length", "--epochs", 5, "--quiet")[1])["epochs"] == 3
    inside.observers.clear()
    assert json.loads(inside("resume", "length", "--quiet")[1])["epochs"] == 5
    assert [round(1e3 * row["lr"], 3) for row in history(home / "length")] == [1, 0.5, 0.655, 0.345, 0.095]


def test_another_rate_on_a_run_that_goes_on_is_told(home, inside):
    assert inside(*training("rated", "--epochs", 1, "--quiet"))[0] == 0
    code, out, err = inside(*training("rated", "--epochs", 2, "--resume", "--lr", 0.01, "--weight-decay", 0.5))
    assert code == 0 and "learning rate of 0.001 (given now: 0.01)" in err and "weight decay of 0.01 (given now: 0.5)" in err
    assert history(home / "rated")[-1]["lr"] == 1e-3
