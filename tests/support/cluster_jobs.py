"""The jobs that tests submit to a cluster, and their run folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from support.cluster import Cluster, Job
from support.launching import ROOT
from support.lone_world import LoneWorld

JOBS = ROOT / "jobs"


def wait_until(condition: Callable[[], object], seconds: float = 300.0, text: Callable[[], str] = str) -> None:
    """Wait until a condition holds.

    Args:
        condition: A function without arguments.
        seconds: The longest time to wait.
        text: A description for the failure.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not after {seconds:g} s: {text()}")
        time.sleep(0.05)


def checkpoints(run: Path) -> list[str]:
    """Return the names of a run's checkpoints, the newest last."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def parameters(run: Path, n_ranks: int = 2) -> np.ndarray:
    """Return the parameters of rank 0 in the last checkpoint of a run."""
    from mpitrain.records import checkpoint

    state = checkpoint.load(run / "checkpoints" / checkpoints(run)[-1], LoneWorld(rank=0, size=n_ranks))
    return np.asarray(state["optimizer"]["parameters"])


class Submitted:
    """A submitted job.

    Args:
        cluster: Where it runs.
        script: The name of a file in jobs/.
        options: Options of sbatch.
        arguments: Arguments of the script.
        mpi: Of the environment: openmpi, mpich or debian.
        variables: Further variables of the environment.
    """

    def __init__(
        self,
        cluster: Cluster,
        script: str,
        *options: str,
        arguments: Sequence[str] = (),
        mpi: str = "openmpi",
        **variables: str,
    ) -> None:
        self.cluster = cluster
        self._command = (*options, str(JOBS / script), *arguments)
        self._env = cluster.environment(mpi, PYTHONPATH=str(ROOT / "tests"), JOBS=str(JOBS)) | variables
        self.submit()

    def submit(self) -> None:
        """Submit the job, or submit it again as another job."""
        self.number = self.cluster.submit(*self._command, env=self._env, cwd=self.cluster.folder)

    def end(self, seconds: float = 400.0) -> Job:
        """Wait for the end of the job."""
        return self.cluster.wait_for(self.number, seconds=seconds)

    @property
    def restarts(self) -> int:
        """How often SLURM has started the job again."""
        return self.cluster.job(self.number).restarts

    @property
    def output(self) -> str:
        """All that the job has printed so far."""
        return self.cluster.output(self.number)


class TrainJob(Submitted):
    """A job of train.sbatch on two nodes, with a run folder of its own.

    Its steps are slow until ``hurry`` is called, so that a test has the time to act on the run.

    Args:
        cluster: Where it runs.
        name: Of the job and the folder.
        n_steps: Steps of the run.
        sbatch: Further options of sbatch.
        variables: As of Submitted.
    """

    def __init__(self, cluster: Cluster, name: str, n_steps: int, *sbatch: str, **variables: str) -> None:
        self.run = cluster.folder / name
        self._slow = cluster.folder / f"{name}.slow"
        self._slow.touch()
        training = f"--algorithm allreduce --data digits --model support.slow_model:slow_mlp --steps {n_steps}"
        training += " --batch-size 16 --checkpoint-every 5"
        where = ("--job-name", name, "--nodes=2", "--ntasks-per-node=1")
        variables = {"RUN": str(self.run), "SLOW_WHILE": str(self._slow), **variables}
        super().__init__(cluster, "train.sbatch", *where, *sbatch, arguments=training.split(), **variables)

    def hurry(self) -> None:
        """Let the run make its steps without pauses from now on."""
        self._slow.unlink()

    def wait_until_saved(self) -> str:
        """Wait until the run has written a checkpoint; return its name."""
        wait_until(lambda: checkpoints(self.run), text=lambda: self.output)
        return checkpoints(self.run)[-1]
