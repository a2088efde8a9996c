"""Bad command lines, data and checkpoints: each ends in one clear line, exit code 2, and leaves no half-written file."""

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
from PIL import Image

import evaluate
import train_protomaml
import train_protonet
from common.checkpoint import FORMAT, encoder_of, load_checkpoint
from common.config import UserError, changed_values, parse_config
from common.data import load_dataset, split_classes
from common.encoder import make_encoder

ROOT = Path(evaluate.__file__).parent
TINY_ENCODER = {"proto_dim": 4, "growth_rate": 4, "block_config": [1, 1, 1, 1], "bn_size": 1, "num_init_features": 8}
PROTONET, PROTOMAML, EVALUATE = train_protonet, train_protomaml, evaluate
SMALL = {PROTONET: [], PROTOMAML: ["--tasks_per_step=2"]}  # the small glyphs give fewer episodes than the default batch takes


def one_line(error):
    """The message as the user sees it: it must fit one line and say something."""
    message = str(error.value)
    return "\n" not in message.strip() and len(message) > 20


# Command lines that are wrong before any file is looked at

BAD_OPTIONS = [
    (PROTONET, "--n_wya=3", "unknown option --n_wya.*did you mean --n_way"),
    (PROTONET, "--learning_rate=3", "unknown option --learning_rate"),
    (PROTONET, "n_way=3", "n_way=3.*--name=value"),
    (PROTONET, "--n_way=five", "--n_way.*invalid int value: 'five'"),
    (PROTONET, "--n_way=2.5", "--n_way.*invalid int value: '2.5'"),
    (PROTONET, "--n_way", "--n_way.*expected one argument"),
    (PROTONET, "--n_way=0", "n_way is 0, but at least 2"),
    (PROTONET, "--n_way=1", "n_way is 1, but at least 2"),
    (PROTONET, "--n_way=-3", "n_way is -3, but at least 2"),
    (PROTONET, "--k_shot=0", "k_shot is 0, but at least 1"),
    (PROTONET, "--n_query=-1", "n_query is -1, but at least 1"),
    (PROTONET, "--val_way=1", "val_way is 1"),
    (PROTONET, "--epochs=0", "epochs is 0, but at least 1"),
    (PROTONET, "--proto_dim=0", "proto_dim is 0, but at least 1"),
    (PROTONET, "--proto_dim=999999999999", "proto_dim is 999999999999"),
    (PROTONET, "--steps_per_epoch=-1", "steps_per_epoch is -1, but at least 0"),
    (PROTONET, "--weight_decay=-0.1", "weight_decay is -0.1, but at least 0"),
    (PROTONET, "--seed=-1", "seed is -1, but at least 0"),
    (PROTONET, "--seed=99999999999999999999", "seed is 99999999999999999999"),
    (PROTONET, "--lr=0", "lr is 0.0, but a number above 0"),
    (PROTONET, "--lr=-1e-3", "lr is -0.001, but a number above 0"),
    (PROTONET, "--lr=1e300", r"lr is 1e\+300"),
    (PROTONET, "--lr=nan", "--lr.*invalid float value: 'nan'"),
    (PROTONET, "--lr=inf", "--lr.*invalid float value: 'inf'"),
    (PROTONET, "--lr_drops=0.5,0", "lr_drops is 0.0, but a number above 0"),
    (PROTONET, "--lr_drops=0.5;0.7", "--lr_drops.*'0.5;0.7'"),
    (PROTONET, "--resume=maybe", "--resume.*invalid true.false value: 'maybe'"),
    (PROTOMAML, "--tasks_per_step=0", "tasks_per_step is 0, but at least 1"),
    (PROTOMAML, "--num_inner_steps=0", "num_inner_steps is 0, but at least 1"),
    (PROTOMAML, "--lr_inner=0", "lr_inner is 0.0, but a number above 0"),
    (PROTOMAML, "--lr_output=-1", "lr_output is -1.0, but a number above 0"),
    (PROTOMAML, "--output_init=zero", "output_init is 'zero'.*--output_init=zeros"),
    (PROTOMAML, "--val_episodes=-1", "val_episodes is -1, but at least 0"),
    (EVALUATE, "--k_shots=2,4,2", "k_shots is 2,4,2; name each value once"),
    (EVALUATE, "--k_shots=", "k_shots"),
    (EVALUATE, "--k_shots=0,2", "k_shots is 0, but at least 1"),
    (EVALUATE, "--k_shots=2,x", "--k_shots.*'2,x'"),
    (EVALUATE, "--domains=mnist,mnist", "domains is mnist,mnist; name each value once"),
    (EVALUATE, "--domains=cifar100", "cifar100 is the data set of the training classes"),
    (EVALUATE, "--num_inner_steps=0", "num_inner_steps is 0, but at least 1"),
    (EVALUATE, "--domain_num_inner_steps=0", "domain_num_inner_steps is 0, but at least 1"),
    (EVALUATE, "--domain_lr_inner=0.1,0.2", "domain_lr_inner has 2 numbers for 5 values of k"),
    (EVALUATE, "--domain_lr_output=-1", "domain_lr_output is -1.0, but a number above 0"),
    (EVALUATE, "--max_support_sets=-1", "max_support_sets is -1, but at least 0"),
    (EVALUATE, "--epochs=3", "unknown option --epochs"),
]


