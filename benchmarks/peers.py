"""The same training steps with other libraries, each used as its own examples do.

Every library trains torchvision's DenseNet on the images of the tutorial's loader. A function here
takes the encoder and returns the training step: step(images, labels), with images
[T*2*S, 3, H, W], T episodes laid end to end, half support and half query, class by class. So the
labels within a half are the same in every episode: `y`, int64 [S], and the data set's labels are
not used. The step returns the (last) query loss.
"""

import contextlib
import importlib
import io
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import nn


def find_libraries():
    """Return {name: version} of the libraries found; say in one line which cannot be imported."""
    found, missing = {}, []
    for name in ("easyfsl", "higher", "learn2learn"):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # gym, for learn2learn, says it is old
                importlib.import_module(name)
            found[name] = version(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if missing:
        print(
            f"not measured: {', '.join(missing)}; pip install -r benchmarks/requirements.txt "
            "installs the libraries, a comment in it says how to build learn2learn",
            file=sys.stderr,
        )
    return found


def easyfsl_protonet(encoder, y, lr):
    """As in easyfsl's notebook on episodic training.

    The encoder sees support and query apart, so that BatchNorm normalises each by its own
    statistics, and the logits are minus the distances, not squared.
    """
    from easyfsl.methods import PrototypicalNetworks

    model = PrototypicalNetworks(encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr)

    def step(images, labels):
        x_spt, x_qry = images.chunk(2)
        optimizer.zero_grad()
        model.process_support_set(x_spt, y)
        loss = F.cross_entropy(model(x_qry), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def learn2learn_protonet(encoder, y, lr):
    """As in learn2learn's ProtoNet: one pass for support and query, squared distances."""
    from learn2learn.nn import PrototypicalClassifier

    classifier = PrototypicalClassifier()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr)

    def step(images, labels):
        support, query = encoder(images).chunk(2)
        classifier.fit_(support, y)
        loss = F.cross_entropy(classifier(query), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def learn2learn_maml(encoder, y, lr, num_tasks, num_inner_steps, lr_inner):
    """As in learn2learn's examples of MAML, first order; gradients are means over the tasks."""
    from learn2learn.algorithms import MAML

    maml = MAML(with_output_layer(encoder, y), lr_inner, first_order=True)
    optimizer = torch.optim.AdamW(maml.parameters(), lr)

    def step(images, labels):
        optimizer.zero_grad()
        for task in images.chunk(num_tasks):
            x_spt, x_qry = task.chunk(2)
            learner = maml.clone()
            for _ in range(num_inner_steps):
                learner.adapt(F.cross_entropy(learner(x_spt), y))
            loss = F.cross_entropy(learner(x_qry), y)
            loss.backward()
        for parameter in maml.parameters():
            parameter.grad.mul_(1 / num_tasks)
        optimizer.step()
        return loss.detach()

    return step


def higher_maml(encoder, y, lr, num_tasks, num_inner_steps, lr_inner):
    """As in higher's example of MAML, with track_higher_grads=False for the first order.

    That cuts the adapted weights off from the initial ones, so the step hands their gradients over.
    """
    from higher import innerloop_ctx

    net = with_output_layer(encoder, y)
    inner_optimizer = torch.optim.SGD(net.parameters(), lr_inner)
    optimizer = torch.optim.AdamW(net.parameters(), lr)

    def step(images, labels):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for task in images.chunk(num_tasks):
            x_spt, x_qry = task.chunk(2)
            with innerloop_ctx(net, inner_optimizer, track_higher_grads=False) as (local, diffopt):
                for _ in range(num_inner_steps):
                    diffopt.step(F.cross_entropy(local(x_spt), y))
                loss = F.cross_entropy(local(x_qry), y)
                gradients = torch.autograd.grad(loss, list(local.parameters()))
            for parameter, gradient in zip(net.parameters(), gradients):
                parameter.grad += gradient
        optimizer.step()
        return loss.detach()

    return step


def with_output_layer(encoder, y):
    """Return encoder and output layer as one module: both are adapted, both are learned.

    The layer starts from zeros, as in the project's MAML, where it does so in every task.
    """
    last = encoder.classifier.weight  # [D, ...]
    layer = nn.Linear(len(last), int(y.max()) + 1).to(last)  # its device and dtype
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(encoder, layer)


PROTONET = {"easyfsl": easyfsl_protonet, "learn2learn": learn2learn_protonet}
MAML = {"higher": higher_maml, "learn2learn": learn2learn_maml}
