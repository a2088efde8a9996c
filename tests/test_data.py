"""Data sets: both formats, one message for whatever is wrong, statistics, downloads."""

import hashlib
import importlib
import io
import os
import pickle
import re
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import stress
import torch
import torchvision
from PIL import Image

import evaluate
from common import UserError, data, files, glyphs, images
from common.checkpoint import content_digest, load_checkpoint
from common.config import parse_config
from common.data import ImageSet, channel_statistics, load_dataset, load_training_data, normalize
from common.glyphs import draw_glyph_digits
from common.splits import split_classes
from common.tutorial import CIFAR100_MEAN, CIFAR100_STD

CPU = torch.device("cpu")


def arrays(per_class=3, class_names=("ant", "bee", "cat"), height=32, width=32):
    """What an .npz holds: random images, their labels in mixed order, and class names."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(class_names), dtype=np.int64), per_class))
    images = rng.integers(256, size=(len(labels), height, width, 3), dtype=np.uint8)
    return {"images": images, "labels": labels, "class_names": np.array(class_names)}


def message_of(name, data_dir, *parts):
    """The one line that load_dataset answers with; it holds each of `parts`."""
    with pytest.raises(UserError) as caught:
        load_dataset(name, data_dir)
    message = str(caught.value)
    for part in parts:
        assert str(part) in message, message


def message_of_npz(data_dir, stored, *parts):
    """The one line that load_dataset answers with where these arrays are in the file."""
    np.savez(data_dir / "mine.npz", **stored)
    message_of("mine", data_dir, data_dir / "mine.npz", *parts)


def assert_same_data(found, expected):
    assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
    assert (found.name, found.class_names) == (expected.name, expected.class_names)


def image_set(**options):
    stored = arrays(**options)
    return ImageSet(
        "mine",
        torch.from_numpy(stored["images"]).permute(0, 3, 1, 2),
        torch.from_numpy(stored["labels"]),
        stored["class_names"].tolist(),
    )


def test_some_classes_of_a_data_set_are_numbered_in_the_order_asked_for():
    data = image_set(per_class=4, class_names=("ant", "bee", "cat", "dog"))
    some = data.of_classes(["dog", "bee"])
    rows = [row for row, label in enumerate(data.labels.tolist()) if label in (3, 1)]
    assert torch.equal(some.images, data.images[rows])
    assert some.labels.tolist() == [{3: 0, 1: 1}[label] for label in data.labels[rows].tolist()]
    assert some.class_names == ["dog", "bee"] and some.name == "mine"
    with pytest.raises(UserError, match="mine has no class 'emu'"):
        data.of_classes(["ant", "emu"])


def test_the_digest_follows_every_pixel_label_and_name_but_neither_layout_nor_split():
    data = image_set()
    digest = data.digest()
    assert re.fullmatch("[0-9a-f]{64}", digest) and data.to("cpu").digest() == digest
    assert data.to("cpu").images.is_contiguous(memory_format=torch.channels_last)
    data.images, data.split = data.images.contiguous(), {"train": ["ant", "bee", "cat"]}
    assert data.digest() == digest
    others = [image_set() for _ in range(3)]
    others[0].images[4, 1, 31, 31] ^= 1
    others[1].labels[0] = (others[1].labels[0] + 1) % 3
    others[2].class_names[1] = "wasp"
    assert len({digest, *(other.digest() for other in others)}) == 4


# ---- .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("height, width", [(32, 32), (29, 40)])
def test_an_npz_file_is_read_back_equal(tmp_path, save, height, width):
    stored = arrays(height=height, width=width)
    save(tmp_path / "mine.npz", **stored)
    data = load_dataset("mine", str(tmp_path))
    assert data.images.dtype == torch.uint8 and data.images.shape == (9, 3, height, width)
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), stored["images"])
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == stored["labels"].tolist()
    assert data.class_names == ["ant", "bee", "cat"] and data.name == "mine" and data.split is None
    save(tmp_path / "fortran.npz", **{**stored, "images": np.asfortranarray(stored["images"])})
    assert load_dataset("fortran", tmp_path).digest() == data.digest()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)  # what code hidden in a file would do


def test_pickled_objects_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message_of_npz(tmp_path, {**arrays(), "class_names": np.array([Bomb()])}, "cannot be read")
    assert not Path("exploded").exists()


WRONG = {
    "no images": ("images", lambda a: None),
    "no labels": ("labels", lambda a: None),
    "float images": ("images", lambda a: a / 255),
    "grey images": ("images", lambda a: a[..., 0]),
    "channels first": ("images", lambda a: a.transpose(0, 3, 1, 2)),
    "small images": ("images", lambda a: a[:, :, :15]),
    "a single number": ("images", lambda a: np.uint8(7)),
    "too many labels": ("labels", lambda a: np.append(a, 0)),
    "a negative label": ("labels", lambda a: np.append(a[1:], -1)),
    "a label without a name": ("labels", lambda a: np.append(a[1:], 2**40)),
    "dates as labels": ("labels", lambda a: a.astype("M8[s]")),
    "a class without an image": ("labels", lambda a: np.where(a == 1, 0, a)),
    "bytes as names": ("class_names", lambda a: a.astype("S")),
    "no characters": ("class_names", lambda a: (a.view(np.uint32) + 2**31).view(a.dtype)),
    "a table of names": ("class_names", lambda a: a[None]),
    "two classes of one name": ("class_names", lambda a: np.array(["ant", "bee", "ant"])),
    "one class": ("class_names", lambda a: a[:1]),
}


@pytest.mark.parametrize("what", WRONG)
def test_arrays_that_make_up_no_data_set_are_refused_with_their_kind_and_the_format(tmp_path, what):
    key, change = WRONG[what]
    stored = arrays()
    changed = change(stored.pop(key))
    found = "" if changed is None else f"{key} {changed.dtype} {list(np.shape(changed))}"
    stored |= {} if changed is None else {key: changed}
    message_of_npz(tmp_path, stored, "holds", found, "a data set has images uint8 [N, H, W, 3]")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_in_a_file_is_refused_or_changes_nothing(tmp_path, save):
    save(tmp_path / "mine.npz", **arrays(per_class=1))
    found = stress.fuzz(tmp_path / "mine.npz", 300, seed=1)
    assert found["refused"] > 100 and not found["accepted wrongly"] + found["tracebacks"], found


def test_what_is_no_archive_of_arrays_is_one_message(tmp_path):
    file = tmp_path / "mine.npz"
    file.mkdir()
    message_of("mine", tmp_path, file)
    file.rmdir()
    for content in (b"", b"<html>404</html>", b"PK\x03\x04", bytes(1000), pickle.dumps([1])):
        file.write_bytes(content)
        message_of("mine", tmp_path, file, "cannot be read", "write it again")
    with open(file, "wb") as handle:
        np.save(handle, arrays()["images"])
    message_of("mine", tmp_path, file, "cannot be read", "write it again")


# ---- a folder of images


def save_images(folder, classes=("ant", "bee"), count=2, size=(32, 32)):
    rng = np.random.default_rng(1)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{number}.png")


@pytest.fixture
def no_reading(monkeypatch):
    """Return a function after which no image can be read."""

    def fail(path, size):
        raise AssertionError(f"{path} is read again")

    return lambda: monkeypatch.setattr(images, "read_image", fail)


def test_a_folder_is_read_pixel_by_pixel_and_the_second_time_not_at_all(
    tmp_path, no_reading, capsys
):
    save_images(tmp_path / "mine", ("dog", "ant", "bee"), size=(40, 36))
    data = load_dataset("mine", tmp_path, 36)
    assert data.class_names == ["ant", "bee", "dog"] and data.split is None
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.images.dtype == torch.uint8 and data.images.shape == (6, 3, 36, 36)
    for image, path in zip(data.images, sorted((tmp_path / "mine").glob("*/*"))):
        with Image.open(path) as stored:
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(stored)[:, 2:38])
    assert sorted(os.listdir(tmp_path)) == ["mine", "mine.npz"]
    capsys.readouterr()
    no_reading()
    again = load_dataset("mine", tmp_path, 36)
    assert_same_data(again, data)
    assert again.digest() == data.digest() and capsys.readouterr().out == ""


def test_it_is_said_how_large_images_were_what_is_not_used_and_what_is_there_twice(
    tmp_path, capsys
):
    folder = tmp_path / "mine"
    save_images(folder, size=(20, 64))
    Image.new("RGB", (300, 200), "red").save(folder / "bee" / "2.jpg")
    Image.new("L", (7, 12), 99).save(folder / "ant" / "2.BMP")
    shutil.copy(folder / "bee" / "0.png", folder / "bee" / "zz copy.png")
    (folder / "bee" / "photo.heic").write_bytes(b"")
    (folder / "bee" / "more").mkdir()
    (folder / ".cache").mkdir()
    (folder / "notes.txt").write_text("")
    data = load_dataset("mine", tmp_path)
    assert (data.images[2] == 99).all() and data.images[5, 0].min() > 250
    unused, copies, read = capsys.readouterr().out.splitlines()
    assert unused == "not used: " + ", ".join(
        f"{folder}/{name}" for name in ("bee/more", "bee/photo.heic", "notes.txt")
    )
    copy, first = folder / "bee" / "zz copy.png", folder / "bee" / "0.png"
    assert copies.startswith("1 of 7 images, as cropped, are copies of others in their class, ")
    assert f"{copy} (class 'bee') and {first} (class 'bee')" in copies and "too high" in copies
    assert read == f"{folder}: 7 images in 2 classes, brought to 32x32"


def test_less_than_two_classes_or_an_empty_one_are_refused(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"loose image")
    message_of("mine", tmp_path, f"{folder} has 0 classes", f"{folder}/<class>/")
    save_images(folder, ("ant",))
    message_of("mine", tmp_path, f"{folder} has 1 classes")
    save_images(folder, ("bee",))
    load_dataset("mine", tmp_path)  # what is kept of two does not hide the third
    (folder / "cat").mkdir()
    message_of("mine", tmp_path, f"{folder / 'cat'} holds no image", ".jpg, .jpeg, .png")


@pytest.mark.parametrize(
    "inside, found",
    [
        ("mine/mine/{}/x.png", "mine/mine holds no image (ant/, bee/)"),
        ("mine/{}/photos/x.png", "mine/ant holds no image (photos/)"),
        ("mine/{}/x.heic", "mine/ant holds no image (x.heic)"),
    ],
)
def test_what_lies_in_place_of_images_is_said(inside, found, tmp_path):
    for name in ("ant", "bee"):
        path = tmp_path / inside.format(name)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    message_of("mine", tmp_path, found, f"{tmp_path / 'mine'}/<class>/", "train/<class>/")


def test_names_are_compared_in_one_form_and_twins_are_named(tmp_path, capsys):
    composed, decomposed = "\u00e9", "e\u0301"
    save_images(tmp_path / "mine", ("bell\x07", decomposed))
    assert load_dataset("mine", tmp_path).class_names == ["bell\\x07", composed]
    save_images(tmp_path / "mine", ("Bee", "bee"))
    load_dataset("mine", tmp_path)
    assert "'Bee' and another class would be one folder on Windows" in capsys.readouterr().out
    save_images(tmp_path / "mine", (composed,))
    message_of("mine", tmp_path, f"two folders {composed!r}", "into one")


def test_a_column_of_labels_in_a_file_is_read_as_the_labels(tmp_path):
    stored = arrays()
    np.savez(tmp_path / "mine.npz", **stored | {"labels": stored["labels"][:, None].astype("u1")})
    assert load_dataset("mine", tmp_path).labels.tolist() == stored["labels"].tolist()


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("absent")])
def test_an_unreadable_image_is_named_and_nothing_is_kept(tmp_path, make):
    save_images(tmp_path / "mine")
    path = tmp_path / "mine" / "bee" / "2.png"
    make(path)
    message_of("mine", tmp_path, f"{path} cannot be read", "replace or remove it")
    (other := path.with_name("3.png")).touch()
    if path.exists():
        message_of("mine", tmp_path, f"{path} cannot be read", f"(and 1 more: {other})")
    assert os.listdir(tmp_path) == ["mine"]


def test_a_file_comes_before_a_folder_and_keeps_its_size(tmp_path, quick_digits, capsys):
    save_images(tmp_path / "mine", ("from", "folder"))
    np.savez(tmp_path / "mine.npz", **arrays(height=48, width=48))
    np.savez(tmp_path / "wide.npz", **arrays(height=48, width=64))
    for size in (32, 48):  # 32 is the default: no size was asked for
        assert load_dataset("mine", tmp_path, size).images.shape == (9, 3, 48, 48)
    assert f"is used, not the folder {tmp_path / 'mine'}" in capsys.readouterr().out
    for name, found in (("mine", "48x48"), ("wide", "64x48"), ("glyph_digits", "32x32")):
        with pytest.raises(UserError, match=f"images are {found} in .*{name}.npz, not 64x64"):
            load_dataset(name, tmp_path, 64)
    with pytest.raises(UserError, match="image_size is 15, but the encoders need at least 16"):
        load_dataset("mine", tmp_path, 15)


@pytest.mark.parametrize("below", ["", "train"])
def test_a_folder_of_images_with_a_built_in_name_is_refused(tmp_path, below):
    save_images(tmp_path / "mnist" / below)
    message_of("mnist", tmp_path, "mnist is a built-in data set", tmp_path / "mnist", "rename")


def in_bee(change):
    return lambda folder: change(folder / "bee" / "1.png")


CHANGES = {
    "an image more": in_bee(lambda file: shutil.copy(file, file.with_name("2.png"))),
    "an image less": in_bee(os.remove),
    "an image edited": in_bee(Image.new("RGB", (32, 32)).save),
    "an image touched": in_bee(lambda file: os.utime(file, ns=(0, 0))),
    "an image renamed": in_bee(lambda file: file.rename(file.with_name("a.png"))),
    "an image in another class": in_bee(lambda file: file.rename(file.parent / "../ant/b.png")),
    "a class renamed": lambda folder: (folder / "bee").rename(folder / "wasp"),
    "another size": lambda folder: None,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_folder_is_read_again_and_a_line_says_so(tmp_path, what, no_reading, capsys):
    folder, file = tmp_path / "mine", tmp_path / "mine.npz"
    size = 40 if what == "another size" else 32
    save_images(folder)
    before = load_dataset("mine", tmp_path).digest()
    CHANGES[what](folder)
    capsys.readouterr()
    data = load_dataset("mine", tmp_path, size)
    changed = f"{folder}, or --image_size, changed since {file} was made; reading the images again"
    assert capsys.readouterr().out.splitlines()[0] == changed
    same_images = what in ("an image touched", "an image renamed")
    assert (data.digest() == before) == same_images
    file.rename(tmp_path / "other.npz")
    assert_same_data(load_dataset("mine", tmp_path, size), data)  # as if read for the first time
    no_reading()
    assert_same_data(load_dataset("mine", tmp_path, size), data)
    shutil.rmtree(folder)  # what is kept is then a file as any
    assert_same_data(load_dataset("mine", tmp_path), data)


def exchange(one, other):
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: exchange(folder / "ant", folder / "bee"),
        lambda folder: exchange(folder / "ant" / "0.bmp", folder / "bee" / "0.bmp"),
        lambda folder: shutil.copy2(folder / "ant" / "0.bmp", folder / "bee" / "0.bmp"),
    ],
)
def test_files_of_equal_size_and_date_that_change_places_are_noticed(change, tmp_path):
    save_images(tmp_path / "mine")
    for path in (tmp_path / "mine").glob("*/*.png"):  # all equally large
        Image.open(path).save(bitmap := path.with_suffix(".bmp"))
        os.utime(bitmap, ns=(10**9, 10**9))
        path.unlink()
    load_dataset("mine", tmp_path)
    change(tmp_path / "mine")
    found = load_dataset("mine", tmp_path)
    (tmp_path / "mine.npz").unlink()
    assert_same_data(found, load_dataset("mine", tmp_path))


def test_an_image_in_two_classes_is_named_with_both(tmp_path, capsys):
    save_images(folder := tmp_path / "mine")
    shutil.copy(folder / "ant" / "1.png", folder / "bee" / "9.png")
    load_dataset("mine", tmp_path)
    line = capsys.readouterr().out.splitlines()[0]
    both = f"{folder}/bee/9.png (class 'bee') and {folder}/ant/1.png (class 'ant')"
    assert both in line and "no model can be right on both" in line and "too high" not in line


def test_a_folder_beside_which_nothing_can_be_written_is_used_all_the_same(
    tmp_path, monkeypatch, capsys
):
    def refuse(path, **options):
        raise OSError(28, "No space left on device")

    save_images(tmp_path / "mine")
    monkeypatch.setattr(np, "savez", refuse)
    assert len(load_dataset("mine", tmp_path).images) == 4 and os.listdir(tmp_path) == ["mine"]
    assert "will be read again at the next start: cannot write" in capsys.readouterr().out


# ---- a split of the data set's own

OWN_SPLIT = {"train": ["dog", "ant", "cow"], "val": ["bee", "emu"], "test": ["cat", "fox"]}


def save_parts(folder, split=OWN_SPLIT):
    for part, names in split.items():
        (folder / part).mkdir(parents=True)
        save_images(folder / part, names)


def test_folders_of_three_parts_are_one_data_set_with_a_split(tmp_path, no_reading):
    save_parts(tmp_path / "mine")
    save_parts(tmp_path / "titled", {part.title(): names for part, names in OWN_SPLIT.items()})
    expected = {part: sorted(names) for part, names in OWN_SPLIT.items()}
    assert load_dataset("titled", tmp_path).split == expected
    data = load_dataset("mine", tmp_path)
    assert data.split == expected and list(data.split) == ["train", "val", "test"]
    assert data.class_names == [name for part in expected.values() for name in part]
    assert data.labels.tolist() == [label for label in range(7) for _ in range(2)]
    assert load_training_data("mine", tmp_path, CPU).split == expected
    (tmp_path / "mine" / "train" / "cow").rename(tmp_path / "mine" / "val" / "cow")
    moved = load_dataset("mine", tmp_path)
    assert moved.split["val"] == ["bee", "cow", "emu"]
    no_reading()
    assert load_dataset("mine", tmp_path).to("cpu").split == moved.split
    assert moved.of_classes(["fox", "ant"]).split is None


def test_parts_that_make_up_no_split_are_refused_before_an_image_is_read(tmp_path, no_reading):
    folder = tmp_path / "mine"
    no_reading()
    save_parts(folder, {**OWN_SPLIT, "test": ["dog"]})
    message_of("mine", tmp_path, f"{folder}: test has 1 classes, but at least 2 are needed")
    save_images(folder / "test", ["cat"])
    message_of("mine", tmp_path, f"{folder}: class 'dog' is in train and test")
    shutil.rmtree(folder / "val")  # two parts alone are taken for classes
    message_of("mine", tmp_path, f"{folder / 'test'} holds no image")


def test_a_file_may_bring_a_split(tmp_path):
    stored = arrays(class_names=tuple("abcdef"))
    parts = np.array(["test", "val", "train", "train", "val", "test"])
    np.savez(tmp_path / "mine.npz", **stored, split=parts)
    expected = {"train": ["c", "d"], "val": ["b", "e"], "test": ["a", "f"]}
    assert load_dataset("mine", tmp_path).split == expected
    assert load_training_data("mine", tmp_path, CPU).split == expected
    for wrong in (parts[1:], parts[[0, 0, 0, 1, 1, 2]], np.arange(6), np.array("train")):
        message_of_npz(tmp_path, {**stored, "split": wrong}, "but at least 2 are needed")


# ---- what is drawn


@pytest.fixture
def quick_digits(monkeypatch):
    monkeypatch.setattr(glyphs, "draw_glyph_digits", lambda: draw_glyph_digits(2))


def test_a_drawn_data_set_is_written_once_and_then_read(tmp_path, capsys, quick_digits, no_network):
    file = tmp_path / "new" / "glyph_digits.npz"
    first = load_dataset("glyph_digits", tmp_path / "new")
    assert os.listdir(tmp_path / "new") == [file.name] and str(file) in capsys.readouterr().out
    images, labels, class_names = draw_glyph_digits(2)
    assert np.array_equal(first.images.permute(0, 2, 3, 1).numpy(), images)
    assert first.labels.tolist() == labels.tolist() and first.class_names == class_names
    written = file.stat().st_mtime_ns
    assert_same_data(load_dataset("glyph_digits", tmp_path / "new"), first)
    assert file.stat().st_mtime_ns == written and capsys.readouterr().out == ""
    message_of("glyph_digits", file, "glyph_digits.npz", "choose another folder")


# ---- statistics and normalisation


def test_statistics_equal_numpys_whatever_the_layout_in_memory():
    data = image_set(per_class=20)
    data.images[:, 1] //= 3
    data.images[:, 2] = 51  # one grey level can be normalised, too
    mean, std = channel_statistics(data)
    pixels = data.images.numpy() / 255.0
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(std, [*pixels.std(axis=(0, 2, 3))[:2], 1], rtol=1e-9)
    assert all(type(value) is float for value in (*mean, *std))
    data.images = data.images.contiguous()
    assert channel_statistics(data) == (mean, std)
    data.name = "cifar100"
    assert channel_statistics(data) == (CIFAR100_MEAN, CIFAR100_STD)


def test_normalising_equals_torchvisions_transforms():
    images = image_set().images
    found = normalize(images, CIFAR100_MEAN, CIFAR100_STD)
    theirs = torchvision.transforms.Normalize(CIFAR100_MEAN, CIFAR100_STD)
    torch.testing.assert_close(found, theirs(images.float() / 255), rtol=1e-5, atol=1e-5)


# ---- what a trainer works on


def test_training_data_are_disjoint_classes_normalised_by_the_training_images_alone(tmp_path):
    stored = arrays(per_class=4, class_names=tuple("abcdefg"))
    # Of different brightness, so that other classes have other statistics.
    stored["images"] //= 1 + stored["labels"][:, None, None, None].astype(np.uint8)
    np.savez(tmp_path / "mine.npz", **stored)
    whole, data = load_dataset("mine", tmp_path), load_training_data("mine", tmp_path, CPU)
    assert data.split == split_classes(whole.class_names)
    assert_same_data(data.train, whole.of_classes(data.split["train"]))
    assert_same_data(data.val, whole.of_classes(data.split["val"]))
    assert data.digest == whole.digest() != data.train.digest()
    assert (data.mean, data.std) == channel_statistics(data.train) != channel_statistics(whole)
    std, mean = torch.std_mean(data.normalize(data.train.images), dim=(0, 2, 3), correction=0)
    assert mean.tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert std.tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    moved = load_training_data("mine", tmp_path, torch.device("meta"))
    for part in (moved.train, moved.val):
        assert part.images.device.type == part.labels.device.type == "meta"
        assert part.images.is_contiguous(memory_format=torch.channels_last)


# ---- what torchvision reads: small files of the true formats


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def digits():
    """Pixels and digits in mixed order, and the rows of the first three (the rarest's) of each."""
    rng = np.random.default_rng(0)
    digits = rng.permutation(np.repeat(np.arange(10), (4, 3, 5, 3, 3, 4, 3, 3, 6, 3)))
    rows = [row for digit in range(10) for row in np.flatnonzero(digits == digit)[:3]]
    return rng.integers(256, size=(len(digits), 32, 32, 3), dtype=np.uint8), digits, rows


def test_of_svhn_the_first_images_of_each_digit_are_kept(tmp_path, digits, monkeypatch, no_network):
    pixels, digits, rows = digits
    # As published: images along the last axis, labels in a column, the digit zero called 10.
    labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
    file = tmp_path / "test_32x32.mat"
    scipy.io.savemat(file, {"X": pixels.transpose(1, 2, 3, 0), "y": labels})
    part = ["http://localhost/", file.name, md5(file.read_bytes())]
    monkeypatch.setitem(torchvision.datasets.SVHN.split_list, "test", part)
    data = load_dataset("svhn", tmp_path)
    assert data.class_names == list("0123456789") and data.labels.tolist() == digits[rows].tolist()
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels[rows])
    file.unlink()
    assert load_dataset("svhn", tmp_path).digest() == data.digest()  # read from the written file


