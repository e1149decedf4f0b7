"""Slices and their owners, visiting orders, trees, emulated nodes, shares of cores: integers only, no MPI.

    n = 100 elements, 3 ranks, shards of at most 32 (aligned to 16)

    |------ rank 0 ------|------ rank 1 ------|--- rank 2 ---|
    |   shard 0   |sh. 1 |   shard 2   |sh. 3 | sh. 4 | sh. 5|     contiguous, each owner the same share
     0            16     32            48     64      80   100

The length of the vector determines the number of shards. A short vector has fewer owners than there are ranks; they are
spread over the nodes. A visit then costs the same number of messages on two nodes as on a thousand.

Rank r starts at its own first shard, or between nodes at that of a later rank, and goes round once, so that the workers
of an exchange follow each other through the vector instead of queueing at the lock of shard 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

ALIGNMENT = 16  # elements: 64 bytes of float32, one cache line


def split(n: int, parts: int, align: int = ALIGNMENT) -> list[slice]:
    """Split 0..n into `parts` contiguous slices that start at multiples of `align`.

    No two lengths differ by more than `align`. If there are fewer than `parts` blocks of `align` elements, some slices
    are empty.
    """
    if n < 0 or parts < 1 or align < 1:
        raise ValueError(
            f"cannot split {n} elements in {parts} parts aligned to {align}: use n >= 0, parts >= 1, align >= 1"
        )
    n_blocks = -(-n // align)
    # Rounding down puts the larger shares last, next to the incomplete block.
    edges = [min(n, align * (n_blocks * part // parts)) for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


@dataclass(frozen=True)
class Shard:
    """A slice of a shared vector with one lock: elements `start` to `stop`, in the memory of rank `owner`."""

    owner: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        """The shard as an index into the whole vector."""
        return slice(self.start, self.stop)


def owners(n_owners: int, nodes: Sequence[int]) -> list[int]:
    """Choose `n_owners` ranks that are spread over the nodes, and return them in ascending order.

    First the first rank of each node is chosen, then the second rank of each node, and so on.

    Args:
        n_owners: The number of owners, at most the number of ranks.
        nodes: (ranks,) the node of each rank.
    """
    seen: Counter[int] = Counter()
    turns = []
    for rank, node in enumerate(nodes):
        turns.append((seen[node], rank))
        seen[node] += 1
    return sorted(rank for _, rank in sorted(turns)[:n_owners])


def shards(
    n: int, nodes: Sequence[int], largest: int, *, smallest: int = ALIGNMENT, align: int = ALIGNMENT
) -> list[Shard]:
    """Return shards of at most `largest` elements, in the order of the vector.

    Each owner holds a contiguous share of the vector, of at least about `smallest` elements. If the vector is long
    enough, all ranks are owners. If there are enough elements, all shares consist of the same number of shards, so that
    `visiting_order` lets each rank start with its own shards. There are no empty shards.

    Args:
        n: The number of elements of the vector.
        nodes: (ranks,) the node of each rank.
        largest: The largest number of elements in a shard.
        smallest: The smallest share, in elements. A vector too short for such shares on all ranks has fewer owners.
            If it exceeds `largest`, `largest` is used instead.
        align: Shards start at multiples of this number if `largest` permits it.
    """
    if largest < 1:
        raise ValueError(f"the largest shard must have at least 1 element, not {largest}")
    align_inside = align if largest >= align else 1
    n_owners = min(max(1, n // min(smallest, largest)), len(nodes))
    shares = split(n, n_owners, align)
    longest = max(share.stop - share.start for share in shares)
    n_blocks = -(-longest // align_inside)
    n_pieces = max(1, -(-n_blocks // (largest // align_inside)))
    return [
        Shard(owner, share.start + piece.start, share.start + piece.stop)
        for owner, share in zip(owners(n_owners, nodes), shares, strict=True)
        for piece in split(share.stop - share.start, n_pieces, align_inside)
        if piece.start < piece.stop
    ]


def visiting_order(n_shards: int, rank: int, size: int) -> list[int]:
    """Return the indices of all shards in cyclic order, from the first shard that this rank visits.

    If there are enough shards, each rank starts with a different one.
    """
    start = rank * n_shards // size
    return [(start + k) % n_shards for k in range(n_shards)]


def binomial_tree(rank: int, size: int, root: int = 0) -> tuple[int | None, tuple[int, ...]]:
    """Return the parent of `rank` (None for the root) and its children, the child with the largest subtree first.

    With relative ranks r = (rank - root) mod size, the parent of r is r without its lowest set bit. If each rank sends
    to its children in this order, a broadcast takes ceil(log2(size)) rounds. A reduction receives in the reverse order.

        size 8, root 0:   0 -> 4 2 1     4 -> 6 5     2 -> 3     6 -> 7
    """
    if not (0 <= rank < size and 0 <= root < size):
        raise ValueError(f"rank {rank} and root {root} must both be in 0..{size - 1}")
    r = (rank - root) % size
    lowest_bit = r & -r if r else 1 << (size - 1).bit_length()
    below = [(r + (1 << k), 1 << k) for k in reversed(range(lowest_bit.bit_length() - 1)) if r + (1 << k) < size]
    # The subtree of a child at distance 2^k has 2^k ranks, or the rest of the ranks; the sort keeps ties in order.
    below.sort(key=lambda child: -min(child[1], size - child[0]))
    parent = ((r & (r - 1)) + root) % size if r else None
    return parent, tuple((child + root) % size for child, _ in below)


def emulated_nodes(local_size: int, n: int) -> list[int]:
    """Return the node of each local rank if one machine emulates `n` nodes, as contiguous groups of ranks.

    The sizes of groups differ by at most one. With fewer ranks than nodes, each rank has its own node.
    """
    if local_size < 1 or n < 1:
        raise ValueError(f"cannot emulate {n} nodes with {local_size} ranks: both must be at least 1")
    n = min(n, local_size)
    return [rank * n // local_size for rank in range(local_size)]


def share_of_cores(affinities: Sequence[Collection[int]], rank: int) -> float:
    """Return how many cores of a machine ``rank`` gets if all ranks that may run on a core share it equally.

    Args:
        affinities: The cores on which each rank of the machine may run.
        rank: One of these ranks.
    """
    n_bound = Counter(core for cores in affinities for core in cores)
    # As fractions: of n ranks on n cores each has one, not a little less.
    return float(sum(Fraction(1, n_bound[core]) for core in affinities[rank]))
