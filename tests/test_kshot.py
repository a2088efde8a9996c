"""The k-shot test and random episodes against loops that go over every image, one at a time."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from stress import TINY, labels_of

from common import UserError
from common.augment import Views
from common.encoders import Encoder
from common.finetune import FineTuning
from common.inner_loop import InnerLoop
from common.kshot import (
    adaptation,
    adapted_accuracies,
    mean_features,
    nearest_prototype_accuracies,
    random_episodes,
    spread_evenly,
    summarize,
    support_sets,
)
from common.prototypes import episode_labels

# Tiny networks: threads would only wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [f"class {c}" for c in range(20)]
FRUIT = ["apple", "beaver", "crab"]
INNER_LOOP = InnerLoop(num_inner_steps=3, lr_inner=0.05, lr_output=0.02)
WAYS = {"inner loop": INNER_LOOP, "fine-tuning": FineTuning(2, 0.01)}


def features_of(labels, dim=6, seed=0):
    """Features in which the classes overlap: some queries are right, some wrong."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(int(labels.max()) + 1, dim, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(len(labels), dim, generator=generator, dtype=torch.float64)


def images_of(labels, seed=0):
    """Noise around a pattern for each class."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)

    return draw(int(labels.max()) + 1)[labels] + 2 * draw(len(labels))


def tiny_encoder(images):
    """An encoder with the running statistics of these images, else all are of one class to it."""
    torch.manual_seed(0)
    encoder = Encoder(8, **TINY).double()
    with torch.no_grad():
        for _ in range(30):
            encoder(images[:30])
    return encoder.eval()


def chunks_by_hand(labels, k_shot):
    """All support sets, as lists of lists of image numbers: [set][class] -> its k images."""
    rows = {}
    for row, label in enumerate(labels.tolist()):
        rows.setdefault(label, []).append(row)
    full = min(len(of_class) // k_shot for of_class in rows.values())
    return [[rows[c][i * k_shot : (i + 1) * k_shot] for c in sorted(rows)] for i in range(full)]


def read_task(task, labels, n_way, k_shot):
    """A task as lists of image numbers: [class] -> its support images, [class] -> its queries."""
    rows, n_query = task.tolist(), len(task) // n_way - k_shot
    support = [rows[c * k_shot : (c + 1) * k_shot] for c in range(n_way)]
    queries = rows[n_way * k_shot :]
    if queries:
        return support, [queries[c * n_query : (c + 1) * n_query] for c in range(n_way)]
    others = [row for row in range(len(labels)) if row not in rows]
    return support, [[row for row in others if labels[row] == c] for c in range(n_way)]


def accuracies_by_hand(labels, tasks, n_way, k_shot, classifier):
    """Count one query after another; classifier(support) -> function of an image's number."""
    accuracies = []
    for task in tasks:
        support, queries = read_task(task, labels, n_way, k_shot)
        classify = torch.no_grad()(classifier(support))
        right = [int(classify(row)) == c for c, rows in enumerate(queries) for row in rows]
        accuracies.append(sum(right) / len(right))
    return torch.tensor(accuracies, dtype=torch.float64)


def nearest_mean(features):
    """The classifier of a support set by the nearest mean feature."""
    features = features.numpy()

    def classifier(support):
        prototypes = [features[rows].mean(axis=0) for rows in support]
        return lambda row: np.argmin([((features[row] - v) ** 2).sum() for v in prototypes])

    return classifier


def adapted_by_hand(encoder, images, output_init, views):
    """The classifier of a support set after 3 steps on it, by a loop over torch's SGD."""

    def classifier(support):
        rows, n_way = sum(support, []), len(support)
        y_spt = torch.arange(n_way).repeat_interleave(len(support[0]))
        x_spt = images[rows]
        if views == 2:
            x_spt, y_spt = torch.cat([x_spt, x_spt.flip(3)]), torch.cat([y_spt, y_spt])
        model, head = deepcopy(encoder).train(), torch.nn.Linear(8, n_way).double()
        with torch.no_grad():
            features = deepcopy(model)(x_spt)
            v = torch.stack([features[y_spt == c].mean(dim=0) for c in range(n_way)])
            head.weight.copy_(2 * v if output_init == "prototypes" else 0 * v)
            head.bias.copy_(-v.square().sum(dim=1) if output_init == "prototypes" else 0 * v[:, 0])
        of_encoder = {"params": model.parameters(), "lr": INNER_LOOP.lr_inner}
        of_head = {"params": head.parameters(), "lr": INNER_LOOP.lr_output}
        optimizer = torch.optim.SGD([of_encoder, of_head])
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(head(model(x_spt)), y_spt).backward()
            optimizer.step()
        model.eval()
        seen = [images, images.flip(3)] if views == 2 else [images]
        return lambda row: sum(head(model(view[row : row + 1])) for view in seen).argmax()

    return classifier


