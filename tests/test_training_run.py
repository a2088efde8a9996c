"""The life of a training run: after any stop it goes on as if there had been none."""

import errno
import io
import os
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
from common import splits, training_run
from common.checkpoint import encoder_of, load_checkpoint, save_checkpoint
from common.config import UserError, parse_config
from common.data import load_dataset
from common.splits import split_classes
from common.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(train_protonet.__file__).parent
# The classifier trains class prototypes beside its encoder: its runs show that these are resumed.
TRAINERS = {
    "classifier": train_classifier,
    "protonet": train_protonet,
    "protomaml": train_protomaml,
}
EPOCHS = {"classifier": 2, "protonet": 3, "protomaml": 2}
STEPS_PER_EPOCH = {"classifier": 5, "protonet": 5, "protomaml": 4}
OWN_OPTIONS = {
    "classifier": ["--batch_size=16"],
    "protonet": [],
    "protomaml": ["--tasks_per_step=2", "--val_episodes=2"],
}


class Crash(Exception):
    """Stands for a process that ends here: nothing in the scripts catches it."""


@pytest.fixture(scope="module")
def uninterrupted(glyph_dir, tmp_path_factory):
    """Return {model: checkpoint_dir of a small run that nothing interrupted}."""
    folders = {}
    for model in TRAINERS:
        folders[model] = tmp_path_factory.mktemp(model)
        train(model, glyph_dir, folders[model])
    return folders


def command_line(model, data_dir, checkpoint_dir, *more):
    return [
        "--dataset=glyphs",
        "--device=cpu",
        f"--data_dir={data_dir}",
        f"--checkpoint_dir={checkpoint_dir}",
        "--n_way=2",
        "--k_shot=2",
        "--n_query=2",
        f"--epochs={EPOCHS[model]}",
        f"--steps_per_epoch={STEPS_PER_EPOCH[model]}",
        *OWN_OPTIONS[model],
        *more,
    ]


def train(model, data_dir, checkpoint_dir, *more):
    script, arguments = TRAINERS[model], command_line(model, data_dir, checkpoint_dir, *more)
    return script.main(parse_config(script.Config, arguments))


