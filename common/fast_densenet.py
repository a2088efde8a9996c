"""torchvision's DenseNet with the same result in fewer operations."""

import torch
import torch.nn.functional as F
from torch import nn


class DenseNetFeatures(nn.Sequential):
    """The `features` of torchvision's DenseNet and their mean: [B, 3, H, W] -> [B, C]."""

    def forward(self, images):
        return pooled_maps(self, images)


def pooled_maps(net, images):
    """Return the means [B, C] of a DenseNet's last feature maps for images [B, 3, H, W].

    net: the `features` of torchvision's DenseNet. Where a pooling and a 1x1 convolution follow each
    other they commute: the pooling comes first, and the convolution sees a quarter of the pixels.
    """
    blocks = sum(name.startswith("denseblock") for name, _ in net.named_children())
    # Max-pool before ReLU: they commute, and ReLU then sees a quarter of the pixels.
    x = net.pool0(batch_norm(net.norm0, net.conv0(images))).relu_()
    for number in range(1, blocks + 1):
        for layer in getattr(net, f"denseblock{number}").values():
            new = conv1x1(batch_norm(layer.norm1, x).relu_(), layer.conv1.weight)
            new = conv3x3(batch_norm(layer.norm2, new).relu_(), layer.conv2.weight)
            x = torch.cat([x, new], 1)  # dense: every layer sees the output of all before it
        if number < blocks:
            transition = getattr(net, f"transition{number}")
            x = batch_norm(transition.norm, x).relu_()
            if min(x.shape[2:]) > 1:  # small images: one pixel cannot be halved
                x = transition.pool(x)
            x = conv1x1(x, transition.conv.weight)
    return batch_norm(net.norm5, x).relu_().mean(dim=(2, 3))


def batch_norm(layer, x):
    """Apply a BatchNorm2d, except for its counter of batches, which nothing reads."""
    tensors = layer.running_mean, layer.running_var, layer.weight, layer.bias
    return F.batch_norm(x, *tensors, layer.training, layer.momentum, layer.eps)


def conv1x1(x, weight):
    """Convolve x [B, C, H, W] with weight [D, C, 1, 1].

    As a matrix product, which on the CPU is faster than a convolution.
    """
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)


def conv3x3(x, weight):
    """Convolve x [B, C, H, W] with weight [D, C, 3, 3], zero-padded so that its size stays.

    In the last two blocks the feature maps are 2x2 and 1x1, where a convolution on the CPU spends
    most of its time on the padding. There every output pixel sees every input pixel through one tap
    of the kernel: a matrix product again.
    """
    height, width = x.shape[2:]
    if x.device.type != "cpu" or max(height, width) > 2:
        return F.conv2d(x, weight, padding=1)
    weight = weight.permute(0, 2, 3, 1)  # [D, 3, 3, C]
    pixels = [(i, j) for i in range(height) for j in range(width)]
    taps = torch.stack(
        [weight[:, 1 - i : 1 - i + height, 1 - j : 1 - j + width] for i, j in pixels]
    )
    taps = taps.flatten(2).flatten(0, 1)  # [H*W*D, H*W*C]
    x = F.linear(x.permute(0, 2, 3, 1).flatten(1), taps)  # [B, H*W*C] -> [B, H*W*D]
    return x.view(-1, height, width, len(weight)).permute(0, 3, 1, 2)
