"""Decisions and failures that the ranks of a node share, so that none of them waits for one that has given up.

Loading is collective over a node. Two things would make ranks part ways and hang: measuring free memory at different
moments and coming to different conclusions, and one rank failing to read its part. `agree` and `together` exclude both,
with nothing but the node-shared memory that loading needs anyway.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from mpitrain.errors import UsageError

T = TypeVar("T")
TEXT_BYTES = 1000  # room for one error text


class World(Protocol):
    """The part of the world that loading data needs."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def local_size(self) -> int: ...
    @property
    def node(self) -> int: ...

    def shared_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray[Any, Any]:
        """Collective over the ranks of the node: one array that all of them see."""
        ...

    def node_barrier(self) -> None:
        """Collective over the ranks of the node."""
        ...


def agree(world: World, value: int) -> int:
    """Collective over the node: the value of its first rank, on every rank."""
    shared = world.shared_array((1,), np.int64)
    if world.local_rank == 0:
        shared[0] = value
    world.node_barrier()
    return int(shared[0])


def all_ok(world: World, action: Callable[[], T]) -> T:
    """Collective over the node: what `action` returns on this rank, if it succeeded on every rank.

    Where it failed anywhere, every rank raises: a rank that failed its own error, the others a `UsageError` with the
    text of the first that failed, so that it does not matter which rank prints it.
    """
    shared = world.shared_array((world.local_size, TEXT_BYTES), np.uint8)  # a row of zeros: no error
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
        text = (str(error) or repr(error)).encode()[:TEXT_BYTES]
        shared[world.local_rank, : len(text)] = np.frombuffer(text, np.uint8)
    world.node_barrier()
    if failure is not None:
        raise failure
    failed = np.flatnonzero(shared[:, 0])
    if failed.size:
        raise UsageError(shared[failed[0]].tobytes().rstrip(b"\0").decode(errors="replace"))
    return result
