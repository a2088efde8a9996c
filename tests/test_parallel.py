"""Workers: tasks side by side, with the results of one task after another."""

import dataclasses
import threading
import time
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from common.cuda_graph import WARM_UP, CudaGraphStep
from common.encoder import Encoder
from common.inner_loop import (
    OUTPUT_INITS,
    InnerLoop,
    follow_statistics,
    hand_over_gradients,
)
from common.parallel import Workers
from train_protomaml import learn_task

CPU = torch.device("cpu")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def new_workers(tasks):
    return Workers(CPU, tasks, torch.nn.Linear(2, 1))


def test_results_come_in_the_order_of_the_items(three_threads):
    def late(item, copy):
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * item

    assert list(new_workers(10).map(late, range(10))) == [item * item for item in range(10)]


def test_as_many_items_are_at_work_as_there_are_threads_each_with_a_copy_of_its_own(three_threads):
    workers, meeting, at_work = new_workers(10), threading.Barrier(3, timeout=20), set()

    def meet(item, copy):
        assert copy not in at_work
        at_work.add(copy)
        meeting.wait()  # passes only when three are here
        threads = torch.get_num_threads()
        at_work.discard(copy)
        return copy, threads

    found = list(workers.map(meet, range(6)))
    assert len(workers.copies) == 3 and {copy for copy, _ in found} == set(workers.copies)
    assert {threads for _, threads in found} == {1}
    assert torch.get_num_threads() == 3  # this thread keeps its own


@pytest.mark.parametrize("tasks, count, threads", [(1, 1, 3), (2, 2, 1), (9, 3, 1)])
def test_there_are_no_more_workers_than_tasks_and_they_share_the_threads(
    three_threads, tasks, count, threads
):
    workers = new_workers(tasks)
    assert len(workers.copies) == count
    assert set(workers.map(lambda item, copy: torch.get_num_threads(), range(4))) == {threads}


@pytest.mark.parametrize("device", DEVICES)
def test_the_copies_share_no_tensor_with_the_module_nor_with_each_other(three_threads, device):
    module = torch.nn.BatchNorm1d(3).to(device)
    modules = [module, *Workers(torch.device(device), 9, module).copies]
    places = [tensor.data_ptr() for each in modules for tensor in each.state_dict().values()]
    assert len(modules) > 2 and len(set(places)) == len(places)
    for copy in modules:
        assert all(map(torch.equal, copy.state_dict().values(), module.state_dict().values()))


def test_an_error_in_a_task_reaches_the_caller_and_the_workers_live_on(three_threads):
    workers = new_workers(3)

    def fail(item, copy):
        if item == 4:
            raise ValueError("item 4")
        return item

    with pytest.raises(ValueError, match="item 4"):
        list(workers.map(fail, range(8)))
    assert list(workers.map(lambda item, copy: item, range(8))) == list(range(8))


N_WAY, K_SHOT, NUM_TASKS = 3, 2, 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("output_init", OUTPUT_INITS)
def test_tasks_side_by_side_give_the_gradients_of_one_after_another(
    three_threads, output_init, device
):
    device = torch.device(device)
    torch.manual_seed(0)
    encoder = Encoder(8, growth_rate=4, block_config=(2, 2, 2, 2), num_init_features=8)
    encoder(torch.randn(10, 3, 32, 32))
    # In float64: with six images BatchNorm turns the last digits of float32 into the third.
    encoder = encoder.to(device).double()
    images = torch.randn(NUM_TASKS, 2 * N_WAY * K_SHOT, 3, 32, 32, dtype=torch.float64).to(device)

    inner_loop = dataclasses.asdict(InnerLoop(2, 0.05, 0.1, output_init))
    cfg = SimpleNamespace(n_way=N_WAY, k_shot=K_SHOT, n_query=K_SHOT, **inner_loop)

    plain = deepcopy(encoder)  # a fresh copy for each task, as the algorithm is written down
    results = [learn_task(cfg, plain, task, None) for task in images]
    losses, _, gradients, statistics = zip(*results)
    hand_over_gradients(plain, gradients)
    follow_statistics(plain, statistics)

    workers = Workers(device, NUM_TASKS, encoder)

    def outer_gradients(images):
        losses, _, gradients, statistics = zip(
            *workers.map(partial(learn_task, cfg, encoder), images)
        )
        hand_over_gradients(encoder, gradients)
        means = [torch.stack(same).mean(dim=0) for same in zip(*statistics)]
        return torch.stack(losses), *(p.grad for p in encoder.parameters()), *means

    step = CudaGraphStep(outer_gradients, device)
    for _ in range(WARM_UP + 2):  # on CUDA the last two are replays
        found_losses, *found = step(images)
    torch.testing.assert_close(found_losses, torch.stack(losses), rtol=1e-5, atol=1e-5)
    buffers = [buffer for buffer in plain.buffers() if buffer.is_floating_point()]
    expected = [*(p.grad for p in plain.parameters()), *buffers]
    atol = 1e-5 * max(tensor.abs().max() for tensor in expected).item()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=atol)
