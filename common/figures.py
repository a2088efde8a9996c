"""The figures, as PNG and SVG: curves, an episode, accuracy over k, contact sheets."""

import contextlib
import math
import re
import textwrap
import warnings

import numpy as np
import torch

from common.files import atomic_file
from common.prototypes import distance_logits, make_prototypes
from common.tables import title_of, tutorials_accuracy

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers differ as well.
STYLES = {
    "classifier": {"color": "#CC79A7", "marker": "D"},
    "protonet": {"color": "#D55E00", "marker": "o"},
    "maml": {"color": "#009E73", "marker": "^"},
    "protomaml": {"color": "#0072B2", "marker": "s"},
    "pixels": {"color": "#666666", "marker": "x", "linestyle": "--"},
}
# Those of other models, which may be any: 12 pairs of a colour and a marker.
OTHER_COLORS, OTHER_MARKERS = ("#E69F00", "#56B4E9", "black"), ("v", "P", "*", "h")
SMALL = {"ha": "center", "va": "top", "fontsize": 8}
FEATURE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
# The same model, fine-tuned: the same colour and marker, filled white, and a dash-dotted line.
FINE_TUNED = {"markerfacecolor": "white", "linestyle": "-."}


@contextlib.contextmanager
def new_figure(path, size, suffixes=(".png", ".svg")):
    """Yield an empty figure of `size` inches to draw on; then write `path`.png and `path`.svg.

    Raises UserError where writing fails. matplotlib is slow to load: not before it is needed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # A class may be called "US$": no formula begins there. Without a random salt and a date in the
    # file, the same numbers give the same bytes.
    settings = {"text.parse_math": False, "svg.hashsalt": "few-shot"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # `find_fonts` says it.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure = Figure(size)
        yield figure
        find_fonts(figure)
        for suffix in suffixes:
            with atomic_file(path + suffix) as temporary:
                figure.savefig(temporary, dpi=150, bbox_inches="tight", metadata={"Date": None})


def find_fonts(figure):
    """Give texts in which matplotlib's own font lacks a character those installed that have it.

    Prints which characters no installed font has.
    """
    from matplotlib.font_manager import fontManager, get_font
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    missing = {c for text in texts for c in text.get_text() if not c.isspace()}
    families = [own := "DejaVu Sans"]
    fonts = [font for font in fontManager.ttflist if "Last Resort" not in font.name]  # boxes
    for font in sorted(fonts, key=lambda font: (font.name != own, font.name)):
        if missing and (found := missing & set(map(chr, get_font(font.fname).get_charmap()))):
            missing -= found
            families += [font.name] if font.name not in families else []
    if len(families) > 1:
        for text in texts:
            text.set_fontfamily(families)
    if missing:
        some = "".join(sorted(missing))[:10]
        how = "install one that has them, for example Noto Sans CJK (Debian: fonts-noto-cjk)"
        print(f"no installed font has {len(missing)} characters of this figure ({some}): {how}")


def style_of(row_name, row_names):
    """Return how to draw the results of a model in a figure that shows all of `row_names`."""
    base = row_name.removesuffix("_finetuned")
    others = sorted({name.removesuffix("_finetuned") for name in row_names} - STYLES.keys())
    place = others.index(base) if base in others else 0
    style = STYLES.get(base, {"color": OTHER_COLORS[place % 3], "marker": OTHER_MARKERS[place % 4]})
    return {**style, **(FINE_TUNED if row_name != base else {})}


def plot_training_curves(history, title, tasks, path):
    """Draw loss and accuracy over the epochs, training and validation.

    history: one dict per epoch, as in the CSV. tasks: what is classified in training and in
    validation; accuracies of different tasks cannot be compared.
    """
    epochs = [row["epoch"] for row in history]
    marker = "." if len(epochs) < 40 else None
    with new_figure(path, (10, 3.6)) as figure:
        axes = figure.subplots(1, 2)
        quantities = (("loss", 1, "Cross-entropy", 0.2), ("accuracy", 100, "Accuracy in %", 5))
        for axis, (quantity, scale, label, least_range) in zip(axes, quantities):
            parts = (("train", "#0072B2", "--"), ("val", "#D55E00", "-"))
            for (part, color, line), task in zip(parts, tasks):
                values = [scale * row[f"{part}_{quantity}"] for row in history]
                axis.plot(epochs, values, line, color=color, label=task, marker=marker)
            low, high = axis.get_ylim()
            missing = max(0, least_range - (high - low))  # noise would look like learning
            axis.set_ylim(low - missing / 2, high + missing / 2)
            axis.set_xlim(0.5, epochs[-1] + 0.5)  # a single epoch has no range of its own
            axis.locator_params("x", nbins=10, integer=True, min_n_ticks=1)
            axis.set(xlabel="Epoch", ylabel=label)
            axis.grid(alpha=0.3)
        best = max(history, key=lambda row: row["val_accuracy"])["epoch"]
        axes[1].axvline(best, color="#666666", linestyle=":", label=f"best epoch: {best}")
        axes[1].legend()
        figure.suptitle(title)
        figure.tight_layout()


def plot_episode(image_set, episode, n_way, k_shot, path):
    """Draw one episode: support set left, query set right, a row per class.

    episode: indices in the order of the samplers.
    """
    support = episode[: n_way * k_shot].view(n_way, k_shot)
    query = episode[n_way * k_shot :].view(n_way, -1)
    names = [_wrapped(image_set.class_names[c]) for c in image_set.labels[support[:, 0]]]
    titles = ("Support set: what the model learns from", "Query set: what it has to classify")
    with new_figure(path, (9, 1.05 * n_way + 0.6)) as figure:
        for axis, title, indices in zip(figure.subplots(1, 2), titles, (support, query)):
            images = image_set.images[indices].cpu()  # [N, K, 3, H, W]; then with white gaps
            images = torch.nn.functional.pad(images, (0, 2, 0, 2), value=255)
            grid = images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [N * H, K * W, 3]
            axis.imshow(grid.numpy(), interpolation="nearest")
            axis.set_title(title, fontsize=10)
            axis.set_xticks([])
            middles = [(row + 0.5) * images.shape[3] for row in range(n_way)]
            axis.set_yticks(middles, names if title == titles[0] else [""] * n_way)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        figure.suptitle(f"One {n_way}-way {k_shot}-shot episode of {image_set.name}")
        figure.tight_layout()


def plot_features(image_set, features, k_shot, path):
    """Draw images where two principal components of their features put them, by encoder.

    image_set: as many images of each class, class by class; features: {title: [N, D]}. The first
    k_shot images of a class make its prototype, a star. Of the others, some that are nearest to the
    prototype of another class are shown.
    """
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    names, labels = image_set.class_names, image_set.labels
    is_query = torch.arange(len(labels)) % (len(labels) // len(names)) >= k_shot
    with new_figure(path, (6.5 * len(features), 5.5)) as figure:
        axes = figure.subplots(1, len(features))
        for axis, (title, vectors) in zip(axes, features.items()):
            prototypes = make_prototypes(vectors[~is_query], len(names))  # [C, D]
            both = torch.cat([vectors, prototypes])
            both = both - both.mean(dim=0)
            plane = both @ torch.linalg.svd(both, full_matrices=False).Vh[:2].T  # [N + C, 2]
            nearest = distance_logits(vectors, prototypes).argmax(dim=1)
            for c, (name, star) in enumerate(zip(names, plane[len(labels) :].tolist())):
                color, marker = FEATURE_COLORS[c % 5], "os^Dv"[c // 5 % 5]
                axis.scatter(*plane[: len(labels)][labels == c].T, s=14, c=color, marker=marker)
                axis.scatter(*star, s=200, c=color, marker="*", edgecolor="black", zorder=3)
                axis.annotate(_wrapped(name), star, (6, 6), textcoords="offset points", zorder=4)
            wrong = torch.nonzero((nearest != labels) & is_query)[:, 0]
            wrong = wrong[:: max(1, len(wrong) // 4)][:4].tolist()
            for number, place in enumerate(sorted(wrong, key=lambda n: plane[n, 0].item())):
                pixels = image_set.images[place].permute(1, 2, 0).numpy()
                where = {"xybox": (0.12 + 0.25 * number, -0.12), "boxcoords": "axes fraction"}
                where["arrowprops"] = {"arrowstyle": "-", "color": "#666666"}
                picture = OffsetImage(pixels, zoom=40 / pixels.shape[0])
                axis.add_artist(AnnotationBbox(picture, plane[place].tolist(), **where))
                true, found = (_wrapped(names[c]) for c in (labels[place], nearest[place]))
                text = f"{true}\ntaken for\n{found}"
                axis.text(where["xybox"][0], -0.21, text, transform=axis.transAxes, **SMALL)
            correct = (nearest == labels)[is_query].float().mean().item()
            axis.set_title(f"{title}: {correct:.0%} of the queries correct")
            axis.set(xticks=[], yticks=[])
        figure.suptitle(f"Features of {image_set.name}; a star is the mean of {k_shot} images")


def plot_accuracy_over_k(rows, title, path):
    """Draw accuracy over k for each model, and the tutorial's where it tested the same.

    Points are means, bars 95 % intervals. rows: result rows of one tested data set, as in
    common/tables.py.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    rows = sorted(rows, key=lambda row: row["k_shot"])
    n_way, k_values = rows[0]["n_way"], sorted({row["k_shot"] for row in rows})
    with new_figure(path, (6, 4)) as figure:
        axis, handles = figure.subplots(), []
        for model in models:
            points = [row for row in rows if row["model"] == model]
            k = [row["k_shot"] for row in points]
            results = [[row["accuracy"], row["ci95"]] for row in points]
            mean, ci95 = 100 * np.array(results, float).T  # [len(k)] each, NaN for None
            style = {**style_of(model, models), "label": title_of(model)}
            handles.append(axis.errorbar(k, mean, yerr=ci95, capsize=3, **style))
            tutorials = [tutorials_accuracy(row) for row in points]
            if all(tutorials):
                printed = [tutorials_accuracy(row, printed=True) for row in points]
                style["label"] += ", the tutorial's" + (", corrected" * (tutorials != printed))
                style.update(linestyle=":", markerfacecolor="white", markersize=4.5)
                handles += axis.plot(k, tutorials, **style)
        chance = {"color": "black", "linestyle": ":", "label": f"Chance ({100 / n_way:.3g} %)"}
        handles.append(axis.axhline(100 / n_way, linewidth=1, **chance))
        axis.set_xscale("log", base=2)
        axis.set_xticks(k_values, map(str, k_values))
        axis.set(xlabel="Support images per class (k)", ylabel="Accuracy in %")
        axis.set_title(f"{title}, {n_way}-way")
        axis.grid(alpha=0.3)
        # Beside the axes: the curves may lie anywhere in them.
        place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "alignment": "left"}
        explained = "bars: 95 % interval of the mean"
        axis.legend(handles=handles, title=explained, fontsize=8, title_fontsize=8, **place)


