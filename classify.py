"""Classify a folder of images, given a few labelled ones of each class; any trained model serves.

    python classify.py --support=FOLDER --images=FOLDER
    python classify.py --support=FOLDER --images=FOLDER --model=checkpoints/cifar100/protonet.pt
    python classify.py --support=FOLDER --images=FOLDER --finetune_steps=160   # unlike CIFAR-100

The support folder has one folder per class with one image or more, FOLDER/cat/1.jpg; the images to
classify lie in the other folder, not in folders below it. They may be of any size and shape: the
middle of each is brought to the size that the model was trained on. The model need not know the
classes.

Prints a table, and writes classified.csv and contact sheets of 100 images each, classified.png,
classified-2.png and so on, into results/classify/. It also tells how much to trust them: each
support image, or 20 of them where the model adapts, is classified with the help of all others
(leave-one-out), which is a little harder, as one image of its class is missing. With few images per
class the probabilities are too high: for five validation classes of CIFAR-100, the classifier's
average 86 to 88 %, while 61, 69, 79 and 86 % of the images are classified correctly with 1, 2, 5
and 20 support images per class.

A classifier or a ProtoNet takes the nearest prototype, the mean of all support images of a class:
some seconds. Fine-tuned, and always in ProtoMAML and MAML, the model adapts to the support set, and
once more for every support image left out: a few minutes.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.augment import Views
from common.checkpoint import ADAPTING, ROW_NAMES, encoder_of, image_shape, load_checkpoint
from common.config import UserError, require
from common.data import normalize
from common.device import pick_device
from common.encoder import encode_in_batches
from common.figures import plot_contact_sheet
from common.images import (
    IMAGE_SUFFIXES,
    list_folder,
    list_images,
    print_unused,
    read_images,
    read_labelled,
    shown,
)
from common.inner_loop import FineTuning, InnerLoop, adapt_for_test
from common.kshot import mean_features, spread_evenly
from common.parallel import Workers
from common.prototypes import distance_logits
from common.script import run_script
from common.tables import classified_table, write_classified

IMAGES_PER_SHEET = 100
THUMBNAIL = 160  # pixels


@dataclass
class Config:
    # data
    support: str = ""  # folder with one folder of labelled images per class; required
    images: str = ""  # folder of the images to classify; required
    # model
    model: str = "checkpoints/cifar100/classifier.pt"  # checkpoint of any kind
    # inner loop of MAML and ProtoMAML
    num_inner_steps: int = 0  # SGD steps on the support set; 0: as in training
    lr_inner: float = 0.0  # learning rate for the encoder; 0: as in training
    lr_output: float = 0.0  # learning rate for the output layer; 0: as in training
    # fine-tuning, of any model
    finetune_steps: int = 0  # steps of Adam on episodes of the support set; 0: none
    finetune_lr: float = 1e-3  # learning rate of these steps
    # of all that adapts
    max_left_out: int = 20  # support images left out, an adaptation for each; 0: all
    # result
    unsure: float = 0.5  # images whose probability is below this are marked
    # run
    device: str = "auto"  # auto, cuda, mps or cpu
    results_dir: str = "results/classify"  # where table and contact sheets go

    def __post_init__(self):
        require(self, "num_inner_steps", "lr_inner", "lr_output", "max_left_out", least=0)
        require(self, "finetune_steps", least=0)
        require(self, "finetune_lr", above=0)
        require(self, "unsure", least=0, most=1)


def main(cfg):
    class_files, files = list_files(cfg)
    device = pick_device(cfg.device)
    checkpoint = load_checkpoint(cfg.model)
    encoder = encoder_of(checkpoint, cfg.model).to(device)
    how = inner_loop_of(cfg, checkpoint)  # None: by nearest prototype

    size, width = image_shape(checkpoint) or (32, 32)
    if size != width:
        raise UserError(
            f"{cfg.model} was trained on images of {width}x{size} pixels, but photographs are made "
            "square; pass a model of square images"
        )
    images, labels, class_names, files, failures = read_labelled(class_files, files, size)
    normalized = partial(normalize, mean=checkpoint["mean"], std=checkpoint["std"])
    support, images = images.to(device).split([len(labels), len(files)])
    support, images = Views(support, normalize=normalized), normalized(images)  # [N, 3, H, W]
    left_out = choose_left_out(labels, class_names, cfg.max_left_out if how else 0)
    method = partial(by_adaptation, inner_loop=how) if how else by_nearest_prototype
    logits, logits_left_out = method(encoder, support, labels, images, left_out)  # [N, C], [L, C]

    rows = result_rows(files, class_names, logits)
    print(classified_table(rows))
    print(what_to_expect(logits_left_out, labels[left_out]))
    unsure = sum(row["probability"] < cfg.unsure for row in rows)
    print(f"unsure, with a probability below {100 * cfg.unsure:g} %: {unsure} of {len(rows)}")
    write_classified(rows, os.path.join(cfg.results_dir, "classified.csv"))
    row = checkpoint["model"] + ("_finetuned" if cfg.finetune_steps else "")
    draw_contact_sheets(cfg, rows, files, class_names, ROW_NAMES[row])
    print(f"table and contact sheets: {cfg.results_dir}{os.sep}")
    return 1 if failures else 0


def inner_loop_of(cfg, checkpoint):
    """Return how the model adapts, an InnerLoop or FineTuning, or None where it does not."""
    if cfg.finetune_steps:
        return FineTuning(cfg.finetune_steps, cfg.finetune_lr)
    if checkpoint["model"] in ADAPTING:
        names = ("num_inner_steps", "lr_inner", "lr_output")
        options = {name: getattr(cfg, name) for name in names}
        return InnerLoop.of(checkpoint["config"], **options)
    return None


def list_files(cfg):
    """Return {class name: paths of its images} and the paths of the images to classify.

    Raises UserError where a folder is missing, empty, or both are one.
    """
    for name, needed in (
        ("support", "a folder with one folder of labelled images per class"),
        ("images", "the folder of the images to classify"),
        ("results_dir", "a folder for the results"),
    ):
        if not getattr(cfg, name):
            raise UserError(f"{name} is empty, but needed: {needed}; pass --{name}=FOLDER")
    support, folder = Path(cfg.support), Path(cfg.images)
    class_folders = [path for path in list_folder(support) if path.is_dir()]
    files = list_images(folder)
    if folder.resolve() in [path.resolve() for path in (support, *class_folders)]:
        raise UserError(
            f"{folder} is the support folder or one of its classes; put the images to classify "
            "into a folder of their own, --images=FOLDER"
        )
    results = Path(cfg.results_dir).resolve()
    if results == folder.resolve() or results.parent == support.resolve():
        raise UserError(
            f"the contact sheets in {cfg.results_dir} would be taken for images the next time; "
            "pass another --results_dir=FOLDER"
        )
    if not files:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"{folder} holds no image ({kinds}); put the images to classify there")
    class_files = {shown(path.name): list_images(path) for path in class_folders}
    used = {support, *class_folders, *files}.union(*class_files.values())
    for each in (folder, support, *class_folders):
        print_unused(each, sorted(set(list_folder(each)) - used))
    return class_files, files


def choose_left_out(labels, class_names, most):
    """Return the support images to be left out, one at a time, int64 [L]: positions in `labels`.

    They are all images of classes with at least two, or `most` of them, evenly spread (0: all).
    """
    shots = torch.bincount(labels)
    single = [name for name, count in zip(class_names, shots.tolist()) if count == 1]
    if single:
        print(f"classes of one image, which cannot be left out: {', '.join(single)}")
    left_out = torch.nonzero(shots[labels] > 1)[:, 0]
    return spread_evenly(left_out, most)


def by_nearest_prototype(encoder, support, labels, images, left_out):
    """Return the logits of the images [N, C] and of the support images left out [L, C], float64.

    support: the Views of S images with labels int64 [S]; images [N, 3, H, W], normalised; left_out
    int64 [L]: support images, each of which is compared with prototypes made without it.
    """
    # On the CPU: not every device has float64.
    support = mean_features(encoder, support).cpu().double()  # [S, D]
    images = encode_in_batches(encoder, images).cpu().double()  # [N, D]
    prototypes = torch.stack([support[labels == c].mean(dim=0) for c in labels.unique()])  # [C, D]
    logits = torch.cat([distance_logits(batch, prototypes) for batch in images.split(250)])
    # Without its feature vector f, a class of n images with the prototype p has the prototype
    # (n p - f) / (n - 1), which is n / (n - 1) times as far from f as p is.
    logits_left_out = distance_logits(support[left_out], prototypes)
    own = labels[left_out]
    shots = torch.bincount(labels)[own]
    logits_left_out[torch.arange(len(own)), own] *= (shots / (shots - 1)) ** 2
    return logits, logits_left_out


def by_adaptation(encoder, support, labels, images, left_out, inner_loop):
    """Return the same as `by_nearest_prototype`, after adaptation to the support set.

    inner_loop: the InnerLoop or FineTuning. For each support image left out, the encoder adapts to
    all others. Raises UserError where an adaptation diverges.
    """
    everything = torch.arange(len(labels))

    def leave_out(position, local):
        others, query = everything[everything != position], support.of(position[None])
        return adapted_logits(encoder, support, others, labels, query, inner_loop, local)

    logits = adapted_logits(encoder, support, everything, labels, images, inner_loop)
    workers = Workers(images.device, len(left_out), encoder)
    bar = {"total": len(left_out), "leave": False, "dynamic_ncols": True}
    logits_left_out = tqdm(workers.map(leave_out, left_out), "leave-one-out", **bar)
    return logits, torch.cat([logits[:0], *logits_left_out])


def adapted_logits(encoder, views, support, labels, queries, inner_loop, local=None):
    """Return the logits of the queries [Q, C], float32, after adaptation to a support set.

    support: indices of images, int64 [S]; local: the copy of the encoder to adapt, or None for a
    new one. Raises UserError where the adaptation diverges.
    """
    n_way, device = len(labels.unique()), queries.device
    chosen = support[equal_shots(labels[support])].to(device)  # [C * K]
    local, weight, bias = adapt_for_test(encoder, views, chosen, n_way, inner_loop, local)
    logits = F.linear(encode_in_batches(local.eval(), queries), weight, bias)
    if not logits.isfinite().all():
        raise UserError(
            f"the adaptation to {len(support)} support images diverged; pass a smaller --lr_inner, "
            "--lr_output or --finetune_lr, or fewer steps"
        )
    return logits.cpu()


def equal_shots(labels):
    """Return positions in `labels`, class by class, of every class as many as the largest has.

    Smaller classes repeat theirs, in order, and their prototypes are means with repeated images.
    """
    positions = [torch.nonzero(labels == c)[:, 0] for c in labels.unique()]
    largest = max(map(len, positions))
    return torch.cat([own[torch.arange(largest) % len(own)] for own in positions])


def result_rows(files, class_names, logits):
    """Return one dict per image: file, class, probability, runner-up and its probability."""
    probabilities, classes = logits.softmax(dim=1).topk(2)  # [N, 2] each
    return [
        {
            "file": shown(file.name),
            "class": class_names[first],
            "probability": probability,
            "runner_up": class_names[second],
            "runner_up_probability": next_probability,
        }
        for file, (first, second), (probability, next_probability) in zip(
            files, classes.tolist(), probabilities.tolist()
        )
    ]


def what_to_expect(logits, wanted):
    """Return a line on the leave-one-out accuracy.

    logits [L, C]: of the support images left out; wanted int64 [L]: their classes.
    """
    if not len(wanted):
        return "leave-one-out: no class has two images, so what to expect is unknown"
    correct, count = (logits.argmax(dim=1) == wanted).sum().item(), len(wanted)
    probability = logits.softmax(dim=1).amax(dim=1).mean().item()
    return (
        f"leave-one-out: {correct} of {count} support images are classified correctly with the "
        f"help of the others, {100 * (correct / count):.1f} %; by chance "
        f"{100 * (1 / logits.shape[1]):.1f} %; their mean probability is {100 * probability:.1f} %"
    )


def draw_contact_sheets(cfg, rows, files, class_names, model_name):
    """Draw all images, by class and falling probability; remove further sheets of an earlier run.

    rows and files: in the same order.
    """

    def place(pair):
        return class_names.index(pair[0]["class"]), -pair[0]["probability"]

    def path_of(number):
        name = f"classified-{number}.png" if number > 1 else "classified.png"
        return os.path.join(cfg.results_dir, name)

    pairs = sorted(zip(rows, files), key=place)
    starts = range(0, len(pairs), IMAGES_PER_SHEET)
    for number, start in enumerate(starts, 1):
        rows, files = zip(*pairs[start : start + IMAGES_PER_SHEET])
        thumbnails = read_images(files, THUMBNAIL, "contact sheet")
        title = f"{model_name}, sheet {number} of {len(starts)}; "
        title += f"dashed: probability below {100 * cfg.unsure:g} %"
        plot_contact_sheet(thumbnails, rows, cfg.unsure, title, path_of(number))
    number = len(starts) + 1
    while os.path.exists(path_of(number)):
        os.remove(path_of(number))
        number += 1


if __name__ == "__main__":
    run_script(main, Config)
