"""The cost model of all-reduces against the formulas of Thakur, Rabenseifner and Gropp, and its choices."""

import math
from dataclasses import replace

import pytest

from mpitrain.collectives.topology.allreduce_cost import MARGIN, MPI, Link, choose, seconds
from mpitrain.collectives.topology.allreduce_steps import ALGORITHMS

LINK = Link(latency=3.0, overhead=2.0, bandwidth=1 / 0.7, mpi_bandwidth=1 / 1.1, addition=1 / 0.3)
ALPHA, BETA, GAMMA = 5.0, 0.7, 0.3


@pytest.mark.parametrize("k", [1, 2, 5, 10])
@pytest.mark.parametrize("m", [8.0, 1e6])
def test_powers_of_two_cost_what_the_paper_says(k, m):
    p = 2**k
    part = (p - 1) / p * m
    ring = 2 * (p - 1) * ALPHA + 2 * part * BETA + part * GAMMA
    assert seconds("ring", m, p, LINK) == pytest.approx(ring)
    assert seconds("doubling", m, p, LINK) == pytest.approx(k * (ALPHA + m * BETA + m * GAMMA))
    assert seconds("halving", m, p, LINK) == pytest.approx(2 * k * ALPHA + 2 * part * BETA + part * GAMMA)


def test_other_numbers_fold_the_first_ranks_into_pairs():
    m, around = 100.0, 2 * ALPHA + 2 * 100 * BETA + 100 * GAMMA
    assert seconds("doubling", m, 6, LINK) == pytest.approx(seconds("doubling", m, 4, LINK) + around)
    assert seconds("halving", m, 6, LINK) == pytest.approx(seconds("halving", m, 4, LINK) + around)


def test_mpi_has_no_overhead_but_a_bandwidth_of_its_own_for_long_messages():
    assert seconds(MPI, 8, 4, replace(LINK, latency=1e3)) == pytest.approx(2 * (1e3 + 8 * (BETA + GAMMA)))
    m = 1e6
    assert seconds(MPI, m, 4, LINK) == pytest.approx(4 * 3 + 1.5 * m * 1.1 + 0.75 * m * GAMMA)


@pytest.mark.parametrize(
    ("p", "n_bytes", "chosen"),
    [
        (2, 1e3, MPI),  # few round trips, compiled
        (1024, 1e3, MPI),
        (2, 1e8, "halving"),  # as the ring, and first beside it in nothing: half the vector in each of two steps
        (3, 1e8, "ring"),  # no power of two: halving would send the vector twice more
        (64, 1e7, "halving"),
        (100, 1e8, "ring"),
        (1000, 1e5, MPI),
        (1024, 1e8, "halving"),
    ],
)
def test_the_choice_follows_size_and_number_of_nodes(p, n_bytes, chosen):
    found = choose(n_bytes, p, Link())
    assert found == chosen or seconds(found, n_bytes, p, Link()) == seconds(chosen, n_bytes, p, Link())


@pytest.mark.parametrize("p", [2, 3, 5, 16, 1000, 1024])
def test_the_choice_is_never_slower_than_mpi_and_never_far_from_the_fastest(p):
    for n_bytes in (10.0**k for k in range(1, 10)):
        costs = {name: seconds(name, n_bytes, p, Link()) for name in (MPI, *ALGORITHMS)}
        found = costs[choose(n_bytes, p, Link())]
        assert found <= costs[MPI]
        assert found <= MARGIN * min(costs.values())


@pytest.mark.parametrize(("factor", "chosen"), [(1.1, MPI), (1.5, "ring")])
def test_an_advantage_within_the_margin_is_left_to_mpi(factor, chosen):
    link = Link(0.0, 0.0, bandwidth=1e9, mpi_bandwidth=1e9 / factor, addition=math.inf)
    assert choose(1e8, 2, link) == chosen


def test_a_slower_mpi_and_a_longer_latency_move_the_choice():
    fast_mpi = replace(Link(), mpi_bandwidth=Link().bandwidth)
    assert choose(1e8, 2, fast_mpi) == MPI
    assert choose(1e6, 100, replace(Link(), latency=1e-7, overhead=0.0, mpi_bandwidth=1e8)) == "ring"
    assert choose(1e6, 100, replace(Link(), latency=1e-2, overhead=0.0, mpi_bandwidth=1e8)) in ("doubling", "halving")


@pytest.mark.parametrize("name", ["latency", "bandwidth"])
def test_the_document_has_units(name):
    document = Link(latency=2e-6, bandwidth=3e9).document()
    assert (document["latency_us"], document["bandwidth_mb_per_s"]) == (2.0, 3000.0)
    assert all(math.isfinite(value) for value in document.values())
