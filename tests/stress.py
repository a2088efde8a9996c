"""Kill the scripts with SIGKILL at random moments, resume them, and compare; damage their files.

    python tests/stress.py --kills=100
    python tests/stress.py --kills=0 --files=5000

The first prints one row per script and exits with 1 if anything was lost against an uninterrupted
run: a damaged file, a result that differs by a single bit, a finished result that is computed
again, a temporary file left behind. The second damages so many copies of a file of each kind at
random and exits with 1 if one was accepted with other content, or ended in anything but one line.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # started as a script, it sees only its own folder

import train_protonet  # noqa: E402
from common.checkpoint import encoder_of, load_checkpoint  # noqa: E402
from common.config import UserError, parse_config  # noqa: E402
from common.data import load_dataset  # noqa: E402
from common.glyphs import draw_glyph_digits, draw_glyphs  # noqa: E402

# The real script, but saving within an epoch every few steps: a kill then often finds a state
# inside an epoch on disk.
OFTEN_SAVING = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
import common.training_run
common.training_run.SAVE_EVERY = 0.2
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Small episodes: an image takes some milliseconds. The classifier is validated on them.
SMALL_EPISODES = ["--dataset=glyphs", "--n_way=2", "--k_shot=2", "--n_query=2"]
TRAINING = {
    "classifier": ["train_classifier.py", "--batch_size=16"],
    "protonet": ["train_protonet.py"],
    "protomaml": ["train_protomaml.py", "--tasks_per_step=2"],
}
SECONDS_OF_WORK = 2  # from the first file that a process writes to the kill, at the most
SECONDS_TO_FINISH = 300  # longer means that it hangs


@dataclass
class Job:
    """A script with its arguments; `writes` is the option that names its output folder."""

    name: str
    script: str
    arguments: list
    writes: str

    @property
    def trains(self):
        return self.script != "evaluate.py"


def training_job(model, data_dir, *arguments):
    """Return the Job that trains a model of TRAINING on the glyphs in `data_dir`."""
    script, *own = TRAINING[model]
    arguments = [*SMALL_EPISODES, f"--data_dir={data_dir}", *own, *arguments]
    return Job(model, script, arguments, "checkpoint_dir")


def make_data(folder, num_classes=20, images_per_class=24):
    """Write a small glyphs.npz and glyph_digits.npz into `folder`."""
    images, labels, class_names = draw_glyphs(images_per_class=images_per_class)
    kept = labels < num_classes
    save_arrays(folder / "glyphs.npz", images[kept], labels[kept], class_names[:num_classes])
    digits = draw_glyph_digits(images_per_class=images_per_class)
    save_arrays(folder / "glyph_digits.npz", *digits)


def save_arrays(path, images, labels, class_names):
    np.savez(path, images=images, labels=labels, class_names=np.array(class_names))


def start(job, folder, log):
    """Start the job with `folder` for its output; a training run that was begun is resumed."""
    arguments = [*job.arguments, f"--{job.writes}={folder}"]
    if job.trains and any(folder.glob(f"*/{job.name}_last.pt")):
        arguments.append("--resume=true")
    # One thread: sums are then in the same order in every process, however busy the cores are.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", OFTEN_SAVING, str(ROOT), str(ROOT / job.script), *arguments]
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
    )


def run_to_end(job, folder):
    """Run the job and return (what it printed, seconds until its first file).

    Raises RuntimeError where it fails.
    """
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        process = start(job, folder, log)
        wait_until(process, lambda: files_of(folder), SECONDS_TO_FINISH)
        first_file = time.monotonic() - began
        try:
            code = process.wait(SECONDS_TO_FINISH)
        finally:
            process.kill()
        log.seek(0)
        printed = log.read()
    if code:
        raise RuntimeError(f"{job.name} ended with exit code {code}:\n{printed[-2000:]}")
    return printed, first_file


def run_and_kill(job, folder, rng, first_file):
    """Start the job, kill it at a random moment, return whether that was before its end.

    One kill in four falls into the start, before anything is written; one in four waits for a
    temporary file, so that it falls into the writing of a file; the others come at any moment.
    """
    kind = rng.choice(["start", "writing", "work", "work"])
    with tempfile.TemporaryFile("w+") as log:
        at_hand = versions(folder)
        process = start(job, folder, log)
        if kind == "start":
            wait_until(process, lambda: False, rng.uniform(0, first_file))
        else:
            wait_until(process, lambda: versions(folder) != at_hand, SECONDS_TO_FINISH)
            wait_until(process, lambda: False, rng.uniform(0, SECONDS_OF_WORK))
        if kind == "writing":
            wait_until(process, lambda: temporary_files(folder), SECONDS_OF_WORK)
        process.kill()
        code = process.wait()
        if code > 0:
            log.seek(0)
            raise RuntimeError(f"{job.name} ended with exit code {code}:\n{log.read()[-2000:]}")
        return code < 0


def wait_until(process, condition, seconds):
    """Wait until the condition holds, the process ends or the seconds are over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.003)


