"""The checkpoint file: save, load, check."""

import hashlib
import io
import os
import warnings

import torch

from common.config import UserError, first_line
from common.data import SOURCES
from common.encoder import Encoder
from common.files import atomic_file
from common.images import size_text
from common.inner_loop import BATCHNORMS, OUTPUT_INITS
from common.parallel import on_first
from common.splits import PARTS, is_list_of_names, split_classes
from common.tutorial import is_lightning_file, read_lightning_file

FORMAT = "few-shot checkpoint, version 2"
MODEL_NAMES = {
    "classifier": "Classifier",
    "protonet": "ProtoNet",
    "maml": "MAML",
    "protomaml": "ProtoMAML",
}
# The rows of a test: each model, and the same fine-tuned on every support set.
ROW_NAMES = {
    row: title
    for model, name in MODEL_NAMES.items()
    for row, title in ((model, name), (f"{model}_finetuned", f"{name}, fine-tuned"))
} | {"pixels": "Pixels"}
ADAPTING = ("maml", "protomaml")  # the other models classify by nearest prototype


def save_checkpoint(path, contents):
    """Write a dict of tensors and plain values to `path` in one piece, with a digest of them.

    Raises UserError where that fails.
    """
    buffer = io.BytesIO()
    torch.save({**contents, "digest": content_digest(contents)}, buffer)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path):
    """Return the checkpoint in `path`, on the CPU: the dict that a training run saved.

    The tutorial's Lightning files have no digest: they are read with a notice. Code inside a file
    is never run. Raises UserError where the file is missing, damaged, foreign or hostile.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"there is no checkpoint {path}; train one first (python train_protonet.py --help) or "
            "pass another file"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it in one line
            contents = torch.load(path, map_location="cpu", weights_only=True)
    # On foreign bytes torch.load raises whatever its layers raise: pickle, zip, struct, unicode,
    # ...
    except Exception as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({first_line(error)}); it may be damaged or "
            "foreign: train again or pass another file"
        ) from error
    lightning = is_lightning_file(contents)
    if lightning:
        contents = {"class_split": {}, **read_lightning_file(contents, path)}
    else:
        _check_digest(contents, path)
    _check_contents(contents, path)
    if lightning:
        print(f"{path} carries no digest, so damage to it would go unnoticed")
    return contents


def content_digest(value):
    """Return the SHA-256, in hexadecimal, of nested dicts, lists, plain values and tensors.

    Their types, their order and every bit of the tensors count; where these lie does not.
    """
    digest = hashlib.sha256()

    def add(value):
        kind = next((kind for kind in (dict, list, tuple) if isinstance(value, kind)), type(value))
        if kind in (dict, list, tuple):
            digest.update(f"{kind.__name__} {len(value)};".encode())
            for item in value.items() if kind is dict else value:
                add(item)
        elif isinstance(value, torch.Tensor):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        else:
            text = repr(value).encode(errors="surrogatepass")
            digest.update(f"{kind.__name__} {len(text)};".encode() + text)

    add(value)
    return digest.hexdigest()


def encoder_of(checkpoint, path):
    """Return the encoder of a loaded checkpoint, on the CPU, in eval mode.

    Raises UserError where the weights do not fit it or are not finite.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoder = Encoder(**checkpoint["encoder"])
        encoder.load_state_dict(checkpoint["state_dict"])
    # A number that no network has is refused by whatever layer it reaches first.
    except Exception as error:
        raise UserError(
            f"{path}: the weights do not fit the encoder that it names ({first_line(error)}); pass "
            "a checkpoint of this project or of the tutorial"
        ) from error
    if not is_finite(encoder):
        raise UserError(
            f"{path}: the weights hold NaN or infinity; train again or pass another file"
        )
    return encoder.eval()


def image_shape(checkpoint):
    """Return (height, width), in pixels, of the images that a checkpoint was trained on.

    None where it does not say: the tutorial's, and some that come with the project.
    """
    return tuple(checkpoint["image_shape"]) if "image_shape" in checkpoint else None


