"""People's photographs: folders of classes, images of any size, their pixels in one size."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common import UserError, files, first_line, shown
from common.files import atomic_file
from common.splits import PARTS, split_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def read_folder(folder, size, file=None, kept=None):
    """Return (the arrays of a data set, see data.py, made of folders of images; bits).

    They are <folder>/<class>/, or <folder>/<part>/<class>/ with the parts train, val and test. The
    images are those that `read_image` gives. The arrays are kept in `file`, if one is named;
    `kept`, what that held before, is returned where nothing changed since. Says what is not used
    and which images are there twice. bits: as of `read_images`. Raises UserError for less than two
    classes, one without images, and an image that cannot be read.
    """
    class_folders, images_of = _classes_of(folder)
    class_names, parts = [shown(path.name) for path in class_folders], None
    if class_folders[0].parent != folder:
        parts = [path.parent.name.lower() for path in class_folders]
        split_of(parts, class_names, folder)  # it is refused before the images are read, not after
    _check_names(class_names, folder)
    paths = [path for own in images_of for path in own]
    state = _state_of(folder, paths, size)
    if kept and kept["folder_state"] == state:
        print_copies(kept["images"], paths, kept["labels"], class_names)
        return kept, None
    if kept:
        print(f"{folder}, or --image_size, changed since {file} was made; reading the images again")
    print_unused({folder, *class_folders, *(path.parent for path in class_folders)}, paths)
    # Many of them are in a file of their own until all are read: they may exceed the memory.
    large = file and (needed := len(paths) * size * size * 3) > files.LARGE
    if large and shutil.disk_usage(file.parent).free < 2.1 * needed:
        found = f"{file.parent} has not twice {needed / 2**30:.1f} GiB free"
        raise UserError(f"{found}, which the images take; pass a smaller --image_size")
    with tempfile.TemporaryFile(dir=file.parent) if large else contextlib.nullcontext() as room:
        images, bits = read_images(paths, size, str(folder), errors := {}, room=room)
    if errors:
        more = [shown(path) for path in errors][1:6]
        more = f" (and {len(errors) - 1} more: {', '.join(more)})" if more else ""
        raise UserError(f"{next(iter(errors.values()))}{more}")
    labels = np.repeat(np.arange(len(images_of), dtype=np.int64), list(map(len, images_of)))
    print_copies(images, paths, labels, class_names)
    print(f"{folder}: {len(paths):,} images in {len(images_of)} classes, brought to {size}x{size}")
    arrays = {"images": images, "labels": labels, "class_names": class_names, "folder_state": state}
    arrays |= {"split": parts} if parts else {}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    try:
        if file:
            with atomic_file(file) as temporary:
                np.savez(temporary, **arrays)
    except UserError as error:
        print(f"{folder} will be read again at the next start: {error}")
    return arrays, bits


def _classes_of(folder):
    """Return the folders of the classes, of two or more, and the paths of the images in each."""
    found = _folders_in(folder)
    parts = {path.name.lower(): path for path in found}
    if parts.keys() == set(PARTS) and len(found) == 3:
        found = [path for part in PARTS for path in _folders_in(parts[part])]
    own = [list_images(path) for path in found]
    if len(found) < 2 or not all(own):
        empty = [path for path, images in zip(found, own) if not images] or [folder]
        names = [shown(path.name) + "/" * path.is_dir() for path in list_folder(empty[0])]
        inside = ", ".join(names[:3]) + (", ..." if names[3:] else "") or "it is empty"
        what = f"has {len(found)} classes" if all(own) else "holds no image"
        raise UserError(
            f"{shown(empty[0])} {what} ({inside}), but at least 2 classes are needed, {folder}/"
            f"<class>/ with images ({', '.join(IMAGE_SUFFIXES)}), or, for a split, train/<class>/, "
            "val/<class>/ and test/<class>/; move the images there, or remove an empty folder"
        )
    return found, own


def _folders_in(folder):
    return [path for path in list_folder(folder) if path.is_dir()]


def _check_names(class_names, folder):
    """Raise UserError where two classes cannot be told apart; say where some systems could not."""
    if twins := {name for name in class_names if class_names.count(name) > 1}:
        found = f"{shown(folder)} has two folders {min(twins)!r}, their accents stored in two ways"
        raise UserError(f"{found}; put their images into one")
    lower = [name.lower() for name in class_names]
    if twins := [name for name in class_names if lower.count(name.lower()) > 1]:
        print(f"{twins[0]!r} and another class would be one folder on Windows and macOS")


def _state_of(folder, paths, size):
    """Return a digest of `size` and of the files as stat() sees them.

    An edit changes a time. Two files that change places may share sizes and dates, but a file keeps
    its number on the disk. A copied folder has other numbers, so it is read again, once.
    """
    digest = hashlib.sha256(str(size).encode())
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            reason = f"{path} cannot be read: {error.strerror}"
            raise UserError(f"{reason}; replace or remove it") from error
        digest.update(os.fsencode(path.relative_to(folder)))
        facts = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
        digest.update(f"\0{facts}\n".encode())
    return digest.hexdigest()


def list_folder(folder):
    """Return a folder's paths, sorted, without hidden ones (macOS puts a ._x.png beside x.png).

    Raises UserError where it cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read: {error.strerror}; correct its name or its permissions"
        ) from error


