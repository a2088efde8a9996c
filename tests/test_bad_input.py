"""Command lines, data and checkpoints that do not fit: one clear line, and no half-written file."""

import io
import os
import string
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import train_classifier
import train_protomaml
import train_protonet
from common.checkpoint import FORMAT, encoder_of, load_checkpoint, save_checkpoint
from common.config import UserError, changed_values, parse_config
from common.data import load_dataset
from common.encoder import Encoder
from common.splits import split_classes

ROOT = Path(evaluate.__file__).parent
TINY_ENCODER = {
    "proto_dim": 4,
    "growth_rate": 4,
    "block_config": [1, 1, 1, 1],
    "bn_size": 1,
    "num_init_features": 8,
}
CLASSIFIER, PROTONET, PROTOMAML = train_classifier, train_protonet, train_protomaml
TRAINERS = [CLASSIFIER, PROTONET, PROTOMAML]
# The small glyphs give fewer episodes than the default batch of tasks takes.
SMALL = {CLASSIFIER: [], PROTONET: [], PROTOMAML: ["--tasks_per_step=2"]}


def one_line(error):
    """The message as the user sees it: it must fit one line and say something."""
    message = str(error.value)
    return "\n" not in message.strip() and len(message) > 20


def name_of(value):
    """Name a parameter in the list of tests."""
    return getattr(value, "__name__", str(value)[:48])


# Command lines that do not fit the machine or the data

BAD_TRAINING = [
    (CLASSIFIER, "--device=gpu", "device 'gpu'"),
    (CLASSIFIER, "--dataset=absent", "no data set 'absent'.*absent.npz"),
    (CLASSIFIER, "--k_shot=21", "has 24 images, but an episode needs 25 of each class"),
    (CLASSIFIER, "--teacher=absent.pt", "no checkpoint absent.pt"),
    (CLASSIFIER, "--resume=true", "nothing to resume"),
    (PROTONET, "--device=gpu", "device 'gpu'"),
    (PROTONET, "--device=meta", "device 'meta'"),
    (PROTONET, "--device=hpu", "device 'hpu'"),
    (PROTONET, "--device=", "device ''"),
    (PROTONET, "--dataset=absent", "no data set 'absent'.*absent.npz"),
    (PROTONET, "--dataset=", "'' is not the name of a data set"),
    (PROTONET, "--dataset=..", "'..' is not the name of a data set"),
    (PROTONET, "--dataset=../glyphs", "'../glyphs' is not the name of a data set.*--data_dir"),
    (PROTONET, "--dataset=" + 300 * "x", "not the name of a data set"),
    (PROTONET, "--n_way=17", "17-way episodes need 17 classes, found 16"),
    (PROTONET, "--k_shot=21", "has 24 images, but an episode needs 25 of each class"),
    (PROTONET, "--n_query=1000000000000000000000", "has 24 images"),
    (PROTONET, "--init_from=absent.pt", "no checkpoint absent.pt"),
    (PROTONET, "--resume=true", "nothing to resume"),
    (PROTOMAML, "--k_shot=21", "has 24 images, but an episode needs 25 of each class"),
    (PROTOMAML, "--tasks_per_step=1000", "a batch needs 1000 episodes"),
    (PROTOMAML, "--init_from=absent.pt", "no checkpoint absent.pt"),
    (PROTOMAML, "--resume=true", "nothing to resume"),
]


def train(module, data_dir, checkpoint_dir, *more, dataset="glyphs"):
    where = [f"--data_dir={data_dir}", f"--checkpoint_dir={checkpoint_dir}"]
    arguments = [f"--dataset={dataset}", *where, *SMALL[module], *more]
    return module.main(parse_config(module.Config, arguments))


