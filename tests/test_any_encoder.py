"""Every trainer with every encoder: trains, resumes to the same bits, is tested, classifies."""

import json
import os

import pytest
import torch
from PIL import Image
from torchvision import models

import classify
import evaluate
import train_classifier
import train_protomaml
import train_protonet
from common import UserError
from common.checkpoint import load_checkpoint, pretrained_checkpoint
from common.config import parse_config
from common.encoders import Encoder

pytestmark = pytest.mark.usefixtures("one_thread", "networks")
TRAINERS = {
    "classifier": [train_classifier, "--batch_size=8", "--principal_features=true"],
    "protonet": [train_protonet],
    "protomaml": [train_protomaml, "--tasks_per_step=2", "--val_episodes=2"],
    "maml": [train_protomaml, "--tasks_per_step=2", "--val_episodes=2", "--output_init=zeros"],
}
OWN = """
from torch import nn

class MyEncoder(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 5, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())

class Maps(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 6, 5)
"""
PRETRAINED = "torchvision:shufflenet_v2_x0_5"
NETWORKS = ["conv4", "resnet12", "my_encoder.py:MyEncoder", PRETRAINED]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder to be in, with an encoder of one's own, and weights where torchvision looks."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "my_encoder.py").write_text(OWN)
    weights = models.get_model_weights(PRETRAINED.partition(":")[2]).DEFAULT
    cached = folder / "hub" / "checkpoints" / os.path.basename(weights.url)
    cached.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(models.get_model(PRETRAINED.partition(":")[2]).state_dict(), cached)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TORCH_HOME", str(folder))
        patched.chdir(folder)
        patched.setattr("common.training_run.plot_training_curves", lambda *arguments: None)
        yield folder


def train(model, encoder, glyph_dir, folder, *more):
    script, *options = TRAINERS[model]
    options += [f"--encoder={encoder}"] + ["--width=4"] * (encoder in ("conv4", "resnet12"))
    options += "--n_way=2 --k_shot=1 --n_query=1 --steps_per_epoch=1 --resume=auto".split()
    options += [f"--data_dir={glyph_dir}", f"--checkpoint_dir={folder}", "--dataset=glyphs"]
    cfg = parse_config(script.Config, [*options, "--device=cpu", "--epochs=1", *more])
    script.main(cfg)
    return folder / cfg.dataset / f"{model}.pt"


@pytest.mark.parametrize("encoder", NETWORKS)
@pytest.mark.parametrize("model", TRAINERS)
def test_it_is_trained_resumed_tested_and_classifies(model, encoder, glyph_dir, tmp_path, networks):
    if encoder == PRETRAINED and model != "protonet":
        pytest.skip("the same code, and slow")
    precision = "--precision=bfloat16" if model == "classifier" else "--precision=float32"
    train(model, encoder, glyph_dir, tmp_path / "a", precision, "--epochs=1")
    torch.manual_seed(9)
    paths = [
        train(model, encoder, glyph_dir, tmp_path / run, precision, "--epochs=2") for run in "ab"
    ]
    resumed, whole = (
        load_checkpoint(path.with_name(f"{model}_last.pt"))["state_dict"] for path in paths
    )
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())

    where = [f"--data_dir={glyph_dir}", f"--results_dir={tmp_path / 'results'}", "--device=cpu"]
    options = "--dataset=glyphs --domains= --k_shots=2 --num_inner_steps=1 --finetune_steps=1"
    options = [*options.split(), "--max_support_sets=1", f"--models={paths[0]}", *where]
    assert evaluate.main(parse_config(evaluate.Config, [*options, f"--finetune={model}"])) == 0
    rows = json.loads((tmp_path / "results" / "accuracy.json").read_text())
    assert [row["model"] for row in rows] == [model, f"{model}_finetuned", "pixels"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)

    for folder in ("support/a", "support/b", "images"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red" if "a" in folder else "blue").save(
            tmp_path / folder / "1.png"
        )
    options = [f"--support={tmp_path / 'support'}", f"--images={tmp_path / 'images'}"]
    options += [f"--model={paths[0]}", "--num_inner_steps=1", *where[1:]]
    assert classify.main(parse_config(classify.Config, options)) == 0


