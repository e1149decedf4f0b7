"""A checkpoint of p workers continues with q workers: what they share goes on exactly, and all begin at one place."""

import numpy as np
import pytest
from support.quadratic import restart, same_bits, simulate, slope, states
from support.variants import variants

from mpitrain import (
    ADMM,
    EAMSGD,
    EASGD,
    AllReduceSGD,
    Average,
    DiLoCo,
    EASGDTree,
    EntropySGD,
    GoSGD,
    LocalSGD,
    MDownpour,
    Parle,
    RobustSGD,
    SlowMo,
    StochasticGradientPush,
)
from mpitrain.algorithms.base.rescaling import mean_of_parts
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.schedules import RandomOrder
from mpitrain.simulation.world import SimulatedWorld

STARTS = np.random.default_rng(0).normal(size=(5, 20))
H, B = np.array([0.5, 1.0, 2.0, 0.8, 1.4]), np.array([1.0, -2.0, 0.5, 3.0, 0.1])
SIZES = pytest.mark.parametrize(("p", "q"), [(4, 2), (2, 4), (3, 1)])
ALL_VARIANTS = [pytest.param(method, id=name) for name, method in variants()]
HAS_MESSAGES_UNDER_WAY = (GoSGD, StochasticGradientPush)


def run(method, p, steps, *, gradient=None, **more):
    """Return a simulation after some steps of workers that differ, from starts that differ if that is allowed."""
    start = STARTS[0] if method.combines_gradients else STARTS[:p]
    gradient = gradient or slope(H, B)
    return simulate(method, p, start=start, eta=0.1, gradient=gradient, largest_shard=8, **more).run(steps)


def rescaled(method, before, q, **more):
    """Return a simulation with ``q`` workers that continues from another one."""
    return restart(run(method, q, 0, **more), states(before))


@SIZES
@pytest.mark.parametrize("method", ALL_VARIANTS)
def test_what_is_evaluated_goes_on_and_all_workers_begin_at_one_place(method, p, q):
    before = run(method, p, 7)
    after = rescaled(method, before, q)
    xs = after.x()
    assert all(same_bits(x, xs[0]) for x in xs)
    if not isinstance(method, HAS_MESSAGES_UNDER_WAY):
        np.testing.assert_allclose(after.consensus(), before.consensus(), rtol=1e-13)
    if method.starts_at is not None:
        assert same_bits(after.consensus(), before.consensus())
    assert [worker.t for worker in after.workers] == [7] * q
    after.run(6)
    assert np.isfinite(after.x()).all()
    assert np.isfinite(after.consensus()).all()


@SIZES
@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize("topology", ["one_peer_exponential", "grid"])
def test_push_sum_keeps_the_weighted_mean_with_the_messages_under_way(p, q, overlap, topology):
    """sum_i x_i/sum_i w_i moves by gradients only, whether a message has arrived or not; sum_i w_i is q."""
    method = StochasticGradientPush(topology=topology, overlap=overlap)

    def rest(rank, x):
        return 0 * x

    before = run(method, p, 7, gradient=rest, schedule=RandomOrder(3))
    after = rescaled(method, before, q, gradient=rest)
    np.testing.assert_allclose(after.x()[0], STARTS[:p].mean(0), rtol=1e-12)
    after.run(5)
    weights = [float(worker.metrics()["push_weight"]) for worker in after.workers]
    if not overlap:
        assert sum(weights) == pytest.approx(q, abs=1e-12)
    np.testing.assert_allclose(after.x(), [STARTS[:p].mean(0)] * q, rtol=1e-12)


@SIZES
def test_gosgd_keeps_the_weighted_mean_with_the_unread_messages(p, q):
    method = GoSGD(probability=1.0)

    def rest(rank, x):
        return 0 * x

    before = run(method, p, 7, gradient=rest, schedule=RandomOrder(3))
    assert p == 1 or any(state["inbox_weight"] for state in states(before))
    after = rescaled(method, before, q, gradient=rest)
    np.testing.assert_allclose(after.x()[0], STARTS[:p].mean(0), rtol=1e-12)
    assert sum(worker.metrics()["push_weight"] for worker in after.workers) == pytest.approx(1, abs=1e-12)


@SIZES
@pytest.mark.parametrize("method", [SlowMo(period=3), DiLoCo(period=3)], ids=["slowmo", "diloco"])
@pytest.mark.parametrize("steps", [6, 8])  # at the end of a round, and in the middle
def test_outer_momentum_goes_on_as_if_nothing_had_happened(method, p, q, steps):
    """With equal linear gradients the mean of local steps is the local step of the mean, so theta does not change."""
    before = run(method, p, steps, gradient=slope())
    after = rescaled(method, before, q, gradient=slope())
    old, new = states(before)[0], states(after)[0]
    for name in ("theta", "momentum"):
        assert same_bits(old[name], new[name])
    np.testing.assert_allclose(after.run(7).consensus(), before.run(7).consensus(), rtol=1e-12)


