"""The two tests: the k-shot test of the tutorial, and the random episodes of the papers.

The k-shot test takes all classes at once. Within each class the images are cut, in the order of the
data set, into consecutive chunks of k; chunk i of every class together is support set i, and all
other images are its queries. A short last chunk is never a support set, but its images are queries.
An episode takes some classes at random, and of each some support images and some queries.

A task is a row of image indices: support, class by class, then queries, class by class. A row of
the k-shot test has no queries: every other image is one.
"""

import dataclasses
import math
from copy import deepcopy

import torch
import torch.nn.functional as F

from common import UserError
from common.cuda_graph import CudaGraphStep
from common.encoders import batch_size
from common.finetune import FineTuning
from common.inner_loop import InnerLoop, inner_step
from common.parallel import Workers, all_gather, my_slice
from common.prototypes import episode_labels, linear_logits, make_prototypes
from common.samplers import class_numbers, require_images


def support_sets(labels, k_shot, class_names, max_sets=0):
    """Return the support sets, int64 [S, C * k_shot], class by class.

    max_sets: take at most so many of them, evenly spread (0: all). Raises UserError where a class
    has no image left to be a query.
    """
    labels = class_numbers(labels)
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    what = f"a test with k = {k_shot} and one query"
    require_images(counts, k_shot + 1, class_names, what, "--k_shots")
    number, rows = min(counts) // k_shot, torch.argsort(labels, stable=True).split(counts)
    chunks = [of_class[: number * k_shot].view(number, k_shot) for of_class in rows]
    return spread_evenly(torch.cat(chunks, dim=1), max_sets)