def start_script(model, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"train_{model}.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def assert_same_run(expected, found):
    """Weights, optimizer, random numbers, curves, CSV and best epoch are the same to the last bit.

    Nothing is left over.
    """
    compared, differing = stress.differences(expected, found)
    assert compared >= 5 and not differing  # best, last, CSV, the figure as PNG and SVG
    assert not stress.temporary_files(found)


def crash_at_call(function, number):
    """Return `function`, but its `number`-th call raises Crash."""
    calls = 0

    def counting(*args, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            raise Crash
        return function(*args, **options)

    return counting


# Where a run crashes, as (what is called, at which call). With a save after every step, the calls
# of save_checkpoint are one for the start, one per step, then the best epoch's file, then the last.
MOMENTS = {
    "inside the first epoch": lambda epochs, steps: (TrainingRun, "track", 3),
    "inside the second epoch": lambda epochs, steps: (TrainingRun, "track", steps + 3),
    "after the first validation": lambda epochs, steps: (TrainingRun, "end_epoch", 1),
    "after the last validation": lambda epochs, steps: (TrainingRun, "end_epoch", epochs),
    "before the last CSV": lambda epochs, steps: (training_run, "write_csv", epochs),
    "between best and last": lambda epochs, steps: (training_run, "save_checkpoint", steps + 3),
    "in the figure": lambda epochs, steps: (training_run, "plot_training_curves", 1),
}


def train_until(moment, model, glyph_dir, folder, monkeypatch):
    """Let a run that saves after every step crash at the named moment."""
    owner, name, number = MOMENTS[moment](EPOCHS[model], STEPS_PER_EPOCH[model])
    with monkeypatch.context() as patched:
        patched.setattr(training_run, "SAVE_EVERY", -1)
        patched.setattr(owner, name, crash_at_call(getattr(owner, name), number))
        with pytest.raises(Crash):
            train(model, glyph_dir, folder)


# What a run leaves behind


@pytest.mark.parametrize("model", TRAINERS)
@pytest.mark.parametrize("kind", ["best", "last"])
def test_best_and_last_carry_what_a_test_needs(model, kind, uninterrupted, glyph_dir):
    name = {"best": f"{model}.pt", "last": f"{model}_last.pt"}[kind]
    contents = torch.load(uninterrupted[model] / "glyphs" / name, weights_only=True)
    class_names = load_dataset("glyphs", glyph_dir).class_names
    assert (contents["model"], contents["dataset"]) == (model, "glyphs")
    assert contents["class_split"] == split_classes(class_names)
    assert len(contents["mean"]) == len(contents["std"]) == 3
    assert all(0 < value < 1 for value in (*contents["mean"], *contents["std"]))
    config = contents["config"]
    assert (config["n_way"], config["k_shot"], config["epochs"]) == (2, 2, EPOCHS[model])
    if model != "classifier":
        assert config["lr_drops"] == [0.7, 0.9]
    if kind == "last":
        assert contents["epoch"] == EPOCHS[model]
    else:
        assert 1 <= contents["epoch"] <= EPOCHS[model]


@pytest.mark.parametrize("model", TRAINERS)
def test_best_is_the_first_epoch_of_the_highest_validation_accuracy(model, uninterrupted):
    folder = uninterrupted[model] / "glyphs"
    history = load_checkpoint(folder / f"{model}_last.pt")["history"]
    accuracies = [row["val_accuracy"] for row in history]
    best = load_checkpoint(folder / f"{model}.pt")
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    assert best["val_accuracy"] == max(accuracies)


# Resuming


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("model", TRAINERS)
def test_a_run_resumed_after_a_crash_equals_an_uninterrupted_one(
    model, moment, uninterrupted, glyph_dir, tmp_path, monkeypatch
):
    train_until(moment, model, glyph_dir, tmp_path, monkeypatch)
    torch.manual_seed(1)  # a new process would not have the old one's random numbers either
    train(model, glyph_dir, tmp_path, "--resume=true")
    assert_same_run(uninterrupted[model], tmp_path)


@pytest.fixture
def unfinished(glyph_dir, tmp_path, monkeypatch):
    """Return the checkpoint_dir of a ProtoNet run that stopped inside its second epoch."""
    folder = tmp_path / "checkpoints"
    train_until("inside the second epoch", "protonet", glyph_dir, folder, monkeypatch)
    return folder


@pytest.mark.parametrize("instead", [None, "another run's", "damaged"])
def test_a_run_moved_without_its_best_epoch_brings_it_along(
    instead, unfinished, uninterrupted, glyph_dir, tmp_path
):
    best = unfinished / "glyphs" / "protonet.pt"
    kept = unfinished / "glyphs" / "protonet_previous.pt"
    before = best.read_bytes()
    best.unlink()
    if instead:
        train("protonet", glyph_dir, tmp_path / "other", "--epochs=1", "--seed=1")
        shutil.copy(tmp_path / "other" / "glyphs" / "protonet.pt", best)
        if instead == "damaged":
            best.write_bytes(best.read_bytes()[:-1000])
        foreign = best.read_bytes()
    # As many epochs as are done, and no step more: what is there is what was brought along.
    with pytest.raises(Crash), pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingRun, "track", crash_at_call(TrainingRun.track, 1))
        train("protonet", glyph_dir, unfinished, "--resume=true")
    assert stress.same_value(torch.load(best), torch.load(io.BytesIO(before)))
    assert not instead or kept.read_bytes() == foreign
    train("protonet", glyph_dir, unfinished, "--resume=true")
    assert_same_run(uninterrupted["protonet"], unfinished)


def test_a_run_goes_on_with_the_same_teacher_wherever_that_is(uninterrupted, glyph_dir, tmp_path):
    teacher, moved = tmp_path / "teacher.pt", tmp_path / "moved.pt"
    shutil.copy(uninterrupted["classifier"] / "glyphs" / "classifier.pt", teacher)
    with pytest.raises(Crash), pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingRun, "track", crash_at_call(TrainingRun.track, 2))
        train("classifier", glyph_dir, tmp_path, f"--teacher={teacher}")
    train("classifier", glyph_dir, tmp_path / "other", "--epochs=1", "--seed=1")
    teacher.rename(moved)
    shutil.copy(tmp_path / "other" / "glyphs" / "classifier.pt", teacher)
    with pytest.raises(UserError, match="cannot resume .*: the teacher changed; put that back"):
        train("classifier", glyph_dir, tmp_path, f"--teacher={teacher}", "--resume=true")
    train("classifier", glyph_dir, tmp_path, f"--teacher={moved}", "--resume=true")


