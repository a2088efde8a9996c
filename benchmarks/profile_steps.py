"""Measure what a step spends its time on: convolutions, BatchNorm and so on, in % of its time.

    python benchmarks/profile_steps.py                on an idle machine; 3 minutes on two CPU cores
    python benchmarks/profile_steps.py --quick=true   in small, to see that it runs

The steps are those of speed.py, without CUDA graphs. Their time is measured without the profiler,
the shares with it; on CUDA these are shares of the GPU's time. On the CPU the outer step and the
adaptation get one thread: side by side with others, a task has no more. Prints a table and writes
it to benchmarks/results/<machine>-profile.md.
"""

import re

import speed
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from common import UserError, augment
from common.config import run_script
from common.data import TrainingData

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
Config = speed.Config


def main(cfg):
    bench = speed.Bench(cfg, graphs=False)
    # Under a name of their own, so that their operations are not those of other groups.
    augment.augment = record_function(AUGMENTATION)(augment.augment)
    TrainingData.normalize = record_function(AUGMENTATION)(TrainingData.normalize)

    tasks, steps = bench.tasks, cfg.adapt_steps or 5
    step = one_step(bench, 1, speed.protonet_step(bench, bench.encoder()))
    columns = [measure(bench, "ProtoNet step", step)]
    torch.set_num_threads(1)
    step = one_step(bench, tasks, speed.protomaml_step(bench, bench.encoder(), tasks))
    columns.append(measure(bench, f"ProtoMAML outer step, {tasks} tasks", step))
    step = speed.test_sides(bench, K_SHOT, steps)[speed.PROJECT]
    columns.append(measure(bench, f"adaptation, k = {K_SHOT}, {steps} steps", step))

    names = [*GROUPS, PYTHON, REST, "time in the profile", "time", "CPU threads"]
    table = "Shares of a step's time", *zip(["", *names], *columns)
    about = [f"n = {cfg.repeats}, in float32: means of the shares, medians of the times"]
    suffix = "-profile" + "-quick" * cfg.quick
    speed.report(cfg, bench.device, suffix, "Where the time goes", about, [table])


def one_step(bench, tasks, step):
    """Return a function that takes a training step, always on the same images."""
    indices = next(speed.training_tasks(bench, tasks))[:1]
    batches = augment.AugmentedBatches(bench.data, indices, torch.Generator())
    return bench.timed(lambda: [step(images) for images in batches])


def measure(bench, name, step):
    """Return a column of the table."""
    seconds = bench.medians(name, step)[0]
    spent = time_by_group(step, bench.cfg.repeats, bench.device)
    total = sum(spent.values())
    if not total:
        raise UserError("PyTorch's profiler saw no work on this device; pass --device=cpu")
    return [
        name,
        *(f"{time / total:.1%}" for time in spent.values()),
        speed.show_time(total / bench.cfg.repeats / 1e6),
        speed.show_time(seconds),
        str(torch.get_num_threads()),
    ]


def time_by_group(step, repeats, device):
    """Return {group: microseconds} of `repeats` calls of `step()`, in all."""
    kind, spent = ("device" if device.type == "cuda" else "cpu"), dict.fromkeys(GROUPS, 0.0)
    spent |= {PYTHON: 0.0, REST: 0.0}

    def time(event):  # with that of all operations that it calls
        return getattr(event, f"{kind}_time_total")

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + (kind == "device")]
    for _ in range(repeats):
        with profile(activities=activities) as profiler, record_function(STEP):
            step()
        for event in profiler.events():
            outermost = event.cpu_parent is None or event.cpu_parent.name == STEP
            if event.device_type != DeviceType.CPU or not outermost:
                continue  # part of another operation, or a kernel, whose operation counts it
            if event.name == STEP:
                spent[PYTHON] += event.self_cpu_time_total * (kind == "cpu")
                continue
            added = [c for c in event.cpu_children if c.name in ("aten::add", "aten::add_")]
            sums = sum(map(time, added)) if BACKWARD in event.name else 0.0
            fits = (g for g in GROUPS if re.search(GROUPS[g], event.name, re.IGNORECASE))
            spent[SUMS] += sums
            spent[next(fits, REST)] += time(event) - sums
    return spent


if __name__ == "__main__":
    run_script(main, Config)
