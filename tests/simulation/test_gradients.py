"""Gradients computed ahead of time, in batches."""

import numpy as np
import pytest
from support.quadratic import simulate

from mpitrain.algorithms import EASGD, AllReduceSGD, Downpour, GossipSGD
from mpitrain.simulation.gradients import AheadOfTime
from mpitrain.simulation.schedules import VirtualTime


class Noisy:
    """The gradient of |x|^2/2 with noise from a stream of each worker, one at a time or in batches."""

    def __init__(self, p, largest_batch):
        self.largest_batch = largest_batch
        self.rngs = [np.random.default_rng(rank) for rank in range(p)]
        self.sizes = []

    def __call__(self, rank, x):
        return x + self.rngs[rank].normal(size=x.size)

    def batch(self, ranks, xs, out):
        self.sizes.append(len(ranks))
        for rank, x, row in zip(ranks, xs, out, strict=True):
            row[...] = self(rank, x)


@pytest.mark.parametrize("method", [AllReduceSGD(), EASGD(period=2), GossipSGD(direction="push"), Downpour()])
def test_batches_change_no_bit_of_a_run(method):
    ends = []
    for largest_batch in (1, 3, 100):
        gradient = Noisy(8, largest_batch)
        schedule = VirtualTime(np.linspace(1, 3, 8), jitter=0.4, seed=3)
        simulation = simulate(method, 8, start=np.ones(4), eta=0.1, gradient=gradient, schedule=schedule)
        ends.append(simulation.run(20).x())
        assert max(gradient.sizes, default=1) == min(largest_batch, 8)
        assert [rng.normal() for rng in gradient.rngs] == [
            np.random.default_rng(rank).normal(size=81)[-1] for rank in range(8)
        ]  # each worker has drawn the noise of 20 steps with 4 elements, no more
    assert ends[0].tobytes() == ends[1].tobytes() == ends[2].tobytes()


def test_a_batch_has_the_worker_that_needs_it_and_those_announced_first():
    gradient = Noisy(6, 3)
    gradients = AheadOfTime(gradient, [np.full(2, float(rank)) for rank in range(6)])
    taken = []
    gradient.batch = lambda ranks, xs, out: taken.append((list(ranks), [x[0] for x in xs]))
    gradients(4, None)
    gradients.announce(4)
    gradients(0, None)
    gradients(5, None)
    assert taken == [([4, 0, 1], [4, 0, 1]), ([5, 2, 3], [5, 2, 3])]
