"""Test trained models: accuracy on new classes after seeing k images of each; tables and figures.

    python evaluate.py                                          the checkpoints in checkpoints/cifar100, and SVHN as unseen domain
    python evaluate.py --dataset=glyphs --num_inner_steps=30 --max_support_sets=4   the built-in data set, nothing to download
    python evaluate.py --protonet=FILE --domains=mnist          one checkpoint of yours, or of the tutorial's author
    python evaluate.py --max_support_sets=10                    fewer adaptations of ProtoMAML and MAML, for a slow machine

Writes accuracy.json, .csv and .md and the figures into results/. What is already there for the same checkpoint, data
and settings is not computed again.

On 2 CPU cores a ProtoNet's complete test on CIFAR-100 and one domain takes 20 s. An adaptation of 200 steps takes about
50 s at k = 32, so test ProtoMAML there on some support sets: the glyphs line takes about 5 minutes.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from common.checkpoint import MODEL_NAMES, encoder_of, load_checkpoint
from common.config import LARGEST_RATE, UserError, require_at_least, require_at_most, require_one_of, require_positive, run_script
from common.data import load_dataset, normalize, split_classes
from common.device import pick_device
from common.encoder import encode_in_batches
from common.figures import plot_accuracy_over_k, plot_episode, plot_examples
from common.files import sha256, write_text
from common.kshot import adapted_accuracies, nearest_prototype_accuracies, summarize, support_sets
from common.samplers import FewShotBatchSampler
from common.tables import text_table, write_tables

PROTOCOL = 1  # version of the test: a change of it makes kept results useless
DEFAULT_DOMAINS = {"cifar100": ("svhn",), "glyphs": ("glyph_digits",)}


@dataclass
class Config:
    # data
    dataset: str = "cifar100"  # data set that the models were trained on; its test classes are tested first
    domains: tuple[str, ...] = ("auto",)  # further data sets, tested on all their classes; auto: svhn for cifar100, glyph_digits for glyphs
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    # models
    checkpoint_dir: str = "checkpoints"  # the checkpoints in <checkpoint_dir>/<dataset>/ are tested, unless files are named:
    protonet: str = ""  # checkpoint of a ProtoNet
    protomaml: str = ""  # checkpoint of a ProtoMAML
    maml: str = ""  # checkpoint of a MAML
    # test
    classes: str = "test"  # held-out classes of the data set: test for the final table, val to choose settings on
    k_shots: tuple[int, ...] = (2, 4, 8, 16, 32)  # support images per class, one test for each
    num_inner_steps: tuple[int, ...] = (200,)  # SGD steps of ProtoMAML and MAML on a support set; one number, or one per k
    lr_inner: tuple[float, ...] = ()  # their learning rate for the encoder; one, or one per k; empty: as in training
    lr_output: tuple[float, ...] = ()  # their learning rate for the output layer; one, or one per k; empty: as in training
    domain_num_inner_steps: tuple[int, ...] = ()  # the same three for unseen domains, which lie further off; empty: as above
    domain_lr_inner: tuple[float, ...] = ()  # one, or one per k
    domain_lr_output: tuple[float, ...] = ()  # one, or one per k
    mirror: bool = False  # see every image together with its mirror image: features, and logits after adaptation, are means
    max_support_sets: int = 0  # support sets per k for ProtoMAML and MAML, spread evenly; 0: all
    # run
    device: str = "auto"  # auto, cuda, mps or cpu
    results_dir: str = "results"  # where tables and figures go

    def __post_init__(self):
        inner_loop = ("num_inner_steps", "lr_inner", "lr_output")
        in_domains = tuple(f"domain_{name}" for name in inner_loop)
        require_at_least(self, 1, "k_shots", "num_inner_steps", "domain_num_inner_steps")
        require_at_least(self, 0, "max_support_sets")
        require_positive(self, *inner_loop[1:], *in_domains[1:])
        require_at_most(self, LARGEST_RATE, *inner_loop[1:], *in_domains[1:])
        require_one_of(self, "classes", ("test", "val"))
        for name in (*inner_loop, *in_domains):
            found = len(getattr(self, name))
            if found not in (1, len(self.k_shots)) and (found or name == "num_inner_steps"):
                raise UserError(f"{name} has {found} numbers for {len(self.k_shots)} values of k; pass one number, or one for each k")
        for name in ("k_shots", "domains"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name == "k_shots" and not values):
                raise UserError(f"{name} is {','.join(map(str, values)) or 'empty'}; name each value once, --k_shots=2,4,8 for example")
        if "auto" in self.domains and len(self.domains) > 1:
            raise UserError(f"domains is {','.join(self.domains)}, but auto stands alone; name the data sets instead")
        if self.dataset in self.domains:
            raise UserError(f"{self.dataset} is the data set of the training classes and cannot be an unseen domain; take it out of --domains")


def main(cfg):
    device = pick_device(cfg.device)
    checkpoints = load_checkpoints(cfg)
    data = load_dataset(cfg.dataset, cfg.data_dir)
    split = common_split(checkpoints, data)

    domains = DEFAULT_DOMAINS.get(cfg.dataset, ()) if cfg.domains == ("auto",) else cfg.domains
    tested = [data.of_classes(split[cfg.classes])]
    failures = {}
    for domain in domains:
        try:
            tested.append(load_dataset(domain, cfg.data_dir))
        except UserError as error:  # the rest is worth having
            failures[domain] = str(error)
    for image_set in tested:
        for k_shot in cfg.k_shots:
            support_sets(image_set.labels, k_shot, image_set.class_names)  # raises now rather than after an hour

    rows = []
    for image_set in tested:
        classes = cfg.classes if image_set is tested[0] else "all"
        for model, (path, checkpoint) in checkpoints.items():
            rows += test_model(cfg, model, path, checkpoint, image_set, classes, device)
        # Nearest class mean on the normalised pixels: what is to be had without learning.
        path, checkpoint = next(iter(checkpoints.values()))
        rows += test_model(cfg, "pixels", path, checkpoint, image_set, classes, device)

    print(text_table(rows, failures))
    write_tables(rows, failures, cfg.results_dir)
    draw_figures(cfg, data, split, tested, rows)
    print(f"tables and figures: {cfg.results_dir}{os.sep}")
    return 1 if failures else 0


def load_checkpoints(cfg):
    """Return {model: (path, checkpoint)} of the named files, or of those in the data set's checkpoint folder."""
    named = {model: getattr(cfg, model) for model in MODEL_NAMES if getattr(cfg, model)}
    folder = os.path.join(cfg.checkpoint_dir, cfg.dataset)
    at_hand = {model: os.path.join(folder, f"{model}.pt") for model in MODEL_NAMES}
    paths = named or {model: path for model, path in at_hand.items() if os.path.exists(path)}
    if not paths:
        raise UserError(f"found no checkpoint in {folder}; train one first (python train_protonet.py --dataset={cfg.dataset}) or name a file (--protonet=FILE)")
    checkpoints = {model: (path, load_checkpoint(path)) for model, path in paths.items()}
    for model, (path, checkpoint) in checkpoints.items():
        if checkpoint["model"] != model:
            raise UserError(f"{path} holds a {checkpoint['model']}, not a {model}; pass it as --{checkpoint['model']}={path}")
        if checkpoint["dataset"] != cfg.dataset:
            raise UserError(f"{path} was trained on {checkpoint['dataset']}; pass --dataset={checkpoint['dataset']}")
        encoder_of(checkpoint, path)
    return checkpoints


