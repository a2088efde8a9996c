"""Photographs of any kind and size become arrays of one size, or one line that names the file."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.transforms import v2

from common import images
from common.config import UserError
from common.images import IMAGE_SUFFIXES, list_images, original_size, read_image, read_images

WHITE, RED, GREEN, BLUE = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def photograph(width, height):
    """Smooth shades with fine stripes, which alias where an image is scaled without a filter."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    smooth = [np.sin(9 * x + 4 * y), np.cos(13 * y - 5 * x), np.sin(20 * x * y)]
    stripes = 40 * (-1) ** (np.indices((height, width)).sum(axis=0)[..., None])
    return Image.fromarray((128 + 80 * np.stack(smooth, axis=2) + stripes).astype(np.uint8))


def saved(image, path, **options):
    image.save(path, **options)
    return path


def message_of(path, size=32):
    with pytest.raises(UserError) as caught:
        read_image(path, size)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as an image: "), message
    assert message.endswith("; replace or remove it") and "\n" not in message
    return message


# Sizes and shapes


@pytest.mark.parametrize("width, height", [(32, 32), (40, 32), (32, 50)])
def test_an_image_whose_shorter_side_fits_is_only_cut(tmp_path, width, height):
    pixels = noise(height, width)
    found = read_image(saved(Image.fromarray(pixels), tmp_path / "x.png"), 32)
    left, top = (width - 32) // 2, (height - 32) // 2
    assert found.dtype == np.uint8 and found.flags.writeable
    assert np.array_equal(found, pixels[top : top + 32, left : left + 32])


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("size", [32, 84])
@pytest.mark.parametrize("width, height", [(720, 480), (300, 1200), (1500, 500), (190, 95)])
def test_scaling_and_cutting_agree_with_torchvision(tmp_path, width, height, size, suffix):
    path = saved(photograph(width, height), tmp_path / f"x.{suffix}")
    bicubic = v2.InterpolationMode.BICUBIC
    theirs = v2.Compose([v2.Resize(size, bicubic, antialias=True), v2.CenterCrop(size)])
    aliased = v2.Compose([v2.Resize(size, bicubic, antialias=False), v2.CenterCrop(size)])
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = read_image(path, size).astype(int)

    def difference(transform):
        return np.abs(found - transform(pixels).permute(1, 2, 0).numpy())

    # The sizes are such that the middle begins at a whole pixel: torchvision knows no other.
    assert difference(theirs).mean() < 0.5 and difference(theirs).max() <= 3
    assert difference(aliased).mean() > 5


@pytest.mark.parametrize("width, height", [(300, 100), (100, 300)])
def test_a_wide_and_a_tall_image_keep_their_middle(tmp_path, width, height):
    colours = np.zeros((100, 300, 3), dtype=np.uint8)
    # The filter sees two pixels beyond the middle.
    colours[:, :98], colours[:, 98:202], colours[:, 202:] = RED, GREEN, BLUE
    pixels = colours if width > height else colours.transpose(1, 0, 2)
    path = saved(Image.fromarray(np.ascontiguousarray(pixels)), tmp_path / "x.png")
    assert np.array_equal(read_image(path, 32), np.full((32, 32, 3), GREEN))


@pytest.mark.parametrize("width, height", [(8, 8), (5, 9), (31, 2), (1, 1)])
def test_small_images_are_enlarged(tmp_path, width, height):
    plain = saved(Image.new("RGB", (width, height), (10, 200, 77)), tmp_path / "plain.png")
    assert np.array_equal(read_image(plain, 32), np.full((32, 32, 3), (10, 200, 77)))
    shades = np.linspace(0, 255, width).astype(np.uint8) * np.ones((width, 1), dtype=np.uint8)
    row = read_image(saved(Image.fromarray(shades), tmp_path / "shades.png"), 32)[16, :, 0]
    assert (np.diff(row.astype(int)) >= 0).all() and len(set(row)) >= min(width, 8)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path, monkeypatch):
    decoded, fit = [], images.ImageOps.fit

    def noted(image, *options):
        decoded.append(image.size)
        return fit(image, *options)

    monkeypatch.setattr(images.ImageOps, "fit", noted)
    path = saved(photograph(1600, 1200), tmp_path / "x.jpg")
    read_image(path, 32)
    read_image(path, 200)
    read_image(path, 1200)
    assert decoded == [(200, 150), (800, 600), (1600, 1200)]
    assert original_size(path) == (1600, 1200)


