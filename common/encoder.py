"""The DenseNet encoder: torchvision's layers and weights, run through in fewer operations."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torchvision.models import DenseNet

LARGEST_DIM = 4096  # of a feature vector; more would not fit beside the rest of the network
START_SCALE = 4.0  # length of the feature vectors where it is learned, at the start of training


class Encoder(DenseNet):
    """torchvision's DenseNet, [B, 3, H, W] -> [B, proto_dim]; with `unit_features` every output has one learned length.

    A softmax over distances of vectors of length s is one over cosines with temperature 1 / (2 s^2): the learned
    temperature of Chen et al. 2021, "Meta-Baseline", within the encoder, so that all that follows stays the same.
    """

    def __init__(self, proto_dim, growth_rate, block_config, bn_size, num_init_features, unit_features):
        super().__init__(growth_rate, tuple(block_config), num_init_features, bn_size, num_classes=proto_dim)
        self.blocks = len(block_config)
        self.log_scale = torch.nn.Parameter(torch.tensor(START_SCALE).log()) if unit_features else None

    def forward(self, images):
        """What torchvision computes, up to rounding, for a good part of the work: linear steps change places with means."""
        net = self.features
        x = net.pool0(norm(net.norm0, net.conv0(images))).relu_()  # the largest first: there are fewer to cut off then
        for number in range(1, self.blocks + 1):
            for layer in getattr(net, f"denseblock{number}").values():
                added = pointwise(norm(layer.norm1, x).relu_(), layer.conv1.weight)
                added = conv3x3(norm(layer.norm2, added).relu_(), layer.conv2.weight)
                x = torch.cat([x, added], 1)  # what came before stays: dense
            if number < self.blocks:
                transition = getattr(net, f"transition{number}")
                x = transition.pool(norm(transition.norm, x).relu_())  # before the convolution, on a quarter of its pixels
                x = pointwise(x, transition.conv.weight)
        features = self.classifier(norm(net.norm5, x).relu_().mean(dim=(2, 3)))  # [B, proto_dim]
        return features if self.log_scale is None else F.normalize(features) * self.log_scale.exp()


def norm(layer, x):
    """Apply a BatchNorm2d as it would itself, but for its counter of batches, which nothing reads: it stays as it is."""
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training, layer.momentum, layer.eps)


def pointwise(x, weight):
    """Convolve x [B, C, H, W] with weight [D, C, 1, 1]: a matrix product, which on the CPU is faster than a convolution."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)


def conv3x3(x, weight):
    """Convolve x [B, C, H, W] with weight [D, C, 3, 3], with a border of zeros, so that its size stays.

    On the CPU the last blocks' images of 2x2 pixels and of one spend most of that time on the border. There every pixel
    of the result sees every pixel of the image, each through a tap of its own: a matrix product again.
    """
    height, width = x.shape[2:]
    if x.device.type != "cpu" or max(height, width) > 2:
        return F.conv2d(x, weight, padding=1)
    weight = weight.permute(0, 2, 3, 1)  # [D, 3, 3, C]
    taps = torch.stack([weight[:, 1 - i : 1 - i + height, 1 - j : 1 - j + width] for i in range(height) for j in range(width)])
    x = F.linear(x.permute(0, 2, 3, 1).flatten(1), taps.flatten(2).flatten(0, 1))  # [B, H*W*C] -> [B, H*W*D]
    return x.view(-1, height, width, len(weight)).permute(0, 3, 1, 2)


def make_encoder(proto_dim=64, growth_rate=32, block_config=(6, 6, 6, 6), bn_size=2, num_init_features=64, unit_features=False):
    """Return a new Encoder; the defaults are the tutorial's, with 962,912 parameters.

    Its weights come from torch's global random number generator. Stored channels last, which convolutions on the CPU
    and on recent GPUs prefer.
    """
    encoder = Encoder(proto_dim, growth_rate, block_config, bn_size, num_init_features, unit_features)
    return encoder.to(memory_format=torch.channels_last)


@torch.no_grad()
def with_principal_features(encoder, images):
    """Return a copy, in eval mode, whose last layer keeps the principal directions of what comes before it.

    Trained to tell classes apart, the last layer drops what these do not need and new ones may. The directions are those
    along which the unit vectors before it are longest in square mean, over images [N, 3, H, W] (normalised); where the
    layer is wider than its input the rest is zero. For encoders with unit_features.
    """
    encoder = deepcopy(encoder).eval()
    last, encoder.classifier = encoder.classifier, torch.nn.Identity()
    inputs = F.normalize(encode_in_batches(encoder, images)).cpu().double()  # [N, C]; not every device has float64
    directions = torch.linalg.svd(inputs, full_matrices=False).Vh[: last.out_features]  # [D, C]
    last.weight.zero_()[: len(directions)] = directions.to(last.weight)
    last.bias.zero_()
    encoder.classifier = last
    return encoder


@torch.no_grad()
def encode_in_batches(encoder, images, batch_size=250, mirror=False):
    """Return the features [N, D] of images [N, 3, H, W] (normalised), in whatever mode the encoder is in.

    mirror: the mean of the features of an image and of its mirror image.
    """
    if mirror:
        return torch.cat([encoder(with_mirror_images(batch)).unflatten(0, (-1, 2)).mean(dim=1) for batch in images.split(batch_size)])
    return torch.cat([encoder(batch) for batch in images.split(batch_size)])


def with_mirror_images(images):
    """Return images [N, 3, H, W] as [2 N, 3, H, W], each followed by its mirror image."""
    return torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)
