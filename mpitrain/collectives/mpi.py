"""The communicator between MPI ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.collectives import tree
from mpitrain.collectives.allreduce import AllReduce
from mpitrain.collectives.node_tree import NodeTree, fits
from mpitrain.collectives.pending_allreduce import PendingAllReduce
from mpitrain.collectives.rma.device_window import AnyWindow
from mpitrain.collectives.rma.node_barrier import FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS
from mpitrain.collectives.rma.peer_memory import PeerMemory
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.world.background import Background, Backoff, Started, threads_may_call_mpi
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.errors import UsageError
from mpitrain.kernels import gpu
from mpitrain.kernels.native.wire import FLOAT32, format_of
from mpitrain.kernels.reductions import DIRECT

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


POLLS_BEFORE_BACKOFF = 64
"""Polls of ``wait_until`` that only yield the core in between; after them the rank sleeps."""

LONGEST_BACKOFF_BETWEEN_NODES_SECONDS = 2e-3
"""Longer than on a node: a poll may be a message, which takes time from the very rank that is awaited."""


class MPICommunicator(PeerMemory):
    """The ``Communicator`` between the ranks of a world. Each rank is a worker. Collective to create.

    The base class ``PeerMemory`` has the methods that allocate and read memory. This class adds the collective
    operations and the operations in the background.

    Args:
        world: The ranks.
        statistics: The counters of exchanges; new ones by default.
        on_host: Whether vectors are in host memory although the ranks have GPUs.
        wire: The wire format of float32 vectors between nodes (``native.wire``). ``"float32"`` sends them unchanged.
            ``"bfloat16"`` and ``"float16"`` use 2 bytes per element, ``"int8"`` about 1. The format applies to
            ``update`` of shared vectors and to large all-reduces; with int8, all-reduces use 2 bytes. Everything else
            is exact: mailboxes, vectors of peers, other types, and ``read`` and ``write`` of shared vectors.

    Raises:
        UsageError: The wire format does not exist, or this world cannot use it between its nodes.
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
        super().__init__(world, statistics or Statistics(), on_host=on_host, encoding=format_of(wire))
        self._on_host, self._wire = on_host, wire
        if self._encoding is not None:
            self._check_wire()
        self._allreduce = AllReduce(world, self.statistics, self._encoding)
        self._pending: PendingAllReduce | None = None
        self._node_tree: NodeTree | None = None  # created by the first small vector
        self._gathered: tuple[np.ndarray, np.ndarray] | None = None
        self._background = Background(threads=threads_may_call_mpi())

    def _check_wire(self) -> None:
        """Raise if encoded vectors cannot travel between the nodes: that takes messages between hosts."""
        transport = None if self._gpu is None else self.world.transport
        if self.world.n_nodes == 1:
            return
        if self.world.service is None:
            raise UsageError(
                f"wire {self._wire} needs progress threads between the nodes. They exist with MPI_THREAD_MULTIPLE and "
                "without MPITRAIN_BETWEEN_NODES=windows. Otherwise remove wire"
            )
        if transport is not None and (transport.in_place or transport.sums):
            raise UsageError(
                f"wire {self._wire} needs vectors that cross nodes through the host, but here MPI moves them from "
                "device memory: use transport staged or ipc, or remove wire"
            )

    @property
    def dead(self) -> frozenset[int]:
        """The ranks known to have died. Local."""
        return self.world.dead

    def split(self, color: int) -> MPICommunicator:
        """Create a communicator of the ranks that pass the same ``color``. Collective."""
        part = MPICommunicator(self.world.split(color), self.statistics, on_host=self._on_host, wire=self._wire)
        self._made.extend((part.world, part))
        return part

    def vector(self, n: int, dtype: Any) -> AnyWindow:
        """Allocate a vector of zeros that peers can read and that can be all-reduced. Collective."""
        window = super().vector(n, dtype)
        self._allreduce.prepare(window)
        return window

    def adopt(self, window: Window) -> Window:
        """Return a window of more ranks as one of these ranks, which can be all-reduced. Collective.

        Args:
            window: The window of a world of which these ranks are a part. Between nodes, they need progress threads.
        """
        adopted = window.of_part(self.world)
        self._allreduce.prepare(adopted)
        return adopted

    def allreduce(self, vector: Any, *, mean: bool = False, part: slice | None = None) -> None:
        """Replace every rank's vector by the sum (or mean) of all, with the same bits everywhere. Collective."""
        self._allreduce(vector, part, scale=1.0 / self.size if mean else 1.0)

    def slice_of(self, n: int) -> slice:
        """Return this rank's slice of a vector of ``n`` elements. Local."""
        return self._allreduce.slice_of(n)

    def reduce_slices(self, vector: Any, fn: Callable[[slice, Sequence[Any]], object]) -> None:
        """Call ``fn`` with vectors that add up to the sum of all vectors in this rank's slice. Collective."""
        self._allreduce.reduce_slices(vector, fn)

    def start_allreduce(self, vector: Any, *, mean: bool = False) -> PendingAllReduce:
        """Start a non-blocking all-reduce. Collective."""
        self._pending = PendingAllReduce(self.world, vector, 1.0 / self.size if mean else 1.0, self.statistics)
        return self._pending

    def start(self, fn: Callable[[], object]) -> Started:
        """Start ``fn`` in the background. Local."""
        if self._gpu is None:
            return self._background.start(fn)
        device, mark = self._gpu, self._gpu.mark()

        def on_background_stream() -> None:
            with device.in_background():
                device.after(mark)
                fn()

        return self._background.start(on_background_stream)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until one-sided operations of other ranks make ``condition()`` true. Local."""
        if condition():
            return
        longest = LONGEST_BACKOFF_SECONDS if self.world.n_nodes == 1 else LONGEST_BACKOFF_BETWEEN_NODES_SECONDS
        began, polls, backoff = time.perf_counter(), 0, Backoff(FIRST_BACKOFF_SECONDS, longest)
        with self.world.polling(), self.world.waiting("messages of other workers"):
            while not condition():
                self.world.require_all()
                self.world.progress()  # the one-sided operations of some MPIs need it
                polls += 1
                if polls < POLLS_BEFORE_BACKOFF:
                    os.sched_yield()
                else:
                    backoff.rest()
        self.statistics.add_wait(began)

    def broadcast(self, array: Any, root: int = 0) -> None:
        """Copy the root's array to the array of every rank. Collective."""
        host = gpu.to_host(array)
        node_tree = self._node_tree_for(host)
        if node_tree is not None:
            node_tree.broadcast(host, root)
        else:
            with self.world.polling(), self.world.waiting("a broadcast"):
                tree.broadcast(self.world, host, root)
        if host is not array:
            gpu.assign(array, host)

    def reduce(self, array: Any, root: int = 0) -> None:
        """Replace the root's array by the sum of all arrays; the other arrays become undefined. Collective."""
        host = gpu.to_host(array)
        node_tree = self._node_tree_for(host)
        if node_tree is not None:
            node_tree.reduce(host, root)
        else:
            with self.world.polling(), self.world.waiting("a reduction"):
                tree.reduce(self.world, host, root)
        if host is not array:
            gpu.assign(array, host)

    def _node_tree_for(self, array: np.ndarray) -> NodeTree | None:
        """Return the tree of the node if it carries such a vector between these ranks. Collective."""
        if not fits(array):
            return None
        if self._node_tree is None and self.world.n_nodes == 1 and 1 < self.size <= DIRECT:
            self._node_tree = NodeTree(self.world, self.statistics)
        return self._node_tree

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Return a few numbers of each rank to all ranks: (size, len(values)) float64. Collective."""
        if self._gpu is not None:
            self._gpu.synchronize()
        mine = np.asarray(values, np.float64)
        all_values = np.empty((self.size, mine.size))
        self._gathered = mine, all_values  # kept alive: after a death, MPI may still write to them
        self.world.run_on_survivors(lambda comm: comm.Allgather(mine, all_values[: comm.Get_size()]), "a gather")
        self.world.require_all()
        return all_values

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        self.barrier_of_survivors()
        self.world.require_all()

    def barrier_of_survivors(self) -> None:
        """Wait for all living ranks. Collective over them."""
        self._publish_all()
        began = time.perf_counter()
        self.world.barrier()
        self.statistics.add_wait(began)

    def free(self) -> None:
        """Free everything that this communicator has allocated. Collective."""
        self._background.stop()
        if self._pending is not None:
            self._pending.wait()  # MPI still writes to memory that is freed next
            self._pending = None
        super().free()
        self._allreduce.free()
        if self._node_tree is not None:
            self._node_tree.free()
            self._node_tree = None
