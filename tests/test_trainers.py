"""The three trainers: their steps, options, learning rates, the classifier's loss, memory."""

import dataclasses
import gc
import json
import resource
import shlex
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import train_classifier
import train_protomaml
import train_protonet
from common.checkpoint import FORMAT, content_digest, load_checkpoint, save_checkpoint
from common.config import UserError, parse_config
from common.data import load_dataset, load_training_data
from common.encoder import Encoder
from common.parallel import Workers
from common.training_run import TrainingRun

# Its own options keep a step of each trainer small.
TRAINERS = {
    "classifier": (train_classifier, ["--batch_size=16"]),
    "protonet": (train_protonet, []),
    "protomaml": (train_protomaml, ["--tasks_per_step=3", "--val_episodes=1"]),
}
CPU = torch.device("cpu")


def train(model, glyph_dir, folder, *more):
    """Train on small episodes; return the path of the best epoch's checkpoint."""
    script, own = TRAINERS[model]
    small = ["--device=cpu", "--n_way=2", "--k_shot=2", "--n_query=2", "--epochs=1", *own]
    where = ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={folder}"]
    arguments = [*where, *small, *more]
    script.main(parse_config(script.Config, arguments, recipes=getattr(script, "RECIPES", None)))
    return folder / "glyphs" / f"{model}.pt"


def use_tiny_encoder(model, monkeypatch):
    """Let a trainer build a tiny encoder, where what counts is what goes on around it."""

    def new_encoder(proto_dim, unit_features=False, stem_stride=2):
        return Encoder(proto_dim, 4, (1, 1, 1, 1), 2, 8, unit_features, stem_stride)

    def starting_encoder(cfg, data):
        encoder = new_encoder(cfg.proto_dim)
        encoder.precision = cfg.precision
        return encoder

    if model == "classifier":
        monkeypatch.setattr(train_classifier, "Encoder", new_encoder)
    else:
        monkeypatch.setattr(TRAINERS[model][0], "starting_encoder", starting_encoder)


def watch_steps(monkeypatch, look):
    """Call look(run, loss) with every step of every training run."""
    track = TrainingRun.track

    def watched(run, loss, accuracy):
        track(run, loss, accuracy)
        look(run, loss)

    monkeypatch.setattr(TrainingRun, "track", watched)


# Steps of several tasks


def tasks_of_glyphs(script, glyph_dir, *options):
    """Return config, data, a tiny encoder, three tasks [3, 8] and views that change nothing."""
    small = ["--n_way=2", "--k_shot=2", "--n_query=2", "--dataset=glyphs", *options]
    cfg = parse_config(script.Config, [*small, f"--data_dir={glyph_dir}"])
    data = load_training_data("glyphs", str(glyph_dir), CPU)
    encoder = Encoder(8, 4, (1, 1, 1, 1), 2, 8).train()
    whole = torch.tensor([[0, 0, 32, 32]]).expand(24, 4)
    return cfg, data, encoder, torch.randperm(300)[:24].view(3, 8), (whole, torch.zeros(24).bool())


def statistics_of(encoder):
    return [buffer.clone() for buffer in encoder.buffers() if buffer.is_floating_point()]


def assert_sums(together, single, divisor=1):
    """together: tensors; single: for each task the same tensors, whose sum over the tasks they are.

    Divided by `divisor`.
    """
    for found, *alone in zip(together, *single, strict=True):
        assert (found - sum(alone) / divisor).norm() < 1e-4 * max(1, found.norm())


def test_a_step_of_several_episodes_has_the_mean_of_their_gradients(glyph_dir):
    cfg, data, encoder, episodes, (boxes, flips) = tasks_of_glyphs(
        train_protonet, glyph_dir, "--episodes_per_step=3"
    )

    def learn(cfg, episodes):
        copy = deepcopy(encoder)
        count = episodes.numel()
        workers = Workers(CPU, len(episodes), copy)
        learned = train_protonet.learn_episodes(
            cfg, data, copy, workers, episodes.flatten(), boxes[:count], flips[:count]
        )
        gradients = [parameter.grad for parameter in copy.parameters()]
        return [*learned, *gradients, *statistics_of(copy)]

    together = learn(cfg, episodes)
    cfg.episodes_per_step = 1
    assert_sums(together, [learn(cfg, episode[None]) for episode in episodes], divisor=3)


