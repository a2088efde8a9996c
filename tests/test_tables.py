"""The tables: every number in its place, what others published only where it belongs."""

import csv
import io
import json
import os

import pytest

from common.config import UserError
from common.published import CIFAR_FS
from common.tables import (
    PUBLISHED_NOTE,
    markdown_table,
    text_table,
    tutorials_accuracy,
    write_class_table,
    write_tables,
)


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
        "split": "tutorial" if trained_on == "cifar100" else "",
    }
    return {**row, **other}


def episode_result(**other):
    row = result(n_way=5, k_shot=1, num_queries=75, num_episodes=2000, parameters=962_912)
    del row["num_support_sets"]
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
        "tutorial corrected": "44.30",
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
def test_models_stand_under_their_names_and_a_test_of_several_views_says_so(model, shown):
    assert only_line(result(model))["model"] == shown
    assert only_line(result(model, settings={"views": 1}))["model"] == shown
    assert only_line(result(model, settings={"views": 6}))["model"] == f"{shown}, 6 views"
    settings = {"views": 2, "precision": "bfloat16"}
    assert only_line(result(model, settings=settings))["model"] == f"{shown}, 2 views, bfloat16"


def test_a_model_fine_tuned_by_no_step_says_so():
    for steps, shown in ((0, "ProtoNet, fine-tuned, 0 steps"), (40, "ProtoNet, fine-tuned")):
        row = result("protonet_finetuned", settings={"finetune_steps": steps})
        assert only_line(row)["model"] == shown


@pytest.mark.parametrize(
    "other, shown",
    [
        ({}, "cifar100"),
        ({"split": ""}, "cifar100"),
        ({"classes": "val"}, "cifar100 (val)"),
        ({"split": "cifar_fs"}, "cifar100, split cifar_fs"),
        ({"split": "fc100", "classes": "val"}, "cifar100, split fc100 (val)"),
        ({"split": "fc100", "dataset": "mnist", "classes": "all"}, "mnist"),
    ],
)
def test_the_classes_of_a_test_are_named(other, shown):
    assert only_line(result(**other))["tested on"] == shown


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
    assert [line["tutorial corrected"] for line in lines] == corrected.split()
    table = markdown_table([result(model, dataset)], {})
    assert "Corrected: correct predictions over queries" in table


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
        result(split="cifar_fs"),
        result(num_episodes=2000, parameters=0),
        # The same names, but a model that was trained on something else.
        result(dataset="svhn", trained_on="glyphs"),
        result(dataset="cifar100", trained_on="glyphs"),
    ],
)
def test_the_tutorials_numbers_stand_nowhere_else(row):
    assert not {"tutorial printed", "tutorial corrected"} & set(only_line(row))
    assert "orrected" not in markdown_table([row], {})
    assert tutorials_accuracy(row) is None
    if "num_episodes" in row:
        return
    # Beside a row that has some:
    headings, _, line, _ = map(cells_of, markdown_table([row, result()], {}).splitlines()[:4])
    cells = dict(zip(headings, line, strict=True))
    assert (cells["tutorial printed"], cells["tutorial corrected"]) == ("-", "-")


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
    write_tables([result()], failures, str(tmp_path / "results"), made_by="by hand\n")
    text = (tmp_path / "results" / "accuracy.md").read_text(encoding="utf-8")
    assert text == markdown_table([result()], failures) + "by hand\n"
    found = sorted(os.listdir(tmp_path / "results"))
    assert found == ["accuracy.csv", "accuracy.json", "accuracy.md"]


# Random episodes


def test_a_row_of_episodes_says_how_many_of_how_many_classes_and_how_large_the_encoder_is():
    assert only_line(episode_result()) == {
        "model": "ProtoNet",
        "tested on": "cifar100",
        "k": "1",
        "accuracy": "44.31",
        "95 % interval": "± 0.42",
        "std": "3.72",
        "episodes": "2000",
        "n_way": "5",
        "parameters (M)": "0.96",
    }
    assert only_line(episode_result(model="pixels", parameters=0))["parameters (M)"] == "-"


@pytest.mark.parametrize("table", [text_table, markdown_table])
def test_the_note_of_episodes_speaks_of_episodes(table):
    text = table([episode_result()], {})
    assert "mean over the episodes" in text and "support set" not in text


def test_published_rows_stand_below_the_table_on_the_screen_and_in_markdown(tmp_path):
    rows = [episode_result(), episode_result(model="pixels", parameters=0)]
    text = text_table(rows, {}, CIFAR_FS).splitlines()
    markdown = markdown_table(rows, {}, CIFAR_FS).splitlines()
    assert markdown[: len(markdown_table(rows, {}).splitlines())] == (
        markdown_table(rows, {}).splitlines()
    )
    assert markdown[-2:] == ["", PUBLISHED_NOTE] and text[-1] == PUBLISHED_NOTE
    below = [cells_of(line) for line in markdown[-len(CIFAR_FS) - 4 : -2]]
    assert below[0] == ["published", "encoder", "parameters (M)", "1-shot", "5-shot"]
    found = {tuple(cells) for cells in below[2:]}
    assert ("MAML", "4 convolutions, 32 filters", "0.03", "58.9", "71.5") in found
    assert ("R2D2", "4 convolutions, up to 512 filters", "-", "65.3", "79.4") in found
    assert ("RFS, distilled", "ResNet-12", "8 to 12", "73.9", "86.9") in found
    for line, cells in zip(text[-len(CIFAR_FS) - 1 : -1], below[2:], strict=True):
        assert line.split() == " ".join(cells).split()
    write_tables(rows, {}, str(tmp_path), CIFAR_FS)
    assert (tmp_path / "accuracy.md").read_text(encoding="utf-8").splitlines() == markdown


# Accuracy per class


def test_the_class_table_says_how_often_a_class_is_recognised_and_what_it_is_taken_for(tmp_path):
    rows = [
        result(confusion=[[6, 1, 3], [0, 10, 0], [4, 4, 2]]),
        result("classifier", k_shot=2, confusion=[[1, 9, 0], [5, 5, 0], [0, 0, 10]]),
    ]
    write_class_table(rows, ["cat", "dog, wild", "eel"], str(tmp_path / "classes.csv"))
    found = list(csv.DictReader(io.StringIO((tmp_path / "classes.csv").read_text())))
    assert [list(line.values()) for line in found] == [
        ["protonet", "2", "cat", "0.6", "eel", "0.3"],
        ["protonet", "2", "dog, wild", "1.0", "", "0.0"],
        ["protonet", "2", "eel", "0.2", "cat", "0.4"],
        ["classifier", "2", "cat", "0.1", "dog, wild", "0.9"],
        ["classifier", "2", "dog, wild", "0.5", "cat", "0.5"],
        ["classifier", "2", "eel", "1.0", "", "0.0"],
    ]
    names = ["model", "k_shot", "class", "accuracy", "most_often_mistaken_for", "share_of_queries"]
    assert list(found[0]) == names


def test_the_counts_of_single_classes_stand_in_no_table_of_accuracies(tmp_path):
    for folder, more in (("with", {"confusion": [[1, 2], [3, 4]]}), ("without", {})):
        write_tables([result(**more)], {}, str(tmp_path / folder))
    for name in ("accuracy.json", "accuracy.csv", "accuracy.md"):
        with_counts, without = ((tmp_path / each / name) for each in ("with", "without"))
        assert with_counts.read_bytes() == without.read_bytes()


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="accuracy.json"):
        write_tables([result()], {}, str(tmp_path / "results"))
