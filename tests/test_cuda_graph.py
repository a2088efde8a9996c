"""When a step is recorded as a CUDA graph and when it is not, with stand-ins for torch.cuda."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from common.cuda_graph import WARM_UP, CudaGraphStep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch):
    """What CudaGraphStep uses of torch.cuda: the current stream; a replay runs nothing."""
    state = SimpleNamespace(current="main", recordings=0, replays=0, error=None)

    @contextmanager
    def graph(_, stream):
        state.recordings, state.current = state.recordings + 1, "of the recording"
        yield
        if state.error:  # a failed recording leaves its stream as the current one
            raise RuntimeError(state.error)
        state.current = "main"

    def replay():
        state.replays += 1

    fakes = {
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: SimpleNamespace(
            name=state.current, wait_stream=lambda other: None
        ),
        "set_stream": lambda stream: setattr(state, "current", stream.name),
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=replay),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(CudaGraphStep, "failed", False)
    return state


def doubling_step(device=CUDA, enabled=True):
    return CudaGraphStep(lambda values: (2 * values,), device, enabled)


def call(step, *sizes):
    for size in sizes:
        assert torch.equal(step(torch.ones(size))[0], 2 * torch.ones(size))


def test_a_shape_is_recorded_after_its_warm_up_and_replayed_from_then_on(fake_cuda):
    step = doubling_step()
    call(step, *[4] * WARM_UP)
    assert (fake_cuda.recordings, fake_cuda.replays) == (0, 0)
    call(step, 4, 4, 4)
    assert (fake_cuda.recordings, fake_cuda.replays, fake_cuda.current) == (1, 3, "main")
    call(step, 3, 4)  # another shape is not forced into the graph
    assert (fake_cuda.recordings, fake_cuda.replays) == (1, 4)


def test_what_a_call_returned_is_still_there_after_later_ones(fake_cuda):
    step = doubling_step()
    call(step, *[1] * WARM_UP)
    first = step(torch.ones(1))[0]
    step.outputs[0].fill_(7)  # as the next replay would
    assert first.item() == 2


def test_a_short_last_chunk_is_not_the_shape_that_is_recorded(fake_cuda):
    step = doubling_step()
    call(step, *[4, 4, 1] * WARM_UP)
    assert fake_cuda.recordings == 0
    call(step, *[4] * (WARM_UP + 2))
    assert step.shapes == [(4,)] and (fake_cuda.recordings, fake_cuda.replays) == (1, 2)


def test_a_failed_recording_says_so_once_and_is_the_last_one(fake_cuda, capsys):
    fake_cuda.error = "operation not permitted when stream is capturing\nand more"
    for step in (doubling_step(), doubling_step()):
        call(step, *[4] * (WARM_UP + 3))
    assert (fake_cuda.recordings, fake_cuda.replays, fake_cuda.current) == (1, 0, "main")
    (line,) = capsys.readouterr().err.splitlines()
    assert "operation not permitted" in line and "going on without" in line


@pytest.mark.parametrize("device, enabled, processes", [(CPU, 1, 1), (CUDA, 0, 1), (CUDA, 1, 2)])
def test_steps_are_eager_on_the_cpu_unwanted_or_in_several_processes(
    device, enabled, processes, fake_cuda, monkeypatch
):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: processes > 1)
    call(doubling_step(device, bool(enabled)), *[4] * (2 * WARM_UP))
    assert fake_cuda.recordings == 0
