"""SGD of one worker in a few lines of torch: what a run of one rank must compute with each of its options."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from mpitrain import data, models
from mpitrain.trainer.study import OneProcess

DATA = "synthetic:n=64,shape=6,classes=3"
MODEL = "mlp:hidden=8"
STEPS = 7  # an epoch of 64 samples in batches of 16 has 4


def load(name: str = DATA) -> data.Dataset:
    return data.load(name, world=OneProcess(), sampling="independent")


def loss_after(
    *,
    name: str = DATA,
    model: str = MODEL,
    steps: int = STEPS,
    batch_size: int = 16,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float = math.inf,
    seed: int = 0,
    sampling: str = "independent",
    average: float | None = None,
    averaged: bool = False,
) -> float:
    """Return the mean cross entropy over the test set after some steps.

    Args:
        clip_norm: The largest norm of a gradient.
        average: The rate of a moving average z <- z + rate*(x - z) that is evaluated.
        averaged: Whether the mean of all iterates is evaluated.
    """
    dataset = load(name)
    net = models.build(model, shape=dataset.shape, n_classes=dataset.n_classes, seed=seed)
    parameters = list(net.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    mean = [p.detach().clone() for p in parameters]
    sampler = data.Sampler(dataset.n_train, batch_size, seed=seed, mode=sampling)
    for step in range(steps):
        x, y = dataset.batch(sampler.indices(*divmod(step, sampler.steps_per_epoch)))
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(net(x), y), parameters)
        norm = float(torch.cat([g.reshape(-1) for g in gradients]).norm())
        with torch.no_grad():
            for p, v, g, z in zip(parameters, velocity, gradients, mean, strict=True):
                v.mul_(momentum).add_(min(1.0, clip_norm / norm) * g + weight_decay * p)
                p.sub_(lr * v)
                z.add_((1 / (step + 1) if average is None else average) * (p - z))
    with torch.no_grad():
        if averaged or average is not None:
            for p, z in zip(parameters, mean, strict=True):
                p.copy_(z)
        x = dataset.normalisation.apply(dataset.test_images.select(np.arange(dataset.n_test)))
        y = torch.from_numpy(dataset.test_labels)
        return float(torch.nn.functional.cross_entropy(net(x), y))


def loss_of_loop(
    make: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
    *,
    rate: Callable[[int], float] = lambda step: 1.0,
    steps: int = STEPS,
    lr: float = 0.05,
    batch_size: int = 16,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.nn.functional.cross_entropy,
    precision: torch.dtype | None = None,
) -> float:
    """Return the mean cross entropy over the test set after some steps of a torch optimizer.

    Args:
        make: Makes the optimizer of the parameters.
        rate: The factor of the learning rate at each step, from 0.
        steps: Their number.
        lr: The learning rate.
        batch_size: Samples in a step.
        loss: What is minimised and reported.
        precision: The type for autocast.
    """
    dataset = load()
    net = models.build(MODEL, shape=dataset.shape, n_classes=dataset.n_classes, seed=0)
    optimizer, sampler = make(net.parameters()), data.Sampler(dataset.n_train, batch_size)
    for step in range(steps):
        x, y = dataset.batch(sampler.indices(*divmod(step, sampler.steps_per_epoch)))
        optimizer.zero_grad()
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            outputs = net(x)
        loss(outputs.float(), y).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step)
        optimizer.step()
    with torch.no_grad():
        ((x, y),) = dataset.test_batches(dataset.n_test)
        return float(loss(net(x), y))