@pytest.mark.parametrize(("module", "option", "message"), BAD_TRAINING, ids=name_of)
def test_training_that_cannot_work_is_refused_before_anything_is_written(
    module, option, message, glyph_dir, tmp_path
):
    with pytest.raises(UserError, match=message) as error:
        train(module, glyph_dir, tmp_path / "checkpoints", option)
    assert one_line(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("module", [*TRAINERS, evaluate], ids=name_of)
def test_cuda_where_there_is_none_is_refused(module):
    with pytest.raises(UserError, match="'cuda' cannot be used here.*--device=cpu") as error:
        module.main(parse_config(module.Config, ["--device=cuda"]))
    assert one_line(error)


@pytest.mark.parametrize("module", TRAINERS, ids=name_of)
@pytest.mark.parametrize("inside", ["", "below"])
def test_a_file_in_place_of_the_checkpoint_folder_is_named_and_kept(
    module, inside, glyph_dir, tmp_path
):
    file = tmp_path / "checkpoints"
    file.write_text("mine")
    with pytest.raises(UserError, match="cannot write .*checkpoints") as error:
        train(module, glyph_dir, file / inside)
    assert one_line(error)
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


def good_arrays(class_names="abcdef"):
    labels = np.arange(2 * len(class_names), dtype=np.int64) % len(class_names)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    return {"images": images, "labels": labels, "class_names": np.array(list(class_names))}


@pytest.mark.parametrize("module", TRAINERS, ids=name_of)
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({**good_arrays(), "labels": np.arange(12)}, "bad.npz: labels run from 0 to 11"),
        (good_arrays("abcde"), "found 5 classes, but at least 6"),
        (good_arrays("abcdefghi"), "class '.' has 2 images, but an episode needs 8 of each class"),
    ],
    ids=["damaged", "too few classes", "too few images"],
)
def test_data_that_cannot_be_used_are_refused_before_anything_is_written(
    module, arrays, message, tmp_path
):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        train(module, tmp_path, tmp_path / "checkpoints", dataset="bad")
    assert one_line(error)
    assert not (tmp_path / "checkpoints").exists()


# Checkpoints that do not fit


def tiny_checkpoint(class_names, model="protonet"):
    """A valid checkpoint with a small encoder, made without training."""
    torch.manual_seed(0)
    inner_loop = {"lr_inner": 0.1, "lr_output": 0.1, "num_inner_steps": 1}
    return {
        "format": FORMAT,
        "model": model,
        "dataset": "glyphs",
        "config": {**inner_loop, "output_init": "prototypes"},
        "encoder": dict(TINY_ENCODER),
        "state_dict": Encoder(**TINY_ENCODER).state_dict(),
        "class_split": split_classes(class_names),
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "epoch": 1,
        "val_accuracy": 0.5,
        "data_digest": "",
    }


@pytest.fixture(scope="module")
def class_names(glyph_dir):
    return load_dataset("glyphs", glyph_dir).class_names


def evaluate_file(path, glyph_dir, tmp_path, *more, model="protonet"):
    budget = ["--k_shots=2", "--num_inner_steps=1", "--max_support_sets=1", "--device=cpu"]
    where = [
        f"--{model}={path}",
        f"--data_dir={glyph_dir}",
        f"--results_dir={tmp_path / 'results'}",
    ]
    arguments = ["--dataset=glyphs", "--domains=", *budget, *where, *more]
    return evaluate.main(parse_config(evaluate.Config, arguments))


@pytest.mark.parametrize("model", ["classifier", "protonet", "maml", "protomaml"])
def test_the_untouched_small_checkpoint_is_accepted(model, class_names, glyph_dir, tmp_path):
    save_checkpoint(tmp_path / "good.pt", tiny_checkpoint(class_names, model))
    assert evaluate_file(tmp_path / "good.pt", glyph_dir, tmp_path, model=model) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "protomaml"}, "holds a protomaml, not a protonet; pass it as --protomaml="),
        ({"model": "classifier"}, "holds a classifier, not a protonet; pass it as --classifier="),
        ({"model": "resnet"}, "resnet"),
        ({"model": ["protonet"]}, "model"),
        ({"dataset": "letters"}, "was trained on letters; pass --dataset=letters"),
        ({"class_split": {"train": ["a"], "val": ["b"], "test": ["c", "d"]}}, "no class '[bc]'"),
        ({"class_split": {"train": ["a"], "val": ["b"]}}, "class_split"),
        ({"class_split": {"train": 1, "val": 2, "test": 3}}, "class_split"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": ["a", "b", "c"]}, "mean"),
        ({"mean": [10**400, 0, 0]}, "mean"),
        ({"std": [0.2, 0.0, 0.2]}, "std"),
        ({"std": [0.2, float("nan"), 0.2]}, "std"),
        ({"encoder": {"proto_dim": 8}}, "weights do not fit"),
        ({"encoder": {**TINY_ENCODER, "heads": 3}}, "weights do not fit"),
        ({"encoder": {**TINY_ENCODER, "proto_dim": 0}}, "weights do not fit"),
        ({"epoch": "last"}, "epoch"),
        ({"state_dict": {}}, "weights do not fit"),
        ({"format": "few-shot checkpoint, version 0"}, "version 0"),
    ],
    ids=name_of,
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    changes, message, class_names, glyph_dir, tmp_path, recwarn
):
    save_checkpoint(tmp_path / "bad.pt", {**tiny_checkpoint(class_names), **changes})
    with pytest.raises(UserError, match=message) as error:
        evaluate_file(tmp_path / "bad.pt", glyph_dir, tmp_path)
    assert one_line(error) and not recwarn.list  # a warning would be a second line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lr_inner": "fast"},
        {"lr_inner": 0.1, "lr_output": 0.1, "output_init": "ones"},
        {"lr_inner": 0.1, "lr_output": 0.1, "batchnorm": "none"},
    ],
    ids=name_of,
)
def test_a_protomaml_checkpoint_without_its_inner_loop_is_refused(
    config, class_names, glyph_dir, tmp_path
):
    contents = {**tiny_checkpoint(class_names, "protomaml"), "config": config}
    save_checkpoint(tmp_path / "bad.pt", contents)
    with pytest.raises(UserError, match="bad.pt") as error:
        evaluate_file(tmp_path / "bad.pt", glyph_dir, tmp_path, model="protomaml")
    assert one_line(error)


