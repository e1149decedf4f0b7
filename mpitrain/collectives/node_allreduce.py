"""A prepared all-reduce between few ranks of one node: barrier, sum and barrier in one compiled call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpitrain.collectives.rma.node_barrier import NodeBarrier
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.topology.partition import split
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels.compile.declare import as_bits
from mpitrain.kernels.native.node_barrier import POLL_ONCE, sum_on_node

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


class NodeAllReduce:
    """An all-reduce of one window on one node, in place.

    Args:
        world: The ranks, all on one node.
        window: The window.
        node_barrier: The barrier of these ranks.
        statistics: The counters of exchanges.
    """

    def __init__(self, world: World, window: Window, node_barrier: NodeBarrier, statistics: Statistics) -> None:
        mine = split(window.local.size, world.size)[world.rank]
        vectors = [vector for rank in world.node_ranks if (vector := window.of(rank)) is not None]
        self._operands = (*(as_bits(vectors) if window.dtype.itemsize == 2 else vectors), mine.start, mine.stop)
        self._node_barrier, self._me, self._end = node_barrier, world.local_rank, 2 * world.size
        self._statistics, self._n_bytes = statistics, 2 * (world.size - 1) * window.local.nbytes // world.size
        self._sum = sum_on_node(world.size, window.dtype)

    def __call__(self, scale: float) -> None:
        """Replace every rank's array by ``scale`` times the sum of all. Collective."""
        # A small vector takes some microseconds, of which each line here is a part.
        node_barrier, me, operands = self._node_barrier, self._me, self._operands
        words, number = node_barrier.words, node_barrier.number + 1
        node_barrier.number = number + 1
        progress = self._sum(words, me, number, 0, node_barrier.spin_limit, *operands, scale)
        if progress != self._end:
            node_barrier.poll_until(
                self._end, lambda first: self._sum(words, me, number, first, POLL_ONCE, *operands, scale), progress
            )
        self._statistics.n_exchanges += 1
        self._statistics.bytes_sent += self._n_bytes