@SIZES
@pytest.mark.parametrize(
    "method",
    [AllReduceSGD(), LocalSGD(period=3), EntropySGD(period=3), RobustSGD(rule="centered_clipping", n_byzantine=0)],
    ids=["allreduce", "localsgd", "entropysgd", "centered-clipping"],
)
def test_equal_gradients_give_the_same_run_with_another_number_of_workers(method, p, q):
    def replicated(p, steps):
        return simulate(method, p, start=STARTS[0], eta=0.1, gradient=slope(1.0, 2.0)).run(steps)

    before = replicated(p, 5)
    after = restart(replicated(q, 0), states(before))
    np.testing.assert_allclose(after.run(6).consensus(), before.run(6).consensus(), rtol=1e-12)


@SIZES
def test_momentum_in_slices_goes_on_to_the_last_bit(p, q):
    """Each worker of ``node_shared`` holds a slice of the momentum; the slices of q workers are cut from the same."""
    from mpitrain.algorithms.synchronous.allreduce import VelocitySlice

    v = np.random.default_rng(1).normal(size=20)

    def slices(comm):
        held = VelocitySlice(comm, v)
        held.values[...] = v[held.mine]
        return dict(held.state())

    parts = SimulatedWorld(p).run(slices)

    def continued(comm):
        held = VelocitySlice(comm, v)
        held.restart(dict(held.merge(parts)))
        return held.mine, held.values

    for mine, values in SimulatedWorld(q).run(continued):
        assert same_bits(values, v[mine])


@SIZES
@pytest.mark.parametrize("mode", ["async", "round_robin", "sync"])
def test_admm_begins_with_multipliers_of_zero_at_the_center(p, q, mode):
    """c = (1/p) sum_j (x_j - lam_j) stays what it was: with x_j = c and lam_j = 0 the mean is c."""
    method = ADMM(mode=mode)
    before = run(method, p, 7)
    after = rescaled(method, before, q)
    center = before.consensus()
    for state in states(after):
        assert not state["multiplier"].any()
        np.testing.assert_array_equal(state["parameters"], center)
    assert same_bits(after.consensus(), center)


@SIZES
def test_momentum_of_a_worker_begins_at_zero_where_workers_begin_at_the_center(p, q):
    for method in (EAMSGD(period=2, momentum=0.5), Parle(period=2)):
        after = rescaled(method, run(method, p, 7), q)
        for state in states(after):
            assert not any(state[name].any() for name in state if name.endswith("velocity"))


@SIZES
def test_the_velocity_of_the_server_goes_on(p, q):
    method = MDownpour(momentum=0.5)
    before = run(method, p, 7)
    old = states(before)[0]
    assert old["velocity"].any()
    assert same_bits(states(rescaled(method, before, q))[0]["velocity"], old["velocity"])


@SIZES
def test_the_root_of_a_tree_goes_on_and_all_nodes_begin_there(p, q):
    method = EASGDTree(degree=2, period=1, slow_period=2)
    before = run(method, p, 9)
    after = rescaled(method, before, q)
    for state in states(after):
        for name in state:
            if name.startswith("center"):
                assert same_bits(state[name], before.consensus())


@SIZES
@pytest.mark.parametrize("source", ["workers", "consensus"])
def test_the_average_of_the_iterates_goes_on_with_its_clock(p, q, source):
    average = Average("polyak", source=source)

    def averaged(size, steps):
        world = SimulatedWorld(size)
        return Simulation(EASGD(period=2), world, slope(H, B), STARTS[:size], 0.1, average=average).run(steps)

    before = averaged(p, 7)
    after = restart(averaged(q, 0), states(before))
    np.testing.assert_allclose(after.consensus(), before.consensus(), rtol=1e-13)
    assert same_bits(states(after)[0]["center"], states(before)[0]["center"])
    z, x = after.consensus(), after.x()[0]
    assert not np.allclose(z, x)
    assert [worker.t for worker in after.workers] == [7] * q


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_mean_of_equal_vectors_is_exact(dtype):
    x = np.random.default_rng(2).normal(size=1000).astype(dtype)
    for p in (2, 3, 7):
        mean = mean_of_parts((x, 1.0) for _ in range(p))
        assert mean.dtype == dtype
        if dtype == np.float32:
            assert same_bits(mean, x)
        np.testing.assert_allclose(mean, x, rtol=1e-15)


def test_vectors_that_are_not_finite_are_left_out_of_the_mean():
    x = np.ones(3)
    broken = np.array([np.nan, 1, 2])
    np.testing.assert_array_equal(mean_of_parts([(broken, 1.0), (x, 1.0), (3 * x, 3.0)]), 2.5 * x)
