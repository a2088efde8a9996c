"""Data sets: both formats, one message per kind of damage, class splits, statistics, downloads."""

import errno
import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import shutil
import socket
import struct
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import scipy.io
import stress
import torch
import torchvision
from PIL import Image

from common import images
from common.config import UserError
from common.data import (
    CIFAR100_MEAN,
    CIFAR100_STD,
    SOURCES,
    ImageSet,
    channel_statistics,
    load_dataset,
    load_training_data,
    normalize,
)
from common.glyphs import draw_glyph_digits
from common.splits import split_classes


def arrays(per_class=3, class_names=("ant", "bee", "cat"), height=32, width=32, seed=0):
    """What an .npz holds: random images, their labels in mixed order, and class names."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(class_names), dtype=np.int64), per_class))
    images = rng.integers(256, size=(len(labels), height, width, 3), dtype=np.uint8)
    return {"images": images, "labels": labels, "class_names": np.array(class_names)}


def message_of(name, data_dir, *parts):
    """The one line that load_dataset answers with; it holds each of `parts`."""
    with pytest.raises(UserError) as caught:
        load_dataset(name, data_dir)
    message = str(caught.value)
    assert "\n" not in message, message
    for part in parts:
        assert str(part) in message, message
    return message


def message_of_npz(data_dir, stored, *parts):
    """The one line that load_dataset answers with where these arrays are in the file."""
    np.savez(data_dir / "mine.npz", **stored)
    return message_of("mine", data_dir, data_dir / "mine.npz", *parts)


def assert_same_data(found, expected):
    assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)
    assert (found.name, found.class_names) == (expected.name, expected.class_names)


# ---- ImageSet


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


def test_a_class_that_is_not_in_the_data_set_is_named():
    with pytest.raises(UserError, match="mine has no class 'emu'"):
        image_set().of_classes(["ant", "emu"])


def test_moving_to_a_device_keeps_the_values():
    data = image_set()
    assert_same_data(data.to("cpu"), data)
    assert data.to("cpu").images.is_contiguous(memory_format=torch.channels_last)


def test_the_digest_follows_every_pixel_label_and_name_but_not_the_layout_in_memory():
    data = image_set()
    digest = data.digest()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert image_set().digest() == data.to("cpu").digest() == digest
    data.images = data.images.contiguous()
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
    data = load_dataset("mine", tmp_path)
    assert data.images.dtype == torch.uint8 and data.images.shape == (9, 3, height, width)
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), stored["images"])
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == stored["labels"].tolist()
    assert data.class_names == ["ant", "bee", "cat"] and data.name == "mine"


def test_a_data_dir_may_be_a_string(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    assert_same_data(load_dataset("mine", str(tmp_path)), load_dataset("mine", tmp_path))


def test_images_in_fortran_order_are_the_same_images(tmp_path):
    stored = arrays()
    np.savez(tmp_path / "c.npz", **stored)
    np.savez(tmp_path / "f.npz", **{**stored, "images": np.asfortranarray(stored["images"])})
    first, second = load_dataset("c", tmp_path), load_dataset("f", tmp_path)
    assert torch.equal(first.images, second.images) and first.digest() == second.digest()


@pytest.mark.parametrize("key", ["images", "labels", "class_names"])
def test_a_missing_array_is_named(tmp_path, key):
    stored = arrays()
    del stored[key]
    message_of_npz(tmp_path, stored, f"no array {key!r}", "write it again")


class Bomb:
    """Unpickling it makes a folder of that name: a stand-in for code hidden in a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("key", ["images", "labels", "class_names"])
def test_pickled_objects_are_refused_and_not_run(tmp_path, key):
    pickled = np.array([Bomb(tmp_path / "exploded")], dtype=object)
    message_of_npz(tmp_path, {**arrays(), key: pickled}, "cannot be read")
    assert not (tmp_path / "exploded").exists()


