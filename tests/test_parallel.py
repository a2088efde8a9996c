"""Workers: tasks side by side, with the results of one task after another."""

import threading
import time

import pytest
import torch

from common.parallel import Workers


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