def test_a_run_goes_on_where_the_file_that_it_started_from_has_moved(
    uninterrupted, glyph_dir, tmp_path
):
    start, moved = tmp_path / "start.pt", tmp_path / "moved.pt"
    shutil.copy(uninterrupted["classifier"] / "glyphs" / "classifier.pt", start)
    train("protonet", glyph_dir, tmp_path / "whole", f"--init_from={start}")
    with pytest.raises(Crash), pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingRun, "track", crash_at_call(TrainingRun.track, 2))
        train("protonet", glyph_dir, tmp_path, f"--init_from={start}")
    start.rename(moved)
    train("protonet", glyph_dir, tmp_path, f"--init_from={moved}", "--resume=true")
    last, whole = (
        load_checkpoint(folder / "glyphs" / "protonet_last.pt")
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert stress.same_value(last["state_dict"], whole["state_dict"])


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_unfinished_run_is_neither_continued_nor_discarded_unasked(unfinished, glyph_dir):
    before = bytes_of(unfinished)
    message = r"1 of 3 epochs done, 2 steps.*--resume=true.*--overwrite=true"
    with pytest.raises(UserError, match=message):
        train("protonet", glyph_dir, unfinished)
    assert bytes_of(unfinished) == before


def test_overwrite_discards_the_unfinished_run(unfinished, uninterrupted, glyph_dir):
    train("protonet", glyph_dir, unfinished, "--overwrite=true")
    # The best epoch of the discarded run.
    for kept in (unfinished / "glyphs").glob("protonet_previous.*"):
        kept.unlink()
    assert_same_run(uninterrupted["protonet"], unfinished)


def test_a_new_run_keeps_the_best_checkpoint_of_a_finished_one(uninterrupted, glyph_dir, tmp_path):
    shutil.copytree(uninterrupted["protonet"], tmp_path, dirs_exist_ok=True)
    earlier, curve = (
        (tmp_path / "glyphs" / f"protonet.{suffix}").read_bytes() for suffix in ("pt", "csv")
    )
    train("protonet", glyph_dir, tmp_path, "--epochs=1", "--seed=1")
    second = (tmp_path / "glyphs" / "protonet.pt").read_bytes()
    for seed in (2, 3):
        train("protonet", glyph_dir, tmp_path, "--epochs=1", f"--seed={seed}")
    # None of them is lost to a later one.
    assert (tmp_path / "glyphs" / "protonet_previous.pt").read_bytes() == earlier
    assert (tmp_path / "glyphs" / "protonet_previous.csv").read_bytes() == curve
    assert (tmp_path / "glyphs" / "protonet_previous-2.pt").read_bytes() == second
    assert (tmp_path / "glyphs" / "protonet_previous-3.pt").exists()


def test_resuming_with_another_config_names_the_differences(unfinished, glyph_dir):
    with pytest.raises(UserError, match=r"lr was 0.0002 and is 0.001.*seed was 42 and is 7"):
        train("protonet", glyph_dir, unfinished, "--resume=true", "--lr=1e-3", "--seed=7")


def test_resuming_with_other_images_says_so(unfinished, glyph_dir, tmp_path):
    with np.load(glyph_dir / "glyphs.npz") as arrays:
        other = dict(arrays)
    other["images"] = other["images"].copy()
    other["images"][0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "glyphs.npz", **other)
    with pytest.raises(UserError, match="images of the data set changed") as error:
        train("protonet", tmp_path, unfinished, "--resume=true")
    assert "class split" not in str(error.value)


def test_resuming_with_another_class_split_says_so(unfinished, glyph_dir, monkeypatch):
    monkeypatch.setattr(splits, "split_classes", lambda names: split_classes(names, seed=1))
    with pytest.raises(UserError, match="class split changed"):
        train("protonet", glyph_dir, unfinished, "--resume=true")


def test_resuming_under_another_model_is_refused(unfinished, glyph_dir):
    folder = unfinished / "glyphs"
    shutil.copy(folder / "protonet_last.pt", folder / "classifier_last.pt")
    before = bytes_of(unfinished)
    with pytest.raises(UserError, match="the model was 'protonet' and is 'classifier'"):
        train("classifier", glyph_dir, unfinished, "--resume=true")
    assert bytes_of(unfinished) == before


def without_option(name, path):
    """Make the checkpoint in `path` older than an option."""
    contents = load_checkpoint(path)
    del contents["config"][name]
    save_checkpoint(path, contents)


def test_an_option_that_is_younger_than_the_run_had_its_default(
    unfinished, uninterrupted, glyph_dir
):
    path = unfinished / "glyphs" / "protonet_last.pt"
    without_option("val_way", path)
    with pytest.raises(UserError, match=f"cannot resume {path}: val_way was 0 and is 2; put"):
        train("protonet", glyph_dir, unfinished, "--resume=true", "--val_way=2")
    train("protonet", glyph_dir, unfinished, "--resume=true")
    assert_same_run(uninterrupted["protonet"], unfinished)


def test_resuming_where_nothing_is_says_what_was_looked_for(glyph_dir, tmp_path):
    with pytest.raises(UserError, match="nothing to resume.*protonet_last.pt"):
        train("protonet", glyph_dir, tmp_path, "--resume=true")
    assert not bytes_of(tmp_path)


def test_resuming_from_a_file_that_is_not_a_last_one_is_refused(uninterrupted, glyph_dir, tmp_path):
    folder = tmp_path / "glyphs"
    folder.mkdir()
    best = uninterrupted["protonet"] / "glyphs" / "protonet.pt"
    shutil.copy(best, folder / "protonet_last.pt")
    for more in ([], ["--resume=true"]):
        with pytest.raises(UserError, match="protonet_last.pt"):
            train("protonet", glyph_dir, tmp_path, "--epochs=4", *more)


def test_a_finished_run_can_be_extended_but_not_shortened(uninterrupted, glyph_dir, tmp_path):
    shutil.copytree(uninterrupted["protonet"], tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="3 epochs are done.*--epochs=2 asks for fewer"):
        train("protonet", glyph_dir, tmp_path, "--resume=true", "--epochs=2")
    train("protonet", glyph_dir, tmp_path, "--resume=true", "--epochs=4")
    rows = (tmp_path / "glyphs" / "protonet.csv").read_text().splitlines()
    before = (uninterrupted["protonet"] / "glyphs" / "protonet.csv").read_text().splitlines()
    assert rows[:4] == before
    assert len(rows) == 5 and rows[4].startswith("4,")


# Signals


@pytest.mark.parametrize(
    ("model", "number", "code"),
    [
        ("classifier", signal.SIGINT, 130),
        ("protonet", signal.SIGINT, 130),
        ("protomaml", signal.SIGTERM, 143),
    ],
)
def test_a_signal_finishes_the_step_saves_and_prints_the_command_that_goes_on(
    model, number, code, uninterrupted, glyph_dir, tmp_path
):
    process = start_script(model, *command_line(model, glyph_dir, tmp_path))
    seen = ""
    while "epoch 1/" not in seen:  # the progress bar of the first epoch
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in errors
    last = load_checkpoint(tmp_path / "glyphs" / f"{model}_last.pt")
    assert last["epoch"] == 0 and last["step"] >= 1

    python, script, *arguments = shlex.split(printed.splitlines()[-1].split("go on with: ")[1])
    assert python == "python" and Path(script).name == f"train_{model}.py"
    trainer = TRAINERS[model]
    trainer.main(parse_config(trainer.Config, arguments))
    assert_same_run(uninterrupted[model], tmp_path)


def signals_in_step(step, *numbers):
    """Return TrainingRun.track, but in the given step the process is sent the signals first."""
    original, calls = TrainingRun.track, 0

    def track(self, loss, accuracy):
        nonlocal calls
        calls += 1
        if calls == step:
            for number in numbers:
                signal.raise_signal(number)
        return original(self, loss, accuracy)

    return track


def test_a_second_interrupt_stops_at_once_and_loses_nothing_that_was_saved(
    uninterrupted, glyph_dir, tmp_path, monkeypatch
):
    twice = signals_in_step(9, signal.SIGINT, signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(training_run, "SAVE_EVERY", -1)
        patched.setattr(TrainingRun, "track", twice)
        with pytest.raises(KeyboardInterrupt):
            train("protonet", glyph_dir, tmp_path)
    assert load_checkpoint(tmp_path / "glyphs" / "protonet_last.pt")["step"] == 3
    train("protonet", glyph_dir, tmp_path, "--resume=true")
    assert_same_run(uninterrupted["protonet"], tmp_path)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("model", TRAINERS)
def test_a_signal_in_the_last_step_of_an_epoch_can_be_resumed(
    model, epochs, uninterrupted, glyph_dir, tmp_path, monkeypatch
):
    in_last_step = signals_in_step(epochs * STEPS_PER_EPOCH[model], signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(TrainingRun, "track", in_last_step)
        with pytest.raises(SystemExit) as stop:
            train(model, glyph_dir, tmp_path)
    assert stop.value.code == 143
    train(model, glyph_dir, tmp_path, "--resume=true")
    assert_same_run(uninterrupted[model], tmp_path)


@pytest.mark.parametrize(
    "typed",
    [["--overwrite=true"], ["--overwrite", "true"], ["--overwrite=true", "--lr", "2e-4"]],
    ids=" ".join,
)
def test_the_printed_command_resumes_however_the_first_one_was_typed(
    typed, glyph_dir, tmp_path, monkeypatch, capsys
):
    arguments = command_line("protonet", glyph_dir, tmp_path, *typed)
    monkeypatch.setattr(sys, "argv", ["train_protonet.py", *arguments])
    monkeypatch.setattr(TrainingRun, "track", signals_in_step(1, signal.SIGINT))
    with pytest.raises(SystemExit):
        train_protonet.main(parse_config(train_protonet.Config, arguments))
    command = capsys.readouterr().out.splitlines()[-1].split("go on with: ")[1]
    cfg = parse_config(train_protonet.Config, shlex.split(command)[2:])
    assert cfg.resume and not cfg.overwrite and cfg.checkpoint_dir == str(tmp_path)


# Losses that are no numbers


@pytest.mark.parametrize("model", TRAINERS)
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(
    model, glyph_dir, tmp_path, monkeypatch
):
    original, calls = TrainingRun.track, 0

    def track(self, loss, accuracy):
        nonlocal calls
        calls += 1
        return original(self, loss * float("nan") if calls == 3 else loss, accuracy)

    monkeypatch.setattr(TrainingRun, "track", track)
    with pytest.raises(UserError, match=r"nan in epoch 1, step 3\b"):
        train(model, glyph_dir, tmp_path)
    encoder_of(load_checkpoint(tmp_path / "glyphs" / f"{model}_last.pt"), "last")


@pytest.mark.parametrize("steps", [1, 5])
def test_a_learning_rate_that_blows_the_weights_up_leaves_no_spoilt_checkpoint(
    steps, glyph_dir, tmp_path
):
    with pytest.raises(UserError, match=r"epoch 1\b"):
        train("protonet", glyph_dir, tmp_path, "--lr=1e30", f"--steps_per_epoch={steps}")
    for path in tmp_path.glob("glyphs/*.pt"):
        encoder = encoder_of(load_checkpoint(path), path)
        assert all(parameter.abs().max() < 1e6 for parameter in encoder.parameters())


# Kills and full disks


def test_five_kills_at_random_moments_lose_nothing(glyph_dir, tmp_path):
    job = stress.training_job("classifier", glyph_dir, "--epochs=3", "--steps_per_epoch=15")
    alone = tmp_path / "alone"
    alone.mkdir()
    _, first_file = stress.run_to_end(job, alone)
    kills, _, checked, losses = stress.kill_and_compare(job, alone, tmp_path, 5, first_file, seed=0)
    assert losses == []
    assert kills == 5 and checked >= 4


def limited(megabytes):
    """Return a function that limits the size of a child process's files, as a full disk would."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead of the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 2**20, megabytes * 2**20))

    return limit


def test_a_full_disk_keeps_the_earlier_checkpoint_whole(uninterrupted, glyph_dir, tmp_path):
    # The first file takes 4 MiB; with the optimizer's averages it would take 12.
    arguments = command_line("protonet", glyph_dir, tmp_path)
    process = start_script("protonet", *arguments, preexec_fn=limited(6))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    message = errors.replace("\r", "\n").strip().splitlines()[-1]
    assert "train_protonet.py: error: cannot write" in message and "protonet_last.pt" in message
    assert "Traceback" not in errors
    assert not stress.temporary_files(tmp_path)
    assert load_checkpoint(tmp_path / "glyphs" / "protonet_last.pt")["epoch"] == 0
    train("protonet", glyph_dir, tmp_path, "--resume=true")
    assert_same_run(uninterrupted["protonet"], tmp_path)


def test_a_full_disk_leaves_no_half_written_data_set(tmp_path):
    folders = [f"--data_dir={tmp_path / 'data'}", f"--checkpoint_dir={tmp_path}"]
    process = start_script("protonet", "--dataset=glyph_digits", *folders, preexec_fn=limited(1))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert "cannot write" in errors and "glyph_digits.npz" in errors
    assert not bytes_of(tmp_path)


# Other disturbances


def test_a_second_run_on_the_same_folder_is_refused_while_the_first_is_at_work(
    uninterrupted, glyph_dir, tmp_path
):
    process = start_script("protonet", *command_line("protonet", glyph_dir, tmp_path))
    seen = ""
    while "epoch 1/" not in seen:
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    process.send_signal(signal.SIGSTOP)  # it stays at work, however fast it is
    for more in ("--overwrite=true", "--resume=true"):
        with pytest.raises(UserError, match="another run trains a protonet in .* right now"):
            train("protonet", glyph_dir, tmp_path, more)
    train("protomaml", glyph_dir, tmp_path)  # another model may
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert_same_run(uninterrupted["protonet"], tmp_path)


def test_a_data_file_replaced_during_a_run_does_not_enter_it(
    uninterrupted, glyph_dir, tmp_path, monkeypatch
):
    data_dir = shutil.copytree(glyph_dir, tmp_path / "data")
    checkpoints = tmp_path / "checkpoints"
    train_until("inside the second epoch", "protonet", data_dir, checkpoints, monkeypatch)
    end_epoch = training_run.TrainingRun.end_epoch

    def replace_and_end(self, *arguments):
        with np.load(glyph_dir / "glyphs.npz") as arrays:
            np.savez(data_dir / "glyphs.npz", **{**arrays, "images": 255 - arrays["images"]})
        end_epoch(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(training_run.TrainingRun, "end_epoch", replace_and_end)
        train("protonet", data_dir, checkpoints, "--resume=true")
    assert_same_run(uninterrupted["protonet"], checkpoints)
    with pytest.raises(UserError, match="images of the data set changed"):
        train("protonet", data_dir, checkpoints, "--resume=true", "--epochs=4")


def test_a_folder_on_a_read_only_file_system_is_one_message(glyph_dir, tmp_path, monkeypatch):
    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(UserError, match="cannot write .*Read-only file system.*another folder"):
        train("protonet", glyph_dir, tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_last_file_is_not_resumed(unfinished, glyph_dir):
    path = unfinished / "glyphs" / "protonet_last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the weights
    path.write_bytes(content)
    for more in ([], ["--resume=true"]):
        with pytest.raises(UserError, match="protonet_last.pt is damaged"):
            train("protonet", glyph_dir, unfinished, *more)
