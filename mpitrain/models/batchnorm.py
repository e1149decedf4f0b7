"""BatchNorm statistics of a model that nobody trained.

Methods average trainable parameters only. The running mean and variance of BatchNorm layers belong to the weights they
were recorded under, and those of a center or an average were never trained with, so they are measured anew before such
a model is evaluated, as the authors of LSGD and Parle do.
"""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batchnorm(model: nn.Module) -> bool:
    """Local: whether the model keeps running statistics."""
    return bool(_layers(model))


def reestimate(model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> None:
    """Local: replaces running statistics by plain averages over `batches`, with the weights the model has now.

    Only BatchNorm layers run in training mode; dropout is off. Modes and momenta are as before afterwards, also after
    an error. Does nothing, and asks for no batch, where the model keeps no running statistics.

    Args:
        model: On any device.
        batches: Images, or (images, labels), on any device; batches of one size, or they do not count alike.
    """
    layers = _layers(model)
    if not layers:
        return
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("BatchNorm statistics cannot be measured without a batch: give at least one")
    training = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    device = next(chain(model.parameters(), model.buffers())).device
    try:
        model.eval()
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average: 1/k at the k-th batch
        with torch.no_grad():
            for batch in chain([first], iterator):
                images = batch if isinstance(batch, Tensor) else batch[0]
                model(images.to(device))
    finally:
        for module, mode in training.items():
            module.training = mode
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
