"""The speed benchmark compares like with like; profile and comparison say what they should."""

import dataclasses
import importlib
import json
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_protomaml
import train_protonet
from benchmarks import peers, reproduction, tutorial_style
from common.encoder import Encoder
from common.inner_loop import InnerLoop, hand_over_gradients
from common.optimizer import make_optimizer
from common.prototypes import distance_logits, make_prototypes
from common.samplers import episode_labels
from common.tutorial import CORRECTED, K_SHOTS

N_WAY, K_SHOT, TASKS, INNER_STEPS, LR_INNER = 3, 2, 2, 2, 0.1
SIZES = SimpleNamespace(n_way=N_WAY, k_shot=K_SHOT, n_query=K_SHOT)
Y = episode_labels(N_WAY, K_SHOT)  # of the support set and of the queries
IMAGES = torch.randn(TASKS * 2 * len(Y), 3, 32, 32, generator=torch.Generator().manual_seed(1))
EPISODE = IMAGES[: 2 * len(Y)]


@pytest.fixture(autouse=True)
def single_thread(one_thread):
    """The encoders are small, and the machine may have other work."""


def make(encoder):
    torch.manual_seed(42)
    return encoder().double().train()


def gradients(module):
    return [parameter.grad for parameter in module.parameters()]


def project_maml(output_init):
    """Return the project's encoder with the gradients of an outer step in it, and the last loss."""
    encoder, found = make(Encoder), []
    inner_loop = InnerLoop(INNER_STEPS, LR_INNER, LR_INNER, output_init)
    cfg = SimpleNamespace(**vars(SIZES), **dataclasses.asdict(inner_loop))
    for task in IMAGES.double().chunk(TASKS):
        loss, _, of_task, _ = train_protomaml.learn_task(cfg, encoder, task, None)
        found.append(of_task)
    hand_over_gradients(encoder, found)
    return encoder, loss


def test_the_tutorials_protonet_step_is_the_projects():
    project, tutorial = make(Encoder), make(tutorial_style.make_encoder)
    loss, _ = train_protonet.solve_episode(SIZES, project, EPISODE.double())
    loss.backward()
    optimizer = torch.optim.AdamW(tutorial.parameters())
    other = tutorial_style.protonet_step(tutorial, optimizer, EPISODE.double(), Y.repeat(2))
    torch.testing.assert_close(other, loss.detach())
    torch.testing.assert_close(gradients(tutorial), gradients(project))


def test_the_tutorials_protomaml_step_is_the_projects():
    project, _ = project_maml("prototypes")
    tutorial = make(tutorial_style.make_encoder)
    optimizer = torch.optim.AdamW(tutorial.parameters())
    labels = Y.repeat(2 * TASKS)
    tutorial_style.protomaml_step(
        tutorial, optimizer, IMAGES.double(), labels, TASKS, INNER_STEPS, LR_INNER
    )
    torch.testing.assert_close(gradients(tutorial), gradients(project))


def test_learn2learns_protonet_step_is_the_projects():
    need("learn2learn")
    project, other = make(Encoder), make(tutorial_style.make_encoder)
    loss, _ = train_protonet.solve_episode(SIZES, project, EPISODE.double())
    loss.backward()
    found = peers.learn2learn_protonet(other, Y, 1e-3)(EPISODE.double(), None)
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(gradients(other), gradients(project))


def test_easyfsls_protonet_step_is_the_projects_but_for_two_passes_and_plain_distances():
    need("easyfsl")
    project, other = make(Encoder), make(tutorial_style.make_encoder)
    x_spt, x_qry = EPISODE.double().chunk(2)
    prototypes = make_prototypes(project(x_spt), N_WAY)
    squared = -distance_logits(project(x_qry), prototypes)
    loss = F.cross_entropy(-squared.sqrt(), Y)
    loss.backward()
    found = peers.easyfsl_protonet(other, Y, 1e-3)(EPISODE.double(), None)
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(gradients(other), gradients(project))


@pytest.mark.parametrize("library", ["higher", "learn2learn"])
def test_a_librarys_maml_step_gives_the_encoder_the_projects_gradients(library):
    need(library)
    project, loss = project_maml("zeros")
    other = make(tutorial_style.make_encoder)
    step = peers.MAML[library](other, Y, 1e-3, TASKS, INNER_STEPS, LR_INNER)
    found = step(IMAGES.double(), None)
    torch.testing.assert_close(found, loss.detach())
    # learn2learn's example takes the mean over the tasks, the project the sum.
    scale = TASKS if library == "learn2learn" else 1
    scaled = [scale * gradient for gradient in gradients(other)]
    torch.testing.assert_close(scaled, gradients(project))


def test_the_profiles_groups_leave_little_of_a_step_to_the_rest(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(peers.__file__))  # where a script finds the others
    profile_steps = importlib.import_module("profile_steps")
    encoder = Encoder()
    optimizer = make_optimizer(encoder.parameters(), 1e-3, 0.01, EPISODE.device)

    def step():
        loss, _ = train_protonet.solve_episode(SIZES, encoder, EPISODE)
        loss.backward()
        optimizer.step()

    spent = profile_steps.time_by_group(step, 2, EPISODE.device)
    assert [group for group, time in spent.items() if not time] == ["augmentation, normalisation"]
    assert spent[profile_steps.REST] < 0.15 * sum(spent.values())


def test_the_comparison_with_the_tutorial_has_intervals_for_it_and_for_the_difference(
    tmp_path, monkeypatch, capsys
):
    accuracy = dict(zip(K_SHOTS, CORRECTED["protonet", "cifar100"]))
    rows = [
        {
            "model": "protonet",
            "dataset": "cifar100",
            "k_shot": k,
            "accuracy": (accuracy[k] + 1) / 100,
            "ci95": 0.003,
            "num_support_sets": 600 // k,
        }
        for k in accuracy
    ]
    (tmp_path / "accuracy.json").write_text(json.dumps(rows))
    monkeypatch.setattr(reproduction, "RESULTS", str(tmp_path))
    reproduction.main()
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    cells = {line[0].strip("| *"): line[1:] for line in lines}
    # Of 300 support sets with a std of 3.63: 1.968 * 3.63 / sqrt(300).
    assert cells["ProtoNet, corrected"][0] == "44.30 ± 0.41"
    assert cells["ProtoNet, here"][0] == "45.30 ± 0.30"
    assert cells["difference"][0] == "+1.00 ± 0.51"  # sqrt(0.41 ** 2 + 0.30 ** 2)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"curves.png", "compared_cifar100.png"}


def need(library):
    pytest.importorskip(library, exc_type=ImportError)
