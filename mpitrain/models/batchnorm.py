"""Re-estimation of BatchNorm statistics for averaged weights.

Methods average trainable parameters only. The running mean and variance of BatchNorm layers belong to the weights with
which they were recorded, but no rank has trained with the weights of a center or an average. The statistics are
therefore re-estimated before such a model is evaluated, as the authors of LSGD and Parle do.
"""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batchnorm(model: nn.Module) -> bool:
    """Return whether the model keeps running statistics. Local."""
    return bool(_layers(model))


def reestimate(model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> None:
    """Replace the running statistics of BatchNorm layers by averages over `batches`. Local.

    The averages are computed with the model's current weights. Meanwhile, BatchNorm layers are in training mode and all
    other layers in evaluation mode, so dropout is off. Modes and momenta are restored afterwards, also after an error.
    For a model without running statistics, no batch is read.

    Args:
        model: The model, on any device.
        batches: Batches of images, or of (images, labels), on any device. They should have the same size, because all
            batches have the same weight.

    Raises:
        ValueError: There is no batch.
    """
    layers = _layers(model)
    if not layers:
        return
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("BatchNorm statistics cannot be estimated without data: pass at least one batch")
    training = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    device = next(chain(model.parameters(), model.buffers())).device
    try:
        model.eval()
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average: weight 1/k for the k-th batch
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
