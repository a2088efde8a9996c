"""The tables: every number in its place, the tutorial's only where they belong."""

import csv
import json

import pytest

from common.tables import text_table, tutorials_accuracy, write_tables


def result(model="protonet", dataset="cifar100", k_shot=2, trained_on="cifar100", **other):
    row = {
        "model": model,
        "dataset": dataset,
        "classes": "test" if dataset == trained_on else "all",
        "trained_on": trained_on,
        "settings": {"lr_inner": 0.1},
        "k_shot": k_shot,
        "n_way": 10,
        "accuracy": 0.44312,
        "std": 0.03717,
        "ci95": 0.00423,
        "num_support_sets": 300,
        "split": "tutorial" if trained_on == "cifar100" else "",
    }
    return {**row, **other}


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def markdown(folder, *rows):
    """The lines of accuracy.md."""
    write_tables(rows, {}, str(folder))
    return (folder / "accuracy.md").read_text(encoding="utf-8").splitlines()


def first_line(folder, *rows):
    """{heading: cell} of the first row in accuracy.md."""
    headings, _, line, *_ = markdown(folder, *rows)
    return dict(zip(cells_of(headings), cells_of(line), strict=True))


def test_every_number_stands_under_its_heading(tmp_path):
    same = {"model": "ProtoNet", "tested on": "cifar100"}
    same |= {"accuracy": "44.31", "95 % interval": "± 0.42", "std": "3.72"}
    tutorials = {"tutorial printed": "44.30", "tutorial corrected": "44.30"}
    assert first_line(tmp_path, result()) == {**same, "k": "2", "sets": "300", **tutorials}
    cells = first_line(tmp_path, result(k_shot=32))
    assert (cells["tutorial printed"], cells["tutorial corrected"]) == ("66.49", "62.80")
    row = result(n_way=5, k_shot=1, num_episodes=2000, parameters=962_912)
    episodes = {"episodes": "2000", "n_way": "5", "parameters (M)": "0.96"}
    assert first_line(tmp_path, row) == {**same, "k": "1", **episodes}
    assert (
        first_line(tmp_path, {**row, "model": "pixels", "parameters": 0})["parameters (M)"] == "-"
    )


@pytest.mark.parametrize(
    "model, settings, shown",
    [
        ("classifier", {}, "Classifier"),
        ("protomaml", {"views": 6}, "ProtoMAML, 6 views"),
        ("maml", {"views": 6, "min_view_area": 0.4}, "MAML, 6 views, crops from 40 %"),
        ("pixels", {"views": 2, "precision": "bfloat16"}, "Pixels, 2 views, bfloat16"),
        ("protonet_finetuned", {"finetune_steps": 40}, "ProtoNet, fine-tuned"),
        ("protonet_finetuned", {"finetune_steps": 0}, "ProtoNet, fine-tuned, 0 steps"),
        ("relation_net", {}, "relation_net"),
        ("relation_net_finetuned", {}, "relation_net, fine-tuned"),
    ],
)
def test_any_model_has_a_row_that_says_how_it_was_tested(tmp_path, model, settings, shown):
    assert first_line(tmp_path, result(model, settings=settings))["model"] == shown


@pytest.mark.parametrize(
    "other, shown",
    [
        ({"classes": "val"}, "cifar100 (val)"),
        ({"split": "cifar_fs"}, "cifar100, split cifar_fs"),
        ({"split": "fc100", "classes": "val"}, "cifar100, split fc100 (val)"),
        ({"split": "fc100", "dataset": "mnist", "classes": "all"}, "mnist"),
    ],
)
def test_the_classes_of_a_test_are_named(tmp_path, other, shown):
    assert first_line(tmp_path, result(**other))["tested on"] == shown


@pytest.mark.parametrize(
    "row",
    [
        result(k_shot=3),
        result(model="maml"),
        result(dataset="mnist"),
        result(classes="val"),
        result(split="cifar_fs"),
        result(num_episodes=2000, parameters=0),
        result(dataset="svhn", trained_on="glyphs"),
    ],
)
def test_the_tutorials_numbers_stand_nowhere_else(tmp_path, row):
    assert tutorials_accuracy(row) is None
    assert not {"tutorial printed", "tutorial corrected"} & set(first_line(tmp_path, row))
    if "num_episodes" not in row:
        cells = first_line(tmp_path, row, result())  # beside a row that has some
        assert (cells["tutorial printed"], cells["tutorial corrected"]) == ("-", "-")


def test_the_fixed_width_table_is_aligned_and_holds_what_the_markdown_table_holds(tmp_path):
    without_spread = {"std": None, "ci95": None, "num_support_sets": 1}
    rows = [
        result(accuracy=0.05),
        result("protomaml", "a_very_long_name_of_a_data_set", 32, num_support_sets=18),
        result("pixels", k_shot=16, accuracy=1.0, **without_spread),
    ]
    headings, rule, *lines, note = text_table(rows, {}).splitlines()
    assert set(rule) == {"-"} and note == markdown(tmp_path, *rows)[-1]
    for line, other in zip(lines, markdown(tmp_path, *rows)[2:5], strict=True):
        assert line.split() == " ".join(cells_of(other)).split() and line == line.rstrip()
    end = headings.index("accuracy") + len("accuracy")
    assert [line[:end].split()[-1] for line in lines] == ["5.00", "44.31", "100.00"]
    start = headings.index("tested on")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)


def test_a_data_set_that_could_not_be_tested_is_named_with_the_reason(tmp_path):
    failures = {"svhn": "the file is missing; put it there"}
    write_tables([result()], failures, str(tmp_path), made_by="by hand\n")
    for text in (text_table([result()], failures), (tmp_path / "accuracy.md").read_text("utf-8")):
        assert "svhn: not tested. the file is missing; put it there" in text.splitlines()
    assert text.endswith("\nby hand\n")


def test_the_json_and_csv_files_give_back_every_row(tmp_path):
    rows = [result(), result("pixels", dataset="with, comma", std=None, ci95=None, accuracy=1 / 3)]
    write_tables(rows, {}, str(tmp_path))
    assert json.loads((tmp_path / "accuracy.json").read_text()) == rows
    lines = list(csv.DictReader((tmp_path / "accuracy.csv").read_text().splitlines()))
    for row, line in zip(rows, lines, strict=True):
        row["settings"] = json.dumps(row["settings"])
        assert line == {name: "" if row[name] is None else str(row[name]) for name in row}
