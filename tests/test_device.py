"""The choice of the device."""

import pytest
import torch

from common import UserError, device
from common.device import computes_bfloat16, pick_device


def test_auto_is_cuda_where_it_is_there_else_the_cpu():
    assert pick_device("cpu") == torch.device("cpu")
    device = pick_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.ones(2, device=device).sum().item() == 2


@pytest.mark.parametrize("name", ["tpu", "", "cuda:99", "cuda:x", "GPU", "cpu\n", "meta"])
def test_a_device_that_is_not_there_is_one_message(name):
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert all(word in str(caught.value) for word in (repr(name), "auto", "cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("training", [True, False])
def test_cuda_may_use_tf32_and_a_training_measures_its_kernels(training):
    assert pick_device("cuda", training=training).type == "cuda"
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark == training


@pytest.mark.parametrize("there", [True, False])
def test_each_of_several_processes_gets_a_gpu_of_its_own(there, monkeypatch):
    asked = []

    def zeros(size, device):
        asked.append(str(device))
        raise RuntimeError("invalid device ordinal")

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")  # the second one on this machine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UserError, match="invalid device ordinal"):
        pick_device("auto")
    assert asked == ["cuda:1" if there else "cpu"]


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_several_processes_that_would_share_one_device_are_refused(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # torchrun did not start them
    with pytest.raises(UserError, match="start them with torchrun"):
        pick_device(name)


def test_the_first_line_names_the_device_and_torch(capsys):
    pick_device("cpu")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"device: CPU, {torch.get_num_threads()} thread")
    assert torch.__version__ in line and "CUDA" in line


@pytest.mark.parametrize("asked, lines", [("auto", 2), ("cpu", 1)])
@pytest.mark.parametrize(
    "cuda, advice", [(None, "install one that has it"), ("13.0", "update its driver")]
)
def test_a_card_that_torch_cannot_use_is_named(asked, lines, cuda, advice, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}")
    pick_device(asked)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines and (lines == 1 or advice in printed[1])


@pytest.mark.parametrize("has, lines", [(True, 1), (False, 2)])
def test_bfloat16_on_a_cpu_without_it_is_named(has, lines, monkeypatch, capsys):
    monkeypatch.setattr(device, "computes_bfloat16", lambda: has)
    pick_device("cpu")
    pick_device("cpu", "bfloat16")
    first, *printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines and ("--precision=float32" in printed[-1]) == (lines == 2)


@pytest.mark.parametrize(
    "flags, has",
    [("fma avx512_bf16 amx_tile", True), ("i8mm bf16 dgh", True), ("avx512f avx512bw", False)],
)
def test_the_instructions_of_a_cpu_are_read(flags, has, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    assert computes_bfloat16(str(tmp_path / "cpuinfo")) == has
    assert computes_bfloat16(str(tmp_path / "none"))  # no such file: not Linux


def test_a_warning_says_how_mps_computes():
    (line,) = device.warnings_about(torch.device("mps"), "mps", "float32")
    assert "channels first" in line
