"""The state of an object in a checkpoint: declared as a list of attributes, saved and loaded here.

    class Worker:
        persistent = ("t",)

    class NesterovWorker(Worker):
        persistent = ("_velocity", "_center")      # the class's own; those of its base classes come first

An entry has the name of its attribute, without the leading underscore. Its contents depend on the attribute's value:

    array, Vector           the array (``.local`` of a Vector); loading copies the entry into the existing array
    number, string          the value itself
    random generator        its state, as JSON
    collaborator            the entries of an object that has ``state()`` and ``load()``, or its own ``persistent``
    sequence, mapping       of collaborators: their entries, ``NAME_1``, ``NAME_2``, ... or ``KEY_NAME``

A collaborator needs hand-written ``state`` and ``load`` only if several workers share what it saves, or if loading
communicates.

The kind of a name says what happens to the entry when another number of workers continues (``base.rescaling``)::

    persistent = (Common("_center"), Located("_position"), "_velocity")

    Common      the same on all workers, or shared by them: the entry is kept
    Located     a vector of parameters: it starts from the parameters from which the workers start
    any other   belongs to one worker: it starts as in a new run
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mpitrain import kernels

State = Mapping[str, Any]
"""The entries of a checkpoint, by name."""


class Common(str):
    """The name of an attribute that is the same on all workers, or shared by them."""


class Located(str):
    """The name of a vector of parameters, or of an object that contains one and has the function ``place``."""


def entries(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each attribute that the object declares as persistent."""
    for attribute in declared(type(owner)):
        value, name = getattr(owner, attribute), attribute.lstrip("_")
        if isinstance(value, np.random.Generator):
            yield name, json.dumps(value.bit_generator.state)
        elif isinstance(value, int | float | str) or _is_array(value):
            yield name, value
        elif hasattr(value, "local"):
            yield name, value.local
        else:
            for collaborator, rename in collaborators(value):
                _require_state(owner, attribute, collaborator)
                found = collaborator.state() if hasattr(collaborator, "state") else entries(collaborator)
                yield from ((rename.format(inner), entry) for inner, entry in found)


def restore(owner: Any, state: State) -> None:
    """Load the attributes that the object declares as persistent. Collective if loading one of them is Collective.

    Raises:
        KeyError: An entry is missing.
    """
    for attribute in declared(type(owner)):
        restore_attribute(owner, attribute, state)


def restore_attribute(owner: Any, attribute: str, state: State) -> None:
    """Load one attribute that the object declares as persistent. Collective if loading it is Collective.

    Raises:
        KeyError: An entry is missing.
    """
    value, name = getattr(owner, attribute), attribute.lstrip("_")
    if isinstance(value, np.random.Generator):
        value.bit_generator.state = json.loads(state[name])
    elif isinstance(value, str):
        setattr(owner, attribute, str(state[name]))
    elif isinstance(value, int | float):
        setattr(owner, attribute, np.asarray(state[name]).item())
    elif _is_array(value):
        kernels.assign(value, state[name])
    elif hasattr(value, "local"):
        kernels.assign(value.local, state[name])
    else:
        for collaborator, rename in collaborators(value):
            _require_state(owner, attribute, collaborator)
            own = renamed(state, rename)
            if hasattr(collaborator, "load"):
                collaborator.load(own)
            else:
                restore(collaborator, own)


def declared(kind: type) -> Iterator[str]:
    """Yield the names of all attributes that a class and its base classes declare as persistent."""
    for base in reversed(kind.__mro__):
        yield from base.__dict__.get("persistent", ())


def array_of(value: Any) -> Any:
    """Return an array, or the array of a Vector; None for any other value."""
    return value if _is_array(value) else getattr(value, "local", None)


def _is_array(value: Any) -> bool:
    is_array = hasattr(value, "dtype") and hasattr(value, "shape") and not hasattr(value, "local")
    return is_array and not isinstance(value, np.generic)


def _require_state(owner: Any, attribute: str, value: Any) -> None:
    if not (hasattr(value, "state") or hasattr(type(value), "persistent")):
        raise TypeError(f"{type(owner).__name__}.{attribute}: a checkpoint cannot store a {type(value).__name__}")


def collaborators(value: Any) -> Iterator[tuple[Any, str]]:
    """Yield the collaborators in the value of an attribute, each with the pattern of its entries' names."""
    if isinstance(value, Mapping):
        yield from ((inner, f"{key}_{{}}") for key, inner in value.items())
    elif isinstance(value, list | tuple):
        yield from ((inner, f"{{}}_{number}") for number, inner in enumerate(value, 1))
    else:
        yield value, "{}"


def renamed(state: State, rename: str) -> State:
    """Return the entries of one of several collaborators, under the names that this collaborator uses itself."""
    return state if rename == "{}" else _Renamed(state, rename)


class _Renamed(Mapping[str, Any]):
    """The entries of one of several collaborators, by their own names.

    Args:
        state: The entries of all.
        rename: The pattern of the names there.
    """

    def __init__(self, state: State, rename: str) -> None:
        self._state, self._rename = state, rename

    def __getitem__(self, name: str) -> Any:
        return self._state[self._rename.format(name)]

    def __iter__(self) -> Iterator[str]:
        prefix, _, suffix = self._rename.partition("{}")
        for name in self._state:
            if name.startswith(prefix) and name.endswith(suffix):
                yield name[len(prefix) : len(name) - len(suffix)]

    def __len__(self) -> int:
        return sum(1 for _ in self)
