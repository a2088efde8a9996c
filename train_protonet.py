"""Train a Prototypical Network (Snell et al. 2017).

The prototype v_c of a class is the mean feature of its support images, and an image x with feature
f(x) belongs to class c with probability softmax_c(-|f(x) - v_c|^2). Training draws episodes, small
tasks of a few classes each, and learns an encoder f that classifies their query images well. New
classes then need no training: their prototypes are enough.

    python train_protonet.py                        the tutorial's recipe on CIFAR-100
    python train_protonet.py --recipe=best          from the classifier, 20-way 1-shot episodes
    python train_protonet.py --init_from=FILE       start from a trained encoder of this project
    python train_protonet.py --dataset=glyphs --epochs=8 --lr=1e-3     the built-in data set
    python train_protonet.py --resume=true          go on after a stop
    python evaluate.py                              then: the k-shot test

Writes checkpoints/<dataset>/protonet.pt (best epoch), protonet_last.pt (to resume), protonet.csv
and protonet_curves.png. An epoch of 1,200 episodes takes one to one and a half minutes on 2 CPU
cores. 5-way validation accuracy: CIFAR-100 43 % after one epoch and 62 % after 20, glyphs 98 %
after 8. `best` takes two minutes.
"""

import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from common.augment import EpochBatches, augment
from common.checkpoint import starting_encoder
from common.config import refuse_own_output, require, require_one_of
from common.cuda_graph import CudaGraphStep
from common.data import SMALLEST_IMAGE, load_training_data
from common.device import pick_device
from common.encoder import PRECISIONS, encode_in_batches
from common.inner_loop import (
    copy_weights,
    follow_statistics,
    hand_over_gradients,
    running_statistics,
)
from common.optimizer import make_optimizer, set_learning_rate, step_decay
from common.parallel import Workers, all_reduce, equal_share, gather, share
from common.prototypes import accuracy, distance_logits, make_prototypes, mean_episode_loss
from common.samplers import TaskBatchSampler, episode_labels, validation_episodes
from common.script import run_script
from common.training_run import TrainingRun


@dataclass
class Config:
    # recipe
    recipe: str = "tutorial"  # tutorial (the values below) or best; options override it
    # data
    dataset: str = "cifar100"  # cifar100, glyphs, or a file or folder of yours in data_dir
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    split: str = "auto"  # of the classes: auto, tutorial, cifar_fs, fc100 or a JSON file
    image_size: int = 32  # side in pixels that a folder's photographs are brought to
    least_crop: float = 0.8  # area of the smallest random crop, as a share of the image
    color_jitter: float = 0.0  # largest random change of brightness, contrast and saturation
    # episode
    n_way: int = 5  # classes per training episode
    k_shot: int = 4  # support images per class
    n_query: int = 4  # query images per class
    episodes_per_step: int = 1  # episodes whose mean loss one step follows
    val_way: int = 0  # classes per validation episode, at most all; 0: as n_way
    # model
    proto_dim: int = 64  # length of a feature vector and of a prototype
    init_from: str = ""  # checkpoint whose encoder to start from, feature length included
    # optimizer
    epochs: int = 200  # passes over the training images
    lr: float = 2e-4  # learning rate of AdamW
    lr_drops: tuple[float, ...] = (0.7, 0.9)  # shares of the epochs after which lr is divided by 10
    weight_decay: float = 0.01  # of AdamW
    steps_per_epoch: int = 0  # steps per epoch at most; 0: as many as the images give
    # run
    seed: int = 42  # of weights, episodes and augmentation; validation episodes are always the same
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "float32"  # of the encoder: float32, or bfloat16, faster on some machines
    cuda_graphs: bool = True  # false: run CUDA steps eagerly, to debug one or to save memory
    checkpoint_dir: str = "checkpoints"  # checkpoints go to <checkpoint_dir>/<dataset>/
    resume: bool = False  # go on with the unfinished run
    overwrite: bool = False  # discard the unfinished run

    def __post_init__(self):
        require(self, "image_size", least=SMALLEST_IMAGE)
        require(self, "n_way", least=2)
        if self.val_way:
            require(self, "val_way", least=2)
        require(self, "k_shot", "n_query", "episodes_per_step", "proto_dim", "epochs", least=1)
        require(self, "weight_decay", "steps_per_epoch", "seed", least=0)
        require(self, "color_jitter", least=0, most=1)
        require(self, "least_crop", "lr_drops", above=0, most=1)
        require_one_of(self, "precision", PRECISIONS)
        require(self, "lr", above=0)
        refuse_own_output(self, "init_from", "protonet")


RECIPES = {
    "tutorial": {},
    # From the trained classifier, a few hundred steps. For CIFAR-100; docs/experiments.md has the
    # numbers behind it.
    "best": {
        "init_from": "checkpoints/cifar100/classifier.pt",
        "n_way": 20,
        "k_shot": 1,
        "n_query": 5,
        "val_way": 10,
        "lr_drops": (0.5,),
        "epochs": 4,
        "steps_per_epoch": 100,
    },
}


