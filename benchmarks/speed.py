"""Measure how fast the project is, beside the same work done the way a first notebook does it (tutorial_style.py).

    python benchmarks/speed.py                 on a machine that does nothing else; half an hour on two CPU cores
    python benchmarks/speed.py --quick=true    the same lines in small, to see that they run; the figures mean little

Prints three tables and writes them to benchmarks/results/<machine>.md: the speed of each part of the work, how its cost
grows, memory over many training steps. A few lines of the training loops are repeated here: scripts are not imported.
Needs Linux or macOS.
"""

import datetime
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

import numpy as np
import torch
import torch.nn.functional as F
import tutorial_style
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # before the imports from there

from common.augment import EpochAugmentation, augment
from common.config import UserError, require_at_least, run_script
from common.data import ImageSet, channel_statistics, load_dataset, normalize, split_classes
from common.device import pick_device
from common.encoder import encode_in_batches, make_encoder
from common.files import write_text
from common.glyphs import draw_glyphs
from common.inner_loop import adapt, first_order_gradients, follow_statistics, hand_over_gradients, statistics_of
from common.kshot import adapted_accuracies, support_sets
from common.launch import Captured, SideBySide, make_optimizer
from common.prototypes import distance_logits, make_prototypes
from common.samplers import FewShotBatchSampler, TaskBatchSampler, episode_labels

N_WAY, K_SHOT, N_QUERY = 5, 4, 4  # of a training task, as in the trainers
TEST_WAY = 10  # classes of the k-shot test
LR_INNER = 0.1  # of the encoder's copy and of the output layer, on both sides
TINY = {"proto_dim": 16, "growth_rate": 8, "block_config": (1, 1, 1, 1), "num_init_features": 8}  # encoder for very many steps
SETTLE = 1.0  # seconds in which the loader's workers fill their queue again, so that they do not disturb the project's turn


@dataclass
class Config:
    # data
    dataset: str = "glyphs"  # read from data_dir where it is there; else a few glyphs are drawn and nothing is written
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    # measurement
    repeats: int = 5  # measurements per line, after one to warm up; the tables give medians
    adapt_steps: int = 0  # inner steps of an adaptation; 0: 200 on a GPU; on the CPU 20, and a tenth of the test's queries
    memory_steps: int = 2000  # training steps over which memory is watched
    workers: int = 2  # worker processes of the tutorial's DataLoader
    quick: bool = False  # 2 repeats of small pieces of work, whatever the options above say
    # run
    device: str = "auto"  # auto, cuda, mps or cpu
    results_dir: str = "benchmarks/results"  # where <machine>.md goes (<machine>-quick.md if quick)

    def __post_init__(self):
        require_at_least(self, 1, "repeats", "workers")
        require_at_least(self, 0, "adapt_steps")
        require_at_least(self, 20, "memory_steps")
        if self.quick:
            self.repeats, self.adapt_steps, self.memory_steps = 2, 2, 20


