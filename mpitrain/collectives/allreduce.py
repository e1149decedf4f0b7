"""All-reduce: direct on a node, hierarchical across nodes.

On a node every rank owns one slice of the vector: it reads that slice of all peers where it lies, sums it and writes
the sum back to all of them, in one pass over cache-sized blocks. Nothing is packed, copied or sent.

Across nodes::

    1. each of the first R local ranks sums its slice over its node       (R: the smallest number of ranks on a node)
    2. the ranks with the same local rank sum that slice, by MPI_Allreduce if it is small and in a ring if it is large:
       all R carry traffic, nothing crosses twice
    3. each writes its slice to all ranks of its node

The order of summation depends on the rank numbers only, so every rank gets the same bits, at every run.

In a ring, float32 sums (those of 16-bit vectors too) travel in 16 bits if a wire format is given. What is small enough
for MPI_Allreduce travels as it is: what that costs is round trips. So does what is summed in the background, by MPI.

Vectors in GPU memory are summed the same way where the ranks of a node map each other's, by one kernel a rank; what
crosses nodes then goes by way of the host, or from the device where MPI is known to do that. Where nothing maps them
they are summed in their mirrors in host memory, in chunks: one is summed while the next is on its way there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mpi4py import MPI

from mpitrain import kernels
from mpitrain.collectives import ring
from mpitrain.collectives.rma.device_window import DeviceWindow
from mpitrain.collectives.rma.node_barrier import NodeBarrier
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.topology.partition import split
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.collectives.world.transport import Transport
from mpitrain.kernels import gpu
from mpitrain.kernels.compile.declare import as_bits
from mpitrain.kernels.native.node_barrier import POLL_ONCE, sum_on_node
from mpitrain.kernels.native.wire import Format, prepare
from mpitrain.kernels.reductions import DIRECT, MOST

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

LARGEST_COUNT = 1 << 30
"""Elements of one MPI_Allreduce: counts are 32-bit numbers before MPI 4."""

RING_BYTES = 1 << 17
"""Bytes of a part from which a ring is faster than MPI_Allreduce, which has fewer round trips."""

CHUNK_BYTES = 8 << 20
"""Of device memory that is summed by way of the host: a fraction of a millisecond on its way there."""

AnyWindow = Window | DeviceWindow

BLOCK = 1 << 17
"""Elements that a rank sums at a time for somebody who uses the sum at once: they are then still in its cache."""


class AllReduce:
    """Sums windows over all ranks, in place.

    Args:
        world: The ranks.
        statistics: Where bytes and waiting are counted.
        wire: How large sums cross nodes: as this format fetches blocks. None: as they are.
    """

    def __init__(self, world: World, statistics: Statistics, wire: Format | None = None) -> None:
        self._world = world
        self._statistics = statistics
        self._wire = wire
        self._staging_buffers: dict[
            tuple[str, bool, int, np.dtype], Any
        ] = {}  # of what crosses nodes, kept from call to call
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
        """Of vectors on GPUs."""
        assert self._world.transport is not None
        return self._world.transport

    def _in_place(self, window: AnyWindow, part: slice, scale: float) -> None:
        """Sum a part of all arrays, which the ranks of a node reach where they lie. Collective."""
        world = self._world
        self._arrive(window)
        if world.local_rank < world.n_rails:  # on a single node: every rank
            mine = self.slice_of(part.stop - part.start)
            mine = slice(part.start + mine.start, part.start + mine.stop)
            peers = [peer[mine] for rank in world.node_ranks if (peer := window.of(rank)) is not None]
            if world.n_nodes == 1 and world.size <= MOST:
                kernels.reduce_broadcast(peers, scale)
            else:
                total = self._sum_of(peers[0])
                sum_in_groups(total, peers, scale)
                self._cross(total)
                for peer in peers:
                    kernels.copy(peer, total)
        self._arrive(window)

    def _in_mirrors(self, window: DeviceWindow, mirror: Window, part: slice, scale: float) -> None:
        """Sum what lies in device memory by way of the host. Collective."""
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
        """Let MPI sum what lies in device memory. Collective."""
        total = array if array.dtype.itemsize >= 4 else self._sum_of(array)
        if total is not array:
            kernels.copy(total, array)
        gpu.synchronize(total)
        for at in range(0, total.size, LARGEST_COUNT):
            self._world.comm.Allreduce(MPI.IN_PLACE, total[at : at + LARGEST_COUNT])
        if scale != 1.0:
            kernels.scale(total, scale)
        if total is not array:
            kernels.copy(array, total)

    def prepare(self, window: AnyWindow) -> None:
        """Compile what a call will need, so that the first is no slower than the others. Collective."""
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
            window.plan = Plan(self._world, window, self._node_barrier, self._statistics)
            return
        empty = [window.local[:0].copy() for _ in self._world.node_ranks]
        if self._world.n_nodes == 1 and self._world.size <= MOST:
            kernels.reduce_broadcast(empty)
        else:
            sum_in_groups(self._sum_of(empty[0]), empty, 1.0)

    def slice_of(self, n: int) -> slice:
        """What this rank has of the sum of vectors of ``n`` elements. Local."""
        world = self._world
        return split(n, world.n_rails)[world.local_rank] if world.local_rank < world.n_rails else slice(n, n)

    def reduce_slices(self, window: AnyWindow, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Give each rank what adds up to its slice of the sum of all arrays, which stay as they are. Collective.

        Args:
            window: Of every rank.
            fn: Called with parts of ``slice_of(n)`` and vectors whose sum is wanted; those of the ranks themselves on a
                node with few, else one, in memory that is used again.
        """
        world, statistics, n = self._world, self._statistics, window.local.size
        statistics.n_exchanges += 1
        statistics.bytes_sent += 2 * (world.size - 1) * window.local.nbytes // world.size
        mine = self.slice_of(n)
        if world.size == 1:
            fn(mine, [window.local])
            return
        self._arrive(window)
        peers = [peer for rank in world.node_ranks if (peer := window.of(rank)) is not None]
        if world.n_nodes > 1:
            if world.local_rank < world.n_rails:
                total = self._sum_of(window.local[mine])
                sum_in_groups(total, [peer[mine] for peer in peers], 1.0)
                self._cross(total)
                fn(mine, [total])
        elif len(peers) <= DIRECT:
            fn(mine, [peer[mine] for peer in peers])
        else:
            incoming = self._sum_of(window.local[:BLOCK])
            for start in range(mine.start, mine.stop, BLOCK):
                part = slice(start, min(start + BLOCK, mine.stop))
                total = incoming[: part.stop - start]
                sum_in_groups(total, [peer[part] for peer in peers], 1.0)
                fn(part, [total])
        self._arrive(window)

    def _cross(self, total: Any) -> None:
        """Sum this rank's slice over the nodes. Collective over the ranks with the same local rank."""
        world = self._world
        on_gpu = gpu.is_device(total)
        if on_gpu and not self._transport.sums:
            device, host = gpu.current(), self._staging_buffer("on the host", total, total.size)
            device.copy(host, total)
            device.synchronize()
            self._cross(host)
            device.copy(total, host)
            return
        gpu.synchronize(total)
        n_bytes = total.nbytes
        with world.polling():
            if world.service is not None and total.nbytes >= RING_BYTES * world.n_nodes and not on_gpu:
                largest = max(part.stop - part.start for part in split(total.size, world.n_nodes))
                incoming = self._staging_buffer("arriving", total, largest)
                if self._wire is not None and total.dtype == np.float32:
                    n_bytes = self._wire.fetched_bytes(total.size)
                    ring.allreduce_encoded(world.rail_comm, total, incoming, self._wire)
                else:
                    ring.allreduce(world.rail_comm, total, incoming)
            else:
                for at in range(0, total.size, LARGEST_COUNT):
                    world.rail_comm.Allreduce(MPI.IN_PLACE, total[at : at + LARGEST_COUNT])
        self._statistics.wire_bytes += 2 * (world.n_nodes - 1) * n_bytes // world.n_nodes

    def _staging_buffer(self, what_for: str, like: Any, n: int) -> Any:
        """(n,) elements of the kind of ``like``, and where it is unless it is for what leaves the GPU."""
        # MPI adds neither 16-bit type everywhere.
        dtype = like.dtype if like.dtype.itemsize >= 4 else np.dtype(np.float32)
        key = (what_for, gpu.is_device(like), n, dtype)
        if key not in self._staging_buffers:
            if what_for == "on the host":
                self._staging_buffers[key] = gpu.current().page_locked(n, dtype)
            else:
                self._staging_buffers[key] = np.zeros_like(like, dtype=dtype, shape=(n,))
        return self._staging_buffers[key]

    def _arrive(self, window: AnyWindow) -> None:
        """Every rank of the node is here, and sees what the others have written."""
        assert self._node_barrier is not None
        window.sync()
        self._node_barrier()
        window.sync()

    def free(self) -> None:
        """Give back what was made for the windows. Collective."""
        if self._node_barrier is not None:
            self._node_barrier.free()
            self._node_barrier = None

    def _sum_of(self, mine: Any) -> Any:
        """Room for a sum of slices like ``mine``; at least float32."""
        return self._staging_buffer("sum", mine, mine.size)


