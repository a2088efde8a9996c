"""Train a classifier of all training classes at once; its features make a strong few-shot baseline.

No episode is seen in training. The last layer is a prototype per training class, learned like a
weight, and an image is classified by its distances to them; new classes are then classified by
nearest prototype, as by a ProtoNet (Chen et al. 2019, "A Closer Look at Few-shot Classification";
Tian et al. 2020, "Rethinking Few-Shot Image Classification", for the teacher).

    python train_classifier.py --recipe=teacher     CIFAR-100: the teacher, from the labels alone
    python train_classifier.py --recipe=best        then: learn from the teacher as well
    python train_classifier.py --recipe=fine        then: feature maps of twice the height and width
    python train_classifier.py --dataset=glyphs --epochs=8     the built-in data set
    python train_classifier.py --resume=true        go on after a stop
    python evaluate.py                              then: the k-shot test

Writes checkpoints/<dataset>/classifier.pt (best epoch), classifier_last.pt (to resume),
classifier.csv and classifier_curves.png; `teacher` and `fine` write into folders of those names. An
epoch takes about 105 s on 2 CPU cores; one of `fine`, 4 times the work in bfloat16, took 115 s on a
machine with avx512_bf16. 10-way validation accuracy on CIFAR-100: `teacher` 63 % after 30 epochs,
`best` 66 % after 40, `fine` 69 % after 30.
"""

import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from common.augment import EpochBatches, augment
from common.checkpoint import load_encoder
from common.config import UserError, refuse_own_output, require, require_one_of
from common.cuda_graph import CudaGraphStep
from common.data import SMALLEST_IMAGE, load_training_data
from common.device import pick_device
from common.encoder import PRECISIONS, Encoder, encode_in_batches, with_principal_features
from common.optimizer import make_optimizer, one_cycle, set_learning_rate
from common.parallel import all_reduce, equal_share, gather, process_count, share
from common.prototypes import accuracy, distance_logits, mean_episode_loss
from common.samplers import validation_episodes
from common.script import run_script
from common.training_run import TrainingRun


@dataclass
class Config:
    # recipe
    recipe: str = "plain"  # plain (the values below), teacher, best or fine; options override it
    # data
    dataset: str = "cifar100"  # cifar100, glyphs, or a file or folder of yours in data_dir
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    split: str = "auto"  # of the classes: auto, tutorial, cifar_fs, fc100 or a JSON file
    image_size: int = 32  # side in pixels that a folder's photographs are brought to
    least_crop: float = 0.4  # area of the smallest random crop, as a share of the image
    color_jitter: float = 0.3  # largest random change of brightness, contrast and saturation
    # loss
    label_smoothing: float = 0.1  # share of the target probability that is spread over all classes
    teacher: str = ""  # checkpoint whose class probabilities are learned as well, if any
    distillation_weight: float = 0.5  # of the teacher's part of the loss; the labels have the rest
    temperature: float = 2.0  # divides the teacher's logits: a higher one makes it less certain
    # validation episode
    n_way: int = 10  # classes per episode, at most all
    k_shot: int = 4  # support images per class
    n_query: int = 4  # query images per class
    # model
    proto_dim: int = 64  # length of a feature vector and of a prototype
    stem_stride: int = 2  # of the first convolution; 1: finer feature maps for 4 times the work
    principal_features: bool = False  # keep principal directions in place of the last layer
    # optimizer
    epochs: int = 30  # passes over the training images
    batch_size: int = 128  # images per step
    lr: float = 3e-3  # highest learning rate of AdamW, in one cycle over all epochs
    weight_decay: float = 0.05  # of AdamW
    steps_per_epoch: int = 0  # steps per epoch at most; 0: as many as the images give
    # run
    seed: int = 42  # of weights, batches and augmentation; validation episodes are always the same
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "float32"  # of the encoder: float32, or bfloat16, faster on some machines
    cuda_graphs: bool = True  # false: run CUDA steps eagerly, to debug one or to save memory
    checkpoint_dir: str = "checkpoints"  # checkpoints go to <checkpoint_dir>/<dataset>/
    resume: bool = False  # go on with the unfinished run
    overwrite: bool = False  # discard the unfinished run

    def __post_init__(self):
        require(self, "image_size", least=SMALLEST_IMAGE)
        require(self, "n_way", "batch_size", least=2)
        require(self, "stem_stride", least=1, most=2)
        require(self, "k_shot", "n_query", "proto_dim", "epochs", least=1)
        require(self, "weight_decay", "steps_per_epoch", "seed", least=0)
        require(self, "label_smoothing", "distillation_weight", "color_jitter", least=0, most=1)
        require(self, "least_crop", above=0, most=1)
        require_one_of(self, "precision", PRECISIONS)
        require(self, "lr", "temperature", above=0)
        refuse_own_output(self, "teacher", "classifier")
        for name in ("distillation_weight", "temperature"):
            if not self.teacher and getattr(self, name) != getattr(Config, name):
                raise UserError(f"{name} does nothing without a teacher; pass --teacher=FILE, too")


# For CIFAR-100; docs/experiments.md has the numbers behind them.
RECIPES = {
    "plain": {},
    "teacher": {"checkpoint_dir": "checkpoints/teacher"},
    "best": {
        "epochs": 40,
        "teacher": "checkpoints/teacher/cifar100/classifier.pt",
        "principal_features": True,
    },
    "fine": {
        "teacher": "checkpoints/cifar100/classifier.pt",
        "stem_stride": 1,
        "principal_features": True,
        "precision": "bfloat16",
        "checkpoint_dir": "checkpoints/fine",
    },
}