# Kinds of pixels


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_is_of_a_format_that_can_be_read(tmp_path, suffix):
    if suffix == ".webp" and not features.check("webp"):
        pytest.skip("this Pillow cannot write WebP")
    image = Image.fromarray(np.full((40, 60, 3), 99, dtype=np.uint8))
    path = saved(image.convert("L") if suffix == ".pgm" else image, tmp_path / f"x{suffix}")
    found = read_image(path, 32).astype(int)
    assert found.shape == (32, 32, 3) and np.abs(found - 99).max() <= 2


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA"])
def test_grey_palette_and_opaque_images_keep_their_colours(tmp_path, mode):
    image = Image.fromarray(noise(32, 32)).convert(mode)
    found = read_image(saved(image, tmp_path / "x.png"), 32)
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


def test_cmyk_images_become_rgb(tmp_path):
    path = saved(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), tmp_path / "x.jpg")
    assert np.abs(read_image(path, 32).astype(int) - RED).max() <= 3


def test_alpha_is_laid_over_white(tmp_path):
    pixels = noise(32, 32)
    alpha = noise(32, 32, seed=1)[..., :1]
    alpha[:8], alpha[24:] = 0, 255
    path = saved(Image.fromarray(np.concatenate([pixels, alpha], axis=2)), tmp_path / "x.png")
    share = alpha / 255
    found = read_image(path, 32)
    assert np.abs(found - (share * pixels + (1 - share) * 255)).max() <= 1
    assert (found[:8] == 255).all() and np.array_equal(found[24:], pixels[24:])


