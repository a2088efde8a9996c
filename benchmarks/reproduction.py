"""Draw the validation curves of the tutorial's recipes beside its author's, and print a table.

    python benchmarks/reproduction.py

Reads checkpoints/tutorial/cifar100/*.csv, which the trainers wrote, and the author's curves, from
the logs that he published, results/tutorial/author_*.csv. Writes results/tutorial/curves.png and
curves.svg.
"""

import csv
import os
import sys

# The project's root, before the imports from there.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import matplotlib.pyplot as plt

from common.checkpoint import MODEL_NAMES
from common.figures import STYLES, save_figure

ROOT = sys.path[0]
EPOCHS = (1, 5, 10, 20, 50, 100, 140, 200)  # of the printed table


def main():
    figure, axis = plt.subplots(figsize=(7, 4.2))
    print(f"{'validation accuracy in % after epoch':<40}" + "".join(f"{e:>7}" for e in EPOCHS))
    for model in ("protonet", "protomaml", "maml"):
        ours = os.path.join(ROOT, "checkpoints", "tutorial", "cifar100", f"{model}.csv")
        authors = os.path.join(ROOT, "results", "tutorial", f"author_{model}.csv")
        name, color = MODEL_NAMES[model], STYLES[model]["color"]
        for path, column, whose, line in (
            (ours, "val_accuracy", "here", "-"),
            (authors, "val_acc", "the author's", ":"),
        ):
            if not os.path.exists(path):
                continue
            accuracy = read_curve(path, column)
            axis.plot(*zip(*accuracy.items()), line, color=color, label=f"{name}, {whose}")
            cells = (f"{accuracy[e]:>7.2f}" if e in accuracy else f"{'-':>7}" for e in EPOCHS)
            print(f"{f'{name}, {whose} ({len(accuracy)} epochs)':<40}" + "".join(cells))
    axis.set_xlabel("Epoch")
    axis.set_ylabel("5-way validation accuracy in %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    save_figure(figure, os.path.join(ROOT, "results", "tutorial", "curves"))


def read_curve(path, column):
    """Return {epoch: accuracy in %}."""
    with open(path, newline="", encoding="utf-8") as file:
        return {int(row["epoch"]): 100 * float(row[column]) for row in csv.DictReader(file)}


if __name__ == "__main__":
    main()
