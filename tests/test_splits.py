"""Class splits: the tutorial's, the papers', and those in a file."""

import json

import pytest
import torch

from common.config import UserError
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
    assert len(CIFAR100) == 100 and CIFAR100 == sorted(CIFAR100)
    split = split_classes(CIFAR100)
    assert " ".join(split["val"]) == (
        "caterpillar castle skunk ray bus motorcycle keyboard chimpanzee possum tiger"
    )
    assert " ".join(split["test"]) == (
        "kangaroo crocodile butterfly shark forest pickup_truck telephone lion worm mushroom"
    )
    assert len(split["train"]) == 80 and list(split) == list(PARTS)
    data = named(CIFAR100, "cifar100")
    assert split == class_split("tutorial", data) == class_split("auto", data)


@pytest.mark.parametrize(
    "count, held_out",
    [
        (6, 2),
        (7, 2),
        (10, 2),
        (20, 2),
        (26, 3),
        (30, 3),
        (50, 5),
        (100, 10),
        (101, 10),
        (1000, 100),
    ],
)
def test_every_class_is_in_exactly_one_part_and_the_parts_are_in_proportion(count, held_out):
    names = [f"class {c}" for c in range(count)]
    split = split_classes(names)
    assert sorted(split["train"] + split["val"] + split["test"]) == sorted(names)
    sizes = [len(split[part]) for part in PARTS]
    assert sizes == [count - 2 * held_out, held_out, held_out]


def test_the_split_follows_its_seed_and_no_other_random_numbers():
    names = [f"class {c}" for c in range(40)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert split_classes(names) == split_classes(names, seed=0) != split_classes(names, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_too_few_classes_to_split_are_refused_with_both_numbers(count):
    with pytest.raises(UserError, match=f"found {count} classes.* 6 "):
        split_classes([f"class {c}" for c in range(count)])


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


def test_fc100_keeps_superclasses_together():
    split = class_split("fc100", named(CIFAR100, "cifar100"))
    people = {"baby", "boy", "girl", "man", "woman"}
    trees = {"maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"}
    assert people < set(split["test"]) and trees < set(split["train"])


@pytest.mark.parametrize("name", ["tutorial", "cifar_fs", "fc100"])
def test_a_split_of_cifar100_is_known_by_its_classes(name):
    cifar100 = named(CIFAR100, "cifar100")
    split = class_split(name, cifar100)
    assert split_name({part: split[part][::-1] for part in PARTS}, cifar100) == name
    for part in PARTS:
        assert split_name({**split, part: split[part][1:]}, cifar100) == ""
    backwards = named(CIFAR100[::-1], "cifar100")
    assert split_name(class_split(name, backwards), cifar100) == name
    assert split_name(split, named(CIFAR100, "mine")) == ""


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
        (json.dumps({**OWN, "test": [7, 8]}), "test is not a list of class names; write"),
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
