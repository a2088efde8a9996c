"""What a CUDA graph does to a step, emulated on the CPU: the recorded operations run again on the
same tensors, with every Python number as it was. The results must not change by a bit."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_classifier
import train_protomaml
import train_protonet
from common import cuda_graph, kshot
from common.augment import Views
from common.checkpoint import load_checkpoint
from common.config import parse_config
from common.encoder import Encoder
from common.inner_loop import InnerLoop

pytestmark = pytest.mark.usefixtures("one_thread")

# While a graph is recorded, reading a value on the host is an error on CUDA.
HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class Tape(TorchDispatchMode):
    """Notes every operation with its arguments and results."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in HOST_READS, f"{name} reads a value on the host"
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, recorded in self.operations:
            result = function(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result)):
                # The memory of a graph is fixed: what an operation makes lands where it did before.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapedStep:
    """CudaGraphStep with a Tape in place of the graph."""

    replays = 0

    def __init__(self, function, device, enabled=True):
        self.function, self.calls, self.tape = function, 0, None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= cuda_graph.WARM_UP:
            return self.function(*inputs)
        if self.tape is None:
            self.inputs, self.tape = [tensor.clone() for tensor in inputs], Tape()
            with self.tape:
                self.outputs = self.function(*self.inputs)
        elif all(old.shape == new.shape for old, new in zip(self.inputs, inputs)):
            for recorded, new in zip(self.inputs, inputs):
                recorded.copy_(new)
            self.tape.replay()
            TapedStep.replays += 1
        else:
            return self.function(*inputs)
        return tuple(output.clone() for output in self.outputs)


EPISODES = ["--n_way=2", "--k_shot=2", "--n_query=2", "--lr_drops=0.5"]
TASKS = [*EPISODES, "--tasks_per_step=2", "--val_episodes=10"]
BATCHES = ["--n_way=2", "--batch_size=16"]
START = "{start}"  # stands for the path of a trained classifier
VARIANTS = {  # model, script and options
    "classifier": ("classifier", train_classifier, BATCHES),
    "taught": ("classifier", train_classifier, [*BATCHES, f"--teacher={START}"]),
    "protonet": ("protonet", train_protonet, EPISODES),
    "episodes": ("protonet", train_protonet, [*EPISODES, "--episodes_per_step=3"]),
    "protomaml": ("protomaml", train_protomaml, TASKS),
    "maml": ("maml", train_protomaml, [*TASKS, "--output_init=zeros"]),
    "frozen": (
        "protomaml",
        train_protomaml,
        [*TASKS, f"--init_from={START}", "--batchnorm=frozen", "--lr_inner=0.01"],
    ),
}


def train(model, script, options, glyph_dir, folder):
    where = ["--dataset=glyphs", f"--data_dir={glyph_dir}", f"--checkpoint_dir={folder}"]
    size = ["--epochs=2", "--steps_per_epoch=6", "--device=cpu"]
    script.main(parse_config(script.Config, [*where, *size, *options]))
    return load_checkpoint(folder / "glyphs" / f"{model}_last.pt")


def assert_same(first, second):
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name
    assert first["history"] == second["history"]


@pytest.fixture(scope="module")
def start(glyph_dir, tmp_path_factory):
    """The path of a trained classifier."""
    folder = tmp_path_factory.mktemp("start")
    train(*VARIANTS["classifier"], glyph_dir, folder)
    return folder / "glyphs" / "classifier.pt"


@pytest.mark.parametrize("variant", VARIANTS)
def test_replayed_steps_train_to_the_same_bits(variant, start, glyph_dir, tmp_path, monkeypatch):
    model, script, options = VARIANTS[variant]
    options = [option.replace(START, str(start)) for option in options]
    expected = train(model, script, options, glyph_dir, tmp_path / "called")

    monkeypatch.setattr(script, "CudaGraphStep", TapedStep)
    monkeypatch.setattr(TapedStep, "replays", 0)
    found = train(model, script, options, glyph_dir, tmp_path / "replayed")
    assert TapedStep.replays >= 8  # of 12 steps, all but the warm-up and the recording
    assert_same(expected, found)


@pytest.mark.parametrize("batchnorm", ["batch", "frozen"])
@pytest.mark.parametrize("output_init", ["prototypes", "zeros"])
def test_replayed_inner_steps_of_a_test_give_the_same_logits(output_init, batchnorm, monkeypatch):
    encoder = Encoder(8, 4, (1, 1, 1, 1), 2, 8).eval()
    images = torch.randn(24, 3, 32, 32)
    labels = torch.arange(3).repeat_interleave(8)
    sets = kshot.support_sets(labels, 2, "abc")
    inner_loop = InnerLoop(8, 0.1, 0.1, output_init, batchnorm)
    models = {}
    for step in (kshot.CudaGraphStep, TapedStep):
        monkeypatch.setattr(kshot, "CudaGraphStep", step)
        monkeypatch.setattr(TapedStep, "replays", 0)
        count, seen = kshot._count, []

        def watch(logits, y_qry):
            seen.append(logits.clone())
            return count(logits, y_qry)

        with monkeypatch.context() as patched:
            patched.setattr(kshot, "_count", watch)
            kshot.adapted_counts(
                encoder, Views(images), labels, sets, 3, 2, inner_loop, in_graph=True
            )
        models[step] = seen
    assert TapedStep.replays == 4 * 7 - cuda_graph.WARM_UP - 1
    for first, second in zip(*models.values(), strict=True):
        assert torch.equal(first, second)


def test_a_step_that_reads_a_value_on_the_host_is_noticed():
    step = TapedStep(lambda values: (values * values.sum().item(),), torch.device("cpu"))
    for _ in range(cuda_graph.WARM_UP):
        step(torch.ones(2))
    with pytest.raises(AssertionError, match="_local_scalar_dense reads a value on the host"):
        step(torch.ones(2))


def test_a_replay_keeps_the_python_numbers_of_its_recording():
    rate = [1.0]
    step = TapedStep(lambda values: (values * rate[0],), torch.device("cpu"))
    for _ in range(cuda_graph.WARM_UP + 1):
        step(torch.ones(2))
    rate[0] = 2.0
    assert step(torch.ones(2))[0].tolist() == [1.0, 1.0]  # what a graph would give
