"""Train a recipe with several seeds, time it from start to end, and test it on validation classes.

    python benchmarks/speedrun.py                                      on an idle machine
    python benchmarks/speedrun.py --command="train_protonet.py --recipe=fast" --seeds=42

Prints a row for the table of docs/speedrun.md: the median time of the training script, its start
included, and the accuracy at each k over all support sets, mean (standard deviation) over the
seeds. Says so where a seed's best epoch, which is tested, is not its last.
"""

import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

from common import ROOT, UserError
from common.checkpoint import find_checkpoints, load_checkpoint
from common.config import require, run_script


@dataclass
class Config:
    command: str = "train_classifier.py --recipe=fast"  # the script and its options
    seeds: tuple[int, ...] = (42, 1, 2)  # a training run with each of them
    dataset: str = "cifar100"  # or another with classes for validation
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    classes: str = "val"  # of the test; test: once, for the final table
    k_shots: tuple[int, ...] = (2, 4, 8, 16, 32)  # support images per class
    evaluate: str = ""  # further options of evaluate.py
    keep: str = ""  # folder for the runs; empty: a temporary one

    def __post_init__(self):
        require(self, "seeds", "k_shots", "classes in ('val', 'test')")


def main(cfg):
    with tempfile.TemporaryDirectory() as folder:
        runs = [run(cfg, seed, os.path.join(cfg.keep or folder, str(seed))) for seed in cfg.seeds]
    seconds, processor, tests = zip(*runs)
    accuracies = [[100 * value for value in test] for test in zip(*tests)]  # of each k
    spread = [f" ({statistics.stdev(each):.2f})" if len(each) > 1 else "" for each in accuracies]
    shown = [f"{statistics.mean(each):.2f}{sd}" for each, sd in zip(accuracies, spread)]
    times = f"{statistics.median(seconds):.0f} s | {statistics.median(processor):.0f} s"
    print(f"| `{cfg.command}` | {times} | {' | '.join(shown)} |")


def run(cfg, seed, folder):
    """Return (seconds, seconds of processor time, accuracy at each k) of one seed."""
    data = [f"--dataset={cfg.dataset}", f"--data_dir={os.path.abspath(cfg.data_dir)}"]
    folder = os.path.abspath(folder)
    where = [f"--seed={seed}", f"--checkpoint_dir={folder}"]
    taken, processor = timed([*shlex.split(cfg.command), *data, *where])
    trained = find_checkpoints(cfg.dataset, [os.path.join(folder, cfg.dataset)])
    model = max(trained, key=os.path.getmtime)  # `keep` may hold another command's, too
    checkpoint = load_checkpoint(model)
    if checkpoint["epoch"] < checkpoint["config"]["epochs"]:
        print(f"seed {seed}: the best epoch, {checkpoint['epoch']}, is not the last", flush=True)
    shots = ",".join(map(str, cfg.k_shots))
    test = ["evaluate.py", f"--models={model}", f"--classes={cfg.classes}", "--domains="]
    test += [f"--k_shots={shots}", f"--results_dir={folder}/results", *shlex.split(cfg.evaluate)]
    timed([*test, *data])
    rows = json.loads(Path(folder, "results", "accuracy.json").read_text())
    by_k = {r["k_shot"]: r["accuracy"] for r in rows if r["model"] == checkpoint["model"]}
    found = [by_k[k] for k in cfg.k_shots]
    numbers = " ".join(f"{100 * accuracy:.2f}" for accuracy in found)
    print(f"seed {seed}: {taken:.1f} s, processor {processor:.1f} s: {numbers}", flush=True)
    return taken, processor, found


def timed(command):
    """Run a script of the project; return the seconds it took, and those of the processor."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    taken, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        raise UserError(f"{' '.join(command)} failed: {ended.stderr[-300:]}")
    return taken, sum(after[:2]) - sum(before[:2])


if __name__ == "__main__":
    run_script(main, Config)
