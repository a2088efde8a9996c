"""The trainers' steps and the k-shot test on a GPU, against the CPU in float64.

python -m pytest -k cuda        with a GPU: two minutes; elsewhere tiny encoders on the CPU
"""

from copy import deepcopy
from functools import partial
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from stress import TINY

import train_classifier
import train_protomaml
import train_protonet
from common.augment import AugmentedBatches, Views
from common.cuda_graph import WARM_UP, CudaGraphStep
from common.encoders import Encoder
from common.inner_loop import InnerLoop
from common.kshot import adapted_accuracies, support_sets
from common.optimizer import make_optimizer, set_learning_rate
from common.parallel import Workers

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
# Largest relative error of a gradient: four times that of float32 on a CPU.
BOUNDS = {"classifier": 0.03, "protonet": 0.05, "protomaml": 0.2, "maml": 0.03}
MODELS = pytest.mark.parametrize("model", BOUNDS)
INNER = {"num_inner_steps": 2, "lr_inner": 0.004, "lr_output": 0.004}  # larger ones: chaos


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch, one_thread):
    monkeypatch.setattr(CudaGraphStep, "failed", False)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def new_encoder(size, **options):
    """The tutorial's encoder for a GPU, else a tiny one, always with the same weights."""
    torch.manual_seed(0)
    return Encoder(**({} if size == "cuda" else TINY), **options).train()


def new_step(model, size, device="cpu", dtype=torch.float32, graphs=True):
    """Return (a trainer's step with a learning rate of 0, its encoder, its optimizer)."""
    device = torch.device(device)
    encoder = new_encoder(size, unit_features=model == "classifier").to(device, dtype)
    prototypes = torch.nn.Embedding(64, 64).to(device, dtype)  # a classifier's
    parameters = [*encoder.parameters(), *prototypes.parameters()]
    optimizer = make_optimizer(parameters, 0.0, 0.0, device)
    if model == "classifier":
        teacher = deepcopy(encoder).eval(), torch.randn(64, 64).to(device, dtype)
        learned = encoder, prototypes, teacher, optimizer
        step = partial(train_classifier.train_step, train_classifier.Config(), *learned)
    elif model == "protonet":
        step = partial(train_protonet.train_step, train_protonet.Config(), encoder, optimizer)
    else:
        cfg = train_protomaml.Config(**INNER)
        cfg.output_init = "zeros" if model == "maml" else "prototypes"
        workers = Workers(device, 10, lambda: (deepcopy(encoder), deepcopy(encoder)))
        step = partial(train_protomaml.train_step, cfg, encoder, optimizer, workers)
    return CudaGraphStep(step, device, graphs), encoder, optimizer


def new_batch(model, size, seed, device="cpu", dtype=torch.float32):
    """The inputs of a step: noise around a pattern for each class."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(64, 3, 32, 32, generator=generator)
    labels = torch.arange(5).repeat_interleave(4).repeat(2)  # an episode: support, then queries
    if model == "classifier":
        labels = torch.randint(64, (128 if size == "cuda" else 16,), generator=generator)
    elif model != "protonet":  # on a GPU more tasks than streams
        labels = labels.repeat(10 if size == "cuda" else 2)
    images = patterns[labels] + torch.randn(len(labels), 3, 32, 32, generator=generator)
    return [images.to(device, dtype), *([labels.to(device)] if model == "classifier" else [])]


def gradient_of(encoder):
    return torch.cat([p.grad.flatten() for p in encoder.parameters()]).double().cpu()


@DEVICES
@MODELS
def test_the_gradients_of_a_step_are_those_in_float64_however_often_it_runs(model, device):
    exact, reference, _ = new_step(model, device, dtype=torch.float64)
    expected = []
    for seed in range(3):
        loss = exact(*new_batch(model, device, seed, dtype=torch.float64))[0].item()
        expected.append((loss, gradient_of(reference)))
    for graphs in (False, True):
        step, encoder, _ = new_step(model, device, device, graphs=graphs)
        errors, differences = [], []
        for seed in (*range(3), *range(3)):
            (expected_loss, gradient), found = expected[seed], []
            for _ in range(WARM_UP + 1):  # a race between streams would show
                loss = step(*new_batch(model, device, seed, device))[0].item()
                assert loss == pytest.approx(expected_loss, rel=0.01)
                found.append(gradient_of(encoder))
            errors.append((found[-1] - gradient).norm() / gradient.norm())
            differences += [(g - found[-1]).norm() / gradient.norm() for g in found]
        assert median(errors) < BOUNDS[model] > max(differences), (errors, differences)
        assert (step.graph is not None) is (graphs and device == "cuda")


@DEVICES
@MODELS
def test_twenty_free_steps_learn_the_same_eager_and_recorded(model, device):
    losses = []
    for graphs in (False, True):
        step, encoder, optimizer = new_step(model, device, device, graphs=graphs)
        batches = [new_batch(model, device, seed, device) for seed in (0, 1)]
        set_learning_rate(optimizer, 1e-3)
        losses.append([step(*batches[number % 2])[0].item() for number in range(20)])
        weights = [parameter.detach().clone() for parameter in encoder.parameters()]
        set_learning_rate(optimizer, 0.0)  # a graph follows it
        step(*batches[0])
        assert all(map(torch.equal, weights, encoder.parameters()))
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.1)
    assert sum(losses[1][-4:]) < sum(losses[1][:4])


@DEVICES
def test_the_k_shot_test_counts_the_same_eager_and_recorded(device):
    labels = torch.arange(3).repeat_interleave(20)
    images = torch.randn(3, 3, 32, 32)[labels] + 2 * torch.randn(60, 3, 32, 32)
    images, labels = images.double().to(device), labels.to(device)
    encoder, sets = new_encoder("tiny").double().to(device), support_sets(labels, 4, "abc")
    encoder(images)  # running statistics of these images
    test = encoder.eval(), Views(images, 2), labels, sets, 3, 4
    how = InnerLoop(num_inner_steps=10, lr_inner=0.02, lr_output=0.02)
    plain, recorded = (adapted_accuracies(*test, how, graphs=way) for way in (False, True))
    assert len(plain) == 5 and len(plain.unique()) > 1 and not CudaGraphStep.failed
    assert (plain - recorded).abs().mean() < 0.001


@DEVICES
def test_augmented_batches_are_the_same_on_every_device(device):
    images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8)
    indices, epochs = torch.arange(60).view(5, 12), []
    for where in ("cpu", device):
        data = SimpleNamespace(train=SimpleNamespace(images=images.to(where)), normalize=torch.sqrt)
        batches = AugmentedBatches(data, indices, torch.Generator().manual_seed(0), 0.5, 0.3)
        epochs.append(torch.cat([*batches]).cpu())
    torch.testing.assert_close(*epochs, rtol=0, atol=1e-4)
