"""EAMSGD, Algorithm 2 and eq. 7-8 of Zhang, Choromanska, LeCun (arXiv 1412.6651)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.elastic_definition import Exchanges
from support.quadratic import change, radius, same_bits, simulate, slope, standard_error, states, statistics

from mpitrain.algorithms import EAMSGD, EASGD
from mpitrain.simulation.schedules import RandomOrder, Scripted

P, BETA = 4, 0.9


def reduced(eh, delta, alpha=BETA / P, beta=BETA):
    """Return the matrix on (v, mean x, c), dh = delta (1 - eh)."""
    dh = delta * (1 - eh)
    return np.array([[delta * (1 - eh), -eh, 0], [dh, 1 - eh - alpha, alpha], [0, beta, 1 - beta]])


def transition(eh, delta):
    """Return the matrix on (v_1, ..., v_p, x_1, ..., x_p, c) of one synchronous step, from a run of unit vectors."""
    method = EAMSGD(momentum=delta, moving_rate=BETA / P, period=1, synchronous=True)
    unit = np.eye(2 * P + 1)
    v, x, c = unit[:P], unit[P : 2 * P], unit[2 * P]
    simulation = simulate(method, P, start=np.zeros(2 * P + 1), eta=eh)
    change(simulation, velocity=v, position=x, center=c, parameters=x + delta * v).run(1)
    after = states(simulation)
    rows = [[state[name] for state in after] for name in ("velocity", "position")]
    return np.vstack([*rows, simulation.consensus()])


@pytest.mark.parametrize(
    ("eh", "delta", "wanted"),
    [
        (0.1, 0.0, 0.921500), (0.1, 0.5, 0.833718), (0.1, 0.9, 0.890256), (0.1, 0.99, 0.934531),
        (0.01, 0.0, 0.992014), (0.01, 0.5, 0.983959), (0.01, 0.9, 0.942998), (0.01, 0.99, 0.989103),
    ],
)  # fmt: skip
def test_mean_velocity_and_center_follow_the_reduced_dynamics(eh, delta, wanted):
    full = transition(eh, delta)
    groups = np.zeros((3, 2 * P + 1))
    groups[0, :P] = groups[1, P : 2 * P] = 1 / P
    groups[2, 2 * P] = 1
    lifted = (groups > 0).astype(float).T  # workers that are alike
    np.testing.assert_allclose(groups @ full @ lifted, reduced(eh, delta), atol=1e-14)
    assert radius(reduced(eh, delta)) == pytest.approx(wanted, abs=5e-7)
    assert radius(groups @ full @ lifted) == pytest.approx(wanted, abs=5e-7)


def algorithm_2(script, exchanges, eta, delta, h, b, decay):
    """Run the loop of the paper, one step per entry of the script; the gradient is h_i (y - b_i) at y = x + delta v."""
    x, v = exchanges.x, np.zeros_like(exchanges.x)
    for i in script:
        y = x[i] + delta * v[i]
        g = h[i] * (y - b[i]) + decay * y
        exchanges.before(i)
        v[i] = delta * v[i] - eta * g
        x[i] = x[i] + v[i]
        exchanges.after(i)
    return x, v, x + delta * v, exchanges.c


@given(
    st.sampled_from(["pre", "post"]),
    st.sampled_from(["jacobi", "center_first", "worker_first"]),
    st.sampled_from([None, 0.15]),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.1]),
    st.lists(st.integers(0, 2), max_size=60),
)
def test_any_order_of_events_follows_algorithm_2(grad_point, order, center_rate, tau, decay, script):
    rng = np.random.default_rng(5)
    start, h, b = rng.normal(size=(3, 6)), rng.uniform(0.2, 2, 3), rng.normal(size=3)
    method = EAMSGD(
        momentum=0.8, moving_rate=0.3, center_rate=center_rate, order=order, period=tau, grad_point=grad_point
    )
    simulation = simulate(
        method, 3, start=start, eta=0.1, decay=decay, gradient=slope(h, b), schedule=Scripted(script)
    ).run(10**6)
    rates = (0.3, 0.3 if center_rate is None else center_rate)
    exchanges = Exchanges(start, rates, order=order, grad_point=grad_point, tau=tau)
    x, v, y, c = algorithm_2(script, exchanges, 0.1, 0.8, h, b, decay)
    after = states(simulation)
    for name, wanted in (("position", x), ("velocity", v), ("parameters", y)):
        np.testing.assert_allclose([state[name] for state in after], wanted, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(simulation.consensus(), c, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("synchronous", [False, True])
# EASGD's decay is taken after the exchange of the step, EAMSGD's with the gradient: post is where these are one.
@pytest.mark.parametrize(("grad_point", "decay"), [("pre", 0.0), ("post", 0.0), ("post", 0.01)])
@pytest.mark.parametrize("order", ["jacobi", "center_first", "worker_first"])
def test_without_momentum_it_is_easgd_bit_for_bit(dtype, tau, synchronous, grad_point, decay, order):
    start = np.random.default_rng(7).normal(size=(3, 50)).astype(dtype)
    ends = []
    for kind, more in ((EASGD, {}), (EAMSGD, {"momentum": 0.0})):
        method = kind(
            moving_rate=0.3, center_rate=0.2, order=order, period=tau, synchronous=synchronous,
            grad_point=grad_point, **more,
        )  # fmt: skip
        simulation = simulate(
            method, 3, start=start, eta=0.05, decay=decay, gradient=slope([0.5, 1.0, 2.0], [1.0, -2.0, 0.5]),
            schedule=RandomOrder(8), interleave_locks=True, largest_shard=16,
        ).run(12)  # fmt: skip
        ends.append(np.vstack([simulation.x(), simulation.consensus()]))
    assert same_bits(*ends)


def test_one_worker_alone_is_nesterov_momentum():
    # v <- delta v - eta g(x + delta v);  x <- x + v
    delta, eta, h = 0.9, 0.1, 1.7
    start = np.random.default_rng(9).normal(size=6)
    simulation = simulate(EAMSGD(momentum=delta, moving_rate=0.0, period=1), 1, start=start, eta=eta, gradient=slope(h))
    x, v = start.copy(), np.zeros(6)
    for _ in range(20):
        v = delta * v - eta * h * (x + delta * v)
        x = x + v
    np.testing.assert_allclose(states(simulation.run(20))[0]["position"], x, rtol=1e-12)


@pytest.mark.parametrize(("delta", "wanted"), [(0.5, 0.0941558442), (0.9, 0.2706339713)])
def test_variance_without_a_center_is_that_of_nesterov_momentum(delta, wanted):
    # Var(x) = (eta^2/eh) (1 + dh) / ((1 - dh) (2 (1 + dh) - eh)), dh = delta (1 - eh)
    eta, dh, d = 0.1, delta * 0.9, 40_000
    formula = eta * (1 + dh) / ((1 - dh) * (2 * (1 + dh) - eta))
    assert formula == pytest.approx(wanted, abs=5e-11)
    method = EAMSGD(momentum=delta, moving_rate=0.0, period=1)
    simulation = simulate(method, 1, start=np.zeros(d), eta=eta, gradient=slope(sigma=1.0, seed=10)).run(250)
    variance = states(simulation)[0]["position"].var()
    assert variance == pytest.approx(formula, abs=4 * standard_error(formula, d))


@pytest.mark.parametrize("synchronous", [False, True])
def test_exchanges_conserve_the_sum_of_positions_and_center(synchronous):
    method = EAMSGD(momentum=0.9, moving_rate=0.2, period=1, synchronous=synchronous)
    start = np.random.default_rng(11).normal(size=(3, 30))
    simulation = simulate(
        method, 3, start=start, eta=0.0, schedule=RandomOrder(3), interleave_locks=True, largest_shard=8
    ).run(15)
    total = sum(state["position"] for state in states(simulation)) + simulation.consensus()
    np.testing.assert_allclose(total, start.sum(0) + start[0], atol=1e-13)


@pytest.mark.parametrize("synchronous", [False, True])
def test_nan_never_reaches_the_center(synchronous):
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = np.nan
        return g

    method = EAMSGD(momentum=0.5, period=1, synchronous=synchronous)
    simulation = simulate(method, 3, start=np.ones(5), eta=0.1, gradient=gradient).run(10)
    assert np.isfinite(simulation.consensus()).all()
    assert np.isfinite(simulation.x()[[0, 2]]).all()
    assert simulation.consensus()[2] < 0.9  # drawn on by the others
    assert statistics(simulation, "n_nonfinite") == [0, 5, 0]  # in every other step it has recovered
