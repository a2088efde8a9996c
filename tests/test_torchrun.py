"""Several processes: the results of one, one line for an error, nothing lost when one dies.

Most tests start the processes themselves, as torchrun would, to see what each of them does; two
start torchrun.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import stress
import torch
from torch import distributed

import train_classifier
import train_protomaml
import train_protonet
from common import data, training_run
from common.checkpoint import load_checkpoint
from common.config import UserError, parse_config
from common.parallel import process_count, process_rank, share

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(train_protonet.__file__).parent
EPISODES = ["--n_way=2", "--k_shot=2", "--n_query=2", "--device=cpu"]
TRAINING = {
    "classifier": ["train_classifier.py", *EPISODES, "--batch_size=16"],
    "protonet": ["train_protonet.py", *EPISODES, "--episodes_per_step=4"],
    "protomaml": ["train_protomaml.py", *EPISODES, "--tasks_per_step=4", "--val_episodes=5"],
}
TRAINERS = {
    "classifier": train_classifier,
    "protonet": train_protonet,
    "protomaml": train_protomaml,
}
# What runs before the script, which sees the names that are changed here.
START = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
rank = int(os.environ.get("RANK", 0))
{before}
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    {after}
"""
# A tiny encoder that computes in float64; notes what all_reduce gives in each step.
WATCHED = """
import torch
from common import checkpoint, data, parallel
from common.encoder import Encoder

def starting_encoder(cfg, data):
    return Encoder(8, 4, (1, 1, 1, 1), 2, 8).to(dtype)

def noting(sums=(), means=()):
    all_reduce(sums, means)
    if len(means) > 1:
        notes.append([[tensor.clone() for tensor in group] for group in (sums, means)])

dtype, notes, all_reduce = torch.{dtype}, [], parallel.all_reduce
parallel.all_reduce, checkpoint.starting_encoder = noting, starting_encoder
normalize = data.TrainingData.normalize
data.TrainingData.normalize = lambda self, images: normalize(self, images).to(dtype)
"""
SAVE_NOTES = "rank or torch.save(notes, {path!r})"
# Saves after every step; in the fifth one, something happens to the process of rank 1.
IN_STEP_5 = """
from common import training_run

def track(run, *numbers):
    track_as_ever(run, *numbers)
    run.tracked = getattr(run, "tracked", 0) + 1
    if run.tracked == 5 and rank == 1:
        {what}

training_run.SAVE_EVERY = -1
track_as_ever = training_run.TrainingRun.track
training_run.TrainingRun.track = track
"""


@contextmanager
def started(count, command, folder, before="", after="pass"):
    """Start `count` processes of a script as torchrun does; yield them."""
    folder.mkdir(exist_ok=True)
    start = folder / "start.py"
    start.write_text(START.format(root=str(ROOT), before=before, after=after))
    script, *arguments = map(str, command)
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(start), str(ROOT / script), *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def run(count, command, folder, before="", after="pass"):
    """Run a script in `count` processes to its end; return [(exit code, output, errors)]."""
    with started(count, command, folder, before, after) as processes:
        printed = [process.communicate(timeout=120) for process in processes]
    codes = [process.returncode for process in processes]
    return [(code, *texts) for code, texts in zip(codes, printed)]


def training(model, glyph_dir, folder, *more):
    where = ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={folder}"]
    return [*TRAINING[model], *where, "--epochs=2", "--steps_per_epoch=6", *more]


def train(count, model, glyph_dir, folder, *more, **patches):
    return run(count, training(model, glyph_dir, folder / "checkpoints", *more), folder, **patches)


def last_of(model, folder):
    return load_checkpoint(folder / "checkpoints" / "glyphs" / f"{model}_last.pt")


def error_lines(results):
    return [line for *_, errors in results for line in errors.splitlines() if "error: " in line]


def assert_same_run(expected, found):
    compared, differing = stress.differences(expected / "checkpoints", found / "checkpoints")
    assert compared >= 5 and not differing
    assert not stress.temporary_files(found)


# The results of one process


