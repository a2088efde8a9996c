"""The figures: training curves, images of a data set, one episode, accuracy over k. Each as PNG and SVG."""

import math

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
    "protonet": {"color": "#D55E00", "marker": "o", "label": MODEL_NAMES["protonet"]},
    "protomaml": {"color": "#0072B2", "marker": "s", "label": MODEL_NAMES["protomaml"]},
    "maml": {"color": "#009E73", "marker": "^", "label": MODEL_NAMES["maml"]},
    "pixels": {"color": "#666666", "marker": "x", "label": "Raw pixels", "linestyle": "--"},
}
TRAIN, VALIDATION = "#0072B2", "#D55E00"


def save_figure(figure, path):
    """Write a figure to `path`.png and `path`.svg and close it. Raises UserError where that fails."""
    for suffix in (".png", ".svg"):
        with atomic_file(path + suffix) as temporary:
            # Without a date in the file, the same numbers give the same bytes.
            figure.savefig(temporary, dpi=150, bbox_inches="tight", metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)


def plot_training_curves(history, model_name, dataset, path):
    """Draw loss and accuracy over the epochs, training and validation; history: one dict per epoch."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    epochs = [row["epoch"] for row in history]
    for axis, quantity, scale, label in ((axes[0], "loss", 1, "Cross-entropy"), (axes[1], "accuracy", 100, "Accuracy in %")):
        for part, color, name in (("train", TRAIN, "training classes"), ("val", VALIDATION, "validation classes")):
            axis.plot(epochs, [scale * row[f"{part}_{quantity}"] for row in history], color=color, label=name, marker="." if len(epochs) < 40 else None)
        axis.set_xlabel("Epoch")
        axis.set_ylabel(label)
        axis.set_xlim(0.5, epochs[-1] + 0.5)  # a single epoch has no range of its own
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    best = max(history, key=lambda row: row["val_accuracy"])
    axes[1].axvline(best["epoch"], color="#666666", linestyle=":", label=f"best epoch: {best['epoch']}")
    axes[1].legend()
    figure.suptitle(f"Training of {model_name} on {dataset}")
    figure.tight_layout()
    save_figure(figure, path)


def plot_examples(image_set, path, rows=2, columns=10):
    """Draw images of up to rows * columns classes, spread evenly over the classes, one of each."""
    count = min(rows * columns, len(image_set.class_names))
    chosen = [position * len(image_set.class_names) // count for position in range(count)]
    columns = min(columns, count)
    figure, axes = plt.subplots(math.ceil(count / columns), columns, figsize=(1.25 * columns, 1.6 * math.ceil(count / columns)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, c in zip(axes.flat, chosen):
        image = image_set.images[int(torch.nonzero(image_set.labels == c)[0])]
        axis.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axis.set_title(_short(image_set.class_names[c]), fontsize=7)
    figure.suptitle(f"Examples of {image_set.name}")
    save_figure(figure, path)


def plot_episode(image_set, episode, n_way, k_shot, path):
    """Draw one episode (indices as the samplers give them): support set left, query set right, a row per class."""
    support, query = episode[: n_way * k_shot].view(n_way, k_shot), episode[n_way * k_shot :].view(n_way, -1)
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.05 * n_way + 0.6))
    for axis, title, rows in ((axes[0], "Support set: what the model learns from", support), (axes[1], "Query set: what it has to classify", query)):
        axis.imshow(_grid(image_set.images[rows.flatten()], rows.shape[1]), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        height = image_set.images.shape[2] + 2
        axis.set_yticks([row * height + height / 2 for row in range(n_way)])
        axis.set_yticklabels([_short(image_set.class_names[image_set.labels[rows[row, 0]]]) for row in range(n_way)] if axis is axes[0] else [])
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.suptitle(f"One {n_way}-way {k_shot}-shot episode of {image_set.name}")
    figure.tight_layout()
    save_figure(figure, path)


def plot_accuracy_over_k(rows, models, title, path):
    """Draw accuracy over k for each of `models`: mean, 95 % interval as bars, one standard deviation as a band.

    rows: result rows of one tested data set, with model, k_shot, n_way, accuracy, std, ci95.
    """
    figure, axis = plt.subplots(figsize=(6, 4))
    for model in models:
        points = sorted((row for row in rows if row["model"] == model), key=lambda row: row["k_shot"])
        if not points:
            continue
        k = [row["k_shot"] for row in points]
        mean, std, ci95 = ([100 * (row[name] or 0) for row in points] for name in ("accuracy", "std", "ci95"))
        style = STYLES[model]
        axis.errorbar(k, mean, yerr=ci95, capsize=3, **style)
        axis.fill_between(k, [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)], color=style["color"], alpha=0.15, linewidth=0)
    n_way = rows[0]["n_way"]
    axis.axhline(100 / n_way, color="black", linestyle=":", linewidth=1, label=f"Chance ({100 / n_way:.0f} %)")
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
    """Lay images uint8 [R*C, 3, H, W] out in rows of `columns`, white in between; returns [R*(H+gap), C*(W+gap), 3]."""
    padded = torch.nn.functional.pad(images.cpu(), (0, gap, 0, gap), value=255)
    count, channels, height, width = padded.shape
    grid = padded.reshape(count // columns, columns, channels, height, width)
    return grid.permute(0, 3, 1, 4, 2).reshape(count // columns * height, columns * width, channels).numpy()


def _short(name, length=16):
    return name if len(name) <= length else name[: length - 1] + "\u2026"
