"""Saving and loading one rank's part of the state, with checks that it is loaded where it belongs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from mpitrain.errors import UsageError
from mpitrain.kernels import gpu
from mpitrain.optimizer.local_replica import LocalReplica
from mpitrain.optimizer.step import LocalUpdate

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Owner:
    """The owner of a state, which is saved with the state.

    Attributes:
        algorithm: Name of the method.
        rank: The rank of this process.
        ranks: The number of ranks.
        replica_size: The number of ranks per worker.
        node_shared: The method keeps the base optimizer's momentum, and the ranks of a node share parameters.
    """

    algorithm: str
    rank: int
    ranks: int
    replica_size: int
    node_shared: bool

    def check(self, state: dict[str, Any]) -> None:
        """Check that a state has this owner.

        Raises:
            UsageError: With what would be right.
        """
        if "algorithm" not in state:
            raise UsageError(
                "this is not a state of a DistributedOptimizer: load that of a torch optimizer into the base "
                "optimizer, before the DistributedOptimizer is made"
            )
        ranks, rank = state.get("ranks", self.ranks), state.get("rank", self.rank)
        if ranks != self.ranks:
            raise UsageError(f"the state is of {ranks} ranks, but this run has {self.ranks}: use as many ranks")
        if rank != self.rank:
            raise UsageError(
                f"the state is that of rank {rank}, but this is rank {self.rank}: each rank must save and load its own "
                "file (to start as a copy of another rank, set state['rank'] to this rank's number)"
            )
        if state["algorithm"] != self.algorithm:
            raise UsageError(f"the state is of {state['algorithm']}, and this optimizer runs {self.algorithm}")
        if state["replica_size"] != self.replica_size:
            raise UsageError(f"the state is of replica_size {state['replica_size']}, and this is {self.replica_size}")
        if state.get("node_shared", self.node_shared) != self.node_shared:
            here, there = ("with the method", "in the base optimizer")[:: 1 if self.node_shared else -1]
            raise UsageError(
                f"the state keeps the momentum {there}, and this optimizer {here}: "
                "use the method's settings, the kind of base optimizer and the device that it was saved with"
            )


class OptimizerState:
    """Saves and loads one rank's part of the state: parameters, the base optimizer's state, the method's.

    Args:
        owner: What the state belongs to.
        base: The base optimizer.
        update: Continues from a state of the base optimizer.
        replica: This rank's vectors and its worker.
    """

    def __init__(self, owner: Owner, base: torch.optim.Optimizer, update: LocalUpdate, replica: LocalReplica) -> None:
        self._owner, self._base, self._update, self._replica = owner, base, update, replica

    def save(self) -> dict[str, Any]:
        """Return a copy of the state: tensors on the CPU, numbers and strings. Local."""
        with self._replica.boundary.exchanging():
            parameters = _copy(self._replica.group.x.local)
            method = {name: _copy(value) for name, value in self._replica.worker.state()}
        return {
            **vars(self._owner),
            "parameters": parameters,
            "base": copy.deepcopy(self._base.state_dict()),  # torch returns its own tensors
            "method": method,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state. Collective.

        Raises:
            UsageError: The state is of another owner or of another model.
        """
        self._owner.check(state)
        x, comm, parameters = self._replica.group.x.local, self._replica.comm, as_array(state["parameters"])
        if parameters.shape != x.shape:
            raise UsageError(
                f"the state holds {parameters.size} parameters and the model has {x.size}: "
                "it was saved from another model"
            )
        with self._replica.boundary.exchanging():
            comm.barrier()  # parameters that the node shares must not change while a rank still reads them
        self._update.load(copy.deepcopy(state["base"]))  # torch would go on in the tensors it is given
        comm.drop_residuals()
        with self._replica.boundary.exchanging():
            gpu.assign(x, parameters)
            self._replica.flat.to_device()
            comm.barrier()
            self._load_worker({name: as_array(value) for name, value in state["method"].items()})
            comm.barrier()

    def _load_worker(self, state: dict[str, Any]) -> None:
        try:
            self._replica.worker.load(state)
        except KeyError as missing:
            raise UsageError(
                f"the state has no {missing}: it was saved with other settings of {self._owner.algorithm}, "
                "or without the average"
            ) from missing


def _copy(value: Any) -> Any:
    """Return an array as a tensor in host memory that shares nothing with it, and anything else as it is.

    ``torch.load(weights_only=True)``, the default, loads tensors, and refuses arrays.
    """
    if isinstance(value, np.generic):
        return value.item()
    if not hasattr(value, "dtype"):
        return value
    array = value.get() if gpu.is_device(value) else value.copy()
    return (
        torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        if array.dtype == BFLOAT16
        else torch.from_numpy(array)
    )


def as_array(value: Any) -> Any:
    """Return a tensor as an array over its memory, and anything else as it is (states once held arrays)."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return value.view(torch.uint16).numpy().view(BFLOAT16) if value.dtype == torch.bfloat16 else value.numpy()
