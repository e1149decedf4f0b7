"""Communication graphs as pure functions of integers.

Sources: the exponential graphs are those of Assran, Loizou, Ballas, Rabbat, "Stochastic Gradient Push for Distributed
Deep Learning", 2019, https://arxiv.org/abs/1811.10792; a bipartite graph is what keeps AD-PSGD free of deadlock in
Lian, Zhang, Zhang, Liu, "Asynchronous Decentralized Parallel SGD", 2018, https://arxiv.org/abs/1710.06952; the
symmetric exponential graph is that of BlueFog (Ying, Yuan, Chen, Hu, Pan, Yin, 2021, https://arxiv.org/abs/2111.04287).

A topology is a tuple of steps and a step is a tuple of out-neighbours per rank; it repeats after its last step. An edge
i -> j means that the vector of i reaches j: i pushes to j, or j pulls from i. No rank is its own neighbour; the share
that a rank keeps is a matter of the weights (`mixing.py`). Different here: the bipartite exponential graph is defined
for odd sizes too, where one rank pauses per step.

    ring           i <-> i+1                                 exponential            i -> i+1, i+2, i+4, ...
    directed_ring  i -> i+1                                  symmetric_exponential  i <-> i+1, i+4, i+16, ...
    grid, torus    rows x columns, without and with wrap     one_peer_exponential   i -> i+2^k at step k
    hypercube      i <-> i xor 2^k                           two_peer_exponential   i -> i+3^k, i+2*3^k at step k
    star           all ranks <-> center                      bipartite_exponential  odd i <-> one even rank per step
    complete       all pairs                                 erdos_renyi            random pairs
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from types import MappingProxyType

from numpy.random import Generator

from mpitrain.errors import unknown

Step = tuple[tuple[int, ...], ...]  # the out-neighbours of rank 0, of rank 1, ...


@dataclass(frozen=True)
class Topology:
    """A communication graph that repeats after `period` steps.

    Attributes:
        name: The name for which `topology` returns this graph, such as `torus:4x2`.
        size: The number of ranks.
        steps: For each step of a period, the sorted out-neighbours of each rank, without the rank itself.
    """

    name: str
    size: int
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a topology needs at least one rank, not {self.size}")
        if not self.steps:
            raise ValueError(f"topology {self.name} has no steps")
        for step in self.steps:
            if len(step) != self.size:
                raise ValueError(f"topology {self.name} lists {len(step)} ranks in a step, its size is {self.size}")
            for rank, peers in enumerate(step):
                if list(peers) != sorted(set(peers) - {rank}) or any(not 0 <= peer < self.size for peer in peers):
                    raise ValueError(
                        f"topology {self.name}: the out-neighbours {peers} of rank {rank} must be other ranks "
                        f"below {self.size}, sorted and each once"
                    )

    def __repr__(self) -> str:
        return f"Topology({self.name!r}, size={self.size}, digest={self.digest})"

    @property
    def period(self) -> int:
        """The number of steps after which the graph repeats."""
        return len(self.steps)

    def out_neighbours(self, rank: int, step: int = 0) -> tuple[int, ...]:
        """Return the ranks that receive from `rank` at `step`."""
        return self.steps[step % self.period][rank]

    def in_neighbours(self, rank: int, step: int = 0) -> tuple[int, ...]:
        """Return the ranks from which `rank` receives at `step`."""
        return self._reversed_steps[step % self.period][rank]

    @cached_property
    def _reversed_steps(self) -> tuple[Step, ...]:
        return tuple(_reverse(step) for step in self.steps)

    @property
    def is_symmetric(self) -> bool:
        """Whether, at every step, i sends to j if and only if j sends to i."""
        return self.steps == self._reversed_steps

    @cached_property
    def union(self) -> Topology:
        """The static graph of all edges of one period."""
        peers = (set[int]().union(*(step[rank] for step in self.steps)) for rank in range(self.size))
        return Topology(f"{self.name} (union)", self.size, (_sorted(peers),))

    @property
    def is_connected(self) -> bool:
        """Whether the vector of every rank reaches all ranks: the union of all steps is strongly connected."""
        forward = self.union.steps[0]
        return all(len(_reach(step)) == self.size for step in (forward, _reverse(forward)))

    @property
    def is_weakly_connected(self) -> bool:
        """Whether the graph is connected if every edge counts in both directions."""
        forward = self.union.steps[0]
        both = tuple((*there, *back) for there, back in zip(forward, _reverse(forward), strict=True))
        return len(_reach(both)) == self.size

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that identify the edges. Equal graphs have equal digests."""
        return hashlib.sha256(repr((self.size, self.steps)).encode()).hexdigest()[:16]

    def two_colouring(self) -> tuple[int, ...] | None:
        """Return a colour, 0 or 1, for each rank, so that no edge joins equal colours; None if this is impossible."""
        union = self.union
        colours: list[int | None] = [None] * self.size
        for start in range(self.size):
            if colours[start] is not None:
                continue
            colours[start], frontier = 0, [start]
            while frontier:
                i = frontier.pop()
                for j in union.out_neighbours(i) + union.in_neighbours(i):
                    if colours[j] is None:
                        colours[j] = 1 - (colours[i] or 0)
                        frontier.append(j)
                    elif colours[j] == colours[i]:
                        return None
        return tuple(colour or 0 for colour in colours)


