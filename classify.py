"""Classify a folder of images, given a few labelled ones of each class; any trained model serves.

    python classify.py --support=FOLDER --images=FOLDER
    python classify.py --support=FOLDER --images=FOLDER --model=checkpoints/cifar100/protomaml.pt

The support folder has one folder per class with one image or more, FOLDER/cat/1.jpg; the images to
classify lie in the other folder, not in folders below it. They may be of any size and shape: the
middle of each is brought to the size that the model was trained on. Classes are those of the
support folder, new to the model or not.

Prints a table, and writes classified.csv and the contact sheets classified.png, classified-2.png
and so on, 100 images each, into results/classify/. It also tells how much to trust them: each
support image is classified with the help of the others (leave-one-out), which is a little harder
than what follows, as one image of its class is missing. With few images per class the probabilities
are too high: for five validation classes of CIFAR-100, the classifier's average 86 to 88 %, while
61, 69, 79 and 86 % of the images are classified correctly with 1, 2, 5 and 20 support images per
class.

A classifier or a ProtoNet takes the nearest prototype, the mean of all support images of a class:
some seconds. ProtoMAML and MAML adapt to the support set, and once more for every support image
left out: a minute or so. Their inner loop sees all classes equally often: a class with fewer
images than the largest repeats its own, in order.
"""

import csv
import io
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.checkpoint import ADAPTING, MODEL_NAMES, encoder_of, load_checkpoint
from common.config import UserError, require
from common.data import normalize
from common.device import pick_device
from common.encoder import encode_in_batches
from common.figures import plot_contact_sheet
from common.files import write_text
from common.images import IMAGE_SUFFIXES, list_folder, list_images, read_images
from common.inner_loop import InnerLoop, adapt
from common.kshot import spread_evenly
from common.parallel import Workers
from common.prototypes import distance_logits
from common.samplers import episode_labels
from common.script import run_script

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
    max_left_out: int = 20  # support images left out, an adaptation for each; 0: all
    # result
    unsure: float = 0.5  # images whose probability is below this are marked
    # run
    device: str = "auto"  # auto, cuda, mps or cpu
    results_dir: str = "results/classify"  # where table and contact sheets go

    def __post_init__(self):
        require(self, "num_inner_steps", "lr_inner", "lr_output", "max_left_out", least=0)
        require(self, "unsure", least=0, most=1)


def main(cfg):
    class_files, files = list_files(cfg)
    device = pick_device(cfg.device)
    checkpoint = load_checkpoint(cfg.model)
    encoder = encoder_of(checkpoint, cfg.model).to(device)
    adapts = checkpoint["model"] in ADAPTING

    images, labels, class_names, files, failures = read_files(class_files, files, checkpoint)
    images = normalize(images.to(device), checkpoint["mean"], checkpoint["std"])
    support, images = images.split([len(labels), len(files)])  # [S, 3, H, W], [N, 3, H, W]
    left_out = choose_left_out(labels, class_names, cfg.max_left_out if adapts else 0)
    if adapts:
        names = ("num_inner_steps", "lr_inner", "lr_output")
        options = {name: getattr(cfg, name) for name in names}
        inner_loop = InnerLoop.of_training(checkpoint["config"], **options)
        logits = by_adaptation(encoder, support, labels, images, left_out, inner_loop)
    else:
        logits = by_nearest_prototype(encoder, support, labels, images, left_out)
    logits, logits_left_out = logits  # [N, C], [L, C]

    rows = result_rows(files, class_names, logits)
    print(text_table(rows))
    print(what_to_expect(logits_left_out, labels[left_out]))
    unsure = sum(row["probability"] < cfg.unsure for row in rows)
    print(f"unsure, with a probability below {100 * cfg.unsure:g} %: {unsure} of {len(rows)}")
    write_csv(rows, os.path.join(cfg.results_dir, "classified.csv"))
    draw_contact_sheets(cfg, rows, files, class_names, MODEL_NAMES[checkpoint["model"]])
    print(f"table and contact sheets: {cfg.results_dir}{os.sep}")
    return 1 if failures else 0


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
    if folder.resolve() == Path(cfg.results_dir).resolve():
        raise UserError(
            f"the contact sheets in {folder} would be classified the next time; pass another "
            "--results_dir=FOLDER"
        )
    if not files:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"{folder} holds no image ({kinds}); put the images to classify there")
    ignored = set(list_folder(folder)) - set(files)
    ignored = sorted(path.name for path in ignored if path.is_file() or list_images(path))
    if ignored:
        names = ", ".join(map(shown, ignored[:5])) + (", ..." if len(ignored) > 5 else "")
        print(f"ignored in {folder}, as they are no images or folders of images: {names}")
    return {shown(path.name): list_images(path) for path in class_folders}, files


