"""The inner loop: adaptation and its first-order gradient, against both written out in float64."""

import dataclasses
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_protomaml
from common.augment import Views
from common.encoder import Encoder
from common.inner_loop import (
    BATCHNORMS,
    OUTPUT_INITS,
    FineTuning,
    InnerLoop,
    adapt,
    copy_weights,
    fine_tune,
    first_order_gradients,
    follow_statistics,
    hand_over_gradients,
    running_statistics,
)
from common.samplers import episode_labels

# Tiny networks: threads would only wait for each other.
pytestmark = pytest.mark.usefixtures("one_thread")

N_WAY, K_SHOT, NUM_QUERY, DIM = 3, 2, 4, 8
Y_SPT, Y_QRY = episode_labels(N_WAY, K_SHOT), episode_labels(N_WAY, NUM_QUERY)
# Unequal rates, so that a mix-up of the two is noticed.
LR_INNER, LR_OUTPUT = 0.05, 0.11


def new_encoder(seed=0):
    """A small DenseNet in float64 with running statistics far from 0 and 1."""
    torch.manual_seed(seed)
    encoder = Encoder(DIM, growth_rate=4, block_config=(2, 2, 2, 2), num_init_features=8).double()
    for _ in range(3):
        encoder(2 + 3 * torch.randn(10, 3, 32, 32, dtype=torch.float64))
    return encoder


