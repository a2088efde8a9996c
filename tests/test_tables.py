"""The tables: every number in its place, the tutorial's only where they belong."""

import csv
import io
import json
import os

import pytest

from common.config import UserError
from common.tables import markdown_table, text_table, write_tables


def result(
    model="protonet", dataset="cifar100", k_shot=2, accuracy=0.44312, trained_on="cifar100", **other
):
    row = {
        "model": model,
        "dataset": dataset,
        "classes": "test" if dataset == trained_on else "all",
        "trained_on": trained_on,
        "checkpoint_sha256": "ab" * 32,
        "data_sha256": "cd" * 32,
        "settings": {"lr_inner": 0.1},
        "k_shot": k_shot,
        "n_way": 10,
        "accuracy": accuracy,
        "std": 0.03717,
        "ci95": 0.00423,
        "num_support_sets": 300,
        "num_queries": 5980,
    }
    return {**row, **other}


def cells_of(line):
    """The cells of a line of the Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def only_line(row):
    """{heading: cell} of the Markdown table of one row."""
    lines = markdown_table([row], {}).splitlines()
    return dict(zip(cells_of(lines[0]), cells_of(lines[2]), strict=True))


def test_every_number_stands_under_its_heading():
    assert only_line(result()) == {
        "model": "ProtoNet",
        "tested on": "cifar100",
        "k": "2",
        "accuracy": "44.31",
        "95 % interval": "± 0.42",
        "std": "3.72",
        "sets": "300",
        "tutorial printed": "44.30",
        "corrected": "44.30",
    }


@pytest.mark.parametrize(
    "model, shown",
    [
        ("classifier", "Classifier"),
        ("protonet", "ProtoNet"),
        ("maml", "MAML"),
        ("protomaml", "ProtoMAML"),
        ("pixels", "Pixels"),
    ],
)
def test_models_stand_under_their_names_and_a_test_with_mirror_images_says_so(model, shown):
    assert only_line(result(model))["model"] == shown
    assert only_line(result(model, settings={"mirror": False}))["model"] == shown
    assert only_line(result(model, settings={"mirror": True}))["model"] == f"{shown}, mirrored"


def test_validation_classes_are_marked():
    assert only_line(result(classes="val"))["tested on"] == "cifar100 (val)"


def test_a_single_support_set_shows_no_spread():
    line = only_line(result(std=None, ci95=None, num_support_sets=1))
    assert (line["95 % interval"], line["std"], line["sets"]) == ("-", "-", "1")


@pytest.mark.parametrize(
    "model, dataset, printed, corrected",
    [
        ("protonet", "cifar100", "44.30 52.07 57.59 62.56 66.49", "44.30 52.07 57.59 60.87 62.80"),
        ("protomaml", "cifar100", "42.89 52.27 59.23 63.94 67.57", "42.89 52.27 59.23 63.94 67.57"),
        ("protonet", "svhn", "18.82 21.94 25.59 29.06 32.93", "18.82 21.94 25.18 28.12 30.73"),
        ("protomaml", "svhn", "17.11 21.29 27.62 36.17 46.03", "17.11 21.29 27.62 36.17 46.03"),
    ],
)
def test_the_tutorials_numbers_stand_beside_the_same_model_data_and_k(
    model, dataset, printed, corrected
):
    lines = [only_line(result(model, dataset, k)) for k in (2, 4, 8, 16, 32)]
    assert [line["tutorial printed"] for line in lines] == printed.split()
    assert [line["corrected"] for line in lines] == corrected.split()


@pytest.mark.parametrize(
    "row",
    [
        result(k_shot=3),
        result(model="classifier"),
        result(model="maml"),
        result(model="pixels"),
        result(dataset="mnist"),
        result(dataset="glyphs", trained_on="glyphs"),
        result(classes="val"),
        # The same names, but a model that was trained on something else.
        result(dataset="svhn", trained_on="glyphs"),
        result(dataset="cifar100", trained_on="glyphs"),
    ],
)
def test_the_tutorials_numbers_stand_nowhere_else(row):
    line = only_line(row)
    assert (line["tutorial printed"], line["corrected"]) == ("-", "-")


def test_the_fixed_width_table_holds_what_the_markdown_table_holds():
    rows = [
        result(),
        result("protomaml", "svhn", 32, 0.1, num_support_sets=18),
        result("pixels", k_shot=4, accuracy=1.0, std=None, ci95=None),
    ]
    text, markdown = text_table(rows, {}).splitlines(), markdown_table(rows, {}).splitlines()
    assert len(text) == 2 + len(rows) + 1 and set(text[1]) == {"-"}
    for line, other in zip(text[2:5], markdown[2:5], strict=True):
        assert line.split() == " ".join(cells_of(other)).split()


def test_columns_of_the_fixed_width_table_are_aligned():
    rows = [
        result(k_shot=2, accuracy=0.05),
        result(k_shot=16, accuracy=1.0),
        result("protomaml", "a_very_long_name_of_a_data_set"),
    ]
    lines = text_table(rows, {}).splitlines()
    end_of_accuracy = lines[0].index("accuracy") + len("accuracy")
    accuracies = [line[:end_of_accuracy].split()[-1] for line in lines[2:5]]
    assert accuracies == ["5.00", "100.00", "44.31"]
    assert all(line == line.rstrip() for line in lines)
    start_of_data = lines[0].index("tested on")
    assert all(line[start_of_data - 1] == " " and line[start_of_data] != " " for line in lines[2:5])


@pytest.mark.parametrize("table", [text_table, markdown_table])
def test_a_data_set_that_could_not_be_tested_is_named_with_the_reason(table):
    text = table([result()], {"svhn": "the file is missing; put it there"})
    assert "svhn: not tested. the file is missing; put it there" in text.splitlines()


@pytest.mark.parametrize("table", [text_table, markdown_table])
def test_the_table_says_what_its_spreads_are(table):
    text = table([result()], {})
    assert "interval is of the mean" in text and "std" in text


def test_the_json_file_gives_back_every_row(tmp_path):
    rows = [result(), result("pixels", checkpoint_sha256=None, std=None, ci95=None, accuracy=1 / 3)]
    write_tables(rows, {}, str(tmp_path))
    assert json.loads((tmp_path / "accuracy.json").read_text()) == rows


def test_the_csv_file_is_read_by_pythons_reader(tmp_path):
    rows = [result(), result("pixels", dataset="with, comma", std=None, ci95=None, accuracy=1 / 3)]
    write_tables(rows, {}, str(tmp_path))
    found = list(csv.DictReader(io.StringIO((tmp_path / "accuracy.csv").read_text())))
    assert len(found) == 2
    for line, row in zip(found, rows):
        assert float(line["accuracy"]) == row["accuracy"] and int(line["k_shot"]) == row["k_shot"]
        assert line["model"] == row["model"] and line["dataset"] == row["dataset"]
        assert line["std"] == ("" if row["std"] is None else str(row["std"]))
        assert None not in line and None not in line.values()


def test_the_markdown_file_is_the_table_with_the_failures(tmp_path):
    failures = {"svhn": "missing"}
    write_tables([result()], failures, str(tmp_path / "results"))
    text = (tmp_path / "results" / "accuracy.md").read_text(encoding="utf-8")
    assert text == markdown_table([result()], failures)
    found = sorted(os.listdir(tmp_path / "results"))
    assert found == ["accuracy.csv", "accuracy.json", "accuracy.md"]


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="accuracy.json"):
        write_tables([result()], {}, str(tmp_path / "results"))
