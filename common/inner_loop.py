"""The inner loop of first-order MAML on a deep copy of the encoder, and the hand-over of its gradients."""

from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F

from common.prototypes import make_prototypes, prototype_head

OUTPUT_INITS = ("prototypes", "zeros")  # ProtoMAML and MAML


def adapt(encoder, x_spt, y_spt, n_way, num_steps, lr_inner, lr_output, output_init="prototypes", local=None):
    """Adapt a copy of the encoder, with an output layer of its own, to a support set by SGD.

    encoder: the base model; its parameters, buffers and gradients come out as they went in.
    x_spt [n_way * K, 3, H, W], class by class; y_spt int64 [n_way * K], labels 0..n_way-1.
    num_steps: SGD steps; lr_inner for the copy of the encoder, lr_output for the output layer.
    output_init: "prototypes" starts from the linear layer that equals a ProtoNet (ProtoMAML), "zeros" from nothing (MAML).
    local: a copy from an earlier call to be used again, which saves making one.

    BatchNorm uses the statistics of the support set, and the copy's running statistics follow them.

    Returns (local, weight [n_way, D], bias [n_way]): the adapted copy, in train mode, and the adapted output layer. The
    output layer is attached to the base encoder through the prototypes: its gradient is that of its starting point,
    as first-order MAML wants it (Finn et al. 2017, section 5.2; Triantafillou et al. 2020, section 3).
    """
    local = deepcopy(encoder) if local is None else copy_weights(encoder, local)
    local.train()
    init_weight, init_bias = output_layer(encoder, x_spt, n_way, output_init)
    weight = init_weight.detach().clone().requires_grad_()
    bias = init_bias.detach().clone().requires_grad_()
    parameters = list(local.parameters())

    for _ in range(num_steps):
        loss = F.cross_entropy(F.linear(local(x_spt), weight, bias), y_spt)
        *gradients, weight_gradient, bias_gradient = torch.autograd.grad(loss, [*parameters, weight, bias])
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-lr_inner)
            weight -= lr_output * weight_gradient
            bias -= lr_output * bias_gradient

    # Same values, but now a function of the prototypes: (adapted - initial) counts as a constant.
    weight = (weight - init_weight).detach() + init_weight
    bias = (bias - init_bias).detach() + init_bias
    return local, weight, bias


def output_layer(encoder, x_spt, n_way, output_init):
    """Return the output layer's starting point, weight [n_way, D] and bias [n_way], as a function of the encoder."""
    if output_init == "zeros":
        width = encoder.classifier.out_features
        return x_spt.new_zeros(n_way, width), x_spt.new_zeros(n_way)
    with batch_statistics(encoder):
        return prototype_head(make_prototypes(encoder(x_spt), n_way))


@contextmanager
def batch_statistics(encoder):
    """Within this context BatchNorm uses the statistics of the batch and leaves its running statistics alone."""
    layers = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    modes = [(layer.training, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for layer, (training, tracking) in zip(layers, modes):
            layer.training, layer.track_running_stats = training, tracking


@torch.no_grad()
def copy_weights(source, target):
    """Copy parameters and buffers of `source` into `target`, a deep copy of it made earlier, and return `target`."""
    torch._foreach_copy_(_tensors(target), _tensors(source))
    return target


@torch.no_grad()
def hand_over_gradients(local, encoder):
    """Add the gradients of the adapted copy to those of the encoder (first order: d theta' / d theta = 1) and clear them."""
    for p_local, p_base in zip(local.parameters(), encoder.parameters()):
        p_base.grad = p_local.grad if p_base.grad is None else p_base.grad.add_(p_local.grad)
        p_local.grad = None


@torch.no_grad()
def follow_statistics(encoder, local, num_tasks):
    """Move the encoder's BatchNorm statistics by 1 / num_tasks of the way to those of an adapted copy.

    Adaptation leaves them alone, so the outer loop has to carry them along: a test starts from them.
    """
    for base, adapted in zip(encoder.buffers(), local.buffers()):
        if base.is_floating_point():
            base.lerp_(adapted, 1 / num_tasks)


def _tensors(module):
    return [*module.parameters(), *module.buffers()]
