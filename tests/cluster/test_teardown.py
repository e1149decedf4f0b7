"""Nothing of a cluster survives the process that booted it, even if that process is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.cluster_jobs import wait_until
from support.launching import ROOT

pytestmark = pytest.mark.cluster

BOOT = """
import sys
from support.cluster import booted
with booted() as cluster:
    job = cluster.submit("-N4", "--wrap=srun sleep 600", cwd=cluster.folder)
    cluster.wait_for(job, "RUNNING")
    print(cluster.folder, flush=True)
    sys.stdin.read()
"""


def processes_in(space: str) -> set[int]:
    """Return the processes in a process namespace."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == space:
                found.add(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("killed", [False, True])
def test_no_process_outlives_the_cluster(killed: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BOOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    try:
        space = os.readlink(f"/proc/{(folder / 'machine.pid').read_text().strip()}/ns/pid")
        assert len(processes_in(space)) > 10  # slurmctld, four slurmd, four steps
        if killed:
            process.kill()
        process.stdin.close()
        process.wait(120)
        wait_until(lambda: not processes_in(space), seconds=120)
        assert folder.exists() == killed
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_the_network_of_this_machine_stays_as_it_is(cluster: Cluster) -> None:
    names = {line.split(":")[1].strip() for line in _ip("-o", "link").splitlines()}
    assert not names & {"switch", "host1", "host2"}
    assert _ip("netns", "list") == ""


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
