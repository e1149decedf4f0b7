"""The ranks of a run, as everything above sees them: places, device, communicators, collective calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np

from mpitrain.collectives.topology.allreduce_cost import Link
from mpitrain.collectives.world.fault_tolerance import FaultTolerance
from mpitrain.collectives.world.progress import ProgressThread
from mpitrain.collectives.world.ranks import RankInfo, revoke_all
from mpitrain.collectives.world.service import Service
from mpitrain.collectives.world.shared_memory import allocate_shared_array
from mpitrain.collectives.world.transport import Transport
from mpitrain.collectives.world.watchdog import Ranks, Waiting, waiting
from mpitrain.kernels.gpu import Gpu

MESSAGES = "messages, served by the progress thread of the rank that has the vector"
WINDOWS = "RMA window, Get/compute/Put under an owner-aware lock"

ASSUMED = Link()

T = TypeVar("T")


class World:
    """All ranks of a run, or a part of them.

    ``mpitrain.init`` returns the world of all ranks, and ``split`` returns a part.

    Args:
        ranks: The ranks and their nodes.
        fault_tolerance: The communicator of the ranks, with the handling of dead ranks.
        device: ``"cpu"``, or ``"cuda:K"``.
        gpu: The GPU of this rank; None on the host.
        transport: The transport of vectors on GPUs; None on the host.
        wanted_transport: The transport that the user has requested, one of ``TRANSPORTS``.
        progress_thread: The thread that calls MPI while this rank computes; None without one.
        service: The requests to the progress threads of other ranks, with which ranks access vectors of other nodes;
            None without them.
        members: For a part of a world, the rank in the run of each of its ranks.
        link: The constants of the network between nodes, the same on all ranks.

    Attributes:
        ranks: See the argument.
        rank: The rank of this process.
        size: The number of ranks.
        local_rank: The rank of this process within its node.
        local_size: The number of ranks of this node.
        node: The index of this node.
        n_nodes: The number of nodes.
        node_ranks: The ranks of this node, by local rank.
        nodes: The index of the node of each rank.
        hosts: The host name of each rank.
        n_rails: The number of ranks of the smallest node.
        cores: This rank's share of the cores of its machine. It is below 1 if there are more ranks than cores.
        node_comm: The mpi4py communicator of the ranks of this node.
        rail_comm: The mpi4py communicator of the ranks with this local rank, one of each node.
        members: The rank in the run of each of these ranks.
        fault_tolerance: See the argument.
        device: The device for this rank's model: ``"cpu"`` or ``"cuda:K"``.
        gpu: See the argument.
        transport: See the argument.
        wanted_transport: See the argument.
        progress_thread: See the argument.
        link: See the argument.
        service: See the argument. It is None on one node, with ``MPITRAIN_BETWEEN_NODES=windows``, and where MPI lets
            only one thread call it.
    """

    def __init__(
        self,
        ranks: RankInfo,
        fault_tolerance: FaultTolerance,
        *,
        device: str = "cpu",
        gpu: Gpu | None = None,
        transport: Transport | None = None,
        wanted_transport: str = "auto",
        progress_thread: ProgressThread | None = None,
        service: Service | None = None,
        members: Sequence[int] | None = None,
        link: Link = ASSUMED,
    ) -> None:
        self.ranks = ranks
        self.rank, self.size = ranks.rank, ranks.size
        self.local_rank, self.local_size = ranks.local_rank, ranks.local_size
        self.node, self.n_nodes = ranks.node, ranks.n_nodes
        self.node_ranks, self.nodes, self.hosts = ranks.node_ranks, ranks.nodes, ranks.hosts
        self.n_rails, self.cores = ranks.n_rails, ranks.cores
        self.node_comm, self.rail_comm = ranks.node_comm, ranks.rail_comm
        self.members = range(ranks.size) if members is None else members
        self.device, self.gpu, self.link = device, gpu, link
        self.transport, self.wanted_transport = transport, wanted_transport
        self.progress_thread, self.service = progress_thread, service
        self.fault_tolerance = fault_tolerance
        self._probed_comm = fault_tolerance.probed_comm
        self._shared_arrays: list[Any] = []

    @property
    def comm(self) -> Any:
        """The mpi4py communicator of all ranks, or of the survivors after a death."""
        return self.fault_tolerance.comm

    def split(self, color: int) -> World:
        """Return the world of the ranks that pass the same ``color``, in the order of their ranks. Collective."""
        with self.waiting("a split of the ranks"):
            return part_of(self, self.comm.Split(color, key=self.rank))

    def free(self) -> None:
        """Free the communicators of a part of a world. The world of all ranks is never freed. Collective."""
        from mpi4py import MPI

        if not self.is_whole:
            return  # as with windows (``rma.window.Window.free``)
        for comm in (self.rail_comm, self.node_comm, self.comm):
            if comm != MPI.COMM_NULL:
                comm.Free()

    @property
    def survives_failures(self) -> bool:
        """Whether the other ranks continue when a rank dies, and are notified. Local."""
        return self.fault_tolerance.survives_failures

    @property
    def dead(self) -> frozenset[int]:
        """The ranks known to have died (``collectives.world.fault_tolerance``). Local."""
        return self.fault_tolerance.dead

    @property
    def is_whole(self) -> bool:
        """Whether no rank had died at the last ``run_on_survivors`` or ``barrier``; the same on all ranks. Local."""
        return self.fault_tolerance.is_whole

    @property
    def leader(self) -> int:
        """The lowest living rank. Local."""
        dead = self.dead
        return next(rank for rank in range(self.size) if rank not in dead) if dead else 0

    def server_of(self, rank: int) -> int | None:
        """Return the living rank that serves the memory of a rank to other nodes; None if its node is lost. Local.

        It is the rank itself or, after its death, the next living rank of its node.
        """
        dead = self.dead
        if rank not in dead:
            return rank
        ranks = [other for other in range(self.size) if self.nodes[other] == self.nodes[rank]]
        at = ranks.index(rank)
        return next((other for other in (*ranks[at:], *ranks[:at]) if other not in dead), None)

    def require_all(self) -> None:
        """Raise an error if a rank is dead. Local.

        Raises:
            RankFailed: A rank is dead.
        """
        self.fault_tolerance.require_all()

    def translated_errors(self) -> AbstractContextManager[None]:
        """Raise ``RankFailed`` inside the context instead of an MPI error that a dead rank has caused. Local."""
        return self.fault_tolerance.translated_errors()

    def run_on_survivors(self, collective: Callable[[Any], T], what: str = "a collective operation") -> T:
        """Return ``collective(comm)``, called on all survivors. Collective over them.

        Args:
            collective: Called with the communicator of the survivors. Their ranks in this communicator change after a
                death. If a rank dies during the call, all survivors call ``collective`` again.
            what: The name of the operation, for the message of a rank that waits for too long.
        """
        with self.polling(), self.waiting(what):
            return self.fault_tolerance.run_on_survivors(collective)

    def progress(self) -> None:
        """Call MPI, so that it can answer requests of other ranks. Local."""
        self._probed_comm.Iprobe()

    def waiting(self, what: str, ranks: Ranks | None = None) -> Waiting:
        """Return a context manager around a blocking wait. If the wait exceeds the timeout, all ranks end. Local.

        Args:
            what: The name of what is awaited, with an article.
            ranks: A function that returns the awaited ranks, as far as they are known.
        """
        return waiting(what, ranks and (lambda: [self.members[rank] for rank in ranks()]))

    def polling(self) -> AbstractContextManager[None]:
        """Return a context in which the progress thread polls with pauses, because this thread polls, too. Local."""
        return self.progress_thread.polling() if self.progress_thread is not None else nullcontext()

    def barrier(self) -> None:
        """Wait for all survivors. Collective over them."""
        self.run_on_survivors(lambda comm: comm.Barrier(), "a barrier")

    def node_barrier(self) -> None:
        """Wait for all ranks of this node. Collective over them."""
        with self.waiting("a barrier of the node"):
            self.node_comm.Barrier()

    def allgather(self, value: Any) -> list[Any]:
        """Gather a value of each rank on all ranks. Collective; for set-up only, because it pickles the values."""
        with self.waiting("the set-up of shared memory"):
            values: list[Any] = self.comm.allgather(value)
        return values

    def shared_array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Allocate an array of zeros that the ranks of the node share. Collective over them.

        It is never freed.
        """
        with self.waiting("the allocation of shared memory"):
            window, array = allocate_shared_array(self.node_comm, shape, dtype)
        self._shared_arrays.append(window)  # freeing it would unmap the array
        return array

    def describe(self) -> dict[str, Any]:
        """Return the facts about this world that a run stores. Local."""
        from mpi4py import MPI

        vendor, version = MPI.get_vendor()
        between_nodes = MESSAGES if self.service is not None else WINDOWS
        return {
            "ranks": self.size,
            "nodes": self.n_nodes,
            "ranks_of_node": [self.nodes.count(node) for node in range(self.n_nodes)],
            "hosts": sorted(set(self.hosts)),
            "mpi": f"{vendor} {'.'.join(map(str, version))}",
            "mpi_standard": ".".join(map(str, MPI.Get_version())),
            "threads": {MPI.THREAD_MULTIPLE: "multiple", MPI.THREAD_SERIALIZED: "serialized"}.get(
                MPI.Query_thread(), "single"
            ),
            "device": self.device,
            "transport": {
                "on a node": "shared-memory window, read and written in place",
                **({} if self.transport is None else self.transport.describe()),
                "between nodes": "not used" if self.n_nodes == 1 else between_nodes,
            },
            **({"link": self.link.document()} if self.n_nodes > 1 else {}),
            "progress thread": self.progress_thread is not None,
            "a rank that dies": self.fault_tolerance.after_death,
        }

    def abort(self, code: int = 1) -> None:
        """End all ranks now, with this exit code. Local."""
        self.fault_tolerance.abort(code)


def part_of(world: World, comm: Any, *, repeats: bool = True) -> World:
    """Return the world of the ranks of ``comm``, which belongs to it from now on. Collective over them.

    Args:
        world: A world that contains these ranks.
        comm: Their communicator.
        repeats: Whether ``run_on_survivors`` repeats a collective in which a rank has died; otherwise it raises
            ``RankFailed``.
    """
    fault_tolerance = world.fault_tolerance.part(comm, repeats=repeats)
    ranks = world.ranks.part(comm, fault_tolerance.agree)
    members = comm.allgather(world.members[world.rank])
    return World(
        ranks,
        fault_tolerance,
        device=world.device,
        gpu=world.gpu,
        transport=world.transport and world.transport.of_part(ranks.n_nodes),
        progress_thread=world.progress_thread,
        service=world.service.of_part(members) if world.service is not None and ranks.n_nodes > 1 else None,
        members=members,
        link=world.link,
    )


def revoke(part: World) -> None:
    """End all operations on the communicators of these ranks with an error, also those that others are in. Local."""
    revoke_all(part.comm, part.node_comm, part.rail_comm)
