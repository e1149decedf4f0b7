"""The end of a run: an exception on one rank ends all ranks, with its traceback and a nonzero exit code."""

from pathlib import Path

import pytest
from support.launching import ROOT, installed, launch, python

pytestmark = pytest.mark.launches

IN_TIME_SECONDS = 250.0  # a hang would last forever

HEAD = """
import os, signal, sys, threading, time
import mpitrain
world = mpitrain.init()
"""


def run(mpi, n_ranks, script, **environment):
    command = [python(mpi), "-c", HEAD + script]
    finished = launch(n_ranks, command, mpi=mpi, timeout_seconds=IN_TIME_SECONDS, extra_env=environment)
    assert not finished.timed_out, finished.output
    return finished


@pytest.mark.parametrize("mpi", installed())
@pytest.mark.parametrize("n_nodes", ["1", "2"])
def test_an_exception_on_one_rank_ends_all(mpi, n_nodes):
    script = """
def fail():
    raise ValueError("a reason")

if world.rank == 1:
    fail()
world.barrier()
print("went on")
"""
    finished = run(mpi, 2, script, MPITRAIN_EMULATED_NODES=n_nodes)
    assert finished.returncode != 0
    assert "rank 1 of 2 failed:\nTraceback (most recent call last):" in finished.output
    assert "in fail\n" in finished.output
    assert "ValueError: a reason" in finished.output
    assert "went on" not in finished.output


@pytest.mark.parametrize("mpi", installed())
def test_an_exception_on_one_rank_in_init_ends_all(mpi):
    script = """
from mpi4py import MPI
from mpitrain.collectives.world import launch

def fail(comm):
    raise ValueError("a reason")

if MPI.COMM_WORLD.Get_rank() == 1:
    launch.find_ranks = fail
mpitrain.init()
print("went on")
"""
    command = [python(mpi), "-c", "import mpitrain" + script]
    finished = launch(2, command, mpi=mpi, timeout_seconds=IN_TIME_SECONDS)
    assert not finished.timed_out, finished.output
    assert finished.returncode == 1
    assert "rank 1 of 2 failed:\nTraceback (most recent call last):" in finished.output
    assert "ValueError: a reason" in finished.output
    assert "went on" not in finished.output


@pytest.mark.parametrize("mpi", installed())
def test_an_error_of_mpi_in_the_first_communication_of_one_rank_ends_all(mpi):
    """A wrong network interface, for example, shows itself on some of the ranks, when they first communicate."""
    script = """
from mpi4py import MPI

class Unreachable(MPI.Intracomm):
    def Dup(self, info=None):
        raise MPI.Exception(MPI.ERR_OTHER)

if MPI.COMM_WORLD.Get_rank() == 1:
    MPI.COMM_WORLD = Unreachable(MPI.COMM_WORLD)
mpitrain.init()
print("went on")
"""
    command = [python(mpi), "-c", "import mpitrain" + script]
    finished = launch(2, command, mpi=mpi, timeout_seconds=IN_TIME_SECONDS)
    assert not finished.timed_out, finished.output
    assert finished.returncode == 1
    assert "rank 1 of 2 failed:\nTraceback (most recent call last):" in finished.output
    assert "went on" not in finished.output


@pytest.mark.parametrize("mpi", installed())
def test_an_exception_in_a_thread_of_one_rank_ends_all(mpi):
    script = """
if world.rank == 0:
    threading.Thread(target=lambda: 1 / 0).start()
world.barrier()
time.sleep(1000)
"""
    finished = run(mpi, 2, script)
    assert finished.returncode != 0
    assert "rank 0 of 2 failed:\n" in finished.output
    assert "ZeroDivisionError" in finished.output


@pytest.mark.parametrize("mpi", installed())
def test_an_exception_ends_a_rank_that_waits_for_a_lock(mpi):
    script = """
from mpitrain.collectives.rma.locks import LockTable
locks = LockTable(world, [1, 1])
if world.rank == 0:
    locks.acquire(0, 0)
    world.barrier()
    time.sleep(0.2)
    raise ValueError("with the lock in hand")
world.barrier()
locks.acquire(0, 0)
print("went on")
"""
    finished = run(mpi, 2, script)
    assert finished.returncode != 0
    assert "ValueError: with the lock in hand" in finished.output
    assert "went on" not in finished.output


