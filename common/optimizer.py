"""AdamW in few calls, and the learning rate as a function of the epoch."""

import math

import torch


def make_optimizer(parameters, lr, weight_decay, device):
    """Return torch's AdamW: one fused call where the device has it, recordable on CUDA."""
    on_cuda = device.type == "cuda"
    rate = torch.tensor(lr, device=device) if on_cuda else lr  # a CUDA graph reads it anew
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        parameters, lr=rate, weight_decay=weight_decay, fused=fused, capturable=on_cuda
    )


def set_learning_rate(optimizer, lr):
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def step_decay(lr, epoch, epochs, drops):
    """Return `lr` divided by 10 once for each of `drops`, shares of the epochs, that is reached.

    epoch: counted from 0. With 200 epochs, drops (0.7, 0.9) are epochs 140 and 180.
    """
    return lr * 0.1 ** sum(epoch / epochs >= share for share in drops)


def one_cycle(lr, done):
    """Return the rate after a share `done`: up in the first fifth, then down half a cosine."""
    if done < 0.2:
        return lr * (max(done, 0.001) / 0.2)
    return lr * (0.5 + 0.5 * math.cos(math.pi * (done - 0.2) / 0.8))
