"""Parle and Entropy-SGD: the inner and the outer loop as equations, their special cases, and the springs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.on_ranks import RankRun, ranks
from support.quadratic import same_bits, simulate, slope, states, statistics

from mpitrain import theory
from mpitrain.algorithms import EntropySGD, Parle
from mpitrain.algorithms.base.replica import ParamGroupSlice

H, B = np.array([0.5, 1.0, 2.0]), np.array([1.0, -2.0, 0.5])
STARTS = np.random.default_rng(0).normal(size=(3, 6))
START = STARTS[0]


def of(simulation, name):
    return np.stack([state[name] for state in states(simulation)])


def two_loops(method, x, eta, steps, decay=0.0, n_batches=None):
    """Run the equations of the module's docstring with the gradients h_i (y - b_i); return x, y, z and r."""
    p = len(x)
    a, delta = method.averaging, method.momentum
    x, y, z, u, v, r = x.copy(), x.copy(), x.copy(), 0 * x, 0 * x, x.mean(0)
    ginv, rinv = method.gamma_inverse, method.rho_inverse
    for t in range(1, steps + 1):
        g = H[:p, None] * (y - B[:p, None]) + decay * y + ginv * (y - x)
        v = delta * v + g
        y = y - method.inner_rate * (g + delta * v)
        z = a * z + (1 - a) * y
        if t % method.period == 0:
            reference = z.mean(0) if method.reference == "z" else r
            d = (x - z) + rinv * (x - reference)
            u = delta * u + d
            x = x - eta * (d + delta * u)
            y, z, v, r = x, x, 0 * v, x.mean(0)
            if n_batches is not None:
                ginv = min(ginv * (1 + 1 / (2 * n_batches)), method.gamma_inverse_cap)
                rinv = min(rinv * (1 + 1 / (2 * n_batches)), method.rho_inverse_cap)
    return x, y, z, r


@given(
    st.sampled_from(["x", "z"]),
    st.integers(1, 4),
    st.integers(0, 25),
    st.sampled_from([None, 1, 5]),
    st.sampled_from([0.0, 0.1]),
)
def test_any_settings_follow_the_equations(reference, period, steps, n_batches, decay):
    method = Parle(
        period=period, reference=reference, inner_rate=0.08, momentum=0.7, averaging=0.6, gamma_inverse=0.3,
        gamma_inverse_cap=0.5, rho_inverse=0.9, rho_inverse_cap=2.0, scoping_batches=n_batches,
    )  # fmt: skip
    simulation = simulate(method, 3, start=STARTS, eta=0.2, decay=decay, gradient=slope(H, B)).run(steps)
    x, y, z, r = two_loops(method, STARTS, 0.2, steps, decay, n_batches)
    for name, wanted in (("position", x), ("parameters", y), ("running_average", z)):
        np.testing.assert_allclose(of(simulation, name), wanted, rtol=0, atol=1e-10)
    np.testing.assert_allclose(simulation.consensus(2), r, rtol=0, atol=1e-10)


def test_inner_iterate_without_momentum_is_the_closed_form():
    method = Parle(period=1000, inner_rate=0.1, momentum=0.0, gamma_inverse=0.5, scoping_batches=None)
    simulation = simulate(method, 1, start=np.ones(1), eta=0.1, gradient=slope(1.0)).run(25)
    assert simulation.x()[0, 0] == pytest.approx(0.3447985399, abs=5e-11)
    assert simulation.x()[0, 0] == pytest.approx(theory.parle_inner_iterate(1.0, 0.5, 0.1, 1.0, 25), abs=1e-12)
    assert simulation.run(500).x()[0, 0] == pytest.approx(0.5 / 1.5, abs=1e-12)


def test_inner_loop_with_momentum_ends_at_the_same_fixed_point():
    method = Parle(period=1000, gamma_inverse=0.3, scoping_batches=None)
    simulation = simulate(method, 1, start=START, eta=0.1, gradient=slope(2.0)).run(900)
    np.testing.assert_allclose(simulation.x()[0], 0.3 * START / 2.3, rtol=0, atol=1e-12)


def test_one_inner_step_without_springs_is_nesterovs_sgd():
    # From rest y - x = -eta_in (1 + delta) g, so that x - z is (1 - a) eta_in (1 + delta) times the gradient.
    method = Parle(period=1, gamma_inverse=0.0, rho_inverse=0.0, inner_rate=0.2, averaging=0.6, momentum=0.9)
    x = torch.nn.Parameter(torch.from_numpy(START.copy()))
    rate = 0.5 * (1 - 0.6) * 0.2 * 1.9
    torchs = torch.optim.SGD([x], lr=rate, momentum=0.9, nesterov=True, weight_decay=0.05)
    simulation = simulate(method, 1, start=START, eta=0.5, decay=0.05, gradient=slope(H, B))
    for _ in range(40):
        x.grad = H[0] * (x.detach() - B[0])
        torchs.step()
        np.testing.assert_allclose(simulation.run(1).x()[0], x.detach().numpy(), rtol=0, atol=1e-12)


