"""Launchers: the number of processes that they have started, compared with the number of ranks that MPI sees.

A launcher that MPI does not know starts p worlds of one rank, which all train alone and write the same files. Its
variables tell how many processes it has started: torchrun, accelerate and deepspeed set RANK and WORLD_SIZE, SLURM
sets SLURM_NTASKS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpitrain.errors import UsageError

WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
MPI_VARIABLES = (*WORLD_SIZES, "PMIX_RANK")
"""Variables of launchers that MPI understands; srun sets some of them."""

MPIRUN_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
"""Variables of mpirun and mpiexec, which srun does not set."""

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID", "RANK", "HOROVOD_RANK")

HIDDEN_PREFIXES = ("OMPI_COMM_", "PMI_", "PMIX_", "MPI_LOCAL")
"""Variables by which other programs recognise a rank of MPI."""


_hidden: dict[str, str] = {}
"""The variables that ``hide_launcher`` has removed."""


def launched_rank() -> int:
    """Return the rank that the launcher has given to this process. MPI need not be running."""
    return next((n for name in RANK_VARIABLES if (n := _number(name, -1)) >= 0), 0)


def is_launched() -> bool:
    """Return whether a launcher known to an MPI has started this process."""
    return is_set(*MPI_VARIABLES, "SLURM_PROCID")


def is_set(*names: str) -> bool:
    """Return whether the launcher has set one of these variables, even if ``hide_launcher`` has removed it."""
    return any(name in os.environ or name in _hidden for name in names)


def openmpi_starts_other_hosts() -> bool:
    """Return whether Open MPI's launcher has also started ranks on other hosts."""
    return _number("OMPI_COMM_WORLD_SIZE") > _number("OMPI_COMM_WORLD_LOCAL_SIZE")


def hide_launcher() -> None:
    """Remove the launcher's variables from the environment, so that other libraries see a single process. Local.

    MPI needs them only while it starts.
    """
    for name in [name for name in os.environ if name.startswith(HIDDEN_PREFIXES)]:
        _hidden[name] = os.environ.pop(name)


def check_before_start() -> None:
    """Refuse a launch that cannot work, before MPI starts. Local.

    Raises:
        UsageError: The message names a launch command that works.
    """
    import multiprocessing

    if multiprocessing.parent_process() is not None and is_set(*MPIRUN_VARIABLES):
        raise UsageError(
            "mpitrain.init() in a process that a rank started by multiprocessing: this process is no rank; "
            "call init() in the process that mpirun starts"
        )
    if not is_launched():
        check_world_of_one("")


