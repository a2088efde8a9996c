"""The encoders by name: images [B, 3, H, W] to features [B, D]."""

import os
import runpy
import sys
from collections import OrderedDict
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, first_line
from common.fast_densenet import DenseNetFeatures
from common.files import sha256

INITIAL_SCALE = 4.0  # length of the feature vectors where it is learned, before training


def densenet(proto_dim, stem_stride=2, **sizes):
    """Return torchvision's DenseNet in two parts, the last layer apart; the tutorial's by default.

    stem_stride: of the first convolution. With 1, all feature maps have twice the height and width,
    for about four times the work; the parameters are the same. sizes: as torchvision names them.
    """
    from torchvision.models import DenseNet  # late: it is slow to load

    sizes = {"block_config": (6, 6, 6, 6), "bn_size": 2, **sizes}
    net = DenseNet(**sizes, num_classes=proto_dim or 64)
    net.features.conv0.stride = (stem_stride, stem_stride)
    return DenseNetFeatures(OrderedDict(net.features.named_children())), net.classifier


def conv4(width=64):
    """Return four blocks of convolution, BatchNorm, ReLU and max-pooling, and flattened features.

    The papers' Conv-4: Vinyals et al. 2016, Snell et al. 2017; MAML's has width 32.
    """
    channels, blocks = [3] + 4 * [width], []
    for before, after in zip(channels, channels[1:]):
        blocks += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after)]
        blocks += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten())


def resnet12(width=64):
    """Return four residual blocks of 1, 2.5, 5 and 10 times `width` channels, and their mean.

    The papers' ResNet-12, without DropBlock: Oreshkin et al. 2018, Lee et al. 2019.
    """
    channels = [3, *(round(width * factor) for factor in (1, 2.5, 5, 10))]
    blocks = [ResidualBlock(*pair) for pair in zip(channels, channels[1:])]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ResidualBlock(nn.Module):
    """Three convolutions beside one of 1x1; then max-pooling."""

    def __init__(self, before, after):
        super().__init__()
        layers = []
        for number in range(3):
            layers.append(nn.Conv2d(after if number else before, after, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*layers[:-1])
        shortcut = nn.Conv2d(before, after, 1, bias=False)
        self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(after))

    def forward(self, x):
        return F.max_pool2d(F.leaky_relu(self.layers(x) + self.shortcut(x), 0.1), 2)


class Pretrained(nn.Module):
    """torchvision:NAME or timm:NAME without its last layer, with the weights published for it.

    weights: false leaves them out. Images of another size than that of its training are scaled.
    mean, std: how it wants pixels in 0..1 normalised. What drops something at random drops nothing.
    """

    def __init__(self, name, weights):
        super().__init__()
        library, _, name = name.partition(":")
        if library == "timm":
            import timm

            self.net = timm.create_model(name, pretrained=weights, num_classes=0)
            how = timm.data.resolve_model_data_config(self.net)
            self.size, self.mean, self.std = how["input_size"][1:], how["mean"], how["std"]
        else:
            from torchvision import models

            published = models.get_model_weights(name).DEFAULT
            how, options = published.transforms(), {}
            if name in ("googlenet", "inception_v3"):  # else other ones without the weights
                options = {"aux_logits": False, "transform_input": True, "init_weights": False}
            if name.startswith("vit_"):
                options = {"image_size": how.crop_size[0]}
            net = models.get_model(name, weights=published if weights else None, **options)
            self.net, size = net, how.crop_size[0]
            self.size, self.mean, self.std = (size, size), tuple(how.mean), tuple(how.std)
            kinds = nn.Linear, nn.Conv2d  # squeezenet's last layer is a convolution
            layers = [path for path, layer in net.named_modules() if isinstance(layer, kinds)]
            parent, _, attribute = layers[-1].rpartition(".")
            setattr(net.get_submodule(parent), attribute, nn.Identity())
        for layer in self.net.modules():
            if type(layer).__name__ in ("Dropout", "StochasticDepth"):
                layer.p = 0.0
            if hasattr(layer, "drop_prob"):  # timm's DropPath
                layer.drop_prob = 0.0

    def forward(self, images):
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.net(images)


def network(name, weights, options):
    """Return a network but the DenseNet, and the options that a checkpoint needs to build it again.

    name, weights, options: as in `Encoder`. Raises whatever goes wrong.
    """
    if name in ("conv4", "resnet12"):
        return {"conv4": conv4, "resnet12": resnet12}[name](**options), options
    if unknown := options.keys() - {"file_sha256"}:
        raise ValueError(f"it has no {min(unknown)}")
    if is_pretrained(name):
        return Pretrained(name, weights), options
    path, _, class_name = name.rpartition(":")
    if not path:
        raise ValueError("there is no such network")
    if os.path.basename(path) != path:  # nor does a checkpoint from elsewhere name any file
        raise ValueError("its file has to lie in the folder that you are in")
    if options.get("file_sha256", digest := sha256(path)) != digest:
        print(f"{path} has changed since the training")
    sys.path.append(os.getcwd())  # for what it imports from this folder
    if class_name not in (defined := runpy.run_path(path)):
        raise ValueError(f"{path} defines no {class_name}")
    made = defined[class_name]()
    if not all(parameter.requires_grad for parameter in made.parameters()) or not made.state_dict():
        raise ValueError("all of its parameters have to be trained, and there has to be one")
    return made, {"file_sha256": digest}


def is_pretrained(name):
    """Return whether a name is that of a pretrained network, torchvision:NAME or timm:NAME."""
    return name.startswith(("torchvision:", "timm:"))