WRONG = {
    "float64 images": ("images", lambda a: a / 255),
    "float32 images": ("images", lambda a: a.astype(np.float32)),
    "images of NaN": ("images", lambda a: np.full(a.shape, np.nan)),
    "int64 images": ("images", lambda a: a.astype(np.int64)),
    "grey images": ("images", lambda a: a[..., 0]),
    "channels first": ("images", lambda a: a.transpose(0, 3, 1, 2)),
    "four channels": ("images", lambda a: np.concatenate([a, a[..., :1]], axis=3)),
    "flat images": ("images", lambda a: a.reshape(len(a), -1)),
    "a single number": ("images", lambda a: np.uint8(7)),
    "int32 labels": ("labels", lambda a: a.astype(np.int32)),
    "float labels": ("labels", lambda a: a.astype(float)),
    "labels in a column": ("labels", lambda a: a[:, None]),
    "too few labels": ("labels", lambda a: a[:-1]),
    "too many labels": ("labels", lambda a: np.append(a, 0)),
    "bytes as names": ("class_names", lambda a: a.astype("S")),
    "numbers as names": ("class_names", lambda a: np.arange(3)),
    "a table of names": ("class_names", lambda a: a[None]),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_array_of_another_kind_is_refused_with_its_kind_and_the_format(tmp_path, what):
    key, change = WRONG[what]
    stored = arrays()
    stored[key] = np.asarray(change(stored[key]))
    found = f"{key} are {stored[key].dtype} {list(stored[key].shape)}"
    wanted = f" for {len(stored['images'])} images; " if key == "labels" else "; "
    message_of_npz(tmp_path, stored, found + wanted, "uint8 [N, H, W, 3]")


def test_class_names_with_characters_that_do_not_exist_are_refused(tmp_path):
    stored = arrays()
    stored["class_names"] = np.full(12, 0xFF, dtype=np.uint8).view("<U1")
    message_of_npz(tmp_path, stored, "uint8 [N, H, W, 3]")


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_labels_out_of_range_are_refused_with_the_range(tmp_path, label):
    stored = arrays()
    stored["labels"][4] = label
    found = f"labels run from {min(label, 0)} to {max(label, 2)}"
    message_of_npz(tmp_path, stored, found, "0 to 2", "renumber")


def test_a_class_without_an_image_is_named(tmp_path):
    stored = arrays()
    stored["labels"][stored["labels"] == 1] = 0
    message_of_npz(tmp_path, stored, "class 'bee' has no image", "add images or remove")


def test_a_data_set_without_any_image_is_refused(tmp_path):
    message_of_npz(tmp_path, arrays(per_class=0), "class 'ant' has no image")


@pytest.mark.parametrize("height, width", [(28, 32), (32, 28), (1, 1), (0, 0)])
def test_images_too_small_for_the_encoder_are_refused_with_both_sizes(tmp_path, height, width):
    stored = arrays(height=height, width=width)
    message_of_npz(tmp_path, stored, f"{width}x{height} pixels", "29x29", "enlarge or pad")


def test_two_classes_of_one_name_are_refused(tmp_path):
    stored = arrays(class_names=("ant", "bee", "ant"))
    parts = ("2 different class names in 3", "all must be different", "name each class once")
    message_of_npz(tmp_path, stored, *parts)


def test_a_single_class_is_refused(tmp_path):
    message_of_npz(tmp_path, arrays(class_names=("ant",)), "at least 2")


def saved_bytes(**options):
    file = io.BytesIO()
    np.savez(file, **arrays(**options))
    return file.getvalue()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_one_message(tmp_path, share):
    content = saved_bytes()
    (tmp_path / "mine.npz").write_bytes(content[: int(share * len(content))])
    message_of("mine", tmp_path, tmp_path / "mine.npz", "write it again")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_in_a_file_is_refused_or_changes_nothing(tmp_path, save):
    path = tmp_path / "mine.npz"
    save(path, **arrays(per_class=1))
    found = stress.fuzz(path, path.read_bytes(), stress.dataset_reader(path), 300, seed=1)
    assert (found["accepted wrongly"], found["tracebacks"]) == (0, 0)
    assert found["refused"] > 200


@pytest.mark.parametrize(
    "content",
    [b"", b"<!DOCTYPE html><html>404</html>", b"PK\x03\x04", bytes(1000), pickle.dumps([1, 2])],
    ids=repr,
)
def test_a_file_that_is_no_archive_is_one_message(tmp_path, content):
    (tmp_path / "mine.npz").write_bytes(content)
    message_of("mine", tmp_path, tmp_path / "mine.npz", "write it again")


def test_a_bare_array_under_the_name_of_an_archive_is_one_message(tmp_path):
    with open(tmp_path / "mine.npz", "wb") as file:
        np.save(file, arrays()["images"])
    message_of("mine", tmp_path, tmp_path / "mine.npz", "write it again")


@pytest.mark.parametrize("suffix", [".npy", "", None], ids=["arrays in name", "files", "empty"])
def test_an_archive_of_other_things_is_one_message(tmp_path, suffix):
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        for name in ("images", "labels", "class_names") if suffix is not None else ():
            archive.writestr(f"{name}{suffix}", "no array at all")
    message_of("mine", tmp_path, tmp_path / "mine.npz", "write it again")


def test_a_header_that_promises_too_much_is_one_message(tmp_path):
    # A header of a few bytes may claim more images than any memory holds.
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        for name, array in arrays().items():
            file, shape = io.BytesIO(), (10**12, *array.shape[1:])
            header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            archive.writestr(f"{name}.npy", file.getvalue())
    message_of("mine", tmp_path, tmp_path / "mine.npz")


def test_a_folder_under_the_name_of_the_file_is_one_message(tmp_path):
    (tmp_path / "mine.npz").mkdir()
    message_of("mine", tmp_path, tmp_path / "mine.npz")


# ---- a folder of images


def save_images(folder, classes=("ant", "bee"), count=2, size=(32, 32), mode="RGB", suffix="png"):
    rng = np.random.default_rng(1)
    pixels = {}
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
            image = Image.fromarray(image).convert(mode)
            image.save(folder / name / f"{number}.{suffix}")
            pixels[name, number] = np.asarray(image.convert("RGB"))
    return pixels


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
def test_a_folder_of_png_files_is_read_pixel_by_pixel(tmp_path, mode):
    folder, classes = tmp_path / "mine", ("dog", "ant", "bee")
    pixels = save_images(folder, classes, count=3, size=(40, 32), mode=mode)
    data = load_dataset("mine", tmp_path)
    assert data.class_names == ["ant", "bee", "dog"]
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == 3 * [0] + 3 * [1] + 3 * [2]
    assert data.images.dtype == torch.uint8 and data.images.shape == (9, 3, 32, 32)
    expected = np.stack([pixels[name, number] for name in data.class_names for number in range(3)])
    middle = expected[:, :, 4:36]
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), middle)


@pytest.mark.parametrize(
    "suffix, mode", [("jpg", "RGB"), ("jpeg", "L"), ("JPG", "RGB"), ("PNG", "L"), ("jpg", "CMYK")]
)
def test_jpg_files_and_capital_suffixes_are_read(tmp_path, suffix, mode):
    save_images(tmp_path / "mine", mode=mode, suffix=suffix)
    data = load_dataset("mine", tmp_path)
    assert data.images.shape == (4, 3, 32, 32)
    with Image.open(tmp_path / "mine" / "bee" / f"1.{suffix}") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(data.images[3].permute(1, 2, 0).numpy(), expected)


