"""Class splits: which classes train a model, which ones choose its settings, which ones test it."""

import json
from pathlib import Path

import torch

from common import UserError, first_line, shown

PARTS = ("train", "val", "test")
# Validation and test classes of the papers' splits of CIFAR-100; all others are training classes.
_HELD_OUT = {
    # Bertinetto et al. 2018, "Meta-learning with differentiable closed-form solvers".
    "cifar_fs": (
        "beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle "
        "otter sea shark television tractor",
        "baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail "
        "sweet_pepper table telephone wardrobe whale woman worm",
    ),
    # Oreshkin et al. 2018, "TADAM": whole superclasses.
    "fc100": (
        "bear camel cattle chimpanzee crab elephant hamster kangaroo leopard lion lobster mouse "
        "rabbit shrew snail spider squirrel tiger wolf worm",
        "baby beaver bee beetle boy butterfly caterpillar cockroach dolphin fox girl man otter "
        "porcupine possum raccoon seal skunk whale woman",
    ),
}
PAPERS = tuple(_HELD_OUT)
NAMES = ("auto", "tutorial", *PAPERS)


def class_split(wanted, data):
    """Return the split of an ImageSet's classes, {"train", "val", "test"}: lists of class names.

    wanted: "auto" (the data set's own, if it has one, else `split_classes`), "tutorial", "cifar_fs"
    or "fc100" (for cifar100), or the path of a JSON file with the three lists. Raises UserError
    where there is no such split, or where the three do not make up the classes of the data set.
    """
    # The tutorial's split is of the classes in alphabetical order, whatever that of the file.
    names = sorted(data.class_names) if data.name == "cifar100" else data.class_names
    if wanted == "auto":
        return data.split or split_classes(names)
    if wanted not in NAMES:
        return read_split(wanted, data)
    if data.name != "cifar100":
        raise UserError(f"split {wanted} is of cifar100's classes; pass --split=auto or a file")
    if wanted == "tutorial":
        return split_classes(names)
    val, test = (words.split() for words in _HELD_OUT[wanted])
    train = [name for name in data.class_names if name not in {*val, *test}]
    return {"train": train, "val": val, "test": test}


def split_name(split, data):
    """Return the name of a split of cifar100 if it is one of NAMES, "" otherwise."""
    for name in NAMES[1:] if data.name == "cifar100" else ():
        known = class_split(name, data)
        if all(set(known[part]) == set(split[part]) for part in PARTS):
            return name
    return ""


def read_split(path, data):
    """Return the split in a JSON file, {"train": [...], "val": [...], "test": [...]}.

    Raises UserError where it cannot be read, or does not fit the classes of an ImageSet.
    """
    try:
        content = json.loads(Path(path).read_bytes())  # UTF-8 or UTF-16, with a mark or without
        split = {part: list(map(shown, content[part])) for part in PARTS}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"split {path!r} cannot be read ({first_line(error)}); pass one of {', '.join(NAMES)} "
            'or a JSON file of {"train": [names], "val": [names], "test": [names]}'
        ) from error
    check_split(split, data.class_names, path)
    return split


def split_of(parts, class_names, source):
    """Return the split that the part of each class makes; raise what `check_split` raises."""
    split = {part: [name for name, of in zip(class_names, parts) if of == part] for part in PARTS}
    check_split(split, class_names, source)
    return split


def check_split(split, class_names, source):
    """Raise UserError unless each class is in one part, and each part has two classes or more."""
    parts_of = {}
    for part in PARTS:
        if len(split[part]) < 2:
            found = f"{part} has {len(split[part])} classes, but at least 2 are needed"
            raise UserError(f"{source}: {found}; add classes to it")
        for name in split[part]:
            parts_of.setdefault(name, []).append(part)
    for name in (*parts_of, *class_names):
        if name not in class_names or len(parts_of.get(name, [])) != 1:
            found = f"class {name!r} is in {' and '.join(parts_of.get(name, ['no part']))}"
            found += "" if name in class_names else ", but not in the data set"
            raise UserError(f"{source}: {found}; put each class into one of train, val and test")


def split_classes(class_names, seed=0):
    """Split class names at random into {"train", "val", "test"}: 80, 10 and 10 of 100.

    Other numbers of classes are split in proportion, with at least 2 to validate and 2 to test. For
    100 classes and seed 0 this is the tutorial's split. Raises UserError for fewer than 6 classes.
    """
    count = len(class_names)
    if count < 6:
        raise UserError(
            f"found {count} classes, but at least 6 are needed, 2 each to train, validate and test,"
            " and 9 for 5-way episodes; add classes, or use a trained model: python classify.py"
        )
    held_out = max(2, round(0.1 * count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    names = [class_names[index] for index in order]
    val, test = count - 2 * held_out, count - held_out  # where these begin
    return {"train": names[:val], "val": names[val:test], "test": names[test:]}