def test_an_outer_step_has_the_sum_of_the_gradients_of_its_tasks(glyph_dir):
    cfg, data, encoder, tasks, views = tasks_of_glyphs(train_protomaml, glyph_dir)
    images = [data.normalize(data.train.images[task]) for task in tasks]
    single = [train_protomaml.learn_task(cfg, encoder, task, None) for task in images]
    losses, accuracies, gradients, statistics = zip(*single)
    workers = Workers(CPU, 3, encoder)
    found = train_protomaml.learn_tasks(cfg, data, encoder, workers, tasks.flatten(), *views)
    assert_sums(found, zip(losses, accuracies), divisor=3)
    assert_sums([parameter.grad for parameter in encoder.parameters()], gradients)
    assert_sums(statistics_of(encoder), statistics, divisor=3)


def test_validation_adapts_to_each_episode_and_leaves_the_encoder_alone(glyph_dir):
    cfg, data, encoder, episodes, _ = tasks_of_glyphs(train_protomaml, glyph_dir)
    images = data.normalize(data.train.images)
    single = [
        train_protomaml.learn_task(cfg, encoder, images[episode], None)[:2] for episode in episodes
    ]
    before = deepcopy(encoder.state_dict())
    workers = Workers(CPU, 3, encoder)
    found = train_protomaml.validation_step(cfg, encoder, workers, 2, images, episodes)
    for values, expected in zip(found, zip(*single), strict=True):
        torch.testing.assert_close(values, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, before.values(), encoder.state_dict().values()))


# Options

OPTIONS = {  # another value for each option that decides what is learned
    "split": "other.json",
    "least_crop": 0.5,
    "color_jitter": 0.6,
    "label_smoothing": 0.3,
    "n_way": 3,
    "k_shot": 1,
    "n_query": 1,
    "episodes_per_step": 2,
    "tasks_per_step": 2,
    "val_way": 3,
    "val_episodes": 1,
    "proto_dim": 4,
    "stem_stride": 1,
    "principal_features": "true",
    "output_init": "zeros",
    "num_inner_steps": 2,
    "lr_inner": 0.2,
    "lr_output": 0.2,
    "epochs": 1,
    "batch_size": 12,
    "lr": 5e-3,
    "lr_drops": 0.4,
    "weight_decay": 0.5,
    "steps_per_epoch": 1,
    "seed": 1,
    "precision": "bfloat16",
}
# Where a run gets its data, where it computes and where its files go; and what has other tests: a
# start from a file, a folder's images, how a run goes on.
OTHERS = set(
    "recipe dataset data_dir image_size device cuda_graphs checkpoint_dir resume overwrite "
    "init_from batchnorm teacher distillation_weight temperature".split()
)


def learned(model, glyph_dir, folder, monkeypatch, *more):
    """Return what a run of a few steps learned: weights, curves, and its classes."""
    use_tiny_encoder(model, monkeypatch)
    own = {"protomaml": ["--tasks_per_step=1", "--val_episodes=2"]}.get(model, [])
    train(model, glyph_dir, folder, "--epochs=2", "--steps_per_epoch=2", *own, *more)
    (last,) = map(load_checkpoint, folder.glob("glyphs/*_last.pt"))
    return content_digest([last[name] for name in ("history", "state_dict", "class_split")])


@pytest.mark.parametrize("model", TRAINERS)
def test_every_option_changes_what_is_learned(model, glyph_dir, tmp_path, monkeypatch):
    names = [field.name for field in dataclasses.fields(TRAINERS[model][0].Config)]
    assert set(names) <= OPTIONS.keys() | OTHERS
    classes = load_dataset("glyphs", str(glyph_dir)).class_names
    monkeypatch.chdir(tmp_path)
    for name, ends in ("default", (12, 16)), ("other", (11, 16)):  # of training and validation
        parts = classes[: ends[0]], classes[ends[0] : ends[1]], classes[ends[1] :]
        split = dict(zip(("train", "val", "test"), parts))
        (tmp_path / f"{name}.json").write_text(json.dumps(split))

    def learned_with(*options):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        default = "--split=default.json"
        return learned(model, glyph_dir, tmp_path / "run", monkeypatch, default, *options)

    by_default = learned_with()
    assert learned_with("--overwrite=true") == by_default
    options = [f"--{name}={OPTIONS[name]}" for name in names if name in OPTIONS]
    assert [option for option in options if learned_with(option) == by_default] == []


