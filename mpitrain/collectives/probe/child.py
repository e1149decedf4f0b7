"""One of the two ranks that try MPI's operations (``probe.runner`` starts them and reads their files).

    mpirun -n 2 python -m mpitrain.collectives.probe.child FOLDER MEMORY OPERATION [OPERATION ...]

An operation is tried at 8 bytes, at 16 MiB or at both: first once, with a check of its bytes, then repeatedly, to
measure its time. Each rank appends its result to ``FOLDER/rank-R.jsonl``, one line per operation, before any rank
starts the next one. A rank that dies leaves its results so far, and the next operation in the order is the one that
killed it. An exception ends the pair too, because the state of MPI is undefined afterwards.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.probe.trials import LARGE_BYTES, SMALL_BYTES, TRIALS, Operation, Pair
from mpitrain.kernels import gpu

REPEATS = {SMALL_BYTES: 100, LARGE_BYTES: 5}

SEGMENTS = ("dev/shm/mpich_shm_", "dev/shm/sm_segment.")
"""MPICH's and Open MPI's; each world has its own."""

ABANDONED_SECONDS = 120.0
"""A rank that makes no progress for this long ends itself: the process that started it may have been killed."""


def try_operation(pair: Pair, operation: Operation, sizes: Sequence[int]) -> dict[str, Any]:
    """Check and time an operation. Collective.

    Args:
        pair: The two ranks.
        operation: The operation.
        sizes: The sizes of the messages in bytes, in increasing order; one or two.

    Returns:
        A dictionary with ``verdict``. On rank 0, it also has ``latency_us``, from the median time of the smallest
        message, and, if there are two sizes, ``gb_per_s``, from the median time of the largest one.
    """
    right, seconds = True, {}
    for n_bytes in sizes:
        with operation(pair, n_bytes) as trial:
            trial.run()
            pair.comm.Barrier()
            right = trial.is_right() and right
            pair.comm.Barrier()
            times = []
            for _ in range(REPEATS[n_bytes]):
                start = time.perf_counter()
                trial.run()
                times.append((time.perf_counter() - start) / trial.n_transfers)
            pair.comm.Barrier()
        seconds[n_bytes] = float(np.median(times))
    found: dict[str, Any] = {"verdict": "ok" if right else "wrong"}
    if pair.rank == 0:
        found["latency_us"] = seconds[sizes[0]] * 1e6
        if len(sizes) > 1:
            found["gb_per_s"] = sizes[-1] / seconds[sizes[-1]] / 1e9
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the operations named on the command line up to the first exception; return the exit code."""
    folder, memory, *names = sys.argv[1:] if arguments is None else arguments
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # a crash leaves no file
    (Path(folder) / f"{os.getpid()}.pid").touch()
    faulthandler.dump_traceback_later(ABANDONED_SECONDS, exit=True)
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    with (Path(folder) / f"rank-{comm.Get_rank()}.jsonl").open("a", buffering=1) as file:

        def write(**record: Any) -> None:
            file.write(json.dumps(record) + "\n")
            faulthandler.dump_traceback_later(ABANDONED_SECONDS, exit=True)

        if comm.Get_size() != 2:
            write(problem=f"mpirun started 2 ranks, but MPI sees a world of {comm.Get_size()}: they do not match")
            return 1
        try:
            if memory != "host":
                _use_gpu(comm.Get_rank())
        except Exception as error:
            write(problem=_first_line(error))
            os._exit(1)  # the other rank may wait: the launcher ends it
        comm.Barrier()
        write(ready=True, segments=_segments())
        pair = Pair(comm, memory)
        for name in names:
            try:
                comm.Barrier()  # both have written their lines
                write(operation=name, **try_operation(pair, *TRIALS[name]))
            except Exception as error:
                write(operation=name, verdict="error", detail=_first_line(error))
                os._exit(1)
    return 0


def _use_gpu(rank: int) -> None:
    """Use a GPU of this rank's own where there are several. MPI has started before, as in a run."""
    import cupy

    index = rank % cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.Device(index).use()
    gpu.use(index)


def _segments() -> list[str]:
    """Return the files of shared memory by which MPI connects the two ranks. A killed rank leaves them behind."""
    mapped = {line.partition("/")[2] for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted(f"/{path}" for path in mapped if path.startswith(SEGMENTS) and not path.endswith(" (deleted)"))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
