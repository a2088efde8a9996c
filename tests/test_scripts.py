"""The three real scripts, end to end, as processes of their own with tiny budgets on small glyphs."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import stress
import train_protomaml
import train_protonet
from common.config import parse_config
from common.data import load_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(evaluate.__file__).parent
SMALL_EPISODES = ["--n_way=2", "--k_shot=2", "--n_query=2", "--epochs=2", "--steps_per_epoch=4", "--device=cpu"]
SMALL_TASKS = ["--tasks_per_step=2", "--val_episodes=3"]
SMALL_TEST = ["--dataset=glyphs", "--k_shots=2,5", "--num_inner_steps=3", "--max_support_sets=3", "--device=cpu"]


def run_script(script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300)


def in_process(module, *arguments):
    return module.main(parse_config(module.Config, list(map(str, arguments))))


@pytest.fixture(scope="module")
def trained(glyph_dir, tmp_path_factory):
    """Train all three models; return (checkpoint_dir, {model: finished process})."""
    folder = tmp_path_factory.mktemp("checkpoints")
    where = ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={folder}"]
    processes = {
        "protonet": run_script("train_protonet.py", *where, *SMALL_EPISODES),
        "protomaml": run_script("train_protomaml.py", *where, *SMALL_EPISODES, *SMALL_TASKS),
        "maml": run_script("train_protomaml.py", *where, *SMALL_EPISODES, *SMALL_TASKS, "--output_init=zeros"),
    }
    for process in processes.values():
        assert process.returncode == 0, process.stderr
    return folder, processes


@pytest.fixture(scope="module")
def tested(trained, glyph_dir, tmp_path_factory):
    """Test all three models; return (results_dir, finished process)."""
    folder = tmp_path_factory.mktemp("results")
    process = run_script("evaluate.py", *SMALL_TEST, f"--data_dir={glyph_dir}", f"--checkpoint_dir={trained[0]}", f"--results_dir={folder}")
    assert process.returncode == 0, process.stderr
    return folder, process


def rows_of(folder):
    return json.loads((folder / "accuracy.json").read_text())


def copied(tested, tmp_path):
    """A copy of the results, for a test that adds to them."""
    return shutil.copytree(tested[0], tmp_path / "results")


# Training


@pytest.mark.parametrize("model", ["protonet", "protomaml", "maml"])
def test_training_writes_checkpoints_curves_and_a_csv(model, trained):
    folder = trained[0] / "glyphs"
    for name in (f"{model}.pt", f"{model}_last.pt"):
        assert torch.load(folder / name, weights_only=True)["model"] == model
    with open(folder / f"{model}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(0 <= float(row["val_accuracy"]) <= 1 and math.isfinite(float(row["train_loss"])) for row in rows)
    Image.open(folder / f"{model}_curves.png").load()
    assert (folder / f"{model}_curves.svg").read_text().endswith("</svg>\n")


@pytest.mark.parametrize("model", ["protonet", "protomaml", "maml"])
def test_training_prints_changed_values_one_line_per_epoch_and_the_next_command(model, trained):
    printed = trained[1][model].stdout
    assert "config: n_way = 2 (default 5)" in printed
    assert "config: seed" not in printed
    assert len(re.findall(r"^epoch \d/2 \|", printed, re.MULTILINE)) == 2
    assert "python evaluate.py --dataset=glyphs" in printed
    assert "Traceback" not in trained[1][model].stderr


@pytest.mark.parametrize(("module", "model", "more"), [(train_protonet, "protonet", []), (train_protomaml, "protomaml", SMALL_TASKS)], ids=["protonet", "protomaml"])
def test_two_runs_with_one_seed_give_identical_weights(module, model, more, trained, glyph_dir, tmp_path):
    # The first run was a process, the second is a call of main(cfg).
    in_process(module, "--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={tmp_path}", *SMALL_EPISODES, *more)
    for name in (f"{model}.pt", f"{model}_last.pt"):
        assert stress.same_file(trained[0] / "glyphs" / name, tmp_path / "glyphs" / name)


def test_another_seed_gives_other_weights(trained, glyph_dir, tmp_path):
    in_process(train_protonet, "--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={tmp_path}", *SMALL_EPISODES, "--seed=1")
    first, second = (torch.load(folder / "glyphs" / "protonet_last.pt")["state_dict"] for folder in (trained[0], tmp_path))
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])


# Evaluation


def test_the_results_hold_one_object_per_model_data_set_and_k(tested):
    rows = rows_of(tested[0])
    wanted = {(model, data, k) for model in ("protonet", "protomaml", "maml", "pixels") for data in ("glyphs", "glyph_digits") for k in (2, 5)}
    assert {(row["model"], row["dataset"], row["k_shot"]) for row in rows} == wanted
    assert len(rows) == len(wanted)
    for row in rows:
        assert 0 <= row["accuracy"] <= 1 and row["std"] >= 0 and row["ci95"] >= 0
        # 24 images of each class; adaptation is capped at three support sets.
        assert row["num_support_sets"] == (24 // row["k_shot"] if row["model"] in ("protonet", "pixels") else 3)


def test_the_accuracy_of_two_classes_lies_on_the_grid_of_their_queries(tested):
    for row in rows_of(tested[0]):
        num_classes = {"glyphs": 2, "glyph_digits": 10}[row["dataset"]]
        correct = row["accuracy"] * row["num_support_sets"] * num_classes * (24 - row["k_shot"])
        assert correct == pytest.approx(round(correct), abs=1e-6)


def test_table_csv_markdown_and_json_agree(tested):
    folder, process = tested
    rows = rows_of(folder)
    with open(folder / "accuracy.csv", newline="") as file:
        assert [float(line["accuracy"]) for line in csv.DictReader(file)] == [row["accuracy"] for row in rows]
    markdown = (folder / "accuracy.md").read_text()
    for row in rows:
        percent = f"{100 * row['accuracy']:.2f}"
        assert percent in markdown and percent in process.stdout
    for name in ("ProtoNet", "ProtoMAML", "MAML"):
        assert re.search(rf"^{name} +glyphs +2 ", process.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", ["examples_glyphs", "examples_glyph_digits", "few_shot_batch", "protonet_glyphs", "models_glyphs", "models_glyph_digits"])
def test_every_figure_is_there_as_png_and_svg(name, tested):
    assert min(Image.open(tested[0] / f"{name}.png").size) > 100
    assert (tested[0] / f"{name}.svg").read_text().endswith("</svg>\n")


def test_a_second_run_reuses_every_result_and_says_so(tested, trained, glyph_dir, tmp_path, capsys):
    folder = copied(tested, tmp_path)
    before = (folder / "accuracy.json").read_bytes()
    (folder / "accuracy.json").unlink()
    in_process(evaluate, *SMALL_TEST, f"--data_dir={glyph_dir}", f"--checkpoint_dir={trained[0]}", f"--results_dir={folder}")
    assert capsys.readouterr().out.count("reused") == 16
    assert (folder / "accuracy.json").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "reused"),
    # Nearest prototypes know no such setting, so the results of ProtoNet and of pixels stay; all four models keep those of k = 2.
    # Mirror images change all but pixels.
    [("--max_support_sets=2", 4), ("--num_inner_steps=2", 4), ("--lr_inner=0.05", 4), ("--k_shots=2,3", 4), ("--mirror=true", 2)],
)
def test_results_of_other_settings_are_not_reused(option, reused, tested, trained, glyph_dir, tmp_path, capsys):
    folder = copied(tested, tmp_path)
    in_process(evaluate, *SMALL_TEST, "--domains=", option, f"--data_dir={glyph_dir}", f"--checkpoint_dir={trained[0]}", f"--results_dir={folder}")
    assert capsys.readouterr().out.count("reused") == reused
    if option.startswith("--max"):
        assert {row["num_support_sets"] for row in rows_of(folder) if "maml" in row["model"]} == {2}
    if option.startswith("--mirror"):
        names = {line.split(" | ")[0] for line in (folder / "accuracy.md").read_text().splitlines() if " glyphs " in line}
        assert names == {"| pixels", "| ProtoNet, mirrored", "| ProtoMAML, mirrored", "| MAML, mirrored"}


def test_unseen_domains_may_have_an_inner_loop_of_their_own(tested, trained, glyph_dir, tmp_path, capsys):
    folder = copied(tested, tmp_path)
    options = ["--domain_num_inner_steps=2", "--domain_lr_inner=0.01,0.02", "--domain_lr_output=0.03"]
    in_process(evaluate, *SMALL_TEST, *options, f"--data_dir={glyph_dir}", f"--checkpoint_dir={trained[0]}", f"--results_dir={folder}")
    assert capsys.readouterr().out.count("reused") == 12  # all but those of ProtoMAML and MAML on the domain
    found = {(row["dataset"], row["k_shot"]): row["settings"] for row in rows_of(folder) if row["model"] == "protomaml"}
    names = ("num_inner_steps", "lr_inner", "lr_output")
    assert [[settings[name] for name in names] for settings in found.values()] == [[3, 0.1, 0.1], [3, 0.1, 0.1], [2, 0.01, 0.03], [2, 0.02, 0.03]]


def test_results_of_other_weights_are_not_reused(tested, trained, glyph_dir, tmp_path, capsys):
    folder = copied(tested, tmp_path)
    checkpoints = shutil.copytree(trained[0], tmp_path / "checkpoints")
    contents = torch.load(checkpoints / "glyphs" / "protonet.pt")
    contents["state_dict"]["classifier.bias"] += 1
    torch.save(contents, checkpoints / "glyphs" / "protonet.pt")
    in_process(evaluate, *SMALL_TEST, "--domains=", f"--protonet={checkpoints / 'glyphs' / 'protonet.pt'}", f"--data_dir={glyph_dir}", f"--results_dir={folder}")
    printed = capsys.readouterr().out
    assert "protonet on glyphs, k = 2: reused" not in printed
    assert "pixels on glyphs, k = 2: reused" in printed  # no weights in it


def test_a_test_leaves_the_checkpoints_as_they_were(trained, glyph_dir, tmp_path):
    folder = trained[0] / "glyphs"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    in_process(evaluate, *SMALL_TEST, "--domains=", "--k_shots=2", f"--data_dir={glyph_dir}", f"--checkpoint_dir={trained[0]}", f"--results_dir={tmp_path}")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_single_support_set_has_no_deviation(trained, glyph_dir, tmp_path):
    arguments = [*SMALL_TEST, "--domains=", "--k_shots=13", f"--protonet={trained[0] / 'glyphs' / 'protonet.pt'}"]
    in_process(evaluate, *arguments, f"--data_dir={glyph_dir}", f"--results_dir={tmp_path}")
    assert [(row["std"], row["ci95"], row["num_support_sets"]) for row in rows_of(tmp_path)] == [(None, None, 1)] * 2


def test_a_missing_domain_is_named_and_the_rest_is_tested(trained, glyph_dir, tmp_path):
    arguments = [*SMALL_TEST, "--domains=nowhere,glyph_digits", f"--protonet={trained[0] / 'glyphs' / 'protonet.pt'}"]
    process = run_script("evaluate.py", *arguments, f"--data_dir={glyph_dir}", f"--results_dir={tmp_path}")
    assert process.returncode == 1
    assert re.search(r"^nowhere: not tested\. .*nowhere\.npz", process.stdout, re.MULTILINE)
    assert "nowhere: not tested" in (tmp_path / "accuracy.md").read_text()
    assert {row["dataset"] for row in rows_of(tmp_path)} == {"glyphs", "glyph_digits"}
    assert "Traceback" not in process.stderr


def test_a_domain_that_needs_a_missing_network_is_named(trained, glyph_dir, tmp_path, no_network, capsys):
    arguments = [*SMALL_TEST, "--domains=mnist", f"--protonet={trained[0] / 'glyphs' / 'protonet.pt'}"]
    data_dir = shutil.copytree(glyph_dir, tmp_path / "data")
    assert in_process(evaluate, *arguments, f"--data_dir={data_dir}", f"--results_dir={tmp_path}") == 1
    assert re.search(r"^mnist: not tested\. .*mnist\.npz is missing", capsys.readouterr().out, re.MULTILINE)


# A user's own images


def test_a_folder_of_png_files_trains_and_is_tested(glyph_dir, tmp_path, capsys):
    glyphs = load_dataset("glyphs", glyph_dir)
    for position, label in enumerate(glyphs.labels.tolist()):
        if label < 8:
            file = tmp_path / "data" / "letters" / glyphs.class_names[label] / f"{position:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(glyphs.images[position].permute(1, 2, 0).contiguous().numpy()).save(file)
    where = ["--dataset=letters", f"--data_dir={tmp_path / 'data'}", f"--checkpoint_dir={tmp_path / 'checkpoints'}"]
    in_process(train_protonet, *where, *SMALL_EPISODES, "--epochs=1")
    assert in_process(evaluate, *where, "--k_shots=2", "--device=cpu", f"--results_dir={tmp_path / 'results'}") == 0
    assert [(row["model"], row["dataset"], row["num_support_sets"]) for row in rows_of(tmp_path / "results")] == [("protonet", "letters", 12), ("pixels", "letters", 12)]
    assert not list((tmp_path / "data").glob("*.npz"))  # the folder stays the user's


# Help


def test_help_lists_every_option_with_type_meaning_and_default():
    process = run_script("train_protonet.py", "--help")
    assert process.returncode == 0 and not process.stderr
    assert re.search(r"--n_way=int\s+classes per training episode \(default 5\)", process.stdout)
    for field in train_protonet.Config.__dataclass_fields__:
        assert f"--{field}=" in process.stdout


@pytest.mark.parametrize("module", [train_protomaml, evaluate], ids=lambda module: module.__name__)
def test_help_of_the_other_scripts_lists_every_option(module, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(module.Config, ["--help"], f"{module.__name__}.py", module.__doc__)
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert all(f"--{field}=" in printed for field in module.Config.__dataclass_fields__)


def test_an_interrupted_test_does_not_wait_for_its_adaptations(trained, glyph_dir, tmp_path):
    where = [f"--data_dir={glyph_dir}", f"--checkpoint_dir={trained[0]}", f"--results_dir={tmp_path}"]
    command = [sys.executable, "-u", ROOT / "evaluate.py", *SMALL_TEST, "--num_inner_steps=1000000", *where]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE) as process:
        shown = b""
        while b"protomaml on glyphs" not in shown and (chunk := process.stderr.read1()):
            shown += chunk
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()  # comes to an end only with the process
    assert process.returncode == 130 and b"stopped; what was saved before is intact" in rest