# Support sets


@pytest.mark.parametrize("sizes, k_shot", [([12] * 3, 4), ([11, 30, 17], 3), ([9, 9], 8)])
def test_support_sets_are_the_full_chunks_of_every_class_in_order(sizes, k_shot):
    labels = labels_of(sizes)
    sets = support_sets(labels, k_shot, NAMES[: len(sizes)])
    assert sets.tolist() == [sum(chunk, []) for chunk in chunks_by_hand(labels, k_shot)]
    assert len(sets) == min(sizes) // k_shot  # the short rest is never a support set
    capped = support_sets(labels, k_shot, NAMES[: len(sizes)], 2)
    assert torch.equal(capped, spread_evenly(sets, 2))


def test_600_images_per_class_give_the_tutorials_numbers_of_support_sets():
    labels = labels_of([600] * 10)
    counts = [len(support_sets(labels, k, NAMES[:10])) for k in (2, 4, 8, 16, 32)]
    assert counts == [300, 150, 75, 37, 18]


@given(st.integers(1, 400), st.integers(0, 400))
def test_rows_that_are_spread_evenly_are_distinct_and_as_far_from_either_end(available, most):
    rows = spread_evenly(torch.arange(available), most).tolist()
    assert rows == sorted(set(rows)) and len(rows) == min(most or available, available)
    gaps = [after - before for before, after in zip(rows, rows[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert abs(rows[0] - (available - 1 - rows[-1])) <= 1


def test_a_class_with_too_few_images_is_named_with_both_numbers():
    labels = labels_of([20, 8, 20])
    with pytest.raises(UserError, match="'beaver' has 8 images, .* k = 8 .* needs 9 "):
        support_sets(labels, 8, FRUIT)
    with pytest.raises(UserError, match="class 'crab' has 0 images"):
        support_sets(labels_of([20, 20]), 10**30, FRUIT)
    with pytest.raises(UserError, match="'beaver' has 8 images, .* k = 4 and 5 queries needs 9 "):
        random_episodes(labels, 2, 4, 5, 2, FRUIT)
    with pytest.raises(UserError, match="found 3 classes, 4 are needed"):
        random_episodes(labels, 4, 1, 1, 2, FRUIT)
    assert len(support_sets(labels, 7, FRUIT)) == 1
    assert len(random_episodes(labels, 2, 4, 4, 2, FRUIT)) == 2


# Random episodes


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(5, 15), min_size=2, max_size=6),
    n_way=st.integers(2, 6),
    k_shot=st.integers(1, 3),
    n_query=st.integers(1, 2),
    seed=st.integers(0, 1000),
)
def test_episodes_have_distinct_classes_and_images_and_are_the_same_in_two_calls(
    sizes, n_way, k_shot, n_query, seed
):
    n_way, labels = min(n_way, len(sizes)), labels_of(sizes, seed)
    draw = (labels, n_way, k_shot, n_query, 7, NAMES[: len(sizes)])
    before = torch.random.get_rng_state()
    episodes = random_episodes(*draw)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert episodes.shape == (7, n_way * (k_shot + n_query))
    for episode in episodes:
        assert len(set(episode.tolist())) == len(episode)
        of_support, of_query = (
            [{labels[row].item() for row in rows} for rows in part]
            for part in read_task(episode, labels, n_way, k_shot)
        )
        assert of_support == of_query and all(len(classes) == 1 for classes in of_support)
        assert len(set.union(*of_support)) == n_way
    torch.manual_seed(seed)
    assert torch.equal(random_episodes(*draw), episodes)


def test_every_class_and_image_is_drawn_about_as_often_as_any_other():
    labels = labels_of([10, 20, 10, 20])
    episodes = random_episodes(labels, 2, 1, 4, 400, NAMES[:4])
    drawn = torch.bincount(labels[episodes[:, :2]].flatten())  # 800 draws of 4 classes
    assert drawn.sum() == 800 and (drawn - 200).abs().max() < 50
    of_image = torch.bincount(episodes.flatten(), minlength=60)
    expected = 1000 / torch.tensor([10, 20, 10, 20])[labels]
    assert ((of_image - expected).abs() < 6 * expected.sqrt()).all()
    assert len({tuple(episode) for episode in episodes.tolist()}) == 400


# Accuracies


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(7, 15), min_size=2, max_size=5),
    n_way=st.integers(2, 5),
    k_shot=st.integers(1, 3),
    n_query=st.integers(0, 4),  # 0: the k-shot test
    seed=st.integers(0, 1000),
)
def test_nearest_prototypes_equal_a_double_loop_over_tasks_and_images(
    sizes, n_way, k_shot, n_query, seed
):
    labels, names = labels_of(sizes, seed), NAMES[: len(sizes)]
    features = features_of(labels, seed=seed)
    n_way = min(n_way, len(sizes)) if n_query else len(sizes)
    tasks = support_sets(labels, k_shot, names)
    if n_query:
        tasks = random_episodes(labels, n_way, k_shot, n_query, len(tasks), names)
    found = nearest_prototype_accuracies(features, labels, tasks, n_way, k_shot)
    expected = accuracies_by_hand(labels, tasks, n_way, k_shot, nearest_mean(features))
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("count, views", [(253, 1), (253, 2), (40, 7)])
def test_a_feature_is_the_mean_over_the_views_of_its_image(count, views):
    images = Views(torch.randn(count, 3, 32, 40).double(), views)
    encoder = tiny_encoder(images.images)
    seen = images.images_of(torch.arange(count)).unflatten(0, (count, views))
    expected = sum(encoder(seen[:, view]) for view in range(views)) / views
    torch.testing.assert_close(mean_features(encoder, images), expected)


