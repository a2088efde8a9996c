"""The inner loops, on a deep copy of the encoder; the hand-over of first-order MAML's gradients."""

import dataclasses
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch.func import functional_call

from common.prototypes import distance_logits, make_prototypes, prototype_head
from common.samplers import episode_labels

OUTPUT_INITS = ("prototypes", "zeros")  # ProtoMAML and MAML
BATCHNORMS = ("batch", "frozen")  # statistics of the batch at hand, or the encoder's running ones
# Of fine-tuning
MOST_IN_HALF = 8  # images of a class in one half at most
FINETUNE_LEAST_CROP = 0.6  # area of the smallest crop, as a share of the image
FINETUNE_COLOR_JITTER = 0.3  # largest random change of brightness, contrast and saturation


@dataclasses.dataclass(frozen=True)
class InnerLoop:
    """How a model adapts to a support set.

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

    @classmethod
    def of(cls, config, **others):
        """Return the inner loop of a config, a dict, with `others` where they are not 0."""
        # An option that is younger than a checkpoint's config has its default.
        names = [field.name for field in dataclasses.fields(cls) if field.name in config]
        given = {name: config[name] for name in names}
        return cls(**given | {name: value for name, value in others.items() if value})


def adapt(encoder, x_spt, y_spt, n_way, inner_loop, local=None, attached=True):
    """Adapt a copy of the encoder, and an output layer of its own, to a support set by SGD.

    encoder: the base model; its parameters, buffers and gradients stay as they are.
    x_spt [n_way * K, 3, H, W], class by class; y_spt int64 [n_way * K], labels 0..n_way-1.
    local: the copy of an earlier call to be used again, which saves making one.
    attached: whether the outer loop will want gradients through the prototypes; a test does not.

    Returns (local, weight [n_way, D], bias [n_way]): the adapted copy and the adapted output layer.
    The copy is in train mode after "batch" and in eval mode after "frozen". The output layer stays
    attached to the encoder through the prototypes: its gradient is that of its initial value, as
    first-order MAML wants it (Finn et al. 2017, section 5.2; Triantafillou et al. 2020, section 3).
    """
    local = deepcopy(encoder) if local is None else copy_weights(encoder, local)
    local.train(inner_loop.batchnorm == "batch")
    # One pass serves the prototypes and the first step: before that step, theta' = theta. It runs
    # `local` with the encoder's parameters, so that only `local`'s running statistics change.
    features = functional_call(local, dict(encoder.named_parameters()), x_spt)  # [N*K, D]
    if inner_loop.output_init == "prototypes":
        prototypes = make_prototypes(features if attached else features.detach(), n_way)
        init_weight, init_bias = prototype_head(prototypes)  # [N, D], [N]
    else:
        init_weight = features.new_zeros(n_way, features.shape[1])
        init_bias = features.new_zeros(n_way)
    weight = init_weight.detach().clone().requires_grad_()
    bias = init_bias.detach().clone().requires_grad_()

    for step in range(inner_loop.num_inner_steps):
        first_pass = (encoder, features) if step == 0 else None
        inner_step(local, weight, bias, x_spt, y_spt, inner_loop, first_pass)
        features = None  # frees its graph; the prototypes keep the part that they need

    # The same values, now a function of the prototypes: (adapted - initial) counts as a constant.
    weight = (weight - init_weight).detach() + init_weight
    bias = (bias - init_bias).detach() + init_bias
    return local, weight, bias


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """How an encoder is fine-tuned on a support set.

    finetune_steps: steps of Adam; finetune_lr: their learning rate.
    """

    finetune_steps: int
    finetune_lr: float


def fine_tune(encoder, views, support, n_way, fine_tuning, local=None):
    """Adapt a copy of the encoder to a support set by ProtoNet episodes drawn from it.

    Each step splits the support images of every class at random into a support and a query half,
    both randomly cropped and coloured, and follows the gradient of the episode's loss: there is no
    output layer, which would memorise a few images (Hu et al. 2022, "Pushing the Limits of Simple
    Pipelines for Few-Shot Learning", fine-tunes on augmented copies; Li et al. 2022, "Cross-domain
    Few-shot Learning with Task-specific Adapters"). BatchNorm keeps the encoder's statistics. The
    random numbers come from a constant seed.

    views: the Views of all images; support: indices of images, int64 [n_way * K], class by class.
    Returns (local, weight [n_way, D], bias [n_way]) as `adapt` does: the output layer equal to the
    prototypes of the adapted copy, which is in eval mode.
    """
    local = deepcopy(encoder) if local is None else copy_weights(encoder, local)
    local.eval()
    optimizer = torch.optim.Adam(local.parameters(), fine_tuning.finetune_lr)
    generator = torch.Generator().manual_seed(0)
    by_class = support.view(n_way, -1)  # [N, K]
    # Images of a class in each half; its only image is in both.
    half = max(1, min(by_class.shape[1] // 2, MOST_IN_HALF))
    labels = episode_labels(n_way, half, support.device)  # [N * half]
    for _ in range(fine_tuning.finetune_steps):
        order = torch.rand(by_class.shape, generator=generator).argsort(dim=1).to(support.device)
        shuffled = by_class.gather(1, order)
        episode = torch.cat([shuffled[:, :half].flatten(), shuffled[:, -half:].flatten()])
        images = views.random(episode, generator, FINETUNE_LEAST_CROP, FINETUNE_COLOR_JITTER)
        support_half, query_half = local(images).chunk(2)  # [N * half, D] each
        logits = distance_logits(query_half, make_prototypes(support_half, n_way))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    with torch.no_grad():
        features = torch.cat([local(views.of(batch)) for batch in support.split(100)])
        return local, *prototype_head(make_prototypes(features, n_way))


def adapt_for_test(encoder, views, support, n_way, inner_loop, local=None):
    """Adapt a copy of the encoder to a support set as the InnerLoop or FineTuning says.

    views, support, local and what is returned: as in `fine_tune`. An InnerLoop learns from all
    views of a support image.
    """
    if isinstance(inner_loop, FineTuning):
        return fine_tune(encoder, views, support, n_way, inner_loop, local)
    x_spt = views.of(support)
    y_spt = episode_labels(n_way, len(x_spt) // n_way, x_spt.device)
    return adapt(encoder, x_spt, y_spt, n_way, inner_loop, local, attached=False)


def inner_step(local, weight, bias, x_spt, y_spt, inner_loop, first_pass=None):
    """Take one SGD step, in place, on a copy of the encoder and its output layer.

    first_pass: (encoder, features) in the first step, when the copy still equals the encoder: the
    gradients are then taken from these features [N*K, D], and their graph is kept.
    """
    model, features = first_pass or (local, local(x_spt))
    loss = F.cross_entropy(F.linear(features, weight, bias), y_spt)
    theta = [*model.parameters(), weight, bias]
    keep = first_pass is not None
    *gradients, weight_gradient, bias_gradient = torch.autograd.grad(loss, theta, retain_graph=keep)
    with torch.no_grad():
        # theta' = theta - lr_inner * gradient, all tensors of the encoder in one call
        torch._foreach_add_(list(local.parameters()), gradients, alpha=-inner_loop.lr_inner)
        weight -= inner_loop.lr_output * weight_gradient
        bias -= inner_loop.lr_output * bias_gradient


def first_order_gradients(loss, encoder, local):
    """Return the gradients of a task's query loss for the encoder's parameters, in their order.

    They are those of the adapted copy (first order: d theta' / d theta = 1) plus those that come
    through the prototypes.
    """
    count = len(list(encoder.parameters()))
    parameters = [*encoder.parameters(), *local.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    if found[0] is None:  # MAML: the output layer started from zeros
        return list(found[count:])
    return list(torch._foreach_add(found[:count], found[count:]))


@torch.no_grad()
def copy_weights(source, target):
    """Copy parameters and buffers of `source` into its deep copy `target`; return `target`."""
    torch._foreach_copy_(list(target.parameters()), list(source.parameters()))
    for floating in (True, False):  # one dtype in a list makes one fast call
        torch._foreach_copy_(_buffers(target, floating), _buffers(source, floating))
    return target


@torch.no_grad()
def hand_over_gradients(encoder, gradients):
    """Set the encoder's gradients to the sum over the tasks: `gradients`, one list per task."""
    total = list(gradients[0])
    for more in gradients[1:]:
        total = torch._foreach_add(total, more)
    for parameter, gradient in zip(encoder.parameters(), total):
        if gradient.stride() != parameter.stride():  # a fused optimizer would mix up the elements
            gradient = torch.empty_like(parameter).copy_(gradient)
        parameter.grad = gradient


def running_statistics(local):
    """Return copies of the BatchNorm statistics of an adapted copy."""
    return torch._foreach_mul(_buffers(local), 1.0)


@torch.no_grad()
def follow_statistics(encoder, statistics):
    """Set the encoder's BatchNorm statistics to the mean over the tasks: one list per task.

    Adaptation leaves the encoder's own alone, so the outer loop has to carry them along: a test
    starts from them.
    """
    mean = [torch.stack(same).mean(dim=0) for same in zip(*statistics)]
    torch._foreach_copy_(_buffers(encoder), mean)


def _buffers(module, floating=True):
    return [buffer for buffer in module.buffers() if buffer.is_floating_point() == floating]
