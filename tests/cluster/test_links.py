"""Runs over links that delay, lose frames or go down for seconds, with interfaces that lead nowhere, and on IPv6."""

from __future__ import annotations

import time

import pytest
from support.cluster import Cluster, emulated_hosts
from support.cluster_jobs import JOBS, TrainJob, checkpoints

pytestmark = pytest.mark.cluster

TRAIN = "mpitrain train --data digits --model mlp:hidden=16 --batch-size 32 --steps 20 --out run".split()


def train(hosts: Cluster, mpi: str = "openmpi", algorithm: str = "easgd", **variables: str) -> str:
    """Train on two hosts without SLURM and return the output; the run must finish."""
    command = [*hosts.mpirun(mpi, "host1", "host2"), *TRAIN, "--algorithm", algorithm]
    done = hosts.run(command, env=hosts.environment(mpi, **variables), seconds=300)
    assert (hosts.folder / "run" / "result.json").exists(), done.stdout
    return done.stdout


@pytest.mark.parametrize("algorithm", ["easgd", "allreduce"])
def test_a_slow_link_that_loses_frames(algorithm: str) -> None:
    with emulated_hosts(delay_ms=10, lost_fraction=0.01) as hosts:
        train(hosts, algorithm=algorithm)


def test_a_link_that_is_down_for_four_seconds(cluster: Cluster) -> None:
    job = TrainJob(cluster, "cut", 60, "--nodelist=host[1-2]")
    job.wait_until_saved()
    cluster.cut("host2")
    time.sleep(4)
    saved = checkpoints(job.run)
    cluster.mend("host2")
    job.hurry()
    ended = job.end()
    assert (ended.state, ended.restarts) == ("COMPLETED", 0), job.output
    assert len(checkpoints(job.run)) >= len(saved)


@pytest.mark.parametrize("name", ["docker0", "bridge7"])
def test_an_interface_with_the_same_address_on_all_hosts(name: str) -> None:
    with emulated_hosts() as hosts:
        for host in ("host1", "host2"):
            hosts.add_bridge(host, name)
        if name == "docker0":  # known by its name
            train(hosts)
            return
        command = [*hosts.mpirun("openmpi", "host1", "host2"), *TRAIN, "--algorithm", "easgd"]
        script = ["bash", "-c", f'source {JOBS}/env.sh && exec "$@"', "with-settings", *command]
        done = hosts.run(script, env=hosts.environment(NETWORK="eth0"), seconds=300)
        assert (hosts.folder / "run" / "result.json").exists(), done.stdout


def test_hosts_that_have_ipv6_only() -> None:
    with emulated_hosts() as hosts:
        hosts.leave_ipv4()
        train(hosts)