def solve_episode(cfg, encoder, images):
    """Return the loss and the accuracy of an episode.

    images [N*(K+Q), 3, H, W], the support set first, class by class.
    """
    # Support and query go through the encoder in one batch: BatchNorm uses the statistics of both.
    features = encoder(images)  # [N*(K+Q), D]
    support, query = features.split([cfg.n_way * cfg.k_shot, cfg.n_way * cfg.n_query])
    prototypes = make_prototypes(support, cfg.n_way)  # [N, D], the mean feature of each class
    logits = distance_logits(query, prototypes)  # [N*Q, N], minus the squared distances
    labels = episode_labels(cfg.n_way, cfg.n_query, logits.device)  # [N*Q]
    return F.cross_entropy(logits, labels), accuracy(logits, labels)


def learn_episodes(cfg, data, encoder, workers, episodes, *views):
    """Set the gradients of the mean loss of a step's episodes; return mean loss and accuracy.

    episodes: indices of images, int64 [E*N*(K+Q)], one episode after the other. views: their random
    crops, flips and colours.
    """
    images = data.normalize(augment(data.train.images[episodes], *views))
    images = images.split(cfg.n_way * (cfg.k_shot + cfg.n_query))  # E of [N*(K+Q), 3, H, W]
    if len(images) == 1:
        loss, acc = solve_episode(cfg, encoder, images[0])
        encoder.zero_grad()
        (loss / cfg.episodes_per_step).backward()
        return loss.detach(), acc
    # Side by side, each on a copy of the encoder with BatchNorm statistics of its own.
    results = workers.map(partial(learn_on_copy, cfg, encoder), images)
    losses, accuracies, gradients, statistics = zip(*results)
    hand_over_gradients(encoder, gradients)
    follow_statistics(encoder, statistics)
    return torch.stack(losses).mean(), torch.stack(accuracies).mean()


def learn_on_copy(cfg, encoder, images, local):
    """Return an episode's loss and accuracy, its gradients and its BatchNorm statistics."""
    loss, acc = solve_episode(cfg, copy_weights(encoder, local), images)
    gradients = torch.autograd.grad(loss / cfg.episodes_per_step, list(local.parameters()))
    return loss.detach(), acc, gradients, running_statistics(local)


def main(cfg):
    own_episodes = equal_share(cfg, "episodes_per_step")  # of each step
    device = pick_device(cfg.device)
    torch.manual_seed(cfg.seed)

    data = load_training_data(cfg.dataset, cfg.data_dir, device, cfg.split, cfg.image_size)
    sampler = TaskBatchSampler(
        data.train.labels,
        cfg.episodes_per_step,
        cfg.n_way,
        cfg.k_shot,
        include_query=True,
        num_query=cfg.n_query,
        class_names=data.train.class_names,
        seed=cfg.seed,
    )
    val_way = min(cfg.val_way or cfg.n_way, len(data.val.class_names))
    val_episodes = validation_episodes(data.val, val_way, cfg.k_shot, cfg.n_query).to(device)
    val_images = data.normalize(data.val.images)

    encoder = starting_encoder(cfg, data).to(device)
    optimizer = make_optimizer(encoder.parameters(), cfg.lr, cfg.weight_decay, device)
    run = TrainingRun(cfg, "protonet", encoder, optimizer, sampler.generator, data)

    workers = Workers(device, own_episodes, encoder.train())
    step_fn = partial(learn_episodes, cfg, data, encoder, workers)
    step_fn = CudaGraphStep(step_fn, device, cfg.cuda_graphs)
    for epoch in run.epochs():
        lr = step_decay(cfg.lr, epoch, cfg.epochs, cfg.lr_drops)
        set_learning_rate(optimizer, lr)
        # Episodes and augmentation are drawn for the whole epoch, on the CPU, from one generator.
        batches = EpochBatches(
            sampler.episodes(),  # [steps, E, N*(K+Q)]
            data.train.images,
            sampler.generator,
            cfg.least_crop,
            cfg.color_jitter,
        )

        encoder.train()
        for step in run.steps(len(batches)):
            loss, acc = step_fn(*batches.of(step))
            gradients = [parameter.grad for parameter in encoder.parameters()]
            all_reduce(sums=gradients, means=[loss, acc, *encoder.buffers()])
            optimizer.step()
            run.track(loss, acc)

        # Validation: other classes, always the same episodes; every image is encoded once.
        features = encode_in_batches(encoder.eval(), val_images[share()])
        features = gather(features, len(val_images))
        run.end_epoch(lr, *mean_episode_loss(features, val_episodes, val_way, cfg.k_shot))
    run.finish(val_way)


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
