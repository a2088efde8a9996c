"""Train a Prototypical Network (Snell et al. 2017): an image belongs to the class with the nearest mean feature.

    python train_protonet.py                                      the tutorial's recipe on CIFAR-100
    python train_protonet.py --recipe=best                        a better one, which learns from a teacher as well
    python train_protonet.py --recipe=teacher                     that teacher: classify all training classes at once
    python train_protonet.py --dataset=glyphs --epochs=8 --lr=1e-3  the built-in data set
    python train_protonet.py --resume=true                        go on after a stop
    python evaluate.py                                            then: the k-shot test

Writes checkpoints/<dataset>/protonet.pt (best epoch), protonet_last.pt (to resume), protonet.csv, protonet_curves.png.

An epoch takes one to one and a half minutes with its validation on 2 CPU cores. On CIFAR-100 the tutorial's first one
reaches 42 % 5-way validation accuracy, `teacher` 63 % 10-way and `best` 66 %; glyphs after 8 epochs 98 % 5-way.
"""

import math
import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from common.augment import EpochAugmentation, augment
from common.checkpoint import TrainingRun, load_encoder
from common.config import LARGEST_RATE, LARGEST_SEED, UserError, require_at_least, require_at_most, require_positive, run_script
from common.data import channel_statistics, load_dataset, normalize, split_classes
from common.device import pick_device
from common.encoder import LARGEST_DIM, encode_in_batches, make_encoder, with_principal_features
from common.figures import plot_training_curves
from common.launch import Captured, make_optimizer, set_learning_rate
from common.prototypes import distance_logits, make_prototypes
from common.samplers import FewShotBatchSampler, episode_labels


@dataclass
class Config:
    # recipe
    recipe: str = "tutorial"  # values for the options below: tutorial (the defaults), teacher or best (RECIPES); single options win
    # data
    dataset: str = "cifar100"  # data set to train on: cifar100, glyphs, or a file or folder of yours in data_dir
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    # classification of all training classes at once, before the episodes
    pretrain_epochs: int = 0  # the first so many of the epochs; 0: episodes from the start
    pretrain_lr: float = 3e-3  # highest learning rate of its one-cycle schedule
    batch_size: int = 128  # images per step
    label_smoothing: float = 0.1  # share of the target probability that is spread over all classes
    teacher: str = ""  # checkpoint of a ProtoNet whose class probabilities are learned beside the labels; empty: labels alone
    teacher_share: float = 0.5  # weight of the teacher's probabilities in the loss, the labels have the rest
    teacher_temperature: float = 2.0  # what its logits are divided by: more makes it less sure
    principal_features: bool = False  # test and keep the encoder with other directions in its last layer than the training classes' own
    # episode
    n_way: int = 5  # classes per training episode
    k_shot: int = 4  # support images per class
    n_query: int = 4  # query images per class
    val_way: int = 0  # classes per validation episode, at most all; 0: as n_way
    # model
    proto_dim: int = 64  # numbers in a feature vector and in a prototype
    unit_features: bool = False  # give every feature vector the same, learned length: cosine similarity with a temperature
    # augmentation
    least_crop: float = 0.8  # area of the smallest random crop, as a share of the image
    color_jitter: float = 0.0  # largest random change of brightness, contrast and saturation, as a share
    # optimizer
    epochs: int = 200  # passes over the training images, those of pretrain_epochs included
    lr: float = 2e-4  # learning rate of AdamW in the episodes
    lr_drops: tuple[float, ...] = (0.7, 0.9)  # the learning rate is divided by 10 after these shares of the episodes' epochs
    weight_decay: float = 0.01  # of AdamW
    steps_per_epoch: int = 0  # steps per epoch at most; 0: as many as the images give
    # run
    seed: int = 42  # of weights, episodes and augmentation; validation episodes are the same for every seed
    device: str = "auto"  # auto, cuda, mps or cpu
    checkpoint_dir: str = "checkpoints"  # checkpoints go to <checkpoint_dir>/<dataset>/
    resume: bool = False  # go on with the unfinished run
    overwrite: bool = False  # discard the unfinished run

    def __post_init__(self):
        require_at_least(self, 2, "n_way", *(["val_way"] if self.val_way else []))
        require_at_least(self, 1, "k_shot", "n_query", "proto_dim", "epochs", "batch_size")
        require_at_least(self, 0, "pretrain_epochs", "label_smoothing", "color_jitter", "weight_decay", "steps_per_epoch", "seed", "teacher_share")
        require_at_most(self, 1, "label_smoothing", "color_jitter", "least_crop", "lr_drops", "teacher_share")
        require_at_most(self, LARGEST_RATE, "lr", "pretrain_lr", "weight_decay")
        require_at_most(self, LARGEST_SEED, "seed")
        require_at_most(self, LARGEST_DIM, "proto_dim")
        require_positive(self, "lr", "lr_drops", "pretrain_lr", "least_crop", "teacher_temperature")
        if self.pretrain_epochs:
            require_at_least(self, 2, "batch_size")  # BatchNorm needs two
        if self.pretrain_epochs > self.epochs:
            raise UserError(f"pretrain_epochs is {self.pretrain_epochs}, but there are only {self.epochs} epochs in all; pass --pretrain_epochs={self.epochs} at most")
        if self.teacher and not self.pretrain_epochs:
            raise UserError("teacher is given, but it teaches classification, and pretrain_epochs is 0; pass --pretrain_epochs too")
        if self.teacher and os.path.abspath(self.teacher) == os.path.abspath(os.path.join(self.checkpoint_dir, self.dataset, "protonet.pt")):
            raise UserError(f"teacher is {self.teacher}, which the run would overwrite; move it or pass another --checkpoint_dir")
        if self.principal_features and not (self.unit_features and self.pretrain_epochs == self.epochs):
            raise UserError("principal_features needs unit_features and classification in all epochs: pass --unit_features=true --pretrain_epochs too")