def learn_batch(cfg, data, encoder, class_prototypes, teacher, batch, *views):
    """Set the gradients of the loss of a batch of images; return the loss and the accuracy.

    batch: indices of images, int64 [B]; views: their random crops, flips and colours.
    class_prototypes: Embedding [C, D]. teacher: None, or (encoder, prototypes [C, D]).
    """
    images = data.normalize(augment(data.train.images[batch], *views))  # [B, 3, H, W]
    labels = data.train.labels[batch]  # [B]
    logits = distance_logits(encoder(images), class_prototypes.weight)  # [B, C]
    loss = F.cross_entropy(logits, labels, label_smoothing=cfg.label_smoothing)
    if teacher:  # it sees the same augmented images
        with torch.no_grad():
            teacher_logits = distance_logits(teacher[0](images), teacher[1])  # [B, C]
            # Only the teacher is softened, so the loss needs no factor of temperature squared.
            probabilities = F.softmax(teacher_logits / cfg.temperature, dim=1)
        distillation = F.cross_entropy(logits, probabilities)
        loss = (1 - cfg.distillation_weight) * loss + cfg.distillation_weight * distillation
    encoder.zero_grad()
    class_prototypes.zero_grad()
    loss.backward()
    return loss.detach(), accuracy(logits, labels)


def main(cfg):
    equal_share(cfg, "batch_size")
    device = pick_device(cfg.device)
    torch.manual_seed(cfg.seed)

    data = load_training_data(cfg.dataset, cfg.data_dir, device, cfg.split, cfg.image_size)
    generator = torch.Generator().manual_seed(cfg.seed)  # draws batches and augmentation
    val_way = min(cfg.n_way, len(data.val.class_names))
    val_episodes = validation_episodes(data.val, val_way, cfg.k_shot, cfg.n_query).to(device)
    val_images = data.normalize(data.val.images)

    teacher = load_teacher(cfg.teacher, data, device) if cfg.teacher else None
    if teacher:
        teacher[0].precision = cfg.precision
    # All features have one learned length; the class prototypes are free.
    encoder = Encoder(cfg.proto_dim, unit_features=True, stem_stride=cfg.stem_stride).to(device)
    encoder.precision = cfg.precision
    class_prototypes = torch.nn.Embedding(len(data.train.class_names), cfg.proto_dim)
    torch.nn.init.normal_(class_prototypes.weight, std=0.1)
    class_prototypes.to(device)
    parameters = [*encoder.parameters(), *class_prototypes.parameters()]
    optimizer = make_optimizer(parameters, cfg.lr, cfg.weight_decay, device)
    run = TrainingRun(
        cfg, "classifier", encoder, optimizer, generator, data, class_prototypes, teacher
    )

    step_fn = partial(learn_batch, cfg, data, encoder, class_prototypes, teacher)
    step_fn = CudaGraphStep(step_fn, device, cfg.cuda_graphs)
    for epoch in run.epochs():
        indices = random_batches(len(data.train.labels), cfg.batch_size, generator)  # [steps, B]
        batches = EpochBatches(
            indices[:, :, None],  # [steps, B, 1]: B tasks of one image
            data.train.images,
            generator,
            cfg.least_crop,
            cfg.color_jitter,
        )

        encoder.train()
        for step in run.steps(len(batches)):
            progress = (epoch + step / run.num_steps) / cfg.epochs  # share of the run
            set_learning_rate(optimizer, one_cycle(cfg.lr, progress))
            loss, acc = step_fn(*batches.of(step))
            # Each process normalises its share of the batch by the share's own statistics; the
            # running statistics are the mean of all (docs/scaling.md).
            gradients = [parameter.grad for parameter in parameters]
            all_reduce(means=[*gradients, loss, acc, *encoder.buffers()])
            optimizer.step()
            run.track(loss, acc)

        # Validation by nearest prototype, on episodes of other classes.
        validated = encoder.eval()
        if cfg.principal_features:
            sample = data.train.images[:: max(1, len(data.train.images) // 2000)]
            validated = with_principal_features(encoder, data.normalize(sample))
        features = encode_in_batches(validated, val_images[share()])
        features = gather(features, len(val_images))
        result = mean_episode_loss(features, val_episodes, val_way, cfg.k_shot)
        run.end_epoch(one_cycle(cfg.lr, epoch / cfg.epochs), *result, validated)
    run.finish(val_way)


def load_teacher(path, data, device):
    """Return the teacher's encoder and its mean feature of each training class, [C, D]."""
    encoder = load_encoder(path, data).to(device)
    means = []
    for label in range(len(data.train.class_names)):
        images = data.normalize(data.train.images[data.train.labels == label])
        means.append(encode_in_batches(encoder, images).mean(dim=0))
    return encoder, torch.stack(means)


def random_batches(count, batch_size, generator):
    """Return 0..count-1 in random order as int64 [count // batch_size, batch_size].

    The rest is left out. A batch is never larger than `count`, and the processes share it equally.
    """
    size = min(batch_size, count // process_count() * process_count())
    order = torch.randperm(count, generator=generator)
    return order[: count // size * size].view(-1, size)


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
