"""Train a Prototypical Network (Snell et al. 2017).

The prototype v_c of a class is the mean feature of its support images, and an image x with feature
f(x) belongs to class c with probability softmax_c(-|f(x) - v_c|^2). Training draws episodes, small
tasks of a few classes each, and learns an encoder f that classifies their query images well. New
classes then need no training: their prototypes are enough.

    python train_protonet.py --recipe=first         a first look, in a minute
    python train_protonet.py                        the tutorial's recipe on CIFAR-100
    python train_protonet.py --recipe=fast          CIFAR-100 in four minutes, see docs/speedrun.md
    python train_protonet.py --recipe=best          from the classifier, 20-way 1-shot episodes
    python train_protonet.py --init_from=FILE       start from a trained encoder of this project
    python train_protonet.py --dataset=glyphs --epochs=8 --lr=1e-3     the built-in data set
    python train_protonet.py --resume=auto          start, or go on after a stop

Writes <checkpoint_dir>/<dataset>/protonet.pt (best epoch), protonet_last.pt (to resume),
protonet.csv and protonet_curves.png, and prints the command that tests it. checkpoint_dir is
checkpoints; first and fast have folders of that name in it. An epoch of 1,200 episodes takes 1 to
1.5 minutes on 2 CPU cores. 5-way validation accuracy: CIFAR-100 43 % after one epoch and 62 % after
20, glyphs 98 % after 8.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from common import ROOT
from common.augment import AugmentedBatches
from common.checkpoint import starting_encoder
from common.config import require, run_script
from common.cuda_graph import CudaGraphStep
from common.data import load_training_data
from common.device import pick_device
from common.encoders import encode_in_batches
from common.optimizer import make_optimizer, one_cycle, set_learning_rate, step_decay
from common.prototypes import (
    accuracy,
    distance_logits,
    episode_labels,
    leave_one_out,
    make_prototypes,
    mean_loss,
)
from common.samplers import FewShotBatchSampler, validation_episodes
from common.training_run import TrainingRun

MODEL = "protonet"  # names the files, and the rows of a test


@dataclass
class Config:
    # recipe
    recipe: str = "tutorial"  # tutorial (below), first, fast or best; options override it
    # data
    dataset: str = "cifar100"  # cifar100, glyphs, or a file or folder of yours in data_dir
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    split: str = "auto"  # of the classes: auto, tutorial, cifar_fs, fc100 or a JSON file
    image_size: int = 32  # side in pixels that a folder's photographs are brought to
    # episode
    n_way: int = 5  # classes per training episode
    k_shot: int = 4  # support images per class
    n_query: int = 4  # query images per class
    val_way: int = 0  # classes per validation episode, at most those there are; 0: as n_way
    # loss
    leave_one_out: bool = False  # every image is a query in turn, the others are its support
    label_smoothing: float = 0.0  # share of the target probability spread over all classes
    # model
    encoder: str = "densenet"  # conv4, resnet12, torchvision:NAME, timm:NAME or FILE.py:CLASS
    width: int = 0  # channels of the first block of conv4 and resnet12; 0: 64
    proto_dim: int = 0  # length of a feature vector; 0: the encoder's own, 64 with densenet
    init_from: str = ""  # checkpoint whose encoder to start from, feature length included
    # optimizer
    optimizer: str = "adamw"  # or muon: convolutions by Muon at 6 times lr, the rest by AdamW
    epochs: int = 200  # passes over the training images
    first_size: int = 0  # side in pixels of the images in the first half of the epochs; 0: full
    lr: float = 2e-4  # learning rate; the peak, where schedule is cycle
    schedule: str = "drops"  # of lr: drops, or cycle: up in the first fifth, then down to 0
    lr_drops: tuple[float, ...] = (0.7, 0.9)  # shares of the epochs after which lr is divided by 10
    weight_decay: float = 0.01  # each step shrinks the weights by lr * weight_decay
    steps_per_epoch: int = 0  # steps per epoch at most; 0: as many as the images give
    # run
    seed: int = 42  # of weights, episodes and augmentation; validation episodes are always the same
    device: str = "auto"  # auto (CUDA if there is one, else the CPU), cuda, mps or cpu
    precision: str = "float32"  # of the encoder: float32, or bfloat16, faster on some machines
    cuda_graphs: bool = True  # false: run CUDA steps eagerly, to debug one or to save memory
    checkpoint_dir: str = "checkpoints"  # checkpoints go to <checkpoint_dir>/<dataset>/
    test: str = ""  # recipe of evaluate.py to test the model with, beside included ones
    resume: str = "false"  # true: go on with the unfinished run; auto: where there is one
    overwrite: bool = False  # discard the run that is there

    def __post_init__(self):
        require(self, "n_way >= 2", "val_way == 0 or val_way >= 2", "k_shot >= 1", "n_query >= 1")
        require(
            self, "proto_dim >= 0", "width >= 0", "epochs >= 1", "steps_per_epoch >= 0", "lr > 0"
        )
        require(self, "all(0 < share <= 1 for share in lr_drops)")
        require(self, "precision in ('float32', 'bfloat16')", "weight_decay >= 0", "seed >= 0")
        require(self, "resume.lower() in ('false', 'true', 'auto')")
        require(self, "optimizer in ('adamw', 'muon')", "schedule in ('drops', 'cycle')")
        require(self, "0 <= label_smoothing <= 1")
        scalable = "encoder in ('densenet', 'resnet12')"  # others' features may depend on the size
        require(self, f"first_size == 0 or first_size >= 16 and {scalable}")


# A recipe is what one would type behind the script's name.
RECIPES = {
    "tutorial": "",
    # A first look, in a minute.
    "first": (
        "--dataset=glyphs --epochs=1 --steps_per_epoch=150 --encoder=conv4 --lr=1e-3 "
        "--checkpoint_dir=checkpoints/first --overwrite=true --test=quick"
    ),
    # From nothing in four minutes; docs/speedrun.md has what was tried.
    "fast": (
        "--n_way=20 --k_shot=5 --n_query=5 --val_way=10 --leave_one_out=true "
        "--label_smoothing=0.1 --optimizer=muon --epochs=10 --first_size=16 --lr=6e-3 "
        "--schedule=cycle --weight_decay=0.1 --precision=bfloat16 "
        "--checkpoint_dir=checkpoints/fast"
    ),
    # From the trained classifier, for CIFAR-100; docs/experiments.md has the numbers behind it.
    "best": (
        "--init_from=checkpoints/best/cifar100/classifier.pt --n_way=20 --k_shot=1 --n_query=5 "
        "--val_way=10 --lr_drops=0.5 --epochs=4 --steps_per_epoch=100"
    ),
}


def train_step(cfg, encoder, optimizer, images):
    """Take a step on one episode; return its loss and accuracy.

    images [N*(K+Q), 3, H, W]: the support set, class by class, then the query set likewise.
    """
    # Support and query go through the encoder in one batch: BatchNorm uses the statistics of both.
    features = encoder(images)  # [N*(K+Q), D]
    support, query = features.split([cfg.n_way * cfg.k_shot, cfg.n_way * cfg.n_query])
    if cfg.leave_one_out:  # every image is a query; the prototype of its class does without it
        sets = [each.unflatten(0, (cfg.n_way, -1)) for each in (support, query)]
        logits, labels = leave_one_out(torch.cat(sets, dim=1))  # [N*(K+Q), N]
    else:
        prototypes = make_prototypes(support, cfg.n_way)  # [N, D], the mean feature of each class
        logits = distance_logits(query, prototypes)  # [N*Q, N], minus the squared distances
        labels = episode_labels(cfg.n_way, cfg.n_query, images.device)  # [N*Q]
    loss = F.cross_entropy(logits, labels, label_smoothing=cfg.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), accuracy(logits, labels)


def learning_rate(cfg, epoch):
    """Return the learning rate after so many epochs, with the fraction of the one that runs."""
    if cfg.schedule == "cycle":
        return one_cycle(cfg.lr, epoch / cfg.epochs)
    return step_decay(cfg.lr, int(epoch), cfg.epochs, cfg.lr_drops)


def main(cfg):
    device = pick_device(cfg.device, cfg.precision, training=True)
    torch.manual_seed(cfg.seed)

    data = load_training_data(cfg.dataset, cfg.data_dir, device, cfg.split, cfg.image_size)
    size, names = (cfg.n_way, cfg.k_shot, cfg.n_query), data.train.class_names
    sampler = FewShotBatchSampler(data.train.labels, *size, names, cfg.seed)
    val_way = min(cfg.val_way or cfg.n_way, len(data.val.class_names))
    val_episodes = validation_episodes(data.val, val_way, cfg.k_shot, cfg.n_query).to(device)

    encoder = starting_encoder(cfg, data).to(device)
    learned = encoder.parameters()
    optimizer = make_optimizer(learned, cfg.lr, cfg.weight_decay, device, cfg.optimizer)
    run = TrainingRun(cfg, MODEL, encoder, optimizer, sampler.generator, data)

    step = partial(train_step, cfg, encoder, optimizer)
    sizes = {0, cfg.first_size}  # 0: full
    steps = {side: CudaGraphStep(step, device, cfg.cuda_graphs) for side in sizes}
    for epoch in run.epochs():
        # Episodes and augmentation are drawn for the whole epoch, on the CPU, from one generator.
        episodes = sampler.episodes()  # [steps, N*(K+Q)]
        side = cfg.first_size if epoch + 1 <= cfg.epochs / 2 else 0
        batches = AugmentedBatches(data, episodes, sampler.generator, size=side)

        encoder.train()
        for number, images in enumerate(run.progress(batches)):  # [N*(K+Q), 3, H, W]
            set_learning_rate(optimizer, learning_rate(cfg, epoch + number / run.num_steps))
            run.track(*steps[side](images))

        # Validation: other classes, always the same episodes; every image is encoded once.
        features = encode_in_batches(encoder.eval(), data.val.images, data.normalize)
        result = mean_loss(features, val_episodes, val_way, cfg.k_shot)
        run.end_epoch(learning_rate(cfg, epoch), *result)
    run.finish(f"{cfg.n_way}-way {cfg.k_shot}-shot", f"{val_way}-way {cfg.k_shot}-shot")
    if cfg.test:
        models, included = f"{run.path}.pt", f"checkpoints/quick/{cfg.dataset}"
        if os.path.isdir(os.path.join(ROOT, included)):
            models += f",{included}"
        options = [f"--dataset={cfg.dataset}", f"--recipe={cfg.test}", f"--models={models}"]
        options.append(f"--data_dir={cfg.data_dir}")
        ways = len(data.split["test"])
        if cfg.test == "quick" and ways < 10:  # classes in each of its episodes
            options.append(f"--n_way={ways}")
        command = [sys.executable, os.path.join(ROOT, "evaluate.py"), *options]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    run_script(main, Config, RECIPES, torchrun=False)  # a step is one episode: nothing to share
