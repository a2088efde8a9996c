"""The scripts that train and test, end to end, with tiny budgets on small glyphs.

Each runs as a process once; the other runs are calls of main(cfg).
"""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from stress import ENVIRONMENT

import evaluate
import train_classifier
import train_protomaml
import train_protonet
from common import UserError
from common.checkpoint import load_checkpoint, save_checkpoint
from common.config import parse_config
from common.data import load_dataset
from common.files import sha256

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(evaluate.__file__).parent
SMALL_EPISODES = "--dataset=glyphs --n_way=2 --k_shot=2 --n_query=2 --epochs=2 --steps_per_epoch=2"
SMALL_EPISODES = [*SMALL_EPISODES.split(), "--device=cpu"]
SMALL_TASKS = ["--tasks_per_step=2", "--val_episodes=2"]
SMALL_TEST = "--dataset=glyphs --k_shots=2,5 --num_inner_steps=2 --max_support_sets=2 --device=cpu"
SMALL_TEST = SMALL_TEST.split()
TRAINING = {  # model: script and options
    "classifier": [train_classifier, *SMALL_EPISODES, "--batch_size=16"],
    "protonet": [train_protonet, *SMALL_EPISODES],
    "maml": [train_protomaml, *SMALL_EPISODES, *SMALL_TASKS, "--output_init=zeros"],
    "protomaml": [train_protomaml, *SMALL_EPISODES, *SMALL_TASKS],
}


