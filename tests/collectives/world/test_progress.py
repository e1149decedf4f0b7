"""Exchanges with a rank that computes or sleeps, checked by the order of events and not by their duration."""

import ctypes
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mpitrain.collectives.world.fault_tolerance import FaultTolerance
from mpitrain.kernels.native import service
from mpitrain.kernels.native.lock_words import OWNER_BITS

BUSY_SECONDS = 120.0  # at most; an exchange takes milliseconds


def sleep():
    time.sleep(0.05)


def compute():
    a = np.ones((300, 300))
    for _ in range(20):
        a @ a


def interpret():
    sum(range(100_000))


@pytest.fixture
def comm(two_nodes):
    from mpitrain.collectives.mpi import MPICommunicator

    communicator = MPICommunicator(two_nodes)
    yield communicator
    two_nodes.comm.Barrier()
    communicator.free()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("work", [sleep, compute, interpret])
def test_an_exchange_with_a_busy_rank_ends_while_the_rank_is_busy(comm, work, mpi_tmp_path):
    ended = Path(mpi_tmp_path) / "ended"  # a message would be progress for MPI
    boxes = comm.mailboxes(10_000, np.float32)
    busy = comm.size - 1  # on the other node than rank 0
    comm.barrier()
    if comm.rank == 0:
        for _ in range(5):
            boxes.update(busy, lambda box, tags: None)
        ended.touch()
    else:
        until = time.monotonic() + BUSY_SECONDS
        while not ended.exists() and time.monotonic() < until:
            work() if comm.rank == busy else sleep()
        assert ended.exists()


@pytest.mark.ranks(1, 2, 3, 4, 5)
def test_a_progress_thread_runs_between_nodes_only_and_stops(one_node, two_nodes):
    from mpitrain.collectives.world.progress import ProgressThread

    assert one_node.progress_thread is None
    assert (two_nodes.progress_thread is not None) == (two_nodes.n_nodes > 1)
    thread = ProgressThread(one_node.comm)
    assert thread._thread.is_alive()
    thread.stop()
    thread.stop()
    assert not thread._thread.is_alive()


@pytest.mark.ranks(2, 4)
def test_a_worker_visits_the_shards_of_another_node_first(comm, two_nodes):
    vector = comm.shared_vector(1024 * comm.size, np.float32)
    visited = []
    vector.update(lambda part, c: visited.append(part))
    nodes, homes = two_nodes.nodes, [part.start // 1024 for part in visited]
    is_elsewhere = [nodes[home] != nodes[comm.rank] for home in homes]
    assert is_elsewhere == sorted(is_elsewhere, reverse=True)
    # They come as they arrive; what each rank asks for first is another one for each.
    firsts = [int(row[0]) for row in comm.gather([float(vector._order[0])])]
    assert sorted(firsts) == list(range(comm.size))
    assert all(nodes[home] != nodes[rank] for rank, home in enumerate(firsts))
    assert sorted(part.start for part in visited) == sorted(part.start for part in vector.parts)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("thread", ["foreground", "background"])
def test_no_update_is_lost_with_many_pending_blocks(comm, thread):
    from mpitrain.collectives.rma.peer_memory import LARGEST_REMOTE_SHARD
    from mpitrain.collectives.world.background import Background

    vector = comm.shared_vector(5 * LARGEST_REMOTE_SHARD // 2 * comm.size, np.float32)  # three blocks at each
    n_visits = 4
    background = Background(threads=thread == "background")

    def visit():
        for _ in range(n_visits):
            vector.update(lambda part, c: np.add(c, 1, out=c) is None)

    background.start(visit).wait()
    background.stop()
    comm.barrier()
    out = np.empty(vector.n, np.float32)
    vector.read(out)
    assert np.array_equal(out, np.full_like(out, n_visits * comm.size))


SERVED = {
    "MPI_Testany": 5,
    "MPI_Send": 6,
    "MPI_Isend": 7,
    "MPI_Irecv": 7,
    "MPI_Testall": 4,
}  # numbers of arguments


@pytest.fixture
def failing(monkeypatch):
    """Return `failing(name, n)`, which starts a service in which a function of MPI fails after n calls. Local.

    It returns the thread, which serves this rank alone, and the list of messages of its exceptions.
    """
    from mpi4py import MPI

    from mpitrain.collectives.world.progress import ProgressThread

    made, raised = [], []
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(str(args.exc_value)))
    serve = service.serve()

    def make(name, n_good):
        k, kind = service.FUNCTIONS.index(name), ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * SERVED[name])
        n_calls = 0

        def call(*arguments):
            nonlocal n_calls
            n_calls += 1
            return real(*arguments) if n_calls <= n_good else MPI.ERR_OTHER

        def serve_badly(functions, *rest):
            nonlocal real
            real, functions = kind(int(functions[k])), functions.copy()
            functions[k] = ctypes.cast(stub, ctypes.c_void_p).value
            return serve(functions, *rest)

        real, stub = None, kind(call)
        monkeypatch.setattr(service, "serve", lambda: serve_badly)
        made.append(ProgressThread(MPI.COMM_SELF))
        return made[-1], raised

    yield make
    for thread in made:
        thread.stop()


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(("name", "n_good"), [*((name, 0) for name in SERVED), ("MPI_Irecv", 1)])
def test_an_mpi_error_ends_the_service_and_is_raised(failing, name, n_good):
    from mpi4py import MPI

    thread, raised = failing(name, n_good)
    there, here, none = np.ones(8), np.zeros(8), np.zeros(0)
    thread.fetch(0, (there.ctypes.data, 0), (here, none))
    thread._thread.join(20.0)
    assert not thread._thread.is_alive()
    assert raised == [f"this rank can no longer serve other nodes: {MPI.Exception(MPI.ERR_OTHER)}"]


