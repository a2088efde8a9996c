"""The inner loop: adaptation and its first-order gradient against both written out by hand in float64."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from common.encoder import make_encoder
from common.inner_loop import OUTPUT_INITS, adapt, copy_weights, first_order_gradients, follow_statistics, hand_over_gradients, statistics_of
from common.samplers import episode_labels

N_WAY, K_SHOT, NUM_QUERY, DIM = 3, 2, 4, 8
Y_SPT, Y_QRY = episode_labels(N_WAY, K_SHOT), episode_labels(N_WAY, NUM_QUERY)
# Unequal rates, so that one in the other's place is noticed.
LR_INNER, LR_OUTPUT = 0.05, 0.11


def new_encoder(seed=0):
    """A small DenseNet in float64 whose BatchNorm has seen some images: running statistics far from 0 and 1."""
    torch.manual_seed(seed)
    encoder = make_encoder(DIM, growth_rate=4, block_config=(2, 2, 2, 2), num_init_features=8).double()
    for _ in range(3):
        encoder(2 + 3 * torch.randn(10, 3, 32, 32, dtype=torch.float64))
    return encoder


def new_task(seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda count: torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(N_WAY * K_SHOT), draw(N_WAY * NUM_QUERY)


def inner_loop(steps, output_init="prototypes", lr_inner=LR_INNER, lr_output=LR_OUTPUT, **options):
    return {"num_inner_steps": steps, "lr_inner": lr_inner, "lr_output": lr_output, "output_init": output_init, **options}


def everything(encoder):
    """All that adaptation must leave alone: parameters, buffers, gradients."""
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    return {**state, **{f"{name}.grad": None if p.grad is None else p.grad.clone() for name, p in encoder.named_parameters()}}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor is None and second[name] is None) or torch.equal(tensor, second[name]), name


def outer_gradient(encoder, x_spt, x_qry, **options):
    """One task as the training script does it; returns (query loss, {name: gradient of the encoder})."""
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, **options)
    loss = F.cross_entropy(F.linear(local(x_qry), weight, bias), Y_QRY)
    names = [name for name, _ in encoder.named_parameters()]
    return loss.item(), dict(zip(names, first_order_gradients(loss, encoder, local), strict=True))


def by_hand(encoder, x_spt, x_qry, steps, output_init):
    """The same from the definition: explicit weights, explicit sums, autograd only for single derivatives.

    First order: the query loss, a function of adapted weights theta' = theta - lr g and W' = W0(theta) - lr h, is
    differentiated with g and h held constant. So dL/dtheta = dL/dtheta' + dL/dW' dW0/dtheta (and b like W).
    """
    names = [name for name, _ in encoder.named_parameters()]

    def features(parameters, images):
        # BatchNorm with the statistics of the batch; the running ones do not enter and are thrown away.
        buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        return torch.func.functional_call(deepcopy(encoder).train(), {**dict(zip(names, parameters)), **buffers}, (images,))

    def query_loss(parameters, weight, bias):
        logits = features(parameters, x_qry) @ weight.T + bias
        return -sum(logits[row].log_softmax(0)[label] for row, label in enumerate(Y_QRY.tolist())) / len(Y_QRY)

    theta = [parameter.detach().clone().requires_grad_() for parameter in encoder.parameters()]
    if output_init == "prototypes":
        support = features(theta, x_spt)
        v = torch.stack([sum(support[c * K_SHOT + shot] for shot in range(K_SHOT)) / K_SHOT for c in range(N_WAY)])
        weight0, bias0 = 2 * v, -(v * v).sum(dim=1)
    else:
        weight0, bias0 = torch.zeros(N_WAY, DIM, dtype=torch.float64), torch.zeros(N_WAY, dtype=torch.float64)

    adapted = [*(t.detach().clone() for t in theta), weight0.detach().clone(), bias0.detach().clone()]
    for _ in range(steps):
        adapted = [tensor.requires_grad_() for tensor in adapted]
        logits = features(adapted[:-2], x_spt) @ adapted[-2].T + adapted[-1]
        loss = -sum(logits[row].log_softmax(0)[label] for row, label in enumerate(Y_SPT.tolist())) / len(Y_SPT)
        rates = [LR_INNER] * len(theta) + [LR_OUTPUT] * 2
        adapted = [(tensor - rate * gradient).detach() for tensor, rate, gradient in zip(adapted, rates, torch.autograd.grad(loss, adapted))]

    adapted = [tensor.requires_grad_() for tensor in adapted]
    loss = query_loss(adapted[:-2], adapted[-2], adapted[-1])
    *direct, d_weight, d_bias = torch.autograd.grad(loss, adapted)
    if output_init == "prototypes":
        through_prototypes = torch.autograd.grad([weight0, bias0], theta, [d_weight, d_bias])
        direct = [a + b for a, b in zip(direct, through_prototypes)]
    return loss.item(), dict(zip(names, direct)), [tensor.detach() for tensor in adapted]


@pytest.mark.parametrize("share_first_pass", [True, False])
@pytest.mark.parametrize("output_init", OUTPUT_INITS)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_order_gradient_equals_the_one_written_by_hand(steps, output_init, share_first_pass):
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    expected_loss, expected, _ = by_hand(encoder, x_spt, x_qry, steps, output_init)
    loss, gradient = outer_gradient(encoder, x_spt, x_qry, **inner_loop(steps, output_init, share_first_pass=share_first_pass))
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    size = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(gradient[name], tensor, rtol=1e-7, atol=1e-10 * size, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("output_init", OUTPUT_INITS)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_adapted_weights_equal_those_written_by_hand(steps, output_init):
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    *expected, expected_weight, expected_bias = by_hand(encoder, x_spt, x_qry, steps, output_init)[2]
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, **inner_loop(steps, output_init))
    for (name, found), tensor in zip(local.named_parameters(), expected):
        torch.testing.assert_close(found.detach(), tensor, rtol=1e-8, atol=1e-10, msg=lambda text: f"{name}: {text}")  # noqa: B023
    torch.testing.assert_close(weight.detach(), expected_weight, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(bias.detach(), expected_bias, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"share_first_pass": False}, {"attached": False}, {"batchnorm": "frozen"}], ids=str)
@pytest.mark.parametrize("output_init", OUTPUT_INITS)
@pytest.mark.parametrize("training", [True, False])
def test_adaptation_leaves_the_encoder_as_it_was_to_the_last_bit(training, output_init, options):
    encoder, (x_spt, _) = new_encoder().train(training), new_task()
    # One with gradients on it, as after the first of several tasks.
    for p in encoder.parameters():
        p.grad = torch.ones_like(p)
    before = everything(encoder)
    adapt(encoder, x_spt, Y_SPT, N_WAY, **inner_loop(2, output_init, **options))
    assert_same_bits(before, everything(encoder))
    assert all(module.training is training for module in encoder.modules())


def test_gradients_that_lie_on_the_encoder_do_not_enter():
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    _, expected = outer_gradient(encoder, x_spt, x_qry, **inner_loop(1))
    for p in encoder.parameters():
        p.grad = torch.full_like(p, 3.0)
    _, gradient = outer_gradient(encoder, x_spt, x_qry, **inner_loop(1))
    assert_same_bits(expected, gradient)


@pytest.mark.parametrize("batchnorm", ["batch", "frozen"])
@pytest.mark.parametrize("output_init", OUTPUT_INITS)
def test_a_copy_that_is_used_again_gives_the_bits_of_a_fresh_one(output_init, batchnorm):
    encoder, options = new_encoder(), inner_loop(2, output_init, batchnorm=batchnorm)
    x_spt, x_qry = new_task(1)

    used, weight, bias = adapt(encoder, new_task(2)[0], Y_SPT, N_WAY, **options)
    first_order_gradients(F.linear(used.eval()(x_qry), weight, bias).sum(), encoder, used)
    results = []
    for local in (used, None):
        local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, local=local, **options)
        loss = F.cross_entropy(F.linear(local(x_qry), weight, bias), Y_QRY)
        gradients = first_order_gradients(loss, encoder, local)
        results.append({**everything(local), "weight": weight, "bias": bias, "loss": loss, **{str(number): g for number, g in enumerate(gradients)}})
        assert local.training is (batchnorm == "batch")
    assert_same_bits(*results)


def test_handing_over_sums_the_gradients_of_the_tasks():
    base = torch.nn.Linear(2, 1)
    base.weight.grad = torch.full_like(base.weight, 7.0)  # of an earlier step: it goes
    tasks = [[torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])], [torch.tensor([[10.0, 20.0]]), torch.tensor([30.0])]]
    for count, weight, bias in ((1, [[1.0, 2.0]], [3.0]), (2, [[11.0, 22.0]], [33.0])):
        hand_over_gradients(base, tasks[:count])
        assert base.weight.grad.tolist() == weight and base.bias.grad.tolist() == bias
    assert tasks[0][0].tolist() == [[1.0, 2.0]]  # what came in is not the sum


@pytest.mark.parametrize("share_first_pass", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_without_learning_the_adapted_model_is_a_protonet_with_batch_statistics(steps, share_first_pass):
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, **inner_loop(steps, lr_inner=0.0, lr_output=0.0, share_first_pass=share_first_pass))
    found = F.linear(local(x_qry), weight, bias).softmax(dim=1)

    plain = deepcopy(encoder).train()
    support, queries = plain(x_spt), plain(x_qry)
    prototypes = torch.stack([support[c * K_SHOT : (c + 1) * K_SHOT].mean(dim=0) for c in range(N_WAY)])
    expected = (-torch.cdist(queries, prototypes).square()).softmax(dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_without_learning_the_outer_gradient_is_that_of_a_protonet():
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    _, gradient = outer_gradient(encoder, x_spt, x_qry, **inner_loop(1, lr_inner=0.0, lr_output=0.0))
    plain = new_encoder().train()
    prototypes = plain(x_spt).view(N_WAY, K_SHOT, DIM).mean(dim=1)
    F.cross_entropy(-torch.cdist(plain(x_qry), prototypes).square(), Y_QRY).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-6, atol=1e-10)


def test_the_first_step_from_a_zero_output_layer_moves_only_that_layer():
    # With W = 0 the loss does not depend on the features; from prototypes, or a step later, it does.
    encoder, (x_spt, _) = new_encoder(), new_task()
    for steps, output_init, moved in ((1, "zeros", False), (2, "zeros", True), (1, "prototypes", True)):
        local, weight, _ = adapt(encoder, x_spt, Y_SPT, N_WAY, **inner_loop(steps, output_init))
        assert all(torch.equal(a, b) for a, b in zip(local.parameters(), encoder.parameters())) is not moved
        assert weight.abs().max() > 0


def test_zero_initialised_output_starts_from_chance():
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, **inner_loop(1, "zeros", lr_inner=0.0, lr_output=0.0))
    assert torch.equal(F.linear(local(x_qry), weight, bias), torch.zeros(N_WAY * NUM_QUERY, N_WAY, dtype=torch.float64))


@pytest.mark.parametrize("output_init", OUTPUT_INITS)
def test_more_steps_fit_the_support_set_better(output_init):
    encoder, (x_spt, _) = new_encoder(), new_task()
    losses = []
    for steps in (1, 4, 16):
        local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, **inner_loop(steps, output_init, lr_inner=0.02, lr_output=0.02))
        losses.append(F.cross_entropy(F.linear(local(x_spt), weight, bias), Y_SPT).item())
    assert losses[0] > losses[1] > losses[2]


def running_statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}


@pytest.mark.parametrize("share_first_pass", [True, False])
def test_the_copys_running_statistics_follow_the_support_set(share_first_pass):
    encoder, (x_spt, _) = new_encoder(), new_task()
    steps = 3
    options = inner_loop(steps, lr_inner=0.0, lr_output=0.0, share_first_pass=share_first_pass)
    local, _, _ = adapt(encoder, x_spt, Y_SPT, N_WAY, **options)
    plain = deepcopy(encoder).train()
    for _ in range(steps):
        plain(x_spt)
    expected = running_statistics(plain)
    for name, found in running_statistics(local).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(found, running_statistics(encoder)[name])


def test_after_200_steps_the_copys_statistics_are_those_of_the_support_set_alone():
    # The tutorial's test relies on it: the copy in eval mode is then the copy that was adapted.
    encoder, (x_spt, _) = new_encoder(), new_task()
    local, _, _ = adapt(encoder, x_spt, Y_SPT, N_WAY, **inner_loop(200, lr_inner=0.0, lr_output=0.0))
    mean = F.conv2d(x_spt, encoder.features.conv0.weight, stride=2, padding=3).mean(dim=(0, 2, 3))
    torch.testing.assert_close(local.features.norm0.running_mean, mean.detach(), rtol=1e-6, atol=1e-8)


def test_a_frozen_batchnorm_uses_and_keeps_the_encoders_statistics():
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, **inner_loop(2, lr_inner=0.0, lr_output=0.0, batchnorm="frozen"))
    assert_same_bits(running_statistics(local), running_statistics(encoder))
    plain = deepcopy(encoder).eval()
    prototypes = plain(x_spt).view(N_WAY, K_SHOT, DIM).mean(dim=1)
    expected = (-torch.cdist(plain(x_qry), prototypes).square()).softmax(dim=1)
    torch.testing.assert_close(F.linear(local(x_qry), weight, bias).softmax(dim=1), expected, rtol=0, atol=1e-9)


def test_a_detached_output_layer_has_the_values_of_an_attached_one():
    encoder, (x_spt, _) = new_encoder(), new_task()
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, **inner_loop(2))
    local_too, weight_too, bias_too = adapt(encoder, x_spt, Y_SPT, N_WAY, **inner_loop(2, attached=False))
    assert weight.grad_fn is not None and not weight_too.requires_grad and not bias_too.requires_grad
    torch.testing.assert_close(weight_too, weight.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bias_too, bias.detach(), rtol=1e-10, atol=1e-12)
    for found, expected in zip(local_too.parameters(), local.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_encoders_statistics_become_the_mean_of_those_of_its_copies():
    encoder, others = new_encoder(0), [new_encoder(5), new_encoder(6), new_encoder(7)]
    targets = [running_statistics(other) for other in others]
    counts = [buffer.clone() for buffer in encoder.buffers() if not buffer.is_floating_point()]
    kept = [statistics_of(other) for other in others]
    others[0](new_task()[0])  # a copy learns the next task before the statistics are used
    follow_statistics(encoder, kept)
    for name, found in running_statistics(encoder).items():
        torch.testing.assert_close(found, sum(target[name] for target in targets) / 3)
    # The counters of batches are numbers of batches, not statistics.
    assert all(torch.equal(a, b) for a, b in zip(counts, (buffer for buffer in encoder.buffers() if not buffer.is_floating_point())))


def test_copying_weights_copies_parameters_and_buffers_into_the_same_tensors():
    source, target = new_encoder(0), new_encoder(5)
    places = [tensor.data_ptr() for tensor in target.state_dict().values()]
    assert copy_weights(source, target) is target
    assert_same_bits(source.state_dict(), target.state_dict())
    assert [tensor.data_ptr() for tensor in target.state_dict().values()] == places
