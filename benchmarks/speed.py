"""Measure the project's speed beside that of a first notebook and of other few-shot libraries.

    pip install -r benchmarks/requirements.txt    the libraries; one not installed is left out
    python benchmarks/speed.py                    on an idle machine; 15 minutes on two CPU cores
    python benchmarks/speed.py --quick=true       the same lines in small, to see that they run

What the others do is in peers.py; the project's steps and tests are its own, on CUDA as graphs.
Prints three tables and writes them to benchmarks/results/<machine>.md: the speed of each part of
the work, how its cost grows, memory over many training steps. Needs Linux.
"""

import datetime
import gc
import itertools
import os
import platform
import re
import resource
import shlex
import statistics
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import peers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

import train_protomaml
import train_protonet
from common import parallel
from common.augment import AugmentedBatches, Views
from common.config import require, run_script
from common.cuda_graph import CudaGraphStep
from common.data import load_training_data
from common.device import pick_device
from common.encoders import Encoder, encode_in_batches
from common.files import write_text
from common.inner_loop import InnerLoop
from common.kshot import adapted_accuracies, random_episodes
from common.optimizer import make_optimizer
from common.prototypes import episode_labels
from common.samplers import FewShotBatchSampler
from common.tables import markdown_lines, text_lines

N_WAY, K_SHOT, N_QUERY = 5, 4, 4  # of a training task, as in the trainers
LR_INNER = 0.1  # of the encoder's copy and of the output layer, on all sides
PROJECT, BFLOAT16 = "project", "project, bfloat16"  # sides of a line; the others are in peers.py
# An encoder for very many steps.
TINY = {"proto_dim": 16, "growth_rate": 8, "block_config": (1, 1, 1, 1), "num_init_features": 8}


@dataclass
class Config:
    dataset: str = "glyphs"  # its training and validation classes are used
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    repeats: int = 5  # measurements per line, after one to warm up; the tables give medians
    adapt_steps: int = 0  # inner steps of an adaptation; 0: as many as suit the device
    quick: bool = False  # 2 repeats of small pieces of work, whose figures mean little
    device: str = "auto"  # auto, cuda, mps or cpu
    results_dir: str = "benchmarks/results"  # where <machine>.md goes, or <machine>-quick.md

    def __post_init__(self):
        require(self, "repeats >= 1", "adapt_steps >= 0")
        if self.quick:
            self.repeats, self.adapt_steps = 2, 2


class Bench:
    """What the measurements share: device, data, sizes of the work, the lines measured."""

    def __init__(self, cfg, others=(), graphs=True):
        self.cfg, self.others, self.graphs = cfg, others, graphs
        self.device = pick_device(cfg.device, training=True)
        self.gpu, self.on_cuda = self.device.type != "cpu", self.device.type == "cuda"
        self.data = load_training_data(cfg.dataset, cfg.data_dir, self.device)
        self.images = self.data.normalize(self.data.val.images)  # of the test
        self.way = len(self.data.val.class_names)
        # Tasks of an outer step; steps in a measurement: a CUDA graph is recorded after 3.
        self.tasks, self.steps = (4, 5) if cfg.quick else (16, 30)
        self.outer_steps = 5 if self.gpu else 1
        self.lines = []  # of the speed table: {column: cell}

    def encoder(self, make=Encoder):
        """Return a new encoder, in train mode; the project's and the others' start alike."""
        torch.manual_seed(42)
        return make().to(self.device).train()

    def project(self, measure):
        """Return {side: measure(new encoder)} of the project, for each precision."""
        encoders = {PROJECT: self.encoder(), BFLOAT16: self.encoder()}
        encoders[BFLOAT16].precision = "bfloat16"
        return {side: measure(encoder) for side, encoder in encoders.items()}

    def timed(self, function, *inputs):
        """Return a function that calls function(*inputs) and returns the seconds that it takes."""
        wait = torch.accelerator.synchronize if self.gpu else int

        def measure():
            wait()
            start = time.perf_counter()
            function(*inputs)
            wait()
            return time.perf_counter() - start

        return measure

    def medians(self, name, *sides):
        """Return the median of what each function returns; a slow minute slows all of them."""
        turns = []
        for _ in range(1 + self.cfg.repeats):
            turns.append([])
            for side in sides:
                gc.collect()  # no side pays for what another left behind
                turns[-1].append(side())
        found = [statistics.median(times) for times in zip(*turns[1:])]  # the first: to warm up
        print(f"measured: {name}: {' / '.join(map(show_time, found))}", file=sys.stderr, flush=True)
        return found

    def line(self, name, sides):
        """Measure a line of the speed table; sides: {side: function that returns its seconds}."""
        own, *others = self.medians(name, *sides.values())
        ratios = [f"{show_time(taken)} ({taken / own:.2f})" for taken in others]
        self.lines.append({"": name, **dict(zip(sides, [show_time(own), *ratios]))})