@pytest.mark.parametrize("mpi", installed())
def test_a_usage_error_of_all_ranks_is_one_line_and_nothing_else(mpi):
    """The launcher adds no report of its own, and the exit code is that of a usage error."""
    finished = run(mpi, 3, "time.sleep(0.3 * world.rank)\nmpitrain.EASGD(period=0)")
    assert finished.output == "mpitrain: error: easgd: period must be a whole number >= 1, not 0 (<string>, line 6)\n"
    assert finished.returncode == 2


@pytest.mark.parametrize("mpi", installed())
def test_a_usage_error_of_one_rank_ends_all_with_few_lines(mpi):
    finished = run(mpi, 3, "if world.rank == 1:\n    mpitrain.EASGD(period=0)\nworld.barrier()\nprint('went on')")
    lines = finished.output.splitlines()
    assert lines[0].startswith("mpitrain: error (rank 1): easgd: period must be")
    assert len(lines) <= 8, finished.output  # MPI_Abort prints 14 with Open MPI
    assert "went on" not in finished.output
    assert finished.returncode == 2


def test_a_rank_inside_of_a_shell_ends_all_too():
    """The shell hides the exit code of its rank from the launcher."""
    command = [
        "bash",
        "-c",
        f'"{python("openmpi")}" -c "$0"; sleep 1000',
        HEAD + "if world.rank == 1:\n    1 / 0\nworld.barrier()",
    ]
    finished = launch(2, command, timeout_seconds=IN_TIME_SECONDS)
    assert not finished.timed_out, finished.output
    assert "ZeroDivisionError" in finished.output
    assert finished.returncode != 0


def test_torchrun_is_refused_in_one_line():
    finished = run("openmpi", 0, "print('went on')", RANK="0", LOCAL_RANK="0", WORLD_SIZE="3")
    assert finished.returncode == 2
    (line,) = finished.output.splitlines()
    assert "started 3 processes (WORLD_SIZE), but MPI sees a world of 1: launch with mpirun -n 3 python" in line


def test_the_wheel_of_open_mpi_is_silent_about_ucx():
    """A window in a script that mpirun starts without jobs/local.sh, which sets OMPI_MCA_osc itself."""
    script = HEAD + "world.shared_array((4,), 'f4'); print(os.environ['OMPI_MCA_osc'])"
    mpirun = str(Path(python("openmpi")).parent / "mpirun")
    flags = ["--allow-run-as-root", "--map-by", ":OVERSUBSCRIBE", "-n", "2"]
    for extra, expected in (({}, "^ucx"), ({"OMPI_MCA_osc": "rdma,sm"}, "rdma,sm")):
        finished = launch(0, [mpirun, *flags, python("openmpi"), "-c", script], timeout_seconds=250, extra_env=extra)
        assert finished.output.split() == [expected] * 2, finished.output


@pytest.mark.parametrize("mpi", installed())
def test_an_interrupt_on_one_rank_ends_all(mpi):
    script = """
if world.rank == 1:
    raise KeyboardInterrupt
world.barrier()
print("went on")
"""
    finished = run(mpi, 2, script)
    assert finished.returncode != 0
    assert "KeyboardInterrupt" in finished.output
    assert "went on" not in finished.output


@pytest.mark.parametrize("mpi", installed())
@pytest.mark.parametrize("waiting", ["world.barrier()", "time.sleep(1000)"])
def test_an_interrupted_launcher_leaves_no_rank(mpi, waiting):
    """Ctrl-C while rank 0 sleeps and the other waits for it in MPI or sleeps too."""
    script = f"""
world.barrier()
if world.rank == 0:
    os.kill(os.getsid(0), signal.SIGINT)  # the launcher leads the session
    time.sleep(1000)
{waiting}
"""
    finished = run(mpi, 2, script)
    assert finished.returncode != 0


SHARES = """
import numpy as np
from mpitrain.collectives.mpi import MPICommunicator
comm = MPICommunicator(world)
vector = comm.shared_vector(8, np.float32)
pids = world.comm.allgather(os.getpid())

def visit(n):
    for _ in range(n):
        vector.update(lambda part, c: np.add(c, 1, out=c) is None)
"""


