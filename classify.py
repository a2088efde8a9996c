"""Classify a folder of images, given a few labelled ones of each class; any trained model serves.

    python classify.py --support=FOLDER --images=FOLDER
    python classify.py --support=FOLDER --images=FOLDER --model=FILE           # any checkpoint
    python classify.py --support=FOLDER --images=FOLDER --model=torchvision:resnet50   # ImageNet's
    python classify.py --support=FOLDER --images=FOLDER --finetune_steps=160   # unlike CIFAR-100

The support folder has one folder per class with one image or more, FOLDER/cat/1.jpg; the images to
classify lie in the other folder, not in folders below it. They may be of any size and shape: the
middle of each is brought to the size of the training. The model need not know the classes.

Prints a table, and writes classified.csv and contact sheets of 100 images each, classified.png,
classified-2.png and so on, into results/classify/. It also tells how much to trust them: each
support image, or 20 of them where the model adapts, is classified with the help of all others
(leave-one-out), which is a little harder. With few images per class the probabilities are too high:
for five validation classes of CIFAR-100, the included model's average 90 %, while 68, 76, 84 and
88 % of the images are classified correctly with 1, 2, 5 and 20 support images per class.

A classifier or a ProtoNet takes the nearest prototype: some seconds. Fine-tuned, and always in
ProtoMAML and MAML, the model adapts to the support set, and once more for every support image left
out: a few minutes.
"""

import os
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError, shown
from common.augment import Views
from common.checkpoint import encoder_of, load_checkpoint
from common.config import require, run_script
from common.data import normalize
from common.device import pick_device
from common.encoders import encode_in_batches
from common.figures import plot_contact_sheet
from common.files import require_writable
from common.images import IMAGE_SUFFIXES, list_images, print_unused, read_folder, read_images
from common.kshot import adaptation, mean_features, spread_evenly
from common.parallel import Workers
from common.prototypes import distance_logits, make_prototypes
from common.tables import classified_table, title_of, write_classified

IMAGES_PER_SHEET = 100
THUMBNAIL = 160  # pixels


@dataclass
class Config:
    # data
    support: str = ""  # folder with one folder of labelled images per class; required
    images: str = ""  # folder of the images to classify; required
    # model
    model: str = "checkpoints/resnet12/cifar100/classifier.pt"  # or torchvision:NAME, timm:NAME
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
        require(self, "num_inner_steps >= 0", "lr_inner >= 0", "lr_output >= 0")
        require(self, "max_left_out >= 0", "finetune_steps >= 0", "finetune_lr > 0")
        require(self, "0 <= unsure <= 1")


