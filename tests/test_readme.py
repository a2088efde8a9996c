"""What README and docs say holds: their commands, their numbers, the trained models."""

import csv
import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from common.checkpoint import encoder_of, load_checkpoint
from common.config import parse_config
from common.files import sha256

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def of_last_commit(pattern):
    """Return the files of the last commit, where this is a checkout, unless one was replaced."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return []
    compare = ["git", "diff", "--quiet", "HEAD", "--", "checkpoints", "results"]
    if subprocess.run(compare, cwd=ROOT).returncode:
        return []
    files = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in files.stdout.splitlines()]


TRAINED, RESULTS = of_last_commit("checkpoints/*.pt"), of_last_commit("results/*/accuracy.json")


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_name_scripts_and_options_that_exist(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    text = page.read_text(encoding="utf-8").replace("\\\n", " ").replace("=N", "=1")
    lines = re.findall(r"^    ((?:python|torchrun) .*\.py\b.*)$", text, re.MULTILINE)
    assert lines
    for command in (part for line in lines for part in line.split("#")[0].split("&&")):
        script, options = re.search(r"(\S+\.py)(.*)", command).groups()
        assert (ROOT / script).is_file()
        module = importlib.import_module(Path(script).stem)
        if hasattr(module, "Config"):
            recipes = getattr(module, "RECIPES", None)
            parse_config(module.Config, shlex.split(options), recipes=recipes)


@pytest.mark.skipif(not RESULTS, reason="the tables are not those of the last commit")
def test_the_readmes_accuracies_are_in_the_tables_of_results():
    tables = "".join(path.with_suffix(".md").read_text(encoding="utf-8") for path in RESULTS)
    shipped = set(re.findall(r"(\d+\.\d\d) \| ± (\d+\.\d\d)", tables))
    claimed = set(re.findall(r"(\d+\.\d\d) ± (\d+\.\d\d)", PAGES[0].read_text(encoding="utf-8")))
    assert len(claimed) > 100 and claimed - shipped == set()


@pytest.mark.parametrize("path", TRAINED, ids=name_of)
def test_a_trained_model_can_be_read_and_is_the_best_epoch_of_its_curve(path):
    checkpoint = load_checkpoint(path)
    encoder_of(checkpoint, path)
    with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        curve = {int(row["epoch"]): float(row["val_accuracy"]) for row in csv.DictReader(file)}
    assert checkpoint["val_accuracy"] == curve[checkpoint["epoch"]] == max(curve.values())


@pytest.mark.parametrize("path", RESULTS, ids=name_of)
def test_a_table_is_that_of_trained_models_that_are_there(path):
    tested = {row["checkpoint_sha256"] for row in json.loads(path.read_text())} - {None}
    assert tested and tested <= {sha256(trained) for trained in TRAINED}