@pytest.mark.parametrize(
    ("module", "option"),
    [(CLASSIFIER, "--teacher"), (PROTONET, "--init_from"), (PROTOMAML, "--init_from")],
    ids=name_of,
)
def test_a_trainer_refuses_a_checkpoint_that_does_not_fit_before_anything_is_written(
    module, option, class_names, glyph_dir, tmp_path
):
    save_checkpoint(tmp_path / "bad.pt", {**tiny_checkpoint(class_names), "state_dict": {}})
    with pytest.raises(UserError, match="bad.pt: the weights do not fit") as error:
        train(module, glyph_dir, tmp_path / "checkpoints", f"{option}={tmp_path / 'bad.pt'}")
    assert one_line(error)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("k_shot", [24, 25, 10**30])
def test_more_shots_than_a_class_has_images_are_refused(k_shot, class_names, glyph_dir, tmp_path):
    save_checkpoint(tmp_path / "good.pt", tiny_checkpoint(class_names))
    message = f"k = {k_shot} needs more than {k_shot} images of each class, found 24"
    with pytest.raises(UserError, match=message):
        evaluate_file(tmp_path / "good.pt", glyph_dir, tmp_path, f"--k_shots=2,{k_shot}")
    assert not (tmp_path / "results").exists()


def test_checkpoints_of_different_class_splits_do_not_share_a_table(
    class_names, glyph_dir, tmp_path
):
    save_checkpoint(tmp_path / "first.pt", tiny_checkpoint(class_names))
    other_split = {"class_split": split_classes(class_names, seed=1)}
    save_checkpoint(tmp_path / "second.pt", {**tiny_checkpoint(class_names, "maml"), **other_split})
    second = f"--maml={tmp_path / 'second.pt'}"
    with pytest.raises(
        UserError, match="first.pt and .*second.pt were trained on different classes"
    ):
        evaluate_file(tmp_path / "first.pt", glyph_dir, tmp_path, second)


def test_checkpoints_of_different_image_sizes_do_not_share_a_table(
    class_names, glyph_dir, tmp_path
):
    for name, model, side in ("first", "protonet", 32), ("second", "maml", 64):
        contents = {**tiny_checkpoint(class_names, model), "image_shape": [side, side]}
        save_checkpoint(tmp_path / f"{name}.pt", contents)
    message = "first.pt and .*second.pt were trained on images of different sizes"
    with pytest.raises(UserError, match=message) as error:
        evaluate_file(
            tmp_path / "first.pt", glyph_dir, tmp_path, f"--maml={tmp_path / 'second.pt'}"
        )
    assert one_line(error)


def test_no_checkpoint_at_all_says_how_to_make_one(glyph_dir, tmp_path):
    arguments = ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={tmp_path}"]
    message = "found no checkpoint in .*train_protonet.py --dataset=glyphs"
    with pytest.raises(UserError, match=message):
        evaluate.main(parse_config(evaluate.Config, arguments))


# What the user sees


