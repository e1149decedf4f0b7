"""Launches that make several worlds of one rank are refused, with the launch that works."""

from __future__ import annotations

import os
import sys

import pytest

from mpitrain.collectives.world import launchers
from mpitrain.errors import UsageError

VARIABLES = (*launchers.MPI_VARIABLES, *launchers.MPIRUN_VARIABLES, *launchers.RANK_VARIABLES)
OTHERS = ("WORLD_SIZE", "LOCAL_RANK", "HOROVOD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID")


@pytest.fixture
def launched(monkeypatch):
    """Return a function that sets the environment of a launch of train.py."""
    for name in (*VARIABLES, *OTHERS, *(name for name in os.environ if name.startswith("ACCELERATE_"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py"])
    monkeypatch.setattr(launchers, "_hidden", {})
    return lambda **environment: [monkeypatch.setenv(*item) for item in environment.items()]


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "none"}
WRONG = {
    "torchrun": (TORCHRUN, "torchrun started 3 processes .* mpirun -n 3 python train.py, or srun"),
    "accelerate": ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch started 3 processes"),
    "RANK and WORLD_SIZE": (
        {"RANK": "0", "WORLD_SIZE": "2"},
        "a launcher of torch.distributed started 2 .* unset RANK",
    ),
    "torchrun in mpirun -n 1": ({**TORCHRUN, "OMPI_COMM_WORLD_SIZE": "1"}, "torchrun started 3 processes"),
    "horovodrun": ({"HOROVOD_SIZE": "4", "HOROVOD_RANK": "0"}, "horovodrun started 4 processes"),
    "srun without --mpi": ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, "srun started 4 tasks.* --mpi=pmix"),
    "a batch script without srun": ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "4 tasks .*srun --mpi=pmix.*python tr"),
    "another MPI": ({"PMI_SIZE": "2"}, "the launcher started 2 ranks, but MPI .x. sees a world of 1"),
}
RIGHT = {
    "no launcher": {},
    "torchrun of one": {"RANK": "0", "WORLD_SIZE": "1"},
    "WORLD_SIZE alone": {"WORLD_SIZE": "4"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_SIZE": "1"},
    "mpirun -n 1 in a job": {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"},
    "srun -n 1": {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "PMI_SIZE": "1"},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_launch_is_refused_with_one_that_works(launched, case):
    environment, words = WRONG[case]
    launched(**environment)
    with pytest.raises(UsageError, match=words):
        launchers.check_world(1, "x")


@pytest.mark.parametrize("case", RIGHT)
def test_a_single_rank_that_is_meant_is_accepted(launched, case):
    launched(**RIGHT[case])
    launchers.check_world(1, "x")


def test_torchrun_is_refused_before_mpi_starts(launched):
    launched(**TORCHRUN)
    with pytest.raises(UsageError, match="torchrun"):
        launchers.check_before_start()


def test_ranks_of_mpi_may_set_the_variables_of_torch_themselves(launched):
    launched(RANK="1", WORLD_SIZE="3", OMPI_COMM_WORLD_SIZE="3")
    launchers.check_before_start()
    launchers.check_world(3, "x")


def test_torchrun_inside_of_ranks_is_refused(launched):
    launched(**{**TORCHRUN, "WORLD_SIZE": "4"}, OMPI_COMM_WORLD_SIZE="2")
    with pytest.raises(UsageError, match=r"started 4 processes .* a world of 2"):
        launchers.check_world(2, "x")


def test_hidden_variables_are_gone_but_known(launched):
    launched(OMPI_COMM_WORLD_SIZE="3", OMPI_COMM_WORLD_RANK="2", PMIX_RANK="2", PMI_SIZE="3", HOME="/home/me")
    launchers.hide_launcher()
    assert not [name for name in os.environ if name.startswith(("OMPI_COMM_", "PMI_", "PMIX_"))]
    assert os.environ["HOME"] == "/home/me"
    assert launchers.launched_rank() == 2
    assert launchers.is_launched()


PMIX = {"PMIX_NAMESPACE": "job", "PMIX_RANK": "0"}
MPIRUN_5 = {**PMIX, "PRTE_LAUNCHED": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_VERSION": "5.0.11"}


@pytest.mark.parametrize(
    ("name", "version", "library", "environ", "words"),
    [
        ("MPICH", "5.0.2", "", PMIX, "MPICH 5.0.2 .* srun --mpi=pmix: use srun --mpi=pmi2"),
        ("MPICH", "5.0.2", "", MPIRUN_5, "by the mpirun of Open MPI: use the mpirun of MPICH"),
        ("MPICH", "5.0.2", "", {**PMIX, "PMI_SIZE": "2"}, "set SLURM_MPI_TYPE=none before mpirun"),
        ("Open MPI", "4.1.4", "", MPIRUN_5, "the mpirun of Open MPI 5.0.11: use the mpirun of Open MPI 4.1.4"),
    ],
    ids=["MPICH under PMIx", "MPICH under Open MPI", "two launchers", "Open MPI 4 under Open MPI 5"],
)
def test_a_library_that_the_launcher_cannot_start_is_refused(name, version, library, environ, words):
    with pytest.raises(UsageError, match=words):
        launchers.check_library(name, version, library, environ)


@pytest.mark.parametrize(
    ("name", "version", "library", "environ"),
    [
        ("MPICH", "4.3.0", "MPICH configure: --with-pmix=/usr", PMIX),
        ("MPICH", "5.0.2", "", {**PMIX, "MPIR_CVAR_PMI_VERSION": "x"}),
        ("MPICH", "5.0.2", "", {"PMI_SIZE": "2"}),
        ("Intel MPI", "2021.1.0", "", PMIX),
        ("Open MPI", "4.1.4", "", PMIX),
        ("Open MPI", "5.0.11", "", MPIRUN_5),
        ("MPICH", "5.0.2", "", {}),
    ],
)
def test_a_library_that_may_start_is_accepted(name, version, library, environ):
    launchers.check_library(name, version, library, environ)
