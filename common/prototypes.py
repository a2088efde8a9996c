"""Prototypes, the distances to them as logits, and the linear layer that gives the same probabilities."""


def make_prototypes(x_spt, n_way):
    """Average the support features of each class: [n_way * K, D], class by class, -> prototypes [n_way, D].

    Snell et al. 2017, "Prototypical Networks for Few-shot Learning", equation 1.
    """
    return x_spt.view(n_way, -1, x_spt.shape[1]).mean(dim=1)


def distance_logits(features, prototypes):
    """Return minus the squared Euclidean distance of features [B, D] to prototypes [N, D] as logits [B, N].

    Snell et al. 2017, equation 2: a softmax over them is p(class | image).
    """
    return -(features[:, None] - prototypes[None]).square().sum(dim=2)


def prototype_head(prototypes):
    """Return weight [N, D] and bias [N] of the linear layer equal to a ProtoNet with these prototypes [N, D].

    -|f - v|^2 = 2 v.f - |v|^2 - |f|^2, and |f|^2 is the same for all classes, so a softmax does not see it. Triantafillou
    et al. 2020, "Meta-Dataset", section 3.
    """
    return 2 * prototypes, -prototypes.square().sum(dim=1)
