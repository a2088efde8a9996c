"""The deepcopy-based inner loop of MAML and ProtoMAML, first order."""

import dataclasses

import torch
import torch.nn.functional as F

from common.prototypes import class_counts, make_prototypes, prototype_head


def inner_loop(
    local, weight, bias, x_spt, y_spt, num_inner_steps, lr_inner, lr_output, class_weights=None
):
    """Adapt a copy of the encoder, in place, and its output layer to a support set by SGD.

    local: a deep copy of the encoder; weight [N, D], bias [N]: the output layer to start from;
    x_spt [N*K, 3, H, W]; y_spt int64 [N*K]; class_weights [N]: in the loss, None for equal ones.
    Returns the adapted (weight, bias). The steps are not differentiated: first-order MAML, Finn et
    al. 2017, section 5.2.
    """
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in (weight, bias))
    for _ in range(num_inner_steps):
        inner_step(local, weight, bias, x_spt, y_spt, lr_inner, lr_output, class_weights)
    return weight, bias


@torch.enable_grad()  # also where the caller wants no gradient of its own
def inner_step(local, weight, bias, x_spt, y_spt, lr_inner, lr_output, class_weights=None):
    """Take one SGD step, in place: theta' = theta - lr_inner * gradient of the support loss."""
    theta = list(local.parameters())
    loss = F.cross_entropy(F.linear(local(x_spt), weight, bias), y_spt, class_weights)
    *gradients, of_weight, of_bias = torch.autograd.grad(loss, [*theta, weight, bias])
    with torch.no_grad():
        torch._foreach_add_(theta, gradients, alpha=-lr_inner)  # all tensors in one call
        weight -= lr_output * of_weight
        bias -= lr_output * of_bias


@dataclasses.dataclass(frozen=True)
class InnerLoop:
    """How a model adapts to a support set in a test.

    num_inner_steps: SGD steps; lr_inner: their learning rate for the encoder, lr_output for the
        output layer.
    output_init: "prototypes" starts from the linear layer that equals a ProtoNet (ProtoMAML),
        "zeros" from nothing (MAML).
    batchnorm: with "batch" BatchNorm uses the statistics of the support set, and the copy's running
        statistics follow them (the tutorial's way); with "frozen" it uses the encoder's running
        statistics, which stay.
    """

    num_inner_steps: int
    lr_inner: float
    lr_output: float
    output_init: str = "prototypes"
    batchnorm: str = "batch"

    def start(self, encoder, x_spt, n_way, local, y_spt=None):
        """Give `local`, a deep copy, the encoder's weights; return its output layer before a step.

        x_spt [n_way * K, 3, H, W], class by class or with its labels y_spt -> weight [n_way, D],
        bias [n_way].
        """
        local.train(self.batchnorm == "batch")
        copy_weights(encoder, local)
        if self.output_init == "zeros":
            return x_spt.new_zeros(n_way, encoder.num_features), x_spt.new_zeros(n_way)
        with torch.no_grad():
            features = local(x_spt)  # [N*K, D]
            copy_tensors(float_buffers(encoder), float_buffers(local))  # moved by the pass
        return prototype_head(make_prototypes(features, n_way, y_spt))

    def adapt(self, encoder, views, support, y_spt, n_way, local):
        """Adapt `local`, a deep copy of the encoder, and an output layer to a support set.

        views: the Views of all images; support: indices of images, int64 [S]; y_spt: their labels
        in the task, int64 [S], each of 0..n_way-1, in any order. Learns from all views of an image,
        and from each class alike, whatever its number of images. The encoder stays as it is.
        Returns (weight [n_way, D], bias [n_way]); the copy is in train mode after "batch".
        """
        support, y_spt = support[order := y_spt.argsort(stable=True)], y_spt[order]
        x_spt, counts = views.images_of(support), class_counts(y_spt, n_way)
        y_spt = y_spt.repeat_interleave(views.count)
        if counts.min() == counts.max():
            head, class_weights = self.start(encoder, x_spt, n_way, local), None
        else:
            head = self.start(encoder, x_spt, n_way, local, y_spt)
            class_weights = counts.max() / counts.to(head[0].dtype)
        rates = self.lr_inner, self.lr_output
        return inner_loop(local, *head, x_spt, y_spt, self.num_inner_steps, *rates, class_weights)


@torch.no_grad()
def copy_weights(source, target):
    """Copy parameters and floating-point buffers of `source` into its deep copy `target`."""
    copy_tensors(source.parameters(), target.parameters())
    copy_tensors(float_buffers(source), float_buffers(target))


def copy_tensors(sources, targets):
    """Copy tensors into others, in one call; there may be none."""
    if targets := list(targets):
        torch._foreach_copy_(targets, list(sources))


def float_buffers(module):
    """Return the buffers that are averaged and copied: BatchNorm's running statistics."""
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]
