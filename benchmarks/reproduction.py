"""Compare the tutorial's recipes, run whole, with what the tutorial published: figures and tables.

    python benchmarks/reproduction.py

Reads checkpoints/tutorial/cifar100/*.csv, which the trainers wrote; accuracy.json in
results/tutorial and results/tutorial_maml, which evaluate.py wrote; and the curves of the
tutorial's author, from the logs that he published, results/tutorial/author_*.csv. Draws
results/tutorial/curves and, for each tested data set, results/tutorial/compared_<data set>, as PNG
and SVG; prints the tables of docs/reproduction.md. A few seconds, no data set needed.
"""

import csv
import json
import math
import os
import statistics
import sys

# The project's root, before the imports from there.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import matplotlib.pyplot as plt

from common.checkpoint import MODEL_NAMES
from common.figures import STYLES, save_figure
from common.kshot import half_width
from common.tutorial import CORRECTED, K_SHOTS, PRINTED, PRINTED_STD

ROOT = sys.path[0]
RESULTS = os.path.join(ROOT, "results", "tutorial")
MODELS = ("protonet", "protomaml", "maml")
EPOCHS = (1, 5, 10, 20, 50, 100, 140, 200)  # of the printed table
IMAGES_PER_CLASS = {"cifar100": 600, "svhn": 500}  # in the tutorial's tests
# (epoch, accuracy in %) of the published checkpoints on this project's validation episodes.
AUTHORS_CHECKPOINTS = {"protonet": (175, 70.67), "protomaml": (200, 71.17)}


