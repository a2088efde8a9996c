"""Prototypes, squared distances, the linear layer equal to them, the loss of an episode."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_protonet
from common.prototypes import (
    accuracy,
    distance_logits,
    episode_loss,
    make_prototypes,
    mean_episode_loss,
    prototype_head,
)

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
    features, prototypes = (
        torch.randn(6, dim, dtype=torch.float64),
        torch.randn(n_way, dim, dtype=torch.float64),
    )
    logits = distance_logits(features, prototypes)
    assert logits.shape == (6, n_way)
    for row in range(6):
        for c in range(n_way):
            distance = sum(
                (a - b) ** 2 for a, b in zip(features[row].tolist(), prototypes[c].tolist())
            )
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
    # Float32 logits of up to a few thousand carry an error of their own, which grows with them.
    tolerance = 1e-5 * max(1.0, scale**2 * dim / 8)
    torch.testing.assert_close(by_head.double(), by_distance, rtol=0, atol=tolerance)


def test_the_head_equals_the_distances_to_1e_5_at_the_tutorials_size():
    prototypes, features = torch.randn(5, 64), torch.randn(20, 64)
    weight, bias = prototype_head(prototypes)
    by_head = torch.nn.functional.linear(features, weight, bias).softmax(dim=1)
    torch.testing.assert_close(
        by_head, distance_logits(features, prototypes).softmax(dim=1), rtol=0, atol=1e-5
    )


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


def episode_by_hand(rows, n_way, k_shot):
    """Loss and accuracy of an episode, from lists of numbers, one query after another."""
    support, queries = rows[: n_way * k_shot], rows[n_way * k_shot :]
    of_class = [support[c * k_shot : (c + 1) * k_shot] for c in range(n_way)]
    prototypes = [[sum(values) / k_shot for values in zip(*shots)] for shots in of_class]
    per_class = len(queries) // n_way
    losses, right = [], 0
    for number, query in enumerate(queries):
        label = number // per_class
        squares = [sum((a - b) ** 2 for a, b in zip(query, v)) for v in prototypes]
        losses.append(squares[label] + math.log(sum(math.exp(-square) for square in squares)))
        right += min(range(n_way), key=lambda c: squares[c]) == label
    return sum(losses) / len(losses), right / len(queries)


EPISODES = [(5, 4, 4), (2, 1, 3), (3, 2, 1), (4, 3, 2)]  # ways, shots, queries per class


def overlapping_features(n_way, per_class, seed=0):
    """Features [per_class, n_way, 6] whose classes overlap: some queries are right, some wrong."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(per_class, n_way, 6, generator=generator, dtype=torch.float64)
    return 0.8 * torch.randn(n_way, 6, generator=generator, dtype=torch.float64) + noise


def solve_episode(features, n_way, k_shot):
    """The trainer's episode, from the features of its images."""
    cfg = SimpleNamespace(n_way=n_way, k_shot=k_shot, n_query=len(features) // n_way - k_shot)
    return train_protonet.solve_episode(cfg, torch.nn.Identity(), features)


@pytest.mark.parametrize("of_episode", [episode_loss, solve_episode])
@pytest.mark.parametrize("n_way, k_shot, num_query", EPISODES)
def test_the_loss_of_an_episode_equals_a_loop_over_its_queries(
    n_way, k_shot, num_query, of_episode
):
    drawn = overlapping_features(n_way, k_shot + num_query)
    by_class = [part.transpose(0, 1).flatten(0, 1) for part in drawn.split([k_shot, num_query])]
    features = torch.cat(by_class).requires_grad_()  # support, then query, each class by class
    loss, share = of_episode(features, n_way, k_shot)
    expected_loss, expected_share = episode_by_hand(features.tolist(), n_way, k_shot)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    assert share.item() == pytest.approx(expected_share, abs=1e-6)
    assert loss.requires_grad and not share.requires_grad


@pytest.mark.parametrize("n_way, k_shot, num_query", EPISODES)
def test_the_mean_loss_of_episodes_equals_a_loop_over_them(n_way, k_shot, num_query):
    features = overlapping_features(n_way, 30).flatten(0, 1)  # image i is of class i % n_way
    images_of_class = [list(range(c, len(features), n_way)) for c in range(n_way)]
    generator = torch.Generator().manual_seed(1)
    episodes = []
    for _ in range(6):  # an image may be in several of them
        drawn = [
            [images[i] for i in torch.randperm(30, generator=generator)[: k_shot + num_query]]
            for images in images_of_class
        ]
        support = [image for images in drawn for image in images[:k_shot]]
        episodes.append(support + [image for images in drawn for image in images[k_shot:]])
    loss, share = mean_episode_loss(features, torch.tensor(episodes), n_way, k_shot)
    results = [episode_by_hand(features[rows].tolist(), n_way, k_shot) for rows in episodes]
    losses, shares = zip(*results)
    assert type(loss) is type(share) is float
    assert loss == pytest.approx(sum(losses) / 6, rel=1e-12)
    assert share == pytest.approx(sum(shares) / 6, abs=1e-6)
    assert 0 < share < 1 and len(set(losses)) == 6


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(2, 8))
def test_accuracy_is_the_share_of_rows_whose_largest_logit_is_the_labels(seed, count, n_way):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, n_way, generator=generator)
    labels = torch.randint(n_way, (count,), generator=generator)
    right = 0
    for row, label in zip(logits.tolist(), labels.tolist()):
        right += row.index(max(row)) == label
    assert accuracy(logits, labels).item() == pytest.approx(right / count, abs=1e-6)