class Plan:
    """An all-reduce of few ranks on one node, made ready: one compiled call meets, sums and meets again.

    Args:
        world: The ranks.
        window: What is summed.
        meeting: Of the ranks.
        statistics: Where exchanges are counted.
    """

    def __init__(self, world: World, window: Window, node_barrier: NodeBarrier, statistics: Statistics) -> None:
        mine = split(window.local.size, world.size)[world.rank]
        vectors = [vector for rank in world.node_ranks if (vector := window.of(rank)) is not None]
        self._what = (*(as_bits(vectors) if window.dtype.itemsize == 2 else vectors), mine.start, mine.stop)
        self._node_barrier, self._me, self._end = node_barrier, world.local_rank, 2 * world.size
        self._statistics, self._n_bytes = statistics, 2 * (world.size - 1) * window.local.nbytes // world.size
        self._sum = sum_on_node(world.size, window.dtype)

    def __call__(self, scale: float) -> None:
        """Every rank's vector becomes ``scale`` times the sum of all. Collective."""
        # A small vector takes some microseconds: each line here is a part of them.
        node_barrier, me, what = self._node_barrier, self._me, self._what
        words, number = node_barrier.words, node_barrier.number + 1
        node_barrier.number = number + 1
        progress = self._sum(words, me, number, 0, node_barrier.spin_limit, *what, scale)
        if progress != self._end:
            node_barrier.wait(
                lambda first: self._sum(words, me, number, first, POLL_ONCE, *what, scale), self._end, progress
            )
        self._statistics.n_exchanges += 1
        self._statistics.bytes_sent += self._n_bytes


