"""The encoders: images [B, 3, H, W] to features [B, D]."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torchvision.models import DenseNet

from common.fast_densenet import pooled_maps

INITIAL_SCALE = 4.0  # length of the feature vectors where it is learned, before training


class Encoder(DenseNet):
    """torchvision's DenseNet, [B, 3, H, W] -> [B, proto_dim]; the defaults are the tutorial's.

    With them it has 962,912 parameters, initialised from torch's global random number generator.

    unit_features: give every feature vector one learned length s. Between two such vectors a and b,
    -|a - b|^2 is, up to a constant, 2 s^2 times the cosine: the learned temperature of Chen et al.
    2021, "Meta-Baseline", as part of the encoder, so that all that follows stays the same.
    stem_stride: of the first convolution. With 1, all feature maps have twice the height and width,
    for about four times the work; the parameters are the same.
    precision: float32 or bfloat16, may be set at any time. In bfloat16 all up to the last pooling
    is computed with 8 significant bits; weights and features stay float32.
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
        # What a checkpoint needs to build the encoder again.
        arguments = {**locals(), "block_config": list(block_config)}
        del arguments["self"], arguments["__class__"]
        super().__init__(growth_rate, block_config, num_init_features, bn_size, 0, proto_dim)
        self.features.conv0.stride = (stem_stride, stem_stride)
        self.log_scale = None
        if unit_features:
            self.log_scale = torch.nn.Parameter(torch.tensor(INITIAL_SCALE).log())
        self.num_features, self.arguments = proto_dim, arguments
        self.to(memory_format=torch.channels_last)

    def to(self, *args, **kwargs):
        """Move the encoder as any module; its weights are stored as convolutions there need it."""
        super().to(*args, **kwargs)
        return super().to(memory_format=memory_format_of(next(self.parameters()).device))

    def forward(self, images):
        """Return the features [B, proto_dim] of images [B, 3, H, W]."""
        if memory_format_of(images.device) == torch.contiguous_format:
            images = images.contiguous()
        in_bfloat16 = self.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, in_bfloat16, cache_enabled=False):
            pooled = pooled_maps(self.features, images)
        features = self.classifier(pooled.to(images.dtype))
        if self.log_scale is not None:
            features = F.normalize(features) * self.log_scale.exp()
        return features


def memory_format_of(device):
    """Return how an encoder computes on a device: channels last, except on mps.

    Convolutions on the CPU and on recent GPUs prefer it. On mps, the BatchNorm of torch up to 2.12
    has wrong gradients channels last, and the pooling ends the process
    (https://github.com/pytorch/pytorch/issues/175189 and 175190).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


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
