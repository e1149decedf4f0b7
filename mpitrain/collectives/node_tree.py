"""Broadcast and reduction of small vectors between few ranks of one node, through memory that they share.

MPI passes a small vector on from rank to rank, in messages. Here every rank reads the vectors of the others in place:
a collective of few kilobytes takes some microseconds, which is less than two calls into MPI.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from mpitrain.collectives.rma.node_barrier import NodeBarrier
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels.compile.declare import as_bits
from mpitrain.kernels.compile.storage import STORAGES
from mpitrain.kernels.native import node_tree
from mpitrain.kernels.native.node_barrier import POLL_ONCE

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

LARGEST_BYTES = 1 << 14
"""Size of a vector, at most. Each rank has two slots of this size."""


def fits(array: np.ndarray) -> bool:
    """Return whether a vector is small enough for a ``NodeTree``, and of a type that kernels can add. Local."""
    return array.nbytes <= LARGEST_BYTES and _can_be_added(array.dtype)


@functools.cache
def _can_be_added(dtype: np.dtype) -> bool:
    return dtype.isnative and dtype.name in STORAGES


class NodeTree:
    """Broadcasts and reductions between the ranks of a world that has one node. Collective to create and to free.

    Args:
        world: The ranks.
        statistics: The counters of waiting.
    """

    def __init__(self, world: World, statistics: Statistics) -> None:
        self._me, self._n = world.rank, world.size
        self._barrier = NodeBarrier(world, statistics, "a broadcast or a reduction on the node")
        self._window = Window(world, 2 * LARGEST_BYTES, np.uint8)
        slots = [self._window.of(rank) for rank in range(world.size)]
        self._slots = [(slot[:LARGEST_BYTES], slot[LARGEST_BYTES:]) for slot in slots if slot is not None]
        self._put, self._get = node_tree.put(), node_tree.get()
        # Of the last call, since most callers pass the same vector again.
        self._array, self._root = np.zeros(0, np.uint8), -1
        self._operands: list[list[np.ndarray]] = [[], []]  # of ``add``, for even and odd numbers
        self._bytes, self._add = self._array, self._put

    def broadcast(self, array: np.ndarray, root: int) -> None:
        """Copy the root's array (n,) to the array of every rank. Collective."""
        if array is not self._array or root != self._root:
            self._prepare(array, root)
        if self._me == root:
            self._show()
            return
        barrier, me, n = self._barrier, self._me, self._n
        barrier.number = number = barrier.number + 1
        words, operands = barrier.words, (self._slots[root][number % 2], self._bytes)
        progress = self._get(words, me, n, number, root, barrier.spin_limit, *operands)
        if progress != n:
            barrier.poll_until(n, lambda _: self._get(words, me, n, number, root, POLL_ONCE, *operands), progress)

    def reduce(self, array: np.ndarray, root: int) -> None:
        """Replace the root's array (n,) by the sum of all arrays, added in the order of the ranks. Collective."""
        if array is not self._array or root != self._root:
            self._prepare(array, root)
        if self._me != root:
            self._show()
            return
        barrier, me, n = self._barrier, self._me, self._n
        barrier.number = number = barrier.number + 1
        words, operands = barrier.words, self._operands[number % 2]
        progress = self._add(words, me, number, 0, barrier.spin_limit, *operands)
        if progress != n:
            barrier.poll_until(n, lambda first: self._add(words, me, number, first, POLL_ONCE, *operands), progress)

    def _show(self) -> None:
        """Copy the vector to this rank's slot. Collective."""
        barrier, me, n = self._barrier, self._me, self._n
        barrier.number = number = barrier.number + 1
        words, operands = barrier.words, (self._slots[me][number % 2], self._bytes)
        progress = self._put(words, me, n, number, 0, barrier.spin_limit, *operands)
        if progress != n:
            barrier.poll_until(n, lambda first: self._put(words, me, n, number, first, POLL_ONCE, *operands), progress)

    def _prepare(self, array: np.ndarray, root: int) -> None:
        """Set the operands of the compiled calls. Local."""
        self._array, self._root, self._bytes = array, root, array.view(np.uint8)
        self._add = node_tree.add(self._n, array.dtype)
        for parity in (0, 1):
            summands = [slots[parity][: array.nbytes].view(array.dtype) for slots in self._slots]
            summands[root] = array
            self._operands[parity] = as_bits([array, *summands])

    def free(self) -> None:
        """Free the memory. Collective."""
        self._window.free()
        self._barrier.free()
