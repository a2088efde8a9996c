"""Measure the project's speed beside that of a first notebook and of other few-shot libraries.

    pip install -r benchmarks/requirements.txt    the libraries; one not installed is left out
    python benchmarks/speed.py                    on an idle machine; 25 minutes on two CPU cores
    python benchmarks/speed.py --quick=true       the same lines in small, to see that they run; the
                                                  figures mean little

The notebook's way is in tutorial_style.py, the libraries' in peers.py. Prints three tables and
writes them to benchmarks/results/<machine>.md: the speed of each part of the work, how its cost
grows, memory over many training steps. What a training step computes is the trainers' own function.
Needs Linux or macOS.
"""

import dataclasses
import datetime
import gc
import itertools
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import peers
import torch
import tutorial_style
from torch.utils.flop_counter import FlopCounterMode

# The project's root, before the imports from there.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train_protomaml
import train_protonet
from common.augment import EpochBatches, Views, augment
from common.config import UserError, require
from common.cuda_graph import CudaGraphStep
from common.data import ImageSet, TrainingData, channel_statistics, load_dataset, normalize
from common.device import pick_device
from common.encoder import Encoder, encode_in_batches
from common.files import write_text
from common.glyphs import draw_glyphs
from common.inner_loop import OUTPUT_INITS, InnerLoop, adapt
from common.kshot import adapted_counts, support_sets
from common.optimizer import make_optimizer
from common.parallel import Workers
from common.samplers import FewShotBatchSampler, TaskBatchSampler, episode_labels
from common.script import run_script
from common.splits import split_classes
from common.tables import markdown_lines, text_lines

ROOT = sys.path[0]
N_WAY, K_SHOT, N_QUERY = 5, 4, 4  # of a training task, as in the trainers
EPISODE = {"n_way": N_WAY, "k_shot": K_SHOT, "n_query": N_QUERY}
TEST_WAY = 10  # classes of the k-shot test
LR_INNER = 0.1  # of the encoder's copy and of the output layer, on all sides
# How many forward passes of one image a ProtoNet step amounts to; a backward pass counts as two.
PROTONET_PASSES = 3 * N_WAY * (K_SHOT + N_QUERY)
# Sides of a line; the others are libraries.
PROJECT, BFLOAT16, TUTORIAL = "project", "project, bfloat16", "tutorial's way"
# An encoder for very many steps.
TINY = {"proto_dim": 16, "growth_rate": 8, "block_config": (1, 1, 1, 1), "num_init_features": 8}
# Seconds in which the loader's workers fill their queue again, so that they do not disturb the
# project's turn.
SETTLE = 1.0


@dataclass
class Config:
    # data
    dataset: str = "glyphs"  # read from data_dir if it is there; else a few glyphs are drawn
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    # measurement
    repeats: int = 5  # measurements per line, after one to warm up; the tables give medians
    adapt_steps: int = 0  # inner steps of an adaptation; 0: 200 on a GPU, 20 on the CPU
    memory_steps: int = 2000  # training steps over which memory is watched
    workers: int = 2  # worker processes of the tutorial's DataLoader
    quick: bool = False  # 2 repeats of small pieces of work, whatever the options above say
    # run
    device: str = "auto"  # auto, cuda, mps or cpu
    results_dir: str = "benchmarks/results"  # where <machine>.md goes (<machine>-quick.md if quick)

    def __post_init__(self):
        require(self, "repeats", "workers", least=1)
        require(self, "adapt_steps", least=0)
        require(self, "memory_steps", least=20)
        if self.quick:
            self.repeats, self.adapt_steps, self.memory_steps = 2, 2, 20


