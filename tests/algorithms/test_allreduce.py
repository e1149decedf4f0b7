"""All-reduce SGD: p workers with a mini-batch of b are one with p*b."""

import numpy as np
import pytest
from quadratic import simulate, slope, standard_error

from mpitrain.algorithms import AllReduceSGD
from mpitrain.collectives.schedules import RandomOrder


@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_many_workers_are_one_with_all_their_samples(p):
    # Least squares: the gradient of a mini-batch is A^T (A x - y) / b.
    rng, n, b, eta, steps = np.random.default_rng(0), 6, 4, 0.05, 25
    features, targets = rng.normal(size=(steps, p * b, n)), rng.normal(size=(steps, p * b))
    start, t = rng.normal(size=n), [0] * p

    def gradient(rank, x):
        own = slice(rank * b, (rank + 1) * b)
        a, y = features[t[rank], own], targets[t[rank], own]
        t[rank] += 1
        return a.T @ (a @ x - y) / b

    simulation = simulate(AllReduceSGD(), p, start=start, eta=eta, gradient=gradient, schedule=RandomOrder(1)).run(
        steps
    )
    x = start.copy()
    for a, y in zip(features, targets, strict=True):
        x -= eta * a.T @ (a @ x - y) / (p * b)
    np.testing.assert_allclose(simulation.x(), np.tile(x, (p, 1)), rtol=1e-12, atol=1e-13)


def test_workers_are_equal_to_the_bit_after_each_step():
    seen = []

    def after_step(simulation, rank):
        x = simulation.x()
        if len({worker.t for worker in simulation.workers}) == 1:  # all have made this step, and none the next
            seen.append(all(one.tobytes() == x[0].tobytes() for one in x))

    start = np.random.default_rng(2).normal(size=17).astype(np.float32)
    gradient = slope([0.3, 1.0, 2.0], [1.0, -1.0, 7.0])
    simulate(AllReduceSGD(), 3, start=start, eta=0.1, gradient=gradient).run(12, after_step)
    assert len(seen) == 12
    assert all(seen)


def test_variance_shrinks_with_the_number_of_workers():
    # Var(x) = (eta^2 sigma^2 / p) / (1 - (1 - eh)^2)
    p, eta, d = 4, 0.1, 40_000
    formula = eta**2 / p / (1 - (1 - eta) ** 2)
    simulation = simulate(AllReduceSGD(), p, start=np.zeros(d), eta=eta, gradient=slope(sigma=1.0, seed=3)).run(120)
    assert simulation.consensus().var() == pytest.approx(formula, abs=4 * standard_error(formula, d))


def test_one_worker_is_sgd():
    start = np.random.default_rng(4).normal(size=8)
    simulation = simulate(AllReduceSGD(), 1, start=start, eta=0.1, decay=0.01, gradient=slope(2.0)).run(9)
    np.testing.assert_allclose(simulation.x()[0], (1 - 0.1 * 2.01) ** 9 * start, rtol=1e-13)