def test_other_files_and_hidden_folders_are_not_taken_for_images(tmp_path):
    save_images(tmp_path / "mine")
    (tmp_path / "mine" / "README.txt").write_text("where the images come from")
    (tmp_path / "mine" / "ant" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "mine" / ".cache").mkdir()
    (tmp_path / "mine" / "bee" / "discarded").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "mine" / "bee" / "discarded" / "0.png")
    data = load_dataset("mine", tmp_path)
    assert data.class_names == ["ant", "bee"] and len(data.images) == 4


def test_the_order_of_the_images_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    save_images(tmp_path / "mine", ("a", "b", "c"), count=5)
    forward = load_dataset("mine", tmp_path)
    (tmp_path / "mine.npz").unlink()
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda *path: sorted(listed(*path), reverse=True))

    def backwards(path):
        return iter([path / name for name in os.listdir(path)])

    monkeypatch.setattr(type(tmp_path), "iterdir", backwards)
    assert_same_data(load_dataset("mine", tmp_path), forward)


def test_a_file_takes_precedence_over_a_folder(tmp_path):
    save_images(tmp_path / "mine", ("from", "folder"))
    np.savez(tmp_path / "mine.npz", **arrays())
    assert load_dataset("mine", tmp_path).class_names == ["ant", "bee", "cat"]


def test_a_folder_without_a_class_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.png").write_bytes(b"loose image")
    message_of("mine", tmp_path, tmp_path / "mine", "no class", "<class>")


def test_a_folder_with_one_class_is_refused(tmp_path):
    save_images(tmp_path / "mine", ("ant",))
    message_of("mine", tmp_path, tmp_path / "mine", "at least 2")


def test_an_empty_class_folder_is_named(tmp_path):
    save_images(tmp_path / "mine")
    (tmp_path / "mine" / "cat").mkdir()
    (tmp_path / "mine" / "cat" / "0.gif").write_bytes(b"GIF89a")
    found = f"{tmp_path / 'mine' / 'cat'} holds no image (.jpg, .jpeg, .png, "
    message_of("mine", tmp_path, found, "add images or remove it")


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", PNG_SIGNATURE, PNG_SIGNATURE + bytes(100), b"<html>404</html>"],
    ids=repr,
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_unreadable_image_is_named(tmp_path, suffix, content):
    save_images(tmp_path / "mine", suffix=suffix)
    path = tmp_path / "mine" / "bee" / f"0.{suffix}"
    path.write_bytes(content)
    message_of("mine", tmp_path, f"{path} cannot be read as an image", "replace or remove it")


def test_a_folder_under_the_name_of_an_image_is_named(tmp_path):
    save_images(tmp_path / "mine")
    path = tmp_path / "mine" / "bee" / "2.png"
    path.mkdir()
    message_of("mine", tmp_path, f"{path} cannot be read as an image", "replace or remove it")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_that_was_cut_short_is_named(tmp_path, suffix):
    save_images(tmp_path / "mine", suffix=suffix)
    path = tmp_path / "mine" / "bee" / f"1.{suffix}"
    content = path.read_bytes()
    for length in (len(content) // 2, 60, 30, 1):
        path.write_bytes(content[:length])
        message_of("mine", tmp_path, f"{path} cannot be read as an image", "replace or remove it")


def test_an_image_with_damaged_bytes_is_named_or_still_readable(tmp_path):
    save_images(tmp_path / "mine")
    path = tmp_path / "mine" / "bee" / "1.png"
    content, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for place in range(120):
        damaged = bytearray(content)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        (tmp_path / "mine.npz").unlink(missing_ok=True)
        try:
            load_dataset("mine", tmp_path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


def test_images_of_all_sizes_are_brought_to_one_and_a_line_says_so(tmp_path, capsys):
    folder = tmp_path / "mine"
    save_images(folder, size=(20, 64))
    Image.new("RGB", (300, 200), "red").save(folder / "bee" / "2.jpg")
    Image.new("L", (7, 12), 99).save(folder / "ant" / "2.bmp")
    data = load_dataset("mine", tmp_path)
    assert data.images.shape == (6, 3, 32, 32)
    assert (data.images[2] == 99).all() and data.images[5, 0].min() > 250
    lines = [f"{folder}: 6 images of 7x12 to 300x200 pixels in 2 classes, brought to 32x32"]
    assert capsys.readouterr().out.splitlines() == lines
    assert load_dataset("mine", tmp_path, 48).images.shape == (6, 3, 48, 48)


def test_images_that_have_the_size_already_are_not_said_to_be_brought_to_it(tmp_path, capsys):
    save_images(tmp_path / "mine")
    load_dataset("mine", tmp_path)
    line = f"{tmp_path / 'mine'}: 4 images of 32x32 pixels in 2 classes\n"
    assert capsys.readouterr().out == line


def test_a_size_too_small_for_the_encoder_is_refused(tmp_path):
    save_images(tmp_path / "mine")
    with pytest.raises(UserError, match="28x28 pixels, but the encoder needs at least 29x29"):
        load_dataset("mine", tmp_path, 28)
    assert not (tmp_path / "mine.npz").exists()


@pytest.mark.parametrize("size", [29, 64])
def test_images_in_a_file_keep_their_size_and_another_one_is_refused(tmp_path, size):
    np.savez(tmp_path / "mine.npz", **arrays(height=48, width=48))
    same_file = load_dataset("mine", tmp_path), load_dataset("mine", tmp_path, 48)
    assert same_file[0].images.shape == same_file[1].images.shape == (9, 3, 48, 48)
    found = f"images are 48x48 in {tmp_path / 'mine.npz'}, not {size}x{size}"
    with pytest.raises(UserError) as caught:
        load_dataset("mine", tmp_path, size)
    assert found in str(caught.value) and "changes only images in a folder" in str(caught.value)


def test_a_file_of_images_that_are_not_square_is_no_file_of_one_size(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays(height=48, width=40))
    for size in (40, 48):
        with pytest.raises(UserError, match="images are 40x48 in "):
            load_dataset("mine", tmp_path, size)


def test_drawn_images_keep_their_size(tmp_path, quick_digits):
    with pytest.raises(UserError, match="images are 32x32 in .*glyph_digits.npz, not 64x64"):
        load_dataset("glyph_digits", tmp_path, 64)
    assert len(load_dataset("glyph_digits", tmp_path, 32).images) == 10


# ---- what is kept of a folder


@pytest.fixture
def no_reading(monkeypatch):
    """Return a function after which no image can be read."""

    def fail(path, size):
        raise AssertionError(f"{path} is read again")

    return lambda: monkeypatch.setattr(images, "read_image", fail)


def test_the_second_time_a_folder_is_not_read(tmp_path, no_reading, capsys):
    save_images(tmp_path / "mine", size=(50, 40))
    first = load_dataset("mine", tmp_path, 36)
    assert sorted(os.listdir(tmp_path)) == ["mine", "mine.npz"]
    capsys.readouterr()
    no_reading()
    second = load_dataset("mine", tmp_path, 36)
    assert_same_data(second, first)
    assert second.digest() == first.digest() and second.split is None
    assert capsys.readouterr().out == ""


def test_what_is_not_used_of_a_folder_and_what_is_there_twice_is_said(tmp_path, capsys):
    folder = tmp_path / "mine"
    save_images(folder)
    first = sorted(path for path in folder.glob("bee/*") if path.is_file())[0]
    shutil.copy(first, folder / "bee" / "zz copy.png")
    (folder / "bee" / "photo.heic").write_bytes(b"")
    (folder / "bee" / "more").mkdir()
    (folder / "notes.txt").write_text("")
    load_dataset("mine", tmp_path)
    printed = capsys.readouterr().out
    unused = [os.path.join("bee", "more"), os.path.join("bee", "photo.heic"), "notes.txt"]
    assert f"not used in {folder}: {', '.join(unused)}\n" in printed
    copies = f"images are copies of others, {folder / 'bee' / 'zz copy.png'} of {first} for example"
    assert copies in printed


def test_a_folder_beside_a_file_of_ones_own_is_named(tmp_path, capsys):
    save_images(tmp_path / "mine")
    np.savez(tmp_path / "mine.npz", **arrays())
    load_dataset("mine", tmp_path)
    line = f"{tmp_path / 'mine.npz'} is used, not the folder {tmp_path / 'mine'}; remove the one"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "train"])
