"""The thread level with which MPI is started, and settings of Open MPI that must be made before.

MPI is started with MPI_THREAD_MULTIPLE, so that a thread of each rank serves the other nodes while the rank computes.
Open MPI 4 has no windows over TCP with that level ("OSC pt2pt component does not support MPI_THREAD_MULTIPLE in this
release"). Where its ranks are on several nodes it is started with MPI_THREAD_SERIALIZED: all methods run, but a rank
answers the other nodes only inside its own MPI calls.

Debian and Ubuntu configure Open MPI 4.1 with ``osc = ^ucx,pt2pt``, which leaves no component for windows over TCP;
an environment variable overrides that file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mpitrain.collectives.world.launchers import check_library
from mpitrain.errors import UsageError, unknown
from mpitrain.log import logger

THREAD_LEVEL = "MPI4PY_RC_THREAD_LEVEL"
"""Environment: the thread level; mpi4py's own variable, which overrides the choice made here."""

LEVELS = ("multiple", "serialized", "funneled", "single")

WINDOWS = "OMPI_MCA_osc"


def import_mpi() -> Any:
    """Import mpi4py's module ``MPI``, which starts MPI, and return it. Collective.

    Raises:
        ImportError, RuntimeError: There is no MPI library.
        UsageError: The launcher cannot start this MPI, or the thread level that the environment asks for is invalid.
    """
    import mpi4py

    mpi4py.rc.initialize = False  # the library must be loaded to learn its version
    if mpi4py.rc.finalize is None:
        mpi4py.rc.finalize = True
    from mpi4py import MPI

    if not MPI.Is_initialized():
        name, version = MPI.get_vendor()
        check_library(name, ".".join(map(str, version)), MPI.Get_library_version())
        reason = lowered_level((name, version)) if on_several_nodes(os.environ) else None
        if reason is not None:
            os.environ.setdefault(WINDOWS, "^ucx")
        MPI.Init_thread(getattr(MPI, f"THREAD_{chosen_level(os.environ, mpi4py.rc.thread_level, reason).upper()}"))
        if reason is not None and MPI.COMM_WORLD.Get_rank() == 0:
            logger.warning(reason)
    return MPI


def chosen_level(environ: Mapping[str, str], default: str, reason: str | None) -> str:
    """Return the thread level with which MPI is started. Local.

    Args:
        environ: The environment; it may ask for a level.
        default: The level if it does not.
        reason: Why several threads are impossible; None if they are possible.

    Raises:
        UsageError: The environment asks for a level that does not exist, or that is impossible.
    """
    level = environ.get(THREAD_LEVEL, default)
    if level not in LEVELS:
        raise UsageError(unknown(THREAD_LEVEL, level, LEVELS), on_all_ranks=True)
    if reason is None or level != "multiple":
        return level
    if THREAD_LEVEL in environ:
        raise UsageError(f"unset {THREAD_LEVEL}=multiple: {reason}", on_all_ranks=True)
    return "serialized"


def lowered_level(vendor: tuple[str, tuple[int, int, int]]) -> str | None:
    """Return the reason to start this MPI with MPI_THREAD_SERIALIZED on several nodes; None if there is none. Local.

    Args:
        vendor: The name and the version of the MPI library.
    """
    name, version = vendor
    if name != "Open MPI" or version >= (5, 0, 0):
        return None
    return (
        f"Open MPI {'.'.join(map(str, version))} has no windows between nodes for several threads: it runs with "
        "MPI_THREAD_SERIALIZED, and asynchronous exchanges wait for ranks that compute; Open MPI 5 and MPICH do better"
    )


def on_several_nodes(environ: Mapping[str, str]) -> bool:
    """Return whether the launcher has started ranks on several nodes. Local."""

    def number(name: str) -> int:
        text = environ.get(name, "")
        return int(text) if text.isdigit() else 0

    spans_nodes = number("OMPI_COMM_WORLD_SIZE") > number("OMPI_COMM_WORLD_LOCAL_SIZE") > 0
    return spans_nodes or number("SLURM_STEP_NUM_NODES") > 1