def _sorted(peers_of_ranks: Iterable[Iterable[int]]) -> Step:
    return tuple(tuple(sorted(set(peers) - {rank})) for rank, peers in enumerate(peers_of_ranks))


def _reverse(step: Step) -> Step:
    senders: list[list[int]] = [[] for _ in step]
    for i, peers in enumerate(step):
        for j in peers:
            senders[j].append(i)
    return tuple(tuple(ranks) for ranks in senders)


def _reach(step: Step) -> set[int]:
    seen, frontier = {0}, [0]
    while frontier:
        for j in step[frontier.pop()]:
            if j not in seen:
                seen.add(j)
                frontier.append(j)
    return seen


def _static(name: str, size: int, peers: Callable[[int], Iterable[int]]) -> Topology:
    return Topology(name, size, (_sorted(peers(rank) for rank in range(size)),))


def _doublings(size: int) -> list[int]:
    """Return 1, 2, 4, ... below `size`: K = floor(log2(size - 1)) + 1 hops, none for a single rank."""
    return [2**k for k in range((size - 1).bit_length())]


def ring(size: int) -> Topology:
    """Return the ring: edges between each rank and its two neighbours on a circle."""
    return _static("ring", size, lambda i: ((i - 1) % size, (i + 1) % size))


def directed_ring(size: int) -> Topology:
    """Return the directed ring: i sends to i + 1."""
    return _static("directed_ring", size, lambda i: [(i + 1) % size])


def complete(size: int) -> Topology:
    """Return the complete graph: edges between all pairs of ranks."""
    return _static("complete", size, lambda i: range(size))


def star(size: int, center: int = 0) -> Topology:
    """Return the star: edges between one center and all other ranks."""
    if not 0 <= center < size:
        raise ValueError(f"the center of a star of {size} ranks is one of 0..{size - 1}, not {center}")
    return _static(f"star:{center}", size, lambda i: range(size) if i == center else (center,))


def _rectangle(kind: str, size: int, rows: int | None, columns: int | None) -> Topology:
    if rows is None:
        rows = next(r for r in range(math.isqrt(size), 0, -1) if size % r == 0)
    if columns is None:
        columns = size // rows if rows > 0 else 0
    if rows < 1 or rows * columns != size:
        raise ValueError(
            f"{rows} x {columns} is not {size} ranks; leave the shape out to get the one nearest to a square"
        )

    def peers(i: int) -> Iterable[int]:
        r, c = divmod(i, columns)
        around = ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
        inside = around if kind == "torus" else ((y, x) for y, x in around if 0 <= y < rows and 0 <= x < columns)
        return (y % rows * columns + x % columns for y, x in inside)

    return _static(f"{kind}:{rows}x{columns}", size, peers)


def grid(size: int, rows: int | None = None, columns: int | None = None) -> Topology:
    """Return a rectangular grid without wrap-around. The default shape is as close to a square as possible."""
    return _rectangle("grid", size, rows, columns)


def torus(size: int, rows: int | None = None, columns: int | None = None) -> Topology:
    """Return a rectangular grid with wrap-around. The default shape is as close to a square as possible."""
    return _rectangle("torus", size, rows, columns)


