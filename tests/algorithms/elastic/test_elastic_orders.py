"""The elastic exchange in every order: what it is, which methods it contains, its spectra (arXiv 1605.02216, ch. 6)."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.quadratic import change, radius, same_bits, simulate, slope, standard_error, statistics, sweep_matrix

from mpitrain.algorithms import EAMSGD, EASGD, AllReduceSGD
from mpitrain.algorithms.elastic.center import jacobi_rates

ORDERS = ["jacobi", "center_first", "worker_first"]
GAUSS_SEIDEL = ORDERS[1:]
SIZES = [1, 2, 3, 4, 5]
H, B = np.array([0.5, 1.0, 2.0, 0.8, 1.4]), np.array([1.0, -2.0, 0.5, 3.0, 0.1])


def synchronous(order, a_w, a_c, **more):
    return EASGD(moving_rate=a_w, center_rate=a_c, order=order, synchronous=True, **more)


def reduced(method, p, eh):
    """What one period does to (mean x, c), for workers that are alike: measured."""
    matrix = sweep_matrix(method, p, eh=eh, steps=method.period)
    return np.array(
        [[matrix[:p, :p].sum() / p, matrix[:p, p].mean()], [matrix[p, :p].sum(), matrix[p, p]]]
    )  # fmt: skip


def exchange(order, x, c, a_w, a_c):
    """The three definitions, for all workers at once: x (p, n), c (n,)."""
    if order == "center_first":
        c = c + a_c * (x - c).sum(0)
        return x - a_w * (x - c), c
    if order == "worker_first":
        x = x - a_w * (x - c)
        return x, c + a_c * (x - c).sum(0)
    return x - a_w * (x - c), c + a_c * (x - c).sum(0)


def run_by_definition(order, x, a_w, a_c, *, eta, steps, tau, grad_point, c=None):
    """Synchronous runs with the gradients h_i (x - b_i); a pre gradient is part of the worker's assignment."""
    p = len(x)
    h, b = H[:p, None], B[:p, None]
    c = x[0].copy() if c is None else c
    for t in range(steps):
        step = -eta * h * (x - b)
        if grad_point == "pre" and t % tau == 0:
            if order == "worker_first":
                x = x + step - a_w * (x - c)
                c = c + a_c * (x - c).sum(0)
            else:
                x, c = exchange(order, x, c, a_w, a_c)
                x = x + step
        else:
            x = x + step
        if grad_point == "post" and (t + 1) % tau == 0:
            x, c = exchange(order, x, c, a_w, a_c)
    return x, c


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("grad_point", ["pre", "post"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("p", SIZES)
def test_synchronous_runs_are_the_definitions(p, order, grad_point, tau):
    start = np.random.default_rng(p).normal(size=(p, 8))
    method = synchronous(order, 0.4, 0.15, period=tau, grad_point=grad_point)
    simulation = simulate(method, p, start=start, eta=0.1, gradient=slope(H, B)).run(7)
    x, c = run_by_definition(order, start, 0.4, 0.15, eta=0.1, steps=7, tau=tau, grad_point=grad_point)
    np.testing.assert_allclose(simulation.x(), x, rtol=0, atol=1e-13)
    for rank in range(p):
        np.testing.assert_allclose(simulation.consensus(rank), c, rtol=0, atol=1e-13)


@pytest.mark.parametrize("synchronous", [False, True])
def test_an_order_that_is_not_given_is_jacobi_with_equal_rates(synchronous):
    start, ends = np.random.default_rng(1).normal(size=(3, 30)), []
    for more in ({}, {"order": "jacobi"}, {"center_rate": 0.3}):
        method = EASGD(moving_rate=0.3, period=2, synchronous=synchronous, **more)
        simulation = simulate(method, 3, start=start, eta=0.1, gradient=slope(H, B)).run(9)
        ends.append(np.vstack([simulation.x(), simulation.consensus()]))
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])


# What is contained: synchronous DOWNPOUR, model averaging, mini-batch SGD.


