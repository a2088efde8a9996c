"""The k-shot test and random episodes against loops that go over every image, one at a time."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.augment import Views
from common.config import UserError
from common.encoder import Encoder
from common.inner_loop import OUTPUT_INITS, FineTuning, InnerLoop, fine_tune
from common.kshot import (
    accuracies,
    adapted_counts,
    mean_features,
    nearest_prototype_counts,
    random_episodes,
    spread_evenly,
    summarize,
    support_sets,
)

NAMES = [f"class {c}" for c in range(20)]


def nearest_prototype_accuracies(features, labels, sets, n_way, *progress):
    k_shot = sets.shape[1] // n_way
    return accuracies(nearest_prototype_counts(features, labels, sets, n_way, k_shot, *progress))


def adapted_accuracies(encoder, images, labels, sets, n_way, loop, *progress, views=1, **options):
    k_shot = sets.shape[1] // n_way
    return accuracies(
        adapted_counts(
            encoder, Views(images, views), labels, sets, n_way, k_shot, loop, *progress, **options
        )
    )


def labels_of(sizes, seed=0):
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def features_of(labels, dim=6, seed=0):
    """Features in which the classes overlap: some queries are right, some wrong."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(int(labels.max()) + 1, dim, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(len(labels), dim, generator=generator, dtype=torch.float64)


def chunks_by_hand(labels, k_shot):
    """All support sets, as lists of lists of image numbers: [set][class] -> its k images."""
    rows = {}
    for row, label in enumerate(labels.tolist()):
        rows.setdefault(label, []).append(row)
    full = min(len(of_class) // k_shot for of_class in rows.values())
    return [[rows[c][i * k_shot : (i + 1) * k_shot] for c in sorted(rows)] for i in range(full)]


def accuracies_by_hand(features, labels, k_shot):
    """One image after another: the class of the nearest mean, counted right or wrong."""
    features, results = features.numpy(), []
    for chunk in chunks_by_hand(labels, k_shot):
        prototypes = [features[rows].mean(axis=0) for rows in chunk]
        support = {row for rows in chunk for row in rows}
        right = [
            int(
                np.argmin([((features[row] - prototype) ** 2).sum() for prototype in prototypes])
                == labels[row]
            )
            for row in range(len(labels))
            if row not in support
        ]
        results.append(sum(right) / len(right))
    return results


@pytest.mark.parametrize(
    "sizes, k_shot",
    [([12, 12, 12], 4), ([13, 13, 13, 13], 4), ([11, 30, 17], 3), ([9, 9], 8), ([5, 5, 5], 1)],
)
def test_support_sets_are_the_full_chunks_of_every_class_in_order(sizes, k_shot):
    labels = labels_of(sizes)
    expected = [[row for rows in chunk for row in rows] for chunk in chunks_by_hand(labels, k_shot)]
    sets = support_sets(labels, k_shot, NAMES[: len(sizes)])
    assert sets.tolist() == expected
    assert len(sets) == min(sizes) // k_shot  # the short rest is never a support set


def test_600_images_per_class_give_the_tutorials_numbers_of_support_sets():
    labels = labels_of([600] * 10)
    counts = [len(support_sets(labels, k, NAMES[:10])) for k in (2, 4, 8, 16, 32)]
    assert counts == [300, 150, 75, 37, 18]


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(6, 15), min_size=2, max_size=5),
    k_shot=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_accuracies_equal_a_double_loop_over_sets_and_images(sizes, k_shot, seed):
    labels = labels_of(sizes, seed)
    features = features_of(labels, seed=seed)
    sets = support_sets(labels, k_shot, NAMES[: len(sizes)])
    found = nearest_prototype_accuracies(features, labels, sets, len(sizes))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(accuracies_by_hand(features, labels, k_shot), abs=1e-12)


def test_queries_are_all_other_images_also_those_that_fill_no_chunk():
    # Two classes on a line; only the last image of the second, in no support set, is wrong.
    labels = torch.tensor([0] * 5 + [1] * 5)
    features = torch.tensor([[0.0]] * 5 + [[1.0]] * 4 + [[0.1]])
    sets = support_sets(labels, 2, NAMES[:2])
    assert len(sets) == 2
    assert nearest_prototype_accuracies(features, labels, sets, 2).tolist() == [5 / 6, 5 / 6]