def check_library(name: str, version: str, library: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse an MPI library that does not fit the launcher, since MPI would end the process without explanation. Local.

    Args:
        name, version: The name and the version of the library.
        library: The library's own description, which contains its build options.
        environ: The environment of this process.

    Raises:
        UsageError: The message names a launch command that works.
    """
    has_pmix = "PMIX_NAMESPACE" in environ
    if name == "MPICH" and has_pmix and "pmix" not in library.lower() and "MPIR_CVAR_PMI_VERSION" not in environ:
        if any(variable in environ for variable in ("PMI_SIZE", "PMI_FD")):
            problem = "was started by mpirun and by srun's PMIx at once: set SLURM_MPI_TYPE=none before mpirun"
        elif "OMPI_COMM_WORLD_SIZE" in environ:
            problem = "cannot be started by the mpirun of Open MPI: use the mpirun of MPICH"
        else:
            problem = "cannot be started by srun --mpi=pmix: use srun --mpi=pmi2 (MPI_TYPE=pmi2 in jobs/)"
        raise UsageError(f"MPICH {version} was built without PMIx and {problem}", on_all_ranks=True)
    if name == "Open MPI" and version.startswith("4.") and "PRTE_LAUNCHED" in environ:
        launcher = f"the mpirun of Open MPI {environ.get('OMPI_VERSION', '5')}"
        raise UsageError(
            f"Open MPI {version}, the library of mpi4py, cannot be started by {launcher}: use the mpirun of Open MPI "
            f"{version}, or let MPI4PY_LIBMPI or LD_LIBRARY_PATH name the library of the launcher",
            on_all_ranks=True,
        )


def check_world(size: int, vendor: str) -> None:
    """Refuse a launch if the launcher has started more processes than MPI has ranks. Local.

    Args:
        size: The number of ranks that MPI sees.
        vendor: The name of the MPI.

    Raises:
        UsageError: The message names a launch command that works.
    """
    if size == 1:
        check_world_of_one(vendor)
    elif _number("WORLD_SIZE") > size and "TORCHELASTIC_RUN_ID" in os.environ:
        raise _of_torch(_number("WORLD_SIZE"), size)


def check_world_of_one(vendor: str) -> None:
    """Refuse a world of one rank if a launcher has started more processes. Local.

    Raises:
        UsageError: The message names a launch command that works.
    """
    if is_set("RANK", "LOCAL_RANK") and (n := _number("WORLD_SIZE")) > 1:
        raise _of_torch(n, 1)
    if (n := _torch_distributed_size()) > 1:
        raise UsageError(
            f"torch.distributed has {n} processes, but MPI sees a world of 1: {_instead(n)}", on_all_ranks=True
        )
    if (n := _number("HOROVOD_SIZE")) > 1:
        raise UsageError(f"horovodrun started {n} processes, but MPI sees a world of 1: {_instead(n)}")
    if is_set(*MPIRUN_VARIABLES):
        _check_own_launcher(vendor)
        return
    if (n := _number("SLURM_STEP_NUM_TASKS")) > 1:
        raise UsageError(
            f"srun started {n} tasks, but MPI sees a world of 1: this MPI does not support srun's --mpi type; try srun "
            "--mpi=pmix (Open MPI) or srun --mpi=pmi2 (MPICH); srun --mpi=list shows the types",
            on_all_ranks=True,
        )
    if (n := _number("SLURM_NTASKS")) > 1:
        raise UsageError(
            f"this job has {n} tasks (SLURM_NTASKS), but the script was started once: write srun --mpi=pmix (Open MPI) "
            f"or srun --mpi=pmi2 (MPICH) before {_command()}; for one rank, srun -n 1"
        )
    _check_own_launcher(vendor)


def _check_own_launcher(vendor: str) -> None:
    # Nested launchers leave several sizes, and one of them is this MPI's.
    sizes = [n for name in WORLD_SIZES if (n := _number(name))]
    if sizes and 1 not in sizes:
        raise UsageError(
            f"the launcher started {max(sizes)} ranks, but MPI ({vendor}) sees a world of 1: the launcher "
            "belongs to another MPI; use the mpirun of this Python environment, or that of the loaded MPI module",
            on_all_ranks=True,
        )


def _of_torch(n: int, size: int) -> UsageError:
    name = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "a launcher of torch.distributed"
    if any(variable.startswith("ACCELERATE_") for variable in os.environ):
        name = "accelerate launch"
    return UsageError(
        f"{name} started {n} processes (WORLD_SIZE), but MPI sees a world of {size}: {_instead(n)}; unset RANK, "
        "LOCAL_RANK and WORLD_SIZE if they are left over",
        on_all_ranks=True,
    )


def _instead(n: int) -> str:
    return f"launch with mpirun -n {n} {_command()}, or srun"


def _command() -> str:
    """Return what the user started: ``python train.py``, or ``mpitrain train``."""
    script = Path(sys.argv[0] if sys.argv else "")
    if script.suffix == ".py" and script.name != "__main__.py":
        return f"python {script.name}"
    return "mpitrain train" if script.name in ("mpitrain", "__main__.py") else "python ..."


def _torch_distributed_size() -> int:
    """Return the number of processes of torch.distributed, if the script has started it already; 0 otherwise."""
    module: Any = sys.modules.get("torch.distributed")
    if module is None or not module.is_available() or not module.is_initialized():
        return 0
    return int(module.get_world_size())


def _number(name: str, otherwise: int = 0) -> int:
    text = os.environ.get(name, _hidden.get(name, ""))
    return int(text) if text.isdigit() else otherwise
