"""Synchronous methods after a death: from the exchange that failed on, the survivors are p' workers of their own."""

import json

import numpy as np
import pytest
from support.dying_workers import die_after, survivable, tear
from support.quadratic import load, same_bits, simulate, slope, states
from support.variants import variants

from mpitrain import DPSGD, EASGD, AllReduceSGD, LocalSGD, SlowMo, StochasticGradientPush, UsageError
from mpitrain.algorithms import METHODS, create
from mpitrain.algorithms.base.surviving import check_on_failure
from mpitrain.algorithms.gossip.neighbours import RECEIVED

P, VICTIM, N = 4, 1, 12
SURVIVORS = [rank for rank in range(P) if rank != VICTIM]
STARTS = np.random.default_rng(0).normal(size=N) * np.ones((P, 1))
H, B = np.array([0.5, 1.0, 2.0, 0.8]), np.array([1.0, -2.0, 0.5, 3.0])
ETA = 0.1


def can_continue(method):
    try:
        check_on_failure("continue", method)
    except UsageError:
        return False
    return method.is_synchronous


ALL = [(name, method) for name, method in variants() if can_continue(method)]
every = pytest.mark.parametrize("method", [pytest.param(method, id=name) for name, method in ALL])


def run_of(method, ranks, start=STARTS):
    gradient = slope(H[ranks], B[ranks])
    return simulate(method, len(ranks), start=start[ranks], eta=ETA, gradient=gradient)


def expected_start(method, of_all, simulation):
    """Return the states of the survivors as those of p' workers: each keeps its own, and what was shared is lost."""
    fresh, found = states(simulation), []
    for state, new in zip([of_all[rank] for rank in SURVIVORS], fresh, strict=True):
        kept = dict(state)
        if "push_weight" in kept:
            kept["push_weight"], kept["shown"] = 1.0, np.ones(1)
        if "posted" in kept:  # every message has been received
            kept["due"], kept["message_tags"] = json.dumps([]), new["message_tags"].copy()
            kept["message_tags"][:, RECEIVED] = kept["t"]
        if "aggregate" in kept:  # a slice of a vector, and the slices are others
            kept["aggregate"] = new["aggregate"]
        if "good" in kept:
            kept |= {name: new[name] for name in new if name.startswith(("long_", "short_"))}
            kept["good"], kept["removed_at"] = kept["good"][SURVIVORS], kept["removed_at"][SURVIVORS]
        if "best" in kept:
            kept["best"] = SURVIVORS.index(kept["best"]) if kept["best"] in SURVIVORS else 0
        found.append(kept)
    return found


@every
@pytest.mark.parametrize("step", [3, 4])
def test_after_a_death_the_trajectory_is_that_of_the_survivors_alone_to_the_last_bit(method, step):
    alone = run_of(method, SURVIVORS)
    load(alone, expected_start(method, states(run_of(method, list(range(P))).run(step)), alone))
    expected = alone.run(7).finalize()

    simulation = survivable(run_of(method, list(range(P))))
    simulation.run(step + 7, die_after(VICTIM, step)).finalize()
    assert same_bits(simulation.x()[SURVIVORS], expected.x())
    for number, rank in enumerate(SURVIVORS):
        assert same_bits(simulation.consensus(rank), expected.consensus(number))
        assert simulation.workers[rank].t == step + 7
        assert list(simulation.workers[rank]._group.members) == SURVIVORS


@every
def test_without_a_death_the_trajectory_does_not_change(method):
    plain = run_of(method, list(range(P))).run(9).finalize()
    simulation = survivable(run_of(method, list(range(P)))).run(9).finalize()
    assert same_bits(simulation.x(), plain.x())
    assert [dict(worker.state()).keys() for worker in simulation.workers] == [
        dict(worker.state()).keys() for worker in plain.workers
    ]