def test_one_inner_step_with_springs_between_replicas_is_elastic_sgd_with_a_growing_rho():
    method = Parle(
        period=1, gamma_inverse=0.0, momentum=0.0, averaging=0.0, rho_inverse=0.5, rho_inverse_cap=0.6,
        scoping_batches=4,
    )  # fmt: skip
    simulation = simulate(method, 3, start=STARTS, eta=0.3, gradient=slope(H, B))
    x = STARTS
    for t in range(12):
        alpha = 0.3 * min(0.5 * (1 + 1 / 8) ** t, 0.6)
        x = x - 0.3 * 0.1 * H[:, None] * (x - B[:, None]) - alpha * (x - x.mean(0))
        np.testing.assert_allclose(simulation.run(1).x(), x, rtol=0, atol=1e-12)


def test_replicas_without_springs_between_them_are_entropy_sgd_each():
    parle = simulate(Parle(period=4, rho_inverse=0.0), 3, start=STARTS, eta=0.2, gradient=slope(H, B)).run(18)
    for rank in range(3):
        alone = simulate(EntropySGD(period=4), 1, start=STARTS[rank], eta=0.2, gradient=slope(H[rank], B[rank]))
        np.testing.assert_allclose(parle.x()[rank], alone.run(18).x()[0], rtol=0, atol=1e-12)


