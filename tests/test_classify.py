"""Classifying a folder of images: every number against a plain loop, every odd folder one line."""

import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from stress import ENVIRONMENT, moved_encoder
from test_checkpoint import contents_of

import classify
from common import UserError
from common.augment import Views
from common.checkpoint import save_checkpoint
from common.config import parse_config
from common.data import load_dataset
from common.figures import plot_contact_sheet
from common.finetune import FineTuning
from common.images import read_image
from common.inner_loop import InnerLoop

pytestmark = pytest.mark.usefixtures("one_thread")

SHOTS = {"a, the first": 3, "b": 1, "c": 5, "d": 2}  # support images of each class
LABELS = torch.arange(len(SHOTS)).repeat_interleave(torch.tensor(list(SHOTS.values())))
QUERIES = 7
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
INNER_LOOP = {"num_inner_steps": 2, "lr_inner": 0.05, "lr_output": 0.11}


def write_checkpoint(folders, model="protonet", scale=10, size=32, **config):
    """Write model.pt; its BatchNorm statistics are far from 0 and 1. Return its encoder."""
    encoder = moved_encoder()
    encoder.classifier.weight.data *= scale
    known = {"model": model, "config": config, "image_shape": [size, size]}
    save_checkpoint(folders / "model.pt", contents_of(encoder, **known, mean=MEAN, std=STD))
    return encoder.eval()


@pytest.fixture(scope="module")
def original(glyph_dir, tmp_path_factory):
    """A folder with `support`, its classes as in SHOTS, and `images`; all in mixed sizes."""
    folder = tmp_path_factory.mktemp("folders")
    data = load_dataset("glyphs", glyph_dir)
    sizes = itertools.cycle([(32, 32), (40, 64), (90, 33), (200, 150)])

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
    write_checkpoint(tmp_path / "folders")
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


def check_rows(rows, logits, abs):
    """Check files, classes and probabilities of all rows, the runner-up's too."""
    assert [row["file"] for row in rows] == [f"image, number {i}.jpg" for i in range(QUERIES)]
    for row, values in zip(rows, logits, strict=True):
        powers = [np.exp(float(value) - float(max(values))) for value in values]
        wanted = dict(zip(SHOTS, np.array(powers) / sum(powers)))
        ranked = sorted(wanted.values(), reverse=True)
        for rank, (name, share) in enumerate([("class", ""), ("runner_up", "runner_up_")]):
            both = [wanted[row[name]], ranked[rank]]  # different classes, if they are nearly equal
            assert 2 * [float(row[f"{share}probability"])] == pytest.approx(both, abs=abs)


def distances_by_hand(feature, features, labels):
    """Minus the squared distances of a feature vector to the mean of each class."""
    logits = []
    for c in range(len(SHOTS)):
        own = [f for f, label in zip(features, labels) if label == c]
        prototype = [sum(values) / len(own) for values in zip(*own)]
        logits.append(-sum((a - b) ** 2 for a, b in zip(feature, prototype)))
    return logits


def features_by_hand(encoder, inputs):
    return [encoder(image[None])[0].tolist() for image in inputs]


@pytest.mark.parametrize("model, size", [("protonet", 32), ("classifier", 48)])
def test_probabilities_are_those_of_a_plain_loop(model, size, folders):
    encoder = write_checkpoint(folders, model, scale=30, size=size)
    assert run_main(folders) == 0
    support, images = (features_by_hand(encoder, x) for x in network_inputs(folders, size))
    expected = [distances_by_hand(feature, support, LABELS.tolist()) for feature in images]
    check_rows(rows_of(folders), expected, abs=2e-4)
    found = {row["probability"] for row in rows_of(folders)}
    assert len(found) == QUERIES  # so that a mistake is seen


def test_leave_one_out_is_that_of_a_plain_loop(folders, capsys):
    encoder = write_checkpoint(folders)
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
    assert f", {10 * correct}.0" in printed and "by chance 25.0" in printed
    assert "classes of one image, which cannot be left out: b\n" in printed
    for path in (folders / "support").glob("*/[1-9].png"):
        path.unlink()
    assert run_main(folders) == 0
    assert "leave-one-out: no class has two images" in capsys.readouterr().out


def adapted_by_hand(encoder, support, labels, queries, how, normalize=lambda images: images):
    """The logits of the queries."""
    views, labels = Views(torch.stack(list(support)), normalize=normalize), torch.as_tensor(labels)
    task = torch.arange(len(labels)), labels, len(SHOTS)
    head = how.adapt(encoder, views, *task, local := deepcopy(encoder))
    with torch.no_grad():
        return F.linear(local.eval()(queries), *head)


