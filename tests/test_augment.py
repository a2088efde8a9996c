"""The augmentation: torchvision's pixels for the same random numbers; numbers in their ranges."""

from types import SimpleNamespace

import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import RandomResizedCrop

from common.augment import (
    AugmentedBatches,
    Views,
    augment,
    draw_augmentation,
    draw_jitter,
    jitter_colors,
)


def drawn(count, height=32, width=32, seed=0, **options):
    return draw_augmentation(count, height, width, torch.Generator().manual_seed(seed), **options)


def one_by_one_with_torchvision(images, boxes, flips, size=None):
    size, antialias, results = size or images.shape[2:], size is None, []
    for image, box, flip in zip(images.float(), boxes.tolist(), flips.tolist()):
        image = TF.hflip(image) if flip else image
        results.append(TF.resized_crop(image, *box, size, antialias=antialias))
    return torch.stack(results)


@pytest.mark.parametrize("height, width", [(32, 32), (29, 29), (32, 48), (48, 32)])
def test_the_pixels_are_torchvisions(height, width):
    images = torch.randint(256, (60, 3, height, width), dtype=torch.uint8)
    numbers = drawn(60, height, width)
    expected = one_by_one_with_torchvision(images, *numbers)
    torch.testing.assert_close(augment(images, *numbers), expected, rtol=0, atol=3e-3)


def test_every_box_and_both_flips_give_torchvisions_pixels():
    # The whole image, corners, narrow and low boxes: each flipped and not.
    boxes = [[0, 0, 32, 32], [0, 0, 28, 30], [4, 2, 28, 30], [3, 0, 29, 32], [0, 5, 32, 27]]
    boxes, flips = torch.tensor((boxes + [[7, 7, 1, 1]]) * 2), torch.arange(12) < 6
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    found = augment(images, boxes, flips)
    expected = one_by_one_with_torchvision(images, boxes, flips)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-3)
    assert torch.equal(found[0], images[0].float().flip(2))  # not even a rounding error


@pytest.mark.parametrize("size", [16, 20, 40])
def test_another_size_is_torchvisions_without_antialiasing(size):
    images = torch.randint(256, (60, 3, 32, 40), dtype=torch.uint8)
    numbers = drawn(60, 32, 40)
    expected = one_by_one_with_torchvision(images, *numbers, size=(size, size))
    torch.testing.assert_close(augment(images, *numbers, size=size), expected, rtol=0, atol=3e-3)


@pytest.mark.parametrize("min_crop_area", [0.8, 0.3])
def test_boxes_lie_within_the_image_and_have_the_asked_area_and_shape(min_crop_area):
    boxes, _ = drawn(20_000, min_crop_area=min_crop_area)
    top, left, height, width = boxes.T
    assert boxes.dtype == torch.int64 and boxes.shape == (20_000, 4)
    assert (top >= 0).all() and (top + height <= 32).all()
    assert (left >= 0).all() and (left + width <= 32).all()
    # Heights and widths are rounded to whole pixels: half a pixel of tolerance on either.
    low, high = (height - 0.5) * (width - 0.5), (height + 0.5) * (width + 0.5)
    least = min_crop_area * 1024
    assert (high >= least).all() and (low <= 1024).all() and low.min() < least
    assert ((width + 0.5) / (height - 0.5) >= 0.9).all()
    assert ((width - 0.5) / (height + 0.5) <= 1.1).all()


def test_where_no_crop_fits_the_box_is_the_whole_image():
    assert drawn(100, 32, 64)[0].unique(dim=0).tolist() == [[0, 0, 32, 64]]


def test_boxes_follow_the_distribution_of_torchvisions():
    torch.manual_seed(0)
    image, draw = torch.empty(3, 32, 32), RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, (0.8, 1.0), (0.9, 1.1)) for _ in range(4_000)])
    ours = drawn(20_000)[0]
    for column in range(4):
        counts = [torch.bincount(boxes[:, column], minlength=33) for boxes in (theirs, ours)]
        difference = counts[0] / len(theirs) - counts[1] / len(ours)
        # Four standard deviations of a share out of 4,000.
        assert difference.abs().max() < 4 * 0.5 / 4_000**0.5


def test_about_half_of_the_images_are_flipped_independently_of_the_boxes():
    boxes, flips = drawn(20_000)
    assert abs(flips.float().mean().item() - 0.5) < 4 * 0.5 / 20_000**0.5
    top = boxes[:, 0].float()
    difference = top[flips].mean() - top[~flips].mean()
    assert abs(difference.item()) < 4 * top.std().item() * 2 / 20_000**0.5


