"""A serving thread that has nothing to do sleeps, where the network wakes it, and hears what comes."""

import pytest
from launching import installed, launch, python

# Ranks of one machine that speak TCP with each other.
TCP = {"openmpi": {"OMPI_MCA_btl": "self,tcp"}, "mpich": {"MPIR_CVAR_NOLOCAL": "1", "UCX_TLS": "tcp,self"}}

SCRIPT = """
import time
import numpy as np
import mpitrain
from mpitrain.collectives.mpi import MPICommunicator

world = mpitrain.init()
comm = MPICommunicator(world)
vector = comm.shared_vector(2000, np.float32)
thread = world._progress._thread.native_id

def visit():
    vector.update(lambda part, c: np.add(c, 1, out=c) is None)

def wake_ups():
    with open(f"/proc/self/task/{thread}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt_switches"))

for rank in range(2):  # one asks the other, which is not in MPI meanwhile
    end = time.monotonic() + 2
    for _ in range(20 * (world.rank == rank)):
        visit()
        time.sleep(0.05)
    time.sleep(max(end - time.monotonic(), 0))
    world.barrier()
before, began = wake_ups(), time.monotonic()
time.sleep(1)
seldom = (wake_ups() - before) / (time.monotonic() - began) < 500
world.barrier()
for _ in range(20):
    visit()
world.barrier()
out = np.empty(vector.n, np.float32)
vector.read(out)
found = world.comm.gather((world.n_nodes, seldom, np.unique(out).tolist()))
if world.rank == 0:
    print("found", found)
world.barrier()
comm.free()
"""


@pytest.mark.parametrize("mpi", installed())
def test_it_wakes_seldom_and_is_woken_by_requests(mpi):
    environment = {"MPITRAIN_EMULATED_NODES": "2", **TCP[mpi]}
    finished = launch(2, [python(mpi), "-c", SCRIPT], mpi=mpi, extra_env=environment)
    assert finished.returncode == 0, finished.output
    assert "found [(2, True, [80.0]), (2, True, [80.0])]" in finished.output, finished.output
