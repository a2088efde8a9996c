"""Class splits: which classes train a model, which ones choose its settings, which ones test it."""

import json

import torch

from common.config import UserError

PARTS = ("train", "val", "test")
PAPERS = ("cifar_fs", "fc100")
NAMES = ("auto", "tutorial", *PAPERS)
# Validation and test classes of splits of CIFAR-100; all others are training classes.
# Bertinetto et al. 2018, "Meta-learning with differentiable closed-form solvers".
CIFAR_FS = (
    """
beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle
otter sea shark television tractor
""",
    """
baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail
sweet_pepper table telephone wardrobe whale woman worm
""",
)
# Oreshkin et al. 2018, "TADAM": whole superclasses.
FC100 = (
    """
bear camel cattle chimpanzee crab elephant hamster kangaroo leopard lion lobster mouse
rabbit shrew snail spider squirrel tiger wolf worm
""",
    """
baby beaver bee beetle boy butterfly caterpillar cockroach dolphin fox girl man otter
porcupine possum raccoon seal skunk whale woman
""",
)


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
    if wanted in NAMES:
        if data.name != "cifar100":
            raise UserError(
                f"split {wanted} is one of cifar100's classes, not of {data.name}'s; pass "
                "--split=auto or a file of your own"
            )
        if wanted == "tutorial":
            return split_classes(names)
        val, test = (words.split() for words in (CIFAR_FS if wanted == "cifar_fs" else FC100))
        train = [name for name in data.class_names if name not in {*val, *test}]
        return {"train": train, "val": val, "test": test}
    return read_split(wanted, data)


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
    how = 'write {"train": [names], "val": [names], "test": [names]} into it'
    try:
        with open(path, encoding="utf-8") as file:
            split = json.load(file)
    except OSError as error:
        raise UserError(
            f"split {path!r} cannot be read: {error.strerror}; pass one of {', '.join(NAMES)} or "
            "a JSON file"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file ({error}); {how}") from error
    found = split.keys() if isinstance(split, dict) else {type(split).__name__}
    if set(found) != set(PARTS):
        raise UserError(f"{path} holds {', '.join(map(str, found)) or 'nothing'}; {how}")
    for part in PARTS:
        if not is_list_of_names(split[part]):
            raise UserError(f"{path}: {part} is not a list of class names; {how}")
    check_split(split, data.class_names, path)
    return {part: split[part] for part in PARTS}


def check_split(split, class_names, source):
    """Raise UserError unless each class is in one part, and each part has two classes or more."""
    seen = {}
    for part in PARTS:
        for name in split[part]:
            if name in seen:
                raise UserError(
                    f"{source}: class {name!r} is in {seen[name]} and in {part}; the parts may not "
                    "overlap: take it out of one"
                )
            if name not in class_names:
                raise UserError(
                    f"{source}: {part} names a class {name!r}, which the data set does not have; "
                    "correct the name or add its images"
                )
            seen[name] = part
        if len(split[part]) < 2:
            raise UserError(
                f"{source}: {part} has {len(split[part])} classes, but at least 2 are needed; add "
                "classes to it"
            )
    missing = [name for name in class_names if name not in seen]
    if missing:
        raise UserError(
            f"{source}: class {missing[0]!r} is in no part ({len(missing)} such "
            "classes); add it to train, val or test, or take its images out of the data set"
        )


def split_classes(class_names, seed=0):
    """Split class names at random into {"train", "val", "test"}: 80, 10 and 10 of 100.

    Other numbers of classes are split in proportion. For 100 classes and seed 0 this is the
    tutorial's split. Validation and test have at least 2 classes each.
    Raises UserError for fewer than 6 classes.
    """
    count = len(class_names)
    if count < 6:
        raise UserError(
            f"found {count} classes, but at least 6 are needed to train, validate and test on "
            "different ones; add classes to the data set"
        )
    held_out = max(2, round(0.1 * count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    names = [class_names[index] for index in order]
    val, test = count - 2 * held_out, count - held_out  # where these begin
    return {"train": names[:val], "val": names[val:test], "test": names[test:]}


def is_list_of_names(value):
    """Return whether a value out of a file is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