def main():
    compare_training()
    rows = []
    for folder in (RESULTS, f"{RESULTS}_maml"):
        path = os.path.join(folder, "accuracy.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                rows += [row for row in json.load(file) if row["k_shot"] in K_SHOTS]
    for dataset in sorted({row["dataset"] for row in rows}):
        compare_tests(dataset, [row for row in rows if row["dataset"] == dataset])


def compare_training():
    """Draw and print the validation curves beside the author's."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    columns = [*EPOCHS, "181 to 200, mean", "best"]
    print_heading("5-way validation accuracy in % after epoch", columns)
    for model in MODELS:
        authors = f"{MODEL_NAMES[model]}, the author's log"
        for path, column, name, line in (
            (curve_of(model), "val_accuracy", name_here(model), "-"),
            (os.path.join(RESULTS, f"author_{model}.csv"), "val_acc", authors, ":"),
        ):
            if not os.path.exists(path):
                continue
            accuracy = read_curve(path, column)
            style = {**STYLES[model], "markersize": 5, "markevery": 20, "linewidth": 1.2}
            if line == ":":
                style["markerfacecolor"] = "white"
            axis.plot(*zip(*accuracy.items()), line, label=name, **style)
            best = max(accuracy, key=accuracy.get)
            cells = [f"{accuracy[e]:.2f}" if e in accuracy else "-" for e in EPOCHS]
            last = [accuracy[epoch] for epoch in range(181, 201) if epoch in accuracy]
            cells.append(f"{statistics.mean(last):.2f}" if len(last) == 20 else "-")
            print_row(name, [*cells, f"{accuracy[best]:.2f} ({best})"])
        if model in AUTHORS_CHECKPOINTS:
            star = {**STYLES[model], "marker": "*", "markersize": 11, "markeredgecolor": "black"}
            label = f"{MODEL_NAMES[model]}, the author's checkpoint on these episodes"
            axis.plot(*AUTHORS_CHECKPOINTS[model], linestyle="", label=label, **star)
    axis.set_title("The tutorial's recipes on CIFAR-100")
    axis.set_xlabel("Epoch")
    axis.set_ylabel("5-way validation accuracy in %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, os.path.join(RESULTS, "curves"))


def curve_of(model):
    return os.path.join(ROOT, "checkpoints", "tutorial", "cifar100", f"{model}.csv")


def name_here(model):
    """Return the name of a model of this project, with its epochs where they are not 200."""
    epochs = len(read_curve(curve_of(model), "val_accuracy"))
    return f"{MODEL_NAMES[model]}, here" + (f", {epochs} epochs" if epochs != 200 else "")


def read_curve(path, column):
    """Return {epoch: accuracy in %}."""
    with open(path, newline="", encoding="utf-8") as file:
        return {int(row["epoch"]): 100 * float(row[column]) for row in csv.DictReader(file)}


def compare_tests(dataset, rows):
    """Draw and print the accuracy over k beside the tutorial's; rows: of accuracy.json."""
    print_heading(f"10-way accuracy in % on {dataset}, k =", K_SHOTS)
    here, tutorials = {}, {}  # {model: (accuracies, half-widths of their 95 % intervals)}
    for model in MODELS:
        name = MODEL_NAMES[model]
        of_model = {row["k_shot"]: row for row in rows if row["model"] == model}
        if (model, dataset) in PRINTED:
            printed, widths = tutorials_intervals(PRINTED, model, dataset)
            print_row(f"{name}, printed", intervals(printed, widths))
            tutorials[model] = tutorials_intervals(CORRECTED, model, dataset)
            if tutorials[model][0] != printed:
                print_row(f"{name}, corrected", intervals(*tutorials[model]))
        if of_model:
            here[model] = tuple(
                [100 * of_model[k][quantity] for k in K_SHOTS] for quantity in ("accuracy", "ci95")
            )
            print_row(f"**{name_here(model)}**", intervals(*here[model]))
            if model in tutorials:
                print_row("difference", differences(here[model], tutorials[model]))
            print_row("support sets", [str(of_model[k]["num_support_sets"]) for k in K_SHOTS])
    for whose, results in (("here", here), ("the tutorial's, corrected", tutorials)):
        if {"protonet", "protomaml"} <= set(results):
            lead = differences(results["protomaml"], results["protonet"])
            print_row(f"ProtoMAML's lead over ProtoNet, {whose}", lead)
    draw_tests(dataset, here, tutorials)


def tutorials_intervals(numbers, model, dataset):
    """Return the tutorial's accuracies out of PRINTED or CORRECTED, and their half-widths, in %.

    A wrong division stretches the standard deviation as it stretches the accuracy.
    """
    widths = []
    for k, std, printed, mean in zip(
        K_SHOTS, PRINTED_STD[model, dataset], PRINTED[model, dataset], numbers[model, dataset]
    ):
        chunks = IMAGES_PER_CLASS[dataset] / k
        # The ProtoNet test takes the short last chunk, too.
        sets = math.ceil(chunks) if model == "protonet" else math.floor(chunks)
        widths.append(half_width(std * mean / printed, sets))
    return numbers[model, dataset], widths


def draw_tests(dataset, here, tutorials):
    """Draw accuracy over k; here and tutorials: {model: (accuracies, half-widths)}."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for model, (found, widths) in here.items():
        style = {**STYLES[model], "label": name_here(model)}
        axis.errorbar(K_SHOTS, found, yerr=widths, capsize=3, **style)
    for model, (corrected, widths) in tutorials.items():
        label = f"{MODEL_NAMES[model]}, the tutorial's"
        label += ", corrected" if corrected != PRINTED[model, dataset] else ""
        style = {**STYLES[model], "linestyle": ":", "markerfacecolor": "white", "label": label}
        axis.errorbar(K_SHOTS, corrected, yerr=widths, capsize=3, **style)
    axis.set_xscale("log", base=2)
    axis.set_xticks(K_SHOTS, map(str, K_SHOTS))
    axis.minorticks_off()
    axis.set_xlabel("Support images per class (k)")
    axis.set_ylabel("10-way accuracy in %")
    axis.grid(alpha=0.3)
    axis.legend(title="bars: 95 % interval")
    figure.tight_layout()
    save_figure(figure, os.path.join(RESULTS, f"compared_{dataset}"))


def intervals(means, widths):
    """Return cells: mean ± half-width."""
    return [f"{mean:.2f} ± {width:.2f}" for mean, width in zip(means, widths)]


def differences(of_one, of_other):
    """Return cells: difference ± half-width, as if the two were independent."""
    cells = zip(*of_one, *of_other)
    return [f"{a - b:+.2f} ± {math.hypot(width, other):.2f}" for a, width, b, other in cells]


def print_heading(title, columns):
    print(f"\n| {title} | " + " | ".join(map(str, columns)) + " |")
    print("|---|" + "---:|" * len(columns))


def print_row(name, cells):
    print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