@pytest.mark.parametrize("tau", [1, 4])
@pytest.mark.parametrize("p", SIZES)
def test_center_first_with_full_rates_is_synchronous_downpour(p, tau):
    # Every worker begins at c, makes tau steps, and the center takes all displacements in full.
    start, eta = np.random.default_rng(2).normal(size=6), 0.03
    method = synchronous("center_first", 1.0, 1.0, period=tau, grad_point="post")
    simulation = simulate(method, p, start=start, eta=eta, gradient=slope(H, B)).run(5 * tau)
    c = start.copy()
    for _ in range(5):
        displacements = np.zeros(6)
        for h, b in zip(H[:p], B[:p]):
            x = c.copy()
            for _ in range(tau):
                x = x - eta * h * (x - b)
            displacements += x - c
        c = c + displacements
    np.testing.assert_allclose(simulation.consensus(), c, rtol=0, atol=1e-12)
    np.testing.assert_allclose(simulation.x(), np.tile(c, (p, 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("p", SIZES)
def test_synchronous_downpour_shrinks_alike_workers_as_1_minus_p_times_one(p, tau):
    eh, k = 0.05, 6
    method = synchronous("center_first", 1.0, 1.0, period=tau, grad_point="post")
    simulation = simulate(method, p, start=np.ones(1), eta=eh).run(k * tau)
    q = 1 - (1 - eh) ** tau
    assert simulation.consensus()[0] == pytest.approx((1 - p * q) ** k, abs=1e-13)
    if (p, tau) == (4, 1):
        assert simulation.consensus()[0] == pytest.approx((1 - 4 * eh) ** k, abs=1e-13)


@pytest.mark.parametrize("tau", [1, 5])
@pytest.mark.parametrize("p", SIZES)
def test_center_first_with_rate_1_over_p_is_model_averaging(p, tau):
    start, eta = np.random.default_rng(3).normal(size=6), 0.1
    method = synchronous("center_first", 1.0, 1.0 / p, period=tau, grad_point="post")
    simulation = simulate(method, p, start=start, eta=eta, gradient=slope(H, B)).run(4 * tau)
    mean = start.copy()
    for _ in range(4):
        # tau steps of SGD on h (x - b)^2 / 2 have a closed form
        ends = [b + (1 - eta * h) ** tau * (mean - b) for h, b in zip(H[:p], B[:p])]
        mean = np.mean(ends, axis=0)
    np.testing.assert_allclose(simulation.consensus(), mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(simulation.x(), np.tile(mean, (p, 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", SIZES)
def test_model_averaging_of_alike_workers_is_sgd(p):
    eh, k, tau = 0.05, 4, 5
    method = synchronous("center_first", 1.0, 1.0 / p, period=tau, grad_point="post")
    simulation = simulate(method, p, start=np.ones(1), eta=eh).run(k * tau)
    assert simulation.consensus()[0] == pytest.approx((1 - eh) ** (5 * k), abs=1e-13)


@pytest.mark.parametrize("p", SIZES)
def test_model_averaging_at_every_step_is_mini_batch_sgd(p):
    start = np.random.default_rng(4).normal(size=50)
    averaged = synchronous("center_first", 1.0, 1.0 / p, period=1, grad_point="post")
    ends = [
        simulate(method, p, start=start, eta=0.1, gradient=slope(H, B, sigma=0.5, seed=5)).run(20)
        for method in (averaged, AllReduceSGD())
    ]
    np.testing.assert_allclose(ends[0].x(), ends[1].x(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(ends[0].consensus(), ends[1].consensus(), rtol=0, atol=1e-12)


# Spectra.


@pytest.mark.parametrize("tau", [1, 4])
@pytest.mark.parametrize("grad_point", ["pre", "post"])
@pytest.mark.parametrize("order", ORDERS)
def test_mean_and_center_follow_the_matrix_of_the_order(order, grad_point, tau):
    eh, alpha, beta, p = 0.1, 0.35, 0.8, 4
    e = eh if grad_point == "pre" else 0.0
    worker, center = np.array([1 - e - alpha, alpha]), np.array([beta, 1 - beta])
    if order == "center_first":  # x - alpha (x - c_new), c_new = beta x + (1 - beta) c
        worker = np.array([1 - e - alpha + alpha * beta, alpha * (1 - beta)])
    if order == "worker_first":  # c_new = (1 - beta) c + beta x_new
        center = np.array([beta * (1 - e - alpha), 1 - beta + alpha * beta])
    one = np.array([worker, center])
    local = np.diag([(1 - eh) ** (tau - 1 if grad_point == "pre" else tau), 1.0])
    wanted = local @ one if grad_point == "pre" else one @ local
    method = synchronous(order, alpha, beta / p, grad_point=grad_point, period=tau)
    np.testing.assert_allclose(reduced(method, p, eh), wanted, rtol=0, atol=1e-13)


rates = st.floats(0.01, 1.99)


@settings(max_examples=40)
@given(rates, rates, rates, st.sampled_from(GAUSS_SEIDEL), st.integers(1, 4))
def test_gauss_seidel_orders_share_a_spectrum(eh, alpha, beta, order, p):
    matrix = reduced(synchronous(order, alpha, beta / p, period=1), p, eh)
    assert np.trace(matrix) == pytest.approx(2 - eh - alpha - beta + alpha * beta, abs=1e-12)
    assert np.linalg.det(matrix) == pytest.approx((1 - eh - alpha) * (1 - beta), abs=1e-12)


@settings(max_examples=60)
@given(rates, rates, rates, st.sampled_from(GAUSS_SEIDEL))
def test_gauss_seidel_is_stable_exactly_in_its_region(eh, alpha, beta, order):
    first = (2 - beta) * (2 - eh) - 2 * alpha * (1 - beta)
    second = 1 - abs((1 - eh - alpha) * (1 - beta))
    assume(abs(first) > 1e-6)
    assume(abs(second) > 1e-6)
    largest = radius(reduced(synchronous(order, alpha, beta / 2, period=1), 2, eh))
    assert (largest < 1) == (first > 0 and second > 0)


@settings(max_examples=60)
@given(rates, rates, rates)
def test_jacobi_is_stable_exactly_in_its_smaller_region(eh, alpha, beta):
    margin = (2 - beta) * (2 - eh) - 2 * alpha
    assume(abs(margin) > 1e-6)
    largest = radius(reduced(synchronous("jacobi", alpha, beta / 2, period=1), 2, eh))
    assert (largest < 1) == (margin > 0 and (2 - eh) + (2 - beta) > alpha)
    if largest < 1 and beta < 1:
        assert radius(reduced(synchronous("center_first", alpha, beta / 2, period=1), 2, eh)) < 1


@pytest.mark.parametrize("eh", [0.01, 0.3, 1.5])
def test_full_rates_are_sgd_in_gauss_seidel_order_and_unstable_in_jacobi(eh):
    for order in GAUSS_SEIDEL:
        assert radius(reduced(synchronous(order, 1.0, 1.0 / 3, period=1), 3, eh)) == pytest.approx(abs(1 - eh))
    assert radius(reduced(synchronous("jacobi", 1.0, 1.0 / 3, period=1), 3, eh)) > 1


# Any two rates: the best moving rate, momentum, the variance it costs, the fixed point.


def test_best_moving_rate_is_negative_and_the_formulas():
    # alpha* = -(sqrt(beta) - sqrt(eh))^2, radius* = 1 - sqrt(eh beta)
    eh, beta, p = 0.1, 0.9, 4
    grid = np.linspace(-0.9, 0.5, 281)  # steps of 0.005, alpha* among them
    radii = [radius(reduced(synchronous("jacobi", float(alpha), beta / p, period=1), p, eh)) for alpha in grid]
    best = int(np.argmin(radii))
    assert grid[best] == pytest.approx(-((np.sqrt(beta) - np.sqrt(eh)) ** 2), abs=1e-9)
    assert grid[best] == pytest.approx(-0.4, abs=1e-9)
    # At the optimum the two eigenvalues meet: they are known to the root of the rounding only.
    assert radii[best] == pytest.approx(1 - np.sqrt(eh * beta), abs=1e-6)
    assert radii[best] == pytest.approx(0.7, abs=1e-6)
    symmetric = radii[int(np.argmin(np.abs(grid - 0.225)))]
    assert symmetric == pytest.approx(0.9215002341, abs=5e-11)


@pytest.mark.parametrize("delta", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("p", [1, 4])
def test_moving_rate_of_minus_dh_is_nesterov_momentum(p, delta):
    eh = 0.1
    dh = delta * (1 - eh)
    measured = np.linalg.eigvals(reduced(synchronous("jacobi", -dh, 1.0 / p, period=1), p, eh))
    nesterov = np.linalg.eigvals([[dh, -eh], [dh, 1 - eh]])  # on (v, x)
    np.testing.assert_allclose(np.sort_complex(measured), np.sort_complex(nesterov), atol=1e-7)


def test_center_with_a_negative_rate_moves_as_nesterov_momentum_does():
    eh, delta, steps = 0.1, 0.5, 25
    dh = delta * (1 - eh)
    start = np.random.default_rng(6).normal(size=7)
    centers = [start]
    simulation = simulate(synchronous("jacobi", -dh, 0.5, period=1), 2, start=start, eta=eh)
    simulation.run(steps, lambda s, rank: centers.append(s.consensus()) if rank == 0 else None)
    momentum = simulate(EAMSGD(momentum=delta, moving_rate=0.0, period=1), 1, start=start, eta=eh)
    positions = [start]
    momentum.run(steps, lambda s, rank: positions.append(dict(s.workers[0].state())["position"].copy()))
    for series in (centers, positions):  # both are AR(2): x'' = (1 - eh + dh) x' - dh x
        for before, now, after in zip(series, series[1:], series[2:]):
            np.testing.assert_allclose(after, (1 - eh + dh) * now - dh * before, rtol=0, atol=1e-13)


def test_variance_of_the_center_with_rates_set_apart_is_the_closed_form():
    # Var(c) = beta^2 eta^2 (sigma^2/p) (2-a+q) / ((a-q) q (4-2a+q)), a = eh+alpha+beta, q = eh*beta. One worker:
    # several would move apart with the negative rate, which is the fastest.
    eta, beta, d, variances = 0.1, 0.9, 40_000, []
    for alpha in (-0.4, 0.225):
        a, q = eta + alpha + beta, eta * beta
        formula = beta**2 * eta**2 * (2 - a + q) / ((a - q) * q * (4 - 2 * a + q))
        method = synchronous("jacobi", alpha, beta, period=1)
        simulation = simulate(method, 1, start=np.zeros(d), eta=eta, gradient=slope(sigma=1.0, seed=7)).run(150)
        variances.append(simulation.consensus().var())
        assert variances[-1] == pytest.approx(formula, abs=4 * standard_error(formula, d))
    assert variances[0] > 2 * variances[1]  # the price of its speed


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("center_rate", [0.05, 0.2])
def test_fixed_point_knows_neither_the_center_rate_nor_the_order(order, center_rate):
    # The envelopes': c* = sum w_i b_i / sum w_i, w_i = h_i rho / (h_i + rho); x_i* = (h_i b_i + rho c*)/(h_i + rho)
    h, b, rho, eta = np.array([0.5, 1, 2, 4]), np.array([1, -2, 0.5, 3]), 1.5, 0.1
    method = EASGD(rho=rho, center_rate=center_rate, order=order, period=1, synchronous=True)
    simulation = simulate(method, 4, start=np.zeros(3), eta=eta, gradient=slope(h, b)).run(1500)
    c = 0.9840053316
    np.testing.assert_allclose(simulation.consensus(), c, atol=5e-10)
    x = (h * b + rho * c) / (h + rho)
    np.testing.assert_allclose(simulation.x(), np.outer(x, np.ones(3)), atol=5e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_worker_before_a_center_that_rests_balances_gradient_and_spring(order):
    # -eta g(x) = eta rho (x - c): x = (h x* + rho c)/(h + rho), and more local steps change nothing
    h, best, rho, c = 2.0, 3.0, 5.0, -1.0
    method = EASGD(rho=rho, center_rate=0.0, order=order, period=1)
    simulation = simulate(method, 1, start=np.array([7.0]), eta=0.05, gradient=slope(h, best))
    change(simulation, center=np.array([c])).run(300)
    assert simulation.x()[0, 0] == pytest.approx((h * best + rho * c) / (h + rho), abs=1e-12)
    assert simulation.consensus()[0] == c


# Asynchronous: for one worker every order is a Jacobi exchange.


@given(st.sampled_from(ORDERS), st.floats(-1.5, 1.5), st.floats(-1.5, 1.5), st.floats(-9, 9), st.floats(-9, 9))
def test_jacobi_rates_do_what_the_order_says(order, a_w, a_c, x, c):
    one_x, one_c = exchange(order, np.array([[x]]), np.array([c]), a_w, a_c)
    other_x, other_c = exchange("jacobi", np.array([[x]]), np.array([c]), *jacobi_rates(order, a_w, a_c))
    np.testing.assert_allclose([one_x[0], one_c], [other_x[0], other_c], rtol=0, atol=1e-12)


def turn(order, eh, a_w, a_c):
    """What one worker's step with an exchange, gradient from before, does to (x_i, c)."""
    worker, center = np.array([1 - eh - a_w, a_w]), np.array([a_c, 1 - a_c])
    if order == "center_first":
        worker = np.array([1 - eh - a_w + a_w * a_c, a_w * (1 - a_c)])
    if order == "worker_first":
        center = np.array([a_c * (1 - eh - a_w), 1 - a_c + a_c * a_w])
    return np.array([worker, center])


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_round_robin_sweep_is_the_product_of_the_turns(order, p):
    eh, a_w, a_c = 0.2, 0.45, 0.3
    sweep = np.eye(p + 1)
    for i in range(p):
        sweep[[i, p]] = turn(order, eh, a_w, a_c) @ sweep[[i, p]]
    method = EASGD(moving_rate=a_w, center_rate=a_c, order=order, period=1)
    np.testing.assert_allclose(sweep_matrix(method, p, eh=eh), sweep, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("p", "wanted"), [(3, 0.9992697476), (8, 0.9991156981)])
def test_center_first_has_the_papers_sweep_radius_at_rates_that_are_equal_in_effect(p, wanted):
    alpha = 0.0025
    method = EASGD(moving_rate=alpha / (1 - alpha), center_rate=alpha, order="center_first", period=1)
    assert radius(sweep_matrix(method, p, eh=0.001)) == pytest.approx(wanted, abs=5e-11)


@settings(max_examples=40)
@given(st.floats(0, 2), st.floats(0, 1), st.integers(1, 5))
def test_center_first_is_stable_in_turns_inside_the_papers_bound(eh, fraction, p):
    # alpha <= (4 - 2 eh)/(4 - eh), whatever p, for what the rates are in effect
    alpha = min(fraction * (4 - 2 * eh) / (4 - eh), 0.66)
    method = EASGD(moving_rate=alpha / (1 - alpha), center_rate=alpha, order="center_first", period=1)
    assert radius(sweep_matrix(method, p, eh=eh)) <= 1 + 1e-7


@given(st.floats(0, 1.9), st.floats(1.01, 2))
def test_a_turn_beyond_the_papers_bound_enlarges(eh, fraction):
    alpha = fraction * (4 - 2 * eh) / (4 - eh)
    assume(0 < alpha < 2)
    assert radius(sweep_matrix(EASGD(moving_rate=alpha, period=1), 1, eh=eh)) > 1


@pytest.mark.parametrize("synchronous", [False, True])
def test_gradient_between_the_halves_costs_no_more_bytes(synchronous):
    sent = []
    for order in ORDERS:
        method = EASGD(moving_rate=0.2, order=order, period=2, synchronous=synchronous)
        sent.append(statistics(simulate(method, 3, start=np.ones(64), eta=0.1).run(8), "bytes_sent"))
    assert sent[0] == sent[1] == sent[2]


@pytest.mark.parametrize("synchronous", [False, True])
@pytest.mark.parametrize("grad_point", ["pre", "post"])
@pytest.mark.parametrize("order", GAUSS_SEIDEL)
@pytest.mark.parametrize("kind", [EASGD, EAMSGD])
def test_what_is_not_finite_never_reaches_the_center_in_any_order(kind, order, grad_point, synchronous):
    def gradient(rank, x):
        g = x.copy()
        if rank == 1:
            g[2] = np.nan
        return g

    method = kind(moving_rate=0.2, order=order, grad_point=grad_point, period=1, synchronous=synchronous)
    simulation = simulate(method, 3, start=np.ones(5), eta=0.1, gradient=gradient).run(10)
    assert np.isfinite(simulation.consensus()).all()
    assert np.isfinite(simulation.x()[[0, 2]]).all()
    assert sum(statistics(simulation, "n_nonfinite")) > 0


# Remarks on settings.


def remarks(p, eta=0.1, **values):
    return list(EASGD(**values).warnings(p, eta))


@pytest.mark.parametrize("p", [1, 2, 4, 16])
def test_nothing_is_remarked_where_all_is_well(p):
    for order, synchronous, grad_point in itertools.product(ORDERS, (False, True), ("pre", "post")):
        assert not remarks(p, order=order, synchronous=synchronous, grad_point=grad_point)
    # model averaging, and DOWNPOUR with few workers
    averaging = {"order": "center_first", "synchronous": True, "grad_point": "post", "moving_rate": 1.0}
    assert not remarks(p, **averaging, center_rate=1 / p, period=64)
    assert not remarks(p, **averaging, center_rate=1.0, period=1)


@pytest.mark.parametrize(
    ("p", "values", "words"),
    [
        (4, {"moving_rate": 0.5}, ["p*moving_rate is 2", "0.225"]),
        (4, {"rho": 5.0}, ["p*moving_rate is 2", "rho that is 2.25"]),
        (8, {"moving_rate": 0.3, "synchronous": True}, ["no learning rate", "0.113"]),
        (1, {"moving_rate": -0.4, "center_rate": 0.9}, ["negative", "momentum"]),
        (4, {"order": "center_first", "moving_rate": 1.0, "center_rate": 1.0, "grad_point": "post", "period": 64,
             "synchronous": True}, ["center_first", "not stable"]),
        (2, {"order": "worker_first", "moving_rate": -0.4, "synchronous": True}, ["worker_first", "not stable"]),
    ],
)  # fmt: skip
def test_settings_outside_the_region_are_remarked_on_with_one_inside(p, values, words):
    found = remarks(p, **values)
    assert found
    for word in words:
        assert word in found[0]
    assert "inside" in found[0]


def test_remarks_need_no_learning_rate():
    assert remarks(4, eta=0.0, rho=1.0, center_rate=1.5, order="center_first", synchronous=True)
    assert not remarks(4, eta=0.0, rho=1.0)


def test_center_that_flees_the_workers_is_remarked_on_and_does():
    assert "flees" in remarks(1, moving_rate=-0.4)[1]
    assert len(remarks(1, moving_rate=-0.4, center_rate=0.9)) == 1
    for eh in (0.01, 0.1, 1.0):
        assert radius(sweep_matrix(EASGD(moving_rate=-0.4, period=1), 1, eh=eh)) > 1
