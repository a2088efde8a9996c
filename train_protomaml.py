"""Train ProtoMAML (Triantafillou et al. 2020) or MAML (Finn et al. 2017), first order.

The inner loop adapts a copy of the encoder, and an output layer, to the support set of a task by a
few steps of SGD. The outer loop learns weights from which that works well: it follows the gradient
of the query loss of the adapted copy. ProtoMAML starts the output layer from the prototypes, MAML
from zeros.

    python train_protomaml.py                              the tutorial's recipe on CIFAR-100
    python train_protomaml.py --output_init=zeros          MAML
    python train_protomaml.py --recipe=best                from the classifier, BatchNorm frozen
    python train_protomaml.py --recipe=fast                from the minute of train_classifier.py
    python train_protomaml.py --dataset=glyphs --epochs=1  the built-in data set
    python train_protomaml.py --resume=auto                start, or go on after a stop

Writes <checkpoint_dir>/<dataset>/protomaml.pt (best epoch), protomaml_last.pt (to resume),
protomaml.csv and protomaml_curves.png, for MAML the same under the name maml, and prints the
command that tests it. checkpoint_dir is checkpoints; fast has checkpoints/fast. An epoch has 75
outer steps of 16 tasks, 1.4 s each on 2 CPU cores. 5-way validation accuracy: CIFAR-100 57 % after
12 epochs; glyphs, with --init_from=checkpoints/quick/glyphs/protonet.pt --lr=3e-4, 98.6 % after
one.
"""

import math
import os
from copy import deepcopy
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn.functional as F

from common import UserError
from common.augment import AugmentedBatches
from common.checkpoint import starting_encoder
from common.config import require, run_script
from common.cuda_graph import CudaGraphStep
from common.data import load_training_data
from common.device import pick_device
from common.inner_loop import copy_tensors, copy_weights, float_buffers, inner_loop
from common.optimizer import make_optimizer, set_learning_rate, step_decay
from common.parallel import Workers, all_gather, all_reduce, equal_share, my_slice, process_count
from common.prototypes import accuracy, episode_labels, make_prototypes, prototype_head
from common.samplers import FewShotBatchSampler, validation_episodes
from common.training_run import TrainingRun


@dataclass
class Config:
    # recipe
    recipe: str = "tutorial"  # tutorial (below), fast or best; options override it
    # data
    dataset: str = "cifar100"  # cifar100, glyphs, or a file or folder of yours in data_dir
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    split: str = "auto"  # of the classes: auto, tutorial, cifar_fs, fc100 or a JSON file
    image_size: int = 32  # side in pixels that a folder's photographs are brought to
    # episode
    n_way: int = 5  # classes per training task
    k_shot: int = 4  # support images per class
    n_query: int = 4  # query images per class
    tasks_per_step: int = 16  # tasks (episodes) whose gradients make up one outer step
    val_episodes: int = 0  # validation episodes, each adapted to; 0: as many as the images give
    # model
    encoder: str = "densenet"  # conv4, resnet12, torchvision:NAME, timm:NAME or FILE.py:CLASS
    width: int = 0  # channels of the first block of conv4 and resnet12; 0: 64
    proto_dim: int = 0  # length of a feature vector; 0: the encoder's own, 64 with densenet
    output_init: str = "prototypes"  # of the output layer: prototypes (ProtoMAML) or zeros (MAML)
    init_from: str = ""  # checkpoint whose encoder to start from, feature length included
    # inner loop
    batchnorm: str = "batch"  # BatchNorm's statistics: batch (support or query set) or frozen
    num_inner_steps: int = 1  # SGD steps on the support set in training
    lr_inner: float = 0.1  # learning rate of these steps for the encoder
    lr_output: float = 0.1  # learning rate of these steps for the output layer
    # optimizer
    epochs: int = 200  # passes over the training images
    lr: float = 1e-3  # learning rate of AdamW, the outer loop
    lr_drops: tuple[float, ...] = (0.7, 0.9)  # shares of the epochs after which lr is divided by 10
    weight_decay: float = 0.01  # of AdamW
    steps_per_epoch: int = 0  # outer steps per epoch at most; 0: as many as the images give
    # run
    seed: int = 42  # of weights, episodes and augmentation; validation episodes are always the same
    device: str = "auto"  # auto (CUDA if there is one, else the CPU), cuda, mps or cpu
    precision: str = "float32"  # of the encoder: float32, or bfloat16, faster on some machines
    cuda_graphs: bool = True  # false: run CUDA steps eagerly, to debug one or to save memory
    checkpoint_dir: str = "checkpoints"  # checkpoints go to <checkpoint_dir>/<dataset>/
    resume: str = "false"  # true: go on with the unfinished run; auto: where there is one
    overwrite: bool = False  # discard the run that is there

    def __post_init__(self):
        require(self, "n_way >= 2", "k_shot >= 1", "n_query >= 1", "tasks_per_step >= 1")
        require(self, "num_inner_steps >= 1", "lr_inner > 0", "lr_output > 0", "lr > 0")
        require(self, "all(0 < share <= 1 for share in lr_drops)", "weight_decay >= 0")
        require(self, "width >= 0", "proto_dim >= 0", "val_episodes >= 0", "epochs >= 1")
        require(self, "precision in ('float32', 'bfloat16')", "batchnorm in ('batch', 'frozen')")
        require(self, "output_init in ('prototypes', 'zeros')", "seed >= 0", "steps_per_epoch >= 0")
        require(self, "resume.lower() in ('false', 'true', 'auto')")
        require(self, "batchnorm == 'batch' or init_from")  # frozen: those of a trained encoder