def watched_steps(count, dtype, model, glyph_dir, folder):
    """Train in `count` processes; return for each step [gradients, [loss, accuracy, *statistics]].

    In float64 20 steps, in float32 one.
    """
    sizes = (
        ["--steps_per_epoch=10"] if dtype == "float64" else ["--steps_per_epoch=1", "--epochs=1"]
    )
    path, watch = folder / "notes.pt", WATCHED.format(dtype=dtype)
    save = SAVE_NOTES.format(path=str(path))
    results = train(count, model, glyph_dir, folder, *sizes, before=watch, after=save)
    assert [code for code, *_ in results] == [0] * count, results
    return torch.load(path)


def test_two_and_four_processes_find_the_gradients_and_statistics_of_one(glyph_dir, tmp_path):
    results = [
        watched_steps(count, "float32", "protomaml", glyph_dir, tmp_path / str(count))[0]
        for count in (1, 2, 4)
    ]
    norm = torch.cat([gradient.flatten() for gradient in results[0][0]]).norm()
    assert norm > 0.01
    for result in results[1:]:
        for expected, found in zip(results[0], result, strict=True):
            difference = [(a - b).flatten() for a, b in zip(expected, found, strict=True)]
            assert torch.cat(difference).norm() < 1e-6 * norm


@pytest.mark.parametrize("model", ["protonet", "protomaml"])
def test_the_loss_of_two_processes_takes_the_course_of_one(model, glyph_dir, tmp_path):
    one, two = (
        watched_steps(count, "float64", model, glyph_dir, tmp_path / str(count)) for count in (1, 2)
    )
    losses, other_losses = ([loss.item() for _, (loss, *_) in steps] for steps in (one, two))
    assert losses == pytest.approx(other_losses, abs=1e-6) and len(set(losses)) == 20


def test_the_classifier_follows_the_mean_gradient_of_the_shares(glyph_dir, tmp_path, monkeypatch):
    path = tmp_path / "notes.pt"
    save = SAVE_NOTES.format(path=str(path))
    watched = {"before": WATCHED.format(dtype="float32"), "after": save}
    results = train(2, "classifier", glyph_dir, tmp_path / "two", **watched)
    assert [code for code, *_ in results] == [0, 0], results
    _, found = torch.load(path)[0]

    class FirstStep(Exception):
        pass

    def stop(means):
        raise FirstStep([tensor.clone() for tensor in means])

    monkeypatch.setattr(train_classifier, "all_reduce", stop)
    for room in (data, training_run):
        monkeypatch.setattr(room, "on_first", lambda function: function())
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        arguments = training("classifier", glyph_dir, tmp_path / f"rank{rank}")[1:]
        with pytest.raises(FirstStep) as caught:
            train_classifier.main(parse_config(train_classifier.Config, arguments))
        shares.append(caught.value.args[0])
    assert not torch.equal(shares[0][0], shares[1][0])
    for together, *own in zip(found, *shares, strict=True):
        assert torch.allclose(together.float(), sum(own) / 2, rtol=1e-5, atol=1e-6)


def test_the_shares_of_the_processes_are_all_tasks_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert (process_rank(), process_count()) == (rank, 3)
        shares += range(10)[share()]
    assert sorted(shares) == list(range(10))


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_only_both_of_torchruns_variables_make_several_processes(name, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "3")
    assert (process_rank(), process_count(), list(range(3)[share()])) == (0, 1, [0, 1, 2])


