"""Memory that the ranks of a world access one-sided: vectors, shared vectors and mailboxes, on hosts or on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.collectives.rma.device_blocks import DeviceBlocks
from mpitrain.collectives.rma.device_window import AnyWindow, DeviceWindow
from mpitrain.collectives.rma.mailboxes import Mailboxes
from mpitrain.collectives.rma.mpi_blocks import MPIBlocks
from mpitrain.collectives.rma.shared_vector import LARGEST_SHARD, SMALLEST_SHARD, SharedVector
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.topology.partition import shards
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.errors import RankFailed
from mpitrain.kernels import gpu
from mpitrain.kernels.native.wire import Format

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

LARGEST_REMOTE_SHARD = 1 << 17
"""Elements of a shard that other nodes fetch by message. Two shards at least are under way at a time, and messages in
the same direction queue behind them, among them the first request of a rank that is a little later: shards four times
as large left a link idle for a tenth of an exchange.
"""

SMALLEST_REMOTE_SHARD = 1 << 15
"""Elements of a share of a rank that other nodes fetch by message, at least. They take a millisecond on a link of
1 Gbit/s, a few times what a request costs.
"""

LARGEST_DEVICE_SHARD = 1 << 25
"""Elements of a shard in device memory: a visit synchronises host and GPU, which takes some 10 us."""

LARGEST_STAGED_SHARD = 1 << 21
"""Elements of a shard that GPUs visit through the host: one is copied in while another one is copied out."""


class PeerMemory:
    """The memory that the ranks of a world can access. Collective to create and to free.

    Args:
        world: The ranks.
        statistics: The counters of exchanges.
        on_host: Whether vectors are in host memory although the ranks have GPUs.
        encoding: The wire format of ``SharedVector.update`` between nodes; None without one.

    Attributes:
        rank: This rank.
        size: The number of ranks.
        nodes: (size,) the node of each rank.
    """

    def __init__(
        self, world: World, statistics: Statistics, *, on_host: bool = False, encoding: Format | None = None
    ) -> None:
        self.world, self.statistics = world, statistics
        self.rank, self.size, self.nodes = world.rank, world.size, world.nodes
        self._gpu = None if on_host else world.gpu
        self._encoding = encoding
        self._made: list[Any] = []
        self._mirrored: list[DeviceWindow] = []
        self._fetched: np.ndarray | None = None

    def vector(self, n: int, dtype: Any) -> AnyWindow:
        """Allocate a vector of zeros that peers can read. Collective."""
        window: AnyWindow
        if self._gpu is None:
            window = Window(self.world, n, dtype)
        else:
            window = DeviceWindow(self.world, n, dtype, mirrored=True)
            if window.mirror is not None:
                self._mirrored.append(window)
        self._made.append(window)
        return window

    def numbers(self, n: int) -> Window:
        """Allocate a few float64 zeros in host memory that peers can read. Collective."""
        window = Window(self.world, n, np.float64)
        self._made.append(window)
        return window

    def node_vector(self, n: int, dtype: Any) -> Window:
        """Allocate a vector of zeros that the ranks of a node share and that peers can read. Collective."""
        window = Window(self.world, n, dtype, node_shared=True)
        self._made.append(window)
        return window

    def publish(self, vector: Any) -> None:
        """Publish a snapshot of ``vector``; peers see it after the next barrier or gather. Local.

        Vectors in host memory are always visible. For them, this call only orders earlier and later writes.
        """
        if isinstance(vector, DeviceWindow):
            vector.publish()
        else:
            vector.sync()

    def read(self, vector: Any, peer: int, fn: Callable[[Any], object]) -> None:
        """Call ``fn`` with the peer's present vector, unless it is lost. Local; not counted as an exchange.

        A vector is lost if all ranks of its node are dead.

        If the vector is on a GPU and this rank does not map it, ``fn`` receives the values that were published last.
        """
        memory = vector.of(peer)
        if memory is not None:
            vector.sync()
            fn(memory)
        elif isinstance(vector, DeviceWindow):
            self._read_mirror(vector, peer, fn)
        else:
            try:
                fetched = self._fetch(vector, peer)
            except RankFailed:
                return
            fn(fetched)

    def _read_mirror(self, vector: DeviceWindow, peer: int, fn: Callable[[Any], object]) -> None:
        assert vector.mirror is not None
        vector.mirror.sync()
        memory = vector.mirror.of(peer)
        copy = np.empty_like(vector.local)
        gpu.assign(copy, self._fetch(vector.mirror, peer) if memory is None else memory)
        fn(copy)

    def _fetch(self, vector: Window, peer: int) -> np.ndarray:
        """Return a copy of the vector of a rank of another node; overwritten by the next call."""
        if self._fetched is None or self._fetched.size < vector.local.nbytes:
            self._fetched = np.empty(vector.local.nbytes, np.uint8)
        fetched = self._fetched[: vector.local.nbytes].view(vector.dtype)
        vector.get(peer, fetched)
        vector.flush(peer)
        self.statistics.wire_bytes += vector.local.nbytes
        return fetched

    def shared_vector(self, n: int, dtype: Any, rows: int = 1) -> SharedVector:
        """Allocate a vector of zeros, divided into shards, or ``rows`` such vectors, updated together. Collective."""
        smallest, largest = self._shard_sizes()
        parts = shards(n, self.nodes, largest, smallest=-(-smallest // rows))
        lengths = [rows * s.size for s in parts]
        blocks = self._blocks([s.owner for s in parts], lengths, dtype, encoding=self._encoding, continues=True)
        # Usually the next node first: a rank that begins with its own shards finds some of them taken by slightly
        # earlier ranks of another node, whose visits take longer.
        first = (self.rank + self.world.n_rails) % self.size
        return SharedVector(blocks, self.rank, self.size, self.statistics, rows, first=first)

    def mailboxes(self, n: int, dtype: Any, slots: int = 1) -> Mailboxes:
        """Allocate ``slots`` vectors at every rank, each with a lock that guards every access to it. Collective."""
        homes = [rank for rank in range(self.size) for _ in range(slots)]
        return Mailboxes(self._blocks(homes, [n] * len(homes), dtype), self.rank, slots, self.statistics)

    def _blocks(
        self,
        homes: Sequence[int],
        lengths: Sequence[int],
        dtype: Any,
        *,
        encoding: Format | None = None,
        continues: bool = False,
    ) -> MPIBlocks | DeviceBlocks:
        blocks: MPIBlocks | DeviceBlocks
        if self._gpu is None:
            blocks = MPIBlocks(
                self.world, homes, lengths, dtype, self.statistics, encoding=encoding, continues=continues
            )
        else:
            blocks = DeviceBlocks(self.world, homes, lengths, dtype, self.statistics, encoding=encoding)
        self._made.append(blocks)
        return blocks

    def _shard_sizes(self) -> tuple[int, int]:
        """Return the elements of an owner's share, at least, and of a shard, at most."""
        if self._gpu is None and self.world.service is None:
            return SMALLEST_SHARD, LARGEST_SHARD
        if self._gpu is None:
            return SMALLEST_REMOTE_SHARD, LARGEST_REMOTE_SHARD
        assert self.world.transport is not None
        return SMALLEST_REMOTE_SHARD, LARGEST_DEVICE_SHARD if self.world.transport.in_place else LARGEST_STAGED_SHARD

    def drop_residuals(self) -> None:
        """Discard the residuals of encoded changes, which are of no use once shared vectors get new values. Local."""
        for made in self._made:
            if isinstance(made, (MPIBlocks, DeviceBlocks, PeerMemory)):
                made.drop_residuals()

    def _publish_all(self) -> None:
        """Publish all vectors on GPUs, and wait for the GPU. Local."""
        for window in self._mirrored:
            window.publish()
        if self._gpu is not None:
            self._gpu.synchronize()

    def free(self) -> None:
        """Free everything that was allocated by this object. Collective."""
        for made in reversed(self._made):
            made.free()
        self._made.clear()
        self._mirrored.clear()
