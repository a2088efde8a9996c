"""Test trained models: accuracy on new classes after seeing k images of each; tables and figures.

    python evaluate.py --dataset=glyphs --recipe=quick   random episodes of the built-in data set
    python evaluate.py --dataset=glyphs --recipe=glyphs  its k-shot test, in a few minutes
    python evaluate.py                                   CIFAR-100 and SVHN, as in the tutorial
    python evaluate.py --recipe=best                     CIFAR-100 and MNIST, as in docs/results.md
    python evaluate.py --models=FILE --domains=mnist     one checkpoint of yours, or the tutorial's
    python evaluate.py --recipe=papers --models=FILE     random 5-way episodes, as in papers
    python evaluate.py --models=torchvision:resnet18     pretrained, without training here

Tests what you trained on the data set, or else the models that come with the project. Writes
accuracy.json, .csv and .md and the figures into results/<dataset>/. What is there already for the
same checkpoint, data, settings and code of the test is not computed again.

On 2 CPU cores the first line takes 20 s, the second some minutes: there ProtoMAML and MAML
adapt to four support sets per k. To adapt to all takes hours; a complete test by nearest prototype
takes 20 s.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import ROOT, UserError, figures, kshot, shell_command, tables
from common.augment import Views
from common.checkpoint import content_digest, encoder_of, find_checkpoints, load_checkpoint
from common.config import require, run_script, show
from common.data import SOURCES, ImageSet, batches, is_there, load_dataset, normalize
from common.device import pick_device
from common.encoders import Encoder, encode_in_batches
from common.files import require_writable, sha256, write_text
from common.parallel import is_first, on_first, process_count
from common.prototypes import episode_labels, linear_logits
from common.splits import class_split, split_classes, split_name

# How a model that does not adapt classifies, where not by squared distance: {"mymethod": function}.
# The function takes queries [Q, D] and prototypes [N, D] and returns logits [Q, N].
LOGITS = {}
DEFAULT_DOMAINS = {"cifar100": ("svhn",), "glyphs": ("glyph_digits",)}


@dataclass
class Config:
    # recipe
    recipe: str = "tutorial"  # quick, glyphs, fast, best, papers, reproduction, reproduction_maml
    # data
    dataset: str = "cifar100"  # the models' training data set; its test classes are tested first
    domains: tuple[str, ...] = ("auto",)  # unseen data sets; auto: svhn or glyph_digits
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    # models
    models: tuple[str, ...] = ()  # files, folders, torchvision:NAME; empty: yours, else included
    finetune: tuple[str, ...] = ()  # models to test once more, fine-tuned on each support set
    # test
    classes: str = "test"  # held-out classes: test for the final table, val to choose settings on
    k_shots: tuple[int, ...] = (2, 4, 8, 16, 32)  # support images per class, one test for each
    views: int = 1  # of each image, averaged over; 2: with its horizontal flip, more: random crops
    min_view_area: float = 0.7  # area of the smallest of these, as a share of the image
    num_episodes: int = 0  # random episodes per k, as in papers; 0: the k-shot test of all classes
    n_way: int = 5  # classes per random episode
    n_query: int = 15  # queries per class and random episode
    # adaptation to a support set; -1: as ADAPTATION below says
    num_inner_steps: int = -1  # SGD steps of MAML and ProtoMAML
    lr_inner: float = -1.0  # their learning rate for the encoder; 0: as in training
    lr_output: float = -1.0  # their learning rate for the output layer; 0: as in training
    finetune_steps: int = -1  # steps of fine-tuning; 0: nearest prototype
    finetune_lr: float = -1.0  # their learning rate, of Adam
    max_support_sets: int = -1  # support sets at most of all that adapts; 0: all
    # run
    device: str = "auto"  # auto (CUDA if there is one, else the CPU), cuda, mps or cpu
    precision: str = "float32"  # of the encoder: float32, or bfloat16, faster on some machines
    cuda_graphs: bool = True  # false: run CUDA steps eagerly, to debug one or to save memory
    results_dir: str = ""  # where tables and figures go; empty: results/<dataset>

    def __post_init__(self):
        require(self, "k_shots and min(k_shots) >= 1", "len(set(k_shots)) == len(k_shots)")
        require(self, "views >= 1", "0 < min_view_area <= 1", "views > 2 or min_view_area == 0.7")
        require(self, "num_episodes >= 0", "n_way >= 2", "n_query >= 1")
        require(self, "num_inner_steps != 0", "finetune_lr == -1 or finetune_lr > 0")
        require(self, *(f"{name} == -1 or {name} >= 0" for name in COLUMNS))
        require(self, "classes in ('test', 'val')", "precision in ('float32', 'bfloat16')")
        require(self, "domains.count(dataset) == 0", "len(set(domains)) == len(domains)")
        require(self, "num_episodes >= 1 or (n_way, n_query) == (5, 15)")  # the k-shot test has all


# A recipe is what one would type behind the script's name.
RECIPES = {
    "tutorial": "",
    # 20 s on 2 CPU cores: few episodes, few steps.
    "quick": "--domains= --num_episodes=10 --n_way=10 --k_shots=1,5 --num_inner_steps=10",
    # A few minutes on a CPU; made the tables in results/quick.
    "glyphs": "--num_inner_steps=30 --max_support_sets=4",
    "fast": "--domains=",  # what the trainers' recipe fast has trained
    # Made the tables in results/best.
    "best": "--domains=mnist --finetune=protonet",
    "papers": "--num_episodes=2000 --k_shots=1,5 --domains=",
    # Made the tables in results/tutorial and results/tutorial_maml.
    "reproduction": "--domains=mnist",
    "reproduction_maml": "--domains=mnist",
}
# How a model adapts, by recipe, on its own data set's test classes and on unseen domains, per k.
COLUMNS = "num_inner_steps lr_inner lr_output finetune_steps finetune_lr max_support_sets".split()
DEFAULT_ADAPTATION = (200, 0, 0, 40, 0.001, 0)  # in a recipe without a table


def tutorials_way(*sets):
    """Return DEFAULT_ADAPTATION for k = 2, 4, 8, 16 and 32, on so many support sets at most."""
    return {k: (*DEFAULT_ADAPTATION[:5], most) for k, most in zip((2, 4, 8, 16, 32), sets)}


ADAPTATION = {
    "reproduction": {"unseen": tutorials_way(30, 30, 12, 6, 6)},
    "reproduction_maml": {
        "own": tutorials_way(30, 30, 20, 10, 10),
        "unseen": tutorials_way(30, 30, 12, 6, 6),
    },
    # Chosen on the validation classes and on glyph_digits; see docs/speedrun.md, experiments.md.
    "fast": {
        "own": {
            **dict.fromkeys((2, 4, 8), (10, 0.0001, 0.02, 0, 0.0001, 0)),
            **dict.fromkeys((16, 32), (200, 0.05, 0.05, 0, 0.0001, 0)),
        }
    },
    "best": {
        "own": {
            **dict.fromkeys((2, 4, 8), (10, 0.0001, 0.02, 0, 0.0001, 0)),
            16: (10, 0.0001, 0.02, 40, 0.0001, 0),
            32: (200, 0.004, 0.004, 40, 0.0001, 0),
        },
        "unseen": {
            2: (20, 0.004, 0.02, 40, 0.001, 30),
            4: (20, 0.004, 0.02, 160, 0.001, 30),
            8: (200, 0.02, 0.02, 320, 0.002, 12),
            16: (200, 0.02, 0.02, 320, 0.002, 6),
            32: (200, 0.02, 0.02, 320, 0.002, 6),
        },
    },
}


def main(cfg):
    device = pick_device(cfg.device, cfg.precision)
    results_dir = cfg.results_dir or os.path.join("results", cfg.dataset)
    checkpoints = on_first(lambda: load_checkpoints(cfg))
    image_sets, val, trained_split, failures = load_image_sets(cfg, checkpoints)

    models = []
    for model, checkpoint in checkpoints.items():
        models.append((model, checkpoint))
        if model in cfg.finetune:
            models.append((f"{model}_finetuned", checkpoint))
    # Nearest class mean on 32x32 pixels, normalised as for the first model: no learning at all.
    models.append(("pixels", {**models[0][1], "model": "pixels"}))
    for (image_set, k_shots), model in product(image_sets, models):
        for k_shot in k_shots:
            test_settings(cfg, *model, image_set, k_shot)  # raises now rather than after hours
    on_first(partial(require_writable, results_dir))
    test = partial(test_model, cfg, results_dir, device)
    rows = [row for each, model in product(image_sets, models) for row in test(*each, *model)]
    of = {model: checkpoint["encoder"].get("name", "densenet") for model, checkpoint in models}
    of["pixels"] = ""
    rows = [{**row, "split": trained_split, "encoder": of[row["model"]]} for row in rows]

    if is_first():
        print(tables.text_table(rows, failures))
        tables.write_tables(rows, failures, results_dir, how_it_was_made(checkpoints))
        draw_figures(cfg, results_dir, val, rows)
        for model, checkpoint in checkpoints.items():  # the first that takes the nearest prototype
            if not kshot.adaptation(checkpoint["config"]):
                draw_features(image_sets[0][0], model, checkpoint, device, results_dir)
                break
        print(f"tables and figures: {results_dir}{os.sep}")
    return 1 if failures else 0


def load_checkpoints(cfg):
    """Return {model: checkpoint}; a checkpoint carries its path and file_sha256, too."""
    checkpoints = {}
    for path in find_checkpoints(cfg.dataset, cfg.models):
        checkpoint = load_checkpoint(path)
        model, trained_on = checkpoint["model"], checkpoint["dataset"]
        if trained_on not in ("", cfg.dataset):  # a pretrained network names none
            dataset = shell_command(f"--dataset={trained_on}")
            raise UserError(f"{path} was trained on {trained_on}; pass {dataset}")
        if model in checkpoints:  # named by its folder, too: checkpoints/best/cifar100/...
            model += f" ({Path(path).absolute().parent.parent.name})"
        if model in checkpoints:
            both = f"{checkpoints[model]['path']} and {path}"
            raise UserError(f"{both} both hold a {model}; test one at a time, --models=FILE")
        encoder = encoder_of(checkpoint, path)  # it can be built, or this raises
        digest = sha256(path) if trained_on else content_digest(checkpoint["state_dict"])
        code = encoder.arguments.get("file_sha256")  # of an encoder of one's own
        if code != checkpoint["encoder"].get("file_sha256"):
            digest = content_digest([digest, code])
        checkpoints[model] = {**checkpoint, "path": path, "file_sha256": digest}
    if absent := set(cfg.finetune) - set(checkpoints):
        found = ", ".join(checkpoints)
        raise UserError(f"finetune names {min(absent)}, which is not tested; take some of {found}")
    order = [*tables.TITLES, *checkpoints]  # the known ones first
    return {model: checkpoints[model] for model in sorted(checkpoints, key=order.index)}


def load_image_sets(cfg, checkpoints):
    """Load what is tested: the held-out classes of the training data set, and the unseen domains.

    Returns (pairs of an ImageSet and the k that it allows, an ImageSet to draw an episode of, the
    name of the class split of the training, {what cannot be tested: why}). Of several things, those
    that can be tested are worth having. Raises UserError where nothing can.
    """
    # A pretrained network takes images of any size; it has no split.
    first, *others = [each for each in checkpoints.values() if each["dataset"]] or [None]
    shape = first and first["image_shape"]
    largest = max(each["image_shape"][0] for each in checkpoints.values())
    split = first and split_of_training(first, checkpoints)
    for other in others:
        if other["image_shape"] != shape or split_of_training(other, checkpoints) != split:
            raise UserError(
                f"{first['path']} and {other['path']} differ in classes or image sizes of their "
                "training; test them one at a time, --models=FILE"
            )
    domains = DEFAULT_DOMAINS.get(cfg.dataset, ()) if cfg.domains == ("auto",) else cfg.domains
    found, failures, val, trained_split = [], {}, None, ""
    for name in (cfg.dataset, *domains):
        own = name == cfg.dataset
        # Who tests a folder of their own need not download what the models were trained on.
        download = not own or set(domains) <= set(SOURCES)
        try:
            image_set = on_first(partial(load_images, cfg, name, shape, largest, download))
            if own:
                split = split or class_split("auto", image_set)
                # In the known ones the order of the images may differ.
                digests = {each.get("data_digest") for each in checkpoints.values()} - {None}
                if name not in SOURCES and digests - {image_set.digest()}:
                    print(f"{name} has changed: models may have been trained on test images")
                trained_split = split_name(split, image_set)
                val = image_set.of_classes(split["val"])
                image_set = image_set.of_classes(split[cfg.classes])
        except UserError as error:
            if own and not domains:
                raise
            failures[name] = str(error)
            continue
        allowed = []
        for k_shot in cfg.k_shots:  # now rather than after an hour
            try:
                draw_tasks(cfg, image_set, k_shot)
                allowed.append(k_shot)
            except UserError as error:
                failures[f"{name}, k = {k_shot}"] = str(error)
        found += [(image_set, allowed)] if allowed else []
    if not found:
        raise UserError("; ".join(f"{name}: {why}" for name, why in failures.items()))
    return found, val or found[0][0], trained_split, failures


def split_of_training(checkpoint, checkpoints):
    """Return a checkpoint's split; the tutorial's files carry none, theirs is that of the names."""
    splits = [each["class_split"] or {} for each in checkpoints.values()]
    names = sorted(name for part in max(splits, key=len).values() for name in part)
    return checkpoint["class_split"] or (split_classes(names) if names else {})


def load_images(cfg, name, shape, largest, download):
    """Return the ImageSet `name`, whose images must have the `shape` of training.

    Without one they may have any; those of a folder get the side `largest`.
    """
    if not download and not is_there(name, cfg.data_dir):
        raise UserError(f"it is not in {cfg.data_dir}; without a domain of yours it is downloaded")
    is_folder = name not in SOURCES and Path(cfg.data_dir, name).is_dir()
    side = shape[0] if shape else largest if is_folder else 32
    image_set = load_dataset(name, cfg.data_dir, side)
    if shape and (found := list(image_set.images.shape[2:])) != list(shape):
        raise UserError(f"the images of {name} are {found} pixels, {list(shape)} are needed")
    return image_set


def draw_tasks(cfg, image_set, k_shot, max_support_sets=0):
    """Return the tasks of a test at k: a tensor as in common/kshot.py."""
    labels, names = image_set.labels, image_set.class_names
    if not cfg.num_episodes:
        return kshot.support_sets(labels, k_shot, names, max_support_sets)
    return kshot.random_episodes(labels, cfg.n_way, k_shot, cfg.n_query, cfg.num_episodes, names)


def test_settings(cfg, model, checkpoint, image_set, k_shot):
    """Return what beside checkpoint and data decides a result, as its row says it."""
    other = {}
    if cfg.num_episodes:
        names = ("n_way", "n_query", "num_episodes")
        other = {"protocol": "episodes", **{name: getattr(cfg, name) for name in names}}
    if model == "pixels":
        return other
    # Compared with the original defaults: Config may have been edited.
    for name, plain in (("views", 1), ("min_view_area", 0.7), ("precision", "float32")):
        if (value := getattr(cfg, name)) != plain:
            other[name] = value
    where = "own" if image_set.name == cfg.dataset else "unseen"
    table = ADAPTATION.get(cfg.recipe, {}).get(where, {})
    given = dict(zip(COLUMNS, table.get(k_shot, DEFAULT_ADAPTATION)))
    given |= {name: getattr(cfg, name) for name in given if getattr(cfg, name) >= 0}
    if model.endswith("_finetuned"):
        how = {name: given[name] for name in COLUMNS[3:5]}
    else:
        overrides = {name: given[name] for name in COLUMNS[:3]}
        how = kshot.adaptation(checkpoint["config"], **overrides)
        how = dataclasses.asdict(how) if how else {}
    if how and table and k_shot not in table:
        raise UserError(
            f"--recipe={cfg.recipe} has no k = {k_shot}; add it to ADAPTATION in evaluate.py, or "
            f"pass --k_shots out of {show(tuple(table))}"
        )
    if how and not cfg.num_episodes and how.get("finetune_steps") != 0:
        other["max_support_sets"] = given["max_support_sets"]
    return {**how, **other}


def test_model(cfg, results_dir, device, image_set, k_shots, model, checkpoint):
    """Return one result row per k, each kept on disk as soon as it is there, for the next run."""
    identity = {
        "code_sha256": code_of_test(),
        "model": model,
        "dataset": image_set.name,
        "classes": cfg.classes if image_set.name == cfg.dataset else "all",
        "trained_on": cfg.dataset,
        "checkpoint_sha256": None if model == "pixels" else checkpoint["file_sha256"],
        "data_sha256": image_set.digest(),
    }
    rows, missing = {}, {}
    for k_shot in k_shots:
        settings = test_settings(cfg, model, checkpoint, image_set, k_shot)
        row = {**identity, "k_shot": k_shot, "settings": settings}
        key = json.dumps([row, checkpoint["mean"], checkpoint["std"]], sort_keys=True)
        name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        path = os.path.join(results_dir, ".cache", name)
        if found := on_first(partial(read_kept, path, row)):
            rows[k_shot] = found
            print(f"{model} on {image_set.name}, k = {k_shot}: reused, same as before ({path})")
        else:
            tasks = draw_tasks(cfg, image_set, k_shot, settings.get("max_support_sets", 0))
            missing[k_shot] = (row, path, tasks)
    if not missing:
        return list(rows.values())

    encoder = encoder_of(checkpoint, checkpoint["path"]) if model != "pixels" else None
    n_way = cfg.n_way if cfg.num_episodes else len(image_set.class_names)
    total = sum(len(tasks) for _, _, tasks in missing.values())
    options = {"leave": False, "dynamic_ncols": True, "disable": not is_first()}
    with tqdm(desc=f"{model} on {image_set.name}", total=total, **options) as bar:
        test = prepare_test(cfg, encoder, checkpoint, image_set.to(device), n_way, bar)
        for k_shot, (row, path, tasks) in missing.items():
            accuracy, std, ci95 = kshot.summarize(test(tasks, k_shot, row["settings"]))
            row |= {"n_way": n_way, "accuracy": accuracy, "std": std, "ci95": ci95}
            row["num_episodes" if cfg.num_episodes else "num_support_sets"] = len(tasks)
            queries = cfg.n_query if cfg.num_episodes else len(image_set.labels) / n_way - k_shot
            row["num_queries"] = round(n_way * queries)
            if cfg.num_episodes:
                row["parameters"] = sum(p.numel() for p in encoder.parameters()) if encoder else 0
            rows[k_shot] = row
            if is_first():
                write_text(path, json.dumps({**row, "digest": content_digest(row)}) + "\n")
    return [rows[k_shot] for k_shot in k_shots]


@functools.cache
def code_of_test():
    """Return a digest of the code that a result follows from, but for its comments."""
    names = "augment cuda_graph data encoders fast_densenet finetune inner_loop kshot parallel "
    names += "prototypes samplers"
    code = [Path(ROOT, "common", f"{name}.py").read_text("utf-8") for name in names.split()]
    code += map(inspect.getsource, (prepare_test, *LOGITS.values()))
    return content_digest([ast.dump(ast.parse(text)) for text in code])


def read_kept(path, wanted):
    """Return the result row kept in `path`, or None where there is none that can be used.

    wanted: what the row must say of model, data and settings.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # not a row
        with open(path, encoding="utf-8") as file:
            row = json.load(file)
        if row.pop("digest") == content_digest(row) and row.items() >= wanted.items():
            return row
    return None