def test_the_support_images_themselves_do_not_count():
    # Every query is wrong: only the support images, were they counted, would be right.
    labels = torch.tensor([0, 0, 1, 1])
    features = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    sets = support_sets(labels, 1, NAMES[:2])
    assert nearest_prototype_accuracies(features, labels, sets, 2).tolist() == [0.0, 0.0]


def small_encoder():
    torch.manual_seed(0)
    encoder = Encoder(8, growth_rate=4, block_config=(2, 2, 2, 2), num_init_features=8).double()
    for _ in range(3):
        encoder(torch.randn(10, 3, 32, 32, dtype=torch.float64))
    return encoder.eval()


def images_of(labels, seed=0):
    """Noise around a pattern for each class."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)

    return draw(int(labels.max()) + 1)[labels] + 2 * draw(len(labels))


INNER_LOOP = InnerLoop(num_inner_steps=3, lr_inner=0.05, lr_output=0.02)


def adapted_by_hand(encoder, images, labels, rows, n_way, output_init, views):
    """The model after 3 steps on one support set, by a loop over torch's SGD."""
    x_spt, y_spt = images[rows], labels[rows]
    if views == 2:
        x_spt, y_spt = torch.cat([x_spt, x_spt.flip(3)]), torch.cat([y_spt, y_spt])
    model = deepcopy(encoder).train()
    head = torch.nn.Linear(8, n_way).double()
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
    return torch.nn.Sequential(model, head).eval()


@torch.no_grad()
@pytest.mark.parametrize("count, views", [(253, 1), (253, 2), (40, 7)])
def test_a_feature_is_the_mean_over_the_views_of_its_image(count, views):
    encoder, images = small_encoder(), Views(torch.randn(count, 3, 32, 40).double(), views)
    seen = images.of(torch.arange(count)).unflatten(0, (count, views))
    expected = sum(encoder(seen[:, view]) for view in range(views)) / views
    torch.testing.assert_close(mean_features(encoder, images), expected)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("in_graph", [True, False])  # True: a GPU's code path, nothing recorded
