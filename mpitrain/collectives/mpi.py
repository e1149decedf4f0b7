"""The communicator between MPI ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.collectives import tree
from mpitrain.collectives.allreduce import AllReduce, AnyWindow, PendingAllReduce
from mpitrain.collectives.rma.blocks import MPIBlocks
from mpitrain.collectives.rma.device_window import DeviceBlocks, DeviceWindow
from mpitrain.collectives.rma.mailboxes import Mailboxes
from mpitrain.collectives.rma.node_barrier import FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS
from mpitrain.collectives.rma.shared_vector import LARGEST_SHARD, SharedVector
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.topology.partition import shards
from mpitrain.collectives.world.background import Background, Backoff, Started, threads_may_call_mpi
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.errors import UsageError
from mpitrain.kernels import gpu
from mpitrain.kernels.native.wire import FLOAT32, Format, format_of

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


LARGEST_REMOTE_SHARD = 1 << 17
"""Elements of a shard where other nodes ask for it by message. Two of them are on their way at a time, and what goes
the same way waits behind them, also the first request of a rank that is a little later: shards four times as large left
a link idle for a tenth of an exchange. But one of them goes in each round trip, which takes longer at 10 ms.
"""

LARGEST_DEVICE_SHARD = 1 << 25
"""Elements of a shard in device memory: a visit costs the GPU's and the host's meeting, which takes some 10 us."""

LARGEST_STAGED_SHARD = 1 << 21
"""Elements of a shard that GPUs visit by way of the host: one is copied in while another one is copied out."""

N_DEVICE_STAGING_BUFFERS = 5
"""For blocks of other nodes: one more than a host needs, since a GPU gives them back one later."""

POLLS_BEFORE_BACKOFF = 64
"""At what others do. Between two looks the core is given to whoever wants it, and soon whether anybody does or not."""

LONGEST_BACKOFF_BETWEEN_NODES_SECONDS = 2e-3
"""Longer than on a node: there a look may be a message, which takes time from the very rank that is waited for."""


class MPICommunicator:
    """Implements ``Communicator`` between the ranks of a world. Each worker is a rank.

    Args:
        world: The ranks.
        statistics: To be counted into.
        on_host: Vectors lie in host memory although the ranks have GPUs.
        wire: How float32 vectors cross nodes: ``"float32"``, as they are; ``"bfloat16"``, ``"float16"`` or ``"int8"``,
            in 2 bytes or about 1 an element (``native.wire``). It holds for visits to shared vectors by ``update``
            (``read`` and ``write``, which evaluation and checkpoints use, are exact) and for large all-reduces, which
            take 2 bytes under int8. Mailboxes, peers' vectors and elements of other types travel as they are, but not
            the sums of 16-bit vectors, which are float32.

    Raises:
        UsageError: There is no such format, or this world crosses nodes in a way that knows none.
    """

    def __init__(
        self,
        world: World,
        statistics: Statistics | None = None,
        *,
        on_host: bool = False,
        wire: str = FLOAT32,
    ) -> None:
        world.require_all()
        self.world = world
        self._on_host = on_host
        self._wire, self._encoding = wire, format_of(wire)
        self._gpu = None if on_host else world.gpu
        self.rank, self.size, self.nodes = world.rank, world.size, world.nodes
        self.statistics = statistics or Statistics()
        if self._encoding is not None:
            self._check_wire()
        self._allreduce = AllReduce(world, self.statistics, self._encoding)
        self._made: list[Any] = []
        self._mirrored: list[DeviceWindow] = []
        self._pending: PendingAllReduce | None = None
        self._background = Background(threads=threads_may_call_mpi())
        self._fetched: np.ndarray | None = None

    @property
    def dead(self) -> frozenset[int]:
        """Workers that have died. Local."""
        return self.world.dead

    def split(self, color: int) -> MPICommunicator:
        """A communicator of those workers that give the same ``color``. Collective."""
        part = MPICommunicator(self.world.split(color), self.statistics, on_host=self._on_host, wire=self._wire)
        self._made.extend((part.world, part))
        return part

    def _check_wire(self) -> None:
        """Encoded vectors cross nodes by messages between hosts."""
        transport = None if self._gpu is None else self.world.transport
        if self.world.n_nodes == 1:
            return
        if self.world.service is None:
            raise UsageError(
                f"wire {self._wire} needs messages between nodes, which there are among all ranks (not in replica "
                "groups or the tree of easgd_tree), with MPI_THREAD_MULTIPLE, without MPITRAIN_BETWEEN_NODES=windows: "
                "leave wire out"
            )
        if transport is not None and (transport.in_place or transport.sums):
            raise UsageError(
                f"wire {self._wire} needs vectors that cross nodes by way of the host, and here MPI moves them from "
                "device memory: take transport staged or ipc, or leave wire out"
            )

    def drop_residuals(self) -> None:
        """Forget what changes of shared vectors have lost on the wire: they get other values. Local."""
        for made in self._made:
            if isinstance(made, (MPIBlocks, DeviceBlocks, MPICommunicator)):
                made.drop_residuals()

    def vector(self, n: int, dtype: Any) -> AnyWindow:
        """A vector of zeros that peers can read. Collective."""
        window: AnyWindow
        if self._gpu is None:
            window = Window(self.world, n, dtype)
        else:
            window = DeviceWindow(self.world, n, dtype, mirrored=True)
            if window.mirror is not None:
                self._mirrored.append(window)
        self._allreduce.prepare(window)
        self._made.append(window)
        return window

    def numbers(self, n: int) -> Window:
        """A few numbers, float64 zeros in host memory, that peers can read. Collective."""
        window = Window(self.world, n, np.float64)
        self._made.append(window)
        return window

    def node_vector(self, n: int, dtype: Any) -> Window:
        """A vector of zeros that peers can read; the workers of a node have one between them. Collective."""
        window = Window(self.world, n, dtype, node_shared=True)
        self._made.append(window)
        return window

    def publish(self, vector: Any) -> None:
        """Let peers read a vector as it is now, after the next barrier or gather. Local.

        In host memory they do anyway, and who sees what is written there after this sees what was written before.
        """
        if isinstance(vector, DeviceWindow):
            vector.publish()
        else:
            vector.sync()

    def read(self, vector: Any, peer: int, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the peer's vector as it is now. Local; not counted as an exchange.

        A vector in the memory of a GPU that this one does not map is seen as its owner has published it.
        """
        memory = vector.of(peer)
        if memory is not None:
            vector.sync()
            fn(memory)
        elif isinstance(vector, DeviceWindow):
            self._read_mirror(vector, peer, fn)
        else:
            fn(self._fetch(vector, peer))

    def _read_mirror(self, vector: DeviceWindow, peer: int, fn: Callable[[Any], object]) -> None:
        assert vector.mirror is not None
        vector.mirror.sync()
        memory = vector.mirror.of(peer)
        shown = np.empty_like(vector.local)
        gpu.assign(shown, self._fetch(vector.mirror, peer) if memory is None else memory)
        fn(shown)

    def _fetch(self, vector: Window, peer: int) -> np.ndarray:
        """The vector of a rank of another node; overwritten by the next call."""
        if self._fetched is None or self._fetched.size < vector.local.nbytes:
            self._fetched = np.empty(vector.local.nbytes, np.uint8)
        fetched = self._fetched[: vector.local.nbytes].view(vector.dtype)
        vector.get(peer, fetched)
        vector.flush(peer)
        self.statistics.wire_bytes += vector.local.nbytes
        return fetched

    def shared_vector(self, n: int, dtype: Any, rows: int = 1) -> SharedVector:
        """One vector for all workers, zeros, sharded over them; or several, changed together. Collective."""
        parts = shards(n, self.size, self._largest_shard())
        blocks = self._blocks([s.owner for s in parts], [rows * s.size for s in parts], dtype, self._encoding)
        acquire = partial(blocks.acquire, encoded=True)
        # The next node first, usually: whoever begins with its own shards finds some of them taken, for as long as a
        # visit from another node takes, by one who is a little earlier.
        first = (self.rank + self.world.n_rails) % self.size
        return SharedVector(blocks, self.rank, self.size, self.statistics, rows, first=first, acquire=acquire)

    def mailboxes(self, n: int, dtype: Any, slots: int = 1) -> Mailboxes:
        """Vectors at every worker that others read or change under their locks. Collective."""
        homes = [rank for rank in range(self.size) for _ in range(slots)]
        return Mailboxes(self._blocks(homes, [n] * len(homes), dtype), self.rank, slots, self.statistics)

    def _blocks(
        self, homes: Sequence[int], lengths: Sequence[int], dtype: Any, encoding: Format | None = None
    ) -> MPIBlocks | DeviceBlocks:
        """Where this communicator's vectors are. Collective."""
        blocks: MPIBlocks | DeviceBlocks
        if self._gpu is None:
            blocks = MPIBlocks(self.world, homes, lengths, dtype, self.statistics, encoding=encoding)
        else:
            assert self.world.transport is not None
            at_home: Any = DeviceWindow if self.world.transport.in_place else Window
            options: Any = {"window": at_home, "n_staging_buffers": N_DEVICE_STAGING_BUFFERS, "encoding": encoding}
            homes_of = MPIBlocks(self.world, homes, lengths, dtype, self.statistics, **options)
            blocks = DeviceBlocks(self.world, homes_of, dtype)
        self._made.append(blocks)
        return blocks

    def _largest_shard(self) -> int:
        if self._gpu is None:
            return LARGEST_SHARD if self.world.service is None else LARGEST_REMOTE_SHARD
        assert self.world.transport is not None
        return LARGEST_DEVICE_SHARD if self.world.transport.in_place else LARGEST_STAGED_SHARD

    def allreduce(self, vector: Any, *, mean: bool = False, part: slice | None = None) -> None:
        """Replace every worker's vector by the sum (or mean) of all; the same bits everywhere. Collective."""
        self._allreduce(vector, part, scale=1.0 / self.size if mean else 1.0)

    def slice_of(self, n: int) -> slice:
        """This worker's part of a vector of ``n`` elements. Local."""
        return self._allreduce.slice_of(n)

    def reduce_slices(self, vector: Any, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Give each worker what adds up to the sum of all workers' vectors in its part. Collective."""
        self._allreduce.reduce_slices(vector, fn)

    def start_allreduce(self, vector: Any, *, mean: bool = False) -> PendingAllReduce:
        """Begin an all-reduce that goes on in the background. Collective."""
        self._pending = PendingAllReduce(self.world, vector, 1.0 / self.size if mean else 1.0, self.statistics)
        return self._pending

    def start(self, fn: Callable[[], object]) -> Started:
        """Begin ``fn`` in the background. Local."""
        if self._gpu is None:
            return self._background.start(fn)
        device, mark = self._gpu, self._gpu.mark()

        def on_its_own_stream() -> None:
            with device.in_background():
                device.after(mark)
                fn()

        return self._background.start(on_its_own_stream)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that others do makes ``condition()`` true. Local."""
        if condition():
            return
        longest = LONGEST_BACKOFF_SECONDS if self.world.n_nodes == 1 else LONGEST_BACKOFF_BETWEEN_NODES_SECONDS
        began, polls, backoff = time.perf_counter(), 0, Backoff(FIRST_BACKOFF_SECONDS, longest)
        with self.world.polling():
            while not condition():
                self.world.require_all()
                self.world.progress()  # for MPIs whose one-sided operations wait for it
                polls += 1
                if polls < POLLS_BEFORE_BACKOFF:
                    os.sched_yield()
                else:
                    backoff.rest()
        self.statistics.wait_seconds += time.perf_counter() - began

    def broadcast(self, array: Any, root: int = 0) -> None:
        """Copy the root's array to every worker's. Collective."""
        self._on_host_copy(tree.broadcast, array, root)

    def reduce(self, array: Any, root: int = 0) -> None:
        """Sum every worker's array into the root's; the others' are spent. Collective."""
        self._on_host_copy(tree.reduce, array, root)

    def _on_host_copy(self, collective: Callable[[World, np.ndarray, int], None], array: Any, root: int) -> None:
        """A collective of host arrays, for an array wherever it lies."""
        host = gpu.to_host(array)
        with self.world.polling():
            collective(self.world, host, root)
        if host is not array:
            gpu.assign(array, host)

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """A few numbers of each worker, to all: (size, len(values)) float64. Collective."""
        if self._gpu is not None:
            self._gpu.synchronize()
        mine = np.asarray(values, np.float64)
        all_values = np.empty((self.size, mine.size))
        self.world.run_on_survivors(lambda comm: comm.Allgather(mine, all_values[: comm.Get_size()]))
        self.world.require_all()
        return all_values

    def barrier(self) -> None:
        """Wait for every worker. Collective."""
        self.barrier_of_survivors()
        self.world.require_all()

    def barrier_of_survivors(self) -> None:
        """The same without those that have died. Collective over the others."""
        for window in self._mirrored:
            window.publish()
        if self._gpu is not None:
            self._gpu.synchronize()
        began = time.perf_counter()
        self.world.barrier()
        self.statistics.wait_seconds += time.perf_counter() - began

    def free(self) -> None:
        """Give back everything that was made here. Collective."""
        self._background.stop()
        if self._pending is not None:
            self._pending.wait()  # MPI still writes to memory that goes now
            self._pending = None
        for made in reversed(self._made):
            made.free()
        self._made.clear()
        self._mirrored.clear()
        self._allreduce.free()
