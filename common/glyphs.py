"""Two small image data sets drawn from the fonts that matplotlib installs.

`draw_glyphs` draws 100 characters of several scripts (no digits) as 32x32 colour images: the shape
of CIFAR-100, in the spirit of Omniglot. A class is a character; its images differ in font face,
size, slant, position, colours, background, blur and noise. `draw_glyph_digits` draws digits with
parts of their neighbours in view, less contrast and more noise: a second domain, as SVHN is to
CIFAR-100. Every number comes from NumPy's PCG64 generator, seeded by (0, domain, class), so a class
is the same whatever is drawn beside it.
"""

import os
import unicodedata
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps

SIZE = 32  # height and width of an image
GLYPH = 32  # longer side of a character's box in its mask, close to the drawn size
MARGIN = 2  # empty border of a mask: what a gather outside the mask reads
EM = 160  # font size at which outlines are rasterised before they are reduced
MIN_FACES = 3  # a character must exist in that many distinct faces
SAME_FACE = 0.02  # masks that differ by less (mean over pixels) are one outline
KNOTS = 6  # control points per axis of a background, see _backdrop
COLOUR_TRIES = 32  # colour pairs to choose from, see _colour_pairs
CHROMA = 0.5  # share of a random colour's distance from grey that is kept
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601 weights

DEJAVU = []
for family, slant in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic")):
    DEJAVU += [f"DejaVu{family}{style}" for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")]
STIX = ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]
# These follow TeX's encoding: outside ASCII they answer with another character.
COMPUTER_MODERN = ["cmr10", "cmb10", "cmss10", "cmtt10"]

# No two of these are the same shape up to size and the rotations and shears below.
CHARACTERS = (
    "ABDEFGHKLMNPQRSTWXYZabdefghjmtæ"  # Latin
    "ΓΔΘΞΠΣΦΨΩβδελμξσωБДЖИЦЧШЫЭЮЯЂЉѪӘ"  # Greek, Cyrillic
    "ԲԴԺԽՁՃՔՖადთმჟრფქאל"  # Armenian, Georgian, Hebrew
    "&@#%?§€£₹∞∫√∀≠→↺↯☺♫"
)
DIGITS = "0123456789"


class Look(NamedTuple):
    """How the images of a domain vary; pairs are ranges, of uniform draws unless noted."""

    size: tuple  # longer side of the character's box, in pixels
    stretch: tuple  # width over height, relative to the font's, log-uniform
    rotation: tuple  # degrees
    shear: tuple  # horizontal shift per unit of height
    shift: tuple  # of the centre along each axis, in pixels
    contrast: tuple  # allowed difference in luma between character and background
    dark_ink: float  # probability that the character is the darker of the two
    texture: tuple  # swing of the background, as a share of that difference
    blur: tuple  # weight of either neighbour in a 3-tap filter
    noise: tuple  # standard deviation of the pixel noise, white being 1


GLYPH_LOOK = Look(
    *((17, 27), (0.75, 1.3), (-25, 25), (-0.3, 0.3), (-3, 3), (0.4, 1.0), 0.9, (0.2, 0.8)),
    *((0.0, 0.25), (0.01, 0.07)),
)
DIGIT_LOOK = Look(
    *((18, 27), (0.8, 1.3), (-12, 12), (-0.25, 0.25), (-2, 2), (0.2, 0.5), 0.5, (0.2, 0.8)),
    *((0.1, 0.33), (0.03, 0.08)),
)
NEIGHBOUR = 0.85  # probability of a further digit, on either side
GAP = (2, 7)  # space between digits, in mask pixels


def draw_glyphs(images_per_class=600):
    """Draw the 100 character classes.

    Returns (images uint8 [100 * images_per_class, 32, 32, 3], labels int64 in ascending order, 100
    ASCII class names such as "greek_small_xi"). Images of a class are independent draws. Raises
    RuntimeError if the installed fonts hold a character in fewer than MIN_FACES faces.
    """
    fonts = _open_fonts()

    def coverage(label, rng):
        masks = np.stack(list(_face_masks(CHARACTERS[label], fonts).values()))
        face = rng.integers(len(masks), size=images_per_class)
        return _gather(masks, face, *_sample_points(rng, images_per_class, GLYPH_LOOK))

    names = [unicodedata.name(character).lower() for character in CHARACTERS]
    names = [name.replace(" letter", "").replace(" ", "_") for name in names]
    return (*_draw(0, images_per_class, len(names), coverage, GLYPH_LOOK), names)


