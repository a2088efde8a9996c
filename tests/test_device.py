"""The choice of the device."""

import pytest
import torch

from common import UserError
from common.device import pick_device


def test_auto_is_cuda_where_it_is_there_else_the_cpu():
    assert pick_device("cpu") == torch.device("cpu")
    device = pick_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.ones(2, device=device).sum().item() == 2


@pytest.mark.parametrize("name", ["tpu", "", "cuda:99", "cuda:x", "GPU", "cpu\n", "meta"])
def test_a_device_that_is_not_there_is_one_message(name):
    with pytest.raises(UserError) as caught:
        pick_device(name)
    message = str(caught.value)
    assert repr(name) in message and "auto" in message
    assert "cpu" in message and "\n" not in message


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
