"""Compare the tutorial's recipes, run whole, with what the tutorial published: figures and tables.

    python benchmarks/reproduction.py    # a few seconds

Draws and prints what docs/reproduction.md shows, from results/tutorial* and checkpoints/tutorial.
"""

import glob
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root

import numpy as np

from common.figures import STYLES, new_figure
from common.kshot import half_width
from common.tables import title_of
from common.tutorial import CORRECTED, K_SHOTS, PRINTED

CURVES = f"{sys.path[0]}/checkpoints/tutorial/cifar100"
RESULTS = f"{sys.path[0]}/results/tutorial"
MODELS = ("protonet", "protomaml", "maml")
EPOCHS = (1, 5, 10, 20, 50, 100, 140, 200)  # of the printed table
# The standard deviation over support sets in %, which the tutorial prints behind each accuracy.
PRINTED_STD = {
    ("protonet", "cifar100"): (3.63, 2.27, 1.30, 1.02, 0.87),
    ("protomaml", "cifar100"): (3.82, 2.72, 1.50, 1.24, 0.90),
    ("protonet", "svhn"): (2.28, 2.09, 1.76, 1.84, 1.33),
    ("protomaml", "svhn"): (1.95, 1.92, 1.84, 1.80, 1.65),
}
# (epoch, accuracy in %) of the published checkpoints on this project's validation episodes.
AUTHORS_CHECKPOINTS = {"protonet": (175, 70.67), "protomaml": (200, 71.17)}


def main():
    compare_training()
    paths = sorted(glob.glob(f"{RESULTS}*/accuracy.json"))
    rows = [row for path in paths for row in json.loads(Path(path).read_text())]
    for dataset in sorted({row["dataset"] for row in rows}):
        compare_tests(dataset, [row for row in rows if row["dataset"] == dataset])


def compare_training():
    """Draw and print the validation curves beside those of the logs that the author published."""
    quantity = "5-way validation accuracy in %"
    print_row(f"{quantity} after epoch", [*EPOCHS, "181 to 200, mean", "best"], heading=True)
    with new_figure(f"{RESULTS}/curves", (7, 4.2)) as figure:
        axis = figure.subplots()
        for model in MODELS:
            style = {**STYLES[model], "markersize": 5, "markevery": 20, "linewidth": 1.2}
            curves = {name_here(model): read_curve(f"{CURVES}/{model}.csv")}
            for path in glob.glob(f"{RESULTS}/author_{model}.csv"):
                curves[f"{title_of(model)}, the author's log"] = read_curve(path, "val_acc")
            for name, accuracy in curves.items():
                axis.plot(*zip(*accuracy.items()), label=name, **style)
                style.update(linestyle=":", markerfacecolor="white")  # of the author's
                cells = [f"{accuracy[e]:.2f}" if e in accuracy else "-" for e in EPOCHS]
                last = [accuracy[e] for e in range(181, 201) if e in accuracy]
                cells.append(f"{np.mean(last):.2f}" if len(last) == 20 else "-")
                best = max(accuracy, key=accuracy.get)
                print_row(name, [*cells, f"{accuracy[best]:.2f} ({best})"])
            if model in AUTHORS_CHECKPOINTS:
                star = {"color": style["color"], "markersize": 11, "markeredgecolor": "black"}
                label = f"{title_of(model)}, the author's checkpoint on these episodes"
                axis.plot(*AUTHORS_CHECKPOINTS[model], "*", label=label, **star)
        axis.set(title="The tutorial's recipes on CIFAR-100", xlabel="Epoch", ylabel=quantity)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        figure.tight_layout()


def read_curve(path, column="val_accuracy"):
    """Return {epoch: accuracy in %}."""
    rows = np.genfromtxt(path, delimiter=",", names=True)
    return {int(row["epoch"]): 100 * row[column] for row in rows}


def name_here(model):
    """Return the name of a model of this project, with its epochs where they are not 200."""
    epochs = len(read_curve(f"{CURVES}/{model}.csv"))
    return f"{title_of(model)}, here" + (f", {epochs} epochs" if epochs != 200 else "")


def compare_tests(dataset, rows):
    """Draw and print the accuracy over k beside the tutorial's; rows: of accuracy.json."""
    print_row(f"10-way accuracy in % on {dataset}, k =", K_SHOTS, heading=True)
    here, tutorials = {}, {}  # {model: accuracies and half-widths of their intervals, [2, K]}
    for model in MODELS:
        if (model, dataset) in PRINTED:
            printed, tutorials[model] = tutorials_results(model, dataset)
            print_row(f"{title_of(model)}, printed", intervals(printed))
            if (printed != tutorials[model]).any():
                print_row(f"{title_of(model)}, corrected", intervals(tutorials[model]))
        if of_model := [row for row in rows if row["model"] == model]:
            here[model] = 100 * np.array([[row["accuracy"], row["ci95"]] for row in of_model]).T
            print_row(f"**{name_here(model)}**", intervals(here[model]))
            if model in tutorials:
                print_row("difference", differences(here[model], tutorials[model]))
            print_row("support sets", [row["num_support_sets"] for row in of_model])
    for whose, results in (("here", here), ("the tutorial's, corrected", tutorials)):
        if {"protonet", "protomaml"} <= set(results):
            lead = differences(results["protomaml"], results["protonet"])
            print_row(f"ProtoMAML's lead over ProtoNet, {whose}", lead)
    with new_figure(f"{RESULTS}/compared_{dataset}", (7, 4.2)) as figure:
        axis = figure.subplots()
        for model, (mean, ci95) in here.items():
            axis.errorbar(K_SHOTS, mean, ci95, capsize=3, label=name_here(model), **STYLES[model])
        for model, (mean, ci95) in tutorials.items():
            corrected = ", corrected" * (CORRECTED[model, dataset] != PRINTED[model, dataset])
            style = {**STYLES[model], "label": f"{title_of(model)}, the tutorial's{corrected}"}
            style.update(linestyle=":", markerfacecolor="white")
            axis.errorbar(K_SHOTS, mean, ci95, capsize=3, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(K_SHOTS, map(str, K_SHOTS))
        axis.set(xlabel="Support images per class (k)", ylabel="10-way accuracy in %")
        axis.grid(alpha=0.3)
        axis.legend(title="bars: 95 % interval")
        figure.tight_layout()


def tutorials_results(model, dataset):
    """Return the tutorial's printed and corrected results, [2, K] each as above."""
    # The ProtoNet test takes the short last chunk of a class's images, too.
    chunks = {"cifar100": 600, "svhn": 500}[dataset] / np.array(K_SHOTS)
    sets = np.ceil(chunks) if model == "protonet" else np.floor(chunks)
    widths = list(map(half_width, PRINTED_STD[model, dataset], sets))
    printed = np.array([PRINTED[model, dataset], widths])
    # A wrong division stretches the standard deviation as it stretches the accuracy.
    return printed, printed * np.divide(CORRECTED[model, dataset], PRINTED[model, dataset])


def intervals(results, sign=""):
    """Return cells: mean ± half-width."""
    return [f"{mean:{sign}.2f} ± {width:.2f}" for mean, width in zip(*results)]


def differences(one, other):
    """Return cells: difference ± half-width, as if the two were independent."""
    return intervals((one[0] - other[0], np.hypot(one[1], other[1])), "+")


def print_row(name, cells, heading=False):
    line = f"| {name} | " + " | ".join(map(str, cells)) + " |"
    print(f"\n{line}\n|---|" + "---:|" * len(cells) if heading else line)


if __name__ == "__main__":
    sys.exit(__doc__) if sys.argv[1:] else main()
