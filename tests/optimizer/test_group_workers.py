"""The head of a replica group and the other members, as workers, without MPI."""

import math
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from mpitrain.algorithms.base.replica import Replica
from mpitrain.algorithms.base.worker import Worker
from mpitrain.optimizer.replica_group import ConsensusServer, GroupHead, GroupMember, GroupVectors


class Vector:
    """(3,) zeros."""

    def __init__(self):
        self.local = np.zeros(3)

    def sync(self):
        pass


class Members:
    """The communicator of a group whose other member has the gradient 10, the loss 6 and no parameters."""

    def __init__(self, busy):
        self._busy = busy
        self.statistics = SimpleNamespace(bytes_sent=0)
        self.was_locked = []

    def allreduce(self, vector, *, mean):
        assert mean
        self.was_locked.append(self._busy.locked())
        vector.local[...] = (vector.local + 10) / 2

    def gather(self, values):
        return np.array([values, [6.0]])

    def barrier(self):
        self.was_locked.append(self._busy.locked())

    def read(self, vector, peer, fn):
        assert peer == 0
        fn(np.full(3, 8.0))


class Recorder(Worker):
    """The method's worker: records its calls, and whether the lock is held during them."""

    def __init__(self, replica, busy):
        super().__init__(replica)
        self._busy, self.calls = busy, []

    def _record(self, name):
        self.calls.append((name, self._busy.locked()))

    def step(self, group_slices, local_update, loss=None, *, skips=False, is_combined=False):
        self._record("step")
        self.seen = self.g.local.copy(), loss
        self.x.local[...] = 5
        return True

    def consensus(self, out):
        self._record("consensus")
        out[...] = 2

    def wait(self):
        self._record("wait")

    def finalize(self, group_slices=()):
        self._record("finalize")
        self.x.local[...] = 6

    def metrics(self):
        return {"leads": 1.0}

    def state(self):
        self._record("state")
        yield "t", 4

    def load(self, state):
        self._record("load")


@pytest.fixture
def head():
    """A head, its worker, its lock, and the vectors that the members share."""
    busy = threading.Lock()
    worker = Recorder(Replica(SimpleNamespace(), Vector(), Vector()), busy)
    shared = GroupVectors(Members(busy), Vector(), Vector())
    return SimpleNamespace(worker=worker, busy=busy, shared=shared, head=GroupHead(worker, shared, busy))


def test_a_head_makes_the_step_with_the_mean_gradient_and_the_mean_loss(head):
    head.worker.g.local[...] = 2
    assert head.head.step([], None, 2.0)
    gradient, loss = head.worker.seen
    assert gradient.tolist() == [6, 6, 6]
    assert loss == 4
    assert head.shared.x.local.tolist() == [5, 5, 5]
    head.head.finalize()
    assert head.shared.x.local.tolist() == [6, 6, 6]


def test_the_worker_is_locked_while_it_is_used_and_not_while_the_members_exchange(head):
    head.head.step([], None, None)
    head.head.consensus(np.zeros(3))
    head.head.wait()
    head.head.finalize()
    assert dict(head.head.state()) == {"t": 4}
    head.head.load({})
    names = ("step", "consensus", "wait", "finalize", "state", "load")
    assert head.worker.calls == [(name, True) for name in names]
    assert head.shared.comm.was_locked == [False] * 3  # gradients, parameters, parameters
    assert not head.busy.locked()


def test_a_head_has_the_metrics_of_its_worker(head):
    assert head.head.metrics() == {"leads": 1.0}


def test_a_member_contributes_its_gradient_and_receives_parameters():
    comm = Members(threading.Lock())
    shared = GroupVectors(comm, Vector(), Vector())
    member = GroupMember(shared, ("leads",))
    shared.g.local[...] = 4
    assert not member.step([], None, 1.0)
    assert shared.g.local.tolist() == [7, 7, 7]
    assert shared.x.local.tolist() == [8, 8, 8]
    assert comm.statistics.bytes_sent == 24
    member.finalize()
    assert comm.statistics.bytes_sent == 48


def test_a_member_has_no_state_and_no_numbers():
    member = GroupMember(GroupVectors(Members(threading.Lock()), Vector(), Vector()), ("leads",))
    assert list(member.state()) == []
    member.load({})
    member.wait()
    assert math.isnan(member.metrics()["leads"])


class Requests:
    """MPI's view of a group of two whose member asks once."""

    def __init__(self):
        self.asked, self.sent = threading.Event(), threading.Event()
        self.asked.set()

    def Iprobe(self, member, tag):
        return self.asked.is_set()

    def Recv(self, buffer, member, tag):
        self.asked.clear()

    def Send(self, buffer, member, tag):
        self.answer = buffer.view(np.float64).copy()
        self.sent.set()


def test_the_server_answers_with_the_lock_held_and_waits_for_it():
    busy, comm, was_locked = threading.Lock(), Requests(), []

    def answer(vector):
        was_locked.append(busy.locked())
        vector[...] = 3

    with busy:
        server = ConsensusServer(
            SimpleNamespace(comm=comm, size=2, translated_errors=nullcontext), np.zeros(2), answer, busy
        )
        assert not comm.sent.wait(0.05)
        assert was_locked == []
    assert comm.sent.wait(30)
    assert was_locked == [True]
    assert comm.answer.tolist() == [3, 3]
    server.stop()
    server.stop()  # does nothing
