"""How work is started: tasks side by side, steps as graphs, the optimizer; with nothing recorded where there is no GPU."""

import threading
import time
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from common.encoder import make_encoder
from common.inner_loop import OUTPUT_INITS, adapt, first_order_gradients, follow_statistics, hand_over_gradients, statistics_of
from common.kshot import adapted_accuracies, support_sets
from common.launch import WARM_UP, Captured, SideBySide, make_optimizer, set_learning_rate
from common.samplers import episode_labels

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch finds none here"))]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items(three_threads):
    def late(item, worker):
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * item

    assert list(SideBySide(CPU, 10).run(late, range(10))) == [item * item for item in range(10)]


def test_as_many_items_are_at_work_as_there_are_threads_each_with_a_worker_of_its_own(three_threads):
    workers, meeting, at_work = SideBySide(CPU, 10), threading.Barrier(3, timeout=20), set()

    def meet(item, worker):
        assert worker not in at_work
        at_work.add(worker)
        meeting.wait()  # passes only when three are here
        threads = torch.get_num_threads()
        at_work.discard(worker)
        return worker, threads

    found = list(workers.run(meet, range(6)))
    assert workers.count == 3 and {worker for worker, _ in found} == {0, 1, 2}
    assert {threads for _, threads in found} == {1}
    assert torch.get_num_threads() == 3  # this thread keeps its own


@pytest.mark.parametrize("most, count, threads", [(1, 1, 3), (2, 2, 1), (9, 3, 1)])
def test_there_are_no_more_workers_than_tasks_and_they_share_the_threads(three_threads, most, count, threads):
    workers = SideBySide(CPU, most)
    assert workers.count == count
    assert set(workers.run(lambda item, worker: torch.get_num_threads(), range(4))) == {threads}


def test_an_error_in_a_task_reaches_the_caller_and_the_workers_live_on(three_threads):
    workers = SideBySide(CPU, 3)

    def fail(item, worker):
        if item == 4:
            raise ValueError("item 4")
        return item

    with pytest.raises(ValueError, match="item 4"):
        list(workers.run(fail, range(8)))
    assert list(workers.run(lambda item, worker: item, range(8))) == list(range(8))


def test_a_function_stays_what_it_is_without_cuda():
    calls, total = [], torch.zeros(2)

    def add(values):
        calls.append(values)
        total.add_(values)
        return (total,)

    captured, ones = Captured(add, CPU), torch.ones(2)
    for number in range(1, 3 * WARM_UP):
        assert captured(ones) == (total,) and calls[-1] is ones and len(calls) == number
    assert total.tolist() == [3 * WARM_UP - 1] * 2


