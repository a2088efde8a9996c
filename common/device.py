"""The device to compute on, and how exactly it computes."""

import ctypes
import os
import re
import sys

import torch

from common import UserError, first_line
from common.parallel import process_count


def pick_device(name):
    """Return the torch.device called `name` ("auto": CUDA where it is there, else the CPU).

    Each process of torchrun gets a GPU of its own. On CUDA, float32 products may use TF32.
    Raises UserError where the device is not there, or cannot serve several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"there is no device {name!r}; pass auto, cuda, cuda:1, mps or cpu")
    if process_count() > 1 and name != "cpu":
        if name != "cuda" or "LOCAL_RANK" not in os.environ:
            raise UserError(
                f"several processes cannot share device {name!r}: start them with torchrun and "
                "--device=cuda (a GPU for each) or --device=cpu"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = f"device {name!r} cannot be used here ({first_line(error)})"
        raise UserError(f"{reason}; pass --device=auto or --device=cpu") from error
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
