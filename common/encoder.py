"""The DenseNet encoder, from torchvision: an image in, a feature vector out."""

import torch
from torchvision.models import DenseNet


def make_encoder(proto_dim=64, growth_rate=32, block_config=(6, 6, 6, 6), bn_size=2, num_init_features=64):
    """Return a DenseNet [B, 3, H, W] -> [B, proto_dim]; the defaults are the tutorial's, with 962,912 parameters.

    Its weights come from torch's global random number generator. Stored channels last, which convolutions on the CPU
    and on recent GPUs prefer.
    """
    encoder = DenseNet(growth_rate, tuple(block_config), num_init_features, bn_size, num_classes=proto_dim)
    return encoder.to(memory_format=torch.channels_last)


@torch.no_grad()
def encode_in_batches(encoder, images, batch_size=250):
    """Return the features [N, D] of images [N, 3, H, W] (normalised), in whatever mode the encoder is in."""
    return torch.cat([encoder(batch) for batch in images.split(batch_size)])