@pytest.mark.parametrize("output_init", OUTPUT_INITS)
@pytest.mark.parametrize("sizes, k_shot", [([7, 7, 7], 3), ([4, 6, 5], 1), ([4, 6, 5], 2)])
def test_adapted_accuracies_equal_adaptation_by_hand_of_one_set_after_another(
    sizes, k_shot, output_init, in_graph, views
):
    labels, encoder, n_way = labels_of(sizes), small_encoder(), len(sizes)
    images, sets = images_of(labels), support_sets(labels, k_shot, NAMES[:n_way])
    loop = InnerLoop(3, INNER_LOOP.lr_inner, INNER_LOOP.lr_output, output_init)
    found = adapted_accuracies(
        encoder, images, labels, sets, n_way, loop, views=views, in_graph=in_graph
    )

    expected = []
    for chunk in chunks_by_hand(labels, k_shot):
        rows = [row for of_class in chunk for row in of_class]
        model = adapted_by_hand(encoder, images, labels, rows, n_way, output_init, views)
        seen = [images, images.flip(3)] if views == 2 else [images]
        right = [
            int(sum(model(view[row : row + 1]) for view in seen).argmax() == labels[row])
            for row in range(len(labels))
            if row not in rows
        ]
        expected.append(sum(right) / len(right))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("batchnorm", ["batch", "frozen"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_steps_of_a_graph_give_the_accuracies_of_plain_ones(steps, batchnorm):
    labels, encoder = labels_of([13, 13, 13]), small_encoder()
    images, sets = images_of(labels), support_sets(labels, 2, NAMES[:3])
    loop = InnerLoop(steps, 0.05, 0.02, batchnorm=batchnorm)
    plain, in_graph = (
        adapted_accuracies(encoder, images, labels, sets, 3, loop, in_graph=way)
        for way in (False, True)
    )
    assert len(plain) == 6 and len(plain.unique()) > 1
    assert torch.equal(plain, in_graph)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_graph_gives_the_accuracies_of_plain_steps():
    device = torch.device("cuda")
    labels = torch.arange(3).repeat_interleave(40)
    images, labels = images_of(labels).to(device), labels.to(device)
    sets, encoder = support_sets(labels, 4, NAMES[:3]), small_encoder().to(device)
    loop = InnerLoop(num_inner_steps=10, lr_inner=0.02, lr_output=0.02)
    plain, in_graph = (
        adapted_accuracies(encoder, images, labels, sets, 3, loop, in_graph=way)
        for way in (False, True)
    )
    assert (plain - in_graph).abs().mean() < 0.001


@pytest.mark.parametrize("views", [1, 2])
def test_the_queries_may_fill_many_batches(views):
    labels, encoder = labels_of([260, 261]), small_encoder()
    images, sets = images_of(labels), support_sets(labels, 2, NAMES[:2], max_sets=2)
    found = adapted_accuracies(encoder, images, labels, sets, 2, INNER_LOOP, views=views)
    expected = []
    for support in sets:
        rows = support.tolist()
        model = adapted_by_hand(encoder, images, labels, rows, 2, "prototypes", views)
        seen = [images, images.flip(3)] if views == 2 else [images]
        with torch.no_grad():
            logits = [sum(model(view[i : i + 37]) for view in seen) for i in range(0, 521, 37)]
        queries = [row for row in range(521) if row not in rows]
        right = (torch.cat(logits).argmax(dim=1) == labels)[queries]
        expected.append(right.double().mean().item())
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("views", [1, 3])
def test_fine_tuned_accuracies_equal_nearest_prototypes_of_each_fine_tuned_encoder(views):
    labels, encoder = labels_of([9, 8, 10]), small_encoder()
    images, sets = Views(images_of(labels), views), support_sets(labels, 2, NAMES[:3])
    loop, expected = FineTuning(3, 0.01), []
    found = adapted_counts(encoder, images, labels, sets, 3, 2, loop, in_graph=True)
    for number, support in enumerate(sets):
        local, *_ = fine_tune(encoder, images, support, 3, loop)
        one = sets[number : number + 1]
        expected.append(nearest_prototype_counts(mean_features(local, images), labels, one, 3, 2))
    assert torch.equal(found, torch.cat(expected)) and len(found) == 4
    assert len(accuracies(found).unique()) > 1
    plain = nearest_prototype_counts(mean_features(encoder, images), labels, sets, 3, 2)
    assert not torch.equal(found, plain)


def test_the_order_of_the_support_sets_changes_no_result_by_a_bit():
    labels, encoder = labels_of([8, 8, 8]), small_encoder().float()
    images, sets = images_of(labels).float(), support_sets(labels, 2, NAMES[:3])
    order = [2, 0, 3, 1]
    features = encoder(images).detach()
    for counts in (
        lambda some: nearest_prototype_counts(features, labels, some, 3, 2),
        lambda some: adapted_counts(encoder, Views(images), labels, some, 3, 2, INNER_LOOP),
        lambda some: adapted_counts(
            encoder, Views(images), labels, some, 3, 2, FineTuning(2, 0.01)
        ),
    ):
        forward = counts(sets)
        assert len(forward) == 4
        assert torch.equal(counts(sets[order]), forward[order])
        # Each set alone, with no copy from an earlier set to be used again.
        assert torch.equal(torch.cat([counts(sets[i : i + 1]) for i in range(4)]), forward)


def test_a_test_leaves_the_encoder_as_it_was_to_the_last_bit():
    labels, encoder = labels_of([6, 6]), small_encoder()
    before = deepcopy(encoder.state_dict())
    sets = support_sets(labels, 2, NAMES[:2])
    adapted_accuracies(encoder, images_of(labels), labels, sets, 2, INNER_LOOP)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())


def test_progress_sees_every_support_set_once():
    labels, seen = labels_of([6, 6]), []

    def count(sets):
        for support in sets:
            seen.append(support.tolist())
            yield support

    sets = support_sets(labels, 2, NAMES[:2])
    nearest_prototype_accuracies(features_of(labels), labels, sets, 2, count)
    adapted_accuracies(small_encoder(), images_of(labels), labels, sets, 2, INNER_LOOP, count)
    assert seen == sets.tolist() * 2


def test_a_cap_takes_support_sets_that_are_spread_evenly():
    labels = labels_of([40] * 3)
    every = support_sets(labels, 2, NAMES[:3])
    assert len(every) == 20
    for cap in range(1, 20):
        sets = support_sets(labels, 2, NAMES[:3], max_sets=cap)
        positions = [every.tolist().index(chosen) for chosen in sets.tolist()]
        assert len(positions) == cap and positions == sorted(set(positions))
        gaps = [after - before for before, after in zip(positions, positions[1:])]
        assert not gaps or max(gaps) - min(gaps) <= 1
        # As far from the beginning as from the end, up to the rounding to whole positions.
        assert abs(positions[0] - (19 - positions[-1])) <= 1
    for cap in (0, 20, 500):
        assert torch.equal(support_sets(labels, 2, NAMES[:3], max_sets=cap), every)


@given(st.integers(1, 400), st.integers(0, 400))
def test_rows_that_are_spread_evenly_are_distinct_and_in_order(available, most):
    rows = spread_evenly(torch.arange(available), most).tolist()
    assert rows == sorted(set(rows)) and len(rows) == min(most or available, available)


def test_a_class_without_an_image_left_to_ask_is_named_with_both_numbers():
    labels = labels_of([20, 8, 20])
    with pytest.raises(UserError) as caught:
        support_sets(labels, 8, ["apple", "beaver", "crab"])
    for part in ("'beaver'", "k = 8", "found 8", "--k_shots"):
        assert part in str(caught.value)
    assert len(support_sets(labels, 7, ["apple", "beaver", "crab"])) == 1


def test_a_class_without_any_image_is_named():
    with pytest.raises(UserError, match="found 0 of 'crab'"):
        support_sets(labels_of([20, 20]), 2, ["apple", "beaver", "crab"])


# Random episodes


def read_episode(episode, n_way, k_shot):
    """An episode as lists of image numbers: [class] -> its support images, [class] -> queries."""
    rows, n_query = episode.tolist(), len(episode) // n_way - k_shot
    support = [rows[c * k_shot : (c + 1) * k_shot] for c in range(n_way)]
    rows = rows[n_way * k_shot :]
    return support, [rows[c * n_query : (c + 1) * n_query] for c in range(n_way)]


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
            for part in read_episode(episode, n_way, k_shot)
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


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(7, 12), min_size=2, max_size=5),
    n_way=st.integers(2, 5),
    k_shot=st.integers(1, 3),
    n_query=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_accuracies_of_episodes_equal_a_loop_over_episodes_and_images(
    sizes, n_way, k_shot, n_query, seed
):
    n_way, labels = min(n_way, len(sizes)), labels_of(sizes, seed)
    features = features_of(labels, seed=seed)
    episodes = random_episodes(labels, n_way, k_shot, n_query, 9, NAMES[: len(sizes)])
    counts = nearest_prototype_counts(features, labels, episodes, n_way, k_shot)

    features = features.numpy()
    for episode, found, accuracy in zip(episodes, counts, accuracies(counts), strict=True):
        support, query = read_episode(episode, n_way, k_shot)
        prototypes = [features[rows].mean(axis=0) for rows in support]
        expected = [[0] * n_way for _ in range(n_way)]
        for c, rows in enumerate(query):
            for row in rows:
                distances = [((features[row] - prototype) ** 2).sum() for prototype in prototypes]
                expected[c][int(np.argmin(distances))] += 1
        assert found.tolist() == expected
        assert accuracy == sum(expected[c][c] for c in range(n_way)) / (n_way * n_query)


