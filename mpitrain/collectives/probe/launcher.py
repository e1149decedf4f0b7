"""The command line and the environment that start two ranks as a separate job, from anywhere.

The two ranks get the environment of this process without the variables of its launcher, so they do not join its world.
Settings by which a user chooses how MPI works (OMPI_MCA_*, UCX_*, LD_LIBRARY_PATH) stay, because they are probed too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Variables that launchers and resource managers set for their ranks. A child that inherits them would join its parent's
# world, or its launcher would start ranks on other hosts.
OF_LAUNCHERS = (
    "OMPI_",
    "PMIX_",
    "PMI_",
    "PRTE_",
    "OPAL_USER_",
    "HYDRA_",
    "HYDI_",
    "MPI_LOCAL",
    "SLURM",
    "PBS_",
    "LSB_",
)
OF_USERS = ("OMPI_MCA_", "PMIX_MCA_", "PMIX_PREFIX", "PRTE_PREFIX")
"""Settings whose names begin like those of launchers."""
PASSED_BY_LAUNCHERS = re.compile(
    "OMPI_MCA_(PREFIXES|cpu_type|initial_wdir|num_procs|orte_.*|ess.*|pmix.*|shmem_RUNTIME_QUERY_hint)"
)
"""Settings that Open MPI's mpirun passes to its ranks."""


def find_launcher() -> str | None:
    """Return the mpirun of this interpreter's environment; if there is none, the mpirun on PATH. Local."""
    folders = (str(Path(sys.executable).parent), None)
    found = (shutil.which(name, path=folder) for folder in folders for name in ("mpirun", "mpiexec"))
    return next(filter(None, found), None)


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without the variables of launchers, and with those that start two ranks on any host. Local.

    The added variables are those of jobs/local.sh: root may start ranks, waiting ranks yield the core, and MPICH's
    launcher Hydra forks instead of using ssh.
    """
    inherited = {name: value for name, value in environ.items() if not _is_of_launcher(name)}
    allowed = [f"{program}_ALLOW_RUN_AS_ROOT{end}" for program in ("OMPI", "PRTE") for end in ("", "_CONFIRM")]
    defaults = {"OMPI_MCA_mpi_yield_when_idle": "1", "HYDRA_LAUNCHER": "fork", "OMP_NUM_THREADS": "1"}
    return defaults | inherited | dict.fromkeys(allowed, "1")


def _is_of_launcher(name: str) -> bool:
    if name.startswith(OF_USERS):
        return PASSED_BY_LAUNCHERS.fullmatch(name) is not None
    return name.startswith(OF_LAUNCHERS)


def launch_command(launcher: str) -> list[str]:
    """Return the command that starts two ranks on any number of cores. Local."""
    done = subprocess.run(
        [launcher, "--version"], capture_output=True, text=True, env=child_environment(os.environ), check=False
    )
    is_open_mpi = re.search("Open MPI|OpenRTE|PRRTE", done.stdout) is not None
    return [launcher, "-n", "2", *(["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"] if is_open_mpi else [])]
