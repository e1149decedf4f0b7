"""Laws of splits, shards, visiting orders and trees, for 1 to 17 parts."""

import math

import pytest

from mpitrain.collectives.topology.partition import (
    binomial_tree,
    emulated_nodes,
    shards,
    share_of_cores,
    split,
    visiting_order,
)

PARTS = range(1, 18)
LENGTHS = (0, 1, 15, 16, 17, 100, 1023, 4096, 100_003)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("align", [1, 16, 64])
@pytest.mark.parametrize("n", LENGTHS)
def test_a_split_covers_is_aligned_and_balanced(n: int, parts: int, align: int) -> None:
    slices = split(n, parts, align)
    assert len(slices) == parts
    assert [0, *(s.stop for s in slices)] == [*(s.start for s in slices), n]
    assert all(s.start % align == 0 or s.start == n for s in slices)
    lengths = [s.stop - s.start for s in slices]
    assert min(lengths) >= 0
    assert max(lengths) - min(lengths) <= align


@pytest.mark.parametrize("size", PARTS)
@pytest.mark.parametrize("largest", [1, 7, 16, 33, 256, 10**6])
@pytest.mark.parametrize("n", [0, 1, 17, 100, 1023, 5000])
def test_shards_cover_the_vector_fit_and_give_owners_equal_shares(n: int, size: int, largest: int) -> None:
    pieces = shards(n, range(size), largest)
    assert [0, *(s.stop for s in pieces)] == [*(s.start for s in pieces), n][: len(pieces) + 1]
    assert sum(s.size for s in pieces) == n
    assert all(0 < s.size <= largest and len(range(n)[s.slice]) == s.size for s in pieces)
    assert [s.owner for s in pieces] == sorted(s.owner for s in pieces)
    held = [sum(s.size for s in pieces if s.owner == rank) for rank in {s.owner for s in pieces}]
    assert max(held, default=0) - min(held, default=0) <= 16


@pytest.mark.parametrize("n_nodes", [1, 2, 16, 1024])
@pytest.mark.parametrize(("n", "n_shards"), [(1, 1), (26_122, 1), (70_000, 2), (1_000_000, 30), (2**24, 512)])
def test_the_vector_decides_how_many_shards_there_are(n: int, n_shards: int, n_nodes: int) -> None:
    """Up to as many ranks as there are; owners are spread over the nodes."""
    nodes = [rank // 2 for rank in range(2 * n_nodes)]
    pieces = shards(n, nodes, 2**17, smallest=2**15)
    n_owners = len({piece.owner for piece in pieces})
    assert n_owners == min(n_shards, len(nodes))
    assert len({nodes[piece.owner] for piece in pieces}) == min(n_owners, n_nodes)
    assert max(piece.size for piece in pieces) - min(piece.size for piece in pieces) <= 16 * 2
    if len(nodes) > n_shards:
        assert len(pieces) == n_shards


@pytest.mark.parametrize("size", PARTS)
@pytest.mark.parametrize("largest", [16, 33, 256, 10**6])
def test_every_rank_starts_with_a_shard_of_its_own(size: int, largest: int) -> None:
    pieces = shards(5000, range(size), largest)
    for rank in range(size):
        assert pieces[visiting_order(len(pieces), rank, size)[0]].owner == rank


@pytest.mark.parametrize("size", PARTS)
@pytest.mark.parametrize("n_shards", [0, 1, 2, 5, 17, 40])
def test_each_rank_visits_every_shard_once_from_a_start_of_its_own(n_shards: int, size: int) -> None:
    orders = [visiting_order(n_shards, rank, size) for rank in range(size)]
    assert all(sorted(order) == list(range(n_shards)) for order in orders)
    assert len({order[0] for order in orders if order}) == min(size, n_shards)


@pytest.mark.parametrize("size", PARTS)
def test_a_tree_reaches_every_rank_once_in_the_fewest_rounds(size: int) -> None:
    for root in range(size):
        tree = [binomial_tree(rank, size, root) for rank in range(size)]
        assert [rank for rank, (parent, _) in enumerate(tree) if parent is None] == [root]
        children = [child for _, below in tree for child in below]
        assert sorted([root, *children]) == list(range(size))
        assert all(tree[child][0] == rank for rank, (_, below) in enumerate(tree) for child in below)

        arrival, frontier = {root: 0}, [root]  # one message a round from each rank that has it
        while frontier:
            rank = frontier.pop()
            for k, child in enumerate(tree[rank][1], start=1):
                arrival[child] = arrival[rank] + k
                frontier.append(child)
        assert max(arrival.values()) == math.ceil(math.log2(size))


@pytest.mark.parametrize("size", PARTS)
def test_the_child_with_the_largest_subtree_comes_first(size: int) -> None:
    def weight(rank: int) -> int:
        return 1 + sum(weight(child) for child in binomial_tree(rank, size, 0)[1])

    for rank in range(size):
        weights = [weight(child) for child in binomial_tree(rank, size, 0)[1]]
        assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("local_size", PARTS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 20])
def test_emulated_nodes_are_contiguous_and_near_equal(local_size: int, n: int) -> None:
    nodes = emulated_nodes(local_size, n)
    assert len(nodes) == local_size
    assert nodes == sorted(nodes)
    assert set(nodes) == set(range(min(n, local_size)))
    counts = [nodes.count(node) for node in set(nodes)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("n", [*PARTS, 49, 96])
def test_cores_are_shared_by_the_ranks_that_may_run_on_them(n: int) -> None:
    everywhere, own = [range(n)] * n, [[core] for core in range(n)]
    assert [share_of_cores(everywhere, rank) for rank in range(n)] == [1.0] * n
    assert [share_of_cores(own, rank) for rank in range(n)] == [1.0] * n
    blocks = [range(8 * rank, 8 * rank + 8) for rank in range(n)]
    assert [share_of_cores(blocks, rank) for rank in range(n)] == [8.0] * n
    crowded = [range(2 * n - 1)] * (2 * n)
    assert all(share_of_cores(crowded, rank) < 1 for rank in range(2 * n))
    assert share_of_cores([range(n), [n - 1]], 0) == n - 0.5


def test_impossible_partitions_are_refused() -> None:
    with pytest.raises(ValueError, match="parts >= 1"):
        split(10, 0)
    with pytest.raises(ValueError, match="at least 1 element"):
        shards(10, [0, 1], 0)
    with pytest.raises(ValueError, match="must both be"):
        binomial_tree(3, 3)
    with pytest.raises(ValueError, match="at least 1"):
        emulated_nodes(0, 1)