@pytest.mark.parametrize(("module", "option", "message"), BAD_OPTIONS, ids=[f"{module.__name__} {option}" for module, option, _ in BAD_OPTIONS])
def test_a_bad_option_is_named_with_what_is_needed(module, option, message):
    with pytest.raises(UserError, match=message) as error:
        parse_config(module.Config, [option])
    assert one_line(error)


# Command lines that do not fit the machine or the data

BAD_TRAINING = [
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
    (PROTONET, "--resume=true", "nothing to resume"),
    (PROTOMAML, "--k_shot=21", "has 24 images, but an episode needs 25 of each class"),
    (PROTOMAML, "--tasks_per_step=1000", "a batch needs 1000 episodes"),
    (PROTOMAML, "--init_from=absent.pt", "no checkpoint absent.pt"),
]


@pytest.mark.parametrize(("module", "option", "message"), BAD_TRAINING, ids=[f"{module.__name__} {option[:24]}" for module, option, _ in BAD_TRAINING])
def test_training_that_cannot_work_is_refused_before_anything_is_written(module, option, message, glyph_dir, tmp_path):
    arguments = ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={tmp_path / 'checkpoints'}", *SMALL[module], option]
    with pytest.raises(UserError, match=message) as error:
        module.main(parse_config(module.Config, arguments))
    assert one_line(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("module", [PROTONET, PROTOMAML, EVALUATE], ids=lambda module: module.__name__)
def test_cuda_where_there_is_none_is_refused(module):
    with pytest.raises(UserError, match="device 'cuda' cannot be used here.*--device=cpu") as error:
        module.main(parse_config(module.Config, ["--device=cuda"]))
    assert one_line(error)


@pytest.mark.parametrize("module", [PROTONET, PROTOMAML], ids=lambda module: module.__name__)
@pytest.mark.parametrize("inside", ["", "below"])
def test_a_file_in_place_of_the_checkpoint_folder_is_named_and_kept(module, inside, glyph_dir, tmp_path):
    file = tmp_path / "checkpoints"
    file.write_text("mine")
    with pytest.raises(UserError, match="cannot write .*checkpoints") as error:
        module.main(parse_config(module.Config, ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={file / inside}", *SMALL[module]]))
    assert one_line(error)
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]


# Checkpoints that do not fit


def tiny_checkpoint(class_names, model="protonet"):
    """A valid checkpoint with a small encoder, made without training."""
    torch.manual_seed(0)
    return {
        "format": FORMAT,
        "model": model,
        "dataset": "glyphs",
        "config": {"lr_inner": 0.1, "lr_output": 0.1, "num_inner_steps": 1, "output_init": "prototypes"},
        "encoder": dict(TINY_ENCODER),
        "state_dict": make_encoder(**TINY_ENCODER).state_dict(),
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
    arguments = ["--dataset=glyphs", "--domains=", "--k_shots=2", "--num_inner_steps=1", "--max_support_sets=1", "--device=cpu"]
    return evaluate.main(parse_config(evaluate.Config, [*arguments, f"--{model}={path}", f"--data_dir={glyph_dir}", f"--results_dir={tmp_path / 'results'}", *more]))


@pytest.mark.parametrize("model", ["protonet", "protomaml"])
def test_the_untouched_small_checkpoint_is_accepted(model, class_names, glyph_dir, tmp_path):
    torch.save(tiny_checkpoint(class_names, model), tmp_path / "good.pt")
    assert evaluate_file(tmp_path / "good.pt", glyph_dir, tmp_path, model=model) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "protomaml"}, "holds a protomaml, not a protonet; pass it as --protomaml="),
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
    ids=lambda value: str(value)[:48] if isinstance(value, dict) else "",
)
def test_a_checkpoint_that_does_not_fit_is_refused(changes, message, class_names, glyph_dir, tmp_path, recwarn):
    torch.save({**tiny_checkpoint(class_names), **changes}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=message) as error:
        evaluate_file(tmp_path / "bad.pt", glyph_dir, tmp_path)
    assert one_line(error) and not recwarn.list  # a warning would be a second line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("config", [{}, {"lr_inner": "fast"}, {"lr_inner": 0.1, "lr_output": 0.1, "output_init": "ones"}], ids=str)
