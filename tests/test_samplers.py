"""Episodes: which images they hold, in which order, how often, and from which random numbers."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from common.config import UserError
from common.data import ImageSet
from common.samplers import (
    FewShotBatchSampler,
    TaskBatchSampler,
    episode_labels,
    validation_episodes,
)


def labels_of(sizes, seed=0):
    """Labels of classes of these sizes, in random order: images of a class do not lie together."""
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


class Unreadable(Dataset):
    """A data set whose labels can be had, but whose images cannot be read."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        raise AssertionError(f"image {index} was read")


class OnlyThese(Dataset):
    """A data set that gives out the images of one list, in the list's order, and no others."""

    def __init__(self, requested):
        self.requested = list(requested)

    def __getitem__(self, index):
        assert index == self.requested.pop(0)
        return torch.tensor(index)


def most_episodes(chunks, n_way):
    """How many episodes can be dealt: take each from the n_way classes with most chunks left."""
    count, chunks = 0, sorted(chunks, reverse=True)
    while chunks[n_way - 1] > 0:
        chunks = sorted([left - (place < n_way) for place, left in enumerate(chunks)], reverse=True)
        count += 1
    return count


def check_episodes(episodes, labels, n_way, k_shot, num_query):
    """Distinct classes, support and then queries, each class by class; no image twice."""
    assert episodes.dtype == torch.int64 and episodes.shape[1] == n_way * (k_shot + num_query)
    assert len(episodes.unique()) == episodes.numel()
    found = labels[episodes]
    support = found[:, : n_way * k_shot].view(len(episodes), n_way, k_shot)
    query = found[:, n_way * k_shot :].view(len(episodes), n_way, num_query)
    classes = support[:, :, 0]
    assert torch.equal(support, classes[:, :, None].expand_as(support))
    assert torch.equal(query, classes[:, :, None].expand_as(query))
    for episode in classes.tolist():
        assert len(set(episode)) == n_way


def test_the_default_setting_gives_1200_episodes_and_uses_all_48000_images():
    labels = labels_of([600] * 80)
    sampler = FewShotBatchSampler(labels, 5, 4, include_query=True)
    episodes = sampler.episodes()
    assert len(sampler) == len(episodes) == 1200
    assert torch.equal(episodes.flatten().sort().values, torch.arange(48_000))
    check_episodes(episodes, labels, 5, 4, 4)


def image_set(labels):
    """Labels with class names, and one pixel per image."""
    names = [f"class {c}" for c in range(int(labels.max()) + 1)]
    return ImageSet("labels", torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels, names)