def prepare_test(cfg, encoder, checkpoint, image_set, n_way, bar):
    """Return the function (tasks, k, settings) -> accuracies of a model on a data set.

    encoder: of the checkpoint; None: the pixels are the features. bar: shows how far it is.
    """
    labels = image_set.labels
    if encoder:
        encoder.to(labels.device).precision = cfg.precision
    normalized = partial(normalize, mean=checkpoint["mean"], std=checkpoint["std"])
    views = Views(image_set.images, cfg.views, normalized, cfg.min_view_area)

    @functools.cache
    def features():  # [N, D]
        if encoder:
            options = {"leave": False, "dynamic_ncols": True, "disable": bar.disable}
            return kshot.mean_features(encoder, views, partial(tqdm, desc="features", **options))
        shrink = partial(F.interpolate, size=(32, 32), mode="area")
        small = [shrink(normalized(batch)) for batch in batches(views.images, 100)]
        return torch.cat(small).flatten(1)

    def progress(tasks):
        for task in tasks:
            yield task
            bar.update(process_count())

    def test(tasks, k_shot, settings):
        bar.set_postfix(k=k_shot)
        how = kshot.adaptation(
            settings, settings.get("finetune_steps"), settings.get("finetune_lr")
        )
        if how:
            where = (encoder, views, labels, tasks, n_way, k_shot, how, progress, cfg.cuda_graphs)
            return kshot.adapted_accuracies(*where)
        logits_of = LOGITS.get(checkpoint["model"], linear_logits)
        where = (features(), labels, tasks, n_way, k_shot, progress, logits_of)
        return kshot.nearest_prototype_accuracies(*where)

    return test