MANY = [260, 261]  # more queries than fit into one batch


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("output_init", ["prototypes", "zeros"])
@pytest.mark.parametrize(
    "sizes, n_way, k_shot, n_query",
    [([7, 9, 8], 3, 1, 0), ([7, 9, 8], 3, 2, 0), ([7, 9, 8], 2, 2, 4), (MANY, 2, 2, 0)],
)
def test_adapted_accuracies_equal_adaptation_by_hand_of_one_task_after_another(
    sizes, n_way, k_shot, n_query, output_init, views
):
    labels, names = labels_of(sizes), NAMES[: len(sizes)]
    images, max_sets = images_of(labels), 1 if sizes is MANY else 3
    tasks = support_sets(labels, k_shot, names, max_sets)
    if n_query:
        tasks = random_episodes(labels, n_way, k_shot, n_query, 3, names)
    encoder, loop = tiny_encoder(images), InnerLoop(3, 0.05, 0.02, output_init)
    found = adapted_accuracies(encoder, Views(images, views), labels, tasks, n_way, k_shot, loop)
    by_hand = adapted_by_hand(encoder, images, output_init, views)
    assert torch.equal(found, accuracies_by_hand(labels, tasks, n_way, k_shot, by_hand))
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("views", [1, 3])
def test_fine_tuned_counts_equal_nearest_prototypes_of_each_fine_tuned_encoder(views):
    labels, expected = labels_of([9, 8, 10]), []
    images, sets = Views(images_of(labels), views), support_sets(labels, 2, FRUIT)
    encoder, how = tiny_encoder(images.images), FineTuning(3, 0.01)
    found = adapted_accuracies(encoder, images, labels, sets, 3, 2, how, graphs=True)
    for one in sets.split(1):
        local = deepcopy(encoder)
        how.adapt(encoder, images, one[0], episode_labels(3, 2), 3, local)
        expected.append(
            nearest_prototype_accuracies(mean_features(local, images), labels, one, 3, 2)
        )
    assert torch.equal(found, torch.cat(expected))
    plain = nearest_prototype_accuracies(mean_features(encoder, images), labels, sets, 3, 2)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_the_tasks_and_several_workers_change_no_result_by_a_bit(way, monkeypatch):
    labels = labels_of([8, 8, 8])
    images, sets = images_of(labels).float(), support_sets(labels, 2, FRUIT)
    encoder, order = tiny_encoder(images.double()).float(), [2, 0, 3, 1]

    def count(some):
        return adapted_accuracies(encoder, Views(images), labels, some, 3, 2, WAYS[way])

    expected = count(sets)
    assert len(expected) == 4 and torch.equal(count(sets[order]), expected[order])
    # Each set alone, with no copy from an earlier set to be used again.
    assert torch.equal(torch.cat([count(one) for one in sets.split(1)]), expected)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(count(sets), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_test_leaves_the_encoder_as_it_was_to_the_last_bit_and_shows_every_task(way):
    labels, seen = labels_of([6, 6]), []
    images, sets = images_of(labels), support_sets(labels, 2, NAMES[:2])
    encoder = tiny_encoder(images)
    before = deepcopy(encoder.state_dict())

    def progress(tasks):
        for task in tasks:
            seen.append(task.tolist())
            yield task

    adapted_accuracies(encoder, Views(images), labels, sets, 2, 2, WAYS[way], progress)
    nearest_prototype_accuracies(features_of(labels), labels, sets, 2, 2, progress)
    assert seen == sets.tolist() * 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())