def read_files(class_files, files, checkpoint):
    """Read all images, in the size of the checkpoint; name what cannot be used.

    class_files, files: as `list_files` returns them.
    Returns (images uint8 [S + N, 3, H, W], the support set class by class and then the images to
    classify; labels int64 [S]; class names; the paths of the images to classify; the number of
    images that cannot be read). Raises UserError where fewer than two classes or no image is left.
    """
    size = checkpoint["config"].get("image_size", 32)
    paths = [path for own in class_files.values() for path in own]
    errors = {}
    images = read_images([*paths, *files], size, "images", errors)
    for error in errors.values():
        print(f"skipped: {shown(error)}", file=sys.stderr)
    class_files = {
        name: [path for path in own if path not in errors] for name, own in class_files.items()
    }
    left = [path for path in files if path not in errors]
    for name, own in class_files.items():
        if not own:
            print(f"class {name} has no image that can be read: it is left out")
    class_files = {name: own for name, own in class_files.items() if own}
    if len(class_files) < 2:
        found = f"images of {len(class_files)} class" + ("es" if not class_files else "")
        raise UserError(
            f"found {found}, but 2 are needed at least; put the images of each class into a folder "
            "of its own, --support=FOLDER with FOLDER/<class>/"
        )
    if not left:
        raise UserError(f"none of the {len(files)} images to classify can be read; replace them")
    shots = torch.tensor([len(own) for own in class_files.values()])  # of each class
    each = f"{shots.min()}" if shots.min() == shots.max() else f"{shots.min()} to {shots.max()}"
    print(
        f"support images: {shots.sum()} of {len(shots)} classes, {each} of each; images to "
        f"classify: {len(left)}; all brought to {size}x{size} pixels"
    )
    labels = torch.arange(len(shots)).repeat_interleave(shots)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images, labels, list(class_files), left, len(errors)


def choose_left_out(labels, class_names, most):
    """Return the support images to be left out, one at a time, int64 [L]: positions in `labels`.

    They are all images of classes with at least two, or `most` of them, evenly spread (0: all).
    """
    shots = torch.bincount(labels)
    single = [name for name, count in zip(class_names, shots.tolist()) if count == 1]
    if single:
        print(f"classes of one image, which cannot be left out: {', '.join(single)}")
    left_out = torch.nonzero(shots[labels] > 1)[:, 0]
    return left_out[spread_evenly(len(left_out), most)] if 0 < most < len(left_out) else left_out


