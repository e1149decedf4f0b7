"""All-reduce by messages between up to 1,024 simulated nodes: sums, steps, bytes and virtual time."""

import math

import numpy as np
import pytest

from mpitrain.collectives.topology import allreduce_cost
from mpitrain.collectives.topology.allreduce_steps import ALGORITHMS
from mpitrain.simulation.allreduce import allreduce
from mpitrain.simulation.network import Fabric, Network

NETWORK = Network(latency=5.0, overhead=0.5, bandwidth=1000.0)
BEYOND = [(name, p) for name in ("doubling", "halving") for p in (257, 1000, 1024)]
# A ring of 1,024 nodes has two million messages; test_allreduce_steps.py counts those of a rank.
CASES = [(name, p) for name in ALGORITHMS for p in (1, 2, 3, 4, 6, 7, 16, 33, 100)] + BEYOND


@pytest.mark.parametrize(("algorithm", "p"), CASES)
def test_all_nodes_get_the_same_sum_for_the_steps_bytes_and_seconds_of_the_model(algorithm, p):
    n = 4096 if p in (2, 4, 16, 1024) else 997
    vectors = [np.random.default_rng([p, rank]).normal(size=n).astype(np.float32) for rank in range(p)]
    exact = np.sum([vector.astype(np.float64) for vector in vectors], axis=0)
    size = np.sum(np.abs(vectors), axis=0)
    traffic = allreduce(algorithm, vectors, Fabric(NETWORK, range(p)))
    assert len({vector.tobytes() for vector in vectors}) == 1
    # Higham 2002, section 4.2: at most p - 1 roundings of a sum of p terms.
    assert (np.abs(vectors[0] - exact) <= (p - 1) * 2.0**-24 * size).all()
    assert traffic.n_steps.max() == (allreduce_cost.n_messages(algorithm, p) if p > 1 else 0)
    n_bytes, folded = 4 * n, p & (p - 1) and algorithm != "ring"
    expected = allreduce_cost.bytes_of_steps(algorithm, n_bytes, p) - n_bytes * bool(folded)  # it receives the others
    slack = 64 * max(traffic.n_steps.max(), 1)  # parts start at multiples of 16 elements
    assert abs(traffic.bytes_sent.max() - expected) <= slack
    model = getattr(NETWORK, algorithm)(n_bytes, range(p))
    if folded:  # the model lets all ranks wait for the first exchange of the pairs
        assert 0.75 * model <= traffic.seconds.max() <= model + slack / NETWORK.bandwidth
    else:
        assert traffic.seconds.max() == pytest.approx(model, abs=slack / NETWORK.bandwidth)


def test_the_model_without_overhead_and_gap_is_that_of_the_choice():
    link = allreduce_cost.Link(6.0, 0.0, 1000.0, 1000.0, math.inf)
    for name in ALGORITHMS:
        for p in (2, 3, 8, 100, 1024):
            assert allreduce_cost.seconds(name, 1e6, p, link) == pytest.approx(getattr(NETWORK, name)(1e6, range(p)))


@pytest.mark.parametrize("algorithm", ["doubling", "halving"])
def test_messages_between_racks_share_the_uplinks(algorithm):
    """The nearest exchange first: only the last steps cross racks, with the shortest messages of the reduce-scatter."""
    network = Network(latency=1.0, bandwidth=1000.0, rack_nodes=4, uplink=2000.0)
    m, p = 4 * 1024, 8
    vectors = [np.ones(m // 4, np.float32) for _ in range(p)]
    traffic = allreduce(algorithm, vectors, Fabric(network, range(p)))
    share = 2000 / 4
    inside = [m, m] if algorithm == "doubling" else [m / 2, m / 4]
    across = m if algorithm == "doubling" else m / 8
    once = sum(1 + size / 1000 for size in inside) + 1 + across / share
    expected = once if algorithm == "doubling" else 2 * once
    assert getattr(network, algorithm)(m, range(p)) == pytest.approx(expected)
    # Whole messages occupy an uplink in turn: the last one then takes its time on the adapter of its receiver.
    assert traffic.seconds.max() <= expected + m / 1000