@pytest.mark.parametrize("in_graph", [True, False])  # True: a GPU's code path, nothing recorded
@pytest.mark.parametrize("output_init", OUTPUT_INITS)
@pytest.mark.parametrize("views", [1, 2])
def test_counts_of_adapted_episodes_equal_adaptation_by_hand(views, output_init, in_graph):
    labels, encoder, n_way, k_shot = labels_of([6, 7, 6, 8]), small_encoder(), 3, 2
    images = images_of(labels)
    with torch.no_grad():
        for _ in range(30):  # running statistics of these images, else all queries go to one class
            encoder.train()(images)
    encoder.eval()
    episodes = random_episodes(labels, n_way, k_shot, 4, 3, NAMES[:4])
    loop = InnerLoop(3, INNER_LOOP.lr_inner, INNER_LOOP.lr_output, output_init)
    found = adapted_counts(
        encoder, Views(images, views), labels, episodes, n_way, k_shot, loop, in_graph=in_graph
    )

    expected = torch.zeros(3, n_way, n_way, dtype=torch.float64)
    for number, episode in enumerate(episodes):
        support, query = read_episode(episode, n_way, k_shot)
        position = torch.full((len(labels),), -1)  # of a class in the episode
        for c, rows in enumerate(support):
            position[rows] = c
        rows = sum(support, [])
        model = adapted_by_hand(encoder, images, position, rows, n_way, output_init, views)
        seen = [images, images.flip(3)] if views == 2 else [images]
        for c, rows in enumerate(query):
            for row in rows:
                logits = sum(model(view[row : row + 1]) for view in seen)
                expected[number, c, logits.argmax()] += 1
    assert torch.equal(found, expected)
    assert (found.sum(dim=1) > 0).sum() > 5  # of 3 episodes * 3 predicted classes


