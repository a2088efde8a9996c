"""The figures: they appear, they are not blank, and what they show changes with the data."""

import xml.etree.ElementTree as ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.config import UserError
from common.data import ImageSet, load_dataset
from common.figures import (
    _wrapped,
    plot_accuracy_over_k,
    plot_confusion,
    plot_episode,
    plot_examples,
    plot_training_curves,
)

HISTORY = [
    {
        "epoch": epoch,
        "lr": 1e-3,
        "train_loss": 2 / epoch,
        "val_loss": 2.2 / epoch,
        "train_accuracy": 1 - 0.7 / epoch,
        "val_accuracy": 1 - 0.8 / epoch,
    }
    for epoch in (1, 2, 3, 4)
]
TASKS = {"train": "training classes, 80 at once", "val": "validation classes, 5-way 4-shot"}


@pytest.fixture(autouse=True)
def close_figures():
    """A test that fails half way leaves its figure open; the next one counts open figures."""
    yield
    plt.close("all")


def result_rows(models=("protonet", "pixels"), spread=True):
    spreads = {"std": 0.03, "ci95": 0.01} if spread else {"std": None, "ci95": None}
    return [
        {
            "model": model,
            "dataset": "glyphs",
            "classes": "test",
            "split": "",
            "k_shot": k,
            "n_way": 10,
            "accuracy": 0.3 + 0.05 * place + 0.01 * k,
            **spreads,
        }
        for place, model in enumerate(models)
        for k in (2, 4, 16)
    ]


def image_set(class_names, per_class=8, height=32, width=32):
    generator = torch.Generator().manual_seed(0)
    size = (len(class_names) * per_class, 3, height, width)
    images = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    labels = torch.arange(len(class_names)).repeat_interleave(per_class)
    return ImageSet("some data", images, labels, list(class_names))