class Bench:
    """What the measurements share: device, images, sizes of the pieces of work.

    libraries: {name: version} of those to compare with; cuda_graphs: whether steps may use them.
    """

    def __init__(self, cfg, libraries, cuda_graphs=True):
        self.cfg, self.device = cfg, pick_device(cfg.device)
        self.libraries, self.cuda_graphs = libraries, cuda_graphs
        self.gpu = self.device.type != "cpu"
        self.adapt_steps = cfg.adapt_steps or (200 if self.gpu else 20)
        # Tasks of an outer step, queries of a test, fewest steps of the growing adaptation.
        self.tasks, self.queries, self.unit = (4, 600, 1) if cfg.quick else (16, 6000, 10)
        # Batches of data, ProtoNet steps and outer steps in one measurement.
        self.batches, self.steps, self.outer_steps = 30, 10, 5 if self.gpu else 1
        if cfg.quick:
            self.batches, self.steps, self.outer_steps = 5, 2, 1
        self.data = read_images(cfg)
        self.train = self.data.of_classes(split_classes(self.data.class_names)["train"])
        self.mean, self.std = channel_statistics(self.train)
        resident = self.train.to(self.device)
        self.training = TrainingData(resident, None, {}, self.mean, self.std, "")
        # As many queries as the test has on CIFAR-100: where ten classes have fewer images, these
        # come more than once.
        test = self.data.of_classes(self.data.class_names[:TEST_WAY])
        order = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(0))
        picked = order[torch.arange(self.queries) % len(order)]
        test = ImageSet(test.name, test.images[picked], test.labels[picked], test.class_names)
        test = test.to(self.device)
        self.labels, self.images = test.labels, normalize(test.images, self.mean, self.std)

    def sampler(self, tasks):
        """Return a new sampler of steps of so many tasks; 0: of episodes."""
        make = partial(TaskBatchSampler, batch_size=tasks) if tasks else FewShotBatchSampler
        options = {"include_query": True, "num_query": N_QUERY}
        return make(self.train.labels, N_way=N_WAY, K_shot=K_SHOT, **options)

    def encoder(self, make=Encoder):
        """Return a new encoder, in train mode; the project's and the others' start alike."""
        torch.manual_seed(42)
        return make().to(self.device).train()

    def project_encoders(self):
        """Return {side: new encoder} of the project, one for each precision."""
        encoders = {PROJECT: self.encoder(), BFLOAT16: self.encoder()}
        encoders[BFLOAT16].precision = "bfloat16"
        return encoders

    def library_steps(self, makers, *options):
        """Return {library: training step} of the libraries found; makers: {library: function}."""
        y = episode_labels(N_WAY, K_SHOT, self.device)
        return {
            name: make(self.encoder(tutorial_style.make_encoder), y, *options)
            for name, make in makers.items()
            if name in self.libraries
        }

    def support(self, k_shot):
        """Return support sets of the k-shot test, int64 [S, n_way * k], and the labels of one."""
        sets = support_sets(self.labels, k_shot, self.data.class_names[:TEST_WAY])
        return sets.to(self.device), episode_labels(TEST_WAY, k_shot, self.device)

    def seconds(self, function):
        """Return the time that `function()` takes until the device has done all of it."""
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def wait(self):
        """Wait until the device has done what it was given."""
        if self.gpu:
            torch.accelerator.synchronize()

    def medians(self, name, *sides):
        """Return the median of what each function returns.

        They take turns, so that a slow minute slows all of them.
        """
        turns = []
        for _ in range(1 + self.cfg.repeats):
            turns.append([])
            for side in sides:
                gc.collect()  # no side pays for what another left behind
                turns[-1].append(side())
        found = [statistics.median(times) for times in zip(*turns[1:])]  # the first: to warm up
        print(f"measured: {name}: {' / '.join(map(show_time, found))}", file=sys.stderr, flush=True)
        return found

    def line(self, name, sides, passes=0):
        """Return a line of the first table; sides: {side: function that returns its seconds}."""
        return name, dict(zip(sides, self.medians(name, *sides.values()))), passes


class Episodes:
    """The project's batches, drawn for an epoch at a time; a step makes its own images."""

    def __init__(self, bench, tasks=1):
        self.images, self.sampler = bench.training.train.images, bench.sampler(tasks)

    def draw(self):
        episodes = self.sampler.episodes()  # [steps, T, N*(K+Q)]
        self.batches = EpochBatches(episodes, self.images, self.sampler.generator)

    def of(self, step):
        """Return the tensors that a step takes; the epoch is repeated without end."""
        return self.batches.of(step % len(self.batches))