# Learning rates


def rates_of(model, glyph_dir, folder, monkeypatch, *more):
    """Return the learning rate of the optimizer in each step, and that recorded for each epoch."""
    rates = []
    use_tiny_encoder(model, monkeypatch)
    watch_steps(monkeypatch, lambda run, loss: rates.append(run.optimizer.param_groups[0]["lr"]))
    train(model, glyph_dir, folder, *more)
    history = load_checkpoint(folder / "glyphs" / f"{model}_last.pt")["history"]
    return rates, [row["lr"] for row in history]


@pytest.mark.parametrize("model", ["protonet", "protomaml"])
def test_the_learning_rate_drops_tenfold_after_7_and_after_9_of_10_epochs(
    model, glyph_dir, tmp_path, monkeypatch
):
    more = ["--epochs=10", "--steps_per_epoch=1", "--lr=1e-3"]
    rates, recorded = rates_of(model, glyph_dir, tmp_path, monkeypatch, *more)
    assert rates == pytest.approx([1e-3] * 7 + [1e-4] * 2 + [1e-5])
    assert recorded == rates


def test_the_classifiers_learning_rate_makes_one_cycle_over_all_steps(
    glyph_dir, tmp_path, monkeypatch
):
    more = ["--epochs=4", "--steps_per_epoch=5", "--lr=1e-3"]
    rates, recorded = rates_of("classifier", glyph_dir, tmp_path, monkeypatch, *more)
    assert len(rates) == 20
    assert rates[:5] == sorted(rates[:5]) and rates[4] == pytest.approx(1e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 2e-5
    assert recorded == rates[::5]


# The classifier


def test_the_teachers_part_of_the_loss_is_cross_entropy_with_its_probabilities(
    glyph_dir, tmp_path, monkeypatch
):
    path = train("classifier", glyph_dir, tmp_path / "teacher", "--steps_per_epoch=3")
    data = load_training_data("glyphs", str(glyph_dir), CPU)
    encoder, prototypes = train_classifier.load_teacher(path, data, CPU)
    seen, losses, images = [], [], []
    cross_entropy, normalize = torch.nn.functional.cross_entropy, type(data).normalize

    def watch(logits, target, **options):
        seen.append((logits.detach(), target, options))
        return cross_entropy(logits, target, **options)

    def keep(data, pixels):
        images.append(normalize(data, pixels))
        return images[-1]

    monkeypatch.setattr(train_classifier.F, "cross_entropy", watch)
    monkeypatch.setattr(train_classifier, "mean_episode_loss", lambda *arguments: (0.0, 0.0))
    monkeypatch.setattr(type(data), "normalize", keep)
    watch_steps(monkeypatch, lambda run, loss: losses.append(loss.item()))
    more = [f"--teacher={path}", "--distillation_weight=0.3", "--temperature=3"]
    train("classifier", glyph_dir, tmp_path, "--steps_per_epoch=3", *more)

    assert len(losses) == 3 and len(seen) == 6
    for step, loss in enumerate(losses):
        (logits, labels, options), (same, taught, _) = seen[2 * step : 2 * step + 2]
        assert torch.equal(logits, same) and options == {"label_smoothing": 0.1}
        with torch.no_grad():  # the same augmented images, [B, C] squared distances by hand
            distances = torch.cdist(encoder(images[step - 3]), prototypes).square()
        assert torch.allclose(taught, (-distances / 3).softmax(dim=1), atol=1e-4)
        assert taught.max() < 1 and not taught.requires_grad
        by_labels = cross_entropy(logits, labels, label_smoothing=0.1).item()
        by_teacher = -(taught * logits.log_softmax(dim=1)).sum(dim=1).mean().item()
        assert loss == pytest.approx(0.7 * by_labels + 0.3 * by_teacher, rel=1e-5)


def test_the_teachers_prototypes_are_the_mean_features_of_each_class(glyph_dir, tmp_path):
    data = load_training_data("glyphs", str(glyph_dir), CPU)
    path = train("classifier", glyph_dir, tmp_path, "--steps_per_epoch=1", "--proto_dim=4")
    encoder, found = train_classifier.load_teacher(path, data, CPU)
    assert not encoder.training
    assert found.shape == (len(data.train.class_names), 4)
    with torch.no_grad():
        images = data.normalize(data.train.images[data.train.labels == 3])
        assert torch.allclose(found[3], encoder(images).mean(dim=0), atol=1e-5)


def test_principal_features_are_validated_and_kept_and_training_goes_on_with_its_own(
    glyph_dir, tmp_path
):
    more = ["--steps_per_epoch=3", "--principal_features=true"]
    path = train("classifier", glyph_dir, tmp_path, *more)
    best = load_checkpoint(path)["state_dict"]
    last = load_checkpoint(path.with_name("classifier_last.pt"))["state_dict"]
    differing = [name for name in best if not torch.equal(best[name], last[name])]
    assert differing == ["classifier.weight", "classifier.bias"]
    directions = best["classifier.weight"]
    assert torch.allclose(directions @ directions.T, torch.eye(len(directions)), atol=1e-5)


@pytest.mark.parametrize(
    ("script", "option", "model", "more"),
    [
        (train_classifier, "teacher", "classifier", {}),
        (train_protonet, "init_from", "protonet", {}),
        (train_protomaml, "init_from", "protomaml", {}),
        (train_protomaml, "init_from", "maml", {"output_init": "zeros"}),
    ],
)
def test_a_file_to_start_from_that_the_run_would_overwrite_is_refused(script, option, model, more):
    path = {option: f"checkpoints/../checkpoints/cifar100/{model}.pt"}
    with pytest.raises(UserError, match=f"{option} is .*{model}.pt, which the run would overwrite"):
        script.Config(**path, **more)
    script.Config(**path, **more, checkpoint_dir="elsewhere")


@pytest.mark.parametrize("option", [{"distillation_weight": 0.3}, {"temperature": 3.0}])
def test_options_of_a_teacher_are_refused_without_one(option):
    with pytest.raises(UserError, match="does nothing without a teacher"):
        train_classifier.Config(**option)
    train_classifier.Config(**option, teacher="teacher.pt")


@pytest.mark.parametrize(
    ("count", "size", "shape"), [(10, 3, (3, 3)), (9, 3, (3, 3)), (2, 5, (1, 2))]
)
def test_an_epoch_of_the_classifier_takes_every_image_at_most_once(count, size, shape):
    batches = train_classifier.random_batches(count, size, torch.Generator().manual_seed(0))
    assert batches.shape == shape and batches.dtype == torch.int64
    images = batches.flatten().tolist()
    assert len(set(images)) == len(images) and set(images) <= set(range(count))


# Starting from a checkpoint


def test_frozen_statistics_need_a_trained_encoder():
    with pytest.raises(UserError, match="--init_from"):
        train_protomaml.Config(batchnorm="frozen")


def test_protomaml_starts_from_a_classifier_and_frozen_statistics_stay(glyph_dir, tmp_path):
    path = train("classifier", glyph_dir, tmp_path, "--steps_per_epoch=3")
    start = load_checkpoint(path)
    more = [f"--init_from={path}", "--batchnorm=frozen", "--steps_per_epoch=1", "--lr=1e-6"]
    found = load_checkpoint(train("protomaml", glyph_dir, tmp_path, *more))
    assert found["encoder"] == start["encoder"]
    for name, tensor in start["state_dict"].items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(found["state_dict"][name], tensor), name
        else:  # one step of AdamW moves a weight by the learning rate at the most
            assert (found["state_dict"][name] - tensor).abs().max() < 1e-4, name


def test_protonet_starts_from_a_classifier_keeps_its_encoder_and_can_be_tested(glyph_dir, tmp_path):
    options = ["--steps_per_epoch=3", "--proto_dim=5", "--stem_stride=1"]
    path = train("classifier", glyph_dir, tmp_path, *options)
    start = load_checkpoint(path)
    names = ("proto_dim", "unit_features", "stem_stride")
    assert [start["encoder"][name] for name in names] == [5, True, 1]
    more = [f"--init_from={path}", "--steps_per_epoch=1", "--lr=1e-6"]
    with pytest.raises(
        UserError, match="proto_dim is 7, but .* has features of 5 numbers; pass --proto_dim=5"
    ):
        train("protonet", glyph_dir, tmp_path, *more, "--proto_dim=7")
    found_path = train("protonet", glyph_dir, tmp_path, *more)
    found = load_checkpoint(found_path)
    assert found["model"] == "protonet" and found["encoder"] == start["encoder"]
    for name, weight in start["state_dict"].items():
        if "running" not in name and "num_batches" not in name:
            assert (found["state_dict"][name] - weight).abs().max() < 1e-4, name

    arguments = [
        "--dataset=glyphs",
        "--domains=",
        f"--data_dir={glyph_dir}",
        f"--protonet={found_path}",
        "--k_shots=2",
        "--device=cpu",
        f"--results_dir={tmp_path / 'results'}",
    ]
    assert evaluate.main(parse_config(evaluate.Config, arguments)) == 0
    rows = json.loads((tmp_path / "results" / "accuracy.json").read_text())
    assert [row["model"] for row in rows] == ["protonet", "pixels"]


def test_a_run_that_started_from_a_checkpoint_resumes_with_its_feature_length(glyph_dir, tmp_path):
    path = train("classifier", glyph_dir, tmp_path, "--steps_per_epoch=1", "--proto_dim=5")
    more = [f"--init_from={path}", "--steps_per_epoch=1"]
    train("protonet", glyph_dir, tmp_path, *more)
    train("protonet", glyph_dir, tmp_path, *more, "--epochs=2", "--resume=true")
    last = load_checkpoint(tmp_path / "glyphs" / "protonet_last.pt")
    assert (last["epoch"], last["encoder"]["proto_dim"]) == (2, 5)


@pytest.mark.parametrize(
    ("model", "option"),
    [("protomaml", "init_from"), ("protonet", "init_from"), ("classifier", "teacher")],
)
def test_a_start_from_other_classes_is_refused(model, option, glyph_dir, tmp_path):
    split = load_training_data("glyphs", str(glyph_dir), CPU).split
    encoder, path = Encoder(), tmp_path / "other.pt"
    contents = {
        "format": FORMAT,
        "model": "classifier",
        "dataset": "glyphs",
        "config": {},
        "epoch": 1,
        "val_accuracy": 0.5,
        "encoder": encoder.arguments,
        "state_dict": encoder.state_dict(),
        "class_split": {**split, "train": split["train"][::-1]},
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.2, 0.2),
        "data_digest": None,
    }
    save_checkpoint(path, contents)
    with pytest.raises(UserError, match="other classes"):
        train(model, glyph_dir, tmp_path / "new", f"--{option}={path}")
    assert not (tmp_path / "new").exists()
    # The same file is taken where its classes are those of the run.
    save_checkpoint(path, {**contents, "class_split": split})
    train(model, glyph_dir, tmp_path / "new", f"--{option}={path}", "--steps_per_epoch=1")