class PendingAllReduce:
    """An all-reduce that MPI makes in the background. Collective to make.

    Args:
        world: The ranks.
        window: Summed over all ranks, in place; nobody touches it until ``wait``.
        scale: Times the sum.
        statistics: Where bytes and waiting are counted.
    """

    def __init__(self, world: World, window: AnyWindow, scale: float, statistics: Statistics) -> None:
        n_bytes = window.local.nbytes
        statistics.n_exchanges += 1
        statistics.bytes_sent += 2 * (world.size - 1) * n_bytes // world.size
        self._world, self._window, self._scale, self._statistics = world, window, scale, statistics
        # MPI adds neither 16-bit type everywhere, and who knows in which thread it would touch device memory.
        self._sum = gpu.to_host(window.local)
        if window.dtype.itemsize < 4:
            self._sum = self._sum.astype(np.float32)
        self._requests = [
            world.comm.Iallreduce(MPI.IN_PLACE, self._sum[at : at + LARGEST_COUNT])
            for at in range(0, self._sum.size, LARGEST_COUNT)
        ]

    def wait(self) -> None:
        """Wait for its end. Collective; once more does nothing."""
        if not self._requests:
            return
        began = time.perf_counter()
        with self._world.polling():
            MPI.Request.Waitall(self._requests)
        self._requests.clear()
        self._statistics.wait_seconds += time.perf_counter() - began
        if self._scale != 1.0:
            kernels.scale(self._sum, self._scale)
        if self._sum is not self._window.local:
            gpu.assign(self._window.local, self._sum)


def sum_in_groups(total: Any, sources: Sequence[Any], scale: float) -> None:
    """``total = scale * sum(sources)``, however many there are and also where they are 16-bit and the total is not."""
    most = DIRECT if total.dtype != sources[0].dtype else MOST
    kernels.reduce_sum(total, sources[:most], 1.0 if len(sources) > most else scale)
    for start in range(most, len(sources), most - 1):
        group = sources[start : start + most - 1]
        kernels.reduce_sum(total, (total, *group), scale if start + most - 1 >= len(sources) else 1.0)
