"""The figures: they appear, they are not blank, and what they show changes with the data."""

import contextlib
import itertools
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from xml.sax.saxutils import escape

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from common import figures, shown
from common.data import ImageSet

CURVES = ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
HISTORY = [{"epoch": epoch, **dict.fromkeys(CURVES, 1 / epoch)} for epoch in (1, 2, 3, 4)]
TASKS = "training classes, 80 at once", "validation classes, 5-way 4-shot"


def result_rows(models, **other):
    row = {"dataset": "cifar100", "classes": "test", "split": "", "n_way": 10}
    row |= {"std": 0.03, "ci95": 0.01, **other}
    return [
        {**row, "model": model, "k_shot": k, "accuracy": 0.3 + 0.05 * place + 0.01 * k}
        for place, model in enumerate(models)
        for k in (2, 4, 16)
    ]


def image_set(class_names, per_class=8, height=32, width=32):
    images = torch.randint(256, (len(class_names) * per_class, 3, height, width)).byte()
    labels = torch.arange(len(class_names)).repeat_interleave(per_class)
    return ImageSet("some data", images, labels, list(class_names))


def pixels_of(path):
    """The pixels of path.png; checks that neither file is blank or broken."""
    with Image.open(f"{path}.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 100
    # White paper, and ink on at least one pixel in two hundred.
    assert (pixels[0, 0] == 255).all() and (pixels < 200).any(axis=2).mean() > 0.005
    svg = ElementTree.parse(f"{path}.svg").getroot()
    assert svg.tag.endswith("svg") and len(list(svg.iter())) > 20
    return pixels


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made, in place of files."""
    kept = []

    @contextlib.contextmanager
    def keep_figure(path, size):
        kept.append(Figure(size))
        yield kept[-1]

    monkeypatch.setattr(figures, "new_figure", keep_figure)
    return kept


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_training_curves_of_any_number_of_epochs_appear(epochs, tmp_path):
    path = tmp_path / "folder" / "curves"
    figures.plot_training_curves(HISTORY[:epochs], "ProtoNet", TASKS, str(path))
    pixels_of(path)


def test_training_curves_say_what_is_classified_and_do_not_magnify_noise(drawn):
    level = [{**row, "train_accuracy": 0.9, "val_accuracy": 0.901} for row in HISTORY]
    figures.plot_training_curves(level, "ProtoNet", TASKS, "curves")
    axis = drawn[0].axes[1]
    assert list(map(Text.get_text, axis.get_legend().texts)) == [*TASKS, "best epoch: 1"]
    low, high = axis.get_ylim()
    assert high - low == pytest.approx(5) and low < 90 < 90.1 < high


def test_an_episodes_support_is_left_and_its_queries_are_right(drawn):
    data = image_set(["a", "b", "c"], per_class=5, height=30, width=40)
    episode = torch.tensor([0, 1, 5, 6, 10, 11, 2, 3, 4, 7, 8, 9, 12, 13, 14])
    figures.plot_episode(data, episode, 3, 2, "episode")
    for axis, of_class in zip(drawn[0].axes, ((0, 1), (2, 3, 4))):
        grid = torch.as_tensor(axis.images[0].get_array())
        for row, (column, image) in itertools.product(range(3), enumerate(of_class)):
            cell = grid[32 * row :, 42 * column :][:30, :40]  # gaps of 2 pixels
            assert cell.equal(data.images[5 * row + image].permute(1, 2, 0))
    assert list(map(Text.get_text, drawn[0].axes[0].get_yticklabels())) == ["a", "b", "c"]
    assert drawn[0].axes[0].get_yticks().tolist() == [16, 48, 80]


@pytest.mark.parametrize("spread", [0.01, None])
def test_accuracy_over_k_appears_for_any_choice_of_models(spread, tmp_path):
    models = ["pixels", "classifier", "protonet", "protonet_finetuned", "my_method"]
    rows = result_rows(models, std=spread, ci95=spread)
    figures.plot_accuracy_over_k(rows, "Test classes", str(tmp_path / "all"))
    one = [row for row in rows if row["model"] == "protonet"]
    figures.plot_accuracy_over_k(one, "Test classes", str(tmp_path / "one"))
    assert not np.array_equal(pixels_of(tmp_path / "all"), pixels_of(tmp_path / "one"))


def test_every_model_of_a_figure_has_a_style_of_its_own():
    models = ["maml", "protomaml", *(f"method {n}" for n in range(12))]
    models += [f"{model}_finetuned" for model in models]
    assert len({tuple(figures.style_of(model, models).items()) for model in models}) == len(models)
    assert figures.style_of("method 3", models) == figures.style_of("method 3", models[::-1])


def test_the_tutorials_numbers_stand_beside_the_same_model_and_classes_only(drawn):
    models = ["protonet", "maml", "pixels"]
    for split in ("tutorial", "cifar_fs"):
        figures.plot_accuracy_over_k(result_rows(models, split=split), "title", "figure")
    beside, alone = ({*map(Text.get_text, each.axes[0].get_legend().texts)} for each in drawn)
    assert beside - alone == {"ProtoNet, the tutorial's, corrected"}
    dotted = [line for line in drawn[0].axes[0].lines if line.get_linestyle() == ":"]
    assert [44.30, 52.07, 60.87] in [list(line.get_ydata()) for line in dotted]


def test_equal_numbers_give_equal_bytes_and_matplotlib_keeps_its_settings(tmp_path, pytestconfig):
    settings = dict(matplotlib.rcParams)
    for name in ("first", "second"):
        figures.plot_accuracy_over_k(result_rows(["maml"]), "", str(tmp_path / name))
    for suffix in ("png", "svg"):
        first, second = (tmp_path / f"{name}.{suffix}" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), suffix
    assert dict(matplotlib.rcParams) == settings
    # Nor is it loaded before the first figure.
    script = "import sys, common.figures; sys.exit('matplotlib' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", script], cwd=pytestconfig.rootpath).returncode


def test_names_with_dollar_signs_are_text_and_no_formula(tmp_path):
    # matplotlib reads what stands between dollar signs as a formula, and stumbles over this one.
    names = ["$^$", "US$_AU$", "c"]
    paths = [str(tmp_path / name) for name in ("episode", "curves")]
    figures.plot_episode(image_set(names), torch.tensor([0, 8, 16, 1, 9, 17]), 3, 1, paths[0])
    figures.plot_training_curves(HISTORY, "$^$", TASKS, paths[1])
    assert all(map(len, map(pixels_of, paths)))


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), max_size=60))
def test_a_wrapped_name_without_its_line_breaks_is_the_name(name):
    wrapped = figures._wrapped(name)
    assert wrapped.replace("\n", "") == name
    assert all(len(line) <= 16 for line in wrapped.split("\n"))


def test_names_are_broken_at_spaces_and_after_underscores():
    for lines in ("aquarium_fish", "Anas|platyrhynchos", "cyrillic_small_|descender"):
        name = lines.replace("_|", "_").replace("|", " ")
        assert figures._wrapped(name) == lines.replace("|", "\n")


@given(st.text(max_size=20))
def test_a_name_as_it_is_shown_is_xml_and_utf8(name):
    text = shown(name)
    root = ElementTree.fromstring(f"<a>{escape(text)}</a>".encode())
    assert (root.text or "") == text == shown(text)


def test_a_character_comes_from_whatever_installed_font_has_it_else_one_line(
    capsys, recwarn, tmp_path
):
    has = {}
    for font in font_manager.fontManager.ttflist:
        if "Last Resort" not in font.name:  # which has a box for each character that there is
            charmap = font_manager.get_font(font.fname).get_charmap()
            has.setdefault(font.name, set()).update(charmap)
    letter = chr(min(set().union(*has.values()) - has["DejaVu Sans"]))
    absent = chr(min(set(range(0x4E00, 0x9FFF)) - set().union(*has.values())))
    with figures.new_figure(str(tmp_path / "x"), (3, 2)) as figure:
        text = figure.suptitle(f"a {letter}{absent}")
    families = text.get_fontfamily()
    assert families[0] == "DejaVu Sans" and any(ord(letter) in has[name] for name in families)
    printed = capsys.readouterr().out
    assert printed.startswith(f"no installed font has 1 characters of this figure ({absent}): ")
    assert "fonts-noto-cjk" in printed and printed.count("\n") == 1 and not recwarn.list


@pytest.mark.parametrize("separation, correct", [(9, "100%"), (0, None)])
def test_features_appear_with_some_that_are_wrong(separation, correct, tmp_path, drawn):
    names = ["apple", "beaver", "crab", "US$^", "e", "f", "g"]
    data, vectors = image_set(names), torch.randn(56, 16)
    vectors += separation * torch.eye(7, 16)[data.labels]
    figures.plot_features(data, {"untrained": torch.randn(56, 16), "trained": vectors}, 3, "x")
    left, right = drawn[0].axes
    shown = [text.get_text() for text in right.texts]
    assert set(names) <= set(shown) and right.get_title().startswith("trained: ")
    wrong = [text for text in shown if "taken for" in text]
    assert len(wrong) == (0 if correct else 4) and (not correct or correct in right.get_title())
    assert all(len({*text.split("\ntaken for\n")}) == 2 for text in wrong)
    drawn[0].savefig(tmp_path / "x.png")
