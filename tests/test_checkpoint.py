"""Checkpoints and training runs: what is saved, what is refused, and that a run goes on after any stop as if there was none."""

import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import stress
import train_protomaml
import train_protonet
from common import checkpoint
from common.checkpoint import encoder_of, load_checkpoint, save_checkpoint
from common.config import UserError, parse_config
from common.data import CIFAR100_MEAN, load_dataset, split_classes
from common.encoder import make_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(train_protonet.__file__).parent
TRAINERS = {"protonet": train_protonet, "protomaml": train_protomaml}
# ProtoNet with an epoch of classification first, so that its further weights are resumed as well.
SMALL = {
    "protonet": ["--n_way=2", "--k_shot=2", "--n_query=2", "--epochs=3", "--steps_per_epoch=5", "--pretrain_epochs=1", "--batch_size=16"],
    "protomaml": ["--n_way=2", "--k_shot=2", "--n_query=2", "--epochs=2", "--steps_per_epoch=4", "--tasks_per_step=2", "--val_episodes=2"],
}

STEPS_PER_EPOCH = {"protonet": 5, "protomaml": 4}


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
    return ["--dataset=glyphs", "--device=cpu", f"--data_dir={data_dir}", f"--checkpoint_dir={checkpoint_dir}", *SMALL[model], *more]


def train(model, data_dir, checkpoint_dir, *more):
    script = TRAINERS[model]
    return script.main(parse_config(script.Config, command_line(model, data_dir, checkpoint_dir, *more)))