def spread_evenly(rows, most):
    """Return at most `most` evenly spaced rows of a tensor (0: all)."""
    count = len(rows)
    if not 0 < most < count:
        return rows
    return rows[[(2 * part + 1) * count // (2 * most) for part in range(most)]]


def random_episodes(labels, n_way, k_shot, n_query, count, class_names):
    """Return random episodes, int64 [count, n_way * (k_shot + n_query)], the same in every call.

    The classes of an episode are distinct, and so are its images. Raises UserError where there are
    too few classes or images.
    """
    size, classes, labels = k_shot + n_query, len(class_names), class_numbers(labels)
    if classes < n_way:
        raise UserError(f"found {classes} classes, {n_way} are needed; pass a smaller --n_way")
    counts = torch.bincount(labels, minlength=classes).tolist()
    what = f"an episode with k = {k_shot} and {n_query} queries"
    require_images(counts, size, class_names, what, "--k_shots or --n_query")
    images_of_class = torch.argsort(labels, stable=True).split(counts)
    generator = torch.Generator().manual_seed(0)

    def draw(available, wanted):
        return torch.randperm(available, generator=generator)[:wanted]

    drawn = []
    for _ in range(count):
        for c in draw(classes, n_way).tolist():
            drawn.append(images_of_class[c][draw(counts[c], size)])
    episodes = torch.stack(drawn).view(count, n_way, size)
    return torch.cat([part.flatten(1) for part in episodes.split([k_shot, n_query], dim=2)], dim=1)


def adaptation(config, finetune_steps=None, finetune_lr=0.001, **overrides):
    """Return how a model adapts to a support set: an InnerLoop, a FineTuning or None (not at all).

    config: of its checkpoint, which may have an inner loop; overrides: of that, where they are not
    0. finetune_steps: fine-tune so often instead.
    """
    if finetune_steps is not None:
        return FineTuning(finetune_steps, finetune_lr) if finetune_steps else None
    if not {"num_inner_steps", "lr_inner", "lr_output"} <= set(config):
        return None
    names = [field.name for field in dataclasses.fields(InnerLoop)]
    # Options added after the checkpoint was written take their default.
    given = {name: config[name] for name in names if name in config}
    return InnerLoop(**given | {name: value for name, value in overrides.items() if value})


@torch.no_grad()
def mean_features(encoder, views, progress=iter):
    """Return the features [N, D] of images, each the mean over its Views, in the encoder's mode.

    progress wraps the batches, to show how far it is.
    """
    indices = torch.arange(len(views.images), device=views.images.device)
    batches = indices.split(max(1, batch_size(views.images, encoder) // views.count))
    features = (encoder(views.images_of(batch)) for batch in progress(batches))
    return torch.cat([each.unflatten(0, (-1, views.count)).mean(dim=1) for each in features])


def nearest_prototype_accuracies(
    features, labels, tasks, n_way, k_shot, progress=iter, logits_of=linear_logits
):
    """Return the accuracy of each task by nearest prototype, float64 [S]: correct over all queries.

    features [N, D] and labels int64 [N] of all images; tasks int64 [S, n_way * k_shot] or, with
    queries, [S, n_way * (k_shot + Q)]; several processes share them. progress wraps this process's
    tasks, to show how far it is. logits_of: as in `mean_loss`.
    """
    if features.device.type != "mps":  # which has no float64
        # 2 v.f - |v|^2 is a difference of large numbers: in TF32 the error would be noticeable.
        features = features.double()
    found = []
    tasks = _in_order(tasks, labels, n_way, k_shot)
    for task in progress(tasks[my_slice()].to(features.device)):
        support, queries, y_qry = _split_task(task, labels, n_way, k_shot)
        prototypes = make_prototypes(features[support], n_way)
        classified = features if len(queries) == len(features) else features[queries]
        found.append(_accuracy(logits_of(classified, prototypes), y_qry))
    return all_gather(torch.tensor(found, dtype=torch.float64), len(tasks))


def adapted_accuracies(
    encoder, views, labels, tasks, n_way, k_shot, how, progress=iter, graphs=False
):
    """Return the accuracy of each task after adaptation to its support set, float64 [S].

    Each support set adapts a copy of the encoder, which classifies the queries in eval mode,
    several of them side by side.

    views: the Views of N images, normalised; all views of a support image are in the support set,
    and the logits of a query are the mean over its views. how: an InnerLoop or a FineTuning.
    graphs: run the steps of an InnerLoop as a CUDA graph. The rest: as in
    `nearest_prototype_accuracies`. Raises UserError where an adaptation diverges.
    """
    device, num_support = views.images.device, n_way * k_shot
    workers = Workers(device, len(tasks), lambda: deepcopy(encoder))
    at_once = batch_size(views.images, encoder) * (2 if device.type == "cpu" else 8)
    at_once = max(1, at_once // views.count)
    own_tasks = _in_order(tasks, labels, n_way, k_shot)[my_slice()].to(device)
    y_spt = episode_labels(n_way, k_shot, device)

    @torch.no_grad()
    def classify(task, local, weight, bias):
        _, queries, y_qry = _split_task(task, labels, n_way, k_shot)
        local.eval()
        batches = (views.images_of(batch) for batch in queries.split(at_once))
        logits = torch.cat([F.linear(local(batch), weight, bias) for batch in batches])
        if not logits.isfinite().all():
            raise UserError(f"{how} diverged; pass a lower learning rate or fewer steps")
        return _accuracy(logits.unflatten(0, (-1, views.count)).mean(dim=1), y_qry)

    def adapt_and_classify(task, local):
        support = task[:num_support]
        return classify(task, local, *how.adapt(encoder, views, support, y_spt, n_way, local))

    if graphs and device.type == "cuda" and isinstance(how, InnerLoop):
        models = _adapt_in_graph(encoder, views, own_tasks, n_way, k_shot, how, workers)
        found = (classify(*model) for model in models)
    else:
        found = workers.map(adapt_and_classify, own_tasks)
    # zip advances the progress bar by one for each finished task.
    found = [each for _, each in zip(progress(own_tasks), found)]
    return all_gather(torch.tensor(found, dtype=torch.float64), len(tasks))


def _adapt_in_graph(encoder, views, tasks, n_way, k_shot, how, workers):
    """Yield (task, local, weight, bias): the next step of all workers is one CUDA graph."""
    y_spt = episode_labels(n_way, k_shot * views.count, tasks.device)
    states = []  # (weight, bias, x_spt) of each worker; the graph is tied to these tensors

    def take_step(state, local):
        inner_step(local, *state, y_spt, how.lr_inner, how.lr_output)
        return state[0].detach()

    step = CudaGraphStep(lambda: tuple(workers.map(take_step, states)), tasks.device)
    for group in tasks.split(len(workers.workspaces)):
        for number, (task, local) in enumerate(zip(group, workers.workspaces)):
            x_spt = views.images_of(task[: n_way * k_shot])
            weight, bias = how.start(encoder, x_spt, n_way, local)
            if number == len(states):
                states.append((weight.requires_grad_(), bias.requires_grad_(), x_spt))
            with torch.no_grad():
                torch._foreach_copy_(states[number], [weight, bias, x_spt])
        for _ in range(how.num_inner_steps):
            step()
        for task, local, (weight, bias, _) in zip(group, workers.workspaces, states):
            yield task, local, weight, bias


def summarize(accuracies):
    """Return (mean, std, ci95) of the accuracies of tasks, in 0..1.

    std: the sample standard deviation over the tasks. ci95: the half-width of the 95 % interval of
    the mean, t(0.975, S - 1) * std / sqrt(S). Both are None for a single task.
    """
    mean = accuracies.mean().item()
    if len(accuracies) < 2:
        return mean, None, None
    std = accuracies.std().item()
    return mean, std, half_width(std, len(accuracies))


def half_width(std, count):
    """Return the half-width of the 95 % interval of a mean of `count` values, by Student's t."""
    from scipy import stats

    return float(stats.t.ppf(0.975, count - 1)) * std / math.sqrt(count)


def _in_order(tasks, labels, n_way, k_shot):
    """Return the tasks; raise UserError where support or queries are not class by class."""
    num_support, own = n_way * k_shot, labels.cpu()[tasks.cpu()]
    parts = own.split([num_support, own.shape[1] - num_support], dim=1)
    classes = parts[0][:, ::k_shot, None]  # [S, n_way, 1]
    distinct = classes.sort(dim=1).values.diff(dim=1).all()
    if not distinct or any(
        (part.view(len(part), n_way, -1) != classes).any() for part in parts if part.numel()
    ):
        found = "the images of a task are not one class after the other"
        needed = f"{n_way} classes of {k_shot} support images, then their queries likewise"
        raise UserError(f"{found}; sort them: {needed}")
    return tasks


def _split_task(task, labels, n_way, k_shot):
    """Return (support, queries, y_qry): indices of images, and the labels of the queries.

    Without queries of its own a task has all images, and a support image among them the label -1.
    """
    support, queries = task[: n_way * k_shot], task[n_way * k_shot :]
    if len(queries):
        return support, queries, episode_labels(n_way, len(queries) // n_way, task.device)
    everything = torch.arange(len(labels), device=labels.device)
    return support, everything, labels.index_fill(0, support, -1)


def _accuracy(logits, y_qry):
    """Return the share of queries of the largest logit [Q, n_way] at the label; -1: no query."""
    return (logits.argmax(dim=1) == y_qry).sum().item() / (y_qry >= 0).sum().item()
