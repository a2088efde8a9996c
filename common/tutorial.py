"""What the tutorial published: its test accuracy, and its checkpoints (PyTorch Lightning files)."""

# Of the 50,000 training images of CIFAR-100, for pixel values in 0..1.
CIFAR100_MEAN = (0.50707516, 0.48654887, 0.44091784)
CIFAR100_STD = (0.26733429, 0.25643846, 0.27615047)
# Accuracy in % as the tutorial prints it, by model and tested data set, for each k of K_SHOTS.
K_SHOTS = (2, 4, 8, 16, 32)
PRINTED = {
    ("protonet", "cifar100"): (44.30, 52.07, 57.59, 62.56, 66.49),
    ("protomaml", "cifar100"): (42.89, 52.27, 59.23, 63.94, 67.57),
    ("protonet", "svhn"): (18.82, 21.94, 25.59, 29.06, 32.93),
    ("protomaml", "svhn"): (17.11, 21.29, 27.62, 36.17, 46.03),
}
# The accuracy with correct predictions divided by the number of queries. Its ProtoNet test divides
# by too few where k does not divide the number of images of a class; its ProtoMAML test is right.
CORRECTED = {
    **PRINTED,
    ("protonet", "cifar100"): (44.30, 52.07, 57.59, 60.87, 62.80),
    ("protonet", "svhn"): (18.82, 21.94, 25.18, 28.12, 30.73),
}


def is_lightning_file(contents):
    """Return whether a loaded file is one of PyTorch Lightning's."""
    return isinstance(contents, dict) and "pytorch-lightning_version" in contents


def read_lightning_file(contents):
    """Return what a test needs of the tutorial's Lightning file, under this project's names."""
    hyperparameters, weights = contents["hyper_parameters"], contents["state_dict"]
    adapts = "num_inner_steps" in hyperparameters
    names = ("num_inner_steps", "lr_inner", "lr_output")
    inner_loop = {name: hyperparameters[name] for name in names if name in hyperparameters}
    return {
        "model": "protomaml" if adapts else "protonet",
        "dataset": "cifar100",
        "class_split": {},
        "config": {**inner_loop, "output_init": "prototypes"} if adapts else {},
        "epoch": contents.get("epoch", 0),
        "encoder": {"proto_dim": hyperparameters.get("proto_dim", 64)},
        "state_dict": {str(name).removeprefix("model."): weights[name] for name in weights},
        "mean": CIFAR100_MEAN,
        "std": CIFAR100_STD,
    }
