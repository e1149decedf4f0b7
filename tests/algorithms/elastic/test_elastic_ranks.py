"""The elastic methods between ranks: they do what simulated workers do and keep the same invariants."""

import numpy as np
import pytest
from support.on_ranks import RankRun, ranks
from support.quadratic import simulate, slope

from mpitrain.algorithms import AEASGD, EAMSGD, EASGD

pytestmark = [pytest.mark.ranks(1, 2, 3), pytest.mark.time_limit(180)]

on_nodes = pytest.mark.parametrize("n_nodes", [1, 2])
GRADIENT = slope(np.array([0.5, 1.0, 2.0, 0.8, 1.4]), np.array([1.0, -2.0, 0.5, 3.0, 0.1]))
N = 1000


def center(run):
    """Return the center when all ranks have finished. Collective."""
    run.comm.barrier()
    out = np.zeros(N)
    run.worker.consensus(out)
    run.comm.barrier()
    return out


@pytest.mark.parametrize("grad_point", ["pre", "post"])
@pytest.mark.parametrize("order", ["jacobi", "center_first", "worker_first"])
@pytest.mark.parametrize("kind", [EASGD, EAMSGD])
def test_ranks_at_once_do_what_simulated_workers_do(kind, order, grad_point):
    start = np.random.default_rng(1).normal(size=N)
    method = kind(moving_rate=0.3, center_rate=0.15, order=order, grad_point=grad_point, period=2, synchronous=True)
    with ranks(1) as comm:
        simulated = simulate(method, comm.size, start=start, eta=0.1, gradient=GRADIENT).run(9)
        run = RankRun(method, comm, start)
        run.run(9, 0.1, GRADIENT)
        np.testing.assert_allclose(run.worker.x.local, simulated.x()[comm.rank], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(center(run), simulated.consensus(), rtol=1e-12, atol=1e-13)


@on_nodes
@pytest.mark.parametrize(
    ("method", "of_x", "of_c"),
    [
        (EASGD(moving_rate=0.3, center_rate=0.1, period=1), 0.1, 0.3),
        (EASGD(moving_rate=0.3, center_rate=0.1, order="center_first", period=1), 0.1, 0.3 * 0.9),
        (EASGD(moving_rate=0.3, center_rate=0.1, order="worker_first", grad_point="post", period=1), 0.1 * 0.7, 0.3),
        (AEASGD(rho=2.0, period=3), 1.0, 1.0),
        (AEASGD(rho=2.0, period=3, early_exchange=True), 1.0, 1.0),
    ],
    ids=["jacobi", "center_first", "worker_first", "aeasgd", "early"],
)
def test_gradients_alone_change_the_weighted_sum(method, of_x, of_c, n_nodes):
    eta = 0.1
    with ranks(n_nodes) as comm:
        rng = np.random.default_rng(comm.rank)
        start = np.random.default_rng(7).normal(size=N)
        run = RankRun(method, comm, start)
        # Of changing size: the small ones let an exchange of AEASGD come early.
        used = run.run(int(rng.integers(20, 60)), eta, lambda rank, x: rng.normal(size=N) * rng.choice([0.01, 1.0]))
        total = of_x * run.sum(run.worker.x.local) + of_c * center(run)
        wanted = of_x * (comm.size * start - eta * run.sum(used)) + of_c * start
        np.testing.assert_allclose(total, wanted, rtol=0, atol=1e-12)
        assert not np.array_equal(center(run), start)
