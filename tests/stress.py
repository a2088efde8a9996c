"""Kill the scripts with SIGKILL at random moments, resume them, and compare; damage their files.

    python tests/stress.py --kills=100
    python tests/stress.py --kills=0 --files=5000

The first exits with 1 if anything was lost against an uninterrupted run: a damaged file, a result
that differs by a single bit, a finished result that is computed again, a temporary file left
behind. The second damages so many copies of a file of each kind and exits with 1 if one was
accepted with other content, or ended in anything but one line.
"""

import collections
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # started as a script, it sees only its own folder

from common import UserError  # noqa: E402
from common.checkpoint import load_checkpoint  # noqa: E402
from common.config import parse_config  # noqa: E402
from common.data import load_dataset  # noqa: E402
from common.encoders import Encoder  # noqa: E402
from common.glyphs import draw_glyph_digits, draw_glyphs  # noqa: E402

# Of the smallest DenseNet, for tests that need any encoder.
TINY = {"growth_rate": 4, "block_config": [1, 1, 1, 1], "num_init_features": 8}
# One thread: sums are then in the same order in every process, however busy the cores are.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
OUTCOMES = ("refused", "unchanged", "accepted wrongly", "tracebacks")
SECONDS_OF_WORK = 3  # from the start, or the first file that a process writes, to a kill, at most
SECONDS_TO_FINISH = 300  # longer means that it hangs


@dataclass
class Config:
    kills: int = 100  # kills in all, shared out among the scripts
    files: int = 0  # damaged copies of each kind of file
    seed: int = 0  # of the moments of the kills and of the damage


class Job(NamedTuple):
    script: str
    arguments: list
    writes: str = "checkpoint_dir"  # the option that names its output folder


def training_job(model, data_dir, *arguments):
    """Return the Job that trains a model on tiny tasks of the glyphs in `data_dir`."""
    small = [f"--data_dir={data_dir}", *"--dataset=glyphs --n_way=2 --k_shot=2 --n_query=2".split()]
    small += ["--batch_size=16"] * (model == "classifier")
    small += ["--tasks_per_step=2", "--val_episodes=2"] * (model == "protomaml")
    return Job(f"train_{model}.py", [*small, *arguments])


def make_data(folder):
    """Write glyphs.npz, 20 classes of 24 images, and glyph_digits.npz, 10 classes of 24."""
    images, labels, names = draw_glyphs(images_per_class=24)
    glyphs = images[labels < 20], labels[labels < 20], names[:20]
    digits = draw_glyph_digits(images_per_class=24)
    for name, (images, labels, names) in {"glyphs": glyphs, "glyph_digits": digits}.items():
        np.savez(folder / f"{name}.npz", images=images, labels=labels, class_names=np.array(names))


def labels_of(sizes, seed=0):
    """Labels of classes of these sizes, in random order: images of a class do not lie together."""
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def moved_encoder():
    """A tiny DenseNet with running statistics far from 0 and 1."""
    encoder = Encoder(8, **TINY)
    for _ in range(3):
        encoder(2 + 3 * torch.randn(10, 3, 32, 32))
    return encoder


@contextlib.contextmanager
def started(job, folder):
    """Yield a process of the job, `folder` for its output; at the end it is killed, if need be.

    A training run that was begun is resumed. What the process printed is then `process.printed`.
    """
    command = [sys.executable, str(ROOT / job.script), *job.arguments, f"--{job.writes}={folder}"]
    if any(folder.glob("*/*_last.pt")):
        command.append("--resume=true")
    process = subprocess.Popen(command, text=True, stdout=PIPE, stderr=STDOUT, env=ENVIRONMENT)
    try:
        yield process
    finally:
        process.kill()
        process.printed, _ = process.communicate()
    if process.returncode > 0:
        raise RuntimeError(f"{job.script} ended with an error:\n{process.printed[-2000:]}")


def run_to_end(job, folder):
    """Run the job and return what it printed."""
    with started(job, folder) as process:
        process.communicate(timeout=SECONDS_TO_FINISH)
    return process.printed


