"""How work is started: an optimizer in few calls, a step as one CUDA graph, independent tasks side by side."""

import sys
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch

WARM_UP = 3  # calls before a graph is recorded: lazy initialisations and cuDNN's choice of algorithms cannot be in one
STREAMS = 4  # tasks that run side by side on a GPU


def make_optimizer(parameters, lr, weight_decay, device):
    """Return torch's AdamW, one call for all parameters where the device has that; on CUDA it can be part of a graph."""
    cuda = device.type == "cuda"
    # A graph repeats the numbers that it was recorded with: the learning rate has to be a tensor there.
    lr = torch.tensor(lr, device=device) if cuda else lr
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=cuda or device.type == "cpu", capturable=cuda)


def set_learning_rate(optimizer, lr):
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class Captured:
    """A function of tensors that on CUDA is recorded as one graph and replayed: thousands of launches become one.

    Elsewhere it is the function. function: takes tensors whose shapes are the same at every call, works on them and on
    tensors of its own without a look at their values, and returns a tuple of tensors; what it changes in place (weights,
    optimizer state) is changed by every call, the first ones included, which run it as it is.
    """

    def __init__(self, function, device):
        self.function, self.graph, self.calls = function, None, 0
        self.wanted = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.wanted else None

    def __call__(self, *inputs):
        if self.graph is not None and all(kept.shape == new.shape for kept, new in zip(self.inputs, inputs)):
            return self._replay(inputs)
        if not self.wanted or self.graph is not None:
            return self.function(*inputs)
        self.calls += 1
        if self.calls > WARM_UP and self._record(inputs):
            return self._replay(inputs)
        # On the stream of the recording to come, to which autograd ties what it makes now.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def _record(self, inputs):
        """Record the function, which does not run it, and return whether that went well."""
        self.inputs = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:
            self.wanted = False
            print(f"no CUDA graph could be recorded ({str(error).splitlines()[0]}); going on without, more slowly", file=sys.stderr)
            return False
        self.graph = graph
        return True

    def _replay(self, inputs):
        for kept, new in zip(self.inputs, inputs):
            kept.copy_(new)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)  # the next replay overwrites them


class SideBySide:
    """Workers for independent tasks: threads on the CPU, which share its cores, and streams on a GPU.

    device: where the tasks compute; most: tasks that there are at a time. A network that sees twenty images keeps one
    core busy, and two of them hardly better: that many tasks, each on a core of its own, take half the time.
    """

    def __init__(self, device, most):
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.count = max(1, min(most, STREAMS if device.type == "cuda" else threads))
        self.streams = [torch.cuda.Stream(device) for _ in range(self.count)] if device.type == "cuda" else None
        self.threads = None
        if threads > 1 and self.count > 1:
            self.threads = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(threads // self.count,))
            self.free = SimpleQueue()
            for worker in range(self.count):
                self.free.put(worker)

    def run(self, function, items):
        """Yield function(item, worker) for all items, in their order; worker, 0..count-1, has one item at a time."""
        if self.threads:
            return self.threads.map(lambda item: self._in_thread(function, item), items)
        if self.streams:
            return self._on_streams(function, items)
        return (function(item, 0) for item in items)

    def _in_thread(self, function, item):
        worker = self.free.get()
        try:
            return function(item, worker)
        finally:
            self.free.put(worker)

    def _on_streams(self, function, items):
        # All fork from the current stream and join it again, so that a recording of that one records them too.
        current, results = torch.cuda.current_stream(), []
        for stream in self.streams:
            stream.wait_stream(current)
        for number, item in enumerate(items):
            with torch.cuda.stream(self.streams[number % self.count]):
                results.append(function(item, number % self.count))
        for stream in self.streams:
            current.wait_stream(stream)
        return results