def new_task(seed=1):
    """Support and query images."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)

    return draw(N_WAY * K_SHOT), draw(N_WAY * NUM_QUERY)


def inner_loop(steps, output_init="prototypes", batchnorm="batch"):
    return InnerLoop(steps, LR_INNER, LR_OUTPUT, output_init, batchnorm)


def without_learning(steps, output_init="prototypes", batchnorm="batch"):
    return InnerLoop(steps, 0.0, 0.0, output_init, batchnorm)


def everything(encoder):
    """All that adaptation must leave alone: parameters, buffers, gradients."""
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for name, parameter in encoder.named_parameters():
        gradient = parameter.grad
        state[f"{name}.grad"] = None if gradient is None else gradient.clone()
    return state


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        both_none = tensor is None and second[name] is None
        assert both_none or torch.equal(tensor, second[name]), name


def outer_gradient(encoder, x_spt, x_qry, loop):
    """One task of the trainer; returns (query loss, {name: gradient of the encoder})."""
    sizes = {"n_way": N_WAY, "k_shot": K_SHOT, "n_query": NUM_QUERY}
    cfg = SimpleNamespace(**sizes, **dataclasses.asdict(loop))
    images = torch.cat([x_spt, x_qry])
    loss, _, gradients, _ = train_protomaml.learn_task(cfg, encoder, images, None)
    names = [name for name, _ in encoder.named_parameters()]
    return loss.item(), dict(zip(names, gradients, strict=True))


def cross_entropy_by_hand(logits, labels):
    of_each = [logits[row].log_softmax(0)[label] for row, label in enumerate(labels.tolist())]
    return -sum(of_each) / len(labels)


def by_hand(encoder, x_spt, x_qry, steps, output_init):
    """The same from the definition: explicit weights and sums, autograd for single derivatives.

    First order: the query loss, a function of adapted weights theta' = theta - lr g and
    W' = W0(theta) - lr h, is differentiated with g and h held constant. So
    dL/dtheta = dL/dtheta' + dL/dW' dW0/dtheta, and b like W. The prototypes and the first step take
    a pass through the encoder each.
    """
    names = [name for name, _ in encoder.named_parameters()]

    def features(parameters, images):
        # BatchNorm with the statistics of the batch; its running ones are not used and thrown away.
        tensors = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        tensors.update(zip(names, parameters))
        return torch.func.functional_call(deepcopy(encoder).train(), tensors, (images,))

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
    return loss.item(), dict(zip(names, direct)), [tensor.detach() for tensor in adapted]


@pytest.mark.parametrize("output_init", OUTPUT_INITS)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_first_order_gradient_equals_the_one_written_by_hand(steps, output_init):
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    expected_loss, expected, _ = by_hand(encoder, x_spt, x_qry, steps, output_init)
    loss, gradient = outer_gradient(encoder, x_spt, x_qry, inner_loop(steps, output_init))
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    atol = 1e-10 * max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(
            gradient[name], tensor, rtol=1e-7, atol=atol, msg=lambda text: f"{name}: {text}"
        )


@pytest.mark.parametrize("output_init", OUTPUT_INITS)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_adapted_weights_equal_those_written_by_hand(steps, output_init):
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    expected = by_hand(encoder, x_spt, x_qry, steps, output_init)[2]
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, inner_loop(steps, output_init))
    found = dict(local.named_parameters(), weight=weight, bias=bias)
    for (name, tensor), other in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(
            tensor.detach(), other, rtol=1e-8, atol=1e-10, msg=lambda text: f"{name}: {text}"
        )


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("batchnorm", BATCHNORMS)
@pytest.mark.parametrize("output_init", OUTPUT_INITS)
@pytest.mark.parametrize("training", [True, False])
def test_adaptation_leaves_the_encoder_as_it_was_to_the_last_bit(
    training, output_init, batchnorm, attached
):
    encoder, (x_spt, _) = new_encoder().train(training), new_task()
    for p in encoder.parameters():
        p.grad = torch.ones_like(p)  # as after an earlier outer step
    before = everything(encoder)
    loop = inner_loop(2, output_init, batchnorm)
    adapt(encoder, x_spt, Y_SPT, N_WAY, loop, attached=attached)
    assert_same_bits(before, everything(encoder))
    assert all(module.training is training for module in encoder.modules())


def test_gradients_that_the_encoder_already_has_do_not_enter():
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    _, expected = outer_gradient(encoder, x_spt, x_qry, inner_loop(1))
    for p in encoder.parameters():
        p.grad = torch.full_like(p, 3.0)
    _, gradient = outer_gradient(encoder, x_spt, x_qry, inner_loop(1))
    assert_same_bits(expected, gradient)


@pytest.mark.parametrize("batchnorm", BATCHNORMS)
@pytest.mark.parametrize("output_init", OUTPUT_INITS)
def test_a_copy_that_is_used_again_gives_the_bits_of_a_fresh_one(output_init, batchnorm):
    encoder, loop = new_encoder(), inner_loop(2, output_init, batchnorm)
    x_spt, x_qry = new_task(1)

    used, weight, bias = adapt(encoder, new_task(2)[0], Y_SPT, N_WAY, loop)
    loss = F.linear(used.eval()(x_qry), weight, bias).sum()
    first_order_gradients(loss, encoder, used)
    results = []
    for copy in (used, None):
        local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, loop, local=copy)
        assert copy is None or local is copy
        loss = F.cross_entropy(F.linear(local(x_qry), weight, bias), Y_QRY)
        gradients = first_order_gradients(loss, encoder, local)
        numbered = {str(number): gradient for number, gradient in enumerate(gradients)}
        head = {"weight": weight, "bias": bias, "loss": loss}
        results.append({**everything(local), **head, **numbered})
        assert local.training is (batchnorm == "batch")
    assert_same_bits(*results)


def test_handing_over_sums_the_gradients_of_the_tasks():
    base = torch.nn.Linear(2, 1)
    base.weight.grad = torch.full_like(base.weight, 7.0)  # of an earlier step: it goes
    tasks = [
        [torch.tensor([[1.0, 2.0]]), torch.tensor([3.0])],
        [torch.tensor([[10.0, 20.0]]), torch.tensor([30.0])],
    ]
    for count, weight, bias in ((1, [[1.0, 2.0]], [3.0]), (2, [[11.0, 22.0]], [33.0])):
        hand_over_gradients(base, tasks[:count])
        assert base.weight.grad.tolist() == weight and base.bias.grad.tolist() == bias
    assert tasks[0][0].tolist() == [[1.0, 2.0]]  # the sum is not taken in place


def test_a_fused_optimizer_follows_gradients_of_any_memory_layout():
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        module = torch.nn.Conv2d(3, 2, 2, bias=False).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0, fused=True)
        gradient = torch.arange(24.0).view(2, 3, 2, 2).contiguous(memory_format=layout)
        hand_over_gradients(module, [[gradient]])
        optimizer.step()
        weights.append(module.weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("steps", [1, 3])
def test_without_learning_the_adapted_model_is_a_protonet_with_batch_statistics(steps):
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, without_learning(steps))
    found = F.linear(local(x_qry), weight, bias).softmax(dim=1)

    plain = deepcopy(encoder).train()
    support, queries = plain(x_spt), plain(x_qry)
    of_class = [support[c * K_SHOT : (c + 1) * K_SHOT] for c in range(N_WAY)]
    prototypes = torch.stack([shots.mean(dim=0) for shots in of_class])
    expected = (-torch.cdist(queries, prototypes).square()).softmax(dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_without_learning_the_outer_gradient_is_that_of_a_protonet():
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    _, gradient = outer_gradient(encoder, x_spt, x_qry, without_learning(1))
    plain = new_encoder().train()
    prototypes = plain(x_spt).view(N_WAY, K_SHOT, DIM).mean(dim=1)
    F.cross_entropy(-torch.cdist(plain(x_qry), prototypes).square(), Y_QRY).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-6, atol=1e-10)


def test_the_first_step_from_a_zero_output_layer_moves_only_that_layer():
    # With W = 0 the loss does not depend on the features; from prototypes or a step later it does.
    encoder, (x_spt, _) = new_encoder(), new_task()
    cases = ((1, "zeros", False), (2, "zeros", True), (1, "prototypes", True))
    for steps, output_init, moved in cases:
        local, weight, _ = adapt(encoder, x_spt, Y_SPT, N_WAY, inner_loop(steps, output_init))
        pairs = zip(local.parameters(), encoder.parameters())
        assert all(torch.equal(a, b) for a, b in pairs) is not moved
        assert weight.abs().max() > 0


def test_zero_initialised_output_starts_from_chance():
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, without_learning(1, "zeros"))
    logits = F.linear(local(x_qry), weight, bias)
    assert torch.equal(logits, torch.zeros(N_WAY * NUM_QUERY, N_WAY, dtype=torch.float64))


@pytest.mark.parametrize("output_init", OUTPUT_INITS)
def test_more_steps_fit_the_support_set_better(output_init):
    encoder, (x_spt, _) = new_encoder(), new_task()
    losses = []
    for steps in (1, 4, 16):
        loop = InnerLoop(steps, 0.02, 0.02, output_init)
        local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, loop)
        losses.append(F.cross_entropy(F.linear(local(x_spt), weight, bias), Y_SPT).item())
    assert losses[0] > losses[1] > losses[2]


def named_statistics(model):
    buffers = model.named_buffers()
    return {name: buffer.clone() for name, buffer in buffers if buffer.is_floating_point()}


def test_the_copys_running_statistics_follow_the_support_set():
    encoder, (x_spt, _) = new_encoder(), new_task()
    steps = 3
    local, _, _ = adapt(encoder, x_spt, Y_SPT, N_WAY, without_learning(steps))
    plain = deepcopy(encoder).train()
    for _ in range(steps):
        plain(x_spt)
    before, expected = named_statistics(encoder), named_statistics(plain)
    for name, found in named_statistics(local).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(found, before[name])


def test_after_200_steps_the_copys_statistics_are_those_of_the_support_set_alone():
    # The tutorial's test relies on it: in eval mode the copy is then still what was adapted.
    encoder, (x_spt, _) = new_encoder(), new_task()
    local, _, _ = adapt(encoder, x_spt, Y_SPT, N_WAY, without_learning(200))
    convolved = F.conv2d(x_spt, encoder.features.conv0.weight, stride=2, padding=3)
    mean = convolved.mean(dim=(0, 2, 3)).detach()
    torch.testing.assert_close(local.features.norm0.running_mean, mean, rtol=1e-6, atol=1e-8)


def test_a_frozen_batchnorm_uses_and_keeps_the_encoders_statistics():
    encoder, (x_spt, x_qry) = new_encoder(), new_task()
    loop = without_learning(2, batchnorm="frozen")
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, loop)
    assert_same_bits(named_statistics(local), named_statistics(encoder))
    plain = deepcopy(encoder).eval()
    prototypes = plain(x_spt).view(N_WAY, K_SHOT, DIM).mean(dim=1)
    expected = (-torch.cdist(plain(x_qry), prototypes).square()).softmax(dim=1)
    found = F.linear(local(x_qry), weight, bias).softmax(dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_detached_output_layer_has_the_values_of_an_attached_one():
    encoder, (x_spt, _) = new_encoder(), new_task()
    local, weight, bias = adapt(encoder, x_spt, Y_SPT, N_WAY, inner_loop(2))
    test = adapt(encoder, x_spt, Y_SPT, N_WAY, inner_loop(2), attached=False)
    assert weight.grad_fn is not None
    assert not test[1].requires_grad and not test[2].requires_grad
    found = [*test[0].parameters(), *test[1:]]
    for one, other in zip(found, [*local.parameters(), weight, bias], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_encoders_statistics_become_the_mean_of_those_of_its_copies():
    encoder, others = new_encoder(0), [new_encoder(5), new_encoder(6), new_encoder(7)]
    targets = [named_statistics(other) for other in others]

    def counters():
        return [buffer.clone() for buffer in encoder.buffers() if not buffer.is_floating_point()]

    before = counters()
    kept = [running_statistics(other) for other in others]
    others[0](new_task()[0])  # a copy learns the next task before the statistics are used
    follow_statistics(encoder, kept)
    for name, found in named_statistics(encoder).items():
        torch.testing.assert_close(found, sum(target[name] for target in targets) / 3)
    # The counters of batches are numbers of batches, not statistics.
    assert all(torch.equal(a, b) for a, b in zip(before, counters(), strict=True))


def test_copying_weights_copies_parameters_and_buffers_into_the_same_tensors():
    source, target = new_encoder(0), new_encoder(5)
    places = [tensor.data_ptr() for tensor in target.state_dict().values()]
    assert copy_weights(source, target) is target
    assert_same_bits(source.state_dict(), target.state_dict())
    assert [tensor.data_ptr() for tensor in target.state_dict().values()] == places


def test_an_inner_loop_takes_its_values_from_a_config():
    own = {"num_inner_steps": 7, "lr_inner": 0.3, "lr_output": 0.4}
    others = {"output_init": "zeros", "batchnorm": "frozen"}
    of_the_outer_loop = {"lr": 1.0, "epochs": 2}
    config = {**own, **others, **of_the_outer_loop}
    assert InnerLoop.of(config) == InnerLoop(7, 0.3, 0.4, "zeros", "frozen")
    assert InnerLoop.of(own, num_inner_steps=200, lr_inner=0) == InnerLoop(200, 0.3, 0.4)


class Seen:
    """Stands in for Views: no crops, no colours; notes the images of each step."""

    def __init__(self, images):
        self.images, self.episodes = images, []

    def of(self, indices):
        return self.images[indices]

    def random(self, indices, generator, least_crop, color_jitter):
        self.episodes.append(indices)
        return self.images[indices]


def fine_tuned_by_hand(encoder, images, episodes, lr):
    """Adam's formulas and the softmax over distances, on the episodes that were seen."""
    model = deepcopy(encoder).eval()
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step, episode in enumerate(episodes, start=1):
        support, query = model(images[episode]).view(2, N_WAY, -1, DIM)
        losses = []
        for c in range(N_WAY):
            for feature in query[c]:
                distances = torch.stack(
                    [(feature - of.mean(dim=0)).square().sum() for of in support]
                )
                losses.append(distances[c] + torch.logsumexp(-distances, dim=0))
        gradients = torch.autograd.grad(sum(losses) / len(losses), parameters)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second):
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g**2)
                p -= lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return model