def list_images(folder):
    """Return the paths of a folder's images, sorted. Raises UserError as `list_folder` does."""
    named = [path for path in list_folder(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    # A link to nowhere stays, to be named as one that cannot be read; a FIFO would be waited for.
    return [path for path in named if path.is_file() or not path.exists()]


def print_unused(folders, used):
    """Print which paths in the folders are neither used nor folders of these, if any."""
    paths = {path for folder in folders for path in list_folder(folder)}
    if paths := sorted(paths - {*folders, *used}):
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        print(f"not used: {', '.join(map(shown, paths[:5]))}{more}")


def print_copies(images, paths, labels, class_names):
    """Print which images [N, S, S, 3] have the pixels of an earlier one, within a class or not."""
    first, within, between = {}, [], []
    for number, image in enumerate(images):
        earlier = first.setdefault(hashlib.sha256(image).digest(), number)
        if earlier != number:
            (within if labels[earlier] == labels[number] else between).append((number, earlier))
    for found, what, why in (
        (within, "copies of others in their class", "accuracy will be too high; remove them"),
        (between, "in two classes", "no model can be right on both; decide on one"),
    ):
        if found:
            pair = [f"{shown(paths[n])} (class {class_names[labels[n]]!r})" for n in found[0]]
            example = f"for example {' and '.join(pair)}"
            print(f"{len(found)} of {len(images)} images, as cropped, are {what}, {example}: {why}")


def read_image(path, size, bits=16, facts=None):
    """Return the middle of an image as uint8 [size, size, 3], RGB, its shorter side being `size`.

    It is scaled with antialiasing and turned upright as its EXIF data say. What is transparent
    becomes white, or black where the drawing itself is nearly white. facts: gets "brightest", the
    brightest of shades of 16 bits, and "frames", pages of a document or an animation; bits: how
    many of the 16 are in use. Raises UserError where it cannot be read.
    """
    with _opened(path) as image:
        # A JPEG that is much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size.
        image.draft(None, (2 * size, 2 * size))
        frames = getattr(image, "n_frames", 1)
        if facts is not None and frames > 1 and image.format != "MPO":  # a photograph's preview
            facts["frames"] = frames
        deep = _in_8_bits(image, bits, {} if facts is None else facts)
        deep.load()
        with contextlib.suppress(Exception):  # damaged EXIF data: the image stays as it lies
            ImageOps.exif_transpose(deep, in_place=True)
        return np.array(ImageOps.fit(_as_rgb(deep), (size, size)))  # antialiased


def read_images(paths, size, title, errors=None, bits=None, room=None):
    """Return (images uint8 [N, size, size, 3] as of `read_image`, bits); several at a time.

    title: of the progress bar on stderr. errors: a dict that gets {path: UserError} of the images
    that cannot be read, which are then missing in the result; without it the first one is raised.
    bits: how many are in use where a channel has 16; None: as many as the brightest of all needs,
    which is returned, or None where no image is such. Says of what only the first page is used.
    room: a file that the images are put into, mapped, rather than memory.
    """
    images, facts = _read(paths, size, title, errors, bits or 16, room)
    pages = {path: each["frames"] for path, each in facts.items() if "frames" in each}
    if pages and (bits is None or errors is not None):
        path, count = next(iter(pages.items()))
        found = f"images of several pages or frames: {len(pages)}, {shown(path)} has {count}"
        print(f"{title}: {found}; only the first of each is used")
    deep = [each["brightest"] for each in facts.values() if "brightest" in each]
    if deep and bits is None:
        bits = max(8, (max(deep).bit_length() + 1) // 2 * 2)  # 8, 10, 12, 14 or 16
        found = f"images of 16 bits per channel: {len(deep)}"
        print(f"{title}: {found}; the brightest needs {bits} of them, and all are scaled by that")
        if bits < 16:
            images, _ = _read(paths, size, title, errors, bits, room)
    return images, bits


def _read(paths, size, title, errors, bits, room):
    """Return (images, {path: the facts of `read_image`})."""
    facts = {path: {} for path in paths}

    def attempt(path):
        try:
            return read_image(path, size, bits, facts[path])
        except UserError as error:
            if errors is None:
                raise  # map() then cancels what has not begun
            return error

    shape, count = (len(paths), size, size, 3), 0
    images = np.memmap(room, np.uint8, shape=shape) if room else np.empty(shape, np.uint8)
    with warnings.catch_warnings(), ThreadPoolExecutor() as threads:
        warnings.simplefilter("ignore")  # of large images and odd EXIF data: they are read
        found = threads.map(attempt, paths)
        found = tqdm(found, title, len(paths), leave=False, dynamic_ncols=True)
        for image, path in zip(found, paths):
            if isinstance(image, UserError):
                errors[path] = image
            else:
                images[count] = image
                count += 1
    return images[:count], facts


@contextlib.contextmanager
def _opened(path):
    """Open an image; whatever goes wrong with it is one line that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # the decoders raise nearly anything
        reason = f"{path} cannot be read as an image: {first_line(error)}"
        raise UserError(f"{reason}; replace or remove it") from error


def _in_8_bits(image, bits, facts):
    """Return an image of 16 bits per channel, `bits` of them in use, in 8; others as they are."""
    grey, layout = image.mode.startswith("I"), repr(image.tile)
    if image.mode == "F":
        raise ValueError("its pixels are floats, not 8 or 16 bits")
    if not grey and ";16" not in layout:
        return image
    shades = np.asarray(image, dtype=np.int64)
    if not grey:  # of colours Pillow reads the upper 8 bits
        facts["brightest"] = int(shades[..., :3].max()) * 256 + 255
        planar = getattr(image, "tag_v2", {}).get(284) == 2
        if bits < 16 or planar or not re.search("'RGBA?;16", layout):
            raise ValueError("colours of 16 bits are read where they use all of them; write 8 bits")
        return image
    if shades.min() < 0 or shades.max() >= 2**bits:
        found = f"its shades run from {shades.min()} to {shades.max()}"
        raise ValueError(f"{found}, but those of its data set from 0 to {2**bits - 1}")
    facts["brightest"] = int(shades.max())
    deep = Image.fromarray((shades >> bits - 8).astype(np.uint8))
    deep.info = image.info  # how it lies, too
    return deep


def _as_rgb(image):
    if image.has_transparency_data:
        image = image.convert("RGBA")
        color, alpha = np.split(np.asarray(image, dtype=np.float32), [3], axis=2)
        # Below 16 of 255 shades on average the drawing cannot be told from white paper.
        white = ((255 - color) * alpha).sum() < 16 * 3 * alpha.sum()
        ground = Image.new("RGBA", image.size, "black" if white else "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")