@pytest.mark.parametrize(
    ("method", "call", "period"),
    [
        pytest.param(AllReduceSGD(), 5, 1, id="allreduce"),
        pytest.param(LocalSGD(period=4), 2, 4, id="localsgd"),
        pytest.param(SlowMo(period=4), 2, 4, id="slowmo"),
    ],
)
def test_an_exchange_that_only_some_have_finished_is_repeated_by_all(method, call, period):
    before = (call - 1) * period  # whole exchanges
    alone = run_of(method, SURVIVORS)
    load(alone, expected_start(method, states(run_of(method, list(range(P))).run(before)), alone))
    expected = alone.run(8)

    simulation = survivable(run_of(method, list(range(P))))
    tear(simulation, VICTIM, call)
    simulation.run(before + 8)
    assert same_bits(simulation.x()[SURVIVORS], expected.x())


def test_all_reduce_uses_the_mean_of_the_living_with_the_same_rate():
    step, x = 4, STARTS[0].copy()
    for t in range(10):
        living = range(P) if t < step else SURVIVORS
        x = x - ETA * np.mean([H[i] * (x - B[i]) for i in living], axis=0)
    simulation = survivable(run_of(AllReduceSGD(), list(range(P)))).run(10, die_after(VICTIM, step))
    np.testing.assert_allclose(simulation.x()[SURVIVORS], np.tile(x, (P - 1, 1)), rtol=1e-12)


def test_the_ring_of_dpsgd_closes_around_the_dead():
    step, x = 4, STARTS.copy()
    for t in range(10):
        living = np.arange(P) if t < step else np.array(SURVIVORS)
        gradients = H[living, None] * (x[living] - B[living, None])
        k = len(living)  # Metropolis weights: 1/(1 + degree) = 1/3 for each neighbour in rings of 3 and 4
        mixing = np.array([[1 / 3 if (i - j) % k in (0, 1, k - 1) else 0.0 for j in range(k)] for i in range(k)])
        x[living] = mixing @ x[living] - ETA * gradients
    simulation = survivable(run_of(DPSGD(), list(range(P)))).run(10, die_after(VICTIM, step))
    np.testing.assert_allclose(simulation.x()[SURVIVORS], x[SURVIVORS], rtol=1e-12)


def test_the_push_weights_of_the_survivors_begin_at_1():
    simulation = survivable(run_of(StochasticGradientPush(overlap=1), list(range(P)))).run(12, die_after(VICTIM, 5))
    simulation.finalize()
    weights = [simulation.workers[rank].metrics()["push_weight"] for rank in SURVIVORS]
    assert sum(weights) == pytest.approx(len(SURVIVORS))


def test_two_deaths_leave_two_workers():
    method = LocalSGD(period=2)
    simulation = survivable(run_of(method, list(range(P))))
    first, second = die_after(1, 3), die_after(0, 6)
    simulation.run(12, lambda *at: (first(*at), second(*at)))
    assert list(simulation.workers[3]._group.members) == [2, 3]
    assert same_bits(simulation.workers[2].x.local, simulation.workers[3].x.local)


@pytest.mark.parametrize(
    ("method", "more", "reason"),
    [
        (EASGD(synchronous=True), {}, "keeps a part of the center at each rank"),
        (create("admm", {"mode": "sync"}), {}, "keeps a part of the center at each rank"),
        (AllReduceSGD(overlap=True), {}, "overlap sums gradients during the backward pass"),
        (AllReduceSGD(node_shared=True), {}, "half updated"),
        (AllReduceSGD(), {"replica_size": 2}, "a replica group needs each of its ranks"),
        (AllReduceSGD(), {"has_average": True}, "the average of the iterates is shared by all ranks"),
    ],
    ids=["easgd", "admm", "overlap", "node_shared", "replica_size", "average"],
)
def test_methods_that_need_each_rank_refuse_to_continue(method, more, reason):
    check_on_failure("stop", method, **more)
    with pytest.raises(UsageError, match=reason):
        check_on_failure("continue", method, **more)


def test_an_unknown_word_is_refused():
    with pytest.raises(UsageError, match="on_failure must be stop or continue, not 'go on'"):
        check_on_failure("go on", AllReduceSGD())


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_that_wait_by_default_can_all_continue(name):
    method = METHODS[name]()
    check_on_failure("continue", method)
    assert not method.is_synchronous or method.can_lose_workers