def test_a_checkpoint_names_the_size_of_the_images_whether_of_a_folder_or_a_file(
    glyph_dir, tmp_path
):
    glyphs = load_dataset("glyphs", str(glyph_dir))
    images = F.interpolate(glyphs.images.float(), size=(40, 40)).byte().permute(0, 2, 3, 1)
    arrays = {"images": images.numpy(), "labels": glyphs.labels.numpy()}
    np.savez(tmp_path / "mine.npz", **arrays, class_names=np.array(glyphs.class_names))
    where = ["--dataset=mine", f"--data_dir={tmp_path}", "--steps_per_epoch=1"]
    train("protonet", glyph_dir, tmp_path, *where)
    train("protonet", glyph_dir, tmp_path, *where, "--epochs=2", "--resume=true")
    checkpoint = load_checkpoint(tmp_path / "mine" / "protonet.pt")
    assert checkpoint["image_shape"] == [40, 40]
    # A test reads folders at that size, and a data set of other images is not tested.
    tested = [*where[:2], f"--checkpoint_dir={tmp_path}", f"--results_dir={tmp_path / 'results'}"]
    tested += ["--domains=glyph_digits", "--k_shots=2", "--device=cpu"]
    assert evaluate.main(parse_config(evaluate.Config, tested)) == 1
    written = (tmp_path / "results" / "accuracy.md").read_text()
    assert "glyph_digits: not tested." in written and "not 40x40" in written


