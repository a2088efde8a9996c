"""Train a classifier of all training classes at once; its features make a strong few-shot baseline.

No episode is seen in training. The last layer is a prototype per training class, learned like a
weight, and an image is classified by its distances to them; new classes are then classified by
nearest prototype, as by a ProtoNet (Chen et al. 2019, "A Closer Look at Few-shot Classification";
Tian et al. 2020, "Rethinking Few-Shot Image Classification", for the teacher).

    python train_classifier.py --recipe=fast        CIFAR-100: a minute, see docs/speedrun.md
    python train_classifier.py --recipe=teacher     CIFAR-100: the teacher, from the labels alone
    python train_classifier.py --recipe=best        then: learn from the teacher as well
    python train_classifier.py --recipe=fine        feature maps of twice the height and width
    python train_classifier.py --recipe=resnet12    a larger network, and better than all of these
    python train_classifier.py --dataset=glyphs --epochs=8     the built-in data set
    python train_classifier.py --resume=auto        start, or go on after a stop

Writes <checkpoint_dir>/<dataset>/classifier.pt (best epoch), classifier_last.pt (to resume),
classifier.csv and classifier_curves.png, and prints the command that tests it. checkpoint_dir is
checkpoints; fast and teacher have folders of that name in it. An epoch takes 105 s on 2 CPU cores;
in bfloat16, with avx512_bf16, one of `fine` 115 s and of `resnet12` 71 s. 10-way 4-shot validation
accuracy on CIFAR-100: `teacher` 63 % after 30 epochs, `best` 66 % after 40, `fine` 69 % after 30,
`resnet12` 73 % after 20.
"""

import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from common import UserError
from common.augment import AugmentedBatches
from common.checkpoint import load_encoder, starting_encoder
from common.config import require, run_script
from common.cuda_graph import CudaGraphStep
from common.data import load_training_data
from common.device import pick_device
from common.encoders import encode_in_batches, with_principal_features
from common.optimizer import make_optimizer, one_cycle, set_learning_rate
from common.parallel import all_gather, all_reduce, equal_share, my_slice, process_count
from common.prototypes import accuracy, distance_logits, mean_loss
from common.samplers import validation_episodes
from common.training_run import TrainingRun

MODEL = "classifier"  # names the files, and the rows of a test


@dataclass
class Config:
    # recipe
    recipe: str = "plain"  # plain (below), fast, teacher, best, fine, resnet12; options override it
    # data
    dataset: str = "cifar100"  # cifar100, glyphs, or a file or folder of yours in data_dir
    data_dir: str = os.environ.get("PATH_DATASETS", "data")  # folder of the data sets
    split: str = "auto"  # of the classes: auto, tutorial, cifar_fs, fc100 or a JSON file
    image_size: int = 32  # side in pixels that a folder's photographs are brought to
    min_crop_area: float = 0.4  # area of the smallest random crop, as a share of the image
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
    encoder: str = "densenet"  # conv4, resnet12, torchvision:NAME, timm:NAME or FILE.py:CLASS
    width: int = 0  # channels of the first block of conv4 and resnet12; 0: 64
    proto_dim: int = 0  # length of a feature vector; 0: the encoder's own, 64 with densenet
    stem_stride: int = 2  # of the first convolution; 1: finer feature maps for 4 times the work
    principal_features: bool = False  # keep principal directions in place of the last layer
    # optimizer
    optimizer: str = "adamw"  # or muon: convolutions by Muon at 6 times lr, the rest by AdamW
    epochs: int = 30  # passes over the training images
    batch_size: int = 128  # images per step
    first_size: int = 0  # side in pixels of the images in the first half of the epochs; 0: full
    lr: float = 3e-3  # highest learning rate, in one cycle over all epochs
    weight_decay: float = 0.05  # each step shrinks the weights by lr * weight_decay
    steps_per_epoch: int = 0  # steps per epoch at most; 0: as many as the images give
    # run
    seed: int = 42  # of weights, batches and augmentation; validation episodes are always the same
    device: str = "auto"  # auto (CUDA if there is one, else the CPU), cuda, mps or cpu
    precision: str = "float32"  # of the encoder: float32, or bfloat16, faster on some machines
    cuda_graphs: bool = True  # false: run CUDA steps eagerly, to debug one or to save memory
    checkpoint_dir: str = "checkpoints"  # checkpoints go to <checkpoint_dir>/<dataset>/
    resume: str = "false"  # true: go on with the unfinished run; auto: where there is one
    overwrite: bool = False  # discard the run that is there

    def __post_init__(self):
        require(self, "n_way >= 2", "batch_size >= 2", "k_shot >= 1", "n_query >= 1")
        require(
            self, "proto_dim >= 0", "width >= 0", "1 <= stem_stride <= 2", "epochs >= 1", "lr > 0"
        )
        require(self, "weight_decay >= 0", "steps_per_epoch >= 0", "seed >= 0", "temperature > 0")
        require(self, "0 <= label_smoothing <= 1", "0 <= distillation_weight <= 1")
        require(self, "0 < min_crop_area <= 1", "0 <= color_jitter <= 1")
        # The features of other encoders may have a length that depends on the image size.
        scalable = "encoder in ('densenet', 'resnet12')"
        require(self, f"first_size == 0 or first_size >= 16 and {scalable}")
        require(self, "resume.lower() in ('false', 'true', 'auto')")
        require(self, "precision in ('float32', 'bfloat16')", "optimizer in ('adamw', 'muon')")


