"""The training loops: learning rates, memory, starting from a checkpoint, the pre-training and frozen BatchNorm."""

import gc
import resource

import pytest
import torch

import train_protomaml
import train_protonet
from common.checkpoint import load_checkpoint
from common.config import UserError, parse_config
from common.encoder import Encoder

SCRIPTS = {"protonet": train_protonet, "protomaml": train_protomaml}
SMALL = ["--dataset=glyphs", "--device=cpu", "--n_way=2", "--k_shot=2", "--n_query=2", "--epochs=1"]


def train(script, glyph_dir, folder, *more):
    script.main(parse_config(script.Config, [*SMALL, f"--data_dir={glyph_dir}", f"--checkpoint_dir={folder}", *more], recipes=getattr(script, "RECIPES", None)))


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_learning_rate_drops_tenfold_at_epochs_140_and_180_of_200(script):
    cfg = script.Config()
    found = {epoch: script.learning_rate(cfg, epoch) / cfg.lr for epoch in (0, 139, 140, 179, 180, 199)}
    assert found == pytest.approx({0: 1, 139: 1, 140: 0.1, 179: 0.1, 180: 0.01, 199: 0.01})


@pytest.mark.parametrize("epochs", [1, 3, 5, 7, 15, 25])
def test_both_trainers_drop_the_learning_rate_at_the_same_share_of_the_epochs(epochs):
    drops = []
    for script in SCRIPTS.values():
        cfg = script.Config(epochs=epochs)
        drops.append([round(script.learning_rate(cfg, epoch) / cfg.lr, 6) for epoch in range(epochs)])
    assert drops[0] == drops[1]


def test_pre_training_goes_up_once_and_down_to_zero_and_episodes_follow():
    cfg = train_protonet.Config(epochs=12, pretrain_epochs=10)
    rates = [train_protonet.learning_rate(cfg, done / 10) for done in range(100)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(cfg.pretrain_lr)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.01 * cfg.pretrain_lr
    assert train_protonet.learning_rate(cfg, 10) == cfg.lr


def test_more_pre_training_than_epochs_is_refused():
    with pytest.raises(UserError, match="--pretrain_epochs=5"):
        parse_config(train_protonet.Config, ["--recipe=best", "--epochs=5"], recipes=train_protonet.RECIPES)


def test_frozen_statistics_need_a_trained_encoder():
    with pytest.raises(UserError, match="--init_from"):
        train_protomaml.Config(batchnorm="frozen")


def test_protomaml_starts_from_a_protonet_and_frozen_statistics_stay(glyph_dir, tmp_path):
    train(train_protonet, glyph_dir, tmp_path, "--steps_per_epoch=3", "--pretrain_epochs=1", "--unit_features=true", "--batch_size=16")
    start = load_checkpoint(tmp_path / "glyphs" / "protonet.pt")
    more = [f"--init_from={tmp_path / 'glyphs' / 'protonet.pt'}", "--batchnorm=frozen", "--tasks_per_step=3", "--steps_per_epoch=1", "--val_episodes=1"]
    train(train_protomaml, glyph_dir, tmp_path, *more, "--lr=1e-6")
    found = load_checkpoint(tmp_path / "glyphs" / "protomaml.pt")
    assert found["encoder"] == start["encoder"]
    for name, tensor in start["state_dict"].items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(found["state_dict"][name], tensor), name
        else:  # one step of AdamW moves a weight by the learning rate at the most
            assert (found["state_dict"][name] - tensor).abs().max() < 1e-4, name


def test_a_start_from_other_classes_is_refused(glyph_dir, tmp_path):
    train(train_protonet, glyph_dir, tmp_path, "--steps_per_epoch=1")
    path = tmp_path / "glyphs" / "protonet.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["class_split"]["train"].reverse()
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="other classes"):
        train(train_protomaml, glyph_dir, tmp_path, f"--init_from={path}")
    with pytest.raises(UserError, match="other classes"):
        train(train_protonet, glyph_dir, tmp_path / "new", f"--teacher={path}", "--pretrain_epochs=1")
    assert not (tmp_path / "new").exists()


CLASSIFY = ["--pretrain_epochs=1", "--unit_features=true", "--batch_size=16", "--steps_per_epoch=3"]


