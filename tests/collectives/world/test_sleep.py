"""An idle serving thread sleeps until the network wakes it, and serves every request."""

import os
import select

import pytest
from support.launching import installed, launch, python

# Ranks of one machine that use TCP between each other.
TCP = {"openmpi": {"OMPI_MCA_btl": "self,tcp"}, "mpich": {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp,self"}}

SCRIPT = """
import sys
import threading
import time
from pathlib import Path
import numpy as np
import mpitrain
from mpitrain.collectives.world import transfers
from mpitrain.collectives.mpi import MPICommunicator
from mpitrain.kernels.native import service

watched, outcomes = transfers.NativeMPI.watched, []

def noted(*arguments):
    outcomes.append(watched(*arguments))
    return outcomes[-1]

transfers.NativeMPI.watched = noted
world = mpitrain.init()
comm = MPICommunicator(world)
vector = comm.shared_vector(70_000, np.float32)  # a shard on each rank

def wakes():
    (thread,) = [t for t in threading.enumerate() if t.name == "mpi-progress"]
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(status.partition("\\nvoluntary_ctxt_switches:")[2].split()[0])

visits = 0

def visit():
    global visits
    visits += 1
    vector.update(lambda part, c: np.add(c, 1, out=c) is None)

visit()  # compiles kernels
world.barrier()
for rank in range(2):  # one requests from the other, which is outside MPI, until that one trusts its event files
    trusts = Path(sys.argv[1], str(1 - rank))
    while not trusts.exists():
        if world.rank == rank:
            visit()
            time.sleep(0.05)  # longer than the pauses of the other rank
        elif world.service._mpi.shared[service.TRUSTED]:
            trusts.touch()
        else:
            time.sleep(0.01)
    world.barrier()
time.sleep(0.1)
before, began = wakes(), time.monotonic()
time.sleep(1)
n_wakes = (wakes() - before) / (time.monotonic() - began)
world.barrier()
for k in range(30 - world.rank):
    comm.start(visit).wait() if k < 10 else visit()
world.barrier()
out = np.empty(vector.n, np.float32)
vector.read(out)
assert world.n_nodes == 2
assert np.unique(out).tolist() == [world.comm.allreduce(visits)]
# A second. It sleeps 5 ms at a time, so 200; with pauses of 1 ms it wakes 900 times, fewer on a loaded machine.
assert n_wakes <= 400, n_wakes
# It waits for the requests of a background exchange; the rank's other thread sleeps.
assert 1 in outcomes, outcomes
assert set(outcomes) <= {0, 1}, outcomes
world.barrier()
comm.free()
"""


@pytest.mark.launches
@pytest.mark.parametrize("mpi", installed())
def test_an_idle_service_sleeps_serves_every_request_and_watches_for_others(mpi, tmp_path):
    environment = {"MPITRAIN_EMULATED_NODES": "2", **TCP[mpi], "LD_PRELOAD": ""}  # it sleeps without the tests' help
    finished = launch(
        2, [python(mpi), "-c", SCRIPT, str(tmp_path)], mpi=mpi, timeout_seconds=150.0, extra_env=environment
    )
    assert finished.returncode == 0, finished.output


def test_many_wakes_wake_once():
    from mpitrain.collectives.world.wakeup import WakeupPipe

    wakeup, poll = WakeupPipe(), select.poll()
    poll.register(wakeup.reads, select.POLLIN)
    assert not poll.poll(0)
    for _ in range(100_000):  # more than a pipe holds
        wakeup.wake()
    assert poll.poll(0) == [(wakeup.reads, select.POLLIN)]
    while poll.poll(0):
        assert os.read(wakeup.reads, 1 << 20)
    wakeup.wake()
    assert poll.poll(0)


def test_event_files_are_found_and_become_readable_on_an_event():
    from mpitrain.collectives.world.wakeup import WakeupPipe, event_files, poll_structs

    before, wakeup = set(event_files()), WakeupPipe()
    with select.epoll() as epoll:
        epoll.register(wakeup.reads, select.EPOLLIN)
        (file,) = set(event_files()) - before
        assert file == epoll.fileno()
        (row,) = poll_structs([file])
        assert row.nbytes == 8
        assert (row["fd"], row["events"]) == (file, select.POLLIN)
        poll = select.poll()
        poll.register(file, int(row["events"]))
        assert not poll.poll(0)
        wakeup.wake()
        assert poll.poll(0)
