"""The built-in data sets: shapes, names, and drawings that depend on nothing but seed and class."""

import unicodedata

import numpy as np
import pytest

from common import glyphs
from common.glyphs import draw_glyph_digits, draw_glyphs

COUNT = 12  # images per class


@pytest.fixture(scope="module")
def characters():
    return draw_glyphs(images_per_class=COUNT)


@pytest.fixture(scope="module")
def digits():
    return draw_glyph_digits(images_per_class=40)


@pytest.mark.parametrize("kind, classes, count", [("characters", 100, COUNT), ("digits", 10, 40)])
def test_every_class_has_the_asked_number_of_images_all_different_and_none_blank(
    kind, classes, count, request
):
    images, labels, names = request.getfixturevalue(kind)
    assert images.shape == (classes * count, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == [c for c in range(classes) for _ in range(count)]
    assert len(names) == len(set(names)) == classes
    assert len({image.tobytes() for image in images}) == len(images)
    assert images.reshape(len(images), -1).std(axis=1).min() > 3


def test_names_are_plain_words_fit_for_a_file_name_and_none_is_a_digits(characters):
    for name in characters[2]:
        assert name.isascii() and name.replace("_", "").isalnum() and name == name.lower(), name
    assert {"greek_small_xi", "latin_capital_a"} < set(characters[2])
    # The digits are the unseen second domain: a model must not have met one.
    assert not any(unicodedata.category(each).startswith("N") for each in glyphs.CHARACTERS)


def test_a_class_is_the_same_whatever_is_drawn_beside_it(characters, monkeypatch):
    monkeypatch.setattr(glyphs, "CHARACTERS", glyphs.CHARACTERS[:3] + "Z" + glyphs.CHARACTERS[4:6])
    images, _, names = draw_glyphs(images_per_class=COUNT)
    images = images.reshape(6, COUNT, 32, 32, 3)
    expected = characters[0].reshape(100, COUNT, 32, 32, 3)
    assert names[3] == "latin_capital_z" and not np.array_equal(images[3], expected[3])
    for label in (0, 1, 2, 4, 5):
        assert np.array_equal(images[label], expected[label])


def test_every_call_draws_the_same_images_whatever_numpys_global_generator_does(digits):
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    assert np.array_equal(draw_glyph_digits(images_per_class=40)[0], digits[0])
    assert np.array_equal(np.random.get_state()[1], before)


def ink_of(images):
    """Distance of each pixel from the median grey of its image, as unit vectors [N, 1024]."""
    grey = images.astype(float).mean(axis=3).reshape(len(images), -1)
    ink = np.abs(grey - np.median(grey, axis=1, keepdims=True))
    ink -= ink.mean(axis=1, keepdims=True)
    return ink / np.linalg.norm(ink, axis=1, keepdims=True)


# Rotated, stretched and shifted, they are hard for so plain a method; chance is 0.01 and 0.1.
@pytest.mark.parametrize(
    "draw, count, least", [(draw_glyphs, 24, 0.1), (draw_glyph_digits, 60, 0.4)]
)
def test_images_look_like_others_of_their_class(draw, count, least):
    images, labels, names = draw(images_per_class=count)
    ink = ink_of(images).reshape(len(names), count, -1)
    half = count // 2
    means = ink[:, :half].mean(axis=1)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    accuracy = ((ink[:, half:] @ means.T).argmax(axis=2) == np.arange(len(names))[:, None]).mean()
    assert accuracy > least
