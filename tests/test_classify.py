"""Classifying a folder of images: every number against a plain loop, every odd folder one line."""

import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import classify
from common.augment import Views
from common.checkpoint import FORMAT, save_checkpoint
from common.config import UserError, parse_config
from common.data import load_dataset
from common.encoder import Encoder
from common.figures import plot_contact_sheet
from common.images import read_image
from common.inner_loop import FineTuning, InnerLoop, adapt, fine_tune

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(classify.__file__).parent
SHOTS = {"a, the first": 3, "b": 1, "c": 5, "d": 2}  # support images of each class
LABELS = torch.arange(len(SHOTS)).repeat_interleave(torch.tensor(list(SHOTS.values())))
QUERIES = 7
SIZES = [(32, 32), (40, 64), (90, 33), (200, 150)]
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
INNER_LOOP = {"num_inner_steps": 2, "lr_inner": 0.05, "lr_output": 0.11}


def new_encoder(scale=10):
    """A tiny encoder with running statistics far from 0 and 1, and with features of some scale."""
    encoder = Encoder(8, 4, (1, 1, 1, 1), 2, 8)
    with torch.no_grad():
        for _ in range(3):
            encoder(2 + 3 * torch.randn(10, 3, 32, 32))
        encoder.classifier.weight *= scale
    return encoder.eval()


def write_checkpoint(path, model="protonet", scale=10, size=32, **config):
    encoder = new_encoder(scale)
    save_checkpoint(
        path,
        {
            "format": FORMAT,
            "model": model,
            "dataset": "glyphs",
            "config": config,
            "epoch": 1,
            "val_accuracy": 0.5,
            "encoder": encoder.arguments,
            "state_dict": encoder.state_dict(),
            "class_split": {"train": ["x"], "val": ["y"], "test": ["z"]},
            "image_shape": [size, size],
            "mean": MEAN,
            "std": STD,
            "data_digest": "0" * 64,
        },
    )
    return path, encoder


