"""A step as one CUDA graph: thousands of kernel launches become one."""

import sys

import torch

from common.config import first_line

# Eager calls before the recording: lazy initialisation and cuDNN's choice of algorithms cannot be
# part of a graph.
WARM_UP = 3


class CudaGraphStep:
    """A function of tensors, recorded on CUDA as one graph and replayed; elsewhere just called.

    function: takes tensors of the same shapes at every call, computes on them and on tensors of
    its own without reading a value on the host, and returns a tuple of tensors. What it changes in
    place (gradients, running statistics) changes at every call, eager or replayed.
    enabled: if False, the function is just called on CUDA, too.
    """

    def __init__(self, function, device, enabled=True):
        self.function, self.graph, self.calls = function, None, 0
        self.wanted = enabled and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.wanted else None

    def __call__(self, *inputs):
        if self.graph is not None and all(a.shape == b.shape for a, b in zip(self.inputs, inputs)):
            return self._replay(inputs)
        if not self.wanted or self.graph is not None:
            return self.function(*inputs)
        self.calls += 1
        if self.calls > WARM_UP and self._record(inputs):
            return self._replay(inputs)
        # Warm up on the stream of the recording: autograd ties what it creates to that stream.
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
            reason = first_line(error)
            print(f"no CUDA graph ({reason}); going on without one, more slowly", file=sys.stderr)
            return False
        self.graph = graph
        return True

    def _replay(self, inputs):
        for recorded, new in zip(self.inputs, inputs):
            recorded.copy_(new)
        self.graph.replay()
        # The next replay overwrites the outputs.
        return tuple(output.clone() for output in self.outputs)