def test_a_test_tells_of_changed_images_and_of_older_figures(glyph_dir, tmp_path, capsys):
    with np.load(glyph_dir / "glyphs.npz") as arrays:
        mine = dict(arrays)
    np.savez(tmp_path / "mine.npz", **mine)
    where = ["--dataset=mine", f"--data_dir={tmp_path}"]
    train("protonet", glyph_dir, tmp_path, *where, "--steps_per_epoch=1")
    mine["images"] = mine["images"][:, ::-1]
    results = tmp_path / "results"
    results.mkdir()
    (results / "confusion_maml_mine.png").touch()
    (results / "my own.png").touch()
    where += [f"--checkpoint_dir={tmp_path}", f"--results_dir={results}"]
    printed = []
    for images in (mine["images"][:, ::-1], mine["images"]):
        np.savez(tmp_path / "mine.npz", **{**mine, "images": images})
        options = [*where, "--k_shots=2", "--device=cpu"]
        assert evaluate.main(parse_config(evaluate.Config, options)) == 0
        printed.append(capsys.readouterr().out)
    changed = f"mine has changed since {tmp_path / 'mine' / 'protonet.pt'} was trained on it"
    assert [changed in text for text in printed] == [False, True]
    assert "of an earlier test, not of this one: confusion_maml_mine.png\n" in printed[0]