def run_and_kill(job, folder, rng):
    """Start the job, kill it at a random moment, return whether that was before its end.

    One kill in four falls into the start; one in four waits for a temporary file, so that it falls
    into the writing of a file; the others come at any moment of the work.
    """
    kind, at_hand = rng.choice(["start", "writing", "work", "work"]), versions(folder)
    with started(job, folder) as process:
        if kind != "start":
            wait_until(process, lambda: versions(folder) != at_hand, SECONDS_TO_FINISH)
        wait_until(process, lambda: False, rng.uniform(0, SECONDS_OF_WORK))
        if kind == "writing":
            wait_until(process, lambda: temporary_files(folder), SECONDS_OF_WORK)
    return process.returncode < 0


def wait_until(process, condition, seconds):
    """Wait until the condition holds, the process ends or the seconds are over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.003)


def versions(folder):
    """Return {finished file under `folder`: its inode}; every writing changes the inode."""
    return {path: path.stat().st_ino for path in files_of(folder)}


def files_of(folder):
    """Return all finished files under `folder`."""
    return [path for path in folder.rglob("*") if ".tmp" not in path.name and path.is_file()]


def temporary_files(folder):
    """Return all files under `folder` that were being written."""
    return [path for path in folder.rglob("*") if ".tmp" in path.name]


def is_whole(path):
    """Return whether a finished file is there to its end."""
    if path.suffix == ".pt":
        with contextlib.suppress(UserError):
            return bool(load_checkpoint(path))
        return False
    ends = {".png": b"IEND\xaeB`\x82", ".svg": b"</svg>\n"}
    return path.read_bytes().endswith(ends.get(path.suffix, b"\n"))


def differences(expected, found):
    """Return (number of files compared, names of those that differ) for two output folders."""
    names = sorted(path.relative_to(expected) for path in files_of(expected))
    return len(names), [f"{n}" for n in names if not same_file(expected / n, found / n)]


def same_file(first, second):
    """Compare checkpoints value by value, other files byte by byte but for the folder's name."""
    if not second.exists():
        return False
    if first.suffix == ".pt":
        return same_value(load_checkpoint(first), load_checkpoint(second))
    texts = [path.read_bytes().replace(bytes(path.parent), b"") for path in (first, second)]
    return texts[0] == texts[1]