def common_split(checkpoints, data):
    """Return the class split that the checkpoints carry; the tutorial's files carry none and were trained on the default one."""
    splits = {path: checkpoint["class_split"] or split_classes(data.class_names) for path, checkpoint in checkpoints.values()}
    (first_path, first), *others = splits.items()
    for path, split in others:
        if split != first:
            raise UserError(f"{first_path} and {path} were trained on different classes, so one table cannot hold both; test them one at a time")
    return first


def test_model(cfg, model, path, checkpoint, image_set, classes, device):
    """Return one result row per k; each is kept on disk as soon as it is there, and reused by the next run."""
    identity = {
        "protocol": PROTOCOL,
        "model": model,
        "dataset": image_set.name,
        "classes": classes,
        "trained_on": cfg.dataset,
        "checkpoint_sha256": None if model == "pixels" else sha256(path),
        "data_sha256": image_set.digest(),
    }
    accuracies_of = None  # made on first use: reading results that are there needs no features
    rows = []
    for position, k_shot in enumerate(cfg.k_shots):
        identity["k_shot"] = k_shot
        identity["settings"] = settings = test_settings(cfg, model, checkpoint, position, in_domain=classes == "all")
        key = hashlib.sha256(json.dumps([identity, checkpoint["mean"], checkpoint["std"]], sort_keys=True).encode()).hexdigest()
        kept = os.path.join(cfg.results_dir, ".cache", f"{key[:32]}.json")
        row = read_kept(kept)
        if row:
            print(f"{model} on {image_set.name}, k = {k_shot}: reused, same checkpoint, data and settings")
        else:
            accuracies_of = accuracies_of or prepare_test(model, path, checkpoint, image_set, device, cfg.mirror)
            sets = support_sets(image_set.labels, k_shot, image_set.class_names, settings.get("max_support_sets", 0))
            bar = partial(tqdm, desc=f"{model} on {image_set.name}, k = {k_shot}", leave=False, dynamic_ncols=True)
            accuracies = accuracies_of(sets, settings, bar)
            accuracy, std, ci95 = summarize(accuracies)
            row = {
                **identity,
                "n_way": len(image_set.class_names),
                "accuracy": accuracy,
                "std": std,
                "ci95": ci95,
                "num_support_sets": len(sets),
                "num_queries": len(image_set.labels) - sets.shape[1],
            }
            write_text(kept, json.dumps(row) + "\n")
        rows.append(row)
    return rows


