"""The DenseNet encoder, from torchvision: an image in, a feature vector out."""

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
        self.log_scale = torch.nn.Parameter(torch.tensor(START_SCALE).log()) if unit_features else None

    def forward(self, images):
        features = super().forward(images)
        return features if self.log_scale is None else F.normalize(features) * self.log_scale.exp()


def make_encoder(proto_dim=64, growth_rate=32, block_config=(6, 6, 6, 6), bn_size=2, num_init_features=64, unit_features=False):
    """Return a new Encoder; the defaults are the tutorial's, with 962,912 parameters.

    Its weights come from torch's global random number generator. Stored channels last, which convolutions on the CPU
    and on recent GPUs prefer.
    """
    encoder = Encoder(proto_dim, growth_rate, block_config, bn_size, num_init_features, unit_features)
    return encoder.to(memory_format=torch.channels_last)


@torch.no_grad()
def encode_in_batches(encoder, images, batch_size=250):
    """Return the features [N, D] of images [N, 3, H, W] (normalised), in whatever mode the encoder is in."""
    return torch.cat([encoder(batch) for batch in images.split(batch_size)])
