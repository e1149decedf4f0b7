"""All-reduce: direct on a node, hierarchical across nodes.

On a node, every rank owns one slice of the vector. It reads this slice of all peers in place, sums it and writes the
sum back to all of them, in one pass over cache-sized blocks. Nothing is packed, copied or sent.

Across nodes::

    1. each of the first R local ranks sums its slice over its node       (R: the smallest number of ranks on a node)
    2. the ranks with the same local rank sum this slice, by MPI_Allreduce if it is small and by messages if it is
       large: all R ranks carry traffic, nothing crosses twice
    3. each of them writes its slice to all ranks of its node

A cost model chooses between MPI_Allreduce, a ring, recursive doubling, and recursive halving with doubling, from the
size, the number of nodes, and constants of the network that do not change between runs (``world.link``).

The order of summation depends only on this choice and the rank numbers, so every rank gets the same bits in every run.

If the choice is not MPI_Allreduce, float32 sums (including those of 16-bit vectors) travel in 16 bits if there is a
wire format (``native.wire``), then always in a ring. Two kinds of sums are always sent in full: small ones, whose time
is mostly latency, and sums in the background, which MPI computes.

Vectors in GPU memory are summed in the same way, by one kernel per rank, if the ranks of a node map each other's
memory. Their slices cross nodes through the host, or directly if MPI is known to support it. Vectors that are not
mapped are summed by MPI if it is known to support that. Otherwise they are summed in their mirrors in host memory
(``rma.device_window``), in chunks: one chunk is summed while the next is copied to the mirror.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from mpitrain import kernels
from mpitrain.collectives import message_allreduce, ring
from mpitrain.collectives.node_allreduce import NodeAllReduce
from mpitrain.collectives.rma.device_window import AnyWindow, DeviceWindow
from mpitrain.collectives.rma.node_barrier import NodeBarrier
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.topology import allreduce_cost
from mpitrain.collectives.topology.allreduce_steps import buffer_size
from mpitrain.collectives.topology.partition import split
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.collectives.world.transport import Transport
from mpitrain.kernels import gpu
from mpitrain.kernels.native.wire import Format, prepare
from mpitrain.kernels.reductions import DIRECT, MOST

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

LARGEST_COUNT = 1 << 30
"""Elements of one MPI_Allreduce: counts are 32-bit before MPI 4."""

CHUNK_BYTES = 8 << 20
"""Chunk of device memory that is summed on the host; its copy takes a fraction of a millisecond."""

BLOCK = 1 << 17
"""Elements of ``reduce_slices`` that are summed at a time: the sum is still in the cache when it is used."""


class AllReduce:
    """The all-reduce of windows, in place. Collective to free.

    Args:
        world: The ranks.
        statistics: The counters of bytes and waiting.
        wire: The wire format of large sums between nodes; None to send them in full.
    """

    def __init__(self, world: World, statistics: Statistics, wire: Format | None = None) -> None:
        self._world = world
        self._statistics = statistics
        self._wire = wire
        # Sums and parts that cross nodes, by purpose, device, size and dtype.
        self._buffers: dict[tuple[str, bool, int, np.dtype], Any] = {}
        self._node_barrier: NodeBarrier | None = None

    def __call__(self, window: AnyWindow, part: slice | None = None, *, scale: float = 1.0) -> None:
        """Replace every rank's array, or a part of it, by ``scale`` times the sum of all. Collective."""
        if part is None and window.plan is not None:
            window.plan(scale)
            return
        world, statistics = self._world, self._statistics
        part = part or slice(0, window.local.size)
        statistics.n_exchanges += 1
        statistics.bytes_sent += 2 * (world.size - 1) * (part.stop - part.start) * window.dtype.itemsize // world.size
        if world.size == 1:
            if scale != 1.0:
                kernels.scale(window.local[part], scale)
        elif isinstance(window, Window) or self._transport.maps:
            self._in_place(window, part, scale)
        elif self._transport.sums:
            self._by_mpi(window.local[part], scale)
        else:
            assert window.mirror is not None
            self._in_mirrors(window, window.mirror, part, scale)

    @property
    def _transport(self) -> Transport:
        """The transport of vectors on GPUs."""
        assert self._world.transport is not None
        return self._world.transport

    def _in_place(self, window: AnyWindow, part: slice, scale: float) -> None:
        """Sum a part of all arrays, which the ranks of a node reach in place. Collective."""
        world = self._world
        self._wait(window)
        if world.local_rank < world.n_rails:  # on a single node: every rank
            mine = self.slice_of(part.stop - part.start)
            mine = slice(part.start + mine.start, part.start + mine.stop)
            peers = [peer[mine] for rank in world.node_ranks if (peer := window.of(rank)) is not None]
            if world.n_nodes == 1 and world.size <= MOST:
                kernels.reduce_broadcast(peers, scale)
            else:
                total = self._sum_buffer(peers[0])
                sum_in_groups(total, peers, scale)
                self._cross(total)
                for peer in peers:
                    kernels.copy(peer, total)
        self._wait(window)

    def _in_mirrors(self, window: DeviceWindow, mirror: Window, part: slice, scale: float) -> None:
        """Sum arrays in device memory through their mirrors on the host. Collective."""
        device, step = gpu.current(), max(CHUNK_BYTES // window.dtype.itemsize, 1)
        chunks = [slice(at, min(at + step, part.stop)) for at in range(part.start, part.stop, step)]
        marks = deque(device.copy_out(mirror.local[chunk], window.local[chunk]) for chunk in chunks[:1])
        for k, chunk in enumerate(chunks):
            for following in chunks[k + 1 : k + 2]:
                marks.append(device.copy_out(mirror.local[following], window.local[following]))
            device.wait_for(marks.popleft())
            self._in_place(mirror, chunk, scale)
            device.copy(window.local[chunk], mirror.local[chunk])

    def _by_mpi(self, array: Any, scale: float) -> None:
        """Let MPI sum arrays in device memory. Collective."""
        total = array if array.dtype.itemsize >= 4 else self._sum_buffer(array)
        if total is not array:
            kernels.copy(total, array)
        gpu.synchronize(total)
        for at in range(0, total.size, LARGEST_COUNT):
            with self._world.waiting("an all-reduce"):
                self._world.comm.Allreduce(MPI.IN_PLACE, total[at : at + LARGEST_COUNT])
        if scale != 1.0:
            kernels.scale(total, scale)
        if total is not array:
            kernels.copy(array, total)

    def prepare(self, window: AnyWindow) -> None:
        """Compile the kernels and allocate the buffers for all-reduces of this window. Collective."""
        if self._world.size == 1:
            return
        if self._node_barrier is None:
            self._node_barrier = NodeBarrier(self._world, self._statistics)
        if self._wire is not None and self._world.n_nodes > 1:
            prepare(self._wire)
        if isinstance(window, DeviceWindow):
            kernels.scale.prepare(window.local)
            kernels.copy.prepare(window.local)
            if not self._transport.maps:
                return
        elif self._world.n_nodes == 1 and self._world.size <= DIRECT:
            window.plan = NodeAllReduce(self._world, window, self._node_barrier, self._statistics)
            return
        empty = [window.local[:0].copy() for _ in self._world.node_ranks]
        if self._world.n_nodes == 1 and self._world.size <= MOST:
            kernels.reduce_broadcast(empty)
        else:
            sum_in_groups(self._sum_buffer(empty[0]), empty, 1.0)

    def slice_of(self, n: int) -> slice:
        """Return this rank's slice of a vector of ``n`` elements. Local."""
        world = self._world
        return split(n, world.n_rails)[world.local_rank] if world.local_rank < world.n_rails else slice(n, n)

    def reduce_slices(self, window: AnyWindow, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Call ``fn`` with vectors that add up to the sum of all arrays in this rank's slice. Collective.

        The arrays do not change.

        Args:
            window: The arrays.
            fn: Called with parts of ``slice_of(n)`` and vectors that add up to the sum. On a node with few ranks, these
                are the arrays of the ranks themselves. Otherwise, it is one vector, the sum, in memory that is reused.
        """
        world, statistics, n = self._world, self._statistics, window.local.size
        statistics.n_exchanges += 1
        statistics.bytes_sent += 2 * (world.size - 1) * window.local.nbytes // world.size
        mine = self.slice_of(n)
        if world.size == 1:
            fn(mine, [window.local])
            return
        self._wait(window)
        peers = [peer for rank in world.node_ranks if (peer := window.of(rank)) is not None]
        if world.n_nodes > 1:
            if world.local_rank < world.n_rails:
                total = self._sum_buffer(window.local[mine])
                sum_in_groups(total, [peer[mine] for peer in peers], 1.0)
                self._cross(total)
                fn(mine, [total])
        elif len(peers) <= DIRECT:
            fn(mine, [peer[mine] for peer in peers])
        else:
            block = self._sum_buffer(window.local[:BLOCK])
            for start in range(mine.start, mine.stop, BLOCK):
                part = slice(start, min(start + BLOCK, mine.stop))
                total = block[: part.stop - start]
                sum_in_groups(total, [peer[part] for peer in peers], 1.0)
                fn(part, [total])
        self._wait(window)

    def _cross(self, total: Any) -> None:
        """Sum this rank's slice over the nodes. Collective over the ranks with the same local rank."""
        world = self._world
        on_gpu = gpu.is_device(total)
        if on_gpu and not self._transport.sums:
            device, host = gpu.current(), self._buffer("on the host", total, total.size)
            device.copy(host, total)
            device.synchronize()
            self._cross(host)
            device.copy(total, host)
            return
        gpu.synchronize(total)
        algorithm = allreduce_cost.MPI
        if world.service is not None and not on_gpu:  # the messages of a ring need a thread that calls MPI
            algorithm = allreduce_cost.choose(total.nbytes, world.n_nodes, world.link)
        with world.polling(), world.waiting("an all-reduce between nodes"):
            if algorithm == allreduce_cost.MPI:
                for at in range(0, total.size, LARGEST_COUNT):
                    world.rail_comm.Allreduce(MPI.IN_PLACE, total[at : at + LARGEST_COUNT])
                n_bytes = 2 * (world.n_nodes - 1) * total.nbytes // world.n_nodes
            else:
                n_bytes = self._by_messages(algorithm, total)
        self._statistics.wire_bytes += n_bytes

    def _by_messages(self, algorithm: str, total: Any) -> int:
        """Sum this rank's slice over the nodes by messages, and return the bytes sent."""
        world, encoded = self._world, self._wire is not None and total.dtype == np.float32
        algorithm = "ring" if encoded else algorithm
        incoming = self._buffer("incoming", total, buffer_size(algorithm, world.n_nodes, total.size))
        if self._wire is not None and encoded:
            ring.allreduce_encoded(world.rail_comm, total, incoming, self._wire)
            return 2 * (world.n_nodes - 1) * self._wire.fetched_bytes(total.size) // world.n_nodes
        return message_allreduce.allreduce(world.rail_comm, algorithm, total, incoming)

    def _sum_buffer(self, like: Any) -> Any:
        """Return a buffer for a sum of slices like this one, of at least 32 bits per element."""
        return self._buffer("sum", like, like.size)

    def _buffer(self, purpose: str, like: Any, n: int) -> Any:
        """Return a buffer (n,), reused from call to call: in the memory of ``like``, or page-locked on the host."""
        # Not every MPI adds 16-bit types.
        dtype = like.dtype if like.dtype.itemsize >= 4 else np.dtype(np.float32)
        key = (purpose, gpu.is_device(like), n, dtype)
        if key not in self._buffers:
            if purpose == "on the host":
                self._buffers[key] = gpu.current().page_locked(n, dtype)
            else:
                self._buffers[key] = np.zeros_like(like, dtype=dtype, shape=(n,))
        return self._buffers[key]

    def _wait(self, window: AnyWindow) -> None:
        """Wait for all ranks of the node, and see the writes of all. Collective over the node."""
        assert self._node_barrier is not None
        window.sync()
        self._node_barrier.wait()
        window.sync()

    def free(self) -> None:
        """Free the node barrier. Collective."""
        if self._node_barrier is not None:
            self._node_barrier.free()
            self._node_barrier = None


def sum_in_groups(total: Any, sources: Sequence[Any], scale: float) -> None:
    """Compute ``total = scale * sum(sources)`` for any number of sources. 16-bit sources may have a float32 total."""
    most = DIRECT if total.dtype != sources[0].dtype else MOST
    kernels.reduce_sum(total, sources[:most], 1.0 if len(sources) > most else scale)
    for start in range(most, len(sources), most - 1):
        group = sources[start : start + most - 1]
        kernels.reduce_sum(total, (total, *group), scale if start + most - 1 >= len(sources) else 1.0)