def start_script(model, *arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / f"train_{model}.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def assert_same_run(expected, found):
    """Weights, optimizer, random numbers, curves, CSV and best epoch are the same to the last bit, and nothing is left over."""
    compared, differing = stress.differences(expected, found)
    assert compared >= 4 and not differing  # best, last, CSV and the figure
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


def crash_when(monkeypatch, model, moment):
    """Save after every step, and let a training run crash at the named moment."""
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", -1)
    steps = STEPS_PER_EPOCH[model]
    run, script = checkpoint.TrainingRun, TRAINERS[model]
    if moment == "inside the first epoch":
        monkeypatch.setattr(run, "track", crash_at_call(run.track, 3))
    elif moment == "inside the second epoch":
        monkeypatch.setattr(run, "track", crash_at_call(run.track, steps + 3))
    elif moment == "after the first validation":
        monkeypatch.setattr(run, "end_epoch", crash_at_call(run.end_epoch, 1))
    elif moment == "after the last validation":
        monkeypatch.setattr(run, "end_epoch", crash_at_call(run.end_epoch, 3 if model == "protonet" else 2))
    elif moment == "before the last CSV":
        monkeypatch.setattr(checkpoint, "write_text", crash_at_call(checkpoint.write_text, 3 if model == "protonet" else 2))
    elif moment == "between best and last":
        # Call 1 begins the run, then one per step, then the best epoch's file, then `last`.
        monkeypatch.setattr(checkpoint, "save_checkpoint", crash_at_call(checkpoint.save_checkpoint, steps + 3))
    elif moment == "in the figure":
        monkeypatch.setattr(script, "plot_training_curves", crash_at_call(script.plot_training_curves, 1))


MOMENTS = [
    "inside the first epoch",
    "inside the second epoch",
    "after the first validation",
    "after the last validation",
    "before the last CSV",
    "between best and last",
    "in the figure",
]


# Saving and loading


def test_what_is_saved_is_loaded_again_without_running_code(uninterrupted, tmp_path):
    contents = load_checkpoint(uninterrupted["protonet"] / "glyphs" / "protonet.pt")
    save_checkpoint(tmp_path / "copy.pt", contents)
    assert stress.same_value(torch.load(tmp_path / "copy.pt", weights_only=True), contents)


@pytest.mark.parametrize("model", TRAINERS)
@pytest.mark.parametrize("kind", ["best", "last"])
def test_best_and_last_carry_what_a_test_needs(model, kind, uninterrupted, glyph_dir):
    name = {"best": f"{model}.pt", "last": f"{model}_last.pt"}[kind]
    contents = torch.load(uninterrupted[model] / "glyphs" / name, weights_only=True)
    class_names = load_dataset("glyphs", glyph_dir).class_names
    assert (contents["model"], contents["dataset"]) == (model, "glyphs")
    assert contents["class_split"] == split_classes(class_names)
    assert len(contents["mean"]) == len(contents["std"]) == 3 and all(0 < value < 1 for value in (*contents["mean"], *contents["std"]))
    assert (contents["config"]["n_way"], contents["config"]["k_shot"], contents["config"]["lr_drops"]) == (2, 2, [0.7, 0.9])
    epochs = contents["config"]["epochs"]
    assert contents["epoch"] == epochs if kind == "last" else 1 <= contents["epoch"] <= epochs


@pytest.mark.parametrize("model", TRAINERS)
def test_best_is_the_first_epoch_of_the_highest_validation_accuracy(model, uninterrupted):
    folder = uninterrupted[model] / "glyphs"
    history = load_checkpoint(folder / f"{model}_last.pt")["history"]
    accuracies = [row["val_accuracy"] for row in history]
    best = load_checkpoint(folder / f"{model}.pt")
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    assert best["val_accuracy"] == max(accuracies)


def damaged_bytes(kind, whole):
    return {
        "empty": b"",
        "cut in the middle": whole[: len(whole) // 2],
        "cut at its end": whole[:-1000],
        "random bytes": np.random.default_rng(0).bytes(5000),
        "text": b"<!DOCTYPE html><html>Not found</html>",
        "a pickled list": pickle.dumps([1, 2, 3]),
        "a pickle of foreign objects": pickle.dumps(Path("somewhere")),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "cut in the middle", "cut at its end", "random bytes", "text", "a pickled list", "a pickle of foreign objects"])
def test_a_damaged_or_foreign_file_is_refused_by_name(kind, uninterrupted, tmp_path, recwarn):
    whole = (uninterrupted["protonet"] / "glyphs" / "protonet.pt").read_bytes()
    (tmp_path / "bad.pt").write_bytes(damaged_bytes(kind, whole))
    with pytest.raises(UserError, match="bad.pt") as error:
        load_checkpoint(tmp_path / "bad.pt")
    assert "\n" not in str(error.value) and not recwarn.list  # a warning would be a second line


@pytest.mark.parametrize("contents", [[1, 2], torch.zeros(3), {"format": "another"}, {"weights": torch.zeros(2)}, "text"], ids=lambda contents: type(contents).__name__)
def test_a_readable_file_of_other_contents_is_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_missing_file_is_refused_with_the_way_to_make_one(tmp_path):
    with pytest.raises(UserError, match="no checkpoint .*train_protonet.py"):
        load_checkpoint(tmp_path / "absent.pt")


class Hostile:
    """Unpickled, it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [lambda path, value: path.write_bytes(pickle.dumps(value)), lambda path, value: torch.save(value, path)], ids=["pickle", "torch"])
def test_code_in_a_hostile_file_is_not_run(write, tmp_path):
    trace = tmp_path / "trace"
    write(tmp_path / "hostile.pt", {"format": checkpoint.FORMAT, "state_dict": Hostile(trace)})
    with pytest.raises(UserError, match="hostile.pt"):
        load_checkpoint(tmp_path / "hostile.pt")
    assert not trace.exists()
    # The proof that this file is dangerous to a reader that trusts it.
    pickle.loads(pickle.dumps(Hostile(trace))).close()
    assert trace.exists()


def narrower(weights):
    weights["classifier.weight"] = weights["classifier.weight"][:, :7]


def without_one(weights):
    del weights["classifier.bias"]


def with_nan(weights):
    weights["features.conv0.weight"][0, 0, 0, 0] = float("nan")


def with_text(weights):
    weights["classifier.bias"] = "text"


@pytest.mark.parametrize("spoil", [narrower, without_one, with_nan, with_text], ids=lambda spoil: spoil.__name__)
def test_weights_that_cannot_be_used_are_refused(spoil, uninterrupted):
    path = uninterrupted["protonet"] / "glyphs" / "protonet.pt"
    contents = load_checkpoint(path)
    spoil(contents["state_dict"])
    with pytest.raises(UserError, match="weights"):
        encoder_of(contents, path)


@pytest.mark.parametrize(("hyperparameters", "model"), [({"proto_dim": 64, "lr": 2e-4}, "protonet"), ({"proto_dim": 64, "num_inner_steps": 1, "lr_inner": 0.1, "lr_output": 0.1}, "protomaml")])
def test_a_lightning_file_loads_as_it_is(hyperparameters, model, tmp_path):
    encoder = make_encoder().eval()
    weights = {f"model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    torch.save({"pytorch-lightning_version": "1.6", "epoch": 7, "state_dict": weights, "hyper_parameters": hyperparameters}, tmp_path / "tutorial.ckpt")
    contents = load_checkpoint(tmp_path / "tutorial.ckpt")
    assert (contents["model"], contents["dataset"], contents["epoch"], tuple(contents["mean"])) == (model, "cifar100", 7, CIFAR100_MEAN)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder_of(contents, "tutorial.ckpt")(images), encoder(images))


# Resuming


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("model", TRAINERS)
def test_a_run_resumed_after_a_crash_equals_an_uninterrupted_one(model, moment, uninterrupted, glyph_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        crash_when(patched, model, moment)
        with pytest.raises(Crash):
            train(model, glyph_dir, tmp_path)
    torch.manual_seed(1)  # a new process would not have the old one's random numbers either
    train(model, glyph_dir, tmp_path, "--resume=true")
    assert_same_run(uninterrupted[model], tmp_path)


@pytest.fixture
def unfinished(glyph_dir, tmp_path, monkeypatch):
    """A checkpoint_dir with a ProtoNet run that stopped inside its second epoch."""
    with monkeypatch.context() as patched:
        crash_when(patched, "protonet", "inside the second epoch")
        with pytest.raises(Crash):
            train("protonet", glyph_dir, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_unfinished_run_is_neither_continued_nor_discarded_unasked(unfinished, glyph_dir):
    before = contents_of(unfinished)
    with pytest.raises(UserError, match=r"1 of 3 epochs done, 2 steps.*--resume=true.*--overwrite=true"):
        train("protonet", glyph_dir, unfinished)
    assert contents_of(unfinished) == before


def test_overwrite_discards_the_unfinished_run(unfinished, uninterrupted, glyph_dir):
    train("protonet", glyph_dir, unfinished, "--overwrite=true")
    (unfinished / "glyphs" / "protonet_previous.pt").unlink()  # the best epoch of the discarded run
    assert_same_run(uninterrupted["protonet"], unfinished)


def test_a_new_run_keeps_the_best_checkpoint_of_a_finished_one(uninterrupted, glyph_dir, tmp_path):
    shutil.copytree(uninterrupted["protonet"], tmp_path, dirs_exist_ok=True)
    earlier = (tmp_path / "glyphs" / "protonet.pt").read_bytes()
    train("protonet", glyph_dir, tmp_path, "--epochs=1", "--pretrain_epochs=0", "--seed=1")
    assert (tmp_path / "glyphs" / "protonet_previous.pt").read_bytes() == earlier


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
    monkeypatch.setattr(train_protonet, "split_classes", lambda names: split_classes(names, seed=1))
    with pytest.raises(UserError, match="class split changed"):
        train("protonet", glyph_dir, unfinished, "--resume=true")


def test_resuming_where_nothing_is_says_what_was_looked_for(glyph_dir, tmp_path):
    with pytest.raises(UserError, match="nothing to resume.*protonet_last.pt"):
        train("protonet", glyph_dir, tmp_path, "--resume=true")
    assert not contents_of(tmp_path)


def test_resuming_from_a_file_that_is_not_a_last_one_is_refused(uninterrupted, glyph_dir, tmp_path):
    (tmp_path / "glyphs").mkdir()
    shutil.copy(uninterrupted["protonet"] / "glyphs" / "protonet.pt", tmp_path / "glyphs" / "protonet_last.pt")
    for more in ([], ["--resume=true"]):
        with pytest.raises(UserError, match="protonet_last.pt"):
            train("protonet", glyph_dir, tmp_path, "--epochs=4", *more)


def test_a_finished_run_can_be_extended_but_not_shortened(uninterrupted, glyph_dir, tmp_path):
    shutil.copytree(uninterrupted["protonet"], tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match="3 epochs are done.*--epochs=2 asks for fewer"):
        train("protonet", glyph_dir, tmp_path, "--resume=true", "--epochs=2")
    train("protonet", glyph_dir, tmp_path, "--resume=true", "--epochs=4")
    rows = (tmp_path / "glyphs" / "protonet.csv").read_text().splitlines()
    assert rows[:4] == (uninterrupted["protonet"] / "glyphs" / "protonet.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[4].startswith("4,")


# Signals


@pytest.mark.parametrize(("model", "number", "code"), [("protonet", signal.SIGINT, 130), ("protomaml", signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_prints_the_command_that_goes_on(model, number, code, uninterrupted, glyph_dir, tmp_path):
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


def send_after(run, step, *numbers):
    """Return TrainingRun.track, but in the named step the process is sent the signals first."""
    original, calls = run.track, 0

    def track(self, loss, accuracy):
        nonlocal calls
        calls += 1
        if calls == step:
            for number in numbers:
                signal.raise_signal(number)
        return original(self, loss, accuracy)

    return track


def test_a_second_interrupt_stops_at_once_and_loses_nothing_that_was_saved(uninterrupted, glyph_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "SAVE_EVERY", -1)
        patched.setattr(checkpoint.TrainingRun, "track", send_after(checkpoint.TrainingRun, 9, signal.SIGINT, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train("protonet", glyph_dir, tmp_path)
    assert load_checkpoint(tmp_path / "glyphs" / "protonet_last.pt")["step"] == 3
    train("protonet", glyph_dir, tmp_path, "--resume=true")
    assert_same_run(uninterrupted["protonet"], tmp_path)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("model", TRAINERS)
def test_a_signal_in_the_last_step_of_an_epoch_can_be_resumed(model, epochs, uninterrupted, glyph_dir, tmp_path, monkeypatch):
    step = epochs * STEPS_PER_EPOCH[model]
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.TrainingRun, "track", send_after(checkpoint.TrainingRun, step, signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            train(model, glyph_dir, tmp_path)
    assert stop.value.code == 143
    train(model, glyph_dir, tmp_path, "--resume=true")
    assert_same_run(uninterrupted[model], tmp_path)


@pytest.mark.parametrize("typed", [["--overwrite=true"], ["--overwrite", "true"], ["--overwrite=true", "--lr", "2e-4"]], ids=" ".join)
def test_the_printed_command_resumes_however_the_first_one_was_typed(typed, glyph_dir, tmp_path, monkeypatch, capsys):
    arguments = command_line("protonet", glyph_dir, tmp_path, *typed)
    monkeypatch.setattr(sys, "argv", ["train_protonet.py", *arguments])
    monkeypatch.setattr(checkpoint.TrainingRun, "track", send_after(checkpoint.TrainingRun, 1, signal.SIGINT))
    with pytest.raises(SystemExit):
        train_protonet.main(parse_config(train_protonet.Config, arguments))
    command = capsys.readouterr().out.splitlines()[-1].split("go on with: ")[1]
    cfg = parse_config(train_protonet.Config, shlex.split(command)[2:])
    assert cfg.resume and not cfg.overwrite and cfg.checkpoint_dir == str(tmp_path)


# Losses that are no numbers


@pytest.mark.parametrize("model", TRAINERS)
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(model, glyph_dir, tmp_path, monkeypatch):
    original, calls = checkpoint.TrainingRun.track, 0

    def track(self, loss, accuracy):
        nonlocal calls
        calls += 1
        return original(self, loss * float("nan") if calls == 3 else loss, accuracy)

    monkeypatch.setattr(checkpoint.TrainingRun, "track", track)
    with pytest.raises(UserError, match=r"nan in epoch 1, step 3\b"):
        train(model, glyph_dir, tmp_path)
    encoder_of(load_checkpoint(tmp_path / "glyphs" / f"{model}_last.pt"), "last")


@pytest.mark.parametrize("steps", [1, 5])
def test_a_learning_rate_that_blows_the_weights_up_leaves_no_spoilt_checkpoint(steps, glyph_dir, tmp_path):
    with pytest.raises(UserError, match=r"epoch 1\b|lr"):
        train("protonet", glyph_dir, tmp_path, "--lr=1e30", "--pretrain_epochs=0", f"--steps_per_epoch={steps}")
    for path in tmp_path.glob("glyphs/*.pt"):
        encoder = encoder_of(load_checkpoint(path), path)
        assert all(parameter.abs().max() < 1e6 for parameter in encoder.parameters())


# Kills and full disks


def test_five_kills_at_random_moments_lose_nothing(glyph_dir, tmp_path):
    job = stress.training_job("protonet", glyph_dir, "--epochs=3", "--steps_per_epoch=15", "--pretrain_epochs=1", "--batch_size=16")
    (tmp_path / "alone").mkdir()
    _, first_file = stress.run_to_end(job, tmp_path / "alone")
    kills, resumes, checked, losses = stress.kill_and_compare(job, tmp_path / "alone", tmp_path, 5, first_file, seed=0)
    assert losses == []
    assert kills == 5 and checked >= 4


def limited(megabytes):
    """Return a function that limits the size of the files which a child process may write, as a full disk would."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead of the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (megabytes * 2**20, megabytes * 2**20))

    return limit


def test_a_full_disk_keeps_the_earlier_checkpoint_whole(uninterrupted, glyph_dir, tmp_path):
    # The first `last` takes 4 MiB; with the optimizer's averages it would take 12.
    process = start_script("protonet", *command_line("protonet", glyph_dir, tmp_path), preexec_fn=limited(6))
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
    process = start_script("protonet", "--dataset=glyph_digits", f"--data_dir={tmp_path / 'data'}", f"--checkpoint_dir={tmp_path}", preexec_fn=limited(1))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1 and "cannot write" in errors and "glyph_digits.npz" in errors
    assert not contents_of(tmp_path)
