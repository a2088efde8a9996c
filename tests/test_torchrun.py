"""Several processes: the results of one, one line for an error, nothing lost when one dies.

Most tests start the processes themselves, as torchrun would, to see what each of them does.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import stress
import torch
from stress import ENVIRONMENT
from torch import distributed

import evaluate
import train_classifier
import train_protomaml
from common import UserError, data, training_run
from common.checkpoint import load_checkpoint
from common.config import parse_config
from common.parallel import my_slice, process_count

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(evaluate.__file__).parent
WAITING = "waiting until all 2 processes are there; Ctrl-C ends it\n"
# What runs before the script, which sees the names that are changed here.
START = """
import os, runpy, signal, sys
rank = int(os.environ.get("RANK", 0))
{before}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# A tiny encoder that computes in float64; writes down what all_reduce gives in each step.
WATCHED = """
import torch
from common import checkpoint, data, encoders, parallel

def starting_encoder(cfg, data, **options):
    if options:  # the classifier's
        return as_ever(cfg, data, **options)
    return encoders.Encoder(8, growth_rate=4, block_config=[1, 1], num_init_features=8).to(dtype)

def noting(sums=(), means=()):
    all_reduce(sums, means)
    if len(means) > 1:
        notes.append([[tensor.clone() for tensor in group] for group in (sums, means)])
        rank or torch.save(notes, {path!r})

dtype, notes, all_reduce = torch.{dtype}, [], parallel.all_reduce
as_ever = checkpoint.starting_encoder
parallel.all_reduce, checkpoint.starting_encoder = noting, starting_encoder
normalize = data.TrainingData.normalize
data.TrainingData.normalize = lambda self, images: normalize(self, images).to(dtype)
"""
# In the first step of the second epoch the process of rank 1 is killed.
KILLED = """
from common import training_run
def track(run, *numbers):
    if rank == 1 and len(run.history) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    track_as_ever(run, *numbers)
track_as_ever, training_run.TrainingRun.track = training_run.TrainingRun.track, track
"""


