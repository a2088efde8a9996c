"""The device to compute on, and how exactly it computes."""

import ctypes
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from common import UserError, first_line
from common.parallel import is_first, process_count


def pick_device(name, precision="float32", training=False):
    """Return the torch.device called `name` ("auto": CUDA where it is there, else the CPU).

    Prints what computes, and a line on what will be slow. Each process of torchrun gets a GPU of
    its own. On CUDA, float32 products may use TF32; a training measures which kernels are fastest.
    Raises UserError where the device is not there, or cannot serve several processes.
    """
    asked = name
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
        # Worth it for few shapes, each of them many times; a test has others for each k.
        torch.backends.cudnn.benchmark = training
    if device.type == "cpu":
        keep_freed_memory()
    if is_first():
        print("\n".join([f"device: {describe(device)}", *warnings_about(device, asked, precision)]))
    return device


def describe(device):
    """Return what computes, in words: the card or the CPU's threads, torch and its CUDA."""
    threads = torch.get_num_threads()
    what = {"cpu": f"CPU, {threads} thread{'s' * (threads > 1)}", "mps": "Apple GPU (mps)"}
    if device.type == "cuda":
        what["cuda"] = f"{torch.cuda.get_device_name(device)} ({device})"
    cuda = f"built with CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"{what[device.type]}; torch {torch.__version__}, {cuda}"


def warnings_about(device, asked, precision):
    """Return a line for each reason why a run on `device` may be slow, or fail."""
    lines = []
    if device.type == "mps":
        lines.append("this was never tried on mps; the encoder computes channels first there")
    if device.type == "cpu" and asked == "auto" and sees_nvidia_card():
        reason = "cannot use it; update its driver, or install a torch for an older CUDA"
        if not torch.version.cuda:
            reason = "is built without CUDA; install one that has it"
        url = "https://pytorch.org/get-started/locally"
        lines.append(f"NVIDIA's driver is installed here, but this torch {reason}: {url}")
    if device.type == "cpu" and precision == "bfloat16" and not computes_bfloat16():
        slow = "this CPU has no instructions for bfloat16, so it takes 4 to 8 times as long as"
        lines.append(f"{slow} --precision=float32")
    return [f"warning: {line}" for line in lines]


def sees_nvidia_card():
    """Return whether NVIDIA's driver is installed, and its cards are not hidden on purpose."""
    driver = shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version")
    return bool(driver) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def computes_bfloat16(info="/proc/cpuinfo"):
    """Return whether the CPU multiplies in bfloat16; True where the system does not say."""
    names = r"\b(avx512_bf16|amx_bf16|bf16)\b"
    return not os.path.exists(info) or bool(re.search(names, Path(info).read_text()))


def keep_freed_memory():
    """Let this process keep the memory that it frees, where the C library is glibc.

    By default glibc gives large blocks back to the system and gets them again, zeroed, thousands of
    times in a training step: 8 to 10 % of its time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: free bytes at the heap's end before it shrinks
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger tensors are not on the heap; the maximum
