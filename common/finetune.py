"""Fine-tuning of an encoder by episodes drawn from the support set."""

import dataclasses

import torch
import torch.nn.functional as F

from common.inner_loop import copy_weights
from common.prototypes import (
    class_counts,
    distance_logits,
    episode_labels,
    make_prototypes,
    prototype_head,
)

MAX_IN_HALF = 8  # images of a class in one half
MIN_CROP_AREA = 0.6  # of the smallest crop, as a share of the image
COLOR_JITTER = 0.3  # largest random change of brightness, contrast and saturation


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """How an encoder is fine-tuned on a support set: steps of Adam, and their learning rate."""

    finetune_steps: int
    finetune_lr: float

    def adapt(self, encoder, views, support, y_spt, n_way, local):
        """Adapt `local`, a deep copy of the encoder, by ProtoNet episodes of the support set.

        Each step splits the support images of every class at random into a support and a query
        half, both randomly cropped and coloured, and follows the gradient of the episode's loss:
        there is no output layer, which would memorise a few images (Hu et al. 2022, "Pushing the
        Limits of Simple Pipelines for Few-Shot Learning", fine-tunes on augmented copies; Li et al.
        2022, "Cross-domain Few-shot Learning with Task-specific Adapters"). BatchNorm keeps the
        encoder's statistics. The random numbers come from a constant seed.

        Arguments and result as in `InnerLoop.adapt`: the output layer equal to the prototypes of
        the adapted copy, which is in eval mode.
        """
        copy_weights(encoder, local.eval())
        optimizer = torch.optim.Adam(local.parameters(), self.finetune_lr)
        generator = torch.Generator().manual_seed(0)
        by_class = support[equal_shots(y_spt, n_way)].view(n_way, -1)  # [N, K]
        # Images of a class in each half; its only image is in both.
        half = max(1, min(by_class.shape[1] // 2, MAX_IN_HALF))
        labels = episode_labels(n_way, half, support.device)  # [N * half]
        for _ in range(self.finetune_steps):
            order = torch.rand(by_class.shape, generator=generator).argsort(dim=1)
            shuffled = by_class.gather(1, order.to(support.device))
            episode = torch.cat([shuffled[:, :half].flatten(), shuffled[:, -half:].flatten()])
            images = views.random_crops(episode, generator, MIN_CROP_AREA, COLOR_JITTER)
            support_half, query_half = local(images).chunk(2)  # [N * half, D] each
            logits = distance_logits(query_half, make_prototypes(support_half, n_way))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
        with torch.no_grad():
            batches = by_class.flatten().split(100)
            features = torch.cat([local(views.images_of(batch)) for batch in batches])
            return prototype_head(make_prototypes(features, n_way))


def equal_shots(labels, n_way):
    """Return positions in `labels`, class by class, of every class as many as the largest has.

    Smaller classes repeat theirs, in order.
    """
    largest = class_counts(labels, n_way).max().item()
    positions = [torch.nonzero(labels == c)[:, 0] for c in range(n_way)]
    return torch.cat([own[torch.arange(largest) % len(own)] for own in positions])
