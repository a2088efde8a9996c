"""The augmentation: torchvision's pixels for the same random numbers; numbers in their ranges."""

import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from common.augment import (
    LEAST_VIEW,
    EpochBatches,
    Views,
    augment,
    draw_augmentation,
    draw_jitter,
    jitter_colors,
)


def drawn(count, height=32, width=32, seed=0, **options):
    return draw_augmentation(count, height, width, torch.Generator().manual_seed(seed), **options)


def one_by_one_with_torchvision(images, boxes, flips):
    size = list(images.shape[2:])
    results = []
    for image, box, flip in zip(images.float(), boxes.tolist(), flips.tolist()):
        if flip:
            image = TF.hflip(image)
        bilinear = InterpolationMode.BILINEAR
        results.append(TF.resized_crop(image, *box, size, bilinear, antialias=True))
    return torch.stack(results)


@pytest.mark.parametrize("height, width", [(32, 32), (40, 40), (29, 29), (32, 48), (48, 32)])
def test_the_pixels_are_torchvisions(height, width):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (60, 3, height, width), generator=generator, dtype=torch.uint8)
    boxes, flips = drawn(60, height, width)
    found = augment(images, boxes, flips)
    assert found.shape == images.shape and found.dtype == torch.float32
    expected = one_by_one_with_torchvision(images, boxes, flips)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_every_box_and_both_flips_give_torchvisions_pixels():
    # Corners, whole image, narrow and low boxes: each flipped and not.
    boxes = [
        [0, 0, 32, 32],
        [0, 0, 28, 30],
        [4, 2, 28, 30],
        [3, 0, 29, 32],
        [0, 5, 32, 27],
        [1, 1, 30, 30],
        [7, 7, 1, 1],
    ]
    boxes = torch.tensor(boxes * 2)
    flips = torch.arange(14) < 7
    images = torch.randint(256, (14, 3, 32, 32), dtype=torch.uint8)
    expected = one_by_one_with_torchvision(images, boxes, flips)
    torch.testing.assert_close(augment(images, boxes, flips), expected, rtol=0, atol=1e-3)


def test_the_whole_image_unflipped_comes_back_unchanged():
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 32, 32]] * 3)
    no, yes = torch.tensor([False] * 3), torch.tensor([True] * 3)
    assert torch.equal(augment(images, boxes, no), images.float())
    assert torch.equal(augment(images, boxes, yes), images.float().flip(3))


def test_the_memory_layout_of_the_images_does_not_matter():
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    boxes, flips = drawn(8)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(images, boxes, flips), augment(channels_last, boxes, flips))


def test_pixels_stay_between_0_and_255_and_the_input_is_left_alone():
    images = torch.randint(2, (50, 3, 32, 32), dtype=torch.uint8) * 255
    before = images.clone()
    found = augment(images, *drawn(50))
    assert found.min() >= 0 and found.max() <= 255 + 1e-3
    assert torch.equal(images, before)


def test_boxes_lie_within_the_image_and_have_the_asked_area_and_shape():
    boxes, _ = drawn(20_000)
    top, left, height, width = boxes.T
    assert boxes.dtype == torch.int64 and boxes.shape == (20_000, 4)
    assert (top >= 0).all() and (top + height <= 32).all()
    assert (left >= 0).all() and (left + width <= 32).all()
    # Heights and widths are rounded to whole pixels: half a pixel of tolerance on either.
    low, high = (height - 0.5) * (width - 0.5), (height + 0.5) * (width + 0.5)
    assert (high >= 0.8 * 1024).all() and (low <= 1024).all()
    assert ((width + 0.5) / (height - 0.5) >= 0.9).all()
    assert ((width - 0.5) / (height + 0.5) <= 1.1).all()


def test_boxes_reach_every_size_and_every_edge():
    top, left, height, width = drawn(20_000)[0].T
    # The smallest by hand: sqrt(0.8 * 1024 / 1.1) = 27.3, sqrt(0.8 * 1024 * 0.9) = 27.2.
    assert height.unique().tolist() == width.unique().tolist() == [27, 28, 29, 30, 31, 32]
    assert top.unique().tolist() == left.unique().tolist() == [0, 1, 2, 3, 4, 5]
    for size in range(28, 33):
        offsets = top[height == size]
        assert offsets.unique().tolist() == list(range(33 - size))
        expected = len(offsets) / (33 - size)
        assert (torch.bincount(offsets) - expected).abs().max() < 6 * expected**0.5 + 1


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
    assert flips.dtype == torch.bool and flips.shape == (20_000,)
    assert abs(flips.float().mean().item() - 0.5) < 4 * 0.5 / 20_000**0.5
    top = boxes[:, 0].float()
    difference = top[flips].mean() - top[~flips].mean()
    assert abs(difference.item()) < 4 * top.std().item() * 2 / 20_000**0.5


def test_smaller_crops_can_be_asked_for():
    height, width = drawn(5_000, least_crop=0.3)[0][:, 2:].T
    area = (height * width).float() / 1024
    assert 0.25 < area.min() < 0.35 and area.max() == 1