def by_nearest_prototype(encoder, support, labels, images, left_out):
    """Return the logits of the images [N, C] and of the support images left out [L, C], float64.

    support [S, 3, H, W] with labels int64 [S], images [N, 3, H, W]; left_out int64 [L]: support
    images, each of which is compared with prototypes made without it.
    """
    features = encode_in_batches(encoder, torch.cat([support, images]))
    # On the CPU: not every device has float64.
    support, images = features.cpu().double().split([len(support), len(images)])  # [S, D], [N, D]
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

    inner_loop: the InnerLoop. For each support image left out, the encoder adapts to all others.
    Raises UserError where an adaptation diverges.
    """
    n_way = len(labels.unique())

    def adapt_and_classify(kept, queries, local=None):
        chosen = kept[equal_shots(labels[kept])]  # [n_way * K]
        y_spt = episode_labels(n_way, len(chosen) // n_way, support.device)
        local, weight, bias = adapt(
            encoder, support[chosen], y_spt, n_way, inner_loop, local, attached=False
        )
        logits = F.linear(encode_in_batches(local.eval(), queries), weight, bias)
        if not logits.isfinite().all():
            raise UserError(
                f"the adaptation to {len(kept)} support images diverged; pass a smaller "
                "--lr_inner, a smaller --lr_output or fewer --num_inner_steps"
            )
        return logits.cpu()

    def leave_out(position, local):
        others = everything[everything != position]
        return adapt_and_classify(others, support[position, None], local)

    everything = torch.arange(len(labels))
    logits = adapt_and_classify(everything, images)
    workers = Workers(support.device, len(left_out), encoder)
    bar = {"total": len(left_out), "leave": False, "dynamic_ncols": True}
    logits_left_out = list(tqdm(workers.map(leave_out, left_out), "leave-one-out", **bar))
    return logits, torch.cat([logits.new_zeros(0, n_way), *logits_left_out])


def equal_shots(labels):
    """Return positions in `labels`, class by class, of every class as many as the largest has.

    Smaller classes repeat theirs, in order: prototypes of the inner loop are means over these.
    """
    positions = [torch.nonzero(labels == c)[:, 0] for c in labels.unique()]
    largest = max(map(len, positions))
    return torch.cat([own[torch.arange(largest) % len(own)] for own in positions])


def result_rows(files, class_names, logits):
    """Return one dict per image: file, class, probability, runner-up and its probability."""
    probabilities, classes = logits.softmax(dim=1).topk(2)
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
    chance, probability = 1 / logits.shape[1], logits.softmax(dim=1).amax(dim=1).mean().item()
    return (
        f"leave-one-out: {correct} of {count} support images are classified correctly with the "
        f"help of the others, {percent(correct / count)}; by chance {percent(chance)}; "
        f"their mean probability is {percent(probability)}"
    )


def text_table(rows):
    """Return the rows as a table of fixed width."""
    cells = [("file", "class", "probability", "runner-up", "probability")]
    cells += [tuple(percent(v) if isinstance(v, float) else v for v in r.values()) for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(map(aligned, line, widths, range(len(line)))) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_csv(rows, path):
    """Write the rows to `path`. Raises UserError where that fails."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, text.getvalue())


def draw_contact_sheets(cfg, rows, files, class_names, model_name):
    """Draw all images, by class and falling probability; remove further sheets of an earlier run.

    rows and files: in the same order.
    """
    shown_order = sorted(
        zip(rows, files),
        key=lambda pair: (class_names.index(pair[0]["class"]), -pair[0]["probability"]),
    )
    sheets = math.ceil(len(rows) / IMAGES_PER_SHEET)
    for number in range(sheets):
        part = shown_order[number * IMAGES_PER_SHEET : (number + 1) * IMAGES_PER_SHEET]
        thumbnails = read_images([file for _, file in part], THUMBNAIL, "contact sheet")
        title = f"{model_name}, sheet {number + 1} of {sheets}; "
        title += f"dashed: probability below {100 * cfg.unsure:g} %"
        plot_contact_sheet(
            thumbnails, [row for row, _ in part], cfg.unsure, title, sheet_path(cfg, number)
        )
    while os.path.exists(path := sheet_path(cfg, sheets)):
        os.remove(path)
        sheets += 1


def shown(name):
    """Return a name as text that can be printed and written: a file's name may hold any bytes."""
    return str(name).encode(errors="backslashreplace").decode()


def sheet_path(cfg, number):
    """Return the path of contact sheet `number`, from 0."""
    name = f"classified-{number + 1}.png" if number else "classified.png"
    return os.path.join(cfg.results_dir, name)


def percent(share):
    return f"{100 * share:.1f} %"


def aligned(cell, width, column):
    return cell.rjust(width) if column in (2, 4) else cell.ljust(width)


if __name__ == "__main__":
    run_script(main, Config)
