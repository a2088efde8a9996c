"""A named data set as tensors; normalisation.

On disk a data set is `<data_dir>/<name>.npz` with `images` uint8 [N, H, W, 3], `labels` int64 [N]
in 0..C-1 and `class_names` str [C]; or a folder of photographs, `<data_dir>/<name>/<class>/*.jpg`.
A split of its own is an array `split` str [C], the part of each class; or folders
`<data_dir>/<name>/<part>/<class>`. The parts are train, val and test.
"""

import functools
import hashlib
import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision

from common.config import UserError
from common.files import atomic_file
from common.glyphs import draw_glyph_digits, draw_glyphs
from common.images import (
    IMAGE_SUFFIXES,
    list_folder,
    list_images,
    original_size,
    print_copies,
    print_unused,
    read_images,
    shown,
    size_text,
)
from common.parallel import on_first
from common.splits import PARTS, check_split, class_split

# Of the 50,000 training images of CIFAR-100, for pixel values in 0..1.
CIFAR100_MEAN = (0.50707516, 0.48654887, 0.44091784)
CIFAR100_STD = (0.26733429, 0.25643846, 0.27615047)

SMALLEST_IMAGE = 29  # pixels: the encoder halves its input five times and needs one at the end
DIGITS_PER_CLASS = 500  # images per digit in the unseen domains, as many as the tutorial takes


