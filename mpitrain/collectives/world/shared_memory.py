"""Memory that the ranks of a node share, and the check that there is enough of it."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np

from mpitrain.errors import UsageError

SHARED_MEMORY = "/dev/shm"


def check_free_memory(n_bytes: int, folder: str = SHARED_MEMORY) -> None:
    """Raise before an allocation that would end in a bus error. Local.

    Shared memory is a file system: a page that does not fit kills the process that touches it. Containers often have
    64 MB of shared memory.

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
    """Raise on all ranks of ``comm`` if one of them lacks ``n_bytes`` of shared memory. Collective.

    Otherwise the others would wait forever for that rank in the allocation.

    Raises:
        UsageError: Some rank has fewer than ``n_bytes`` free.
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
        shape, dtype: Of the array.

    Returns:
        The MPI window that holds the memory, and the array, which freeing the window unmaps.

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
