"""Saving and loading one rank's part of the state, with checks that it is loaded where it belongs."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import ml_dtypes
import numpy as np
import torch

from mpitrain.algorithms.base.method import Method
from mpitrain.collectives.world.survivor_collectives import broadcast
from mpitrain.errors import UsageError
from mpitrain.kernels import gpu
from mpitrain.optimizer import rescaled_state
from mpitrain.optimizer.layout import FlatLayout
from mpitrain.optimizer.local_replica import LocalReplica
from mpitrain.optimizer.step import LocalUpdate

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Owner:
    """The description of the rank and the run to which a state belongs; it is saved with the state.

    Attributes:
        algorithm: The name of the method.
        rank: The rank of this process.
        ranks: The number of ranks.
        replica_size: The number of ranks per worker.
        node_shared: Whether the ranks of a node share parameters. The method then keeps the base optimizer's momentum.
    """

    algorithm: str
    rank: int
    ranks: int
    replica_size: int
    node_shared: bool

    def check(self, state: Mapping[str, Any], *, of_all: bool = False) -> None:
        """Check that a state belongs to this owner.

        Args:
            state: The state.
            of_all: Whether the state is the entry of this rank in a list of the states of all ranks.

        Raises:
            UsageError: The state belongs to another owner; the message names the difference.
        """
        if "algorithm" not in state:
            raise UsageError(
                "this is not a state of a DistributedOptimizer: load that of a torch optimizer into the base "
                "optimizer, before the DistributedOptimizer is made"
            )
        ranks, rank = state.get("ranks", self.ranks), state.get("rank", self.rank)
        if of_all and (ranks, rank) != (self.ranks, self.rank):
            raise UsageError(
                f"state number {self.rank} of {self.ranks} is that of rank {rank} of {ranks}: "
                "give the states of all ranks of one run, in the order of the ranks"
            )
        if ranks != self.ranks:
            raise UsageError(
                f"the state is of {ranks} ranks, but this run has {self.ranks}: "
                f"load a list of the states of all {ranks} ranks"
            )
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


def describe(layout: FlatLayout, model: torch.nn.Module) -> list[str]:
    """Return the name and shape of each parameter of a layout, without the prefix that ``torch.compile`` adds."""
    names = {id(parameter): name.replace("_orig_mod.", "") for name, parameter in model.named_parameters()}
    return [f"{names[id(place.parameter)]} {tuple(place.parameter.shape)}" for place in layout.places]


class OptimizerState:
    """The saving and loading of one rank's part of the state: parameters, base optimizer and method.

    Args:
        owner: The owner of the state.
        parameters: The name and shape of each parameter, in the order of the vector; see ``describe``.
        base: The base optimizer.
        update: The local update, which loads the state of the base optimizer.
        replica: This rank's vectors and its worker.
        method: The method.
    """

    def __init__(
        self,
        owner: Owner,
        parameters: Sequence[str],
        base: torch.optim.Optimizer,
        update: LocalUpdate,
        replica: LocalReplica,
        method: Method,
    ) -> None:
        self._owner, self._parameters, self._method = owner, parameters, method
        self._base, self._update, self._replica = base, update, replica

    def save(self) -> dict[str, Any]:
        """Return a copy of the state: tensors on the CPU, numbers and strings. Local."""
        with self._replica.boundary.exchanging():
            parameters = _copy(self._replica.group.x.local)
            method = {name: _copy(value) for name, value in self._replica.worker.state()}
        return {
            **vars(self._present_owner),
            "parameters": parameters,
            "layout": "\n".join(self._parameters),
            "base": copy.deepcopy(self._base.state_dict()),  # torch returns its own tensors
            "method": method,
        }

    @property
    def _present_owner(self) -> Owner:
        """The owner; after a death, a rank of the survivors."""
        members = self._replica.members
        return dataclasses.replace(self._owner, rank=members.index(self._owner.rank), ranks=len(members))

    def load(self, state: Mapping[str, Any] | rescaled_state.States) -> None:
        """Continue from this rank's state, or from the states of any number of ranks. Collective.

        Raises:
            UsageError: The state belongs to another owner or another model.
        """
        if isinstance(state, Mapping):
            self._present_owner.check(state)
            self._check_model(state)
            self._load(state)
        elif len(state) == self._owner.ranks:
            self.load(state[self._owner.rank])
        else:
            self._load(self._merged(state))

    def _merged(self, states: rescaled_state.States) -> Mapping[str, Any]:
        """Return the state from which every rank continues after another number of ranks. Collective.

        Rank 0 computes it; the other ranks need no states.

        Raises:
            UsageError: The states do not belong together or here, or this optimizer has made a step.
        """
        if self._replica.worker.t:
            raise UsageError("states of another number of ranks are loaded before the first step: make a new optimizer")

        def make() -> tuple[str, Any]:
            owner = dataclasses.replace(self._owner, rank=0, ranks=len(states))
            try:
                for rank, state in enumerate(states):
                    dataclasses.replace(owner, rank=rank).check(state, of_all=True)
                    self._check_model(state)
                if len(states) % owner.replica_size:
                    raise UsageError(f"{len(states)} states do not form groups of {owner.replica_size} ranks")
                parts = rescaled_state.Parts(states, owner.replica_size, as_array)
                return "", rescaled_state.merge(states, parts, self._method, self._replica.worker)
            except UsageError as error:
                return str(error), None

        problem, merged = broadcast(self._replica.comm.world, make)
        if problem:
            raise UsageError(problem, on_all_ranks=True)
        return dict(merged)

    def _load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that fits. Collective."""
        x, comm, parameters = self._replica.group.x.local, self._replica.comm, as_array(state["parameters"])
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

    def _check_model(self, state: Mapping[str, Any]) -> None:
        """Check that a state is of a model with the same parameters.

        Raises:
            UsageError: A parameter differs; the message names the first one.
        """
        saved = state["layout"].split("\n") if "layout" in state else self._parameters  # earlier states lack it
        for number, (there, here) in enumerate(zip_longest(saved, self._parameters, fillvalue="absent")):
            if there != here:
                raise UsageError(
                    f"parameter number {number} is {there} in the state and {here} in this model: "
                    "it was saved from another model"
                )
        n, n_here = math.prod(state["parameters"].shape), self._replica.group.x.local.size
        if n != n_here:
            raise UsageError(
                f"the state holds {n} parameters and the model has {n_here}: it was saved from another model"
            )

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
    """Return a tensor as an array that shares its memory; return anything else unchanged (old states hold arrays)."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return value.view(torch.uint16).numpy().view(BFLOAT16) if value.dtype == torch.bfloat16 else value.numpy()
