"""LSGD against its theory on quadratics and in the double well, and against the rule of its exchanges under any script.

The numbers of the double well and the follower's factor are those of the theory's order, grad_point="pre", where pull
and gradient are taken at the same point; for the algorithm's order the formulas are derived anew.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.quadratic import change, same_bits, simulate, slope, states, statistics
from torch import nn

from mpitrain import EASGD, LSGD, DistributedOptimizer, UsageError
from mpitrain.algorithms.leader.asynchronous import LOSS, STAMP
from mpitrain.simulation.communicator import SimulatedCommunicator
from mpitrain.simulation.schedules import RandomOrder, RoundRobin, Scripted, VirtualTime

STARTS = np.random.default_rng(0).normal(size=(5, 6))
SIDES = pytest.mark.parametrize("grad_point", ["pre", "post"])
TIMINGS = pytest.mark.parametrize("synchronous", [True, False])


def quadratic_loss(rank, x):
    return 0.5 * float(x @ x)


def by_rank(rank, x):
    """Worker 0 leads."""
    return float(rank)


def lsgd(loss, **arguments):
    simulation = simulate(arguments.pop("method"), arguments.pop("p"), **arguments)
    simulation.loss = loss
    return simulation


def one_group(**settings):
    """Return LSGD with a single group."""
    return LSGD(**{"period": 1, "global_pull": 0.0, "synchronous": True, **settings})


# ---- the leader and the followers ------------------------------------------------------------------------------------


@SIDES
@TIMINGS
@pytest.mark.parametrize("continuous", [True, False])
def test_a_leader_steps_as_if_it_were_alone(grad_point, synchronous, continuous):
    method = LSGD(period=2, grad_point=grad_point, synchronous=synchronous, continuous_pull=continuous)
    start = np.array([[2.0] * 6, [0.1] * 6, [-3.0] * 6])
    run_on_survivors = lsgd(lambda rank, x: [1.0, 0.5, 2.0][rank], method=method, p=3, start=start, eta=0.1).run(30)
    alone = simulate(method, 1, start=start[1], eta=0.1).run(30)
    assert same_bits(run_on_survivors.x()[1], alone.x()[0])
    assert [worker.metrics()["leader"] for worker in run_on_survivors.workers] == [1, 1, 1]
    assert [worker.metrics()["leads"] > 0 for worker in run_on_survivors.workers] == [False, True, False]
    assert np.abs(run_on_survivors.x()[0] - 0.9**30 * 2).max() > 0.01  # and the others are pulled


@given(st.floats(0, 2), st.floats(0, 1), st.sampled_from(["pre", "post"]))
def test_the_distance_to_the_leader_shrinks_by_its_factor(eh, lam, grad_point):
    method = one_group(pull=lam, grad_point=grad_point)
    simulation = lsgd(by_rank, method=method, p=2, start=[[0.3], [1.3]], eta=eh)
    factor = 1 - eh - lam if grad_point == "pre" else (1 - eh) * (1 - lam)
    distance = 1.0
    for _ in range(5):
        simulation.run(1)
        distance *= factor
        leader, follower = simulation.x()[:, 0]
        assert follower - leader == pytest.approx(distance, abs=1e-12)


@pytest.mark.parametrize(("eh", "lam", "stable"), [(1.2, 0.79, True), (1.2, 0.81, False), (1.0, 1.0, None)])
def test_a_follower_is_stable_below_two(eh, lam, stable):
    simulation = lsgd(by_rank, method=one_group(pull=lam, grad_point="pre"), p=2, start=[[0.0], [1.0]], eta=eh).run(
        2000
    )
    distance = abs(float(simulation.x()[1, 0]))
    assert distance == 1.0 if stable is None else (distance < 1e-7) == stable


@settings(max_examples=30)
@given(st.integers(0, 2**16), st.floats(0.01, 1.9), st.floats(0, 1), st.sampled_from(["pre", "post"]))
def test_the_leaders_value_never_rises(seed, step, lam, grad_point):
    rng = np.random.default_rng(seed)
    h = np.append(rng.uniform(0.05, 1, 3), 1.0)  # L = 1, and eta < 2/L

    def loss(rank, x):
        return 0.5 * float(h @ (x * x))

    method = one_group(pull=lam, grad_point=grad_point)
    simulation = lsgd(loss, method=method, p=4, start=rng.normal(size=(4, 4)), eta=step, gradient=lambda r, x: h * x)
    before = math.inf
    for _ in range(20):
        best = min(loss(0, x) for x in simulation.x())
        assert best <= before
        simulation.run(1)
        before = best


@given(st.permutations(range(5)), st.sampled_from(["pre", "post"]))
def test_permuting_the_workers_permutes_the_result(order, grad_point):
    method = LSGD(period=2, synchronous=True, grad_point=grad_point)
    order = list(order)
    plain = lsgd(quadratic_loss, method=method, p=5, start=STARTS, eta=0.1).run(9)
    renamed = lsgd(quadratic_loss, method=method, p=5, start=STARTS[order], eta=0.1).run(9)
    assert same_bits(renamed.x(), plain.x()[order])


@TIMINGS
def test_among_equal_losses_the_lowest_rank_leads(synchronous):
    method = one_group(synchronous=synchronous, pull=1.0)
    end = lsgd(lambda rank, x: [2.0, 1.0, 1.0][rank], method=method, p=3, start=[[0.0], [1.0], [2.0]], eta=0.0).run(6)
    assert [worker.metrics()["leader"] for worker in end.workers] == [1, 1, 1]
    assert end.x()[:, 0].tolist() == [1, 1, 1]


@TIMINGS
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_loss_that_is_not_finite_never_leads(synchronous, bad):
    method = LSGD(period=2, synchronous=synchronous)
    start = [[0.0], [1.0], [2.0]]
    end = lsgd(lambda rank, x: [5.0, bad, 6.0][rank], method=method, p=3, start=start, eta=0.0).run(12)
    assert [worker.metrics()["leader"] for worker in end.workers] == [0, 0, 0]
    end = lsgd(lambda rank, x: bad, method=method, p=3, start=start, eta=0.0).run(12)
    assert [worker.metrics()["leader"] for worker in end.workers] == [-1, -1, -1]
    assert end.x()[:, 0].tolist() == [0, 1, 2]


@TIMINGS
def test_a_lucky_batch_does_not_lead(synchronous):
    losses = {0: [1, 1, 1, 9], 1: [5, 5, 5, 0]}  # means 3 and 3.75; the last alone would say 1
    drawn = {rank: iter(values) for rank, values in losses.items()}
    method = one_group(period=4, synchronous=synchronous)
    simulation = lsgd(lambda rank, x: next(drawn[rank]), method=method, p=2, start=[[0.0], [1.0]], eta=0.0).run(4)
    if not synchronous:
        drawn.update({rank: iter([3.0]) for rank in losses})
        simulation.run(1)  # the first of the two saw the other's publication only now
    assert {worker.metrics()["leader"] for worker in simulation.workers} == {0}


def test_workers_are_ranked_by_the_loss_of_the_last_period():
    # A worker that was bad long ago leads once a whole period was good.
    values = {0: [1.0] * 8, 1: [100.0] * 4 + [0.5] * 4}
    drawn = {rank: iter(v) for rank, v in values.items()}
    simulation = lsgd(lambda rank, x: next(drawn[rank]), method=one_group(period=4), p=2, start=[[0.0], [1.0]], eta=0.0)
    assert [worker.metrics()["leader"] for worker in simulation.run(4).workers] == [0, 0]
    assert [worker.metrics()["leader"] for worker in simulation.run(4).workers] == [1, 1]


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.4])
def test_a_step_lowers_the_value_as_far_as_the_posters_bound(lam):
    # E f(x') - f* <= (1 - m*eta)(f(x) - f*) - eta*(lambda/eta)*(f(x) - f(z)) + eta^2 M sigma^2 / 2, in 1-D m = M = h;
    # every coordinate is a sample of its own.
    n, eta, h, sigma, x, z = 200_000, 0.2, 1.5, 0.7, 2.0, 0.4
    simulation = lsgd(
        by_rank,
        method=one_group(pull=lam, grad_point="pre"),
        p=2,
        start=np.array([[z] * n, [x] * n]),
        eta=eta,
        gradient=slope(h, sigma=sigma),
    ).run(1)
    values = 0.5 * h * simulation.x()[1] ** 2
    f_x, f_z = 0.5 * h * x**2, 0.5 * h * z**2
    bound = (1 - h * eta) * f_x - lam * (f_x - f_z) + eta**2 * h * sigma**2 / 2
    assert values.mean() <= bound + 4 * values.std() / math.sqrt(n)
    assert values.mean() > bound - 1.0  # of the order of the bound


# ---- the double well -------------------------------------------------------------------------------------------------


def double_well(lam, grad_point, *, eta=0.1, steps=4000):
    """Return the end of (.9, -.85) on f(x) = (1 - x^2)^2/4 with a pull at every step."""
    return lsgd(
        lambda rank, x: 0.25 * float((1 - x[0] ** 2) ** 2),
        method=one_group(pull=lam, grad_point=grad_point),
        p=2,
        start=[[0.9], [-0.85]],
        eta=eta,
        gradient=lambda rank, x: x**3 - x,
    ).run(steps).x()[:, 0]  # fmt: skip


@pytest.mark.parametrize(("lam", "follower"), [(0.01, -0.8873), (0.02, -0.7236), (0.024, -0.6), (0.026, 1.0)])
def test_a_follower_leaves_the_other_valley_above_a_quarter(lam, follower):
    leader, found = double_well(lam, "pre")
    assert leader == pytest.approx(1, abs=1e-12)
    assert found == pytest.approx(follower, abs=5e-5)


@SIDES
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.24, 0.26, 0.5])
def test_a_trapped_follower_is_the_root_of_a_quadratic(grad_point, ratio):
    # At rest eta*x*(x^2 - 1) + lambda*(x - 1) = 0 with both at the same x; after the step it is lambda/(1 - lambda).
    eta = 0.1
    lam = eta * ratio if grad_point == "pre" else eta * ratio / (1 + eta * ratio)
    leader, follower = double_well(lam, grad_point, eta=eta)
    assert leader == pytest.approx(1, abs=1e-12)
    trapped = -0.5 - math.sqrt(0.25 - ratio) if ratio <= 0.25 else 1.0
    assert follower == pytest.approx(trapped, abs=1e-9)


def test_at_rest_the_leaders_gradient_is_zero_and_a_followers_need_not_be():
    leader, follower = double_well(0.02, "pre")
    assert abs(leader**3 - leader) < 1e-12
    assert abs(follower**3 - follower) > 0.1


# ---- groups, and who is pulled where ---------------------------------------------------------------------------------


@SIDES
@pytest.mark.parametrize("how", ["group_size", "nodes"])
def test_the_groups_leader_pulls_first_then_the_leader_of_all(how, grad_point):
    start, losses = np.array([[1.0], [2.0], [4.0], [8.0]]), [1.0, 2.0, 3.0, 4.0]
    a, b = 0.3, 0.2
    grouping = {"group_size": 2} if how == "group_size" else {}
    method = LSGD(pull=a, global_pull=b, period=1, global_period=2, synchronous=True, grad_point=grad_point, **grouping)
    simulation = lsgd(
        lambda rank, x: losses[rank], method=method, p=4, start=start, eta=0.0,
        **({"nodes": [0, 0, 1, 1]} if how == "nodes" else {}),
    )  # fmt: skip

    def local(x):
        return [x[0], x[1] - a * (x[1] - x[0]), x[2], x[3] - a * (x[3] - x[2])]

    def both(x):
        return [v - b * (v - x[0]) for v in local(x)]

    x = start[:, 0]
    for exchange in (both, local, both, local) if grad_point == "pre" else (local, both, local, both):
        x = exchange(x)
        np.testing.assert_allclose(simulation.run(1).x()[:, 0], x, rtol=1e-14)
    assert [worker.metrics()["leader"] for worker in simulation.workers] == [0, 0, 2, 2]
    assert [worker.metrics()["leads"] for worker in simulation.workers] == [4, 0, 4, 0]


def test_without_groups_on_one_node_all_are_one_group():
    method = LSGD(pull=0.5, global_pull=0.0, period=1, synchronous=True)
    end = lsgd(by_rank, method=method, p=3, start=[[0.0], [4.0], [8.0]], eta=0.0).run(1)
    assert end.x()[:, 0].tolist() == [0, 2, 4]
    method = LSGD(pull=0.5, global_pull=0.0, period=1, synchronous=True, group_size=2)  # the last group is smaller
    end = lsgd(by_rank, method=method, p=3, start=[[0.0], [4.0], [8.0]], eta=0.0).run(1)
    assert end.x()[:, 0].tolist() == [0, 2, 8]


@TIMINGS
def test_leaders_send_and_followers_read_once_half_of_elastic_averaging(synchronous):
    p, n, steps, tau = 4, 100, 40, 4
    size = 8 * n
    end = lsgd(
        by_rank, method=LSGD(period=tau, synchronous=synchronous), p=p, start=np.ones(n), eta=0.1
    ).run(steps + 2 * (not synchronous))  # fmt: skip
    bytes_sent = statistics(end, "bytes_sent")
    assert bytes_sent == [0] + [steps // tau * size] * (p - 1)  # both pulls to one leader are one
    assert statistics(end, "n_exchanges") == [0] + [steps // tau] * (p - 1)
    elastic = simulate(EASGD(period=tau), p, start=np.ones(n), eta=0.1).run(steps)
    assert sum(bytes_sent) / sum(statistics(elastic, "bytes_sent")) == (p - 1) / (2 * p)


def test_pulls_of_every_step_are_towards_the_leaders_last_exchange():
    method = LSGD(pull=0.3, global_pull=0.0, period=3, synchronous=True, continuous_pull=True, grad_point="pre")
    z, x, eta = 0.5, 2.0, 0.1
    simulation = lsgd(by_rank, method=method, p=2, start=[[z], [x]], eta=eta)
    known = z
    for t in range(7):
        g = x
        if t % 3 == 0:
            known = z
            x = x - 0.3 * (x - z)
        x = x - eta * g
        x = x - 0.1 * (x - known)
        z = z - eta * z
        np.testing.assert_allclose(simulation.run(1).x()[:, 0], [z, x], rtol=1e-13)


@TIMINGS
def test_nonfinite_values_stay_with_the_leader(synchronous):
    def gradient(rank, x):
        g = x.copy()
        g[2] = math.nan if rank == 0 else g[2]
        return g

    end = lsgd(
        by_rank, method=LSGD(period=1, synchronous=synchronous), p=3, start=np.ones(5), eta=0.1, gradient=gradient
    ).run(10)
    assert np.isfinite(end.x()[1:]).all()
    assert statistics(end, "n_nonfinite")[0] == 0
    assert min(statistics(end, "n_nonfinite")[1:]) >= 9


# ---- asynchronous ----------------------------------------------------------------------------------------------------


def asynchronous_rule(script, x, losses, method, eta):
    """Follow the rule of the method's docstring, one worker's step per entry of the script; the gradient is x."""
    p = len(x)
    x, published = x.copy(), x.copy()
    clock, stamp, shown = np.zeros(p, int), np.full(p, -1), np.full(p, np.inf)
    groups = [[j for j in range(p) if j // (method.group_size or p) == i // (method.group_size or p)] for i in range(p)]
    pulls = [
        [{"of": of, "rate": r, "every": p * tau, "round": -(method.grad_point == "pre"), "pending": False}
         for of, r, tau in ((groups[i], method.pull, method.tau), (range(p), method.global_pull, method.tau_global))]
        for i in range(p)
    ]  # fmt: skip
    history = [[] for _ in range(p)]
    taken = np.zeros(p, int)

    def pull(i, due):
        towards = {}
        for one in due:
            one["pending"] = False
            present = [j for j in one["of"] if stamp[j] >= one["round"] * one["every"]]
            leader = min(present, key=lambda j: (shown[j], j))
            towards.setdefault(leader, []).append(one["rate"])
        for leader, rates in towards.items():
            for rate in rates if leader != i else ():
                x[i] = x[i] - rate * (x[i] - published[leader])

    def exchange(i, t):
        clock[i] = t
        begun = [one for one in pulls[i] if clock.sum() // one["every"] > one["round"]]
        pull(i, [one for one in begun if one["pending"]])
        for one in begun:
            one["round"], one["pending"] = clock.sum() // one["every"], True
        if begun:
            published[i], stamp[i], shown[i] = x[i], clock.sum(), np.mean(history[i][-method.tau :])
        pull(i, [one for one in pulls[i]
                 if one["pending"] and all(stamp[j] >= one["round"] * one["every"] for j in one["of"])])  # fmt: skip

    for i in script:
        t = taken[i]
        g = x[i].copy()
        history[i].append(losses[i, t])
        if method.grad_point == "pre":
            exchange(i, t)
        x[i] = x[i] - eta * g
        if method.grad_point == "post":
            exchange(i, t + 1)
        taken[i] += 1
    return x


@given(
    st.sampled_from(["pre", "post"]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.lists(st.integers(0, 3), max_size=80),
    st.integers(0, 100),
)
def test_any_order_of_events_follows_the_rule(grad_point, tau, times, group_size, script, seed):
    rng = np.random.default_rng(seed)
    start, losses = rng.normal(size=(4, 5)), rng.integers(0, 4, size=(4, 81)).astype(float)
    method = LSGD(
        pull=0.3, global_pull=0.2, period=tau, global_period=tau * times, group_size=group_size, grad_point=grad_point
    )
    drawn = [iter(row) for row in losses]
    end = lsgd(
        lambda rank, x: next(drawn[rank]), method=method, p=4, start=start, eta=0.1, schedule=Scripted(script)
    ).run(10**6)
    np.testing.assert_allclose(end.x(), asynchronous_rule(script, start, losses, method, 0.1), rtol=1e-12, atol=1e-13)


def test_a_loss_is_published_before_its_stamp(monkeypatch):
    published, losses = [], iter([4.0, 3.0, 2.0])
    monkeypatch.setattr(SimulatedCommunicator, "publish", lambda comm, vector: published.append(vector.local.copy()))
    method = one_group(synchronous=False)
    lsgd(lambda rank, x: next(losses), method=method, p=1, start=[[0.0]], eta=0.0).run(3)
    assert [shown[LOSS] for shown in published] == [4, 3, 2]
    assert [shown[STAMP] for shown in published] == [-1, 1, 2]


@SIDES
def test_a_loss_read_before_its_stamp_is_read_again(monkeypatch, grad_point):
    rng = np.random.default_rng(3)
    losses, method = rng.random((60, 3)), LSGD(pull=0.3, period=2, grad_point=grad_point)
    seen, read = {}, SimulatedCommunicator.read

    def read_torn(comm, vector, peer, fn):
        def tear(numbers):
            before = seen.get((comm.rank, peer), numbers)
            seen[comm.rank, peer] = numbers.copy()
            torn = numbers.copy()
            if before[STAMP] != numbers[STAMP]:
                torn[LOSS] = before[LOSS]
            fn(torn)

        read(comm, vector, peer, tear if vector.local.size == 3 and peer != comm.rank else fn)

    def end():
        drawn = [iter(column) for column in losses.T]
        start, schedule = [[0.0, 1.0], [4.0, 2.0], [8.0, 3.0]], RandomOrder(5)
        simulation = lsgd(
            lambda rank, x: next(drawn[rank]), method=method, p=3, start=start, eta=0.1, schedule=schedule
        )
        return simulation.run(50).x()

    whole = end()
    monkeypatch.setattr(SimulatedCommunicator, "read", read_torn)
    assert same_bits(end(), whole)


def test_workers_in_step_are_pulled_one_step_after_the_synchronous_ones():
    # A round of 9 steps ends with worker 2's third; all have published when it comes to worker 1's fourth.
    method = one_group(period=3, synchronous=False, pull=0.5)
    simulation = lsgd(by_rank, method=method, p=3, start=[[0.0], [4.0], [8.0]], eta=0.0, schedule=RoundRobin())
    assert simulation.run(3).x()[:, 0].tolist() == [0, 4, 8]
    assert simulation.run(1).x()[:, 0].tolist() == [0, 2, 4]
    assert simulation.run(2).x()[:, 0].tolist() == [0, 2, 4]


def test_an_absent_worker_stops_no_other_and_does_not_lead():
    # Worker 0 has the lowest loss and makes two steps in all; three workers with tau = 2 have a round of 6 steps.
    script = [0, 0, *[1, 2] * 40]
    method = one_group(period=2, synchronous=False, pull=0.5)
    end = lsgd(by_rank, method=method, p=3, start=[[0.0], [4.0], [8.0]], eta=0.0, schedule=Scripted(script)).run(99)
    assert [worker.metrics()["leader"] for worker in end.workers[1:]] == [1, 1]
    np.testing.assert_allclose(end.x()[:, 0], [0, 4, 4], atol=0.05)


def test_fast_workers_make_more_local_steps_between_exchanges():
    method = one_group(period=4, synchronous=False)
    simulation = lsgd(
        lambda rank, x: -float(rank), method=method, p=2, start=[[0.0], [1.0]], eta=0.0, schedule=VirtualTime([1, 3])
    )
    simulation.run(60)  # each; the fast one is ready first
    leads = simulation.workers[1].metrics()["leads"]
    assert leads == pytest.approx(120 / 8, abs=2)  # a round is 8 steps of both together


@settings(max_examples=20)
@given(st.integers(0, 2**16), st.integers(1, 4), st.sampled_from(["pre", "post"]), st.booleans())
def test_without_gradients_workers_stay_in_the_hull_of_their_starts(seed, p, grad_point, continuous):
    start = np.random.default_rng(seed).normal(size=(p, 33))
    method = LSGD(pull=0.4, period=1, grad_point=grad_point, continuous_pull=continuous, group_size=2)
    rng = np.random.default_rng(seed + 1)
    end = lsgd(
        lambda rank, x: rng.random(), method=method, p=p, start=start, eta=0.0,
        schedule=RandomOrder(seed), interleave_locks=True,
    ).run(25)  # fmt: skip
    assert (end.x() >= start.min(0) - 1e-12).all()
    assert (end.x() <= start.max(0) + 1e-12).all()
    if p > 1:
        assert not same_bits(end.x(), start)


def test_consensus_is_the_mean():
    end = lsgd(quadratic_loss, method=LSGD(), p=5, start=STARTS, eta=0.1).run(7)
    np.testing.assert_allclose(end.consensus(3), end.x().mean(0), rtol=1e-14)


def test_equal_workers_lead_equally_often():
    n, p = 300, 4
    leads = np.zeros(p)
    for seed in range(n):
        end = lsgd(
            quadratic_loss, method=one_group(period=2), p=p, start=np.ones(5), eta=0.2,
            gradient=slope(sigma=1.0, seed=seed),
        ).run(5)  # fmt: skip
        leads[int(end.workers[0].metrics()["leader"])] += 1
    chi_square = float(((leads - n / p) ** 2).sum() / (n / p))
    assert chi_square < 21.1  # of 3 degrees of freedom: one in ten thousand


def test_leads_survive_a_checkpoint():
    end = lsgd(by_rank, method=LSGD(period=1, synchronous=True), p=2, start=[[0.0], [1.0]], eta=0.1).run(5)
    assert states(end)[0]["leads"] == 5
    again = lsgd(by_rank, method=LSGD(period=1, synchronous=True), p=2, start=[[0.0], [1.0]], eta=0.1)
    change(again, leads=7)
    assert [worker.metrics()["leads"] for worker in again.run(3).workers] == [10, 7]


# ---- settings --------------------------------------------------------------------------------------------------------


def test_each_period_has_a_default_from_the_other():
    periods = [(4, 16), (5, 20), (16, 64), (1, 2)]
    made = [LSGD(), LSGD(period=5), LSGD(global_period=64), LSGD(global_period=2)]
    assert [(method.tau, method.tau_global) for method in made] == periods


@given(st.integers(1, 100), st.integers(1, 100))
def test_the_global_period_is_not_the_shorter_one(tau, tau_global):
    assume(tau_global < tau)
    with pytest.raises(UsageError, match=f"lsgd: global_period must be at least period .{tau}.*not {tau_global}"):
        LSGD(period=tau, global_period=tau_global)


# ---- between ranks ---------------------------------------------------------------------------------------------------


class Point(nn.Module):
    """A model with parameters x and the gradient h*(x - b)."""

    def __init__(self, start):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start))

    def descend(self, optimizer, h, b):
        optimizer.zero_grad()
        loss = (0.5 * h * (self.x - b) ** 2).sum()
        loss.backward()
        optimizer.step(loss)


H, B = np.array([0.5, 1.0, 2.0, 0.8, 1.4]), np.array([1.0, -2.0, 0.5, 3.0, 0.1])


@pytest.mark.ranks(3, 4)
@pytest.mark.time_limit(180)
@SIDES
@pytest.mark.parametrize("continuous", [True, False])
def test_ranks_do_what_simulated_workers_do(world, grad_point, continuous):
    method = LSGD(
        period=2, global_period=4, group_size=2, synchronous=True, grad_point=grad_point, continuous_pull=continuous
    )
    start, steps, p = np.random.default_rng(1).normal(size=50), 20, world.size
    simulated = lsgd(
        lambda rank, x: 0.5 * H[rank] * float(((x - B[rank]) ** 2).sum()),
        method=method, p=p, start=start, eta=0.1, gradient=slope(H[:p], B[:p]),
    ).run(steps)  # fmt: skip
    model = Point(start)
    with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, method, world=world) as optimizer:
        for _ in range(steps):
            model.descend(optimizer, H[world.rank], B[world.rank])
        mine = model.x.detach().numpy()
        np.testing.assert_allclose(mine, simulated.x()[world.rank], rtol=1e-12, atol=1e-13)
        assert optimizer.metrics() == simulated.workers[world.rank].metrics()
        world.barrier()
        np.testing.assert_allclose(optimizer.consensus_vector()[:50], simulated.consensus(), rtol=1e-12, atol=1e-13)
        world.barrier()


@pytest.mark.ranks(3, 4)
@pytest.mark.time_limit(180)
def test_asynchronous_ranks_never_wait_and_stay_in_the_hull(world):
    model = Point(np.zeros(500))
    method = LSGD(period=1, global_period=2, group_size=2, pull=0.5)
    with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, method, world=world) as optimizer:
        with torch.no_grad():
            model.x.fill_(1.0 + world.rank)
        world.barrier()
        for _ in range(30 * (1 + world.rank)):  # a different number of steps on each
            model.descend(optimizer, 1.0, 1.0)  # the lowest rank has the lowest loss
        if world.rank == 0:  # alone, while the others are still at work
            assert np.isfinite(optimizer.consensus_vector()).all()
        assert (model.x >= 1).all()
        assert (model.x <= world.size).all()
        world.barrier()
        followed = world.comm.allgather(optimizer.statistics.bytes_sent)
        assert (max(followed) > 0) == (world.size > 1)
        world.barrier()
