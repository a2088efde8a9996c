"""The same work done as in a first notebook: what the project's speed is measured against.

PIL transforms in DataLoader workers, images stored channels first, every operation launched on its
own, a fresh deep copy for every task, prototypes by a loop over the classes, one support set at a
time.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import DenseNet


class PILImages(Dataset):
    """Images uint8 [N, H, W, 3] (numpy), each through PIL and a torchvision transform."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def train_transform(mean, std):
    """Return the tutorial's augmentation and normalisation for one PIL image."""
    crop = transforms.RandomResizedCrop((32, 32), scale=(0.8, 1.0), ratio=(0.9, 1.1))
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            crop,
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def make_loader(images, labels, sampler, mean, std, workers=2):
    """Return a DataLoader of the sampler's batches: (images [B, 3, 32, 32], labels [B])."""
    return DataLoader(
        PILImages(images, labels, train_transform(mean, std)),
        batch_sampler=sampler,
        num_workers=workers,
    )


def make_encoder():
    """Return the same DenseNet as the project's, stored channels first."""
    return DenseNet(32, (6, 6, 6, 6), 64, 2, num_classes=64)


def protonet_step(encoder, optimizer, images, labels):
    """One training step on an episode of images [2*S, 3, H, W]: half support, half query."""
    features = encoder(images)
    support, query = features.chunk(2)
    y_spt, y_qry = labels.chunk(2)
    prototypes, classes = _prototypes(support, y_spt)
    logits = -(prototypes[None] - query[:, None]).pow(2).sum(dim=2)
    loss = F.cross_entropy(logits, _positions(classes, y_qry))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def protomaml_step(encoder, optimizer, images, labels, num_tasks, num_inner_steps, lr=0.1):
    """One outer step of first-order ProtoMAML on `num_tasks` episodes; returns the mean query loss.

    images [num_tasks*2*S, 3, H, W]: the episodes laid end to end.
    """
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    losses = []
    for task_images, task_labels in zip(images.chunk(num_tasks), labels.chunk(num_tasks)):
        x_spt, x_qry = task_images.chunk(2)
        y_spt, y_qry = task_labels.chunk(2)
        local, weight, bias, classes = adapt(encoder, x_spt, y_spt, num_inner_steps, lr)
        loss = F.cross_entropy(F.linear(local(x_qry), weight, bias), _positions(classes, y_qry))
        loss.backward()
        for base, copy in zip(encoder.parameters(), local.parameters()):
            base.grad += copy.grad
        losses.append(loss.detach())
    optimizer.step()
    return torch.stack(losses).mean()


def adapt(encoder, x_spt, y_spt, num_inner_steps, lr=0.1):
    """Adapt a fresh deep copy to a support set; returns (copy, weight, bias, classes)."""
    prototypes, classes = _prototypes(encoder(x_spt), y_spt)
    labels = _positions(classes, y_spt)
    local = deepcopy(encoder).train()
    sgd = torch.optim.SGD(local.parameters(), lr=lr)
    init_weight, init_bias = 2 * prototypes, -(prototypes.norm(dim=1) ** 2)
    weight, bias = init_weight.detach().requires_grad_(), init_bias.detach().requires_grad_()
    for _ in range(num_inner_steps):
        sgd.zero_grad()
        weight.grad = bias.grad = None
        F.cross_entropy(F.linear(local(x_spt), weight, bias), labels).backward()
        sgd.step()
        weight.data -= lr * weight.grad
        bias.data -= lr * bias.grad
    sgd.zero_grad()
    return (
        local,
        (weight - init_weight).detach() + init_weight,
        (bias - init_bias).detach() + init_bias,
        classes,
    )


@torch.no_grad()
def encode(encoder, images, batch_size=128):
    """Return the features of images [N, 3, H, W], on the CPU, in the notebook's batches."""
    return torch.cat([encoder(batch).cpu() for batch in images.split(batch_size)])


@torch.no_grad()
def count_correct(local, weight, bias, images, labels, batch_size=128):
    """Return how many of images [N, 3, H, W] an adapted model classifies as `labels`."""
    local.eval()
    batches = zip(images.split(batch_size), labels.split(batch_size))
    return sum(
        (F.linear(local(x), weight, bias).argmax(dim=1) == y).sum().item() for x, y in batches
    )


def _prototypes(features, labels):
    classes = torch.unique(labels)
    return torch.stack(
        [features[torch.where(labels == c)[0]].mean(dim=0) for c in classes]
    ), classes


def _positions(classes, labels):
    return (classes[None] == labels[:, None]).long().argmax(dim=1)
