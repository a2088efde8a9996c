"""Test trained models: accuracy on new classes after seeing k images of each; tables and figures.

    python evaluate.py --dataset=glyphs --recipe=quick   the built-in data set, nothing to download
    python evaluate.py                                   CIFAR-100 and SVHN, as in the tutorial
    python evaluate.py --recipe=best                     CIFAR-100 and MNIST, as in the README
    python evaluate.py --protonet=FILE --domains=mnist   one checkpoint of yours, or the tutorial's
    python evaluate.py --protocol=episodes --k_shots=1,5 random 5-way episodes, as in papers

Writes accuracy.json, .csv and .md, accuracy per class and the figures into results/. What is
already there for the same checkpoint, data and settings is not computed again.

On 2 CPU cores the first line takes about 7 minutes. A complete test by nearest prototype takes
20 s. ProtoMAML and MAML adapt to every support set, which takes hours; --recipe=quick adapts to
four per k.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from common.augment import Views
from common.checkpoint import (
    ADAPTING,
    MODEL_NAMES,
    ROW_NAMES,
    content_digest,
    encoder_of,
    image_shape,
    load_checkpoint,
    print_change,
)
from common.config import UserError, require, require_one_of, show
from common.data import load_dataset, normalize
from common.device import pick_device
from common.encoder import PRECISIONS
from common.figures import plot_accuracy_over_k, plot_confusion, plot_episode, plot_examples
from common.files import sha256, write_text
from common.images import size_text
from common.inner_loop import MOST_IN_HALF, FineTuning, InnerLoop
from common.kshot import (
    accuracies,
    adapted_counts,
    mean_features,
    nearest_prototype_counts,
    random_episodes,
    summarize,
    support_sets,
)
from common.parallel import is_first, on_first, process_count, tasks_at_a_time
from common.published import published_results
from common.samplers import FewShotBatchSampler
from common.script import run_script
from common.splits import split_classes, split_name
from common.tables import name_of, text_table, variant, write_class_table, write_tables
from common.tutorial import K_SHOTS

PROTOCOL = 1  # version of the test: results of another version are not reused
DEFAULT_DOMAINS = {"cifar100": ("svhn",), "glyphs": ("glyph_digits",)}
# With each protocol: options that do nothing, and their only value then.
IN_VAIN = {
    "tutorial": {"n_way": 5, "n_query": 15, "num_episodes": 2000},
    "episodes": {"max_support_sets": (0,), "domain_max_support_sets": ()},
}
EPISODE = tuple(IN_VAIN["tutorial"])  # what decides random episodes, beside k
INNER_LOOP = ("num_inner_steps", "lr_inner", "lr_output")  # one number each, or one per k
FINE_TUNING = ("finetune_steps", "finetune_lr")  # the same


@dataclass
class Config:
    # recipe
    recipe: str = "tutorial"  # tutorial (the values below), quick or best; options override it
    # data
    dataset: str = "cifar100"  # the models' training data set; its test classes are tested first
    domains: tuple[str, ...] = ("auto",)  # unseen; auto: svhn or glyph_digits, none in episodes
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    # models
    checkpoint_dir: str = "checkpoints"  # its folder <dataset> is tested, unless files are named
    classifier: str = ""  # checkpoint of a classifier
    protonet: str = ""  # checkpoint of a ProtoNet
    maml: str = ""  # checkpoint of a MAML
    protomaml: str = ""  # checkpoint of a ProtoMAML
    # test
    protocol: str = "tutorial"  # tutorial: all classes at once; episodes: random ones, as in papers
    classes: str = "test"  # held-out classes: test for the final table, val to choose settings on
    k_shots: tuple[int, ...] = (2, 4, 8, 16, 32)  # support images per class, one test for each
    views: int = 1  # of each image, averaged over; 2: with its horizontal flip, more: random crops
    # random episodes, with --protocol=episodes
    n_way: int = 5  # classes per episode
    n_query: int = 15  # queries per class and episode
    num_episodes: int = 2000  # episodes per k, the same for all models
    # inner loop of MAML and ProtoMAML
    num_inner_steps: tuple[int, ...] = (200,)  # SGD steps on a support set; one, or one per k
    lr_inner: tuple[float, ...] = ()  # learning rate for the encoder; empty: as in training
    lr_output: tuple[float, ...] = ()  # learning rate for the output layer; empty: as in training
    domain_num_inner_steps: tuple[int, ...] = ()  # on unseen domains; empty: num_inner_steps
    domain_lr_inner: tuple[float, ...] = ()  # on unseen domains; empty: as lr_inner
    domain_lr_output: tuple[float, ...] = ()  # on unseen domains; empty: as lr_output
    # fine-tuning by episodes drawn from the support set
    finetune: tuple[str, ...] = ()  # models to test once more, fine-tuned on each support set
    finetune_steps: tuple[int, ...] = (40,)  # one number, or one per k; 0: nearest prototype
    finetune_lr: tuple[float, ...] = (1e-3,)  # learning rate of Adam
    domain_finetune_steps: tuple[int, ...] = ()  # on unseen domains; empty: finetune_steps
    domain_finetune_lr: tuple[float, ...] = ()  # on unseen domains; empty: finetune_lr
    # of all that adapts
    max_support_sets: tuple[int, ...] = (0,)  # support sets at most: a number, or one per k; 0: all
    domain_max_support_sets: tuple[int, ...] = ()  # on unseen domains; empty: max_support_sets
    # run
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "float32"  # of the encoder: float32, or bfloat16, faster on some machines
    cuda_graphs: bool = True  # false: run CUDA steps eagerly, to debug one or to save memory
    results_dir: str = "results"  # where tables and figures go

    def __post_init__(self):
        per_k = (*INNER_LOOP, *FINE_TUNING, "max_support_sets")
        per_k += tuple(f"domain_{name}" for name in per_k)
        require(self, "k_shots", "num_inner_steps", "domain_num_inner_steps", least=1)
        require(self, "finetune_steps", "domain_finetune_steps", least=0)
        require(self, "n_query", "num_episodes", "views", least=1)
        require(self, "n_way", least=2)
        require(self, "max_support_sets", "domain_max_support_sets", least=0)
        require(self, *(name for name in per_k if "lr" in name), above=0)
        require_one_of(self, "classes", ("test", "val"))
        require_one_of(self, "finetune", tuple(MODEL_NAMES))
        require_one_of(self, "precision", PRECISIONS)
        require_one_of(self, "protocol", ("tutorial", "episodes"))
        for name, only in IN_VAIN[self.protocol].items():
            if (value := getattr(self, name)) != only:
                other = "episodes" if self.protocol == "tutorial" else "tutorial"
                raise UserError(
                    f"{name} is {show(value)}, which does nothing with --protocol={self.protocol}; "
                    f"pass --{name}={show(only)} or --protocol={other}"
                )
        for name in per_k:
            count, needed = len(getattr(self, name)), getattr(Config, name) != ()
            if count not in (1, len(self.k_shots)) and (count or needed):
                raise UserError(
                    f"{name} has {count} numbers for {len(self.k_shots)} values of k; pass one "
                    "number, or one for each k"
                )
            of_recipe = RECIPES.get(self.recipe, {}).get(name, ())
            if len(of_recipe) > 1 and getattr(self, name) == of_recipe and self.k_shots != K_SHOTS:
                raise UserError(
                    f"{name} of --recipe={self.recipe} is for k = {show(K_SHOTS)}, not for "
                    f"{show(self.k_shots)}; pass --{name}, too: one number, or one for each k"
                )
        for name in ("k_shots", "domains", "finetune"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name == "k_shots" and not values):
                once = show(tuple(dict.fromkeys(values)) or Config.k_shots)
                raise UserError(f"{name} is {show(values)}; pass each value once: --{name}={once}")
        if "auto" in self.domains and len(self.domains) > 1:
            found = ",".join(self.domains)
            raise UserError(
                f"domains is {found}, but auto stands alone; name the data sets instead"
            )
        if self.dataset in self.domains:
            raise UserError(
                f"{self.dataset} is the data set of the training classes and cannot be an unseen "
                "domain; take it out of --domains"
            )


RECIPES = {
    "tutorial": {},
    # A few minutes on a CPU; made the tables in results/glyphs.
    "quick": {"num_inner_steps": (30,), "max_support_sets": (4,)},
    # Made the tables in results/cifar100. Chosen on the validation classes and on glyph_digits; see
    # docs/experiments.md.
    "best": {
        "domains": ("mnist",),
        "num_inner_steps": (10, 10, 10, 10, 200),
        "lr_inner": (0.0001, 0.0001, 0.0001, 0.0001, 0.004),
        "lr_output": (0.02, 0.02, 0.02, 0.02, 0.004),
        "domain_num_inner_steps": (20, 20, 200, 200, 200),
        "domain_lr_inner": (0.004, 0.004, 0.02, 0.02, 0.02),
        "domain_lr_output": (0.02,),
        "finetune": ("protonet",),
        "finetune_steps": (0, 0, 0, 40, 40),
        "finetune_lr": (0.0001,),
        "domain_finetune_steps": (40, 160, 320, 320, 320),
        "domain_finetune_lr": (0.001, 0.001, 0.002, 0.002, 0.002),
        "domain_max_support_sets": (30, 30, 12, 6, 6),
    },
}


def main(cfg):
    device = pick_device(cfg.device)
    checkpoints = on_first(lambda: load_checkpoints(cfg))
    data, split, image_sets, failures = load_image_sets(cfg, checkpoints)

    rows = []
    for image_set in image_sets:
        for model, checkpoint in checkpoints.items():
            rows += test_model(cfg, model, checkpoint, image_set, device)
            if model in cfg.finetune:
                rows += test_model(cfg, f"{model}_finetuned", checkpoint, image_set, device)
        # Nearest class mean on the pixels, normalised as for the first model: no learning at all.
        rows += test_model(cfg, "pixels", next(iter(checkpoints.values())), image_set, device)
    rows = [{**row, "split": split_name(split, data)} for row in rows]

    if is_first():
        published = ()
        if cfg.protocol == "episodes" and cfg.classes == "test":
            published = published_results(rows[0]["split"], cfg.n_way)
        print(text_table(rows, failures, published))
        write_tables(rows, failures, cfg.results_dir, published, how_it_was_made(cfg, checkpoints))
        for image_set in image_sets:
            path = os.path.join(cfg.results_dir, f"classes_{image_set.name}.csv")
            write_class_table(rows_by_class(cfg, image_set, rows), image_set.class_names, path)
        draw_figures(cfg, data, split, image_sets, rows)
        if leftovers := older_files(cfg.results_dir):
            print(f"of an earlier test, not of this one: {', '.join(leftovers)}")
        print(f"tables and figures: {cfg.results_dir}{os.sep}")
    return 1 if failures else 0


def how_it_was_made(cfg, checkpoints):
    """Return the command, the checkpoints and all settings of a test, as Markdown."""
    command = shlex.join(["python", "evaluate.py", *sys.argv[1:]])
    tested = []
    for each in checkpoints.values():
        epochs = each["config"].get("epochs", "?")  # the tutorial's files do not say
        digest = each["file_sha256"][:12]
        tested.append(f"{each['path']} (epoch {each['epoch']} of {epochs}, {digest})")
    unused = ("data_dir", "device", "cuda_graphs", "results_dir", *MODEL_NAMES)
    unused += tuple(IN_VAIN[cfg.protocol])
    values = {name: show(value) for name, value in vars(cfg).items() if name not in unused}
    settings = ", ".join(f"{name} {value}" for name, value in values.items())
    return (
        f"\n    {command}\n\nCheckpoints, their best epochs and how their SHA-256 begins: "
        f"{', '.join(tested)}.\n\n"
        f"Settings: {settings}.\n"
    )


def load_checkpoints(cfg):
    """Return {model: checkpoint} of the named files, or of the data set's folder.

    A checkpoint carries its path and file_sha256, too.
    """
    named = {model: getattr(cfg, model) for model in MODEL_NAMES if getattr(cfg, model)}
    folder = os.path.join(cfg.checkpoint_dir, cfg.dataset)
    in_folder = {model: os.path.join(folder, f"{model}.pt") for model in MODEL_NAMES}
    paths = named or {model: path for model, path in in_folder.items() if os.path.exists(path)}
    if not paths:
        raise UserError(
            f"found no checkpoint in {folder}; train one first (python train_protonet.py "
            f"--dataset={cfg.dataset}) or name a file (--protonet=FILE)"
        )
    checkpoints = {}
    for model, path in paths.items():
        digest = os.path.isfile(path) and sha256(path)
        checkpoint = load_checkpoint(path)
        if sha256(path) != digest:
            raise UserError(f"{path} was replaced while it was read; start again")
        # Of what was read: a run that trains meanwhile may replace the file at any time.
        checkpoints[model] = {**checkpoint, "path": path, "file_sha256": digest}
        if (found := checkpoint["model"]) != model:
            raise UserError(f"{path} holds a {found}, not a {model}; pass it as --{found}={path}")
        if (trained_on := checkpoint["dataset"]) != cfg.dataset:
            raise UserError(f"{path} was trained on {trained_on}; pass --dataset={trained_on}")
        encoder_of(checkpoint, path)
    for model in cfg.finetune:
        if model not in checkpoints:
            raise UserError(
                f"finetune names {model}, but no {model} is tested; name its file (--{model}=FILE) "
                f"or pass --finetune={next(iter(checkpoints))}"
            )
    return checkpoints


def load_image_sets(cfg, checkpoints):
    """Load what is tested: the held-out classes of the training data set, and the unseen domains.

    Returns (the training data set as an ImageSet, its class split, the ImageSets to test, {unseen
    domain: why it cannot be tested}).
    """
    models = checkpoints.values()
    known = {each["path"]: image_shape(each) for each in models if image_shape(each)}
    shape = agreed(known, "on images of different sizes") if known else None
    data = on_first(lambda: load_images(cfg, cfg.dataset, shape))
    shape = tuple(data.images.shape[2:])
    tutorials = split_classes(sorted(data.class_names))  # the files of the tutorial carry none
    splits = {each["path"]: each["class_split"] or tutorials for each in models}
    split = agreed(splits, "on different classes")
    digest = functools.cache(data.digest)
    for checkpoint in models:
        print_change(data.name, digest, checkpoint, checkpoint["path"])

    image_sets, failures = [data.of_classes(split[cfg.classes])], {}
    draw_all_tasks(cfg, image_sets[0])  # raises now rather than after an hour
    domains = cfg.domains
    if domains == ("auto",):
        domains = () if cfg.protocol == "episodes" else DEFAULT_DOMAINS.get(cfg.dataset, ())
    for domain in domains:
        try:
            image_set = on_first(partial(load_images, cfg, domain, shape))
            draw_all_tasks(cfg, image_set)
            image_sets.append(image_set)
        except UserError as error:  # the rest is worth having
            failures[domain] = str(error)
    return data, split, image_sets, failures


def agreed(values, how_they_differ):
    """Return the one value of {path: value}; raise UserError where two checkpoints differ."""
    (first_path, first), *others = values.items()
    for path, value in others:
        if value != first:
            raise UserError(
                f"{first_path} and {path} were trained {how_they_differ}, so one table cannot hold "
                "both; test them one at a time"
            )
    return first


def load_images(cfg, name, shape):
    """Return the ImageSet `name`, whose images must have the `shape` of training where given."""
    side = shape[0] if shape and shape[0] == shape[1] else 32
    image_set = load_dataset(name, cfg.data_dir, side)
    found = tuple(image_set.images.shape[2:])
    if shape and found != shape:
        raise UserError(
            f"the images of {name} are {size_text(found)} pixels, but the models were trained on "
            f"{size_text(shape)}; bring them to that size, or put them into a folder"
        )
    return image_set


def draw_all_tasks(cfg, image_set):
    """Raise UserError where the images do not give the tasks of every k."""
    for k_shot in cfg.k_shots:
        draw_tasks(cfg, image_set, k_shot, {})


def test_model(cfg, model, checkpoint, image_set, device):
    """Return one result row per k.

    Each is kept on disk as soon as it is there, and reused by the next run.
    """
    rows, missing = on_first(lambda: kept_results(cfg, model, checkpoint, image_set))
    works = {
        k: (row["settings"], draw_tasks(cfg, image_set, k, row["settings"]))
        for k, (row, _) in missing.items()
    }
    if missing:
        counts_of = prepare_test(cfg, model, checkpoint, image_set, device)
        adapting = {k: work for k, work in works.items() if adapts(work[0])}
        progress = Progress(cfg, model, adapting, image_set, tasks_at_a_time(device))
    for k_shot, (row, kept) in missing.items():
        settings, tasks = works[k_shot]
        counts = counts_of(tasks, k_shot, settings, partial(progress.show, k_shot))
        accuracy, std, ci95 = summarize(accuracies(counts))
        episodes = cfg.protocol == "episodes"
        rows[k_shot] = {
            **row,
            "n_way": counts.shape[1],
            "accuracy": accuracy,
            "std": std,
            "ci95": ci95,
            "num_episodes" if episodes else "num_support_sets": len(tasks),
            "num_queries": int(counts[0].sum()),
        }
        if episodes:
            weights = []
            if model != "pixels":
                weights = encoder_of(checkpoint, checkpoint["path"]).parameters()
            rows[k_shot]["parameters"] = sum(tensor.numel() for tensor in weights)
        elif model != "pixels":
            rows[k_shot]["confusion"] = counts.sum(dim=0).long().tolist()
        if is_first():
            digest = content_digest(rows[k_shot])
            write_text(kept, json.dumps({**rows[k_shot], "digest": digest}) + "\n")
    return [rows[k_shot] for k_shot in cfg.k_shots]


def draw_tasks(cfg, image_set, k_shot, settings):
    """Return the tasks of a test at k: a tensor as in common/kshot.py."""
    labels, names = image_set.labels, image_set.class_names
    if cfg.protocol == "episodes":
        return random_episodes(labels, cfg.n_way, k_shot, cfg.n_query, cfg.num_episodes, names)
    return support_sets(labels, k_shot, names, settings.get("max_support_sets", 0))


def kept_results(cfg, model, checkpoint, image_set):
    """Return {k: result row} of what is kept on disk, and {k: (row without result, path)} else."""
    identity = {
        "protocol": PROTOCOL,
        "model": model,
        "dataset": image_set.name,
        "classes": "all" if is_unseen(cfg, image_set) else cfg.classes,
        "trained_on": cfg.dataset,
        "checkpoint_sha256": None if model == "pixels" else checkpoint["file_sha256"],
        "data_sha256": image_set.digest(),
    }
    rows, missing = {}, {}
    for position, k_shot in enumerate(cfg.k_shots):
        settings = test_settings(cfg, model, checkpoint, image_set, position)
        row = {**identity, "k_shot": k_shot, "settings": settings}
        key = json.dumps([row, checkpoint["mean"], checkpoint["std"]], sort_keys=True)
        name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        kept = os.path.join(cfg.results_dir, ".cache", name)
        if found := read_kept(kept, row):
            rows[k_shot] = found
            print(
                f"{model} on {image_set.name}, k = {k_shot}: reused, same checkpoint, data and "
                f"settings ({kept})"
            )
        else:
            missing[k_shot] = (row, kept)
    return rows, missing


def test_settings(cfg, model, checkpoint, image_set, position):
    """Return what else decides a result: episodes, views, and the inner loop at this k.

    position: of k in cfg.k_shots.
    """
    episodes = cfg.protocol == "episodes"
    other = {name: getattr(cfg, name) for name in ("protocol", *EPISODE)} if episodes else {}
    # Not compared with Config's defaults, which may be edited.
    for name, plain in (("views", 1), ("precision", "float32")):
        if (value := getattr(cfg, name)) != plain and model != "pixels":
            other[name] = value
    fine_tuned = model.endswith("_finetuned")
    if model not in ADAPTING and not fine_tuned:
        return other

    def at_k(name):
        values = getattr(cfg, option_of(cfg, name, image_set))
        if not values:
            return None
        return values[position] if len(values) > 1 else values[0]

    names = FINE_TUNING if fine_tuned else INNER_LOOP
    loop = {name: value for name in names if (value := at_k(name)) is not None}
    if not fine_tuned:
        loop = dataclasses.asdict(InnerLoop.of(checkpoint["config"], **loop))
    if not episodes and adapts(loop):
        other["max_support_sets"] = at_k("max_support_sets")
    return {**loop, **other}


def is_unseen(cfg, image_set):
    """Return whether a tested data set is an unseen domain."""
    return image_set.name != cfg.dataset


def option_of(cfg, name, image_set):
    """Return the option that decides a setting: on unseen domains, domain_<name> if it is given."""
    of_domains = f"domain_{name}"
    return of_domains if is_unseen(cfg, image_set) and getattr(cfg, of_domains) else name


def prepare_test(cfg, model, checkpoint, image_set, device):
    """Return the function (tasks, k, settings, progress) -> counts of a model on a data set."""
    image_set = image_set.to(device)
    labels, n_way = image_set.labels, way_of(cfg, image_set)
    encoder = encoder_of(checkpoint, checkpoint["path"]).to(device)
    encoder.precision = cfg.precision
    normalized = partial(normalize, mean=checkpoint["mean"], std=checkpoint["std"])
    views = Views(image_set.images, cfg.views, normalized)
    in_graph = cfg.cuda_graphs and device.type == "cuda"

    @functools.cache
    def features():  # [N, D]
        pixels = model == "pixels"
        return normalized(views.images).flatten(1) if pixels else mean_features(encoder, views)

    def counts_of(tasks, k_shot, settings, progress):
        if not adapts(settings):
            return nearest_prototype_counts(features(), labels, tasks, n_way, k_shot, progress)
        if "finetune_steps" in settings:
            inner_loop = FineTuning(settings["finetune_steps"], settings["finetune_lr"])
        else:
            inner_loop = InnerLoop.of(settings)
        return adapted_counts(
            encoder, views, labels, tasks, n_way, k_shot, inner_loop, progress, in_graph
        )

    return counts_of


def adapts(settings):
    """Return whether a test with these settings adapts to each support set."""
    return bool(settings.get("num_inner_steps") or settings.get("finetune_steps"))


def way_of(cfg, image_set):
    """Return the number of classes of a task."""
    return cfg.n_way if cfg.protocol == "episodes" else len(image_set.class_names)


def what_shortens_it(cfg, model, image_set):
    """Return the options that make a model's tests shorter, as they are typed."""
    steps = "finetune_steps" if model.endswith("_finetuned") else "num_inner_steps"
    steps = option_of(cfg, steps, image_set)
    if cfg.protocol == "episodes":
        return f"--num_episodes=N or --{steps}=N"
    sets = option_of(cfg, "max_support_sets", image_set)
    both = (sets, steps) == ("max_support_sets", "num_inner_steps")
    return f"--{sets}=N or --{steps}=N" + (" (--recipe=quick sets both)" if both else "")


