"""What a CUDA graph does to a step, emulated on the CPU: the recorded operations run again on the
same tensors, with every Python number as it was. The results must not change by a bit."""

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from test_trainers import TRAINERS, last_of, tiny_encoder, tiny_encoders, train  # noqa: F401
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import kshot
from common.augment import Views
from common.cuda_graph import WARM_UP, CudaGraphStep
from common.inner_loop import InnerLoop
from common.optimizer import make_optimizer
from common.prototypes import episode_labels

pytestmark = pytest.mark.usefixtures("one_thread")
# While a graph is recorded, CUDA refuses what reads a value on the host (a number, how many entries
# are True or distinct) or copies one from there: torch.tensor is `lift_fresh`.
REFUSED = set(
    "_local_scalar_dense is_nonzero equal allclose nonzero masked_select bincount _unique _unique2 "
    "unique_dim unique_consecutive unique_dim_consecutive repeat_interleave lift_fresh".split()
)


def refuse(name):
    raise RuntimeError(f"not permitted when stream is capturing: {name}")


class HostReads(TorchFunctionMode):
    """Refuses what a Tape does not see: on the CPU these are no operations."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("tolist", "numpy", "cpu"):
            refuse(function.__name__)
        return function(*args, **kwargs or {})


class Tape(TorchDispatchMode):
    """Notes every operation with its arguments and results."""

    replays = 0

    def __init__(self):
        super().__init__()
        self.operations, self.is_new = [], True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in REFUSED or any(i is not None and i.dtype == torch.bool for i in indices):
            refuse(name)
        result = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        if self.is_new:  # here, other than on CUDA, the recording has run the step
            self.is_new = False
            return
        Tape.replays += 1
        for function, args, kwargs, recorded in self.operations:
            result = function(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result)):
                # The memory of a graph is fixed: what an operation makes lands where it did before.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapedStep(CudaGraphStep):
    """CudaGraphStep with a Tape in place of the graph; a failed recording is an error."""

    def __init__(self, function, device, enabled=True):
        super().__init__(function, device, enabled)
        self.wanted, self.stream = enabled, torch.cuda.current_stream()

    def _record(self, inputs):
        self.inputs, self.graph = [tensor.clone() for tensor in inputs], Tape()
        with HostReads(), self.graph:
            self.outputs = self.function(*self.inputs)
        return True


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda stream: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tape, "replays", 0)


def optimizer_as_on_cuda(parameters, lr, *more):
    """As make_optimizer on CUDA: the learning rate is a tensor, which a graph reads anew."""
    optimizer = make_optimizer(parameters, lr, *more)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(lr)
    return optimizer


@pytest.mark.parametrize(
    "model, options, replays",  # of 12 steps, all but the warm-up and the recording
    [
        ("classifier", [], 8),
        ("classifier", ["--teacher={start}"], 8),  # the path of a trained classifier
        ("classifier", ["--optimizer=muon"], 8),
        ("protonet", [], 8),
        ("protonet", ["--leave_one_out=true"], 8),
        ("protonet", ["--encoder=resnet12", "--width=4"], 8),
        ("protomaml", ["--encoder=conv4", "--width=4"], 8),
        # In each of two epochs the validation takes five times two episodes, and one alone.
        ("protomaml", ["--tasks_per_step=2", "--val_episodes=11", "--k_shot=1", "--n_query=1"], 14),
        ("maml", ["--output_init=zeros", "--num_inner_steps=2"], 8),
        ("protomaml", ["--init_from={start}", "--batchnorm=frozen", "--lr_inner=0.01"], 8),
    ],
)
def test_replays_train_to_the_same_bits(model, options, replays, glyph_dir, tmp_path, monkeypatch):
    start = train("classifier", glyph_dir, tmp_path / "start", "--steps_per_epoch=3")
    options = [option.format(start=start) for option in options]
    monkeypatch.setitem(TRAINERS, "maml", TRAINERS["protomaml"])
    script, lasts = TRAINERS[model][0], []
    monkeypatch.setattr(script, "make_optimizer", optimizer_as_on_cuda)
    for step in (CudaGraphStep, TapedStep):
        monkeypatch.setattr(script, "CudaGraphStep", step)
        more = ["--epochs=2", "--steps_per_epoch=6", *options]
        lasts.append(last_of(train(model, glyph_dir, tmp_path / step.__name__, *more)))
    assert Tape.replays == replays
    for name, tensor in lasts[0]["state_dict"].items():
        assert torch.equal(tensor, lasts[1]["state_dict"][name]), name
    assert lasts[0]["history"] == lasts[1]["history"]


@pytest.mark.parametrize("batchnorm", ["batch", "frozen"])
@pytest.mark.parametrize("output_init", ["prototypes", "zeros"])
def test_replayed_inner_steps_of_a_test_adapt_to_the_same_bits(output_init, batchnorm, monkeypatch):
    encoder, views = tiny_encoder().eval(), Views(torch.randn(24, 3, 32, 32), 2)
    sets = kshot.support_sets(torch.arange(3).repeat_interleave(8), 2, "abc")
    how = InnerLoop(8, 0.1, 0.1, output_init, batchnorm)
    spaces = [deepcopy(encoder) for _ in range(3)]  # of four tasks the last one is alone
    workers = SimpleNamespace(workspaces=spaces, map=lambda step, items: map(step, items, spaces))
    monkeypatch.setattr(kshot, "CudaGraphStep", TapedStep)
    adapted = kshot._adapt_in_graph(encoder, views, sets, 3, 2, how, workers)
    for number, (task, local, *head) in enumerate(adapted):
        assert torch.equal(task, sets[number])
        plain = deepcopy(encoder)
        head = how.adapt(encoder, views, task, episode_labels(3, 2), 3, plain)
        expected = [*head, *plain.state_dict().values()]
        found = [*head, *local.state_dict().values()]
        assert all(map(torch.equal, found, expected))
    assert number == 3 and Tape.replays == 2 * 8 - WARM_UP - 1


@pytest.mark.parametrize(
    "planted",
    "x*x.sum().item() x*x.tolist()[0] (x,-x)[bool(x[0]>0)] x*float(x.numpy()[0]) x*x.cpu() x[x>0] "
    "x.nonzero() x.masked_select(x>0) torch.bincount(x.long()) x.unique() x[:,None].unique(dim=0) "
    "x.repeat_interleave(x.long()) x*torch.tensor(2.0) x[[0,1]]".split(),
)
def test_a_step_that_cuda_would_refuse_to_record_is_noticed(planted):
    step = TapedStep(lambda x: (eval(planted, {"torch": torch}, {"x": x}),), torch.device("cpu"))
    for _ in range(WARM_UP):
        step(torch.ones(2))
    with pytest.raises(RuntimeError, match="not permitted"):
        step(torch.ones(2))