def main(cfg):
    load = os.getloadavg()[0]
    bench = Bench(cfg, peers.find_libraries())
    memory = memory_table(bench)  # first: what the other measurements free again would hide growth
    gflops, flop = matrix_rate(bench), flop_per_image(bench)
    parts = (protonet_lines, maml_lines, test_lines, process_lines)
    lines = [line for part in parts for line in part(bench)]
    tables = [speed_table(bench, lines, gflops, flop), growth_table(bench), memory]
    about = [*about_run(bench, gflops, flop, load), about_bfloat16(lines)]
    name = machine(bench.device) + ("-quick" if cfg.quick else "")
    report(cfg.results_dir, name, "Speed", about, tables)


def read_images(cfg):
    """Return the data set from data_dir, or else 60 glyphs of each class, drawn and not kept.

    Raises UserError where it does not suit.
    """
    path = os.path.join(cfg.data_dir, cfg.dataset)
    if os.path.exists(f"{path}.npz") or os.path.isdir(path):
        data = load_dataset(cfg.dataset, cfg.data_dir)
    elif cfg.dataset == "glyphs":
        images, labels, names = draw_glyphs(images_per_class=60)
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
        data = ImageSet("glyphs", images, torch.from_numpy(labels), names)
    else:
        raise UserError(
            f"found no data set {path}.npz, and none is downloaded here; put it there or leave "
            "--dataset out"
        )
    fewest = torch.bincount(data.labels).min()
    if data.images.shape[2:] != (32, 32) or len(data.class_names) < 20 or fewest < 60:
        raise UserError(
            f"{cfg.dataset} does not suit: 20 classes of 60 images of 32x32 pixels are needed; "
            "leave --dataset out to draw glyphs"
        )
    return data


def matrix_rate(bench):
    """Return the machine's rate of float32 matrix products, in GFLOP/s."""
    size = 8192 if bench.gpu else 2048  # a large GPU is not busy with less
    a, b = torch.rand(2, size, size, device=bench.device)
    seconds = bench.medians("matrix product", lambda: bench.seconds(lambda: a @ b))[0]
    return 2 * size**3 / seconds / 1e9