class FakeGraph:
    """Replays by calling the function that was recorded on the tensors that it was recorded with."""

    def replay(self):
        for kept, new in zip(self.outputs, self.function(*self.inputs)):
            kept.copy_(new)


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda as far as Captured touches it; `recording` says whether a recording is under way, `broken` spoils it."""
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

    for name, fake in (("Stream", FakeStream), ("stream", stream), ("current_stream", FakeStream), ("graph", graph), ("CUDAGraph", FakeGraph)):
        monkeypatch.setattr(torch.cuda, name, fake)
    return state


def recorded_sum(fake_cuda):
    """A Captured function that adds its input to a total and returns the total and twice the input; and the total."""
    total = torch.zeros(2)

    def add(values):
        if not fake_cuda["recording"]:  # a recording runs nothing
            total.add_(values)
        return total + 0, 2 * values

    captured = Captured(add, torch.device("cuda"))
    return captured, total


def connect(captured):
    """Give the fake graph what a real one knows by itself."""
    captured.graph.inputs, captured.graph.outputs, captured.graph.function = captured.inputs, captured.outputs, captured.function


def test_every_call_counts_whether_run_recorded_or_replayed(fake_cuda, monkeypatch):
    captured, total = recorded_sum(fake_cuda)
    record = Captured._record
    monkeypatch.setattr(Captured, "_record", lambda self, inputs: record(self, inputs) and (connect(self) or True))
    expected, results = torch.zeros(2), []
    for number in range(1, 2 * WARM_UP + 2):
        values = torch.full((2,), float(number))
        expected += values
        results.append(captured(values))
        assert torch.equal(total, expected) and torch.equal(results[-1][0], expected) and torch.equal(results[-1][1], 2 * values)
        assert (captured.graph is None) is (number <= WARM_UP)
    # What a call returned is still there after later ones.
    assert [result[1][0].item() for result in results] == [2.0 * number for number in range(1, 2 * WARM_UP + 2)]


def test_inputs_of_another_shape_are_not_forced_into_the_graph(fake_cuda, monkeypatch):
    captured = Captured(lambda values: (values.sum(),), torch.device("cuda"))
    record = Captured._record
    monkeypatch.setattr(Captured, "_record", lambda self, inputs: record(self, inputs) and (connect(self) or True))
    for _ in range(WARM_UP + 1):
        captured(torch.ones(4))
    assert captured.graph is not None
    assert captured(torch.ones(3))[0] == 3 and captured(torch.ones(4))[0] == 4


def test_a_recording_that_fails_says_so_once_and_the_work_goes_on(fake_cuda, capsys):
    fake_cuda["broken"] = True
    captured, total = recorded_sum(fake_cuda)
    for _ in range(WARM_UP + 3):
        captured(torch.ones(2))
    assert total.tolist() == [WARM_UP + 3] * 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "operation not permitted" in lines[0] and "going on without" in lines[0]


@pytest.mark.parametrize("device", DEVICES)
def test_the_optimizer_is_adamw(device):
    device = torch.device(device)
    start = [torch.randn(3, 2), torch.randn(5)]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(4)]
    expected = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    found = [torch.nn.Parameter(tensor.clone().to(device)) for tensor in start]
    plain = torch.optim.AdamW(expected, lr=0.1, weight_decay=0.2, foreach=False, fused=False)
    ours = make_optimizer(found, 0.5, 0.2, device)
    for step, wanted in enumerate(gradients):
        plain.param_groups[0]["lr"] = 0.1 / (step + 1)
        set_learning_rate(ours, 0.1 / (step + 1))
        for parameters in (expected, found):
            for parameter, gradient in zip(parameters, wanted):
                parameter.grad = gradient.to(parameter.device)
        plain.step()
        ours.step()
        for a, b in zip(expected, found):
            torch.testing.assert_close(b.detach().cpu(), a.detach(), rtol=1e-5, atol=1e-6)


N_WAY, K_SHOT, NUM_TASKS = 3, 2, 5


def new_work(device):
    """An encoder with some statistics and the images of some tasks, [T, N * 2K, 3, 32, 32]."""
    torch.manual_seed(0)
    encoder = make_encoder(8, growth_rate=4, block_config=(2, 2, 2, 2), num_init_features=8)
    encoder(torch.randn(10, 3, 32, 32))
    # In float64: with six images BatchNorm turns the last digits of float32 into the third.
    return encoder.to(device).double(), torch.randn(NUM_TASKS, 2 * N_WAY * K_SHOT, 3, 32, 32, dtype=torch.float64).to(device)


def learn_task(encoder, images, local, output_init, **options):
    y = episode_labels(N_WAY, K_SHOT, images.device)
    x_spt, x_qry = images.chunk(2)
    local, weight, bias = adapt(encoder, x_spt, y, N_WAY, 2, 0.05, 0.1, output_init, local=local, **options)
    loss = F.cross_entropy(F.linear(local(x_qry), weight, bias), y)
    return loss.detach(), first_order_gradients(loss, encoder, local), statistics_of(local)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("output_init", OUTPUT_INITS)
def test_tasks_side_by_side_give_the_gradients_of_one_after_another(three_threads, output_init, device):
    device = torch.device(device)
    encoder, images = new_work(device)
    plain = deepcopy(encoder)  # as the algorithm is written down: a fresh copy for each task, two passes
    losses, gradients, statistics = zip(*(learn_task(plain, task, None, output_init, share_first_pass=False) for task in images))
    hand_over_gradients(plain, gradients)
    follow_statistics(plain, statistics)

    workers = SideBySide(device, NUM_TASKS)
    copies = [deepcopy(encoder) for _ in range(workers.count)]

    def outer_gradients(images):
        tasks = workers.run(lambda task, worker: learn_task(encoder, task, copies[worker], output_init), images)
        losses, gradients, statistics = zip(*tasks)
        hand_over_gradients(encoder, gradients)
        return torch.stack(losses), *(p.grad for p in encoder.parameters()), *(torch.stack(same).mean(dim=0) for same in zip(*statistics))

    step = Captured(outer_gradients, device)
    for _ in range(WARM_UP + 2):  # on CUDA the last two are replays
        found_losses, *found = step(images)
    torch.testing.assert_close(found_losses, torch.stack(losses), rtol=1e-5, atol=1e-5)
    expected = [*(p.grad for p in plain.parameters()), *(buffer for buffer in plain.buffers() if buffer.is_floating_point())]
    size = max(tensor.abs().max() for tensor in expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * size.item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch finds none here")
def test_the_test_in_a_graph_gives_the_results_of_the_plain_one():
    device = torch.device("cuda")
    encoder, _ = new_work(device)
    labels = torch.arange(3).repeat_interleave(40).to(device)
    images = (torch.randn(3, 3, 32, 32)[labels.cpu()] + 2 * torch.randn(120, 3, 32, 32)).to(device, torch.float64)
    sets = support_sets(labels, 4, ["a", "b", "c"])
    inner_loop = {"num_inner_steps": 10, "lr_inner": 0.02, "lr_output": 0.02}
    plain, recorded = (adapted_accuracies(encoder, images, labels, sets, 3, inner_loop, captured=captured) for captured in (False, True))
    assert (plain - recorded).abs().mean() < 0.001


