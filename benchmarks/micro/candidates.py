"""The operations that are measured side by side on vectors of one size.

For each size every rank holds a float32 vector x, and all do the same at once:

    local pass         the fused kernel of the elastic exchange over x and a c of each rank's own: what memory allows
    exchange           the same kernel over x and the shared center, shard by shard under our locks
    Get/Put, Allocate  the same on MPI_Win_allocate: exclusive lock, Get, kernel, Put, unlock, at each rank's share
    Get/Put, Create    the same on MPI_Win_create over memory of the process
    Get/Put, server    the same on MPI_Win_allocate with the whole center at rank 0, as codes with a parameter server
                       have it; the two above are given our sharding, which spreads the load
    all-reduce         ours, in place
    MPI_Allreduce      in place
    gloo               torch.distributed's all-reduce

and when these have given their memory back:

    tree reduce + broadcast  ours: the sum along a binomial tree to rank 0, and back along it
    MPI_Reduce + Bcast       the same by MPI, in place
    gossip                   a step of D-PSGD on a ring: the mean with both neighbours (2 ranks: with the other one), by
                             messages in mailboxes that the neighbours read where they lie
    MPI_Sendrecv + NumPy     the same mean as one writes it without us: two shifts around the ring, then array by array

The c of the local pass lies in the same kind of memory as the center. NumPy's own arrays lie on huge pages, and from
one allocation to the next a pass over two of them takes up to 1.6 times as long: no reference for anything.

All vectors hold zeros, so that no sum overflows however often it is made.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from mpitrain.algorithms.gossip.neighbours import Neighbours
from mpitrain.collectives.mpi import MPICommunicator
from mpitrain.collectives.topology.graphs import topology
from mpitrain.collectives.topology.mixing import mixing_matrix
from mpitrain.collectives.topology.partition import split, visiting_order
from mpitrain.collectives.world.world import World
from mpitrain.kernels import elastic_exchange

RATE = 0.1  # alpha; with zeros any will do

GET_AND_PUT = ("Get/Put, Allocate", "Get/Put, Create", "Get/Put, server")
SERVER = 0  # the rank that has the whole center

REFERENCES = {"exchange": "local pass", **dict.fromkeys(GET_AND_PUT, "exchange")}
REFERENCES |= {"MPI_Allreduce": "all-reduce", "gloo": "all-reduce"}
REFERENCES |= {"MPI_Reduce + Bcast": "tree reduce + broadcast", "MPI_Sendrecv + NumPy": "gossip"}
"""The reference of each operation."""


class Candidates:
    """All operations on vectors of one size. Collective to create and to free.

    Args:
        world: The ranks.
        n: Elements of a vector.
        with_gloo: Whether torch.distributed could be started.
    """

    def __init__(self, world: World, n: int, *, with_gloo: bool) -> None:
        self._comm = MPICommunicator(world)
        self._world = world
        x, center = self._comm.vector(n, np.float32), self._comm.shared_vector(n, np.float32)
        own = self._comm.vector(n, np.float32)
        summed = np.full(n, 0, np.float32)  # full touches the pages
        shares = split(n, world.size)
        mine = shares[world.rank]
        in_turn = [(rank, shares[rank]) for rank in visiting_order(world.size, world.rank, world.size)]
        at_once = [(SERVER, slice(0, n))]
        self._staged = np.full(n, 0, np.float32)
        n_bytes = max(4 * (mine.stop - mine.start), 4)
        allocated = self._allocate(n_bytes)
        self._exposed = np.full(n_bytes, 0, np.uint8)
        created = MPI.Win.Create(self._exposed, 1, comm=world.comm)
        at_server = self._allocate(4 * n if world.rank == SERVER else 0)
        self._windows = [allocated, created, at_server]
        self.operations: dict[str, Callable[[], object]] = {
            "local pass": lambda: elastic_exchange(x.local, own.local, RATE, RATE),
            "exchange": lambda: center.update(lambda part, c: elastic_exchange(x.local[part], c, RATE, RATE)),
            "Get/Put, Allocate": lambda: self._get_and_put(allocated, x.local, in_turn),
            "Get/Put, Create": lambda: self._get_and_put(created, x.local, in_turn),
            "Get/Put, server": lambda: self._get_and_put(at_server, x.local, at_once),
            "all-reduce": lambda: self._comm.allreduce(x),
            "MPI_Allreduce": lambda: world.comm.Allreduce(MPI.IN_PLACE, summed),
        }
        if with_gloo:
            import torch

            tensor = torch.from_numpy(np.full(n, 0, np.float32))
            self.operations["gloo"] = lambda: torch.distributed.all_reduce(tensor)

    def _allocate(self, n_bytes: int) -> MPI.Win:
        window = MPI.Win.Allocate(n_bytes, 1, comm=self._world.comm)
        if n_bytes:
            memory: Any = window.tomemory()
            np.frombuffer(memory, np.uint8)[:] = 0
        return window

    def _get_and_put(self, window: MPI.Win, x: np.ndarray, parts: Sequence[tuple[int, slice]]) -> None:
        """Exchange without shared memory: get, change and put back, one target's part at a time."""
        for target, part in parts:
            c = self._staged[: part.stop - part.start]
            window.Lock(target, MPI.LOCK_EXCLUSIVE)
            window.Get(c, target)
            window.Flush(target)
            elastic_exchange(x[part], c, RATE, RATE)
            window.Put(c, target)
            window.Unlock(target)

    def free(self) -> None:
        """Free the memory. Collective."""
        self.operations.clear()
        for window in self._windows:
            window.Free()
        self._comm.free()