def test_a_protomaml_checkpoint_without_its_inner_loop_is_refused(config, class_names, glyph_dir, tmp_path):
    torch.save({**tiny_checkpoint(class_names, "protomaml"), "config": config}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="bad.pt"):
        evaluate_file(tmp_path / "bad.pt", glyph_dir, tmp_path, model="protomaml")


@pytest.mark.parametrize("k_shot", [24, 25, 10**30])
def test_more_shots_than_a_class_has_images_are_refused(k_shot, class_names, glyph_dir, tmp_path):
    torch.save(tiny_checkpoint(class_names), tmp_path / "good.pt")
    with pytest.raises(UserError, match=f"k = {k_shot} needs more than {k_shot} images of each class, found 24"):
        evaluate_file(tmp_path / "good.pt", glyph_dir, tmp_path, f"--k_shots=2,{k_shot}")
    assert not (tmp_path / "results").exists()


def test_checkpoints_of_different_class_splits_do_not_share_a_table(class_names, glyph_dir, tmp_path):
    torch.save(tiny_checkpoint(class_names), tmp_path / "first.pt")
    torch.save({**tiny_checkpoint(class_names, "maml"), "class_split": split_classes(class_names, seed=1)}, tmp_path / "second.pt")
    with pytest.raises(UserError, match="different classes"):
        evaluate_file(tmp_path / "first.pt", glyph_dir, tmp_path, f"--maml={tmp_path / 'second.pt'}")