# A recipe is what one would type behind the script's name. For CIFAR-100; docs/experiments.md has
# the numbers behind them.
RECIPES = {
    "plain": "",
    # The accuracy of the tutorial's ProtoNet in a minute: docs/speedrun.md has what was tried.
    "fast": (
        "--optimizer=muon --epochs=3 --first_size=16 --batch_size=256 --lr=0.015 "
        "--weight_decay=0.1 --label_smoothing=0.2 --min_crop_area=1 --color_jitter=0 "
        "--principal_features=true --precision=bfloat16 --checkpoint_dir=checkpoints/fast"
    ),
    "teacher": "--checkpoint_dir=checkpoints/teacher",
    "best": (
        "--epochs=40 --teacher=checkpoints/teacher/cifar100/classifier.pt --principal_features=true"
    ),
    "fine": (
        "--teacher=checkpoints/best/cifar100/classifier.pt --stem_stride=1 "
        "--principal_features=true --precision=bfloat16"
    ),
    # 3.1 M parameters, from the labels alone.
    "resnet12": (
        "--encoder=resnet12 --width=32 --optimizer=muon --epochs=20 --batch_size=256 --lr=0.012 "
        "--weight_decay=0.1 --precision=bfloat16"
    ),
}


def train_step(cfg, encoder, class_prototypes, teacher, optimizer, images, labels):
    """Take a step on images [B, 3, H, W] with labels int64 [B]; return the loss and the accuracy.

    class_prototypes: Embedding [C, D]. teacher: None, or (encoder, prototypes [C, D]).
    """
    logits = distance_logits(encoder(images), class_prototypes.weight)  # [B, C]
    loss = F.cross_entropy(logits, labels, label_smoothing=cfg.label_smoothing)
    if teacher:  # it sees the same augmented images
        with torch.no_grad():
            teacher_logits = distance_logits(teacher[0](images), teacher[1])  # [B, C]
            # Only the teacher is softened, so the loss needs no factor of temperature squared.
            probabilities = F.softmax(teacher_logits / cfg.temperature, dim=1)
        distillation = F.cross_entropy(logits, probabilities)
        loss = (1 - cfg.distillation_weight) * loss + cfg.distillation_weight * distillation
    optimizer.zero_grad()
    loss.backward()
    loss, acc = loss.detach(), accuracy(logits, labels)
    if process_count() > 1:
        # Each process normalises by the statistics of its share of the batch (docs/scaling.md).
        groups = optimizer.param_groups
        gradients = [parameter.grad for group in groups for parameter in group["params"]]
        statistics = [buffer for buffer in encoder.buffers() if buffer.is_floating_point()]
        all_reduce(means=[*gradients, loss, acc, *statistics])
    optimizer.step()
    return loss, acc