class Forms:
    """Tree and gossip on vectors of one size, beside MPI's. Collective to create, to call and to free.

    Args:
        world: The ranks.
        n: Elements of a vector.

    Attributes:
        operations: By name.
        vectors: (n,) float32, what each operation changes; the gossip's is one that peers could read, as a method's is.
    """

    def __init__(self, world: World, n: int) -> None:
        self._comm = MPICommunicator(world)
        self._mpi = world.comm
        plain = np.full(n, 0, np.float32)  # full touches the pages
        x = self._comm.vector(n, np.float32).local
        ring = topology("ring", world.size)
        self._row = mixing_matrix(ring, weights="metropolis")[world.rank].tolist()
        self._neighbours = Neighbours(self._comm, ring, x)
        self._hops = sorted({1 % world.size, -1 % world.size} - {0})
        self._received = [np.full(n, 0, np.float32) for _ in self._hops]
        self.operations: dict[str, Callable[[], object]] = {
            "tree reduce + broadcast": lambda: self._along_the_tree(plain),
            "MPI_Reduce + Bcast": lambda: self._reduce_and_broadcast(plain),
            "gossip": lambda: self._mix(x),
            "MPI_Sendrecv + NumPy": lambda: self._shift_and_mix(plain),
        }
        self.vectors = dict(zip(self.operations, (plain, plain, x, plain), strict=True))

    def _along_the_tree(self, array: np.ndarray) -> None:
        self._comm.reduce(array)
        self._comm.broadcast(array)

    def _reduce_and_broadcast(self, array: np.ndarray) -> None:
        if self._comm.rank == 0:
            self._mpi.Reduce(MPI.IN_PLACE, array)
        else:
            self._mpi.Reduce(array, None)
        self._mpi.Bcast(array)

    def _mix(self, x: np.ndarray) -> None:
        """Mix as ``algorithms.gossip.dpsgd`` does."""
        self._neighbours.post(x)
        self._neighbours.average(x, self._row[self._comm.rank], self._row)

    def _shift_and_mix(self, x: np.ndarray) -> None:
        rank, size = self._comm.rank, self._comm.size
        for hop, z in zip(self._hops, self._received, strict=True):
            self._mpi.Sendrecv(x, (rank + hop) % size, recvbuf=z, source=(rank - hop) % size)
        for z in self._received:
            x += z
        x *= 1 / (1 + len(self._received))

    def free(self) -> None:
        """Free the memory. Collective."""
        self.operations.clear()
        self._comm.free()


def start_gloo(world: World) -> str | None:
    """Start torch.distributed on the same ranks; return why it failed, else None. Collective."""
    try:
        import torch.distributed

        with socket.socket() as probe:  # a port that is free now
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        port, host = world.comm.bcast((port, "127.0.0.1" if world.n_nodes == 1 else world.hosts[0]))
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://{host}:{port}", rank=world.rank, world_size=world.size
        )
        problem = None
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        problem = str(error).splitlines()[0]
    problems = [theirs for theirs in world.comm.allgather(problem) if theirs]
    return problems[0] if problems else None
