"""Agreement between the ranks of a node, so that none waits for a rank that has raised.

Loading is collective over a node. Ranks would diverge and hang if they measured free memory at different moments and
drew different conclusions, or if one of them failed to read its part. `agree` and `all_ok` prevent both. They need
nothing but the node-shared memory that loading uses anyway.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from mpitrain.errors import UsageError

T = TypeVar("T")
MESSAGE_BYTES = 1000  # the longest error message that ranks share


class World(Protocol):
    """The part of a world that loading data needs."""

    @property
    def rank(self) -> int:
        """The rank of this process."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks."""
        ...

    @property
    def local_rank(self) -> int:
        """The rank within the node."""
        ...

    @property
    def local_size(self) -> int:
        """The number of ranks of the node."""
        ...

    @property
    def node(self) -> int:
        """The index of the node."""
        ...

    def shared_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray[Any, Any]:
        """Allocate one array of zeros that all ranks of the node see. Collective over the node."""
        ...

    def node_barrier(self) -> None:
        """Wait for all ranks of the node. Collective over the node."""
        ...


def agree(world: World, value: int) -> int:
    """Return the value of the node's first rank on every rank. Collective over the node."""
    shared = world.shared_array((1,), np.int64)
    if world.local_rank == 0:
        shared[0] = value
    world.node_barrier()
    return int(shared[0])


def all_ok(world: World, action: Callable[[], T]) -> T:
    """Return the result of `action` on this rank if it succeeds on every rank. Collective over the node.

    If the action fails on any rank, all ranks raise an error. A rank on which it failed raises its own error. The other
    ranks raise a `UsageError` with the message of the first rank that failed.
    """
    shared = world.shared_array((world.local_size, MESSAGE_BYTES), np.uint8)  # a row of zeros: no error
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
        text = (str(error) or repr(error)).encode()[:MESSAGE_BYTES]
        shared[world.local_rank, : len(text)] = np.frombuffer(text, np.uint8)
    world.node_barrier()
    if failure is not None:
        raise failure
    failed = np.flatnonzero(shared[:, 0])
    if failed.size:
        raise UsageError(shared[failed[0]].tobytes().rstrip(b"\0").decode(errors="replace"))
    return result