def errors_of(runs):
    """Run commands side by side, {name: words}; return what each printed to stderr as lines.

    Each must end with exit code 2. Progress bars are left out.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONDEVMODE"] = ""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = {
        name: subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, **pipes)
        for name, words in runs.items()
    }
    lines = {}
    for name, process in processes.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, (name, errors)
        printed = errors.replace("\r", "\n").splitlines()
        lines[name] = [line for line in printed if line.strip() and " k = " not in line]
    return lines


def test_the_scripts_end_with_exit_code_2_and_one_line(class_names, glyph_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    save_checkpoint(tmp_path / "good.pt", tiny_checkpoint(class_names))
    data, good = (
        ["--dataset=glyphs", f"--data_dir={glyph_dir}"],
        f"--protonet={tmp_path / 'good.pt'}",
    )
    here, there = f"--checkpoint_dir={tmp_path / 'file'}", f"--results_dir={tmp_path / 'file'}"
    runs = {
        "unknown option": ["train_protonet.py", "--n_wya=3"],
        "no room for checkpoints": ["train_protomaml.py", *data, *SMALL[PROTOMAML], here],
        "no room for results": ["evaluate.py", *data, "--domains=", "--k_shots=20", good, there],
    }
    for name, lines in errors_of(runs).items():
        assert len(lines) == 1 and lines[0].startswith(f"{runs[name][0]}: error: "), (name, lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "good.pt"]


def test_an_absurd_value_ends_with_exit_code_2_and_the_librarys_own_words(glyph_dir, tmp_path):
    where = [f"--data_dir={glyph_dir}", f"--checkpoint_dir={tmp_path}", "--device=cpu"]
    runs = {
        "seed": ["train_protonet.py", "--dataset=glyphs", *where, "--seed=99999999999999999999"],
        "size": ["train_classifier.py", "--dataset=glyphs", *where, "--proto_dim=999999999999"],
    }
    for name, lines in errors_of(runs).items():
        script = runs[name][0]
        assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), (name, lines)
        assert any(f": {kind}: " in lines[0] for kind in ("RuntimeError", "ValueError")), lines
    assert not list(tmp_path.iterdir())


# Fuzzing: 2,000 inputs, each of which ends in success or in a UserError

FEW = settings(suppress_health_check=list(HealthCheck))
NASTY_WORDS = """
    0 -1 1 2 3 1e400 nan inf -0 1_0 0x10 ٣ true False 2,4 2,,4 , - = ' é %s %(prog)s
    999999999999999999999999 tutorial best
