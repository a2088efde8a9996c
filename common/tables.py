"""The results as tables: fixed width for the screen, Markdown, CSV and JSON."""

import csv
import json
import os

from common.encoders import is_pretrained
from common.files import atomic_file, write_text
from common.splits import PAPERS
from common.tutorial import CORRECTED, K_SHOTS, PRINTED

TITLES = {name.lower(): name for name in "Classifier ProtoNet MAML ProtoMAML Pixels".split()}


def title_of(row_name):
    """Return how tables and figures name a model; one that is not in TITLES keeps its name."""
    base, found, folder = row_name.removesuffix("_finetuned").partition(" (")
    title = TITLES.get(base, base) + found + folder
    if is_pretrained(base):
        title = f"{base.partition(':')[2]}, pretrained"
    return title + (", fine-tuned" if row_name.endswith("_finetuned") else "")


def name_of(data_name, split):
    """Return the name of a data set, with that of the split where it is one of the papers'."""
    return f"{data_name}, split {split}" if split in PAPERS else data_name


def variant(settings):
    """Return what a row's name says of the settings: ", 6 views, bfloat16", or nothing."""
    views, precision = settings.get("views", 1), settings.get("precision", "float32")
    text = ", 0 steps" if settings.get("finetune_steps") == 0 else ""
    text += f", {views} views" if views > 1 else ""
    area = settings.get("min_view_area", 0.7)
    text += f", crops from {100 * area:g} %" if area != 0.7 else ""
    return text + (f", {precision}" if precision != "float32" else "")


def network(row):
    """Return what a row's name says of the encoder: ", conv4", or nothing."""
    name = row.get("encoder") or "densenet"  # the pixels have none
    return "" if name == "densenet" or is_pretrained(row["model"]) else f", {name}"


def tutorials_accuracy(row, printed=False):
    """Return the tutorial's accuracy in % for the model, data set and k of a row, or None.

    It is corrected, correct predictions over queries, or as printed.
    """
    # Other classes in training or test make numbers incomparable, and so do random episodes.
    if row["split"] != "tutorial" or row["classes"] == "val" or "num_episodes" in row:
        return None
    numbers = (PRINTED if printed else CORRECTED).get((row["model"], row["dataset"]), ())
    return dict(zip(K_SHOTS, numbers)).get(row["k_shot"])


def text_table(rows, failures):
    """Return the results as a table of fixed width.

    rows: of evaluate.py; `split` names the split that the model was trained on, "" for one's own.
    failures: {data set: what is wrong and what to do}.
    """
    return "\n".join([*text_lines(_cells(rows)), *_remarks(rows, failures)])


def write_tables(rows, failures, folder, made_by=""):
    """Write accuracy.json, .csv and .md into `folder`; made_by: Markdown at the end of the last.

    rows, failures: as in `text_table`. Raises UserError where that fails.
    """
    write_text(os.path.join(folder, "accuracy.json"), json.dumps(rows, indent=1) + "\n")
    lines = [{**row, "settings": json.dumps(row["settings"])} for row in rows]
    write_csv(os.path.join(folder, "accuracy.csv"), list(rows[0]), lines)
    text = "\n\n".join(["\n".join(markdown_lines(_cells(rows))), *_remarks(rows, failures)])
    write_text(os.path.join(folder, "accuracy.md"), f"{text}\n{made_by}")


def classified_table(rows):
    """Return classified images as a table of fixed width, probabilities in %.

    rows: one dict per image, with its file, class, probability, runner-up and its probability.
    """
    cells = [("file", "class", "probability", "runner-up", "probability")]
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
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def text_lines(cells, left=(0, 1)):
    """Return a table as lines. cells: its lines, headings first; left: columns aligned to it."""
    columns = []
    for number, column in enumerate(zip(*cells)):
        align, width = str.ljust if number in left else str.rjust, max(map(len, column))
        columns.append([align(cell, width) for cell in column])
    lines = ["  ".join(line).rstrip() for line in zip(*columns)]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def markdown_lines(cells, left=(0, 1)):
    """Return the same table in Markdown; cells and left as in `text_lines`."""
    rule = "|".join("---" if column in left else "---:" for column in range(len(cells[0])))
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return [lines[0], f"|{rule}|", *lines[1:]]


def _cells(rows):
    """Return the cells of the table of results, line by line, the headings first."""
    beside_tutorials = any(map(tutorials_accuracy, rows))
    lines = []
    for row in rows:
        split = row["split"] if row["dataset"] == row["trained_on"] else ""
        part = " (val)" if row["classes"] == "val" else ""
        cells = {
            "model": title_of(row["model"]) + network(row) + variant(row["settings"]),
            "tested on": name_of(row["dataset"], split) + part,
            "k": str(row["k_shot"]),
            "accuracy": f"{100 * row['accuracy']:.2f}",
            "95 % interval": _number(row["ci95"], 100, "± "),
            "std": _number(row["std"], 100),
        }
        if "num_episodes" in row:
            cells["episodes"], cells["n_way"] = str(row["num_episodes"]), str(row["n_way"])
            cells["parameters (M)"] = _number(row["parameters"] / 1e6 or None)
        else:
            cells["sets"] = str(row["num_support_sets"])
        if beside_tutorials:
            cells["tutorial printed"] = _number(tutorials_accuracy(row, printed=True))
            cells["tutorial corrected"] = _number(tutorials_accuracy(row))
        lines.append(cells)
    return [list(lines[0]), *(list(line.values()) for line in lines)]


def _number(value, scale=1, sign=""):
    return "-" if value is None else f"{sign}{scale * value:.2f}"


def _remarks(rows, failures):
    one = "episode" if "num_episodes" in rows[0] else "support set"
    note = "k: support images per class. Accuracy, interval and std in %. The interval is of the "
    note += f"mean over the {one}s; std says how much one {one} differs from the next."
    if any(is_pretrained(row.get("encoder", "")) for row in rows):
        note += " Pretrained: on other data; ImageNet, most often, has most classes of CIFAR-100, "
        note += "so that they are not new to it."
    if any(map(tutorials_accuracy, rows)):
        note += " Corrected: correct predictions over queries; the tutorial's ProtoNet test "
        note += "divides by too few."
    return [*(f"{name}: not tested. {reason}" for name, reason in failures.items()), note]
