"""Workers: tasks side by side, with the results of one task after another."""

import threading
import time
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from common.cuda_graph import WARM_UP, CudaGraphStep
from common.encoders import Encoder
from common.inner_loop import float_buffers
from common.parallel import Workers
from train_protomaml import task_gradients, train_step

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def new_workers(tasks):
    return Workers(torch.device("cpu"), tasks, lambda: [0])


def test_results_come_in_the_order_of_the_items(three_threads):
    def late(item, workspace):
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * item

    assert list(new_workers(10).map(late, range(10))) == [item * item for item in range(10)]


def test_as_many_items_are_at_work_as_there_are_threads_each_with_its_own_workspace(three_threads):
    workers, meeting, at_work = new_workers(10), threading.Barrier(3, timeout=20), set()

    def meet(item, workspace):
        assert id(workspace) not in at_work
        at_work.add(id(workspace))
        meeting.wait()  # passes only when three are here
        at_work.discard(id(workspace))
        workspace[0] += 1
        return torch.get_num_threads()

    assert set(workers.map(meet, range(6))) == {1}
    assert len(workers.workspaces) == 3 and sum(map(sum, workers.workspaces)) == 6
    assert torch.get_num_threads() == 3  # this thread keeps its own


@pytest.mark.parametrize("tasks, count, threads", [(0, 1, 3), (1, 1, 3), (2, 2, 1), (9, 3, 1)])
def test_there_are_no_more_workers_than_tasks_and_they_share_the_threads(
    three_threads, tasks, count, threads
):
    workers = new_workers(tasks)
    assert len(workers.workspaces) == count
    assert set(workers.map(lambda item, _: torch.get_num_threads(), range(4))) == {threads}


def test_an_error_in_a_task_reaches_the_caller_and_the_workers_live_on(three_threads):
    workers = new_workers(3)

    def fail(item, workspace):
        if item == 4:
            raise ValueError("item 4")
        return item

    with pytest.raises(ValueError, match="item 4"):
        list(workers.map(fail, range(8)))
    assert list(workers.map(lambda item, workspace: item, range(8))) == list(range(8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("output_init", ["prototypes", "zeros"])
def test_tasks_side_by_side_take_the_step_of_one_after_another(three_threads, output_init, device):
    device = torch.device(device)
    encoder = Encoder(8, growth_rate=4, block_config=(2, 2, 2, 2), num_init_features=8)
    encoder(torch.randn(10, 3, 32, 32))
    # In float64: with six images BatchNorm turns the last digits of float32 into the third.
    encoder = encoder.to(device).double()
    images = torch.randn(5, 12, 3, 32, 32, dtype=torch.float64, device=device)  # five tasks
    inner_loop = {"num_inner_steps": 2, "lr_inner": 0.05, "lr_output": 0.1, "batchnorm": "batch"}
    cfg = SimpleNamespace(n_way=3, k_shot=2, n_query=2, output_init=output_init, **inner_loop)

    # Fresh copies for each task, as the algorithm is written down.
    fresh = [(deepcopy(encoder), deepcopy(encoder)) for _ in images]
    results = [task_gradients(cfg, encoder, *pair) for pair in zip(fresh, images)]
    losses, _, gradients, statistics = zip(*results)
    expected = [torch.stack(losses).mean()]
    expected += [torch.stack(same).sum(dim=0) for same in zip(*gradients)]
    expected += [torch.stack(same).mean(dim=0) for same in zip(*statistics)]

    workers = Workers(device, 5, lambda: (deepcopy(encoder), deepcopy(encoder)))
    before = deepcopy(encoder.state_dict())
    still = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)  # keeps the weights

    def outer_step(images):
        loss, _ = train_step(cfg, encoder, still, workers, images)
        found = loss, *(p.grad for p in encoder.parameters()), *float_buffers(encoder)
        found = tuple(tensor.clone() for tensor in found)
        encoder.load_state_dict(before)
        return found

    step = CudaGraphStep(outer_step, device)
    for _ in range(WARM_UP + 2 if device.type == "cuda" else 2):  # on CUDA the last are replays
        found = step(images.flatten(0, 1))
    atol = 1e-5 * max(tensor.abs().max() for tensor in expected).item()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=atol)