def flop_per_image(bench):
    """Return the floating-point operations of the encoder's forward pass, per image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bench.encoder()(bench.images[:40])
    return counter.get_total_flops() / 40


def make_images(data, batch, *crops):
    """Return the images of a step, [B, 3, H, W], as the trainers make them."""
    return data.normalize(augment(data.train.images[batch], *crops))


def protonet_trainer(bench, encoder):
    """Return the function that does one step of train_protonet.py."""
    optimizer = make_optimizer(encoder.parameters(), 2e-4, 0.01, bench.device)
    cfg = SimpleNamespace(**EPISODE, episodes_per_step=1)
    learn = partial(train_protonet.learn_episodes, cfg, bench.training, encoder, None)
    return tracked(bench, learn, optimizer)


def protomaml_trainer(bench, encoder, tasks, num_inner_steps, output_init="prototypes"):
    """Return the function that does one outer step of train_protomaml.py."""
    optimizer = make_optimizer(encoder.parameters(), 1e-3, 0.01, bench.device)
    inner_loop = InnerLoop(num_inner_steps, LR_INNER, LR_INNER, output_init)
    cfg = SimpleNamespace(**EPISODE, **dataclasses.asdict(inner_loop))
    workers = Workers(bench.device, tasks, encoder)
    learn = partial(train_protomaml.learn_tasks, cfg, bench.training, encoder, workers)
    return tracked(bench, learn, optimizer)


def outer_step_passes(tasks, num_inner_steps, output_init="prototypes"):
    """Return how many forward passes of one image an outer step amounts to."""
    # Forward and backward: the support set in every inner step, the queries in the outer one.
    passes = 3 * (K_SHOT * num_inner_steps + N_QUERY)
    if output_init == "prototypes":
        passes += 2 * K_SHOT  # backward through the prototypes; forward was an inner step's
    return tasks * N_WAY * passes


def tracked(bench, learn, optimizer):
    """Return the step as the trainers run it: a CUDA graph on CUDA, loss and accuracy added up."""
    learn = CudaGraphStep(learn, bench.device, bench.cuda_graphs)
    sums = torch.zeros(3, device=bench.device)

    def run(*inputs):
        loss_and_accuracy = torch.stack(learn(*inputs))
        optimizer.step()
        sums[:2] += loss_and_accuracy
        sums[2] += torch.isfinite(sums[0])

    return run


def project_side(bench, episodes, step, count):
    """Return the project's seconds per step, from `count` steps.

    Each bears its share of the draws for an epoch.
    """
    drawing = bench.seconds(episodes.draw) / len(episodes.batches)
    steps = bench.seconds(lambda: [step(*episodes.of(number)) for number in range(count)])
    return drawing + steps / count


def loader_side(bench, batches, step, count, lead):
    """Return the seconds per step of the tutorial's way or of a library, from `count` steps.

    Their batches are those of the tutorial's loader. lead: steps before that are not measured.
    """

    def run(steps):
        for _ in range(steps):
            images, labels = next(batches)
            step(images.to(bench.device), labels.to(bench.device))

    run(lead)
    taken = bench.seconds(partial(run, count)) / count
    time.sleep(SETTLE)
    return taken


def start_loader(bench, tasks=0):
    """Return the tutorial's loader of training images as an iterator without end.

    So its workers start only once.
    """
    images = bench.train.images.permute(0, 2, 3, 1).contiguous().numpy()
    labels, sampler = bench.train.labels.numpy(), bench.sampler(tasks)
    endless = (batch for epoch in iter(lambda: iter(sampler), None) for batch in epoch)
    numbers = (bench.mean, bench.std, bench.cfg.workers)
    return iter(tutorial_style.make_loader(images, labels, endless, *numbers))


def speed_table(bench, lines, gflops, flop):
    """Return the first table: (title, headings, *rows)."""
    sides = {PROJECT: "", BFLOAT16: "", TUTORIAL: "", **bench.libraries}
    rows = []
    for name, cells, passes in lines:
        rates = ("-", "-")
        if passes:
            rate = passes * flop / cells[PROJECT] / 1e9
            rates = (f"{rate:,.1f}", f"{rate / gflops:.1%}")
        rows.append((name, *(show_cell(cells, side) for side in sides), *rates))
    headings = [f"{side} {version}".strip() for side, version in sides.items()]
    title = (
        f"Speed: medians of {bench.cfg.repeats}; in brackets: how many times the project's time; "
        "GFLOP/s of the project in float32"
    )
    return title, ("", *headings, "GFLOP/s", "of matrix rate"), *rows


def show_cell(cells, side):
    """Return a side's cell as text: seconds, and their ratio to the project's."""
    cell = cells.get(side, "-")
    if isinstance(cell, str):
        return cell
    return show_time(cell) + ("" if side == PROJECT else f" ({cell / cells[PROJECT]:.2f})")


# The lines of that table: name, cells {side: seconds, or a text that stands as it is}, and how many
# forward passes of one image the project's work amounts to (0: not counted).


def protonet_lines(bench):
    lead = 2 * bench.cfg.workers + 1  # each worker has two batches ready
    project = partial(project_side, bench, Episodes(bench))
    others = partial(loader_side, bench, start_loader(bench), lead=lead)
    sides = {
        PROJECT: partial(project, partial(make_images, bench.training), bench.batches),
        TUTORIAL: partial(others, lambda images, labels: None, bench.batches),
    }
    data = bench.line("data for one ProtoNet step", sides)
    yield data
    encoder = bench.encoder(tutorial_style.make_encoder)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-4, weight_decay=0.01)
    steps = {
        TUTORIAL: partial(tutorial_style.protonet_step, encoder, optimizer),
        **bench.library_steps(peers.PROTONET, 2e-4),
    }
    sides = {
        side: partial(project, protonet_trainer(bench, encoder), bench.steps)
        for side, encoder in bench.project_encoders().items()
    }
    sides |= {side: partial(others, step, bench.steps) for side, step in steps.items()}
    name = "ProtoNet step, 5-way 4-shot 4-query"
    line = bench.line(name, sides, PROTONET_PASSES)
    yield "data's share of that step", {PROJECT: f"{data[1][PROJECT] / line[1][PROJECT]:.1%}"}, 0
    yield line


def maml_lines(bench):
    batches, tasks, count = start_loader(bench, bench.tasks), bench.tasks, bench.outer_steps
    # On the CPU a step takes longer than its images: the queue is always full, and each step pays
    # for its refill.
    lead = 2 * bench.cfg.workers + 1 if bench.gpu else 0

    for inner, output_init in itertools.product((1, 5), OUTPUT_INITS):
        if output_init == "prototypes":
            name, encoder = "ProtoMAML", bench.encoder(tutorial_style.make_encoder)
            optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.01)
            options = {"num_tasks": tasks, "num_inner_steps": inner, "lr": LR_INNER}
            step = partial(tutorial_style.protomaml_step, encoder, optimizer, **options)
            steps = {TUTORIAL: step}
        else:
            name, steps = "MAML", bench.library_steps(peers.MAML, 1e-3, tasks, inner, LR_INNER)
        sides = {}
        for side, encoder in bench.project_encoders().items():
            trainer = protomaml_trainer(bench, encoder, tasks, inner, output_init)
            sides[side] = partial(project_side, bench, Episodes(bench, tasks), trainer, count)
        for side, step in steps.items():
            sides[side] = partial(loader_side, bench, batches, step, count, lead)
        name = f"{name} outer step, {tasks} tasks, inner steps: {inner}"
        yield bench.line(name, sides, outer_step_passes(tasks, inner, output_init))
        if bench.device.type == "cuda":
            peaks = {side: peak_gpu_memory(run, bench.device) for side, run in sides.items()}
            yield "peak GPU memory of that", peaks, 0


def test_lines(bench):
    encoders, other = bench.project_encoders(), bench.encoder(tutorial_style.make_encoder)
    steps, ready = bench.adapt_steps, bench.images.contiguous()  # channels first
    asked = len(ready) if bench.gpu else len(ready) // 10  # the CPU is asked less

    def compare(name, project, tutorial, passes):
        """Return a line; project(encoder) returns the function that is measured."""
        functions = {side: project(encoder) for side, encoder in encoders.items()}
        functions[TUTORIAL] = tutorial
        sides = {side: partial(bench.seconds, each) for side, each in functions.items()}
        return bench.line(name, sides, passes)

    for k_shot in (2, 8, 32):
        sets, y_spt = bench.support(k_shot)
        sets = sets[: len(Workers(bench.device, len(sets), other).copies)]
        name = f"one adaptation, 10-way, k = {k_shot}, {steps} inner steps"
        project = partial(adaptation, bench, k_shot=k_shot, steps=steps)
        tutorial = partial(tutorial_style.adapt, other, ready[sets[0]], y_spt, steps, LR_INNER)
        yield compare(name, project, tutorial, 3 * steps * len(y_spt))

        # The support sets' images come first, and so many others that there are as many queries as
        # wanted.
        rows = torch.cat([sets.unique(), torch.arange(len(ready), device=bench.device)])
        rows = rows[: max(asked, sets.numel() + TEST_WAY)]
        images, labels = bench.images[rows], bench.labels[rows]
        places = torch.searchsorted(rows[: sets.numel()], sets)
        inner_loop = InnerLoop(steps, LR_INNER, LR_INNER)
        test = (Views(images), labels, places, TEST_WAY, k_shot, inner_loop)
        tutorial = partial(test_in_turn, other, ready[rows], labels, places, y_spt, steps)
        name = (
            f"k-shot test, k = {k_shot}: {len(sets)} support sets, {steps} inner steps, "
            f"{len(rows):,} images to classify"
        )
        passes = len(sets) * (3 * steps * len(y_spt) + len(rows))
        yield compare(
            name, lambda encoder: partial(adapted_counts, encoder, *test), tutorial, passes
        )

    yield compare(
        f"features of {bench.queries:,} images",
        lambda encoder: partial(encode_in_batches, encoder.eval(), bench.images),
        partial(tutorial_style.encode, other.eval(), ready),
        bench.queries,
    )


def test_in_turn(encoder, images, labels, sets, y_spt, steps):
    """Test as the tutorial does: one support set after the other."""
    for support in sets:
        adapted = tutorial_style.adapt(encoder, images[support], y_spt, steps, LR_INNER)
        tutorial_style.count_correct(*adapted[:3], images, labels)


def adaptation(bench, encoder, k_shot, steps):
    """Return the function that adapts once as the project's k-shot test does."""
    indices, y_spt = bench.support(k_shot)
    x_spt, inner_loop = bench.images[indices[0]], InnerLoop(steps, LR_INNER, LR_INNER)
    local = deepcopy(encoder)
    return partial(adapt, encoder, x_spt, y_spt, TEST_WAY, inner_loop, local, attached=False)


