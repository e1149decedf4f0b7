"""Exit codes, and the one line with which a command fails."""

from __future__ import annotations

import os
import sys
import time

from mpitrain.collectives.world.watchdog import watchdog
from mpitrain.errors import OUTPUT_SECONDS, TURN_SECONDS, printable

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_STOPPED = 3
"""A run that SIGUSR1 has stopped and that --resume continues."""

GRACE_SECONDS = 5.0
"""How long a rank other than 0 holds its message back: if all ranks have the same problem, rank 0 reports it."""

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


def fail(text: str, *, on_all_ranks: bool = False, code: int = EXIT_USAGE) -> int:
    """Report a problem once, and end all ranks; return the exit code.

    Args:
        text: One line.
        on_all_ranks: Whether every rank is sure to find the problem, as with a wrong argument: only rank 0 reports it.
        code: The exit code.
    """
    rank = launched_rank()
    if rank != 0:
        turn = rank * TURN_SECONDS if code == EXIT_FAILURE else 0.0
        time.sleep(GRACE_SECONDS + turn)  # a launcher may end all ranks when the first ends: rank 0 must be heard
        if on_all_ranks:
            return code
    where = f" (rank {rank})" if rank else ""
    print(f"mpitrain: error{where}: {printable(text)}", file=sys.stderr, flush=True)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and mpi.COMM_WORLD.Get_size() > 1:
        watchdog.announce_end_of_all()
        sys.stdout.flush()
        time.sleep(OUTPUT_SECONDS)
        mpi.COMM_WORLD.Abort(code)  # the others may be waiting for this rank
    return code


def launched_rank() -> int:
    """Return the rank of this process as the launcher gives it, before MPI has started."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if os.environ.get(name, "").isdigit()), 0)
