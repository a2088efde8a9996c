"""Measure how several processes share the work of one, on the real scripts.

    python benchmarks/scaling.py                       on an idle machine; 15 minutes on 2 CPU cores
    python benchmarks/scaling.py --processes=1,2,4,8   where there are as many cores, or GPUs

Every process has one CPU thread. A line takes the difference of few and more steps (support sets,
in the test), so that start and end do not count. Writes benchmarks/results/<machine>-scaling.md.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from speed import report, show_time

from common import UserError
from common.config import require, run_script
from common.device import pick_device

TRAIN = "--dataset=glyphs --epochs=1 --steps_per_epoch="
TEST = "evaluate.py --models=checkpoints/quick/glyphs/protomaml.pt --dataset=glyphs --domains= "
TEST += "--k_shots=4 --num_inner_steps=20 --max_support_sets="
# name: command with the number of steps or support sets at its end, little and more of them
LINES = {
    "ProtoMAML outer step, 16 tasks": (f"train_protomaml.py --val_episodes=16 {TRAIN}", (2, 14)),
    "classifier step, 128 images": (f"train_classifier.py {TRAIN}", (5, 65)),
    "ProtoMAML test, per support set (k = 4, 20 steps)": (TEST, (4, 16)),
}


@dataclass
class Config:
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data set glyphs
    processes: tuple[int, ...] = (1, 2)  # numbers of processes, 1 for the script without torchrun
    repeats: int = 3  # measurements per line; the table gives medians
    device: str = "auto"  # auto, cuda or cpu
    results_dir: str = "benchmarks/results"  # where <machine>-scaling.md goes

    def __post_init__(self):
        require(self, "repeats >= 1", "processes and min(processes) >= 1")


def main(cfg):
    device = pick_device(cfg.device)
    rows = []
    for name, line in LINES.items():
        # They take turns, so that a slow minute slows all of them.
        turns = [[] for _ in cfg.processes]
        for count, turn in [*zip(cfg.processes, turns)] * cfg.repeats:
            turn.append(seconds_per_step(cfg, count, *line))
        times = list(map(statistics.median, turns))
        rows.append((name, *(f"{show_time(each)} ({times[0] / each:.2f})" for each in times)))
        print("measured:", *rows[-1], file=sys.stderr, flush=True)
    about = [
        f"glyphs, medians of {cfg.repeats} measurements, one CPU thread per process",
        f"in brackets: how many times as fast as with {cfg.processes[0]}",
    ]
    table = ("Time with N processes", ("", *(f"N = {count}" for count in cfg.processes)), *rows)
    report(cfg, device, "-scaling", "Several processes", about, [table])


def seconds_per_step(cfg, count, command, sizes):
    """Return the seconds that one more step takes in `count` processes."""
    few, more = (seconds(cfg, count, f"{command}{size}".split()) for size in sizes)
    return (more - few) / (sizes[1] - sizes[0])


def seconds(cfg, count, command):
    """Return the seconds that a command takes from its start to its end."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    options = [f"--data_dir={os.path.abspath(cfg.data_dir)}", f"--device={cfg.device}"]
    root, environment = sys.path[0], {**os.environ, "OMP_NUM_THREADS": "1"}  # root: by speed.py
    with tempfile.TemporaryDirectory() as folder:
        output = "results_dir" if command[0] == "evaluate.py" else "checkpoint_dir"
        options.append(f"--{output}={folder}")
        command = [sys.executable, *launch * (count > 1), *command, *options]
        begin = time.perf_counter()
        ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        taken = time.perf_counter() - begin
    if ended.returncode:
        raise UserError(f"{command[1:]} failed: {ended.stderr[-300:]}")
    return taken


if __name__ == "__main__":
    run_script(main, Config)