def test_no_checkpoint_at_all_says_how_to_make_one(glyph_dir, tmp_path):
    with pytest.raises(UserError, match="found no checkpoint in .*train_protonet.py --dataset=glyphs"):
        evaluate.main(parse_config(evaluate.Config, ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={tmp_path}"]))


# Data that cannot be used


def good_arrays():
    labels = np.arange(12, dtype=np.int64) % 6
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    return {"images": images, "labels": labels, "class_names": np.array(list("abcdef"))}


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("images", None, "no array 'images'"),
        ("labels", None, "no array 'labels'"),
        ("images", good_arrays()["images"].astype(np.float32), "images are float32"),
        ("images", np.full((12, 32, 32, 3), np.nan), "images are float64"),
        ("images", good_arrays()["images"][..., 0], r"images are uint8 \[12, 32, 32\]"),
        ("images", good_arrays()["images"][:, :16, :16], "16x16 pixels"),
        ("images", np.array([None] * 12), "bad.npz"),
        ("labels", good_arrays()["labels"].astype(np.int32), "labels are int32"),
        ("labels", good_arrays()["labels"][:11], r"labels are int64 \[11\] for 12 images"),
        ("labels", good_arrays()["labels"] + 1, "labels run from 1 to 6"),
        ("labels", good_arrays()["labels"] - 1, "labels run from -1 to 4"),
        ("labels", np.minimum(good_arrays()["labels"], 4), "class 'f' has no image"),
        ("class_names", np.arange(6), "class_names are int64"),
        ("class_names", np.array(list("aacdef")), "different class names"),
        ("class_names", np.array(list("abcde")), "labels run from 0 to 5"),
    ],
)
def test_a_bad_array_is_named(name, array, message, tmp_path):
    arrays = good_arrays()
    arrays.pop(name) if array is None else arrays.update({name: array})
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        train_protonet.main(parse_config(train_protonet.Config, ["--dataset=bad", f"--data_dir={tmp_path}", f"--checkpoint_dir={tmp_path / 'checkpoints'}"]))
    assert one_line(error)
    assert not (tmp_path / "checkpoints").exists()


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zip_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"text", npy_bytes(np.zeros(3)), zip_bytes({}), zip_bytes({"images": b"x", "labels": b"x", "class_names": b"x"}), zip_bytes({"images.npy": b"x", "labels.npy": b"x", "class_names.npy": b"x"})],
    ids=["empty", "text", "a single array", "an empty archive", "members that are no arrays", "members that only say so"],
)
def test_a_file_that_is_no_archive_of_arrays_is_refused(content, tmp_path):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match="bad.npz") as error:
        load_dataset("bad", tmp_path)
    assert one_line(error)


