"""The scripts that train and test, end to end, as processes with tiny budgets on small glyphs."""

import csv
import errno
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import stress
import torch
from PIL import Image

import evaluate
import train_classifier
import train_protomaml
import train_protonet
from common.checkpoint import MODEL_NAMES, load_checkpoint, save_checkpoint
from common.config import UserError, parse_config
from common.data import load_dataset
from common.files import sha256

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(evaluate.__file__).parent
SMALL_EPISODES = (
    "--n_way=2 --k_shot=2 --n_query=2 --epochs=2 --steps_per_epoch=4 --device=cpu".split()
)
SMALL_BATCH = ["--batch_size=16"]
SMALL_TASKS = ["--tasks_per_step=2", "--val_episodes=3"]
SMALL_TEST = "--dataset=glyphs --k_shots=2,5 --num_inner_steps=3 --max_support_sets=3 --device=cpu"
SMALL_TEST = SMALL_TEST.split()
TRAINING = {  # model: script and options
    "classifier": ["train_classifier.py", *SMALL_EPISODES, *SMALL_BATCH],
    "protonet": ["train_protonet.py", *SMALL_EPISODES],
    "protomaml": ["train_protomaml.py", *SMALL_EPISODES, *SMALL_TASKS],
    "maml": ["train_protomaml.py", *SMALL_EPISODES, *SMALL_TASKS, "--output_init=zeros"],
}
MODELS = list(TRAINING)


