"""A new method is one new file: trained, resumed, tested and used without an edit elsewhere."""

import csv
import importlib
import json
from pathlib import Path

import pytest
from PIL import Image

import classify
import evaluate
import train_protonet
from common import UserError
from common.config import parse_config
from common.data import load_dataset
from common.figures import STYLES, style_of
from common.prototypes import distance_logits

CHANGES = {
    'MODEL = "protonet"': 'MODEL = "mymethod"',
    "F.cross_entropy(logits, labels, ": "F.cross_entropy(0.5 * logits, labels, ",
}


def run(module, *arguments):
    return module.main(parse_config(module.Config, arguments))


@pytest.fixture
def trained(glyph_dir, tmp_path, monkeypatch):
    """Train a copy of train_protonet.py with another name and loss; return its checkpoint."""
    text = Path(train_protonet.__file__).read_text()
    for line, changed in CHANGES.items():
        assert text.count(line) == 1
        text = text.replace(line, changed)
    (tmp_path / "train_mymethod.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    script = importlib.import_module("train_mymethod")
    options = ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={tmp_path}"]
    options += ["--n_way=2", "--k_shot=2", "--n_query=2", "--steps_per_epoch=2", "--device=cpu"]
    run(script, *options, "--epochs=1")
    run(script, *options, "--epochs=2", "--resume=true")
    assert len((tmp_path / "glyphs" / "mymethod.csv").read_text().splitlines()) == 3
    return tmp_path / "glyphs" / "mymethod.pt"


@pytest.mark.parametrize("name", ["pixels", "mine_last", "mine_finetuned", "a/b"])
def test_a_name_that_tests_take_for_something_else_is_refused(name, glyph_dir, monkeypatch):
    monkeypatch.setattr(train_protonet, "MODEL", name)
    with pytest.raises(UserError, match="MODEL"):
        run(train_protonet, "--dataset=glyphs", f"--data_dir={glyph_dir}", "--device=cpu")


def farthest(queries, prototypes):
    return -distance_logits(queries, prototypes)


def test_a_method_may_classify_by_a_rule_of_its_own(trained, glyph_dir, tmp_path, monkeypatch):
    options = ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--models={trained}", "--domains="]
    options += ["--k_shots=2", f"--results_dir={tmp_path}", "--device=cpu"]
    monkeypatch.setattr(evaluate, "code_of_test", evaluate.code_of_test.__wrapped__)
    found = []  # by each rule; a result by another one is not reused
    for rules in ({}, {"mymethod": farthest}):
        monkeypatch.setattr(evaluate, "LOGITS", rules)
        run(evaluate, *options)
        rows = json.loads((tmp_path / "accuracy.json").read_text())
        found.append([row["accuracy"] for row in rows])
    (nearest, pixels), (other, same_pixels) = found
    assert other < nearest and pixels == same_pixels


def test_a_copy_of_a_training_script_is_a_new_method(trained, glyph_dir, tmp_path, capsys):
    options = ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--models={trained}", "--domains="]
    run(evaluate, *options, "--k_shots=2,4", f"--results_dir={tmp_path}", "--device=cpu")
    assert "\nmymethod  glyphs     2 " in capsys.readouterr().out
    rows = json.loads((tmp_path / "accuracy.json").read_text())
    names = [row["model"] for row in rows]
    assert names == ["mymethod", "mymethod", "pixels", "pixels"]
    color = style_of("mymethod", names)["color"]
    assert color not in [style["color"] for style in STYLES.values()]
    figure = (tmp_path / "models_glyphs.svg").read_text()
    assert "mymethod" in figure and f"stroke: {color.lower()}" in figure

    data = load_dataset("glyphs", glyph_dir)
    for label, name in enumerate("ab"):
        (tmp_path / "support" / name).mkdir(parents=True)
        images = data.images[data.labels == label].permute(0, 2, 3, 1).numpy()
        for number in range(3):
            Image.fromarray(images[number]).save(tmp_path / "support" / name / f"{number}.png")
        (tmp_path / "queries").mkdir(exist_ok=True)
        Image.fromarray(images[3]).save(tmp_path / "queries" / f"{name}.png")
    folders = [f"--support={tmp_path / 'support'}", f"--images={tmp_path / 'queries'}"]
    run(classify, *folders, f"--model={trained}", f"--results_dir={tmp_path}", "--device=cpu")
    with open(tmp_path / "classified.csv", newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} <= {"a", "b"}
