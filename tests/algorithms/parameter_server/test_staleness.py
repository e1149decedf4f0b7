"""Staleness: the number of other commits between a worker's pull and its own commit, and its effect.

Hermans, CERN-THESIS-2017-103, chapter 4; Mitliagkas, Zhang, Hadjis, Re 2016, Asynchrony begets momentum.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parameter_server import OnRank
from support.quadratic import load, simulate, states, statistics

from mpitrain.algorithms import ADAG, AGN, Downpour, DynSGD, MDownpour
from mpitrain.simulation.schedules import RandomOrder, RoundRobin, Scripted, VirtualTime

METHODS = [Downpour(), AGN(period=1), ADAG(period=1), DynSGD(period=1), MDownpour()]


def found_by(method, p, schedule, steps):
    """Return the staleness of every commit, in order, and the lags at the end."""
    found = []
    simulation = simulate(method, p, start=np.zeros(10), eta=0.1, schedule=schedule)
    simulation.run(steps, lambda s, rank: found.append(int(s.workers[rank].metrics()["staleness"])))
    return found, [int(worker_lags) for worker in simulation.workers for worker_lags in dict(worker.state())["lags"]]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("p", [1, 2, 5])
def test_in_turn_it_is_that_of_the_others(method, p):
    found, _ = found_by(method, p, RoundRobin(), 11)
    assert found[:p] == list(range(p))  # all have pulled the beginning
    assert set(found[p:]) == {p - 1}


def test_histograms_count_every_commit():
    p, steps = 5, 11
    simulation = simulate(Downpour(), p, start=np.zeros(10), eta=0.1, schedule=RoundRobin()).run(steps)
    for rank, histogram in enumerate(statistics(simulation, "staleness")):
        wanted = np.zeros(33, int)
        wanted[p - 1] += steps - 1
        wanted[rank] += 1
        assert histogram.tolist() == wanted.tolist()


@given(st.integers(1, 6), st.data())
def test_staleness_adds_up_to_the_commits_of_the_others(p, data):
    """Each commit ages the pulls of p-1 others by one; their next commit counts it, or the lags at the end do."""
    script = data.draw(st.lists(st.integers(0, p - 1), max_size=80))
    found, left = found_by(Downpour(), p, Scripted(script), 10**6)
    assert len(found) == len(script)
    assert sum(found) + sum(left) == (p - 1) * len(script)


def ending(schedule, n):
    """Return the schedule cut after ``n`` choices, so that no worker continues alone when the others have finished."""
    choose, chosen = schedule.choose, itertools.count()
    schedule.choose = lambda ready: choose(ready) if next(chosen) < n else None
    return schedule


@pytest.mark.parametrize("p", [2, 10, 30])
@pytest.mark.parametrize("speeds", ["random", "one to three", "one straggler"])
def test_mean_staleness_is_p_minus_1_at_any_speeds(p, speeds):
    schedule = {
        "random": RandomOrder(p),
        "one to three": VirtualTime(np.linspace(1, 3, p)),
        "one straggler": VirtualTime([20] + [1] * (p - 1)),
    }[speeds]
    found, left = found_by(Downpour(), p, ending(schedule, 150 * p), 10**6)
    assert len(found) == 150 * p
    # The law above: what is left at the end is all that the mean can lack.
    assert np.mean(found) == pytest.approx(p - 1 - sum(left) / len(found), abs=1e-12)
    assert np.mean(found) == pytest.approx(p - 1, rel=0.1 if speeds == "one straggler" else 0.02)


def test_in_random_order_it_is_geometric():
    p, steps = 5, 4000
    found = np.array(found_by(Downpour(), p, RandomOrder(0), steps)[0][p * 20 :])
    for k in range(12):
        q = (1 / p) * (1 - 1 / p) ** k
        # Neighbouring commits are almost independent: the width is that of independent ones, and a half.
        assert np.mean(found == k) == pytest.approx(q, abs=6 * np.sqrt(q * (1 - q) / found.size))


@pytest.mark.parametrize(("p", "n_steps"), [(1, 5), (2, 8), (3, 5)])
def test_asynchrony_is_momentum(p, n_steps):
    """E c_{t+1} - E c_t = (1-1/p)(E c_t - E c_{t-1}) - (eh/p) E c_t, the mean over all orders in which p can come.

    Each commit is equally likely to be that of any worker. Then the staleness is geometric, P(l) = (1/p)(1-1/p)^l,
    except that no pull is older than the start.
    """
    eh, total = 0.3, np.zeros(n_steps + 1)
    for script in itertools.product(range(p), repeat=n_steps):
        centers = [1.0]
        simulate(Downpour(), p, start=np.ones(1), eta=eh, schedule=Scripted(script)).run(
            10**6, lambda s, rank, centers=centers: centers.append(s.consensus()[0])
        )
        total += centers
    c = total / p**n_steps
    assert c[1] == pytest.approx(1 - eh)
    change = np.diff(c)
    np.testing.assert_allclose(change[1:], (1 - 1 / p) * change[:-1] - eh / p * c[1:-1], rtol=0, atol=1e-14)


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(0, 2**16), st.integers(0, 8))
def test_age_of_a_pull_survives_a_checkpoint(p, seed, before):
    whole = simulate(DynSGD(period=1), p, start=np.ones(40), eta=0.1, schedule=RandomOrder(seed), largest_shard=8)
    whole.run(before)
    resumed = simulate(DynSGD(period=1), p, start=np.zeros(40), eta=0.1, schedule=RandomOrder(1), largest_shard=8)
    load(resumed, states(whole))
    for one, other in zip(whole.workers, resumed.workers, strict=True):
        assert np.array_equal(dict(one.state())["lags"], dict(other.state())["lags"])
    for simulation in (whole, resumed):
        simulation.world.schedule = RandomOrder(seed + 1)
        simulation.run(5)
    assert np.array_equal(whole.x(), resumed.x())


@pytest.mark.ranks(3)
@pytest.mark.parametrize("method", [Downpour(), DynSGD(period=2), ADAG(period=3)], ids=lambda method: method.name)
def test_staleness_between_ranks_adds_up_to_the_commits_of_the_others(world, method):
    with OnRank(world, method, np.zeros(1000), eta=0.1) as rank:
        worker, visit = rank.worker, rank.worker.visit
        shard_of = {part.start: k for k, part in enumerate(worker._center.parts)}
        found = np.zeros(len(shard_of))

        def note(part, c):
            found[shard_of[part.start]] += worker._center.staleness
            return visit(part, c)

        worker.visit = note
        n_commits = 10 + 5 * world.rank
        for _ in range(n_commits * method.period):
            rank.step(np.ones(1000))
        world.barrier()
        total = world.comm.allreduce(found + dict(worker.state())["lags"])
        assert total.tolist() == [(world.size - 1) * world.comm.allreduce(n_commits)] * len(shard_of)