def test_mnist_is_padded_to_32_pixels_and_made_rgb(tmp_path, digits, no_network):
    pixels, digits, rows = digits
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels[:, 2:30, 2:30, 0]), ("labels-idx1", digits)):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            file = tmp_path / "MNIST" / "raw" / f"{part}-{kind}-ubyte"
            file.write_bytes(header + array.astype(np.uint8).tobytes())
    data = load_dataset("mnist", tmp_path)
    assert data.class_names == list("0123456789") and data.labels.tolist() == digits[rows].tolist()
    expected = np.zeros((30, 3, 32, 32), dtype=np.uint8)
    expected[:, :, 2:30, 2:30] = pixels[rows, None, 2:30, 2:30, 0]
    assert np.array_equal(data.images.numpy(), expected)
    assert load_dataset("mnist", tmp_path).digest() == data.digest()


def test_the_two_parts_of_cifar100_are_merged(tmp_path, monkeypatch, no_network):
    pixels = np.random.default_rng(0).integers(256, size=(10, 3, 32, 32), dtype=np.uint8)
    labels, theirs, sums = [0, 1, 2, 2, 1, 0, 1, 2, 0, 2], torchvision.datasets.CIFAR100, {}
    parts = {
        "train": {"data": pixels[:6].reshape(6, -1), "fine_labels": labels[:6]},
        "test": {"data": pixels[6:].reshape(4, -1), "fine_labels": labels[6:]},
        "meta": {"fine_label_names": ["apple", "baby", "can"]},
    }
    (tmp_path / theirs.base_folder).mkdir()
    for name, part in parts.items():
        (tmp_path / theirs.base_folder / name).write_bytes(content := pickle.dumps(part))
        sums[name] = md5(content)
    monkeypatch.setattr(theirs, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(theirs, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(theirs, "meta", {**theirs.meta, "md5": sums["meta"]})
    data = load_dataset("cifar100", tmp_path)
    assert np.array_equal(data.images.numpy(), pixels) and data.labels.tolist() == labels
    assert data.class_names == ["apple", "baby", "can"]
    assert load_dataset("cifar100", tmp_path).digest() == data.digest()


@pytest.mark.parametrize(
    "name, files",
    [
        ("cifar100", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
        ("svhn", "http://ufldl.stanford.edu/housenumbers/test_32x32.mat"),
        ("mnist", "MNIST/raw with the files of https://ossci-datasets.s3.amazonaws.com/mnist/"),
    ],
)
def test_without_a_network_one_message_names_the_missing_file_and_where_it_goes(
    tmp_path, no_network, name, files
):
    # torchvision makes a folder MNIST, which macOS and Windows also find under the name mnist.
    (tmp_path / name / "raw").mkdir(parents=True)
    (tmp_path / "test_32x32.mat").write_bytes(b"<html>Please log in</html>")
    parts = f"{name} could not be downloaded", f"put {files} or ", f"{name}.npz into {tmp_path}/"
    message_of(name, tmp_path, *parts)
    assert not (tmp_path / f"{name}.npz").exists()


# ---- more images than memory


@pytest.mark.parametrize("model", ["classifier", "protonet", "protomaml"])
def test_images_that_stay_in_their_file_give_the_same_bits(
    model, glyph_dir, tmp_path, monkeypatch, one_thread
):
    script = importlib.import_module("train_protomaml" if "maml" in model else f"train_{model}")
    digests = []
    for limit in (files.LARGE, 0):
        monkeypatch.setattr(files, "LARGE", limit)
        images = load_dataset("glyphs", glyph_dir).images
        assert isinstance(images, data.MappedImages) == (limit == 0)
        options = ["--dataset=glyphs", f"--data_dir={glyph_dir}", "--n_way=2", "--epochs=1"]
        options += ["--steps_per_epoch=2", f"--checkpoint_dir={tmp_path / str(limit)}"]
        options += ["--encoder=conv4", "--width=4", "--device=cpu"]
        options += ["--tasks_per_step=2"] if "maml" in model else []
        script.main(parse_config(script.Config, options))
        last = load_checkpoint(tmp_path / str(limit) / "glyphs" / f"{model}_last.pt")
        digests.append(content_digest([last["state_dict"], last["history"], last["data_digest"]]))
        folder = tmp_path / str(limit)
        results = [f"--models={folder}/glyphs", f"--results_dir={folder}"]
        results += ["--domains=", "--k_shots=2", "--num_inner_steps=1", "--max_support_sets=1"]
        assert evaluate.main(parse_config(evaluate.Config, [*options[:2], *results])) == 0
        digests[-1] += (folder / "accuracy.json").read_text()
    assert digests[0] == digests[1]


def test_a_mapped_file_is_read_from_the_disk_and_damage_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 0)
    save_images(tmp_path / "mine", size=(40, 40))
    first, again = load_dataset("mine", tmp_path), load_dataset("mine", tmp_path)
    sent = pickle.dumps(first)  # to the other processes of torchrun, without a pixel
    assert len(sent) < 3000 < first.images[:].numel()
    assert torch.equal(pickle.loads(sent).images[:], first.images[:])
    assert torch.equal(first.images[:], again.images[:]) and first.digest() == again.digest()
    plain = np.load(tmp_path / "mine.npz")["images"]
    assert np.array_equal(first.images[:].permute(0, 2, 3, 1).numpy(), plain)
    subset = first.of_classes(["bee"])
    assert torch.equal(subset.images[torch.tensor([1])], first.images[torch.tensor([3])])
    raw = bytearray((tmp_path / "mine.npz").read_bytes())
    raw[raw.index(plain[2].tobytes()) + 7] ^= 1
    (tmp_path / "mine.npz").write_bytes(raw)
    shutil.rmtree(tmp_path / "mine")
    message_of("mine", tmp_path, "mine.npz cannot be read as a data set")


@pytest.mark.parametrize("turned", [False, True])
def test_omniglots_characters_are_light_on_dark_with_a_split_and_turned_on_request(
    turned, tmp_path, monkeypatch, no_network
):
    """Two alphabets of twelve characters, in archives as Lake et al. publish them."""
    folder, shapes = tmp_path / "omniglot-py", {}
    folder.mkdir()
    checksums = {}
    for part, alphabet in (("images_background", "Latin"), ("images_evaluation", "Tengwar")):
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for character in range(12):
                pixels = np.full((105, 105), 255, np.uint8)
                pixels[: 8 * (character + 1), :50] = 0  # the more, the later
                shapes[f"{alphabet}/character{character:02}"] = character
                for drawer in range(3):
                    with io.BytesIO() as file:
                        Image.fromarray(pixels).convert("1").save(file, "png")
                        name = f"{part}/{alphabet}/character{character:02}/{drawer}.png"
                        archive.writestr(name, file.getvalue())
        checksums[part] = hashlib.md5((folder / f"{part}.zip").read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.Omniglot, "zips_md5", checksums)
    found = load_dataset("omniglot_turned" if turned else "omniglot", tmp_path)
    sizes = {part: len(names) for part, names in found.split.items()}
    assert sizes == {"train": 64 if turned else 16, "val": 2, "test": 6}
    assert len(found.images) == 3 * len(found.class_names) and found.images.shape[2:] == (32, 32)
    for image, label in zip(found.images[:, 0].numpy(), found.labels.tolist()):
        name, _, turns = found.class_names[label].partition(", turned ")
        upright = np.rot90(image, -int(turns or 0) // 90)
        height = 28 * 8 * (shapes[name] + 1) / 105
        assert (upright[:2] == 0).all() and upright[2, 4] > 200 > 50 > upright[2, 28]
        assert abs((upright[:, 4] > 127).sum() - height) <= 1.5
        assert not turns or name in found.split["train"]