def main(cfg):
    load = os.getloadavg()[0]
    bench = Bench(cfg, {peers.TUTORIAL: "", **peers.find_libraries()})
    memory = memory_table(bench)  # first: what the other measurements free again would hide growth
    measure_training(bench)
    measure_tests(bench)
    columns = {"": "", PROJECT: "", BFLOAT16: "", **bench.others}
    headings = [f"{column} {version}".strip() for column, version in columns.items()]
    rows = [[line.get(column, "-") for column in columns] for line in bench.lines]
    title = f"Speed: medians of {cfg.repeats}; in brackets: how many times the project's time"
    about = [
        f"load before the start {load:.1f}; {torch.get_num_threads()} threads; sides in turn after "
        f"one measurement to warm up; {len(bench.data.train.labels):,} images of {cfg.dataset}",
        "the tutorial's way: a DataLoader with 2 workers and PIL, which work during its training "
        "steps, and during those of the libraries; its test gets the images ready-made",
    ]
    tables = [(title, headings, *rows), growth_table(bench), memory]
    report(cfg, bench.device, "-quick" * cfg.quick, "Speed", about, tables)


def protonet_step(bench, encoder):
    """Return the step of train_protonet.py, a function of its images."""
    cfg = train_protonet.Config()
    optimizer = make_optimizer(encoder.parameters(), cfg.lr, cfg.weight_decay, bench.device)
    step = partial(train_protonet.train_step, cfg, encoder, optimizer)
    return CudaGraphStep(step, bench.device, bench.graphs)


def protomaml_step(bench, encoder, tasks, inner_steps=1, init="prototypes"):
    """Return the outer step of train_protomaml.py, a function of its images."""
    cfg = train_protomaml.Config(**vars(InnerLoop(inner_steps, LR_INNER, LR_INNER, init)))
    optimizer = make_optimizer(encoder.parameters(), cfg.lr, cfg.weight_decay, bench.device)
    workers = parallel.Workers(bench.device, tasks, lambda: (deepcopy(encoder), deepcopy(encoder)))
    step = partial(train_protomaml.train_step, cfg, encoder, optimizer, workers)
    return CudaGraphStep(step, bench.device, bench.graphs)


