"""The life of a training run: after any stop it goes on as if there had been none."""

import csv
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stress
import torch

import train_classifier
import train_protomaml
import train_protonet
from common import UserError, splits, training_run
from common.checkpoint import encoder_of, load_checkpoint, save_checkpoint
from common.config import parse_config
from common.data import load_dataset
from common.splits import split_classes
from common.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("one_thread")

# The classifier trains class prototypes beside its encoder: its runs show that these are resumed.
SCRIPTS = (train_classifier, train_protonet, train_protomaml)
TRAINERS = {script.__name__.removeprefix("train_"): script for script in SCRIPTS}
# The real script, but at the end of the second epoch it gets a signal before that is saved.
WITH_SIGNAL = """
import os, runpy, sys
from common import training_run
training_run.write_csv = lambda path, names, rows: rows[1:] and os.kill(os.getpid(), {number})
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Crash(Exception):
    """Stands for a process that ends here."""


def command_line(model, data_dir, checkpoint_dir, *more):
    """Return the options of a run of three epochs of two steps."""
    sizes = ["--device=cpu", "--epochs=3", "--steps_per_epoch=2"]
    arguments = stress.training_job(model, data_dir, *sizes).arguments
    return [*arguments, f"--checkpoint_dir={checkpoint_dir}", *more]


def train(model, data_dir, checkpoint_dir, *more):
    script, arguments = TRAINERS[model], command_line(model, data_dir, checkpoint_dir, *more)
    return script.main(parse_config(script.Config, arguments))


def last_of(folder, model="protonet"):
    return load_checkpoint(folder / "glyphs" / f"{model}_last.pt")


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(expected, found):
    """Every file is the same to the last bit, and nothing else is there."""
    compared, differing = stress.differences(expected, found)
    assert compared == 5 and not differing  # best, last, CSV, the figure as PNG and SVG
    assert not stress.temporary_files(found)


# Where a run crashes, as (what is called, at which call).
MOMENTS = {
    "inside the first epoch": (TrainingRun, "track", 2),
    "inside the second epoch": (TrainingRun, "track", 4),
    "after the last validation": (TrainingRun, "end_epoch", 3),
    # The first call is at the start; then the best epoch is saved before the newest.
    "between best and last": (training_run, "save_checkpoint", 3),
    "in the figure": (training_run, "plot_training_curves", 1),
}


def train_until(moment, *arguments):
    """Let a run crash at the named moment."""
    owner, name, number = MOMENTS[moment]
    original, calls = getattr(owner, name), []

    def crashing(*args, **options):
        calls.append(1)
        if len(calls) == number:
            raise Crash
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Crash):
        patched.setattr(owner, name, crashing)
        train(*arguments)
    torch.manual_seed(1)  # a new process would not have the old one's random numbers either


@pytest.fixture(scope="module")
def uninterrupted(glyph_dir, tmp_path_factory):
    """Return {model: checkpoint_dir of a small run that nothing interrupted}."""
    folders = {model: tmp_path_factory.mktemp(model) for model in TRAINERS}
    for model, folder in folders.items():
        train(model, glyph_dir, folder)
    return folders


@pytest.fixture
def unfinished(glyph_dir, tmp_path):
    """Return the checkpoint_dir of a ProtoNet run that stopped inside its second epoch."""
    train_until("inside the second epoch", "protonet", glyph_dir, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


# What a run leaves behind


@pytest.mark.parametrize("model", TRAINERS)
def test_best_and_last_carry_what_a_test_needs(model, uninterrupted, glyph_dir):
    path = uninterrupted[model] / "glyphs" / f"{model}.pt"
    best, last = load_checkpoint(path), last_of(uninterrupted[model], model)
    split = split_classes(load_dataset("glyphs", glyph_dir).class_names)
    for contents in (best, last):
        assert encoder_of(contents, model).num_features
        assert (contents["model"], contents["dataset"]) == (model, "glyphs")
        assert (contents["class_split"], contents["image_shape"]) == (split, [32, 32])
        assert all(0 < value < 1 for value in (*contents["mean"], *contents["std"]))
        config = contents["config"]
        assert (config["n_way"], config["k_shot"], config["epochs"]) == (2, 2, 3)
        assert not {"data_dir", "checkpoint_dir", "device", "resume"} & set(config)
    with open(path.with_suffix(".csv"), newline="") as file:
        curve = [{name: float(row[name]) for name in row} for row in csv.DictReader(file)]
    assert curve == last["history"] and last["epoch"] == len(curve) == 3


def test_best_is_the_first_epoch_of_the_highest_validation_accuracy(
    glyph_dir, tmp_path, monkeypatch
):
    end_epoch, accuracies = TrainingRun.end_epoch, iter([0.5, 0.75, 0.25, 0.75])

    def end(run, lr, val_loss, val_accuracy):
        end_epoch(run, lr, val_loss, next(accuracies))

    monkeypatch.setattr(TrainingRun, "end_epoch", end)
    train("protonet", glyph_dir, tmp_path, "--epochs=4")
    best = load_checkpoint(tmp_path / "glyphs" / "protonet.pt")
    assert (best["epoch"], best["val_accuracy"], last_of(tmp_path)["epoch"]) == (2, 0.75, 4)


# Resuming


CRASHES = [("protonet", moment) for moment in MOMENTS]
CRASHES += [(model, "inside the second epoch") for model in ("classifier", "protomaml")]


@pytest.mark.parametrize(("model", "moment"), CRASHES)
def test_a_run_resumed_after_a_crash_equals_an_uninterrupted_one(
    model, moment, uninterrupted, glyph_dir, tmp_path
):
    train_until(moment, model, glyph_dir, tmp_path)
    train(model, glyph_dir, tmp_path, "--resume=true")
    assert_same_run(uninterrupted[model], tmp_path)


def test_a_run_moved_without_its_best_epoch_brings_it_along(unfinished, uninterrupted, glyph_dir):
    best = unfinished / "glyphs" / "protonet.pt"
    expected = load_checkpoint(best)
    shutil.copy(uninterrupted["classifier"] / "glyphs" / "classifier.pt", best)
    # No epoch more: what is there is what was brought along.
    train_until("inside the first epoch", "protonet", glyph_dir, unfinished, "--resume=true")
    assert stress.same_value(load_checkpoint(best), expected)


def test_a_folder_that_holds_a_run_is_refused_until_overwrite_discards_that(
    unfinished, uninterrupted, glyph_dir
):
    before = bytes_of(unfinished)
    with pytest.raises(UserError, match=r"_last\.pt is .*--resume=true.*--overwrite=true"):
        train("protonet", glyph_dir, unfinished)
    assert bytes_of(unfinished) == before
    train("protonet", glyph_dir, unfinished, "--overwrite=true")
    assert_same_run(uninterrupted["protonet"], unfinished)
    (unfinished / "glyphs" / "protonet_last.pt").unlink()
    with pytest.raises(UserError, match=r"protonet\.pt is .*--overwrite=true"):
        train("protonet", glyph_dir, unfinished)


def test_a_run_never_overwrites_the_file_that_it_starts_from(uninterrupted, glyph_dir):
    for option, model in (("init_from", "protonet"), ("teacher", "classifier")):
        start = f"--{option}={uninterrupted[model] / 'glyphs' / model}.pt"
        with pytest.raises(UserError, match=f"would overwrite {option}"):
            train(model, glyph_dir, uninterrupted[model], start, "--overwrite=true")


def test_resuming_something_else_names_the_differences(
    unfinished, glyph_dir, tmp_path, monkeypatch
):
    def refused(message, *options, model="protonet", data_dir=glyph_dir):
        with pytest.raises(UserError, match=message):
            train(model, data_dir, unfinished, "--resume=true", *options)

    before = bytes_of(unfinished)
    refused(r"lr was 0.0002 and is 0.001; seed was 42 and is 7; put", "--lr=1e-3", "--seed=7")
    refused("proto_dim was 0 and is 8; encoder has changed", "--proto_dim=8")
    for resume in ("true", "auto"):  # overwrite may be a recipe's
        told = f"--resume={resume}.*pass --overwrite=false"
        refused(told, f"--resume={resume}", "--overwrite=true")
    path = unfinished / "glyphs" / "protonet_last.pt"
    contents = load_checkpoint(path)
    save_checkpoint(path, {**contents, "config": {**contents["config"], "temperature": 2.0}})
    refused("there is no temperature any more")
    save_checkpoint(path, contents)
    with np.load(glyph_dir / "glyphs.npz") as arrays:
        np.savez(tmp_path / "glyphs.npz", **{**arrays, "images": 255 - arrays["images"]})
    refused(r"_last.pt: data_digest has changed; put that back", data_dir=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(splits, "split_classes", lambda names: split_classes(names, seed=1))
        refused(r"_last.pt: class_split has changed; put that back")
    assert bytes_of(unfinished) == before
    refused("maml_last.pt.* there is none", "--output_init=zeros", model="protomaml")
    path.rename(path.with_name("maml_last.pt"))
    refused("model has changed", "--output_init=zeros", model="protomaml")


def test_a_run_does_not_go_on_without_its_teacher(uninterrupted, glyph_dir, tmp_path):
    teacher = f"--teacher={uninterrupted['classifier'] / 'glyphs' / 'classifier.pt'}"
    train("classifier", glyph_dir, tmp_path, teacher, "--epochs=1")
    with pytest.raises(UserError, match="teacher was .* and is ''; put that back"):
        train("classifier", glyph_dir, tmp_path, "--epochs=1", "--resume=true")


def test_moments_stored_in_another_order_are_the_same(unfinished, uninterrupted, glyph_dir):
    contents = last_of(unfinished)
    for state in contents["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].contiguous()  # as on mps
    save_checkpoint(unfinished / "glyphs" / "protonet_last.pt", contents)
    train("protonet", glyph_dir, unfinished, "--resume=true")
    assert_same_run(uninterrupted["protonet"], unfinished)


def test_an_option_added_after_the_run_began_had_its_default(unfinished, uninterrupted, glyph_dir):
    contents = last_of(unfinished)
    del contents["config"]["val_way"]
    save_checkpoint(unfinished / "glyphs" / "protonet_last.pt", contents)
    with pytest.raises(UserError, match="cannot resume .*: val_way was 0 and is 2; put"):
        train("protonet", glyph_dir, unfinished, "--resume=true", "--val_way=2")
    train("protonet", glyph_dir, unfinished, "--resume=true")
    assert_same_run(uninterrupted["protonet"], unfinished)


def test_a_state_that_cannot_be_taken_up_is_refused(unfinished, uninterrupted, glyph_dir):
    path = unfinished / "glyphs" / "protonet_last.pt"
    kept = path.read_bytes()

    def refused(message):
        with pytest.raises(UserError, match=f"{path}.*{message}"):
            train("protonet", glyph_dir, unfinished, "--resume=true")

    shutil.copy(uninterrupted["protonet"] / "glyphs" / "protonet.pt", path)
    refused("cannot be resumed .*--overwrite=true")
    middle = len(kept) // 2  # among the weights
    path.write_bytes(kept[:middle] + bytes([kept[middle] ^ 1]) + kept[middle + 1 :])
    refused("is damaged")


def test_a_finished_run_can_be_extended_but_not_shortened(uninterrupted, glyph_dir, tmp_path):
    shutil.copytree(uninterrupted["protonet"], tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="3 epochs are done and 2 asked for"):
        train("protonet", glyph_dir, tmp_path, "--resume=true", "--epochs=2")
    curve = tmp_path / "glyphs" / "protonet.csv"
    before = curve.read_text()
    # The file that it started from may be another one: what came from it is in the state.
    started_from = f"--init_from={uninterrupted['protomaml']}/glyphs/protomaml.pt"
    train("protonet", glyph_dir, tmp_path, "--resume=true", "--epochs=4", started_from)
    assert curve.read_text().startswith(f"{before}4,")


# Signals and kills


@pytest.mark.parametrize(
    ("model", "number", "code"),
    [("protonet", signal.SIGINT, 130), ("protomaml", signal.SIGTERM, 143)],
)
def test_a_signal_ends_a_run_in_one_line_and_loses_at_most_an_epoch(
    model, number, code, uninterrupted, glyph_dir, tmp_path
):
    script = TRAINERS[model].__file__
    command = [sys.executable, "-c", WITH_SIGNAL.format(number=int(number)), script]
    command += command_line(model, glyph_dir, tmp_path)
    options = {"env": stress.ENVIRONMENT, "cwd": Path(script).parent, "timeout": 120}
    process = subprocess.run(command, capture_output=True, text=True, **options)
    assert process.returncode == code, process.stderr
    *bars, line = process.stderr.strip().splitlines()
    assert line.startswith(f"train_{model}.py: stopped; what was saved before is intact")
    assert "--resume=auto" in line and all("epoch" in bar for bar in bars if bar.strip())
    assert last_of(tmp_path, model)["epoch"] == 1
    train(model, glyph_dir, tmp_path, "--resume=true")
    assert_same_run(uninterrupted[model], tmp_path)


def test_kills_at_random_moments_lose_nothing(glyph_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(stress, "SECONDS_OF_WORK", 1)
    sizes = ["--epochs=12", "--steps_per_epoch=3"]
    job = stress.training_job("classifier", glyph_dir, *sizes)
    train("classifier", glyph_dir, tmp_path / job.script, *sizes)
    kills, _, checked, losses = stress.kill_and_compare(tmp_path, job, 3, seed=0)
    assert losses == []
    assert kills == 3 and checked >= 10


# Losses that are no numbers, full disks


@pytest.mark.parametrize("model", TRAINERS)
def test_a_loss_that_is_no_number_stops_the_run_names_the_step_and_keeps_the_last_files(
    model, glyph_dir, tmp_path, monkeypatch
):
    end_epoch, track, files, calls = TrainingRun.end_epoch, TrainingRun.track, [], []

    def end(run, *arguments):
        end_epoch(run, *arguments)
        files.append(bytes_of(tmp_path))

    def spoilt(run, loss, accuracy):
        calls.append(1)
        return track(run, loss * float("nan") if len(calls) == 3 else loss, accuracy)

    monkeypatch.setattr(TrainingRun, "track", spoilt)
    monkeypatch.setattr(TrainingRun, "end_epoch", end)
    with pytest.raises(UserError, match="the loss became NaN or infinite in epoch 2, step 1;"):
        train(model, glyph_dir, tmp_path)
    assert files == [bytes_of(tmp_path)] and len(calls) == 4


def test_a_learning_rate_that_blows_the_weights_up_leaves_no_spoilt_checkpoint(glyph_dir, tmp_path):
    with pytest.raises(UserError, match="validation loss became NaN or infinite in epoch 1"):
        train("protonet", glyph_dir, tmp_path, "--lr=1e30", "--steps_per_epoch=1")
    (path,) = tmp_path.glob("glyphs/*.pt")
    encoder = encoder_of(load_checkpoint(path), path)
    assert all(parameter.abs().max() < 1e6 for parameter in encoder.parameters())


def test_a_full_disk_keeps_the_earlier_checkpoint_whole(uninterrupted, glyph_dir, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The first file takes 4 MiB; with the optimizer's averages it would take 12.
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * 2**20, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write \S*protonet_last.pt: File too large"):
            train("protonet", glyph_dir, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not stress.temporary_files(tmp_path) and last_of(tmp_path)["epoch"] == 0
    train("protonet", glyph_dir, tmp_path, "--resume=true")
    assert_same_run(uninterrupted["protonet"], tmp_path)


# One command that starts or goes on, and what it says


def test_resume_auto_starts_goes_on_and_is_content_with_a_finished_run(
    uninterrupted, glyph_dir, tmp_path, capsys
):
    train_until("inside the second epoch", "protonet", glyph_dir, tmp_path, "--resume=auto")
    for _ in range(2):
        train("protonet", glyph_dir, tmp_path, "--resume=auto")
        assert_same_run(uninterrupted["protonet"], tmp_path)
    assert capsys.readouterr().out.count("resumed ") == 2
    with pytest.raises(UserError, match="resume is yes, but .*'auto'.* is needed"):
        train("protonet", glyph_dir, tmp_path, "--resume=yes")


def test_more_steps_than_an_epoch_has_are_named(glyph_dir, tmp_path, capsys):
    train("protonet", glyph_dir, tmp_path, "--steps_per_epoch=1000", "--epochs=1")
    found = re.search(r"steps_per_epoch is 1000, but .* after (\d+)", capsys.readouterr().out)
    assert found and 0 < int(found[1]) < 1000


def test_printed_commands_can_be_copied_whatever_the_names(glyph_dir, tmp_path, capsys):
    data_dir, name = tmp_path / "my data; all", "it's mine"
    data_dir.mkdir()
    shutil.copy(glyph_dir / "glyphs.npz", data_dir / f"{name}.npz")
    where = [f"--data_dir={data_dir}", f"--dataset={name}", "--epochs=1"]
    train("protonet", data_dir, tmp_path / "my checkpoints", *where)
    command = shlex.split(capsys.readouterr().out.split("next: ")[1])
    model = tmp_path / "my checkpoints" / name / "protonet.pt"
    options = [f"--dataset={name}", f"--models={model}", f"--data_dir={data_dir}"]
    options.append("--k_shots=1,2,4,8,16")  # of 20 images per class
    assert command == ["python", "evaluate.py", *options]


def test_a_model_whose_name_is_no_file_name_on_some_system_is_refused(
    glyph_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_protonet, "MODEL", "my:method")
    with pytest.raises(UserError, match="is not the name of a MODEL"):
        train("protonet", glyph_dir, tmp_path)
    assert not list(tmp_path.iterdir())
