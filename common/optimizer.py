"""AdamW in few calls, Muon, and the learning rate as a function of the epoch."""

import math

import torch

MUON_FACTOR = 6.0  # Muon's learning rate over that of the AdamW beside it
MUON_MOMENTUM = 0.9


def make_optimizer(parameters, lr, weight_decay, device, name="adamw"):
    """Return torch's AdamW, or Muon: one fused call where the device has it, recordable on CUDA."""
    on_cuda, parameters = device.type == "cuda", list(parameters)
    options = {"fused": device.type in ("cuda", "cpu"), "capturable": on_cuda}
    kernels = [p for p in parameters if p.ndim == 4] if name == "muon" else []
    others = [p for p in parameters if p.ndim != 4] if name == "muon" else parameters
    groups = [{"params": others}] + [{"params": kernels, "lr_factor": MUON_FACTOR}] * bool(kernels)
    for group in groups:
        group["lr"] = torch.tensor(lr, device=device) if on_cuda else lr  # a graph reads it anew
    return (Muon if kernels else torch.optim.AdamW)(groups, weight_decay=weight_decay, **options)


class Muon(torch.optim.AdamW):
    """Muon for the convolutions, the second parameter group, and AdamW for the rest.

    The update of a kernel [D, C, h, w], seen as a matrix [D, C*h*w], is its momentum with all
    singular values brought near 1: Jordan et al. 2024, "Muon: An optimizer for hidden layers in
    neural networks".
    """

    @torch.no_grad()
    def step(self):
        whole = self.param_groups
        self.param_groups = whole[:1]
        super().step()
        self.param_groups = whole
        group, batches = whole[1], {}
        for weight in [each for each in group["params"] if each.grad is not None]:
            if not (state := self.state[weight]):  # under AdamW's names, which load it, too
                state.update(step=weight.new_zeros(()), exp_avg=torch.zeros_like(weight))
            momentum = state["exp_avg"]
            momentum.lerp_(weight.grad, 1 - MUON_MOMENTUM)
            matrix = weight.grad.lerp(momentum, MUON_MOMENTUM).flatten(1)  # Nesterov's
            wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            batches.setdefault(len(wide), []).append((weight, wide))
        for batch in batches.values():
            for (weight, wide), root in zip(batch, inverse_roots([wide for _, wide in batch])):
                rows, columns = len(weight), weight[0].numel()
                update = root @ wide if rows <= columns else (root @ wide).T
                step = group["lr"] * max(1, rows / columns) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update.view(weight.shape) * step)


def inverse_roots(matrices):
    """Return R [B, m, m], about (X X^T)^(-1/2), for matrices X [m, n]: R X is X orthogonalised.

    Five steps of a Newton-Schulz iteration, by the polynomial of Jordan et al. 2024, on X X^T in
    place of X: its size is m for all of them. Singular values come out between 0.7 and 1.2.
    """
    gram = torch.stack([matrix @ matrix.T for matrix in matrices])
    squares = gram.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None] + 1e-14  # of the norms
    gram, identity = gram / squares, torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
    root = identity / squares.sqrt()
    for _ in range(5):
        factor = 2.0315 * gram @ gram - 4.7750 * gram + 3.4445 * identity
        root, gram = factor @ root, factor @ gram @ factor
    return root


def set_learning_rate(optimizer, lr):
    """Set the learning rate of all parameters; Muon's is MUON_FACTOR times as high."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_factor", 1)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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
