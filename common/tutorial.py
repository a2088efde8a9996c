"""What the tutorial published: its test accuracy, and its checkpoints (PyTorch Lightning files)."""

from common.config import UserError
from common.data import CIFAR100_MEAN, CIFAR100_STD

# Accuracy in % as the tutorial prints it, by model and tested data set, for each k of K_SHOTS.
K_SHOTS = (2, 4, 8, 16, 32)
PRINTED = {
    ("protonet", "cifar100"): (44.30, 52.07, 57.59, 62.56, 66.49),
    ("protomaml", "cifar100"): (42.89, 52.27, 59.23, 63.94, 67.57),
    ("protonet", "svhn"): (18.82, 21.94, 25.59, 29.06, 32.93),
    ("protomaml", "svhn"): (17.11, 21.29, 27.62, 36.17, 46.03),
}
# The standard deviation over support sets, which it prints behind each of them.
PRINTED_STD = {
    ("protonet", "cifar100"): (3.63, 2.27, 1.30, 1.02, 0.87),
    ("protomaml", "cifar100"): (3.82, 2.72, 1.50, 1.24, 0.90),
    ("protonet", "svhn"): (2.28, 2.09, 1.76, 1.84, 1.33),
    ("protomaml", "svhn"): (1.95, 1.92, 1.84, 1.80, 1.65),
}
# The accuracy with correct predictions divided by the number of queries. Its ProtoNet test divides
# by too few where k does not divide the number of images of a class; its ProtoMAML test is right.
CORRECTED = {
    **PRINTED,
    ("protonet", "cifar100"): (44.30, 52.07, 57.59, 60.87, 62.80),
    ("protonet", "svhn"): (18.82, 21.94, 25.18, 28.12, 30.73),
}


def accuracy(numbers, model, dataset, k_shot):
    """Return the accuracy in % out of PRINTED or CORRECTED, or None where the tutorial has none."""
    known = numbers.get((model, dataset))
    return known[K_SHOTS.index(k_shot)] if known and k_shot in K_SHOTS else None


def is_lightning_file(contents):
    """Return whether a loaded file is one of PyTorch Lightning's."""
    return isinstance(contents, dict) and "pytorch-lightning_version" in contents


def read_lightning_file(contents, path):
    """Return what a test needs of the tutorial's Lightning file, under this project's names.

    Raises UserError where `contents` lacks the hyperparameters or the weights.
    """
    hyperparameters, weights = contents.get("hyper_parameters"), contents.get("state_dict")
    if not isinstance(hyperparameters, dict) or not isinstance(weights, dict):
        raise UserError(
            f"{path} is a Lightning file without hyper_parameters or state_dict; pass one of the "
            "tutorial's or of this project's"
        )
    adapts = "num_inner_steps" in hyperparameters
    names = ("num_inner_steps", "lr_inner", "lr_output")
    inner_loop = {name: hyperparameters[name] for name in names if name in hyperparameters}
    return {
        "model": "protomaml" if adapts else "protonet",
        "dataset": "cifar100",
        "config": {**inner_loop, "output_init": "prototypes"} if adapts else {},
        "epoch": contents.get("epoch", 0),
        "encoder": {"proto_dim": hyperparameters.get("proto_dim", 64)},
        "state_dict": {str(name).removeprefix("model."): weights[name] for name in weights},
        "mean": CIFAR100_MEAN,
        "std": CIFAR100_STD,
    }
