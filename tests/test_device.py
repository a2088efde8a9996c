"""The choice of the device."""

import pytest
import torch

from common.config import UserError
from common.device import pick_device


def test_the_cpu_is_always_there():
    assert pick_device("cpu") == torch.device("cpu")


def test_auto_takes_what_is_there():
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = pick_device("auto")
    assert device.type == next((name for name in there if there[name]), "cpu")
    assert torch.ones(2, device=device).sum().item() == 2


NAMES = ["tpu", "", "cuda:99", "cpu:x", "GPU", "hpu", "cuda:", "cuda:x", "cpu\n"]


@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_is_not_there_is_one_message(name):
    with pytest.raises(UserError) as caught:
        pick_device(name)
    message = str(caught.value)
    assert repr(name) in message and "--device=auto" in message
    assert "cpu" in message and "\n" not in message


def test_a_device_without_memory_is_no_device():
    # torch knows "meta", on which tensors have shapes but no values.
    with pytest.raises(UserError):
        pick_device("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_gpu_is_one_message():
    with pytest.raises(UserError, match="--device=auto"):
        pick_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_may_use_tf32():
    assert pick_device("cuda").type == "cuda"
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32


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
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UserError, match="invalid device ordinal"):
        pick_device("auto")
    assert asked == ["cuda:1" if there else "cpu"]


def test_processes_that_torchrun_did_not_start_are_one_message(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="start with torchrun"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_several_processes_cannot_share_one_device(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="each gets a GPU of its own"):
        pick_device(name)
