"""The device to compute on, and how exactly it computes."""

import re

import torch

from common.config import UserError


def pick_device(name):
    """Return the torch.device called `name` ("auto": CUDA, else Apple's MPS, else the CPU), ready for the scripts.

    Raises UserError where the device is not there. On CUDA, float32 products may use TF32.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d)?", name):
        raise UserError(f"there is no device {name!r} here; pass --device=auto, --device=cuda (cuda:1 and so on), --device=mps or --device=cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); pass --device=auto or --device=cpu") from error
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # few shapes, and each comes many times
    return device
