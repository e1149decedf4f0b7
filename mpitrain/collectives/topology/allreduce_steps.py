"""The messages of all-reduce algorithms between p ranks: integers only, no MPI.

    algorithm    steps of a rank                  elements that a rank sends    elements that a rank adds
    ring         2*(p - 1)                        2*n*(p - 1)/p                 n*(p - 1)/p
    doubling     log2 p                           n*log2 p                      n*log2 p
    halving      2*log2 p                         2*n*(p - 1)/p                 n*(p - 1)/p

``doubling`` is recursive doubling. ``halving`` is Rabenseifner's algorithm: a reduce-scatter that halves the vector in
each step, then an all-gather that doubles the parts again. Both need a power of two. With other numbers of ranks, the
first 2*r ranks work in pairs, where r is p minus the largest power of two: the even rank of a pair sends its vector to
the odd one, waits, and receives the result. This takes two more steps, of n elements each.

Every element is added up in an order that depends only on the ranks, and a sum that two ranks compute has the same two
terms. All ranks therefore get the same bits.

Sources: Thakur, Rabenseifner, Gropp, Optimization of collective communication operations in MPICH, 2005; Patarasuk,
Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.

Deviation: the reduce-scatter exchanges with the nearest rank first. The largest messages then stay between neighbours,
which often share a rack, and the parts of the vector end in bit-reversed order, which no rank notices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mpitrain.collectives.topology.partition import split

NOTHING = slice(0, 0)


@dataclass(frozen=True, slots=True)
class Step:
    """A step of one rank: a message to another rank and a message from another rank, at the same time.

    Attributes:
        target: The rank that receives; None if this rank sends nothing.
        sent: The part of the vector to send.
        source: The rank that sends; None if this rank receives nothing.
        received: The part of the vector that arrives.
        adds: Whether the received part is added to this rank's part. Otherwise it replaces it.
    """

    target: int | None
    sent: slice
    source: int | None
    received: slice
    adds: bool


def ring(rank: int, size: int, n: int) -> Iterator[Step]:
    """Yield the steps of a ring all-reduce of ``n`` elements."""
    parts, target, source = _parts(n, size), (rank + 1) % size, (rank - 1) % size
    for step in range(2 * (size - 1)):
        sent, received = parts[(rank - step) % size], parts[(rank - step - 1) % size]
        yield Step(target, sent, source, received, adds=step < size - 1)


def doubling(rank: int, size: int, n: int) -> Iterator[Step]:
    """Yield the steps of an all-reduce of ``n`` elements by recursive doubling."""
    whole = slice(0, n)

    def among_core(position: int, core: int, rest: int) -> Iterator[Step]:
        for k in range(core.bit_length() - 1):
            partner = core_rank(position ^ (1 << k), rest)
            yield Step(partner, whole, partner, whole, adds=True)

    yield from _folded(rank, size, n, among_core)


def halving(rank: int, size: int, n: int) -> Iterator[Step]:
    """Yield the steps of an all-reduce of ``n`` elements by recursive halving and doubling (Rabenseifner)."""

    def among_core(position: int, core: int, rest: int) -> Iterator[Step]:
        parts, begin, end = _parts(n, core), 0, core
        exchanged = []  # (partner, the parts that it keeps, the parts that this rank keeps)
        for k in range(core.bit_length() - 1):
            partner, middle = core_rank(position ^ (1 << k), rest), (begin + end) // 2
            halves = _span(parts, begin, middle), _span(parts, middle, end)
            theirs, mine = halves if position >> k & 1 else halves[::-1]
            begin, end = (middle, end) if position >> k & 1 else (begin, middle)
            exchanged.append((partner, theirs, mine))
            yield Step(partner, theirs, partner, mine, adds=True)
        for partner, theirs, mine in reversed(exchanged):
            yield Step(partner, mine, partner, theirs, adds=False)

    yield from _folded(rank, size, n, among_core)


ALGORITHMS: dict[str, Callable[[int, int, int], Iterator[Step]]] = {
    "ring": ring,
    "doubling": doubling,
    "halving": halving,
}


def fold(size: int) -> tuple[int, int]:
    """Return the largest power of two up to ``size``, and the number of ranks beyond it."""
    core = 1 << (size.bit_length() - 1)
    return core, size - core


def core_rank(position: int, rest: int) -> int:
    """Return the rank at a position of the core: the odd ranks of the first ``rest`` pairs, then all later ranks."""
    return 2 * position + 1 if position < rest else position + rest


def buffer_size(algorithm: str, size: int, n: int) -> int:
    """Return the number of elements that a rank receives to add at a time, at most."""
    core, rest = fold(size)
    if algorithm == "ring":
        return max(part.stop - part.start for part in _parts(n, size))
    if algorithm == "halving" and rest == 0 and size > 1:
        middle = _parts(n, core)[core // 2].start
        return max(middle, n - middle)
    return n


def _folded(rank: int, size: int, n: int, among_core: Callable[[int, int, int], Iterator[Step]]) -> Iterator[Step]:
    """Yield the steps of a rank, with those before and after the steps ``among_core(position, core, rest)``."""
    core, rest = fold(size)
    whole, partner = slice(0, n), rank ^ 1
    if rank >= 2 * rest:
        yield from among_core(rank - rest, core, rest)
    elif rank % 2:
        yield Step(None, NOTHING, partner, whole, adds=True)
        yield from among_core(rank // 2, core, rest)
        yield Step(partner, whole, None, NOTHING, adds=False)
    else:
        yield Step(partner, whole, None, NOTHING, adds=False)
        yield Step(None, NOTHING, partner, whole, adds=False)


@functools.lru_cache(maxsize=64)
def _parts(n: int, size: int) -> tuple[slice, ...]:
    return tuple(split(n, size))


def _span(parts: tuple[slice, ...], begin: int, end: int) -> slice:
    """Return the slice that the parts ``begin`` to ``end`` cover."""
    return slice(parts[begin].start, parts[end - 1].stop)
