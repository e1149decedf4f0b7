"""Evaluate what a method evaluates (center, average, leader), beside the model that goes on training.

The evaluated model is a copy with a vector of its own, so that neither parameters nor BatchNorm statistics of the
training are touched. Averaged parameters have no BatchNorm statistics: they are re-estimated from training data first.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch

from mpitrain.collectives.world.world import World
from mpitrain.data import Dataset
from mpitrain.models import has_batchnorm, reestimate
from mpitrain.optimizer.flat import FlatParameters
from mpitrain.optimizer.layout import FlatLayout

BATCHNORM_SAMPLES = 2000
BATCH = 500


@dataclass
class Point:
    """What was known when a method was looked at, and what its evaluation found.

    Attributes:
        seconds: Of training.
        step: Of rank 0.
        gradients, bytes: Of all ranks.
        epoch: Of rank 0.
        consensus_distance: Of the workers' parameters from what is evaluated: the root of the mean square over the
            workers (over some of them, where there are many).
        elastic_energy: (rho/2)*sum_i ||x_i - c||^2, for methods with springs; 0 for others.
        test_loss: Mean cross entropy over the test set.
        test_accuracy: 0 to 1.
    """

    seconds: float
    step: int
    gradients: int
    bytes: int
    epoch: float
    consensus_distance: float
    elastic_energy: float = 0.0
    test_loss: float = float("nan")
    test_accuracy: float = float("nan")


class Evaluator:
    """Evaluates parameter vectors on the test set.

    Args:
        model: Copied; call before a DistributedOptimizer moves its parameters.
        dataset: Of ``mpitrain.data.load``.
        device: Where to compute.
    """

    def __init__(self, model: torch.nn.Module, dataset: Dataset, device: str) -> None:
        self._model = copy.deepcopy(model).to(device)
        self._dataset, self._device = dataset, device
        layout = FlatLayout([{"params": list(self._model.parameters())}])
        self._vector = np.zeros(layout.n, layout.dtype)
        self._flat = FlatParameters(layout, self._vector, np.zeros_like(self._vector))
        self._dtype = layout.torch_dtype
        self._reestimates = has_batchnorm(self._model)

    def empty_vector(self) -> np.ndarray:
        """(n,) of the kind that ``evaluate`` takes."""
        return np.empty_like(self._vector)

    @torch.no_grad()
    def evaluate(self, vector: np.ndarray) -> tuple[float, float]:
        """Mean cross entropy and accuracy (0 to 1) of parameters ``vector`` (n,) over the whole test set. Local."""
        self._vector[...] = vector
        self._flat.to_device()
        if self._reestimates:
            limit = min(BATCHNORM_SAMPLES, self._dataset.n_train)
            batches = self._dataset.train_batches(min(BATCH, limit), limit)
            reestimate(self._model, (x.to(self._device, self._dtype) for x, _ in batches))
        self._model.eval()
        total_loss, n_right, n = 0.0, 0, 0
        for x, y in self._dataset.test_batches(BATCH):
            logits = self._model(x.to(self._device, self._dtype)).float()
            y = y.to(self._device)
            total_loss += float(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
            n_right += int((logits.argmax(1) == y).sum())
            n += len(y)
        return total_loss / n, n_right / n


def evaluate_deferred(points: list[Point], vectors: list[np.ndarray], evaluator: Evaluator, world: World) -> None:
    """Evaluate rank 0's snapshots on all ranks in turn, and fill in what was found. Collective.

    Args:
        points, vectors: Rank 0's; empty elsewhere.
        evaluator: Each rank's own.
        world: The ranks.
    """
    comm = world.comm  # of those that live
    rank, size = comm.Get_rank(), comm.Get_size()
    n_points = comm.bcast(len(points))
    found = []
    for k in range(n_points):
        worker = k % size
        if rank == 0 and worker != 0:
            comm.Send(vectors[k].view(np.uint8), worker, k)
        if rank == worker:
            vector = vectors[k] if rank == 0 else evaluator.empty_vector()
            if rank != 0:
                comm.Recv(vector.view(np.uint8), 0, k)
            found.append((k, *evaluator.evaluate(vector)))
    for results in comm.gather(found) or []:
        for k, loss, accuracy in results:
            points[k].test_loss, points[k].test_accuracy = loss, accuracy