TEACHER = {
    "epochs": 30,
    "pretrain_epochs": 30,
    "unit_features": True,
    "least_crop": 0.4,
    "color_jitter": 0.3,
    "weight_decay": 0.05,
    "val_way": 10,
}
RECIPES = {
    "tutorial": {},
    # Classify all training classes at once, with strong augmentation; no episode is seen. Twice: the second encoder learns
    # from the first one, too. For CIFAR-100; see docs/experiments.md.
    "teacher": {**TEACHER, "checkpoint_dir": "checkpoints/teacher"},
    "best": {
        **TEACHER,
        "epochs": 40,
        "pretrain_epochs": 40,
        "teacher": "checkpoints/teacher/cifar100/protonet.pt",
        "principal_features": True,
    },
}


def main(cfg):
    device = pick_device(cfg.device)
    torch.manual_seed(cfg.seed)

    # Three disjoint sets of classes; the test classes are evaluate.py's.
    data = load_dataset(cfg.dataset, cfg.data_dir)
    split = split_classes(data.class_names)
    train, val = data.of_classes(split["train"]), data.of_classes(split["val"])
    mean, std = channel_statistics(train)

    val_way = min(cfg.val_way or cfg.n_way, len(val.class_names))
    query_options = {"include_query": True, "num_query": cfg.n_query}
    sampler = FewShotBatchSampler(train.labels, cfg.n_way, cfg.k_shot, class_names=train.class_names, seed=cfg.seed, **query_options)
    val_sampler = FewShotBatchSampler(val.labels, val_way, cfg.k_shot, shuffle=False, shuffle_once=True, class_names=val.class_names, seed=0, **query_options)

    teacher = load_encoder(cfg.teacher, split)[0].to(device) if cfg.teacher else None
    encoder_arguments = {"proto_dim": cfg.proto_dim, "unit_features": cfg.unit_features}
    encoder = make_encoder(**encoder_arguments).to(device)
    # Prototypes of all training classes, learned like weights: for the classification before the episodes.
    class_prototypes = torch.nn.Embedding(len(train.class_names) if cfg.pretrain_epochs else 0, cfg.proto_dim)
    torch.nn.init.normal_(class_prototypes.weight, std=0.1)
    class_prototypes.to(device)
    optimizer = make_optimizer([*encoder.parameters(), *class_prototypes.parameters()], cfg.lr, cfg.weight_decay, device)
    checkpoint_extras = {"encoder": encoder_arguments, "class_split": split, "mean": mean, "std": std, "data_digest": data.digest()}
    run = TrainingRun(cfg, "protonet", encoder, optimizer, sampler.generator, checkpoint_extras, extra_module=class_prototypes)

    train, val = train.to(device), val.to(device)
    teacher_prototypes = mean_features(teacher, train, mean, std) if teacher else None
    num_support = cfg.n_way * cfg.k_shot
    y_qry = episode_labels(cfg.n_way, cfg.n_query, device)  # [N*Q]
    val_images, val_episodes = normalize(val.images, mean, std), val_sampler.episodes().to(device)

    def train_step(classify, batch, *crops):
        """One step on the images number `batch` [B], all on the device; returns its loss and its accuracy."""
        images = normalize(augment(train.images[batch], *crops), mean, std)  # [B, 3, H, W]
        features = encoder(images)  # [B, D]
        if classify:
            logits, labels = distance_logits(features, class_prototypes.weight), train.labels[batch]  # [B, C], [B]
            loss = F.cross_entropy(logits, labels, label_smoothing=cfg.label_smoothing)
            if teacher:  # it sees the same augmented images: Tian et al. 2020, "Rethinking Few-Shot Image Classification"
                with torch.no_grad():
                    taught = F.softmax(distance_logits(teacher(images), teacher_prototypes) / cfg.teacher_temperature, dim=1)  # [B, C]
                loss = (1 - cfg.teacher_share) * loss + cfg.teacher_share * F.cross_entropy(logits, taught)
        else:
            # Support and query went through the encoder together: BatchNorm saw both.
            x_spt, x_qry = features[:num_support], features[num_support:]  # [N*K, D], [N*Q, D]
            logits, labels = distance_logits(x_qry, make_prototypes(x_spt, cfg.n_way)), y_qry  # [N*Q, N]
            loss = F.cross_entropy(logits, labels)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), (logits.argmax(dim=1) == labels).float().mean()

    steps = {classify: Captured(partial(train_step, classify), device) for classify in (True, False)}  # on CUDA one graph each
    for epoch in run.epochs():
        classify = epoch < cfg.pretrain_epochs
        batches = random_batches(len(train.labels), cfg.batch_size, sampler.generator) if classify else sampler.episodes()
        batches = batches.to(device)  # [steps, B], with B = N*(K+Q) in an episode
        augmentation = EpochAugmentation(batches, train.images, sampler.generator, cfg.least_crop, cfg.color_jitter)

        encoder.train()
        num_steps = min(cfg.steps_per_epoch or len(batches), len(batches))
        for step in run.steps(num_steps):
            set_learning_rate(optimizer, learning_rate(cfg, epoch + step / num_steps))
            run.track(*steps[classify](batches[step], *augmentation.of(step)))

        tested = encoder.eval()
        if cfg.principal_features:
            tested = with_principal_features(encoder, normalize(train.images[:: max(1, len(train.images) // 2000)], mean, std))
        val_loss, val_accuracy = validate(tested, val_images, val_episodes, val_way, cfg)
        run.end_epoch(learning_rate(cfg, epoch), val_loss, val_accuracy, tested)

    plot_training_curves(run.history, "ProtoNet", cfg.dataset, os.path.join(run.folder, "protonet_curves"))
    print(f"best epoch {run.best['epoch']}, {val_way}-way validation accuracy {run.best['val_accuracy']:.2%}: {run.best_path}")
    print(f"next: python evaluate.py --dataset={cfg.dataset}")


def learning_rate(cfg, epochs_done):
    """Return the learning rate after so many epochs (a fraction within an epoch)."""
    if epochs_done < cfg.pretrain_epochs:  # one cycle: up in the first fifth, down along half a cosine
        done = epochs_done / cfg.pretrain_epochs
        return cfg.pretrain_lr * (max(done, 0.001) / 0.2 if done < 0.2 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.2) / 0.8))
    done = (math.floor(epochs_done) - cfg.pretrain_epochs) / (cfg.epochs - cfg.pretrain_epochs)
    return cfg.lr * 0.1 ** sum(done >= share for share in cfg.lr_drops)


def mean_features(encoder, train, mean, std):
    """Return the mean feature of each training class, [C, D]."""
    classes = (train.images[train.labels == label] for label in range(len(train.class_names)))
    return torch.stack([encode_in_batches(encoder, normalize(images, mean, std)).mean(dim=0) for images in classes])


def random_batches(count, batch_size, generator):
    """Return the numbers 0..count-1 in random order as int64 [count // batch_size, batch_size]; the rest is left out."""
    size = min(batch_size, count)
    return torch.randperm(count, generator=generator)[: count // size * size].view(-1, size)


@torch.no_grad()
def validate(encoder, images, episodes, n_way, cfg):
    """Return (loss, accuracy), means over the validation episodes; every image is encoded once."""
    features = encode_in_batches(encoder, images)
    y_qry = episode_labels(n_way, cfg.n_query, images.device)
    losses, accuracies = [], []
    for episode in features[episodes]:  # [N*(K+Q), D]
        x_spt, x_qry = episode[: n_way * cfg.k_shot], episode[n_way * cfg.k_shot :]
        logits = distance_logits(x_qry, make_prototypes(x_spt, n_way))
        losses.append(F.cross_entropy(logits, y_qry))
        accuracies.append((logits.argmax(dim=1) == y_qry).float().mean())
    return torch.stack(losses).mean().item(), torch.stack(accuracies).mean().item()


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
