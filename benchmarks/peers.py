"""The same work done as in a first notebook, and the same training steps with other libraries.

The notebook's way: PIL transforms in DataLoader workers, images stored channels first, every
operation launched on its own, a fresh deep copy for every task, prototypes by a loop over the
classes, one support set at a time. The libraries are used as in their own examples, on the images
of the notebook's loader. All train torchvision's DenseNet.

A function of PROTONET, PROTOMAML or MAML takes the encoder and returns the training step:
step(images, labels), with images [T*2*S, 3, H, W], T episodes laid end to end, half support and
half query, class by class. So the labels within a half are the same in every episode, `y`, int64
[S], and the libraries do not use the data set's `labels`. The step returns the (last) query loss.
"""

import contextlib
import importlib
from copy import deepcopy
from importlib.metadata import version

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import DenseNet

LOADER_WORKERS = 2
TUTORIAL = "tutorial's way"


def find_libraries():
    """Return {name: version} of the libraries that can be imported."""
    found = {}
    for name in ("easyfsl", "higher", "learn2learn"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            found[name] = version(name)
    return found


class PILImages(Dataset):
    """Images uint8 [N, H, W, 3] (numpy), each through PIL and a torchvision transform."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def make_loader(data, sampler):
    """Return a DataLoader of TrainingData: augmented images [B, 3, H, W] and labels [B]."""
    images = data.train.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    crop = transforms.RandomResizedCrop(images.shape[1:3], scale=(0.8, 1.0), ratio=(0.9, 1.1))
    to_tensor = transforms.ToTensor(), transforms.Normalize(data.mean, data.std)
    transform = transforms.Compose([transforms.RandomHorizontalFlip(), crop, *to_tensor])
    dataset = PILImages(images, data.train.labels.cpu().numpy(), transform)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=LOADER_WORKERS)


def make_encoder():
    """Return the same DenseNet as the project's, stored channels first."""
    return DenseNet(32, (6, 6, 6, 6), 64, 2, num_classes=64)


def tutorial_protonet(encoder, y, lr):
    """As in the tutorial's ProtoNet, on one episode."""

    def backward(images, labels):
        support, query = encoder(images).chunk(2)
        y_spt, y_qry = labels.chunk(2)
        prototypes, classes = _prototypes(support, y_spt)
        logits = -(prototypes[None] - query[:, None]).pow(2).sum(dim=2)
        loss = F.cross_entropy(logits, _positions(classes, y_qry))
        loss.backward()
        return loss

    return _training_step(encoder, lr, backward)


def tutorial_protomaml(encoder, y, lr, num_tasks, num_inner_steps, lr_inner):
    """As in the tutorial's ProtoMAML, first order."""

    def backward(images, labels):
        for task, task_labels in zip(images.chunk(num_tasks), labels.chunk(num_tasks)):
            (x_spt, x_qry), (y_spt, y_qry) = task.chunk(2), task_labels.chunk(2)
            local, weight, bias, classes = adapt(encoder, x_spt, y_spt, num_inner_steps, lr_inner)
            loss = F.cross_entropy(F.linear(local(x_qry), weight, bias), _positions(classes, y_qry))
            loss.backward()
            for base, copy in zip(encoder.parameters(), local.parameters()):
                base.grad += copy.grad
        return loss

    return _training_step(encoder, lr, backward)


def adapt(encoder, x_spt, y_spt, num_inner_steps, lr):
    """Adapt a fresh deep copy to a support set; returns (copy, weight, bias, classes)."""
    prototypes, classes = _prototypes(encoder(x_spt), y_spt)
    labels = _positions(classes, y_spt)
    local = deepcopy(encoder).train()
    sgd = torch.optim.SGD(local.parameters(), lr=lr)
    weight0, bias0 = 2 * prototypes, -(prototypes.norm(dim=1) ** 2)
    weight, bias = weight0.detach().requires_grad_(), bias0.detach().requires_grad_()
    for _ in range(num_inner_steps):
        sgd.zero_grad()
        weight.grad = bias.grad = None
        F.cross_entropy(F.linear(local(x_spt), weight, bias), labels).backward()
        sgd.step()
        weight.data -= lr * weight.grad
        bias.data -= lr * bias.grad
    sgd.zero_grad()
    return local, (weight - weight0).detach() + weight0, (bias - bias0).detach() + bias0, classes


def tutorials_test(encoder, images, tasks, y_spt, y_qry, num_inner_steps, lr):
    """Return the correct queries of each task; tasks: indices of images, support then queries."""
    counts = []
    for support, queries in (task.split([len(y_spt), len(y_qry)]) for task in tasks):
        local, weight, bias, _ = adapt(encoder, images[support], y_spt, num_inner_steps, lr)
        with torch.no_grad():
            predicted = F.linear(encode(local.eval(), images[queries]), weight, bias).argmax(dim=1)
        counts.append((predicted == y_qry).sum().item())
    return counts


@torch.no_grad()
def encode(encoder, images):
    """Return the features of images [N, 3, H, W], in the notebook's batches."""
    return torch.cat([encoder(batch) for batch in images.split(128)])


def _prototypes(features, labels):
    classes = torch.unique(labels)
    means = [features[torch.where(labels == c)[0]].mean(dim=0) for c in classes]
    return torch.stack(means), classes


def _positions(classes, labels):
    return (classes[None] == labels[:, None]).long().argmax(dim=1)


def easyfsl_protonet(encoder, y, lr):
    """As in easyfsl's notebook on episodic training.

    The encoder sees support and query apart, so that BatchNorm normalises each by its own
    statistics, and the logits are minus the distances, not squared.
    """
    from easyfsl.methods import PrototypicalNetworks

    model = PrototypicalNetworks(encoder)

    def backward(images, labels):
        x_spt, x_qry = images.chunk(2)
        model.process_support_set(x_spt, y)
        loss = F.cross_entropy(model(x_qry), y)
        loss.backward()
        return loss

    return _training_step(model, lr, backward)


def l2l_protonet(encoder, y, lr):
    """As in learn2learn's ProtoNet: one pass for support and query, squared distances."""
    from learn2learn.nn import PrototypicalClassifier

    classifier = PrototypicalClassifier()

    def backward(images, labels):
        support, query = encoder(images).chunk(2)
        classifier.fit_(support, y)
        loss = F.cross_entropy(classifier(query), y)
        loss.backward()
        return loss

    return _training_step(encoder, lr, backward)


def l2l_maml(encoder, y, lr, num_tasks, num_inner_steps, lr_inner):
    """As in learn2learn's examples of MAML, first order; gradients are means over the tasks."""
    from learn2learn.algorithms import MAML

    maml = MAML(_with_output_layer(encoder, y), lr_inner, first_order=True)

    def backward(images, labels):
        for x_spt, x_qry in (task.chunk(2) for task in images.chunk(num_tasks)):
            learner = maml.clone()
            for _ in range(num_inner_steps):
                learner.adapt(F.cross_entropy(learner(x_spt), y))
            loss = F.cross_entropy(learner(x_qry), y)
            loss.backward()
        for parameter in maml.parameters():
            parameter.grad.mul_(1 / num_tasks)
        return loss

    return _training_step(maml, lr, backward)


def higher_maml(encoder, y, lr, num_tasks, num_inner_steps, lr_inner):
    """As in higher's example of MAML, with track_higher_grads=False for the first order.

    That cuts the adapted weights off from the initial ones, so the step hands their gradients over.
    """
    from higher import innerloop_ctx

    net = _with_output_layer(encoder, y)
    sgd = torch.optim.SGD(net.parameters(), lr_inner)

    def backward(images, labels):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for x_spt, x_qry in (task.chunk(2) for task in images.chunk(num_tasks)):
            with innerloop_ctx(net, sgd, track_higher_grads=False) as (local, inner_optimizer):
                for _ in range(num_inner_steps):
                    inner_optimizer.step(F.cross_entropy(local(x_spt), y))
                loss = F.cross_entropy(local(x_qry), y)
                gradients = torch.autograd.grad(loss, list(local.parameters()))
            for parameter, gradient in zip(net.parameters(), gradients):
                parameter.grad += gradient
        return loss

    return _training_step(net, lr, backward)


def _training_step(module, lr, backward):
    """Return the step; backward(images, labels) leaves gradients in the module, returns a loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr)

    def step(images, labels):
        optimizer.zero_grad()
        loss = backward(images, labels)
        optimizer.step()
        return loss.detach()

    return step


def _with_output_layer(encoder, y):
    # Both are adapted, both are learned. The layer starts from zeros, as in the project's MAML,
    # where it does so in every task.
    last = encoder.classifier.weight  # [D, ...]
    layer = torch.nn.Linear(len(last), int(y.max()) + 1).to(last)  # its device and dtype
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(encoder, layer)


PROTONET = {TUTORIAL: tutorial_protonet, "easyfsl": easyfsl_protonet, "learn2learn": l2l_protonet}
PROTOMAML = {TUTORIAL: tutorial_protomaml}
MAML = {"higher": higher_maml, "learn2learn": l2l_maml}
