"""A named data set as tensors; normalisation.

On disk a data set is `<data_dir>/<name>.npz` with `images` uint8 [N, H, W, 3], `labels` int64 [N]
in 0..C-1 and `class_names` str [C]; or a folder `<data_dir>/<name>/<class>/*.png|jpg`.
"""

import functools
import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from common.config import UserError
from common.files import atomic_file
from common.glyphs import draw_glyph_digits, draw_glyphs
from common.parallel import on_first
from common.splits import class_split

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
        return ImageSet(self.name, images, self.labels.to(device), self.class_names)

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


def load_training_data(name, data_dir, device, wanted_split="auto"):
    """Return the TrainingData of the data set `name`, its images on `device`.

    Raises UserError as `load_dataset` and `class_split` do.
    """
    data = on_first(lambda: load_dataset(name, data_dir))
    split = on_first(lambda: class_split(wanted_split, data))
    train, val = data.of_classes(split["train"]), data.of_classes(split["val"])
    mean, std = channel_statistics(train)
    return TrainingData(train.to(device), val.to(device), split, mean, std, data.digest())


def load_dataset(name, data_dir):
    """Return the ImageSet `name` from `data_dir`, where it is downloaded or drawn if need be.

    Known by name: cifar100, svhn, mnist (downloaded through torchvision), glyphs, glyph_digits
    (drawn). Any other name is a file or a folder of the user's. Raises UserError where there is no
    such data or it is malformed.
    """
    file, folder = Path(data_dir, f"{name}.npz"), Path(data_dir, name)
    # A name that is a path, or longer than a file's name may be, never reaches the file system.
    if name in ("", "..") or Path(name).name != name or "\0" in name or len(name.encode()) > 200:
        raise UserError(
            f"{name!r} is not the name of a data set: pass a plain name, and the folder that holds "
            "it as --data_dir=FOLDER"
        )
    if file.exists():
        return _read_npz(name, file)
    # Not for the names in SOURCES: torchvision keeps its files in a folder MNIST, which a file
    # system that ignores case finds as mnist, too.
    if folder.is_dir() and name not in SOURCES:
        return _read_folder(name, folder)
    if name not in SOURCES:
        raise UserError(
            f"there is no data set {name!r}: found neither {file} nor the folder {folder}; put "
            f"one there (see README.md, section Data) or take one of {', '.join(SOURCES)}"
        )
    images, labels, class_names = SOURCES[name](name, Path(data_dir))
    with atomic_file(file) as temporary:
        np.savez(temporary, images=images, labels=labels, class_names=np.array(class_names))
    print(f"data: wrote {file} ({len(images):,} images, {len(class_names)} classes)")
    return _image_set(name, images, labels, class_names)


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
    return _image_set(name, images, labels, names, file)


def _read_folder(name, folder):
    class_folders = [path for path in _listed(folder) if path.is_dir()]
    if not class_folders:
        where = f"{folder}/<class>/"
        raise UserError(f"{folder} holds no class: put the images of each class into {where}")
    images, labels, first = [], [], None
    for label, class_folder in enumerate(class_folders):
        suffixes = (".png", ".jpg", ".jpeg")
        files = [path for path in _listed(class_folder) if path.suffix.lower() in suffixes]
        if not files:
            raise UserError(
                f"class folder {class_folder} holds no .png or .jpg file; add images or remove it"
            )
        for file in files:
            image = _read_image(file)
            first = first or (file, image.shape)
            if image.shape != first[1]:
                raise UserError(
                    f"{file} is {_size(image.shape)} but {first[0]} is {_size(first[1])}; "
                    "bring all images to one size"
                )
            images.append(image)
            labels.append(label)
    class_names = [path.name for path in class_folders]
    labels = np.array(labels, dtype=np.int64)
    return _image_set(name, np.stack(images), labels, class_names, folder)


def _listed(folder):
    """Return a folder's paths, sorted, without hidden ones (macOS puts a ._x.png beside x.png)."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        reason = f"{folder} cannot be read: {error.strerror}"
        raise UserError(f"{reason}; change its permissions") from error


def _read_image(file):
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = f"{file} cannot be read as an image: {error}"
        raise UserError(f"{reason}; replace or remove it") from error


def _size(shape):
    return f"{shape[1]}x{shape[0]} pixels"


def _image_set(name, images, labels, class_names, source=None):
    """Check what both formats must hold, and return the ImageSet."""
    count = len(class_names)
    if min(images.shape[1:3]) < SMALLEST_IMAGE:
        raise UserError(
            f"{source}: images are {_size(images.shape[1:])}, but the encoder needs at least "
            f"{SMALLEST_IMAGE}x{SMALLEST_IMAGE}; enlarge or pad them (32x32 is usual)"
        )
    if len(set(class_names)) != count or count < 2:
        raise UserError(
            f"{source}: found {len(set(class_names))} different class names in {count}, but at "
            "least 2, all different, are needed; name each class once"
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


def _drawn(draw):
    return lambda name, root: draw()


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
    "glyphs": _drawn(draw_glyphs),
    "glyph_digits": _drawn(draw_glyph_digits),
}
