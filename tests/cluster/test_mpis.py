"""Every MPI trains between hosts, started by srun and by mpirun; a wrong launch gets its sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from support.cluster import Cluster
from support.launching import ROOT

pytestmark = pytest.mark.cluster

SRUN = ("srun", "-w", "host[1-2]", "-N2", "-n2")
LEVEL = "MPI4PY_RC_THREAD_LEVEL"
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
    # With UCX, MPICH 5 sends addresses that SLURM's pmi2 cannot always read (docs/cluster.md).
    variables = {"MPIR_CVAR_CH4_NETMOD": "ofi"} if mpi == "mpich" else {}
    command = [*SRUN, f"--mpi={MPI_TYPES[mpi]}", *TRAIN, "--algorithm", "easgd"]
    done = cluster.run(command, env=cluster.environment(mpi, **variables), seconds=300)
    document = result(done.stdout)
    assert (document["world"]["ranks"], document["world"]["nodes"]) == (2, 2)
    lowered = "has no windows between nodes for several threads" in done.stdout
    assert lowered == (mpi == "debian")
    assert document["world"]["threads"] == ("serialized" if lowered else "multiple")


@pytest.mark.parametrize("mpi", ["openmpi", "mpich", "debian"])
def test_mpirun_starts_ranks_on_two_hosts(cluster: Cluster, mpi: str) -> None:
    command = [*cluster.mpirun(mpi, "host1", "host2"), *TRAIN, "--algorithm", "allreduce"]
    done = cluster.run(command, env=cluster.environment(mpi), seconds=300)
    document = result(done.stdout)
    assert (document["ranks"], document["world"]["hosts"]) == (2, ["host1", "host2"])


def test_hosts_may_have_different_numbers_of_ranks(cluster: Cluster) -> None:
    sizes = ["--distribution=block", "-w", "host[1-2]", "-N2", "-n3"]
    document = result(cluster.check(["srun", *sizes, "--mpi=pmix", *TRAIN, "--algorithm", "easgd"], seconds=300))
    assert sorted(document["world"]["ranks_of_node"]) == [1, 2]


def refused(cluster: Cluster, command: list[str], mpi: str = "openmpi", **variables: str) -> str:
    """Return what a wrong launch prints; it must fail by itself."""
    done = cluster.run(command, env=cluster.environment(mpi, **variables), seconds=240)
    assert 0 < done.returncode < 124, done.stdout
    return done.stdout


def mpirun(cluster: Cluster, mpi: str) -> list[str]:
    """Return the command of an MPI's mpirun, whatever environment it runs in."""
    command = cluster.mpirun(mpi, "host1", "host2")
    return [f"{cluster.environment(mpi)['VIRTUAL_ENV']}/bin/mpirun", *command[1:]]


@contextmanager
def another_version(cluster: Cluster) -> Iterator[None]:
    """Another version of mpitrain on host3."""
    file, other = ROOT / "mpitrain" / "version.py", cluster.folder / "version.py"
    other.write_text('__version__ = "9.9"\n')
    cluster.check(["mount", "--bind", str(other), str(file)], host="host3")
    try:
        yield
    finally:
        cluster.check(["umount", str(file)], host="host3")


NO_PMIX = "was built without PMIx and cannot be started by"
TWO_TASKS = "srun started 2 tasks, but MPI sees a world of 1: .* srun --mpi=pmix .Open MPI. or srun --mpi=pmi2 .MPICH."

# The MPI of the launcher, its command if that is not mpirun, the MPI of Python, variables, and the sentence.
WRONG: dict[str, tuple[str, list[str], str, dict[str, str], str]] = {
    "srun without PMI": ("", [*SRUN, "--mpi=none"], "openmpi", {}, TWO_TASKS),
    "srun without PMI, MPICH": ("", [*SRUN, "--mpi=none"], "mpich", {}, TWO_TASKS),
    "pmi2 for Open MPI": ("", [*SRUN, "--mpi=pmi2"], "openmpi", {}, TWO_TASKS),
    "pmix for MPICH": (
        "",
        [*SRUN, "--mpi=pmix"],
        "mpich",
        {},
        f"{NO_PMIX} srun --mpi=pmix: use srun --mpi=pmi2",
    ),
    "MPICH's mpirun": (
        "mpich",
        [],
        "openmpi",
        {},
        "launcher belongs to another MPI; use the mpirun of this Py",
    ),
    "Open MPI's mpirun": (
        "openmpi",
        [],
        "mpich",
        {},
        f"{NO_PMIX} the mpirun of Open MPI: use the mpirun of MPICH",
    ),
    "Open MPI 5's mpirun": (
        "openmpi",
        [],
        "debian",
        {},
        "MPI 4.1.4, .* cannot be started by the mpirun of Open MPI 5",
    ),
    "threads": (
        "",
        [*SRUN, "--mpi=pmix"],
        "debian",
        {LEVEL: "multiple"},
        f"unset {LEVEL}=multiple: Open MPI 4.1.4 has",
    ),
    "torchrun": (
        "",
        ["torchrun", "--nproc-per-node=2", "--no-python"],
        "openmpi",
        {},
        "torchrun started 2 processes .*, but MPI sees a world of 1: launch with mpirun -n 2 mpitrain train, or srun",
    ),
    "two versions": (
        "",
        [*SRUN, "--mpi=pmix", "-w", "host[2-3]"],
        "openmpi",
        {},
        r"version of mpitrain differs .*9.9 on rank 1; install the same version on every node",
    ),
}


@pytest.fixture(scope="module")
def refusals(cluster: Cluster) -> dict[str, Future[str]]:
    """The output of every wrong launch, three at a time."""
    with another_version(cluster), ThreadPoolExecutor(3) as pool:
        return {
            name: pool.submit(refused, cluster, [*(command or mpirun(cluster, launcher)), *TRAIN], mpi, **variables)
            for name, (launcher, command, mpi, variables, _) in WRONG.items()
        }


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_launch_gets_the_sentence_that_says_what_to_do(refusals: dict[str, Future[str]], name: str) -> None:
    assert re.search(WRONG[name][-1], refusals[name].result()), refusals[name].result()


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
    assert re.search(r"9 MiB of shared memory are needed on host2, but /dev/shm has only \d MiB free: enlarge", output)


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
