"""The checkpoint file: what is saved is loaded again; what cannot be used is refused by name."""

import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stress
import torch

import train_protonet
from common import UserError, checkpoint
from common.checkpoint import content_digest, encoder_of, find_checkpoints, load_checkpoint
from common.encoders import Encoder
from common.splits import split_classes
from common.tutorial import CIFAR100_MEAN


def contents_of(encoder=None, **changes):
    """Return what a checkpoint holds; by default that of a tiny encoder on the glyphs."""
    encoder = encoder or stress.moved_encoder()
    contents = {"format": checkpoint.FORMAT, "model": "protonet", "dataset": "glyphs", "epoch": 2}
    contents |= {"config": {"epochs": 3, "lr_drops": [0.7, 0.9]}, "val_accuracy": 0.5}
    contents |= {"encoder": encoder.arguments, "state_dict": encoder.state_dict()}
    contents["class_split"] = {"train": ["a", "b"], "val": ["c", "d"], "test": ["e", "f"]}
    contents |= {"image_shape": [32, 32], "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    return {**contents, "data_digest": "0" * 64, **changes}


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint file, and what is in it."""
    contents = contents_of()
    checkpoint.save_checkpoint(tmp_path / "saved.pt", contents)
    return tmp_path / "saved.pt", contents


def refused(path, message="pt"):
    """Check that a file is refused with its name, and the message."""
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(path)
    assert path.name in str(error.value)


def test_what_is_saved_is_loaded_again_and_its_encoder_computes_the_same(saved):
    path, contents = saved
    loaded = load_checkpoint(path)
    assert content_digest(loaded) == content_digest(contents)
    encoder, found = Encoder(**contents["encoder"]), encoder_of(loaded, path)
    encoder.load_state_dict(contents["state_dict"])
    images = torch.randn(2, 3, 32, 32)
    assert not found.training and torch.equal(found(images), encoder.eval()(images))


BAD_FILES = {
    "empty": b"",
    "no archive": bytes(range(256)) * 20,
    "a foreign object": pickle.dumps(Path("somewhere")),
    "another format": {"format": "another"},
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_foreign_file_is_refused_by_name(name, tmp_path, recwarn):
    content, path = BAD_FILES[name], tmp_path / "bad.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refused(path)
    assert not recwarn.list  # a warning would be a second line


class Hostile:
    def __reduce__(self):  # unpickled, it creates a file
        return open, ("trace", "w")


def test_code_in_a_hostile_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents, file = {"format": checkpoint.FORMAT, "state_dict": Hostile()}, Path("hostile.pt")
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write(contents, file)
        refused(file)
        assert not Path("trace").exists()
    # The proof that this file is dangerous to a reader that trusts it.
    pickle.loads(file.read_bytes())["state_dict"].close()
    assert Path("trace").exists()


def test_damage_anywhere_in_a_file_is_refused_or_changes_nothing(saved):
    found = stress.fuzz(saved[0], 200, seed=0)
    assert found["refused"] > 100 and not found["accepted wrongly"] + found["tracebacks"], found


def test_any_change_of_the_content_is_noticed(saved):
    for change in (
        lambda contents: contents["state_dict"]["classifier.bias"].fill_(7),
        lambda contents: contents.update(epoch=2.0),
        lambda contents: contents["config"].update(epochs=4),
        lambda contents: contents["class_split"]["test"].reverse(),
        lambda contents: contents.pop("digest"),
    ):
        checkpoint.save_checkpoint(*saved)
        contents = torch.load(saved[0], weights_only=True)
        change(contents)
        torch.save(contents, saved[0])
        refused(saved[0], "digest")


def lightning_file(path, **hyperparameters):
    """Write a file as the tutorial's; return its encoder."""
    encoder = Encoder().eval()
    weights = {f"model.{name}": value for name, value in encoder.state_dict().items()}
    contents = {"pytorch-lightning_version": "1.6", "epoch": 7, "state_dict": weights}
    contents["hyper_parameters"] = {"proto_dim": 64, **hyperparameters}
    torch.save(contents, path)
    return encoder


@pytest.mark.parametrize("model", ["protonet", "protomaml"])
def test_a_lightning_file_loads_as_it_is_with_a_notice(model, tmp_path, capsys):
    path, images = tmp_path / "tutorial.ckpt", torch.randn(2, 3, 32, 32)
    inner_loop = {"num_inner_steps": 1, "lr_inner": 0.1, "lr_output": 0.2}
    encoder = lightning_file(path, **(inner_loop if model == "protomaml" else {"lr": 2e-4}))
    contents = load_checkpoint(path)
    assert "tutorial.ckpt carries no digest" in capsys.readouterr().out
    found = (contents["model"], contents["dataset"], contents["epoch"], contents["mean"])
    assert found == (model, "cifar100", 7, CIFAR100_MEAN)
    assert model == "protonet" or inner_loop.items() <= contents["config"].items()
    assert torch.equal(encoder_of(contents, path)(images), encoder(images))


def load_for_run(path, split, height=32, width=32, name="cifar100"):
    """Call load_encoder with the TrainingData of a run, as far as it looks at it."""
    train = SimpleNamespace(name=name, images=torch.zeros(1, 3, height, width))
    return checkpoint.load_encoder(path, SimpleNamespace(split=split, train=train))


def test_a_run_starts_from_an_encoder_of_its_own_classes_and_image_size_alone(tmp_path):
    split = split_classes([f"class {number:02}" for number in range(20)])
    other = {**split, "val": split["test"], "test": split["val"]}
    tutorials, own = tmp_path / "tutorial.ckpt", tmp_path / "own.pt"
    lightning_file(tutorials)  # whose classes are the tutorial's split
    checkpoint.save_checkpoint(own, contents_of(class_split=split, image_shape=[40, 48]))
    load_for_run(tutorials, split)
    load_for_run(own, split, 40, 48)
    for run in (tutorials, other), (tutorials, split, 32, 32, "photos"), (own, other, 40, 48):
        with pytest.raises(UserError, match=f"{run[0].name} was trained on other classes"):
            load_for_run(*run)
    with pytest.raises(UserError, match=r"trained on .*\[40, 48\].*\[32, 32\]"):
        load_for_run(own, split)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_the_users_checkpoints_come_first_else_the_included_ones(tmp_path, monkeypatch, capsys):
    included = touch(tmp_path / "included", "best/glyphs/b.pt", "quick/glyphs/a.pt")
    monkeypatch.setattr(checkpoint, "INCLUDED", str(included))
    monkeypatch.chdir(tmp_path)
    assert find_checkpoints("glyphs") == [str(included / "best/glyphs/b.pt")]
    assert "models: those in " in capsys.readouterr().out
    (included / "best/glyphs/b.pt").unlink()
    assert find_checkpoints("glyphs") == [str(included / "quick/glyphs/a.pt")]
    own = touch(Path("checkpoints/glyphs"), "mine.pt", "mine_last.pt", "mine.csv", "a.pt")
    assert find_checkpoints("glyphs") == [str(own / "a.pt"), str(own / "mine.pt")]
    with pytest.raises(UserError, match="no checkpoint .*train_protonet.py --dataset=letters"):
        find_checkpoints("letters")


def test_named_files_and_folders_are_taken_as_they_are(tmp_path):
    folder = touch(tmp_path / "my [best] run", "b.pt", "a.pt", "a_last.pt")
    last, absent = str(folder / "a_last.pt"), str(tmp_path / "absent.pt")
    named = find_checkpoints("glyphs", (absent, str(folder), last))
    assert named == [absent, str(folder / "a.pt"), str(folder / "b.pt"), last]
    with pytest.raises(UserError, match="found no checkpoint "):
        find_checkpoints("glyphs", (str(tmp_path),))


@pytest.mark.parametrize("odd", [Path("a"), np.float64(1.5), {"deep": [np.arange(3)]}])
def test_objects_beside_tensors_are_named_and_no_file_is_called_damaged(odd, tmp_path):
    torch.save({"pytorch-lightning_version": "2", "odd": odd}, tmp_path / "x.ckpt")
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "x.ckpt")
    message = str(error.value)
    assert re.search(r"holds more than tensors and plain values \((pathlib|numpy)", message)
    assert "damaged" not in message and "\x1b" not in message and "save it again" in message


def test_the_included_models_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (found,) = find_checkpoints("cifar100")[:1]
    assert os.path.isabs(found) and load_checkpoint(found)
    options = dict(word.split("=") for word in train_protonet.RECIPES["best"].split())
    assert load_checkpoint(options["--init_from"])["model"] == "classifier"
    assert len(find_checkpoints("glyphs", [os.path.join("checkpoints", "quick", "glyphs")])) == 3
