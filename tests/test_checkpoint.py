"""The checkpoint file: what is saved is loaded again; what cannot be used is refused by name."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stress
import torch

from common.checkpoint import (
    FORMAT,
    content_digest,
    encoder_of,
    load_checkpoint,
    load_encoder,
    save_checkpoint,
)
from common.config import UserError
from common.data import CIFAR100_MEAN
from common.encoder import Encoder
from common.splits import split_classes


def contents_of(model="protonet", epoch=2, **config):
    """Return what a checkpoint of a tiny encoder holds."""
    encoder = Encoder(8, 4, (1, 1, 1, 1), 2, 8)
    return {
        "format": FORMAT,
        "model": model,
        "dataset": "glyphs",
        "config": {"epochs": 3, "lr_drops": [0.7, 0.9], **config},
        "epoch": epoch,
        "val_accuracy": 0.5,
        "encoder": encoder.arguments,
        "state_dict": encoder.state_dict(),
        "class_split": {"train": ["a", "b"], "val": ["c", "d"], "test": ["e", "f"]},
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "data_digest": "0" * 64,
    }


def test_what_is_saved_is_loaded_again_without_running_code(tmp_path):
    contents = contents_of()
    save_checkpoint(tmp_path / "model.pt", contents)
    assert stress.same_value(load_checkpoint(tmp_path / "model.pt"), contents)


def test_the_encoder_of_a_checkpoint_computes_what_the_saved_one_did(tmp_path):
    contents = contents_of()
    encoder = Encoder(**contents["encoder"])
    encoder.load_state_dict(contents["state_dict"])
    save_checkpoint(tmp_path / "model.pt", contents)
    found = encoder_of(load_checkpoint(tmp_path / "model.pt"), "model.pt")
    images = torch.randn(2, 3, 32, 32)
    assert not found.training
    with torch.no_grad():
        assert torch.equal(found(images), encoder.eval()(images))


def cut_in_the_middle(whole):
    return whole[: len(whole) // 2]


def cut_at_its_end(whole):
    return whole[:-1000]


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        cut_in_the_middle,
        cut_at_its_end,
        np.random.default_rng(0).bytes(5000),
        b"<!DOCTYPE html><html>Not found</html>",
        pickle.dumps([1, 2, 3]),
        pickle.dumps(Path("somewhere")),
    ],
    ids=["empty", "cut in the middle", "cut", "random", "text", "a list", "a foreign object"],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(bad, tmp_path, recwarn):
    save_checkpoint(tmp_path / "whole.pt", contents_of())
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "bad.pt").write_bytes(bad(whole) if callable(bad) else bad)
    with pytest.raises(UserError, match="bad.pt") as error:
        load_checkpoint(tmp_path / "bad.pt")
    assert "\n" not in str(error.value)
    assert not recwarn.list  # a warning would be a second line


@pytest.mark.parametrize(
    "contents",
    [[1, 2], torch.zeros(3), {"format": "another"}, {"weights": torch.zeros(2)}, "text"],
    ids=["list", "tensor", "other format", "no format", "text"],
)
def test_a_readable_file_of_other_contents_is_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_missing_file_is_refused_with_the_way_to_make_one(tmp_path):
    with pytest.raises(UserError, match="no checkpoint .*train_protonet.py"):
        load_checkpoint(tmp_path / "absent.pt")


class Hostile:
    """Unpickled, it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_pickle(path, value):
    path.write_bytes(pickle.dumps(value))


def write_torch(path, value):
    torch.save(value, path)


@pytest.mark.parametrize("write", [write_pickle, write_torch])
def test_code_in_a_hostile_file_is_not_run(write, tmp_path):
    trace = tmp_path / "trace"
    write(tmp_path / "hostile.pt", {"format": FORMAT, "state_dict": Hostile(trace)})
    with pytest.raises(UserError, match="hostile.pt"):
        load_checkpoint(tmp_path / "hostile.pt")
    assert not trace.exists()
    # The proof that this file is dangerous to a reader that trusts it.
    pickle.loads(pickle.dumps(Hostile(trace))).close()
    assert trace.exists()


def narrower(weights):
    weights["classifier.weight"] = weights["classifier.weight"][:, :7]


def without_one(weights):
    del weights["classifier.bias"]


def with_nan(weights):
    weights["features.conv0.weight"][0, 0, 0, 0] = float("nan")


def with_text(weights):
    weights["classifier.bias"] = "text"


@pytest.mark.parametrize("spoil", [narrower, without_one, with_nan, with_text])
def test_weights_that_cannot_be_used_are_refused(spoil, tmp_path):
    save_checkpoint(tmp_path / "model.pt", contents_of())
    contents = load_checkpoint(tmp_path / "model.pt")
    encoder_of(contents, "model.pt")
    spoil(contents["state_dict"])
    with pytest.raises(UserError, match="model.pt: the weights"):
        encoder_of(contents, "model.pt")


