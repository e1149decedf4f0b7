"""Which all-reduce is the fastest between p ranks: a cost model with the constants of a network.

With latency alpha, bandwidth 1/beta, time gamma to add a byte, and an overhead o of this library per message, the
algorithms of ``topology.allreduce_steps`` take for m bytes and p = 2^k ranks

    ring        2*(p - 1)*(alpha + o) + 2*(p - 1)/p*m*beta + (p - 1)/p*m*gamma
    doubling            k*(alpha + o) +           k*m*beta +         k*m*gamma
    halving           2*k*(alpha + o) + 2*(p - 1)/p*m*beta + (p - 1)/p*m*gamma

With other numbers of ranks, ``doubling`` and ``halving`` take two more messages of m bytes.

The fourth candidate is MPI's own all-reduce, which is compiled and needs no o. It is modelled as the faster of
``doubling`` and ``halving``, as in MPICH. MPIs negotiate messages beyond their eager limit, and over TCP Open MPI then
uses one direction at a time: the bandwidth for such messages is a constant of its own.

Source: Thakur, Rabenseifner, Gropp, Optimization of collective communication operations in MPICH, 2005, section 4.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mpitrain.collectives.topology.allreduce_steps import ALGORITHMS, fold

MPI = "mpi"
"""The name of MPI's own all-reduce."""

EAGER_BYTES = 1 << 16
"""Messages that Open MPI and MPICH send without asking over TCP, at most about."""


OF_MPI = ("doubling", "halving")

MARGIN = 1.25
"""How much faster another algorithm must be than MPI's own: on a busy node, Python waits longer for a core."""


@dataclass(frozen=True)
class Link:
    """The constants of the network between two nodes, as one rank of each sees it.

    Attributes:
        latency: alpha, the seconds from sending a short message to its arrival.
        overhead: o, the seconds that this library adds to each message.
        bandwidth: 1/beta, the bytes per second in each direction, of messages in eager pieces sent both ways at once.
        mpi_bandwidth: The same, for long messages in MPI's own all-reduce, which MPI negotiates.
        addition: 1/gamma, the bytes of a vector that are added to another one per second.
    """

    latency: float = 40e-6
    overhead: float = 60e-6
    bandwidth: float = 1.1e9
    mpi_bandwidth: float = 0.6e9
    addition: float = 4e9

    def document(self) -> dict[str, float]:
        """Return the constants in microseconds and megabytes (10^6) per second."""
        times = {f"{name}_us": round(1e6 * getattr(self, name), 1) for name in ("latency", "overhead")}
        rates = ("bandwidth", "mpi_bandwidth", "addition")
        return times | {f"{name}_mb_per_s": round(getattr(self, name) / 1e6, 1) for name in rates}


def seconds(algorithm: str, n_bytes: float, size: int, link: Link) -> float:
    """Return the time of an all-reduce of ``n_bytes`` between ``size`` ranks.

    Args:
        algorithm: One of ``ALGORITHMS``, or ``MPI``.
        n_bytes: The size of the vector.
        size: The number of ranks, each on a node of its own.
        link: The constants of the network.
    """
    if algorithm != MPI:
        return _seconds(algorithm, n_bytes, size, link.latency + link.overhead, link.bandwidth, link.addition)
    return min(
        _seconds(
            name,
            n_bytes,
            size,
            link.latency,
            link.bandwidth if _longest_message(name, n_bytes, size) <= EAGER_BYTES else link.mpi_bandwidth,
            link.addition,
        )
        for name in OF_MPI
    )


@functools.lru_cache(maxsize=1024)
def choose(n_bytes: float, size: int, link: Link) -> str:
    """Return the fastest of ``ALGORITHMS``, or ``MPI`` unless that is slower by ``MARGIN``."""
    fastest = min(ALGORITHMS, key=lambda algorithm: seconds(algorithm, n_bytes, size, link))
    own = seconds(MPI, n_bytes, size, link)
    return fastest if MARGIN * seconds(fastest, n_bytes, size, link) < own else MPI


def n_messages(algorithm: str, size: int) -> int:
    """Return the number of steps, one after the other, of one of ``ALGORITHMS``."""
    core, rest = fold(size)
    k, around = core.bit_length() - 1, 2 * (rest > 0)
    return {"ring": 2 * (size - 1), "doubling": k + around, "halving": 2 * k + around}[algorithm]


def bytes_of_steps(algorithm: str, n_bytes: float, size: int) -> float:
    """Return the bytes that cross a link in all steps of one of ``ALGORITHMS``, one after the other."""
    core, rest = fold(size)
    around = 2 * n_bytes * (rest > 0)
    return {
        "ring": 2 * n_bytes * (size - 1) / size,
        "doubling": n_bytes * (core.bit_length() - 1) + around,
        "halving": 2 * n_bytes * (core - 1) / core + around,
    }[algorithm]


def _seconds(algorithm: str, n_bytes: float, size: int, latency: float, bandwidth: float, addition: float) -> float:
    core, rest = fold(size)
    added = {
        "ring": n_bytes * (size - 1) / size,
        "doubling": n_bytes * (core.bit_length() - 1 + (rest > 0)),
        "halving": n_bytes * ((core - 1) / core + (rest > 0)),
    }[algorithm]
    sent = bytes_of_steps(algorithm, n_bytes, size)
    return n_messages(algorithm, size) * latency + sent / bandwidth + added / addition


def _longest_message(algorithm: str, n_bytes: float, size: int) -> float:
    if algorithm == "ring":
        return n_bytes / size
    return n_bytes / 2 if algorithm == "halving" and fold(size)[1] == 0 else n_bytes