def test_images_of_another_size_than_in_training_are_not_tested(glyph_dir, tmp_path, capsys):
    train("protonet", glyph_dir, tmp_path, "--steps_per_epoch=1")
    digits = load_dataset("glyph_digits", str(glyph_dir))
    images = F.interpolate(digits.images.float(), size=(64, 64)).byte().permute(0, 2, 3, 1)
    arrays = {"images": images.numpy(), "labels": digits.labels.numpy()}
    shutil.copy(glyph_dir / "glyphs.npz", tmp_path)
    np.savez(tmp_path / "large.npz", **arrays, class_names=np.array(digits.class_names))
    options = ["--dataset=glyphs", "--k_shots=2", "--device=cpu", "--domains=large"]
    where = [f"--data_dir={tmp_path}", f"--checkpoint_dir={tmp_path}", f"--results_dir={tmp_path}"]
    assert evaluate.main(parse_config(evaluate.Config, [*options, *where])) == 1
    line = "large: not tested. the images of large are 64x64 pixels, but the models were trained on"
    assert f"{line} 32x32" in capsys.readouterr().out


def test_what_a_run_prints_last_tests_what_it_trained(glyph_dir, tmp_path, capsys):
    folder = tmp_path / "my models"
    train("protonet", glyph_dir, folder, "--steps_per_epoch=1")
    command = capsys.readouterr().out.splitlines()[-1].split("; next: ")[1]
    python, script, *options = shlex.split(command)
    assert (python, script) == ("python", "evaluate.py")
    cfg = parse_config(evaluate.Config, options)
    assert (cfg.dataset, cfg.data_dir) == ("glyphs", str(glyph_dir))
    assert cfg.checkpoint_dir == str(folder)


# Memory


@pytest.mark.parametrize("model", TRAINERS)
def test_memory_is_flat_over_2000_steps(model, glyph_dir, tmp_path, monkeypatch):
    # What could grow is what the loop keeps of each step, not the step itself.
    use_tiny_encoder(model, monkeypatch)
    tensors, peaks, steps = [], [], 0

    def look(run, loss):
        nonlocal steps
        steps += 1
        if steps in (200, 2000):
            tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    watch_steps(monkeypatch, look)
    small = ["--k_shot=1", "--n_query=1", "--epochs=22"]
    own = {"classifier": ["--batch_size=4"], "protomaml": ["--tasks_per_step=1"]}
    train(model, glyph_dir, tmp_path, *small, *own.get(model, []))
    assert steps >= 2000
    assert tensors[1] <= tensors[0] + 5
    assert peaks[1] - peaks[0] < 30 * 1024  # KiB