def test_entropy_sgd_on_several_workers_is_one_with_their_mean_gradient():
    several = simulate(EntropySGD(period=4), 3, start=START, eta=0.2, gradient=slope(H, B)).run(18)
    mean = slope(H.mean(), (H * B).mean() / H.mean())
    one = simulate(EntropySGD(period=4), 1, start=START, eta=0.2, gradient=mean).run(18)
    np.testing.assert_allclose(several.x(), np.tile(one.x(), (3, 1)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(several.consensus(1), one.consensus(), rtol=0, atol=1e-12)
    assert same_bits(several.x()[0], several.x()[1])


@pytest.mark.parametrize("rho_inverse", [0.0, 1.0, 7.0])
def test_springs_pull_the_replicas_together_and_leave_their_mean(rho_inverse):
    # Where the gradient is one and the same everywhere, z differs from x by the same on all: the springs are alone.
    method = Parle(period=3, rho_inverse=rho_inverse, scoping_batches=None)
    ends = simulate(method, 3, start=STARTS, eta=0.1, gradient=lambda rank, x: np.full(6, 0.3)).run(30)
    free = simulate(Parle(period=3, rho_inverse=0.0, scoping_batches=None), 3, start=STARTS, eta=0.1)
    free.gradient = ends.gradient
    np.testing.assert_allclose(ends.x().mean(0), free.run(30).x().mean(0), rtol=0, atol=1e-12)
    spread = np.ptp(ends.x(), axis=0) / np.ptp(STARTS, axis=0)
    if rho_inverse == 0:
        np.testing.assert_allclose(spread, 1.0)
    else:
        np.testing.assert_array_less(spread, 0.5)


def test_one_outer_step_moves_the_mean_whatever_the_springs_and_the_gradients():
    means = [
        of(simulate(Parle(period=5, rho_inverse=r), 3, start=STARTS, eta=0.1, gradient=slope(H, B)).run(5), "position")
        for r in (0.0, 4.0)
    ]
    np.testing.assert_allclose(means[0].mean(0), means[1].mean(0), rtol=0, atol=1e-12)
    assert np.abs(means[0] - means[1]).max() > 0.1


@pytest.mark.parametrize("reference", ["x", "z"])
@pytest.mark.parametrize("p", [2, 3, 5])
def test_equal_replicas_with_equal_batches_stay_equal(p, reference):
    start = START.astype(np.float32)
    simulation = simulate(
        Parle(period=3, reference=reference), p, start=start, eta=0.1, gradient=lambda rank, x: np.sin(x)
    ).run(17)
    for rank in range(1, p):
        assert same_bits(simulation.x()[rank], simulation.x()[0])
        assert same_bits(simulation.consensus(rank), simulation.consensus(0))


@pytest.mark.parametrize("reference", ["x", "z"])
def test_the_mean_position_is_evaluated_and_equal_on_all_workers(reference):
    simulation = simulate(Parle(period=4, reference=reference), 3, start=STARTS, eta=0.1, gradient=slope(H, B))
    np.testing.assert_allclose(simulation.consensus(), STARTS.mean(0), rtol=0, atol=1e-15)
    simulation.run(10)
    np.testing.assert_allclose(simulation.consensus(), of(simulation, "position").mean(0), rtol=0, atol=1e-14)
    assert same_bits(simulation.consensus(2), simulation.consensus(0))


def test_couplings_grow_once_per_outer_step_up_to_their_caps():
    method = Parle(period=25, scoping_batches=100)
    assert [method.gamma_inverse_at(t) for t in (0, 24)] == [0.01, 0.01]
    assert method.gamma_inverse_at(25 * 7) == pytest.approx(0.01 * 1.005**7, rel=1e-12)
    assert method.rho_inverse_at(25 * 7 + 3) == pytest.approx(1.005**7, rel=1e-12)
    assert (method.gamma_inverse_at(10**12), method.rho_inverse_at(10**12)) == (1.0, 10.0)
    fixed = Parle(scoping_batches=None, gamma_inverse=0.3, rho_inverse=20.0)
    assert (fixed.gamma_inverse_at(10**12), fixed.rho_inverse_at(0)) == (0.3, 10.0)
    assert Parle(rho_inverse=0.0).rho_inverse_at(10**12) == 0
    simulation = simulate(Parle(period=2, scoping_batches=1), 2, start=START, eta=0.1).run(5)
    assert simulation.workers[0].metrics() == pytest.approx({"gamma_inverse": 0.01 * 2.25, "rho_inverse": 2.25})


@pytest.mark.parametrize("method", [EntropySGD(period=3), Parle(period=3), Parle(period=3, reference="z")])
def test_each_part_of_the_vector_has_its_own_learning_rate_and_weight_decay(method):
    parts = [ParamGroupSlice(slice(0, 2), 0.3, 0.1), ParamGroupSlice(slice(2, 6), 0.05, 0.0)]
    whole = simulate(method, 2, start=START, eta=0.0, gradient=slope(H, B))

    def program(comm):
        worker = whole.workers[comm.rank]
        for _ in range(7):
            worker.g.local[...] = whole.gradient(comm.rank, worker.x.local)
            worker.step(parts, None)

    whole.world.run(program)
    for part in parts:
        alone = simulate(
            method, 2, start=START[part.part], eta=part.learning_rate, decay=part.weight_decay, gradient=slope(H, B)
        ).run(7)
        np.testing.assert_allclose(whole.x()[:, part.part], alone.x(), rtol=0, atol=1e-14)


def test_a_replica_that_is_not_finite_is_left_out():
    def gradient(rank, x):
        return np.where(np.arange(6) == 2, np.inf, 0.0) if rank == 1 else H[rank] * (x - B[rank])

    parle = simulate(Parle(period=2), 3, start=STARTS, eta=0.1, gradient=gradient).run(8)
    assert np.isfinite(parle.x()[[0, 2]]).all()
    np.testing.assert_allclose(parle.consensus(1), of(parle, "position")[[0, 2]].mean(0), rtol=0, atol=1e-14)
    assert statistics(parle, "n_nonfinite")[1] > 0
    assert statistics(parle, "n_nonfinite")[::2] == [0, 0]
    entropy = simulate(EntropySGD(period=2), 3, start=START, eta=0.1, gradient=gradient).run(8)
    assert np.array_equal(entropy.x(), np.tile(START, (3, 1)))  # it averages gradients: all leave out the step
    assert statistics(entropy, "n_nonfinite")[::2] == [8, 8]  # its own elements a rank counts when it collects them


@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_replicas_diverge_exactly_where_the_warning_begins(factor):
    momentum, rinv = 0.5, 3.0
    bound = 2 * (1 + momentum) / (1 + 2 * momentum)
    # On a flat loss x - z = 0, and what replicas differ by makes Nesterov's steps with the curvature 1/rho.
    eta = factor * bound / rinv
    method = Parle(period=1, momentum=momentum, gamma_inverse=0.0, rho_inverse=rinv, scoping_batches=None)
    end = simulate(method, 2, start=STARTS[:2], eta=eta, gradient=lambda rank, x: 0 * x).run(400)
    assert (np.ptp(end.x(), axis=0).max() < 1e-2) == (factor < 1)
    # x - z is at most x: the warning counts it as 1 more.
    told = [list(method.warnings(p, factor * bound / (1 + rinv))) for p in (1, 2)]
    assert [len(lines) for lines in told] == [0, int(factor > 1)]


@pytest.mark.ranks(3)
@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("reference", ["x", "z"])
def test_between_ranks_springs_leave_the_mean_to_the_gradients(world, n_nodes, reference):
    with ranks(n_nodes) as comm:
        start = np.random.default_rng(comm.rank).normal(size=300)
        method = Parle(period=2, gamma_inverse=0.0, momentum=0.0, averaging=0.0, reference=reference)
        run = RankRun(method, comm, start)
        mean = run.sum(start) / comm.size
        for _ in range(5):
            used = run.run(2, 0.2, lambda rank, x: np.full(300, 0.5))
            # x - z is eta_in times the two gradients; so far it pulls to a mean of z that lies behind the mean of x
            behind = 0.1 * run.sum(used) / comm.size
            rinv = 1.0 * (1 + 1 / 780) ** (run.worker.t // 2 - 1)
            mean = mean - 0.2 * behind * (1 + rinv * (reference == "z"))
            out = np.empty(300)
            run.worker.consensus(out)
            np.testing.assert_allclose(out, mean, rtol=0, atol=1e-12)
        everyones = np.stack([state["reference"] for state in run.states()])
        assert same_bits(everyones, np.tile(everyones[0], (comm.size, 1)))
