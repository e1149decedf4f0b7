"""The cost of a simulation per worker does not grow with the number of workers."""

import cProfile

import numpy as np
import pytest
from support.quadratic import simulate

from mpitrain.algorithms import EASGD, AllReduceSGD, Downpour, GossipSGD
from mpitrain.simulation.schedules import VirtualTime

METHODS = [AllReduceSGD(), EASGD(period=1), EASGD(period=1, synchronous=True), GossipSGD(), Downpour()]


def calls_per_worker(p, method, steps):
    """Calls of set-up and of a run of that many steps, per worker."""
    simulate(method, 2, start=np.ones(4), eta=0.1).run(1)  # compiles the kernels
    profile = cProfile.Profile()
    with profile:
        simulation = simulate(method, p, start=np.ones(4), eta=0.1)
        simulation.world.schedule = VirtualTime(np.linspace(1, 1.5, p), jitter=0.2)
        simulation.run(steps)
    return sum(entry.callcount for entry in profile.getstats()) / p


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.is_synchronous}")
def test_set_up_and_steps_take_as_many_calls_per_worker_with_many_workers(method):
    for steps in (0, 3):
        assert calls_per_worker(400, method, steps) <= 1.25 * calls_per_worker(50, method, steps)
