"""What README and docs say holds: their commands, their numbers, the included models."""

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


def included(pattern):
    """Return the project's own files, where this is a checkout, unless one was replaced."""
    compare = ["git", "diff", "--quiet", "HEAD", "--", "checkpoints", "results"]
    checkout = shutil.which("git") and (ROOT / ".git").exists()
    if not checkout or subprocess.run(compare, cwd=ROOT).returncode:
        return []
    # In git's patterns a * stands for folders, too.
    files = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in files.stdout.splitlines()]


TRAINED, RESULTS = included("checkpoints/*.pt"), included("results/*accuracy.json")


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_name_scripts_options_and_recipes_that_exist(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    text = page.read_text(encoding="utf-8").replace("=N", "=1")
    assert "\\\n" not in text  # which continues a line in no shell of Windows
    lines = re.findall(r"^    ((?:python|torchrun) .*\.py\b.*)$", text, re.MULTILINE)
    for command in (part for line in lines for part in line.split("#")[0].split("&&")):
        script, options = re.search(r"(\S+\.py)(.*)", command).groups()
        assert (ROOT / script).is_file()
        module = importlib.import_module(Path(script).stem)
        if hasattr(module, "Config"):
            parse_config(module.Config, shlex.split(options), getattr(module, "RECIPES", None))
    assert lines or page.parent != ROOT


@pytest.mark.skipif(not RESULTS, reason="the tables are not those of the last commit")
def test_the_readmes_accuracies_are_in_the_tables_of_results():
    tables = "".join(path.with_suffix(".md").read_text(encoding="utf-8") for path in RESULTS)
    shipped = set(re.findall(r"(\d+\.\d\d) \| ± (\d+\.\d\d)", tables))
    for page in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        lines = re.findall(r"(?m)^\|.*", page.read_text(encoding="utf-8"))
        claimed = set(re.findall(r"(\d+\.\d\d) ± (\d+\.\d\d)", "\n".join(lines)))
        assert claimed and claimed <= shipped


@pytest.mark.parametrize("path", TRAINED, ids=name_of)
def test_an_included_model_can_be_read_and_is_the_best_epoch_of_its_curve(path):
    checkpoint = load_checkpoint(path)
    assert encoder_of(checkpoint, path) and checkpoint["model"] == path.stem
    with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        curve = {int(row["epoch"]): float(row["val_accuracy"]) for row in csv.DictReader(file)}
    assert checkpoint["val_accuracy"] == curve[checkpoint["epoch"]] == max(curve.values())


@pytest.mark.skipif(not RESULTS, reason="the tables are not those of the last commit")
def test_every_table_tests_an_included_model_and_every_included_model_is_in_a_table():
    tables = [{row["checkpoint_sha256"] for row in json.loads(p.read_text())} for p in RESULTS]
    digests = set(map(sha256, TRAINED))
    assert all(digests & table for table in tables) and digests <= set().union(*tables)


@pytest.mark.skipif(not TRAINED, reason="this is no checkout")
def test_a_checkout_has_the_same_bytes_on_every_system():
    command = ["git", "check-attr", "text", "README.md", "train_protonet.py", TRAINED[0]]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert found.count("text: unset") == 3
