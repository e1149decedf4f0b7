"""Parameters in 16 bits: what small changes add up in has more."""

import ml_dtypes
import numpy as np
import pytest

from mpitrain import AEASGD, EAMSGD, EASGD, DiLoCo, EASGDTree, GossipSGD, SlowMo, StochasticGradientPush
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.world import SimulatedWorld

HALVES = [np.float16, ml_dtypes.bfloat16]
PULLED = [
    EASGD(moving_rate=0.05, period=1),
    EASGD(moving_rate=0.05, period=1, synchronous=True),
    EASGD(moving_rate=0.05, period=1, order="center_first"),
    EASGD(moving_rate=0.05, period=1, order="worker_first"),
    EASGD(moving_rate=0.05, period=1, overlap=True),
    EAMSGD(moving_rate=0.05, period=1, momentum=0.0),
    AEASGD(rho=0.5, period=1),
    AEASGD(rho=0.5, period=1, early_exchange=True),
    EASGDTree(moving_rate=0.05, degree=2, period=1, slow_period=1),
]


def held_at(value, method, p, dtype, start):
    """Workers that stay where they are, whatever pulls them, and the simulation they are in."""

    def hold(simulation, rank):
        for vector in simulation.workers[rank].positions:
            vector[...] = value

    def at_rest(rank, x):
        return np.zeros_like(x)

    simulation = Simulation(method, SimulatedWorld(p), at_rest, np.full(7, start, dtype), 0.1)
    for worker in simulation.workers:
        for vector in worker.positions:
            vector[...] = value
    return simulation, hold


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", PULLED, ids=repr)
def test_a_center_follows_in_steps_that_sixteen_bits_cannot_take(method, dtype):
    simulation, hold = held_at(1.0, method, 4, dtype, 0.97)
    simulation.run(400, hold)
    assert simulation.consensus().dtype == dtype
    assert np.array_equal(simulation.consensus().astype(np.float64), np.ones(7))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", [GossipSGD(), StochasticGradientPush()], ids=repr)
def test_the_mean_of_many_equal_workers_is_what_they_are(method, dtype):
    value = dtype(1.01)
    simulation, _ = held_at(value, method, 300, dtype, value)
    assert np.array_equal(simulation.consensus(), np.full(7, value))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "method",
    [
        SlowMo(period=1, slow_learning_rate=0.02, slow_momentum=0.0),
        DiLoCo(period=1, outer_learning_rate=0.02, outer_momentum=0.0),
    ],
    ids=repr,
)
def test_outer_steps_add_up_that_sixteen_bits_cannot_take(method, dtype):
    simulation = Simulation(method, SimulatedWorld(2), lambda rank, x: np.ones_like(x), np.ones(3, dtype), 0.01)
    moved = 1 - simulation.run(100).consensus().astype(np.float64)
    np.testing.assert_allclose(moved, 100 * 0.02 * 0.01, rtol=0.3)
