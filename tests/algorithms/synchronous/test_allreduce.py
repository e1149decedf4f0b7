"""All-reduce SGD: p workers with a mini-batch of b are one with p*b."""

import numpy as np
import pytest
import torch
from support.quadratic import simulate, slope, standard_error

from mpitrain.algorithms import AllReduceSGD
from mpitrain.algorithms.base.replica import ParamGroupSlice, Replica
from mpitrain.simulation.schedules import RandomOrder
from mpitrain.simulation.world import SimulatedWorld


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


def sliced(p, nodes, schedule=None):
    """Workers of which those of a node hold one copy of the parameters: what each holds after some steps."""
    rng, n = np.random.default_rng(5), 53
    start, h, b = rng.normal(size=n), np.linspace(0.2, 1.5, p), rng.normal(size=p)
    group_slices = [
        ParamGroupSlice(slice(0, 20), 0.1, 0.01, 0.9),
        ParamGroupSlice(slice(20, 37), 0.05, 0.0, 0.8, nesterov=True),
        ParamGroupSlice(slice(37, n), 0.2, 0.02),
    ]
    gradient = slope(h, b)

    def program(comm):
        x, g = comm.node_vector(n, np.float64), comm.vector(n, np.float64)
        x.local[...] = start
        comm.barrier()
        worker = AllReduceSGD().worker(Replica(comm, x, g, node_shared=True))
        for _ in range(9):
            g.local[...] = gradient(comm.rank, x.local)
            worker.step(group_slices, None)
        out = np.empty(n)
        worker.consensus(out)
        comm.barrier()
        held = dict(worker.state())["velocity"]
        return out, held.size

    results = SimulatedWorld(p, schedule, nodes=nodes).run(program)

    parts = [torch.nn.Parameter(torch.from_numpy(start[group_slice.part].copy())) for group_slice in group_slices]
    alone = torch.optim.SGD(
        [
            {"params": [part], "lr": s.learning_rate, "weight_decay": s.weight_decay}
            | {"momentum": s.momentum, "nesterov": s.nesterov}
            for part, s in zip(parts, group_slices, strict=True)
        ]
    )
    for _ in range(9):
        for part in parts:
            at = part.detach().numpy()
            part.grad = torch.from_numpy(np.mean([gradient(rank, at) for rank in range(p)], axis=0))
        alone.step()
    return results, np.concatenate([part.detach().numpy() for part in parts])


@pytest.mark.parametrize("nodes", [[0], [0, 0], [0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
def test_workers_that_share_a_copy_take_torchs_steps_each_in_its_slice(nodes):
    results, wanted = sliced(len(nodes), nodes, RandomOrder(3))
    for x, _ in results:
        np.testing.assert_allclose(x, wanted, rtol=1e-12, atol=1e-13)
    for node in set(nodes):
        assert sum(held for (_, held), at in zip(results, nodes, strict=True) if at == node) == wanted.size
