"""A rank that waits for too long says what it waits for, and all ranks end with an exit code of their own."""

import re
import threading

import pytest
from support.launching import installed, launch, python

import mpitrain
from mpitrain.collectives.world.watchdog import Waiting, Watchdog
from mpitrain.errors import EXIT_TIMEOUT, UsageError

IN_TIME_SECONDS = 250.0  # a hang would last forever


def wait_of(dog, what="something", ranks=None):
    return Waiting(dog, what, ranks)


def at(dog, seconds):
    """Return the names of the waits that are too old when the watchdog's clock shows `seconds`."""
    dog.now = seconds
    return [wait.what for wait in dog._late()]


def test_a_wait_is_late_once_it_has_lasted_for_the_timeout():
    dog = Watchdog(timeout=5)
    dog.now = 100.0
    with wait_of(dog, "a lock"):
        assert at(dog, 104.9) == []
        assert at(dog, 105) == ["a lock"]
    assert at(dog, 200) == []


def test_a_timeout_of_0_waits_for_ever():
    dog = Watchdog(timeout=0)
    with wait_of(dog):
        assert at(dog, 1e9) == []


def test_progress_begins_a_wait_anew():
    dog = Watchdog(timeout=5)
    with wait_of(dog) as wait:
        dog.now = 4
        wait.restart()
        assert at(dog, 8.9) == []
        assert at(dog, 9) == ["something"]


def test_the_end_of_an_inner_wait_is_progress_of_the_outer_one():
    dog = Watchdog(timeout=5)
    with wait_of(dog, "outer"):
        dog.now = 4
        with wait_of(dog, "inner"):
            assert at(dog, 8.9) == []  # the inner one is what this thread waits for
            assert at(dog, 9) == ["inner"]
        assert at(dog, 13.9) == []
        assert at(dog, 14) == ["outer"]


def test_a_wait_of_another_thread_is_no_progress():
    dog = Watchdog(timeout=5)
    with wait_of(dog, "outer"):
        dog.now = 4

        def wait_elsewhere():
            with wait_of(dog, "elsewhere"):
                pass

        thread = threading.Thread(target=wait_elsewhere)
        thread.start()
        thread.join()
        assert at(dog, 5) == ["outer"]


def test_a_line_names_the_step_and_the_awaited_ranks_but_not_this_one():
    dog = Watchdog()
    dog.attach(1, lambda code: None)
    for _ in range(7):
        dog.begin_step()
    wait = wait_of(dog, "a barrier", lambda: [2, 1, 0])
    assert dog._describe(wait) == "in step 7, waiting in a barrier for rank 0, rank 2"


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_a_timeout_is_a_number_of_seconds(timeout):
    with pytest.raises(UsageError, match="timeout must be a number of seconds"):
        mpitrain.init(timeout=timeout)


HEAD = """
import os, signal, sys, time
import numpy as np
import mpitrain
from mpitrain.collectives.mpi import MPICommunicator
from mpitrain.collectives.rma.locks import LockTable
from mpitrain.collectives.world.watchdog import watchdog
world = mpitrain.init()
comm = MPICommunicator(world)
vector = comm.vector(8, np.float32)
locks = LockTable(world, [1] * world.size)

def steps(n):
    for _ in range(n):
        watchdog.begin_step()
        comm.allreduce(vector)

steps(20)
world.barrier()
mpitrain.init(timeout=8)  # a fraction of it is the time within which the others write their lines
"""

LOCK_NEVER_RELEASED = """
def compute():
    locks.acquire(0, 0)
    world.barrier()
    time.sleep(1000)

if world.rank == 0:
    compute()
world.barrier()
locks.acquire(0, 0)
"""

# By name: a script, and what rank 0, 1, ... says; None if it cannot.
SILENCES = {
    "fewer steps": (
        "steps(10 if world.rank == 0 else 30)\nworld.barrier()",
        ["in step 30, waiting in a barrier for "]
        + 2 * [r"in step 31, waiting in a barrier or a sum .* for rank 0 \(waiting in step 30\)"],
    ),
    "sys.exit": (
        "if world.rank == 0:\n    sys.exit(0)\nsteps(1)",
        [None] + 2 * [r"in step 21, waiting in .* for rank 0 \(which ended after step 20\)"],
    ),
    "stopped": (
        "if world.rank == 0:\n    os.kill(os.getpid(), signal.SIGSTOP)\nworld.barrier()",
        [None]
        + 2 * [r"in step 20, waiting in a barrier for rank 0 \(process \d+, which a signal stopped in step 20\)"],
    ),
    "lock": (
        LOCK_NEVER_RELEASED,
        [r"busy in step 20, at line \d+ of <string> \(compute\)"]
        + 2 * [r"in step 20, waiting in a lock for rank 0 \(busy in step 20\)"],
    ),
}


