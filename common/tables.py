"""The results as tables: fixed width for the screen, Markdown, CSV and JSON."""

import csv
import io
import json
import os

from common import tutorial
from common.checkpoint import MODEL_NAMES
from common.files import write_text

HEADINGS = (
    "model",
    "tested on",
    "k",
    "accuracy",
    "95 % interval",
    "std",
    "sets",
    "tutorial printed",
    "corrected",
)
NOTE = (
    "Accuracy, interval and std in %. The interval is of the mean over the support sets; std says "
    "how much one support set differs from the next."
)


def text_table(rows, failures):
    """Return the results as a table of fixed width.

    failures: {data set: what is wrong and what to do}.
    """
    cells = [HEADINGS, *_cells(rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(map(_aligned, line, widths, range(len(line)))).rstrip() for line in cells]
    lines.insert(1, "-" * len(max(lines, key=len)))
    lines += [f"{name}: not tested. {reason}" for name, reason in failures.items()]
    return "\n".join([*lines, NOTE])


def markdown_table(rows, failures):
    """Return the results as a Markdown table; failures as in `text_table`."""
    rule = ["---" if column < 2 else "---:" for column in range(len(HEADINGS))]
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "|".join(rule) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in _cells(rows)]
    lines += [f"\n{name}: not tested. {reason}" for name, reason in failures.items()]
    return "\n".join([*lines, "", NOTE, ""])


def write_tables(rows, failures, folder):
    """Write accuracy.json, accuracy.csv and accuracy.md into `folder`.

    Raises UserError where that fails.
    """
    write_text(os.path.join(folder, "accuracy.json"), json.dumps(rows, indent=1) + "\n")
    text = io.StringIO()
    columns = [name for name in rows[0] if name != "settings"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(os.path.join(folder, "accuracy.csv"), text.getvalue())
    write_text(os.path.join(folder, "accuracy.md"), markdown_table(rows, failures))


def _cells(rows):
    for row in rows:
        mirrored = ", mirrored" if row["settings"].get("mirror") else ""
        yield (
            MODEL_NAMES.get(row["model"], "Pixels") + mirrored,
            row["dataset"] + (" (val)" if row["classes"] == "val" else ""),
            str(row["k_shot"]),
            _percent(row["accuracy"]),
            f"± {_percent(row['ci95'])}" if row["ci95"] is not None else "-",
            _percent(row["std"]),
            str(row["num_support_sets"]),
            _tutorial(tutorial.PRINTED, row),
            _tutorial(tutorial.CORRECTED, row),
        )


def _tutorial(numbers, row):
    # The tutorial trained on CIFAR-100 and tested on no validation classes: its numbers are
    # comparable with no other row.
    if row["trained_on"] != "cifar100" or row["classes"] == "val":
        return "-"
    known = tutorial.accuracy(numbers, row["model"], row["dataset"], row["k_shot"])
    return "-" if known is None else f"{known:.2f}"


def _percent(value):
    return "-" if value is None else f"{100 * value:.2f}"


def _aligned(cell, width, column):
    return cell.ljust(width) if column < 2 else cell.rjust(width)