def run_script(script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def in_process(module, *arguments):
    return module.main(parse_config(module.Config, list(map(str, arguments))))


def glyphs(glyph_dir, checkpoint_dir):
    return ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={checkpoint_dir}"]


@pytest.fixture(scope="module")
def trained(glyph_dir, tmp_path_factory):
    """Train all four models; return (checkpoint_dir, {model: finished process})."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with ThreadPoolExecutor(2) as pool:
        commands = [[*command, *glyphs(glyph_dir, folder)] for command in TRAINING.values()]
        processes = dict(zip(TRAINING, pool.map(lambda command: run_script(*command), commands)))
    for process in processes.values():
        assert process.returncode == 0, process.stderr
    return folder, processes


@pytest.fixture(scope="module")
def tested(trained, glyph_dir, tmp_path_factory):
    """Test all four models; return (results_dir, finished process)."""
    folder = tmp_path_factory.mktemp("results")
    where = [*glyphs(glyph_dir, trained[0]), f"--results_dir={folder}"]
    process = run_script("evaluate.py", *SMALL_TEST, *where)
    assert process.returncode == 0, process.stderr
    return folder, process


@pytest.fixture
def evaluate_small(trained, glyph_dir, capsys, monkeypatch):
    """Return a function (results_dir, *options) -> what the small test prints, in this process.

    Without figures, which take longer than all the rest, unless a test asks for them.
    """

    def evaluate_in_process(results_dir, *options, code=0, figures=False):
        where = [*glyphs(glyph_dir, trained[0]), f"--results_dir={results_dir}"]
        with monkeypatch.context() as patched:
            if not figures:
                patched.setattr(evaluate, "draw_figures", lambda *arguments: None)
            assert in_process(evaluate, *SMALL_TEST, *where, *options) == code
        return capsys.readouterr().out

    return evaluate_in_process


def only(model, trained):
    """Return the option that makes a test leave out the other models."""
    return f"--{model}={trained[0] / 'glyphs' / model}.pt"


def rows_of(folder):
    return json.loads((folder / "accuracy.json").read_text())


def copied(tested, tmp_path):
    """A copy of the results, for a test that adds to them."""
    return shutil.copytree(tested[0], tmp_path / "results")


# Training


@pytest.mark.parametrize("model", MODELS)
def test_training_writes_checkpoints_curves_and_a_csv(model, trained):
    folder = trained[0] / "glyphs"
    for name in (f"{model}.pt", f"{model}_last.pt"):
        assert torch.load(folder / name, weights_only=True)["model"] == model
    with open(folder / f"{model}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 <= float(row["val_accuracy"]) <= 1 for row in rows)
    assert all(math.isfinite(float(row["train_loss"])) for row in rows)
    Image.open(folder / f"{model}_curves.png").load()
    assert (folder / f"{model}_curves.svg").read_text().endswith("</svg>\n")


@pytest.mark.parametrize("model", MODELS)
def test_training_prints_changed_values_one_line_per_epoch_and_the_next_command(model, trained):
    printed = trained[1][model].stdout
    assert f"config: n_way = 2 (default {10 if model == 'classifier' else 5})" in printed
    assert "config: seed" not in printed
    assert len(re.findall(r"^epoch \d/2 \|", printed, re.MULTILINE)) == 2
    assert "python evaluate.py --dataset=glyphs" in printed
    assert "Traceback" not in trained[1][model].stderr


@pytest.mark.parametrize("model", ["classifier", "protonet", "protomaml"])
def test_two_runs_with_one_seed_give_identical_weights(model, trained, glyph_dir, tmp_path):
    # The first run was a process, the second is a call of main(cfg).
    scripts = [train_classifier, train_protonet, train_protomaml]
    module = {f"{script.__name__}.py": script for script in scripts}[TRAINING[model][0]]
    in_process(module, *TRAINING[model][1:], *glyphs(glyph_dir, tmp_path))
    for name in (f"{model}.pt", f"{model}_last.pt"):
        assert stress.same_file(trained[0] / "glyphs" / name, tmp_path / "glyphs" / name)


def test_another_seed_gives_other_weights(trained, glyph_dir, tmp_path):
    in_process(train_protonet, *SMALL_EPISODES, *glyphs(glyph_dir, tmp_path), "--seed=1")
    files = [folder / "glyphs" / "protonet_last.pt" for folder in (trained[0], tmp_path)]
    first, second = (torch.load(file)["state_dict"]["classifier.weight"] for file in files)
    assert not torch.equal(first, second)


# Evaluation


def test_the_results_hold_one_object_per_model_data_set_and_k(tested):
    rows = rows_of(tested[0])
    wanted = set(itertools.product([*MODELS, "pixels"], ["glyphs", "glyph_digits"], [2, 5]))
    assert {(row["model"], row["dataset"], row["k_shot"]) for row in rows} == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        assert 0 <= row["accuracy"] <= 1 and row["std"] >= 0 and row["ci95"] >= 0
        # 24 images of each class; adaptation is capped at three support sets.
        sets = 3 if row["model"] in ("protomaml", "maml") else 24 // row["k_shot"]
        assert row["num_support_sets"] == sets


def test_the_accuracy_of_two_classes_lies_on_the_grid_of_their_queries(tested):
    for row in rows_of(tested[0]):
        num_classes = {"glyphs": 2, "glyph_digits": 10}[row["dataset"]]
        queries = row["num_support_sets"] * num_classes * (24 - row["k_shot"])
        correct = row["accuracy"] * queries
        assert correct == pytest.approx(round(correct), abs=1e-6)


def test_table_csv_markdown_and_json_agree(tested):
    folder, process = tested
    rows = rows_of(folder)
    with open(folder / "accuracy.csv", newline="") as file:
        found = [float(line["accuracy"]) for line in csv.DictReader(file)]
    assert found == [row["accuracy"] for row in rows]
    markdown = (folder / "accuracy.md").read_text()
    for row in rows:
        percent = f"{100 * row['accuracy']:.2f}"
        assert percent in markdown and percent in process.stdout
    for name in ("Classifier", "ProtoNet", "ProtoMAML", "MAML", "Pixels"):
        assert re.search(rf"^{name} +glyphs +2 ", process.stdout, re.MULTILINE)


def test_the_markdown_table_says_how_it_was_made(tested, trained):
    markdown = (tested[0] / "accuracy.md").read_text()
    assert f"    python evaluate.py {shlex.join(tested[1].args[2:])}\n" in markdown
    for model in MODELS:
        path = trained[0] / "glyphs" / f"{model}.pt"
        checkpoint = load_checkpoint(path)
        epoch = f"epoch {checkpoint['epoch']} of {checkpoint['config']['epochs']}"
        assert f"{path} ({epoch}, {sha256(path)[:12]})" in markdown


FIGURES = (
    "examples_glyphs examples_glyph_digits few_shot_batch protonet_glyphs models_glyphs".split()
)


@pytest.mark.parametrize("name", [*FIGURES, "models_glyph_digits"])
def test_every_figure_is_there_as_png_and_svg(name, tested):
    assert min(Image.open(tested[0] / f"{name}.png").size) > 100
    assert (tested[0] / f"{name}.svg").read_text().endswith("</svg>\n")


def test_a_second_run_reuses_every_result_and_says_so(tested, evaluate_small, tmp_path):
    folder = copied(tested, tmp_path)
    before = (folder / "accuracy.json").read_bytes()
    (folder / "accuracy.json").unlink()
    printed = evaluate_small(folder)
    assert printed.count("reused") == 20 and "adaptations" not in printed
    assert (folder / "accuracy.json").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "reused"),
    [
        # Nearest prototypes know no such setting: classifier, ProtoNet and pixels keep both k.
        ("--max_support_sets=2", 6),
        ("--num_inner_steps=2", 6),
        ("--lr_inner=0.05", 6),
        ("--k_shots=2,3", 5),  # k = 2 of each
        ("--views=2", 2),  # pixels
        ("--precision=bfloat16", 2),
    ],
)
def test_results_of_other_settings_are_not_reused(option, reused, tested, evaluate_small, tmp_path):
    folder = copied(tested, tmp_path)
    assert evaluate_small(folder, "--domains=", option).count("reused") == reused
    if option.startswith("--max"):
        adapted = [row for row in rows_of(folder) if row["model"] in ("maml", "protomaml")]
        assert {row["num_support_sets"] for row in adapted} == {2}
    if option.startswith("--views"):
        lines = (folder / "accuracy.md").read_text().splitlines()
        names = {line.strip("| ").split(" | ")[0] for line in lines if " glyphs " in line}
        models = {f"{name}, 2 views" for name in ("Classifier", "ProtoNet", "ProtoMAML", "MAML")}
        assert names == {"Pixels", *models}


def test_a_fine_tuned_model_has_rows_and_settings_of_its_own(evaluate_small, trained, tmp_path):
    folder = tmp_path
    options = ["--finetune=protonet,maml", "--finetune_steps=2,0", "--domain_finetune_lr=0.01"]
    options += [only("protonet", trained), only("maml", trained), "--max_support_sets=4,2"]
    options += ["--domain_max_support_sets=3,1"]
    printed = evaluate_small(folder, *options, figures=True)
    assert "ProtoNet, fine-tuned" in printed and "MAML, fine-tuned" in printed
    rows = {(row["model"], row["dataset"], row["k_shot"]): row for row in rows_of(folder)}
    for model in ("protonet", "maml"):
        settings = rows[f"{model}_finetuned", "glyphs", 2]["settings"]
        assert settings == {"finetune_steps": 2, "finetune_lr": 0.001, "max_support_sets": 4}
        settings = rows[f"{model}_finetuned", "glyph_digits", 2]["settings"]
        assert settings == {"finetune_steps": 2, "finetune_lr": 0.01, "max_support_sets": 3}
        assert (folder / f"confusion_{model}_finetuned_glyphs.png").exists()
        assert rows[f"{model}_finetuned", "glyphs", 2]["num_support_sets"] == 4
        assert rows[f"{model}_finetuned", "glyph_digits", 2]["num_support_sets"] == 3
    assert rows["maml", "glyphs", 5]["num_support_sets"] == 2
    assert rows["maml", "glyph_digits", 5]["num_support_sets"] == 1
    # Without steps it is the nearest prototype, over all support sets.
    plain, tuned = (rows[name, "glyphs", 5] for name in ("protonet", "protonet_finetuned"))
    assert tuned["num_support_sets"] == plain["num_support_sets"]
    assert tuned["accuracy"] == plain["accuracy"] and "max_support_sets" not in tuned["settings"]
    again = evaluate_small(folder, *options, "--finetune_steps=2,1")
    assert "protonet_finetuned on glyphs, k = 2: reused" in again
    assert "protonet_finetuned on glyphs, k = 5: reused" not in again


def test_only_a_tested_model_can_be_fine_tuned(trained):
    path = trained[0] / "glyphs" / "protonet.pt"
    cfg = evaluate.Config(dataset="glyphs", protonet=str(path), finetune=("maml",))
    with pytest.raises(UserError, match="finetune names maml, but no maml is tested.*=protonet"):
        evaluate.load_checkpoints(cfg)


def test_unseen_domains_may_have_an_inner_loop_of_their_own(tested, evaluate_small, tmp_path):
    folder = copied(tested, tmp_path)
    options = "--domain_num_inner_steps=2 --domain_lr_inner=0.01,0.02 --domain_lr_output=0.03"
    # All but the results of ProtoMAML and MAML on the domain.
    assert evaluate_small(folder, *options.split()).count("reused") == 16
    names = ("num_inner_steps", "lr_inner", "lr_output")
    found = {
        (row["dataset"], row["k_shot"]): [row["settings"][name] for name in names]
        for row in rows_of(folder)
        if row["model"] == "protomaml"
    }
    assert found == {
        ("glyphs", 2): [3, 0.1, 0.1],
        ("glyphs", 5): [3, 0.1, 0.1],
        ("glyph_digits", 2): [2, 0.01, 0.03],
        ("glyph_digits", 5): [2, 0.02, 0.03],
    }


def test_edited_defaults_are_settings_like_any_others(
    tested, evaluate_small, tmp_path, monkeypatch
):
    folder = copied(tested, tmp_path)
    # As if they stood at the top of the script.
    monkeypatch.setattr(evaluate.Config, "views", 2)
    monkeypatch.setattr(evaluate.Config, "precision", "bfloat16")
    options = ["--domains=", "--views=2", "--precision=bfloat16"]
    assert evaluate_small(folder, *options).count("reused") == 2  # pixels
    markdown = (folder / "accuracy.md").read_text()
    assert "ProtoNet, 2 views, bfloat16" in markdown and "views 2, " in markdown


def test_results_of_other_weights_are_not_reused(tested, trained, evaluate_small, tmp_path):
    folder = copied(tested, tmp_path)
    contents = load_checkpoint(trained[0] / "glyphs" / "protonet.pt")
    contents["state_dict"]["classifier.bias"] += 1
    save_checkpoint(tmp_path / "other.pt", contents)
    printed = evaluate_small(folder, "--domains=", f"--protonet={tmp_path / 'other.pt'}")
    assert "protonet on glyphs, k = 2: reused" not in printed
    assert "pixels on glyphs, k = 2: reused" in printed  # no weights in it


def test_a_test_leaves_the_checkpoints_as_they_were(trained, evaluate_small, tmp_path):
    folder = trained[0] / "glyphs"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    evaluate_small(tmp_path, "--domains=", "--k_shots=2")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_single_support_set_has_no_deviation(trained, evaluate_small, tmp_path):
    evaluate_small(tmp_path, "--domains=", "--k_shots=13", only("protonet", trained))
    found = [(row["std"], row["ci95"], row["num_support_sets"]) for row in rows_of(tmp_path)]
    assert found == [(None, None, 1)] * 2


def test_a_missing_domain_is_named_and_the_rest_is_tested(trained, glyph_dir, tmp_path):
    options = ["--domains=nowhere,glyph_digits", only("protonet", trained)]
    where = [f"--data_dir={glyph_dir}", f"--results_dir={tmp_path}"]
    process = run_script("evaluate.py", *SMALL_TEST, *options, *where)
    assert process.returncode == 1
    assert re.search(r"^nowhere: not tested\. .*nowhere\.npz", process.stdout, re.MULTILINE)
    assert "nowhere: not tested" in (tmp_path / "accuracy.md").read_text()
    assert {row["dataset"] for row in rows_of(tmp_path)} == {"glyphs", "glyph_digits"}
    assert "Traceback" not in process.stderr


def test_a_domain_that_needs_a_missing_network_is_named(
    trained, evaluate_small, glyph_dir, tmp_path, no_network
):
    data_dir = shutil.copytree(glyph_dir, tmp_path / "data")
    options = [only("protonet", trained), "--domains=mnist", f"--data_dir={data_dir}"]
    printed = evaluate_small(tmp_path, *options, code=1)
    assert re.search(r"^mnist: not tested\. .*mnist\.npz is missing", printed, re.MULTILINE)


# Which class is taken for which


@pytest.mark.parametrize("dataset", ["glyphs", "glyph_digits"])
def test_accuracy_per_class_and_a_confusion_matrix_are_written_for_the_largest_k(dataset, tested):
    with open(tested[0] / f"classes_{dataset}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["k_shot"] for line in lines} == {"5"}
    assert {line["model"] for line in lines} == set(MODELS)
    assert len(lines) == 4 * {"glyphs": 2, "glyph_digits": 10}[dataset]
    for row in rows_of(tested[0]):
        of_model = [line for line in lines if line["model"] == row["model"]]
        if (row["dataset"], row["k_shot"]) == (dataset, 5) and of_model:
            # All classes have the same number of queries.
            mean = sum(float(line["accuracy"]) for line in of_model) / len(of_model)
            assert mean == pytest.approx(row["accuracy"], abs=1e-12)
            assert all(line["class"] != line["most_often_mistaken_for"] for line in of_model)
            name = f"confusion_{row['model']}_{dataset}"
            assert min(Image.open(tested[0] / f"{name}.png").size) > 100
            assert (tested[0] / f"{name}.svg").read_text().endswith("</svg>\n")
    assert not list(tested[0].glob("*confusion_pixels*"))


# Random episodes

EPISODES = "--protocol=episodes --max_support_sets=0 --k_shots=1,5 --n_way=2 --n_query=4"
EPISODES = [*EPISODES.split(), "--num_episodes=6"]


def test_random_episodes_are_tested_in_place_of_support_sets(evaluate_small, tmp_path):
    printed = evaluate_small(tmp_path, *EPISODES, figures=True)
    rows = rows_of(tmp_path)
    wanted = itertools.product([*MODEL_NAMES, "pixels"], ["glyphs"], [1, 5])
    assert [(row["model"], row["dataset"], row["k_shot"]) for row in rows] == list(wanted)
    for row in rows:
        assert (row["n_way"], row["num_episodes"], row["num_queries"]) == (2, 6, 8)
        # The classifier's features have a learned length.
        sizes = {"pixels": 0, "classifier": 962_913}
        assert row["parameters"] == sizes.get(row["model"], 962_912)
        correct = row["accuracy"] * 6 * 8
        assert correct == pytest.approx(round(correct), abs=1e-9)
        numbers = f"{100 * row['accuracy']:.2f} +± {100 * row['ci95']:.2f} .* 6 +2 +"
        assert re.search(rf" {row['k_shot']} +{numbers}", printed)
    assert "protomaml on glyphs: 12 adaptations of 3 steps\n" in printed
    names = {path.stem for path in tmp_path.iterdir() if path.is_file()}
    assert names == {"accuracy", "examples_glyphs", "few_shot_batch", "models_glyphs"}
    assert evaluate_small(tmp_path, *EPISODES).count("reused") == 10
    assert rows_of(tmp_path) == rows


def test_episodes_of_one_k_have_no_figure_over_k(trained, evaluate_small, tmp_path):
    evaluate_small(tmp_path, *EPISODES, "--k_shots=5", only("protonet", trained), figures=True)
    assert not list(tmp_path.glob("models_*"))


@pytest.mark.parametrize(
    ("option", "reused"),
    [("--num_episodes=5", 0), ("--n_query=3", 0), ("--k_shots=1,2", 2), ("--views=2", 2)],
)
def test_results_of_other_episodes_are_not_reused(
    option, reused, trained, evaluate_small, tmp_path
):
    model = only("protonet", trained)
    evaluate_small(tmp_path, *EPISODES, model)
    assert evaluate_small(tmp_path, *EPISODES, model, option).count("reused") == reused


def test_the_two_protocols_share_no_result(tested, trained, evaluate_small, tmp_path):
    folder, model = copied(tested, tmp_path), only("protonet", trained)
    assert "reused" not in evaluate_small(folder, *EPISODES, "--k_shots=2,5", model)
    assert evaluate_small(folder, "--domains=", model).count("reused") == 4


def test_a_named_domain_is_tested_on_episodes_of_all_its_classes(trained, evaluate_small, tmp_path):
    options = ["--domains=glyph_digits", "--classes=val", only("protonet", trained)]
    evaluate_small(tmp_path, *EPISODES, *options)
    found = {(row["dataset"], row["classes"]) for row in rows_of(tmp_path)}
    assert found == {("glyphs", "val"), ("glyph_digits", "all")}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--n_way=3", "3-way episodes need 3 classes, found 2; pass --n_way=2"),
        ("--n_query=20", "an episode needs 25 images of each class .*found 24"),
    ],
)
def test_episodes_that_the_data_cannot_give_are_refused_in_one_line(
    option, message, trained, evaluate_small, tmp_path
):
    with pytest.raises(UserError, match=message):
        evaluate_small(tmp_path, *EPISODES, option, only("protonet", trained))


def test_a_result_belongs_to_the_weights_that_were_tested(
    trained, evaluate_small, tmp_path, monkeypatch
):
    # A training run may replace the file while a test is under way.
    option, path = only("protonet", trained).split("=")
    shutil.copy(path, tmp_path / "tested.pt")
    prepare = evaluate.prepare_test

    def replace_first(*arguments):
        shutil.copy(other, tmp_path / "tested.pt")
        return prepare(*arguments)

    other = tmp_path / "other.pt"
    contents = load_checkpoint(path)
    contents["state_dict"]["classifier.weight"] *= -2
    save_checkpoint(other, contents)
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "prepare_test", replace_first)
        evaluate_small(tmp_path, "--domains=", f"{option}={tmp_path / 'tested.pt'}")
    printed = evaluate_small(tmp_path, "--domains=", f"{option}={tmp_path / 'tested.pt'}")
    assert "pixels on glyphs, k = 2: reused" in printed
    assert "protonet on glyphs, k = 2: reused" not in printed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_standard_output_that_cannot_be_written_is_one_line():
    command = [sys.executable, "evaluate.py", "--dataset=absent"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("evaluate.py: error: ") and done.stderr.count("\n") == 1


# How long a test takes


def test_a_test_says_how_many_adaptations_it_makes_of_how_many_steps(tested):
    lines = [line for line in tested[1].stdout.splitlines() if "adaptations" in line]
    assert lines == [
        f"{model} on {data}: 6 adaptations of 3 steps"
        for data in ("glyphs", "glyph_digits")
        for model in ("maml", "protomaml")
    ]


def test_a_step_of_fine_tuning_costs_no_more_than_its_two_halves():
    cfg = evaluate.Config(views=3)
    tested = SimpleNamespace(name="cifar100", labels=range(50), class_names="abcd")
    works = {k: ({"finetune_steps": 10}, [0] * 6) for k in (8, 16, 32)}
    costs = evaluate.Progress(cfg, "protonet_finetuned", works, tested, 2).costs
    # 10 steps of 3 passes of 4 k images, k at most 16, and 50 queries in 3 views.
    assert costs == {8: 30 * 32 + 150, 16: 30 * 64 + 150, 32: 30 * 64 + 150}
    works = {2: ({"num_inner_steps": 10}, [0] * 6)}
    assert evaluate.Progress(cfg, "maml", works, tested, 2).costs == {2: 30 * 4 * 2 * 3 + 150}


def test_only_the_adaptations_still_to_make_are_counted(tested, trained, evaluate_small, tmp_path):
    options = ["--domains=", "--k_shots=5,6,8", "--num_inner_steps=3,2,3"]
    printed = evaluate_small(copied(tested, tmp_path), *options, only("protomaml", trained))
    assert "protomaml on glyphs: 6 adaptations of 2, 3 steps\n" in printed


@pytest.mark.parametrize(("seconds", "minutes"), [(120, 16), (1, None)])
def test_a_long_test_estimates_its_minutes_once_and_names_what_shortens_it(
    seconds, minutes, trained, evaluate_small, tmp_path, monkeypatch
):
    # A clock that goes on by so many seconds whenever someone looks at it.
    clock = itertools.count(step=seconds)
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    printed = evaluate_small(tmp_path, "--domains=", only("protomaml", trained))
    # Of 2 classes: 3 steps * 3 passes * 2 k images + 48 queries are 84 passes at k = 2 and 138 at
    # k = 5. The first of 3 + 3 adaptations took 120 s: 2 min / 84 * (3 * 84 + 3 * 138) = 15.9 min.
    found = [line for line in printed.splitlines() if "in all" in line]
    assert found == [
        f"protomaml on glyphs: about {each} min in all; less with --max_support_sets=N or "
        "--num_inner_steps=N (--recipe=quick sets both)"
        for each in [minutes]
        if each
    ]


@pytest.mark.parametrize(
    ("model", "domain", "options", "shorter"),
    [
        ("protomaml", "mnist", {}, "--max_support_sets=N or --num_inner_steps=N (--recipe=quick "),
        ("protonet_finetuned", "cifar100", {}, "--max_support_sets=N or --finetune_steps=N"),
        (
            "maml",
            "mnist",
            {"domain_max_support_sets": (3,), "domain_num_inner_steps": (9,)},
            "--domain_max_support_sets=N or --domain_num_inner_steps=N",
        ),
        ("maml", "mnist", {"protocol": "episodes"}, "--num_episodes=N or --num_inner_steps=N"),
    ],
)
def test_what_shortens_a_test_is_what_decides_it(model, domain, options, shorter):
    cfg, tested = evaluate.Config(**options), SimpleNamespace(name=domain)
    assert evaluate.what_shortens_it(cfg, model, tested).startswith(shorter)


def test_an_interrupted_test_does_not_wait_for_its_adaptations(trained, glyph_dir, tmp_path):
    where = [*glyphs(glyph_dir, trained[0]), f"--results_dir={tmp_path}"]
    script = ["-u", str(ROOT / "evaluate.py")]
    command = [sys.executable, *script, *SMALL_TEST, "--num_inner_steps=1000000", *where]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        shown = b""
        while b"maml on glyphs" not in shown and (chunk := process.stderr.read1()):
            shown += chunk
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()  # comes to an end only with the process
    assert process.returncode == 130 and b"stopped; what was saved before is intact" in rest


# A user's own images


SIZES = [(32, 32), (120, 90), (48, 100), (640, 360), (20, 24)]
PARTS = {"train": 4, "val": 2, "test": 2}  # classes of each


def save_photographs(folder, data, per_class=24):
    """Save images of some classes as JPEG and PNG files of mixed sizes and shapes, in parts."""
    names = iter(data.class_names)
    for part, count in PARTS.items():
        for name in itertools.islice(names, count):
            (folder / part / name).mkdir(parents=True)
            of_class = data.of_classes([name]).images.permute(0, 2, 3, 1)
            for number, pixels in enumerate(of_class[:per_class]):
                image = Image.fromarray(pixels.contiguous().numpy())
                image = image.resize(SIZES[number % len(SIZES)])
                image.save(folder / part / name / f"{number}.{('jpg', 'png')[number % 2]}")


def test_a_folder_of_photographs_of_mixed_sizes_trains_and_is_tested(glyph_dir, tmp_path, capsys):
    data, photos = load_dataset("glyphs", glyph_dir), tmp_path / "data" / "letters"
    save_photographs(photos, data)
    where = ["--dataset=letters", f"--data_dir={tmp_path / 'data'}"]
    where += [f"--checkpoint_dir={tmp_path / 'checkpoints'}"]
    in_process(train_protonet, *where, *SMALL_EPISODES, "--epochs=1", "--image_size=36")
    read = f"{photos}: 192 images of 20x24 to 640x360 pixels in 8 classes, brought to 36x36\n"
    assert read in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "letters" / "protonet.pt")
    assert checkpoint["config"]["image_size"] == 36
    names = data.class_names[:8]
    split = {"train": sorted(names[:4]), "val": sorted(names[4:6]), "test": sorted(names[6:])}
    assert checkpoint["class_split"] == split

    results = tmp_path / "results"
    options = ["--k_shots=2", "--device=cpu", f"--results_dir={results}"]
    assert in_process(evaluate, *where, *options) == 0
    assert str(photos) not in capsys.readouterr().out  # what was kept has the size asked for
    found = [(row["model"], row["dataset"], row["num_support_sets"]) for row in rows_of(results)]
    assert found == [("protonet", "letters", 12), ("pixels", "letters", 12)]


# Help


def test_the_help_of_a_script_is_printed_and_nothing_else_happens():
    process = run_script("train_protonet.py", "--help")
    assert process.returncode == 0 and not process.stderr
    assert "python train_protonet.py --init_from=FILE" in process.stdout
    line = r"--n_way=int\s+classes per training episode \(default 5\)"
    assert re.search(line, process.stdout)
    assert "config:" not in process.stdout


# Kept results


def changed_accuracy(row):
    return json.dumps({**row, "accuracy": 0.99})


def changed_accuracy_and_no_digest(row):
    return json.dumps({name: row[name] for name in row if name != "digest"})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: '{"a": 1}',
        lambda row: "[1, 2]",
        lambda row: "null",
        lambda row: '"text"',
        lambda row: "",
        lambda row: json.dumps(row)[:100],
        changed_accuracy,
        changed_accuracy_and_no_digest,
    ],
    ids=["foreign", "list", "null", "text", "empty", "cut", "changed", "without digest"],
)
def test_a_kept_result_that_is_damaged_or_foreign_is_computed_anew(
    spoil, tested, evaluate_small, tmp_path
):
    folder = copied(tested, tmp_path)
    before = (folder / "accuracy.json").read_bytes()
    for path in (folder / ".cache").glob("*.json"):
        row = json.loads(path.read_text())
        if (row["model"], row["dataset"]) == ("pixels", "glyphs"):
            path.write_text(spoil(row))
    printed = evaluate_small(folder)
    assert printed.count("is damaged or foreign: this result is computed anew") == 2
    assert (folder / "accuracy.json").read_bytes() == before


def test_a_kept_result_under_the_name_of_another_is_computed_anew(tested, evaluate_small, tmp_path):
    folder = copied(tested, tmp_path)
    before = (folder / "accuracy.json").read_bytes()
    first, second, *_ = sorted((folder / ".cache").glob("*.json"))
    second.write_bytes(first.read_bytes())
    assert f"{second} is damaged or foreign" in evaluate_small(folder)
    assert (folder / "accuracy.json").read_bytes() == before


def test_a_disk_that_fills_up_during_a_test_loses_no_finished_result(
    tested, evaluate_small, tmp_path, monkeypatch
):
    written, fsync = [], os.fsync

    def fill_up(descriptor):
        written.append(descriptor)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fill_up)
        with pytest.raises(UserError, match="cannot write .*No space left on device; free some"):
            evaluate_small(tmp_path)
    assert not stress.temporary_files(tmp_path)
    assert evaluate_small(tmp_path).count("reused") == 3
    assert (tmp_path / "accuracy.json").read_bytes() == (tested[0] / "accuracy.json").read_bytes()
