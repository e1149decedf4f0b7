"""Every method with vectors in device memory does there what it does in host memory. No method is named here."""

import numpy as np
import pytest
from support.on_gpus import TRANSPORTS, gpus
from support.on_ranks import ranks
from support.quadratic import slope
from support.variants import variants

from mpitrain import kernels
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica

pytestmark = pytest.mark.time_limit(120)

N, STEPS, ETA, DECAY, SEED = 50, 7, 0.05, 0.01, 3
H, B = np.array([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 0.5])
START = np.random.default_rng(1).normal(size=N)
LAYERS = (slice(0, 20), slice(20, N))
gradient = slope(H, B)

ON_GPUS = [(name, method) for name, method in variants() if not method.on_host]
FIRST = list({method.name: name for name, method in reversed(ON_GPUS)}.values())  # a variant of each method
WHERE = [(1, transport) for transport in TRANSPORTS] + [(2, "staged")]


def on_gpus(*, synchronous, several):
    """Return all variants in one place, and a variant of each method in all other places.

    All of them run on a single rank. Several ranks run one variant of each method: what a switch of a method changes is
    the same in host memory, where test_simulated_and_real.py and test_contract.py have all variants.
    """
    return [
        pytest.param(method, where, id=f"{name}-{where[0]}-{where[1]}", marks=several if name in FIRST else [])
        for name, method in ON_GPUS
        for where in WHERE
        if method.is_synchronous == synchronous and (where == WHERE[0] or name in FIRST)
    ]


class Run:
    """This rank's worker. Collective."""

    def __init__(self, method, comm):
        self.method, self.comm = method, comm
        x, g = comm.vector(N, START.dtype), comm.vector(N, START.dtype)
        kernels.assign(x.local, START)
        comm.barrier()
        self.worker = method.worker(Replica(comm, x, g, SEED, LAYERS))
        self.x, self.g = x.local, g.local

    def steps(self, n):
        update = None if self.method.owns_update else lambda: kernels.sgd_step(self.x, self.g, ETA, DECAY)
        for _ in range(n):
            x = kernels.to_host(self.x)
            kernels.assign(self.g, gradient(self.comm.rank, x))
            loss = float(H[self.comm.rank] * np.sum((x - B[self.comm.rank]) ** 2) / 2)
            self.worker.step(
                [ParamGroupSlice(slice(0, N), ETA, DECAY)], update, loss if self.method.needs_loss else None
            )
        return self

    def state(self):
        state = dict(self.worker.state())
        copied = {n: np.array(kernels.to_host(v)) if hasattr(v, "copy") else v for n, v in state.items()}
        return np.array(kernels.to_host(self.x)), copied

    def load(self, state):
        kernels.assign(self.x, state[0])
        self.comm.barrier()
        self.worker.load(state[1])
        return self

    def found(self):
        """Return the model's parameters and the consensus, (2, n)."""
        self.comm.barrier()
        out = np.zeros_like(self.x)
        self.worker.consensus(out)
        self.comm.barrier()
        return np.stack([kernels.to_host(self.x), kernels.to_host(out)])


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("method", "where"), on_gpus(synchronous=True, several=pytest.mark.ranks(1, 2)))
def test_a_synchronous_method_makes_the_same_steps(world, method, where):
    with ranks(where[0]) as comm:
        wanted = Run(method, comm).steps(STEPS).found()
    with gpus(*where) as comm:
        found = Run(method, comm).steps(STEPS).found()
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert np.abs(found[0] - START).max() > 1e-3


@pytest.mark.ranks(1)
@pytest.mark.parametrize(("method", "where"), on_gpus(synchronous=False, several=pytest.mark.ranks(1, 3)))
def test_an_asynchronous_method_comes_near_the_minimum(world, method, where):
    """The result of several ranks depends on their order; that of one rank equals the host's."""
    with gpus(*where) as comm:
        # Whether an exchange in the background has ended when one looks is another matter.
        alone = comm.size == 1 and not getattr(method, "overlap", False)
        found = Run(method, comm).steps(STEPS if alone else 4 * STEPS).found()
        size = comm.size
    if alone:
        with ranks(where[0]) as comm:
            wanted = Run(method, comm).steps(STEPS).found()
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert np.isfinite(found).all()
    low, high = min(B[:size].min(), START.min()), max(B[:size].max(), START.max())
    assert (found >= low - 1.0).all()
    assert (found <= high + 1.0).all()


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    "method", [pytest.param(method, id=name) for name, method in ON_GPUS if not getattr(method, "overlap", False)]
)
def test_a_state_from_device_memory_continues_in_host_memory_and_back(world, method):
    """Run one rank, so that the run after a checkpoint equals the uninterrupted one."""
    with ranks(1) as comm:
        wanted = Run(method, comm).steps(6).found()
        state = Run(method, comm).steps(2).state()
    with gpus(1, "ipc") as comm:
        state = Run(method, comm).load(state).steps(2).state()
    with gpus(1, "staged") as comm:
        found = Run(method, comm).load(state).steps(2).found()
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
