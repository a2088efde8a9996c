"""The figures: training curves, images of a data set, one episode, accuracy over k.

Each is written as PNG and SVG.
"""

import math
import re
import textwrap

import matplotlib

matplotlib.use("Agg")  # the scripts run where there is no screen
import matplotlib.pyplot as plt
import torch

from common.checkpoint import MODEL_NAMES
from common.files import atomic_file

plt.rcParams["text.parse_math"] = False  # a class may be called "US$": no formula begins there
plt.rcParams["svg.hashsalt"] = "few-shot"  # the same numbers give the same bytes, see save_figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ as well.
STYLES = {
    "classifier": {"color": "#CC79A7", "marker": "D", "label": MODEL_NAMES["classifier"]},
    "protonet": {"color": "#D55E00", "marker": "o", "label": MODEL_NAMES["protonet"]},
    "maml": {"color": "#009E73", "marker": "^", "label": MODEL_NAMES["maml"]},
    "protomaml": {"color": "#0072B2", "marker": "s", "label": MODEL_NAMES["protomaml"]},
    "pixels": {"color": "#666666", "marker": "x", "label": "Pixels", "linestyle": "--"},
}
TRAIN, VALIDATION = "#0072B2", "#D55E00"


def save_figure(figure, path):
    """Write a figure to `path`.png and `path`.svg and close it.

    Raises UserError where that fails.
    """
    for suffix in (".png", ".svg"):
        # Without a date in the file, the same numbers give the same bytes.
        metadata = {"Date": None} if suffix == ".svg" else None
        with atomic_file(path + suffix) as temporary:
            figure.savefig(temporary, dpi=150, bbox_inches="tight", metadata=metadata)
    plt.close(figure)


def plot_training_curves(history, model_name, dataset, path):
    """Draw loss and accuracy over the epochs, training and validation.

    history: one dict per epoch, as in the CSV.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    epochs = [row["epoch"] for row in history]
    marker = "." if len(epochs) < 40 else None
    quantities = (("loss", 1, "Cross-entropy"), ("accuracy", 100, "Accuracy in %"))
    for axis, (quantity, scale, label) in zip(axes, quantities):
        for part, color, classes in (
            ("train", TRAIN, "training"),
            ("val", VALIDATION, "validation"),
        ):
            values = [scale * row[f"{part}_{quantity}"] for row in history]
            axis.plot(epochs, values, color=color, label=f"{classes} classes", marker=marker)
        axis.set_xlabel("Epoch")
        axis.set_ylabel(label)
        axis.set_xlim(0.5, epochs[-1] + 0.5)  # a single epoch has no range of its own
        integers = matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1)
        axis.xaxis.set_major_locator(integers)
        axis.grid(alpha=0.3)
    best = max(history, key=lambda row: row["val_accuracy"])["epoch"]
    axes[1].axvline(best, color="#666666", linestyle=":", label=f"best epoch: {best}")
    axes[1].legend()
    figure.suptitle(f"Training of {model_name} on {dataset}")
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
        height = image_set.images.shape[2] + 2
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
    """Draw accuracy over k for each of `models`.

    Points are means, bars 95 % intervals, bands one standard deviation. rows: result rows of one
    tested data set, with model, k_shot, n_way, accuracy, std, ci95.
    """
    figure, axis = plt.subplots(figsize=(6, 4))
    for model in models:
        of_model = (row for row in rows if row["model"] == model)
        points = sorted(of_model, key=lambda row: row["k_shot"])
        if not points:
            continue
        k = [row["k_shot"] for row in points]
        mean, std, ci95 = (
            [100 * (row[name] or 0) for row in points] for name in ("accuracy", "std", "ci95")
        )
        style = STYLES[model]
        axis.errorbar(k, mean, yerr=ci95, capsize=3, **style)
        low, high = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
        axis.fill_between(k, low, high, color=style["color"], alpha=0.15, linewidth=0)
    n_way = rows[0]["n_way"]
    chance = 100 / n_way
    axis.axhline(
        chance, color="black", linestyle=":", linewidth=1, label=f"Chance ({chance:.0f} %)"
    )
    axis.set_xscale("log", base=2)
    k_values = sorted({row["k_shot"] for row in rows})
    axis.set_xticks(k_values, [str(k) for k in k_values])
    axis.minorticks_off()
    axis.set_xlabel("Support images per class (k)")
    axis.set_ylabel("Accuracy in %")
    axis.set_title(f"{title}, {n_way}-way")
    axis.grid(alpha=0.3)
    axis.legend(title="bars: 95 % interval; band: 1 std", fontsize=8, title_fontsize=8)
    save_figure(figure, path)


def _grid(images, columns, gap=2):
    """Lay images out in rows of `columns`, white in between.

    images uint8 [R * columns, 3, H, W] -> numpy uint8 [R * (H + gap), columns * (W + gap), 3].
    """
    padded = torch.nn.functional.pad(images.cpu(), (0, gap, 0, gap), value=255)
    count, channels, height, width = padded.shape
    rows = count // columns
    grid = padded.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * height, columns * width, channels).numpy()


def _wrapped(name):
    """Break a class name into lines of up to 16 characters, at spaces and after underscores."""
    wrapper = textwrap.TextWrapper(16, break_on_hyphens=False)
    wrapper.wordsep_simple_re = re.compile(r"(\s+)|(?<=_)")
    return "\n".join(wrapper.wrap(name))
