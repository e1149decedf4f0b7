"""Every synchronous method does the same between ranks as in the simulated world. No method is named here."""

import numpy as np
import pytest
from support.on_ranks import ranks
from support.quadratic import slope
from support.variants import variants

from mpitrain import kernels
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.world import SimulatedWorld

# Every variant makes its windows anew, which takes its time where ranks share a core.
pytestmark = [pytest.mark.ranks(2, 3), pytest.mark.time_limit(180)]

VARIANTS = [(name, method) for name, method in variants() if method.is_synchronous]
FIRST = {method.name: name for name, method in reversed(VARIANTS)}.values()  # a variant of each method, also on 5 ranks
SYNCHRONOUS = [
    pytest.param(method, id=name, marks=[pytest.mark.ranks(2, 3, 5)] if name in FIRST else [])
    for name, method in VARIANTS
]
N, STEPS, ETA, DECAY, SEED = 50, 13, 0.05, 0.01, 3
H, B = np.array([0.5, 1.0, 2.0, 0.8, 1.4]), np.array([1.0, -2.0, 0.5, 3.0, 0.1])
START = np.random.default_rng(1).normal(size=N)
LAYERS = (slice(0, 20), slice(20, N))
gradient = slope(H, B)


def fitness(x):
    return float(np.sum((np.asarray(x, np.float64) - 0.3) ** 2))


def loss(rank, x):
    return float(H[rank] * np.sum((x - B[rank]) ** 2) / 2)


def simulated(method, nodes):
    """Return each worker's parameters (p, n) and consensus (p, n)."""
    world = SimulatedWorld(len(nodes), nodes=nodes)
    more = {"weight_decay": DECAY, "seed": SEED, "layers": LAYERS, "fitness": fitness, "loss": loss}
    simulation = Simulation(method, world, gradient, START, ETA, **more).run(STEPS)
    return simulation.x(), np.stack([simulation.consensus(rank) for rank in range(len(nodes))])


def real(method, comm):
    """Return this rank's parameters and consensus, (n,) each. Collective."""
    vectors = comm.vector(N, START.dtype), comm.vector(N, START.dtype)
    x, g = vectors[0].local, vectors[1].local
    x[...] = START
    comm.barrier()
    worker = method.worker(Replica(comm, *vectors, SEED, LAYERS, fitness))
    update = None if method.owns_update else lambda: kernels.sgd_step(x, g, ETA, DECAY)
    for _ in range(STEPS):
        g[...] = gradient(comm.rank, x)
        worker.step(
            [ParamGroupSlice(slice(0, N), ETA, DECAY)], update, loss(comm.rank, x) if method.needs_loss else None
        )
    comm.barrier()
    consensus = np.empty(N)
    worker.consensus(consensus)
    return x.copy(), consensus


@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("method", SYNCHRONOUS)
def test_ranks_do_what_simulated_workers_do(world, method, n_nodes):
    with ranks(n_nodes) as comm:
        xs, consensuses = simulated(method, comm.nodes)
        x, consensus = real(method, comm)
        np.testing.assert_allclose(x, xs[comm.rank], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(consensus, consensuses[comm.rank], rtol=1e-12, atol=1e-12)
        assert np.abs(x - START).max() > 1e-3
