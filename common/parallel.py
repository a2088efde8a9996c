"""Independent tasks side by side: threads on the CPU, streams on a GPU, torchrun's processes.

torchrun's processes run the same script and draw the same random numbers; each computes its slice
of the tasks, and sums over all tasks are exchanged. The first one alone reads and writes files.
"""

import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from queue import SimpleQueue

import torch
from torch import distributed

from common import UserError, first_line

STREAMS = 8  # tasks side by side on a GPU: docs/benchmarks.md has the times of 1 to 16


class Workers:
    """Workers for independent tasks, each with a workspace of its own: copies of an encoder, say.

    device: where the tasks compute; tasks: how many of them there are at a time; make_workspace:
    called once per worker. On the CPU the workers are threads that share its cores: a network that
    sees twenty images does not scale past one core, so each core gets a task of its own.
    """

    def __init__(self, device, tasks, make_workspace):
        at_a_time = {"cpu": torch.get_num_threads(), "cuda": STREAMS}.get(device.type, 1)
        count = max(1, min(tasks, at_a_time))
        self.workspaces = [make_workspace() for _ in range(count)]
        self.streams = [torch.cuda.Stream(device) for _ in range(count) if device.type == "cuda"]
        self.threads = None
        if device.type == "cpu" and count > 1:
            share = torch.get_num_threads() // count
            self.threads = ThreadPoolExecutor(count, "worker", torch.set_num_threads, (share,))
            self.free = SimpleQueue()
            for workspace in self.workspaces:
                self.free.put(workspace)

    def map(self, function, items):
        """Yield function(item, workspace) for all items, in order; none shares one at once."""
        if self.threads:
            return self.threads.map(partial(self._in_thread, function), items)
        if self.streams:
            return self._on_streams(function, items)
        return (function(item, self.workspaces[0]) for item in items)

    def _in_thread(self, function, item):
        workspace = self.free.get()
        try:
            return function(item, workspace)
        finally:
            self.free.put(workspace)

    def _on_streams(self, function, items):
        # As many items as there are streams, then their results: a long test shows how far it is.
        # All streams fork from the current one and join it again, so that a CUDA graph recorded on
        # that one contains them.
        current, items = torch.cuda.current_stream(), iter(items)
        while group := list(itertools.islice(items, len(self.streams))):
            results = []
            for item, stream, workspace in zip(group, self.streams, self.workspaces):
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    results.append(function(item, workspace))
            for stream in self.streams[: len(group)]:
                current.wait_stream(stream)
            yield from results


def process_count():
    """Return the number of processes that torchrun started, on all machines; else 1."""
    rank, count = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
    if rank is None or count is None or rank == count == "":
        return 1
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        found = f"RANK={rank} WORLD_SIZE={count} in the environment are no process of several"
        raise UserError(f"{found}; start them with torchrun, or: unset RANK WORLD_SIZE")
    return int(count)


def is_first():
    """Return whether this is the process that reads, writes and prints."""
    return my_slice().start == 0


def equal_share(cfg, name):
    """Return the named number over that of processes; raise UserError if there is a remainder."""
    share, rest = divmod(getattr(cfg, name), process_count())
    if rest:
        raise UserError(f"{process_count()} processes cannot share --{name} equally; change either")
    return share


def my_slice():
    """Return the slice of tasks that this process computes: `tasks[my_slice()]`."""
    count = process_count()
    return slice(int(os.environ["RANK"]) if count > 1 else 0, None, count)


def all_gather(values, count):
    """Pass this process's results, those of my_slice(); get all [count, ...] of them."""
    if process_count() == 1:
        return values
    results = values.new_zeros(count, *values.shape[1:])
    results[my_slice()] = values
    all_reduce(sums=[results])
    return results


@torch.no_grad()
def all_reduce(sums=(), means=()):
    """Replace float tensors, in place, by their sums or means over the processes: one message."""
    if process_count() == 1:
        return
    tensors = [*sums, *means]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    _communicate(distributed.all_reduce, flat)
    flat[sum(tensor.numel() for tensor in sums) :] /= process_count()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def on_first(function):
    """Call function() in the first process; return its result, or raise its UserError, in all."""
    if process_count() == 1:
        return function()
    outcome = [None, None]
    if is_first():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    _communicate(distributed.broadcast_object_list, outcome)
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]


def is_first_to_fail():
    """Return True in the first process that calls this: errors of the others follow from its."""
    if process_count() == 1:
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"failed/{attempt}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # torchrun is not there any more
        return True


def _communicate(operation, *arguments):
    """Call an operation of torch.distributed, which the first call sets up."""
    try:
        if not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            # A process may wait hours for another one's adaptation, or for a download. A dead
            # process is noticed without a timeout, by its closed connection.
            start = partial(distributed.init_process_group, backend, timeout=timedelta(days=30))
            starting = ThreadPoolExecutor(1).submit(start)  # Ctrl-C would not end it in this thread
            if wait([starting], timeout=5).not_done:
                text = f"waiting until all {process_count()} processes are there; Ctrl-C ends it"
                print(text, file=sys.stderr, flush=True)
            starting.result()
        operation(*arguments)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"another process ended early or cannot be reached ({first_line(error)[:160]}); see "
            "what it says, then start again: what was saved is intact. Where there should be no "
            "other: unset RANK WORLD_SIZE"
        ) from error
