"""Prototypes, squared distances and the linear layer that equals them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.prototypes import distance_logits, make_prototypes, prototype_head

SIZES = [(5, 4, 64), (2, 1, 3), (10, 7, 1), (3, 2, 640)]


@pytest.mark.parametrize("n_way, k_shot, dim", SIZES)
def test_a_prototype_is_the_mean_of_its_class(n_way, k_shot, dim):
    features = torch.randn(n_way * k_shot, dim, dtype=torch.float64)
    prototypes = make_prototypes(features, n_way)
    assert prototypes.shape == (n_way, dim)
    for c in range(n_way):
        total = [0.0] * dim
        for shot in range(k_shot):
            for d in range(dim):
                total[d] += features[c * k_shot + shot, d].item() / k_shot
        assert prototypes[c].tolist() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("n_way, k_shot, dim", SIZES)
def test_logits_are_minus_the_squared_distances(n_way, k_shot, dim):
    features, prototypes = torch.randn(6, dim, dtype=torch.float64), torch.randn(n_way, dim, dtype=torch.float64)
    logits = distance_logits(features, prototypes)
    assert logits.shape == (6, n_way)
    for row in range(6):
        for c in range(n_way):
            distance = sum((a - b) ** 2 for a, b in zip(features[row].tolist(), prototypes[c].tolist()))
            assert logits[row, c].item() == pytest.approx(-distance, rel=1e-12)


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 80), st.floats(0.01, 3))
def test_the_head_gives_the_softmax_of_the_distances(seed, n_way, dim, scale):
    generator = torch.Generator().manual_seed(seed)
    prototypes = scale * torch.randn(n_way, dim, generator=generator)
    features = scale * torch.randn(20, dim, generator=generator)
    weight, bias = prototype_head(prototypes)
    assert weight.shape == (n_way, dim) and bias.shape == (n_way,)
    by_head = torch.nn.functional.linear(features, weight, bias).softmax(dim=1)
    by_distance = distance_logits(features.double(), prototypes.double()).softmax(dim=1)
    # Float32 logits of this size (up to a few thousand) carry an error of their own; it grows with them.
    tolerance = 1e-5 * max(1.0, scale**2 * dim / 8)
    torch.testing.assert_close(by_head.double(), by_distance, rtol=0, atol=tolerance)


def test_the_head_equals_the_distances_to_1e_5_at_the_tutorials_size():
    prototypes, features = torch.randn(5, 64), torch.randn(20, 64)
    weight, bias = prototype_head(prototypes)
    by_head = torch.nn.functional.linear(features, weight, bias).softmax(dim=1)
    torch.testing.assert_close(by_head, distance_logits(features, prototypes).softmax(dim=1), rtol=0, atol=1e-5)


def test_the_softmax_of_the_distances_prefers_the_nearest_prototype():
    prototypes = torch.eye(4)
    assert distance_logits(prototypes + 0.1, prototypes).argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_gradients_flow_through_prototypes_and_head():
    features = torch.randn(6, 3, requires_grad=True)
    weight, bias = prototype_head(make_prototypes(features, 3))
    (weight.sum() + bias.sum()).backward()
    # d/df of sum(2 v) - |v|^2 with v the mean of two features: (2 - 2 v) / 2 for each of them.
    prototypes = features.detach().view(3, 2, 3).mean(dim=1)
    torch.testing.assert_close(features.grad, (1 - prototypes).repeat_interleave(2, dim=0))