def test_alpha_is_laid_over_white_before_scaling(tmp_path):
    # The colour under a transparent pixel must not shine through at the edges.
    pixels = np.zeros((320, 320, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(np.arange(320) % 20 < 10, 255, 0)
    pixels[pixels[..., 3] == 0, :3] = RED
    found = read_image(saved(Image.fromarray(pixels), tmp_path / "x.png"), 32)
    assert (found == found[..., :1]).all() and 0 < found.mean() < 255


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    colours = (np.indices((32, 32)).sum(axis=0) % 3).astype(np.uint8)
    image = Image.frombytes("P", (32, 32), colours.tobytes())
    image.putpalette([*RED, *GREEN, *BLUE])
    one = saved(image, tmp_path / "one.png", transparency=1)
    expected = np.array([RED, WHITE, BLUE])[colours]
    assert np.array_equal(read_image(one, 32), expected)
    all_three = saved(image, tmp_path / "three.png", transparency=bytes([255, 0, 51]))
    expected = np.array([RED, WHITE, (204, 204, 255)])[colours]
    assert np.array_equal(read_image(all_three, 32), expected)


@pytest.mark.parametrize("mode, colour", [("RGB", (7, 8, 9)), ("L", 7), ("1", 0)])
def test_a_transparent_colour_of_a_plain_image_is_white(tmp_path, mode, colour):
    image = Image.new(mode, (32, 32), colour)
    opaque = {"RGB": (50, 60, 70), "L": 50, "1": 1}[mode]
    image.paste(opaque, (0, 16, 32, 32))
    found = read_image(saved(image, tmp_path / "x.png", transparency=colour), 32)
    assert (found[:16] == 255).all()
    assert np.array_equal(found[16:], np.asarray(image.convert("RGB"))[16:])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_images_keep_their_shades(tmp_path, suffix):
    # Cut off at 255, as a plain conversion does, nearly all of such an image would be white.
    pixels = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)
    found = read_image(saved(Image.fromarray(pixels), tmp_path / f"x.{suffix}"), 32)
    assert np.array_equal(found, np.repeat(pixels[..., None] // 256, 3, axis=2))


def test_shades_up_to_255_in_16_bits_stay_as_they_are(tmp_path):
    pixels = (np.arange(32 * 32).reshape(32, 32) // 4).astype(np.uint16)
    found = read_image(saved(Image.fromarray(pixels), tmp_path / "x.png"), 32)
    assert np.array_equal(found[..., 0], pixels)


@pytest.mark.parametrize("brightest", [256, 300, 4095, 2**14 - 1])
def test_shades_of_12_bits_for_example_are_refused_rather_than_nearly_black(tmp_path, brightest):
    pixels = np.linspace(0, brightest, 32 * 32).reshape(32, 32).astype(np.uint16)
    path = saved(Image.fromarray(pixels), tmp_path / "x.png")
    assert f"its shades run to {brightest}, not to 255 or to 65535" in message_of(path)


def test_an_image_of_floats_is_refused(tmp_path):
    path = saved(Image.fromarray(np.zeros((32, 32), dtype=np.float32)), tmp_path / "x.tif")
    assert "its pixels are floats" in message_of(path)


# EXIF orientation

# How an upright image lies in a file of each orientation.
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright),  # a camera turned clockwise: the top lies on the left
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_a_turned_photograph_is_turned_upright(tmp_path, orientation):
    upright = noise(50, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    found = read_image(saved(stored, tmp_path / "x.png", exif=exif), 32)
    assert np.array_equal(found, upright[9:41])
    # A JPEG that is decoded at a fraction of its size is turned as well.
    upright = np.asarray(photograph(320, 500))
    expected = read_image(saved(Image.fromarray(upright), tmp_path / "upright.png"), 32)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    found = read_image(saved(stored, tmp_path / "x.jpg", exif=exif), 32)
    assert np.abs(found - expected.astype(int)).mean() < 1


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"?"])
def test_damaged_exif_data_leave_the_image_as_it_lies(tmp_path, exif, recwarn):
    pixels = noise(32, 32)
    path = saved(Image.fromarray(pixels), tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_images([path], 32, "damaged")[0], pixels)
    assert not recwarn.list


# What cannot be read


def png(height=40, width=40):
    file = io.BytesIO()
    Image.fromarray(noise(height, width)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"<html>404</html>", png()[:30], png()[:2000]], ids=len
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    message_of(tmp_path / "x.png")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    message_of(tmp_path / "absent.png")
    (tmp_path / "x.png").mkdir()
    message_of(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image"):
        original_size(tmp_path / "x.png")


def test_an_error_without_words_is_named_by_its_class(tmp_path, monkeypatch):
    def fail(*options):
        raise MemoryError

    monkeypatch.setattr(images.ImageOps, "fit", fail)
    assert "MemoryError" in message_of(saved(Image.new("RGB", (40, 40)), tmp_path / "x.png"))


# Many images


@pytest.fixture
def mixed(tmp_path):
    """Paths of forty images of mixed sizes and formats."""
    sizes = [(32 + 7 * number % 50, 20 + 11 * number % 70) for number in range(40)]
    return [
        saved(photograph(*size), tmp_path / f"{number:02}.{('png', 'jpg', 'bmp')[number % 3]}")
        for number, size in enumerate(sizes)
    ]


def test_many_images_come_in_the_order_of_their_paths_with_a_progress_bar(mixed, capsys):
    found = read_images(mixed, 36, "holiday")
    assert found.dtype == np.uint8 and found.shape == (40, 36, 36, 3)
    assert np.array_equal(found, [read_image(path, 36) for path in mixed])
    printed = capsys.readouterr()
    assert "holiday" in printed.err and "40" in printed.err and printed.out == ""


def test_one_unreadable_image_among_many_is_named(mixed):
    mixed[17].write_bytes(b"no image")
    with pytest.raises(UserError, match=f"{mixed[17].name} cannot be read as an image"):
        read_images(mixed, 32, "holiday")


def test_unreadable_images_are_left_out_where_their_errors_are_asked_for(mixed):
    expected = [read_image(path, 32) for path in mixed if path not in (mixed[17], mixed[4])]
    for number in (17, 4):
        mixed[number].write_bytes(b"no image")
    errors = {}
    assert np.array_equal(read_images(mixed, 32, "holiday", errors), expected)
    assert list(errors) == [mixed[4], mixed[17]]
    assert all(str(error).startswith(str(path)) for path, error in errors.items())


def test_after_an_error_the_other_images_are_not_read(monkeypatch):
    read = []

    def first_fails(path, size):
        read.append(path)
        if path == 0:
            raise UserError("0 cannot be read")
        time.sleep(0.002)
        return np.zeros((32, 32, 3), dtype=np.uint8)

    monkeypatch.setattr(images, "read_image", first_fails)
    with pytest.raises(UserError, match="0 cannot be read"):
        read_images(range(3000), 32, "holiday")
    assert len(read) < 1500


def test_an_image_of_very_many_pixels_is_read_without_a_warning(tmp_path, monkeypatch, recwarn):
    path = saved(Image.fromarray(noise(32, 40)), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_images([path], 32, "panoramas").shape == (1, 32, 32, 3)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # more than twice that is an error
    assert "exceeds limit" in message_of(path)


def test_images_are_listed_in_order_whatever_the_case_of_their_suffix(tmp_path):
    for name in ("b.JPG", "a.png", "c.Tiff", ".hidden.png", "notes.txt", "d.gif", "png", "e.webp"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPG", "c.Tiff", "e.webp"]
    assert all(suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(UserError, match="absent cannot be read: No such file"):
        list_images(tmp_path / "absent")
