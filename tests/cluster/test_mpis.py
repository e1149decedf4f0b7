"""Every MPI trains between hosts, started by srun and by mpirun; a wrong launch gets its sentence."""

from __future__ import annotations

import json

import pytest
from support.cluster import AGENT, DEBIAN_MPIRUN, Cluster
from support.launching import ROOT

pytestmark = pytest.mark.cluster

MPI_TYPES = {"openmpi": "pmix", "mpich": "pmi2", "debian": "pmix"}
TRAIN = "mpitrain train --data digits --model mlp:hidden=16 --batch-size 32 --steps 20 --json".split()


def mpirun(mpi: str, *hosts: str) -> tuple[list[str], dict[str, str]]:
    """Return the command with which an MPI starts a rank on each host by the agent, and its variables."""
    names = ",".join(hosts)
    n = ["-n", str(len(hosts))]
    if mpi == "mpich":
        return ["mpirun", *n, "-hosts", names, "-launcher", "rsh", "-launcher-exec", str(AGENT), "-iface", "eth0"], {}
    if mpi == "openmpi":
        venv = str(ROOT / ".venv" / "openmpi")
        return ["mpirun", *n, "--prefix", venv, "--host", names, "--prtemca", "plm_ssh_agent", str(AGENT)], {}
    exported = [word for name in ("MPI4PY_LIBMPI", "VIRTUAL_ENV", "PATH") for word in ("-x", name)]
    return [str(DEBIAN_MPIRUN), *n, "--host", names, "--mca", "plm_rsh_agent", str(AGENT), *exported], {}


def result(output: str) -> dict:
    lines = [line for line in output.splitlines() if line.startswith("{")]
    assert lines, output
    return json.loads(lines[-1])


@pytest.mark.parametrize("mpi", ["openmpi", "mpich", "debian"])
def test_srun_starts_ranks_on_two_hosts(cluster: Cluster, mpi: str) -> None:
    command = ["srun", "-N2", "-n2", f"--mpi={MPI_TYPES[mpi]}", *TRAIN, "--algorithm", "easgd"]
    done = cluster.run(command, env=cluster.environment(mpi), seconds=100)
    document = result(done.stdout)
    assert (document["ranks"], document["world"]["nodes"]) == (2, 2)
    lowered = "has no windows between nodes for several threads" in done.stdout
    assert lowered == (mpi == "debian")
    assert document["world"]["threads"] == ("serialized" if lowered else "multiple")


@pytest.mark.parametrize("mpi", ["openmpi", "mpich", "debian"])
def test_mpirun_starts_ranks_on_two_hosts(cluster: Cluster, mpi: str) -> None:
    launcher, variables = mpirun(mpi, "host1", "host2")
    env = cluster.environment(mpi, **variables)
    done = cluster.run([*launcher, *TRAIN, "--algorithm", "allreduce"], env=env, seconds=100)
    document = result(done.stdout)
    assert (document["ranks"], document["world"]["hosts"]) == (2, ["host1", "host2"])
