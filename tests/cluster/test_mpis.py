"""Every MPI trains between hosts, started by srun and by mpirun; a wrong launch gets its sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.cluster import Cluster

pytestmark = pytest.mark.cluster

SRUN = ("srun", "-w", "host[1-2]", "-N2", "-n2")
MPI_TYPES = {"openmpi": "pmix", "mpich": "pmi2", "debian": "pmix"}
TRAIN = "mpitrain train --data digits --model mlp:hidden=16 --batch-size 32 --steps 20 --json".split()


def result(output: str) -> dict[str, Any]:
    """The document of a run."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    assert lines, output
    document: dict[str, Any] = json.loads(lines[-1])
    return document


@pytest.mark.parametrize("mpi", ["openmpi", "mpich", "debian"])
def test_srun_starts_ranks_on_two_hosts(cluster: Cluster, mpi: str) -> None:
    command = [*SRUN, f"--mpi={MPI_TYPES[mpi]}", *TRAIN, "--algorithm", "easgd"]
    done = cluster.run(command, env=cluster.environment(mpi), seconds=100)
    document = result(done.stdout)
    assert (document["ranks"], document["world"]["nodes"]) == (2, 2)
    lowered = "has no windows between nodes for several threads" in done.stdout
    assert lowered == (mpi == "debian")
    assert document["world"]["threads"] == ("serialized" if lowered else "multiple")


@pytest.mark.parametrize("mpi", ["openmpi", "mpich", "debian"])
def test_mpirun_starts_ranks_on_two_hosts(cluster: Cluster, mpi: str) -> None:
    command = [*cluster.mpirun(mpi, "host1", "host2"), *TRAIN, "--algorithm", "allreduce"]
    done = cluster.run(command, env=cluster.environment(mpi), seconds=100)
    document = result(done.stdout)
    assert (document["ranks"], document["world"]["hosts"]) == (2, ["host1", "host2"])


def refused(cluster: Cluster, command: list[str], mpi: str = "openmpi", **variables: str) -> str:
    """Return what a wrong launch prints; it must fail by itself."""
    done = cluster.run(command, env=cluster.environment(mpi, **variables), seconds=60)
    assert 0 < done.returncode < 124, done.stdout
    return done.stdout


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_a_type_of_srun_that_does_not_fit_is_named(cluster: Cluster, mpi: str) -> None:
    output = refused(cluster, [*SRUN, "--mpi=none", *TRAIN], mpi)
    assert "srun --mpi=pmix (Open MPI) or srun --mpi=pmi2 (MPICH)" in output


def test_the_launcher_of_another_mpi_is_named(cluster: Cluster) -> None:
    launcher = cluster.mpirun("mpich", "host1", "host2")
    launcher[0] = cluster.environment("mpich")["VIRTUAL_ENV"] + "/bin/mpirun"
    output = refused(cluster, [*launcher, *TRAIN], "openmpi")
    assert "the launcher belongs to another MPI" in output


def test_a_folder_that_hosts_do_not_share_is_named(cluster: Cluster) -> None:
    # /dev/shm is the only folder that each of these hosts has for itself.
    output = refused(cluster, [*SRUN, "--mpi=pmix", *TRAIN, "--out", "/dev/shm/run"])
    assert "rank 1 on host2 does not see the folder /dev/shm/run of rank 0 on host1" in output
    assert "epoch" not in output


def test_a_host_with_little_shared_memory_is_named(cluster: Cluster) -> None:
    cluster.check(["mount", "-o", "remount,size=2m", "/dev/shm"], host="host2")
    try:
        large = [word.replace("hidden=16", "hidden=2048x1024") for word in TRAIN]
        output = refused(cluster, [*SRUN, "--mpi=pmix", *large])
    finally:
        cluster.check(["mount", "-o", "remount,size=2g", "/dev/shm"], host="host2")
    assert "9 MiB of shared memory are needed on host2, but /dev/shm has only 2 MiB free: enlarge it" in output


def test_info_compares_the_hosts(cluster: Cluster) -> None:
    cluster.check(["mount", "-o", "remount,size=64m", "/dev/shm"], host="host4")
    for host in ("host3", "host4"):
        cluster.add_bridge(host, "docker0")
    try:
        command = ["srun", "-w", "host[3-4]", "-N2", "-n2", "--mpi=pmix", "mpitrain", "info", "--json"]
        document = result(cluster.check(command))
    finally:
        cluster.check(["mount", "-o", "remount,size=2g", "/dev/shm"], host="host4")
        for host in ("host3", "host4"):
            cluster.check(["ip", "link", "del", "docker0"], host=host)
    assert [one["host"] for one in document["ranks"]] == ["host3", "host4"]
    assert {one["launcher"] for one in document["ranks"]} == {"srun"}
    assert {tuple(one["interfaces"]) for one in document["ranks"]} == {("eth0", "docker0")}
    [small] = document["verdicts"]
    assert small.startswith("host4: /dev/shm has 67.1 MB free; 1 ranks should have")