class Bench:
    """What the measurements share: device, images, sizes of the pieces of work."""

    def __init__(self, cfg):
        self.cfg, self.device = cfg, pick_device(cfg.device)
        self.gpu = self.device.type != "cpu"
        self.adapt_steps = cfg.adapt_steps or (200 if self.gpu else 20)
        self.tasks, self.queries, self.unit = (4, 600, 1) if cfg.quick else (16, 6000, 10)  # unit: least steps of a growing adaptation
        self.batches, self.steps, self.outer_steps = (5, 2, 1) if cfg.quick else (30, 10, 5 if self.gpu else 1)  # in one measurement
        self.data = read_images(cfg)
        self.train = self.data.of_classes(split_classes(self.data.class_names)["train"])
        self.mean, self.std = channel_statistics(self.train)
        self.resident = self.train.to(self.device)
        # As many queries as the test has on CIFAR-100; where ten classes have fewer images, these come more than once.
        test = self.data.of_classes(self.data.class_names[:TEST_WAY])
        picked = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(0))[torch.arange(self.queries) % len(test.images)]
        test = ImageSet(test.name, test.images[picked], test.labels[picked], test.class_names).to(self.device)
        self.labels, self.images = test.labels, normalize(test.images, self.mean, self.std)
        self.images_channels_first = self.images.contiguous()

    def sampler(self, tasks):
        """Return a new sampler of ProtoMAML's outer steps with so many tasks, or with 0 of ProtoNet's episodes."""
        make = partial(TaskBatchSampler, batch_size=tasks) if tasks else FewShotBatchSampler
        return make(self.train.labels, N_way=N_WAY, K_shot=K_SHOT, include_query=True, num_query=N_QUERY)

    def encoders(self):
        """Return the project's encoder and the tutorial's, with the same weights."""
        torch.manual_seed(42)
        project, tutorial = make_encoder().to(self.device), tutorial_style.make_encoder().to(self.device)
        tutorial.load_state_dict(project.state_dict())
        return project.train(), tutorial.train()

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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def medians(self, name, *sides):
        """Return the median of what each function returns; they take turns, so that a slow minute slows all of them."""
        turns = [[side() for side in sides] for _ in range(1 + self.cfg.repeats)][1:]  # the first is to warm up
        found = [statistics.median(times) for times in zip(*turns)]
        print(f"measured: {name}: {' / '.join(map(show_time, found))}", file=sys.stderr, flush=True)
        return found


class Episodes:
    """The project's batches: what to take is drawn for an epoch at a time, images are made step by step on the device."""

    def __init__(self, bench, tasks=0):
        self.bench, self.sampler = bench, bench.sampler(tasks)

    def draw(self):
        bench, generator = self.bench, self.sampler.generator
        batches = self.sampler.episodes().flatten(1)  # [steps, B]
        self.batches = batches.to(bench.device)
        self.augmentation = EpochAugmentation(self.batches, bench.resident.images, generator)

    def of(self, step):
        """Return the tensors that a step takes; after the last step of the epoch comes the first again."""
        step %= len(self.batches)
        return self.batches[step], *self.augmentation.of(step)


def main(cfg):
    load = os.getloadavg()[0]
    bench = Bench(cfg)
    memory = memory_table(bench)  # first: what the other measurements free again would hide growth
    gflops, flop = matrix_rate(bench), flop_per_image(bench)
    tables = [speed_table(bench, gflops, flop), growth_table(bench), memory]
    about = about_run(bench, gflops, flop, load)
    print("\n\n".join(["\n".join(about), *(text_table(*table) for table in tables)]))
    slug = re.sub(r"[^a-z0-9]+", "-", machine(bench.device).lower()).strip("-")
    path = os.path.join(cfg.results_dir, f"{slug}{'-quick' if cfg.quick else ''}.md")
    bullets = "\n".join(f"- {line}" for line in about)
    write_text(path, "\n\n".join(["# Speed", bullets, *(markdown_table(*table) for table in tables)]) + "\n")
    print(f"\nwrote {path}")


def read_images(cfg):
    """Return the data set from data_dir, or else 60 glyphs of each class. Raises UserError where it does not suit."""
    path = os.path.join(cfg.data_dir, cfg.dataset)
    if os.path.exists(f"{path}.npz") or os.path.isdir(path):
        data = load_dataset(cfg.dataset, cfg.data_dir)
    elif cfg.dataset == "glyphs":
        images, labels, names = draw_glyphs(images_per_class=60)
        data = ImageSet("glyphs", torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), names)
    else:
        raise UserError(f"found no data set {path}.npz, and none is downloaded here; put it there or leave --dataset out")
    if data.images.shape[2:] != (32, 32) or len(data.class_names) < 20 or torch.bincount(data.labels).min() < 60:
        raise UserError(f"{cfg.dataset} does not suit: 20 classes of 60 images of 32x32 pixels are needed; leave --dataset out to draw glyphs")
    return data


def matrix_rate(bench):
    """Return the machine's rate of float32 matrix products, in GFLOP/s."""
    size = 8192 if bench.gpu else 2048  # a large GPU is not busy with less
    a, b = torch.rand(2, size, size, device=bench.device)
    return 2 * size**3 / bench.medians("matrix product", lambda: bench.seconds(lambda: a @ b))[0] / 1e9


