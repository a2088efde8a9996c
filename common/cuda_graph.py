"""A step as one CUDA graph: thousands of kernel launches become one."""

import sys

import torch

# Eager calls before the recording: lazy initialisation and cuDNN's choice of algorithms cannot be
# part of a graph.
WARM_UP = 3


class CudaGraphStep:
    """A function of tensors, recorded on CUDA as one graph and replayed; elsewhere just called.

    function: computes on its tensors and on others of its own without reading a value on the host,
    and returns a tuple of tensors. What it changes in place (weights, gradients, statistics)
    changes at every call, eager or replayed. Calls with other shapes than the recorded ones are
    eager; so are all where several processes exchange gradients, or where enabled is False.
    """

    failed = False  # one recording that fails is enough: the next one would fail as well

    def __init__(self, function, device, enabled=True):
        self.function, self.graph, self.shapes, self.calls = function, None, None, 0
        distributed = torch.distributed
        alone = not (distributed.is_available() and distributed.is_initialized())
        self.wanted = enabled and device.type == "cuda" and alone
        self.stream = torch.cuda.Stream(device) if self.wanted else None

    def __call__(self, *inputs):
        shapes = [tensor.shape for tensor in inputs]
        if self.graph is not None and shapes == self.shapes:
            return self._replay(inputs)
        if not self.wanted or self.graph is not None or CudaGraphStep.failed:
            return self.function(*inputs)
        # What is recorded is a shape that comes back, not a short last batch.
        self.calls = self.calls + 1 if shapes == self.shapes else 1
        self.shapes = shapes
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
        self.inputs, before = [tensor.clone() for tensor in inputs], torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a failed recording leaves its own as the current one
            CudaGraphStep.failed = True
            reason = str(error).partition("\n")[0]
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
