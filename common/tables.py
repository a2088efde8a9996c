"""The results as tables: fixed width for the screen, Markdown, CSV and JSON."""

import csv
import io
import json
import os

from common.checkpoint import MODEL_NAMES
from common.files import write_text

# Accuracy in % that the tutorial prints, by model and tested data set, for k = 2, 4, 8, 16, 32; and what is left of it
# when correct predictions are divided by the number of queries (its ProtoNet test divides by too few where k does not
# divide the number of images of a class; its ProtoMAML test is right).
TUTORIAL_PRINTED = {
    ("protonet", "cifar100"): (44.30, 52.07, 57.59, 62.56, 66.49),
    ("protomaml", "cifar100"): (42.89, 52.27, 59.23, 63.94, 67.57),
    ("protonet", "svhn"): (18.82, 21.94, 25.59, 29.06, 32.93),
    ("protomaml", "svhn"): (17.11, 21.29, 27.62, 36.17, 46.03),
}
TUTORIAL_CORRECTED = {
    **TUTORIAL_PRINTED,
    ("protonet", "cifar100"): (44.30, 52.07, 57.59, 60.87, 62.80),
    ("protonet", "svhn"): (18.82, 21.94, 25.18, 28.12, 30.73),
}
TUTORIAL_K = (2, 4, 8, 16, 32)

HEADINGS = ("model", "tested on", "k", "accuracy", "95 % interval", "std", "sets", "tutorial printed", "corrected")
NOTE = "Accuracy, interval and std in %. The interval is of the mean over the support sets; std says how much one support set differs from the next."


def text_table(rows, failures):
    """Return the results as a table of fixed width; failures: {data set: what is wrong and what to do}."""
    cells = [HEADINGS, *_cells(rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = ["  ".join(_aligned(cell, width, column) for column, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in cells]
    lines.insert(1, "-" * len(max(lines, key=len)))
    lines += [f"{name}: not tested. {reason}" for name, reason in failures.items()]
    return "\n".join([*lines, NOTE])


def markdown_table(rows, failures):
    """Return the results as a Markdown table."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "|".join("---" if column < 2 else "---:" for column in range(len(HEADINGS))) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in _cells(rows)]
    lines += [f"\n{name}: not tested. {reason}" for name, reason in failures.items()]
    return "\n".join([*lines, "", NOTE, ""])


def write_tables(rows, failures, folder):
    """Write accuracy.json, accuracy.csv and accuracy.md into `folder`. Raises UserError where that fails."""
    write_text(os.path.join(folder, "accuracy.json"), json.dumps(rows, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name in rows[0] if name != "settings"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(os.path.join(folder, "accuracy.csv"), text.getvalue())
    write_text(os.path.join(folder, "accuracy.md"), markdown_table(rows, failures))


def _cells(rows):
    for row in rows:
        yield (
            MODEL_NAMES.get(row["model"], row["model"]) + (", mirrored" if row["settings"].get("mirror") else ""),
            row["dataset"] + (" (val)" if row["classes"] == "val" else ""),
            str(row["k_shot"]),
            _percent(row["accuracy"]),
            f"± {_percent(row['ci95'])}" if row["ci95"] is not None else "-",
            _percent(row["std"]),
            str(row["num_support_sets"]),
            _tutorial(TUTORIAL_PRINTED, row),
            _tutorial(TUTORIAL_CORRECTED, row),
        )


def _tutorial(numbers, row):
    # The tutorial trained on CIFAR-100 and did not test on validation classes; beside other rows its numbers say nothing.
    comparable = row["trained_on"] == "cifar100" and row["classes"] != "val"
    known = numbers.get((row["model"], row["dataset"])) if comparable else None
    return f"{known[TUTORIAL_K.index(row['k_shot'])]:.2f}" if known and row["k_shot"] in TUTORIAL_K else "-"


def _percent(value):
    return "-" if value is None else f"{100 * value:.2f}"


def _aligned(cell, width, column):
    return cell.ljust(width) if column < 2 else cell.rjust(width)