class Progress:
    """Progress bars of a model's tests on a data set; how many adaptations, and about how long.

    works: {k: (settings, tasks)} of the tests that adapt; at_a_time: tasks side by side.
    """

    def __init__(self, cfg, model, works, image_set, at_a_time):
        self.at_a_time = at_a_time
        self.title = f"{model} on {image_set.name}"
        self.shorter = what_shortens_it(cfg, model, image_set)
        queries = len(image_set.labels)
        if cfg.protocol == "episodes":
            queries = cfg.n_way * cfg.n_query
        # In forward passes of an image: three per support image and step, one per query, each times
        # the views; but a step of fine-tuning sees two halves of the support set, one view of each.
        fine_tuned = model.endswith("_finetuned")
        seen = {k: min(k, 2 * MOST_IN_HALF) if fine_tuned else k * cfg.views for k in works}
        steps = {
            k: settings.get("num_inner_steps", settings.get("finetune_steps"))
            for k, (settings, _) in works.items()
        }
        self.costs = {
            k: 3 * of_one * way_of(cfg, image_set) * seen[k] + queries * cfg.views
            for k, of_one in steps.items()
        }
        self.total = sum(self.costs[k] * len(tasks) for k, (_, tasks) in works.items())
        if works:
            count = sum(len(tasks) for _, tasks in works.values())
            steps = ", ".join(map(str, sorted(set(steps.values()))))
            print(f"{self.title}: {count} adaptations of {steps} steps", flush=True)

    def show(self, k_shot, tasks):
        """Yield this process's tasks with a progress bar.

        Once the first are done, estimate the time.
        """
        first = min(self.at_a_time, len(tasks))
        start = time.perf_counter()
        bar = tqdm(
            tasks,
            f"{self.title}, k = {k_shot}",
            leave=False,
            dynamic_ncols=True,
            disable=not is_first(),
        )
        for number, task in enumerate(bar):
            if number == first:
                self._estimate(k_shot, (time.perf_counter() - start) / first)
            yield task
        if first == len(tasks) > 0:
            self._estimate(k_shot, (time.perf_counter() - start) / first)

    def _estimate(self, k_shot, seconds):
        """Print once about how long all tests take, given the seconds of one adaptation at k."""
        if k_shot not in self.costs or not is_first():
            return
        minutes = seconds / self.costs[k_shot] * self.total / process_count() / 60
        self.costs = {}
        if minutes > 1:
            tqdm.write(f"{self.title}: about {minutes:.0f} min in all; less with {self.shorter}")


