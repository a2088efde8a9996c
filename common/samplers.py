"""Episodes as index tensors: which images make up the support and the query set of each task.

An episode takes N classes (the way), K support images of each (the shot) and Q query images of
each. Its indices stand in an order that the whole project relies on: first the support set, class
by class, then the query set, class by class. So its labels are always the same: see
`episode_labels` in prototypes.py.
"""

import torch

from common import UserError, first_line


class FewShotBatchSampler:
    """Episodes of N_way distinct classes, each image at most once per epoch; new ones every epoch.

    Usable as the batch_sampler of a DataLoader.

    targets: int64 [num_images] or [num_images, 1], the class of each image.
    N_way, K_shot, num_query: classes per episode, support images and queries of each class.
    class_names: names for the error message, in the order of the sorted labels.
    seed: seed of the sampler's own `generator`; no other random number generator is read or moved.

    Raises UserError for fewer classes than N_way, a class with too few images for one episode, a
    way or shot below 1, and targets of another shape.
    """

    def __init__(self, targets, N_way, K_shot, num_query=0, class_names=None, seed=42):
        self.N_way, self.K_shot, self.num_query = N_way, K_shot, num_query
        self.images_per_class = K_shot + num_query
        self.generator = torch.Generator().manual_seed(seed)

        if N_way < 1 or K_shot < 1 or num_query < 0:
            found = f"{N_way}-way {K_shot}-shot episodes of {num_query} queries per class"
            raise UserError(f"there are no {found}; way and shot are 1 or more, queries 0 or more")
        targets = class_numbers(targets)
        classes, counts = (each.tolist() for each in torch.unique(targets, return_counts=True))
        if N_way > len(classes):
            raise UserError(
                f"{N_way}-way episodes need {N_way} classes, found {len(classes)} (without those "
                "held out); pass a smaller --n_way, or add classes"
            )
        what = f"an episode of {K_shot} support + {num_query} query images"
        needed, options = self.images_per_class, "--k_shot or --n_query"
        require_images(counts, needed, class_names or classes, what, options)
        self.images_of_class = torch.argsort(targets, stable=True).split(counts)
        chunks = [count // self.images_per_class for count in counts]
        self.chunks_of_class = _chunks_to_deal(chunks, N_way)
        self.num_episodes = sum(self.chunks_of_class) // N_way

    def episodes(self):
        """Return the episodes of an epoch, int64 [num_episodes, N_way * (K_shot + num_query)].

        Every class is cut into chunks of one episode's size, which are dealt out to the episodes.
        """
        size = self.images_per_class
        classes = torch.tensor(list(self._deal_classes())).flatten()  # [episodes * N]
        dealt = torch.empty(len(classes), size, dtype=torch.int64)
        for c, images in enumerate(self.images_of_class):
            places = torch.nonzero(classes == c)[:, 0]
            order = self._shuffled(len(images))[: len(places) * size]
            dealt[places] = images[order].view(-1, size)
        dealt = dealt.view(self.num_episodes, self.N_way, size)
        support, query = dealt.split([self.K_shot, self.num_query], dim=2)
        return torch.cat([support.flatten(1), query.flatten(1)], dim=1)

    def __iter__(self):
        for episode in self.episodes():
            yield episode.tolist()

    def __len__(self):
        return self.num_episodes

    def _deal_classes(self):
        """Yield the classes of each episode, distinct within it, as indices into the sorted labels.

        Chunks lie in a queue in random order; each episode takes the next N of different classes. A
        class with as many chunks left as there are episodes left must be in all of these, else the
        last episodes would lack classes.
        """
        left = list(self.chunks_of_class)
        queue = [c for turn in range(max(left)) for c in range(len(left)) if turn < left[c]]
        queue = [queue[position] for position in self._shuffled(len(queue)).tolist()]
        queue.reverse()  # the next one is at the end, where pop() is cheap
        for episodes_left in range(self.num_episodes, 0, -1):
            classes = [c for c, chunks in enumerate(left) if chunks == episodes_left]
            for c in classes:
                queue.remove(c)
            skipped = []
            while len(classes) < self.N_way:
                c = queue.pop()
                (skipped if c in classes else classes).append(c)
            queue.extend(reversed(skipped))
            for c in classes:
                left[c] -= 1
            yield classes

    def _shuffled(self, count):
        return torch.randperm(count, generator=self.generator)


def class_numbers(labels):
    """Return labels of shape [N] or [N, 1] as a tensor [N] on the CPU; else raise UserError."""
    try:
        labels = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"labels are no list of numbers ({first_line(error)})"
        raise UserError(f"{found}; pass the class number of each image: dataset.targets") from error
    if labels.ndim == 2 and labels.shape[1] == 1:  # as Keras and MedMNIST have them
        labels = labels[:, 0]
    if labels.ndim != 1:
        found = f"labels have the shape {list(labels.shape)}, but one class number per image"
        raise UserError(f"{found} is needed, [N]; pass labels.argmax(axis=1) if they are one-hot")
    return labels


def require_images(counts, needed, class_names, what, options):
    """Raise UserError where a class has fewer images than needed.

    what needs them, in words; options: of the command line, which would need fewer.
    """
    if lacking := [count for count in counts if count < needed]:
        name, fewest = class_names[counts.index(min(lacking))], min(lacking)
        more = f"; {len(lacking)} of {len(counts)} classes have too few" if lacking[1:] else ""
        raise UserError(
            f"class {name!r} has {fewest} images, but {what} needs {needed} of each class{more}; "
            f"pass smaller {options}, or add images"
        )


def validation_episodes(image_set, n_way, k_shot, num_query):
    """Return episodes on an ImageSet, int64 [E, n_way * (k_shot + num_query)].

    They are the same in every run, whatever its seed: numbers of two runs can be compared.
    """
    size = n_way, k_shot, num_query
    return FewShotBatchSampler(image_set.labels, *size, image_set.class_names, seed=0).episodes()


def _chunks_to_deal(chunks_of_class, n_way):
    """Return how many chunks of each class make up as many episodes as possible, E * n_way in all.

    A class serves at most once per episode, so E episodes of n_way distinct classes need
    sum(min(chunks, E)) >= E * n_way, which is also enough.
    """
    episodes = sum(chunks_of_class) // n_way
    while sum(dealt := [min(chunks, episodes) for chunks in chunks_of_class]) < episodes * n_way:
        episodes -= 1
    for _ in range(sum(dealt) - episodes * n_way):
        dealt[max(range(len(dealt)), key=lambda c: (dealt[c], c))] -= 1  # the last of the largest
    return dealt
