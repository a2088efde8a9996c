"""Photographs of any kind and size become arrays of one size, or one line that names the file."""

import math
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.transforms import v2

from common import UserError
from common.images import IMAGE_SUFFIXES, list_images, read_image, read_images

WHITE, RED, GREEN, BLUE = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def noise(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(256, size=(height, width, channels), dtype=np.uint8)


def photograph(width, height):
    """Smooth shades with fine stripes, which alias where an image is scaled without a filter."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    smooth = [np.sin(9 * x + 4 * y), np.cos(13 * y - 5 * x), np.sin(20 * x * y)]
    stripes = 40 * (-1) ** (np.indices((height, width)).sum(axis=0)[..., None])
    return Image.fromarray((128 + 80 * np.stack(smooth, axis=2) + stripes).astype(np.uint8))


def saved(image, path, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(image))
    image.save(path, **options)
    return path


def message_of(path, size=32):
    with pytest.raises(UserError) as caught:
        read_image(path, size)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as an image: "), message
    assert message.endswith("; replace or remove it")
    return message


# Sizes and shapes


@pytest.mark.parametrize("width, height", [(32, 32), (40, 32), (32, 50)])
def test_an_image_whose_shorter_side_fits_is_only_cut_and_a_tiny_one_enlarged(
    tmp_path, width, height
):
    pixels = noise(height, width)
    found = read_image(saved(pixels, tmp_path / "x.png"), 32)
    left, top = (width - 32) // 2, (height - 32) // 2
    assert found.dtype == np.uint8 and found.flags.writeable
    assert np.array_equal(found, pixels[top : top + 32, left : left + 32])
    tiny = saved(Image.new("RGB", (5, 9), (10, 200, 77)), tmp_path / "tiny.png")
    assert np.array_equal(read_image(tiny, 32), np.full((32, 32, 3), (10, 200, 77)))


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


# Kinds of pixels


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_is_of_a_format_that_can_be_read(tmp_path, suffix):
    if suffix == ".webp" and not features.check("webp"):
        pytest.skip("this Pillow cannot write WebP")
    image = Image.fromarray(np.full((40, 60, 3), 99, dtype=np.uint8))
    path = saved(image.convert("L") if suffix == ".pgm" else image, tmp_path / f"x{suffix}")
    found = read_image(path, 32).astype(int)
    assert found.shape == (32, 32, 3) and np.abs(found - 99).max() <= 2


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_images_without_transparency_keep_their_colours(tmp_path, mode):
    image = Image.fromarray(noise(32, 32)).convert(mode)
    found = read_image(saved(image, tmp_path / ("x.tif" if mode == "CMYK" else "x.png")), 32)
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


def test_alpha_is_laid_over_white_before_scaling(tmp_path):
    pixels, alpha = noise(32, 32), noise(32, 32, channels=1, seed=1)
    found = read_image(saved(np.concatenate([pixels, alpha], axis=2), tmp_path / "x.png"), 32)
    share = alpha / 255
    assert np.abs(found - (share * pixels + (1 - share) * 255)).max() <= 1
    # The colour under a transparent pixel must not shine through at the edges.
    pixels = np.zeros((320, 320, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(np.arange(320) % 20 < 10, 255, 0)
    pixels[pixels[..., 3] == 0, :3] = RED
    found = read_image(saved(pixels, tmp_path / "y.png"), 32)
    assert (found == found[..., :1]).all() and 0 < found.mean() < 255


@pytest.mark.parametrize("transparency, second", [(1, WHITE), (bytes([255, 51]), (204, 255, 204))])
def test_a_transparent_colour_of_a_palette_is_laid_over_white(tmp_path, transparency, second):
    colours = (np.indices((32, 32)).sum(axis=0) % 3).astype(np.uint8)
    image = Image.frombytes("P", (32, 32), colours.tobytes())
    image.putpalette([*RED, *GREEN, *BLUE])
    found = read_image(saved(image, tmp_path / "x.png", transparency=transparency), 32)
    assert np.array_equal(found, np.array([RED, second, BLUE])[colours])


@pytest.mark.parametrize("mode, colour", [("RGB", (7, 8, 9)), ("L", 7)])
def test_a_transparent_colour_of_a_plain_image_is_white(tmp_path, mode, colour):
    image = Image.new(mode, (32, 32), colour)
    image.paste({"RGB": (50, 60, 70), "L": 50}[mode], (0, 16, 32, 32))
    found = read_image(saved(image, tmp_path / "x.png", transparency=colour), 32)
    assert (found[:16] == 255).all()
    assert np.array_equal(found[16:], np.asarray(image.convert("RGB"))[16:])


def save_16_bits(path, shades, mode):
    """A 16-bit PNG of shades [H, W, C], which Pillow cannot write in colour."""
    colour_type = {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}[mode]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in shades)
    size = struct.pack(">II", shades.shape[1], shades.shape[0])
    parts = (b"IHDR", size + bytes([16, colour_type, 0, 0, 0])), (b"IDAT", zlib.compress(rows))
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in (*parts, (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(name + body))
        data += struct.pack(">I", len(body)) + name + body + check
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "mode, bits, divisor",
    [("L", 8, 1), ("L", 9, 4), ("L", 12, 16), ("L", 16, 256), ("RGB", 16, 256), ("RGBA", 16, 256)],
)
def test_shades_of_16_bits_are_scaled_alike_by_the_brightest_of_the_data_set(
    mode, bits, divisor, tmp_path, capsys
):
    rng = np.random.default_rng(0)
    images = [rng.integers(most, size=(32, 32, len(mode))) for most in (2**bits, 2**bits // 4)]
    images[0][0, 0] = 2**bits - 1
    for shades in images:
        if mode[-1] == "A":
            shades[..., -1] = 2**16 - 1  # opaque, whatever the colours use
    paths = [save_16_bits(tmp_path / f"{n}.png", each, mode) for n, each in enumerate(images)]
    found, used = read_images([*paths, saved(noise(32, 32), tmp_path / "8.png")], 32, "scans")
    for pixels, shades in zip(found, images):
        expected = shades[..., : len(mode) - (mode[-1] == "A")] // divisor
        assert np.array_equal(pixels, np.broadcast_to(expected, pixels.shape))
    assert np.array_equal(found[2], noise(32, 32)) and used == 2 * math.ceil(bits / 2)
    said = f"scans: images of 16 bits per channel: 2; the brightest needs {used} of them"
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("kind, least", [(np.int32, -5), (np.int32, 2**16), (np.float32, 0.5)])
def test_shades_that_no_rule_fits_are_refused(kind, least, tmp_path):
    pixels = np.full((32, 32), least, kind)
    message = message_of(saved(pixels, tmp_path / "x.tif"))
    assert "pixels are floats" in message or f"run from {least} to {least}, but" in message
    for mode, brightest in ("RGB", 4095), ("RGBA", 4095), ("LA", 65535):
        opaque = np.full((32, 32, len(mode)), 65535)
        opaque[..., : len(mode) - (mode[-1] == "A")] = brightest
        path = save_16_bits(tmp_path / "x.png", opaque, mode)
        with pytest.raises(UserError, match="colours of 16 bits are read where they use all"):
            read_images([path], 32, "scans")
    both = saved(np.full((32, 32), 4095, np.uint16), tmp_path / "a.tif")
    with pytest.raises(UserError, match="run from 4095 to 4095, but .* from 0 to 1023"):
        read_images([both], 32, "scans", bits=10)


def test_of_several_pages_or_frames_the_first_is_used_and_a_line_says_so(tmp_path, capsys):
    pages = [Image.fromarray(noise(32, 32, seed=n)) for n in range(3)]
    paths = []
    for suffix in ("tif", "png", "webp", "jpg"):
        more = {"save_all": True, "append_images": pages[1:]} if suffix != "jpg" else {}
        paths.append(saved(pages[0], tmp_path / f"x.{suffix}", **more))
    found, _ = read_images(paths, 32, "scans")
    assert np.array_equal(found[0], pages[0]) and np.array_equal(found[1], pages[0])
    printed = capsys.readouterr().out
    assert printed.startswith("scans: images of several pages or frames: 3, ")
    assert printed.endswith("x.tif has 3; only the first of each is used\n")


@pytest.mark.parametrize("shade, ground", [(255, 0), (250, 0), (200, 255), (0, 255)])
def test_a_drawing_can_be_seen_on_its_ground(shade, ground, tmp_path):
    pixels = np.full((32, 32, 4), shade, np.uint8)
    pixels[..., 3] = np.repeat([0, 255], 16)[:, None]
    found = read_image(saved(pixels, tmp_path / "x.png"), 32)
    assert (found[:16] == ground).all() and (found[16:] == shade).all()


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
    upright, exif = noise(50, 32), Image.Exif()
    exif[0x0112] = orientation
    stored = saved(STORED[orientation](upright), tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_image(stored, 32), upright[9:41])
    # A JPEG that is decoded at a fraction of its size is turned as well.
    upright = np.asarray(photograph(320, 500))
    expected = read_image(saved(upright, tmp_path / "upright.png"), 32)
    found = read_image(saved(STORED[orientation](upright), tmp_path / "x.jpg", exif=exif), 32)
    assert np.abs(found - expected.astype(int)).mean() < 1


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"?"])
def test_damaged_exif_data_leave_the_image_as_it_lies(tmp_path, exif, recwarn):
    pixels = noise(32, 32)
    path = saved(pixels, tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_images([path], 32, "damaged")[0][0], pixels)
    assert not recwarn.list


# What cannot be read


@pytest.mark.parametrize("length", [0, 30, 2000])
def test_a_file_that_cannot_be_read_is_named(tmp_path, length):
    path = saved(noise(40, 40), tmp_path / "x.png")
    path.write_bytes(path.read_bytes()[:length])
    message_of(path)
    path.write_bytes(b"<html>404</html>")
    message_of(path)


def test_many_images_come_in_order_and_an_unreadable_one_ends_it_or_is_left_out(tmp_path, capsys):
    paths = [
        saved(photograph(32 + 7 * n % 50, 20 + 11 * n % 70), tmp_path / f"{n:02}.{suffix}")
        for n, suffix in enumerate(10 * ("png", "jpg", "bmp"))
    ]
    expected = [read_image(path, 36) for path in paths]
    assert np.array_equal(read_images(paths, 36, "holiday")[0], expected)
    printed = capsys.readouterr()
    assert "holiday" in printed.err and "30" in printed.err and printed.out == ""

    for bad in (paths[17], paths[4]):
        bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"{paths[4].name} cannot be read as an image"):
        read_images(paths, 36, "holiday")
    errors = {}
    left = [image for n, image in enumerate(expected) if n not in (4, 17)]
    assert np.array_equal(read_images(paths, 36, "holiday", errors)[0], left)
    assert list(errors) == [paths[4], paths[17]] and str(paths[4]) in str(errors[paths[4]])


def test_an_image_of_very_many_pixels_is_read_without_a_warning(tmp_path, monkeypatch, recwarn):
    path = saved(noise(32, 40), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_images([path], 32, "panoramas")[0].shape == (1, 32, 32, 3)
    assert not recwarn.list


def test_images_are_listed_in_order_whatever_the_case_of_their_suffix(tmp_path):
    for name in ("b.JPG", "a.png", "c.Tiff", ".hidden.png", "notes.txt", "d.gif", "png", "e.webp"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.JPG", "c.Tiff", "e.webp"]
    with pytest.raises(UserError, match="absent cannot be read: No such file"):
        list_images(tmp_path / "absent")


def test_what_is_no_regular_file_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    saved(noise(32, 32), tmp_path / "c.png")
    (tmp_path / "d.png").symlink_to("c.png")
    assert [path.name for path in list_images(tmp_path)] == ["c.png", "d.png"]
