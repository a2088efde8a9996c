"""The results as tables: fixed width for the screen, Markdown, CSV and JSON."""

import csv
import io
import json
import os

from common import tutorial
from common.checkpoint import ROW_NAMES
from common.files import write_text
from common.splits import PAPERS

HEADINGS = ("model", "tested on", "k", "accuracy", "95 % interval", "std")
KSHOT_HEADINGS = (*HEADINGS, "sets")
TUTORIAL_HEADINGS = ("tutorial printed", "tutorial corrected")
EPISODE_HEADINGS = (*HEADINGS, "episodes", "n_way", "parameters (M)")
CLASSIFIED_HEADINGS = ("file", "class", "probability", "runner-up", "probability")
PUBLISHED_HEADINGS = ("published", "encoder", "parameters (M)", "1-shot", "5-shot")
PUBLISHED_NOTE = (
    "5-way accuracy in %, inductive like the rows above; common/published.py names the papers."
)
NOTE = (
    "k: support images per class. Accuracy, interval and std in %. The interval is of the mean "
    "over the {0}s; std says how much one {0} differs from the next."
)
TUTORIAL_NOTE = (
    " Corrected: correct predictions over queries; the tutorial's ProtoNet test divides by too few."
)


def text_table(rows, failures, published=()):
    """Return the results as a table of fixed width.

    rows: of evaluate.py; `split` names the split that the model was trained on, "" for one's own.
    failures: {data set: what is wrong and what to do}. published: rows of common/published.py, a
    table of their own below.
    """
    lines = text_lines(_cells(rows))
    lines += [f"{name}: not tested. {reason}" for name, reason in failures.items()]
    lines.append(_note(rows))
    if published:
        lines += ["", *text_lines(_published_cells(published)), PUBLISHED_NOTE]
    return "\n".join(lines)


def markdown_table(rows, failures, published=()):
    """Return the results as a Markdown table; failures and published as in `text_table`."""
    lines = markdown_lines(_cells(rows))
    lines += [f"\n{name}: not tested. {reason}" for name, reason in failures.items()]
    lines += ["", _note(rows), ""]
    if published:
        lines += [*markdown_lines(_published_cells(published)), "", PUBLISHED_NOTE, ""]
    return "\n".join(lines)


def write_tables(rows, failures, folder, published=(), made_by=""):
    """Write accuracy.json, accuracy.csv and accuracy.md into `folder`.

    made_by: Markdown that ends accuracy.md. What the rows say of single classes is left to
    `write_class_table`. Raises UserError where writing fails.
    """
    kept = [{name: row[name] for name in row if name != "confusion"} for row in rows]
    write_text(os.path.join(folder, "accuracy.json"), json.dumps(kept, indent=1) + "\n")
    lines = [{**row, "settings": json.dumps(row["settings"])} for row in kept]
    write_csv(os.path.join(folder, "accuracy.csv"), list(kept[0]), lines)
    markdown = markdown_table(rows, failures, published) + made_by
    write_text(os.path.join(folder, "accuracy.md"), markdown)


def write_class_table(rows, class_names, path):
    """Write as CSV how often each class is recognised, and which other it is most often taken for.

    rows: result rows with "confusion", counts [C, C] of queries by true and predicted class.
    Without any, nothing is written. Raises UserError where writing fails.
    """
    lines = []
    for row in rows:
        for c, of_class in enumerate(row["confusion"]):
            queries = sum(of_class)
            mistakes = [0 if other == c else count for other, count in enumerate(of_class)]
            most = max(mistakes)
            lines.append(
                {
                    "model": row["model"],
                    "k_shot": row["k_shot"],
                    "class": class_names[c],
                    "accuracy": of_class[c] / queries,
                    "most_often_mistaken_for": class_names[mistakes.index(most)] if most else "",
                    "share_of_queries": most / queries,
                }
            )
    if lines:
        write_csv(path, list(lines[0]), lines)


def variant(settings):
    """Return what a row's name says of the settings: ", 6 views, bfloat16", or nothing."""
    views, precision = settings.get("views", 1), settings.get("precision", "float32")
    parts = {
        ", 0 steps": settings.get("finetune_steps") == 0,
        f", {views} views": views > 1,
        f", {precision}": precision != "float32",
    }
    return "".join(part for part, said in parts.items() if said)


