"""Independent tasks side by side: threads on the CPU, streams on a GPU."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from queue import SimpleQueue

import torch

STREAMS = 4  # tasks that run side by side on a GPU


class Workers:
    """Workers for independent tasks, each with a deep copy of `module` of its own.

    device: where the tasks compute; tasks: how many of them there are at a time. On the CPU the
    workers are threads that share its cores: a network that sees twenty images does not scale past
    one core, so each core gets a task of its own. copies: one deep copy per worker, made once.
    """

    def __init__(self, device, tasks, module):
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        count = max(1, min(tasks, STREAMS if device.type == "cuda" else threads))
        self.copies = [deepcopy(module) for _ in range(count)]
        self.streams = self.threads = None
        if device.type == "cuda":
            self.streams = [torch.cuda.Stream(device) for _ in range(count)]
        elif threads > 1 and count > 1:
            self.threads = ThreadPoolExecutor(
                count, initializer=torch.set_num_threads, initargs=(threads // count,)
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
        # All streams fork from the current one and join it again, so that a CUDA graph recorded on
        # that one contains them.
        current, results = torch.cuda.current_stream(), []
        for stream in self.streams:
            stream.wait_stream(current)
        for number, item in enumerate(items):
            with torch.cuda.stream(self.streams[number % len(self.streams)]):
                results.append(function(item, self.copies[number % len(self.copies)]))
        for stream in self.streams:
            current.wait_stream(stream)
        return results
