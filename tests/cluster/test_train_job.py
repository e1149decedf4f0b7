"""jobs/train.sbatch on a real SLURM: whatever interrupts a run, its job ends with the run that nothing interrupted.

Every run trains with the synchronous all-reduce on two nodes, so the last parameters must be the same bit for bit.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.cluster import Cluster
from support.cluster_jobs import TrainJob, checkpoints, parameters, wait_until

pytestmark = pytest.mark.cluster

STEPS = 80


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> TrainJob:
    return TrainJob(cluster, "undisturbed", STEPS)


@pytest.fixture(scope="module")
def expected(undisturbed: TrainJob) -> np.ndarray:
    """The parameters of the run that nothing interrupts."""
    assert undisturbed.end().state == "COMPLETED", undisturbed.output
    return parameters(undisturbed.run)


def assert_finished(job: TrainJob, expected: np.ndarray, *, restarts: int) -> None:
    """Assert that a job has finished its run after a number of restarts, with the expected parameters."""
    ended = job.end()
    assert (ended.state, ended.restarts) == ("COMPLETED", restarts), job.output
    assert (job.run / "result.json").exists()
    assert checkpoints(job.run)[-1] == f"step-{STEPS:08d}"
    np.testing.assert_array_equal(parameters(job.run), expected)


def test_the_time_limit_saves_requeues_and_resumes(
    cluster: Cluster, undisturbed: TrainJob, expected: np.ndarray
) -> None:
    job = TrainJob(cluster, "limit", STEPS)
    job.wait_until_saved()
    cluster.check(["scancel", "-b", "-s", "USR1", str(job.number)])  # SLURM's own signal ahead of the limit, now
    assert_finished(job, expected, restarts=1)


def test_preemption_saves_requeues_and_resumes(cluster: Cluster, undisturbed: TrainJob, expected: np.ndarray) -> None:
    job = TrainJob(cluster, "preempted", STEPS)
    job.wait_until_saved()
    urgent = cluster.submit("--partition=urgent", "-N4", "--exclusive", "--wrap=true", cwd=cluster.folder)
    assert cluster.wait_for(urgent).state == "COMPLETED"
    assert_finished(job, expected, restarts=1)


def test_a_lost_node_requeues_and_resumes(cluster: Cluster, undisturbed: TrainJob, expected: np.ndarray) -> None:
    job = TrainJob(cluster, "lost-node", STEPS)
    job.wait_until_saved()
    facts = cluster.job(job.number).facts
    nodes = cluster.check(["scontrol", "show", "hostnames", facts["NodeList"]]).split()
    [lost] = [node for node in nodes if node != facts["BatchHost"]]
    cluster.kill_host(lost)
    assert_finished(job, expected, restarts=1)
    assert lost not in cluster.job(job.number).facts["NodeList"]
    cluster.start_slurmd(lost)
    cluster.wait_until_idle()


def test_a_cancelled_run_is_saved_and_continues_when_it_is_submitted_again(
    cluster: Cluster, undisturbed: TrainJob, expected: np.ndarray
) -> None:
    job = TrainJob(cluster, "cancelled", STEPS)
    saved = job.wait_until_saved()
    cluster.check(["scancel", str(job.number)])
    assert job.end().state == "CANCELLED"
    wait_until(lambda: not cluster.is_completing(job.number), text=lambda: job.output)
    assert saved < checkpoints(job.run)[-1] < f"step-{STEPS:08d}", job.output
    job.submit()
    assert_finished(job, expected, restarts=0)


def test_a_time_limit_that_leaves_no_time_is_refused(cluster: Cluster) -> None:
    job = TrainJob(cluster, "short", STEPS, "--time=2")
    ended = job.end(20)
    assert (ended.state, ended.facts["ExitCode"], ended.restarts) == ("FAILED", "2:0", 0)
    assert "set --time to 4 minutes or more" in job.output
    assert not job.run.exists()


def test_a_wrong_mpi_type_ends_before_training(cluster: Cluster) -> None:
    job = TrainJob(cluster, "wrong-type", STEPS, MPI_TYPE="none")
    assert job.end(30).state == "FAILED"
    assert "srun --mpi=none does not make one world of 2 ranks: set MPI_TYPE" in job.output
    assert not job.run.exists()