@pytest.fixture(scope="module")
def original(glyph_dir, tmp_path_factory):
    """A folder with `support`, its classes as in SHOTS, and `images`; all in mixed sizes."""
    folder = tmp_path_factory.mktemp("folders")
    data = load_dataset("glyphs", glyph_dir)
    sizes = itertools.cycle(SIZES)

    def write(path, position):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = data.images[position].permute(1, 2, 0).contiguous().numpy()
        pixels[..., position // 24 % 3] //= 2  # a tint, so that some images are easy to classify
        Image.fromarray(pixels).resize(next(sizes)).save(path)

    for c, (name, count) in enumerate(SHOTS.items()):
        for shot in range(count):
            write(folder / "support" / name / f"{shot}.png", 24 * c + shot)
    for number in range(QUERIES):
        write(folder / "images" / f"image, number {number}.jpg", 24 * (number % 4) + 10 + number)
    return folder


@pytest.fixture
def folders(original, tmp_path):
    """A copy of the folders for one test, with a ProtoNet beside them."""
    shutil.copytree(original, tmp_path / "folders")
    write_checkpoint(tmp_path / "folders" / "model.pt")
    return tmp_path / "folders"


def options_of(folders, *more):
    where = [f"--{name}={folders / name}" for name in ("support", "images")]
    where += [f"--model={folders / 'model.pt'}", f"--results_dir={folders / 'results'}"]
    return [*where, "--device=cpu", *more]


def run_main(folders, *more):
    return classify.main(parse_config(classify.Config, options_of(folders, *more)))


def rows_of(folders):
    with open(folders / "results" / "classified.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def network_inputs(folders, size=32):
    """The support images [S, 3, H, W], class by class, and the images to classify, normalised."""
    support = [folders / "support" / c / f"{i}.png" for c, n in SHOTS.items() for i in range(n)]
    images = [folders / "images" / f"image, number {number}.jpg" for number in range(QUERIES)]
    arrays = [read_image(path, size) / 255 for path in [*support, *images]]
    inputs = torch.from_numpy((np.stack(arrays) - MEAN) / STD).float().permute(0, 3, 1, 2)
    return inputs.split([len(support), len(images)])


def softmax(logits):
    powers = [np.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def distances_by_hand(feature, features, labels):
    """Minus the squared distances of a feature vector to the mean of each class."""
    logits = []
    for c in range(len(SHOTS)):
        own = [f for f, label in zip(features, labels) if label == c]
        prototype = [sum(values) / len(own) for values in zip(*own)]
        logits.append(-sum((a - b) ** 2 for a, b in zip(feature, prototype)))
    return logits


@torch.no_grad()
def features_by_hand(encoder, inputs):
    return [encoder(image[None])[0].tolist() for image in inputs]


# Nearest prototype


@pytest.mark.parametrize("model, size", [("protonet", 32), ("classifier", 48)])
def test_probabilities_are_those_of_a_plain_loop(model, size, folders):
    path, encoder = write_checkpoint(folders / "model.pt", model, scale=30, size=size)
    assert run_main(folders) == 0
    support, images = network_inputs(folders, size)
    features = features_by_hand(encoder, support)
    names, labels, rows = list(SHOTS), LABELS.tolist(), rows_of(folders)
    assert [row["file"] for row in rows] == [f"image, number {i}.jpg" for i in range(QUERIES)]
    for row, feature in zip(rows, features_by_hand(encoder, images), strict=True):
        expected = softmax(distances_by_hand(feature, features, labels))
        first, second = np.argsort(expected)[::-1][:2]
        assert (row["class"], row["runner_up"]) == (names[first], names[second])
        assert float(row["probability"]) == pytest.approx(expected[first], abs=2e-4)
        assert float(row["runner_up_probability"]) == pytest.approx(expected[second], abs=2e-4)
    found = [float(row["probability"]) for row in rows]
    assert max(found) - min(found) > 0.1  # so that a mistake is seen


def test_leave_one_out_is_that_of_a_plain_loop(folders, capsys):
    _, encoder = write_checkpoint(folders / "model.pt")
    support, images = network_inputs(folders)
    left_out = torch.nonzero(LABELS != 1)[:, 0]  # class b has one image
    found = classify.by_nearest_prototype(encoder, Views(support), LABELS, images, left_out)[1]
    features, labels, correct = features_by_hand(encoder, support), LABELS.tolist(), 0
    for position, logits in zip(left_out.tolist(), found, strict=True):
        others, of_others = features.copy(), labels.copy()
        feature, own = others.pop(position), of_others.pop(position)
        expected = distances_by_hand(feature, others, of_others)
        assert logits.tolist() == pytest.approx(expected, rel=1e-3)
        correct += np.argmax(expected) == own
    run_main(folders)
    printed = capsys.readouterr().out
    assert f"leave-one-out: {correct} of 10 support images are classified correctly" in printed
    assert f", {10 * correct}.0 %; by chance 25.0 %; their mean" in printed
    assert "classes of one image, which cannot be left out: b\n" in printed


def test_without_a_class_of_two_images_there_is_no_leave_one_out(folders, capsys):
    for path in (folders / "support").glob("*/[1-9].png"):
        path.unlink()
    assert run_main(folders) == 0
    printed = capsys.readouterr().out
    assert "leave-one-out: no class has two images, so what to expect is unknown\n" in printed
    assert "cannot be left out: a, the first, b, c, d\n" in printed


# Adaptation


def adapted_by_hand(encoder, support, labels, queries, loop):
    """The logits of the queries; each class repeats its images up to the number of the largest."""
    of_class = [[image for image, c in zip(support, labels) if c == n] for n in range(len(SHOTS))]
    largest = max(map(len, of_class))
    chosen = [
        image for own in of_class for image in itertools.islice(itertools.cycle(own), largest)
    ]
    y_spt = torch.arange(len(SHOTS)).repeat_interleave(largest)
    local, weight, bias = adapt(deepcopy(encoder), torch.stack(chosen), y_spt, len(SHOTS), loop)
    with torch.no_grad():
        return F.linear(local.eval()(queries), weight, bias)


@pytest.mark.parametrize(
    "model, trained, options",
    [
        ("protomaml", {}, []),
        ("protomaml", {"batchnorm": "frozen"}, []),
        ("maml", {"output_init": "zeros"}, []),
        ("protomaml", {}, ["--num_inner_steps=3", "--lr_inner=0.02", "--lr_output=0.04"]),
    ],
)
def test_adaptation_agrees_with_calling_it_by_hand(model, trained, options, folders, capsys):
    _, encoder = write_checkpoint(folders / "model.pt", model, **INNER_LOOP, **trained)
    assert run_main(folders, "--max_left_out=4", *options) == 0
    values = {**INNER_LOOP, **trained}
    values |= {"num_inner_steps": 3, "lr_inner": 0.02, "lr_output": 0.04} if options else {}
    loop, (support, images) = InnerLoop(**values), network_inputs(folders)

    expected = adapted_by_hand(encoder, support, LABELS, images, loop).softmax(dim=1)
    for row, wanted in zip(rows_of(folders), expected, strict=True):
        assert row["class"] == list(SHOTS)[wanted.argmax()]
        assert float(row["probability"]) == pytest.approx(wanted.max().item(), abs=1e-3)

    # The ten images of the classes with two or more lie at 0-2 and 4-10; four evenly spread ones
    # are the 2nd, 4th, 7th and 9th.
    correct = 0
    for position in (1, 4, 7, 9):
        others = torch.arange(len(LABELS)) != position
        query = support[position][None]
        logits = adapted_by_hand(encoder, support[others], LABELS[others], query, loop)
        correct += logits.argmax().item() == LABELS[position].item()
    assert f"leave-one-out: {correct} of 4 support images" in capsys.readouterr().out


def test_leave_one_out_by_adaptation_agrees_with_a_plain_loop():
    encoder, loop = new_encoder(), InnerLoop(**INNER_LOOP)
    support, images = torch.randn(len(LABELS), 3, 32, 32), torch.randn(2, 3, 32, 32)
    left_out = torch.tensor([0, 5, 10])
    found = classify.by_adaptation(encoder, Views(support), LABELS, images, left_out, loop)[1]
    for position, logits in zip(left_out.tolist(), found, strict=True):
        others = torch.arange(len(LABELS)) != position
        query = support[position][None]
        expected = adapted_by_hand(encoder, support[others], LABELS[others], query, loop)[0]
        assert logits.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)


def test_an_adaptation_that_diverges_is_one_message(folders):
    write_checkpoint(folders / "model.pt", "maml", output_init="zeros", **INNER_LOOP)
    with pytest.raises(UserError, match="11 support images diverged; pass a smaller --lr_inner"):
        run_main(folders, "--lr_output=1e38", "--num_inner_steps=5")
    assert not (folders / "results").exists()


@pytest.mark.parametrize("model", ["protonet", "protomaml"])
def test_fine_tuning_agrees_with_calling_it_by_hand(model, folders, capsys):
    trained = INNER_LOOP if model == "protomaml" else {}
    path, encoder = write_checkpoint(folders / "model.pt", model, **trained)
    options = ["--finetune_steps=2", "--finetune_lr=0.01", "--max_left_out=3"]
    assert run_main(folders, *options) == 0
    assert "of 3 support images" in capsys.readouterr().out
    # Colours are changed before the normalisation, so the images come in 0..255 here.
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (STD, MEAN))
    support, images = network_inputs(folders)
    pixels = ((support * std + mean) * 255).round().byte()
    views = Views(pixels, normalize=lambda found: (found / 255 - mean) / std)
    chosen = classify.equal_shots(LABELS)
    local, weight, bias = fine_tune(encoder, views, chosen, len(SHOTS), FineTuning(2, 0.01))
    with torch.no_grad():
        expected = F.linear(local(images), weight, bias).softmax(dim=1)
    for row, wanted in zip(rows_of(folders), expected, strict=True):
        assert row["class"] == list(SHOTS)[wanted.argmax()]
        assert float(row["probability"]) == pytest.approx(wanted.max().item(), abs=1e-3)


def test_by_default_all_or_twenty_images_are_left_out():
    labels = torch.arange(3).repeat_interleave(torch.tensor([30, 1, 29]))
    assert len(classify.choose_left_out(labels, ["a", "b", "c"], 0)) == 59
    assert len(classify.choose_left_out(labels, ["a", "b", "c"], 100)) == 59
    twenty = classify.choose_left_out(labels, ["a", "b", "c"], classify.Config().max_left_out)
    assert len(set(twenty.tolist())) == 20 and 30 not in twenty
    assert (labels[twenty] == 0).sum() == 10


# What is written


def test_the_table_shows_what_the_csv_holds_and_counts_the_unsure_ones(folders, capsys):
    run_main(folders, "--unsure=0.6")
    printed, rows = capsys.readouterr().out, rows_of(folders)
    for row in rows:
        names = [re.escape(row[column]) for column in ("file", "class", "runner_up")]
        pattern = r"^{} +{} +(\S+) %  {} +(\S+) %$".format(*names)
        found = re.search(pattern, printed, re.MULTILINE).groups()
        expected = [row["probability"], row["runner_up_probability"]]
        for percent, share in zip(found, expected, strict=True):
            assert float(percent) == pytest.approx(100 * float(share), abs=0.06)
    table = [line for line in printed.splitlines() if line.startswith("image, number")]
    assert len(table) == QUERIES and len({len(line) for line in table}) == 1
    unsure = sum(float(row["probability"]) < 0.6 for row in rows)
    assert f"unsure, with a probability below 60 %: {unsure} of {QUERIES}\n" in printed


def test_the_contact_sheets_show_all_images_by_class_and_falling_probability(folders, monkeypatch):
    sheets = []
    monkeypatch.setattr(classify, "IMAGES_PER_SHEET", 3)
    monkeypatch.setattr(classify, "plot_contact_sheet", lambda *sheet: sheets.append(sheet))
    run_main(folders)
    names = ["classified.png", "classified-2.png", "classified-3.png"]
    assert [sheet[-1] for sheet in sheets] == [str(folders / "results" / name) for name in names]
    assert [len(sheet[0]) for sheet in sheets] == [3, 3, 1]
    assert sheets[1][3] == "ProtoNet, sheet 2 of 3; dashed: probability below 50 %"
    drawn = [row for sheet in sheets for row in sheet[1]]
    order = [(list(SHOTS).index(row["class"]), -row["probability"]) for row in drawn]
    assert order == sorted(order)
    for row, thumbnail in zip(drawn, [image for sheet in sheets for image in sheet[0]]):
        assert np.array_equal(thumbnail, read_image(folders / "images" / row["file"], 160))


def test_the_contact_sheets_open_and_those_of_an_earlier_run_are_removed(folders, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(classify, "IMAGES_PER_SHEET", 3)
        run_main(folders)
    names = ["classified-2.png", "classified-3.png", "classified.csv", "classified.png"]
    assert sorted(path.name for path in (folders / "results").iterdir()) == names
    run_main(folders)
    assert sorted(path.name for path in (folders / "results").iterdir()) == names[2:]
    with Image.open(folders / "results" / "classified.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0, 0] == 255).all() and (pixels < 200).any(axis=2).mean() > 0.05
    assert plt.get_fignums() == []


def sheet_pixels(path, probabilities, name="a class"):
    images = np.zeros((len(probabilities), 40, 40, 3), dtype=np.uint8)
    rows = [{"file": "x.png", "class": name, "probability": p} for p in probabilities]
    plot_contact_sheet(images, rows, 0.5, "some images", str(path))
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_only_unsure_images_are_framed(tmp_path):
    def orange(pixels):
        return (pixels[..., 0] > pixels[..., 2] + 60).mean()

    assert orange(sheet_pixels(tmp_path / "a.png", [0.9, 0.5, 0.8])) == 0
    assert orange(sheet_pixels(tmp_path / "b.png", [0.9, 0.49, 0.8])) > 0.002


@pytest.mark.parametrize("count", [1, 2, 10, 11, 100])
def test_images_have_the_same_size_on_every_contact_sheet(count, tmp_path):
    pixels = sheet_pixels(tmp_path / "sheet.png", [0.9] * count, "a very long name " * 10)
    columns, rows = min(count, 10), -(-count // 10)
    black = (pixels == 0).all(axis=2)
    # One inch each, at 150 dots per inch.
    assert black.any(axis=1).sum() == pytest.approx(150 * rows, abs=60 * rows)
    assert black.any(axis=0).sum() == pytest.approx(150 * columns, abs=15 * columns)


# Folders that are not as they should be


def stderr_lines(captured):
    lines = captured.err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("skipped")]


@pytest.mark.parametrize("where", ["support/c/2.png", "images/image, number 3.jpg"])
def test_an_unreadable_image_is_named_and_the_rest_is_done(where, folders, capsys):
    run_main(folders)
    before = rows_of(folders)
    (folders / where).write_bytes(b"no image")
    capsys.readouterr()
    assert run_main(folders) == 1
    (line,) = stderr_lines(capsys.readouterr())
    assert line.startswith(f"skipped: {folders / where} cannot be read as an image")
    rows = rows_of(folders)
    if where.startswith("images"):
        assert rows == before[:3] + before[4:]
    else:
        (folders / where).unlink()
        assert run_main(folders) == 0
        assert rows_of(folders) == rows


def test_a_class_folder_without_images_is_named_and_left_out(folders, capsys):
    run_main(folders)
    before = rows_of(folders)
    (folders / "support" / "aa, empty").mkdir()
    (folders / "support" / "notes").mkdir()
    (folders / "support" / "notes" / "notes.txt").write_text("notes")
    capsys.readouterr()
    assert run_main(folders) == 0
    printed = capsys.readouterr().out
    for name in ("aa, empty", "notes"):
        assert f"class {name} has no image that can be read: it is left out\n" in printed
    assert rows_of(folders) == before


def test_what_is_no_image_or_lies_deeper_is_named_and_ignored(folders, capsys):
    (folders / "images" / "notes.txt").write_text("notes")
    (folders / "images" / "empty").mkdir()
    shutil.copytree(folders / "support" / "c", folders / "images" / "deeper")
    assert run_main(folders) == 0
    assert (
        f"not used in {folders / 'images'}: deeper, empty, notes.txt\n" in capsys.readouterr().out
    )
    assert len(rows_of(folders)) == QUERIES


def only_one_class(folders):
    for name in list(SHOTS)[1:]:
        shutil.rmtree(folders / "support" / name)


def no_class(folders):
    shutil.rmtree(folders / "support")
    (folders / "support").mkdir()


def empty_classes(folders):
    for path in folders.glob("support/*/*.png"):
        path.unlink()


def unreadable_classes(folders):
    for path in folders.glob("support/*/*.png"):
        path.write_bytes(b"no image")


def no_images(folders):
    shutil.rmtree(folders / "images")
    (folders / "images").mkdir()


def unreadable_images(folders):
    for path in folders.glob("images/*"):
        path.write_bytes(b"no image")


def no_support_folder(folders):
    shutil.rmtree(folders / "support")


def no_images_folder(folders):
    shutil.rmtree(folders / "images")


def images_in_support(folders):
    shutil.rmtree(folders / "images")
    (folders / "images").symlink_to(folders / "support")


def images_are_a_class(folders):
    shutil.rmtree(folders / "images")
    (folders / "images").symlink_to(folders / "support" / "c")


def images_are_the_results(folders):
    (folders / "results").symlink_to(folders / "images")


def no_checkpoint(folders):
    (folders / "model.pt").unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (only_one_class, "found images of 1 class, but 2 are needed at least; put"),
        (no_class, "found images of 0 classes, but 2 are needed at least; put"),
        (empty_classes, "found images of 0 classes, but 2 are needed at least; put"),
        (unreadable_classes, "found images of 0 classes, but 2 are needed at least; put"),
        (no_images, r"images holds no image \(.*\.png.*\); put the images to classify there"),
        (unreadable_images, "none of the 7 images to classify can be read"),
        (no_support_folder, "support cannot be read: No such file or directory; correct"),
        (no_images_folder, "images cannot be read: No such file or directory; correct"),
        (images_in_support, "is the support folder or one of its classes; put"),
        (images_are_a_class, "is the support folder or one of its classes; put"),
        (images_are_the_results, "would be taken for images the next time; pass another"),
        (no_checkpoint, "there is no checkpoint .*model.pt"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_folders_that_cannot_work_are_refused_in_one_line_and_nothing_is_written(
    spoil, message, folders
):
    spoil(folders)
    with pytest.raises(UserError, match=message) as error:
        run_main(folders)
    assert "\n" not in str(error.value)
    results = folders / "results"
    assert not list(results.glob("classified*"))


@pytest.mark.parametrize("name", ["support", "images", "results_dir"])
def test_a_folder_that_is_not_named_is_asked_for(name, folders):
    with pytest.raises(UserError, match=f"{name} is empty, but needed: .*; pass --{name}=FOLDER"):
        run_main(folders, f"--{name}=")


@pytest.mark.parametrize(
    "option, message",
    [
        ("--unsure=1.5", "unsure is 1.5, but at most 1"),
        ("--unsure=-0.1", "unsure is -0.1, but at least 0"),
        ("--finetune_steps=-1", "finetune_steps is -1, but at least 0"),
        ("--finetune_lr=0", "finetune_lr is 0.0, but a number above 0"),
        ("--num_inner_steps=-1", "num_inner_steps is -1, but at least 0"),
        ("--lr_inner=-1", "lr_inner is -1.0, but at least 0"),
        ("--lr_output=-1", "lr_output is -1.0, but at least 0"),
        ("--max_left_out=-1", "max_left_out is -1, but at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused(option, message):
    with pytest.raises(UserError, match=message):
        parse_config(classify.Config, [option])


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_a_file_name_that_is_no_text_is_shown_escaped(folders):
    one = next((folders / "images").iterdir())
    shutil.copy(one, os.fsencode(folders / "images") + b"/z\xe9.jpg")
    os.rename(folders / "support" / "d", os.fsencode(folders / "support") + b"/d\xe9")
    assert run_main(folders) == 0
    assert rows_of(folders)[-1]["file"] == r"z\udce9.jpg"


# The command


def test_the_command_classifies_and_reports_what_it_skipped_with_its_exit_code(folders):
    (folders / "images" / "bad.png").write_bytes(b"no image")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "classify.py"), *options_of(folders)]
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    process = subprocess.run(command, env=environment, **pipes)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert f"skipped: {folders / 'images' / 'bad.png'} cannot be read" in process.stderr
    assert "leave-one-out: " in process.stdout and "image, number 6.jpg" in process.stdout
    assert len(rows_of(folders)) == QUERIES
    with Image.open(folders / "results" / "classified.png") as image:
        image.load()