@pytest.mark.parametrize("mpi", installed())
@pytest.mark.parametrize("way", ["messages", "windows"])
def test_a_rank_at_its_end_serves_the_others(mpi, way):
    script = """
if world.rank:
    time.sleep(0.5)
    visit(20)
    print("rank", world.rank, "went on")
"""
    finished = run(mpi, 3, SHARES + script, MPITRAIN_EMULATED_NODES="2", MPITRAIN_BETWEEN_NODES=way)
    assert finished.returncode == 0, finished.output
    assert finished.output.count("went on") == 2


@pytest.mark.parametrize("mpi", installed())
def test_a_rank_without_service_lets_the_others_end(mpi):
    script = """
if world.rank == 1:
    world.progress_thread.stop()
    time.sleep(0.5)
"""
    finished = run(mpi, 3, SHARES + script, MPITRAIN_EMULATED_NODES="2")
    assert finished.returncode == 0, finished.output


@pytest.mark.parametrize("mpi", installed())
@pytest.mark.parametrize("end", ["raise ValueError('a reason')", "os.kill(pids[0], signal.SIGINT); time.sleep(1000)"])
def test_a_rank_at_its_end_does_not_wait_for_a_rank_that_fails(mpi, end):
    """Another rank raises an exception, or this one is interrupted."""
    script = f"""
if world.rank == 1:
    time.sleep(0.5)
    visit(1)
    {end}
"""
    finished = run(mpi, 2, SHARES + script, MPITRAIN_EMULATED_NODES="2")
    assert finished.returncode != 0
    assert "rank 1 of 2 failed:" in finished.output or "KeyboardInterrupt" in finished.output


@pytest.mark.parametrize("mpi", installed())
def test_an_error_in_the_service_of_one_rank_ends_all(mpi):
    script = """
from mpitrain.kernels.native.service import MOST_REQUESTS, REQUEST_WORDS
if world.rank == 0:  # a message longer than there is room for
    world.progress_thread._comm.Send(np.zeros(MOST_REQUESTS * REQUEST_WORDS + 1), 1, 1)
time.sleep(1000)
"""
    finished = run(mpi, 2, SHARES + script, MPITRAIN_EMULATED_NODES="2")
    assert finished.returncode != 0
    assert "rank 1 of 2 failed:" in finished.output
    assert "this rank can no longer serve other nodes: " in finished.output


@pytest.mark.parametrize("mpi", installed())
def test_tasks_of_srun_that_mpi_does_not_join_are_a_usage_error(mpi):
    """srun started 4 tasks, and MPI sees a world of 1 in each."""
    finished = run(mpi, 0, "print('went on')", SLURM_STEP_NUM_TASKS="4")
    assert finished.returncode != 0
    assert "mpitrain: error: srun started 4 tasks, but MPI sees a world of 1" in finished.output
    assert "went on" not in finished.output


@pytest.mark.parametrize("mpi", installed())
def test_mpirun_inside_a_step_of_srun_decides_the_size(mpi):
    finished = run(mpi, 1, "print('ranks', world.size)", SLURM_STEP_NUM_TASKS="4")
    assert finished.returncode == 0
    assert "ranks 1" in finished.output


@pytest.mark.parametrize("mpi", installed())
def test_the_launcher_of_another_mpi_is_a_usage_error(mpi):
    others = [other for other in installed() if other != mpi]
    for other in others:
        command = [python(mpi), "-c", HEAD + "print('ranks', world.size)"]
        finished = launch(2, command, mpi=other, timeout_seconds=IN_TIME_SECONDS)
        assert finished.returncode != 0
        assert "ranks 1" not in finished.output
        told = (
            "mpitrain: error: the launcher started 2 ranks, but MPI (",
            "was built without PMIx and cannot be started by the mpirun of Open MPI",
            "Fatal error in internal_Init_thread",  # MPICH may refuse on its own
        )
        assert any(words in finished.output for words in told), finished.output


@pytest.mark.parametrize("mpi", installed())
def test_a_rank_may_start_a_process_with_a_world_of_its_own(mpi):
    script = """
import subprocess
from support.launching import environment
child = "import mpitrain; print('alone', mpitrain.init().size)"
print(world.size, subprocess.check_output([sys.executable, "-c", child], env=environment("active"), text=True))
"""
    finished = run(mpi, 2, script, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert finished.returncode == 0, finished.output
    assert finished.output.count("2 alone 1") == 2
