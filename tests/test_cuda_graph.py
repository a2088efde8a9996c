"""A step as a CUDA graph; where there is no GPU, with a stand-in for torch.cuda."""

from contextlib import contextmanager

import pytest
import torch

from common.cuda_graph import WARM_UP, CudaGraphStep
from common.optimizer import make_optimizer, set_learning_rate
from common.parallel import STREAMS, Workers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


def test_without_cuda_every_call_is_one_of_the_function():
    calls, total = [], torch.zeros(2)

    def add(values):
        calls.append(values)
        total.add_(values)
        return (total,)

    step, ones = CudaGraphStep(add, CPU), torch.ones(2)
    for number in range(1, 3 * WARM_UP):
        assert step(ones) == (total,) and calls[-1] is ones and len(calls) == number
    assert total.tolist() == [3 * WARM_UP - 1] * 2


class FakeGraph:
    """Replays by calling the function on the tensors that it was recorded with."""

    def replay(self):
        for recorded, new in zip(self.outputs, self.function(*self.inputs)):
            recorded.copy_(new)


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def fake_cuda(monkeypatch):
    """What CudaGraphStep uses of torch.cuda.

    `recording` says whether a graph is being recorded; `broken` makes recordings fail.
    """
    state = {"recording": False, "broken": False}

    @contextmanager
    def stream(_):
        yield

    @contextmanager
    def graph(_, stream):
        state["recording"] = True
        try:
            yield
            if state["broken"]:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            state["recording"] = False

    fakes = {
        "Stream": FakeStream,
        "stream": stream,
        "current_stream": FakeStream,
        "graph": graph,
        "CUDAGraph": FakeGraph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    record = CudaGraphStep._record

    def record_for_replay(self, inputs):
        recorded = record(self, inputs)
        if recorded:  # the stand-in is given what a real graph holds by itself
            self.graph.inputs, self.graph.outputs = self.inputs, self.outputs
            self.graph.function = self.function
        return recorded

    monkeypatch.setattr(CudaGraphStep, "_record", record_for_replay)
    return state


def summing_step(fake_cuda):
    """A step that adds its input to a total and returns (total, twice the input); the total."""
    total = torch.zeros(2)

    def add(values):
        if not fake_cuda["recording"]:  # a recording runs nothing
            total.add_(values)
        return total + 0, 2 * values

    return CudaGraphStep(add, CUDA), total


def test_every_call_counts_whether_eager_recorded_or_replayed(fake_cuda):
    step, total = summing_step(fake_cuda)
    expected, results = torch.zeros(2), []
    numbers = range(1, 2 * WARM_UP + 2)
    for number in numbers:
        values = torch.full((2,), float(number))
        expected += values
        results.append(step(values))
        assert torch.equal(total, expected) and torch.equal(results[-1][0], expected)
        assert torch.equal(results[-1][1], 2 * values)
        assert (step.graph is None) is (number <= WARM_UP)
    # What a call returned is still there after later ones.
    assert [result[1][0].item() for result in results] == [2.0 * number for number in numbers]


def test_a_graph_that_is_not_wanted_is_not_recorded(fake_cuda):
    step = CudaGraphStep(lambda values: (values + 1,), CUDA, enabled=False)
    for _ in range(2 * WARM_UP):
        assert step(torch.ones(1))[0].tolist() == [2]
    assert step.graph is None


def test_inputs_of_another_shape_are_not_forced_into_the_graph(fake_cuda):
    step = CudaGraphStep(lambda values: (values.sum(),), CUDA)
    for _ in range(WARM_UP + 1):
        step(torch.ones(4))
    assert step.graph is not None
    assert step(torch.ones(3))[0] == 3 and step(torch.ones(4))[0] == 4


def test_a_recording_that_fails_says_so_once_and_the_work_goes_on(fake_cuda, capsys):
    fake_cuda["broken"] = True
    step, total = summing_step(fake_cuda)
    for _ in range(WARM_UP + 3):
        step(torch.ones(2))
    assert total.tolist() == [WARM_UP + 3] * 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "operation not permitted" in lines[0]
    assert "going on without" in lines[0]


@pytest.mark.parametrize("device", DEVICES)
def test_the_optimizer_is_adamw_on_the_gradients_of_a_graph_and_follows_the_learning_rate(device):
    device = torch.device(device)
    start = [torch.randn(3, 2), torch.randn(5)]
    expected = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    found = [torch.nn.Parameter(tensor.clone().to(device)) for tensor in start]
    plain = torch.optim.AdamW(expected, lr=0.1, weight_decay=0.2, foreach=False, fused=False)
    ours = make_optimizer(found, 0.5, 0.2, device)

    def set_gradients(*gradients):
        for parameter, gradient in zip(found, gradients, strict=True):
            parameter.grad = gradient * 1
        return gradients

    step = CudaGraphStep(set_gradients, device)
    for number in range(1, WARM_UP + 4):  # on CUDA the last three are replays
        gradients = [torch.randn_like(tensor) for tensor in start]
        plain.param_groups[0]["lr"] = 0.1 / number
        set_learning_rate(ours, 0.1 / number)
        for parameter, gradient in zip(expected, gradients):
            parameter.grad = gradient
        plain.step()
        step(*(gradient.to(device) for gradient in gradients))
        ours.step()
        for a, b in zip(expected, found):
            torch.testing.assert_close(b.detach().cpu(), a.detach(), rtol=1e-5, atol=1e-6)


def test_results_on_streams_come_while_later_tasks_wait(fake_cuda):
    started, count = [], 2 * STREAMS + 1

    def begin(item, copy):
        started.append((item, id(copy)))
        return item

    results = Workers(CUDA, count, torch.nn.Linear(1, 1)).map(begin, iter(range(count)))
    for number, result in enumerate(results):
        assert result == number
        assert len(started) == min(count, (number // STREAMS + 1) * STREAMS)
    for first in range(0, count, STREAMS):  # those side by side have a copy each
        copies = [copy for _, copy in started[first : first + STREAMS]]
        assert len(set(copies)) == len(copies)
