"""The gradients of one torch model at any parameters: many simulated workers share it."""

from __future__ import annotations

import numpy as np
import torch

from mpitrain import data
from mpitrain.optimizer.flat import FlatParameters
from mpitrain.optimizer.layout import FlatLayout


class ModelGradient:
    """``gradient(rank, x)``: that of the worker's next mini-batch at parameters x (n,). Buffers are common to all.

    Args:
        model: Its parameters are moved into a vector.
        dataset: What the workers draw from.
        samplers: Of each worker.

    Attributes:
        start: (n,) float32, the model's first parameters.
        layers: Where each parameter tensor lies.
        losses: (p,) of each worker's last mini-batch.
    """

    def __init__(self, model: torch.nn.Module, dataset: data.Dataset, samplers: list[data.Sampler]) -> None:
        self._model, self._dataset, self._samplers = model, dataset, samplers
        layout = FlatLayout([{"params": list(model.parameters())}])
        self._x, self._g = np.zeros((2, layout.n), layout.dtype)
        self._flat = FlatParameters(layout, self._x, self._g)
        self.start = self._x.copy()
        self.layers = layout.layers
        self.losses = np.full(len(samplers), np.nan)

    def __call__(self, rank: int, x: np.ndarray) -> np.ndarray:
        """(n,), overwritten by the next call."""
        self._x[...] = x
        self._flat.release_gradients()
        inputs, labels = self._dataset.batch(self._samplers[rank].draw())
        loss = torch.nn.functional.cross_entropy(self._model(inputs), labels)
        loss.backward()
        self.losses[rank] = float(loss.detach())
        self._flat.collect_gradients()
        gradient: np.ndarray = self._g
        return gradient
