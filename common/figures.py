"""The figures: training curves, images of a data set, one episode, accuracy over k, confusions.

Each is written as PNG and SVG.
"""

import math
import re
import textwrap

import matplotlib

matplotlib.use("Agg")  # the scripts run where there is no screen
import matplotlib.pyplot as plt
import torch

from common.checkpoint import ROW_NAMES
from common.files import atomic_file
from common.tables import tutorials_accuracy
from common.tutorial import PRINTED

plt.rcParams["text.parse_math"] = False  # a class may be called "US$": no formula begins there
plt.rcParams["svg.hashsalt"] = "few-shot"  # the same numbers give the same bytes, see save_figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ as well.
STYLES = {
    "classifier": {"color": "#CC79A7", "marker": "D"},
    "protonet": {"color": "#D55E00", "marker": "o"},
    "maml": {"color": "#009E73", "marker": "^"},
    "protomaml": {"color": "#0072B2", "marker": "s"},
    "pixels": {"color": "#666666", "marker": "x", "linestyle": "--"},
}
# The same model, fine-tuned: the same colour and marker, filled white, and a dash-dotted line.
FINE_TUNED = {"markerfacecolor": "white", "linestyle": "-."}
TRAIN, VALIDATION = "#0072B2", "#D55E00"
LEAST_RANGE = {"loss": 0.2, "accuracy": 5}  # of an axis: less would make noise look like learning
UNSURE = "#D55E00"
GAP = 2  # pixels between the images of an episode


def save_figure(figure, path, suffixes=(".png", ".svg")):
    """Write a figure to `path`.png and `path`.svg and close it.

    Raises UserError where that fails.
    """
    for suffix in suffixes:
        # Without a date in the file, the same numbers give the same bytes.
        metadata = {"Date": None} if suffix == ".svg" else None
        with atomic_file(path + suffix) as temporary:
            figure.savefig(temporary, dpi=150, bbox_inches="tight", metadata=metadata)
    plt.close(figure)


