"""Measure what a step spends its time on: convolutions, BatchNorm and so on, in % of its time.

    python benchmarks/profile_steps.py                on an idle machine; 3 minutes on two CPU cores
    python benchmarks/profile_steps.py --quick=true   in small, to see that it runs

The steps are those of speed.py, without CUDA graphs. Their time is measured without the profiler,
which slows them down, the shares with it; on CUDA these are shares of the GPU's time. On the CPU
the outer step and the adaptation get one thread: side by side with others, a task has no more.
Prints a table and writes it to benchmarks/results/<machine>-profile.md. PyTorch's profiler prints
lines of its own.
"""

import datetime
import os
import re
import shlex
import sys
from dataclasses import dataclass
from functools import partial

# The project's root, before the imports from there.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import speed
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from common.config import UserError, require
from common.data import TrainingData
from common.script import run_script

K_SHOT = 32  # of the adaptation
# In a profile: the step, an operation's backward, the making of a step's images.
STEP, BACKWARD, AUGMENTATION = "step", "evaluate_function", "augmentation"
SUMS, PYTHON, REST = "concatenation, sums of gradients", "Python, autograd", "the rest"
# What the outermost operations of a group are called in a profile, forward and backward. Where two
# groups fit, the first counts.
GROUPS = {
    "convolutions, 3x3 and the first": "conv",
    # With what leads to them and back; 3x3 convolutions of 2x2 and 1x1 maps are among them.
    "convolutions as matrix products": "linear|mmbackward|tbackward"
    "|permute|view|flatten|slice|stack",
    "BatchNorm, ReLU": "batch_?norm|relu",
    "pooling": "pool|mean",
    # Every layer reads the outputs of all before it, so that their gradients are sums.
    SUMS: "::cat$|catbackward",
    "augmentation, normalisation": f"^{AUGMENTATION}$",
    "optimizer, inner SGD, copies of weights": "optimizer|_foreach_|accumulategrad",
}


@dataclass
class Config:
    # data
    dataset: str = "glyphs"  # read from data_dir if it is there; else a few glyphs are drawn
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    # measurement
    repeats: int = 5  # of each step, after one to warm up, without the profiler and with it
    adapt_steps: int = 5  # inner steps of the adaptation
    quick: bool = False  # one repeat of small pieces of work, whatever the options above say
    # run
    device: str = "auto"  # auto, cuda or cpu
    results_dir: str = "benchmarks/results"  # where <machine>-profile.md goes

    def __post_init__(self):
        require(self, "repeats", "adapt_steps", least=1)
        if self.quick:
            self.repeats, self.adapt_steps = 1, 2


def main(cfg):
    bench = speed.Bench(cfg, libraries={}, cuda_graphs=False)
    if bench.device.type == "mps":
        raise UserError(
            "found device mps, which PyTorch's profiler does not time; pass --device=cpu"
        )
    # Under a name of their own, so that their operations are not those of other groups.
    named = record_function(AUGMENTATION)
    for trainer in (speed.train_protonet, speed.train_protomaml):
        trainer.augment = named(trainer.augment)
    TrainingData.normalize = named(TrainingData.normalize)
    trainer = speed.protonet_trainer(bench, bench.encoder())
    columns = [measure(bench, "ProtoNet step", one_step(bench, trainer, 1), speed.PROTONET_PASSES)]

    torch.set_num_threads(1)
    tasks, steps = bench.tasks, bench.adapt_steps
    trainer = speed.protomaml_trainer(bench, bench.encoder(), tasks, num_inner_steps=1)
    step, passes = one_step(bench, trainer, tasks), speed.outer_step_passes(tasks, 1)
    columns.append(measure(bench, f"ProtoMAML outer step, {tasks} tasks", step, passes))
    step = speed.adaptation(bench, bench.encoder(), K_SHOT, steps)
    name, passes = f"adaptation, k = {K_SHOT}, {steps} steps", 3 * steps * speed.TEST_WAY * K_SHOT
    columns.append(measure(bench, name, step, passes))

    names = [*GROUPS, PYTHON, REST, "time in the profile", "time", "of matrix rate", "CPU threads"]
    lines = zip(["", *names], *columns)
    name = speed.machine(bench.device)
    about = [
        f"{datetime.date.today()}, {name}; torch {torch.__version__}, device {bench.device.type}",
        f"command: python {shlex.join(sys.argv)}",
        f"n = {cfg.repeats} of each step, in float32: means of the shares, medians of the times",
    ]
    name += "-profile-quick" if cfg.quick else "-profile"
    table = ("Shares of a step's time", *lines)
    speed.report(cfg.results_dir, name, "Where the time goes", about, [table])


def one_step(bench, trainer, tasks):
    """Return a function that takes a trainer's step, always on the same images."""
    episodes = speed.Episodes(bench, tasks)
    episodes.draw()
    return partial(trainer, *episodes.of(0))


def measure(bench, name, step, passes):
    """Return a column of the table; passes: forward passes of one image that a step amounts to."""
    gflops, flop = speed.matrix_rate(bench), speed.flop_per_image(bench)
    step = partial(bench.seconds, step)
    seconds = bench.medians(name, step)[0]
    spent = time_by_group(step, bench.cfg.repeats, bench.device)
    total = sum(spent.values())
    if not total:
        raise UserError("PyTorch's profiler saw no work on the GPU here; pass --device=cpu")
    return [
        name,
        *(f"{time / total:.1%}" for time in spent.values()),
        speed.show_time(total / bench.cfg.repeats / 1e6),
        speed.show_time(seconds),
        f"{passes * flop / seconds / 1e9 / gflops:.1%}",
        str(torch.get_num_threads()),
    ]


def time_by_group(step, repeats, device):
    """Return {group: microseconds} of `repeats` calls of `step()`, in all.

    An operation's time includes that of all operations that it calls.
    """
    on_gpu, spent = device.type == "cuda", dict.fromkeys([*GROUPS, PYTHON, REST], 0.0)

    def time(event):
        return event.device_time_total if on_gpu else event.cpu_time_total

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for _ in range(repeats):
        with profile(activities=activities) as profiler, record_function(STEP):
            step()
        for event in profiler.events():
            outermost = event.cpu_parent is None or event.cpu_parent.name == STEP
            if event.device_type != DeviceType.CPU or not outermost:
                continue  # part of another operation, or a kernel, whose operation counts it
            if event.name == STEP:
                spent[PYTHON] += 0 if on_gpu else event.self_cpu_time_total
                continue
            sums = [
                time(child)
                for child in event.cpu_children
                if BACKWARD in event.name and child.name in ("aten::add", "aten::add_")
            ]
            spent[SUMS] += sum(sums)
            spent[group_of(event.name)] += time(event) - sum(sums)
    return spent


def group_of(name):
    """Return the group of an outermost operation."""
    fits = (group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(fits, REST)


if __name__ == "__main__":
    run_script(main, Config)