def load_encoder(path, data):
    """Return the encoder in `path`, on the CPU, in eval mode.

    data: the TrainingData of this run. Raises UserError where the encoder was trained on other
    classes, so that it may have seen the ones that are held out here, or on images of another size.
    """
    split, shape = data.split, tuple(data.train.images.shape[2:])
    checkpoint = on_first(lambda: load_checkpoint(path))
    trained_split = checkpoint["class_split"]
    if not trained_split and data.train.name == "cifar100":
        # The tutorial's files name no classes: they are its split, of names in alphabetical order.
        trained_split = split_classes(sorted(name for part in split.values() for name in part))
    if trained_split != split:
        raise UserError(
            f"{path} was trained on other classes than this run; start from a checkpoint of the "
            "same data set and the same --split"
        )
    if (trained_on := image_shape(checkpoint)) not in (None, shape):
        raise UserError(
            f"{path} was trained on images of {size_text(trained_on)} pixels, this run's have "
            f"{size_text(shape)}; pass --image_size={trained_on[0]}, or start from another file"
        )
    print_change(data.train.name, lambda: data.digest, checkpoint, path)
    return encoder_of(checkpoint, path)


def print_change(data_name, digest, checkpoint, path):
    """Print that a data set has changed since a checkpoint was trained on it, if it has.

    digest: function that returns the digest of the data set as it is now.
    """
    if data_name in SOURCES:  # there, the order may differ, not the images
        return
    if checkpoint.get("data_digest") not in (None, digest()):
        print(
            f"{data_name} has changed since {path} was trained on it: images of the training may "
            "be among those of the test"
        )


def starting_encoder(cfg, data):
    """Return the encoder of `cfg.init_from` if that names a file, else a new one.

    A new one has features of `cfg.proto_dim` numbers; it computes in `cfg.precision`. Raises
    UserError as `load_encoder` does, or where another proto_dim than the file's is asked for.
    """
    encoder = load_encoder(cfg.init_from, data) if cfg.init_from else Encoder(cfg.proto_dim)
    found = encoder.arguments["proto_dim"]
    if cfg.proto_dim not in (found, 64):  # 64 stands there unasked
        raise UserError(
            f"proto_dim is {cfg.proto_dim}, but {cfg.init_from} has features of {found} numbers; "
            f"pass --proto_dim={found} or start from another file"
        )
    encoder.precision = cfg.precision
    return encoder


def is_finite(encoder):
    """Return whether all weights and statistics are finite, with one look at the device."""
    finite = [tensor.isfinite().all() for tensor in encoder.state_dict().values()]
    return torch.stack(finite).all().item()


def _check_digest(contents, path):
    """Take the digest out of `contents`; raise UserError where it is missing or does not fit."""
    found = contents.get("format") if isinstance(contents, dict) else type(contents).__name__
    if found != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this project (found {str(found)[:60]!r}, needed "
            f"{FORMAT!r}); pass another file"
        )
    digest = contents.pop("digest", None)
    try:
        fits = digest == content_digest(contents)
    except Exception:  # tensors of a kind that no checkpoint holds
        fits = False
    if not fits:
        raise UserError(
            f"{path} is damaged: its content does not fit its digest; pass another file or train "
            "again"
        )


def _check_contents(contents, path):
    """Raise UserError unless `contents` has all that a test reads, each of the right kind."""
    kinds = {
        "model": str,
        "dataset": str,
        "config": dict,
        "encoder": dict,
        "state_dict": dict,
        "class_split": dict,
        "epoch": int,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(contents.get(name), kind)]
    for name in ("mean", "std"):
        values = contents.get(name)
        if (
            not isinstance(values, (tuple, list))
            or len(values) != 3
            or not _usable_numbers(*values)
        ):
            wrong.append(name)
    if not wrong and contents["class_split"] and not _is_split(contents["class_split"]):
        wrong.append("class_split")
    if not wrong and min(contents["std"]) <= 0:
        wrong.append("std")
    if not wrong and contents["model"] in ADAPTING:
        config = contents["config"]
        wrong += [
            name for name in ("lr_inner", "lr_output") if not _usable_numbers(config.get(name))
        ]
        for name, allowed in (("output_init", OUTPUT_INITS), ("batchnorm", BATCHNORMS)):
            if config.get(name, allowed[0]) not in allowed:
                wrong.append(name)
    if not wrong and not _is_shape(contents.get("image_shape", [32, 32])):
        wrong.append("image_shape")
    if wrong:
        raise UserError(
            f"{path} is damaged: its {wrong[0]!r} cannot be used; pass another file or train again"
        )
    if contents["model"] not in MODEL_NAMES:
        raise UserError(
            f"{path} holds a model {contents['model'][:60]!r}, but one of "
            f"{', '.join(MODEL_NAMES)} is needed; pass another file"
        )


def _usable_numbers(*values):
    return all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in values)


def _is_shape(shape):
    return (
        isinstance(shape, (tuple, list))
        and len(shape) == 2
        and all(isinstance(side, int) and side > 0 for side in shape)
    )


def _is_split(split):
    return all(is_list_of_names(split.get(part)) and split[part] for part in PARTS)
