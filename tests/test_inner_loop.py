"""The inner loop: adaptation and its first-order gradient, against both written out in float64."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from stress import moved_encoder

import train_protomaml
from common.augment import Views
from common.inner_loop import InnerLoop, copy_weights
from common.prototypes import episode_labels

# Tiny networks: threads would only wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")

N_WAY, K_SHOT, NUM_QUERY, DIM = 3, 2, 4, 8
Y_SPT, Y_QRY = episode_labels(N_WAY, K_SHOT), episode_labels(N_WAY, NUM_QUERY)
# Unequal rates, so that a mix-up of the two is noticed.
LR_INNER, LR_OUTPUT = 0.05, 0.11
KINDS = pytest.mark.parametrize(
    "output_init, batchnorm",
    [("prototypes", "batch"), ("prototypes", "frozen"), ("zeros", "batch"), ("zeros", "frozen")],
)
STEPS = pytest.mark.parametrize("steps", [1, 3])


def new_encoder(seed=0):
    torch.manual_seed(seed)
    return moved_encoder().double()


def new_task(seed=1):
    """Support and query images."""
    generator = torch.Generator().manual_seed(seed)
    size = (N_WAY * (K_SHOT + NUM_QUERY), 3, 32, 32)
    images = torch.randn(size, generator=generator, dtype=torch.float64)
    return images.split([N_WAY * K_SHOT, N_WAY * NUM_QUERY])


def adapt(encoder, x_spt, steps, output_init="prototypes", batchnorm="batch", learn=True):
    """Adapt a copy by the InnerLoop of a test; return (copy, weight, bias)."""
    loop = InnerLoop(steps, learn * LR_INNER, learn * LR_OUTPUT, output_init, batchnorm)
    local, support = deepcopy(encoder), torch.arange(len(x_spt))
    y_spt = episode_labels(N_WAY, len(x_spt) // N_WAY)
    return local, *loop.adapt(encoder, Views(x_spt), support, y_spt, N_WAY, local)


def task_gradients(encoder, copies, images, steps, output_init):
    """Call the trainer for one task; return (loss, accuracy, gradients, statistics)."""
    sizes = {"n_way": N_WAY, "k_shot": K_SHOT, "n_query": NUM_QUERY}
    rates = {"lr_inner": LR_INNER, "lr_output": LR_OUTPUT}
    cfg = SimpleNamespace(**sizes, **rates, num_inner_steps=steps, output_init=output_init)
    return train_protomaml.task_gradients(cfg, encoder, copies, torch.cat(images))


def everything(encoder):
    """All that adaptation must leave alone: parameters, buffers, gradients, modes."""
    gradients = [torch.tensor([]) if p.grad is None else p.grad for p in encoder.parameters()]
    modes = torch.tensor([module.training for module in encoder.modules()])
    return [tensor.clone() for tensor in (*encoder.state_dict().values(), *gradients, modes)]


def assert_same_bits(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def cross_entropy_by_hand(logits, labels):
    of_each = [logits[row].log_softmax(0)[label] for row, label in enumerate(labels.tolist())]
    return -sum(of_each) / len(labels)


def by_hand(encoder, x_spt, x_qry, steps, output_init, batchnorm):
    """Return (query loss, accuracy, gradient, adapted weights), from the definition.

    First order: the query loss, a function of adapted weights theta' = theta - lr g and
    W' = W0(theta) - lr h, is differentiated with g and h held constant. So
    dL/dtheta = dL/dtheta' + dL/dW' dW0/dtheta, and b like W.
    """
    names = [name for name, _ in encoder.named_parameters()]

    def features(parameters, images):
        tensors = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        tensors.update(zip(names, parameters))
        model = deepcopy(encoder).train(batchnorm == "batch")
        return torch.func.functional_call(model, tensors, (images,))

    theta = [parameter.detach().clone().requires_grad_() for parameter in encoder.parameters()]
    if output_init == "prototypes":
        support = features(theta, x_spt)
        of_class = [support[c * K_SHOT : (c + 1) * K_SHOT] for c in range(N_WAY)]
        v = torch.stack([sum(shots) / K_SHOT for shots in of_class])
        weight0, bias0 = 2 * v, -(v * v).sum(dim=1)
    else:
        weight0 = torch.zeros(N_WAY, DIM, dtype=torch.float64)
        bias0 = torch.zeros(N_WAY, dtype=torch.float64)

    adapted = [tensor.detach().clone() for tensor in (*theta, weight0, bias0)]
    rates = [LR_INNER] * len(theta) + [LR_OUTPUT] * 2
    for _ in range(steps):
        adapted = [tensor.requires_grad_() for tensor in adapted]
        logits = features(adapted[:-2], x_spt) @ adapted[-2].T + adapted[-1]
        gradients = torch.autograd.grad(cross_entropy_by_hand(logits, Y_SPT), adapted)
        stepped = zip(adapted, rates, gradients, strict=True)
        adapted = [(tensor - rate * gradient).detach() for tensor, rate, gradient in stepped]

    adapted = [tensor.requires_grad_() for tensor in adapted]
    logits = features(adapted[:-2], x_qry) @ adapted[-2].T + adapted[-1]
    loss = cross_entropy_by_hand(logits, Y_QRY)
    *direct, d_weight, d_bias = torch.autograd.grad(loss, adapted)
    if output_init == "prototypes":
        through_prototypes = torch.autograd.grad([weight0, bias0], theta, [d_weight, d_bias])
        direct = [a + b for a, b in zip(direct, through_prototypes)]
    right = (logits.argmax(dim=1) == Y_QRY).float().mean()
    return loss.item(), right.item(), direct, [tensor.detach() for tensor in adapted]


@KINDS
@STEPS
def test_the_first_order_gradient_equals_the_one_written_by_hand(steps, output_init, batchnorm):
    encoder, task = new_encoder().train(batchnorm == "batch"), new_task()
    loss, share, expected, _ = by_hand(encoder, *task, steps, output_init, batchnorm)
    copies = deepcopy(encoder), deepcopy(encoder)
    found = task_gradients(encoder, copies, task, steps, output_init)
    assert (found[0].item(), found[1].item()) == pytest.approx((loss, share), rel=1e-6)
    atol = 1e-10 * max(tensor.abs().max().item() for tensor in expected)
    for gradient, tensor in zip(found[2], expected, strict=True):
        torch.testing.assert_close(gradient, tensor, rtol=1e-7, atol=atol)


@KINDS
@STEPS
def test_the_adapted_weights_equal_those_written_by_hand(steps, output_init, batchnorm):
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    expected = by_hand(encoder, x_spt, x_qry, steps, output_init, batchnorm)[3]
    local, *head = adapt(encoder, x_spt, steps, output_init, batchnorm)
    for tensor, other in zip([*local.parameters(), *head], expected, strict=True):
        torch.testing.assert_close(tensor.detach(), other, rtol=1e-8, atol=1e-10)


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_adaptation_leaves_the_encoder_as_it_was_to_the_last_bit(training, output_init, batchnorm):
    encoder, task = new_encoder().train(training), new_task()
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)  # as after an earlier outer step
    before = everything(encoder)
    adapt(encoder, task[0], 2, output_init, batchnorm)
    task_gradients(encoder, (deepcopy(encoder), deepcopy(encoder)), task, 2, output_init)
    assert_same_bits(before, everything(encoder))


@KINDS
def test_copies_that_an_earlier_task_used_give_the_bits_of_fresh_ones(output_init, batchnorm):
    encoder, results = new_encoder().train(batchnorm == "batch"), []
    other = new_encoder(5).train(batchnorm == "batch")  # as the encoder was an outer step before
    used, fresh = ([deepcopy(model), deepcopy(model)] for model in (other, encoder))
    task_gradients(other, used, new_task(2), 2, output_init)
    for copies in (used, fresh):
        found = task_gradients(encoder, copies, new_task(1), 2, output_init)
        results.append([*found[:2], *found[2], *found[3], *everything(copies[1])])
    assert_same_bits(*results)


def named_statistics(model):
    buffers = model.named_buffers()
    return {name: buffer.clone() for name, buffer in buffers if buffer.is_floating_point()}


@pytest.mark.parametrize("batchnorm", ["batch", "frozen"])
@STEPS
def test_without_learning_the_adapted_model_is_a_protonet(steps, batchnorm):
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    local, weight, bias = adapt(encoder, x_spt, steps, batchnorm=batchnorm, learn=False)
    statistics = named_statistics(local)
    found = F.linear(local(x_qry), weight, bias).softmax(dim=1)

    plain = deepcopy(encoder).train(batchnorm == "batch")
    for _ in range(steps):  # each pass moves the running statistics
        prototypes = plain(x_spt).view(N_WAY, K_SHOT, DIM).mean(dim=1)
    for name, expected in named_statistics(plain).items():
        torch.testing.assert_close(statistics[name], expected, rtol=1e-9, atol=1e-12)
    expected = (-torch.cdist(plain(x_qry), prototypes).square()).softmax(dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_first_step_from_a_zero_output_layer_moves_only_that_layer():
    # With W = 0 the loss does not depend on the features; from prototypes or a step later it does.
    encoder, (x_spt, _) = new_encoder(), new_task()
    cases = ((1, "zeros", False), (2, "zeros", True), (1, "prototypes", True))
    for steps, output_init, moved in cases:
        local, weight, _ = adapt(encoder, x_spt, steps, output_init)
        pairs = zip(local.parameters(), encoder.parameters())
        assert all(torch.equal(a, b) for a, b in pairs) is not moved
        assert weight.abs().max() > 0


def test_copying_weights_copies_parameters_and_statistics_into_the_same_tensors():
    source, target = new_encoder(0), new_encoder(5)
    places = [tensor.data_ptr() for tensor in target.state_dict().values()]
    copy_weights(source, target)
    assert_same_bits(source.state_dict().values(), target.state_dict().values())
    assert [tensor.data_ptr() for tensor in target.state_dict().values()] == places


@pytest.mark.parametrize("output_init", ["prototypes", "zeros"])
def test_classes_of_any_sizes_in_any_order_count_alike_and_no_image_is_repeated(output_init):
    encoder, (_, images) = new_encoder(), new_task()
    labels = torch.tensor([1, 0, 2, 1, 2, 1, 2, 1])  # 1, 4 and 3 images
    loop, sizes = InnerLoop(2, LR_INNER, LR_OUTPUT, output_init, "frozen"), []
    local = deepcopy(encoder)
    local.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    task = torch.arange(8), labels, N_WAY
    found = loop.adapt(encoder, Views(images), *task, local)
    assert set(sizes) == {8}
    # Each image as often as makes all classes equally large.
    repeats = torch.tensor([12, 3, 4])[labels]
    order = labels.argsort(stable=True)
    repeated = torch.arange(8)[order].repeat_interleave(repeats[order])
    task = repeated, labels[repeated], N_WAY
    expected = loop.adapt(encoder, Views(images), *task, other := deepcopy(encoder))
    pairs = zip([*found, *local.parameters()], [*expected, *other.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in pairs)