@dataclass
class ImageSet:
    """Images of some classes.

    images: uint8 [N, 3, H, W]; labels: int64 [N] in 0..C-1; class_names: C of them.
    split: {"train", "val", "test"}, lists of class names, where the data set brings one.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    class_names: list
    split: dict | None = None

    def of_classes(self, names):
        """Return the ImageSet of the named classes, labels renumbered in the order of `names`.

        Images stay in the order that they have here. Raises UserError for a name that is not in
        the data set.
        """
        missing = [name for name in names if name not in self.class_names]
        if missing:
            raise UserError(
                f"data set {self.name} has no class {missing[0]!r} (it has {len(self.class_names)} "
                "classes); use the data set that the class split was made from"
            )
        new_label = torch.full((len(self.class_names),), -1)
        new_label[[self.class_names.index(name) for name in names]] = torch.arange(len(names))
        labels = new_label[self.labels]
        kept = labels >= 0
        return ImageSet(self.name, self.images[kept], labels[kept], list(names))

    def to(self, device):
        """Return the same ImageSet on `device`, stored channels last as convolutions read it."""
        images = self.images.to(device).contiguous(memory_format=torch.channels_last)
        return ImageSet(self.name, images, self.labels.to(device), self.class_names, self.split)

    def digest(self):
        """Return the SHA-256 of images, labels and class names in hexadecimal."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.class_names)).encode())
        digest.update(self.images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        digest.update(self.labels.cpu().numpy())
        return digest.hexdigest()


@dataclass
class TrainingData:
    """What a trainer works on: two disjoint sets of classes, and the numbers that normalise images.

    split: {"train", "val", "test"}, lists of class names; the test classes are evaluate.py's.
    mean, std: per channel, of pixel values in 0..1. digest: SHA-256 of the whole data set.
    """

    train: ImageSet
    val: ImageSet
    split: dict
    mean: tuple
    std: tuple
    digest: str

    def normalize(self, images):
        """Return images [B, 3, H, W] with values in 0..255 as the encoder wants them."""
        return normalize(images, self.mean, self.std)


def load_training_data(name, data_dir, device, wanted_split="auto", image_size=32):
    """Return the TrainingData of the data set `name`, its images on `device`.

    Raises UserError as `load_dataset` and `class_split` do.
    """
    data = on_first(lambda: load_dataset(name, data_dir, image_size))
    split = on_first(lambda: class_split(wanted_split, data))
    train, val = data.of_classes(split["train"]), data.of_classes(split["val"])
    mean, std = channel_statistics(train)
    return TrainingData(train.to(device), val.to(device), split, mean, std, data.digest())


def load_dataset(name, data_dir, image_size=32):
    """Return the ImageSet `name` from `data_dir`, where it is downloaded or drawn if need be.

    Known by name: cifar100, svhn, mnist (downloaded through torchvision), glyphs, glyph_digits
    (drawn). Any other name is a file or a folder of the user's. A folder's images are brought to
    image_size x image_size pixels and kept as a file beside it, until the folder changes. Raises
    UserError where there is no such data, it is malformed, or a file's images have another size.
    """
    file, folder = Path(data_dir, f"{name}.npz"), Path(data_dir, name)
    # A name that is a path, or longer than a file's name may be, never reaches the file system.
    if name in ("", "..") or Path(name).name != name or "\0" in name or len(name.encode()) > 200:
        raise UserError(
            f"{name!r} is not the name of a data set: pass a plain name, and the folder that holds "
            "it as --data_dir=FOLDER"
        )
    # Not for the names in SOURCES: torchvision keeps its files in a folder MNIST, which a file
    # system that ignores case finds as mnist, too.
    has_folder = folder.is_dir() and name not in SOURCES
    if name in SOURCES and folder.is_dir() and _has_class_folders(folder):
        raise UserError(
            f"{name} is a built-in data set, and the images in {folder} are not it; rename the "
            "folder and pass its name as --dataset"
        )
    data = made_from = None
    if file.exists():
        data, made_from = _read_npz(name, file)
        if not (made_from and has_folder):  # the user's own file, or all that is left
            if has_folder:
                print(f"{file} is used, not the folder {folder}; remove the one that is not meant")
            return _check_size(data, image_size, file)
    if has_folder:
        return _read_folder(name, folder, image_size, file, data, made_from)
    if name not in SOURCES:
        raise UserError(
            f"there is no data set {name!r}: found neither {file} nor the folder {folder}; put "
            f"one there (see README.md, section Data) or take one of {', '.join(SOURCES)}"
        )
    images, labels, class_names = SOURCES[name](name, Path(data_dir))
    with atomic_file(file) as temporary:
        np.savez(temporary, images=images, labels=labels, class_names=np.array(class_names))
    print(f"data: wrote {file} ({len(images):,} images, {len(class_names)} classes)")
    return _check_size(_image_set(name, images, labels, class_names), image_size, file)


def channel_statistics(train_set):
    """Return (mean, std) per channel, three floats each, of pixel values in 0..1, for normalising.

    For cifar100 they are the constants that the tutorial uses, for other data sets those of
    `train_set`'s images.
    """
    if train_set.name == "cifar100":
        return CIFAR100_MEAN, CIFAR100_STD
    # A histogram is exact, and needs no second copy of the images as floats.
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(3):
        share = torch.bincount(train_set.images[:, channel].flatten().cpu(), minlength=256).double()
        share /= share.sum()
        mean = (share * values).sum()
        means.append(mean.item())
        # One grey level in all images: any scale will do, but not zero.
        stds.append(((share * (values - mean) ** 2).sum().sqrt().item()) or 1.0)
    return tuple(means), tuple(stds)


def normalize(images, mean, std):
    """Return images [B, 3, H, W] in 0..255 as float32 (x / 255 - mean) / std per channel."""
    mean, std = (_per_channel(tuple(values), images.device) for values in (mean, std))
    return (images.float() / 255 - mean) / std


@functools.cache  # every step needs them, and copying them to a GPU would make it wait
def _per_channel(values, device):
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def _read_npz(name, file):
    """Return the ImageSet in a file, and the state of the folder that it was made from, if any."""
    how = (
        "the format is images uint8 [N, H, W, 3], labels int64 [N], class_names str [C]; "
        f"delete {file} or write it again"
    )
    try:
        with open(file, "rb") as handle, np.lib.npyio.NpzFile(handle, allow_pickle=False) as arrays:
            found = set(arrays.files)
            missing = {"images", "labels", "class_names"} - found
            if missing:
                found = ", ".join(sorted(found)) or "none"
                raise UserError(f"{file} has no array {min(missing)!r} (found: {found}); {how}")
            images, labels = np.asarray(arrays["images"]), np.asarray(arrays["labels"])
            class_names = np.asarray(arrays["class_names"])
            names = class_names.tolist()
            parts = np.asarray(arrays["split"]) if "split" in found else None
            made_from = str(arrays["folder_state"]) if "folder_state" in found else None
    except UserError:
        raise
    # A damaged archive can fail in any layer below: zip, zlib, numpy's header, the memory it asks
    # for.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{file} cannot be read as a data set: {reason}; {how}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f"{file}: images are {images.dtype} {list(images.shape)}; {how}")
    if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
        found = f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images"
        raise UserError(f"{file}: {found}; {how}")
    if class_names.dtype.kind != "U" or class_names.ndim != 1:
        found = f"class_names are {class_names.dtype} {list(class_names.shape)}"
        raise UserError(f"{file}: {found}; {how}")
    data = _image_set(name, images, labels, names, file)
    if parts is not None:
        _check_parts(parts, len(names), file)
        data.split = _split_of(names, parts, file)
    return data, made_from


def _check_parts(parts, count, file):
    if parts.dtype.kind != "U" or parts.shape != (count,):
        found = f"is {parts.dtype} {list(parts.shape)} for {count} classes"
    elif unknown := set(parts.tolist()) - set(PARTS):
        found = f"names a part {min(unknown)!r}"
    else:
        return
    raise UserError(f"{file}: split {found}; give each class train, val or test, as str [C]")


def _read_folder(name, folder, image_size, file, kept, made_from):
    """Return the ImageSet of a folder, and keep it in `file`; or `kept`, if that is still the same.

    made_from: the state of the folder when `kept` was read from it.
    """
    class_folders, parts = _class_folders(folder)
    class_names = [shown(path.name) for path in class_folders]
    split = None if parts is None else _split_of(class_names, parts, folder)
    files = [_images_of_class(path) for path in class_folders]
    paths = [path for own in files for path in own]
    state = _folder_state(folder, paths, image_size)
    if state == made_from:
        print_copies(kept.images.permute(0, 2, 3, 1).numpy(), paths)
        return kept
    if made_from:
        print(f"{folder}, or --image_size, changed since {file} was made; reading the images again")
    folders = {folder, *class_folders, *(path.parent for path in class_folders)}
    found = {path for each in folders for path in list_folder(each)}
    print_unused(folder, sorted(found - {*paths, *folders}))
    images = read_images(paths, image_size, str(folder))
    print_copies(images, paths)
    labels = np.repeat(np.arange(len(files)), [len(own) for own in files]).astype(np.int64)
    data = _image_set(name, images, labels, class_names, folder)
    data.split = split
    found, wanted = _size_range(paths), f"{image_size}x{image_size}"
    brought = f", brought to {wanted}" if found != wanted else ""
    print(f"{folder}: {len(paths):,} images of {found} pixels in {len(files)} classes{brought}")
    arrays = {"images": images, "labels": labels, "class_names": np.array(class_names)}
    arrays |= {"split": np.array(parts)} if split else {}
    try:
        with atomic_file(file) as temporary:
            np.savez(temporary, **arrays, folder_state=np.array(state))
    except UserError as error:
        print(f"{folder} will be read again at the next start: {error}")
    return data


def _class_folders(folder):
    """Return the folders of the classes, and the part of each class where there are parts."""
    found = _folders_in(folder)
    if not found:
        where = f"{folder}/<class>/"
        raise UserError(f"{folder} holds no class: put the images of each class into {where}")
    if {path.name for path in found} != set(PARTS):
        return found, None
    found = [path for part in PARTS for path in _folders_in(folder / part)]
    return found, [path.parent.name for path in found]


def _has_class_folders(folder):
    found = _folders_in(folder)
    found += [path for part in found for path in _folders_in(part)]
    return any(map(list_images, found))


def _folders_in(folder):
    return [path for path in list_folder(folder) if path.is_dir()]


def _images_of_class(class_folder):
    files = list_images(class_folder)
    if not files:
        in_place_of_parts = " (a split needs train, val and test, and no other folder beside them)"
        raise UserError(
            f"class folder {class_folder} holds no image ({', '.join(IMAGE_SUFFIXES)}); add images "
            f"or remove it{in_place_of_parts if class_folder.name in PARTS else ''}"
        )
    return files


def _folder_state(folder, paths, image_size):
    """Return a digest of what decides an ImageSet: image_size, and the files as far as stat() sees.

    A file that was edited has another size or another time.
    """
    digest = hashlib.sha256(str(image_size).encode())
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            reason = f"{path} cannot be read: {error.strerror}"
            raise UserError(f"{reason}; replace or remove it") from error
        digest.update(os.fsencode(path.relative_to(folder)))
        digest.update(f"\0{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _size_range(paths):
    sizes = sorted(map(original_size, paths), key=lambda size: (math.prod(size), size))
    smallest, largest = ("{}x{}".format(*size) for size in (sizes[0], sizes[-1]))
    return smallest if smallest == largest else f"{smallest} to {largest}"


def _split_of(class_names, parts, source):
    """Return {"train", "val", "test"}: lists of class names, given the part of each class."""
    split = {part: [name for name, of in zip(class_names, parts) if of == part] for part in PARTS}
    check_split(split, class_names, source)
    return split


def _check_size(data, image_size, file):
    """Return the ImageSet of a file, whose images keep their size, or raise UserError."""
    shape = tuple(data.images.shape[2:])
    if image_size != 32 and shape != (image_size, image_size):
        raise UserError(
            f"images are {size_text(shape)} in {file}, not {image_size}x{image_size}; --image_size "
            "changes only images in a folder: put them into one, or train without it"
        )
    return data


def _image_set(name, images, labels, class_names, source=None):
    """Check what both formats must hold, and return the ImageSet."""
    count = len(class_names)
    if min(images.shape[1:3]) < SMALLEST_IMAGE:
        raise UserError(
            f"{source}: images are {size_text(images.shape[1:])} pixels, but the encoder needs at "
            f"least {SMALLEST_IMAGE}x{SMALLEST_IMAGE}; enlarge or pad them (32x32 is usual)"
        )
    if count < 2:
        raise UserError(f"{source}: found {count} class, but at least 2 are needed; add classes")
    if len(set(class_names)) != count:
        raise UserError(
            f"{source}: found {len(set(class_names))} different class names in {count}, but all "
            "must be different; name each class once"
        )
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= count:
        raise UserError(
            f"{source}: labels run from {labels.min()} to {labels.max()}, but {count} class names "
            f"need labels 0 to {count - 1}; renumber them"
        )
    empty = np.flatnonzero(np.bincount(labels, minlength=count) == 0)
    if len(empty):
        name = class_names[empty[0]]
        raise UserError(f"{source}: class {name!r} has no image; add images or remove the class")
    # [N, H, W, 3] seen as [N, 3, H, W] is channels last already: no copy.
    return ImageSet(
        name, torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), class_names
    )


def _cifar100(root):
    cifar100 = torchvision.datasets.CIFAR100
    parts = [cifar100(root, train=train, download=True) for train in (True, False)]
    images = np.concatenate([part.data for part in parts])
    labels = np.concatenate([np.array(part.targets, dtype=np.int64) for part in parts])
    return images, labels, parts[0].classes


def _svhn(root):
    test = torchvision.datasets.SVHN(root, split="test", download=True)
    images, labels = test.data.transpose(0, 2, 3, 1), test.labels.astype(np.int64)
    return *_first_of_each(images, labels), list("0123456789")


def _mnist(root):
    test = torchvision.datasets.MNIST(root, train=False, download=True)
    images, labels = _first_of_each(test.data.numpy(), test.targets.numpy().astype(np.int64))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))  # 28x28 -> 32x32
    return np.repeat(images[..., None], 3, axis=3), labels, list("0123456789")


