"""Measure how several processes share the work of one, on the real scripts.

    python benchmarks/scaling.py                       on an idle machine; 20 minutes on 2 CPU cores
    python benchmarks/scaling.py --processes=1,2,4,8   where there are as many cores, or GPUs

Every process has one CPU thread. A line runs its script with few and with more steps (support sets,
in the test) and takes the difference, so that start and end do not count. Prints a table and writes
it to benchmarks/results/<machine>-scaling.md.
"""

import datetime
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

# The project's root, before the imports from there.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from speed import machine, report, show_time

from common.config import UserError, require
from common.device import pick_device
from common.script import run_script

ROOT = sys.path[0]
MODEL = os.path.join(ROOT, "checkpoints", "glyphs", "protomaml.pt")
TEST = ["evaluate.py", f"--protomaml={MODEL}", "--k_shots=4", "--num_inner_steps=20", "--domains="]
# name: command, the option that says how much there is to do, little and more of it
LINES = {
    "ProtoMAML outer step, 16 tasks": (
        ["train_protomaml.py", "--val_episodes=16"],
        "steps_per_epoch",
        (2, 14),
    ),
    "ProtoNet step, 8 episodes": (
        ["train_protonet.py", "--episodes_per_step=8"],
        "steps_per_epoch",
        (5, 45),
    ),
    "classifier step, 128 images": (["train_classifier.py"], "steps_per_epoch", (5, 65)),
    "ProtoMAML test, per support set (k = 4, 20 steps)": (TEST, "max_support_sets", (4, 16)),
}


@dataclass
class Config:
    # data
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data set glyphs
    # measurement
    processes: tuple[int, ...] = (1, 2)  # numbers of processes, 1 for the script without torchrun
    repeats: int = 3  # measurements per line; the table gives medians
    # run
    device: str = "auto"  # auto, cuda or cpu
    results_dir: str = "benchmarks/results"  # where <machine>-scaling.md goes

    def __post_init__(self):
        require(self, "repeats", "processes", least=1)


def main(cfg):
    rows = []
    for name, line in LINES.items():
        # They take turns, so that a slow minute slows all of them.
        turns = [
            [seconds_per_step(cfg, count, *line) for count in cfg.processes]
            for _ in range(cfg.repeats)
        ]
        times = [statistics.median(times) for times in zip(*turns)]
        ratios = [f"{show_time(taken)} ({times[0] / taken:.2f})" for taken in times]
        rows.append((name, *ratios))
        print(f"measured: {name}: {' / '.join(ratios)}", file=sys.stderr, flush=True)
    name = machine(pick_device(cfg.device))
    about = [
        f"{datetime.date.today()}, {name}; torch {torch.__version__}, one thread per process",
        f"command: python {shlex.join(sys.argv)}; glyphs, medians of {cfg.repeats} measurements",
        f"in brackets: how many times as fast as with {cfg.processes[0]}",
    ]
    table = ("Time with N processes", ("", *(f"N = {count}" for count in cfg.processes)), *rows)
    report(cfg.results_dir, f"{name}-scaling", "Several processes", about, [table])


def seconds_per_step(cfg, count, command, option, sizes):
    """Return the seconds that one more step takes in `count` processes."""
    few, more = (seconds(cfg, count, [*command, f"--{option}={size}"]) for size in sizes)
    return (more - few) / (sizes[1] - sizes[0])


def seconds(cfg, count, command):
    """Return the seconds that a command takes from its start to its end."""
    launch = [sys.executable]
    if count > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    with tempfile.TemporaryDirectory() as folder:
        if command[0] == "evaluate.py":
            where = [f"--results_dir={folder}"]
        else:
            where = [f"--checkpoint_dir={folder}", "--epochs=1"]
        where += ["--dataset=glyphs", f"--data_dir={os.path.abspath(cfg.data_dir)}"]
        begin = time.perf_counter()
        process = subprocess.run(
            [*launch, *command, *where, f"--device={cfg.device}"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        taken = time.perf_counter() - begin
    if process.returncode:
        errors = [line for line in process.stderr.splitlines() if "error: " in line]
        raise UserError(errors[0] if errors else process.stderr[-300:])
    return taken


if __name__ == "__main__":
    run_script(main, Config)
