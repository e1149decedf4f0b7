"""The network of a simulated cluster: LogGP messages, shared adapters and uplinks, and the cost of collectives.

A message of m bytes from one node to another arrives

    o + L + max(g, m*G) + o     after it is sent,

with latency L, overhead o of each side's processor, gap g between messages and gap G per byte (1/bandwidth) of an
adapter. The message occupies the sender's and the receiver's adapter, each for max(g, m/bandwidth) seconds. Between
racks it also occupies the uplinks of both racks. It waits while one of these is busy. Ranks of a node send no messages
to each other, but use its memory.

Source: Alexandrov, Ionescu, Schauser, Scheiman, LogGP: incorporating long messages into the LogP model, SPAA 1995.

Deviations: a message occupies its adapters and uplinks as a whole (packets of different messages do not alternate), and
a collective neither waits for other messages nor delays them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpitrain.collectives.topology.allreduce_steps import core_rank, fold

REQUEST_BYTES = 64
"""A request, an acknowledgement: a message without a vector."""

KEPT = 4096
"""Busy intervals that a resource remembers; older ones are over for every worker."""


@dataclass(frozen=True)
class Network:
    """The constants of a cluster. Times are in seconds, bandwidths in bytes per second.

    Attributes:
        latency: L, the latency of a message between nodes.
        overhead: o, the time of a processor to send or receive a message.
        gap: g, the shortest time between two messages of an adapter.
        bandwidth: 1/G, the bandwidth of a node's adapter in each direction.
        node_latency: The latency of an access to a vector in the memory of the node, including its lock.
        node_bandwidth: The bandwidth of a pass over such a vector.
        rack_nodes: The number of consecutive nodes in a rack, which share an uplink to other racks; 0 for a single
            rack.
        uplink: The bandwidth of this uplink in each direction.
        service: The time that a request for a shard takes on the processor of the rank whose memory holds the shard.
        service_bandwidth: The bandwidth at which this processor sends and stores data.
        request_bytes: The size of a message without a vector.
    """

    latency: float = 0.0
    overhead: float = 0.0
    gap: float = 0.0
    bandwidth: float = math.inf
    node_latency: float = 0.0
    node_bandwidth: float = math.inf
    rack_nodes: int = 0
    uplink: float = math.inf
    service: float = 0.0
    service_bandwidth: float = math.inf
    request_bytes: float = REQUEST_BYTES

    def message(self, n_bytes: float, bandwidth: float | None = None) -> float:
        """Return the seconds from sending a message to its arrival on an idle network.

        Args:
            n_bytes: The size of the message.
            bandwidth: The bandwidth of the slowest link on the way; by default that of an adapter.
        """
        slowest = self.bandwidth if bandwidth is None else min(self.bandwidth, bandwidth)
        return self.latency + 2 * self.overhead + max(self.gap, n_bytes / slowest)

    def service_time(self, n_bytes: float) -> float:
        """Return the time that a request with as many bytes of data takes on the processor that serves it."""
        return self.service + n_bytes / self.service_bandwidth

    def rack(self, node: int) -> int:
        """Return the rack of a node."""
        return node // self.rack_nodes if self.rack_nodes else 0

    def allreduce(self, n_bytes: float, nodes: Sequence[int]) -> float:
        """Return the seconds that an all-reduce takes once all ranks have arrived.

        The ranks of a node add their vectors in its memory. Between n = 2^k nodes, the fastest of three algorithms is
        used (``collectives.topology.allreduce_steps``):

            ring                   2*(n - 1)*(L + 2*o + max(g, m/n*G))
            recursive doubling             k*(L + 2*o + max(g, m*G))
            halving, doubling      2*sum over i = 1..k of (L + 2*o + max(g, m/2^i*G))

        With other numbers of nodes, the last two take two more messages of m bytes. If messages cross racks, 1/G is the
        part of the uplink's bandwidth that is left to each of them.

        Args:
            n_bytes: The size m of the vector.
            nodes: (ranks,) the node of each rank.
        """
        distinct, inside = self._inside(n_bytes, nodes)
        algorithms = (self.ring, self.doubling, self.halving)
        return inside + min(algorithm(n_bytes, distinct) for algorithm in algorithms)

    def ring(self, n_bytes: float, nodes: Sequence[int]) -> float:
        """Return the seconds of a ring all-reduce between distinct nodes.

        The nodes of a rack are neighbours in the ring, so that only one message per step leaves a rack.
        """
        n = len(nodes)
        crosses = len({self.rack(node) for node in nodes}) > 1
        return 2 * (n - 1) * self.message(n_bytes / max(n, 1), self.uplink if crosses else None)

    def doubling(self, n_bytes: float, nodes: Sequence[int]) -> float:
        """Return the seconds of an all-reduce between distinct nodes by recursive doubling."""
        return self._folded(n_bytes, nodes, lambda _: n_bytes, 1)

    def halving(self, n_bytes: float, nodes: Sequence[int]) -> float:
        """Return the seconds of an all-reduce between distinct nodes by recursive halving and doubling."""
        return self._folded(n_bytes, nodes, lambda k: n_bytes / 2 ** (k + 1), 2)

    def _folded(
        self, n_bytes: float, nodes: Sequence[int], bytes_of_step: Callable[[int], float], n_times: int
    ) -> float:
        """Return the seconds of steps in which the node at position i of the core exchanges with that at i XOR 2^k.

        Messages that leave a rack share its uplink.
        """
        core, rest = fold(len(nodes))
        at = [core_rank(position, rest) for position in range(core)] if self.rack_nodes else []
        seconds = 0.0
        for k in range(core.bit_length() - 1):
            pairs = [(at[position], at[position ^ (1 << k)]) for position in range(core) if self.rack_nodes]
            seconds += n_times * self._step(bytes_of_step(k), nodes, pairs)
        if rest:
            pairs = [(2 * position, 2 * position + 1) for position in range(rest) if self.rack_nodes]
            seconds += 2 * self._step(n_bytes, nodes, pairs)
        return seconds

    def _step(self, n_bytes: float, nodes: Sequence[int], pairs: Sequence[tuple[int, int]]) -> float:
        """Return the seconds of messages between pairs of positions at the same time."""
        racks = ((self.rack(nodes[one]), self.rack(nodes[other])) for one, other in pairs)
        leaving = Counter(rack for rack, to in racks if rack != to)
        return self.message(n_bytes, self.uplink / max(leaving.values()) if leaving else None)

    def tree(self, n_bytes: float, nodes: Sequence[int]) -> float:
        """Return the seconds of a broadcast or reduction along a binomial tree: ceil(log2 n) messages in sequence."""
        distinct, inside = self._inside(n_bytes, nodes)
        crosses = len({self.rack(node) for node in distinct}) > 1
        return inside + _rounds(len(distinct)) * self.message(n_bytes, self.uplink if crosses else None)

    def gather(self, n_bytes: float, nodes: Sequence[int]) -> float:
        """Return the seconds of an all-gather of ``n_bytes`` per rank. Messages double in size from step to step."""
        distinct, inside = self._inside(n_bytes * len(nodes), nodes)
        per_node = n_bytes * len(nodes) / max(len(distinct), 1)
        return inside + sum(self.message(per_node * 2**k) for k in range(_rounds(len(distinct))))

    def barrier(self, nodes: Sequence[int]) -> float:
        """Return the seconds of a dissemination barrier: ceil(log2 n) messages in sequence."""
        distinct, inside = self._inside(0, nodes)
        return inside + _rounds(len(distinct)) * self.message(0)

    def collective(self, kind: str, n_bytes: float, nodes: Sequence[int]) -> float:
        """Return the seconds of a collective; ``kind`` is that of ``Schedule.all_met``. The result is 0 for set-up."""
        if kind == "set-up" or len(nodes) < 2:
            return 0.0
        if kind == "barrier":
            return self.barrier(nodes)
        costs = {"allreduce": self.allreduce, "tree": self.tree, "gather": self.gather}
        return costs[kind](n_bytes, nodes)

    def _inside(self, n_bytes: float, nodes: Sequence[int]) -> tuple[list[int], float]:
        """Return the distinct nodes in order, and the seconds of one pass of all ranks over their node's vectors."""
        distinct = list(dict.fromkeys(nodes))
        if len(distinct) == len(nodes):
            return distinct, 0.0
        return distinct, self.node_latency + n_bytes / self.node_bandwidth