def plot_training_curves(history, title, tasks, path):
    """Draw loss and accuracy over the epochs, training and validation.

    history: one dict per epoch, as in the CSV. tasks: {"train", "val"}, what is classified in
    either; accuracies of different tasks cannot be compared.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    epochs = [row["epoch"] for row in history]
    marker = "." if len(epochs) < 40 else None
    quantities = (("loss", 1, "Cross-entropy"), ("accuracy", 100, "Accuracy in %"))
    for axis, (quantity, scale, label) in zip(axes, quantities):
        for part, color, line in (("train", TRAIN, "--"), ("val", VALIDATION, "-")):
            values = [scale * row[f"{part}_{quantity}"] for row in history]
            axis.plot(epochs, values, line, color=color, label=tasks[part], marker=marker)
        low, high = axis.get_ylim()
        if (missing := LEAST_RANGE[quantity] - (high - low)) > 0:
            axis.set_ylim(low - missing / 2, high + missing / 2)
        axis.set_xlabel("Epoch")
        axis.set_ylabel(label)
        axis.set_xlim(0.5, epochs[-1] + 0.5)  # a single epoch has no range of its own
        integers = matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1)
        axis.xaxis.set_major_locator(integers)
        axis.grid(alpha=0.3)
    best = max(history, key=lambda row: row["val_accuracy"])["epoch"]
    axes[1].axvline(best, color="#666666", linestyle=":", label=f"best epoch: {best}")
    axes[1].legend()
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)


def plot_examples(image_set, path, rows=2, columns=10):
    """Draw one image of each of up to rows * columns classes, evenly spread over the classes."""
    classes = len(image_set.class_names)
    count = min(rows * columns, classes)
    chosen = [position * classes // count for position in range(count)]
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.8 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, c in zip(axes.flat, chosen):
        image = image_set.images[int(torch.nonzero(image_set.labels == c)[0])]
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set_title(_wrapped(image_set.class_names[c]), fontsize=7)
    figure.suptitle(f"Examples of {image_set.name}")
    figure.tight_layout(h_pad=1.5)
    save_figure(figure, path)


def plot_episode(image_set, episode, n_way, k_shot, path):
    """Draw one episode: support set left, query set right, a row per class.

    episode: indices in the order of the samplers.
    """
    support = episode[: n_way * k_shot].view(n_way, k_shot)
    query = episode[n_way * k_shot :].view(n_way, -1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.05 * n_way + 0.6))
    titles = ("Support set: what the model learns from", "Query set: what it has to classify")
    for axis, title, rows in zip(axes, titles, (support, query)):
        grid = _grid(image_set.images[rows.flatten()], rows.shape[1])
        axis.imshow(grid, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        height = image_set.images.shape[2] + GAP
        axis.set_yticks([row * height + height / 2 for row in range(n_way)])
        names = [image_set.class_names[image_set.labels[rows[row, 0]]] for row in range(n_way)]
        axis.set_yticklabels(map(_wrapped, names) if axis is axes[0] else [])
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.suptitle(f"One {n_way}-way {k_shot}-shot episode of {image_set.name}")
    figure.tight_layout()
    save_figure(figure, path)


def plot_accuracy_over_k(rows, models, title, path):
    """Draw accuracy over k for each of `models`, and the tutorial's where it tested the same.

    Points are means, bars 95 % intervals; for a single model a band shows one standard deviation.
    rows: result rows of one tested data set, as in common/tables.py.
    """
    figure, axis = plt.subplots(figsize=(6, 4))
    handles = []
    for model in models:
        of_model = (row for row in rows if row["model"] == model)
        points = sorted(of_model, key=lambda row: row["k_shot"])
        k = [row["k_shot"] for row in points]
        mean, std, ci95 = (
            [math.nan if row[name] is None else 100 * row[name] for row in points]
            for name in ("accuracy", "std", "ci95")
        )
        base = model.removesuffix("_finetuned")
        style = {**STYLES[base], **({} if base == model else FINE_TUNED), "label": ROW_NAMES[model]}
        handles.append(axis.errorbar(k, mean, yerr=ci95, capsize=3, **style))
        if len(models) == 1:
            low, high = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
            axis.fill_between(k, low, high, color=style["color"], alpha=0.15, linewidth=0)
        tutorials = {row["k_shot"]: tutorials_accuracy(row) for row in points}
        if base == model and all(tutorials.values()):
            of_tutorial = {"linestyle": ":", "markerfacecolor": "white", "markersize": 4.5}
            printed = {row["k_shot"]: tutorials_accuracy(row, PRINTED) for row in points}
            which = "the tutorial's" + (", corrected" if tutorials != printed else "")
            of_tutorial["label"] = f"{ROW_NAMES[model]}, {which}"
            handles += axis.plot(*zip(*tutorials.items()), **{**style, **of_tutorial})
    n_way = rows[0]["n_way"]
    chance = {"color": "black", "linestyle": ":", "label": f"Chance ({100 / n_way:.3g} %)"}
    handles.append(axis.axhline(100 / n_way, linewidth=1, **chance))
    axis.set_xscale("log", base=2)
    k_values = sorted({row["k_shot"] for row in rows})
    axis.set_xticks(k_values, [str(k) for k in k_values])
    axis.minorticks_off()
    axis.set_xlabel("Support images per class (k)")
    axis.set_ylabel("Accuracy in %")
    axis.set_title(f"{title}, {n_way}-way")
    axis.grid(alpha=0.3)
    # Beside the axes: the curves may lie anywhere in them.
    place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "alignment": "left"}
    explained = "bars: 95 % interval of the mean"
    if len(models) == 1:
        one = "episode" if "num_episodes" in rows[0] else "support set"
        explained += f"\nband: ± 1 std of a single {one}"
    axis.legend(handles=handles, title=explained, fontsize=8, title_fontsize=8, **place)
    save_figure(figure, path)


def plot_confusion(counts, class_names, title, path):
    """Draw which classes are taken for which, in percent of the queries of each true class.

    counts: [C, C], queries of each true class (row) by predicted class (column). The numbers
    themselves are shown for up to 20 classes.
    """
    counts = torch.tensor(counts, dtype=torch.float64)
    percent = (100 * counts / counts.sum(dim=1, keepdim=True)).numpy()
    classes = len(class_names)
    inches = min(2.2 + 0.42 * classes, 16)
    figure, axis = plt.subplots(figsize=(inches + 1, inches))
    # The square root makes room for the mistakes, which are few beside what is right.
    norm = matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=100)
    image = axis.imshow(percent, cmap="Blues", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, fraction=0.046, pad=0.03, aspect=30, ticks=(0, 1, 5, 20, 50, 100))
    bar.set_label("% of the true class" + (" (no number: below 0.5)" if classes <= 20 else ""))
    font = min(8, 650 / classes)
    names = [_wrapped(name) for name in class_names]
    rotation = 90 if max(map(len, class_names)) > 2 else 0
    axis.set_xticks(range(classes), names, rotation=rotation, fontsize=font)
    axis.set_yticks(range(classes), names, fontsize=font)
    axis.set_xlabel("Predicted class")
    axis.set_ylabel("True class")
    if classes <= 20:
        for row in range(classes):
            for column in range(classes):
                value = percent[row, column]
                if value >= 0.5:
                    color = "white" if value > 35 else "black"
                    axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color)
    axis.set_title(title, pad=12)
    save_figure(figure, path)


def plot_contact_sheet(images, rows, unsure, title, path, columns=10):
    """Draw classified images, each with class, probability and file below, as `path` (a PNG).

    images uint8 [N, S, S, 3]; rows: N dicts with file, class and probability. Those whose
    probability is below `unsure` get a dashed frame and a question mark.
    """
    names = [_shortened(_wrapped(row["class"])) for row in rows]
    columns = min(columns, len(rows))
    # In inches; the images are 1 x 1, and a line of text is 0.13 high.
    step = 1.1, 1.5 + 0.13 * max(name.count("\n") for name in names)
    across, down = columns * step[0], math.ceil(len(rows) / columns) * step[1]
    figure = plt.figure(figsize=(across, down))
    axis = figure.add_axes((0, 0, 1, 1))
    small = {"ha": "center", "va": "top", "linespacing": 1.15}
    for number, (image, row, name) in enumerate(zip(images, rows, names)):
        left, top = number % columns * step[0], number // columns * step[1]
        axis.imshow(image, extent=(left, left + 1, top + 1, top))
        text, color = f"{name}\n{100 * row['probability']:.0f} %", "black"
        if row["probability"] < unsure:
            text, color = f"{text} ?", UNSURE
            frame = {"fill": False, "linestyle": (0, (3, 2)), "linewidth": 2.5, "clip_on": False}
            axis.add_patch(plt.Rectangle((left, top), 1, 1, edgecolor=color, **frame))
        axis.text(left + 0.5, top + 1.03, text, color=color, fontsize=7, **small)
        below = top + 1.03 + 0.13 * (text.count("\n") + 1)
        file = _middle_cut(row["file"])
        axis.text(left + 0.5, below, file, color="#666666", fontsize=6, **small)
    axis.set(xlim=(0, across), ylim=(down, 0))
    axis.axis("off")
    axis.set_title(title, loc="left", fontsize=9)
    save_figure(figure, path.removesuffix(".png"), (".png",))


def _grid(images, columns):
    """Lay images out in rows of `columns`, white in between.

    images uint8 [R * columns, 3, H, W] -> numpy uint8 [R * (H + GAP), columns * (W + GAP), 3].
    """
    padded = torch.nn.functional.pad(images.cpu(), (0, GAP, 0, GAP), value=255)
    count, channels, height, width = padded.shape
    rows = count // columns
    grid = padded.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, columns * width, channels).numpy()


def _wrapped(name):
    """Break a class name into lines of up to 16 characters, at spaces and after underscores."""
    wrapper = textwrap.TextWrapper(16, break_on_hyphens=False)
    wrapper.wordsep_simple_re = re.compile(r"(\s+)|(?<=_)")
    return "\n".join(wrapper.wrap(name))


def _shortened(text):
    """Cut a text of several lines off after the second, with an ellipsis."""
    lines = text.split("\n")
    return "\n".join(lines[:2]) + ("..." if len(lines) > 2 else "")


def _middle_cut(name, most=19):
    """Return a name of at most so many characters, without some in its middle if need be."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}...{name[-(most // 2 - 1) :]}"