def flop_per_image(bench):
    """Return the floating-point operations of the encoder's forward pass, per image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bench.encoders()[0](bench.images[:40])
    return counter.get_total_flops() / 40


def make_images(bench, batch, *crops):
    """Return the images of a step, [B, 3, H, W], as the trainers make them."""
    return normalize(augment(bench.resident.images[batch], *crops), bench.mean, bench.std)


def protonet_trainer(bench, encoder):
    """Return the function that does one step of train_protonet.py."""
    optimizer = make_optimizer(encoder.parameters(), 2e-4, 0.01, bench.device)
    y_qry, num_support = episode_labels(N_WAY, N_QUERY, bench.device), N_WAY * K_SHOT

    def train_step(batch, *crops):
        features = encoder(make_images(bench, batch, *crops))  # [B, D]
        x_spt, x_qry = features[:num_support], features[num_support:]
        logits = distance_logits(x_qry, make_prototypes(x_spt, N_WAY))
        loss = F.cross_entropy(logits, y_qry)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), (logits.argmax(dim=1) == y_qry).float().mean()

    return tracked(bench, train_step)


def protomaml_trainer(bench, encoder, tasks, num_inner_steps):
    """Return the function that does one outer step of train_protomaml.py."""
    optimizer = make_optimizer(encoder.parameters(), 1e-3, 0.01, bench.device)
    y_spt, y_qry = episode_labels(N_WAY, K_SHOT, bench.device), episode_labels(N_WAY, N_QUERY, bench.device)
    workers = SideBySide(bench.device, tasks)
    copies = [deepcopy(encoder) for _ in range(workers.count)]

    def learn_task(images, worker):
        x_spt, x_qry = images[: len(y_spt)], images[len(y_spt) :]
        local, weight, bias = adapt(encoder, x_spt, y_spt, N_WAY, num_inner_steps, LR_INNER, LR_INNER, local=copies[worker])
        logits = F.linear(local(x_qry), weight, bias)
        loss = F.cross_entropy(logits, y_qry)
        accuracy = (logits.argmax(dim=1) == y_qry).float().mean()
        return loss.detach(), accuracy, first_order_gradients(loss, encoder, local), statistics_of(local)

    def outer_step(batch, *crops):
        results = workers.run(learn_task, make_images(bench, batch, *crops).chunk(tasks))
        losses, accuracies, gradients, statistics = zip(*results)
        hand_over_gradients(encoder, gradients)
        follow_statistics(encoder, statistics)
        optimizer.step()
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()

    return tracked(bench, outer_step)


def tracked(bench, step):
    """Return the step as the trainers run it: captured where there is CUDA, its loss and accuracy added up."""
    step, sums = Captured(step, bench.device), torch.zeros(3, device=bench.device)

    def run(*inputs):
        sums[:2] += torch.stack(step(*inputs))
        sums[2] += torch.isfinite(sums[0])

    return run


def project_side(bench, episodes, step, count):
    """Return the project's seconds per step, from `count` steps; each bears its share of the draws for an epoch."""
    drawing = bench.seconds(episodes.draw) / len(episodes.batches)
    return drawing + bench.seconds(lambda: [step(*episodes.of(number)) for number in range(count)]) / count


def tutorial_side(bench, batches, step, count, lead):
    """Return the tutorial's seconds per step, from `count` steps on the loader's batches after `lead` unmeasured ones."""

    def run(steps):
        for _ in range(steps):
            images, labels = next(batches)
            step(images.to(bench.device), labels.to(bench.device))

    run(lead)
    taken = bench.seconds(partial(run, count)) / count
    time.sleep(SETTLE)
    return taken


def start_loader(bench, tasks=0):
    """Return the tutorial's loader of training images as an iterator without end, so that its workers start only once."""
    images, labels = bench.train.images.permute(0, 2, 3, 1).contiguous().numpy(), bench.train.labels.numpy()
    sampler = bench.sampler(tasks)
    endless = (batch for epoch in iter(lambda: iter(sampler), None) for batch in epoch)
    return iter(tutorial_style.make_loader(images, labels, endless, bench.mean, bench.std, bench.cfg.workers))


