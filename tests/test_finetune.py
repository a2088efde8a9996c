"""Fine-tuning by episodes of the support set, against Adam's formulas and loops over queries."""

from copy import deepcopy

import pytest
import torch
from stress import moved_encoder

from common.augment import Views
from common.finetune import FineTuning
from common.prototypes import episode_labels

N_WAY, DIM = 3, 8


def new_encoder():
    return moved_encoder().double().eval()


class Seen:
    """Stands in for Views: no crops, no colours; notes the images of each step."""

    def __init__(self, images):
        self.images, self.episodes = images, []

    def images_of(self, indices):
        return self.images[indices]

    def random_crops(self, indices, generator, min_crop_area, color_jitter):
        self.episodes.append(indices)
        return self.images[indices]


def fine_tuned_by_hand(encoder, images, episodes, lr):
    """Adam's formulas and the softmax over distances, on the episodes that were seen."""
    model = deepcopy(encoder)
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step, episode in enumerate(episodes, start=1):
        support, query = model(images[episode]).view(2, N_WAY, -1, DIM)
        losses = []
        for c in range(N_WAY):
            for feature in query[c]:
                squares = [(feature - of.mean(dim=0)).square().sum() for of in support]
                losses.append(squares[c] + torch.logsumexp(-torch.stack(squares), dim=0))
        gradients = torch.autograd.grad(sum(losses) / len(losses), parameters)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second):
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g**2)
                p -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return model


@pytest.mark.parametrize("k_shot, steps", [(1, 3), (2, 3), (5, 3), (2, 0)])
def test_fine_tuning_equals_adam_on_the_loss_of_its_episodes_by_hand(k_shot, steps):
    encoder, images = new_encoder(), torch.randn(N_WAY * k_shot, 3, 32, 32, dtype=torch.float64)
    seen, support, local = Seen(images), torch.arange(len(images)), deepcopy(encoder).train()
    before, y_spt = deepcopy(encoder.state_dict()), episode_labels(N_WAY, k_shot)
    weight, bias = FineTuning(steps, 0.01).adapt(encoder, seen, support, y_spt, N_WAY, local)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not local.training and len(seen.episodes) == steps

    expected = fine_tuned_by_hand(encoder, images, seen.episodes, 0.01)
    assert torch.equal(encoder(images), expected(images)) is (steps == 0)
    torch.testing.assert_close(local.state_dict(), expected.state_dict())
    prototypes = expected(images).view(N_WAY, k_shot, DIM).mean(dim=1).detach()
    torch.testing.assert_close(weight, 2 * prototypes)
    torch.testing.assert_close(bias, -prototypes.square().sum(dim=1))


@pytest.mark.parametrize("k_shot, half", [(1, 1), (2, 1), (5, 2), (40, 8)])
def test_an_episode_of_fine_tuning_has_as_many_other_queries_of_each_class(k_shot, half):
    support, encoder = 100 + torch.arange(N_WAY * k_shot), new_encoder()
    seen = Seen(torch.randn(100 + N_WAY * k_shot, 3, 32, 32, dtype=torch.float64))
    y_spt = episode_labels(N_WAY, k_shot)
    FineTuning(6, 0.001).adapt(encoder, seen, support, y_spt, N_WAY, deepcopy(encoder))
    for episode in seen.episodes:
        support_half, query_half = (episode - 100).view(2, N_WAY, half)
        for c in range(N_WAY):
            images = [*support_half[c].tolist(), *query_half[c].tolist()]
            assert all(image // k_shot == c for image in images)
            assert len(set(images)) == (2 * half if k_shot > 1 else 1)
    assert (len({tuple(episode.tolist()) for episode in seen.episodes}) > 1) is (k_shot > 1)


def test_fine_tuning_with_crops_on_a_copy_used_before_gives_the_same_bits():
    encoder, views = new_encoder(), Views(torch.randn(6, 3, 32, 32, dtype=torch.float64))
    fresh, used, support = deepcopy(encoder), deepcopy(encoder), torch.arange(6)
    how, y_spt = FineTuning(2, 0.01), episode_labels(N_WAY, 6 // N_WAY)
    first = how.adapt(encoder, views, support, y_spt, N_WAY, fresh)
    how.adapt(encoder, views, support.flip(0), y_spt, N_WAY, used)
    again = how.adapt(encoder, views, support, y_spt, N_WAY, used)
    pairs = zip([*first, *fresh.state_dict().values()], [*again, *used.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in pairs)
