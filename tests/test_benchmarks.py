"""The speed benchmark compares like with like; profile and comparison say what they should."""

import importlib
import json
import os
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import train_protomaml
import train_protonet
from benchmarks import peers, reproduction
from common.encoders import Encoder
from common.inner_loop import InnerLoop
from common.parallel import Workers
from common.prototypes import distance_logits, episode_labels, make_prototypes
from common.tutorial import CORRECTED, K_SHOTS

N_WAY, K_SHOT, TASKS, INNER_STEPS, LR_INNER = 3, 2, 2, 2, 0.1
SIZES = {"n_way": N_WAY, "k_shot": K_SHOT, "n_query": K_SHOT}
Y = episode_labels(N_WAY, K_SHOT)  # of the support set and of the queries
RANDOM = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
IMAGES = torch.randn(TASKS * 2 * len(Y), 3, 32, 32, **RANDOM)
EPISODE = IMAGES[: 2 * len(Y)]
pytestmark = pytest.mark.usefixtures("one_thread")


def make(encoder):
    torch.manual_seed(42)
    return encoder().double().train()


def gradients(module, scale=1):
    return [scale * parameter.grad for parameter in module.parameters()]


@pytest.mark.parametrize("side", peers.PROTONET)
def test_a_protonet_step_is_the_projects_but_for_easyfsls_two_passes_and_plain_distances(side):
    if side != peers.TUTORIAL:
        pytest.importorskip(side, exc_type=ImportError)
    project, other = make(Encoder), make(peers.make_encoder)
    if side == "easyfsl":
        support, query = map(project, EPISODE.chunk(2))
        squared = -distance_logits(query, make_prototypes(support, N_WAY))
        loss = F.cross_entropy(-squared.sqrt(), Y)
        loss.backward()
    else:
        cfg, optimizer = train_protonet.Config(**SIZES), torch.optim.SGD(project.parameters())
        loss, _ = train_protonet.train_step(cfg, project, optimizer, EPISODE)
    found = peers.PROTONET[side](other, Y, 1e-3)(EPISODE, Y.repeat(2))
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(gradients(other), gradients(project))


@pytest.mark.parametrize(
    ("output_init", "side"), [("prototypes", peers.TUTORIAL), *(("zeros", s) for s in peers.MAML)]
)
def test_an_outer_step_gives_the_encoder_the_projects_gradients(output_init, side):
    if side != peers.TUTORIAL:
        pytest.importorskip(side, exc_type=ImportError)
    project, other = make(Encoder), make(peers.make_encoder)
    how = InnerLoop(INNER_STEPS, LR_INNER, LR_INNER, output_init)
    cfg = train_protomaml.Config(**SIZES, **vars(how))
    optimizer = torch.optim.SGD(project.parameters())
    workers = Workers(IMAGES.device, TASKS, lambda: (deepcopy(project), deepcopy(project)))
    train_protomaml.train_step(cfg, project, optimizer, workers, IMAGES)
    make_step = (peers.PROTOMAML | peers.MAML)[side]
    make_step(other, Y, 1e-3, TASKS, INNER_STEPS, LR_INNER)(IMAGES, Y.repeat(2 * TASKS))
    scale = TASKS if side == "learn2learn" else 1  # its example takes the mean over the tasks
    torch.testing.assert_close(gradients(other, scale), gradients(project))


def test_the_profiles_groups_leave_little_of_a_step_to_the_rest(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(peers.__file__))  # where a script finds the others
    profile_steps, encoder = importlib.import_module("profile_steps"), Encoder()
    inputs = encoder, torch.optim.AdamW(encoder.parameters()), EPISODE.float()
    step = partial(train_protonet.train_step, train_protonet.Config(**SIZES), *inputs)
    spent = profile_steps.time_by_group(step, 2, EPISODE.device)
    assert [group for group, time in spent.items() if not time] == ["augmentation, normalisation"]
    assert spent[profile_steps.REST] < 0.15 * sum(spent.values())


def test_the_comparison_with_the_tutorial_has_intervals(tmp_path, monkeypatch, capsys):
    rows = [
        {"k_shot": k, "accuracy": (accuracy + 1) / 100, "ci95": 0.003, "num_support_sets": 600 // k}
        for k, accuracy in zip(K_SHOTS, CORRECTED["protonet", "cifar100"])
    ]
    rows = [row | {"model": "protonet", "dataset": "cifar100"} for row in rows]
    (tmp_path / "accuracy.json").write_text(json.dumps(rows))
    monkeypatch.setattr(reproduction, "RESULTS", str(tmp_path))
    reproduction.main()
    lines = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    cells = {name.strip("| *"): values for name, *values in lines}
    assert cells["ProtoNet, corrected"][0] == "44.30 ± 0.41"  # 1.968 * 3.63 / sqrt(300)
    assert cells["ProtoNet, here"][0] == "45.30 ± 0.30"
    assert cells["difference"][0] == "+1.00 ± 0.51"  # sqrt(0.41 ** 2 + 0.30 ** 2)
    assert {path.name for path in tmp_path.glob("*.png")} == {"curves.png", "compared_cifar100.png"}


def test_a_speedrun_prints_the_time_and_the_mean_over_seeds(glyph_dir, tmp_path, capsys):
    speedrun = importlib.import_module("benchmarks.speedrun")
    small = "--encoder=conv4 --width=4 --epochs=2 --steps_per_epoch=1 --n_way=2 --k_shot=1"
    options = {"command": f"train_classifier.py {small} --n_query=1", "seeds": (3, 4)}
    folders = {"data_dir": str(glyph_dir), "keep": str(tmp_path)}
    speedrun.main(speedrun.Config(dataset="glyphs", k_shots=(2, 4), **options, **folders))
    *_, row = capsys.readouterr().out.strip().splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == f"`{options['command']}`" and all(c.endswith(" s") for c in cells[1:3])
    for k, cell in zip((2, 4), cells[3:], strict=True):
        found = []
        for seed in options["seeds"]:
            rows = json.loads((tmp_path / str(seed) / "results/accuracy.json").read_text())
            found += [r["accuracy"] for r in rows if (r["model"], r["k_shot"]) == ("classifier", k)]
        mean, half = sum(found) * 50, abs(found[0] - found[1]) * 100 / 2**0.5
        assert cell == f"{mean:.2f} ({half:.2f})" and len(found) == 2
