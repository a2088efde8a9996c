"""Labels and prototypes of an episode, distance logits, the output layer equal to prototypes."""

import torch
import torch.nn.functional as F

from common import UserError


def episode_labels(n_way, per_class, device=None):
    """Return the labels within an episode, int64 [n_way * per_class]: 0, ..., 0, 1, ..., 1, ..."""
    return torch.arange(n_way, device=device).repeat_interleave(per_class)


def make_prototypes(support, n_way, labels=None):
    """Average the support features of each class.

    support [n_way * K, D], class by class -> prototypes [n_way, D]. In another order, or with
    classes of several sizes, pass their labels, int64 [S], each of 0..n_way-1.
    Snell et al. 2017, "Prototypical Networks for Few-shot Learning", equation 1. Raises UserError
    where the number of rows is no multiple of n_way and there are no labels.
    """
    if labels is not None:
        counts = class_counts(labels, n_way)
        sums = support.new_zeros(n_way, support.shape[1]).index_add_(0, labels, support)
        return sums / counts[:, None]
    if len(support) % n_way:
        found = f"{len(support)} support features cannot be {n_way} classes of the same size"
        raise UserError(f"{found}; pass their labels to make_prototypes")
    return support.unflatten(0, (n_way, -1)).mean(dim=1)


def class_counts(labels, n_way):
    """Return how often each class is in labels, int64 [n_way]; raise UserError where one is not."""
    counts = torch.bincount(labels, minlength=n_way)
    if len(counts) != n_way or not counts.all():
        raise UserError(
            f"labels of a {n_way}-way task have to be 0 to {n_way - 1}, each at least once"
        )
    return counts


def distance_logits(features, prototypes):
    """Return minus the squared Euclidean distances as logits.

    features [B, D], prototypes [N, D] -> [B, N]. A softmax over them is p(class | image): Snell et
    al. 2017, equation 2. A test computes the same by `linear_logits`, and `leave_one_out` relies on
    a squared distance: whoever changes the metric changes it there as well.
    """
    return -(features[:, None] - prototypes[None]).square().sum(dim=2)


def leave_one_out(features):
    """Take every image of an episode as a query, and as support of all others.

    features [N, M, D] of M images per class -> (logits [N*M, N], labels [N*M]), class by class. An
    image does not count in the prototype of its own class: from the mean of the other M - 1 it is
    M / (M - 1) times as far as from that of all M.
    """
    n_way, per_class, _ = features.shape
    labels = episode_labels(n_way, per_class, features.device)
    logits = distance_logits(features.flatten(0, 1), features.mean(dim=1))
    farther = (per_class / (per_class - 1)) ** 2
    own = labels[:, None] == labels[::per_class]  # [N*M, N]
    return torch.where(own, farther * logits, logits), labels


def prototype_head(prototypes):
    """Return weight [N, D] and bias [N] of the output layer equal to prototypes [N, D].

    -|f - v|^2 = 2 v.f - |v|^2 - |f|^2, and |f|^2 is the same for all classes, so that a softmax
    ignores it. Triantafillou et al. 2020, "Meta-Dataset", section 3.
    """
    return 2 * prototypes, -prototypes.square().sum(dim=1)


def linear_logits(features, prototypes):
    """Return `distance_logits` plus |f|^2, which changes no probability, in much less memory."""
    return F.linear(features, *prototype_head(prototypes))


@torch.no_grad()
def mean_loss(features, episodes, n_way, k_shot, logits_of=distance_logits):
    """Return (loss, accuracy) of the queries by nearest prototype, means over episodes.

    features [num_images, D]; episodes int64 [E, n_way * (k_shot + Q)], indices into them;
    logits_of(query, prototypes): [N*Q, D], [N, D] -> [N*Q, N].
    """
    num_support, num_query = n_way * k_shot, episodes.shape[1] - n_way * k_shot
    labels = episode_labels(n_way, num_query // n_way, features.device)  # [N*Q]
    losses, accuracies = [], []
    for support, query in (features[e].split([num_support, num_query]) for e in episodes):
        logits = logits_of(query, make_prototypes(support, n_way))  # [N*Q, N]
        losses.append(F.cross_entropy(logits, labels))
        accuracies.append(accuracy(logits, labels))
    return torch.stack(losses).mean().item(), torch.stack(accuracies).mean().item()


def accuracy(logits, labels):
    """Return the share of rows of logits [B, N] whose largest entry is at the label [B]."""
    return (logits.argmax(dim=1) == labels).float().mean()