def main(cfg):
    equal_share(cfg, "batch_size")
    device = pick_device(cfg.device, cfg.precision, training=True)
    torch.manual_seed(cfg.seed)

    data = load_training_data(cfg.dataset, cfg.data_dir, device, cfg.split, cfg.image_size)
    generator = torch.Generator().manual_seed(cfg.seed)  # draws batches and augmentation
    val_way = min(cfg.n_way, len(data.val.class_names))
    val_episodes = validation_episodes(data.val, val_way, cfg.k_shot, cfg.n_query).to(device)

    teacher = load_teacher(cfg, data, device) if cfg.teacher else None
    # All features have one learned length; the class prototypes are free.
    options = {"stem_stride": cfg.stem_stride} if cfg.stem_stride != 2 else {}
    encoder = starting_encoder(cfg, data, unit_features=True, **options).to(device)
    if teacher and len({teacher[0].mean, encoder.mean} - {None}) == 2:
        raise UserError("teacher and encoder want images normalised in two ways; take another")
    num_classes = len(data.train.class_names)
    class_prototypes = torch.nn.Embedding(num_classes, encoder.num_features)
    torch.nn.init.normal_(class_prototypes.weight, std=0.1)
    class_prototypes.to(device)
    parameters = [*encoder.parameters(), *class_prototypes.parameters()]
    optimizer = make_optimizer(parameters, cfg.lr, cfg.weight_decay, device, cfg.optimizer)
    run = TrainingRun(cfg, MODEL, encoder, optimizer, generator, data, class_prototypes)

    size = min(cfg.batch_size, len(data.train.labels) // process_count() * process_count())
    step = partial(train_step, cfg, encoder, class_prototypes, teacher, optimizer)
    sizes = {0, cfg.first_size}  # 0: full
    steps = {side: CudaGraphStep(step, device, cfg.cuda_graphs) for side in sizes}
    for epoch in run.epochs():
        order = torch.randperm(len(data.train.labels), generator=generator)
        indices = order[: len(order) // size * size].view(-1, size)  # [steps, B]
        side = cfg.first_size if epoch + 1 <= cfg.epochs / 2 else 0
        augmentation = generator, cfg.min_crop_area, cfg.color_jitter, my_slice(), side
        batches = AugmentedBatches(data, indices, *augmentation)
        labels = data.train.labels[indices[:, my_slice()].to(device)]  # [steps, B]

        encoder.train()
        for number, images in enumerate(run.progress(batches)):  # [B, 3, H, W]
            progress = (epoch + number / run.num_steps) / cfg.epochs  # share of the run
            set_learning_rate(optimizer, one_cycle(cfg.lr, progress))
            run.track(*steps[side](images, labels[number]))

        # Validation by nearest prototype, on episodes of other classes.
        validated = encoder.eval()
        if cfg.principal_features:
            sample = data.train.images[:: max(1, len(data.train.images) // 2000)]
            validated = with_principal_features(encoder, data.normalize(sample))
        features = encode_in_batches(validated, data.val.images[my_slice()], data.normalize)
        features = all_gather(features, len(data.val.images))
        result = mean_loss(features, val_episodes, val_way, cfg.k_shot)
        run.end_epoch(one_cycle(cfg.lr, epoch / cfg.epochs), *result, validated)
    run.finish(f"{num_classes} at once", f"{val_way}-way {cfg.k_shot}-shot")


def load_teacher(cfg, data, device):
    """Return the teacher's encoder and its mean feature of each training class, [C, D]."""
    encoder = load_encoder(cfg.teacher, data).to(device)
    means = []
    for label in range(len(data.train.class_names)):
        images = data.train.images[data.train.labels == label]
        means.append(encode_in_batches(encoder, images, data.normalize).mean(dim=0))
    encoder.precision = cfg.precision
    return encoder, torch.stack(means)


if __name__ == "__main__":
    run_script(main, Config, RECIPES)
