"""The encoder: its size, its outputs, where its weights come from."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import DenseNet

from common import fast_densenet
from common.data import SMALLEST_IMAGE
from common.encoders import Encoder, encode_in_batches, with_principal_features
from common.fast_densenet import conv1x1, conv3x3

SMALL = {"proto_dim": 8, "growth_rate": 4, "block_config": (1, 2, 1, 1), "num_init_features": 8}


def test_the_default_encoder_has_the_tutorials_number_of_parameters():
    encoder = Encoder().eval()
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 962_912
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 64) == (2, encoder.num_features)


def test_the_smallest_image_that_data_sets_may_hold_is_the_smallest_that_fits():
    for name in ("densenet", "resnet12", "conv4"):
        options = SMALL if name == "densenet" else {"name": name, "width": 4}
        encoder = Encoder(image_size=SMALLEST_IMAGE, **options).eval()
        assert len(encoder(torch.randn(2, 3, SMALLEST_IMAGE, SMALLEST_IMAGE))) == 2
    with pytest.raises(RuntimeError):
        encoder(torch.randn(2, 3, SMALLEST_IMAGE - 1, SMALLEST_IMAGE))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (29, 29), (33, 64), (128, 40)], ids=str)
@pytest.mark.parametrize("stem_stride", [2, 1])
def test_it_computes_what_torchvisions_densenet_does(stem_stride, size, training):
    # With the same names in its state, too: the author's checkpoint holds exactly these.
    sizes = {"growth_rate": 4, "block_config": (1, 2, 1, 1), "bn_size": 2, "num_init_features": 8}
    plain = DenseNet(**sizes, num_classes=8).double().train(training)
    plain.features.conv0.stride = stem_stride
    encoder = Encoder(**SMALL, stem_stride=stem_stride).double().train(training)
    encoder.load_state_dict(plain.state_dict())
    images = torch.randn(5, 3, *size, dtype=torch.float64)
    direction = torch.randn(5, 8, dtype=torch.float64)
    outputs = [model(images) for model in (encoder, plain)]
    torch.testing.assert_close(*outputs)
    gradients = [
        torch.autograd.grad((output * direction).sum(), list(model.parameters()))
        for model, output in zip((encoder, plain), outputs)
    ]
    scale = max(gradient.abs().max() for gradient in gradients[1])
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * scale.item())
    for (name, found), expected in zip(encoder.named_buffers(), plain.buffers()):
        assert "num_batches" in name or torch.allclose(found, expected), name


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (4, 4)])
def test_convolutions_equal_torchs_however_small_the_image(height, width, layout):
    x = torch.randn(3, 5, height, width, dtype=torch.float64).contiguous(memory_format=layout)
    for convolve, size in ((conv3x3, 3), (conv1x1, 1)):
        weight = torch.randn(4, 5, size, size, dtype=torch.float64).contiguous(memory_format=layout)
        torch.testing.assert_close(convolve(x, weight), F.conv2d(x, weight, padding=size // 2))


@pytest.mark.parametrize("count", [1, 250, 251, 520])  # 250 images make a batch
def test_encoding_in_batches_equals_encoding_at_once(count):
    encoder = Encoder(**SMALL).eval().double()
    images = torch.randn(count, 3, 32, 32, dtype=torch.float64)
    features = encode_in_batches(encoder, images)
    assert not features.requires_grad
    torch.testing.assert_close(features, encoder(images).detach(), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("proto_dim", [3, 40])  # fewer and more than the layer before has
def test_principal_features_keep_what_any_projection_of_that_size_can(proto_dim):
    torch.manual_seed(0)
    encoder = Encoder(**{**SMALL, "proto_dim": proto_dim}, unit_features=True).train()
    images, before = torch.randn(50, 3, 32, 32), deepcopy(encoder.state_dict())
    found = with_principal_features(encoder, images)
    assert encoder.training and not found.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())

    plain = deepcopy(encoder).eval()
    plain.classifier = torch.nn.Identity()
    inputs = F.normalize(plain(images))  # [50, C]
    kept, bias = inputs @ found.classifier.weight.T, found.classifier.bias
    assert found.classifier.weight.shape == encoder.classifier.weight.shape and not bias.any()
    torch.testing.assert_close(found(images), F.normalize(kept) * encoder.log_scale.exp())
    # Eckart and Young: what is lost of the sum of squares is that of the singular values left out.
    left = torch.linalg.svdvals(inputs.double())[proto_dim:].square().sum().item()
    assert (inputs.square().sum() - kept.square().sum()).item() == pytest.approx(left, abs=1e-3)


@torch.no_grad()
def test_unit_features_all_have_one_length_and_the_plain_direction():
    torch.manual_seed(0)
    plain = Encoder(**SMALL).eval()
    unit = Encoder(**SMALL, unit_features=True).eval()
    unit.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(6, 3, 32, 32)
    lengths = unit(images).norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(6))
    torch.testing.assert_close(torch.cosine_similarity(unit(images), plain(images)), torch.ones(6))
    assert set(dict(unit.named_parameters())) - set(dict(plain.named_parameters())) == {"log_scale"}
    torch.testing.assert_close(lengths[0], unit.log_scale.exp())  # the length is learned


def test_weights_are_stored_channels_last():
    for name, parameter in Encoder(**SMALL, unit_features=True).named_parameters():
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name


def test_on_mps_the_encoder_computes_channels_first(monkeypatch):
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    encoder = Encoder(**SMALL).eval()
    expected, pooled_maps = encoder(images), fast_densenet.pooled_maps

    def checked(features, images):
        for tensor in (images, *features.parameters()):
            assert tensor.dim() < 4 or tensor.is_contiguous()
        return pooled_maps(features, images)

    layout = encoder.memory_format(torch.device("mps"))
    monkeypatch.setattr(Encoder, "memory_format", lambda encoder, device: layout)
    monkeypatch.setattr(fast_densenet, "pooled_maps", checked)
    torch.testing.assert_close(encoder.to("cpu")(images), expected)


def test_bfloat16_changes_features_little_and_leaves_weights_and_gradients_in_float32():
    torch.manual_seed(0)
    encoder = Encoder(unit_features=True).eval()
    images = torch.randn(6, 3, 32, 32)
    expected = encoder(images)
    encoder.precision = "bfloat16"
    copied = deepcopy(encoder)
    found = copied(images)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    # Eight significant bits in some thirty layers.
    assert (found - expected).norm() < 0.02 * expected.norm()
    found.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in copied.parameters())
    assert not torch.is_autocast_enabled("cpu")
    encoder.precision = "float32"
    assert torch.equal(encoder(images), expected)
