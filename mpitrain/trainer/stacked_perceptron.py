"""The gradients of a perceptron at many parameter vectors at once, by batched matrix products.

Workers of a simulation have the same small model with different parameters. One call per layer for all of them takes a
fraction of the time of one backward pass per worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mpitrain.models.mlp import MLP

SIZE = 64
"""Workers in a batch: enough to make the overhead of a call small; their activations stay in the cache."""


@dataclass(frozen=True)
class LinearLayer:
    """The position of a layer's parameters in the flat vector.

    Attributes:
        weight, bias: The slices of the vector; ``bias`` is None in a layer without a bias.
        n_in, n_out: The numbers of inputs and outputs.
        is_rectified: Whether a ReLU follows.
    """

    weight: slice
    bias: slice | None
    n_in: int
    n_out: int
    is_rectified: bool


def linear_layers(model: nn.Module, parts: Sequence[slice]) -> list[LinearLayer] | None:
    """Return the linear layers of a perceptron; None if the model contains anything but linear layers and ReLU.

    Args:
        model: The model.
        parts: The slice of each of its parameters in the flat vector.
    """
    sequence = model.layers if type(model) is MLP else model
    if type(sequence) is not nn.Sequential:
        return None
    modules = list(sequence)
    known = modules and all(type(module) in (nn.Flatten, nn.Linear, nn.ReLU) for module in modules)
    n_tensors = sum(1 + (module.bias is not None) for module in modules if isinstance(module, nn.Linear))
    is_trained = all(p.requires_grad for p in model.parameters()) and n_tensors == len(list(model.parameters()))
    if not (known and is_trained) or isinstance(modules[0], nn.ReLU):
        return None
    layers: list[LinearLayer] = []
    places = iter(parts)
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(module, nn.Linear):
            weight, bias = next(places), None if module.bias is None else next(places)
            is_rectified = isinstance(following, nn.ReLU)
            layers.append(LinearLayer(weight, bias, module.in_features, module.out_features, is_rectified))
    return layers if layers and not layers[-1].is_rectified else None


class StackedPerceptron:
    """The losses and gradients of the perceptrons of k workers, each on its own mini-batch.

    Args:
        layers: The layers of the model, from ``linear_layers``.
        n: The number of parameters.
    """

    def __init__(self, layers: list[LinearLayer], n: int) -> None:
        self._layers = layers
        self._parameters = torch.empty(SIZE, n)
        used = [part for layer in layers for part in (layer.weight, layer.bias) if part is not None]
        edges = [0, *(edge for part in used for edge in (part.start, part.stop)), n]
        self._gaps = [slice(edges[k], edges[k + 1]) for k in range(0, len(edges), 2) if edges[k] < edges[k + 1]]

    def gradients(self, xs: list[np.ndarray], inputs: Tensor, labels: Tensor, out: np.ndarray) -> np.ndarray:
        """Compute the gradients of the mean cross entropy.

        Args:
            xs: The parameter vectors (n,) of k <= ``SIZE`` workers.
            inputs: (k*b, ...) the mini-batches of the workers, concatenated.
            labels: (k*b,) the classes of the inputs.
            out: (k, n) float32, to which the gradients are written.

        Returns:
            (k,) the losses.
        """
        k, n_samples = len(xs), len(labels) // len(xs)
        parameters = self._parameters[:k]
        np.stack(xs, out=parameters.numpy())
        gradient = torch.from_numpy(out)
        for gap in self._gaps:  # the padding between tensors
            gradient[:, gap] = 0
        activations = [inputs.reshape(k, n_samples, -1)]
        for layer in self._layers:
            activations.append(self._forward(layer, parameters, activations[-1]))
        logarithms = torch.log_softmax(activations.pop(), dim=-1)
        chosen = labels.reshape(k, n_samples, 1)
        losses = -logarithms.gather(2, chosen).mean(dim=(1, 2))
        slope = logarithms.exp_()
        slope.scatter_add_(2, chosen, torch.full_like(chosen, -1, dtype=slope.dtype))
        slope /= n_samples
        for layer, below in zip(reversed(self._layers), reversed(activations), strict=True):
            slope = self._backward(layer, parameters, gradient, below, slope)
        return losses.numpy()

    @staticmethod
    def _forward(layer: LinearLayer, parameters: Tensor, below: Tensor) -> Tensor:
        """Return the activations (k, b, n_out) of a layer."""
        weight = parameters[:, layer.weight].view(-1, layer.n_out, layer.n_in)
        if layer.bias is None:
            above = torch.bmm(below, weight.mT)
        else:
            above = torch.baddbmm(parameters[:, None, layer.bias], below, weight.mT)
        return above.relu_() if layer.is_rectified else above

    def _backward(
        self, layer: LinearLayer, parameters: Tensor, gradient: Tensor, below: Tensor, slope: Tensor
    ) -> Tensor:
        """Store a layer's gradient; return the slope (k, b, n_in) at the layer below, if there is one."""
        gradient[:, layer.weight].view(-1, layer.n_out, layer.n_in).copy_(torch.bmm(slope.mT, below))
        if layer.bias is not None:
            torch.sum(slope, dim=1, out=gradient[:, layer.bias])
        if layer is self._layers[0]:
            return slope
        weight = parameters[:, layer.weight].view(-1, layer.n_out, layer.n_in)
        slope = torch.bmm(slope, weight)
        previous = self._layers[self._layers.index(layer) - 1]
        return slope.mul_(below > 0) if previous.is_rectified else slope
