"""Runs over links that delay, lose frames, or go down for seconds or for good, interfaces that lead nowhere, IPv6."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.cluster import Cluster, emulated_hosts
from support.cluster_jobs import JOBS, TrainJob, checkpoints

from mpitrain.errors import EXIT_TIMEOUT

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


# By name: what the ranks do without end, and what the rank on the launcher's host then says.
WAITS = {
    "all-reduce": ("comm.allreduce(vector)", "waiting in an all-reduce between nodes for another rank"),
    "exchange": ("center.update(lambda part, values: None)", r"waiting in an answer of another node for rank 1"),
}
WAIT = """
import time
from pathlib import Path
import numpy as np
import mpitrain
from mpitrain.collectives.mpi import MPICommunicator
from mpitrain.collectives.world.watchdog import watchdog
world = mpitrain.init()
comm = MPICommunicator(world)
vector, center = comm.vector(100_000, np.float32), comm.shared_vector(100_000, np.float32)
world.barrier()
Path(f"ready{{world.rank}}").touch()
while not Path("is-cut").exists():
    time.sleep(0.1)
mpitrain.init(timeout=6)
while True:
    watchdog.begin_step()
    {step}
"""


@pytest.mark.parametrize(("mpi", "wait"), [("openmpi", "all-reduce"), ("openmpi", "exchange"), ("mpich", "all-reduce")])
def test_a_link_that_is_cut_ends_the_job_with_a_line(mpi: str, wait: str) -> None:
    step, line = WAITS[wait]
    with emulated_hosts(3) as hosts:
        command = [*hosts.mpirun(mpi, "host1", "host2"), "python", "-c", WAIT.format(step=step)]
        with ThreadPoolExecutor(1) as pool:
            ending = pool.submit(hosts.run, command, env=hosts.environment(mpi), seconds=240)
            while not all((hosts.folder / f"ready{rank}").exists() for rank in range(2)) and not ending.done():
                time.sleep(0.1)
            hosts.cut("host2")
            (hosts.folder / "is-cut").touch()
            done = ending.result()
    assert len(re.findall(rf"^mpitrain: no progress for \S+ s: in step \d+, {line}", done.stdout, re.M)) == 1
    # Open MPI's launcher cannot end its daemon beyond the link, and is ended itself.
    assert done.returncode in ((EXIT_TIMEOUT, 1) if mpi == "openmpi" else (EXIT_TIMEOUT,)), done.stdout