def how_it_was_made(checkpoints):
    """Return the command and the checkpoints of a test, as Markdown."""
    lines = [f"\n    {shell_command('python', 'evaluate.py', *sys.argv[1:])}\n"]
    for each in checkpoints.values():
        epochs = each["config"].get("epochs", "?")  # the tutorial's files do not say
        epoch = f" epoch {each['epoch']} of {epochs}," if each["dataset"] else ""
        lines.append(f"- {each['path']},{epoch} SHA-256 {each['file_sha256'][:12]}...")
    return "\n".join(lines) + "\n"


def draw_figures(cfg, results_dir, val, rows):
    """Draw an episode of the ImageSet `val` and, for each tested data set, accuracy over k."""
    where = partial(os.path.join, results_dir)
    n_way = min(5, len(val.class_names))
    if k_shot := min(4, torch.bincount(val.labels).min().item() // 2):
        episode = kshot.random_episodes(val.labels, n_way, k_shot, k_shot, 1, val.class_names)[0]
        figures.plot_episode(val, episode, n_way, k_shot, where("few_shot_batch"))
    for name in dict.fromkeys(row["dataset"] for row in rows):
        of_set = [row for row in rows if row["dataset"] == name]
        if len({row["k_shot"] for row in of_set}) == 1:
            continue
        part = {"test": "Test", "val": "Validation", "all": "All"}[of_set[0]["classes"]]
        tested = tables.name_of(name, rows[0]["split"]) if name == cfg.dataset else name
        title = f"{part} classes of {tested}" + tables.variant(vars(cfg))
        figures.plot_accuracy_over_k(of_set, title, where(f"models_{name}"))


def draw_features(image_set, model, checkpoint, device, results_dir):
    """Draw the features of some test images by the untrained and by the trained encoder."""
    names = image_set.class_names[:10]
    count = min(40, torch.bincount(image_set.labels).min().item())
    rows = [torch.nonzero(image_set.labels == c)[:count, 0] for c in range(len(names))]
    labels = episode_labels(len(names), count)
    shown = ImageSet(image_set.name, image_set.images[torch.cat(rows)], labels, names)
    torch.manual_seed(0)
    size = checkpoint["image_shape"][0]
    untrained = Encoder(**checkpoint["encoder"], image_size=size, weights=False).eval()
    normalized = partial(normalize, mean=checkpoint["mean"], std=checkpoint["std"])
    features = {}
    for title, encoder in (
        ("untrained", untrained),
        (tables.title_of(model), encoder_of(checkpoint, checkpoint["path"])),
    ):
        images = shown.images.to(device)
        features[title] = encode_in_batches(encoder.to(device), images, normalized).cpu()
    if count > 1 and encoder.num_features > 1:
        k_shot = min(5, count // 2)
        figures.plot_features(shown, features, k_shot, os.path.join(results_dir, "features"))


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
