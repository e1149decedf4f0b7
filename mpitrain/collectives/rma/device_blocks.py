"""Blocks of shared vectors and mailboxes in device memory.

The blocks live in device memory, where kernels update them in place, or in page-locked host memory. In the latter case
each visit copies its block to a staging buffer on the device and back.

A lock must not be released before the GPU has written the block that it guards. A rank waits for the GPU not after each
block but one block later: a block is released while the next one is worked on::

    lock 0   [copy in | kernel | copy out]
    lock 1                     [copy in | kernel | copy out]         copy out 0 and copy in 1 overlap

If this worker would have to wait for a lock, it first releases the earlier block, so that no two workers wait for each
other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.collectives.rma.blocks import Block, Blocks
from mpitrain.collectives.rma.device_window import DeviceWindow
from mpitrain.collectives.rma.mpi_blocks import MPIBlocks
from mpitrain.collectives.rma.window import Window
from mpitrain.collectives.world.statistics import Statistics
from mpitrain.kernels.native.wire import Format

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

N_STAGING_BUFFERS = 3
"""On the device: one that is worked on, one that is copied out, and one for a visit inside a visit."""

N_REMOTE_STAGING_BUFFERS = 5
"""For blocks of other nodes: one more than on a host, because they are released one block later."""


class DeviceBlocks(Blocks):
    """Blocks of ranks that have GPUs. Collective to create and to free.

    Args:
        world: The ranks.
        homes: The home rank of each block.
        lengths: The number of elements of each block.
        dtype: The type of the elements.
        statistics: The counters of bytes and waiting.
        encoding: As in ``MPIBlocks``.
    """

    def __init__(
        self,
        world: World,
        homes: Sequence[int],
        lengths: Sequence[int],
        dtype: Any,
        statistics: Statistics,
        *,
        encoding: Format | None = None,
    ) -> None:
        assert world.gpu is not None
        assert world.transport is not None
        self.homes, self.lengths = tuple(homes), tuple(lengths)
        self._gpu, self._in_place = world.gpu, world.transport.in_place
        self._n_visits = self._n_held = 0
        self._visits: dict[int, Block] = {}  # the blocks in host memory whose copies are worked on
        self._unreleased: deque[tuple[Any, Block, bool]] = deque()  # blocks that the GPU may still write
        self._has_next = False
        self._blocks = MPIBlocks(
            world,
            homes,
            lengths,
            dtype,
            statistics,
            make_window=DeviceWindow if self._in_place else Window,
            n_staging_buffers=N_REMOTE_STAGING_BUFFERS,
            encoding=encoding,
            before_wait=self._release_written,
        )
        self._staging: list[Any] = []
        if not self._in_place:
            longest = max(self.lengths, default=0)
            self._staging = [self._gpu.zeros(longest, dtype) for _ in range(N_STAGING_BUFFERS)]
            for array in self._blocks.arrays():
                self._gpu.lock_pages(array)

    def acquire(self, index: int, prefetch: int | None = None, *, encoded: bool = False) -> Block:
        """Lock a block and return it in device memory. Local; waits for the present owner."""
        if self._n_held == 0 and not self._unreleased:
            # Work that precedes the exchange may take a whole backward pass: do not hold a lock meanwhile.
            self._gpu.synchronize()
        self._n_held += 1
        block = self._blocks.acquire(index, prefetch, encoded=encoded)
        self._has_next = prefetch is not None
        if self._in_place:
            return block
        self._n_visits += 1
        buffer = self._staging[self._n_visits % N_STAGING_BUFFERS][: self.lengths[index]]
        self._gpu.copy(buffer, block.data)
        self._visits[index] = block
        return Block(index, buffer, block.tags, block.version)

    def release(self, block: Block, *, updated: bool) -> None:
        """Store an updated block and unlock it, immediately or while the next block is processed. Local."""
        self._n_held -= 1
        if self._in_place:
            self._unreleased.append((self._gpu.mark(), block, updated))
        else:
            home = self._visits.pop(block.index)
            mark = self._gpu.copy_out(home.data, block.data) if updated else self._gpu.mark()
            self._unreleased.append((mark, home, updated))
        self._release_written(all_but=1 if self._has_next else 0)

    def _release_written(self, all_but: int = 0) -> None:
        """Release the blocks, except for the last ones, once the GPU has written them."""
        while len(self._unreleased) > all_but:
            mark, block, updated = self._unreleased.popleft()
            self._gpu.wait_for(mark)
            self._blocks.release(block, updated=updated)

    @property
    def residuals(self) -> dict[int, np.ndarray]:
        """The rounding error of each block's last encoded change, (length,), which the next change includes."""
        return self._blocks.residuals

    def drop_residuals(self) -> None:
        """Discard the residuals, which are of no use once all blocks get new values. Local."""
        self._blocks.drop_residuals()

    def peek_tags(self, index: int) -> np.ndarray:
        """Return a block's tags (N_TAGS,) without a lock. Local; see ``Blocks.peek_tags``."""
        return self._blocks.peek_tags(index)

    def lock_owner(self, index: int) -> int | None:
        """Return the rank that holds a block's lock; None if it is free. Local."""
        return self._blocks.lock_owner(index)

    def free(self) -> None:
        """Free the memory. Collective."""
        self._release_written()
        self._gpu.synchronize()
        if not self._in_place:
            for array in self._blocks.arrays():
                self._gpu.unlock_pages(array)
        self._staging.clear()
        self._blocks.free()