def test_the_same_generator_state_draws_the_same_and_global_numbers_stay():
    state = torch.get_rng_state()
    first, again, other = drawn(100), drawn(100), drawn(100, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_jitter_equals_torchvisions_brightness_then_contrast_then_saturation():
    images = torch.randint(256, (30, 3, 32, 32), generator=torch.Generator().manual_seed(2)).float()
    factors = draw_jitter(30, 0.4, torch.Generator().manual_seed(3))
    found = jitter_colors(images, factors)
    for image, of_image, result in zip(images / 255, factors.tolist(), found):
        brightness, contrast, saturation = of_image
        expected = TF.adjust_contrast(TF.adjust_brightness(image, brightness), contrast)
        expected = TF.adjust_saturation(expected, saturation)
        torch.testing.assert_close(result, 255 * expected, rtol=0, atol=0.03)


def test_jitter_factors_are_spread_over_their_range():
    factors = draw_jitter(5_000, 0.4, torch.Generator().manual_seed(0))
    assert factors.shape == (5_000, 3)
    assert (factors.min(dim=0).values < 0.61).all() and (factors.max(dim=0).values > 1.39).all()
    assert factors.min() >= 0.6 and factors.max() <= 1.4
    assert ((factors.mean(dim=0) - 1).abs() < 0.02).all()


def test_factors_of_one_leave_the_colours_alone():
    images = torch.randint(256, (4, 3, 32, 32)).float()
    torch.testing.assert_close(jitter_colors(images, torch.ones(4, 3)), images, rtol=0, atol=1e-3)


TASKS = torch.arange(24).flip(0).view(3, 4, 2)  # of 3 steps, 4 tasks of 2 images each


def epoch(color_jitter):
    """What 3 steps of 4 tasks of 2 images take, and the state of the generator after the draws."""
    images, generator = torch.zeros(24, 3, 32, 40), torch.Generator().manual_seed(5)
    batches = EpochBatches(TASKS, images, generator, 0.5, color_jitter)
    assert len(batches) == 3
    return [batches.of(step) for step in range(3)], generator.get_state()


def test_each_step_of_an_epoch_takes_the_draws_of_its_images():
    generator = torch.Generator().manual_seed(5)
    boxes, flips = draw_augmentation(24, 32, 40, generator, 0.5)
    expected = TASKS.flatten(), boxes, flips, draw_jitter(24, 0.3, generator)
    steps, _ = epoch(color_jitter=0.3)
    for found, drawn in zip(zip(*steps), expected, strict=True):
        assert all(len(of_step) == 8 for of_step in found)
        assert torch.equal(torch.cat(found), drawn)


def test_of_two_processes_each_takes_every_second_task_with_its_draws(monkeypatch):
    alone, _ = epoch(color_jitter=0.3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        shares, _ = epoch(color_jitter=0.3)
        for whole, own in zip(alone, shares, strict=True):
            for numbers, part in zip(whole, own, strict=True):
                by_task = numbers.view(4, 2, *numbers.shape[1:])
                assert torch.equal(part, by_task[rank::2].flatten(0, 1))


def test_without_jitter_an_epoch_draws_the_same_but_gives_out_no_factors():
    jittered, state = epoch(color_jitter=0.3)
    plain, other_state = epoch(color_jitter=0.0)
    assert torch.equal(state, other_state)
    for found, (*expected, _) in zip(plain, jittered, strict=True):
        assert all(map(torch.equal, found, expected)) and len(found) == len(expected)


def test_the_views_are_the_image_its_flip_and_then_crops_of_both_in_turn():
    images = torch.rand(5, 3, 32, 40, dtype=torch.float64)
    views, indices = Views(images, 6), torch.tensor([3, 0])
    found = views.of(indices).unflatten(0, (2, 6))
    assert torch.equal(found[:, 0], images[indices])
    assert torch.equal(found[:, 1], images[indices].flip(3))
    assert torch.equal(views.flips, torch.tensor([False, True] * 3))
    for row, image in enumerate(images[indices]):
        for view in range(2, 6):
            top, left, height, width = views.boxes[indices[row], view].tolist()
            assert (height + 0.5) * (width + 0.5) >= LEAST_VIEW * 32 * 40
            source = image.flip(2) if view % 2 else image
            crop = TF.resized_crop(source, top, left, height, width, (32, 40), antialias=False)
            torch.testing.assert_close(found[row, view], crop, rtol=1e-5, atol=1e-5)
    assert len(views.boxes[:, 2:].flatten(0, 1).unique(dim=0)) > 10  # each crop is another


def test_the_views_are_the_same_each_time_and_of_one_view_just_the_images():
    images = torch.rand(4, 3, 32, 32)
    everything = torch.arange(4)
    assert torch.equal(Views(images, 5).of(everything), Views(images, 5).of(everything))
    assert torch.equal(Views(images).of(everything), images)


def test_random_views_are_unflipped_crops_with_other_colours_drawn_by_the_generator():
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    views, indices = Views(images, normalize=lambda pixels: pixels / 255), torch.tensor([2, 2, 0])
    found = views.random(indices, torch.Generator().manual_seed(3), 0.6, 0.3)
    generator = torch.Generator().manual_seed(3)
    boxes, _ = draw_augmentation(3, 32, 32, generator, 0.6)
    factors = draw_jitter(3, 0.3, generator)
    expected = augment(images[indices], boxes, torch.zeros(3, dtype=torch.bool), factors) / 255
    assert torch.equal(found, expected)
    assert not torch.equal(found[0], found[1])
