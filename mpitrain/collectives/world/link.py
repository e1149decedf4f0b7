"""The network between two nodes: its constants for the cost model of all-reduces, measured and stored.

``mpirun -n 2 mpitrain info --probe`` measures them between the first two nodes and stores them in the folder of the
compiled kernels, by MPI and settings, not by host: the nodes of a cluster change from job to job, its network does not.
All ranks use the constants of rank 0. The choice of an algorithm decides in which order a sum is rounded, so the
constants of a run never change. Without a stored result, those of ``Link`` are used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.probe.cache import settings_of
from mpitrain.collectives.topology.allreduce_cost import Link
from mpitrain.collectives.world.background import wait_all
from mpitrain.collectives.world.ranks import EMULATED_NODES
from mpitrain.collectives.world.transfers import pieces
from mpitrain.kernels import cache_root

FORMAT = 1
SHORT_REPEATS, LONG_REPEATS = 200, 8
LONG_BYTES = 4 << 20


def measure(comm: Any, nodes: list[int]) -> Link | None:
    """Measure the link between the first ranks of nodes 0 and 1; None on a single node. Collective.

    It takes tens of milliseconds; the other ranks wait. Each constant is the median of several trials.

    Args:
        comm: The ranks.
        nodes: (ranks,) the node of each rank.
    """
    from mpi4py import MPI

    if max(nodes) == 0:
        return None
    ends, rank = (nodes.index(0), nodes.index(1)), comm.Get_rank()
    found = None
    pair = comm.Split(0 if rank in ends else MPI.UNDEFINED, key=rank)
    if rank in ends:
        found = _between(pair)
        pair.Free()
    return Link(**comm.bcast(asdict(found) if rank == ends[0] and found else None, ends[0]))


def _between(pair: Any) -> Link:
    """Measure the link between the two ranks of a communicator. Collective."""
    from mpi4py import MPI

    peer = 1 - pair.Get_rank()
    word, words = np.zeros(1, np.uint8), np.zeros((2, 1), np.uint8)
    there, back = np.zeros(LONG_BYTES, np.uint8), np.zeros(LONG_BYTES, np.uint8)
    a, b = there.view(np.float32), back.view(np.float32)

    def in_pieces(sent: np.ndarray, received: np.ndarray) -> None:
        requests = [pair.Irecv(piece, peer) for piece in pieces(received)]
        wait_all([*requests, *(pair.Isend(piece, peer) for piece in pieces(sent))])

    alone = _median(lambda: pair.Sendrecv(word, peer, recvbuf=words[0], source=peer), SHORT_REPEATS)
    ours = _median(lambda: in_pieces(word, words[0]), SHORT_REPEATS)
    long_in_pieces = _median(lambda: in_pieces(there, back), LONG_REPEATS)
    long_by_mpi = _median(lambda: pair.Allreduce(MPI.IN_PLACE, a), LONG_REPEATS)
    return Link(
        latency=alone,
        overhead=max(ours - alone, 0.0),
        bandwidth=LONG_BYTES / max(long_in_pieces - ours, 1e-9),
        mpi_bandwidth=LONG_BYTES / max(long_by_mpi - alone, 1e-9),
        addition=LONG_BYTES / max(_median(lambda: np.add(a, b, out=a), LONG_REPEATS), 1e-9),
    )


def _median(call: Callable[[], object], n_repeats: int) -> float:
    """Return the median of the seconds of a call. The first call, which may connect the ranks, does not count."""
    seconds = np.empty(n_repeats)
    call()
    for k in range(n_repeats):
        began = time.perf_counter()
        call()
        seconds[k] = time.perf_counter() - began
    return float(np.median(seconds))


def known(comm: Any) -> tuple[Link, str]:
    """Return the constants that this run uses, and where they come from. Collective."""
    link = comm.bcast(_read() if comm.Get_rank() == 0 else None, 0)
    return (Link(), "assumed") if link is None else (link, "stored by mpitrain info --probe")


def store(link: Link) -> None:
    """Store the constants for later runs on this network, unless there is no room. Local."""
    path = _path()
    if path is None:
        return
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_text(json.dumps({"format": FORMAT, **asdict(link)}, indent=1) + "\n")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)


def _read() -> Link | None:
    """Return the stored constants; None if the file is absent, incomplete or of another format."""
    path = _path()
    try:
        document = {} if path is None else json.loads(path.read_text())
        if document.pop("format") != FORMAT:
            return None
        link = Link(**document)
        return link if all(0 <= value < math.inf for value in document.values()) and _can_divide(link) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _can_divide(link: Link) -> bool:
    return min(link.bandwidth, link.mpi_bandwidth, link.addition) > 0


def _path() -> Path | None:
    from mpi4py import MPI

    root = cache_root()
    if root is None:
        return None
    settings = settings_of(os.environ) | {EMULATED_NODES: str(EMULATED_NODES in os.environ)}
    text = json.dumps([FORMAT, MPI.Get_library_version().rstrip("\0\n"), settings], sort_keys=True)
    return root / "link" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