def draw_glyph_digits(images_per_class=500):
    """Draw the 10 digit classes; the label is the digit in the centre.

    Returns and raises what `draw_glyphs` does, with 10 classes named "0" to "9".
    """
    fonts = _open_fonts()
    by_digit = [_face_masks(digit, fonts) for digit in DIGITS]
    faces = [face for face in fonts if all(face in masks for masks in by_digit)]
    masks = np.stack([masks[face] for masks in by_digit for face in faces])
    widths = (masks.max(axis=1) > 0).sum(axis=1)

    def coverage(label, rng):
        face = rng.integers(len(faces), size=images_per_class)
        x, y = _sample_points(rng, images_per_class, DIGIT_LOOK)
        centre = label * len(faces) + face
        ink = _gather(masks, centre, x, y)
        for side in (-1, 1):
            beside = rng.integers(10, size=images_per_class) * len(faces) + face
            step = (widths[centre] + widths[beside]) / 2 + rng.uniform(*GAP, images_per_class)
            step[rng.random(images_per_class) >= NEIGHBOUR] = 10 * SIZE  # out of view
            offset = (side * step).astype(np.float32)[:, None, None]
            ink = np.maximum(ink, _gather(masks, beside, x - offset, y))
        return ink

    return (*_draw(1, images_per_class, 10, coverage, DIGIT_LOOK), list(DIGITS))


def _draw(domain, count, classes, coverage, look):
    """Images and labels of a domain; coverage(label, rng) gives a class's [count, 32, 32]."""
    images = np.empty((classes, count, SIZE, SIZE, 3), dtype=np.uint8)
    for label in range(classes):
        rng = np.random.default_rng([0, domain, label])
        images[label] = _paint(rng, coverage(label, rng), look)
    labels = np.repeat(np.arange(classes, dtype=np.int64), count)
    return images.reshape(-1, SIZE, SIZE, 3), labels


def _open_fonts():
    """Face name -> (font, set of the code points it may be used for)."""
    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = {}
    for face in DEJAVU + STIX + COMPUTER_MODERN:
        path = os.path.join(folder, face + ".ttf")
        codes = set(FT2Font(path).get_charmap())
        if face in COMPUTER_MODERN:
            codes &= set(range(128))
        # The basic layout engine: the other one is optional and need not be installed.
        font = ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.BASIC)
        fonts[face] = font, codes
    return fonts


def _face_masks(character, fonts):
    """Face name -> mask, for the faces that hold the character in distinct outlines."""
    masks = {}
    for face, (font, codes) in fonts.items():
        if ord(character) in codes:
            mask = _rasterise(character, font)
            # Fonts borrow symbols from each other: the same outline must not count twice.
            if all(np.abs(mask - other).mean() > SAME_FACE for other in masks.values()):
                masks[face] = mask
    if len(masks) < MIN_FACES:
        raise RuntimeError(f"{character!r} is in {len(masks)} of matplotlib's font faces only")
    return masks


def _rasterise(character, font):
    """Mask float32 [36, 36] in [0, 1] with the character's box centred and scaled to GLYPH."""
    image = Image.new("L", (3 * EM, 3 * EM))
    ImageDraw.Draw(image).text((EM, EM), character, fill=255, font=font)
    # Pillow widens its filter when it reduces, so that thin strokes do not alias.
    bilinear = Image.Resampling.BILINEAR
    image = ImageOps.pad(image.crop(image.getbbox()), (GLYPH, GLYPH), bilinear)
    return np.asarray(ImageOps.expand(image, MARGIN), dtype=np.float32) / 255


def _sample_points(rng, count, look):
    """Where in a mask each image pixel lies: x and y, float32 [count, 32, 32]."""

    def draw(limits):
        return rng.uniform(*limits, (count, 1, 1))

    # The inverse of: scale, then shear, then rotate, then shift the character.
    scale = draw(look.size) / GLYPH
    root = np.exp(draw(np.log(look.stretch)) / 2)
    angle, shear = np.radians(draw(look.rotation)), draw(look.shear)
    cos, sin = np.cos(angle), np.sin(angle)
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    column, row = axis - draw(look.shift), axis[:, None] - draw(look.shift)
    x = ((cos + shear * sin) * column + (sin - shear * cos) * row) / (scale * root)
    y = (cos * row - sin * column) / (scale / root)
    middle = GLYPH / 2 + MARGIN - 0.5
    return (x + middle).astype(np.float32), (y + middle).astype(np.float32)