@pytest.mark.parametrize(
    ("hyperparameters", "model"),
    [
        ({"proto_dim": 64, "lr": 2e-4}, "protonet"),
        ({"proto_dim": 64, "num_inner_steps": 1, "lr_inner": 0.1, "lr_output": 0.1}, "protomaml"),
    ],
)
def test_a_lightning_file_loads_as_it_is(hyperparameters, model, tmp_path):
    encoder = Encoder().eval()
    weights = {f"model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    lightning = {
        "pytorch-lightning_version": "1.6",
        "epoch": 7,
        "state_dict": weights,
        "hyper_parameters": hyperparameters,
    }
    torch.save(lightning, tmp_path / "tutorial.ckpt")
    contents = load_checkpoint(tmp_path / "tutorial.ckpt")
    found = (contents["model"], contents["dataset"], contents["epoch"], tuple(contents["mean"]))
    assert found == (model, "cifar100", 7, CIFAR100_MEAN)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(encoder_of(contents, "tutorial.ckpt")(images), encoder(images))


def run_of(split, *shape, name="cifar100", digest="0" * 64):
    """Return the TrainingData of a run with images of this shape, as far as a start looks at it."""
    images = torch.zeros(1, 3, *(shape or (32, 32)))
    train = SimpleNamespace(name=name, images=images)
    return SimpleNamespace(split=split, train=train, digest=digest)


def test_a_run_starts_from_the_tutorials_file_with_the_tutorials_split_alone(tmp_path, capsys):
    hyperparameters = {"proto_dim": 64}
    weights = {f"model.{name}": tensor for name, tensor in Encoder().state_dict().items()}
    lightning = {"pytorch-lightning_version": "1.6", "epoch": 7, "state_dict": weights}
    torch.save({**lightning, "hyper_parameters": hyperparameters}, tmp_path / "tutorial.ckpt")
    names = [f"class {number:02}" for number in range(20)]
    split = split_classes(names)
    load_encoder(tmp_path / "tutorial.ckpt", run_of(split))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "tutorial.ckpt carries no digest" in printed
    other = {"train": split["train"][1:], "val": [*split["val"], split["train"][0]]}
    with pytest.raises(UserError, match="trained on other classes than this run"):
        load_encoder(tmp_path / "tutorial.ckpt", run_of({**split, **other}))
    with pytest.raises(UserError, match="trained on other classes than this run"):
        load_encoder(tmp_path / "tutorial.ckpt", run_of(split, name="photos"))


def test_a_run_starts_from_an_encoder_of_images_of_its_own_size_alone(tmp_path):
    contents, split = contents_of(), contents_of()["class_split"]
    save_checkpoint(tmp_path / "start.pt", {**contents, "image_shape": [40, 48]})
    with pytest.raises(UserError, match="images of 48x40 pixels, this run's have 32x32"):
        load_encoder(tmp_path / "start.pt", run_of(split))
    load_encoder(tmp_path / "start.pt", run_of(split, 40, 48))
    # Some files do not say what the size was.
    save_checkpoint(tmp_path / "start.pt", contents)
    load_encoder(tmp_path / "start.pt", run_of(split, 40, 40))


def test_a_start_tells_that_the_data_changed_since_the_encoder_was_trained(tmp_path, capsys):
    contents = contents_of()
    save_checkpoint(tmp_path / "start.pt", contents)
    printed = []
    for name, digest in (("photos", "0" * 64), ("photos", "1" * 64), ("cifar100", "1" * 64)):
        run = run_of(contents["class_split"], name=name, digest=digest)
        load_encoder(tmp_path / "start.pt", run)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[2] == ""  # the same data, or one in another order
    assert "photos has changed since" in printed[1] and "start.pt" in printed[1]


# Damage


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint file, and what is in it."""
    contents = contents_of()
    save_checkpoint(tmp_path / "saved.pt", contents)
    return tmp_path / "saved.pt", contents


def test_damage_anywhere_in_a_file_is_refused_or_changes_nothing(saved):
    path, contents = saved
    whole = path.read_bytes()
    outcomes = stress.fuzz(path, whole, stress.checkpoint_reader(path), count=300, seed=1)
    assert outcomes["accepted wrongly"] == outcomes["tracebacks"] == 0
    assert outcomes["refused"] > 200


@pytest.mark.parametrize(
    "change",
    [
        lambda contents: contents["state_dict"]["classifier.bias"].fill_(7),
        lambda contents: contents.update(epoch=4),
        lambda contents: contents.update(epoch=2.0),
        lambda contents: contents.update(mean=[0.5, 0.5, 0.5]),
        lambda contents: contents["config"].update(epochs=4),
        lambda contents: contents["class_split"]["test"].reverse(),
        lambda contents: contents["state_dict"].update(more=torch.zeros(1)),
        lambda contents: contents.pop("val_accuracy"),
    ],
)
def test_any_change_of_the_content_changes_its_digest(change, saved):
    path, _ = saved
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, path)
    with pytest.raises(UserError, match="saved.pt is damaged: its content does not fit its digest"):
        load_checkpoint(path)


def test_the_digest_does_not_depend_on_where_tensors_lie_in_memory():
    tensor = torch.arange(24.0).view(2, 3, 2, 2)
    other = tensor.to(memory_format=torch.channels_last)
    assert content_digest({"a": tensor}) == content_digest({"a": other})
    assert content_digest({"a": tensor}) != content_digest({"a": tensor.double()})
    assert content_digest({"a": tensor}) != content_digest({"a": tensor.view(3, 2, 2, 2)})


def test_a_file_without_its_digest_is_refused(saved):
    path, contents = saved
    torch.save(contents, path)
    with pytest.raises(UserError, match="does not fit its digest"):
        load_checkpoint(path)