def _first_of_each(images, labels):
    """Return the first 500 images of each digit, or fewer of each where one digit has fewer."""
    count = min(DIGITS_PER_CLASS, np.bincount(labels).min())
    rows = np.concatenate([np.flatnonzero(labels == digit)[:count] for digit in range(10)])
    return np.ascontiguousarray(images[rows]), labels[rows]


def _downloaded(read, files, address):
    """Return a source whose failure says which file is missing and where it goes."""

    def source(name, root):
        timeout = socket.getdefaulttimeout()
        # Seconds without a byte: a silent server must not hang the script.
        socket.setdefaulttimeout(30)
        try:
            os.makedirs(root, exist_ok=True)
            return read(str(root))
        # The layers below raise nearly anything: URLError, tarfile.ReadError, ValueError, ...
        except Exception as error:
            raise UserError(
                f"{root / (name + '.npz')} is missing and could not be downloaded "
                f"({type(error).__name__}: {error}); put {files} from {address} into {root}/ and "
                f"start again, or set PATH_DATASETS to a folder that has {name}.npz"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)

    return source


# Data sets that can be made where their file is absent:
# name -> function(name, data_dir) -> images, labels, class names.
SOURCES = {
    "cifar100": _downloaded(
        _cifar100, "cifar-100-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar.html"
    ),
    "svhn": _downloaded(_svhn, "test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"),
    "mnist": _downloaded(
        _mnist,
        "the four .gz files of MNIST, in MNIST/raw,",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "glyphs": lambda name, root: draw_glyphs(),
    "glyph_digits": lambda name, root: draw_glyph_digits(),
}