def test_one_process_never_communicates(glyph_dir, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("torch.distributed was used")

    for name in ("init_process_group", "all_reduce", "broadcast_object_list"):
        monkeypatch.setattr(distributed, name, refuse)
    arguments = training("protonet", glyph_dir, tmp_path)[1:]
    train_protonet.main(parse_config(train_protonet.Config, arguments))


# Signals, kills, errors


@pytest.fixture(scope="module")
def uninterrupted(glyph_dir, tmp_path_factory):
    """Return {model: folder of a run of two processes that nothing interrupted}."""
    folders = {}
    for model in ("protonet", "protomaml"):
        folders[model] = tmp_path_factory.mktemp(model)
        results = train(2, model, glyph_dir, folders[model])
        assert [code for code, *_ in results] == [0, 0], results
        assert "best epoch" in results[0][1] and not any(results[1][1:])
    return folders


def test_a_signal_to_one_process_stops_both_after_the_same_step(uninterrupted, glyph_dir, tmp_path):
    send = IN_STEP_5.format(what="os.kill(os.getpid(), signal.SIGTERM)")
    results = train(2, "protonet", glyph_dir, tmp_path, before=send)
    assert [code for code, *_ in results] == [143, 143], results
    assert "--resume=true" in results[0][1].splitlines()[-1]
    assert not results[1][1] and not results[1][2]
    assert last_of("protonet", tmp_path)["step"] == 5
    results = train(2, "protonet", glyph_dir, tmp_path, "--resume=true")
    assert [code for code, *_ in results] == [0, 0], results
    assert_same_run(uninterrupted["protonet"], tmp_path)


def test_after_a_kill_the_other_process_ends_in_one_line_and_nothing_is_lost(
    uninterrupted, glyph_dir, tmp_path
):
    kill = IN_STEP_5.format(what="os.kill(os.getpid(), signal.SIGKILL)")
    begin = time.monotonic()
    results = train(2, "protomaml", glyph_dir, tmp_path, before=kill)
    assert time.monotonic() - begin < 60
    assert [code for code, *_ in results] == [2, -signal.SIGKILL]
    (line,) = error_lines(results)
    assert "another process ended early" in line and "--resume=true" in line
    assert "Traceback" not in results[0][2]
    shutil.copytree(tmp_path, tmp_path.with_name("by_one"))

    results = train(2, "protomaml", glyph_dir, tmp_path, "--resume=true")
    assert [code for code, *_ in results] == [0, 0], results
    assert_same_run(uninterrupted["protomaml"], tmp_path)

    # Another number of processes goes on, too: the same epochs, up to the order of sums.
    ((code, printed, errors),) = train(
        1, "protomaml", glyph_dir, tmp_path.with_name("by_one"), "--resume=true"
    )
    assert code == 0 and "step 4 of the next" in printed, errors
    history = last_of("protomaml", tmp_path.with_name("by_one"))["history"]
    expected = last_of("protomaml", tmp_path)["history"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=0.05)


def command_of_test(uninterrupted, glyph_dir, results_dir):
    """The command of a test. k = 9 has two support sets: one process of three has none."""
    models = [
        f"--{model}={folder / 'checkpoints/glyphs' / model}.pt"
        for model, folder in uninterrupted.items()
    ]
    where = [f"--data_dir={glyph_dir}", f"--results_dir={results_dir}", "--dataset=glyphs"]
    sizes = ["--k_shots=2,9", "--num_inner_steps=3", "--max_support_sets=3"]
    return ["evaluate.py", *models, *where, *sizes, "--domains=", "--device=cpu"]


@pytest.fixture(scope="module")
def tested(uninterrupted, glyph_dir, tmp_path_factory):
    """The results folder of a test by one process."""
    folder = tmp_path_factory.mktemp("tested")
    ((code, _, errors),) = run(
        1, command_of_test(uninterrupted, glyph_dir, folder / "results"), folder
    )
    assert code == 0, errors
    return folder / "results"


def assert_same_results(expected, found):
    for name in ("accuracy.json", "accuracy.csv", "accuracy.md", "classes_glyphs.csv"):
        # The command under the table names the folder.
        one, other = ((folder / name).read_text() for folder in (found, expected))
        assert one.replace(str(found), "") == other.replace(str(expected), "")


def test_a_test_by_three_processes_gives_the_bytes_of_one(
    tested, uninterrupted, glyph_dir, tmp_path
):
    results = run(3, command_of_test(uninterrupted, glyph_dir, tmp_path / "results"), tmp_path)
    assert [code for code, *_ in results] == [0, 0, 0], results
    assert all(not printed and not errors for _, printed, errors in results[1:])
    assert_same_results(tested, tmp_path / "results")
    rows = json.loads((tmp_path / "results/accuracy.json").read_text())
    assert {row["num_support_sets"] for row in rows if row["model"] == "protomaml"} == {3, 2}


def test_a_kill_in_a_test_loses_no_finished_result(tested, uninterrupted, glyph_dir, tmp_path):
    kill = """
from common import kshot
def adapted(*arguments):
    if rank == 1 and arguments[5] == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return adapted_as_ever(*arguments)
adapted_as_ever, kshot.adapted_counts = kshot.adapted_counts, adapted
"""
    command = command_of_test(uninterrupted, glyph_dir, tmp_path / "results")
    results = run(2, command, tmp_path, before=kill)
    assert [code for code, *_ in results] == [2, -signal.SIGKILL]
    assert len(error_lines(results)) == 1
    kept = {path.read_bytes() for path in (tmp_path / "results/.cache").glob("*.json")}
    assert len(kept) == 3  # the ProtoNet's two and the first of ProtoMAML
    results = run(2, command, tmp_path)
    assert [code for code, *_ in results] == [0, 0], results
    assert results[0][1].count("reused") == 3
    assert_same_results(tested, tmp_path / "results")


def test_a_loss_that_is_no_number_in_one_process_stops_both_at_its_step(glyph_dir, tmp_path):
    spoil = """
import torch.nn.functional as F
calls, cross_entropy = [], F.cross_entropy
def spoiling(*arguments, **options):
    calls.append(1)
    loss = cross_entropy(*arguments, **options)
    return loss * float("nan") if rank == 1 and len(calls) == 6 else loss
F.cross_entropy = spoiling
"""
    results = train(2, "protonet", glyph_dir, tmp_path, before=spoil)
    assert [code for code, *_ in results] == [2, 2]
    (line,) = error_lines(results)
    assert "the loss became nan in epoch 1, step 3;" in line  # two episodes in each process
    assert last_of("protonet", tmp_path)["step"] == 0


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--resume=true", "there is nothing to resume"),
        ("--device=mps", "cannot share device"),
    ],
)
def test_what_all_processes_refuse_is_one_line(option, expected, glyph_dir, tmp_path):
    results = train(2, "protonet", glyph_dir, tmp_path, option)
    assert [code for code, *_ in results] == [2, 2]
    (line,) = error_lines(results)
    assert expected in line
    assert "Traceback" not in "".join(errors for *_, errors in results)


