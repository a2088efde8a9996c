"""A named data set as tensors; normalisation.

On disk a data set is `<data_dir>/<name>.npz` (see FORMAT) or a folder of photographs,
`<data_dir>/<name>/<class>/*.jpg`. A split of its own is the array `split`, the part of each class,
or folders `<data_dir>/<name>/<part>/<class>`. The parts are train, val and test.
"""

import functools
import hashlib
import os
import shutil
import socket
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common import UserError, files, first_line, shown
from common.files import atomic_file, require_file_name
from common.images import IMAGE_SUFFIXES, read_folder
from common.parallel import on_first
from common.splits import class_split, split_of
from common.tutorial import CIFAR100_MEAN, CIFAR100_STD

SMALLEST_IMAGE = 16  # pixels: Conv-4 and ResNet-12 halve their input four times
ARRAYS = ("images", "labels", "class_names", "split", "folder_state")  # the last two: if any
FORMAT = (
    f"images uint8 [N, H, W, 3] of {SMALLEST_IMAGE}x{SMALLEST_IMAGE} pixels or more, labels int64 "
    "[N] with each of 0..C-1, class_names str [C], 2 or more, all different; a split is str [C]"
)


@dataclass
class ImageSet:
    """Images of some classes.

    images: uint8 [N, 3, H, W], a tensor or MappedImages; labels: int64 [N] in 0..C-1; class_names:
    C of them.
    split: {"train", "val", "test"}, lists of class names, where the data set brings one.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    class_names: list
    split: dict | None = None

    def of_classes(self, names):
        """Return the ImageSet of the named classes, labels renumbered in the order of `names`.

        Images keep their order. Raises UserError for a name that is not in the data set.
        """
        if missing := [name for name in names if name not in self.class_names]:
            found = f"data set {self.name} has no class {missing[0]!r}"
            raise UserError(f"{found}; use the data set that the class split was made from")
        new_label = {name: label for label, name in enumerate(names)}
        labels = torch.tensor([new_label.get(name, -1) for name in self.class_names])[self.labels]
        kept = labels >= 0
        return ImageSet(self.name, self.images[kept], labels[kept], list(names))

    def to(self, device):
        """Return the same ImageSet on `device`, stored channels last as convolutions read it."""
        if isinstance(self.images, MappedImages):
            images = self.images.to(device)
        else:
            images = self.images.to(device).contiguous(memory_format=torch.channels_last)
        return ImageSet(self.name, images, self.labels.to(device), self.class_names, self.split)

    def digest(self):
        """Return the SHA-256 of images, labels and class names in hexadecimal."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.class_names)).encode())
        for batch in batches(self.images):
            digest.update(batch.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        digest.update(self.labels.cpu().numpy())
        return digest.hexdigest()


class MappedImages:
    """Images that stay in their file until they are indexed: a data set may exceed the memory.

    array: a memmap uint8 [M, H, W, 3]; rows: int64 [N], the images of this set. Indexed as a tensor
    [N, 3, H, W] would be, it returns a tensor on `device`. Processes share the memory.
    """

    def __init__(self, array, rows, device="cpu"):
        self.array, self.rows, self.device = array, rows, torch.device(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it cannot be written to: nobody does
            self.stored = torch.from_numpy(array).permute(0, 3, 1, 2)
        self.shape = torch.Size([len(rows), *self.stored.shape[1:]])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, torch.Tensor):
            index = index.cpu()
            if index.dtype == torch.bool:  # a choice of images, not the images themselves
                return MappedImages(self.array, self.rows[index], self.device)
        return self.stored[self.rows[index]].to(self.device)

    def __reduce__(self):  # to another process of torchrun goes what it needs to map the file
        where = self.array.filename, self.array.offset, self.array.shape
        return _mapped_again, (*where, self.rows, self.device)

    def to(self, device):
        """Return all images as a tensor on a GPU that has twice the room, else those that index."""
        size = len(self) * self.stored[0].numel()
        if device.type == "cuda" and 2 * size < torch.cuda.mem_get_info(device)[0]:
            images = torch.cat([batch.to(device) for batch in batches(self)])
            return images.contiguous(memory_format=torch.channels_last)
        return MappedImages(self.array, self.rows, device)


def _mapped_again(file, offset, shape, rows, device):
    return MappedImages(np.memmap(file, np.uint8, "r", offset, shape), rows, device)


def batches(images, size=1000):
    """Yield images, a tensor or MappedImages, as tensors of so many at most."""
    return (images[start : start + size] for start in range(0, len(images), size))


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
    """Return the TrainingData of `name` on `device`; raise as load_dataset and class_split do."""
    data = on_first(lambda: load_dataset(name, data_dir, image_size))
    split = on_first(lambda: class_split(wanted_split, data))
    train, val = data.of_classes(split["train"]), data.of_classes(split["val"])
    mean, std = channel_statistics(train)
    return TrainingData(train.to(device), val.to(device), split, mean, std, data.digest())


def load_dataset(name, data_dir, image_size=32):
    """Return the ImageSet `name` from `data_dir`, where it is downloaded or drawn if need be.

    Known by name: cifar100, svhn, mnist, omniglot and, with turned characters to train,
    omniglot_turned (downloaded through torchvision), glyphs, glyph_digits (drawn). Any other name
    is a file or a folder of the user's. A folder's images are brought to image_size x image_size
    pixels and kept as a file beside it, until the folder changes. Raises UserError where there is
    no such data, it is malformed, or a file's images have another size.
    """
    # A name that is a path, or longer than a file's name may be, never reaches the file system.
    require_file_name(name, "a data set in --data_dir=FOLDER")
    if image_size < SMALLEST_IMAGE:
        found = f"image_size is {image_size}, but the encoders need at least {SMALLEST_IMAGE}"
        raise UserError(f"{found}; pass --image_size=32, say")
    file, folder, made = Path(data_dir, f"{name}.npz"), Path(data_dir, name), SOURCES.get(name)
    if made and any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*")):
        found = f"{name} is a built-in data set, and the images in {folder} are not it"
        raise UserError(f"{found}; rename the folder and pass its name as --dataset")
    # Where case is ignored, mnist is also the folder MNIST in which torchvision keeps its files.
    has_folder = folder.is_dir() and not made
    arrays = stored = _read_npz(file) if file.exists() else None
    if has_folder and (stored is None or "folder_state" in stored):
        arrays, _ = read_folder(folder, image_size, file, stored)
        fresh = arrays is not stored  # what was kept is mapped already
        if fresh and arrays["images"].nbytes > files.LARGE and file.exists():
            mapped = _read_npz(file)
            written = mapped.get("folder_state") == arrays["folder_state"]
            arrays = mapped if written else arrays
    elif has_folder:
        print(f"{file} is used, not the folder {folder}; remove the one that is not meant")
    elif stored is None:
        if not made:
            found = f"there is no data set {name!r}: neither {file} nor the folder {folder}"
            raise UserError(f"{found}; put one there (docs/data.md) or take {', '.join(SOURCES)}")
        arrays = dict(zip(ARRAYS, map(np.asarray, made(name, Path(data_dir)))))
        with atomic_file(file) as temporary:
            np.savez(temporary, **arrays)
        print(f"data: wrote {file} ({len(arrays['images']):,} images)")
    data = _image_set(name, arrays, file)
    if image_size != 32 and (shape := tuple(data.images.shape[2:])) != (image_size, image_size):
        found = f"images are {shape[1]}x{shape[0]} in {file}, not {image_size}x{image_size}"
        raise UserError(f"{found}; --image_size changes only images in a folder: put them into one")
    return data


def is_there(name, data_dir):
    """Return whether the data set `name` can be had from `data_dir` without a download."""
    archive = Path(_DOWNLOADS.get(name, name)).name
    names = f"{name}.npz", archive, archive.removesuffix(".tar.gz")
    return name not in _DOWNLOADS or any(Path(data_dir, each).exists() for each in names)


def channel_statistics(train_set):
    """Return (mean, std) per channel, three floats each, of pixel values in 0..1, for normalising.

    They are those of `train_set`'s images, but for cifar100 the tutorial's constants.
    """
    if train_set.name == "cifar100":
        return CIFAR100_MEAN, CIFAR100_STD
    # A histogram is exact, and needs no second copy of the images as floats.
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for batch in batches(train_set.images):
        for count, channel in zip(counts, batch.cpu().unbind(dim=1)):
            count += channel.flatten().bincount(minlength=256)
    share = counts.double() / counts.sum(dim=1, keepdim=True)  # [3, 256]
    mean = (share * values).sum(dim=1)
    std = (share * (values - mean[:, None]) ** 2).sum(dim=1).sqrt()
    std[std == 0] = 1  # one grey level in all images: any scale will do, but not zero
    return tuple(mean.tolist()), tuple(std.tolist())


def normalize(images, mean, std):
    """Return images [B, 3, H, W] in 0..255 as float32 (x / 255 - mean) / std per channel."""
    mean, std = (_per_channel(tuple(values), images.device) for values in (mean, std))
    return (images.float() / 255 - mean) / std


@functools.cache  # every step needs them, and copying them to a GPU would make it wait
def _per_channel(values, device):
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def _read_npz(file):
    """Return the arrays in a file."""
    try:
        mapped = _map_images(file)
        with np.load(file, allow_pickle=False) as stored:
            keys = [key for key in ARRAYS if key in stored and key not in mapped]
            return {key: np.asarray(stored[key]) for key in keys} | mapped
    except Exception as error:  # of zip, zlib, numpy's header, or the memory that this asks for
        reason = f"{file} cannot be read as a data set ({first_line(error)})"
        raise UserError(f"{reason}; delete it or write it again: {FORMAT}") from error


def _map_images(file):
    """Return {"images": their map} where the images in a file are LARGE, and not compressed."""
    with zipfile.ZipFile(file) as archive:
        if "images.npy" not in archive.namelist():
            return {}
        member = archive.getinfo("images.npy")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size <= files.LARGE:
            return {}
        with archive.open(member) as content:  # damage is noticed at the end
            while content.read(2**24):
                pass
    with open(file, "rb") as raw:
        raw.seek(member.header_offset + 26)
        lengths = int.from_bytes(raw.read(2), "little") + int.from_bytes(raw.read(2), "little")
        raw.seek(lengths, os.SEEK_CUR)
        if np.lib.format.read_magic(raw) != (1, 0):
            return {}
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(raw)
        return {} if by_columns else {"images": np.memmap(file, dtype, "r", raw.tell(), shape)}


def _image_set(name, arrays, source):
    """Return the ImageSet of these arrays. Raises UserError where they do not make up one."""
    images, labels, names = (arrays.get(key, np.empty(0)) for key in ARRAYS[:3])
    if labels.ndim == 2 and labels.shape[1] == 1:  # as Keras and MedMNIST have them
        labels = labels[:, 0]
    labels = labels.astype(np.int64) if labels.dtype.kind in "iu" else labels
    try:
        class_names = [shown(each) for each in names.tolist()]
        wrong = np.setxor1d(labels, np.arange(names.size)).tolist()
    except (SystemError, TypeError, ValueError):  # no such character; labels that are dates
        class_names, wrong = [], []
    if wrong or not (
        (images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3)
        and min(images.shape[1:3]) >= SMALLEST_IMAGE
        and (labels.dtype == np.int64 and labels.shape == images.shape[:1])
        and (names.dtype.kind == "U" and names.ndim == 1)
        and 2 <= len(set(class_names)) == len(names)
    ):
        found = [f"{key} {array.dtype} {list(array.shape)}" for key, array in arrays.items()]
        found = ", ".join(found) + f" (labels without a name or an image: {wrong[:5] or 'none'})"
        raise UserError(f"{source} holds {found}, but a data set has {FORMAT}; write it again")
    split = split_of(arrays["split"].tolist(), class_names, source) if "split" in arrays else None
    # [N, H, W, 3] seen as [N, 3, H, W] is channels last already: no copy.
    if isinstance(images, np.memmap) and images.nbytes > files.LARGE:
        images = MappedImages(images, torch.arange(len(images)))
    else:
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return ImageSet(name, images, torch.from_numpy(labels), class_names, split)


def _download(name, root):
    socket.setdefaulttimeout(30)  # seconds without a byte: a silent server must not hang the script
    try:
        return _read_download(name, str(root))
    except Exception as error:  # nearly anything: URLError, tarfile.ReadError, ValueError, ...
        found = f"{name} could not be downloaded ({type(error).__name__}: {error})"
        how = f"put {_DOWNLOADS[name]} or {name}.npz into {root}/"
        raise UserError(f"{found}; {how}") from error


def _read_download(name, root):
    from torchvision import datasets  # late: whoever downloads nothing need not wait for it

    if name == "cifar100":
        parts = [datasets.CIFAR100(root, train=train, download=True) for train in (True, False)]
        labels = np.concatenate([np.array(part.targets, dtype=np.int64) for part in parts])
        return np.concatenate([part.data for part in parts]), labels, parts[0].classes
    if name.startswith("omniglot"):
        for archive in Path(root, "omniglot-py").glob("*.zip"):  # torchvision unpacks only its own
            shutil.unpack_archive(archive, archive.parent)
        parts = [datasets.Omniglot(root, part, download=True) for part in (True, False)]
        return _omniglot(parts, turned=name == "omniglot_turned")
    if name == "svhn":
        test = datasets.SVHN(root, split="test", download=True)
        images, labels = test.data.transpose(0, 2, 3, 1), test.labels.astype(np.int64)
    else:
        test = datasets.MNIST(root, train=False, download=True)
        images = np.pad(test.data.numpy(), ((0, 0), (2, 2), (2, 2)))  # 28x28 -> 32x32
        images, labels = np.repeat(images[..., None], 3, axis=3), test.targets.numpy()
    # The first 500 of each digit, as many as the tutorial takes.
    count = min(500, np.bincount(labels).min())
    rows = np.concatenate([np.flatnonzero(labels == digit)[:count] for digit in range(10)])
    return np.ascontiguousarray(images[rows]), labels[rows], list("0123456789")


def _omniglot(parts, turned):
    """Return images, labels, names and split of the characters of torchvision's two parts.

    The split has the sizes of Vinyals et al. 2016, 1,200 characters to train (172 of them to
    validate) and 423 to test, but is drawn here. turned: each character of the training is three
    more classes, turned by quarters of a circle.
    """
    images, labels, names = [], [], []
    for part in parts:
        files_of = [(part._characters[c], file) for file, c in part._flat_character_images]
        # In an order that does not depend on the disk; dark on light, 105x105.
        for place in sorted(range(len(part)), key=files_of.__getitem__):
            name = files_of[place][0].replace(os.sep, "/")
            names += [name] if name not in names[-1:] else []
            light = ImageOps.invert(part[place][0]).resize((28, 28), Image.Resampling.LANCZOS)
            images.append(np.pad(np.asarray(light), 2))  # 28x28 -> 32x32
            labels.append(len(names) - 1)
    images, labels, count = np.stack(images), np.array(labels), len(names)
    split, order = np.full(count, "train"), np.random.default_rng(0).permutation(count)
    split[order[: count * 423 // 1623]] = "test"
    split[order[count * 423 // 1623 : count * 595 // 1623]] = "val"
    rows = np.flatnonzero(split[labels] == "train")
    for turns in (1, 2, 3) if turned else ():
        images = np.concatenate([images, np.rot90(images[rows], turns, axes=(1, 2))])
        labels = np.concatenate([labels, labels[rows] + turns * count])
        names = [*names, *(f"{name}, turned {90 * turns}" for name in names[:count])]
    kept, labels = np.unique(labels, return_inverse=True)
    split = split[kept % count]
    return np.repeat(images[..., None], 3, axis=3), labels, np.array(names)[kept], split


def _draw(name, root):
    from common import glyphs  # late: it imports matplotlib

    return glyphs.draw_glyphs() if name == "glyphs" else glyphs.draw_glyph_digits()


_DOWNLOADS = {  # what to put where by hand
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "svhn": "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
    "omniglot": "omniglot-py/ with the files of https://github.com/brendenlake/omniglot",
    "omniglot_turned": "omniglot-py/ with the files of https://github.com/brendenlake/omniglot",
    "mnist": "MNIST/raw with the files of https://ossci-datasets.s3.amazonaws.com/mnist/",
}
# Data sets made where there is no file: name -> function(name, data_dir) -> images, labels, names.
SOURCES = dict.fromkeys(_DOWNLOADS, _download) | dict.fromkeys(("glyphs", "glyph_digits"), _draw)
