"""Train a Prototypical Network (Snell et al. 2017): an image belongs to the class with the nearest mean feature.

    python train_protonet.py                              the tutorial's recipe on CIFAR-100
    python train_protonet.py --dataset=glyphs --epochs=5  on the built-in data set
    python train_protonet.py --resume=true                go on after a stop
    python evaluate.py                                    then: the k-shot test

Writes checkpoints/<dataset>/protonet.pt (best epoch), protonet_last.pt (to resume), protonet.csv, protonet_curves.png.
"""

import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.augment import augment, draw_augmentation
from common.checkpoint import TrainingRun
from common.config import require_at_least, require_positive, run_script
from common.data import channel_statistics, load_dataset, normalize, split_classes
from common.device import pick_device
from common.encoder import encode_in_batches, make_encoder
from common.figures import plot_training_curves
from common.prototypes import distance_logits, make_prototypes
from common.samplers import FewShotBatchSampler, episode_labels


@dataclass
class Config:
    # data
    dataset: str = "cifar100"  # data set to train on: cifar100, glyphs, or a file or folder of yours in data_dir
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    # episode
    n_way: int = 5  # classes per training episode
    k_shot: int = 4  # support images per class
    n_query: int = 4  # query images per class
    val_way: int = 0  # classes per validation episode; 0: as n_way, or all validation classes if these are fewer
    # model
    proto_dim: int = 64  # length of a feature vector and of a prototype
    # optimizer
    epochs: int = 200  # passes over the training images
    lr: float = 2e-4  # learning rate of AdamW
    lr_drops: tuple[float, ...] = (0.7, 0.9)  # the learning rate is divided by 10 after these shares of the epochs
    weight_decay: float = 0.01  # of AdamW
    steps_per_epoch: int = 0  # training episodes per epoch; 0: as many as the images give
    # run
    seed: int = 42  # of weights, episodes and augmentation; validation episodes are the same for every seed
    device: str = "auto"  # auto, cuda, mps or cpu
    checkpoint_dir: str = "checkpoints"  # checkpoints go to <checkpoint_dir>/<dataset>/
    resume: bool = False  # go on with the unfinished run
    overwrite: bool = False  # discard the unfinished run

    def __post_init__(self):
        require_at_least(self, 2, "n_way")
        require_at_least(self, 1, "k_shot", "n_query", "proto_dim", "epochs")
        require_at_least(self, 0, "val_way", "weight_decay", "steps_per_epoch", "seed")
        require_positive(self, "lr", "lr_drops")


def main(cfg):
    device = pick_device(cfg.device)
    torch.manual_seed(cfg.seed)

    # Three disjoint sets of classes; the test classes are evaluate.py's.
    data = load_dataset(cfg.dataset, cfg.data_dir)
    split = split_classes(data.class_names)
    train, val = data.of_classes(split["train"]), data.of_classes(split["val"])
    mean, std = channel_statistics(train)

    val_way = cfg.val_way or min(cfg.n_way, len(val.class_names))
    episode_of = {"include_query": True, "num_query": cfg.n_query}
    sampler = FewShotBatchSampler(train.labels, cfg.n_way, cfg.k_shot, class_names=train.class_names, seed=cfg.seed, **episode_of)
    val_sampler = FewShotBatchSampler(val.labels, val_way, cfg.k_shot, shuffle=False, shuffle_once=True, class_names=val.class_names, seed=0, **episode_of)

    encoder = make_encoder(cfg.proto_dim).to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    about = {"encoder": {"proto_dim": cfg.proto_dim}, "class_split": split, "mean": mean, "std": std, "data_digest": data.digest()}
    run = TrainingRun(cfg, "protonet", encoder, optimizer, sampler.generator, about)

    train, val = train.to(device), val.to(device)
    num_support = cfg.n_way * cfg.k_shot
    y_qry = episode_labels(cfg.n_way, cfg.n_query, device)  # [N*Q]
    for epoch in run.epochs():
        lr = learning_rate(cfg, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        episodes = sampler.episodes()  # [E, N*(K+Q)]
        boxes, flips = draw_augmentation(episodes.numel(), *train.images.shape[2:], sampler.generator)
        episodes, boxes, flips = episodes.to(device), boxes.view(*episodes.shape, 4).to(device), flips.view(episodes.shape).to(device)

        encoder.train()
        for step in run.steps(min(cfg.steps_per_epoch or len(episodes), len(episodes))):
            images = augment(train.images[episodes[step]], boxes[step], flips[step])
            # Support and query go through the encoder together: BatchNorm sees both.
            features = encoder(normalize(images, mean, std))  # [N*(K+Q), D]
            x_spt, x_qry = features[:num_support], features[num_support:]
            logits = distance_logits(x_qry, make_prototypes(x_spt, cfg.n_way))  # [N*Q, N]
            loss = F.cross_entropy(logits, y_qry)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.track(loss, (logits.argmax(dim=1) == y_qry).float().mean())

        run.end_epoch(lr, *validate(encoder, normalize(val.images, mean, std), val_sampler.episodes(), val_way, cfg))

    plot_training_curves(run.history, "ProtoNet", cfg.dataset, os.path.join(run.folder, "protonet_curves"))
    print(f"best epoch {run.best['epoch']}, validation accuracy {run.best['val_accuracy']:.2%}: {run.best_path}")
    print(f"next: python evaluate.py --dataset={cfg.dataset}")


def learning_rate(cfg, epoch):
    """Return the learning rate of an epoch (counted from 0)."""
    return cfg.lr * 0.1 ** sum(epoch >= round(share * cfg.epochs) for share in cfg.lr_drops)


@torch.no_grad()
def validate(encoder, images, episodes, n_way, cfg):
    """Return (loss, accuracy), means over the validation episodes; every image is encoded once, in eval mode."""
    encoder.eval()
    features = encode_in_batches(encoder, images)
    y_qry = episode_labels(n_way, cfg.n_query, images.device)
    losses, accuracies = [], []
    for episode in features[episodes.to(images.device)]:  # [N*(K+Q), D]
        x_spt, x_qry = episode[: n_way * cfg.k_shot], episode[n_way * cfg.k_shot :]
        logits = distance_logits(x_qry, make_prototypes(x_spt, n_way))
        losses.append(F.cross_entropy(logits, y_qry))
        accuracies.append((logits.argmax(dim=1) == y_qry).float().mean())
    return torch.stack(losses).mean().item(), torch.stack(accuracies).mean().item()


if __name__ == "__main__":
    run_script(main, Config)