FROM_CLASSIFIER = (
    "--batchnorm=frozen --n_way=10 --k_shot=8 --n_query=8 --num_inner_steps=5 --lr_inner=0.004 "
    "--lr_output=0.004 --tasks_per_step=4 --lr=2e-4 --lr_drops=0.5 --epochs=2 "
    "--steps_per_epoch=60 --val_episodes=30"
)
# A recipe is what one would type behind the script's name.
RECIPES = {
    "tutorial": "",
    # From the classifier of its recipe fast; docs/speedrun.md has what was tried.
    "fast": (
        f"{FROM_CLASSIFIER} --init_from=checkpoints/fast/cifar100/classifier.pt "
        "--precision=bfloat16 --checkpoint_dir=checkpoints/fast"
    ),
    # From the trained classifier, for CIFAR-100; docs/experiments.md has the numbers behind it.
    "best": f"{FROM_CLASSIFIER} --init_from=checkpoints/best/cifar100/classifier.pt",
}


def query_loss(cfg, encoder, copies, images, n_way):
    """Adapt to the support set of a task; return the loss and the accuracy of its query set.

    copies: two copies of the encoder: one keeps its weights, the other adapts. images
    [n_way*(K+Q), 3, H, W]: the support set, class by class, then the query set likewise.
    """
    start, local = copies
    for copy in copies:
        copy_weights(encoder, copy)
    x_spt, x_qry = images.split([n_way * cfg.k_shot, n_way * cfg.n_query])
    y_spt = episode_labels(n_way, cfg.k_shot, images.device)  # [N*K]
    y_qry = episode_labels(n_way, cfg.n_query, images.device)  # [N*Q]
    if cfg.output_init == "prototypes":  # ProtoMAML: the output layer that equals a ProtoNet
        weight0, bias0 = prototype_head(make_prototypes(start(x_spt), n_way))  # [N, D], [N]
    else:  # MAML
        weight0 = images.new_zeros(n_way, encoder.num_features)
        bias0 = images.new_zeros(n_way)
    # Inner loop: theta' = theta - lr_inner * gradient of the support loss, num_inner_steps times.
    how = cfg.num_inner_steps, cfg.lr_inner, cfg.lr_output
    weight, bias = inner_loop(local, weight0, bias0, x_spt, y_spt, *how)
    # First order: forward uses the adapted values, the gradient flows to the initial ones.
    weight = weight0 + (weight - weight0).detach()
    bias = bias0 + (bias - bias0).detach()
    logits = F.linear(local(x_qry), weight, bias)  # [N*Q, N]
    return F.cross_entropy(logits, y_qry), accuracy(logits, y_qry)


def task_gradients(cfg, encoder, copies, images):
    """Return a task's query loss and accuracy, its gradients for the encoder, its statistics."""
    start, local = copies
    start.zero_grad(), local.zero_grad()
    loss, acc = query_loss(cfg, encoder, copies, images, cfg.n_way)
    loss.backward()
    # First order: the gradient of the adapted copy counts as the encoder's.
    gradients = [parameter.grad for parameter in local.parameters()]
    if cfg.output_init == "prototypes":  # which depend on the encoder, too
        gradients = torch._foreach_add(gradients, [p.grad for p in start.parameters()])
    return loss.detach(), acc, gradients, [b.clone() for b in float_buffers(local)]


