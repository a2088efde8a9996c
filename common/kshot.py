"""The k-shot test: every full chunk of k images per class is a support set once.

Within each class the images are cut, in the order of the data set, into consecutive chunks of k;
chunk i of every class together is support set i, and all other images are its queries. A short last
chunk is never a support set, but its images are queries.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from scipy import stats

from common.config import UserError
from common.cuda_graph import CudaGraphStep
from common.encoder import with_mirror_images
from common.inner_loop import adapt, inner_step
from common.parallel import Workers, gather, share
from common.prototypes import make_prototypes, prototype_head
from common.samplers import FewShotBatchSampler, episode_labels


def support_sets(labels, k_shot, class_names, max_sets=0):
    """Return the support sets, int64 [S, C * k_shot], class by class.

    max_sets: take at most so many of them, evenly spread (0: all). Raises UserError where a class
    has no image left to be a query.
    """
    counts = torch.bincount(labels.cpu(), minlength=len(class_names))
    fewest = counts.min().item()
    if fewest <= k_shot:
        raise UserError(
            f"k = {k_shot} needs more than {k_shot} images of each class, found {fewest} of "
            f"{class_names[counts.argmin()]!r}; pass smaller numbers, --k_shots=2,4 for example"
        )
    sets = FewShotBatchSampler(labels, len(class_names), k_shot, shuffle=False).episodes()
    if 0 < max_sets < len(sets):
        sets = sets[spread_evenly(len(sets), max_sets)]
    return sets


def spread_evenly(available, wanted):
    """Return `wanted` positions in 0..available-1: the middles of as many equal parts."""
    return [(2 * part + 1) * available // (2 * wanted) for part in range(wanted)]


def nearest_prototype_accuracies(features, labels, sets, n_way, progress=iter):
    """Return the accuracy of each support set, float64 [S], by nearest prototype.

    features [N, D] and labels int64 [N] of all images; sets int64 [S, n_way * k], which several
    processes share. progress wraps this one's, to show how far the test is.
    """
    if features.device.type != "mps":  # which has no float64
        # 2 v.f - |v|^2 is a difference of large numbers: in TF32 the error would be noticeable.
        features = features.double()
    accuracies = []
    for support in progress(sets[share()]):
        support = support.to(features.device)
        weight, bias = prototype_head(make_prototypes(features[support], n_way))
        accuracies.append(_share_correct(F.linear(features, weight, bias), labels, support))
    return gather(torch.tensor(accuracies, dtype=torch.float64), len(sets))


def adapted_accuracies(
    encoder,
    images,
    labels,
    sets,
    n_way,
    inner_loop,
    progress=iter,
    mirror=False,
    in_graph=False,
):
    """Return the accuracy of each support set, float64 [S], after adaptation to it.

    Each support set adapts a copy of the encoder, which classifies the queries in eval mode.
    Several support sets are adapted side by side, and several processes share them.

    images [N, 3, H, W], normalised, and their labels int64 [N]; sets int64 [S, n_way * k].
    inner_loop: the InnerLoop. progress wraps this process's support sets, to show how far it is.
    mirror: the support set includes its mirror images, and the logits of a query are the mean of
    its own and its mirror image's. in_graph: run the inner steps as a CUDA graph.
    Raises UserError where an adaptation diverges.
    """
    workers = Workers(images.device, len(sets), encoder)
    views = 2 if mirror else 1  # of each image
    batch_size = 500 if images.device.type == "cpu" else 2000
    own_sets = sets[share()].to(images.device)
    y_spt = episode_labels(n_way, sets.shape[1] // n_way * views, images.device)

    def view(batch):
        return with_mirror_images(batch) if mirror else batch

    def accuracy(support, local, weight, bias):
        local.eval()
        with torch.no_grad():
            batches = (view(batch) for batch in images.split(batch_size))
            logits = torch.cat([F.linear(local(batch), weight, bias) for batch in batches])
            logits = logits.unflatten(0, (-1, views)).mean(dim=1)  # [N, n_way]
        if not logits.isfinite().all():
            raise UserError(
                f"the adaptation to a support set of {len(support)} images diverged; pass a "
                "smaller --lr_inner or fewer --num_inner_steps"
            )
        return _share_correct(logits, labels, support)

    def adapt_and_test(support, local):
        x_spt = view(images[support])
        return accuracy(
            support, *adapt(encoder, x_spt, y_spt, n_way, inner_loop, local, attached=False)
        )

    if in_graph:
        models = _adapt_in_graph(
            encoder,
            own_sets,
            lambda support: view(images[support]),
            y_spt,
            n_way,
            inner_loop,
            workers,
        )
        accuracies = (accuracy(*model) for model in models)
    else:
        accuracies = workers.map(adapt_and_test, own_sets)
    # The support sets are there to be counted; zip stops with them.
    accuracies = [each for _, each in zip(progress(own_sets), accuracies)]
    return gather(torch.tensor(accuracies, dtype=torch.float64), len(sets))


def _adapt_in_graph(encoder, sets, images_of, y_spt, n_way, inner_loop, workers):
    """Yield (support, local, weight, bias) for each support set, adapted in a CUDA graph.

    images_of: gives the images [n_way * k, 3, H, W] of a support set. As many support sets as there
    are workers learn at a time, all in one graph. The first step is taken outside of it: it belongs
    to the pass that makes the prototypes.
    """
    first_step = dataclasses.replace(inner_loop, num_inner_steps=1)
    states = []  # (local, weight, bias, x_spt) of each worker; the graph is tied to these tensors

    def take_step(state, _):
        local, weight, bias, x_spt = state
        inner_step(local, weight, bias, x_spt, y_spt, inner_loop)
        return weight.detach()

    step = CudaGraphStep(lambda: tuple(workers.map(take_step, states)), y_spt.device)
    for group in sets.split(len(workers.copies)):
        for number, support in enumerate(group):
            x_spt, local = images_of(support), workers.copies[number]
            _, weight, bias = adapt(encoder, x_spt, y_spt, n_way, first_step, local, attached=False)
            if number == len(states):
                states.append((local, weight.requires_grad_(), bias.requires_grad_(), x_spt))
            with torch.no_grad():
                torch._foreach_copy_(states[number][1:], [weight, bias, x_spt])
        for _ in range(inner_loop.num_inner_steps - 1):
            step()
        yield from ((support, *states[number][:3]) for number, support in enumerate(group))


def summarize(accuracies):
    """Return (mean, std, ci95) of the accuracies of support sets, in 0..1.

    std: the sample standard deviation over support sets, how much their choice matters. ci95: the
    half-width of the 95 % confidence interval of the mean, t(0.975, S - 1) * std / sqrt(S). Both
    are None for a single support set.
    """
    count, mean = len(accuracies), accuracies.mean().item()
    if count < 2:
        return mean, None, None
    std = accuracies.std().item()
    return mean, std, float(stats.t.ppf(0.975, count - 1)) * std / math.sqrt(count)


def _share_correct(logits, labels, support):
    """Return correct predictions over queries; support images count as neither."""
    correct = logits.argmax(dim=1) == labels
    correct[support] = False
    return correct.sum().item() / (len(labels) - len(support))
