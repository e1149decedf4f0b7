"""Broadcast and reduce along a binomial tree, in ceil(log2 p) rounds, pipelined in chunks.

Small vectors are left to MPI, or to ``node_tree`` if all ranks share a node. For others, ``partition.binomial_tree``
computes the tree, and MPI's point-to-point calls carry the chunks, so that a rank forwards a chunk while it receives
the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from mpitrain import kernels
from mpitrain.collectives.topology.partition import binomial_tree

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

CHUNK_BYTES = 1 << 20

SMALL_BYTES = 1 << 14
"""Vectors that MPI's own collectives carry, at most: they use such a tree, too, and take one call."""

MPI_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
"""The types that every MPI adds."""

TAG = 17


def _chunks(array: np.ndarray) -> list[slice]:
    step = max(CHUNK_BYTES // array.itemsize, 1)
    return [slice(at, min(at + step, array.size)) for at in range(0, array.size, step)]


def _raw(array: np.ndarray) -> list:
    return [array.view(np.uint8), MPI.BYTE]


def broadcast(world: World, array: np.ndarray, root: int = 0) -> None:
    """Copy the root's array (n,) to the array of every rank. Collective."""
    if array.nbytes <= SMALL_BYTES:
        world.comm.Bcast(_raw(array), root)
        return
    parent, children = binomial_tree(world.rank, world.size, root)
    requests = []
    for part in _chunks(array):
        if parent is not None:
            world.comm.Recv(_raw(array[part]), parent, TAG)
        requests += [world.comm.Isend(_raw(array[part]), child, TAG) for child in children]
    MPI.Request.Waitall(requests)


def reduce(world: World, array: np.ndarray, root: int = 0) -> None:
    """Replace the root's array (n,) by the sum of all arrays; the other arrays become partial sums. Collective.

    Each rank adds the arrays of its children in a fixed order, so the result has the same bits in every run.
    """
    if array.nbytes <= SMALL_BYTES and array.dtype in MPI_DTYPES:
        if world.rank == root:
            world.comm.Reduce(MPI.IN_PLACE, array, root=root)
        else:
            world.comm.Reduce(array, None, root=root)
        return
    parent, children = binomial_tree(world.rank, world.size, root)
    received = np.empty(min(array.size, max(CHUNK_BYTES // array.itemsize, 1)), array.dtype)
    requests = []
    for part in _chunks(array):
        incoming = received[: part.stop - part.start]
        for child in reversed(children):  # the smallest subtree is ready first
            world.comm.Recv(_raw(incoming), child, TAG)
            kernels.scaled_add(array[part], incoming, 1.0)
        if parent is not None:
            requests.append(world.comm.Isend(_raw(array[part]), parent, TAG))
    MPI.Request.Waitall(requests)