def _rounds(n: int) -> int:
    """Return ceil(log2 n)."""
    return max(n - 1, 0).bit_length()


class Resource:
    """A resource that serves one user at a time: an adapter, an uplink, a processor, a lock.

    Reservations may be made in any order. Each reservation gets the first free interval that is long enough.
    """

    def __init__(self) -> None:
        self._starts: list[float] = []  # of the busy intervals, ascending and disjoint
        self._ends: list[float] = []

    def reserve(self, earliest: float, seconds: float) -> float:
        """Reserve the resource for ``seconds`` from ``earliest`` on, or as soon as it is free; return the beginning."""
        start, k = earliest, bisect_right(self._ends, earliest)
        while k < len(self._starts) and self._starts[k] < start + seconds:
            start = self._ends[k]
            k += 1
        if seconds > 0:
            self._insert(start, start + seconds)
        return start

    def _insert(self, start: float, end: float) -> None:
        """Add a busy interval, joined with those that it touches."""
        k = bisect_left(self._starts, start)
        if k and self._ends[k - 1] >= start:
            k -= 1
            start = self._starts.pop(k)
            del self._ends[k]
        if k < len(self._starts) and self._starts[k] <= end:
            end = self._ends.pop(k)
            del self._starts[k]
        self._starts.insert(k, start)
        self._ends.insert(k, end)
        if len(self._starts) > KEPT:
            del self._starts[: KEPT // 2], self._ends[: KEPT // 2]


class Fabric:
    """The adapters, uplinks and processors of a cluster, and the messages that occupy them.

    Args:
        network: The constants.
        nodes: (ranks,) the node of each rank.
    """

    def __init__(self, network: Network, nodes: Sequence[int]) -> None:
        self.network, self._nodes = network, nodes
        self._resources: dict[tuple[str, int], Resource] = {}

    def send(self, source: int, target: int, n_bytes: float, at: float) -> tuple[float, float]:
        """Send a message between two ranks.

        Args:
            source, target: The ranks.
            n_bytes: The size of the message.
            at: The time at which the sender begins.

        Returns:
            The time at which the sender's processor and adapter are free again, and the time of arrival.
        """
        network, a, b = self.network, self._nodes[source], self._nodes[target]
        if a == b:
            end = at + network.node_latency + n_bytes / network.node_bandwidth
            return end, end
        way = [(("out", a), network.bandwidth), (("in", b), network.bandwidth)]
        racks = network.rack(a), network.rack(b)
        if racks[0] != racks[1]:
            way[1:1] = [(("up", racks[0]), network.uplink), (("down", racks[1]), network.uplink)]
        start = at + network.overhead
        end = start
        sent = start
        for hop, (key, bandwidth) in enumerate(way):
            seconds = max(network.gap, n_bytes / bandwidth)
            start = self._resource(*key).reserve(start, seconds)
            end = max(end, start + seconds)
            sent = start + seconds if hop == 0 else sent
        return sent, end + network.latency + network.overhead

    def serve(self, rank: int, n_bytes: float, at: float) -> float:
        """Let a rank's processor serve a request that arrives at the time ``at``; return the end of the service."""
        seconds = self.network.service_time(n_bytes)
        return self._resource("processor", rank).reserve(at, seconds) + seconds

    def is_local(self, one: int, other: int) -> bool:
        """Whether two ranks share a node."""
        return self._nodes[one] == self._nodes[other]

    def _resource(self, kind: str, number: int) -> Resource:
        key = kind, number
        if key not in self._resources:
            self._resources[key] = Resource()
        return self._resources[key]
