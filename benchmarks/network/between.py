"""The measurements between two hosts, on the ranks that hosts.py starts. Rank 0 prints a JSON document.

between.py link WIRE SIZE ...    bandwidth of TCP, the exchange and the all-reduces on vectors of these bytes in a wire
                                 format; the stall
between.py latency               on a link that is slow to answer: round trips of TCP and of the exchange; training
                                 steps with exchanges in the foreground and in the background (overlap.py)
between.py long                  on such a link, or one that is slower still: the exchange of a large vector
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from mpi4py import MPI
from numba import njit

from benchmarks.micro.candidates import RATE, start_gloo
from benchmarks.network import tcp
from mpitrain.cli import info
from mpitrain.collectives.mpi import MPICommunicator
from mpitrain.collectives.world.launch import init
from mpitrain.collectives.world.world import World
from mpitrain.kernels import elastic_exchange
from mpitrain.kernels.native.wire import FLOAT32
from mpitrain.trainer.runfolder import to_json

TCP_SECONDS = 0.7
BYTES_OF_ALL_REPEATS = 2**28
FEWEST_REPEATS, MOST_REPEATS = 4, 20

SMALL = 1000  # elements of a vector whose exchange costs its round trips only
BUSY_SECONDS = 2.0
PAUSE_SECONDS = 2e-3  # between two exchanges with a busy rank, at most
CALL_SECONDS = 0.05  # of the loop that keeps the interpreter lock

ROUND_TRIPS = 20
LARGE, LARGE_WARM_UPS, LARGE_REPEATS = 16_000_000, 5, 11  # elements, and exchanges


class Pair:
    """The first rank of each node, connected by TCP. Collective to create; the other ranks stand by."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ends = world.nodes.index(0), world.nodes.index(1)
        self.first = world.rank == self.ends[0]

    @contextmanager
    def connected(self) -> Iterator[socket.socket | None]:
        """Connect the two ranks; return None on the other ranks. Collective."""
        world = self.world
        listener = socket.create_server(("", 0)) if self.first else None
        port = world.comm.bcast(listener.getsockname()[1] if listener else 0, self.ends[0])
        if world.rank in self.ends:
            with tcp.connect(listener, (world.hosts[self.ends[0]], port)) as connection:
                yield connection
        else:
            yield None
        if listener:
            listener.close()

    def measure(self, call: Callable[[socket.socket, bool], float]) -> list[float]:
        """Call ``call(connection, is_first)`` at both ends and return its results. Collective."""
        with self.connected() as connection:
            result = call(connection, self.first) if connection else 0.0
        results = self.world.comm.allgather(result)
        return [results[rank] for rank in self.ends]


def measure_tcp(world: World) -> dict[str, float]:
    """Measure bytes per second: one way, the other way, and the sum of both at once. Collective."""
    pair = Pair(world)
    there = pair.measure(lambda connection, first: tcp.bandwidth(connection, TCP_SECONDS, sends=first))
    back = pair.measure(lambda connection, first: tcp.bandwidth(connection, TCP_SECONDS, sends=not first))
    both = pair.measure(lambda connection, _: tcp.bandwidth(connection, TCP_SECONDS, sends=True))
    return {"there": there[1], "back": back[0], "both": sum(both)}


def time_of(world: World, operation: Callable[[], object], n_repeats: int) -> np.ndarray:
    """Return the seconds per call of the slowest rank, (n_repeats,). Collective."""
    seconds, slowest = np.empty(n_repeats), np.empty(n_repeats)
    for repeat in range(-1, n_repeats):  # the first warms up
        world.barrier()
        began = time.perf_counter()
        operation()
        seconds[max(repeat, 0)] = time.perf_counter() - began
    world.comm.Allreduce(seconds, slowest, MPI.MAX)
    return slowest