class Encoder(nn.Module):
    """A network by name, and what training and tests need of it: [B, 3, H, W] -> [B, D].

    proto_dim: length D of a feature vector, by a linear layer at the end. 0: that of the network's
        features; but the DenseNet always has the layer, of 64.
    unit_features: give every feature vector one learned length s. Between two such vectors a and b,
        -|a - b|^2 is, up to a constant, 2 s^2 times the cosine: the learned temperature of Chen et
        al. 2021, "Meta-Baseline", as part of the encoder, so that all that follows stays the same.
    name: densenet, conv4 or resnet12; torchvision:NAME or timm:NAME, pretrained; FILE.py:CLASS, a
        module of yours, [B, 3, H, W] -> [B, D], made without arguments.
    image_size: side of the images; weights: false leaves those of a pretrained network out.
    options: of the network: width of conv4 and resnet12, several of the DenseNet.
    precision: float32 or bfloat16, may be set at any time. In bfloat16 the network computes with 8
        significant bits; weights and features stay float32.

    Weights are drawn from torch's global random number generator; the default has 962,912. Raises
    UserError where there is no such network, or it does not give features.
    """

    precision = "float32"

    def __init__(
        self,
        proto_dim=0,
        unit_features=False,
        name="densenet",
        image_size=32,
        weights=True,
        **options,
    ):
        super().__init__()
        self.mean = self.std = None  # how it wants pixels normalised, if that is known
        try:
            if name == "densenet":
                features, last = densenet(proto_dim, **options)
                self.num_features = last.out_features
            else:
                features, options = network(name, weights, options)
                with torch.no_grad():
                    shape = features.eval()(torch.zeros(1, 3, image_size, image_size)).shape
                if len(shape) != 2:
                    raise ValueError(f"of one image it gives {list(shape)}")
                length, last = shape[1], nn.Identity()
                if proto_dim:
                    last = nn.Linear(length, proto_dim)
                self.num_features = proto_dim or length
        except Exception as error:  # a library's, a download's, of the user's code: nearly any
            raise UserError(
                f"encoder {name!r} cannot be made ({first_line(error)}); take densenet, conv4, "
                "resnet12, torchvision:NAME, timm:NAME or FILE.py:CLASS, [B, 3, H, W] -> [B, D]"
            ) from error
        if is_pretrained(name):
            self.mean, self.std = features.mean, features.std
        self.features, self.classifier = features, last
        self.contiguous = ".py:" in name  # x.view(len(x), -1) works in no other layout
        self.log_scale = None
        if unit_features:
            self.log_scale = nn.Parameter(torch.tensor(INITIAL_SCALE).log())
        # What a checkpoint needs to build the encoder again.
        known = {"proto_dim": proto_dim, "unit_features": unit_features, "name": name}
        self.arguments = {**known, **options}
        self.train().to("cpu")

    def to(self, *args, **kwargs):
        """Move the encoder as any module; its weights are stored as convolutions there need it."""
        super().to(*args, **kwargs)
        return super().to(memory_format=self.memory_format(next(self.parameters()).device))

    def memory_format(self, device):
        """Return how weights and images are stored on a device."""
        # Channels last is faster; but on mps, the BatchNorm of torch up to 2.12 then has wrong
        # gradients, and the pooling ends the process
        # (https://github.com/pytorch/pytorch/issues/175189 and 175190).
        plain = self.contiguous or device.type == "mps"
        return torch.contiguous_format if plain else torch.channels_last

    def forward(self, images):
        """Return the features [B, D] of images [B, 3, H, W]."""
        if self.memory_format(images.device) == torch.contiguous_format:
            images = images.contiguous()
        in_bfloat16 = self.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, in_bfloat16, cache_enabled=False):
            features = self.features(images)
        features = self.classifier(features.to(images.dtype))
        if self.log_scale is not None:
            features = F.normalize(features) * self.log_scale.exp()
        return features


@torch.no_grad()
def with_principal_features(encoder, images):
    """Return a copy of an encoder with unit_features, in eval mode, with another last layer.

    Trained to tell its classes apart, the last layer drops what new classes would need. It is
    replaced by the principal directions of its input: those along which the unit vectors that enter
    it have the largest mean square, over images [N, 3, H, W] (normalised). Where there are fewer
    of these than features (few images, a narrow input), the other features are zero. Without a last
    layer nothing is dropped.
    """
    encoder = deepcopy(encoder).eval()
    if isinstance(encoder.classifier, nn.Identity):
        return encoder
    last, encoder.classifier = encoder.classifier, nn.Identity()
    # On the CPU: not every device has float64.
    inputs = F.normalize(encode_in_batches(encoder, images)).cpu().double()  # [N, C]
    directions = torch.linalg.svd(inputs, full_matrices=False).Vh[: last.out_features]  # [D, C]
    last.weight.zero_()[: len(directions)] = directions.to(last.weight)
    last.bias.zero_()
    encoder.classifier = last
    return encoder


@torch.no_grad()
def encode_in_batches(encoder, images, normalize=lambda images: images):
    """Return the features [N, D] of images [N, 3, H, W], normalised, in the encoder's mode."""
    size = batch_size(images, encoder)
    starts = range(0, len(images), size)
    return torch.cat([encoder(normalize(images[start : start + size])) for start in starts])


def batch_size(images, encoder):
    """Return how many images to encode at once: 250, or fewer of more than 64x64 pixels."""
    height, width = getattr(encoder.features, "size", images.shape[2:])
    return max(1, min(250, 2**20 // (height * width)))