def train_step(cfg, encoder, optimizer, workers, images):
    """Take an outer step on T tasks; return their mean query loss and accuracy.

    images [T*N*(K+Q), 3, H, W], one task after the other.
    """
    tasks = images.split(cfg.n_way * (cfg.k_shot + cfg.n_query))  # T of [N*(K+Q), 3, H, W]
    # Several tasks at a time, each worker with copies of its own.
    results = workers.map(lambda task, copies: task_gradients(cfg, encoder, copies, task), tasks)
    losses, accuracies, gradients, statistics = zip(*results)
    loss, acc = torch.stack(losses).mean(), torch.stack(accuracies).mean()
    gradients = reduce(torch._foreach_add, gradients)  # the sum over the tasks
    statistics = [torch.stack(of_tasks).mean(dim=0) for of_tasks in zip(*statistics)]
    all_reduce(sums=gradients, means=[loss, acc, *statistics])  # over the processes of torchrun
    for parameter, gradient in zip(encoder.parameters(), gradients):
        parameter.grad = gradient
    optimizer.step()
    if cfg.batchnorm == "batch":  # the encoder's own follow those of the adapted copies
        copy_tensors(statistics, float_buffers(encoder))
    return loss, acc


def validation_step(cfg, encoder, workers, images, n_way):
    """Return losses and accuracies [E] of episodes, images [E, n_way*(K+Q), 3, H, W]."""

    @torch.no_grad()  # the inner loop records what it needs
    def solve(episode, copies):
        return query_loss(cfg, encoder, copies, episode, n_way)

    losses, accuracies = zip(*workers.map(solve, images))
    return torch.stack(losses), torch.stack(accuracies)


def main(cfg):
    own_tasks = equal_share(cfg, "tasks_per_step")
    if 0 < cfg.val_episodes < process_count():
        raise UserError(f"{process_count()} processes need at least as many --val_episodes")
    device = pick_device(cfg.device, cfg.precision, training=True)
    torch.manual_seed(cfg.seed)

    data = load_training_data(cfg.dataset, cfg.data_dir, device, cfg.split, cfg.image_size)
    size, names = (cfg.n_way, cfg.k_shot, cfg.n_query), data.train.class_names
    sampler = FewShotBatchSampler(data.train.labels, *size, names, cfg.seed)
    if (num_steps := len(sampler) // cfg.tasks_per_step) == 0:
        raise UserError(f"an epoch has {len(sampler)} episodes; pass fewer --tasks_per_step")
    val_way = min(cfg.n_way, len(data.val.class_names))
    val_episodes = validation_episodes(data.val, val_way, cfg.k_shot, cfg.n_query).to(device)
    val_episodes = val_episodes[: cfg.val_episodes or None]

    encoder = starting_encoder(cfg, data).to(device).train(cfg.batchnorm == "batch")
    optimizer = make_optimizer(encoder.parameters(), cfg.lr, cfg.weight_decay, device)
    model = "protomaml" if cfg.output_init == "prototypes" else "maml"
    run = TrainingRun(cfg, model, encoder, optimizer, sampler.generator, data)

    workers = Workers(device, own_tasks, lambda: (deepcopy(encoder), deepcopy(encoder)))
    step = CudaGraphStep(
        partial(train_step, cfg, encoder, optimizer, workers), device, cfg.cuda_graphs
    )
    val_step = partial(validation_step, cfg, encoder, workers, n_way=val_way)
    val_step = CudaGraphStep(val_step, device, cfg.cuda_graphs)
    for epoch in run.epochs():
        lr = step_decay(cfg.lr, epoch, cfg.epochs, cfg.lr_drops)
        set_learning_rate(optimizer, lr)
        # Tasks and augmentation are drawn for the whole epoch, on the CPU, from one generator.
        tasks = sampler.episodes()[: num_steps * cfg.tasks_per_step]
        tasks = tasks.view(num_steps, cfg.tasks_per_step, -1)  # [steps, T, N*(K+Q)]
        batches = AugmentedBatches(data, tasks, sampler.generator, own=my_slice())

        for images in run.progress(batches):  # [T*N*(K+Q), 3, H, W]
            run.track(*step(images))

        # Validation: adapt to episodes of other classes, always the same ones.
        own = val_episodes[my_slice()]
        chunks = own.chunk(math.ceil(len(own) / own_tasks))
        images = (data.normalize(data.val.images[chunk]) for chunk in chunks)
        results = map(torch.cat, zip(*map(val_step, images)))
        losses, accuracies = (all_gather(values, len(val_episodes)) for values in results)
        run.end_epoch(lr, losses.mean().item(), accuracies.mean().item())
    run.finish(f"{cfg.n_way}-way {cfg.k_shot}-shot", f"{val_way}-way {cfg.k_shot}-shot")


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