def speed_table(bench, gflops, flop):
    """Return the first table: (title, headings, rows)."""
    rows = []
    for name, project, tutorial, passes in (*protonet_lines(bench), *protomaml_lines(bench), *test_lines(bench), *process_lines(bench)):
        times = [cell if isinstance(cell, str) else show_time(cell) for cell in (project, tutorial)]
        ratio = "-" if isinstance(tutorial, str) else f"{tutorial / project:.2f}"
        rate = passes * flop / project / 1e9 if passes else None
        rows.append((name, *times, ratio, *((f"{rate:,.1f}", f"{rate / gflops:.1%}") if passes else "--")))
    headings = ("", "project", "tutorial's way", "ratio", "GFLOP/s", "of matrix rate")
    return f"Speed: medians of {bench.cfg.repeats}; GFLOP/s of the project", headings, rows


# The lines of that table: name, seconds of the project, seconds of the tutorial's way, and how many forward passes of
# one image the project's work amounts to (0: not counted). A text in place of a number stands as it is.


def protonet_lines(bench):
    encoder, other = bench.encoders()
    optimizer = torch.optim.AdamW(other.parameters(), lr=2e-4, weight_decay=0.01)
    project = partial(project_side, bench, Episodes(bench))
    tutorial = partial(tutorial_side, bench, start_loader(bench), lead=2 * bench.cfg.workers + 1)  # each worker has two batches ready
    data = bench.medians("data", partial(project, partial(make_images, bench), bench.batches), partial(tutorial, lambda x, y: None, bench.batches))
    yield "data for one ProtoNet step", *data, 0
    step = bench.medians(
        "ProtoNet step",
        partial(project, protonet_trainer(bench, encoder), bench.steps),
        partial(tutorial, partial(tutorial_style.protonet_step, other, optimizer), bench.steps),
    )
    yield "data's share of that step", f"{data[0] / step[0]:.1%}", "-", 0
    yield "ProtoNet step, 5-way 4-shot 4-query", *step, 3 * N_WAY * (K_SHOT + N_QUERY)


def protomaml_lines(bench):
    batches, tasks, count = start_loader(bench, bench.tasks), bench.tasks, bench.outer_steps
    # On the CPU a step takes longer than its images: the queue is always full, and each step pays for its refill.
    lead = 2 * bench.cfg.workers + 1 if bench.gpu else 0
    for inner in (1, 5):
        encoder, other = bench.encoders()
        optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.01)
        step = partial(tutorial_style.protomaml_step, other, optimizer, num_tasks=tasks, num_inner_steps=inner, lr=LR_INNER)
        project = partial(project_side, bench, Episodes(bench, tasks), protomaml_trainer(bench, encoder, tasks, inner), count)
        tutorial = partial(tutorial_side, bench, batches, step, count, lead)
        name = f"ProtoMAML outer step, {tasks} tasks, inner steps: {inner}"
        # Support: forward and backward per inner step, the first of which gives the prototypes too; then backward through these.
        passes = tasks * N_WAY * (K_SHOT * (3 * inner + 2) + N_QUERY * 3)
        yield name, *bench.medians(name, project, tutorial), passes
        if bench.device.type == "cuda":
            yield "peak GPU memory of that", peak_gpu_memory(project, bench.device), peak_gpu_memory(tutorial, bench.device), 0


