"""The input of a worker: one copy of the model as flat vectors, and the communicator to the other workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpitrain.collectives.communicator import Communicator, Vector


@dataclass(frozen=True, slots=True)
class ParamGroupSlice:
    """A part of the flat vector that is updated with the same settings (a parameter group of torch).

    Attributes:
        part: Where it lies in the vector.
        learning_rate: eta.
        weight_decay: The L2 coefficient.
        momentum, nesterov: Those of torch.optim.SGD, for workers that make its step.
    """

    part: slice
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True)
class Replica:
    """One copy of the model, as flat vectors, and the other workers.

    Attributes:
        comm: The communicator of the workers.
        x: (n,) the parameters that the model holds; equal on all workers at the start.
        g: (n,) the gradient, once it is computed.
        seed: The run's seed; a worker draws from (seed, rank).
        layers: The position of each parameter tensor in the vector, in order. When it is empty the vector is one layer.
        fitness: The loss of parameters (n,) on held-out data, the same function on all workers; None without such data.
        node_shared: Whether the workers of a node share one ``x``; only for methods that declare it.
    """

    comm: Communicator
    x: Vector
    g: Vector
    seed: int = 0
    layers: tuple[slice, ...] = ()
    fitness: Callable[[Any], float] | None = None
    node_shared: bool = False