def process_lines(bench):
    with tempfile.TemporaryDirectory() as folder:
        small = bench.data.of_classes(bench.data.class_names[:20])
        rows = torch.cat([torch.nonzero(small.labels == c)[:24, 0] for c in range(20)])
        images = small.images[rows].permute(0, 2, 3, 1).contiguous().numpy()
        labels, names = small.labels[rows].numpy(), np.array(small.class_names)
        path = os.path.join(folder, "small.npz")
        np.savez(path, images=images, labels=labels, class_names=names)
        name = "start-up of train_protonet.py to the end of its first step"
        yield bench.line(name, {PROJECT: partial(start_up, bench, folder)})
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield "peak memory of this process, all sides in it", {PROJECT: show_memory(peak)}, 0


def start_up(bench, folder):
    """Return the seconds until train_protonet.py's progress bar shows its only step as done."""
    command = [
        sys.executable,
        "train_protonet.py",
        "--dataset=small",
        f"--data_dir={folder}",
        f"--checkpoint_dir={folder}",
        f"--device={bench.device}",
        "--epochs=1",
        "--steps_per_epoch=1",
    ]
    start, shown = time.perf_counter(), b""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        while b"100%" not in shown and (chunk := process.stderr.read1()):
            shown += chunk
        taken = time.perf_counter() - start
        process.communicate()
    if process.returncode or b"100%" not in shown:
        tail = shown.decode(errors="replace")[-300:]
        raise UserError(f"train_protonet.py did not finish a step: {tail}")
    return taken