def transfers(world: World, n_bytes: int, wire: str, *, with_gloo: bool) -> list[dict[str, Any]]:
    """Measure each operation on vectors of this size and return the rows. Collective."""
    comm = MPICommunicator(world, wire=wire)
    n = n_bytes // 4
    x, center = comm.vector(n, np.float32), comm.shared_vector(n, np.float32)
    summed = np.zeros(n, np.float32)

    def exchange() -> None:
        center.update(lambda part, c: elastic_exchange(x.local[part], c, RATE, RATE))

    operations: dict[str, Callable[[], object]] = {
        "exchange": exchange,
        "exchange, one rank": lambda: exchange() if world.rank == 0 else None,
        "all-reduce": lambda: comm.allreduce(x),
        "MPI_Allreduce": lambda: world.comm.Allreduce(MPI.IN_PLACE, summed),
    }
    if with_gloo:
        import torch

        tensor = torch.from_numpy(np.zeros(n, np.float32))
        operations["gloo"] = lambda: torch.distributed.all_reduce(tensor)
    rows = []
    n_repeats = min(max(BYTES_OF_ALL_REPEATS // n_bytes, FEWEST_REPEATS), MOST_REPEATS)
    for name, operation in operations.items():
        before = comm.statistics.wire_bytes
        seconds = time_of(world, operation, n_repeats)
        counted = world.comm.allreduce(comm.statistics.wire_bytes - before) // (n_repeats + 1)
        wire_bytes = counted or 2 * n_bytes  # other all-reduces move at least what ours does in float32
        rows.append({"bytes": n_bytes, "operation": name, "median_seconds": float(np.median(seconds))})
        rows[-1] |= {"slowest_seconds": float(seconds.max()), "wire_bytes": wire_bytes, "n_repeats": n_repeats}
    comm.free()
    return rows


@njit(cache=False)
def _add(n: int) -> float:
    total = 0.0
    for k in range(n):
        total += 1.0 / (k + 1.0)
    return total


_add_freely = njit(_add.py_func, nogil=True)


def _until(end: float, work: Callable[[], object]) -> None:
    while time.perf_counter() < end:
        work()


def busy_works() -> dict[str, Callable[[], object]]:
    """Return the compiled functions that keep a rank busy."""
    n = 10_000_000
    _add(10)
    _add_freely(10)
    began = time.perf_counter()
    _add(n)
    n = int(n * CALL_SECONDS / (time.perf_counter() - began))
    a = np.ones((300, 300), np.float32)
    return {
        "compiled loop without the GIL": lambda: _add_freely(n),
        "NumPy, the GIL held at times": lambda: [np.sqrt(a) @ a for _ in range(10)],
        "interpreter, the GIL held": lambda: sum(range(10_000)),
        f"compiled loop, the GIL held {1e3 * CALL_SECONDS:.0f} ms": lambda: _add(n),
    }


def stalls(world: World) -> list[dict[str, Any]]:
    """Measure exchanges of a small vector by rank 0 while a rank of the other node computes. Collective."""
    comm = MPICommunicator(world)
    x, center = np.zeros(SMALL, np.float32), comm.shared_vector(SMALL, np.float32)
    busy, rng = world.nodes.index(1), np.random.default_rng(0)
    rows = []
    for name, work in {"nothing": None, **busy_works()}.items():
        seconds: list[float] = []
        for _ in range(3):
            center.update(lambda part, c: elastic_exchange(x[part], c, RATE, RATE))
        world.barrier()
        end = time.perf_counter() + BUSY_SECONDS
        if world.rank == 0:
            time.sleep(BUSY_SECONDS / 10)  # the other one is at work now
            while time.perf_counter() < end - BUSY_SECONDS / 10:
                began = time.perf_counter()
                center.update(lambda part, c: elastic_exchange(x[part], c, RATE, RATE))
                seconds.append(time.perf_counter() - began)
                time.sleep(rng.uniform(0, PAUSE_SECONDS))
        elif world.rank == busy and work is not None:
            _until(end, work)
        else:
            time.sleep(BUSY_SECONDS)
        world.barrier()
        of_origin = world.comm.bcast(seconds)
        rows.append({"target": name, "n_exchanges": len(of_origin), "median_seconds": float(np.median(of_origin))})
        rows[-1]["longest_seconds"] = max(of_origin)
    comm.free()
    return rows


def latencies(world: World) -> dict[str, Any]:
    """Measure a round trip, and an exchange of a small vector by one rank and by all. Collective."""
    comm = MPICommunicator(world)
    x, center = np.zeros(SMALL, np.float32), comm.shared_vector(SMALL, np.float32)
    seconds_of_round_trip = Pair(world).measure(lambda end, first: tcp.round_trip(end, ROUND_TRIPS, first=first))[0]

    def exchange() -> None:
        center.update(lambda part, c: elastic_exchange(x[part], c, RATE, RATE))

    word = np.zeros(1)
    operations: dict[str, Callable[[], object]] = {
        "exchange, one rank": lambda: exchange() if world.rank == 0 else None,
        "exchange, all ranks": exchange,
        "MPI_Allreduce": lambda: world.comm.Allreduce(MPI.IN_PLACE, word),
    }
    rows = []
    for name, operation in operations.items():
        seconds = time_of(world, operation, ROUND_TRIPS)
        rows.append({"operation": name, "median_seconds": float(np.median(seconds))})
    comm.free()
    return {"round_trip_seconds": seconds_of_round_trip, "operations": rows}


def large_exchange(world: World) -> dict[str, float]:
    """Measure an exchange of a large vector by one rank, and as many bytes there and back by a socket. Collective.

    The two take turns, so that a busy machine slows down both.
    """
    comm = MPICommunicator(world)
    x, center = np.zeros(LARGE, np.float32), comm.shared_vector(LARGE, np.float32)

    def exchange() -> float:
        world.barrier()
        began = time.perf_counter()
        if world.rank == 0:
            center.update(lambda part, c: elastic_exchange(x[part], c, RATE, RATE))
        return time.perf_counter() - began

    for _ in range(LARGE_WARM_UPS):  # the window opens
        before = comm.statistics.wire_bytes
        exchange()
    n_bytes = world.comm.bcast((comm.statistics.wire_bytes - before) // 2)
    pair, seconds, of_socket = Pair(world), [], []
    with pair.connected() as end:
        for _ in range(1 + LARGE_REPEATS):
            seconds.append(exchange())
            world.barrier()
            if end is not None:
                of_socket.append(tcp.visit(end, n_bytes, first=pair.first))
    comm.free()
    by_socket = world.comm.bcast(float(np.median(of_socket[1:])) if of_socket else 0.0, pair.ends[0])
    return {"bytes": 4 * LARGE, "seconds": float(np.median(seconds[1:])), "socket_seconds": by_socket}


def main() -> None:
    """Run the benchmark and return the exit code. Collective."""
    what, *words = sys.argv[1:]
    world = init()
    assert world.n_nodes == 2
    document: dict[str, Any] = {}
    if what == "long":
        document |= {"large": large_exchange(world), "wire": FLOAT32, **info.describe(world)}
    elif what == "latency":
        from benchmarks.training import overlap

        document |= {"latency": latencies(world)}
        document |= {"overlaps": overlap.measure(Pair(world))}
    else:
        no_gloo = start_gloo(world)
        measured, rows = [measure_tcp(world)], []
        wire, *sizes = words
        for size in sizes:
            rows += transfers(world, int(size), wire, with_gloo=not no_gloo)
            measured.append(measure_tcp(world))
        document |= {
            "tcp": measured,
            "wire": wire,
            "transfers": rows,
            "stalls": stalls(world),
            "gloo": no_gloo or "available",
        }
        document |= info.describe(world)
    if world.rank == 0:
        print(to_json(document), flush=True)


if __name__ == "__main__":
    main()