def _gather(masks, index, x, y):
    """Bilinear values of masks[index] at (x, y): float32 [count, 32, 32] in [0, 1]."""
    side = masks.shape[-1]
    x, y = (np.clip(value, 0, side - 1.001) for value in (x, y))
    column, row = x.astype(np.int32), y.astype(np.int32)
    x, y = x - column, y - row
    flat = masks.ravel()
    start = index[:, None, None] * side**2 + row * side + column
    upper = flat[start] * (1 - x) + flat[start + 1] * x
    lower = flat[start + side] * (1 - x) + flat[start + side + 1] * x
    return upper * (1 - y) + lower * y


def _paint(rng, coverage, look):
    """Colour, backdrop, blur and noise for coverage [count, 32, 32]: uint8 images."""
    count = len(coverage)
    back, ink, gap = _colour_pairs(rng, count, look)
    swing = (gap * rng.uniform(*look.texture, count)).astype(np.float32)
    image = back[:, None, None] + swing[:, None, None, None] * _backdrop(rng, count)
    image += coverage[..., None] * (ink[:, None, None] - image)
    weight = rng.uniform(*look.blur, (count, 1, 1, 1)).astype(np.float32)
    for axis in (1, 2):
        image = _blur(image, weight, axis)
    deviation = rng.uniform(*look.noise, (count, 1, 1, 1)).astype(np.float32)
    image += deviation * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _colour_pairs(rng, count, look):
    """Background and ink, float32 [count, 3] in [0, 1], and their luma gap [count]."""
    # Candidate pairs are uniform in RGB, then drawn towards grey by 1 - CHROMA. The first of
    # COLOUR_TRIES pairs whose lumas (Rec. 601) differ by an amount within look.contrast is taken,
    # or the one nearest to it if none does; look.dark_ink then decides the roles.
    pairs = rng.random((count, COLOUR_TRIES, 2, 3), dtype=np.float32)
    luma = (pairs * LUMA).sum(axis=-1)
    gap = np.abs(luma[..., 0] - luma[..., 1])
    low, high = look.contrast
    pick = np.arange(count), np.maximum(np.maximum(low - gap, gap - high), 0).argmin(axis=1)
    pairs, luma = pairs[pick], luma[pick]
    pairs = luma[..., None] + CHROMA * (pairs - luma[..., None])
    swap = ((luma[:, 1] < luma[:, 0]) != (rng.random(count) < look.dark_ink))[:, None]
    first, second = pairs[:, 0], pairs[:, 1]
    return np.where(swap, second, first), np.where(swap, first, second), gap[pick]


def _backdrop(rng, count):
    """Plain (0), gradient or smooth noise, roughly in [-1, 1]: float32 [count, 32, 32, 3]."""
    # All three are grids of control points of a cubic B-spline, which keeps a linear ramp.
    ramp = np.linspace(-1, 1, KNOTS)[:, None]
    slope = rng.uniform(-1, 1, (2, count, 1, 1, 3))
    gradient = slope[0] * ramp[:, None] + slope[1] * ramp
    noise = 1.5 * rng.uniform(-1, 1, (count, KNOTS, KNOTS, 3))
    kind = rng.integers(3, size=(count, 1, 1, 1))
    grid = np.where(kind == 1, gradient, np.where(kind == 2, noise, 0)).astype(np.float32)
    # The outermost control points lie one interval outside the image.
    distance = np.abs(np.linspace(1, KNOTS - 2, SIZE)[:, None] - np.arange(KNOTS))
    basis = (np.maximum(2 - distance, 0) ** 3 - 4 * np.maximum(1 - distance, 0) ** 3) / 6
    basis = basis.astype(np.float32)
    return np.einsum("jb,nibc->nijc", basis, np.einsum("ia,nabc->nibc", basis, grid))


def _blur(image, weight, axis):
    """Filter [weight, 1 - 2 weight, weight] along an axis; borders repeat."""
    index = np.arange(SIZE)
    before = image.take(np.maximum(index - 1, 0), axis)
    after = image.take(np.minimum(index + 1, SIZE - 1), axis)
    return image + weight * (before + after - 2 * image)