def same_value(first, second):
    """Compare nested dicts, lists and tensors to the last bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_value(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same_value, first, second))
    return type(first) is type(second) and first == second


def kill_and_compare(folder, job, kills, seed):
    """Kill the job `kills` times, resume it in between, compare with folder / job.script.

    That holds the files of an uninterrupted run. A run that reaches its end before the last kill is
    followed by another. Returns (kills, resumes, files checked, losses), the last a list of texts.
    """
    rng, killed, resumes, checked, losses, rounds = random.Random(seed), 0, 0, 0, [], 0
    while killed < kills or not rounds:
        rounds, finished = rounds + 1, False
        output = folder / f"{job.script}_{rounds}"
        output.mkdir()
        while not finished:
            before = files_of(output)
            resumes += bool(before)
            if killed < kills:
                finished = not run_and_kill(job, output, rng)
                killed += not finished
            else:
                finished, printed = True, run_to_end(job, output)
                results = sum(path.parent.name == ".cache" for path in before)
                if printed.count("reused") < results:
                    losses.append(f"of {results} results some were computed again")
            for path in temporary_files(output):  # the next writer removes those of an hour ago
                os.utime(path, (0, 0))
            files = files_of(output)
            checked += len(files)
            losses += [f"{path.name} is damaged" for path in files if not is_whole(path)]
        count, differing = differences(folder / job.script, output)
        checked += count
        losses += [f"{name} differs from that of one run" for name in differing]
        losses += [f"{path.name} was left behind" for path in temporary_files(output)]
    return killed, resumes, checked, [f"{job.script}: {loss}" for loss in losses]


def stress(folder, kills, seed):
    """Kill all scripts, print the table, return how much was lost."""
    jobs = [
        training_job("classifier", folder, "--epochs=20", "--steps_per_epoch=4"),
        training_job("protonet", folder, "--epochs=20", "--steps_per_epoch=4"),
        training_job("protomaml", folder, "--epochs=15", "--steps_per_epoch=2"),
    ]
    models = ",".join(f"{folder / job.script / 'glyphs'}" for job in jobs)
    test = ["--dataset=glyphs", f"--data_dir={folder}", f"--models={models}", "--k_shots=2,4,8"]
    test += ["--num_inner_steps=8", "--max_support_sets=3"]
    jobs.append(Job("evaluate.py", test, "results_dir"))
    for job in jobs:
        run_to_end(job, folder / job.script)
    shares = [len(range(place, kills, len(jobs))) for place in range(len(jobs))]
    with ThreadPoolExecutor(2) as pool:
        run = partial(kill_and_compare, folder)
        results = list(pool.map(run, jobs, shares, range(seed, seed + len(jobs))))
    rows = [(job.script, *counts, len(lost)) for job, (*counts, lost) in zip(jobs, results)]
    rows.append(("all", *(sum(column) for column in list(zip(*rows))[1:])))
    print_rows(("script", "kills", "resumes", "files checked", "losses"), *rows)
    print(*(loss for *_, losses in results for loss in losses), sep="\n")
    return rows[-1][-1]


def fuzz_files(folder, count, seed):
    """Damage copies of files of each kind, print the table, return how many were not noticed."""
    job, rows = training_job("protonet", folder, "--epochs=1", "--steps_per_epoch=2"), []
    run_to_end(job, folder / "run")
    for path in (*sorted(folder.glob("run/glyphs/*.pt")), folder / "glyphs.npz"):
        found = fuzz(path, count, seed)
        rows.append((path.name, count, *(found[name] for name in OUTCOMES)))
    print_rows(("file", "tried", *OUTCOMES), *rows)
    return sum(sum(row[-2:]) for row in rows)


def fuzz(path, count, seed):
    """Damage the file `path` `count` times; return a Counter of OUTCOMES."""
    rng, outcomes = random.Random(seed), collections.Counter()
    whole, expected = path.read_bytes(), content_of(path)
    for _ in range(count):
        path.write_bytes(damaged(whole, rng))
        try:
            same = same_value(content_of(path), expected)
            outcomes["unchanged" if same else "accepted wrongly"] += 1
        except UserError:
            outcomes["refused"] += 1
        except Exception:
            outcomes["tracebacks"] += 1
    path.write_bytes(whole)
    return outcomes


def content_of(path):
    """Return what a checkpoint or a data set holds."""
    if path.suffix == ".pt":
        return load_checkpoint(path)
    return vars(load_dataset(path.stem, path.parent))


def damaged(whole, rng):
    """Return the bytes with a bit flipped, cut off, zeroed, with more put in, or a part copied."""
    size = rng.choice((1, 16, 512, 8192))
    start, other = (rng.randrange(max(1, len(whole) - size)) for _ in range(2))
    kind = rng.choice(("flip", "cut", "zero", "insert", "copy"))
    end = {"flip": start + 1, "cut": len(whole), "insert": start}.get(kind, start + size)
    new = {
        "flip": bytes([whole[start] ^ 1 << rng.randrange(8)]),
        "cut": b"",
        "zero": bytes(size),
        "insert": rng.randbytes(size),
        "copy": whole[other : other + size],
    }
    return whole[:start] + new[kind] + whole[end:]


def print_rows(*rows):
    for first, *cells in rows:
        print(f"{first:<20}", *(f"{cell:>17}" for cell in cells))


def main(cfg):
    with tempfile.TemporaryDirectory() as folder:
        make_data(folder := Path(folder))
        bad_files = cfg.files and fuzz_files(folder, cfg.files, cfg.seed)
        lost = cfg.kills and stress(folder, cfg.kills, cfg.seed)
    return 1 if bad_files or lost else 0


if __name__ == "__main__":
    sys.exit(main(parse_config(Config, sys.argv[1:], doc=__doc__)))
