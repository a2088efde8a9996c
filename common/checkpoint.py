"""The checkpoint file: save, load, check; the encoder in it."""

import glob
import hashlib
import io
import os
import re
import warnings

import torch

from common import ROOT, UserError, first_line, script_command
from common.encoders import Encoder, is_pretrained
from common.files import atomic_file
from common.splits import PARTS, split_classes
from common.tutorial import is_lightning_file, read_lightning_file

# The models that come with the project: <recipe>/<data set>/<model>.pt.
INCLUDED = os.path.join(ROOT, "checkpoints")
FORMAT = "few-shot checkpoint, version 2"
# What a checkpoint must hold. `model` is the name under which it is tested; one whose `config` has
# an inner loop adapts to every support set, the others take the nearest prototype.
CONTENTS = {
    "model": str,
    "dataset": str,
    "config": dict,
    "encoder": dict,
    "state_dict": dict,
    "class_split": dict,
    "epoch": int,
    "image_shape": list,
    "mean": (tuple, list),
    "std": (tuple, list),
}


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

    path: also torchvision:NAME or timm:NAME, a pretrained network. The tutorial's Lightning files
    have no digest: they are read with a notice. Code inside a file is never run. Raises UserError
    where the file is missing, damaged, foreign or hostile.
    """
    if is_pretrained(str(path)):
        return pretrained_checkpoint(path)
    path = included_or(path)
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}; train a model first, or pass another file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it in one line
            contents = torch.load(path, map_location="cpu", weights_only=True)
        if is_lightning_file(contents):
            print(f"{path} carries no digest, so damage to it would go unnoticed")
            contents = read_lightning_file(contents)
        elif contents.pop("digest") != content_digest(contents) or contents["format"] != FORMAT:
            raise ValueError(f"its digest or format does not fit, {FORMAT!r} is needed")
        # The tutorial's files, and some that come with the project, do not say it.
        contents.setdefault("image_shape", [32, 32])
        for name, kind in CONTENTS.items():
            if not isinstance(contents[name], kind):
                raise TypeError(f"its {name!r} cannot be used")
        return contents
    except Exception as error:  # a bad file can raise anything here
        if objects := re.search(r"GLOBAL (\S+)", str(error)):
            found = f"{path} holds more than tensors and plain values ({objects[1]}), and loading "
            found += "it could run code of the file"
            how = "save it again with plain values alone: str(path), float(number)"
            raise UserError(f"{found}; {how}") from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        if "weights_only" in reason:  # torch's advice to run what is in the file
            reason = "it holds neither tensors nor plain values"
        raise UserError(
            f"{path} is damaged, or no checkpoint of this project ({reason}); train again or pass "
            "another file"
        ) from error


def pretrained_checkpoint(name):
    """Return what load_checkpoint does for a network with its published weights.

    Its class_split is None: it was trained on other classes, but may have seen all that there are.
    """
    encoder = Encoder(name=name, unit_features=True)  # cosines: else probabilities are near 1
    contents = {"model": name, "dataset": "", "config": {}, "epoch": 0, "class_split": None}
    contents |= {"encoder": encoder.arguments, "state_dict": encoder.state_dict()}
    size = {"image_shape": list(encoder.features.size)}
    return {**contents, **size, "mean": encoder.mean, "std": encoder.std}


def included_or(path):
    """Return `path`, or the file that comes with the project where only that exists.

    So a script finds the included models from whatever folder it is called.
    """
    ours = os.path.join(ROOT, path)
    return ours if os.path.exists(ours) and not os.path.exists(path) else path


def find_checkpoints(dataset, named=()):
    """Return paths of checkpoints: those named, files or folders, else the user's, else included.

    dataset: on which they were trained. Raises UserError where there are none.
    """
    included = [os.path.join(INCLUDED, recipe, dataset) for recipe in ("best", "quick")]
    found = []
    for path in map(included_or, named or (os.path.join("checkpoints", dataset), *included)):
        files = sorted(glob.glob(os.path.join(glob.escape(path), "*.pt")))
        # Those ending in _last are to resume from.
        found += [file for file in files if not file.endswith("_last.pt")]
        if named and not os.path.isdir(path):
            found.append(path)
        if found and not named:
            print(f"models: those in {path}{os.sep}")
            break
    if not found:
        train = script_command("train_protonet.py", f"--dataset={dataset}")
        where = f"in {', '.join(named)}" if named else f"for {dataset}"
        raise UserError(f"found no checkpoint {where}; train one ({train}) or name a file")
    return found


def content_digest(value):
    """Return the SHA-256, in hexadecimal, of nested dicts, lists, plain values and tensors.

    Types, order and every bit count; where a tensor lies does not.
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
            image_size = checkpoint["image_shape"][0]
            encoder = Encoder(**checkpoint["encoder"], image_size=image_size, weights=False)
        encoder.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # a number that no network has can raise anything here
        reason = f"the weights do not fit the encoder that it names ({first_line(error)})"
        raise UserError(f"{path}: {reason}; pass another file") from error
    if not is_finite(encoder):
        raise UserError(f"{path}: the weights are not all finite; pass another file")
    return encoder.eval()


def is_finite(encoder):
    """Return whether all weights and statistics are finite, with one look at the device."""
    finite = [tensor.isfinite().all() for tensor in encoder.state_dict().values()]
    return torch.stack(finite).all().item()


def starting_encoder(cfg, data, **options):
    """Return the encoder of `cfg.init_from` if that names a file, else a new one, on the CPU.

    It computes in `cfg.precision`; a new one is made as cfg.encoder, proto_dim, width and `options`
    say. Where it was pretrained, `data` is normalised from then on as in its training.
    """
    if getattr(cfg, "init_from", ""):
        encoder = load_encoder(cfg.init_from, data)
        if cfg.encoder != "densenet" or cfg.width:
            raise UserError("--init_from brings its encoder: leave out --encoder and --width")
    else:
        options |= {"width": cfg.width} if cfg.width else {}
        size = data.train.images.shape[2]
        encoder = Encoder(cfg.proto_dim, name=cfg.encoder, image_size=size, **options)
        if encoder.mean:
            data.mean, data.std = encoder.mean, encoder.std
    encoder.precision = cfg.precision
    return encoder


def load_encoder(path, data):
    """Return the encoder in `path`, on the CPU, in eval mode; normalise `data` as it was trained.

    data: the TrainingData of this run. Raises UserError where the encoder was trained on other
    classes, so that it may have seen the ones that are held out here, or on images of another size.
    """
    checkpoint = load_checkpoint(path)
    trained_split, shape = checkpoint["class_split"], list(data.train.images.shape[2:])
    if trained_split == {} and data.train.name == "cifar100":
        # The tutorial's files name no classes: they are its split, of names in alphabetical order.
        names = sorted(name for part in PARTS for name in data.split[part])
        trained_split = split_classes(names)
    if trained_split not in (None, data.split):
        raise UserError(f"{path} was trained on other classes than this run's; pass another file")
    scales = is_pretrained(checkpoint["encoder"].get("name", ""))  # images of any size
    if (trained_on := checkpoint["image_shape"]) != shape and not scales:
        raise UserError(
            f"{path} was trained on {trained_on} pixels, this run's images have {shape}"
        )
    data.mean, data.std = tuple(checkpoint["mean"]), tuple(checkpoint["std"])
    return encoder_of(checkpoint, path)