def test_lines(bench):
    (encoder, other), steps, ready = bench.encoders(), bench.adapt_steps, bench.images_channels_first
    asked = len(ready) if bench.gpu else len(ready) // 10

    def compare(name, project, tutorial, passes):
        return name, *bench.medians(name, partial(bench.seconds, project), partial(bench.seconds, tutorial)), passes

    for k_shot in (2, 8, 32):
        sets, y_spt = bench.support(k_shot)
        sets = sets[: SideBySide(bench.device, len(sets)).count]
        tutorial = partial(tutorial_style.adapt, other, ready[sets[0]], y_spt, steps, LR_INNER)
        yield compare(f"one adaptation, 10-way, k = {k_shot}, {steps} inner steps", adaptation(bench, encoder, k_shot, steps), tutorial, 3 * steps * len(y_spt))

        # The support sets' images come first, and so many others that there are as many queries as wanted.
        rows = torch.cat([sets.unique(), torch.arange(len(ready), device=bench.device)])[: max(asked, sets.numel() + TEST_WAY)]
        images, labels = bench.images[rows], bench.labels[rows]
        places = torch.searchsorted(rows[: sets.numel()], sets)
        inner_loop = {"num_inner_steps": steps, "lr_inner": LR_INNER, "lr_output": LR_INNER}
        project = partial(adapted_accuracies, encoder, images, labels, places, TEST_WAY, inner_loop)
        name = f"k-shot test, k = {k_shot}: {len(sets)} support sets, {steps} inner steps, {len(rows):,} images to classify"
        yield compare(name, project, partial(test_in_turn, other, ready[rows], labels, places, y_spt, steps), len(sets) * (3 * steps * len(y_spt) + len(rows)))

    project = partial(encode_in_batches, encoder.eval(), bench.images)
    yield compare(f"features of {bench.queries:,} images", project, partial(tutorial_style.encode, other.eval(), ready), bench.queries)


def test_in_turn(encoder, images, labels, sets, y_spt, steps):
    """Test as the tutorial does: one support set after the other."""
    for support in sets:
        local, weight, bias, _ = tutorial_style.adapt(encoder, images[support], y_spt, steps, LR_INNER)
        tutorial_style.count_correct(local, weight, bias, images, labels)


def adaptation(bench, encoder, k_shot, steps):
    """Return the function that adapts once as the project's k-shot test does."""
    indices, y_spt = bench.support(k_shot)
    x_spt, local = bench.images[indices[0]], None

    def run():
        nonlocal local
        local, *_ = adapt(encoder, x_spt, y_spt, TEST_WAY, steps, LR_INNER, LR_INNER, local=local, attached=False)

    return run


def process_lines(bench):
    with tempfile.TemporaryDirectory() as folder:
        small = bench.data.of_classes(bench.data.class_names[:20])
        rows = torch.cat([torch.nonzero(small.labels == c)[:24, 0] for c in range(20)])
        images = small.images[rows].permute(0, 2, 3, 1).contiguous().numpy()
        np.savez(os.path.join(folder, "small.npz"), images=images, labels=small.labels[rows].numpy(), class_names=np.array(small.class_names))
        yield "start-up of train_protonet.py to the end of its first step", *bench.medians("start-up", partial(start_up, bench, folder)), "-", 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    yield "peak memory of this process, both sides in it", show_memory(peak), "-", 0


def start_up(bench, folder):
    """Return the seconds from the start of train_protonet.py until its progress bar shows the only step as done."""
    where = ("--dataset=small", f"--data_dir={folder}", f"--checkpoint_dir={folder}", f"--device={bench.device}")
    command = [sys.executable, "train_protonet.py", *where, "--epochs=1", "--steps_per_epoch=1"]
    start, shown = time.perf_counter(), b""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while b"100%" not in shown and (chunk := process.stderr.read1()):
            shown += chunk
        taken = time.perf_counter() - start
        process.communicate()
    if process.returncode or b"100%" not in shown:
        raise UserError(f"train_protonet.py did not finish a step: {shown.decode(errors='replace')[-300:]}")
    return taken


