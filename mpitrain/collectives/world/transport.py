"""How vectors in GPU memory reach other ranks: chosen from what was probed, never assumed.

    transport     on a node                                     between nodes
    ipc           CUDA IPC: a kernel works on the peer's        as staged, or by MPI where it was proved to move device
                  memory in place                               memory rightly
    cuda-aware    MPI moves device memory                       the same
    staged        page-locked host memory, shared by the        page-locked host memory, as vectors of hosts are
                  node, copied in chunks                        exchanged

``auto`` takes the first that works on every rank. IPC is tried at once: every rank maps its neighbours' memory and
looks at what they have written there. That an MPI moves device memory is believed only after ``mpirun -n 2 mpitrain
info --probe`` has seen it, on every host of the run; what that found is kept (``collectives.probe.cache``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.errors import UsageError
from mpitrain.kernels import gpu
from mpitrain.kernels.gpu import Gpu

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

TRANSPORTS = ("auto", "ipc", "cuda-aware", "staged")

OF_WINDOWS = ("window creation", "put", "get", "lock")
"""What visits to device memory by one-sided operations are made of."""

PATTERN_ELEMENTS = 1024


@dataclass(frozen=True)
class Transport:
    """What was chosen, alike on all ranks.

    Attributes:
        maps: The ranks of a node read and write each other's device memory in place.
        sums: MPI sums vectors in device memory, where they are not mapped.
        windows: MPI's one-sided operations reach device memory.
        n_nodes: Of the world.
        why: What decided.
    """

    maps: bool
    sums: bool
    windows: bool
    n_nodes: int
    why: str

    def of_part(self, n_nodes: int) -> Transport:
        """That of ranks on ``n_nodes`` nodes: it has windows only where not all of them map the memory."""
        return replace(self, n_nodes=n_nodes, windows=self.windows and (not self.maps or n_nodes > 1))

    @property
    def in_place(self) -> bool:
        """Whether what all ranks change (the center) lies in device memory; else in host memory, page-locked."""
        return self.windows or (self.maps and self.n_nodes == 1)

    def describe(self) -> dict[str, str]:
        """For people."""
        shared = "device memory" if self.in_place else "page-locked host memory, copied in chunks"
        visited = ", in place" if self.in_place and self.maps else ", by one-sided operations" if self.in_place else ""
        summed = "in place, by CUDA IPC" if self.maps else "by MPI" if self.sums else "in page-locked host memory"
        between = (
            "not used" if self.n_nodes == 1 else "by MPI, from device memory" if self.sums else "by way of the host"
        )
        return {
            "vectors on GPUs, shared": shared + visited,
            "vectors on GPUs, summed on a node": summed,
            "vectors on GPUs, summed between nodes": between,
            "vectors on GPUs, why so": self.why,
        }


def choose(world: World, wanted: str, device: Gpu) -> Transport:
    """The transport of a world. Collective.

    Args:
        world: The ranks.
        wanted: One of ``TRANSPORTS``.
        device: This rank's GPU.

    Raises:
        UsageError: What was asked for does not work here, on all ranks alike.
    """
    n_nodes = world.n_nodes
    if wanted == "staged":
        return Transport(False, False, False, n_nodes, "asked for")
    problem = None if wanted == "cuda-aware" else mapping_problem(world, device)
    maps = wanted != "cuda-aware" and problem is None
    if wanted == "ipc" and problem is not None:
        raise UsageError(f"--transport ipc does not work here: {problem}; try --transport staged")
    sums, windows = _proved(world)
    if wanted == "cuda-aware" and not sums:
        raise UsageError(
            "--transport cuda-aware: nothing has shown that this MPI sums device memory rightly; run "
            "mpirun -n 2 mpitrain info --probe on every host, and see docs/cuda-aware-mpi.md"
        )
    if wanted == "ipc":
        sums = windows = False
    why = {
        "ipc": "asked for",
        "cuda-aware": "asked for, and the probe saw it work",
        "auto": "device memory can be mapped" if maps else f"device memory cannot be mapped: {problem}",
    }[wanted]
    return Transport(maps, sums, windows, n_nodes, why).of_part(n_nodes)


def mapping_problem(world: World, device: Gpu) -> str | None:
    """Why the ranks of some node cannot map each other's device memory; None if all can. Collective."""
    problem, opened = "", []
    try:
        mine: Any = device.zeros(PATTERN_ELEMENTS, np.float32)
        gpu.assign(mine, _pattern(world.rank))
        handle = device.handle(mine)
        device.synchronize()
    except Exception as error:
        mine, handle, problem = None, b"", f"rank {world.rank}: {_first_line(error)}"
    handles: list[bytes] = world.node_comm.allgather(handle)
    try:
        for rank, theirs in zip(world.node_ranks, handles, strict=True):
            if rank != world.rank and theirs and not problem:
                opened.append(device.mapped(theirs, PATTERN_ELEMENTS, np.float32))
                if not np.array_equal(gpu.to_host(opened[-1]), _pattern(rank)):
                    problem = f"rank {world.rank} reads wrong bytes in the memory of rank {rank}"
    except Exception as error:
        problem = f"rank {world.rank}: {_first_line(error)}"
    world.comm.Barrier()
    for array in opened:
        device.unmap(array)
    problems = [text for text in world.comm.allgather(problem) if text]  # and nobody frees what others have mapped
    return problems[0] if problems else None


def _pattern(rank: int) -> np.ndarray:
    return np.arange(PATTERN_ELEMENTS, dtype=np.float32) + 7919 * rank


def _proved(world: World) -> tuple[bool, bool]:
    """Whether every host has seen MPI sum device memory, and reach it by one-sided operations. Collective."""
    from mpitrain.collectives.probe import cache

    known = cache.known()
    here = (
        known is not None and known.proved("all-reduce", "device"),
        known is not None and all(known.proved(operation, "device") for operation in OF_WINDOWS),
    )
    everywhere = world.comm.allgather(here)
    return all(sums for sums, _ in everywhere), all(windows for _, windows in everywhere)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
