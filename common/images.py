"""A user's photographs: which there are, and their pixels in one size."""

import contextlib
import hashlib
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from common.config import UserError
from common.parallel import is_first

IMAGE_SUFFIXES = IMG_EXTENSIONS  # in lower case


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


def print_unused(folder, paths):
    """Print what of a folder's paths is not used, if any."""
    if paths:
        names = ", ".join(shown(path.relative_to(folder)) for path in paths[:5])
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        print(f"not used in {folder}: {names}{more}")


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


def size_text(shape):
    """Return a size (height, width) as it is usually written, width first."""
    return f"{shape[1]}x{shape[0]}"


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
        options = {"leave": False, "dynamic_ncols": True, "disable": not is_first()}
        found = tqdm(threads.map(attempt, paths), title, len(paths), **options)
        for image, path in zip(found, paths):
            if isinstance(image, UserError):
                errors[path] = image
            else:
                images[count] = image
                count += 1
    return images[:count]


def read_labelled(class_files, files, size):
    """Read support images and the images to classify; say what was read and what cannot be used.

    class_files: {class name: paths of its images}; files: paths of the images to classify.
    Returns (images uint8 [S + N, 3, size, size], the support set class by class and then the images
    to classify; labels int64 [S]; class names; N paths of images to classify; the number of images
    that cannot be read). Raises UserError where fewer than two classes or no image is left.
    """
    paths = [path for own in class_files.values() for path in own]
    errors = {}
    images = read_images([*paths, *files], size, "images", errors)
    for error in errors.values():
        print(f"skipped: {shown(error)}", file=sys.stderr)
    shots = {name: sum(path not in errors for path in own) for name, own in class_files.items()}
    for name in [name for name, count in shots.items() if not count]:
        print(f"class {name} has no image that can be read: it is left out")
        del shots[name]
    if len(shots) < 2:
        found = f"images of {len(shots)} class" + ("es" if not shots else "")
        raise UserError(
            f"found {found}, but 2 are needed at least; put the images of each class into a folder "
            "of its own, --support=FOLDER with FOLDER/<class>/"
        )
    left = [path for path in files if path not in errors]
    if not left:
        raise UserError(f"none of the {len(files)} images to classify can be read; replace them")
    counts = torch.tensor(list(shots.values()))
    fewest, most = counts.min(), counts.max()
    print(
        f"support images: {counts.sum()} of {len(counts)} classes, "
        f"{fewest if fewest == most else f'{fewest} to {most}'} of each; images to classify: "
        f"{len(left)}; all brought to {size}x{size} pixels"
    )
    print_copies(images[: counts.sum()], [path for path in paths if path not in errors])
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels, list(shots), left, len(errors)


def original_size(path):
    """Return (width, height) of an image file in pixels. Raises UserError as `read_image` does."""
    with _opened(path) as image:
        return image.size


@contextlib.contextmanager
def _opened(path):
    """Open an image; whatever goes wrong with it is one line that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # the decoders raise nearly anything
        reason = f"{path} cannot be read as an image: {str(error) or type(error).__name__}"
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