def growth_table(bench):
    """Return the second table: how the project's time grows with tasks, inner steps and shots."""
    unit, few = bench.unit, bench.tasks // 4

    def outer(tasks, inner):
        trainer = protomaml_trainer(bench, bench.encoders()[0], tasks, inner)
        return partial(project_side, bench, Episodes(bench, tasks), trainer, bench.outer_steps)

    def test(k_shot, steps):
        return partial(bench.seconds, adaptation(bench, bench.encoders()[0], k_shot, steps))

    series = [
        ("tasks of an outer step, inner steps: 1", (few, 2 * few, 4 * few), lambda n: outer(n, 1)),
        (f"inner steps of an outer step, tasks: {few}", (1, 3, 5), lambda n: outer(few, n)),
        ("steps of an adaptation, k = 8", (unit, 2 * unit, 4 * unit), lambda n: test(8, n)),
        (f"k of an adaptation, steps: {unit}", (4, 8, 16), lambda n: test(n, unit)),
    ]
    rows = []
    for name, counts, side in series:
        times = bench.medians(f"growth with {name}", *map(side, counts))
        # Part of the work does not depend on n (an outer step's queries): linear growth is a last column that stays the same.
        steps = zip(times[1:], times, counts[1:], counts)
        added = ["-", *(show_time((later - earlier) / (more - fewer)) for later, earlier, more, fewer in steps)]
        rows += [(name, str(n), show_time(taken), show_time(taken / n), one) for n, taken, one in zip(counts, times, added)]
    return "Growth: the project's time for n of something", ("n: number of", "n", "time", "time / n", "per added one"), rows


def memory_table(bench):
    """Return the third table: memory in use after more and more steps of each trainer, with a tiny encoder."""
    last, rows = bench.cfg.memory_steps, []
    marks = [last // 20, last // 4, last // 2, last]
    for name, tasks in (("ProtoNet", 0), ("ProtoMAML, 2 tasks", 2)):
        torch.manual_seed(42)
        encoder, episodes, used = make_encoder(**TINY).to(bench.device), Episodes(bench, tasks), []
        step = protomaml_trainer(bench, encoder, tasks, 1) if tasks else protonet_trainer(bench, encoder)
        episodes.draw()
        for number in range(1, last + 1):
            step(*episodes.of(number))
            if number % len(episodes.batches) == 0:
                episodes.draw()
            if number in marks:
                used.append(memory_in_use(bench.device))
        rows += [(f"{name}: {kind}", *(show_memory(each[kind]) for each in used)) for kind in used[0]]
    return "Memory in use after n training steps, with a tiny encoder (four blocks of one layer)", ("", *(f"n = {n:,}" for n in marks)), rows


def memory_in_use(device):
    """Return {kind: bytes}; where /proc does not tell what the process holds now, the most that it ever held."""
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
    cfg, precision = bench.cfg, ", TF32 allowed, as in all that follows" if bench.device.type == "cuda" else ""
    return [
        f"{datetime.date.today()}, {machine(bench.device)}; load before the start {load:.1f}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {bench.device.type}",
        f"command: python {shlex.join(sys.argv)}{' (a quick run: its figures mean little)' if cfg.quick else ''}",
        f"n = {cfg.repeats} measurements per line, the two sides in turn, after one to warm up; {len(bench.train.labels):,} training images of {bench.train.name}",
        f"float32 matrix products: {gflops:,.1f} GFLOP/s{precision}",
        f"encoder: {flop / 1e6:.1f} MFLOP per image forward (counted by PyTorch); training counts three times that",
        f"the tutorial's way: a DataLoader with {cfg.workers} workers and PIL, which work during its training steps; its test gets the images ready-made",
    ]


def machine(device):
    """Name what counts for speed: cores, CPU, GPU."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"model name\s*: (.+)", file.read())
        name = found[1].strip() if found else name
    gpu = {"cpu": "", "cuda": torch.cuda.is_available() and f", {torch.cuda.get_device_name(device)}"}
    return f"{os.cpu_count()}-core {name}{gpu.get(device.type, f', {device.type}')}"


def show_time(taken):
    return f"{1000 * taken:.1f} ms" if taken < 1 else f"{taken:.2f} s"


def show_memory(count):
    return f"{count / 2**20:,.1f} MiB"


def text_table(title, headings, rows):
    """Return a table of fixed width."""
    widths = [max(map(len, column)) for column in zip(headings, *rows)]
    lines = ["  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(line, widths))) for line in (headings, *rows)]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(title, headings, rows):
    """Return the same table as Markdown, under a heading of its own."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(line)} |" for line in (headings, rule, *rows))])


if __name__ == "__main__":
    run_script(main, Config)
