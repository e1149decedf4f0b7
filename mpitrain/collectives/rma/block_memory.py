"""The placement of blocks (``rma.blocks``): elements and tags lie in windows at the home ranks of their blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.collectives.rma.blocks import N_TAGS, Block
from mpitrain.collectives.rma.window import Window

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World


def pack(homes: Sequence[int], sizes: Sequence[int], n_ranks: int) -> tuple[list[int], list[int]]:
    """Return the offset of each item at its rank, and the total size per rank. Each rank stores its items contiguously.

    Args:
        homes: (items,) the rank that stores each item.
        sizes: (items,) the size of each item.
        n_ranks: Number of ranks.
    """
    offsets, totals = [], [0] * n_ranks
    for home, size in zip(homes, sizes, strict=True):
        offsets.append(totals[home])
        totals[home] += size
    return offsets, totals


class BlockMemory:
    """The elements and tags of all blocks. Collective to create and to free.

    Args:
        world: The ranks.
        homes: (blocks,) the home rank of each block.
        lengths: (blocks,) the number of elements of each block.
        dtype: The type of the elements.
        make_window: The class that allocates the elements: ``Window`` or ``DeviceWindow``.

    Attributes:
        slots: (blocks,) the index of each block among the blocks of its home.
        n_slots: (ranks,) the number of blocks of each home.
        in_place: (blocks,) the blocks in memory that this rank can access directly, and None for all others. Only the
            owner of a block's lock may use the block.
        longest_remote: The number of elements of the longest block that is not in place.
    """

    def __init__(
        self,
        world: World,
        homes: Sequence[int],
        lengths: Sequence[int],
        dtype: Any,
        make_window: Callable[..., Any],
    ) -> None:
        self.world = world
        self.homes, self.lengths = tuple(homes), tuple(lengths)
        self.starts, n_elements = pack(self.homes, self.lengths, world.size)
        self.slots, self.n_slots = pack(self.homes, [1] * len(self.homes), world.size)
        self.data = make_window(world, n_elements[world.rank], dtype)
        self.tags = Window(world, self.n_slots[world.rank] * N_TAGS, np.float64)
        self._fetched_tags = np.zeros(N_TAGS)
        self.in_place = [self._block(index) for index in range(len(self.homes))]
        remote = (n for n, block in zip(self.lengths, self.in_place, strict=True) if block is None)
        self.longest_remote = max(remote, default=0)

    def _block(self, index: int) -> Block | None:
        start, length = self.starts[index], self.lengths[index]
        elements, tags = self.data.of(self.homes[index]), self._tags_in_place(index)
        if elements is None or tags is None:
            return None
        return Block(index, elements[start : start + length], tags, version=0)

    def _tags_in_place(self, index: int) -> np.ndarray | None:
        """Return the tags of a block of this node, even if its elements are in the memory of another GPU."""
        tags, slot = self.tags.of(self.homes[index]), self.slots[index]
        return None if tags is None else tags[slot * N_TAGS : (slot + 1) * N_TAGS]

    def staging_buffers(self, n: int) -> list[Any]:
        """Return ``n`` buffers, each large enough for any block that is not in place. Local."""
        like, length = self.data.local, self.longest_remote
        if isinstance(like, np.ndarray):
            return [np.zeros(length, like.dtype) for _ in range(n)]  # takes memory only once it is used
        return [np.zeros_like(like, shape=(length,)) for _ in range(n)]

    def get(self, block: Block) -> None:
        """Copy a remote block from its home; this rank must hold the block's lock. Local."""
        index = block.index
        home = self.homes[index]
        self.data.get(home, block.data, self.starts[index])
        tags = self._tags_in_place(index)
        if tags is None:
            self.tags.get(home, block.tags, self.slots[index] * N_TAGS)
            self.tags.flush(home)
        else:
            block.tags[:] = tags
        self.data.flush(home)

    def put(self, block: Block) -> None:
        """Copy a remote block to its home; this rank must hold the block's lock. Local."""
        index = block.index
        home = self.homes[index]
        self.data.put(home, block.data, self.starts[index])
        tags = self._tags_in_place(index)
        if tags is None:
            self.tags.put(home, block.tags, self.slots[index] * N_TAGS)
            self.tags.flush(home)
        else:
            tags[:] = block.tags
        self.data.flush(home)

    def peek_tags(self, index: int) -> np.ndarray:
        """Return a block's tags (N_TAGS,) without a lock. Local; see ``Blocks.peek_tags``."""
        tags = self._tags_in_place(index)
        if tags is not None:
            self.tags.sync()
            return tags
        self.tags.get(self.homes[index], self._fetched_tags, self.slots[index] * N_TAGS)
        self.tags.flush(self.homes[index])
        return self._fetched_tags

    def arrays(self) -> list[Any]:
        """Return the arrays of elements that this rank can access directly. Local."""
        arrays = [self.data.of(rank) for rank in sorted(set(self.homes))]
        return [array for array in arrays if array is not None]

    def free(self) -> None:
        """Free the memory. Collective."""
        self.tags.free()
        self.data.free()