def plot_contact_sheet(images, rows, unsure, title, path, columns=10):
    """Draw classified images, each with class, probability and file below, as `path` (a PNG).

    images uint8 [N, S, S, 3]; rows: N dicts with file, class and probability. Those whose
    probability is below `unsure` get a dashed frame and a question mark.
    """
    names = [_wrapped(row["class"]).split("\n") for row in rows]
    names = ["\n".join(lines[:2]) + ("..." if lines[2:] else "") for lines in names]
    columns = min(columns, len(rows))
    # In inches; the images are 1 x 1, and a line of text is 0.13 high.
    step = 1.1, 1.5 + 0.13 * max(name.count("\n") for name in names)
    across, down = columns * step[0], math.ceil(len(rows) / columns) * step[1]
    small = {"ha": "center", "va": "top", "linespacing": 1.15}
    with new_figure(path.removesuffix(".png"), (across, down), (".png",)) as figure:
        axis = figure.add_axes((0, 0, 1, 1))
        for number, (image, row, name) in enumerate(zip(images, rows, names)):
            left, top = number % columns * step[0], number // columns * step[1]
            axis.imshow(image, extent=(left, left + 1, top + 1, top))
            text, color = f"{name}\n{100 * row['probability']:.0f} %", "black"
            if row["probability"] < unsure:
                text, color = f"{text} ?", "#D55E00"
                x, y = [left, left + 1, left + 1, left, left], [top, top, top + 1, top + 1, top]
                axis.plot(x, y, color=color, linestyle=(0, (3, 2)), linewidth=2.5, clip_on=False)
            axis.text(left + 0.5, top + 1.03, text, color=color, fontsize=7, **small)
            below = top + 1.03 + 0.13 * (text.count("\n") + 1)
            file = row["file"]
            file = file if len(file) < 20 else f"{file[:8]}...{file[-8:]}"
            axis.text(left + 0.5, below, file, color="#666666", fontsize=6, **small)
        axis.set(xlim=(0, across), ylim=(down, 0))
        axis.axis("off")
        axis.set_title(title, loc="left", fontsize=9)


def _wrapped(name):
    """Break a class name into lines of up to 16 characters, at spaces and after underscores."""
    wrapper = textwrap.TextWrapper(16, break_on_hyphens=False)
    wrapper.wordsep_simple_re = re.compile(r"(\s+)|(?<=_)")
    return "\n".join(wrapper.wrap(name))