def test_settings(cfg, model, checkpoint, position, in_domain):
    """Return what else decides a result: mirror images, and the inner loop at this k for models that adapt."""
    mirror = {"mirror": True} if cfg.mirror else {}
    if model == "pixels":
        return {}
    if model == "protonet":
        return mirror
    trained = checkpoint["config"]
    settings = {"output_init": trained.get("output_init", "prototypes"), "batchnorm": trained.get("batchnorm", "batch")}
    for name in ("num_inner_steps", "lr_inner", "lr_output"):
        values = (in_domain and getattr(cfg, f"domain_{name}")) or getattr(cfg, name) or (trained[name],)
        settings[name] = values[position] if len(values) > 1 else values[0]
    return {**settings, **mirror, "max_support_sets": cfg.max_support_sets}


def prepare_test(model, path, checkpoint, image_set, device, mirror):
    """Return the function (sets, settings, progress) -> accuracies [S] of a model on a data set."""
    image_set = image_set.to(device)
    n_way = len(image_set.class_names)
    images = normalize(image_set.images, checkpoint["mean"], checkpoint["std"])  # [N, 3, H, W]
    encoder = encoder_of(checkpoint, path).to(device)
    if model in ("protomaml", "maml"):

        def accuracies_of(sets, settings, progress):
            inner_loop = {name: value for name, value in settings.items() if name not in ("mirror", "max_support_sets")}
            return adapted_accuracies(encoder, images, image_set.labels, sets, n_way, inner_loop, progress, mirror)

        return accuracies_of
    features = images.flatten(1) if model == "pixels" else encode_in_batches(encoder, images, mirror=mirror)  # [N, D]
    return lambda sets, settings, progress: nearest_prototype_accuracies(features, image_set.labels, sets, n_way, progress)


def read_kept(path):
    """Return the result row kept in `path`, or None where there is none or it cannot be read (it is then made anew)."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def draw_figures(cfg, data, split, tested, rows):
    """Draw the data sets, one validation episode, ProtoNet alone and all models over k."""
    where = partial(os.path.join, cfg.results_dir)
    for image_set in (data, *tested[1:]):
        plot_examples(image_set, where(f"examples_{image_set.name}"))
    val = data.of_classes(split["val"])
    n_way, k_shot = min(5, len(val.class_names)), min(4, torch.bincount(val.labels).min().item() // 2)
    if k_shot:
        episode = FewShotBatchSampler(val.labels, n_way, k_shot, include_query=True, seed=0, class_names=val.class_names).episodes()[0]
        plot_episode(val, episode, n_way, k_shot, where("few_shot_batch"))
    for image_set in tested:
        of_set = [row for row in rows if row["dataset"] == image_set.name]
        models = [model for model in ("pixels", *MODEL_NAMES) if any(row["model"] == model for row in of_set)]
        title = f"{'All' if image_set is not tested[0] else 'Test' if cfg.classes == 'test' else 'Validation'} classes of {image_set.name}"
        title += ", mirrored" if cfg.mirror else ""
        plot_accuracy_over_k(of_set, models, title, where(f"models_{image_set.name}"))
        if image_set is tested[0] and "protonet" in models:
            plot_accuracy_over_k(of_set, ["protonet"], f"ProtoNet: {title.lower()}", where(f"protonet_{image_set.name}"))


if __name__ == "__main__":
    run_script(main, Config)
