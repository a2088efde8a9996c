"""The DenseNet encoder: torchvision's layers and weights, computed in fewer operations."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torchvision.models import DenseNet

PRECISIONS = ("float32", "bfloat16")  # of the encoder's convolutions and their feature maps
INITIAL_SCALE = 4.0  # length of the feature vectors where it is learned, before training


class Encoder(DenseNet):
    """torchvision's DenseNet, [B, 3, H, W] -> [B, proto_dim]; the defaults are the tutorial's.

    With them it has 962,912 parameters, initialised from torch's global random number generator and
    stored channels last, which convolutions on the CPU and on recent GPUs prefer.

    unit_features: give every feature vector one learned length s. Between two such vectors a and b,
    -|a - b|^2 is, up to a constant, 2 s^2 times the cosine: the learned temperature of Chen et al.
    2021, "Meta-Baseline", as part of the encoder, so that all that follows stays the same.

    stem_stride: of the first convolution. With 1, all feature maps have twice the height and width,
    for about four times the work; the parameters are the same.

    precision: one of PRECISIONS, may be set at any time. In bfloat16 all up to the last pooling is
    computed with 8 significant bits, which some processors and most GPUs do faster; weights and
    features stay float32.
    """

    precision = "float32"

    def __init__(
        self,
        proto_dim=64,
        growth_rate=32,
        block_config=(6, 6, 6, 6),
        bn_size=2,
        num_init_features=64,
        unit_features=False,
        stem_stride=2,
    ):
        super().__init__(growth_rate, block_config, num_init_features, bn_size, 0, proto_dim)
        self.features.conv0.stride = (stem_stride, stem_stride)
        self.log_scale = None
        if unit_features:
            self.log_scale = torch.nn.Parameter(torch.tensor(INITIAL_SCALE).log())
        # What a checkpoint needs to build the encoder again.
        self.arguments = {
            "proto_dim": proto_dim,
            "growth_rate": growth_rate,
            "block_config": list(block_config),
            "bn_size": bn_size,
            "num_init_features": num_init_features,
            "unit_features": unit_features,
            "stem_stride": stem_stride,
        }
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        """Return the features [B, proto_dim] of images [B, 3, H, W]."""
        in_bfloat16 = self.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, in_bfloat16, cache_enabled=False):
            pooled = self.pooled_maps(images)
        features = self.classifier(pooled.to(images.dtype))
        if self.log_scale is not None:
            features = F.normalize(features) * self.log_scale.exp()
        return features

    def pooled_maps(self, images):
        """Return the means [B, C] of the last feature maps: torchvision's, with less work.

        Where a pooling and a 1x1 convolution follow each other they commute: the pooling comes
        first, and the convolution sees a quarter of the pixels.
        """
        net, blocks = self.features, len(self.arguments["block_config"])
        # Max-pool before ReLU: they commute, and ReLU then sees a quarter of the pixels.
        x = net.pool0(batch_norm(net.norm0, net.conv0(images))).relu_()
        for number in range(1, blocks + 1):
            for layer in getattr(net, f"denseblock{number}").values():
                new = conv1x1(batch_norm(layer.norm1, x).relu_(), layer.conv1.weight)
                new = conv3x3(batch_norm(layer.norm2, new).relu_(), layer.conv2.weight)
                x = torch.cat([x, new], 1)  # dense: every layer sees the output of all before it
            if number < blocks:
                transition = getattr(net, f"transition{number}")
                x = transition.pool(batch_norm(transition.norm, x).relu_())
                x = conv1x1(x, transition.conv.weight)
        return batch_norm(net.norm5, x).relu_().mean(dim=(2, 3))


def batch_norm(layer, x):
    """Apply a BatchNorm2d, except for its counter of batches, which nothing reads."""
    return F.batch_norm(
        x,
        layer.running_mean,
        layer.running_var,
        layer.weight,
        layer.bias,
        layer.training,
        layer.momentum,
        layer.eps,
    )


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


@torch.no_grad()
def with_principal_features(encoder, images):
    """Return a copy of an encoder with unit_features, in eval mode, with another last layer.

    Trained to tell its classes apart, the last layer drops what new classes would need. It is
    replaced by the principal directions of its input: those along which the unit vectors that enter
    it have the largest mean square, over images [N, 3, H, W] (normalised). Where there are fewer
    of these than features (few images, a narrow input), the other features are zero.
    """
    encoder = deepcopy(encoder).eval()
    last, encoder.classifier = encoder.classifier, torch.nn.Identity()
    # On the CPU: not every device has float64.
    inputs = F.normalize(encode_in_batches(encoder, images)).cpu().double()  # [N, C]
    directions = torch.linalg.svd(inputs, full_matrices=False).Vh[: last.out_features]  # [D, C]
    last.weight.zero_()[: len(directions)] = directions.to(last.weight)
    last.bias.zero_()
    encoder.classifier = last
    return encoder


@torch.no_grad()
def encode_in_batches(encoder, images):
    """Return the features [N, D] of images [N, 3, H, W] (normalised), in the encoder's mode."""
    return torch.cat([encoder(batch) for batch in images.split(250)])
