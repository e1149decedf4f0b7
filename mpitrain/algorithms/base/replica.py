"""The input of a worker: one copy of the model as flat vectors, and the communicator to the other workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpitrain.collectives.communicator import Communicator, Vector


@dataclass(frozen=True, slots=True)
class ParamGroupSlice:
    """A slice of the flat vector, with the settings of the torch parameter group to which it belongs.

    Attributes:
        part: The position of the slice in the vector.
        learning_rate: The learning rate eta.
        weight_decay: The coefficient of the L2 penalty.
        momentum, nesterov: The options of torch.optim.SGD, for workers that make its step.
    """

    part: slice
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True)
class Replica:
    """A copy of the model, as flat vectors, with everything else that a worker needs.

    Attributes:
        comm: The communicator of the workers.
        x: (n,) the parameters that the model holds; equal on all workers at the start.
        g: (n,) the gradient, once it is computed.
        seed: The seed of the run. A worker seeds its generator with (seed, rank).
        layers: The slice of each parameter tensor in the vector, in order. Without any slice, the vector counts as one
            layer.
        fitness: A function that takes parameters (n,) and returns their loss on held-out data. The data is the same on
            all workers. None if there is no such data.
        node_shared: Whether the workers of a node share one ``x``. The method must allow it (``shares_parameters``).
    """

    comm: Communicator
    x: Vector
    g: Vector
    seed: int = 0
    layers: tuple[slice, ...] = ()
    fitness: Callable[[Any], float] | None = None
    node_shared: bool = False