def run_script(module, *arguments):
    command = [sys.executable, module.__file__, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def in_process(module, *arguments):
    return module.main(parse_config(module.Config, arguments, getattr(module, "RECIPES", None)))


@pytest.fixture(scope="module")
def trained(glyph_dir, tmp_path_factory):
    """Train all four models, ProtoNet as a process; return (their folder, what that printed)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    own = [f"--data_dir={glyph_dir}", f"--checkpoint_dir={folder}"]
    for model in set(TRAINING) - {"protonet"}:
        in_process(*TRAINING[model], *own)
    process = run_script(*TRAINING["protonet"], *own)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    return folder / "glyphs", process.stdout


@pytest.fixture(scope="module")
def tested(trained, glyph_dir, tmp_path_factory):
    """Test all four models as a process; return (results_dir, finished process)."""
    folder, before = tmp_path_factory.mktemp("results"), bytes_of(trained[0])
    options = [f"--data_dir={glyph_dir}", f"--models={trained[0]}", f"--results_dir={folder}"]
    process = run_script(evaluate, *SMALL_TEST, *options)
    assert process.returncode == 0, process.stderr
    assert bytes_of(trained[0]) == before
    return folder, process


@pytest.fixture
def evaluate_small(trained, glyph_dir, capsys, monkeypatch):
    """Return a function (results_dir, *options) -> what the small test prints, in this process.

    Of ProtoNet and ProtoMAML, on glyphs alone and without figures, unless a test asks for more.
    """

    def run(results_dir, *options, models=("protonet", "protomaml"), code=0, figures=False):
        files = ",".join(f"{trained[0] / model}.pt" for model in models)
        own = [f"--data_dir={glyph_dir}", f"--models={files}", f"--results_dir={results_dir}"]
        with monkeypatch.context() as patched:
            if not figures:
                patched.setattr(evaluate, "draw_figures", lambda *arguments: None)
            assert in_process(evaluate, *SMALL_TEST, "--domains=", *own, *options) == code
        return capsys.readouterr().out

    return run


def save_as_folder(data_dir, name, folder):
    data = load_dataset(name, data_dir)
    for number, (image, label) in enumerate(zip(data.images, data.labels.tolist())):
        path = folder / data.class_names[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def rows_of(folder):
    return json.loads((folder / "accuracy.json").read_text())


def copied(tested, tmp_path):
    return shutil.copytree(tested[0], tmp_path / "results")


# Training


def test_training_prints_changed_values_one_line_per_epoch_and_the_next_command(trained):
    folder, printed = trained
    assert "config: n_way = 2 (default 5)" in printed and "config: seed" not in printed
    assert len(re.findall(r"^epoch \d/2 \|", printed, re.MULTILINE)) == 2
    (command,) = re.findall(r"python (evaluate\.py .*)", printed)
    assert f"--models={folder / 'protonet.pt'}" in command.split()
    for model in TRAINING:
        names = {f"{model}{end}" for end in (".pt", "_last.pt", ".csv", "_curves.png")}
        assert names <= set(os.listdir(folder))
        Image.open(folder / f"{model}_curves.png").load()


# The k-shot test


def test_the_results_hold_one_row_per_model_data_set_and_k(tested):
    rows = rows_of(tested[0])
    wanted = itertools.product(["glyphs", "glyph_digits"], [*TRAINING, "pixels"], [2, 5])
    assert [(row["dataset"], row["model"], row["k_shot"]) for row in rows] == list(wanted)
    for row in rows:
        # 24 images of each class; adaptation is capped at two support sets.
        sets = 2 if row["model"] in ("protomaml", "maml") else 24 // row["k_shot"]
        num_classes = {"glyphs": 2, "glyph_digits": 10}[row["dataset"]]
        queries = num_classes * (24 - row["k_shot"])
        assert (row["num_support_sets"], row["n_way"]) == (sets, num_classes)
        assert row["num_queries"] == queries
        # The accuracy lies on the grid of the queries.
        correct = row["accuracy"] * sets * queries
        assert correct == pytest.approx(round(correct), abs=1e-6)
        assert 0 <= row["accuracy"] <= 1 and row["std"] >= 0 and row["ci95"] >= 0


def test_table_csv_markdown_json_and_command_agree(tested, trained):
    folder, process = tested
    rows = rows_of(folder)
    with open(folder / "accuracy.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    markdown = (folder / "accuracy.md").read_text()
    for row, line in zip(rows, lines, strict=True):
        assert float(line["accuracy"]) == row["accuracy"]
        assert json.loads(line["settings"]) == row["settings"]
        numbers = f"{100 * row['accuracy']:.2f}", f"± {100 * row['ci95']:.2f}"
        number = rf"{row['dataset']} +\|? +{row['k_shot']} +\|? +%s +\|? +%s " % numbers
        assert re.search(number, markdown) and re.search(number, process.stdout)
    for name in ("Classifier", "ProtoNet", "ProtoMAML", "MAML", "Pixels"):
        assert re.search(rf"^{name} +glyphs +2 ", process.stdout, re.MULTILINE)
    assert f"    python evaluate.py {' '.join(process.args[2:])}\n" in markdown
    for model in TRAINING:
        assert sha256(trained[0] / f"{model}.pt")[:12] in markdown


@pytest.mark.parametrize(
    "name", ["few_shot_batch", "features", "models_glyphs", "models_glyph_digits"]
)
def test_every_figure_is_there_as_png_and_svg(name, tested):
    assert min(Image.open(tested[0] / f"{name}.png").size) > 100
    assert (tested[0] / f"{name}.svg").read_text().endswith("</svg>\n")


def test_domains_that_cannot_be_tested_are_named_and_the_rest_is_tested(
    evaluate_small, glyph_dir, tmp_path, no_network
):
    data_dir = shutil.copytree(glyph_dir, tmp_path / "data")
    options = ["--domains=nowhere,glyph_digits,mnist", f"--data_dir={data_dir}"]
    printed = evaluate_small(tmp_path, *options, models=["protonet"], code=1)
    texts = printed, (tmp_path / "accuracy.md").read_text()
    for name, text in itertools.product(("nowhere", "mnist"), texts):
        assert re.search(rf"^{name}: not tested\. .*{name}", text, re.MULTILINE)
    assert {row["dataset"] for row in rows_of(tmp_path)} == {"glyphs", "glyph_digits"}


def test_a_folder_of_photographs_of_mixed_sizes_trains_and_is_tested(glyph_dir, tmp_path, capsys):
    glyphs, folder = load_dataset("glyphs", glyph_dir), tmp_path / "data" / "letters"
    parts = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    for part, name in zip(parts, glyphs.class_names):
        (folder / part / name).mkdir(parents=True)
        images = glyphs.of_classes([name]).images.permute(0, 2, 3, 1)[:6]
        for number, pixels in enumerate(images.numpy()):
            size = [(32, 32), (120, 90), (20, 24)][number % 3]
            path = folder / part / name / f"{number}.{('jpg', 'png')[number % 2]}"
            Image.fromarray(pixels).resize(size).save(path)
    own = ["--dataset=letters", f"--data_dir={folder.parent}"]
    options = [*own, "--epochs=1", "--image_size=84", f"--checkpoint_dir={tmp_path}"]
    in_process(train_protonet, *SMALL_EPISODES, *options, "--encoder=conv4", "--width=4")
    checkpoint = load_checkpoint(tmp_path / "letters" / "protonet.pt")
    assert list(checkpoint["image_shape"]) == [84, 84]
    names = glyphs.class_names[:8]
    split = {"train": sorted(names[:4]), "val": sorted(names[4:6]), "test": sorted(names[6:])}
    assert checkpoint["class_split"] == split
    options = [f"--models={tmp_path / 'letters'}", f"--results_dir={tmp_path}", "--k_shots=2"]
    assert in_process(evaluate, *own, *options, "--device=cpu") == 0
    found = [(row["model"], row["dataset"], row["num_support_sets"]) for row in rows_of(tmp_path)]
    assert found == [("protonet", "letters", 3), ("pixels", "letters", 3)]


def test_an_interrupted_test_keeps_what_is_done_and_does_not_wait_for_its_adaptations(
    trained, glyph_dir, tmp_path
):
    models = f"--models={trained[0]}/protonet.pt,{trained[0]}/maml.pt"
    options = [f"--data_dir={glyph_dir}", models, "--domains="]
    options += [f"--results_dir={tmp_path}", "--num_inner_steps=1000000"]
    command = [sys.executable, evaluate.__file__, *SMALL_TEST, *options]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "2"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        shown = b""
        while b"k=2" not in shown.partition(b"maml on")[2] and (chunk := process.stderr.read1()):
            shown += chunk
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()  # comes to an end only with the process
    assert process.returncode == 130 and b"stopped; what was saved before is intact" in rest
    assert len([*tmp_path.glob(".cache/*.json")]) == 2  # of ProtoNet


# Adaptation


def test_fine_tuned_models_have_rows_of_their_own_and_settings_by_the_table(
    evaluate_small, tmp_path, monkeypatch
):
    table = {
        "own": {2: (2, 0.01, 0.02, 1, 0.003, 2), 5: (1, 0, 0.02, 0, 0.003, 1)},
        "unseen": {2: (1, 0.03, 0, 1, 0.004, 1), 5: (1, 0.03, 0, 2, 0.004, 1)},
    }
    monkeypatch.setitem(evaluate.ADAPTATION, "best", table)
    options = ["--recipe=best", "--domains=glyph_digits", "--finetune=protonet"]
    options += ["--num_inner_steps=-1", "--max_support_sets=-1"]
    printed = evaluate_small(tmp_path, *options, figures=True)
    assert "ProtoNet, fine-tuned" in printed
    found = {(row["model"], row["dataset"], row["k_shot"]): row for row in rows_of(tmp_path)}

    def settings(model, dataset, k_shot):
        row = found[model, dataset, k_shot]
        given = row["settings"]
        assert given.get("max_support_sets") in (None, row["num_support_sets"])
        names = ("num_inner_steps", "lr_inner", "lr_output", "finetune_steps", "finetune_lr")
        return [given[name] for name in (*names, "max_support_sets") if name in given]

    assert settings("protomaml", "glyphs", 2) == [2, 0.01, 0.02, 2]
    assert settings("protomaml", "glyphs", 5) == [1, 0.1, 0.02, 1]  # 0: as in training
    assert settings("protomaml", "glyph_digits", 5) == [1, 0.03, 0.1, 1]
    assert settings("protonet_finetuned", "glyphs", 2) == [1, 0.003, 2]
    assert settings("protonet_finetuned", "glyph_digits", 5) == [2, 0.004, 1]
    assert settings("protonet", "glyphs", 2) == []
    # Without steps it is the nearest prototype, over all support sets.
    assert settings("protonet_finetuned", "glyphs", 5) == [0, 0.003]
    plain, tuned = found["protonet", "glyphs", 5], found["protonet_finetuned", "glyphs", 5]
    assert (tuned["accuracy"], tuned["num_support_sets"]) == (plain["accuracy"], 4)

    with pytest.raises(UserError, match=r"best has no k = 3; .* --k_shots out of 2,5"):
        evaluate_small(tmp_path, *options, "--k_shots=3")
    monkeypatch.setitem(evaluate.ADAPTATION, "best", {"unseen": table["unseen"]})
    with pytest.raises(UserError, match="best has no k = 3"):  # before anything is tested
        evaluate_small(tmp_path / "new", *options, "--k_shots=3")
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(evaluate.ADAPTATION, "best", table)
    # An option goes before the table.
    evaluate_small(tmp_path, *options, "--num_inner_steps=3", "--domains=")
    (row,) = (row for row in rows_of(tmp_path) if (row["model"], row["k_shot"]) == ("protomaml", 2))
    assert (row["settings"]["num_inner_steps"], row["settings"]["lr_inner"]) == (3, 0.01)


def test_only_a_tested_model_can_be_fine_tuned(evaluate_small, tmp_path):
    with pytest.raises(UserError, match="finetune names maml, which is not tested.*protonet"):
        evaluate_small(tmp_path, "--finetune=maml")


# Results that are kept


def test_a_second_run_reuses_every_result_and_says_so(tested, evaluate_small, tmp_path):
    folder = copied(tested, tmp_path)
    before = (folder / "accuracy.json").read_bytes()
    (folder / "accuracy.json").unlink()
    printed = evaluate_small(folder, "--domains=auto", models=TRAINING)
    assert printed.count("reused") == 20
    assert (folder / "accuracy.json").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "reused"),
    [
        # Nearest prototypes know no such setting: ProtoNet and pixels keep both k.
        ("--max_support_sets=1", 4),
        ("--num_inner_steps=1", 4),
        ("--lr_inner=0.05", 4),
        ("--k_shots=2,3", 3),  # k = 2 of each
        ("--views=2", 2),  # pixels
        ("--precision=bfloat16", 2),
        ("--classes=val", 0),
        ("--domains=glyph_digits", 12),
    ],
)
def test_results_of_other_settings_are_not_reused(option, reused, tested, evaluate_small, tmp_path):
    folder = copied(tested, tmp_path)
    assert evaluate_small(folder, option).count("reused") == reused
    if option == "--views=2":
        lines = (folder / "accuracy.md").read_text().splitlines()
        names = {line.strip("| ").split(" | ")[0] for line in lines if " glyphs " in line}
        assert names == {"Pixels", "ProtoNet, 2 views", "ProtoMAML, 2 views"}


def test_results_of_other_weights_are_not_reused(tested, trained, evaluate_small, tmp_path):
    folder = copied(tested, tmp_path)
    contents = load_checkpoint(trained[0] / "protonet.pt")
    contents["state_dict"]["classifier.bias"] += 1
    save_checkpoint(tmp_path / "other.pt", contents)
    printed = evaluate_small(folder, f"--models={tmp_path / 'other.pt'}")
    assert "protonet on glyphs, k = 2: reused" not in printed
    assert "pixels on glyphs, k = 2: reused" in printed  # no weights in it


def test_results_are_not_reused_once_the_code_of_the_test_has_changed(monkeypatch, tmp_path):
    before = evaluate.code_of_test.__wrapped__()
    shutil.copytree(f"{ROOT}/common", tmp_path / "common")
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    with open(tmp_path / "common/kshot.py", "a") as file:
        file.write("# a comment\n")
    assert evaluate.code_of_test.__wrapped__() == before
    monkeypatch.setattr(evaluate, "prepare_test", evaluate.draw_tasks)
    assert evaluate.code_of_test.__wrapped__() != before
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    with open(tmp_path / "common/kshot.py", "a") as file:
        file.write("NEW = 1\n")
    assert evaluate.code_of_test.__wrapped__() != before


def test_kept_results_that_are_damaged_or_foreign_are_computed_anew(evaluate_small, tmp_path):
    spoils = {
        2: lambda row: "null",
        3: lambda row: json.dumps(row)[:100],
        4: lambda row: json.dumps({**row, "accuracy": 0.99}),
        5: lambda row: (tmp_path / ".cache" / names[7]).read_text(),  # that of another k
        6: lambda row: json.dumps({name: row[name] for name in row if name != "digest"}),
        7: json.dumps,
    }
    options = f"--k_shots={','.join(map(str, spoils))}"
    evaluate_small(tmp_path, options, models=["protonet"])
    before = (tmp_path / "accuracy.json").read_bytes()
    rows = [(path, json.loads(path.read_text())) for path in tmp_path.glob(".cache/*.json")]
    names = {row["k_shot"]: path.name for path, row in rows if row["model"] == "pixels"}
    for path, row in rows:
        if row["model"] == "pixels":
            path.write_text(spoils[row["k_shot"]](row))
    assert evaluate_small(tmp_path, options, models=["protonet"]).count("reused") == 6 + 1
    assert (tmp_path / "accuracy.json").read_bytes() == before


def test_a_data_set_is_tested_with_the_k_that_its_classes_allow(evaluate_small, tmp_path):
    options = ["--k_shots=2,30", "--domains=glyph_digits"]
    printed = evaluate_small(tmp_path, *options, models=["protonet"], code=1)
    assert {(row["dataset"], row["k_shot"]) for row in rows_of(tmp_path)} == {
        ("glyphs", 2),
        ("glyph_digits", 2),
    }
    for name in ("glyphs", "glyph_digits"):
        assert f"{name}, k = 30: not tested. class '" in printed


def test_a_model_is_tested_on_a_folder_where_its_own_data_set_is_not(
    glyph_dir, tmp_path, capsys, no_network
):
    save_as_folder(glyph_dir, "glyph_digits", tmp_path / "mine")
    model = ROOT / "checkpoints" / "best" / "cifar100" / "protonet.pt"
    where = [f"--data_dir={tmp_path}", f"--results_dir={tmp_path / 'results'}"]
    options = [*where, f"--models={model}", "--domains=mine", "--k_shots=2,4"]
    assert in_process(evaluate, *options, "--device=cpu") == 1
    assert {(row["dataset"], row["split"]) for row in rows_of(tmp_path / "results")} == {
        ("mine", "")
    }
    printed = capsys.readouterr().out
    assert (
        f"cifar100: not tested. it is not in {tmp_path}; without a domain of yours it is downloaded"
        in printed
    )
    assert (tmp_path / "results" / "few_shot_batch.png").exists()


def test_a_results_dir_that_cannot_be_written_is_known_before_anything_is_computed(
    evaluate_small, tmp_path, monkeypatch
):
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr("common.kshot.mean_features", None)
    with pytest.raises(UserError, match="cannot write into"):
        evaluate_small(tmp_path / "taken" / "results", models=["protonet"])


def test_the_first_command_trains_and_then_tests_beside_the_included_models(
    glyph_dir, tmp_path, monkeypatch
):
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda words: commands.append(words) or subprocess)
    monkeypatch.setattr(subprocess, "returncode", 7, raising=False)
    options = ["--recipe=first", f"--data_dir={glyph_dir}", "--steps_per_epoch=1", "--n_way=2"]
    assert in_process(train_protonet, *options) == 7
    (python, script, *words) = commands[0]
    assert (python, Path(script)) == (sys.executable, ROOT / "evaluate.py")
    cfg = parse_config(evaluate.Config, words, evaluate.RECIPES)
    assert cfg.num_episodes == 10 and cfg.data_dir == str(glyph_dir)
    models = evaluate.load_checkpoints(cfg)
    assert list(models) == ["protonet", "maml", "protomaml", "protonet (quick)"]


# Random episodes

EPISODES = "--num_episodes=6 --max_support_sets=-1 --k_shots=1,5 --n_way=2 --n_query=4".split()


def test_random_episodes_are_tested_in_place_of_support_sets(evaluate_small, trained, tmp_path):
    printed = evaluate_small(tmp_path, *EPISODES, models=TRAINING, figures=True)
    rows = rows_of(tmp_path)
    wanted = itertools.product([*TRAINING, "pixels"], [1, 5])
    assert [(row["model"], row["k_shot"]) for row in rows] == list(wanted)
    for row in rows:
        assert (row["n_way"], row["num_episodes"], row["num_queries"]) == (2, 6, 8)
        # The classifier's features have a learned length.
        sizes = {"pixels": 0, "classifier": 962_913}
        assert row["parameters"] == sizes.get(row["model"], 962_912)
        correct = row["accuracy"] * 6 * 8
        assert correct == pytest.approx(round(correct), abs=1e-9)
        numbers = f"{100 * row['accuracy']:.2f} +± {100 * row['ci95']:.2f} .* 6 +2 +"
        assert re.search(rf" {row['k_shot']} +{numbers}", printed)
    assert evaluate_small(tmp_path, *EPISODES, models=TRAINING).count("reused") == 10
    assert rows_of(tmp_path) == rows


def test_results_of_other_episodes_are_not_reused(tested, evaluate_small, tmp_path):
    folder, models = copied(tested, tmp_path), ["protonet"]
    assert "reused" not in evaluate_small(folder, *EPISODES, "--k_shots=2,5", models=models)
    for option, reused in (("--num_episodes=5", 0), ("--n_query=3", 0), ("--k_shots=1,2", 2)):
        assert evaluate_small(folder, *EPISODES, option, models=models).count("reused") == reused


def test_a_domain_is_tested_on_episodes_of_all_its_classes(evaluate_small, tmp_path):
    options = ["--domains=glyph_digits", "--classes=val"]
    evaluate_small(tmp_path, *EPISODES, *options, models=["protonet"])
    found = {(row["dataset"], row["classes"]) for row in rows_of(tmp_path)}
    assert found == {("glyphs", "val"), ("glyph_digits", "all")}
