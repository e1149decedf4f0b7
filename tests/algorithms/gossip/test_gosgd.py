"""GoSGD (Blot et al., arXiv 1611.09726): weighted means lose nothing, whatever the order of messages."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import load, same_bits, simulate, slope, states, statistics

from mpitrain.algorithms import GoSGD
from mpitrain.simulation.schedules import RandomOrder, RoundRobin, Scripted

H, B = np.array([0.5, 1.0, 2.0, 0.8, 1.4, 0.3]), np.array([1.0, -2.0, 0.5, 3.0, 0.1, -0.7])
ALWAYS = GoSGD(probability=1.0)


def mass(everyones):
    """Return sum w_i and sum w_i x_i, with the contents of the mailboxes."""
    weight, total = 0.0, np.zeros(everyones[0]["parameters"].size)
    for state in everyones:
        weight += state["push_weight"] + state["inbox_weight"]
        total += state["push_weight"] * state["parameters"] + state["inbox_weight"] * state["inbox"]
    return weight, total


def push(simulation, sender, receiver):
    simulation.workers[sender].push_to(receiver)


def take(simulation, rank):
    worker = simulation.workers[rank]
    worker._boxes.update(rank, worker._drain)


def test_a_push_halves_the_weight_and_a_receiver_takes_the_weighted_mean():
    x = np.array([2.0, 8.0, 5.0, 1.0])
    simulation = simulate(ALWAYS, 4, start=x[:, None], eta=0.0)
    weights = lambda: [worker.metrics()["push_weight"] for worker in simulation.workers]  # noqa: E731
    assert weights() == [0.25] * 4
    push(simulation, 0, 1)
    take(simulation, 1)
    assert weights() == [0.125, 0.375, 0.25, 0.25]
    assert simulation.x()[:, 0] == pytest.approx([2, (0.25 * 8 + 0.125 * 2) / 0.375, 5, 1], abs=1e-15)
    push(simulation, 0, 2)
    push(simulation, 0, 2)
    push(simulation, 3, 2)
    take(simulation, 2)
    one = (0.25 * 5 + 0.0625 * 2) / 0.3125
    two = (0.3125 * one + 0.03125 * 2) / 0.34375
    three = (0.34375 * two + 0.125 * 1) / 0.46875
    assert simulation.x()[2, 0] == pytest.approx(three, abs=1e-15)  # as if it had taken them one by one
    assert weights() == [0.03125, 0.375, 0.46875, 0.125]


@settings(max_examples=80)
@given(st.integers(1, 6), st.sampled_from([0.05, 0.5, 1.0]), st.sampled_from(["pre", "post"]), st.integers(0, 2**16))
def test_weights_and_weighted_sum_are_conserved_with_unread_messages(p, probability, grad_point, seed):
    start = np.random.default_rng(seed).normal(size=(p, 5))
    method = GoSGD(probability=probability, grad_point=grad_point)
    simulation = simulate(method, p, start=start, eta=0.0, schedule=RandomOrder(seed), seed=seed, interleave_locks=True)
    low, high = start.min(0) - 1e-14, start.max(0) + 1e-14
    for _ in range(5):
        weight, total = mass(states(simulation.run(4)))
        assert weight == pytest.approx(1, abs=1e-13)
        np.testing.assert_allclose(total, start.mean(0), rtol=0, atol=1e-13)
        x = simulation.x()
        assert ((low <= x) & (x <= high)).all()


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(0, 2**16))
def test_weighted_sum_moves_by_the_weighted_gradients_only(p, seed):
    start, moved = np.random.default_rng(seed).normal(size=(p, 3)), np.zeros(3)

    def gradient(rank, x):
        nonlocal moved
        g = slope(H, B)(rank, x)
        moved = moved - 0.1 * simulation.workers[rank].metrics()["push_weight"] * g
        return g

    method, schedule = GoSGD(probability=0.7), RandomOrder(seed)
    simulation = simulate(method, p, start=start, eta=0.1, gradient=gradient, schedule=schedule, interleave_locks=True)
    weight, total = mass(states(simulation.run(12)))
    assert weight == pytest.approx(1, abs=1e-13)
    np.testing.assert_allclose(total, start.mean(0) + moved, rtol=0, atol=1e-12)


def test_workers_converge_to_the_weighted_mean():
    start = np.random.default_rng(0).normal(size=(5, 4))
    simulation = simulate(ALWAYS, 5, start=start, eta=0.0, schedule=RandomOrder(1), interleave_locks=True).run(200)
    np.testing.assert_allclose(simulation.x(), np.broadcast_to(start.mean(0), (5, 4)), rtol=0, atol=1e-12)


def test_a_worker_that_receives_nothing_keeps_a_tiny_weight_without_harm():
    simulation = simulate(ALWAYS, 2, start=[[1.0], [3.0]], eta=0.0)
    for _ in range(1200):  # 2^-1201 is 0 in float64
        push(simulation, 0, 1)
    weight, total = mass(states(simulation))
    assert weight == pytest.approx(1, abs=1e-15)
    assert total[0] == pytest.approx(2, abs=1e-15)
    take(simulation, 1)
    take(simulation, 1)
    push(simulation, 1, 0)
    take(simulation, 0)
    assert simulation.x()[:, 0].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("grad_point", ["pre", "post"])
def test_gradient_is_taken_before_the_exchange_or_after_it(grad_point):
    eta, x0, x1 = 0.1, 2.0, 6.0
    method = GoSGD(probability=1.0, grad_point=grad_point)
    simulation = simulate(method, 2, start=[[x0], [x1]], eta=eta, schedule=Scripted([0, 1])).run(9)
    step = lambda x: x - eta * x  # noqa: E731
    # Worker 0 pushes with weight 1/4; worker 1 pushes half of its own, then takes that: both have 1/4.
    wanted = (x1 + x0) / 2 - eta * x1 if grad_point == "pre" else (step(x1) + step(x0)) / 2
    assert simulation.x()[:, 0] == pytest.approx([step(x0), wanted], abs=1e-14)


def test_pushes_have_their_probability_and_reach_all_others_equally_often():
    p, steps, probability = 4, 6000, 0.3
    drawn = [[] for _ in range(p)]
    simulation = simulate(GoSGD(probability=probability), p, start=np.zeros(1), eta=0.1)
    for worker, peers in zip(simulation.workers, drawn, strict=True):
        worker.push_to = lambda peer, worker=worker, peers=peers: peers.append((worker.t, peer))
    simulation.run(steps)
    for i, peers in enumerate(drawn):
        counts = np.bincount([peer for _, peer in peers], minlength=p)
        q = probability / (p - 1)
        assert counts[i] == 0
        np.testing.assert_allclose(np.delete(counts, i), steps * q, atol=4 * np.sqrt(steps * q * (1 - q)))
    for a, b in itertools.combinations(drawn, 2):  # each draws for itself
        run_on_survivors = len({t for t, _ in a} & {t for t, _ in b})
        q = probability**2
        assert run_on_survivors == pytest.approx(steps * q, abs=4.5 * np.sqrt(steps * q * (1 - q)))


@settings(max_examples=20)
@given(st.integers(2, 5), st.integers(0, 7), st.integers(0, 2**16))
def test_a_checkpoint_holds_the_messages_under_way(p, before, seed):
    start = np.random.default_rng(seed).normal(size=(p, 4))
    arguments = {"eta": 0.1, "gradient": slope(H, B), "interleave_locks": True}
    whole = simulate(ALWAYS, p, start=start, schedule=RandomOrder(seed), seed=seed, **arguments)
    saved = states(whole.run(before))
    resumed = load(simulate(ALWAYS, p, start=np.zeros(4), **arguments), saved)
    whole.world.schedule = RoundRobin()
    assert same_bits(whole.run(6).x(), resumed.run(6).x())
    assert mass(states(whole))[0] == pytest.approx(1, abs=1e-13)


def test_nan_of_a_peer_does_not_spread():
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = np.nan
        return g

    simulation = simulate(ALWAYS, 4, start=np.ones(5), eta=0.1, gradient=gradient).run(20)
    assert np.isfinite(np.delete(simulation.x(), 1, axis=0)).all()
    assert sum(statistics(simulation, "n_nonfinite")) > 0


def test_consensus_is_the_mean_of_all():
    simulation = simulate(ALWAYS, 4, start=np.random.default_rng(3).normal(size=(4, 6)), eta=0.1).run(3)
    np.testing.assert_allclose(simulation.consensus(2), simulation.x().mean(0), rtol=1e-14)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_mass_is_conserved_between_ranks(world, n_nodes):
    start = np.random.default_rng(world.rank).normal(size=2000)
    with ranks(n_nodes) as comm:
        mine = RankRun(ALWAYS, comm, start)
        mean = mine.sum(start) / comm.size
        for _ in range(3):
            mine.run(10 + 7 * comm.rank, 0.0, slope())  # a different number of steps on each: nobody waits
            comm.barrier()
            weight, total = mass(mine.states())
            assert weight == pytest.approx(1, abs=1e-12)
            np.testing.assert_allclose(total, mean, rtol=0, atol=1e-11)
            comm.barrier()
        if comm.size > 1:
            assert np.abs(mine.worker.x.local - start).max() > 0.1