def test_the_teachers_share_of_the_loss_is_cross_entropy_with_its_probabilities(glyph_dir, tmp_path, monkeypatch):
    train(train_protonet, glyph_dir, tmp_path / "teacher", *CLASSIFY)
    teacher = f"--teacher={tmp_path / 'teacher' / 'glyphs' / 'protonet.pt'}"
    seen, losses, cross_entropy = [], [], torch.nn.functional.cross_entropy

    def watch(logits, target, **options):
        seen.append((logits.detach(), target, options))
        return cross_entropy(logits, target, **options)

    monkeypatch.setattr(train_protonet.F, "cross_entropy", watch)
    track = train_protonet.TrainingRun.track
    monkeypatch.setattr(train_protonet.TrainingRun, "track", lambda run, loss, accuracy: (losses.append(loss), track(run, loss, accuracy)))
    monkeypatch.setattr(train_protonet, "validate", lambda *arguments: (0.0, 0.0))
    train(train_protonet, glyph_dir, tmp_path, *CLASSIFY, teacher, "--teacher_share=0.3", "--teacher_temperature=3")
    for step, loss in enumerate(losses):
        (logits, labels, options), (same, taught, _) = seen[2 * step : 2 * step + 2]
        assert torch.equal(logits, same) and options == {"label_smoothing": 0.1}
        assert torch.allclose(taught.sum(dim=1), torch.ones(len(labels))) and taught.max() < 1 and not taught.requires_grad
        by_hand = -(taught * logits.log_softmax(dim=1)).sum(dim=1).mean()
        assert loss == pytest.approx(0.7 * cross_entropy(logits, labels, label_smoothing=0.1).item() + 0.3 * by_hand.item(), rel=1e-5)
    assert len(losses) == 3


def test_mean_features_are_the_means_of_the_images_of_each_class(glyph_dir):
    encoder = train_protonet.make_encoder(proto_dim=4).eval()
    glyphs = train_protonet.load_dataset("glyphs", str(glyph_dir))
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    found = train_protonet.mean_features(encoder, glyphs, mean, std)
    with torch.no_grad():
        images = train_protonet.normalize(glyphs.images[glyphs.labels == 3], mean, std)
        assert torch.allclose(found[3], encoder(images).mean(dim=0), atol=1e-5)
    assert found.shape == (len(glyphs.class_names), 4)


def test_principal_features_are_what_is_validated_and_kept_and_the_run_goes_on_with_its_own(glyph_dir, tmp_path):
    train(train_protonet, glyph_dir, tmp_path, *CLASSIFY, "--principal_features=true")
    best, last = (load_checkpoint(tmp_path / "glyphs" / name)["state_dict"] for name in ("protonet.pt", "protonet_last.pt"))
    assert [name for name in best if not torch.equal(best[name], last[name])] == ["classifier.weight", "classifier.bias"]
    directions = best["classifier.weight"]
    assert torch.allclose(directions @ directions.T, torch.eye(len(directions)), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"teacher": "some.pt"}, "--pretrain_epochs"),
        ({"teacher": "checkpoints/../checkpoints/cifar100/protonet.pt", "pretrain_epochs": 1}, "overwrite"),
        ({"principal_features": True, "pretrain_epochs": 200}, "--unit_features"),
        ({"principal_features": True, "unit_features": True, "pretrain_epochs": 199}, "--pretrain_epochs"),
    ],
)
def test_options_of_the_classification_that_would_do_nothing_or_harm_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        train_protonet.Config(**options)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_memory_is_flat_over_2000_steps(script, glyph_dir, tmp_path, monkeypatch):
    # A tiny encoder: what could grow is what the loop keeps of each step, not the step itself.
    monkeypatch.setattr(script, "make_encoder", lambda *arguments, **options: Encoder(8, 4, (1, 1, 1, 1), 2, 8, False))
    tensors, peaks = [], []
    track = script.TrainingRun.track

    def watch(run, loss, accuracy):
        track(run, loss, accuracy)
        watch.steps += 1
        if watch.steps in (200, 2000):
            tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    watch.steps = 0
    monkeypatch.setattr(script.TrainingRun, "track", watch)
    more = ["--tasks_per_step=1", "--val_episodes=1"] if script is train_protomaml else []
    train(script, glyph_dir, tmp_path, *more, "--epochs=50")
    assert watch.steps >= 2000
    assert tensors[1] <= tensors[0] + 5
    assert peaks[1] - peaks[0] < 30 * 1024  # KiB