def test_an_adaptation_that_diverges_is_one_line():
    labels, how = labels_of([4, 4]), InnerLoop(3, 1e30, 1e30)
    images, sets = images_of(labels), support_sets(labels, 2, NAMES[:2])
    with pytest.raises(UserError, match="lr_inner=1e.30.* diverged; pass a lower"):
        adapted_accuracies(tiny_encoder(images), Views(images), labels, sets, 2, 2, how)


def test_a_model_adapts_as_its_checkpoint_and_the_options_say():
    of_maml = {"num_inner_steps": 1, "lr_inner": 0.1, "lr_output": 0.2, "output_init": "zeros"}
    assert adaptation({"lr": 1.0}) is None
    assert adaptation(of_maml) == InnerLoop(1, 0.1, 0.2, "zeros")
    assert adaptation(of_maml, num_inner_steps=9, lr_inner=0) == InnerLoop(9, 0.1, 0.2, "zeros")
    assert adaptation(of_maml, 3, 0.5) == FineTuning(3, 0.5)
    assert adaptation(of_maml, 0) is None


# The summary


def test_the_summary_of_a_known_sample():
    # Mean 0.5, standard deviation 0.1; t(0.975, 2) = 4.302653 from a printed table.
    mean, std, ci95 = summarize(torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64))
    assert (mean, std) == (pytest.approx(0.5), pytest.approx(0.1))
    assert ci95 == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    assert summarize(torch.tensor([0.25], dtype=torch.float64)) == (0.25, None, None)


@pytest.mark.parametrize("wrong", ["interleaved", "a class twice", "queries in another order"])
def test_tasks_that_are_not_class_by_class_are_refused(wrong):
    labels = labels_of([12, 12, 12])
    task = random_episodes(labels, 3, 2, 3, 4, FRUIT)
    if wrong == "interleaved":
        task[1, :6] = task[1, :6].view(3, 2).T.flatten()
    elif wrong == "a class twice":
        task[2, :2] = torch.nonzero(labels == labels[task[2, 2]])[:2, 0]
    else:
        task[3, 6:] = task[3, 6:].flip(0)
    images = images_of(labels)
    where = labels, task, 3, 2
    with pytest.raises(UserError, match="not one class after the other; sort them"):
        nearest_prototype_accuracies(images.flatten(1), *where)
    with pytest.raises(UserError, match="not one class after the other; sort them"):
        adapted_accuracies(tiny_encoder(images), Views(images), *where, InnerLoop(1, 0.1, 0.1))