@pytest.mark.parametrize(
    "model, trained, given",
    [
        ("protomaml", {"batchnorm": "frozen"}, {}),
        ("maml", {"output_init": "zeros"}, {}),
        ("my_method", {}, {"num_inner_steps": 3, "lr_inner": 0.02, "lr_output": 0.04}),
    ],
)
def test_adaptation_agrees_with_calling_it_by_hand(model, trained, given, folders, capsys):
    encoder = write_checkpoint(folders, model, **INNER_LOOP, **trained)
    options = [f"--{name}={value}" for name, value in given.items()]
    assert run_main(folders, "--max_left_out=4", *options) == 0
    how, (support, images) = InnerLoop(**INNER_LOOP | trained | given), network_inputs(folders)
    check_rows(rows_of(folders), adapted_by_hand(encoder, support, LABELS, images, how), abs=1e-3)

    # The ten images of the classes with two or more lie at 0-2 and 4-10; four evenly spread ones
    # are the 2nd, 4th, 7th and 9th.
    left_out, correct = torch.tensor([1, 4, 7, 9]), 0
    found = classify.by_adaptation(encoder, Views(support), LABELS, images, left_out, how)[1]
    for position, logits in zip(left_out.tolist(), found, strict=True):
        others, query = torch.arange(len(LABELS)) != position, support[position][None]
        expected = adapted_by_hand(encoder, support[others], LABELS[others], query, how)[0]
        assert logits.tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)
        correct += expected.argmax().item() == LABELS[position].item()
    assert f"leave-one-out: {correct} of 4 support images" in capsys.readouterr().out


@pytest.mark.parametrize("trained", [{}, INNER_LOOP])
def test_any_model_can_be_fine_tuned_instead(trained, folders, capsys):
    encoder = write_checkpoint(folders, **trained)
    assert run_main(folders, "--finetune_steps=2", "--finetune_lr=0.01", "--max_left_out=3") == 0
    assert "of 3 support images" in capsys.readouterr().out
    # Colours are changed before the normalisation, so the images come in 0..255 here.
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (STD, MEAN))
    support, images = network_inputs(folders)
    pixels, how = ((support * std + mean) * 255).round().byte(), FineTuning(2, 0.01)
    by_hand = encoder, pixels, LABELS, images, how, lambda found: (found / 255 - mean) / std
    check_rows(rows_of(folders), adapted_by_hand(*by_hand), abs=1e-3)


def test_an_adaptation_that_diverges_is_one_message(folders):
    write_checkpoint(folders, "maml", output_init="zeros", **INNER_LOOP)
    with pytest.raises(UserError, match="diverged; pass a lower"):
        run_main(folders, "--lr_output=1e38", "--num_inner_steps=5")
    assert not list((folders / "results").iterdir())


def test_the_table_shows_what_the_csv_holds_and_counts_the_unsure_ones(folders, capsys):
    run_main(folders, "--unsure=0.6")
    printed, rows = capsys.readouterr().out, rows_of(folders)
    for row in rows:
        first, second = (100 * float(row[f"{name}probability"]) for name in ("", "runner_up_"))
        line = re.search(rf"^{row['file']}.*", printed, re.MULTILINE)[0]
        assert row["class"] in line and line.split("%")[1].split()[0] == row["runner_up"].split()[0]
        found = [float(number) for number in re.findall(r"([\d.]+) ?%", line)]
        assert found == pytest.approx([first, second], abs=0.06)
    unsure = sum(float(row["probability"]) < 0.6 for row in rows)
    assert f"unsure, with a probability below 60 %: {unsure} of {QUERIES}\n" in printed


