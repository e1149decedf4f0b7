"""The boundary around an exchange: copies, streams and clock, in their order."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mpitrain import EASGD, AllReduceSGD, DistributedOptimizer
from mpitrain.optimizer import exchange
from mpitrain.optimizer.exchange import ExchangeBoundary


class Recorder:
    """Stands for the flat parameters and for a GPU, and records what they are told."""

    compute_stream = 7

    def __init__(self):
        self.events = []

    def to_host(self):
        self.events.append("to_host")

    def to_device(self):
        self.events.append("to_device")

    @contextmanager
    def exchanging(self, compute):
        self.events.append(f"exchange after {compute}")
        yield
        self.events.append("exchange ends")

    @contextmanager
    def computing(self, compute):
        self.events.append(f"{compute} after exchange")
        yield
        self.events.append("computing ends")


@pytest.fixture
def seconds(monkeypatch):
    """A clock that moves by ``seconds.pass_(n)`` only. Half of the time is CPU time."""
    clock = SimpleNamespace(now=100.0)
    clock.pass_ = lambda n: setattr(clock, "now", clock.now + n)
    times = SimpleNamespace(perf_counter=lambda: clock.now, thread_time=lambda: clock.now / 2)
    monkeypatch.setattr(exchange, "time", times)
    return clock


def test_vectors_cross_and_streams_follow_each_other():
    recorder = Recorder()
    boundary = ExchangeBoundary(recorder, recorder)
    with boundary.exchanging(copies=True):
        recorder.events.append("before_update")
        with boundary.computing():
            recorder.events.append("local update")
        recorder.events.append("after_update")
    assert recorder.events == [
        *("to_host", "exchange after 7", "before_update"),
        *("to_device", "7 after exchange", "local update", "computing ends", "to_host"),
        *("after_update", "exchange ends", "to_device"),
    ]


def test_an_exchange_that_only_reads_copies_nothing():
    recorder = Recorder()
    with ExchangeBoundary(recorder, recorder).exchanging():
        pass
    assert recorder.events == ["exchange after 7", "exchange ends"]


def test_without_a_gpu_there_are_only_the_copies():
    recorder = Recorder()
    boundary = ExchangeBoundary(recorder, None)
    with boundary.exchanging(copies=True), boundary.computing():
        pass
    assert recorder.events == ["to_host", "to_device", "to_host", "to_device"]


def test_an_exchange_that_fails_does_not_overwrite_the_model():
    recorder = Recorder()
    with pytest.raises(KeyError), ExchangeBoundary(recorder, None).exchanging(copies=True):
        raise KeyError
    assert recorder.events == ["to_host"]


def test_the_clock_runs_in_exchanges_that_count_and_not_in_the_local_update(seconds):
    boundary = ExchangeBoundary(Recorder(), None)
    for _ in range(2):
        with boundary.exchanging(counts=True):
            seconds.pass_(3)
            with boundary.computing():
                seconds.pass_(50)
            seconds.pass_(4)
        seconds.pass_(1000)
        with boundary.exchanging():
            seconds.pass_(200)
    assert (boundary.clock.seconds, boundary.clock.cpu_seconds) == (14, 7)


def test_the_clock_is_right_after_an_exchange_that_fails(seconds):
    boundary = ExchangeBoundary(Recorder(), None)

    def exchange_and_fail():
        with boundary.exchanging(counts=True):
            seconds.pass_(3)
            with boundary.computing():
                seconds.pass_(50)
                raise KeyError

    with pytest.raises(KeyError):
        exchange_and_fail()
    assert boundary.clock.seconds == 3


class Slow(torch.optim.SGD):
    """A local update of 50 seconds."""

    @torch.no_grad()
    def step(self, closure=None):
        self.pass_(50)
        super().step()


@pytest.mark.ranks(1, 2)
@pytest.mark.time_limit(180)
@pytest.mark.parametrize(("method", "early"), [(EASGD(period=1), 0), (AllReduceSGD(overlap=True), 5)])
def test_exchange_seconds_are_those_of_step_without_the_local_update(world, seconds, method, early):
    def lasting(method, n):
        def call(*args):
            seconds.pass_(n)
            return method(*args)

        return call

    model = nn.Linear(3, 2)
    base = Slow(model.parameters(), lr=0.1)
    base.pass_ = seconds.pass_
    with DistributedOptimizer(base, model, method) as optimizer:
        worker = optimizer._parts.replica.worker
        for name, n in {"before_update": 3, "after_update": 4, "consensus": 200, "wait": 300, "finalize": 400}.items():
            setattr(worker, name, lasting(getattr(worker, name), n))
        worker.gradient_complete = lasting(worker.gradient_complete, 5)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            seconds.pass_(1000)
            optimizer.step()
        world.barrier()
        optimizer.consensus_vector()
        optimizer.wait()
        optimizer.finalize()
        assert optimizer.exchange_seconds == 2 * (3 + 4 + early)
        optimizer.exchange_seconds = 0.5  # of a run that is continued
        world.barrier()
    assert optimizer.exchange_seconds == 0.5