def lines_of(rank, text, output):
    """Return the lines of a rank that end with a text; the first rank that waits for too long asks the others."""
    where = rf"mpitrain \(rank {rank}\): " if rank else "mpitrain: "
    return re.findall(
        rf"^{where}(?:no progress for \S+ s: |another rank has waited for too long; this one is ){text}", output, re.M
    )


@pytest.mark.launches
@pytest.mark.parametrize(
    ("silence", "mpi"),
    [
        (silence, mpi)
        for silence in SILENCES
        for mpi in installed()
        if mpi == "openmpi" or silence in ("stopped", "lock")
    ],
)
def test_silence_ends_all_ranks_and_each_says_what_it_waits_for(mpi, silence):
    script, texts = SILENCES[silence]
    done = launch(3, [python(mpi), "-c", HEAD + script], mpi=mpi, timeout_seconds=IN_TIME_SECONDS)
    assert not done.timed_out, done.output
    assert done.returncode == EXIT_TIMEOUT, done.output
    for rank, text in enumerate(texts):
        assert text is None or len(lines_of(rank, text, done.output)) == 1, f"{text}\n{done.output}"
    assert "no progress for" in done.output
    assert "was killed or crashed" not in done.output


@pytest.mark.launches
@pytest.mark.parametrize("mpi", installed())
def test_silence_between_nodes_ends_all_ranks(mpi):
    """A rank of another node holds a lock and is stopped: its progress thread gives no answer."""
    script = """
if world.rank == 2:
    os.kill(os.getpid(), signal.SIGSTOP)
shared = world.service.fetch(2, (0, 0), (np.zeros(0), np.zeros(0))) if world.rank == 0 else None
if world.rank == 0:
    shared.wait()
world.barrier()
"""
    done = launch(
        3,
        [python(mpi), "-c", HEAD + script],
        mpi=mpi,
        timeout_seconds=IN_TIME_SECONDS,
        extra_env={"MPITRAIN_EMULATED_NODES": "3"},
    )
    assert not done.timed_out, done.output
    assert done.returncode == EXIT_TIMEOUT, done.output
    assert (
        len(re.findall(r"mpitrain: no progress .* waiting in an answer of another node for rank 2", done.output)) == 1
    )
    assert len(re.findall(r"\(rank 1\): no progress .* waiting in a barrier for another rank", done.output)) == 1


@pytest.mark.launches
def test_a_killed_rank_is_named_with_its_place_by_one_other_rank():
    """Open MPI ends the others a quarter of a second later; under MPICH they end at once.

    The launcher, which leads the session, is stopped until one of the others has said it.
    """
    script = """
import logging

class Continue(logging.Handler):
    def emit(self, record):
        if "was killed" in record.getMessage():
            os.kill(os.getsid(0), signal.SIGCONT)

logging.getLogger("mpitrain").addHandler(Continue())
world.barrier()
if world.rank == 0:
    os.kill(os.getsid(0), signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1000)
"""
    done = launch(3, [python("openmpi"), "-c", HEAD + script], timeout_seconds=IN_TIME_SECONDS)
    assert not done.timed_out, done.output
    assert done.returncode not in (0, EXIT_TIMEOUT)
    assert len(re.findall(r"rank 0 \(process \d+ on \S+\) was killed or crashed in step 20", done.output)) == 1


@pytest.mark.launches
@pytest.mark.parametrize("end", ["raise ValueError('a reason')", "world.abort(5)"])
def test_a_rank_that_ends_by_itself_is_not_reported_as_killed(end):
    script = f"if world.rank == 0:\n    {end}\ntime.sleep(1000)"
    done = launch(3, [python("openmpi"), "-c", HEAD + script], timeout_seconds=IN_TIME_SECONDS)
    assert not done.timed_out, done.output
    assert "was killed or crashed" not in done.output