def write_image(path, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def no_class(folder):
    folder.mkdir()


def class_without_images(folder):
    write_image(folder / "a" / "1.png")
    (folder / "b").mkdir()


def one_class(folder):
    write_image(folder / "a" / "1.png")


def different_sizes(folder):
    write_image(folder / "a" / "1.png")
    write_image(folder / "b" / "1.png", (40, 32))


def small_images(folder):
    write_image(folder / "a" / "1.png", (8, 8))
    write_image(folder / "b" / "1.png", (8, 8))


def unreadable_image(folder):
    write_image(folder / "a" / "1.png")
    write_image(folder / "b" / "1.png")
    (folder / "b" / "2.jpg").write_bytes(b"no image")


def cut_image(folder):
    write_image(folder / "a" / "1.png")
    content = (folder / "a" / "1.png").read_bytes()
    (folder / "a" / "2.png").write_bytes(content[: len(content) // 2])
    write_image(folder / "b" / "1.png")


def folder_named_as_an_image(folder):
    write_image(folder / "a" / "1.png")
    (folder / "b" / "1.png").mkdir(parents=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_class, "holds no class"),
        (class_without_images, "b holds no .png or .jpg file"),
        (one_class, "at least 2"),
        (different_sizes, "40x32 pixels.*32x32 pixels"),
        (small_images, "8x8 pixels"),
        (unreadable_image, "2.jpg cannot be read as an image"),
        (cut_image, "2.png cannot be read as an image"),
        (folder_named_as_an_image, "1.png"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_folder_of_images_is_refused_with_the_file_at_fault(make, message, tmp_path):
    make(tmp_path / "letters")
    with pytest.raises(UserError, match=message) as error:
        load_dataset("letters", tmp_path)
    assert one_line(error)


def test_too_few_classes_to_split_are_refused(tmp_path):
    for name in "abcde":
        write_image(tmp_path / "letters" / name / "1.png")
    with pytest.raises(UserError, match="found 5 classes, but at least 6"):
        train_protonet.main(parse_config(train_protonet.Config, ["--dataset=letters", f"--data_dir={tmp_path}", f"--checkpoint_dir={tmp_path / 'checkpoints'}"]))


# What the user sees


def test_the_scripts_end_with_exit_code_2_and_one_line(glyph_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    torch.save(tiny_checkpoint(load_dataset("glyphs", glyph_dir).class_names), tmp_path / "good.pt")
    data = ["--dataset=glyphs", f"--data_dir={glyph_dir}"]
    runs = {
        "unknown option": ["train_protonet.py", "--n_wya=3"],
        "no room for checkpoints": ["train_protomaml.py", *data, *SMALL[PROTOMAML], f"--checkpoint_dir={tmp_path / 'file'}"],
        "no room for results": ["evaluate.py", *data, "--domains=", "--k_shots=20", f"--protonet={tmp_path / 'good.pt'}", f"--results_dir={tmp_path / 'file'}"],
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # All at once: most of their time goes into imports.
    processes = {name: subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for name, command in runs.items()}
    for name, process in processes.items():
        _, errors = process.communicate(timeout=120)
        lines = [line for line in errors.replace("\r", "\n").splitlines() if line.strip() and " k = " not in line]  # the progress bar of a test may be there as well
        assert process.returncode == 2, (name, errors)
        assert len(lines) == 1 and lines[0].startswith(f"{runs[name][0]}: error: "), (name, errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "good.pt"]


# Fuzzing: 2,000 inputs, each of which ends in success or in a UserError

FEW = settings(suppress_health_check=list(HealthCheck), deadline=None, derandomize=True, database=None)
NASTY_WORDS = ["", " ", "0", "-1", "1", "2", "3", "1e400", "nan", "inf", "-0", "1_0", "0x10", "٣", "true", "False", "2,4", "2,,4", ",", "--", "-", "=", "'", "\n", "é", "a b", "%s", "%(prog)s", "999999999999999999999999"]


def words(module):
    names = list(module.Config.__dataclass_fields__)
    values = st.one_of(st.sampled_from(NASTY_WORDS), st.text(max_size=8), st.integers().map(str), st.floats().map(repr), st.lists(st.integers(-2, 9), max_size=4).map(lambda items: ",".join(map(str, items))))
    option = st.tuples(st.sampled_from(names), values).map(lambda pair: f"--{pair[0]}={pair[1]}")
    misspelt = st.tuples(st.sampled_from(names), st.sampled_from(string.ascii_letters + "-_="), st.integers(0, 12)).map(lambda parts: f"--{parts[0][: parts[2]]}{parts[1]}{parts[0][parts[2] :]}=1")
    return st.lists(st.one_of(option, option, option, misspelt, values), max_size=4)


@pytest.mark.parametrize("module", [PROTONET, PROTOMAML, EVALUATE], ids=lambda module: module.__name__)
def test_any_command_line_gives_a_config_or_a_user_error(module):
    @settings(FEW, max_examples=250)
    @given(words(module))
    def check(argv):
        try:
            cfg = parse_config(module.Config, argv)
        except UserError as error:
            assert str(error).strip()
        except SystemExit as stop:
            assert not stop.code and any(word.startswith("-") for word in argv)  # --help was among them
        else:
            changed_values(cfg)
            for name, field in module.Config.__dataclass_fields__.items():
                assert type(getattr(cfg, name)) is type(field.default)

    check()


# Where in a file, and what there: bytes replaced, a piece cut out, or a piece put in.
EDITS = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["replace", "cut", "insert"]), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)


def edited(content, edits):
    for share, kind, piece in edits:
        place = int(share * len(content))
        after = {"replace": place + len(piece), "cut": place + 20 * len(piece), "insert": place}[kind]
        content = content[:place] + (b"" if kind == "cut" else piece) + content[after:]
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


def test_any_damage_to_an_npz_file_is_survived(tmp_path):
    np.savez(tmp_path / "whole.npz", **good_arrays())
    whole = (tmp_path / "whole.npz").read_bytes()

    @settings(FEW, max_examples=200)
    @given(EDITS)
    def check(edits):
        (tmp_path / "fuzzed.npz").write_bytes(edited(whole, edits))
        load_or_refuse(tmp_path)

    check()


def test_any_damage_to_an_array_within_a_sound_archive_is_survived(tmp_path):
    # An archive's check sums catch nearly all damage; here they fit, and the array's header is what is damaged.
    whole = {name: npy_bytes(array) for name, array in good_arrays().items()}

    @settings(FEW, max_examples=200)
    @given(st.sampled_from(sorted(whole)), EDITS, st.booleans())
    def check(name, edits, header_only):
        header, body = (whole[name][:128], whole[name][128:]) if header_only else (whole[name], b"")
        members = {**whole, name: edited(header, edits) + body}
        (tmp_path / "fuzzed.npz").write_bytes(zip_bytes({f"{member}.npy": content for member, content in members.items()}))
        load_or_refuse(tmp_path)

    check()


DTYPES = st.sampled_from(["u1", "i1", "<i8", ">i8", "<i4", "<f4", "<f8", "<c8", "?", "<U3", ">U3", "S3", "<M8[s]", "V4", "O"])


@st.composite
def arrays(draw):
    dtype, shape = np.dtype(draw(DTYPES)), tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 6, 12, 32]), max_size=4)))
    if dtype == object:
        return np.full(shape, None)
    count = int(np.prod(shape))
    # Any bytes, among them characters and dates that do not exist.
    return np.frombuffer((draw(st.binary(min_size=1, max_size=64)) * (count * dtype.itemsize + 1))[: count * dtype.itemsize], dtype=dtype).reshape(shape)


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