def main(cfg):
    for name in ("support", "images"):
        if not getattr(cfg, name):
            raise UserError(f"--{name}=FOLDER is missing; --help says what belongs into it")
    device, folder = pick_device(cfg.device), Path(cfg.images)
    if folder.resolve() == Path(cfg.results_dir).resolve():
        raise UserError("--results_dir is the folder of --images; pass another")
    checkpoint = load_checkpoint(cfg.model)
    encoder = encoder_of(checkpoint, cfg.model).to(device)
    size, width = checkpoint["image_shape"]
    if size != width:
        found = f"{cfg.model} was trained on {width}x{size} pixels"
        raise UserError(f"{found}; pass one of square images")

    support, bits = read_folder(Path(cfg.support), size)
    labels, class_names = torch.from_numpy(support["labels"]), support["class_names"].tolist()
    print_unused([folder], list_images(folder))
    errors = {}
    images, bits = read_images(list_images(folder), size, str(folder), errors, bits)
    files = [file for file in list_images(folder) if file not in errors]
    for error in errors.values():
        print(f"skipped: {shown(error)}", file=sys.stderr)
    if not files:
        raise UserError(f"{folder} holds no image to classify ({', '.join(IMAGE_SUFFIXES)})")
    require_writable(cfg.results_dir or ".")
    normalized = partial(normalize, mean=checkpoint["mean"], std=checkpoint["std"])
    pixels = (torch.from_numpy(each).permute(0, 3, 1, 2) for each in (support["images"], images))
    support, images = (each.to(device) for each in pixels)
    support = Views(support, normalize=normalized)

    steps = {name: getattr(cfg, name) for name in ("num_inner_steps", "lr_inner", "lr_output")}
    tuning = cfg.finetune_steps or None, cfg.finetune_lr
    how = adaptation(checkpoint["config"], *tuning, **steps)  # None: by nearest prototype
    left_out = choose_left_out(labels, class_names, cfg.max_left_out if how else 0)
    method = partial(by_adaptation, how=how) if how else by_nearest_prototype
    logits, logits_left_out = method(encoder, support, labels, images, left_out)  # [N, C], [L, C]

    rows = result_rows(files, class_names, logits)
    print(classified_table(rows))
    print(what_to_expect(logits_left_out, labels[left_out]))
    unsure = sum(row["probability"] < cfg.unsure for row in rows)
    print(f"unsure, with a probability below {100 * cfg.unsure:g} %: {unsure} of {len(rows)}")
    write_classified(rows, os.path.join(cfg.results_dir, "classified.csv"))
    row = checkpoint["model"] + ("_finetuned" if cfg.finetune_steps else "")
    draw_contact_sheets(cfg, rows, files, class_names, title_of(row), bits)
    print(f"table and contact sheets: {cfg.results_dir}{os.sep}")
    return 1 if errors else 0


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

    support: the Views of S images with labels int64 [S]; images uint8 [N, 3, H, W]; left_out int64
    [L]: support images, each of which is compared with prototypes made without it.
    """
    # On the CPU: not every device has float64.
    images = encode_in_batches(encoder, images, support.normalize).cpu().double()  # [N, D]
    support = mean_features(encoder, support).cpu().double()  # [S, D]
    prototypes = make_prototypes(support, len(labels.unique()), labels)  # [C, D]
    logits = torch.cat([distance_logits(batch, prototypes) for batch in images.split(250)])
    # Without its feature vector f, a class of n images with the prototype p has the prototype
    # (n p - f) / (n - 1), which is n / (n - 1) times as far from f as p is.
    logits_left_out = distance_logits(support[left_out], prototypes)
    own = labels[left_out]
    shots = torch.bincount(labels)[own]
    logits_left_out[torch.arange(len(own)), own] *= (shots / (shots - 1)) ** 2
    return logits, logits_left_out


def by_adaptation(encoder, support, labels, images, left_out, how):
    """Return the same as `by_nearest_prototype`, after adaptation to the support set.

    how: the InnerLoop or FineTuning. For each support image left out, the encoder adapts to
    all others. Raises UserError where an adaptation diverges.
    """
    everything = torch.arange(len(labels))

    def leave_out(position, local):
        others, query = everything[everything != position], support.images[position[None]]
        return adapted_logits(encoder, support, others, labels, query, how, local)

    logits = adapted_logits(encoder, support, everything, labels, images, how, deepcopy(encoder))
    workers = Workers(images.device, len(left_out), lambda: deepcopy(encoder))
    bar = {"total": len(left_out), "leave": False, "dynamic_ncols": True}
    logits_left_out = tqdm(workers.map(leave_out, left_out), "leave-one-out", **bar)
    return logits, torch.cat([logits[:0], *logits_left_out])


def adapted_logits(encoder, views, support, labels, queries, how, local):
    """Return the logits of the queries [Q, C], float32, after `local` has adapted to a support set.

    support: indices of images, int64 [S]. Raises UserError where the adaptation diverges.
    """
    n_way, device = len(labels.unique()), queries.device
    task = support.to(device), labels[support].to(device)
    weight, bias = how.adapt(encoder, views, *task, n_way, local)
    features = encode_in_batches(local.eval(), queries, views.normalize)
    logits = F.linear(features, weight, bias)
    if not logits.isfinite().all():
        raise UserError(f"{how} diverged; pass a lower learning rate or fewer steps")
    return logits.detach().cpu()


def result_rows(files, class_names, logits):
    """Return one dict per image: file, class, probability, runner-up and its probability."""
    rows, columns = [], ("file", "class", "probability", "runner_up", "runner_up_probability")
    probabilities, classes = logits.softmax(dim=1).topk(2)  # [N, 2] each
    for file, (first, second), (c, d) in zip(files, probabilities.tolist(), classes.tolist()):
        values = (shown(file.name), class_names[c], first, class_names[d], second)
        rows.append(dict(zip(columns, values)))
    return rows


def what_to_expect(logits, wanted):
    """Return a line on the leave-one-out accuracy.

    logits [L, C]: of the support images left out; wanted int64 [L]: their classes.
    """
    if not len(wanted):
        return "leave-one-out: no class has two images, so what to expect is unknown"
    correct, count = (logits.argmax(dim=1) == wanted).sum().item(), len(wanted)
    probability, chance = logits.softmax(dim=1).amax(dim=1).mean().item(), 1 / logits.shape[1]
    return (
        f"leave-one-out: {correct} of {count} support images are classified correctly with the "
        f"help of the others, {correct / count:.1%}; by chance {chance:.1%}; their mean "
        f"probability is {probability:.1%}"
    )


def draw_contact_sheets(cfg, rows, files, class_names, model_name, bits):
    """Draw all images, by class and falling probability; remove sheets of an earlier run."""

    def path_of(number):
        name = f"classified-{number}.png" if number > 1 else "classified.png"
        return os.path.join(cfg.results_dir, name)

    def place(pair):
        return class_names.index(pair[0]["class"]), -pair[0]["probability"]

    pairs = sorted(zip(rows, files), key=place)
    sheets = [pairs[i : i + IMAGES_PER_SHEET] for i in range(0, len(pairs), IMAGES_PER_SHEET)]
    for number, sheet in enumerate(sheets, 1):
        rows, files = zip(*sheet)
        thumbnails, _ = read_images(files, THUMBNAIL, "contact sheet", bits=bits or 16)
        title = f"{model_name}, sheet {number} of {len(sheets)}; "
        title += f"dashed: probability below {100 * cfg.unsure:g} %"
        plot_contact_sheet(thumbnails, rows, cfg.unsure, title, path_of(number))
    number = len(sheets) + 1
    while os.path.exists(path_of(number)):
        os.remove(path_of(number))
        number += 1


if __name__ == "__main__":
    run_script(main, Config)
