"""The gradients of one torch model at any parameters, shared by many simulated workers."""

from __future__ import annotations

import numpy as np
import torch

from mpitrain import data
from mpitrain.optimizer.flat import FlatParameters
from mpitrain.optimizer.layout import FlatLayout
from mpitrain.trainer.batches import cross_entropy, to_model
from mpitrain.trainer.stacked_perceptron import SIZE, StackedPerceptron, linear_layers


class ModelGradient:
    """A function ``gradient(rank, x)`` that returns the gradient of a worker's next mini-batch at parameters x (n,).

    All workers share the buffers of the model. If the model is a perceptron on the host, the gradients of several
    workers are computed together.

    Args:
        model: The model, whose parameters are moved into a vector.
        dataset: The data from which the workers draw.
        samplers: The sampler of each worker.

    Attributes:
        start: (n,) float32, the initial parameters.
        layers: The slice of each parameter tensor.
        losses: (p,) the loss of each worker's last mini-batch.
        largest_batch: The largest number of workers for which ``batch`` can compute the gradients together.
    """

    def __init__(self, model: torch.nn.Module, dataset: data.Dataset, samplers: list[data.Sampler]) -> None:
        self._model, self._dataset, self._samplers = model, dataset, samplers
        layout = FlatLayout([{"params": list(model.parameters())}])
        self._x, self._g = np.zeros((2, layout.n), layout.dtype)
        self._flat = FlatParameters(layout, self._x, self._g)
        self.start = self._x.copy()
        self.layers = layout.layers
        self.losses = np.full(len(samplers), np.nan)
        linear = linear_layers(model, layout.layers)
        self._stacked = None if linear is None or layout.dtype != np.float32 else StackedPerceptron(linear, layout.n)
        self.largest_batch = 1 if self._stacked is None else SIZE

    def __call__(self, rank: int, x: np.ndarray) -> np.ndarray:
        """Return the gradient (n,), which the next call overwrites."""
        self._x[...] = x
        self._flat.release_gradients()
        inputs, labels = self._dataset.batch(self._samplers[rank].draw())
        inputs = to_model(inputs, "cpu", self._flat.layout.torch_dtype)
        loss = cross_entropy(self._model(inputs), labels)
        loss.backward()
        self.losses[rank] = float(loss.detach())
        self._flat.collect_gradients()
        gradient: np.ndarray = self._g
        return gradient

    def batch(self, ranks: list[int], xs: list[np.ndarray], out: np.ndarray) -> None:
        """Compute the gradients of several workers, each on its next mini-batch.

        Args:
            ranks: The k workers.
            xs: The parameters (n,) of each of them.
            out: (k, n) to which the gradients are written.
        """
        if self._stacked is None:
            for k, (rank, x) in enumerate(zip(ranks, xs, strict=True)):
                out[k] = self(rank, x)
            return
        indices = np.concatenate([self._samplers[rank].draw() for rank in ranks])
        inputs, labels = self._dataset.batch(indices)
        self.losses[ranks] = self._stacked.gradients(xs, inputs, labels, out)