def test_the_processes_share_the_episodes_and_put_them_together_in_order(monkeypatch):
    labels = labels_of([9, 9, 9])
    episodes = random_episodes(labels, 2, 1, 5, 7, NAMES[:3])
    tested = (features_of(labels), labels, episodes, 2, 1)
    expected = nearest_prototype_counts(*tested)
    monkeypatch.setattr("common.kshot.gather", lambda own, count: own)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert torch.equal(nearest_prototype_counts(*tested), expected[rank::3])


def test_an_episode_of_more_classes_than_there_are_is_refused():
    with pytest.raises(UserError, match="4-way episodes need 4 classes, found 3; pass --n_way=3"):
        random_episodes(labels_of([20, 20, 20]), 4, 1, 5, 2, NAMES[:3])


def test_an_episode_of_more_images_than_a_class_has_is_refused_with_its_name():
    names = ["apple", "beaver", "crab"]
    with pytest.raises(UserError) as caught:
        random_episodes(labels_of([20, 8, 20]), 2, 4, 5, 2, names)
    for part in ("needs 9 images", "k = 4, 5 queries", "found 8 of 'beaver'", "--n_query"):
        assert part in str(caught.value)
    assert len(random_episodes(labels_of([20, 9, 20]), 2, 4, 5, 2, names)) == 2


# Which class is taken for which


@pytest.mark.parametrize("adapts", [True, False])
def test_the_counts_of_support_sets_equal_those_of_single_images(adapts):
    labels, encoder = labels_of([7, 9, 8]), small_encoder()
    images, sets = images_of(labels), support_sets(labels, 2, NAMES[:3])
    with torch.no_grad():
        features = encoder(images)
    if adapts:
        found = adapted_counts(encoder, Views(images), labels, sets, 3, 2, INNER_LOOP)
    else:
        found = nearest_prototype_counts(features, labels, sets, 3, 2)

    expected = torch.zeros(len(sets), 3, 3, dtype=torch.float64)
    for number, chunk in enumerate(chunks_by_hand(labels, 2)):
        rows = sum(chunk, [])
        model = adapted_by_hand(encoder, images, labels, rows, 3, "prototypes", False)
        prototypes = torch.stack([features[of_class].mean(dim=0) for of_class in chunk])
        for row in sorted(set(range(len(labels))) - set(rows)):
            if adapts:
                predicted = model(images[row : row + 1]).argmax()
            else:
                predicted = (prototypes - features[row]).square().sum(dim=1).argmin()
            expected[number, labels[row], predicted] += 1
    assert torch.equal(found, expected)
    assert found.sum(dim=2).unique(dim=0).tolist() == [[5, 7, 6]]  # queries of each class
    assert 0 < found.diagonal(dim1=1, dim2=2).sum() < found.sum()


def test_the_mean_over_classes_is_the_accuracy_where_all_have_as_many_queries():
    labels = labels_of([13, 13, 13, 13])
    sets = support_sets(labels, 3, NAMES[:4])
    counts = nearest_prototype_counts(features_of(labels), labels, sets, 4, 3)
    confusion = counts.sum(dim=0)
    of_class = confusion.diagonal() / confusion.sum(dim=1)
    assert len(of_class.unique()) > 1
    assert of_class.mean().item() == pytest.approx(summarize(accuracies(counts))[0], abs=1e-12)


# The summary


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_the_summary_equals_scipys(accuracies):
    mean, std, ci95 = summarize(torch.tensor(accuracies, dtype=torch.float64))
    assert mean == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert std == pytest.approx(np.std(accuracies, ddof=1), abs=1e-9)
    if std > 1e-6:
        low, high = stats.t.interval(
            0.95, len(accuracies) - 1, loc=np.mean(accuracies), scale=stats.sem(accuracies)
        )
        assert ci95 == pytest.approx((high - low) / 2, rel=1e-6)


def test_the_summary_of_a_known_sample():
    # Mean 0.5, standard deviation 0.1; t(0.975, 2) = 4.302653 from a printed table.
    mean, std, ci95 = summarize(torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64))
    assert (mean, std) == (pytest.approx(0.5), pytest.approx(0.1))
    assert ci95 == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)


def test_a_single_support_set_has_no_spread():
    assert summarize(torch.tensor([0.25], dtype=torch.float64)) == (0.25, None, None)