def test_validation_on_10_classes_gives_150_episodes_and_uses_all_6000_images():
    labels = labels_of([600] * 10)
    episodes = validation_episodes(image_set(labels), 5, 4, 4)
    assert len(episodes) == 150
    assert len(episodes.unique()) == 6_000
    check_episodes(episodes, labels, 5, 4, 4)
    # Many different sets of classes, not the same two over and over.
    assert len({tuple(sorted(classes)) for classes in labels[episodes[:, :20:4]].tolist()}) > 50


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=9),
    n_way=st.integers(1, 6),
    k_shot=st.integers(1, 4),
    num_query=st.integers(0, 3),
    mode=st.sampled_from(["random", "once", "in order"]),
    seed=st.integers(0, 1000),
)
def test_every_episode_has_distinct_classes_whatever_the_sizes(
    sizes, n_way, k_shot, num_query, mode, seed
):
    # Every class needs the images of one episode: without them the constructor refuses, see below.
    sizes = [max(size, k_shot + num_query) for size in sizes]
    n_way = min(n_way, len(sizes))
    labels = labels_of(sizes, seed)
    sampler = FewShotBatchSampler(
        labels,
        n_way,
        k_shot,
        num_query > 0,
        mode == "random",
        mode == "once",
        num_query=num_query,
        seed=seed,
    )
    assert len(sampler) == most_episodes([size // (k_shot + num_query) for size in sizes], n_way)
    for _ in range(2):
        episodes = sampler.episodes()
        assert len(episodes) == len(sampler)
        check_episodes(episodes, labels, n_way, k_shot, num_query)


def test_one_huge_class_does_not_enter_an_episode_twice():
    labels = labels_of([1000, 8, 8, 8])
    sampler = FewShotBatchSampler(labels, 2, 2, include_query=True)
    check_episodes(sampler.episodes(), labels, 2, 2, 2)
    # The small classes give 2 chunks each, each of which finds a partner in the huge one.
    assert len(sampler) == 6


def test_images_that_fill_no_chunk_have_their_turn_in_later_epochs():
    sampler = FewShotBatchSampler(labels_of([7, 7]), 2, 2, include_query=True)
    seen = torch.cat([sampler.episodes().flatten() for _ in range(30)])
    assert len(sampler) == 1 and len(seen.unique()) == 14


def test_support_only_episodes_hold_no_queries():
    labels = labels_of([6] * 4)
    sampler = FewShotBatchSampler(labels, 3, 2, num_query=5)
    assert sampler.images_per_class == 2
    check_episodes(sampler.episodes(), labels, 3, 2, 0)  # 3 * 2 images each


def test_queries_are_as_many_as_the_shot_unless_said_otherwise():
    labels = labels_of([12] * 4)
    as_many = FewShotBatchSampler(labels, 3, 2, include_query=True).episodes()
    single = FewShotBatchSampler(labels, 3, 2, include_query=True, num_query=1).episodes()
    assert as_many.shape[1] == 12 and single.shape[1] == 9
    check_episodes(as_many, labels, 3, 2, 2)
    check_episodes(single, labels, 3, 2, 1)


def test_in_order_with_all_classes_episode_i_is_the_ith_run_of_every_class():
    labels = torch.tensor([1, 0, 2, 0, 1, 2, 2, 0, 1, 0, 1, 2, 2, 0, 1])
    positions = [[row for row, label in enumerate(labels.tolist()) if label == c] for c in range(3)]
    sampler = FewShotBatchSampler(labels, 3, 2, shuffle=False)
    assert sampler.episodes().tolist() == [
        [row for c in range(3) for row in positions[c][2 * i : 2 * i + 2]] for i in range(2)
    ]


def test_labels_need_not_be_consecutive_nor_a_tensor():
    labels = [30, 10, 20, 10, 30, 20, 10, 20, 30]
    episodes = FewShotBatchSampler(labels, 3, 1, include_query=True).episodes()
    check_episodes(episodes, torch.tensor(labels), 3, 1, 1)


def test_the_same_seed_gives_the_same_episodes_and_another_seed_others():
    labels = labels_of([20] * 6)
    draws = [FewShotBatchSampler(labels, 3, 2, True, seed=seed).episodes() for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    # Validation must not depend on what the training has drawn: the same for the fixed episodes.
    fixed = [
        FewShotBatchSampler(labels, 3, 2, True, False, True, seed=seed).episodes()
        for seed in (1, 1, 2)
    ]
    assert torch.equal(fixed[0], fixed[1]) and not torch.equal(fixed[0], fixed[2])


def test_training_draws_new_episodes_for_every_epoch_and_validation_keeps_its_own():
    labels = labels_of([20] * 6)
    training = FewShotBatchSampler(labels, 3, 2, True)
    assert not torch.equal(training.episodes(), training.episodes())
    fixed = FewShotBatchSampler(labels, 3, 2, True, shuffle=False, shuffle_once=True)
    first = fixed.episodes().clone()
    assert torch.equal(first, fixed.episodes()) and list(fixed) == first.tolist()


def test_the_generators_state_is_the_whole_state_of_a_sampler():
    labels = labels_of([20] * 6)
    sampler = FewShotBatchSampler(labels, 3, 2, True)
    sampler.episodes()
    state = sampler.generator.get_state()
    second = sampler.episodes()
    other = FewShotBatchSampler(labels, 3, 2, True, seed=7)
    other.generator.set_state(state)
    assert torch.equal(other.episodes(), second)


def test_other_random_numbers_are_neither_read_nor_moved():
    labels = labels_of([20] * 6)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = FewShotBatchSampler(labels, 3, 2, True).episodes()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(FewShotBatchSampler(labels, 3, 2, True).episodes(), first)


# Drawn once and written down: if they change, so do the episodes, and every published number.
GOLDEN_TRAINING = [
    [33, 39, 81, 63, 4, 27, 38, 65, 7],
    [56, 50, 88, 78, 24, 29, 51, 85, 25],
    [17, 19, 46, 43, 139, 142, 26, 32, 120],
]
GOLDEN_VALIDATION = [
    [146, 143, 60, 81, 104, 113, 129, 61, 110],
    [42, 36, 74, 67, 121, 132, 53, 86, 139],
]


def test_the_first_and_last_episodes_are_the_same_on_every_machine():
    labels = torch.arange(5).repeat_interleave(30)
    sampler = FewShotBatchSampler(labels, 3, 2, include_query=True, num_query=1, seed=42)
    assert sampler.episodes()[[0, 1, -1]].tolist() == GOLDEN_TRAINING
    assert validation_episodes(image_set(labels), 3, 2, 1)[[0, -1]].tolist() == GOLDEN_VALIDATION


def test_validation_episodes_are_the_same_whatever_was_drawn_before():
    labels = labels_of([13, 20, 17, 20])
    torch.manual_seed(1)
    first = validation_episodes(image_set(labels), 3, 2, 4)
    FewShotBatchSampler(labels, 3, 2, seed=7).episodes()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(validation_episodes(image_set(labels), 3, 2, 4), first)
    assert torch.equal(torch.get_rng_state(), before)
    check_episodes(first, labels, 3, 2, 4)
    assert len(first) == most_episodes([13 // 6, 20 // 6, 17 // 6, 20 // 6], 3)


def test_a_class_with_too_few_images_for_validation_is_named():
    with pytest.raises(UserError, match="'class 1' has 5 images"):
        validation_episodes(image_set(labels_of([20, 5, 20])), 2, 2, 4)


def test_samplers_read_no_image():
    data = Unreadable(labels_of([20] * 6))
    for sampler in (
        FewShotBatchSampler(data.labels, 3, 2, True),
        TaskBatchSampler(data.labels, 2, 3, 2, include_query=True),
    ):
        assert sum(len(batch) for batch in sampler) == len(sampler) * len(next(iter(sampler)))
    with pytest.raises(AssertionError, match="was read"):
        next(iter(DataLoader(data, batch_sampler=sampler)))


@pytest.mark.parametrize("make", [FewShotBatchSampler, partial(TaskBatchSampler, batch_size=2)])
def test_a_data_loader_takes_a_sampler_as_its_batch_sampler(make):
    options = {"include_query": True, "shuffle": False, "shuffle_once": True}
    sampler = make(labels_of([20] * 6), N_way=3, K_shot=2, **options)
    batches = list(sampler)
    requested = OnlyThese(index for batch in batches for index in batch)
    loader = DataLoader(requested, batch_sampler=sampler)
    assert len(loader) == len(batches)
    assert [batch.tolist() for batch in loader] == batches
    assert loader.dataset.requested == []


def test_batches_of_indices_are_plain_lists_of_one_episode_each():
    sampler = FewShotBatchSampler(labels_of([20] * 6), 3, 2, True)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    for batch in batches:
        assert type(batch) is list and len(batch) == 12 and type(batch[0]) is int


def test_batches_of_tasks_are_episodes_in_groups():
    labels = labels_of([600] * 80)
    sampler = TaskBatchSampler(labels, 16, 5, 4, include_query=True)
    tasks = sampler.episodes()
    assert len(sampler) == 75 and tasks.shape == (75, 16, 40)
    check_episodes(tasks.flatten(0, 1), labels, 5, 4, 4)
    assert len(tasks.unique()) == 48_000


def test_batches_of_tasks_draw_the_episodes_of_the_plain_sampler():
    labels = labels_of([20] * 6)
    plain = FewShotBatchSampler(labels, 3, 2, True, seed=5)
    tasks = TaskBatchSampler(labels, 4, 3, 2, include_query=True, seed=5)
    assert torch.equal(tasks.episodes(), plain.episodes()[:8].view(2, 4, 12))
    assert torch.equal(tasks.generator.get_state(), plain.generator.get_state())


def test_tasks_that_fill_no_batch_are_dropped():
    options = {"include_query": True, "shuffle": False, "shuffle_once": True}
    sampler = TaskBatchSampler(labels_of([20] * 6), 4, 3, 2, **options)
    assert len(sampler.batch_sampler) == 10 and len(sampler) == 2
    assert [len(batch) for batch in sampler] == [48, 48]


def test_a_batch_that_the_data_cannot_fill_is_refused_with_both_numbers():
    with pytest.raises(UserError, match="16.* 10 "):
        TaskBatchSampler(labels_of([20] * 6), 16, 3, 2, include_query=True)


def test_more_ways_than_classes_are_refused_with_both_numbers():
    with pytest.raises(UserError) as caught:
        FewShotBatchSampler(labels_of([20] * 6), 7, 2)
    assert "7" in str(caught.value) and "6" in str(caught.value) and "n_way" in str(caught.value)


def test_a_class_with_too_few_images_is_named_with_both_numbers():
    labels = labels_of([20, 7, 20])
    with pytest.raises(UserError) as caught:
        names = ["apple", "beaver", "crab"]
        FewShotBatchSampler(labels, 2, 5, True, num_query=3, class_names=names)
    for part in ("'beaver'", "7", "8", "5 support + 3 query"):
        assert part in str(caught.value)
    # Without names the label stands in for them.
    with pytest.raises(UserError, match="class 1 has 7"):
        FewShotBatchSampler(labels, 2, 5, include_query=True, num_query=3)
    FewShotBatchSampler(labels, 2, 5, include_query=True, num_query=2)


def test_labels_of_an_episode_count_the_classes():
    assert episode_labels(3, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert episode_labels(4, 1).dtype == torch.int64
