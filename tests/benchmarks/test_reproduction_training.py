"""The shared training of the reproductions: gradients of several workers, the virtual cluster, costs to a target."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.reproduce.digits import MiniBatches, Network
from benchmarks.reproduce.training import Cluster, Curve, train
from mpitrain.algorithms import EASGD, AllReduceSGD


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(8, dtype=np.float32)


def test_gradients_of_a_batch_of_workers_are_those_of_each(network: Network) -> None:
    together, alone = (MiniBatches(network, 3, batch_size=5, seed=1) for _ in range(2))
    xs = [network.start(k) for k in range(3)]
    out = np.empty((3, network.n), np.float32)
    together.batch([2, 0, 1], [xs[2], xs[0], xs[1]], out)
    for row, rank in zip(out, (2, 0, 1), strict=True):
        np.testing.assert_allclose(row, alone(rank, xs[rank]), rtol=1e-5, atol=1e-6)
        assert together.loss(rank, xs[rank]) == pytest.approx(alone.loss(rank, xs[rank]), rel=1e-5)


def test_workers_draw_from_their_parts_only(network: Network) -> None:
    parts = [np.array([4]), np.array([9])]
    batches = MiniBatches(network, 2, parts=parts)
    x = network.start(0)
    for rank, part in enumerate(parts):
        samples = network.train[0][part], network.train[1][part]
        np.testing.assert_allclose(batches(rank, x), network.gradient_on(x, samples), rtol=1e-4, atol=1e-6)


def test_noise_changes_a_ninth_less_than_its_fraction_of_labels() -> None:
    clean, noisy = Network().train[1], Network(label_noise=0.5).train[1]
    assert np.mean(clean != noisy) == pytest.approx(0.5 * 0.9, abs=0.06)  # a tenth of the draws is the old label


def test_all_reduce_takes_the_time_of_the_model(network: Network) -> None:
    """2 workers: a ring has 2 steps of half the vector, so a step takes 0.1 s + m/bandwidth + 2 L."""
    cluster = Cluster(jitter=0.0, latency=1e-3, overhead=0.0, bandwidth=1e9, model_bytes=5e7)
    curve = train(network, AllReduceSGD(), 0.1, 2, 40, cluster=cluster, points=1)
    step = curve.seconds[-1] / 20
    assert step == pytest.approx(0.1 + min(0.05 + 2e-3, 0.05 + 1e-3), rel=1e-6)
    assert curve.computing == pytest.approx(0.1 / step)
    # A ring sends 2 (p - 1)/p vectors per worker.
    assert curve.gigabytes[-1] == pytest.approx(40 * 0.05, rel=1e-3)


def test_stragglers_are_slow_and_few(network: Network) -> None:
    steady = Cluster(jitter=0.0)
    seconds = [steady.compute(8, 0).draw(k) for k in (0, 7)]
    assert seconds == pytest.approx([0.1, 0.1])
    slow = replace(steady, stragglers=0.2, slowness=3.0).compute(8, 0)
    assert [slow.draw(k) for k in range(8)] == pytest.approx([0.1] * 6 + [0.3] * 2)


def test_a_run_ends_at_its_target_or_its_gradients(network: Network) -> None:
    whole = train(network, EASGD(), 0.5, 3, 600, points=50)
    assert whole.gradients[-1] == pytest.approx(600, abs=12)
    target = float(whole.loss[0]) * 0.8
    short = train(network, EASGD(), 0.5, 3, 600, points=50, target=target)
    assert short.to(target) == whole.to(target)
    assert short.gradients[-1] < whole.gradients[-1]
    late = train(network, AllReduceSGD(), 0.5, 3, 600, points=50, longest_seconds=2.0)
    assert 2.0 < late.seconds[-1] < 3.5


def test_decay_applies_from_its_fraction_on(network: Network) -> None:
    still = train(network, AllReduceSGD(), 0.5, 2, 80, points=8, decay=[(0.5, 0.0)])
    assert still.loss[4] < still.loss[0]
    assert still.loss[5:] == pytest.approx([still.loss[5]] * (len(still.loss) - 5), rel=1e-6)


def test_costs_are_those_of_the_first_point_at_the_target() -> None:
    curve = Curve(*np.array([[0, 10, 20], [0.0, 1.0, 2.0], [0.0, 0.1, 0.2], [2.0, 0.5, 0.1], [1.0, 0.5, 0.1]]), 1.0)
    assert curve.to(0.5) == (1.0, 10.0, 0.1)
    assert curve.to(0.3) == (2.0, 20.0, 0.2)
    assert curve.to(0.01) == (math.inf,) * 3
