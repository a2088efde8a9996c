"""People's photographs: folders of classes, images of any size, their pixels in one size."""

import contextlib
import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common import UserError, first_line
from common.files import atomic_file
from common.splits import PARTS, split_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def read_folder(folder, size, file=None, kept=None):
    """Return the arrays of a data set (see data.py) made of folders of images.

    They are <folder>/<class>/, or <folder>/<part>/<class>/ with the parts train, val and test. The
    images are those that `read_image` gives. The arrays are kept in `file`, if one is named;
    `kept`, what that held before, is returned where nothing changed since. Says what is not used
    and which images are there twice. Raises UserError for less than two classes, one without
    images, and an image that cannot be read.
    """
    class_folders, files = _classes_of(folder)
    class_names, parts = [shown(path.name) for path in class_folders], None
    if class_folders[0].parent != folder:
        parts = [path.parent.name for path in class_folders]
        split_of(parts, class_names, folder)  # it is refused before the images are read, not after
    paths = [path for own in files for path in own]
    state = _state_of(folder, paths, size)
    if kept and kept["folder_state"] == state:
        print_copies(kept["images"], paths)
        return kept
    if kept:
        print(f"{folder}, or --image_size, changed since {file} was made; reading the images again")
    print_unused({folder, *class_folders, *(path.parent for path in class_folders)}, paths)
    images = read_images(paths, size, str(folder))
    labels = np.repeat(np.arange(len(files), dtype=np.int64), list(map(len, files)))
    print_copies(images, paths)
    print(f"{folder}: {len(paths):,} images in {len(files)} classes, brought to {size}x{size}")
    arrays = {"images": images, "labels": labels, "class_names": class_names, "folder_state": state}
    arrays |= {"split": parts} if parts else {}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    try:
        if file:
            with atomic_file(file) as temporary:
                np.savez(temporary, **arrays)
    except UserError as error:
        print(f"{folder} will be read again at the next start: {error}")
    return arrays


def _classes_of(folder):
    """Return the folders of the classes, of two or more, and the paths of the images in each."""
    found = _folders_in(folder)
    if {path.name for path in found} == set(PARTS):
        found = [path for part in PARTS for path in _folders_in(folder / part)]
    files = [list_images(path) for path in found]
    if len(found) < 2 or not all(files):
        empty = [f"{path} holds no image" for path, own in zip(found, files) if not own]
        raise UserError(
            f"{empty[0] if empty else f'{folder} has {len(found)} classes'}, but at least 2 classes"
            f" are needed, {folder}/<class>/ with images ({', '.join(IMAGE_SUFFIXES)}), or, for a "
            "split, train/<class>/, val/<class>/ and test/<class>/; add images or remove the folder"
        )
    return found, files


def _folders_in(folder):
    return [path for path in list_folder(folder) if path.is_dir()]


def _state_of(folder, paths, size):
    """Return a digest of `size` and of the files as stat() sees them: an edit changes a time."""
    digest = hashlib.sha256(str(size).encode())
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            reason = f"{path} cannot be read: {error.strerror}"
            raise UserError(f"{reason}; replace or remove it") from error
        digest.update(os.fsencode(path.relative_to(folder)))
        digest.update(f"\0{stat.st_size} {stat.st_mtime_ns}\n".encode())
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
    return [path for path in list_folder(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def print_unused(folders, used):
    """Print which paths in the folders are neither used nor folders of these, if any."""
    paths = {path for folder in folders for path in list_folder(folder)}
    if paths := sorted(paths - {*folders, *used}):
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        print(f"not used: {', '.join(map(shown, paths[:5]))}{more}")


def print_copies(images, paths):
    """Print how many images [N, S, S, 3] have the pixels of an earlier one, if any."""
    first, copies = {}, []
    for image, path in zip(images, paths, strict=True):
        earlier = first.setdefault(hashlib.sha256(image).digest(), path)
        copies += [(path, earlier)] if earlier != path else []
    if copies:
        print(
            f"{len(copies)} of {len(images)} images are copies of others, {shown(copies[0][0])} of "
            f"{shown(copies[0][1])} for example: accuracy will be too high; remove them"
        )


def shown(name):
    """Return a name as text that can be printed and written: a file's name may hold any bytes."""
    return str(name).encode(errors="backslashreplace").decode()


def read_image(path, size):
    """Return the middle of an image as uint8 [size, size, 3], RGB, its shorter side being `size`.

    It is scaled with antialiasing and turned upright as its EXIF data say; what is transparent
    becomes white. Raises UserError where it cannot be read.
    """
    with _opened(path) as image:
        # A JPEG that is much larger than needed is decoded at 1/2, 1/4 or 1/8 of its size.
        image.draft(None, (2 * size, 2 * size))
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF data: the image stays as it lies
            ImageOps.exif_transpose(image, in_place=True)
        return np.array(ImageOps.fit(_as_rgb(image), (size, size)))  # antialiased


def read_images(paths, size, title, errors=None):
    """Return images as uint8 [N, size, size, 3], as `read_image` does, several at a time.

    title: of the progress bar on stderr. errors: a dict that gets {path: UserError} of the images
    that cannot be read, which are then missing in the result; without it the first one is raised.
    """

    def attempt(path):
        try:
            return read_image(path, size)
        except UserError as error:
            if errors is None:
                raise  # map() then cancels what has not begun
            return error

    images, count = np.empty((len(paths), size, size, 3), dtype=np.uint8), 0
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
    return images[:count]


@contextlib.contextmanager
def _opened(path):
    """Open an image; whatever goes wrong with it is one line that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # the decoders raise nearly anything
        reason = f"{path} cannot be read as an image: {first_line(error)}"
        raise UserError(f"{reason}; replace or remove it") from error


def _as_rgb(image):
    if image.mode == "F":
        raise ValueError("its pixels are floats, not 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
        shades = np.asarray(image)
        if (brightest := shades.max()) > 255:
            if not 2**14 <= brightest < 2**16:  # 12 bits, for example: nearly black
                raise ValueError(f"its shades run to {brightest}, not to 255 or to 65535")
            shades = shades // 256
        image = Image.fromarray(shades.clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
