"""Virtual time on a cluster: gradients take cores, exchanges take the network, locks and servers make workers wait.

A worker's clock advances by the time of each gradient and of each operation of an exchange. A visit to a block (a shard
or a mailbox) takes a request, the wait for its lock, and the transfer of the data to the worker and back. A collective
takes the time of its algorithm. The worker with the smallest clock goes first, so that workers occupy links, processors
and cores in the order of virtual time.

A request is served by a thread of the rank whose memory holds the block, and wakes such a thread of the rank that
visits, too. If the workers of a node have all its cores, the time of the service is missing to the next gradient of its
rank; if they share the cores, the service waits for the end of a time slice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from mpitrain.simulation.compute import ComputeTime, Cores
from mpitrain.simulation.network import Fabric, Network
from mpitrain.simulation.schedules import ClockSchedule, Watched

SLICE_SPREAD = 0.5
"""The largest relative deviation of a time slice from the mean."""


class NetworkTime(ClockSchedule):
    """A schedule that runs the worker with the smallest clock, on a cluster with shared links, servers and cores.

    Args:
        compute: The durations of gradients.
        network: The constants of the network.
        nodes: (p,) the node of each worker.
        cores: The number of cores of a node, which its workers share; None if each worker has its own core.
        slice_seconds: The mean time slice of a core with several workers.
        wake_up: The time after a collective until workers that share cores run again.
        sharing: The part s by which gradients take longer on shared cores, because workers that alternate on a core
            empty each other's caches: a gradient takes 1 + s*(w/c - 1) times as long if w workers share c cores.
        starts: (p,) the time at which each worker joins; by default 0.

    Attributes:
        clocks: (p,) the virtual time of each worker, in seconds.
    """

    def __init__(
        self,
        compute: ComputeTime,
        network: Network,
        nodes: Sequence[int],
        *,
        cores: int | None = None,
        slice_seconds: float = 3e-3,
        wake_up: float = 0.0,
        sharing: float = 0.0,
        starts: Sequence[float] | None = None,
    ) -> None:
        super().__init__(np.zeros(len(nodes)) if starts is None else np.array(starts, np.float64))
        self._compute, self._network, self._nodes = compute, network, nodes
        self._fabric = Fabric(network, nodes)
        self._cores, self._n_cores, self._wake_up = _cores(nodes, cores, slice_seconds), cores, wake_up
        self._left: list[float | None] = [None] * len(nodes)  # of the gradient that is being computed
        self._served: list[float] = [0.0] * len(nodes)  # the core time of services since each worker's last gradient
        n_workers = Counter(nodes)
        self._has_idle_cores = [cores is None or n_workers[node] < cores for node in nodes]
        self._slowdown = [1 + sharing * max(n_workers[node] / (cores or math.inf) - 1, 0) for node in nodes]
        self._turns_awaited: list[Watched | None] = [None] * len(nodes)  # for whose service each worker waits
        self._lock_free: dict[Watched, float] = {}
        self._asked: list[Watched | None] = [None] * len(nodes)  # whose lock each worker has asked for
        self._prefetched: list[tuple[Watched, float] | None] = [None] * len(nodes)
        self._is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let operations inside the block take no time, for an evaluation."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def computing(self, rank: int) -> bool:
        """Advance the worker's clock by the time of its gradient, or a part of it; return whether to call again."""
        left, cores = self._left[rank], self._cores[rank]
        if left == 0:
            self._left[rank] = None
            return False
        if left is None:
            left = self._compute.draw(rank) * self._slowdown[rank] + self._served[rank]
            self._served[rank] = 0.0
        if cores is None:
            self._left[rank] = 0.0
            self._set(rank, self.clocks[rank] + left)
        else:
            until, self._left[rank] = cores.run(rank, float(self.clocks[rank]), left)
            self._set(rank, until)
        return True

    def asking(self, rank: int, block: Watched, home: int) -> bool:
        """Advance the worker's clock until its request for a lock is being served; return whether to call again."""
        if self._is_paused:
            return False
        if self._asked[rank] == block:
            needs_turn, self._turns_awaited[rank] = self._turns_awaited[rank] == block, None
            now = float(self.clocks[rank])
            turn = self._turn_at(home, now) if needs_turn else now
            if turn > now:
                self._set(rank, turn)
            return turn > now
        now, prefetched = float(self.clocks[rank]), self._prefetched[rank]
        self._asked[rank], self._prefetched[rank] = block, None
        if not self._fabric.is_local(rank, home):
            self._turns_awaited[rank] = block
            sent = prefetched[1] if prefetched is not None and prefetched[0] == block else now
            self._set(rank, max(now, self._fabric.send(rank, home, self._network.request_bytes, sent)[1]))
        return True

    def visit_begun(self, rank: int, block: Watched, home: int, n_bytes: int, following: Watched | None) -> None:
        """Advance the worker's clock to the time at which the worker has received the lock and data of a block."""
        if self._is_paused:
            return
        self._asked[rank] = None
        fabric, free = self._fabric, max(float(self.clocks[rank]), self._lock_free.get(block, 0.0))
        if fabric.is_local(rank, home):
            self._spend(rank, free + self._network.node_latency)
            return
        _, received = fabric.send(home, rank, n_bytes, self._serve(rank, home, n_bytes, free))
        self._set(rank, received)
        if following is not None:
            self._prefetched[rank] = following, received

    def visit_ended(self, rank: int, block: Watched, home: int, n_bytes: int, *, updated: bool) -> None:
        """Advance the worker's clock by the time to release a block, and note when the lock is free again."""
        if self._is_paused:
            return
        now = float(self.clocks[rank])
        if self._fabric.is_local(rank, home):
            self._spend(rank, now + n_bytes / self._network.node_bandwidth)
            self._lock_free[block] = float(self.clocks[rank])
            return
        n_sent = n_bytes if updated else self._network.request_bytes
        done, arrived = self._fabric.send(rank, home, n_sent, now)
        self._lock_free[block] = self._serve(rank, home, n_sent, self._turn_at(home, arrived))
        self._set(rank, done)

    def peer_read(self, rank: int, peer: int, n_bytes: int) -> None:
        """Advance the worker's clock by the time to read a peer's vector.

        The read needs neither a lock nor the peer's processor.
        """
        if self._is_paused:
            return
        if self._fabric.is_local(rank, peer):
            self._spend(rank, float(self.clocks[rank]) + n_bytes / self._network.node_bandwidth)
            return
        _, arrived = self._fabric.send(rank, peer, self._network.request_bytes, float(self.clocks[rank]))
        self._set(rank, self._fabric.send(peer, rank, n_bytes, arrived)[1])

    def all_met(self, ranks: Sequence[int], kind: str = "set-up", n_bytes: int = 0) -> None:
        """Advance the clocks of the workers to the end of a collective. It begins when the last worker arrives."""
        members = list(ranks)
        cost = self._collective(kind, n_bytes, [self._nodes[rank] for rank in members])
        self.clocks[members] = self.clocks[members].max() + cost
        self._turns.add(members)

    def _collective(self, kind: str, n_bytes: int, nodes: Sequence[int]) -> float:
        """Return the seconds of a collective. Workers that share cores take turns for their pass over memory."""
        if self._n_cores is None or kind == "set-up":
            return self._network.collective(kind, n_bytes, nodes)
        n_turns = math.ceil(max(Counter(nodes).values(), default=0) / self._n_cores)
        if n_turns <= 1:
            return self._network.collective(kind, n_bytes, nodes)
        network = replace(self._network, node_bandwidth=self._network.node_bandwidth / n_turns)
        return network.collective(kind, n_bytes, nodes) + self._wake_up

    def _serve(self, rank: int, home: int, n_bytes: float, at: float) -> float:
        """Let the home of a block serve a request of a worker; return the end of the service."""
        for end in (rank, home):
            if not self._has_idle_cores[end]:
                self._served[end] += self._network.service_time(n_bytes)
        return self._fabric.serve(home, n_bytes, at)

    def _turn_at(self, home: int, at: float) -> float:
        """Return when the thread of a rank that serves a request from the time ``at`` on has a core."""
        cores = self._cores[home]
        return at if cores is None else cores.turn_at(at)

    def _spend(self, rank: int, until: float) -> None:
        """Advance a clock while the worker uses its core."""
        self._set(rank, until)
        cores = self._cores[rank]
        if cores is not None:
            cores.keep(rank, until)

    def _set(self, rank: int, seconds: float) -> None:
        self.clocks[rank] = seconds
        self._turns.add((rank,))


def _cores(nodes: Sequence[int], n_cores: int | None, slice_seconds: float) -> list[Cores | None]:
    """Return the cores of each worker's node; None if each of its workers has a core of its own."""
    made = {
        node: Cores(n_cores, slice_seconds, spread=SLICE_SPREAD, seed=node)
        for node, n_workers in Counter(nodes).items()
        if n_cores is not None and n_workers > n_cores
    }
    return [made.get(node) for node in nodes]