def test_a_pretrained_network_is_tested_under_its_name_and_needs_no_training(
    glyph_dir, tmp_path, networks
):
    where = [f"--data_dir={glyph_dir}", f"--results_dir={tmp_path}", "--device=cpu"]
    options = ["--dataset=glyphs", "--domains=", "--k_shots=1", f"--models={PRETRAINED}", *where]
    assert evaluate.main(parse_config(evaluate.Config, options)) == 0
    rows = json.loads((tmp_path / "accuracy.json").read_text())
    assert [row["model"] for row in rows] == [PRETRAINED, "pixels"]
    table = (tmp_path / "accuracy.md").read_text()
    assert "| shufflenet_v2_x0_5, pretrained |" in table and "most classes of CIFAR-100" in table
    # The network sees what torchvision's own transform gives it, but for the middle that it cuts.
    contents = pretrained_checkpoint(PRETRAINED)
    assert contents["image_shape"] == [224, 224] and contents["mean"] == (0.485, 0.456, 0.406)
    encoder = Encoder(name=PRETRAINED).eval()
    images = torch.randn(2, 3, 224, 224)
    net = models.get_model(PRETRAINED.partition(":")[2], weights="DEFAULT").eval()
    net.fc = torch.nn.Identity()
    torch.testing.assert_close(encoder(images), net(images))
    assert encoder(images[:, :, :32, :32]).shape == (2, 1024)


@pytest.mark.parametrize(
    "name, why",
    [
        ("vgg", "there is no such network"),
        ("torchvision:nothing", ""),
        ("absent.py:A", ""),
        ("my_encoder.py:B", "defines no B"),
        ("my_encoder.py:Maps", "of one image it gives"),
    ],
)
def test_a_network_that_cannot_be_made_is_one_line(name, why, networks, no_network):
    with pytest.raises(
        UserError, match=f"encoder '{name}' cannot be made .*{why}.*; take densenet, "
    ):
        Encoder(name=name)
    with pytest.raises(UserError, match="'width'"):
        Encoder(width=3)


@pytest.mark.parametrize(
    "name, options, size, parameters, length",
    [
        ("conv4", {}, 32, 113_088, 256),
        ("conv4", {"width": 32}, 84, 28_896, 800),
        ("resnet12", {}, 32, 12_424_320, 640),
        ("resnet12", {"width": 32}, 84, 3_108_928, 320),
    ],
)
def test_the_papers_networks_have_the_papers_sizes(name, options, size, parameters, length):
    encoder = Encoder(name=name, image_size=size, **options).eval()
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
    assert encoder(torch.randn(1, 3, size, size)).shape == (1, length) == (1, encoder.num_features)
    assert Encoder(5, name=name, image_size=size, **options).num_features == 5


def test_an_encoder_whose_file_changed_since_the_training_is_named(networks, capsys):
    arguments = Encoder(name="my_encoder.py:MyEncoder").arguments
    Encoder(**arguments)
    assert capsys.readouterr().out == ""
    Encoder(**{**arguments, "file_sha256": "0" * 64})
    assert "my_encoder.py has changed since the training" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["classifier", "protonet", "maml"])
def test_a_network_without_batchnorm_that_flattens_by_view_is_trained_too(
    model, glyph_dir, tmp_path, networks
):
    code = "\n    def forward(self, x):\n        return super().forward(x).view(len(x), -1)\n"
    (networks / "plain.py").write_text(
        "from torch import nn\n\nclass Plain(nn.Conv2d):\n    def __init__(self):\n"
        "        super().__init__(3, 6, 5, stride=4)\n" + code
    )
    path = train(model, "plain.py:Plain", glyph_dir, tmp_path)
    options = [f"--data_dir={glyph_dir}", f"--results_dir={tmp_path}", f"--models={path}"]
    options += "--dataset=glyphs --domains= --k_shots=1 --num_inner_steps=1 --device=cpu".split()
    options += ["--max_support_sets=1", f"--finetune={model}", "--finetune_steps=1"]
    assert evaluate.main(parse_config(evaluate.Config, options)) == 0
    assert ", plain.py:Plain |" in (tmp_path / "accuracy.md").read_text()


def test_a_teacher_and_a_start_bring_the_normalisation_of_their_training(
    glyph_dir, tmp_path, networks
):
    for name in ("torchvision:shufflenet_v2_x0_5", "densenet"):
        path = train("classifier", name, glyph_dir, tmp_path / name[:5], f"--teacher={PRETRAINED}")
        assert load_checkpoint(path)["mean"] == (0.485, 0.456, 0.406)
    start = f"--init_from={path}"
    path = train("protonet", "densenet", glyph_dir, tmp_path / "third", start)
    assert load_checkpoint(path)["mean"] == (0.485, 0.456, 0.406)
    with pytest.raises(UserError, match="--init_from brings its encoder"):
        train("protonet", "conv4", glyph_dir, tmp_path / "fourth", start)
