"""Prototypes, squared distances, the linear layer equal to them, the loss of an episode."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import train_protonet
from common import UserError
from common.prototypes import (
    distance_logits,
    episode_labels,
    leave_one_out,
    linear_logits,
    make_prototypes,
    mean_loss,
)

SIZES = [(5, 4, 64), (2, 1, 3), (10, 7, 1)]  # ways, shots, length of a feature
EPISODES = [(5, 4, 4), (2, 1, 3), (3, 2, 1)]  # ways, shots, queries per class


@pytest.mark.parametrize("n_way, k_shot, dim", SIZES)
def test_a_prototype_is_the_mean_of_its_class(n_way, k_shot, dim):
    features = torch.randn(n_way * k_shot, dim, dtype=torch.float64)
    prototypes = make_prototypes(features, n_way)
    assert prototypes.shape == (n_way, dim)
    for c in range(n_way):
        total = sum(features[c * k_shot + shot] for shot in range(k_shot))
        torch.testing.assert_close(prototypes[c], total / k_shot)
    maps = make_prototypes(features[:, :, None].expand(-1, -1, 2), n_way)  # of feature maps, too
    torch.testing.assert_close(maps, prototypes[:, :, None].expand(-1, -1, 2))
    labels = [c for c in range(n_way) for _ in range(k_shot)]
    assert episode_labels(n_way, k_shot).tolist() == labels


@pytest.mark.parametrize("n_way, k_shot, dim", SIZES)
def test_logits_are_minus_the_squared_distances(n_way, k_shot, dim):
    features, prototypes = torch.randn(6, dim).double(), torch.randn(n_way, dim).double()
    logits = distance_logits(features, prototypes)
    assert logits.shape == (6, n_way)
    for row, feature in enumerate(features.tolist()):
        for c, prototype in enumerate(prototypes.tolist()):
            distance = sum((a - b) ** 2 for a, b in zip(feature, prototype))
            assert logits[row, c].item() == pytest.approx(-distance, rel=1e-12)


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 80), st.floats(0.01, 3))
def test_the_head_gives_the_softmax_of_the_distances(seed, n_way, dim, scale):
    generator = torch.Generator().manual_seed(seed)
    prototypes = scale * torch.randn(n_way, dim, generator=generator)
    features = scale * torch.randn(20, dim, generator=generator)
    by_head = linear_logits(features, prototypes).softmax(dim=1)
    by_distance = distance_logits(features.double(), prototypes.double()).softmax(dim=1)
    # Float32 logits of up to a few thousand carry an error of their own, which grows with them.
    tolerance = 1e-5 * max(1.0, scale**2 * dim / 8)
    torch.testing.assert_close(by_head.double(), by_distance, rtol=0, atol=tolerance)


def episode_by_hand(features, n_way, k_shot):
    """Loss and accuracy of an episode [N*(K+Q), D], one query after another."""
    support, queries = features[: n_way * k_shot], features[n_way * k_shot :]
    of_class = [support[c * k_shot : (c + 1) * k_shot] for c in range(n_way)]
    prototypes = [sum(shots) / k_shot for shots in of_class]
    losses, right = [], 0
    for number, query in enumerate(queries):
        label = number // (len(queries) // n_way)
        squares = [sum((a - b) ** 2 for a, b in zip(query, v)) for v in prototypes]
        losses.append(squares[label] + sum((-square).exp() for square in squares).log())
        right += min(range(n_way), key=lambda c: squares[c]) == label
    return sum(losses) / len(losses), right / len(queries)


def overlapping_features(n_way, per_class):
    """Features [per_class, n_way, 4] whose classes overlap: some queries are right, some wrong."""
    centres = 0.8 * torch.randn(n_way, 4, dtype=torch.float64)
    return centres + torch.randn(per_class, n_way, 4, dtype=torch.float64)


@pytest.mark.parametrize("n_way, k_shot, n_query", EPISODES)
def test_a_protonet_step_follows_the_gradient_of_a_loop_over_its_queries(n_way, k_shot, n_query):
    drawn = overlapping_features(n_way, k_shot + n_query).split([k_shot, n_query])
    features = torch.cat([part.transpose(0, 1).flatten(0, 1) for part in drawn]).requires_grad_()
    loss, share = episode_by_hand(features, n_way, k_shot)
    expected = features.detach() - torch.autograd.grad(loss, features)[0]

    how = {"leave_one_out": False, "label_smoothing": 0.0}
    cfg = SimpleNamespace(n_way=n_way, k_shot=k_shot, n_query=n_query, **how)
    features.grad = torch.ones_like(features)  # of an earlier step: it does not count
    optimizer = torch.optim.SGD([features], lr=1.0)
    found = train_protonet.train_step(cfg, torch.nn.Identity(), optimizer, features)
    torch.testing.assert_close(features.detach(), expected)
    assert found[0].item() == pytest.approx(loss.item(), rel=1e-12)
    assert found[1].item() == pytest.approx(share, abs=1e-6)
    assert not found[0].requires_grad and not found[1].requires_grad


@pytest.mark.parametrize("n_way, k_shot, n_query", EPISODES)
def test_leave_one_out_takes_every_image_as_a_query_of_all_others(n_way, k_shot, n_query):
    drawn = overlapping_features(n_way, k_shot + n_query).split([k_shot, n_query])
    support, query = (part.transpose(0, 1) for part in drawn)  # [N, K, D], [N, Q, D]
    features = torch.cat([support, query], dim=1)
    losses = []
    for c in range(n_way):
        for number, image in enumerate(features[c]):
            prototypes = features.mean(dim=1)
            prototypes[c] = torch.cat([features[c, :number], features[c, number + 1 :]]).mean(dim=0)
            logits = distance_logits(image[None], prototypes)
            losses.append(F.cross_entropy(logits, torch.tensor([c]), label_smoothing=0.2))

    how = {"leave_one_out": True, "label_smoothing": 0.2}
    cfg = SimpleNamespace(n_way=n_way, k_shot=k_shot, n_query=n_query, **how)
    episode = torch.cat([support.flatten(0, 1), query.flatten(0, 1)]).requires_grad_()
    optimizer = torch.optim.SGD([episode], lr=0.1)
    loss, _ = train_protonet.train_step(cfg, torch.nn.Identity(), optimizer, episode)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)
    logits, labels = leave_one_out(features)
    assert logits.shape == (len(labels), n_way)
    assert labels.tolist() == episode_labels(n_way, k_shot + n_query).tolist()


@pytest.mark.parametrize("n_way, k_shot, n_query", EPISODES)
def test_the_mean_loss_of_episodes_equals_a_loop_over_them(n_way, k_shot, n_query):
    features = overlapping_features(n_way, 30).flatten(0, 1)  # image i is of class i % n_way
    episodes = []
    for _ in range(6):  # an image may be in several of them
        drawn = torch.stack([torch.randperm(30)[: k_shot + n_query] for _ in range(n_way)])
        rows = drawn * n_way + torch.arange(n_way)[:, None]
        episodes.append(torch.cat([rows[:, :k_shot].flatten(), rows[:, k_shot:].flatten()]))
    loss, share = mean_loss(features, torch.stack(episodes), n_way, k_shot)
    losses, shares = zip(*(episode_by_hand(features[rows], n_way, k_shot) for rows in episodes))
    assert loss == pytest.approx(math.fsum(losses) / 6, rel=1e-12)
    assert share == pytest.approx(sum(shares) / 6, abs=1e-6) and 0 < share < 1


def test_labels_give_the_prototypes_of_any_order_and_any_sizes():
    labels, features = torch.tensor([2, 0, 1, 0, 2, 2]), torch.randn(6, 4).double()
    found = make_prototypes(features, 3, labels)
    for c in range(3):
        torch.testing.assert_close(found[c], features[labels == c].mean(dim=0))
    with pytest.raises(UserError, match="7 support features cannot be 3 classes .* labels"):
        make_prototypes(torch.randn(7, 4), 3)