@pytest.mark.filterwarnings("ignore")
def test_any_damage_to_a_checkpoint_is_survived(tmp_path):
    torch.save(tiny_checkpoint(list("abcdef")), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()

    @settings(FEW, max_examples=300)
    @given(EDITS)
    def check(edits):
        (tmp_path / "fuzzed.pt").write_bytes(edited(whole, edits))
        load_and_build(tmp_path / "fuzzed.pt")

    check()


NASTY_VALUES = st.sampled_from([None, True, -1, 0, 1, 3, 10**12, 2**70, 10**400, 0.5, float("nan"), float("inf"), "", "text", "protonet", "maml", b"bytes"])
TENSORS = st.sampled_from([torch.zeros(0), torch.tensor(float("nan")), torch.zeros(3, dtype=torch.complex64), torch.ones(2, 2, dtype=torch.int8), torch.zeros(4, 36)])
VALUES = st.recursive(st.one_of(NASTY_VALUES, TENSORS), lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["train", "val", "test", "proto_dim", "lr_inner"]), inner, max_size=3)), max_leaves=4)


@pytest.mark.filterwarnings("ignore")
def test_any_values_in_a_checkpoint_are_survived(tmp_path):
    base = tiny_checkpoint(list("abcdef"))
    places = [(name,) for name in base] + [(name, key) for name in ("config", "encoder", "class_split") for key in base[name]] + [("state_dict", key) for key in list(base["state_dict"])[:3]]

    @settings(FEW, max_examples=300)
    @given(st.sampled_from(places), VALUES, st.sampled_from(["protonet", "protomaml"]), st.booleans())
    def check(place, value, model, lightning):
        contents = {key: dict(part) if isinstance(part, dict) else part for key, part in base.items()}
        contents["model"] = model
        if lightning:  # the tutorial's files take another way through the reader
            contents.update({"pytorch-lightning_version": "1.6", "hyper_parameters": {"proto_dim": value, "num_inner_steps": 1, "lr_inner": value}})
        target = contents if len(place) == 1 else contents[place[0]]
        target[place[-1]] = value
        torch.save(contents, tmp_path / "fuzzed.pt")
        load_and_build(tmp_path / "fuzzed.pt")

    check()
