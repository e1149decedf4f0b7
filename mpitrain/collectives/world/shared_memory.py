"""Memory that the ranks of a node share, and the check that there is enough of it."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np

from mpitrain.errors import UsageError

SHARED_MEMORY = "/dev/shm"


def check_free_memory(n_bytes: int, folder: str = SHARED_MEMORY) -> None:
    """Raise an error before an allocation that would cause a bus error. Local.

    Shared memory is a file system. If it is full, a process that touches a new page is killed. Containers often have
    only 64 MB of shared memory.

    Raises:
        UsageError: ``folder`` has fewer than ``n_bytes`` free.
    """
    try:
        status = os.statvfs(folder)
    except OSError:
        return  # no such file system here: nothing to check
    free_bytes = status.f_bavail * status.f_frsize
    if n_bytes > free_bytes:
        raise UsageError(
            f"{n_bytes / 2**20:.0f} MiB of shared memory are needed on {socket.gethostname()}, but {folder} has only "
            f"{free_bytes / 2**20:.0f} MiB free: enlarge it (docker run --shm-size=8g, or mount -o remount,size=8g "
            f"{folder}), or use a smaller model or fewer ranks"
        )


def check_free_memory_on_all(n_bytes: int, comm: Any) -> None:
    """Raise an error on all ranks of ``comm`` if one of them lacks ``n_bytes`` of shared memory. Collective.

    Without this check, the other ranks would wait forever in the allocation.

    Raises:
        UsageError: A rank has fewer than ``n_bytes`` of free shared memory. All ranks raise it.
    """
    text = ""
    try:
        check_free_memory(n_bytes)
    except UsageError as error:
        text = str(error)
    texts = [theirs for theirs in comm.allgather(text) if theirs]
    if texts:
        raise UsageError(texts[0])


def allocate_shared_array(node_comm: Any, shape: tuple[int, ...], dtype: Any) -> tuple[Any, np.ndarray]:
    """Allocate one array of zeros for all ranks of a node. Collective over them.

    Args:
        node_comm: The communicator of these ranks.
        shape, dtype: The shape and the type of the array.

    Returns:
        The MPI window of the memory, and the array. Freeing the window makes the array invalid.

    Raises:
        UsageError: The node has too little shared memory.
    """
    from mpi4py import MPI

    dtype = np.dtype(dtype)
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    check_free_memory_on_all(n_bytes, node_comm)
    window = MPI.Win.Allocate_shared(max(n_bytes, 1) if node_comm.Get_rank() == 0 else 0, 1, comm=node_comm)
    memory: Any = window.Shared_query(0)[0]
    array = np.frombuffer(memory, np.uint8)[:n_bytes].view(dtype).reshape(shape)
    if node_comm.Get_size() == 1:
        array[...] = 0  # reused heap memory; between several ranks it is a new segment of zeros
    return window, array
