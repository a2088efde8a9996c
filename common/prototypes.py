"""Prototypes, distance logits, the linear head equal to them, the loss of an episode."""

import torch
import torch.nn.functional as F

from common.samplers import episode_labels


def make_prototypes(support, n_way):
    """Average the support features of each class.

    support [n_way * K, D], class by class -> prototypes [n_way, D].
    Snell et al. 2017, "Prototypical Networks for Few-shot Learning", equation 1.
    """
    return support.view(n_way, -1, support.shape[1]).mean(dim=1)


def distance_logits(features, prototypes):
    """Return minus the squared Euclidean distances as logits.

    features [B, D], prototypes [N, D] -> [B, N]. A softmax over them is p(class | image): Snell et
    al. 2017, equation 2.
    """
    return -(features[:, None] - prototypes[None]).square().sum(dim=2)


def prototype_head(prototypes):
    """Return weight [N, D] and bias [N] of the linear layer equal to prototypes [N, D].

    -|f - v|^2 = 2 v.f - |v|^2 - |f|^2, and |f|^2 is the same for all classes, so that a softmax
    ignores it. Triantafillou et al. 2020, "Meta-Dataset", section 3.
    """
    return 2 * prototypes, -prototypes.square().sum(dim=1)


def episode_loss(features, n_way, k_shot):
    """Return the loss and the accuracy of an episode's queries by nearest prototype.

    features [n_way * (k_shot + Q), D]: the support set, class by class, then the queries likewise.
    """
    support, query = features[: n_way * k_shot], features[n_way * k_shot :]  # [N*K, D], [N*Q, D]
    labels = episode_labels(n_way, len(query) // n_way, features.device)  # [N*Q]
    logits = distance_logits(query, make_prototypes(support, n_way))  # [N*Q, N]
    return F.cross_entropy(logits, labels), accuracy(logits, labels)


@torch.no_grad()
def mean_episode_loss(features, episodes, n_way, k_shot):
    """Return (loss, accuracy), means over episodes.

    features [num_images, D]; episodes int64 [E, n_way * (k_shot + Q)], indices into them.
    """
    results = [episode_loss(episode, n_way, k_shot) for episode in features[episodes]]
    losses, accuracies = zip(*results)
    return torch.stack(losses).mean().item(), torch.stack(accuracies).mean().item()


def accuracy(logits, labels):
    """Return the share of rows of logits [B, N] whose largest entry is at the label [B]."""
    return (logits.argmax(dim=1) == labels).float().mean()
