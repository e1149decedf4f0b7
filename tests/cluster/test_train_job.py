"""jobs/train.sbatch on a real SLURM: whatever interrupts a run, its job ends with the run that nothing interrupted.

Every run trains with the synchronous all-reduce on two nodes, so the last parameters must be the same bit for bit. All
jobs are submitted at once and wait for SLURM at the same time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support.cluster import Cluster
from support.cluster_jobs import TrainJob, checkpoints, parameters, wait_until

pytestmark = pytest.mark.cluster

STEPS = 60
LOST = "host4"


def reach_time_limit(cluster: Cluster, job: TrainJob) -> None:
    """Send the signal that SLURM sends ahead of the limit."""
    cluster.check(["scancel", "-b", "-s", "USR1", str(job.number)])


def preempt(cluster: Cluster, job: TrainJob) -> None:
    """Submit a job with a higher priority for a node of this one."""
    cluster.submit("--partition=urgent", "-w", "host3", "--exclusive", "--wrap=true", cwd=cluster.folder)


def lose_a_node(cluster: Cluster, job: TrainJob) -> None:
    """Kill all of a node's processes, SLURM's included."""
    assert LOST in cluster.hosts_of(job.number)
    cluster.kill_host(LOST)


def cancel(cluster: Cluster, job: TrainJob) -> None:
    cluster.check(["scancel", str(job.number)])


# What interrupts a job, and where the job runs: the others must not share the node that is lost or wanted.
INTERRUPTIONS: dict[str, tuple[Callable[[Cluster, TrainJob], None], str]] = {
    "time-limit": (reach_time_limit, "--nodelist=host[1-2]"),
    "preempted": (preempt, "--nodelist=host[2-3]"),
    "lost-node": (lose_a_node, "--exclude=host3"),
    "cancelled": (cancel, "--nodelist=host[1-2]"),
}


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> dict[str, TrainJob]:
    """All jobs by name, interrupted where they are to be."""
    found = {name: TrainJob(cluster, name, STEPS, where) for name, (_, where) in INTERRUPTIONS.items()}
    found["undisturbed"] = TrainJob(cluster, "undisturbed", STEPS, "--nodelist=host[1-2]")
    found["short"] = TrainJob(cluster, "short", STEPS, "--time=3", "--nodelist=host[1-2]", START_SECONDS="90")
    found["wrong-type"] = TrainJob(cluster, "wrong-type", STEPS, "--nodelist=host[1-2]", MPI_TYPE="none")
    found["undisturbed"].hurry()
    waiting = dict(INTERRUPTIONS)

    def interrupt_saved() -> bool:
        """Interrupt each job as soon as it has saved a checkpoint; return whether all have been."""
        for name in [name for name in waiting if checkpoints(found[name].run)]:
            interrupt, _ = waiting.pop(name)
            interrupt(cluster, found[name])
        return not waiting

    wait_until(interrupt_saved, text=lambda: "\n".join(found[name].output for name in waiting))
    return found


@pytest.fixture(scope="module")
def expected(jobs: dict[str, TrainJob]) -> np.ndarray:
    """The parameters of the run that nothing interrupts."""
    undisturbed = jobs["undisturbed"]
    assert undisturbed.end().state == "COMPLETED", undisturbed.output
    return parameters(undisturbed.run)


def assert_finished(job: TrainJob, expected: np.ndarray, *, restarts: int) -> None:
    """Assert that a job finishes its run after a number of restarts, with the expected parameters."""
    wait_until(lambda: job.restarts >= restarts, text=lambda: job.output)
    job.hurry()
    ended = job.end()
    assert (ended.state, ended.restarts) == ("COMPLETED", restarts), job.output
    assert (job.run / "result.json").exists()
    assert checkpoints(job.run)[-1] == f"step-{STEPS:08d}"
    np.testing.assert_array_equal(parameters(job.run), expected)


def test_a_time_limit_that_leaves_no_time_is_refused(jobs: dict[str, TrainJob]) -> None:
    job = jobs["short"]
    ended = job.end()
    assert (ended.state, ended.facts["ExitCode"], ended.restarts) == ("FAILED", "2:0", 0)
    assert "set --time to 4 minutes or more" in job.output
    assert not job.run.exists()


def test_a_wrong_mpi_type_ends_before_training(jobs: dict[str, TrainJob]) -> None:
    job = jobs["wrong-type"]
    assert job.end().state == "FAILED"
    assert "srun --mpi=none does not make one world of 2 ranks: set MPI_TYPE" in job.output
    assert not job.run.exists()


def test_the_time_limit_saves_requeues_and_resumes(jobs: dict[str, TrainJob], expected: np.ndarray) -> None:
    assert_finished(jobs["time-limit"], expected, restarts=1)


def test_preemption_saves_requeues_and_resumes(jobs: dict[str, TrainJob], expected: np.ndarray) -> None:
    assert_finished(jobs["preempted"], expected, restarts=1)


def test_a_cancelled_run_is_saved_and_continues_when_it_is_submitted_again(
    cluster: Cluster, jobs: dict[str, TrainJob], expected: np.ndarray
) -> None:
    job = jobs["cancelled"]
    assert job.end().state == "CANCELLED"
    wait_until(lambda: not cluster.is_completing(job.number), text=lambda: job.output)
    assert "step-00000005" < checkpoints(job.run)[-1] < f"step-{STEPS:08d}", job.output
    job.submit()
    assert_finished(job, expected, restarts=0)


def test_a_lost_node_requeues_and_resumes(cluster: Cluster, jobs: dict[str, TrainJob], expected: np.ndarray) -> None:
    job = jobs["lost-node"]
    assert_finished(job, expected, restarts=1)
    assert LOST not in cluster.hosts_of(job.number)
    cluster.start_slurmd(LOST)
    cluster.wait_until_idle()