def read_kept(path, wanted):
    """Return the result row kept in `path`, or None where there is none that can be used.

    wanted: what the row must say of model, data and settings.
    """
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            row = json.load(file)
        digest = row.pop("digest")
        if digest == content_digest(row) and row.items() >= wanted.items():
            return row
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # not a row
        pass
    print(f"{path} is damaged or foreign: this result is computed anew")
    return None


def draw_figures(cfg, data, split, image_sets, rows):
    """Draw the data sets, one validation episode, ProtoNet alone and all models over k."""
    where = partial(os.path.join, cfg.results_dir)
    for image_set in (data, *image_sets[1:]):
        plot_examples(image_set, where(f"examples_{image_set.name}"))
    val = data.of_classes(split["val"])
    n_way = min(5, len(val.class_names))
    k_shot = min(4, torch.bincount(val.labels).min().item() // 2)
    if k_shot:
        sampler = FewShotBatchSampler(
            val.labels, n_way, k_shot, include_query=True, seed=0, class_names=val.class_names
        )
        plot_episode(val, sampler.episodes()[0], n_way, k_shot, where("few_shot_batch"))
    for image_set in image_sets:
        of_set = [row for row in rows if row["dataset"] == image_set.name]
        tested = {row["model"] for row in of_set}
        models = [model for model in ROW_NAMES if model in tested]
        held_out = not is_unseen(cfg, image_set)
        part = {"test": "Test", "val": "Validation"}[cfg.classes] if held_out else "All"
        name = name_of(image_set.name, rows[0]["split"] if held_out else "")
        title = f"{part} classes of {name}" + variant(vars(cfg))
        where_tested = title[0].lower() + title[1:]
        in_episodes = cfg.protocol == "episodes"
        if len(cfg.k_shots) > 1 or not in_episodes:
            plot_accuracy_over_k(of_set, models, title, where(f"models_{image_set.name}"))
        if held_out and "protonet" in models and not in_episodes:
            path = where(f"protonet_{image_set.name}")
            plot_accuracy_over_k(of_set, ["protonet"], f"ProtoNet: {where_tested}", path)
        for row in rows_by_class(cfg, image_set, rows):
            path = where(f"confusion_{row['model']}_{image_set.name}")
            heading = f"{ROW_NAMES[row['model']]}, k = {row['k_shot']}: {where_tested}"
            plot_confusion(row["confusion"], image_set.class_names, heading, path)


def older_files(folder):
    """Return the names of class tables and figures that are older than the table beside them."""
    names = re.compile(r"(classes|models|protonet|confusion|examples)_.*\.(csv|png|svg)")
    written = os.path.getmtime(os.path.join(folder, "accuracy.json"))
    found = filter(names.fullmatch, sorted(os.listdir(folder)))
    return [name for name in found if os.path.getmtime(os.path.join(folder, name)) < written]


def rows_by_class(cfg, image_set, rows):
    """Return the rows of a data set at the largest k that say which class was taken for which."""
    wanted = (image_set.name, max(cfg.k_shots))
    return [row for row in rows if (row["dataset"], row["k_shot"]) == wanted and "confusion" in row]


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
