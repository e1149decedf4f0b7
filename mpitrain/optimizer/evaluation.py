"""The consensus of a method: the parameters that it evaluates, such as a center or an average of the workers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.peers import alive_ranks
from mpitrain.collectives.world.phases import EVALUATION
from mpitrain.errors import UsageError
from mpitrain.kernels import gpu
from mpitrain.optimizer.checks import KnownParameters
from mpitrain.optimizer.local_replica import LocalReplica
from mpitrain.optimizer.phase import phase_of

MOST_MEASURED = 32
"""The most workers whose distance from the consensus is measured: reading a thousand would take minutes."""


class Evaluation:
    """The consensus of a method, as this rank sees it.

    Args:
        base: The base optimizer, for the learning rate.
        model: The model that holds the consensus inside ``consensus``.
        method: The method to evaluate.
        replica: This rank's vectors and its worker.
        known: The check for parameters that were added to the model later.

    Attributes:
        is_shown: Whether the model holds the consensus now.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        model: torch.nn.Module,
        method: Method,
        replica: LocalReplica,
        known: KnownParameters,
    ) -> None:
        self._base, self._model, self._method, self._replica, self._known = base, model, method, replica, known
        self._scratch: Any = None  # (n,) where the worker's vectors are, from the first evaluation on
        self.is_shown = False

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """Load the consensus into the model inside the block. Local."""
        if self.is_shown:
            raise UsageError("consensus() inside consensus(): the model already holds what the method evaluates")
        self._replica.flat.check_attached()
        self._known.check()
        watch = self._replica.foreign_writes
        vector = self._evaluate()
        with (
            phase_of(EVALUATION),
            restored_buffers(self._model),
            nullcontext() if watch is None else watch.ignored(),
            self._replica.flat.swapped_parameters(vector, copies=True),
        ):
            self.is_shown = True
            try:
                yield
            finally:
                self.is_shown = False

    def state_dict(self, module: torch.nn.Module | None) -> dict[str, Any]:
        """Return a copy of the state of a module, with the consensus as its parameters. Local.

        Raises:
            UsageError: The module has parameters that the model does not have.
        """
        module = self._model if module is None else module
        known = {id(parameter) for parameter in self._model.parameters()}
        foreign = next((name for name, one in module.named_parameters() if id(one) not in known), None)
        if foreign is not None:
            raise UsageError(f"the module has a parameter {foreign}, which the distributed model does not have")
        with nullcontext() if self.is_shown else self.consensus():
            return {name: _copied(value) for name, value in module.state_dict().items()}

    def final_consensus(self) -> Any:
        """Return the consensus (n,) after all ranks have made their last step. Collective."""
        replica = self._replica
        if self._scratch is None:
            self._scratch = np.zeros_like(replica.group.x.local)
        with replica.boundary.exchanging():
            replica.worker.wait()
            replica.comm.barrier_of_survivors()
            replica.group.consensus(replica.worker, self._scratch)
        return self._scratch

    def consensus_vector(self) -> np.ndarray:
        """Return the consensus (n,), in host memory. Local."""
        with self._replica.boundary.exchanging():
            return gpu.to_host(self._evaluate())

    def _evaluate(self) -> Any:
        if self._scratch is None:
            self._scratch = np.zeros_like(self._replica.group.x.local)
        with self._replica.boundary.exchanging():
            self._replica.worker.consensus(self._scratch)
        return self._scratch

    def spread(self, vector: np.ndarray) -> tuple[float, float]:
        """Return the root mean square distance of the workers from ``vector`` (n,), and the elastic energy. Local.

        Raises:
            UsageError: This rank is not the first of its replica group.
        """
        group = self._replica.group
        comm = group.workers
        if comm is None:
            raise UsageError("ask the first rank of a replica group for the spread of the workers")
        alive = alive_ranks(comm)
        squares: list[float] = []
        with self._replica.boundary.exchanging():
            for peer in alive[:: -(-len(alive) // MOST_MEASURED)]:
                comm.read(group.x, peer, lambda x: squares.append(_square_distance(gpu.to_host(x), vector)))
        mean = float(np.mean(squares))
        learning_rate = max(float(param_group["lr"]) for param_group in self._base.param_groups)
        rho = self._method.elastic_coefficient(comm.size, learning_rate)
        return math.sqrt(mean), rho / 2 * len(alive_ranks(comm)) * mean


@contextmanager
def restored_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Restore a model's buffers at the end of the block, whether they were changed or replaced."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in saved:
                module._buffers[name] = buffer.copy_(values)


def _copied(value: Any) -> Any:
    with torch.inference_mode(mode=False):
        return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _square_distance(a: np.ndarray, b: np.ndarray, block: int = 1 << 16) -> float:
    """Return ||a - b||^2 in float64, computed block by block."""
    total = 0.0
    for start in range(0, a.size, block):
        difference = a[start : start + block].astype(np.float64) - b[start : start + block]
        total += float(difference @ difference)
    return total