def run(count, script, *arguments, before=""):
    """Run a script in `count` processes, as torchrun does; return [(exit code, output, errors)]."""
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    own = {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{store.port}", "WORLD_SIZE": f"{count}"}
    own["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    command = [sys.executable, "-c", START.format(before=before), script, *arguments]
    processes = []
    for rank in range(count):
        environment = {**ENVIRONMENT, **own, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        options = {"env": environment, "cwd": ROOT, "stdout": PIPE, "stderr": PIPE, "text": True}
        processes.append(subprocess.Popen(command, **options))
    try:
        printed = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    # On a busy machine one of them may have waited for the other.
    printed = [(output, errors.replace(WAITING, "")) for output, errors in printed]
    return [(process.returncode, *texts) for process, texts in zip(processes, printed)]


def training(model, glyph_dir, folder, *more):
    """Return a script with its options: two epochs of two steps of two tasks."""
    arguments = stress.training_job(model, glyph_dir, "--epochs=2", "--steps_per_epoch=2").arguments
    where = [f"--checkpoint_dir={folder / 'checkpoints'}", "--device=cpu"]
    return [f"train_{model}.py", *arguments, *where, *more]


def train(count, model, glyph_dir, folder, *more, **patches):
    return run(count, *training(model, glyph_dir, folder, *more), **patches)


def train_here(module, glyph_dir, folder, *more):
    """Train in this process."""
    arguments = training(module.__name__.removeprefix("train_"), glyph_dir, folder, *more)
    module.main(parse_config(module.Config, arguments[1:]))


def last_of(folder, model="protomaml"):
    return load_checkpoint(folder / "checkpoints" / "glyphs" / f"{model}_last.pt")


def the_error(results):
    """Return the one line that is an error of the script, of all processes."""
    (line,) = (
        line for *_, errors in results for line in errors.splitlines() if ": error: " in line
    )
    assert not any("Traceback" in errors for *_, errors in results)
    return line


def assert_same_run(expected, found):
    compared, differing = stress.differences(expected / "checkpoints", found / "checkpoints")
    assert compared == 5 and not differing
    assert not stress.temporary_files(found)


@pytest.fixture(scope="module")
def uninterrupted(glyph_dir, tmp_path_factory):
    """Return the folder of a ProtoMAML run of two processes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    results = train(2, "protomaml", glyph_dir, folder)
    assert [code for code, *_ in results] == [0, 0], results
    assert "best epoch" in results[0][1] and not any(results[1][1:])
    return folder


# The results of one process


def watched_steps(count, dtype, model, glyph_dir, folder, *more):
    """Train; return for each step what is exchanged: (sums, [loss, accuracy, ...])."""
    path = folder / f"notes{count}.pt"
    watch = WATCHED.format(dtype=dtype, path=str(path))
    folder = folder / f"{count}"
    results = train(count, model, glyph_dir, folder, *more, before=watch)
    assert [code for code, *_ in results] == [0] * count, results
    return torch.load(path)


def test_two_processes_find_the_gradients_the_statistics_and_the_losses_of_one(glyph_dir, tmp_path):
    task = "float64", "protomaml", glyph_dir, tmp_path, "--steps_per_epoch=4", "--tasks_per_step=4"
    one, two = (watched_steps(count, *task) for count in (1, 2))
    assert len(one) == len(two) == 8
    for expected, found in zip(one[0], two[0], strict=True):
        norm = torch.cat([tensor.flatten() for tensor in expected]).norm()
        difference = [(a - b).flatten() for a, b in zip(expected, found, strict=True)]
        assert norm > 0.01 and torch.cat(difference).norm() < 1e-6 * norm
    losses, other_losses = ([loss.item() for _, (loss, *_) in steps] for steps in (one, two))
    assert losses == pytest.approx(other_losses, abs=1e-6) and len(set(losses)) == 8


def test_the_classifier_follows_the_mean_gradient_of_the_shares(glyph_dir, tmp_path, monkeypatch):
    sizes = ["--epochs=1", "--steps_per_epoch=1"]
    _, found = watched_steps(2, "float32", "classifier", glyph_dir, tmp_path, *sizes)[0]

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
        with pytest.raises(FirstStep) as caught:
            train_here(train_classifier, glyph_dir, tmp_path / f"rank{rank}")
        shares.append(caught.value.args[0])
    assert not torch.equal(shares[0][0], shares[1][0])
    for together, *own in zip(found, *shares, strict=True):
        assert torch.allclose(together.float(), sum(own) / 2, rtol=1e-5, atol=1e-6)


def test_a_test_by_two_processes_gives_the_bytes_of_one(uninterrupted, glyph_dir, tmp_path):
    # At k = 13 there is one support set: the second process has none.
    options = ["--dataset=glyphs", f"--models={uninterrupted}/checkpoints/glyphs", "--domains="]
    options += [f"--data_dir={glyph_dir}", "--k_shots=2,13", "--finetune=protomaml"]
    options += ["--finetune_steps=1", "--num_inner_steps=2", "--max_support_sets=3", "--device=cpu"]
    here, there = (f"--results_dir={tmp_path / name}" for name in ("one", "two"))
    evaluate.main(parse_config(evaluate.Config, [*options, here]))
    # A process whose work is done does not wait for the interpreter's end, which may abort it.
    late = "import atexit; atexit.register(os.abort)"
    results = run(2, "evaluate.py", *options, there, before=late)
    assert [code for code, *_ in results] == [0, 0], results
    assert not results[1][1] and not results[1][2]
    for name in ("accuracy.json", "accuracy.csv", "models_glyphs.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    rows = json.loads((tmp_path / "two" / "accuracy.json").read_text())
    assert [row["num_support_sets"] for row in rows] == [3, 1, 3, 1, 12, 1]


def test_the_shares_of_the_processes_are_all_tasks_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares += range(10)[my_slice()]
    assert sorted(shares) == list(range(10)) and process_count() == 3
    for name in ("RANK", "WORLD_SIZE"):  # only both make several processes
        with monkeypatch.context() as patched:
            patched.delenv(name)
            assert (process_count(), my_slice()) == (1, slice(0, None, 1))


def test_one_process_never_communicates(glyph_dir, tmp_path, monkeypatch):
    for name in ("init_process_group", "all_reduce", "broadcast_object_list"):
        monkeypatch.delattr(distributed, name)
    train_here(train_protomaml, glyph_dir, tmp_path)


# Kills, signals, errors


def torchrun(*command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = {"cwd": ROOT, "env": ENVIRONMENT, "stdout": PIPE, "stderr": PIPE, "text": True}
    return subprocess.Popen([*launch, *command], **options)


def test_after_a_kill_the_other_process_ends_in_one_line_and_torchrun_resumes_the_run(
    uninterrupted, glyph_dir, tmp_path
):
    results = train(2, "protomaml", glyph_dir, tmp_path, before=KILLED)
    assert [code for code, *_ in results] == [2, -signal.SIGKILL]
    line = the_error(results)
    assert "another process ended early" in line and "what was saved is intact" in line
    assert last_of(tmp_path)["epoch"] == 1

    process = torchrun(*training("protomaml", glyph_dir, tmp_path, "--resume=true"))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "resumed" in printed, errors
    assert_same_run(uninterrupted, tmp_path)


def test_torchrun_passes_a_signal_on_and_one_process_can_resume_the_run(glyph_dir, tmp_path):
    process = torchrun(*training("protomaml", glyph_dir, tmp_path, "--epochs=500"))
    seen = ""
    while "epoch 3/" not in seen:
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("train_protomaml.py: stopped; what was saved before is intact") == 1
    done = last_of(tmp_path)["epoch"]
    assert 2 <= done < 500
    train_here(train_protomaml, glyph_dir, tmp_path, "--resume=true", f"--epochs={done + 1}")
    assert [row["epoch"] for row in last_of(tmp_path)["history"]] == list(range(1, done + 2))


def test_what_all_processes_refuse_is_one_line(glyph_dir, tmp_path):
    results = train(2, "protomaml", glyph_dir, tmp_path, "--resume=true")
    assert [code for code, *_ in results] == [2, 2]
    assert "protomaml_last.pt" in the_error(results)


def test_a_script_whose_work_cannot_be_shared_refuses_several_processes(glyph_dir, tmp_path):
    results = train(2, "protonet", glyph_dir, tmp_path)
    assert [code for code, *_ in results] == [2, 2]
    assert "several processes cannot share its work" in the_error(results)


@pytest.mark.parametrize(
    ("module", "name"), [(train_protomaml, "tasks_per_step"), (train_classifier, "batch_size")]
)
def test_a_number_that_the_processes_do_not_divide_is_refused(
    module, name, glyph_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=f"3 processes cannot share .*{name}"):
        train_here(module, glyph_dir, tmp_path, f"--{name}=16")
    if module is train_protomaml:
        with pytest.raises(UserError, match="3 processes need at least as many --val_episodes"):
            train_here(module, glyph_dir, tmp_path, "--tasks_per_step=3", "--val_episodes=2")


def test_a_process_that_waits_for_the_others_says_so_and_can_be_stopped(glyph_dir, tmp_path):
    script, *options = training("protomaml", glyph_dir, tmp_path)
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    options = [sys.executable, script, *options]
    process = subprocess.Popen(
        options, cwd=ROOT, env={**ENVIRONMENT, **alone}, stderr=PIPE, stdout=PIPE, text=True
    )
    assert process.stderr.readline() == WAITING
    process.send_signal(signal.SIGINT)
    assert "stopped; what was saved" in process.communicate(timeout=30)[1]
    assert process.returncode == 130
