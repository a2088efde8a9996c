"""The training augmentation, for a whole batch on its device; the views of an image in a test.

It does what torchvision's RandomHorizontalFlip, RandomResizedCrop(size, scale=(min_crop_area, 1),
ratio=(0.9, 1.1)) and, if wanted, ColorJitter (brightness, contrast, saturation, in this order) do
to one image after another; where no crop fits, in images far from square, it takes the whole image.
The random numbers are drawn apart from their use, on the CPU, so that every machine draws the same.
"""

import math

import torch

RATIO = (0.9, 1.1)  # width of the crop over its height
ATTEMPTS = 10  # crops drawn until one fits into the image, as in torchvision


class AugmentedBatches:
    """The images of each step of an epoch: randomly cropped, flipped and coloured, normalised.

    Iterating yields float32 [B, 3, H, W] per step, on the device of the images of `data`, the
    TrainingData. indices: of training images, int64 [steps, B] or [steps, T, M]: T tasks of M
    images. min_crop_area: area of the smallest crop, as a share of the image. color_jitter: see
    `draw_jitter`. own: the slice of the images or tasks that this process computes; all processes
    draw the same numbers, those of an epoch at once. size: side of what is yielded; 0: as it is.
    """

    def __init__(
        self, data, indices, generator, min_crop_area=0.8, color_jitter=0.0, own=slice(None), size=0
    ):
        self.data, self.images, count, self.size = data, data.train.images, indices.numel(), size
        boxes, flips = draw_augmentation(count, *self.images.shape[2:], generator, min_crop_area)
        # Drawn even where it is not used: the episodes of a seed do not depend on this option.
        factors = draw_jitter(count, color_jitter, generator)
        drawn = [indices.flatten(), boxes, flips, *([factors] if color_jitter else [])]
        self.drawn = []  # [steps, B, ...] each
        for numbers in drawn:
            numbers = numbers.view(*indices.shape, *numbers.shape[1:])[:, own]
            self.drawn.append(numbers.flatten(1, indices.ndim - 1).to(self.images.device))

    def __len__(self):
        return len(self.drawn[0])

    def __iter__(self):
        # On a GPU many steps at once, since starting an operation takes longer than the operation.
        size = self.drawn[0].shape[1]
        pixels = size * self.images.shape[2:].numel()  # of a step
        at_once = 1 if self.images.device.type == "cpu" else max(1, 2**22 // pixels)
        for chunk in zip(*(numbers.split(at_once) for numbers in self.drawn)):
            indices, *views = (numbers.flatten(0, 1) for numbers in chunk)
            images = augment(self.images[indices], *views, size=self.size)
            yield from self.data.normalize(images).split(size)


class Views:
    """Several views of each image, whose mean a test takes (Bendou et al. 2022, "EASY").

    The first is the image itself, the second its horizontal flip; then follow random crops of the
    one and the other in turn, down to the share min_crop_area of the image. images [N, 3, H, W];
    count: views of each; normalize: what is done to a batch of views last. The same numbers draw
    the same crops.
    """

    def __init__(self, images, count=1, normalize=lambda images: images, min_crop_area=0.7):
        self.images, self.count, self.normalize = images, count, normalize
        if count > 1:
            size, generator = images.shape[2:], torch.Generator().manual_seed(0)
            boxes, _ = draw_augmentation(len(images) * count, *size, generator, min_crop_area)
            boxes = boxes.view(-1, count, 4)
            boxes[:, :2] = torch.tensor([0, 0, *size])
            self.boxes = boxes.to(images.device)
            self.flips = (torch.arange(count) % 2 == 1).to(images.device)

    def images_of(self, indices):
        """Return all views of the images of int64 [B], as [B * count, 3, H, W], image by image."""
        images = self.images[indices]
        if self.count > 1:
            boxes, flips = self.boxes[indices].flatten(0, 1), self.flips.repeat(len(images))
            images = augment(images.repeat_interleave(self.count, dim=0), boxes, flips)
        return self.normalize(images)

    def random_crops(self, indices, generator, min_crop_area, color_jitter):
        """Return a random crop, its colours changed, of each image, [B, 3, H, W]; no flips.

        min_crop_area and color_jitter are those of `draw_augmentation` and `draw_jitter`.
        """
        images = self.images[indices]
        boxes, flips = draw_augmentation(len(images), *images.shape[2:], generator, min_crop_area)
        factors = draw_jitter(len(images), color_jitter, generator)
        drawn = (numbers.to(images.device) for numbers in (boxes, torch.zeros_like(flips), factors))
        return self.normalize(augment(images, *drawn))


def draw_augmentation(count, height, width, generator, min_crop_area=0.8):
    """Draw crop boxes and flips for `count` images of `height` x `width` pixels.

    min_crop_area: of the smallest crop, as a share of the image. Returns boxes int64 [count, 4] =
    (top, left, height, width), in pixels, and flips bool [count].
    """
    uniform = torch.rand(2, count, ATTEMPTS, generator=generator)
    area = height * width * (min_crop_area + uniform[0] * (1 - min_crop_area))
    ratio = torch.exp(math.log(RATIO[0]) + uniform[1] * math.log(RATIO[1] / RATIO[0]))
    crop_height = (area / ratio).sqrt().round().long()  # [count, ATTEMPTS]
    crop_width = (area * ratio).sqrt().round().long()
    fits = (crop_height <= height) & (crop_width <= width)
    first = fits.int().argmax(dim=1, keepdim=True)  # the first crop that fits, if any does
    any_fits = fits.any(dim=1)
    crop_height = torch.where(any_fits, crop_height.gather(1, first)[:, 0], height)  # [count]
    crop_width = torch.where(any_fits, crop_width.gather(1, first)[:, 0], width)
    offset = torch.rand(2, count, generator=generator)
    top = (offset[0] * (height - crop_height + 1)).long()
    left = (offset[1] * (width - crop_width + 1)).long()
    flips = torch.rand(count, generator=generator) < 0.5
    return torch.stack([top, left, crop_height, crop_width], dim=1), flips


def augment(images, boxes, flips, factors=None, size=0):
    """Flip images horizontally, crop, resize to full size or `size`, change the colours.

    images [B, 3, H, W] in 0..255, boxes int64 [B, 4], flips bool [B], factors [B, 3] or None ->
    [B, 3, H, W] or [B, 3, size, size] in floating point. The interpolation is bilinear and, as in
    torchvision, sees nothing outside the crop.
    """
    images = images if images.is_floating_point() else images.float()
    height, width = images.shape[2:]
    rows = _interpolation(boxes[:, 0], boxes[:, 2], height, size or height)  # [B, size, H]
    columns = _interpolation(boxes[:, 1], boxes[:, 3], width, size or width)  # [B, size, W]
    rows, columns = rows.to(images.dtype), columns.to(images.dtype)
    # The crop is taken from the flipped image, whose column w is column W-1-w of the original.
    columns = torch.where(flips[:, None, None], columns.flip(2), columns)
    # Bilinear interpolation is linear in each direction: two matrix products for the whole batch.
    augmented = rows[:, None] @ images @ columns[:, None].transpose(2, 3)
    augmented = augmented.contiguous(memory_format=torch.channels_last)
    return augmented if factors is None else jitter_colors(augmented, factors)


def draw_jitter(count, strength, generator):
    """Draw factors of a colour change, float32 [count, 3], within 1 - strength .. 1 + strength."""
    return 1 + strength * (2 * torch.rand(count, 3, generator=generator) - 1)


def jitter_colors(images, factors):
    """Change brightness, contrast, saturation of images [B, 3, H, W] in 0..255 by factors [B, 3].

    As in torchvision, contrast blends with the mean grey of the image, saturation with the grey of
    each pixel.
    """
    brightness, contrast, saturation = factors.T[:, :, None, None, None]
    images = (images * brightness).clamp(0, 255)
    mean_grey = _grey(images).mean(dim=(2, 3), keepdim=True)
    images = (mean_grey + contrast * (images - mean_grey)).clamp(0, 255)
    grey = _grey(images)
    return (grey + saturation * (images - grey)).clamp(0, 255)


def _grey(images):
    red, green, blue = images.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]  # Rec. 601, as in torchvision


def _interpolation(start, length, size, new_size):
    """Return [B, new_size, size]: row i holds the weights of all input pixels in output pixel i."""
    pixels = torch.arange(size, device=start.device, dtype=torch.float32)
    places = torch.arange(new_size, device=start.device, dtype=torch.float32)
    start, length = start[:, None].float(), length[:, None].float()
    # The centre of each output pixel, in input pixels.
    source = start + (places + 0.5) * length / new_size - 0.5
    source = torch.minimum(torch.maximum(source, start), start + length - 1)
    return (1 - (source[:, :, None] - pixels).abs()).clamp(min=0)