def test_the_same_generator_state_draws_the_same_and_global_numbers_stay():
    state = torch.get_rng_state()
    first, again, other = drawn(100), drawn(100), drawn(100, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_jitter_equals_torchvisions_brightness_then_contrast_then_saturation():
    images = torch.randint(256, (30, 3, 32, 32)).float()
    factors = draw_jitter(30, 0.4, torch.Generator().manual_seed(3))
    found = jitter_colors(images, factors)
    for image, of_image, result in zip(images / 255, factors.tolist(), found):
        adjusts = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
        for adjust, factor in zip(adjusts, of_image):
            image = adjust(image, factor)
        torch.testing.assert_close(result, 255 * image, rtol=0, atol=0.03)


def test_jitter_factors_are_spread_over_their_range():
    factors = draw_jitter(5_000, 0.4, torch.Generator().manual_seed(0))
    assert factors.shape == (5_000, 3) and 0.6 <= factors.min() and factors.max() <= 1.4
    assert (factors.amin(dim=0) < 0.61).all() and (factors.amax(dim=0) > 1.39).all()
    assert ((factors.mean(dim=0) - 1).abs() < 0.02).all()


TASKS = torch.arange(24).flip(0).view(3, 4, 2)  # of 3 steps, 4 tasks of 2 images each


def epoch(color_jitter=0.3, own=slice(None)):
    """The images of 3 steps of 4 tasks of 2 images, and the state of the generator afterwards."""
    images, generator = torch.arange(24 * 3 * 32 * 40) % 251, torch.Generator().manual_seed(5)
    train = SimpleNamespace(images=images.view(24, 3, 32, 40).byte())
    data = SimpleNamespace(train=train, normalize=lambda images: images / 255 - 1)
    batches = AugmentedBatches(data, TASKS, generator, 0.5, color_jitter, own)
    assert len(batches) == 3
    return list(batches), generator.get_state(), train.images


@pytest.mark.parametrize("color_jitter", [0.3, 0.0])
def test_the_steps_of_an_epoch_are_augmented_with_the_draws_of_its_generator(color_jitter):
    steps, state, images = epoch(color_jitter)
    generator = torch.Generator().manual_seed(5)
    boxes, flips = draw_augmentation(24, 32, 40, generator, 0.5)
    factors = draw_jitter(24, color_jitter, generator)  # drawn even where they are not used
    expected = augment(images[TASKS.flatten()], boxes, flips, factors if color_jitter else None)
    torch.testing.assert_close(torch.cat(steps), expected / 255 - 1)
    assert torch.equal(state, generator.get_state()) and len({*map(len, steps)}) == 1


def test_of_two_processes_each_takes_every_second_task_with_its_draws():
    alone, state, _ = epoch()
    for rank in range(2):
        shares, own_state, _ = epoch(own=slice(rank, None, 2))
        assert torch.equal(state, own_state)
        for whole, part in zip(alone, shares, strict=True):
            of_tasks = whole.unflatten(0, (4, 2))[rank::2].flatten(0, 1)
            torch.testing.assert_close(part, of_tasks)


def test_the_views_are_the_image_its_flip_and_then_crops_of_both_in_turn():
    images = torch.rand(5, 3, 32, 40, dtype=torch.float64)
    views, indices = Views(images, 6, min_crop_area=0.5), torch.tensor([3, 0])
    found = views.images_of(indices).unflatten(0, (2, 6))
    assert torch.equal(found[:, 0], images[indices])
    assert torch.equal(found[:, 1], images[indices].flip(3))
    assert torch.equal(views.flips, torch.tensor([False, True] * 3))
    for row, image in enumerate(images[indices]):
        for view in range(2, 6):
            top, left, height, width = views.boxes[indices[row], view].tolist()
            assert (height + 0.5) * (width + 0.5) >= 0.5 * 32 * 40
            source = image.flip(2) if view % 2 else image
            crop = TF.resized_crop(source, top, left, height, width, (32, 40), antialias=False)
            torch.testing.assert_close(found[row, view], crop, rtol=1e-5, atol=1e-5)
    assert len(views.boxes[:, 2:].flatten(0, 1).unique(dim=0)) > 10  # each crop is another
    assert torch.equal(Views(images, 6, min_crop_area=0.5).images_of(indices), found.flatten(0, 1))
    assert torch.equal(Views(images).images_of(indices), images[indices])


def test_random_views_are_unflipped_crops_with_other_colours_drawn_by_the_generator():
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    views, indices = Views(images, normalize=lambda pixels: pixels / 255), torch.tensor([2, 2, 0])
    found = views.random_crops(indices, torch.Generator().manual_seed(3), 0.6, 0.3)
    generator = torch.Generator().manual_seed(3)
    boxes, _ = draw_augmentation(3, 32, 32, generator, 0.6)
    factors = draw_jitter(3, 0.3, generator)
    expected = augment(images[indices], boxes, torch.zeros(3, dtype=torch.bool), factors) / 255
    assert torch.equal(found, expected)
    assert not torch.equal(found[0], found[1])
