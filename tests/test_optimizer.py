"""AdamW and Muon, which follow the learning rate of each step, against their formulas."""

import torch

from common.optimizer import MUON_FACTOR, MUON_MOMENTUM, make_optimizer, set_learning_rate


def test_the_optimizer_is_adamw_with_the_learning_rate_of_each_step_by_hand():
    weight, mean, square = torch.randn(5, dtype=torch.float64), 0, 0
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = make_optimizer([parameter], 0.5, 0.2, torch.device("cpu"))
    for step, lr in enumerate((0.1, 0.03, 0.2), 1):
        set_learning_rate(optimizer, lr)
        parameter.grad = gradient = torch.randn_like(weight)
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        adam = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        weight = weight * (1 - lr * 0.2) - lr * adam
        torch.testing.assert_close(parameter.detach(), weight)


def orthogonalized(matrix):
    """Jordan et al.'s iteration on the matrix itself, one singular value after the other."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return u @ values.diag() @ v


def test_muon_moves_kernels_along_their_orthogonalized_momentum_and_adamw_the_rest():
    shapes = [(8, 3, 3, 3), (6, 8, 1, 1), (8, 6, 1, 1), (8, 2, 3, 3), (40, 2, 3, 3), (5,), (4, 3)]
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters[-2:]]
    adamw = make_optimizer(others, 0.5, 0.2, torch.device("cpu"))
    muon = make_optimizer(parameters, 0.5, 0.2, torch.device("cpu"), "muon")
    expected = [p.detach().clone() for p in parameters[:5]]
    momenta = [torch.zeros_like(p) for p in expected]
    for lr in (0.1, 0.03, 0.2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        for parameter, other in zip(parameters[-2:], others):
            other.grad = parameter.grad.clone()
        for optimizer in (muon, adamw):
            set_learning_rate(optimizer, lr)
            optimizer.step()
        rate = MUON_FACTOR * lr
        for number, (weight, momentum) in enumerate(zip(expected, momenta)):
            gradient = parameters[number].grad
            momentum += (1 - MUON_MOMENTUM) * (gradient - momentum)
            update = gradient + MUON_MOMENTUM * (momentum - gradient)
            update = orthogonalized(update.flatten(1)).view_as(weight)
            factor = max(1, len(weight) / weight[0].numel()) ** 0.5
            expected[number] = weight * (1 - rate * 0.2) - rate * factor * update
    torch.testing.assert_close([p.detach() for p in parameters[:5]], expected)
    torch.testing.assert_close(parameters[-2:], others, rtol=0, atol=0)


def test_muon_leaves_a_kernel_without_gradient_as_it_is():
    used, unused = (torch.nn.Parameter(torch.ones(4, 2, 3, 3)) for _ in range(2))
    optimizer = make_optimizer([used, unused], 0.1, 0.1, torch.device("cpu"), "muon")
    (used * torch.randn(4, 2, 3, 3)).sum().backward()
    optimizer.step()
    assert (unused == 1).all() and (used != 1).all()