def growth_table(bench):
    """Return the second table: how the project's time grows with tasks, inner steps and shots."""
    unit, few = bench.unit, bench.tasks // 4

    def outer(tasks, inner):
        trainer = protomaml_trainer(bench, bench.encoder(), tasks, inner)
        return partial(project_side, bench, Episodes(bench, tasks), trainer, bench.outer_steps)

    def test(k_shot, steps):
        return partial(bench.seconds, adaptation(bench, bench.encoder(), k_shot, steps))

    series = [
        ("tasks of an outer step, inner steps: 1", (few, 2 * few, 4 * few), lambda n: outer(n, 1)),
        (f"inner steps of an outer step, tasks: {few}", (1, 3, 5), lambda n: outer(few, n)),
        ("steps of an adaptation, k = 8", (unit, 2 * unit, 4 * unit), lambda n: test(8, n)),
        (f"k of an adaptation, steps: {unit}", (4, 8, 16), lambda n: test(n, unit)),
    ]
    rows = []
    for name, counts, side in series:
        times = bench.medians(f"growth with {name}", *map(side, counts))
        # Part of the work does not depend on n (an outer step's queries): linear growth is a last
        # column that stays the same.
        pairs = zip(times[1:], times, counts[1:], counts)
        added = [(later - earlier) / (more - fewer) for later, earlier, more, fewer in pairs]
        added = ["-", *map(show_time, added)]
        for n, taken, one in zip(counts, times, added):
            rows.append((name, str(n), show_time(taken), show_time(taken / n), one))
    headings = ("n: number of", "n", "time", "time / n", "per added one")
    return "Growth: the project's time for n of something", headings, *rows