def versions(folder):
    """Return {finished file under `folder`: its inode}; every writing changes the inode."""
    found = {}
    for path in files_of(folder):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_ino
    return found


def files_of(folder):
    """Return all finished files under `folder`."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return [path for path in paths if ".tmp" not in path.name]


def temporary_files(folder):
    """Return all files under `folder` that were being written."""
    return [path for path in folder.rglob("*") if ".tmp" in path.name]


def damaged_files(folder):
    """Return (number of finished files, names of those that cannot be read to their end)."""
    files, damaged = files_of(folder), []
    for path in files:
        try:
            if path.suffix == ".pt":
                encoder_of(load_checkpoint(path), path)
            elif path.suffix == ".png":
                Image.open(path).load()
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif not path.read_text().endswith({".svg": "</svg>\n"}.get(path.suffix, "\n")):
                damaged.append(path.name)
        except Exception:  # of whatever kind: the file is not whole
            damaged.append(path.name)
    return len(files), damaged


def differences(expected, found):
    """Return (number of files compared, names of those that differ) for two output folders.

    Checkpoints are compared value by value and to the last bit, all else byte by byte.
    """
    names = sorted(path.relative_to(expected) for path in files_of(expected))
    differing = [str(name) for name in names if not same_file(expected / name, found / name)]
    return len(names), differing


def same_file(first, second):
    if not second.exists():
        return False
    if first.suffix == ".pt":
        return same_value(load_checkpoint(first), load_checkpoint(second))
    return first.read_bytes() == second.read_bytes()


def same_value(first, second):
    """Compare nested dicts, lists and tensors to the last bit."""
    if isinstance(first, torch.Tensor):
        if not isinstance(second, torch.Tensor) or first.dtype != second.dtype:
            return False
        return torch.equal(first, second)
    if isinstance(first, dict):
        if not isinstance(second, dict) or first.keys() != second.keys():
            return False
        return all(same_value(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        if not isinstance(second, (list, tuple)) or len(first) != len(second):
            return False
        return all(map(same_value, first, second))
    return type(first) is type(second) and first == second


def kill_and_compare(job, expected, folder, kills, first_file, seed):
    """Kill the job `kills` times, resume it in between, compare its results with `expected`.

    first_file: seconds until the job writes its first file. A run that reaches its end before the
    last kill is followed by a new one in a new folder; every finished run is compared.
    Returns (kills, resumes, files checked, losses), the last a list of texts.
    """
    rng = random.Random(seed)
    killed, resumes, checked, losses, rounds = 0, 0, 0, [], 0
    while killed < kills or not rounds:
        rounds += 1
        output = folder / f"{job.name}_{rounds}"
        output.mkdir()
        finished = False
        while not finished:
            # Finished results only: a file that was being written may go and be begun anew.
            before = set(output.glob(".cache/*.json")) - set(temporary_files(output))
            resumes += bool(files_of(output))
            if killed < kills:
                finished = not run_and_kill(job, output, rng, first_file)
                killed += not finished
            else:
                printed, _ = run_to_end(job, output)
                finished = True
                reused = printed.count("reused")
                if reused < len(before):
                    losses.append(f"{job.name}: {len(before)} results were there, {reused} reused")
            count, damaged = damaged_files(output)
            checked += count
            losses += [f"{job.name}: {name} is damaged" for name in damaged]
            losses += [f"{job.name}: {path.name} is gone" for path in before if not path.exists()]
        count, differing = differences(expected, output)
        checked += count
        losses += [f"{job.name}: {name} differs from that of one run" for name in differing]
        losses += [f"{job.name}: {path.name} was left behind" for path in temporary_files(output)]
    return killed, resumes, checked, losses


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    kills_help = "kills in all, shared out among the scripts (default: 100)"
    parser.add_argument("--kills", type=int, default=100, help=kills_help)
    files_help = "damaged copies of each kind of file (default: 0)"
    parser.add_argument("--files", type=int, default=0, help=files_help)
    seed_help = "of the moments of the kills and of the damage (default: 0)"
    parser.add_argument("--seed", type=int, default=0, help=seed_help)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_data(folder)
        bad_files = options.files and fuzz_files(folder, options.files, options.seed)
        lost = options.kills and stress(folder, options.kills, options.seed)
    return 1 if bad_files or lost else 0


def fuzz_files(folder, count, seed):
    """Damage copies of a checkpoint, a `_last.pt` and a data set; print the table.

    Returns how many were accepted wrongly or ended in a traceback.
    """
    where = [f"--data_dir={folder}", f"--checkpoint_dir={folder}", "--device=cpu"]
    arguments = [*SMALL_EPISODES, *where, "--epochs=1", "--steps_per_epoch=2"]
    with contextlib.redirect_stdout(None):
        train_protonet.main(parse_config(train_protonet.Config, arguments))
    trained = folder / "glyphs"
    files = [trained / "protonet.pt", trained / "protonet_last.pt", folder / "glyphs.npz"]
    print(f"{'file':<20}" + "".join(f"{name:>18}" for name in ("tried", *OUTCOMES)))
    print("-" * 110)
    bad = 0
    for path in files:
        read = dataset_reader(path) if path.suffix == ".npz" else checkpoint_reader(path)
        found = fuzz(path, path.read_bytes(), read, count, seed)
        print(f"{path.name:<20}{count:>18}" + "".join(f"{found[name]:>18}" for name in OUTCOMES))
        bad += found["accepted wrongly"] + found["tracebacks"]
    return bad


OUTCOMES = ("refused", "unchanged", "accepted wrongly", "tracebacks")


def fuzz(path, whole, read, count, seed):
    """Damage the file `path`, whose bytes are `whole`, `count` times; return a Counter of OUTCOMES.

    read: returns whether the content is that of the whole file; raises UserError to refuse it.
    """
    rng, outcomes = random.Random(seed), collections.Counter()
    for _ in range(count):
        path.write_bytes(damaged(whole, rng))
        try:
            outcomes["unchanged" if read() else "accepted wrongly"] += 1
        except UserError as error:
            outcomes["refused" if "\n" not in str(error) else "tracebacks"] += 1
        except Exception:
            outcomes["tracebacks"] += 1
    path.write_bytes(whole)
    return outcomes


def damaged(whole, rng):
    """Return the bytes with a bit flipped, cut off, zeroed, something put in, or ranges swapped."""
    content, start = bytearray(whole), rng.randrange(len(whole))
    end = min(start + rng.choice((1, 16, 512, 8192)), len(whole))
    kind = rng.choice(("flip", "cut", "zero", "insert", "swap"))
    if kind == "flip":
        content[start] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[start:]
    elif kind == "zero":
        content[start:end] = bytes(end - start)
    elif kind == "insert":
        content[start:start] = rng.randbytes(end - start)
    else:
        other = rng.randrange(len(whole) - (end - start) + 1)
        there = whole[other : other + end - start]
        content[other : other + end - start] = whole[start:end]
        content[start:end] = there
    return bytes(content)


def checkpoint_reader(path):
    """Return a function that says whether the checkpoint `path` still has today's content."""
    expected = load_checkpoint(path)

    def read():
        contents = load_checkpoint(path)
        encoder_of(contents, path)
        return same_value(contents, expected)

    return read


