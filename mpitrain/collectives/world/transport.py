"""The transport of vectors in GPU memory to other ranks, chosen from the results of the probe.

    transport     on a node                                     between nodes
    ipc           CUDA IPC: a kernel works on the peer's        as staged; under ``auto``, by MPI if the probe has shown
                  memory in place                               that it transfers device memory correctly
    cuda-aware    MPI moves device memory                       the same
    staged        page-locked host memory, shared by the        page-locked host memory, as vectors of hosts are
                  node, copied in chunks                        exchanged

``auto`` selects the first that works on every rank. IPC is tried at start-up: every rank maps its neighbours' memory
and compares the pattern they have written there. MPI is used on device memory only after ``mpirun -n 2 mpitrain info
--probe`` has shown on every host of the run that it works; the results are stored (``collectives.probe.cache``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpitrain.collectives.probe import cache
from mpitrain.collectives.world.device import gpu_names
from mpitrain.collectives.world.ranks import RankInfo
from mpitrain.errors import UsageError
from mpitrain.kernels import gpu
from mpitrain.kernels.gpu import Gpu

TRANSPORTS = ("auto", "ipc", "cuda-aware", "staged")

OF_WINDOWS = ("window creation", "put", "get", "lock")
"""The operations of a one-sided visit to device memory."""

PATTERN_ELEMENTS = 1024


@dataclass(frozen=True)
class Transport:
    """The chosen transport, the same on all ranks.

    Attributes:
        maps: Whether the ranks of a node read and write each other's device memory in place.
        sums: Whether MPI sums vectors in device memory that is not mapped.
        windows: Whether one-sided operations of MPI access device memory.
        n_nodes: The number of nodes of the world.
        why: The reason for the choice, as text.
    """

    maps: bool
    sums: bool
    windows: bool
    n_nodes: int
    why: str

    def of_part(self, n_nodes: int) -> Transport:
        """Return the transport of a subset of the ranks, which is on ``n_nodes`` nodes."""
        return replace(self, n_nodes=n_nodes, windows=self.windows and (not self.maps or n_nodes > 1))

    @property
    def in_place(self) -> bool:
        """Whether shared vectors, such as the center, are in device memory instead of page-locked host memory."""
        return self.windows or (self.maps and self.n_nodes == 1)

    def describe(self) -> dict[str, str]:
        """Return a description of the ways that vectors on GPUs take."""
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


def choose(ranks: RankInfo, wanted: str, device: Gpu) -> Transport:
    """Choose the transport. Collective.

    Args:
        ranks: The ranks.
        wanted: One of ``TRANSPORTS``.
        device: This rank's GPU.

    Raises:
        UsageError: The wanted transport does not work. All ranks raise it.
    """
    n_nodes = ranks.n_nodes
    if wanted == "staged":
        return Transport(False, False, False, n_nodes, "asked for")
    problem = None if wanted == "cuda-aware" else mapping_problem(ranks, device)
    maps = wanted != "cuda-aware" and problem is None
    if wanted == "ipc" and problem is not None:
        raise UsageError(f"--transport ipc does not work here: {problem}; try --transport staged")
    sums, windows = _proved(ranks.comm)
    if wanted == "cuda-aware" and not sums:
        raise UsageError(
            "--transport cuda-aware: no probe has shown that this MPI sums device memory correctly; run "
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


def mapping_problem(ranks: RankInfo, device: Gpu) -> str | None:
    """Return the reason why the ranks of a node cannot map each other's device memory; None if they can. Collective."""
    problem, opened = "", []
    try:
        mine: Any = device.zeros(PATTERN_ELEMENTS, np.float32)
        gpu.assign(mine, _pattern(ranks.rank))
        handle = device.handle(mine)
        device.synchronize()
    except Exception as error:
        mine, handle, problem = None, b"", f"rank {ranks.rank}: {_first_line(error)}"
    handles: list[bytes] = ranks.node_comm.allgather(handle)
    try:
        for rank, theirs in zip(ranks.node_ranks, handles, strict=True):
            if rank != ranks.rank and theirs and not problem:
                opened.append(device.mapped(theirs, PATTERN_ELEMENTS, np.float32))
                if not np.array_equal(gpu.to_host(opened[-1]), _pattern(rank)):
                    problem = f"rank {ranks.rank} reads wrong bytes in the memory of rank {rank}"
    except Exception as error:
        problem = f"rank {ranks.rank}: {_first_line(error)}"
    ranks.comm.Barrier()
    for array in opened:
        device.unmap(array)
    problems = [text for text in ranks.comm.allgather(problem) if text]  # no rank frees memory that others map
    return problems[0] if problems else None


def _pattern(rank: int) -> np.ndarray:
    return np.arange(PATTERN_ELEMENTS, dtype=np.float32) + 7919 * rank


def _proved(comm: Any) -> tuple[bool, bool]:
    """Return whether MPI sums device memory, and reaches it one-sided, as probed on every host. Collective."""
    known = cache.known(gpu_names())
    here = (
        known is not None and known.proved("all-reduce", "device"),
        known is not None and all(known.proved(operation, "device") for operation in OF_WINDOWS),
    )
    everywhere = comm.allgather(here)
    return all(sums for sums, _ in everywhere), all(windows for _, windows in everywhere)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
