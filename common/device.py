"""The device to compute on, and how exactly it computes."""

import ctypes
import os
import re
import sys

import torch

from common.config import UserError, first_line
from common.parallel import process_count


def pick_device(name):
    """Return the torch.device called `name` ("auto": CUDA, else Apple's MPS, else the CPU).

    Each process of torchrun gets a GPU of its own. On CUDA, float32 products may use TF32.
    Raises UserError where the device is not there, or cannot serve several processes.
    """
    if name == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((name for name, there in found.items() if there), "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(
            f"there is no device {name!r} here; pass --device=auto, --device=cuda (cuda:1 and so "
            "on), --device=mps or --device=cpu"
        )
    if process_count() > 1:
        if name not in ("cuda", "cpu"):
            raise UserError(
                f"several processes cannot share device {name!r}; pass --device=cuda (each gets a "
                "GPU of its own) or --device=cpu"
            )
        if name == "cuda":
            if "LOCAL_RANK" not in os.environ:
                raise UserError("found RANK but no LOCAL_RANK: start with torchrun, or unset RANK")
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} cannot be used here ({first_line(error)}); pass --device=auto or "
            "--device=cpu"
        ) from error
    if device.type == "cuda":
        # Streams and graphs are made on the current device.
        torch.cuda.set_device(device.index or 0)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # few shapes, each of them many times
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let this process keep the memory that it frees, where the C library is glibc.

    By default glibc gives large blocks back to the system and gets them again, zeroed, thousands of
    times in a training step: 8 to 10 % of its time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: free bytes at the heap's end before it shrinks
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger tensors are not on the heap; the maximum