def tutorials_accuracy(row, numbers=tutorial.CORRECTED):
    """Return the tutorial's accuracy in % for the model, data set and k of a row, or None.

    Other classes in training or test make numbers incomparable, and so do random episodes.
    """
    if row["split"] != "tutorial" or row["classes"] == "val" or _of_episodes([row]):
        return None
    return tutorial.accuracy(numbers, row["model"], row["dataset"], row["k_shot"])


def name_of(data_name, split):
    """Return the name of a data set, with that of the split where it is one of the papers'."""
    return f"{data_name}, split {split}" if split in PAPERS else data_name


def classified_table(rows):
    """Return classified images as a table of fixed width, probabilities in %.

    rows: one dict per image, with its file, class, probability, runner-up and its probability.
    """
    cells = [CLASSIFIED_HEADINGS]
    for row in rows:
        cells.append([f"{100 * v:.1f} %" if isinstance(v, float) else v for v in row.values()])
    return "\n".join(text_lines(cells, left=(0, 1, 3)))


def write_classified(rows, path):
    """Write classified images as CSV; rows as above. Raises UserError where writing fails."""
    rounded = [
        {name: f"{v:.4f}" if isinstance(v, float) else v for name, v in row.items()} for row in rows
    ]
    write_csv(path, list(rows[0]), rounded)


def write_csv(path, columns, rows):
    """Write a list of dicts as CSV, those columns of them. Raises UserError where that fails."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _of_episodes(rows):
    return "num_episodes" in rows[0]


def _note(rows):
    note = NOTE.format("episode" if _of_episodes(rows) else "support set")
    return note + (TUTORIAL_NOTE if _beside_the_tutorial(rows) else "")


def _beside_the_tutorial(rows):
    return any(map(tutorials_accuracy, rows))


def _cells(rows):
    beside = _beside_the_tutorial(rows)
    headings = (*KSHOT_HEADINGS, *TUTORIAL_HEADINGS) if beside else KSHOT_HEADINGS
    yield EPISODE_HEADINGS if _of_episodes(rows) else headings
    for row in rows:
        held_out = row["dataset"] == row["trained_on"]
        tested_on = name_of(row["dataset"], row["split"]) if held_out else row["dataset"]
        yield (
            ROW_NAMES[row["model"]] + variant(row["settings"]),
            tested_on + (" (val)" if row["classes"] == "val" else ""),
            str(row["k_shot"]),
            _percent(row["accuracy"]),
            f"± {_percent(row['ci95'])}" if row["ci95"] is not None else "-",
            _percent(row["std"]),
            *(_of_episode_test(row) if _of_episodes(rows) else [str(row["num_support_sets"])]),
            *(_tutorials_cells(row) if beside else ()),
        )


def _of_episode_test(row):
    parameters = f"{row['parameters'] / 1e6:.2f}" if row["parameters"] else "-"
    return (str(row["num_episodes"]), str(row["n_way"]), parameters)


def _tutorials_cells(row):
    found = (tutorials_accuracy(row, numbers) for numbers in (tutorial.PRINTED, tutorial.CORRECTED))
    return ("-" if value is None else f"{value:.2f}" for value in found)


def _published_cells(published):
    yield PUBLISHED_HEADINGS
    for method, encoder, parameters, *accuracies in published:
        yield (method, encoder, parameters or "-", *(f"{value:.1f}" for value in accuracies))


def _percent(value):
    return "-" if value is None else f"{100 * value:.2f}"


def text_lines(cells, left=(0, 1)):
    """Return a table as lines of equal columns; the first line of cells holds the headings.

    left: the columns whose cells are aligned to the left.
    """
    columns = []
    for number, column in enumerate(zip(*cells)):
        align, width = str.ljust if number in left else str.rjust, max(map(len, column))
        columns.append([align(cell, width) for cell in column])
    lines = ["  ".join(line).rstrip() for line in zip(*columns)]
    lines.insert(1, "-" * len(max(lines, key=len)))
    return lines


def markdown_lines(cells, left=(0, 1)):
    """Return a table as lines of Markdown; cells and left as in `text_lines`."""
    headings, *cells = cells
    rule = ["---" if column in left else "---:" for column in range(len(headings))]
    lines = ["| " + " | ".join(line) + " |" for line in (headings, *cells)]
    lines.insert(1, "|" + "|".join(rule) + "|")
    return lines