def dataset_reader(path):
    """Return a function that says whether the data set `path` still has today's content."""
    expected = load_dataset(path.stem, path.parent).digest()
    return lambda: load_dataset(path.stem, path.parent).digest() == expected


def stress(folder, kills, seed):
    """Kill all scripts, print the table, return how much was lost."""
    test = [
        "--dataset=glyphs",
        f"--data_dir={folder}",
        f"--checkpoint_dir={folder / 'trained'}",
        "--k_shots=2,4,8",
        "--num_inner_steps=8",
        "--max_support_sets=3",
    ]
    jobs = [
        training_job("classifier", folder, "--epochs=6", "--steps_per_epoch=20"),
        training_job("protonet", folder, "--epochs=6", "--steps_per_epoch=20"),
        training_job("protomaml", folder, "--epochs=4", "--steps_per_epoch=10", "--val_episodes=4"),
        Job("evaluate", "evaluate.py", test, "results_dir"),
    ]
    # The uninterrupted runs. The evaluation tests all models, so these go into one folder, too.
    expected, first_file = {}, {}
    for job in jobs:
        alone = folder / f"{job.name}_alone"
        alone.mkdir()
        _, first_file[job.name] = run_to_end(job, alone)
        expected[job.name] = alone
        if job.trains:
            shutil.copytree(alone, folder / "trained", dirs_exist_ok=True)

    def kill(position):
        job, share = jobs[position], kills // len(jobs) + (position < kills % len(jobs))
        alone, seconds = expected[job.name], first_file[job.name]
        return kill_and_compare(job, alone, folder, share, seconds, seed + position)

    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(kill, range(len(jobs))))

    print_row("script", "kills", "resumes", "files checked", "losses")
    print("-" * 59)
    rows = [[*counts, len(losses)] for *counts, losses in results]
    for job, row in zip(jobs, rows):
        print_row(job.script, *row)
    print("-" * 59)
    total = [sum(column) for column in zip(*rows)]
    print_row("all", *total)
    for *_, losses in results:
        print(*losses, sep="\n", end="\n" if losses else "")
    return total[3]


def print_row(name, kills, resumes, checked, losses):
    print(f"{name:<20}{kills:>7}{resumes:>9}{checked:>15}{losses:>8}")


if __name__ == "__main__":
    sys.exit(main())