def memory_table(bench):
    """Return the third table: memory in use after more and more steps of each trainer."""
    last, rows = bench.cfg.memory_steps, []
    marks = [last // 20, last // 4, last // 2, last]
    for name, tasks in (("ProtoNet", 1), ("ProtoMAML, 2 tasks", 2)):
        torch.manual_seed(42)
        encoder, episodes, used = Encoder(**TINY).to(bench.device), Episodes(bench, tasks), []
        if tasks > 1:
            step = protomaml_trainer(bench, encoder, tasks, 1)
        else:
            step = protonet_trainer(bench, encoder)
        episodes.draw()
        for number in range(1, last + 1):
            step(*episodes.of(number))
            if number % len(episodes.batches) == 0:
                episodes.draw()
            if number in marks:
                used.append(memory_in_use(bench.device))
        for kind in used[0]:
            rows.append((f"{name}: {kind}", *(show_memory(each[kind]) for each in used)))
    title = "Memory in use after n training steps, with a tiny encoder (four blocks of one layer)"
    return title, ("", *(f"n = {n:,}" for n in marks)), *rows


def memory_in_use(device):
    """Return {kind: bytes}; without /proc, the most that the process ever held."""
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm", encoding="ascii") as file:
            used = {"process": int(file.read().split()[1]) * resource.getpagesize()}
    else:
        used = {"process, peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return {**used, "GPU": torch.cuda.memory_allocated(device)} if device.type == "cuda" else used


def peak_gpu_memory(side, device):
    """Return the most GPU memory allocated during one measurement of a side, as a table's cell."""
    torch.cuda.reset_peak_memory_stats(device)
    side()
    return show_memory(torch.cuda.max_memory_allocated(device))


def about_run(bench, gflops, flop, load):
    """Return lines that say what was measured where and how."""
    cfg, libraries = bench.cfg, ", ".join(bench.libraries)
    precision = ", TF32 allowed, as in all that follows" if bench.device.type == "cuda" else ""
    quick = " (a quick run: its figures mean little)" if cfg.quick else ""
    return [
        f"{datetime.date.today()}, {machine(bench.device)}; load before the start {load:.1f}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {bench.device.type}",
        f"command: python {shlex.join(sys.argv)}{quick}",
        f"n = {cfg.repeats} measurements per line, the sides in turn, after one to warm up; "
        f"{len(bench.train.labels):,} training images of {bench.train.name}",
        f"float32 matrix products: {gflops:,.1f} GFLOP/s{precision}",
        f"encoder: {flop / 1e6:.1f} MFLOP per image forward (counted by PyTorch); training counts "
        "three times that",
        f"the tutorial's way: a DataLoader with {cfg.workers} workers and PIL, which work during "
        "its training steps; its test gets the images ready-made",
        f"libraries, in training steps alone, on that DataLoader's images: {libraries or 'none'}",
    ]


def about_bfloat16(lines):
    """Return a line that says what bfloat16 is, and where it is slower than float32."""
    slower = [
        name
        for name, cells, _ in lines
        if isinstance(cells.get(BFLOAT16), float) and cells[BFLOAT16] > cells[PROJECT]
    ]
    where = f"slower than float32 in: {'; '.join(slower)}" if slower else "nowhere slower"
    return f"bfloat16: the project with --precision=bfloat16, {where}"


def machine(device):
    """Name what counts for speed: cores, CPU, GPU."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"model name\s*: (.+)", file.read())
        name = found[1].strip() if found else name
    gpu = "" if device.type == "cpu" else f", {device.type}"
    if device.type == "cuda":
        gpu = f", {torch.cuda.get_device_name(device)}"
    return f"{os.cpu_count()}-core {name}{gpu}"


def report(folder, name, title, about, tables):
    """Print lines about a run and its tables (title, headings, *rows); write <folder>/<name>.md."""
    print("\n".join(about))
    for heading, *cells in tables:
        print("\n".join(["", heading, *text_lines(cells, left=(0,))]))
    path = os.path.join(folder, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".md")
    bullets = "\n".join(f"- {line}" for line in about)
    parts = [f"# {title}", bullets]
    for heading, *cells in tables:
        parts += [f"## {heading}", "\n".join(markdown_lines(cells, left=(0,)))]
    write_text(path, "\n\n".join(parts) + "\n")
    print(f"\nwrote {path}")


def show_time(taken):
    return f"{1000 * taken:.1f} ms" if taken < 1 else f"{taken:.2f} s"


def show_memory(count):
    return f"{count / 2**20:,.1f} MiB"


if __name__ == "__main__":
    run_script(main, Config)
