"""The two tests: the k-shot test of the tutorial, and the random episodes of the papers.

The k-shot test takes all classes at once. Within each class the images are cut, in the order of the
data set, into consecutive chunks of k; chunk i of every class together is support set i, and all
other images are its queries. A short last chunk is never a support set, but its images are queries.

An episode takes some classes at random, and of each class some support images and some queries.

What either test draws is a tensor of tasks, one per row: the support images, class by class, and in
an episode its queries after them, class by class. A task without queries is one of the k-shot test.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from scipy import stats

from common.config import UserError
from common.cuda_graph import CudaGraphStep
from common.inner_loop import FineTuning, adapt, adapt_for_test, inner_step
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
    return spread_evenly(sets, max_sets)


def spread_evenly(rows, most):
    """Return at most `most` rows of a tensor (0: all): the middles of as many equal parts."""
    count = len(rows)
    if not 0 < most < count:
        return rows
    return rows[[(2 * part + 1) * count // (2 * most) for part in range(most)]]


def random_episodes(labels, n_way, k_shot, n_query, count, class_names):
    """Return random episodes, int64 [count, n_way * (k_shot + n_query)].

    The classes of an episode are distinct, and so are its images. Every call with the same numbers
    and labels draws the same episodes. Raises UserError where there are too few classes or images.
    """
    labels, size = labels.cpu(), k_shot + n_query
    counts = torch.bincount(labels, minlength=len(class_names))
    if len(counts) < n_way:
        raise UserError(
            f"{n_way}-way episodes need {n_way} classes, found {len(counts)}; pass "
            f"--n_way={len(counts)} or less"
        )
    if (fewest := counts.min().item()) < size:
        raise UserError(
            f"an episode needs {size} images of each class (k = {k_shot}, {n_query} queries), "
            f"found {fewest} of {class_names[counts.argmin()]!r}; pass a smaller --n_query or "
            "smaller --k_shots"
        )
    images_of_class = torch.argsort(labels, stable=True).split(counts.tolist())
    generator = torch.Generator().manual_seed(0)

    def draw(available, wanted):
        return torch.randperm(available, generator=generator)[:wanted]

    episodes = torch.stack(
        [
            images_of_class[c][draw(len(images_of_class[c]), size)]
            for _ in range(count)
            for c in draw(len(counts), n_way).tolist()
        ]
    ).view(count, n_way, size)
    support, query = episodes.split([k_shot, n_query], dim=2)
    return torch.cat([support.flatten(1), query.flatten(1)], dim=1)


@torch.no_grad()
def mean_features(encoder, views):
    """Return the features [N, D] of images, each the mean over its Views, in the encoder's mode."""
    indices = torch.arange(len(views.images), device=views.images.device)
    batches = indices.split(max(1, 250 // views.count))
    features = [encoder(views.of(batch)).unflatten(0, (-1, views.count)) for batch in batches]
    return torch.cat([batch.mean(dim=1) for batch in features])


def nearest_prototype_counts(features, labels, tasks, n_way, k_shot, progress=iter):
    """Return how each task's queries are classified by nearest prototype.

    features [N, D] and labels int64 [N] of all images; tasks int64 [S, n_way * k_shot] or, with
    queries, [S, n_way * (k_shot + Q)]; several processes share them. progress wraps this process's
    tasks, to show how far it is.
    Returns float64 [S, n_way, n_way]: queries of each true class, by predicted class.
    """
    if features.device.type != "mps":  # which has no float64
        # 2 v.f - |v|^2 is a difference of large numbers: in TF32 the error would be noticeable.
        features = features.double()
    counts = []
    for task in progress(tasks[share()].to(features.device)):
        support, queries, y_qry = _split_task(task, labels, n_way, k_shot)
        weight, bias = prototype_head(make_prototypes(features[support], n_way))
        counts.append(_count(F.linear(features[queries], weight, bias), y_qry))
    return _gather_counts(counts, len(tasks), n_way)


def adapted_counts(
    encoder, views, labels, tasks, n_way, k_shot, inner_loop, progress=iter, in_graph=False
):
    """Return how each task's queries are classified after adaptation to its support set.

    Each support set adapts a copy of the encoder, which classifies the queries in eval mode.
    Several support sets are adapted side by side, and several processes share them.

    views: the Views of N images, normalised; all views of a support image are in the support set,
    and the logits of a query are the mean over its views. labels int64 [N]; tasks int64 [S, n_way *
    k_shot] or, with queries, [S, n_way * (k_shot + Q)]. inner_loop: the InnerLoop or FineTuning.
    progress wraps this process's tasks, to show how far it is. in_graph: run the steps of an
    InnerLoop as a CUDA graph.
    Returns float64 [S, n_way, n_way]: queries of each true class, by predicted class.
    Raises UserError where an adaptation diverges.
    """
    device = views.images.device
    workers = Workers(device, len(tasks), encoder)
    batch_size = max(1, (500 if device.type == "cpu" else 2000) // views.count)
    own_tasks = tasks[share()].to(device)

    def classify(task, local, weight, bias):
        _, queries, y_qry = _split_task(task, labels, n_way, k_shot)
        local.eval()
        with torch.no_grad():
            batches = (views.of(batch) for batch in queries.split(batch_size))
            logits = torch.cat([F.linear(local(batch), weight, bias) for batch in batches])
            logits = logits.unflatten(0, (-1, views.count)).mean(dim=1)  # [Q, n_way]
        if not logits.isfinite().all():
            tuned = isinstance(inner_loop, FineTuning)
            names = "--finetune_lr" if tuned else "--lr_inner or --lr_output"
            raise UserError(
                f"the adaptation to a support set of {n_way * k_shot} images diverged; pass a "
                f"smaller {names} (on an unseen domain, --domain_...) or fewer steps"
            )
        return _count(logits, y_qry)

    def adapt_and_classify(task, local):
        support = task[: n_way * k_shot]
        return classify(task, *adapt_for_test(encoder, views, support, n_way, inner_loop, local))

    if in_graph and not isinstance(inner_loop, FineTuning):
        models = _adapt_in_graph(encoder, views, own_tasks, n_way, k_shot, inner_loop, workers)
        counts = (classify(*model) for model in models)
    else:
        counts = workers.map(adapt_and_classify, own_tasks)
    # progress() sees each task go by; zip ends with the last one.
    counts = [each for _, each in zip(progress(own_tasks), counts)]
    return _gather_counts(counts, len(tasks), n_way)


def _adapt_in_graph(encoder, views, tasks, n_way, k_shot, inner_loop, workers):
    """Yield (task, local, weight, bias) for each task, adapted in a CUDA graph.

    As many tasks as there are workers learn at a time, all in one graph. The first step is taken
    outside of it: it belongs to the pass that makes the prototypes.
    """
    y_spt = episode_labels(n_way, k_shot * views.count, tasks.device)
    first_step = dataclasses.replace(inner_loop, num_inner_steps=1)
    states = []  # (local, weight, bias, x_spt) of each worker; the graph is tied to these tensors

    def take_step(state, _):
        local, weight, bias, x_spt = state
        inner_step(local, weight, bias, x_spt, y_spt, inner_loop)
        return weight.detach()

    step = CudaGraphStep(lambda: tuple(workers.map(take_step, states)), y_spt.device)
    for group in tasks.split(len(workers.copies)):
        for number, task in enumerate(group):
            x_spt, local = views.of(task[: n_way * k_shot]), workers.copies[number]
            _, weight, bias = adapt(encoder, x_spt, y_spt, n_way, first_step, local, attached=False)
            if number == len(states):
                states.append((local, weight.requires_grad_(), bias.requires_grad_(), x_spt))
            with torch.no_grad():
                torch._foreach_copy_(states[number][1:], [weight, bias, x_spt])
        for _ in range(inner_loop.num_inner_steps - 1):
            step()
        yield from ((task, *states[number][:3]) for number, task in enumerate(group))


def accuracies(counts):
    """Return the accuracy of each task, float64 [S]: correct queries over queries.

    counts [S, n_way, n_way], as nearest_prototype_counts and adapted_counts return them.
    """
    return counts.diagonal(dim1=1, dim2=2).sum(dim=1) / counts.sum(dim=(1, 2))


def summarize(accuracies):
    """Return (mean, std, ci95) of the accuracies of tasks, in 0..1.

    std: the sample standard deviation over the tasks, how much their choice matters. ci95: the
    half-width of the 95 % confidence interval of the mean, t(0.975, S - 1) * std / sqrt(S). Both
    are None for a single task.
    """
    count, mean = len(accuracies), accuracies.mean().item()
    if count < 2:
        return mean, None, None
    std = accuracies.std().item()
    return mean, std, half_width(std, count)


def half_width(std, count):
    """Return the half-width of the 95 % interval of a mean of `count` values, by Student's t."""
    return float(stats.t.ppf(0.975, count - 1)) * std / math.sqrt(count)


def _split_task(task, labels, n_way, k_shot):
    """Return (support, queries, y_qry): indices of images, and the labels of the queries.

    Without queries of its own a task has all images, and a support image among them the label -1.
    """
    support, queries = task[: n_way * k_shot], task[n_way * k_shot :]
    if len(queries):
        return support, queries, episode_labels(n_way, len(queries) // n_way, task.device)
    everything = torch.arange(len(labels), device=labels.device)
    return support, everything, labels.index_fill(0, support, -1)


def _count(logits, y_qry):
    """Return int64 [n_way, n_way]: queries of each true class, by the class of the largest logit.

    logits [Q, n_way]; y_qry int64 [Q], where -1 means that an image does not count.
    """
    n_way = logits.shape[1]
    pairs = (y_qry * n_way + logits.argmax(dim=1))[y_qry >= 0].cpu()
    return torch.bincount(pairs, minlength=n_way**2).view(n_way, n_way)


def _gather_counts(counts, num_tasks, n_way):
    """Return in every process the counts of all tasks, of which `counts` are this one's."""
    own = torch.stack(counts) if counts else torch.zeros(0, n_way, n_way)
    return gather(own.double(), num_tasks)
