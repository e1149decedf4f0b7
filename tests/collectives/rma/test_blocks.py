"""The context manager of a locked block: what it acquires and releases, with and without errors."""

import numpy as np
import pytest

from mpitrain.collectives.rma.blocks import Block, Blocks


class RecordedBlocks(Blocks):
    """Blocks that record what is called."""

    def __init__(self):
        self.homes, self.lengths, self.calls = [0, 0], [3, 3], []

    def acquire(self, index, prefetch=None, *, encoded=False):
        self.calls.append(("acquire", index, prefetch, encoded))
        return Block(index, np.zeros(3), np.zeros(4), version=0)

    def release(self, block, *, updated):
        self.calls.append(("release", block.index, updated))

    def peek_tags(self, index, out):
        raise NotImplementedError

    def free(self):
        raise NotImplementedError


@pytest.mark.parametrize("updated", [True, False])
@pytest.mark.parametrize("encoded", [True, False])
def test_a_block_is_released_at_the_end_of_the_with_statement(updated, encoded):
    blocks = RecordedBlocks()
    with blocks.locked(0, 1, updated=updated, encoded=encoded) as block:
        assert block.index == 0
        assert blocks.calls == [("acquire", 0, 1, encoded)]
    assert blocks.calls[1:] == [("release", 0, updated)]


@pytest.mark.parametrize("updated", [True, False])
def test_an_error_releases_the_block_and_the_prefetched_one(updated):
    """The body may have changed a part of the block, so it is stored; the prefetched block is unchanged."""
    blocks = RecordedBlocks()
    with pytest.raises(ValueError, match="planned"), blocks.locked(0, 1, updated=updated):
        raise ValueError("planned")
    assert blocks.calls[1:] == [("release", 0, updated), ("acquire", 1, None, False), ("release", 1, False)]


def test_an_error_without_prefetch_releases_one_block():
    blocks = RecordedBlocks()
    with pytest.raises(ValueError, match="planned"), blocks.locked(1, updated=True):
        raise ValueError("planned")
    assert blocks.calls[1:] == [("release", 1, True)]


def test_blocks_can_be_locked_inside_each_other():
    blocks = RecordedBlocks()
    with blocks.locked(0, updated=True), blocks.locked(1, updated=False):
        pass
    assert blocks.calls[2:] == [("release", 1, False), ("release", 0, True)]


@pytest.mark.parametrize(
    ("homes", "sizes", "offsets", "totals"),
    [([], [], [], [0, 0]), ([0, 1, 0], [5, 7, 2], [0, 0, 5], [7, 7]), ([1, 1, 1], [1, 1, 1], [0, 1, 2], [0, 3])],
)
@pytest.mark.ranks(1)
def test_items_lie_one_after_the_other_at_their_homes(homes, sizes, offsets, totals):
    from mpitrain.collectives.rma.block_memory import pack

    assert pack(homes, sizes, 2) == (offsets, totals)