def test_a_folder_of_images_with_a_built_in_name_is_refused(tmp_path, below):
    save_images(tmp_path / "mnist" / below)
    message_of("mnist", tmp_path, "mnist is a built-in data set", tmp_path / "mnist", "rename")


def add_image(folder):
    Image.new("RGB", (32, 32)).save(folder / "bee" / "new.png")


def edit_image(folder):
    file = folder / "bee" / "1.png"
    stat = file.stat()
    Image.new("RGB", (32, 32)).save(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the number of bytes tells


def touch_image(folder):
    file = folder / "bee" / "1.png"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def add_class(folder):
    shutil.copytree(folder / "ant", folder / "cat")


CHANGES = {
    "an image more": add_image,
    "an image less": lambda folder: (folder / "bee" / "1.png").unlink(),
    "an image edited": edit_image,
    "an image saved again": touch_image,
    "an image renamed": lambda folder: (folder / "bee" / "1.png").rename(folder / "bee" / "a.png"),
    "an image in another class": lambda folder: (folder / "bee" / "1.png").rename(
        folder / "ant" / "b.png"
    ),
    "a class more": add_class,
    "a class renamed": lambda folder: (folder / "bee").rename(folder / "wasp"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_folder_is_read_again_and_a_line_says_so(tmp_path, what, no_reading, capsys):
    folder, file = tmp_path / "mine", tmp_path / "mine.npz"
    save_images(folder)
    before = load_dataset("mine", tmp_path).digest()
    CHANGES[what](folder)
    capsys.readouterr()
    data = load_dataset("mine", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    changed = f"{folder}, or --image_size, changed since {file} was made; reading the images again"
    copies = [line for line in lines if "images are copies of others" in line]
    assert len(copies) == (what == "a class more")  # it has the pixels of another
    assert lines[0] == changed and lines[-1].startswith(f"{folder}: ")
    assert len(lines) == 2 + len(copies)
    same_images = what in ("an image saved again", "an image renamed")
    assert (data.digest() == before) == same_images

    file.rename(tmp_path / "other.npz")
    assert_same_data(load_dataset("mine", tmp_path), data)  # as if read for the first time
    no_reading()
    assert_same_data(load_dataset("mine", tmp_path), data)


def test_another_image_size_is_read_again(tmp_path, no_reading, capsys):
    save_images(tmp_path / "mine", size=(64, 64))
    load_dataset("mine", tmp_path)
    data = load_dataset("mine", tmp_path, 40)
    assert data.images.shape == (4, 3, 40, 40)
    assert "reading the images again" in capsys.readouterr().out
    no_reading()
    assert_same_data(load_dataset("mine", tmp_path, 40), data)


def test_without_its_folder_what_was_kept_is_used(tmp_path):
    save_images(tmp_path / "mine", size=(50, 50))
    first = load_dataset("mine", tmp_path, 40)
    shutil.rmtree(tmp_path / "mine")
    for size in (40, 32):  # as any file: the size that its images have
        assert_same_data(load_dataset("mine", tmp_path, size), first)


def test_a_class_folder_that_was_emptied_is_named_though_its_images_were_kept(tmp_path):
    save_images(tmp_path / "mine")
    load_dataset("mine", tmp_path)
    for file in (tmp_path / "mine" / "bee").iterdir():
        file.unlink()
    message_of("mine", tmp_path, f"{tmp_path / 'mine' / 'bee'} holds no image")


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    save_images(tmp_path / "mine")
    (tmp_path / "mine" / "bee" / "2.png").symlink_to(tmp_path / "absent.png")
    message_of("mine", tmp_path, "2.png cannot be read: No such file", "replace or remove it")


@pytest.mark.parametrize("reason", [errno.EACCES, errno.ENOSPC])
def test_a_folder_beside_which_nothing_can_be_written_is_used_all_the_same(
    tmp_path, reason, monkeypatch, capsys
):
    def refuse(path, **options):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(reason, os.strerror(reason))

    save_images(tmp_path / "mine")
    monkeypatch.setattr(np, "savez", refuse)
    data = load_dataset("mine", tmp_path)
    assert len(data.images) == 4 and os.listdir(tmp_path) == ["mine"]
    lines = capsys.readouterr().out.splitlines()
    will = f"{tmp_path / 'mine'} will be read again at the next start: cannot write "
    assert len(lines) == 2 and lines[1].startswith(will) and os.strerror(reason) in lines[1]


def test_an_unreadable_image_leaves_no_file(tmp_path):
    save_images(tmp_path / "mine")
    (tmp_path / "mine" / "bee" / "1.png").write_bytes(b"no image")
    message_of("mine", tmp_path, "1.png")
    assert os.listdir(tmp_path) == ["mine"]


# ---- a split of the data set's own

OWN_SPLIT = {"train": ["dog", "ant", "cow"], "val": ["bee", "emu"], "test": ["cat", "fox"]}


def save_parts(folder, split=OWN_SPLIT):
    for part, names in split.items():
        (folder / part).mkdir(parents=True)
        save_images(folder / part, names)


def test_folders_of_three_parts_are_one_data_set_with_a_split(tmp_path, no_reading, capsys):
    save_parts(tmp_path / "mine")
    expected = {part: sorted(names) for part, names in OWN_SPLIT.items()}
    data = load_dataset("mine", tmp_path)
    assert data.split == expected and list(data.split) == ["train", "val", "test"]
    assert data.class_names == [name for part in expected.values() for name in part]
    assert data.labels.tolist() == [label for label in range(7) for _ in range(2)]
    assert "14 images of 32x32 pixels in 7 classes" in capsys.readouterr().out
    with Image.open(tmp_path / "mine" / "test" / "fox" / "1.png") as image:
        pixels = np.asarray(image)
    assert np.array_equal(data.images[-1].permute(1, 2, 0).numpy(), pixels)

    no_reading()
    kept = load_dataset("mine", tmp_path)
    assert_same_data(kept, data)
    assert kept.split == kept.to("cpu").split == expected
    assert kept.of_classes(["fox", "ant"]).split is None


def test_training_follows_the_split_of_the_data_set(tmp_path):
    save_parts(tmp_path / "mine")
    data = load_training_data("mine", tmp_path, torch.device("cpu"), image_size=40)
    assert data.split == {part: sorted(names) for part, names in OWN_SPLIT.items()}
    assert data.train.class_names == ["ant", "cow", "dog"]
    assert data.val.class_names == ["bee", "emu"] and data.val.images.shape == (4, 3, 40, 40)


def test_a_class_that_changes_its_part_is_noticed(tmp_path):
    save_parts(tmp_path / "mine")
    load_dataset("mine", tmp_path)
    (tmp_path / "mine" / "train" / "cow").rename(tmp_path / "mine" / "val" / "cow")
    assert load_dataset("mine", tmp_path).split["val"] == ["bee", "cow", "emu"]


def test_a_split_is_no_part_of_the_digest(tmp_path):
    data = image_set()
    digest = data.digest()
    data.split = {"train": ["ant"], "val": ["bee"], "test": ["cat"]}
    assert data.digest() == digest


def test_a_class_in_two_parts_is_refused(tmp_path):
    save_parts(tmp_path / "mine", {**OWN_SPLIT, "test": ["cat", "dog"]})
    found = f"{tmp_path / 'mine'}: class 'dog' is in train and in test"
    message_of("mine", tmp_path, found, "take it out of one")


@pytest.mark.parametrize("names", [[], ["cat"]])
def test_a_part_with_fewer_than_two_classes_is_refused(tmp_path, names):
    save_parts(tmp_path / "mine", {**OWN_SPLIT, "test": names})
    found = f"{tmp_path / 'mine'}: test has {len(names)} classes, but at least 2 are needed"
    message_of("mine", tmp_path, found)


def test_three_empty_parts_are_refused(tmp_path):
    save_parts(tmp_path / "mine", {"train": [], "val": [], "test": []})
    message_of("mine", tmp_path, f"{tmp_path / 'mine'}: train has 0 classes")


def test_two_parts_alone_are_taken_for_classes_and_the_third_is_asked_for(tmp_path):
    save_parts(tmp_path / "mine", {part: OWN_SPLIT[part] for part in ("train", "test")})
    found = f"{tmp_path / 'mine' / 'test'} holds no image"
    message_of("mine", tmp_path, found, "a split needs train, val and test")


def test_a_file_may_bring_a_split(tmp_path):
    parts = np.array(["test", "val", "train", "train", "val", "test"])
    np.savez(tmp_path / "mine.npz", **arrays(class_names=tuple("abcdef")), split=parts)
    expected = {"train": ["c", "d"], "val": ["b", "e"], "test": ["a", "f"]}
    assert load_dataset("mine", tmp_path).split == expected
    assert load_training_data("mine", tmp_path, torch.device("cpu")).split == expected


@pytest.mark.parametrize(
    "split, message",
    [
        (np.array(list("aabbcc")), "split names a part 'a'; give each class train, val"),
        (np.array(["train", "train", "val", "val", "test", "Test"]), "names a part 'Test'"),
        (np.array(["train", "train", "val", "val", "val", "test"]), "test has 1 classes"),
        (np.array(["train", "train", "val", "val", "test"]), "split is <U5 [5] for 6 classes"),
        (np.array("train"), "split is <U5 [] for 6 classes"),
        (np.array([0, 0, 1, 1, 2, 2]), "split is int64 [6] for 6 classes"),
        (np.array([None] * 6), "cannot be read as a data set"),
    ],
    ids=["other words", "capital", "a class alone", "one less", "a word", "numbers", "pickled"],
)
def test_a_split_in_a_file_that_does_not_fit_is_refused(tmp_path, split, message):
    stored = {**arrays(class_names=tuple("abcdef")), "split": split}
    message_of_npz(tmp_path, stored, message)


# ---- names


@pytest.mark.parametrize("name", ["", ".", "a/b", "../mine", "/tmp", "mine/", ".."])
def test_a_name_that_is_a_path_is_refused(tmp_path, name):
    np.savez(tmp_path / "mine.npz", **arrays())
    (tmp_path / "inner").mkdir()
    message_of(name, tmp_path / "inner", repr(name), "--data_dir")


def test_an_unknown_data_set_is_answered_with_where_it_would_be_and_what_there_is(tmp_path):
    message = message_of("mine", tmp_path, tmp_path / "mine.npz", tmp_path / "mine")
    for name in ("cifar100", "svhn", "mnist", "glyphs", "glyph_digits"):
        assert name in message


# ---- what is drawn


def test_a_drawn_data_set_is_written_once_and_then_read(tmp_path, capsys, no_network):
    first = load_dataset("glyph_digits", tmp_path / "new")
    assert os.listdir(tmp_path / "new") == ["glyph_digits.npz"]
    assert str(tmp_path / "new" / "glyph_digits.npz") in capsys.readouterr().out
    images, labels, class_names = draw_glyph_digits()
    assert np.array_equal(first.images.permute(0, 2, 3, 1).numpy(), images)
    assert first.labels.tolist() == labels.tolist() and first.class_names == class_names

    written = (tmp_path / "new" / "glyph_digits.npz").stat()
    second = load_dataset("glyph_digits", tmp_path / "new")
    assert_same_data(second, first)
    assert second.digest() == first.digest()
    assert (tmp_path / "new" / "glyph_digits.npz").stat().st_mtime_ns == written.st_mtime_ns
    assert capsys.readouterr().out == ""


@pytest.fixture
def quick_digits(monkeypatch):
    """glyph_digits, drawn in no time."""
    few = functools.partial(draw_glyph_digits, images_per_class=1)
    monkeypatch.setitem(SOURCES, "glyph_digits", lambda name, root: few())


def test_a_data_set_that_cannot_be_written_is_one_message(tmp_path, quick_digits):
    (tmp_path / "taken").write_text("a file where a folder is needed")
    message_of("glyph_digits", tmp_path / "taken", "glyph_digits.npz", "choose another folder")


def test_an_interrupted_writing_leaves_nothing(tmp_path, quick_digits, monkeypatch):
    def stop_half_way(path, **options):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("glyph_digits", tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_shared_glyphs_of_these_tests_can_be_split(glyph_dir):
    glyphs = load_dataset("glyphs", glyph_dir)
    parts = split_classes(glyphs.class_names)
    sets = [glyphs.of_classes(names) for names in parts.values()]
    assert [len(part.labels) for part in sets] == [16 * 24, 2 * 24, 2 * 24]
    assert load_dataset("glyph_digits", glyph_dir).class_names == list("0123456789")


# ---- statistics and normalisation


def test_statistics_equal_numpys_on_the_training_images():
    data = image_set(per_class=20)
    data.images[:, 1] //= 3
    mean, std = channel_statistics(data)
    pixels = data.images.numpy() / 255.0
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-9)
    assert all(type(value) is float for value in (*mean, *std))


def test_statistics_do_not_depend_on_the_layout_in_memory():
    data = image_set()
    channels_last = channel_statistics(data)
    data.images = data.images.contiguous()
    assert channel_statistics(data) == channels_last


def test_cifar100_is_normalised_with_the_tutorials_constants():
    data = image_set()
    data.name = "cifar100"
    mean, std = (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)
    assert channel_statistics(data) == (mean, std) == (CIFAR100_MEAN, CIFAR100_STD)


def test_images_of_a_single_grey_can_be_normalised():
    data = image_set()
    data.images[:] = 51
    mean, std = channel_statistics(data)
    assert mean == pytest.approx((0.2, 0.2, 0.2))
    assert torch.isfinite(normalize(data.images, mean, std)).all()


def test_normalised_training_images_have_mean_0_and_deviation_1():
    data = image_set(per_class=20)
    images = normalize(data.images, *channel_statistics(data))
    assert images.dtype == torch.float32 and images.shape == data.images.shape
    std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), correction=0)
    assert mean.tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert std.tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_normalising_equals_torchvisions_transforms():
    images = image_set().images
    found = normalize(images, CIFAR100_MEAN, CIFAR100_STD)
    theirs = torchvision.transforms.Normalize(CIFAR100_MEAN, CIFAR100_STD)
    torch.testing.assert_close(found, theirs(images.float() / 255), rtol=1e-5, atol=1e-5)
    # The augmentation gives float images of the same scale.
    torch.testing.assert_close(normalize(images.float(), CIFAR100_MEAN, CIFAR100_STD), found)


# ---- what a trainer works on


@pytest.fixture
def seven_classes(tmp_path):
    """Seven classes of different brightness, so that other classes have other statistics."""
    stored = arrays(per_class=4, class_names=tuple("abcdefg"))
    stored["images"] //= 1 + stored["labels"][:, None, None, None].astype(np.uint8)
    np.savez(tmp_path / "mine.npz", **stored)
    return load_dataset("mine", tmp_path)


def test_training_data_are_disjoint_classes_of_the_split_on_the_device(tmp_path, seven_classes):
    data = load_training_data("mine", tmp_path, torch.device("cpu"))
    assert data.split == split_classes(seven_classes.class_names)
    assert_same_data(data.train, seven_classes.of_classes(data.split["train"]))
    assert_same_data(data.val, seven_classes.of_classes(data.split["val"]))
    assert not set(data.train.class_names) & set(data.val.class_names)
    for part in (data.train, data.val):
        assert part.images.is_contiguous(memory_format=torch.channels_last)
    moved = load_training_data("mine", tmp_path, torch.device("meta"))
    for part in (moved.train, moved.val):
        assert part.images.device.type == part.labels.device.type == "meta"


def test_training_data_are_normalised_by_the_training_images_alone(tmp_path, seven_classes):
    data = load_training_data("mine", tmp_path, torch.device("cpu"))
    assert (data.mean, data.std) == channel_statistics(data.train)
    assert data.mean != channel_statistics(seven_classes)[0]
    std, mean = torch.std_mean(data.normalize(data.train.images), dim=(0, 2, 3), correction=0)
    assert mean.tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert std.tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    validation_images = normalize(data.val.images, data.mean, data.std)
    assert torch.equal(data.normalize(data.val.images), validation_images)


def test_training_data_of_cifar100_are_normalised_with_the_tutorials_constants(tmp_path):
    np.savez(tmp_path / "cifar100.npz", **arrays(class_names=tuple("abcdef")))
    data = load_training_data("cifar100", tmp_path, torch.device("cpu"))
    assert (data.mean, data.std) == (CIFAR100_MEAN, CIFAR100_STD)


def test_training_data_carry_the_digest_of_the_whole_data_set(tmp_path, seven_classes):
    data = load_training_data("mine", tmp_path, torch.device("cpu"))
    assert data.digest == seven_classes.digest()
    with np.load(tmp_path / "mine.npz") as file:
        stored = dict(file)
    # Test images are part of it, though no trainer sees them.
    stored["images"][stored["labels"] == "abcdefg".index(data.split["test"][0])] ^= 1
    np.savez(tmp_path / "mine.npz", **stored)
    assert load_training_data("mine", tmp_path, torch.device("cpu")).digest != data.digest


def test_training_data_need_a_data_set_and_enough_classes(tmp_path):
    with pytest.raises(UserError, match="there is no data set 'absent'"):
        load_training_data("absent", tmp_path, torch.device("cpu"))
    np.savez(tmp_path / "mine.npz", **arrays())
    with pytest.raises(UserError, match="found 3 classes, but at least 6"):
        load_training_data("mine", tmp_path, torch.device("cpu"))


# ---- downloads: small files of the true formats, from a local server, through torchvision


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    """(folder, address): what lies in the folder can be had at the address."""
    folder = tmp_path_factory.mktemp("server")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as instance:
        thread = threading.Thread(target=instance.serve_forever, args=(0.02,))
        thread.start()
        yield folder, f"http://127.0.0.1:{instance.server_port}/"
        instance.shutdown()
        thread.join()


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def few_digits(counts=(4, 3, 5, 3, 3, 4, 3, 3, 6, 3)):
    """Digits in mixed order, some more often than others; the rarest decides how many are kept."""
    rng = np.random.default_rng(0)
    return rng, rng.permutation(np.repeat(np.arange(10), counts))


def first_three_of_each(digits):
    return [row for digit in range(10) for row in np.flatnonzero(digits == digit)[:3]]


def svhn_file():
    rng, digits = few_digits()
    pixels = rng.integers(256, size=(len(digits), 32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    # As published: images along the last axis, labels in a column, the digit zero called 10.
    labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
    scipy.io.savemat(file, {"X": pixels.transpose(1, 2, 3, 0), "y": labels})
    return file.getvalue(), pixels, digits


@pytest.fixture
def svhn(server, monkeypatch):
    folder, address = server
    content, pixels, digits = svhn_file()
    (folder / "test_32x32.mat").write_bytes(content)
    test_part = [address + "test_32x32.mat", "test_32x32.mat", md5(content)]
    monkeypatch.setitem(torchvision.datasets.SVHN.split_list, "test", test_part)
    return folder / "test_32x32.mat", pixels, digits


def check_svhn(data, pixels, digits):
    rows = first_three_of_each(digits)
    assert data.class_names == list("0123456789")
    assert data.labels.tolist() == [digit for digit in range(10) for _ in range(3)]
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels[rows])


def test_svhn_is_downloaded_and_the_first_images_of_each_digit_are_kept(tmp_path, svhn):
    _, pixels, digits = svhn
    first = load_dataset("svhn", tmp_path)
    check_svhn(first, pixels, digits)
    assert (tmp_path / "svhn.npz").exists()
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def test_the_second_time_svhn_is_read_from_the_written_file(tmp_path, svhn, monkeypatch):
    first = load_dataset("svhn", tmp_path)
    monkeypatch.delattr(torchvision.datasets, "SVHN")
    second = load_dataset("svhn", tmp_path)
    assert_same_data(second, first)
    assert second.digest() == first.digest()


def test_a_file_put_there_by_hand_is_read_without_a_network(tmp_path, svhn, monkeypatch):
    file, pixels, digits = svhn
    (tmp_path / "test_32x32.mat").write_bytes(file.read_bytes())
    monkeypatch.setattr(socket, "create_connection", None)
    check_svhn(load_dataset("svhn", tmp_path), pixels, digits)


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>Please log in</html>", b""], ids=["html", "empty"]
)
def test_a_page_in_place_of_the_file_is_one_message_and_leaves_no_data_set(tmp_path, svhn, content):
    svhn[0].write_bytes(content)
    parts = ("test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/", "PATH_DATASETS")
    message_of("svhn", tmp_path, tmp_path / "svhn.npz", *parts)
    assert not (tmp_path / "svhn.npz").exists()


def test_a_wrong_checksum_is_one_message_and_a_later_try_succeeds(tmp_path, svhn):
    file, pixels, digits = svhn
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message_of("svhn", tmp_path, tmp_path / "svhn.npz", "test_32x32.mat")
    assert not (tmp_path / "svhn.npz").exists()
    file.write_bytes(content)
    check_svhn(load_dataset("svhn", tmp_path), pixels, digits)


def test_a_download_that_the_server_refuses_is_one_message(tmp_path, svhn):
    svhn[0].unlink()
    message_of("svhn", tmp_path, tmp_path / "svhn.npz", "404")
    assert not (tmp_path / "svhn.npz").exists()


def idx(array):
    """An array of bytes in the format of MNIST, compressed."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def test_mnist_is_downloaded_padded_to_32_pixels_and_made_rgb(tmp_path, server, monkeypatch):
    folder, address = server
    rng, digits = few_digits()
    pixels = rng.integers(256, size=(len(digits), 28, 28), dtype=np.uint8)
    resources = []
    for part, count in (("train", 2), ("t10k", len(digits))):
        for kind, array in (("images-idx3", pixels[:count]), ("labels-idx1", digits[:count])):
            name, content = f"{part}-{kind}-ubyte.gz", idx(array)
            (folder / name).write_bytes(content)
            resources.append((name, md5(content)))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])

    data = load_dataset("mnist", tmp_path)
    rows = first_three_of_each(digits)
    assert data.class_names == list("0123456789") and data.labels.tolist() == digits[rows].tolist()
    assert data.images.shape == (30, 3, 32, 32)
    for image, row in zip(data.images, rows):
        expected = np.zeros((32, 32), dtype=np.uint8)
        expected[2:30, 2:30] = pixels[row]
        assert all(np.array_equal(channel.numpy(), expected) for channel in image)
    assert load_dataset("mnist", tmp_path).digest() == data.digest()


def test_the_rest_of_a_failed_download_is_not_taken_for_images(tmp_path, no_network, monkeypatch):
    # torchvision makes the folder MNIST, which macOS and Windows also find under the name mnist.
    with pytest.raises(UserError):
        load_dataset("mnist", tmp_path)
    assert (tmp_path / "MNIST").is_dir()
    for name in ("is_dir", "iterdir"):
        method = getattr(type(tmp_path), name)

        def ignoring_case(path, method=method):
            return method(path.with_name("MNIST") if path.name == "mnist" else path)

        monkeypatch.setattr(type(tmp_path), name, ignoring_case)
    with pytest.raises(UserError, match="mnist.npz is missing"):
        load_dataset("mnist", tmp_path)


@pytest.fixture
def cifar100(server, monkeypatch):
    folder, address = server
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(10, 3, 32, 32), dtype=np.uint8)
    labels = [0, 1, 2, 2, 1, 0, 1, 2, 0, 2]
    parts = {
        "train": {"data": pixels[:6].reshape(6, -1), "fine_labels": labels[:6]},
        "test": {"data": pixels[6:].reshape(4, -1), "fine_labels": labels[6:]},
        "meta": {"fine_label_names": ["apple", "baby", "can"]},
    }
    contents = {name: pickle.dumps(part) for name, part in parts.items()}
    with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    theirs = torchvision.datasets.CIFAR100
    monkeypatch.setattr(theirs, "url", address + "cifar-100-python.tar.gz")
    monkeypatch.setattr(theirs, "tgz_md5", md5((folder / "cifar-100-python.tar.gz").read_bytes()))
    monkeypatch.setattr(theirs, "train_list", [["train", md5(contents["train"])]])
    monkeypatch.setattr(theirs, "test_list", [["test", md5(contents["test"])]])
    monkeypatch.setattr(theirs, "meta", {**theirs.meta, "md5": md5(contents["meta"])})
    return folder / "cifar-100-python.tar.gz", pixels, labels


def test_cifar100_is_downloaded_and_its_two_parts_are_merged(tmp_path, cifar100):
    _, pixels, labels = cifar100
    data = load_dataset("cifar100", tmp_path)
    assert np.array_equal(data.images.numpy(), pixels) and data.labels.tolist() == labels
    assert data.class_names == ["apple", "baby", "can"]
    assert load_dataset("cifar100", tmp_path).digest() == data.digest()
    assert channel_statistics(data) == (CIFAR100_MEAN, CIFAR100_STD)


def test_a_page_in_place_of_cifar100_is_one_message_and_leaves_no_data_set(tmp_path, cifar100):
    cifar100[0].write_bytes(b"<html>moved</html>")
    parts = ("cifar-100-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar.html")
    message_of("cifar100", tmp_path, tmp_path / "cifar100.npz", *parts)
    assert not (tmp_path / "cifar100.npz").exists()


@pytest.mark.parametrize(
    "name, files, address",
    [
        ("cifar100", "cifar-100-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar.html"),
        ("svhn", "test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"),
        ("mnist", "MNIST/raw", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    ],
)
def test_without_a_network_one_message_names_the_missing_file_and_where_it_goes(
    tmp_path, no_network, name, files, address
):
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(17)
    file = tmp_path / "data" / f"{name}.npz"
    message_of(name, tmp_path / "data", file, files, address, "PATH_DATASETS")
    assert not file.exists()
    assert socket.getdefaulttimeout() == 17
    socket.setdefaulttimeout(timeout)
