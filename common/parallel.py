"""Independent tasks side by side: threads on the CPU, streams on a GPU, torchrun's processes.

The processes of torchrun all run the same script and draw the same random numbers; each computes
its share of the tasks, and sums over all tasks are exchanged. The first process alone reads and
writes files. Without torchrun there is one process, whose share is everything.
"""

import atexit
import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from datetime import timedelta
from queue import SimpleQueue

import torch
from torch import distributed

from common.config import UserError, first_line

STREAMS = 4  # tasks that run side by side on a GPU


class Workers:
    """Workers for independent tasks, each with a deep copy of `module` of its own.

    device: where the tasks compute; tasks: how many of them there are at a time. On the CPU the
    workers are threads that share its cores: a network that sees twenty images does not scale past
    one core, so each core gets a task of its own. copies: one deep copy per worker, made once.
    """

    def __init__(self, device, tasks, module):
        count = max(1, min(tasks, tasks_at_a_time(device)))
        self.copies = [deepcopy(module) for _ in range(count)]
        self.streams = self.threads = None
        if device.type == "cuda":
            self.streams = [torch.cuda.Stream(device) for _ in range(count)]
        elif count > 1:
            threads = torch.get_num_threads() // count
            self.threads = ThreadPoolExecutor(
                count, initializer=torch.set_num_threads, initargs=(threads,)
            )
            self.free_copies = SimpleQueue()
            for copy in self.copies:
                self.free_copies.put(copy)

    def map(self, function, items):
        """Yield function(item, copy) for all items, in their order; a copy has one at a time."""
        if self.threads:
            return self.threads.map(lambda item: self._in_thread(function, item), items)
        if self.streams:
            return self._on_streams(function, items)
        return (function(item, self.copies[0]) for item in items)

    def _in_thread(self, function, item):
        copy = self.free_copies.get()
        try:
            return function(item, copy)
        finally:
            self.free_copies.put(copy)

    def _on_streams(self, function, items):
        # As many items as there are streams, then their results: a long test shows how far it is.
        # All streams fork from the current one and join it again, so that a CUDA graph recorded on
        # that one contains them.
        current, items = torch.cuda.current_stream(), iter(items)
        while group := list(itertools.islice(items, len(self.streams))):
            results = []
            for item, stream, copy in zip(group, self.streams, self.copies):
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    results.append(function(item, copy))
            for stream in self.streams[: len(group)]:
                current.wait_stream(stream)
            yield from results


def tasks_at_a_time(device):
    """Return how many tasks run side by side on a device: in threads on the CPU, in streams."""
    return {"cpu": torch.get_num_threads(), "cuda": STREAMS}.get(device.type, 1)


def process_count():
    """Return the number of processes that torchrun started, on all machines; else 1."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def process_rank():
    """Return the number of this process, from 0."""
    return int(os.environ["RANK"]) if process_count() > 1 else 0


def is_first():
    """Return whether this is the process that reads, writes and prints."""
    return process_rank() == 0


def equal_share(cfg, name):
    """Return the named number of the config, divided by the number of processes.

    Raises UserError where there is a remainder.
    """
    value, count = getattr(cfg, name), process_count()
    if value % count:
        raise UserError(
            f"{name} is {value}, which {count} processes cannot share equally; pass "
            f"--{name}={-(-value // count) * count} or start another number of processes"
        )
    return value // count


def share():
    """Return the slice of tasks that this process computes: `tasks[share()]`."""
    return slice(process_rank(), None, process_count())


def gather(values, count):
    """Return in every process all results [count, ...], of which `values` are this one's share."""
    if process_count() == 1:
        return values
    results = values.new_zeros(count, *values.shape[1:])
    results[share()] = values
    all_reduce(sums=[results])
    return results


@torch.no_grad()
def all_reduce(sums=(), means=()):
    """Replace each tensor, in place, by its sum or its mean over the processes, in one message."""
    if process_count() == 1:
        return
    tensors = [*sums, *means]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    _communicate(distributed.all_reduce, flat)
    flat[sum(tensor.numel() for tensor in sums) :] /= process_count()
    for tensor, result in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(result.view(tensor.shape))


def agree(*numbers):
    """Return the largest value of each number in any process, so that all go on alike."""
    if process_count() == 1:
        return numbers
    largest = torch.tensor([int(number) for number in numbers])
    _communicate(distributed.all_reduce, largest, distributed.ReduceOp.MAX)
    return largest.tolist()


def on_first(function):
    """Call function() in the first process; return its result, or raise its UserError, in all.

    The result is sent, so that the other processes need no file.
    """
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
    """Return whether no other process has asked this before: of several errors one is printed.

    The error that counts is the first; the others follow from it, or are the same.
    """
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
            # Small numbers travel from CPU to CPU, so that a GPU need not be waited for.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            # A process may wait hours for another one's adaptation, or for a download. That one
            # has died is noticed without a timeout, by its closed connection.
            distributed.init_process_group(backend, timeout=timedelta(days=30))
            atexit.register(distributed.destroy_process_group)
        operation(*arguments)
    except RuntimeError as error:
        # "[a file of the library: line] Connection closed by peer [127.0.0.1]:2460. This is ..."
        reason = re.sub(r"^\[.*?\] ", "", first_line(error)).split(". ")[0]
        raise UserError(
            f"another process ended early or cannot be reached ({reason[:160]}); see what it says, "
            "then start again: what was saved is intact, and a trainer goes on with --resume=true"
        ) from error
