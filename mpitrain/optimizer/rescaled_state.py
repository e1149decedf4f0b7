"""The conversion of the states of p ranks to one state from which each of q ranks continues; see ``base.rescaling``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from mpitrain.algorithms.base import rescaling
from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.worker import Worker
from mpitrain.errors import UsageError

States = Sequence[Mapping[str, Any]]
"""The state of each rank, by rank; loaded one at a time if the sequence does so."""


class Parts(Sequence[Mapping[str, Any]]):
    """The method's entries and the parameters of each worker, taken from the states of all ranks.

    Args:
        states: The states of all ranks.
        replica_size: The number of ranks per worker. The first of them has the worker's state.
        as_array: A function that converts a saved value to an array.
    """

    def __init__(self, states: States, replica_size: int, as_array: Callable[[Any], Any]) -> None:
        self._states, self._size, self._as_array = states, replica_size, as_array

    def __len__(self) -> int:
        return len(self._states) // self._size

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        state = self._states[index * self._size]
        entries = {name: self._as_array(value) for name, value in state["method"].items()}
        return {**entries, rescaling.PARAMETERS: self._as_array(state["parameters"])}


def merge(states: States, parts: Parts, method: Method, worker: Worker) -> dict[str, Any]:
    """Return the state from which each rank continues if the number of ranks has changed. Local.

    Args:
        states: The states of all former ranks, which have been checked.
        parts: The part of each worker, from the same states.
        method: The method of the states.
        worker: One of the new workers.

    Raises:
        UsageError: An entry is missing.
    """
    try:
        start = method.common_start(parts)
        merged = rescaling.merge_all(worker, start, parts)
    except KeyError as missing:
        raise UsageError(
            f"the state has no {missing}: it was saved with other settings of {method.name}, or without the average"
        ) from missing
    size = len(states) // len(parts)
    heads = (states[rank]["base"] for rank in range(0, len(states), size))
    base = mean_of_bases(heads) if method.averages_optimizer else _without_state(next(heads))
    return {"parameters": start, "base": base, "method": merged}


def mean_of_bases(states: Iterator[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of the states of a torch optimizer.

    Values other than floating-point tensors are those of the first state. The mean is computed in float64, so that the
    mean of equal float32 states has the same bits.
    """
    first = next(states)
    totals: dict[Any, dict[str, tuple[torch.Tensor, int]]] = {}
    for state in (first, *states):
        for parameter, entries in state["state"].items():
            known = totals.setdefault(parameter, {})
            for name, value in entries.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    total, count = known.get(name, (torch.zeros((), dtype=torch.float64), 0))
                    known[name] = total + value.detach().double().cpu(), count + 1
    found: dict[str, Any] = {"param_groups": first["param_groups"], "state": {}}
    for parameter, sums in totals.items():
        entries = dict(first["state"].get(parameter, {}))
        for name, (total, count) in sums.items():
            like = entries.get(name)
            dtype = like.dtype if isinstance(like, torch.Tensor) else torch.float32
            entries[name] = (total / count).to(dtype)
        found["state"][parameter] = entries
    return found


def _without_state(base: Mapping[str, Any]) -> dict[str, Any]:
    return {"param_groups": base["param_groups"], "state": {}}
