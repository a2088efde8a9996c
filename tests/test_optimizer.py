"""The learning rate as a function of the epoch, and how the optimizer gets it."""

import pytest
import torch

from common.optimizer import make_optimizer, one_cycle, set_learning_rate, step_decay


@pytest.mark.parametrize(
    ("epochs", "full", "tenth", "hundredth"),
    [
        (1, 1, 0, 0),
        (3, 3, 0, 0),
        (5, 4, 1, 0),
        (7, 5, 2, 0),
        (10, 7, 2, 1),
        (15, 11, 3, 1),
        (25, 18, 5, 2),
        (200, 140, 40, 20),
    ],
)
def test_the_learning_rate_drops_tenfold_once_each_share_of_the_epochs_is_reached(
    epochs, full, tenth, hundredth
):
    found = [step_decay(0.5, epoch, epochs, (0.7, 0.9)) for epoch in range(epochs)]
    assert found == pytest.approx([0.5] * full + [0.05] * tenth + [0.005] * hundredth)


def test_without_drops_the_learning_rate_stays():
    assert {step_decay(0.5, epoch, 10, ()) for epoch in range(10)} == {0.5}


def test_one_cycle_goes_up_in_the_first_fifth_and_down_to_zero():
    rates = [one_cycle(3e-3, done / 100) for done in range(100)]
    top = rates.index(max(rates))
    assert top == 20 and rates[top] == pytest.approx(3e-3)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[0] < 0.01 * 3e-3 and 0 < rates[-1] < 0.01 * 3e-3


def test_a_learning_rate_is_set_for_all_parameters():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(2)]
    optimizer = make_optimizer(groups, 0.1, 0.0, torch.device("cpu"))
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