""".split()
NASTY_WORDS += ["", " ", "\n", "a b"]


def words(module):
    """Words of a command line: options, misspelt options and bare values."""
    names = st.sampled_from(list(module.Config.__dataclass_fields__))
    lists = st.lists(st.integers(-2, 9), max_size=4).map(lambda items: ",".join(map(str, items)))
    numbers = st.one_of(st.integers().map(str), st.floats().map(repr), lists)
    values = st.one_of(st.sampled_from(NASTY_WORDS), st.text(max_size=8), numbers)
    values = values.filter(lambda word: word != "--")
    option = st.builds("--{}={}".format, names, values)
    letters = st.sampled_from(string.ascii_letters + "-_=")

    def misspell(name, letter, place):
        return f"--{name[:place]}{letter}{name[place:]}=1"

    misspelt = st.builds(misspell, names, letters, st.integers(0, 12))
    return st.lists(st.one_of(option, option, option, misspelt, values), max_size=4)


@pytest.mark.parametrize("module", [*TRAINERS, evaluate], ids=name_of)
def test_any_command_line_gives_a_config_or_a_user_error(module):
    @settings(FEW, max_examples=200)
    @given(words(module))
    def check(argv):
        try:
            cfg = parse_config(module.Config, argv, recipes=getattr(module, "RECIPES", None))
        except UserError as error:
            assert str(error).strip()
        except SystemExit as stop:  # --help was among them
            assert not stop.code and any(word.startswith("-") for word in argv)
        else:
            changed_values(cfg)
            for name, field in module.Config.__dataclass_fields__.items():
                assert type(getattr(cfg, name)) is type(field.default)

    check()


# Where in a file, and what there: bytes replaced, a piece cut out, or a piece put in.
KINDS = st.sampled_from(["replace", "cut", "insert"])
EDIT = st.tuples(st.floats(0, 1), KINDS, st.binary(min_size=1, max_size=12))
EDITS = st.lists(EDIT, min_size=1, max_size=4)


def edited(content, edits):
    for share, kind, piece in edits:
        place = int(share * len(content))
        removed = {"replace": len(piece), "cut": 20 * len(piece), "insert": 0}[kind]
        new = b"" if kind == "cut" else piece
        content = content[:place] + new + content[place + removed :]
    return content


def load_or_refuse(folder):
    try:
        data = load_dataset("fuzzed", folder)
    except UserError as error:
        assert str(error).strip()
    else:
        assert len(data.images) == len(data.labels) and data.images.dtype == torch.uint8
        assert data.labels.min() >= 0 and data.labels.max() < len(data.class_names)
        data.digest()


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_any_damage_to_an_array_within_a_sound_archive_is_survived(tmp_path):
    # An archive's check sums catch nearly all damage; here they fit the damaged array.
    whole = {name: npy_bytes(array) for name, array in good_arrays().items()}

    @settings(FEW, max_examples=200)
    @given(st.sampled_from(sorted(whole)), EDITS, st.booleans())
    def check(name, edits, header_only):
        end = 128 if header_only else len(whole[name])
        damaged = edited(whole[name][:end], edits) + whole[name][end:]
        with zipfile.ZipFile(tmp_path / "fuzzed.npz", "w") as archive:
            for member, content in {**whole, name: damaged}.items():
                archive.writestr(f"{member}.npy", content)
        load_or_refuse(tmp_path)

    check()


DTYPES = "u1 i1 <i8 >i8 <i4 <f4 <f8 <c8 ? <U3 >U3 S3 <M8[s] V4 O".split()
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 6, 12, 32]), max_size=4)


@st.composite
def arrays(draw):
    dtype, shape = np.dtype(draw(st.sampled_from(DTYPES))), tuple(draw(SHAPES))
    if dtype.hasobject:
        return np.full(shape, None)
    size = int(np.prod(shape)) * dtype.itemsize
    # Any bytes, among them characters and dates that do not exist.
    content = draw(st.binary(min_size=1, max_size=64)) * (size + 1)
    return np.frombuffer(content[:size], dtype=dtype).reshape(shape)


def test_any_arrays_in_an_npz_file_are_survived(tmp_path):
    @settings(FEW, max_examples=250)
    @given(st.sampled_from(sorted(good_arrays())), arrays())
    def check(name, array):
        np.savez(tmp_path / "fuzzed.npz", **{**good_arrays(), name: array})
        load_or_refuse(tmp_path)

    check()


def load_and_build(path):
    try:
        encoder_of(load_checkpoint(path), path)
    except UserError as error:
        assert str(error).strip()


NUMBERS = [-1, 0, 1, 3, 10**12, 2**70, 10**400, 0.5, float("nan"), float("inf")]
NASTY_VALUES = [None, True, *NUMBERS, "", "text", "protonet", "maml", "classifier", b"bytes"]
TENSORS = [
    torch.zeros(0),
    torch.tensor(float("nan")),
    torch.zeros(3, dtype=torch.complex64),
    torch.ones(2, 2, dtype=torch.int8),
    torch.zeros(4, 36),
]
KEYS = st.sampled_from(["train", "val", "test", "proto_dim", "lr_inner"])
VALUES = st.recursive(
    st.one_of(st.sampled_from(NASTY_VALUES), st.sampled_from(TENSORS)),
    lambda part: st.one_of(st.lists(part, max_size=3), st.dictionaries(KEYS, part, max_size=3)),
    max_leaves=4,
)


@pytest.mark.filterwarnings("ignore")
def test_any_values_in_a_checkpoint_are_survived(tmp_path):
    base = tiny_checkpoint(list("abcdef"))
    places = [(name,) for name in base]
    places += [(name, key) for name in ("config", "encoder", "class_split") for key in base[name]]
    places += [("state_dict", key) for key in list(base["state_dict"])[:3]]
    models = st.sampled_from(["classifier", "protonet", "protomaml"])

    @settings(FEW, max_examples=300)
    @given(st.sampled_from(places), VALUES, models, st.booleans())
    def check(place, value, model, lightning):
        contents = {k: dict(part) if isinstance(part, dict) else part for k, part in base.items()}
        contents["model"] = model
        if lightning:  # the tutorial's files take another way through the reader
            contents["pytorch-lightning_version"] = "1.6"
            hyperparameters = {"proto_dim": value, "num_inner_steps": 1, "lr_inner": value}
            contents["hyper_parameters"] = hyperparameters
        target = contents if len(place) == 1 else contents[place[0]]
        target[place[-1]] = value
        save_checkpoint(tmp_path / "fuzzed.pt", contents)
        load_and_build(tmp_path / "fuzzed.pt")

    check()