def training_tasks(bench, tasks):
    """Yield the tasks of an epoch's steps, int64 [steps, tasks, N * (K + Q)], without end."""
    sampler = FewShotBatchSampler(bench.data.train.labels, N_WAY, K_SHOT, N_QUERY)
    while True:
        yield sampler.episodes()[: len(sampler) // tasks * tasks].unflatten(0, (-1, tasks))


def project_side(bench, tasks, step):
    """Return the project's seconds per step, with its share of the draws for an epoch."""
    epochs, generator = training_tasks(bench, tasks), torch.Generator().manual_seed(42)
    drawing = bench.timed(next, epochs)() / len(indices := next(epochs))
    indices = indices[: bench.steps if tasks == 1 else bench.outer_steps]

    def run():
        for images in AugmentedBatches(bench.data, indices, generator):
            step(images)

    return drawing + bench.timed(run)() / len(indices)


def loader_side(bench, tasks, batches, step):
    """Return the seconds per step of another side; batches: of the tutorial's loader."""

    def run(steps):
        for images, labels in itertools.islice(batches, steps):
            step(images.to(bench.device), labels.to(bench.device))

    # First use up what the workers have ready, two batches each. A single long step pays for the
    # refill of the queue, which is always full.
    count = bench.steps if tasks == 1 else bench.outer_steps
    run(2 * peers.LOADER_WORKERS + 1 if count > 1 else 0)
    taken = bench.timed(run, count)() / count
    time.sleep(1)  # the workers fill their queue again, and do not disturb the project's turn
    return taken


def training_sides(bench, tasks, make_step, makers, *options):
    """Return the sides of make_step(encoder) and peers.py's makers[side](encoder, y, *options)."""
    sides = bench.project(lambda encoder: partial(project_side, bench, tasks, make_step(encoder)))
    steps = (step for epoch in training_tasks(bench, tasks) for step in epoch.flatten(1).tolist())
    batches, y = iter(peers.make_loader(bench.data, steps)), episode_labels(N_WAY, K_SHOT)
    for side in [side for side in bench.others if side in makers]:
        step = makers[side](bench.encoder(peers.make_encoder), y.to(bench.device), *options)
        sides[side] = partial(loader_side, bench, tasks, batches, step)
    return sides


def measure_training(bench):
    """Measure the training steps of ProtoNet, ProtoMAML and MAML."""
    tasks, no_step = bench.tasks, {peers.TUTORIAL: lambda *options: lambda *batch: None}
    sides = training_sides(bench, 1, no_step[peers.TUTORIAL], no_step)
    sides.pop(BFLOAT16)
    bench.line("data for one ProtoNet step", sides)
    sides = training_sides(bench, 1, partial(protonet_step, bench), peers.PROTONET, 2e-4)
    bench.line("ProtoNet step, 5-way 4-shot 4-query", sides)

    models = ("ProtoMAML", "prototypes", peers.PROTOMAML), ("MAML", "zeros", peers.MAML)
    for steps, (model, init, makers) in itertools.product((1, 5), models):
        make_step = partial(protomaml_step, bench, tasks=tasks, inner_steps=steps, init=init)
        sides = training_sides(bench, tasks, make_step, makers, 1e-3, tasks, steps, LR_INNER)
        bench.line(f"{model} outer step, {tasks} tasks, inner steps: {steps}", sides)

    # STREAMS is chosen by these lines; the last one is what it is.
    for parallel.STREAMS in (1, 4, 16, parallel.STREAMS) if bench.on_cuda else ():
        step = protomaml_step(bench, bench.encoder(), tasks)
        name = f"ProtoMAML outer step, {tasks} tasks, inner steps: 1, streams: {parallel.STREAMS}"
        bench.line(name, {PROJECT: partial(project_side, bench, tasks, step)})


def test_sides(bench, k_shot, steps, sets=1, queries=1):
    """Return the sides of a k-shot test of `sets` support sets; queries: per class."""
    val, way, how = bench.data.val, bench.way, InnerLoop(steps, LR_INNER, LR_INNER)
    tasks = random_episodes(val.labels, way, k_shot, queries, sets, val.class_names)
    tasks, images = tasks.to(bench.device), bench.images.contiguous()  # channels first
    test = Views(bench.images), val.labels, tasks, way, k_shot, how, iter, bench.graphs
    sides = bench.project(lambda encoder: bench.timed(adapted_accuracies, encoder, *test))
    ys = (episode_labels(way, count, bench.device) for count in (k_shot, queries))
    test = bench.encoder(peers.make_encoder), images, tasks, *ys, steps, LR_INNER
    return {**sides, peers.TUTORIAL: bench.timed(peers.tutorials_test, *test)}


def measure_tests(bench):
    """Measure adaptations, the k-shot test, encoding."""
    way, side_by_side = bench.way, parallel.STREAMS if bench.gpu else torch.get_num_threads()
    steps = bench.cfg.adapt_steps or (200 if bench.gpu else 20)
    sizes = (1, 1), (side_by_side, 5 if bench.cfg.quick else 500 if bench.gpu else 60)
    for k_shot, (sets, queries) in itertools.product((2, 8, 32), sizes):
        name = f"k-shot test, k = {k_shot}: {sets} support sets, {steps} inner steps, "
        name += f"{way * queries:,} images to classify"
        if queries == 1:  # which hardly count
            name = f"one adaptation, {way}-way, k = {k_shot}, {steps} inner steps"
        bench.line(name, test_sides(bench, k_shot, steps, sets, queries))

    sides = bench.project(lambda e: bench.timed(encode_in_batches, e.eval(), bench.images))
    notebooks = bench.encoder(peers.make_encoder).eval(), bench.images.contiguous()
    sides[peers.TUTORIAL] = bench.timed(peers.encode, *notebooks)
    bench.line(f"features of {len(bench.images):,} images", sides)


def growth_table(bench):
    """Return the second table: how the project's time grows with tasks, inner steps and shots."""
    few, unit = bench.tasks // 4, 1 if bench.cfg.quick else 10

    def outer(tasks, steps):
        step = protomaml_step(bench, bench.encoder(), tasks, steps)
        return partial(project_side, bench, tasks, step)

    def test(k_shot, steps):
        return test_sides(bench, k_shot, steps)[PROJECT]

    series = [
        ("tasks of an outer step, inner steps: 1", (few, 2 * few, 4 * few), lambda n: outer(n, 1)),
        (f"inner steps of an outer step, tasks: {few}", (1, 3, 5), lambda n: outer(few, n)),
        ("steps of an adaptation, k = 8", (unit, 2 * unit, 4 * unit), lambda n: test(8, n)),
        (f"k of an adaptation, steps: {unit}", (4, 8, 16), lambda n: test(n, unit)),
    ]
    rows = []
    for name, counts, side in series:
        times = bench.medians(f"growth with {name}", *map(side, counts))
        # Part of the work does not depend on n: linear growth is a last column of equal values.
        added = map(show_time, np.diff(times) / np.diff(counts))
        for n, taken, one in zip(counts, times, ["-", *added]):
            rows.append((name, str(n), show_time(taken), show_time(taken / n), one))
    headings = ("n: number of", "n", "time", "time / n", "per added one")
    return "Growth: the project's time for n of something", headings, *rows


def memory_table(bench):
    """Return the third table: memory in use after more and more steps of each trainer."""
    last, rows = 20 if bench.cfg.quick else 2000, []
    marks = [last // 20, last // 4, last // 2, last]
    for name, tasks in (("ProtoNet", 1), ("ProtoMAML, 2 tasks", 2)):
        encoder, generator = bench.encoder(partial(Encoder, **TINY)), torch.Generator()
        step = protomaml_step(bench, encoder, 2) if tasks > 1 else protonet_step(bench, encoder)
        epochs = (
            AugmentedBatches(bench.data, epoch, generator) for epoch in training_tasks(bench, tasks)
        )
        used = {"process": [], "GPU": []}
        for done, images in zip(range(1, last + 1), itertools.chain.from_iterable(epochs)):
            step(images)
            if done in marks:
                pages = Path("/proc/self/statm").read_text().split()[1]
                used["process"].append(int(pages) * resource.getpagesize())
                used["GPU"] += [torch.cuda.memory_allocated()] * bench.on_cuda
        rows += [(f"{name}: {kind}", *map(show_memory, used[kind])) for kind in used if used[kind]]
    title = "Memory in use after n training steps, with a tiny encoder (four blocks of one layer)"
    return title, ("", *(f"n = {n:,}" for n in marks)), *rows


def report(cfg, device, suffix, title, about, tables):
    """Print and write to <machine><suffix>.md what was done and tables (title, headings, *rows)."""
    info = Path("/proc/cpuinfo")  # no such file on macOS
    found = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    name = f"{os.cpu_count()}-core {found[1].strip() if found else platform.processor()}"
    name += f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    where = f"{datetime.date.today()}, {name}; torch {torch.__version__}, device {device.type}"
    about = [where, f"command: python {shlex.join(sys.argv)}", *about]
    print("\n".join(about))
    parts = [f"# {title}", "\n".join(f"- {line}" for line in about)]
    for heading, *cells in tables:
        print("\n".join(["", heading, *text_lines(cells, left=(0,))]))
        parts += [f"## {heading}", "\n".join(markdown_lines(cells, left=(0,)))]
    path = re.sub(r"[^a-z0-9]+", "-", f"{name}{suffix}".lower()).strip("-")
    path = os.path.join(cfg.results_dir, f"{path}.md")
    write_text(path, "\n\n".join(parts) + "\n")
    print(f"\nwrote {path}")


def show_time(taken):
    return f"{1000 * taken:.1f} ms" if taken < 1 else f"{taken:.2f} s"


def show_memory(count):
    return f"{count / 2**20:,.1f} MiB"


if __name__ == "__main__":
    run_script(main, Config)
