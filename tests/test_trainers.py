"""The three trainers: their steps, validation, options, learning rates, starts, memory."""

import dataclasses
import gc
import json
import resource
import shutil
from copy import deepcopy

import pytest
import torch
from stress import TINY

import train_classifier
import train_protomaml
import train_protonet
from common import UserError
from common.augment import AugmentedBatches
from common.checkpoint import content_digest, encoder_of, load_checkpoint, save_checkpoint
from common.config import parse_config
from common.data import load_dataset, load_training_data
from common.encoders import Encoder, encode_in_batches
from common.parallel import Workers
from common.prototypes import mean_loss
from common.samplers import validation_episodes
from common.training_run import TrainingRun

# Tiny networks: threads would only wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")

# Its own options keep a step of each trainer small.
TRAINERS = {
    "classifier": (train_classifier, ["--batch_size=16"]),
    "protonet": (train_protonet, []),
    "protomaml": (train_protomaml, ["--tasks_per_step=3", "--val_episodes=1"]),
}
CPU = torch.device("cpu")


def tiny_encoder(proto_dim=8, name="densenet", **options):
    return Encoder(proto_dim, name=name, **(TINY if name == "densenet" else {}) | options)


@pytest.fixture(autouse=True)
def tiny_encoders(monkeypatch):
    """Let the trainers build tiny encoders: what counts is what goes on around them. No figures."""
    monkeypatch.setattr("common.checkpoint.Encoder", tiny_encoder)
    monkeypatch.setattr("common.training_run.plot_training_curves", lambda *arguments: None)


def small_config(model, glyph_dir, folder, *more):
    """The Config of a trainer with small episodes and one epoch."""
    script, own = TRAINERS[model]
    small = ["--n_way=2", "--k_shot=2", "--n_query=2", "--proto_dim=8", "--epochs=1", *own]
    where = [f"--data_dir={glyph_dir}", f"--checkpoint_dir={folder}"]
    where += ["--dataset=glyphs", "--device=cpu"]
    return parse_config(script.Config, [*where, *small, *more], script.RECIPES)


def train(model, glyph_dir, folder, *more):
    """Train on small episodes; return the path of the best epoch's checkpoint."""
    TRAINERS[model][0].main(small_config(model, glyph_dir, folder, *more))
    return folder / "glyphs" / f"{model}.pt"


def last_of(path):
    return load_checkpoint(path.with_name(f"{path.stem}_last.pt"))


def watch_steps(monkeypatch, look):
    """Call look(run) with every step of every training run."""
    track = TrainingRun.track

    def watched(run, loss, accuracy):
        track(run, loss, accuracy)
        look(run)

    monkeypatch.setattr(TrainingRun, "track", watched)


# Steps


def two_copies(encoder):
    return deepcopy(encoder), deepcopy(encoder)


def statistics_of(encoder):
    return [buffer.clone() for buffer in encoder.buffers() if buffer.is_floating_point()]


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize(
    "threads, output_init", [(1, "prototypes"), (3, "prototypes"), (3, "zeros")]
)
def test_an_outer_step_follows_the_sum_of_the_gradients_of_its_tasks(
    threads, output_init, device, glyph_dir, monkeypatch
):
    more = [f"--output_init={output_init}", "--num_inner_steps=2", "--lr_inner=0.05"]
    cfg, device = small_config("protomaml", glyph_dir, "unused", *more), torch.device(device)
    data = load_training_data("glyphs", str(glyph_dir), CPU)
    # In float64: with four images BatchNorm turns the last digits of float32 into the third.
    encoder = tiny_encoder().train().to(device).double()
    images = data.normalize(data.train.images[torch.randperm(300)[:24]]).to(device).double()
    single = [
        train_protomaml.task_gradients(cfg, encoder, two_copies(encoder), task)
        for task in images.split(8)
    ]
    losses, accuracies, gradients, statistics = zip(*single)
    expected = [p.detach() - sum(g) for p, *g in zip(encoder.parameters(), *gradients)]

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    workers = Workers(device, 3, lambda: two_copies(encoder))
    assert len(workers.workspaces) == (threads if device.type == "cpu" else 3)
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)  # of an earlier step: it does not count
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    found = train_protomaml.train_step(cfg, encoder, optimizer, workers, images)
    assert found[0].item() == pytest.approx(sum(losses).item() / 3)
    assert found[1].item() == pytest.approx(sum(accuracies).item() / 3)
    for parameter, value in zip(encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    for found, *of_tasks in zip(statistics_of(encoder), *statistics, strict=True):
        torch.testing.assert_close(found, sum(of_tasks) / 3)


def test_a_classifiers_step_follows_the_gradient_of_its_loss_by_hand(glyph_dir):
    options = ["--label_smoothing=0.2", "--distillation_weight=0.3", "--temperature=3"]
    cfg = small_config("classifier", glyph_dir, "unused", *options)
    encoder, taught_by = (tiny_encoder(unit_features=True).double() for _ in range(2))
    prototypes = torch.nn.Embedding(4, 8, dtype=torch.float64)
    teacher = taught_by.eval(), torch.randn(4, 8, dtype=torch.float64)
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6) % 4
    parameters = [*encoder.parameters(), *prototypes.parameters()]

    def logits_by_hand(features, prototypes):
        return torch.stack([-(features - v).square().sum(dim=1) for v in prototypes], dim=1)

    log_p = logits_by_hand(encoder(images), prototypes.weight).log_softmax(dim=1)
    taught = (logits_by_hand(taught_by(images), teacher[1]) / 3).softmax(dim=1).detach()
    loss = 0
    for row, label in enumerate(labels.tolist()):
        by_label = -0.8 * log_p[row, label] - 0.2 * log_p[row].mean()
        loss += (0.7 * by_label - 0.3 * (taught[row] * log_p[row]).sum()) / 6
    gradients = torch.autograd.grad(loss, parameters)
    expected = [p.detach() - gradient for p, gradient in zip(parameters, gradients)]

    optimizer = torch.optim.SGD(parameters, lr=1.0)
    step = cfg, encoder, prototypes, teacher, optimizer, images, labels
    found, share = train_classifier.train_step(*step)
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)
    assert share == (log_p.argmax(dim=1) == labels).float().mean()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    assert all(parameter.grad is None for parameter in taught_by.parameters())


