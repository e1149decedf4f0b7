"""The counters: where staleness is counted, by its two definitions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpitrain import kernels
from mpitrain.collectives.world.statistics import DISTANCE_BINS, SMALLEST_DISTANCE_EXPONENT, Statistics, distance_bin
from mpitrain.simulation.schedules import RoundRobin
from mpitrain.simulation.world import SimulatedWorld


@given(st.floats(0, 1e12))
def test_distances_are_counted_by_powers_of_two(distance):
    found = distance_bin(distance)
    low, high = (2.0 ** (found + SMALLEST_DISTANCE_EXPONENT - k) for k in (1, 0))
    assert found == 0 or low <= distance
    assert found == DISTANCE_BINS - 1 or distance < high


def test_a_distance_that_is_no_number_is_counted_as_none():
    assert distance_bin(float("nan")) == 0


def test_each_staleness_is_counted_once():
    statistics = Statistics()
    for n_updates, distance in [(0, 0.0), (3, 1.5), (3, 1.0), (99, 1e9)]:
        statistics.record_staleness(n_updates, distance)
    assert np.flatnonzero(statistics.staleness).tolist() == [0, 3, 32]
    assert statistics.staleness[3] == 2
    assert statistics.staleness_distance[distance_bin(1.2)] == 2
    assert statistics.staleness_distance.sum() == 4


def test_distance_of_a_visit_is_how_far_the_center_has_moved():
    """In round robin, everybody adding 1/4 to each of n elements: (p - 1)/4*sqrt(n); from a sample if n is large."""
    for n in (64, 5000):

        def program(comm, n=n):
            center = comm.shared_vector(n, np.float32)
            comm.barrier()
            for _ in range(3):
                center.update(lambda part, c: kernels.scaled_add(c, np.ones_like(c), 0.25))
                comm.end_step()

        p = 5
        world = SimulatedWorld(p, RoundRobin())
        world.run(program)
        expected = distance_bin((p - 1) / 4 * np.sqrt(n))
        for comm in world.communicators:
            assert np.flatnonzero(comm.statistics.staleness).tolist() == [p - 1]
            assert np.flatnonzero(comm.statistics.staleness_distance).tolist() == [expected]
            assert comm.statistics.staleness_distance[expected] == 2


def test_what_was_pulled_counts_and_not_what_was_pushed():
    def program(comm):
        center = comm.shared_vector(16, np.float64)
        center.update(lambda part, c: None, pushes=False)
        for _ in range(2):
            center.update(lambda part, c: np.add(c, 1, out=c) is None, pulls=False)
        return comm.statistics

    (statistics,) = SimulatedWorld(1).run(program)
    # Its own first push has moved the center by 1 in 16 elements since its pull; nobody else has.
    assert statistics.staleness[0] == 2
    assert statistics.staleness_distance[0] == 1
    assert statistics.staleness_distance[distance_bin(4.0)] == 1
