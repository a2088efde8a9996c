"""The inner loop of first-order MAML on a deep copy of the encoder, and the hand-over of its gradients."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch.func import functional_call

from common.prototypes import make_prototypes, prototype_head

OUTPUT_INITS = ("prototypes", "zeros")  # ProtoMAML and MAML
BATCHNORMS = ("batch", "frozen")  # statistics that BatchNorm uses: those of the batch, or the encoder's running ones


def adapt(
    encoder, x_spt, y_spt, n_way, num_inner_steps, lr_inner, lr_output, output_init="prototypes", batchnorm="batch", *,
    local=None, attached=True, share_first_pass=True,
):  # fmt: skip
    """Adapt a copy of the encoder, with an output layer of its own, to a support set by SGD.

    encoder: the base model; its parameters, buffers and gradients come out as they went in.
    x_spt [n_way * K, 3, H, W], class by class; y_spt int64 [n_way * K], labels 0..n_way-1.
    num_inner_steps: SGD steps; lr_inner for the copy of the encoder, lr_output for the output layer.
    output_init: "prototypes" starts from the linear layer that equals a ProtoNet (ProtoMAML), "zeros" from nothing (MAML).
    batchnorm: "batch": BatchNorm uses the statistics of the support set, which the copy's running statistics follow (the
        tutorial's way); "frozen": it uses the encoder's running statistics, and they stay.
    local: a copy from an earlier call to be used again, which saves making one.
    attached: whether the outer loop will want gradients through the prototypes; a test does not.
    share_first_pass: take the prototypes and the first step from one pass through the encoder: before that step the copy
        equals it. False runs two passes, as the algorithm is written down; the result is the same.

    Returns (local, weight [n_way, D], bias [n_way]): the adapted copy and the adapted output layer. The copy is in
    train mode after "batch", in eval mode after "frozen". The output layer is attached to the base encoder through the
    prototypes: its gradient is that of its starting point, as first-order MAML wants it (Finn et al. 2017, section 5.2;
    Triantafillou et al. 2020, section 3).
    """
    local = deepcopy(encoder) if local is None else copy_weights(encoder, local)
    local.train(batchnorm == "batch")
    features = base_features(encoder, local, x_spt, noted=share_first_pass)  # [n_way * K, D]
    if output_init == "prototypes":
        init_weight, init_bias = prototype_head(make_prototypes(features if attached else features.detach(), n_way))
    else:
        init_weight, init_bias = features.new_zeros(n_way, features.shape[1]), features.new_zeros(n_way)
    weight = init_weight.detach().clone().requires_grad_()
    bias = init_bias.detach().clone().requires_grad_()

    for step in range(num_inner_steps):
        first_pass = (encoder, features) if share_first_pass and step == 0 else None
        inner_step(local, weight, bias, x_spt, y_spt, lr_inner, lr_output, first_pass)
        features = None  # its graph is large, and the prototypes keep what they need of it

    # Same values, but now a function of the prototypes: (adapted - initial) counts as a constant.
    weight = (weight - init_weight).detach() + init_weight
    bias = (bias - init_bias).detach() + init_bias
    return local, weight, bias


def inner_step(local, weight, bias, x_spt, y_spt, lr_inner, lr_output, first_pass=None):
    """Take one step of SGD, in place, on a copy of the encoder and an output layer.

    first_pass: (encoder, features), the encoder that the copy still equals and what it made of the support set: the
    gradients are taken from there, and that graph is kept.
    """
    model, features = first_pass or (local, local(x_spt))
    loss = F.cross_entropy(F.linear(features, weight, bias), y_spt)
    inputs = [*model.parameters(), weight, bias]
    *gradients, weight_gradient, bias_gradient = torch.autograd.grad(loss, inputs, retain_graph=first_pass is not None)
    with torch.no_grad():
        torch._foreach_add_(list(local.parameters()), gradients, alpha=-lr_inner)
        weight -= lr_output * weight_gradient
        bias -= lr_output * bias_gradient


def base_features(encoder, local, x_spt, noted):
    """Return the un-adapted encoder's features of the support set, as a function of its parameters.

    They pass through the copy, with the encoder's parameters put in: whatever happens to buffers happens to the copy's
    if this pass is to be `noted` in its running statistics, and to none otherwise.
    """
    tensors = dict(encoder.named_parameters())
    if not noted:
        tensors.update((name, buffer.clone()) for name, buffer in local.named_buffers())
    return functional_call(local, tensors, x_spt)


def first_order_gradients(loss, encoder, local):
    """Return the gradients of a task's query loss for the encoder's parameters, in their order.

    They are those of the adapted copy (first order: d theta' / d theta = 1) plus those that come through the prototypes.
    """
    count = len(list(encoder.parameters()))
    found = torch.autograd.grad(loss, [*encoder.parameters(), *local.parameters()], allow_unused=True)
    if found[0] is None:  # MAML: the output layer started from zeros
        return list(found[count:])
    return list(torch._foreach_add(found[:count], found[count:]))


@torch.no_grad()
def copy_weights(source, target):
    """Copy parameters and buffers of `source` into `target`, a deep copy of it made earlier, and return `target`."""
    torch._foreach_copy_(list(target.parameters()), list(source.parameters()))
    for floating in (True, False):  # running statistics, counters: one type in a list makes one fast call
        torch._foreach_copy_(_buffers(target, floating), _buffers(source, floating))
    return target


@torch.no_grad()
def hand_over_gradients(encoder, gradients):
    """Set the gradients of the encoder to the sum of those of its tasks: `gradients`, one list per task."""
    total = list(gradients[0])
    for more in gradients[1:]:
        total = torch._foreach_add(total, more)
    for parameter, gradient in zip(encoder.parameters(), total):
        parameter.grad = gradient


def statistics_of(local):
    """Return copies of the running statistics of an adapted copy."""
    return torch._foreach_mul(_buffers(local), 1.0)


@torch.no_grad()
def follow_statistics(encoder, statistics):
    """Set the encoder's BatchNorm statistics to the mean of those of its adapted copies: `statistics`, one list per task.

    Adaptation leaves them alone, so the outer loop has to carry them along: a test starts from them.
    """
    mean = [torch.stack(same).mean(dim=0) for same in zip(*statistics)]
    torch._foreach_copy_(_buffers(encoder), mean)


def _buffers(module, floating=True):
    return [buffer for buffer in module.buffers() if buffer.is_floating_point() == floating]
