"""Command lines, data and checkpoints that do not fit: one clear line, and no half-written file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stress import ENVIRONMENT
from test_checkpoint import contents_of

import evaluate
import train_classifier
import train_protomaml
import train_protonet
from common import UserError
from common.checkpoint import save_checkpoint
from common.config import parse_config
from common.data import load_dataset
from common.splits import split_classes

ROOT = Path(evaluate.__file__).parent
CLASSIFIER, PROTONET, PROTOMAML = train_classifier, train_protonet, train_protomaml
# The small glyphs give fewer episodes than the default batch of tasks takes.
SMALL = {CLASSIFIER: [], PROTONET: [], PROTOMAML: ["--tasks_per_step=2"]}


def name_of(value):
    """Name a parameter in the list of tests."""
    return getattr(value, "__name__", str(value)[:48])


def train(module, data_dir, checkpoint_dir, *more, dataset="glyphs"):
    where = [f"--data_dir={data_dir}", f"--checkpoint_dir={checkpoint_dir}", "--device=cpu"]
    arguments = [f"--dataset={dataset}", *where, *SMALL[module], *more]
    return module.main(parse_config(module.Config, arguments))


@pytest.mark.parametrize(
    ("module", "option", "message"),
    [
        (CLASSIFIER, "--k_shot=21", "has 24 images, .* 25 of each"),
        (CLASSIFIER, "--resume=true", "resume=true .*classifier_last.pt"),
        (PROTONET, "--device=gpu", "device 'gpu'"),
        (PROTONET, "--dataset=absent", "absent.npz nor the folder .*absent;.* cifar100, svhn, "),
        (PROTONET, "--dataset=../glyphs", "'../glyphs' is not the name of a data set.*--data_dir"),
        (PROTONET, "--n_way=17", "17 classes, found 16"),
        (PROTONET, "--n_query=1000000000000000000000", "has 24 images"),
        (PROTONET, "--split=absent.json", "absent.json.* cannot be read"),
        (PROTOMAML, "--tasks_per_step=1000", "episodes; pass fewer --tasks_per_step"),
    ],
    ids=name_of,
)
def test_training_that_cannot_work_is_refused_before_anything_is_written(
    module, option, message, glyph_dir, tmp_path
):
    with pytest.raises(UserError, match=message):
        train(module, glyph_dir, tmp_path / "checkpoints", option)
    assert not list(tmp_path.iterdir())


# Checkpoints that do not fit


@pytest.fixture(scope="module")
def class_names(glyph_dir):
    return load_dataset("glyphs", glyph_dir).class_names


@pytest.fixture
def write(class_names, tmp_path):
    """A function that writes a checkpoint on the glyphs, made without training."""

    def write(name, **changes):
        contents = {**contents_of(class_split=split_classes(class_names)), **changes}
        save_checkpoint(tmp_path / name, contents)
        return tmp_path / name

    return write


@pytest.fixture
def test(glyph_dir, tmp_path):
    """A function that tests checkpoints on few tasks."""

    def test(*paths, more=()):
        where = [f"--data_dir={glyph_dir}", f"--results_dir={tmp_path / 'results'}"]
        budget = ["--k_shots=2", "--num_inner_steps=1", "--max_support_sets=1", "--device=cpu"]
        arguments = ["--dataset=glyphs", "--domains=", *where, *budget, *more]
        models = f"--models={','.join(map(str, paths))}"
        return evaluate.main(parse_config(evaluate.Config, [*arguments, models]))

    return test


INNER_LOOP = {"num_inner_steps": 1, "lr_inner": 0.1, "lr_output": 0.1}


def test_models_of_any_name_are_tested_and_adapt_where_their_config_says_how(write, test, tmp_path):
    write("a.pt", model="my_method"), write("b.pt", model="my_maml", config=INNER_LOOP)
    write("a_last.pt", model="not_tested")
    assert test(tmp_path) == 0
    rows = json.loads((tmp_path / "results" / "accuracy.json").read_text())
    found = [(row["model"], row["settings"].get("lr_inner")) for row in rows]
    assert found == [("my_method", None), ("my_maml", 0.1), ("pixels", None)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ["protonet"]}, "'model' cannot be used"),
        ({"dataset": "letters"}, "was trained on letters; pass --dataset=letters"),
        ({"class_split": {"train": ["a"], "val": ["b"], "test": ["c", "d"]}}, "no class 'b'"),
        ({"encoder": {"proto_dim": 8, "heads": 3}}, "encoder 'densenet' cannot be made"),
        ({"state_dict": {}}, "weights do not fit"),
        (
            {"format": "few-shot checkpoint, version 0"},
            "'few-shot checkpoint, version 2' is needed",
        ),
    ],
    ids=name_of,
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    changes, message, write, test, tmp_path, recwarn
):
    with pytest.raises(UserError, match=message):
        test(write("bad.pt", **changes))
    assert not recwarn.list  # a warning would be a second line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("module", SMALL, ids=name_of)
def test_a_trainer_refuses_weights_that_do_not_fit_before_anything_is_written(
    module, write, glyph_dir, tmp_path
):
    option = "--teacher" if module is CLASSIFIER else "--init_from"
    weights = contents_of()["state_dict"]
    weights["classifier.bias"].fill_(float("nan"))
    for spoilt, message in ({}, "the weights do not fit"), (weights, "not all finite"):
        words = f"{option}={write('bad.pt', state_dict=spoilt)}"
        with pytest.raises(UserError, match=f"bad.pt: .*{message}"):
            train(module, glyph_dir, tmp_path / "checkpoints", words)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "first.pt and .*second.pt differ"),
        ({"image_shape": [64, 64]}, "first.pt and .*second.pt differ"),
    ],
    ids=name_of,
)
def test_checkpoints_that_cannot_share_a_table_are_named(
    changes, message, class_names, write, test
):
    if seed := changes.pop("seed", 0):
        changes["class_split"] = split_classes(class_names, seed)
    paths = write("first.pt"), write("second.pt", **{"model": "maml", **changes})
    with pytest.raises(UserError, match=message):
        test(*paths)


def test_two_models_of_one_kind_are_told_apart_by_their_folders(write, test, tmp_path):
    for folder in ("a/glyphs", "b/glyphs"):
        (tmp_path / folder).mkdir(parents=True)
        write(f"{folder}/protonet.pt")
    paths = [tmp_path / folder / "glyphs" / "protonet.pt" for folder in "ab"]
    assert test(*paths) == 0
    rows = json.loads((tmp_path / "results" / "accuracy.json").read_text())
    assert [row["model"] for row in rows] == ["protonet", "protonet (b)", "pixels"]
    assert "| ProtoNet (b) |" in (tmp_path / "results" / "accuracy.md").read_text()
    with pytest.raises(UserError, match="both hold a protonet .b.; test one at a time"):
        test(*paths, paths[1])


# What the user sees


def test_a_script_ends_with_exit_code_2_and_one_line_also_where_a_library_refuses(
    glyph_dir, tmp_path
):
    where = [f"--data_dir={glyph_dir}", f"--checkpoint_dir={tmp_path}", "--device=cpu"]
    command = ["train_protonet.py", "--dataset=glyphs", *where, "--seed=99999999999999999999"]
    environment = {**ENVIRONMENT, "PYTHONDEVMODE": ""}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    process = subprocess.run([sys.executable, *command], timeout=120, **options)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("train_protonet.py: error: ")
    assert not list(tmp_path.iterdir())
