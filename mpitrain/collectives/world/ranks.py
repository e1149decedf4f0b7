"""The place of this rank among the others: nodes, hosts, cores, and the communicators that follow from them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mpitrain.collectives.topology.partition import emulated_nodes, share_of_cores
from mpitrain.errors import RankFailed, UsageError

EMULATED_NODES = "MPITRAIN_EMULATED_NODES"
"""Environment: treat the ranks of one machine as this many nodes, to run the path between nodes on one machine."""


@dataclass(frozen=True)
class RankInfo:
    """The ranks of a communicator and their nodes, at the time of its creation.

    Attributes:
        comm: mpi4py's communicator of all ranks.
        node_comm: The communicator of the ranks of this node.
        rail_comm: The communicator of the ranks with this local rank, one of each node. It carries one slice of the
            data between nodes. ``MPI.COMM_NULL`` if a node has no rank with this number.
        rank, size: The rank of this process, and the number of ranks.
        local_rank, local_size: The rank of this process within its node, and the number of ranks of the node.
        node, n_nodes: The index of this node, and the number of nodes.
        node_ranks: The ranks of this node, by local rank.
        nodes, hosts: The node and the host name of each rank.
        n_rails: The number of ranks of the smallest node.
        cores: This rank's share of the cores of its machine. It is below 1 if there are more ranks than cores.
    """

    comm: Any
    node_comm: Any
    rail_comm: Any
    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int
    n_nodes: int
    node_ranks: list[int]
    nodes: list[int]
    hosts: list[str]
    n_rails: int
    cores: float

    def part(self, comm: Any, agree: Callable[[bool], bool]) -> RankInfo:
        """Return the ``RankInfo`` of a part of the ranks, with the same nodes. Collective over the part.

        The share of cores does not change, because the other ranks compute, too.

        Args:
            comm: The communicator of the part.
            agree: Returns whether all ranks of the part have passed True, and none has died.

        Raises:
            RankFailed: A rank has died meanwhile.
        """
        from mpi4py import MPI

        node_comm = None
        with suppress(MPI.Exception):
            node_comm = comm.Split(self.node, key=comm.Get_rank())
        # Without a dead rank, the collectives of a node end only if all its living ranks are in them.
        if not agree(node_comm is not None):
            raise RankFailed("a rank died while a part of the ranks was formed")
        try:
            return _gather(comm, node_comm, self.cores)
        except MPI.Exception:
            revoke_all(comm, node_comm)
            raise


def revoke_all(*comms: Any) -> None:
    """End all operations on these communicators with an error, also those that other ranks are in. Local."""
    from mpi4py import MPI

    for comm in comms:
        if comm is not None and comm != MPI.COMM_NULL:
            with suppress(NotImplementedError):  # this MPI ends all ranks after a death
                comm.Revoke()


def find_ranks(comm: Any) -> RankInfo:
    """Find the nodes of all ranks by ``Split_type``. Collective.

    Args:
        comm: The ranks.

    Raises:
        UsageError: ``MPITRAIN_EMULATED_NODES`` is not a number of nodes.
    """
    n_emulated = _n_emulated_nodes()
    node_comm, cores = _split_nodes(comm, n_emulated)
    return _gather(comm, node_comm, cores)


def _n_emulated_nodes() -> int:
    text = os.environ.get(EMULATED_NODES, "1")
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"{EMULATED_NODES} must be a whole number of nodes, 1 or more, not {text!r}")
    return int(text)


def _split_nodes(comm: Any, n_emulated: int) -> tuple[Any, float]:
    """Return the communicator of the ranks that share this one's memory, and the share of cores. Collective."""
    from mpi4py import MPI

    machine = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.Get_rank())
    cores = share_of_cores(machine.allgather(os.sched_getaffinity(0)), machine.Get_rank())
    n_emulated = min(n_emulated, machine.Get_size())
    if n_emulated == 1:
        return machine, cores
    colors = emulated_nodes(machine.Get_size(), n_emulated)
    node = machine.Split(colors[machine.Get_rank()], key=comm.Get_rank())
    machine.Free()
    return node, cores


def _gather(comm: Any, node_comm: Any, cores: float) -> RankInfo:
    """Exchange the places of all ranks. Collective."""
    from mpi4py import MPI

    local_rank, local_size = node_comm.Get_rank(), node_comm.Get_size()
    node_ranks = node_comm.allgather(comm.Get_rank())
    first_ranks = sorted(set(comm.allgather(node_ranks[0])))
    node = first_ranks.index(node_ranks[0])
    n_rails = comm.allreduce(local_size, op=MPI.MIN)
    rail = local_rank if local_rank < n_rails else MPI.UNDEFINED
    return RankInfo(
        comm=comm,
        node_comm=node_comm,
        rail_comm=comm.Split(rail, key=node),
        rank=comm.Get_rank(),
        size=comm.Get_size(),
        local_rank=local_rank,
        local_size=local_size,
        node=node,
        n_nodes=len(first_ranks),
        node_ranks=node_ranks,
        nodes=comm.allgather(node),
        hosts=comm.allgather(socket.gethostname()),
        n_rails=n_rails,
        cores=cores,
    )