def test_the_contact_sheets_show_all_images_by_class_and_falling_probability(folders, monkeypatch):
    sheets = []

    def plot(*sheet):
        sheets.append(sheet)
        plot_contact_sheet(*sheet)

    monkeypatch.setattr(classify, "IMAGES_PER_SHEET", 3)
    monkeypatch.setattr(classify, "plot_contact_sheet", plot)
    run_main(folders)
    names = ["classified-2.png", "classified-3.png", "classified.csv", "classified.png"]
    assert sorted(path.name for path in (folders / "results").iterdir()) == names
    assert [len(sheet[0]) for sheet in sheets] == [3, 3, 1]
    assert sheets[1][3] == "ProtoNet, sheet 2 of 3; dashed: probability below 50 %"
    drawn = [row for sheet in sheets for row in sheet[1]]
    order = [(list(SHOTS).index(row["class"]), -row["probability"]) for row in drawn]
    assert order == sorted(order)
    for row, thumbnail in zip(drawn, [image for sheet in sheets for image in sheet[0]]):
        assert np.array_equal(thumbnail, read_image(folders / "images" / row["file"], 160))
    monkeypatch.undo()
    run_main(folders)  # with fewer sheets: the others are removed
    assert sorted(path.name for path in (folders / "results").iterdir()) == names[2:]


def test_only_unsure_images_are_framed(tmp_path):
    def orange(*probabilities):
        images, path = np.zeros((3, 40, 40, 3), dtype=np.uint8), tmp_path / "sheet.png"
        rows = [{"file": "x.png", "class": "c", "probability": p} for p in probabilities]
        plot_contact_sheet(images, rows, 0.5, "some images", str(path))
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        return (pixels[..., 0] > pixels[..., 2] + 60).mean()

    assert orange(0.9, 0.5, 0.8) == 0 and orange(0.9, 0.49, 0.8) > 0.002


def test_what_is_not_used_is_named_and_the_rest_is_classified_as_without_it(folders, capsys):
    run_main(folders)
    before = rows_of(folders)
    (folders / "images" / "image, number 3.jpg").write_bytes(b"no image")
    (folders / "images" / "notes.txt").write_text("notes")
    shutil.copytree(folders / "support" / "c", folders / "images" / "deeper")
    capsys.readouterr()
    assert run_main(folders) == 1
    assert rows_of(folders) == before[:3] + before[4:]
    printed = capsys.readouterr()
    assert f"not used: {folders}/images/deeper, {folders}/images/notes.txt\n" in printed.out
    (line,) = [line for line in re.split("[\r\n]+", printed.err) if line.startswith("skipped")]
    assert "image, number 3.jpg cannot be read as an image" in line


@pytest.mark.parametrize(
    "spoilt, content, message",
    [
        ("support/c/*.png", None, "support/c holds no image"),
        ("support/c/2.png", b"no image", "c/2.png cannot be read as an image"),
        ("images/*", None, "images holds no image"),
        ("model.pt", None, "there is no file .*model.pt"),
    ],
)
def test_folders_that_cannot_work_are_refused_in_one_line_and_nothing_is_written(
    spoilt, content, message, folders
):
    for path in folders.glob(spoilt):
        path.write_bytes(content) if content else path.unlink()
    with pytest.raises(UserError, match=message):
        run_main(folders)
    assert not (folders / "results").exists()


@pytest.mark.parametrize("name", ["support", "images"])
def test_a_folder_that_is_not_named_or_not_there_is_asked_for(name, folders):
    with pytest.raises(UserError, match=f"--{name}=FOLDER is missing"):
        run_main(folders, f"--{name}=")
    with pytest.raises(UserError, match="absent cannot be read: No such file or directory"):
        run_main(folders, f"--{name}={folders / 'absent'}")


def test_results_among_the_images_are_refused(folders):
    with pytest.raises(UserError, match="--results_dir is the folder of --images"):
        run_main(folders, f"--results_dir={folders / 'images'}")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode there")
def test_a_file_name_that_is_no_text_is_shown_escaped(folders):
    one = next((folders / "images").iterdir())
    shutil.copy(one, os.fsencode(folders / "images") + b"/z\xe9.jpg")
    os.rename(folders / "support" / "d", os.fsencode(folders / "support") + b"/d\xe9")
    assert run_main(folders) == 0 and rows_of(folders)[-1]["file"] == r"z\udce9.jpg"


def test_the_command_classifies_and_reports_what_it_skipped_with_its_exit_code(folders):
    (folders / "images" / "bad.png").write_bytes(b"no image")
    options = {"capture_output": True, "text": True, "timeout": 300, "env": ENVIRONMENT}
    command = [sys.executable, classify.__file__, *options_of(folders)]
    process = subprocess.run(command, cwd=folders, **options)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert f"skipped: {folders / 'images' / 'bad.png'} cannot be read" in process.stderr
    assert "leave-one-out: " in process.stdout and "image, number 6.jpg" in process.stdout
    assert len(rows_of(folders)) == QUERIES and (folders / "results" / "classified.png").exists()