def test_the_teachers_prototypes_are_the_mean_features_of_each_class(glyph_dir, tmp_path):
    data = load_training_data("glyphs", str(glyph_dir), CPU)
    path = train("classifier", glyph_dir, tmp_path, "--steps_per_epoch=1")
    cfg = small_config("classifier", glyph_dir, "unused", f"--teacher={path}")
    encoder, found = train_classifier.load_teacher(cfg, data, CPU)
    assert not encoder.training and found.shape == (len(data.train.class_names), 8)
    with torch.no_grad():
        images = data.normalize(data.train.images[data.train.labels == 3])
        assert torch.allclose(found[3], encoder(images).mean(dim=0), atol=1e-5)


@pytest.mark.parametrize("batch_size", [100, 1000])
def test_an_epoch_of_the_classifier_takes_every_image_at_most_once(
    batch_size, glyph_dir, tmp_path, monkeypatch
):
    def batches(data, indices, *others):
        count, size = len(data.train.labels), min(batch_size, len(data.train.labels))
        assert indices.shape == (count // size, size)
        assert len(indices.unique()) == indices.numel() and 0 <= indices.min() < count
        return AugmentedBatches(data, indices, *others)

    monkeypatch.setattr(train_classifier, "AugmentedBatches", batches)
    train("classifier", glyph_dir, tmp_path, f"--batch_size={batch_size}")


@pytest.mark.parametrize("model", ["classifier", "protonet"])
def test_the_first_half_of_the_epochs_has_smaller_images(model, glyph_dir, tmp_path, monkeypatch):
    sizes, forward = [], Encoder.forward

    def watched(encoder, images):
        if encoder.training:
            sizes.append(tuple(images.shape[2:]))
        return forward(encoder, images)

    monkeypatch.setattr(Encoder, "forward", watched)
    more = ["--epochs=5", "--steps_per_epoch=2", "--first_size=16"]
    train(model, glyph_dir, tmp_path, *more)
    assert sizes == [(16, 16)] * 4 + [(32, 32)] * 6


# Validation


@pytest.mark.parametrize("model", TRAINERS)
def test_validation_is_the_mean_over_fixed_episodes_of_the_validation_classes(
    model, glyph_dir, tmp_path
):
    more = ["--steps_per_epoch=2", *["--val_episodes=5"] * (model == "protomaml")]
    last = last_of(train(model, glyph_dir, tmp_path, *more))
    data, cfg = load_training_data("glyphs", str(glyph_dir), CPU), small_config(model, "", "")
    encoder = encoder_of(last, "last").train(model == "protomaml")
    episodes, images = validation_episodes(data.val, 2, 2, 2), data.normalize(data.val.images)
    if model == "protomaml":
        results = []
        for episode in images[episodes[:5]]:
            copies = two_copies(encoder)
            results.append(train_protomaml.query_loss(cfg, encoder, copies, episode, 2))
        expected = tuple(sum(values).item() / 5 for values in zip(*results))
        workers = Workers(CPU, 5, lambda: two_copies(encoder))
        losses, _ = train_protomaml.validation_step(cfg, encoder, workers, images[episodes[:5]], 2)
        assert not losses.requires_grad  # the graphs of all episodes would stay in memory
    else:
        expected = mean_loss(encode_in_batches(encoder, images), episodes, 2, 2)
    row = last["history"][-1]
    assert (row["val_loss"], row["val_accuracy"]) == pytest.approx(expected, rel=1e-5)


def test_principal_features_are_validated_and_kept_and_training_goes_on_with_its_own(
    glyph_dir, tmp_path
):
    more = ["--steps_per_epoch=3", "--principal_features=true"]
    path = train("classifier", glyph_dir, tmp_path, *more)
    best, last = load_checkpoint(path)["state_dict"], last_of(path)["state_dict"]
    differing = [name for name in best if not torch.equal(best[name], last[name])]
    assert differing == ["classifier.weight", "classifier.bias"]
    directions = best["classifier.weight"]
    assert torch.allclose(directions @ directions.T, torch.eye(len(directions)), atol=1e-5)


# Options

# Another value for each option that decides what is learned.
OPTIONS = """
    split=other.json min_crop_area=0.5 color_jitter=0.6 label_smoothing=0.3 n_way=3 k_shot=1
    n_query=1 tasks_per_step=2 val_way=3 val_episodes=1 proto_dim=4 stem_stride=1
    principal_features=true output_init=zeros num_inner_steps=2 lr_inner=0.2 lr_output=0.2 epochs=1
    batch_size=12 lr=5e-3 lr_drops=0.4 weight_decay=0.5 steps_per_epoch=1 seed=1 precision=bfloat16
    encoder=conv4 optimizer=muon first_size=16 schedule=cycle leave_one_out=true
"""
OPTIONS = dict(option.split("=") for option in OPTIONS.split())
# Where a run gets its data, where it computes and where its files go; and what has other tests: a
# start from a file, a folder's images, how a run goes on.
OTHERS = set(
    "recipe dataset data_dir image_size device cuda_graphs checkpoint_dir resume overwrite "
    "init_from batchnorm teacher distillation_weight temperature width test".split()
)


@pytest.mark.parametrize("model", TRAINERS)
def test_every_option_changes_what_is_learned(model, glyph_dir, tmp_path, monkeypatch):
    names = [field.name for field in dataclasses.fields(TRAINERS[model][0].Config)]
    assert set(names) <= OPTIONS.keys() | OTHERS
    classes = load_dataset("glyphs", str(glyph_dir)).class_names
    monkeypatch.chdir(tmp_path)
    for name, ends in ("default", (12, 16)), ("other", (11, 16)):  # of training and validation
        parts = classes[: ends[0]], classes[ends[0] : ends[1]], classes[ends[1] :]
        (tmp_path / f"{name}.json").write_text(
            json.dumps(dict(zip(("train", "val", "test"), parts)))
        )
    small = ["--split=default.json", "--epochs=2", "--steps_per_epoch=2"]
    small += {"protomaml": ["--tasks_per_step=1", "--val_episodes=2"]}.get(model, [])

    def learned_with(*options):
        """What a run learns in a few steps: weights, curves, and its classes."""
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        train(model, glyph_dir, tmp_path / "run", *small, *options)
        (last,) = map(load_checkpoint, (tmp_path / "run").glob("glyphs/*_last.pt"))
        return content_digest([last[name] for name in ("history", "state_dict", "class_split")])

    by_default = learned_with()
    assert learned_with("--overwrite=true") == by_default
    options = [f"--{name}={OPTIONS[name]}" for name in names if name in OPTIONS]
    assert [option for option in options if learned_with(option) == by_default] == []


# Learning rates


def rates_of(model, glyph_dir, folder, monkeypatch, *more):
    """Return the learning rate of the optimizer in each step, and that recorded for each epoch."""
    rates = []
    watch_steps(monkeypatch, lambda run: rates.append(run.optimizer.param_groups[0]["lr"]))
    path = train(model, glyph_dir, folder, *more)
    return rates, [row["lr"] for row in last_of(path)["history"]]


@pytest.mark.parametrize("model", ["protonet", "protomaml"])
def test_the_learning_rate_drops_tenfold_after_7_and_after_9_of_10_epochs(
    model, glyph_dir, tmp_path, monkeypatch
):
    more = ["--epochs=10", "--steps_per_epoch=1", "--lr=1e-3"]
    rates, recorded = rates_of(model, glyph_dir, tmp_path, monkeypatch, *more)
    assert rates == pytest.approx([1e-3] * 7 + [1e-4] * 2 + [1e-5])
    assert recorded == rates


@pytest.mark.parametrize("model, schedule", [("classifier", []), ("protonet", ["cycle"])])
def test_the_learning_rate_makes_one_cycle_over_all_steps(
    model, schedule, glyph_dir, tmp_path, monkeypatch
):
    more = ["--epochs=4", "--steps_per_epoch=5", "--lr=1e-3"]
    more += [f"--schedule={name}" for name in schedule]
    rates, recorded = rates_of(model, glyph_dir, tmp_path, monkeypatch, *more)
    assert len(rates) == 20
    assert rates[:5] == sorted(rates[:5]) and 0 < rates[0] < 2e-5
    assert rates[4] == pytest.approx(1e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 2e-5
    assert recorded == rates[::5]


def test_a_run_with_muon_is_resumed_to_the_same_bits(glyph_dir, tmp_path):
    more = ["--optimizer=muon", "--steps_per_epoch=3"]
    whole = last_of(train("protonet", glyph_dir, tmp_path / "whole", *more, "--epochs=2"))
    train("protonet", glyph_dir, tmp_path / "parts", *more, "--epochs=1")
    more += ["--epochs=2", "--resume=true"]
    parts = last_of(train("protonet", glyph_dir, tmp_path / "parts", *more))
    assert parts["history"] == whole["history"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][name], tensor), name


# Starting from a checkpoint


@pytest.mark.parametrize("model", ["protonet", "protomaml"])
def test_a_run_starts_from_a_classifiers_encoder_and_can_be_resumed(model, glyph_dir, tmp_path):
    options = ["--steps_per_epoch=3", "--proto_dim=5", "--stem_stride=1"]
    path = train("classifier", glyph_dir, tmp_path, *options)
    start, more = load_checkpoint(path), [f"--init_from={path}", "--steps_per_epoch=1", "--lr=1e-6"]
    frozen = ["--batchnorm=frozen"] * (model == "protomaml")
    found_path = train(model, glyph_dir, tmp_path, *more, *frozen)
    found = load_checkpoint(found_path)
    assert found["model"] == model and found["encoder"] == start["encoder"]
    names = ("proto_dim", "unit_features", "stem_stride")
    assert [start["encoder"][name] for name in names] == [5, True, 1]
    for name, tensor in start["state_dict"].items():
        if "running" in name or "num_batches" in name:
            same = torch.equal(found["state_dict"][name], tensor)
            assert same or not frozen, name
        else:  # one step of AdamW moves a weight by the learning rate at the most
            assert (found["state_dict"][name] - tensor).abs().max() < 1e-4, name
    train(model, glyph_dir, tmp_path, *more, *frozen, "--epochs=2", "--resume=true")
    assert (last_of(found_path)["epoch"], last_of(found_path)["encoder"]["proto_dim"]) == (2, 5)


@pytest.mark.parametrize("model", TRAINERS)
def test_a_start_from_other_classes_is_refused(model, glyph_dir, tmp_path):
    path = train("classifier", glyph_dir, tmp_path, "--steps_per_epoch=1")
    contents = load_checkpoint(path)
    split = contents["class_split"]
    save_checkpoint(path, {**contents, "class_split": {**split, "train": split["train"][::-1]}})
    option = "teacher" if model == "classifier" else "init_from"
    with pytest.raises(UserError, match="other classes"):
        train(model, glyph_dir, tmp_path / "new", f"--{option}={path}")
    assert not (tmp_path / "new").exists()


# Memory


@pytest.mark.parametrize("model", TRAINERS)
def test_memory_is_flat_over_200_steps(model, glyph_dir, tmp_path, monkeypatch):
    # What could grow is what the loop keeps of each step, not the step itself.
    tensors, peaks, steps = [], [], 0

    def look(run):
        nonlocal steps
        steps += 1
        assert run.encoder.training  # also in the second epoch, after a validation
        if steps in (110, 310):  # after the first epoch, which keeps its best weights
            gc.collect()
            tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    watch_steps(monkeypatch, look)
    own = {"classifier": ["--batch_size=4"], "protomaml": ["--tasks_per_step=1"]}
    more = ["--k_shot=1", "--n_query=1", "--epochs=4", *own.get(model, [])]
    train(model, glyph_dir, tmp_path, *more)
    assert steps >= 310
    assert tensors[1] <= tensors[0] + 5
    assert peaks[1] - peaks[0] < 30 * 1024  # KiB