@pytest.mark.parametrize(
    ("model", "name", "value", "fits"),
    [
        ("protonet", "episodes_per_step", 1, 3),
        ("protomaml", "tasks_per_step", 4, 6),
        ("classifier", "batch_size", 16, 18),
    ],
)
def test_a_number_that_the_processes_do_not_divide_is_refused(
    model, name, value, fits, glyph_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    trainer = TRAINERS[model]
    arguments = training(model, glyph_dir, tmp_path, f"--{name}={value}")[1:]
    with pytest.raises(UserError, match=f"{name} is {value}, .* pass --{name}={fits} or"):
        trainer.main(parse_config(trainer.Config, arguments))


def test_a_full_disk_ends_all_processes_in_one_line(glyph_dir, tmp_path):
    fill = """
import errno
from common import files
def fsync(number):
    raise OSError(errno.ENOSPC, "No space left on device")
os.fsync = fsync
"""
    results = train(2, "protonet", glyph_dir, tmp_path, before=fill)
    assert [code for code, *_ in results] == [2, 2]
    (line,) = error_lines(results)
    assert "No space left on device" in line


# torchrun


def torchrun(glyph_dir, folder, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = training("protonet", glyph_dir, folder / "checkpoints", *more)
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_passes_a_signal_on_and_the_run_is_resumed(uninterrupted, glyph_dir, tmp_path):
    process = torchrun(glyph_dir, tmp_path)
    seen = ""
    while not re.search("[1-6]/6", seen):  # a step is done: both processes are in training
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"saved .*; go on with: torchrun .* --resume=true", printed)
    assert last_of("protonet", tmp_path)["step"] >= 1

    printed, errors = torchrun(glyph_dir, tmp_path, "--resume=true").communicate(timeout=60)
    assert "resumed" in printed, errors
    assert_same_run(uninterrupted["protonet"], tmp_path)


def test_an_error_under_torchrun_is_one_line_of_the_script(glyph_dir, tmp_path):
    _, errors = torchrun(glyph_dir, tmp_path, "--episodes_per_step=1").communicate(timeout=60)
    assert len([line for line in errors.splitlines() if "train_protonet.py: error:" in line]) == 1
