"""The learning rate as a function of the epoch, and AdamW that follows it."""

import pytest
import torch

from common.optimizer import make_optimizer, one_cycle, set_learning_rate, step_decay


@pytest.mark.parametrize(
    "epochs, counts", [(1, (1, 0, 0)), (5, (4, 1, 0)), (10, (7, 2, 1)), (200, (140, 40, 20))]
)
def test_the_learning_rate_drops_tenfold_once_each_share_of_the_epochs_is_reached(epochs, counts):
    found = [step_decay(0.5, epoch, epochs, (0.7, 0.9)) for epoch in range(epochs)]
    assert found == pytest.approx([0.5] * counts[0] + [0.05] * counts[1] + [0.005] * counts[2])


def test_one_cycle_goes_up_in_the_first_fifth_and_down_to_zero():
    rates = [one_cycle(3e-3, done / 100) for done in range(100)]
    assert rates[20] == pytest.approx(3e-3) and rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[0] < 0.01 * 3e-3 and 0 < rates[-1] < 0.01 * 3e-3


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
