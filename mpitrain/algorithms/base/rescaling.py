"""Continuing with another number of workers: the parts of p workers become the state of q workers.

    start      the parameters from which all q workers start: the center, or the mean of the p workers' parameters
               (``Method.common_start``)
    common     values that all workers share, or have in equal copies: they stay the same to the last bit
    clock      t, the number of local steps of a worker: the mean of the p clocks

``merge`` computes these from the parts of a checkpoint, and ``restart`` continues from them in a worker that has made
no step. The declarations of ``base.state`` say which entry is of which kind. What belongs to a single worker (its
velocity, its multiplier, the messages that it has not read, its random generator) begins as in a new run.

A collaborator (an object that a worker uses and that has checkpoint entries) may have a rule of its own: its
``merge(parts)`` yields its merged entries, and its ``restart(state)`` loads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mpitrain import kernels
from mpitrain.algorithms.base.state import (
    Common,
    Located,
    State,
    array_of,
    collaborators,
    declared,
    renamed,
    restore_attribute,
)

PARAMETERS = "parameters"
"""The name, in a part, of the model's parameters."""

START, CLOCK = "start_of_all", "t"
"""The names, among merged entries, of the vector at which all workers begin, and of their clock."""

Parts = Sequence[State]
"""The entries of each worker, with its parameters. Several passes are made over them, one part at a time."""


def mean_of_parts(weighted: Iterable[tuple[Any, float]]) -> np.ndarray:
    """Return the weighted mean (n,) of the finite vectors, computed in float64.

    The mean of equal float32 vectors with equal weights has the same bits as these vectors.

    Args:
        weighted: Pairs of a vector and its weight; at least one pair.
    """
    total, weight, last = None, 0.0, None
    for values, share in weighted:
        last = np.asarray(values)
        wide = last.astype(np.float64)
        if share and np.isfinite(wide).all():
            total = wide * share if total is None else total + wide * share
            weight += share
    assert last is not None
    mean = last if total is None else total / weight
    return np.asarray(mean, kernels.accumulator(last.dtype))


def merge_all(worker: Any, start: Any, parts: Parts) -> dict[str, Any]:
    """Return the state from which each worker continues if the number of workers has changed. Local.

    Args:
        worker: One of the new workers.
        start: (n,) the parameters of the new workers.
        parts: The entries of the former workers.
    """
    clock = sum(int(part[CLOCK]) for part in parts) // len(parts)
    return dict(merge(worker, parts)) | {START: start, CLOCK: clock}


def merge(owner: Any, parts: Parts, *, everything: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of the entries with which a new worker continues. Local.

    Args:
        owner: A worker, or an object that it uses.
        parts: The entries of the same object in each former worker.
        everything: Whether to yield all persistent attributes instead of only those marked as ``Common``.
    """
    if hasattr(owner, "merge"):
        yield from owner.merge(parts)
        return
    everything = everything or is_replicated(owner)
    for attribute in declared(type(owner)):
        value, name = getattr(owner, attribute), attribute.lstrip("_")
        goes_on = everything or isinstance(attribute, Common)
        if _is_plain(value):
            if goes_on:
                yield name, parts[0][name]
            continue
        for collaborator, rename in collaborators(value):
            theirs = [renamed(part, rename) for part in parts]
            if _is_worker(collaborator):
                yield from merge(collaborator, theirs)
            elif goes_on or not hasattr(collaborator, "merge"):
                for inner, entry in merge(collaborator, theirs, everything=goes_on):
                    yield rename.format(inner), entry


def restart(owner: Any, state: State, *, everything: bool = False) -> None:
    """Load merged entries into a newly created object. Collective if loading an attribute is Collective.

    Args:
        owner: A worker, or an object that it uses.
        state: The merged entries, with ``START`` and ``CLOCK``.
        everything: See ``merge``.
    """
    everything = everything or is_replicated(owner)
    for attribute in declared(type(owner)):
        value, goes_on = getattr(owner, attribute), everything or isinstance(attribute, Common)
        if _is_plain(value):
            if goes_on:
                restore_attribute(owner, attribute, state)
            elif isinstance(attribute, Located) and array_of(value).size:
                kernels.assign(array_of(value), state[START])
            continue
        for collaborator, rename in collaborators(value):
            own = {**renamed(state, rename), START: state[START], CLOCK: state[CLOCK]}
            if isinstance(attribute, Located):
                collaborator.place(state[START])
            elif _is_worker(collaborator):
                collaborator.load(own)
            elif hasattr(collaborator, "restart"):
                collaborator.restart(own)
            else:
                restart(collaborator, own, everything=goes_on)


def is_replicated(owner: Any) -> bool:
    """Return whether all attributes that the object declares as persistent are equal on all workers."""
    return bool(getattr(owner, "is_replicated", False))


def _is_plain(value: Any) -> bool:
    """Return whether a value is stored under the name of its attribute."""
    return array_of(value) is not None or isinstance(value, int | float | str | np.random.Generator)


def _is_worker(value: Any) -> bool:
    return hasattr(value, "after_load")
