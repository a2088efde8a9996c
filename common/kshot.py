"""The k-shot test: every full run of k images per class is a support set once, all other images are its queries.

Within each class the images are cut, in the order of the data set, into consecutive chunks of k; chunk i of every
class together is support set i. A short last chunk is never a support set, but its images are queries.
"""

import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from scipy import stats

from common.config import UserError
from common.encoder import with_mirror_images
from common.inner_loop import adapt, inner_step
from common.launch import Captured, SideBySide
from common.prototypes import make_prototypes, prototype_head
from common.samplers import FewShotBatchSampler, episode_labels


def support_sets(labels, k_shot, class_names, max_sets=0):
    """Return the support sets as int64 [S, C * k_shot], class by class; at most `max_sets` (0: all), spread evenly.

    Raises UserError where a class has no image left to be a query.
    """
    counts = torch.bincount(labels.cpu(), minlength=len(class_names))
    fewest = counts.min().item()
    if fewest <= k_shot:
        name = class_names[counts.argmin()]
        raise UserError(f"k = {k_shot} needs more than {k_shot} images of each class, found {fewest} of {name!r}; pass smaller numbers, --k_shots=2,4 for example")
    sets = FewShotBatchSampler(labels, len(class_names), k_shot, shuffle=False).episodes()
    if 0 < max_sets < len(sets):
        sets = sets[spread_evenly(len(sets), max_sets)]
    return sets


def spread_evenly(available, wanted):
    """Return `wanted` positions out of 0..available-1, the middles of equal parts, so none is at an end by design."""
    return [(2 * part + 1) * available // (2 * wanted) for part in range(wanted)]


def nearest_prototype_accuracies(features, labels, sets, n_way, progress=iter):
    """Return the accuracy of each support set, float64 [S], for features [N, D] and labels int64 [N] of all images.

    progress wraps the support sets, to show how far it is.
    """
    if features.device.type != "mps":  # which has no float64
        features = features.double()  # 2 v.f - |v|^2 is a difference of large numbers; TF32 would be felt
    accuracies = []
    for support in progress(sets):
        support = support.to(features.device)
        weight, bias = prototype_head(make_prototypes(features[support], n_way))
        accuracies.append(_share_correct(F.linear(features, weight, bias), labels, support))
    return torch.tensor(accuracies, dtype=torch.float64)


def adapted_accuracies(encoder, images, labels, sets, n_way, inner_loop, progress=iter, mirror=False, batch_size=0, captured=None):
    """Return the accuracy of each support set, float64 [S], of a copy of the encoder adapted to that support set.

    images [N, 3, H, W], normalised; inner_loop: the keyword arguments of `adapt` (num_inner_steps, lr_inner, ...).
    progress wraps the support sets, to show how far it is. mirror: the support set is learned with its mirror images, and
    a query's logits are the means of its own and its mirror image's. The queries see the copy in eval mode. Several
    support sets are adapted side by side; captured: their inner step as one CUDA graph (None: on CUDA). Raises UserError
    where an adaptation diverges.
    """
    workers = SideBySide(images.device, len(sets))
    copies = [deepcopy(encoder) for _ in range(workers.count)]
    batch_size = batch_size or (500 if images.device.type == "cpu" else 2000)
    sets, views = sets.to(images.device), 2 if mirror else 1
    y_spt = episode_labels(n_way, sets.shape[1] // n_way * views, images.device)

    def see(batch):
        return with_mirror_images(batch) if mirror else batch

    def adapted(support, worker):
        return adapt(encoder, see(images[support]), y_spt, n_way, local=copies[worker], attached=False, **inner_loop)

    def accuracy(support, local, weight, bias):
        local.eval()
        with torch.no_grad():
            logits = torch.cat([F.linear(local(see(batch)), weight, bias) for batch in images.split(batch_size)])
            logits = logits.unflatten(0, (-1, views)).mean(dim=1)
        if not logits.isfinite().all():
            raise UserError(f"the adaptation to a support set of {len(support)} images diverged; pass a smaller --lr_inner or fewer --num_inner_steps")
        return _share_correct(logits, labels, support)

    if images.is_cuda if captured is None else captured:
        models = _adapt_captured(encoder, lambda support: see(images[support]), y_spt, sets, n_way, inner_loop, workers, copies)
        accuracies = (accuracy(*model) for model in models)
    else:
        accuracies = workers.run(lambda support, worker: accuracy(support, *adapted(support, worker)), sets)
    # The support sets are there to be counted; zip stops with them.
    return torch.tensor([each for _, each in zip(progress(sets), accuracies)], dtype=torch.float64)


def _adapt_captured(encoder, images_of, y_spt, sets, n_way, inner_loop, workers, copies):
    """Yield (support, local, weight, bias) for each support set; as many as there are workers learn in one CUDA graph."""
    start = {**inner_loop, "num_inner_steps": 0, "attached": False, "share_first_pass": False}
    rates = inner_loop["lr_inner"], inner_loop["lr_output"]
    states = []  # x_spt, weight and bias of each worker; the graph knows where they lie, so there they stay

    def one_step(number, _):
        x_spt, weight, bias = states[number]
        inner_step(copies[number], weight, bias, x_spt, y_spt, *rates)
        return weight.detach()

    step = Captured(lambda: tuple(workers.run(one_step, range(len(states)))), y_spt.device)
    for group in sets.split(workers.count):
        for number, support in enumerate(group):
            x_spt = images_of(support)
            _, weight, bias = adapt(encoder, x_spt, y_spt, n_way, local=copies[number], **start)
            if number == len(states):
                states.append([x_spt, weight.requires_grad_(), bias.requires_grad_()])
            with torch.no_grad():
                torch._foreach_copy_(states[number], [x_spt, weight, bias])
        for _ in range(inner_loop["num_inner_steps"]):
            step()
        yield from ((support, copies[number], *states[number][1:]) for number, support in enumerate(group))


def summarize(accuracies):
    """Return (mean, std, ci95) of per-support-set accuracies in 0..1; std and ci95 are None for a single support set.

    std is the sample standard deviation over support sets: how much the choice of the support set matters. ci95 is
    the half-width of the 95 % confidence interval of the mean, t(0.975, S - 1) * std / sqrt(S).
    """
    count, mean = len(accuracies), accuracies.mean().item()
    if count < 2:
        return mean, None, None
    std = accuracies.std().item()
    return mean, std, stats.t.ppf(0.975, count - 1) * std / math.sqrt(count)


def _share_correct(logits, labels, support):
    """Correct predictions over queries, the support images counting as neither."""
    correct = logits.argmax(dim=1) == labels
    correct[support] = False
    return correct.sum().item() / (len(labels) - len(support))
