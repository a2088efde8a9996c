"""Class splits: the tutorial's, the papers', and those in a file."""

import json

import pytest
import torch

from common import UserError
from common.data import ImageSet
from common.splits import PARTS, class_split, split_classes, split_name

NAMES = [f"class {number}" for number in range(9)]
OWN = {"train": NAMES[:5], "val": NAMES[5:7], "test": NAMES[7:]}
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


def test_the_split_of_cifar100_is_the_tutorials():
    split, data = split_classes(CIFAR100), named(CIFAR100, "cifar100")
    assert " ".join(split["val"]) == (
        "caterpillar castle skunk ray bus motorcycle keyboard chimpanzee possum tiger"
    )
    assert " ".join(split["test"]) == (
        "kangaroo crocodile butterfly shark forest pickup_truck telephone lion worm mushroom"
    )
    assert split == class_split("tutorial", data) == class_split("auto", data)


@pytest.mark.parametrize(
    "count, held_out", [(6, 2), (7, 2), (20, 2), (26, 3), (100, 10), (101, 10), (1000, 100)]
)
def test_every_class_is_in_exactly_one_part_and_the_parts_are_in_proportion(count, held_out):
    names = [f"class {c}" for c in range(count)]
    torch.manual_seed(3)
    split = split_classes(names)
    assert sorted(split["train"] + split["val"] + split["test"]) == sorted(names)
    assert [len(split[part]) for part in PARTS] == [count - 2 * held_out, held_out, held_out]
    torch.manual_seed(4)  # the split follows its own seed alone
    assert split == split_classes(names, seed=0) != split_classes(names, seed=1)
    with pytest.raises(UserError, match="found 5 classes, .* 6 .* 9 for 5-way .*classify.py"):
        split_classes(names[:5])


@pytest.mark.parametrize(
    ("name", "counts"),
    [("tutorial", [80, 10, 10]), ("cifar_fs", [64, 16, 20]), ("fc100", [60, 20, 20])],
)
def test_a_named_split_shares_out_all_classes_of_cifar100_and_is_known_by_them(name, counts):
    cifar100, backwards = named(CIFAR100, "cifar100"), named(CIFAR100[::-1], "cifar100")
    split = class_split(name, cifar100)
    assert list(split) == list(PARTS) and [len(split[part]) for part in PARTS] == counts
    assert sorted(sum(split.values(), [])) == CIFAR100
    assert split_name({part: split[part][::-1] for part in PARTS}, cifar100) == name
    assert split_name(class_split(name, backwards), cifar100) == name
    assert split_name({**split, "val": split["val"][1:]}, cifar100) == ""
    assert split_name(split, named(CIFAR100, "mine")) == ""
    with pytest.raises(UserError, match=f"split {name} is of cifar100's classes"):
        class_split(name, named(CIFAR100, "mine"))
    if name == "fc100":  # superclasses stay together
        assert {"baby", "boy", "girl", "man", "woman"} < set(split["test"])


def test_a_file_or_the_data_sets_own_split_comes_before_a_random_one(tmp_path):
    assert class_split("auto", named(NAMES, split=OWN)) == OWN
    assert class_split("auto", named(NAMES)) == split_classes(NAMES)
    (tmp_path / "split.json").write_text(json.dumps(OWN))
    assert class_split(str(tmp_path / "split.json"), named(NAMES)) == OWN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"train": ["a"]}', "cannot be read .*'val'"),
        (json.dumps({**OWN, "test": [7, 8]}), "'7' is in test, but not in the data set"),
        (json.dumps({**OWN, "test": NAMES[6:]}), "'class 6' is in val and test;"),
        (json.dumps({**OWN, "val": [*NAMES[5:7], "dog"]}), "'dog' is in val, but not in the"),
        (json.dumps({**OWN, "val": NAMES[5:6]}), "val has 1 classes, but at least 2"),
        (json.dumps({**OWN, "train": NAMES[1:5]}), "'class 0' is in no part"),
        (None, "No such file or directory.*pass one of auto, tutorial, cifar_fs, fc100 or a JSON"),
    ],
)
def test_a_file_that_is_no_split_of_the_classes_is_one_line(content, message, tmp_path):
    path = tmp_path / "split.json"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=f"split.json.*{message}"):
        class_split(str(path), named(NAMES))


def test_a_split_file_by_notepad_or_with_names_from_a_mac_is_read(tmp_path):
    names = ["caf\u00e9", *NAMES[1:]]
    split = {"train": names[:5], "val": names[5:7], "test": names[7:]}
    text = json.dumps(split, ensure_ascii=False).replace("\u00e9", "e\u0301")
    (tmp_path / "split.json").write_text(text, encoding="utf-8-sig")
    assert class_split(str(tmp_path / "split.json"), named(names)) == split
