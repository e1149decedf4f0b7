"""A rank that computes or sleeps does not stop the exchange of another: the order of events says so, not their time."""

import time

import numpy as np
import pytest

BUSY_SECONDS = 1.0  # an exchange takes milliseconds


def sleep(until):
    time.sleep(max(until - time.monotonic(), 0))


def compute(until):
    a = np.ones((300, 300))
    while time.monotonic() < until:
        a @ a


def interpret(until):
    while time.monotonic() < until:
        sum(range(1000))


@pytest.fixture
def comm(two_nodes):
    from mpitrain.collectives.mpi import MPICommunicator

    communicator = MPICommunicator(two_nodes)
    yield communicator
    two_nodes.comm.Barrier()
    communicator.free()


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("work", [sleep, compute, interpret])
def test_an_exchange_with_a_busy_rank_ends_before_its_work(comm, work):
    boxes = comm.mailboxes(10_000, np.float32)
    busy = comm.size - 1  # on the other node than rank 0
    comm.barrier()
    ended = 0.0
    if comm.rank == 0:
        for _ in range(5):
            boxes.update(busy, lambda box, tags: None)
        ended = time.monotonic()
    elif comm.rank == busy:
        work(time.monotonic() + BUSY_SECONDS)
        ended = time.monotonic()
    else:
        sleep(time.monotonic() + BUSY_SECONDS)
    times = comm.gather([ended])[:, 0]
    assert times[0] < times[busy]


@pytest.mark.ranks(1, 2, 3, 4, 5)
def test_a_progress_thread_runs_between_nodes_only_and_stops(one_node, two_nodes):
    from mpitrain.collectives.progress import ProgressThread

    assert one_node._progress is None
    assert (two_nodes._progress is not None) == (two_nodes.n_nodes > 1)
    thread = ProgressThread(one_node.comm)
    assert thread._thread.is_alive()
    thread.stop()
    thread.stop()
    assert not thread._thread.is_alive()


@pytest.mark.ranks(2, 4)
def test_a_worker_begins_with_the_shards_of_another_node(comm, two_nodes):
    vector = comm.shared_vector(1024 * comm.size, np.float32)
    visited = []
    vector.update(lambda part, c: visited.append(part))
    firsts = [int(row[0]) for row in comm.gather([float(visited[0].start // 1024)])]
    assert sorted(firsts) == list(range(comm.size))  # no two with the same
    assert all(two_nodes.nodes[home] != two_nodes.nodes[rank] for rank, home in enumerate(firsts))
    assert sorted(part.start for part in visited) == sorted(part.start for part in vector.parts)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("thread", ["foreground", "background"])
def test_many_blocks_of_another_node_under_way_meet_and_none_is_lost(comm, thread):
    from mpitrain.collectives.background import Background
    from mpitrain.collectives.mpi import LARGEST_SERVED_SHARD

    vector = comm.shared_vector(5 * LARGEST_SERVED_SHARD // 2 * comm.size, np.float32)  # three blocks at each
    n_visits = 4
    background = Background(threads=thread == "background")

    def visit():
        for _ in range(n_visits):
            vector.update(lambda part, c: np.add(c, 1, out=c) is None)

    background.start(visit).finish()
    background.stop()
    comm.barrier()
    out = np.empty(vector.n, np.float32)
    vector.read(out)
    assert np.array_equal(out, np.full_like(out, n_visits * comm.size))
