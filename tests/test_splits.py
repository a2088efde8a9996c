"""Class splits: the tutorial's, the papers', and those in a file."""

import json

import pytest
import torch

from common.config import UserError
from common.data import ImageSet
from common.splits import PARTS, class_split, split_classes

NAMES = [f"class {number}" for number in range(9)]
OWN = {"train": NAMES[:5], "val": NAMES[5:7], "test": NAMES[7:]}
# The ten classes that the tutorial tests on.
TUTORIALS_TEST = """kangaroo crocodile butterfly shark forest pickup_truck telephone lion worm
    mushroom"""
CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
    crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()


def named(class_names, name="photos", split=None):
    """Return an ImageSet with one image of each class."""
    count = len(class_names)
    return ImageSet(name, torch.zeros(count, 3, 32, 32), torch.arange(count), class_names, split)


@pytest.mark.parametrize(
    ("wanted", "counts"),
    [("auto", [80, 10, 10]), ("tutorial", [80, 10, 10]), ("cifar_fs", [64, 16, 20])]
    + [("fc100", [60, 20, 20])],
)
def test_the_named_splits_share_out_all_classes_of_cifar100(wanted, counts):
    split = class_split(wanted, named(CIFAR100, "cifar100"))
    assert list(split) == list(PARTS)
    assert [len(split[part]) for part in PARTS] == counts
    assert sorted(sum(split.values(), [])) == sorted(CIFAR100)


def test_the_tutorials_split_is_the_default_one_and_tests_on_its_classes():
    data = named(CIFAR100, "cifar100")
    assert class_split("tutorial", data) == class_split("auto", data)
    assert class_split("tutorial", data)["test"] == TUTORIALS_TEST.split()


def test_fc100_keeps_superclasses_together():
    split = class_split("fc100", named(CIFAR100, "cifar100"))
    people = {"baby", "boy", "girl", "man", "woman"}
    trees = {"maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"}
    assert people < set(split["test"]) and trees < set(split["train"])


def test_a_data_sets_own_split_comes_before_a_random_one():
    assert class_split("auto", named(NAMES, split=OWN)) == OWN
    assert class_split("auto", named(NAMES)) == split_classes(NAMES)


def test_a_file_gives_the_split(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(OWN))
    assert class_split(str(path), named(NAMES)) == OWN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[1, 2]", "holds list; write"),
        ('{"train": ["a"]}', "holds train; write"),
        (json.dumps({**OWN, "test": [7, 8]}), "holds train, val, test; write"),
        (json.dumps({**OWN, "test": NAMES[6:]}), "'class 6' is in val and in test"),
        (json.dumps({**OWN, "val": [*NAMES[5:7], "dog"]}), "val names a class 'dog'"),
        (json.dumps({**OWN, "val": NAMES[5:6]}), "val has 1 classes, but at least 2"),
        (json.dumps({**OWN, "train": NAMES[1:5]}), "'class 0' is in no part"),
    ],
)
def test_a_file_that_is_no_split_of_the_classes_is_one_line(content, message, tmp_path):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(UserError, match="split.json") as caught:
        class_split(str(path), named(NAMES))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("cifar_fs", "is one of cifar100's classes, not of photos's"),
        ("nowhere.json", "'nowhere.json' cannot be read: No such file or directory"),
        ("cifarfs", "pass one of auto, tutorial, cifar_fs, fc100 or a JSON file"),
    ],
)
def test_a_split_that_does_not_exist_is_one_line(wanted, message):
    with pytest.raises(UserError) as caught:
        class_split(wanted, named(NAMES))
    assert message in str(caught.value)