@pytest.mark.parametrize("k_shot", [1, 2, 5])
def test_fine_tuning_equals_adam_on_the_loss_of_its_episodes_by_hand(k_shot):
    encoder, (images, _) = new_encoder(), new_task()
    images = torch.cat([images, new_task(seed=2)[1]])[: N_WAY * k_shot]
    seen, support = Seen(images), torch.arange(N_WAY * k_shot)
    before = everything(encoder)
    local, weight, bias = fine_tune(encoder, seen, support, N_WAY, FineTuning(3, 0.01))
    assert_same_bits(everything(encoder), before)
    assert not local.training and len(seen.episodes) == 3

    expected = fine_tuned_by_hand(encoder, images, seen.episodes, 0.01)
    assert not torch.equal(encoder(images), expected(images))
    torch.testing.assert_close(local.state_dict(), expected.state_dict())
    prototypes = expected(images).view(N_WAY, k_shot, DIM).mean(dim=1)
    torch.testing.assert_close(weight, 2 * prototypes.detach())
    torch.testing.assert_close(bias, -prototypes.detach().square().sum(dim=1))


@pytest.mark.parametrize("k_shot, half", [(1, 1), (2, 1), (5, 2), (40, 8)])
def test_an_episode_of_fine_tuning_has_as_many_other_queries_of_each_class(k_shot, half):
    support = 100 + torch.arange(N_WAY * k_shot)
    seen = Seen(torch.randn(200 + N_WAY * k_shot, 3, 32, 32, dtype=torch.float64))
    fine_tune(new_encoder(), seen, support, N_WAY, FineTuning(6, 0.001))
    for episode in seen.episodes:
        support_half, query_half = (episode - 100).view(2, N_WAY, half)
        for c in range(N_WAY):
            images = [*support_half[c].tolist(), *query_half[c].tolist()]
            assert all(image // k_shot == c for image in images)
            assert len(set(images)) == (2 * half if k_shot > 1 else 1)
    if k_shot > 1:
        assert len({tuple(episode.tolist()) for episode in seen.episodes}) > 1


def test_fine_tuning_on_a_copy_used_before_gives_the_same_bits():
    encoder, (images, _) = new_encoder(), new_task()
    views, support = Views(images), torch.arange(N_WAY * K_SHOT)
    first = fine_tune(encoder, views, support, N_WAY, FineTuning(2, 0.01))
    used, _, _ = fine_tune(encoder, views, support.flip(0), N_WAY, FineTuning(2, 0.01))
    again = fine_tune(encoder, views, support, N_WAY, FineTuning(2, 0.01), used)
    assert again[0] is used
    assert_same_bits(first[0].state_dict(), used.state_dict())
    assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])


def test_no_steps_leave_the_prototypes_of_the_encoder():
    encoder, (images, _) = new_encoder().eval(), new_task()
    _, weight, bias = fine_tune(
        encoder, Views(images), torch.arange(len(images)), N_WAY, FineTuning(0, 0.01)
    )
    prototypes = encoder(images).detach().view(N_WAY, K_SHOT, DIM).mean(dim=1)
    torch.testing.assert_close(weight, 2 * prototypes)
    torch.testing.assert_close(bias, -prototypes.square().sum(dim=1))