def hypercube(size: int) -> Topology:
    """Return the hypercube: edges between ranks whose numbers differ in one bit; `size` is a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a hypercube needs a power of two, not {size} ranks; `torus` and `exponential` take any size")
    return _static("hypercube", size, lambda i: [i ^ h for h in _doublings(size)])


def exponential(size: int) -> Topology:
    """Return the exponential graph, directed: i sends to i + 1, i + 2, i + 4, ..., all at every step."""
    return _static("exponential", size, lambda i: [(i + h) % size for h in _doublings(size)])


def symmetric_exponential(size: int, base: int = 4) -> Topology:
    """Return the symmetric exponential graph: i exchanges with i +- 1, i +- base, i +- base^2, ..., up to size / 2."""
    if not isinstance(base, int) or base < 2:
        raise ValueError(f"the base of a symmetric exponential graph is a whole number of 2 or more, not {base}")
    hops = list(takewhile(lambda hop: hop <= size // 2, (base**k for k in count())))
    name = "symmetric_exponential" + (f":{base}" if base != 4 else "")
    return _static(name, size, lambda i: [(i + sign * hop) % size for hop in hops for sign in (1, -1)])


def one_peer_exponential(size: int) -> Topology:
    """Return the one-peer exponential graph: at step k, i sends to i + 2^(k mod K), K = floor(log2(size - 1)) + 1."""
    steps = [_sorted([(i + h) % size] for i in range(size)) for h in _doublings(size) or [0]]
    return Topology("one_peer_exponential", size, tuple(steps))


def two_peer_exponential(size: int) -> Topology:
    """Return the two-peer exponential graph, directed: i sends to i + h and i + 2h, h = 1, 3, 9, ... from step to step.

    The steps begin again when h would reach `size`.
    """
    hops = list(takewhile(lambda hop: hop < size, (3**k for k in count()))) or [1]
    steps = tuple(_sorted([(i + hop) % size, (i + 2 * hop) % size] for i in range(size)) for hop in hops)
    return Topology("two_peer_exponential", size, steps)


def bipartite_exponential(size: int) -> Topology:
    """Return the bipartite exponential graph: at each step every odd rank exchanges with one even rank.

    Odd ranks initiate the exchange, and even ranks answer. The a-th odd rank, 2a + 1, is matched with the (a + s)-th
    even rank, where s = 0, 1, 2, 4, ... from step to step. With an even size, the distances are -1, 1, 3, 7, ... With
    an odd size, one even rank pauses at each step.
    """
    n_even, n_odd = size - size // 2, size // 2
    steps = []
    for shift in [0, *_doublings(n_even)]:
        peers: list[list[int]] = [[] for _ in range(size)]
        for a in range(n_odd):
            i, j = 2 * a + 1, 2 * ((a + shift) % n_even)
            peers[i], peers[j] = [j], [i]
        steps.append(_sorted(peers))
    return Topology("bipartite_exponential", size, tuple(steps))


def erdos_renyi(size: int, probability: float = 0.5, seed: int = 0) -> Topology:
    """Return a connected random graph, in which `probability` is that of an edge between two ranks.

    The graph is drawn again until it is connected.
    """
    draw = random.Random(seed)  # the same stream in every version of Python, unlike NumPy's
    for _ in range(100):
        edges = [(i, j) for i in range(size) for j in range(i) if draw.random() < probability]
        peers: list[list[int]] = [[] for _ in range(size)]
        for i, j in edges:
            peers[i].append(j)
            peers[j].append(i)
        topology = _static(f"erdos_renyi:{probability},{seed}", size, peers.__getitem__)
        if topology.is_connected:
            return topology
    raise ValueError(
        f"100 random graphs of {size} ranks with probability {probability} were all disconnected: increase it"
    )


_STATIC = (
    ring, directed_ring, complete, star, grid, torus, hypercube, exponential, symmetric_exponential, erdos_renyi
)  # fmt: skip
_VARYING = (one_peer_exponential, two_peer_exponential, bipartite_exponential)
TOPOLOGIES = MappingProxyType({constructor.__name__: constructor for constructor in (*_STATIC, *_VARYING)})


def topology(spec: str, size: int) -> Topology:
    """Return the topology named `spec`, with options after a colon: `ring`, `torus:4x2`, `erdos_renyi:0.3,7`."""
    name, _, options = spec.strip().partition(":")
    if name not in TOPOLOGIES:
        raise ValueError(unknown("topology", name, TOPOLOGIES))
    try:
        values = [float(word) if "." in word else int(word) for word in options.replace("x", ",").split(",") if word]
    except ValueError:
        raise ValueError(
            f"the options of topology {spec!r} must be numbers, as in torus:4x2 or erdos_renyi:0.3,7"
        ) from None
    constructor: Callable[..., Topology] = TOPOLOGIES[name]
    try:
        return constructor(size, *values)
    except TypeError:
        raise ValueError(f"topology {name} does not take the options {options!r}") from None


def uniform_peer(rng: Generator, rank: int, size: int) -> int:
    """Draw a rank uniformly from all ranks except `rank`."""
    if size < 2:
        raise ValueError("a world of one rank has no peer to draw; skip the exchange when size is 1")
    peer = int(rng.integers(size - 1))
    return peer + (peer >= rank)