@pytest.mark.ranks(1, 2)
def test_a_watched_request_raises_the_error_of_the_service(failing):
    from mpi4py import MPI

    from mpitrain.collectives.world.background import Background

    thread, _ = failing("MPI_Isend", 0)
    there, here, none, locked = np.ones(8), np.zeros(8), np.zeros(0), np.ones(1, np.int64)
    waits = thread.fetch(0, (there.ctypes.data, 0), (here, none), (locked.ctypes.data, 2))
    time.sleep(0.2)  # the request has arrived, and no other will
    shared, background = thread._mpi.shared, Background(threads=True)
    shared[service.TRUSTED] = 1
    started = background.start(waits.wait)
    while shared[service.OUTCOME] != service.WATCHING:
        time.sleep(0.001)
    thread.fetch(0, (there.ctypes.data, 0), (here.copy(), none))
    with pytest.raises(MPI.Exception):
        started.wait()
    background.stop()


class Survivors(FaultTolerance):
    """A fault tolerance of ranks that survive; the test says who is dead."""

    survives_failures = True

    def __init__(self, comm):
        super().__init__(comm)
        self.dead_words = np.zeros(8, np.int64)


@pytest.fixture
def survivor():
    """Return a thread that serves this rank alone and knows the deaths of others, and its fault tolerance."""
    from mpi4py import MPI

    from mpitrain.collectives.world.progress import ProgressThread

    survivors = Survivors(MPI.COMM_SELF)
    thread = ProgressThread(MPI.COMM_SELF, survivors)
    yield thread, survivors
    thread.stop()


def polled(transfer, n=300):
    return any(transfer.granted() for _ in range(n))


@pytest.mark.ranks(1, 2)
def test_a_request_gets_the_lock_of_a_rank_once_that_is_dead(survivor):
    thread, survivors = survivor
    there, here, none = np.arange(8.0), np.zeros(8), np.zeros(0)
    word = np.array([7 << OWNER_BITS | 5])  # rank 4 has it
    transfer = thread.fetch(0, (there.ctypes.data, 0), (here, none), (word.ctypes.data, 1))
    assert not polled(transfer)
    survivors.dead_words[4] = 1
    deadline = time.monotonic() + 60.0
    while not transfer.granted():
        assert time.monotonic() < deadline
    assert transfer.wait() == 7 << OWNER_BITS
    assert np.array_equal(here, there)
    assert word[0] == 7 << OWNER_BITS | 1


@pytest.mark.ranks(1, 2)
def test_a_rank_takes_its_own_lock_again_only_if_it_says_that_the_answer_was_lost(survivor):
    thread, _ = survivor
    there, here, none = np.arange(8.0), np.zeros(8), np.zeros(0)
    word = np.array([7 << OWNER_BITS | 1])
    arguments = 0, (there.ctypes.data, 0), (here, none), (word.ctypes.data, 1)
    waits = thread.fetch(*arguments)
    assert not polled(waits)
    assert thread.fetch(*arguments, retakes=True).wait() == 7 << OWNER_BITS
    word[0] = 8 << OWNER_BITS
    assert waits.wait() == 8 << OWNER_BITS


@pytest.mark.ranks(1, 2)
def test_values_are_stored_without_a_lock(survivor):
    thread, _ = survivor
    there, values, none = np.zeros(8), np.arange(8.0), np.zeros(0)
    assert thread.store(0, (there.ctypes.data, 0), (values, none), (0, 0, 0)).wait() == 0
    assert np.array_equal(there, values)