def pixels_of(path):
    """The pixels of path.png; checks that both files are neither blank nor broken, none open."""
    with Image.open(f"{path}.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 100
    # White paper, and ink on at least one pixel in two hundred.
    assert (pixels[0, 0] == 255).all() and (pixels < 200).any(axis=2).mean() > 0.005
    svg = ElementTree.parse(f"{path}.svg").getroot()
    assert svg.tag.endswith("svg") and len(list(svg.iter())) > 20
    assert plt.get_fignums() == []
    return pixels


def test_training_curves_appear(tmp_path):
    path = str(tmp_path / "folder" / "curves")
    plot_training_curves(HISTORY, "ProtoNet", TASKS, path)
    pixels = pixels_of(path)
    plot_training_curves(HISTORY[:2], "ProtoNet", TASKS, path)
    assert not np.array_equal(pixels, pixels_of(path))


def test_training_curves_of_a_single_epoch_appear(tmp_path):
    plot_training_curves(HISTORY[:1], "MAML", TASKS, str(tmp_path / "curves"))
    pixels_of(tmp_path / "curves")


def test_examples_show_images_of_the_data_set(glyph_dir, tmp_path):
    glyphs = load_dataset("glyphs", glyph_dir)
    plot_examples(glyphs, str(tmp_path / "glyphs"))
    pixels = pixels_of(tmp_path / "glyphs")
    glyphs.images = 255 - glyphs.images
    plot_examples(glyphs, str(tmp_path / "negative"))
    assert not np.array_equal(pixels, pixels_of(tmp_path / "negative"))


@pytest.mark.parametrize("count", [1, 2, 9, 11, 30])
def test_examples_of_any_number_of_classes_appear(tmp_path, count):
    plot_examples(image_set([f"class {c}" for c in range(count)]), str(tmp_path / "examples"))
    pixels_of(tmp_path / "examples")


def test_an_episode_shows_its_own_images(tmp_path):
    data = image_set(["a", "b", "c"], height=32, width=40)
    episode = torch.tensor([0, 1, 8, 9, 16, 17, 2, 3, 4, 10, 11, 12, 18, 19, 20])
    plot_episode(data, episode, 3, 2, str(tmp_path / "episode"))
    pixels = pixels_of(tmp_path / "episode")
    plot_episode(data, episode + 1, 3, 2, str(tmp_path / "other"))
    assert not np.array_equal(pixels, pixels_of(tmp_path / "other"))


def test_an_episodes_support_is_left_and_its_queries_are_right(tmp_path):
    # Red support images, blue queries.
    data = image_set(["a", "b"])
    data.images[:] = 0
    data.images[:, 2] = 255
    support = torch.tensor([0, 1, 8, 9])
    data.images[support] = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    plot_episode(data, torch.tensor([0, 1, 8, 9, 2, 3, 10, 11]), 2, 2, str(tmp_path / "episode"))
    pixels = pixels_of(tmp_path / "episode").astype(int)
    red = np.flatnonzero(((pixels - [255, 0, 0]) == 0).all(axis=2).any(axis=0))
    blue = np.flatnonzero(((pixels - [0, 0, 255]) == 0).all(axis=2).any(axis=0))
    assert len(red) and len(blue)
    assert red.max() < pixels.shape[1] / 2 < blue.max() and red.max() < blue.min()


def test_accuracy_over_k_appears_for_any_choice_of_models(tmp_path):
    models = ("pixels", "classifier", "protonet", "protomaml", "maml")
    rows = result_rows(models)
    plot_accuracy_over_k(rows, models, "Test classes", str(tmp_path / "all"))
    plot_accuracy_over_k(rows, ["protonet"], "Test classes", str(tmp_path / "one"))
    assert not np.array_equal(pixels_of(tmp_path / "all"), pixels_of(tmp_path / "one"))


def test_accuracy_over_k_needs_no_spread(tmp_path):
    rows, models = result_rows(spread=False), ["protonet", "pixels"]
    plot_accuracy_over_k(rows, models, "Test classes", str(tmp_path / "figure"))
    pixels_of(tmp_path / "figure")


def test_the_tutorials_numbers_stand_beside_the_same_model_and_classes_only(drawn):
    rows = [{**row, "dataset": "cifar100"} for row in result_rows(("protonet", "maml", "pixels"))]
    models = ["protonet", "maml", "pixels"]
    for split in ("tutorial", "cifar_fs"):
        rows = [{**row, "split": split} for row in rows]
        plot_accuracy_over_k(rows, models, "Test classes", "figure")
    beside, alone = (
        {line.get_text() for line in figure.axes[0].get_legend().get_texts()} for figure in drawn
    )
    assert beside - alone == {"ProtoNet, the tutorial's, corrected"}
    dotted = [line for line in drawn[0].axes[0].lines if line.get_linestyle() == ":"]
    assert [44.30, 52.07, 60.87] in [list(line.get_ydata()) for line in dotted]


def test_training_curves_say_what_is_classified_and_do_not_magnify_noise(drawn):
    level = [{**row, "train_accuracy": 0.9, "val_accuracy": 0.901} for row in HISTORY]
    plot_training_curves(level, "ProtoNet", TASKS, "curves")
    axis = drawn[0].axes[1]
    labels = {text.get_text() for text in axis.get_legend().get_texts()}
    assert labels == {*TASKS.values(), "best epoch: 1"}
    low, high = axis.get_ylim()
    assert high - low == pytest.approx(5) and low < 90 < 90.1 < high


@pytest.mark.parametrize("classes", [2, 20, 21, 100])
def test_a_confusion_matrix_of_any_number_of_classes_appears(classes, tmp_path):
    counts = (torch.eye(classes, dtype=torch.int64) * 20 + 1).tolist()
    names = [f"class {c}" for c in range(classes)]
    plot_confusion(counts, names, "ProtoNet, k = 4", str(tmp_path / "confusion"))
    pixels = pixels_of(tmp_path / "confusion")
    counts[0].reverse()
    plot_confusion(counts, names, "ProtoNet, k = 4", str(tmp_path / "other"))
    assert not np.array_equal(pixels, pixels_of(tmp_path / "other"))


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        models, path = ["protonet", "pixels"], str(tmp_path / name)
        plot_accuracy_over_k(result_rows(), models, "Test classes", path)
    for suffix in ("png", "svg"):
        first, second = (tmp_path / f"{name}.{suffix}" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), suffix


def test_names_with_dollar_signs_are_text_and_no_formula(tmp_path):
    # matplotlib reads what stands between dollar signs as a formula, and stumbles over this one.
    names = ["$^$", "US$_AU$", "c"]
    plot_examples(image_set(names), str(tmp_path / "examples"))
    episode = torch.tensor([0, 8, 16, 1, 9, 17])
    plot_episode(image_set(names), episode, 3, 1, str(tmp_path / "episode"))
    plot_training_curves(HISTORY, "$^$", TASKS, str(tmp_path / "curves"))
    plot_confusion([[9, 1, 0]] * 3, names, "$^$", str(tmp_path / "confusion"))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made, in place of files."""
    figures = []
    monkeypatch.setattr("common.figures.save_figure", lambda figure, path: figures.append(figure))
    return figures


def test_a_confusion_matrix_shows_the_percentage_of_each_true_class_in_its_row(drawn):
    plot_confusion([[30, 9, 1], [0, 5, 5], [4, 0, 996]], ["a", "b", "c"], "title", "confusion")
    axis = drawn[0].axes[0]
    shown = {tuple(reversed(text.get_position())): text.get_text() for text in axis.texts}
    # (row, column); less than half a percent, and nothing at all, stay empty.
    assert shown == {
        (0, 0): "75",
        (0, 1): "22",
        (0, 2): "2",
        (1, 1): "50",
        (1, 2): "50",
        (2, 2): "100",
    }
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("Predicted class", "True class")
    assert axis.images[0].get_array()[0].tolist() == [75, 22.5, 2.5]


def test_a_confusion_matrix_of_more_than_20_classes_has_no_numbers_in_its_cells(drawn):
    for classes in (20, 21):
        counts = torch.ones(classes, classes).tolist()
        plot_confusion(counts, [str(c) for c in range(classes)], "title", "confusion")
    assert [len(figure.axes[0].texts) for figure in drawn] == [400, 0]
    assert all(len(figure.axes[0].get_yticklabels()) in (20, 21) for figure in drawn)


LONG_NAMES = [
    "aquarium_fish",
    "Anas platyrhynchos domesticus",
    "cyrillic_small_yat_with_descender",
    "well-known_semi-detached_house",
    "_a__b_ c_",
    "pneumonoultramicroscopicsilicovolcanoconiosis_x",
    "x" * 40,
]


def test_long_class_names_are_wrapped_and_keep_every_character(drawn):
    data = image_set(LONG_NAMES)
    plot_examples(data, "examples")
    plot_episode(data, torch.arange(0, 8 * len(LONG_NAMES), 8).repeat(2), 7, 1, "episode")
    examples, episode = drawn
    titles = [axis.get_title() for axis in examples.axes][: len(LONG_NAMES)]
    ticks = [label.get_text() for label in episode.axes[0].get_yticklabels()]
    assert titles == ticks
    for name, shown in zip(LONG_NAMES, titles, strict=True):
        # A line break may stand for a space of the name, and is otherwise added to it.
        assert shown.replace("\n", "").replace(" ", "") == name.replace(" ", "")
        assert all(0 < len(line) <= 16 for line in shown.split("\n"))
    assert titles[0] == "aquarium_fish"
    assert titles[1] == "Anas\nplatyrhynchos\ndomesticus"
    parts = titles[2].split("\n")  # short enough parts are broken at underscores only
    assert len(parts) > 2 and all(part.endswith("_") for part in parts[:-1])


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), max_size=60))
def test_a_wrapped_name_without_its_line_breaks_is_the_name(name):
    shown = _wrapped(name)
    assert shown.replace("\n", "") == name
    assert all(len(line) <= 16 for line in shown.split("\n"))


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder is needed")
    with pytest.raises(UserError, match="curves"):
        plot_training_curves(HISTORY, "ProtoNet", TASKS, str(tmp_path / "taken" / "curves"))
