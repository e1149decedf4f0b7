"""The order in which the blocks of a visit are requested."""

from __future__ import annotations

from mpitrain.collectives.rma.awaited_blocks import AwaitedBlocks


def taken(awaited: AwaitedBlocks, home: int | None = None) -> list[int]:
    """Take all blocks, or all of a home."""
    indices = []
    while (index := awaited.first(home)) is not None:
        awaited.remove(index)
        indices.append(index)
    return indices


def test_homes_take_turns_and_each_block_comes_once() -> None:
    homes = [0, 0, 0, 1, 2, 2]
    assert taken(AwaitedBlocks([1, 2, 0, 3, 4, 5], homes)) == [1, 3, 4, 2, 5, 0]


def test_a_home_that_asks_for_its_next_block_gets_its_own() -> None:
    homes = [0, 0, 0, 1, 1, 1]
    awaited = AwaitedBlocks([0, 1, 2, 3, 4, 5], homes)
    assert taken(awaited, home=1) == [3, 4, 5]
    assert awaited.first(1) is None
    assert taken(awaited) == [0, 1, 2]
    assert awaited.first() is None


def test_nothing_is_awaited_of_a_home_without_blocks() -> None:
    assert AwaitedBlocks([0], [3]).first(2) is None
    assert AwaitedBlocks([], []).first() is None
