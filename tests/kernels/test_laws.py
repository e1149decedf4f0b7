"""The kernels compute their papers' formulas, conserve what they should, and keep non-finite values out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain import kernels


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


X, C, S, G, V = normal(5, 257)
A_W, A_C, ETA, DELTA, DECAY = 0.21, 0.34, 0.05, 0.9, 0.01
OUTER = X - ETA * ((X - G) + A_W * (X - C) + DELTA * (DELTA * V + (X - G) + A_W * (X - C)))  # x after entropy_outer
LAM = V - (X - C)  # the multiplier of ADMM after a turn, with x = X, lam = V, g = G, center C, and x after it
TURN = (X - ETA * (G + DECAY * X) + ETA * 2.5 * (LAM + C)) / (1 + ETA * 2.5)
MEAN = (C + S) / 2 + DECAY * X  # of two gradients C and S, with the decay

# Kernel: its arrays, its scalars, and what each array becomes. Every right-hand side is at the old values.
ORACLES = {
    "elastic_exchange": ([X, C], [A_W, A_C], [X - A_W * (X - C), C + A_C * (X - C)]),
    "elastic_displacement": ([X, C], [A_W, A_C], [A_W * (X - C), C + A_C * (X - C)]),
    "elastic_exchange_seen": ([X, C, S], [A_W, A_C], [X - A_W * (X - C), *[C + A_C * (X - C)] * 2]),
    # beta = p*alpha: c' = (1 - beta) c + beta mean(x), s = p mean(x)
    "elastic_center": ([C, S], [A_C / 4, 4], [(1 - A_C) * C + A_C * (S / 4), S]),
    "elastic_pull": ([X, C], [A_W], [(1 - A_W) * X + A_W * C, C]),
    "elastic_sync": ([X, C, S], [A_W, A_C / 4, 4], [(1 - A_W) * X + A_W * C, (1 - A_C) * C + A_C * (S / 4), S]),
    "elastic_sync_center_first": (
        [X, C, S],
        [A_W, A_C / 4, 4],
        [(1 - A_W) * X + A_W * ((1 - A_C) * C + A_C * (S / 4)), (1 - A_C) * C + A_C * (S / 4), S],
    ),
    "admm_local": ([X, V, C, G], [ETA, 2.5, DECAY], [TURN, LAM, TURN - LAM, G]),
    "admm_turn": (
        [X, V, S, G, C],
        [ETA, 2.5, DECAY, 0.25],
        [TURN, LAM, TURN - LAM, G, C + 0.25 * (TURN - LAM - S)],
    ),
    "admm_arrival": (
        [X, V, S, G, C, X],
        [ETA, 2.5, DECAY, 0.25],
        [TURN, LAM, TURN - LAM, G, C, X + 0.25 * (TURN - LAM - S)],
    ),
    "sgd_step": ([X, G], [ETA, DECAY], [(1 - ETA * DECAY) * X - ETA * G, G]),
    "heavy_ball_step": (
        [X, V, G],
        [ETA, DELTA, DECAY],
        [X + DELTA * V - ETA * (G + DECAY * X), DELTA * V - ETA * (G + DECAY * X), G],
    ),
    "lookahead": ([X, V, C], [DELTA], [X, V, X + DELTA * V]),
    "pair_average": ([X, C], [], [(X + C) / 2, C]),
    "symmetric_average": ([X, C], [], [(X + C) / 2, (X + C) / 2]),
    "push_receive": ([X, S], [3], [(X + S) / (1 + 3), S]),
    "commit_and_pull": ([X, V, C], [A_W], [C + A_W * (X - V)] * 3),
    "commit_only": ([X, V, C], [], [X, X, C + (X - V)]),
    "pull_only": ([X, V, C], [], [C, C - (X - V), C]),
    "commit_averaged": (
        [X, V, C, S],
        [A_C],
        [C + (X - V), C + (X - V), C + (X - V), (1 - A_C) * S + A_C * (C + (X - V))],
    ),
    "commit_gathered": ([X, V, C], [A_W], [C + A_W * V, 0 * V, C + A_W * V]),
    "gather_step": ([V, G, X], [ETA, DECAY], [V - ETA * (G + DECAY * X), G, X]),
    "master_momentum": (
        [X, G, C, V],
        [ETA, DELTA, DECAY],
        [
            C + (1 + DELTA) * (DELTA * V - ETA * (G + DECAY * X)),
            G,
            C + DELTA * V - ETA * (G + DECAY * X),
            DELTA * V - ETA * (G + DECAY * X),
        ],
    ),
    "adag_commit": ([X, V, C], [A_W, 4], [C + A_W * (X - V) / (4 * (C - V) ** 2 + 1)] * 3),
    "adag_scale": ([X, V, C], [A_W, 4], [A_W * (X - V) / (4 * (C - V) ** 2 + 1), C, C]),
    "adag_push": ([X, V, C], [], [V + X, V + X, C + X]),
    "scaled_add": ([C, X], [A_W], [C + A_W * X, X]),
    "scale": ([X], [A_W], [A_W * X]),
    "copy": ([X, C], [], [C, C]),
    "weighted_average": ([X, C], [0.3], [0.7 * X + 0.3 * C, C]),
    "debias": ([C, X], [0.7], [X / 0.7, X]),
    "keep_finite": ([X], [], [X]),
    "outer_gradient": ([V, C, X], [], [C - X, C, X]),
    "slow_momentum": (
        [X, C, V, G],
        [DELTA, 1 / ETA, A_W],
        [C - A_W * (DELTA * V + G / ETA), C - A_W * (DELTA * V + G / ETA), DELTA * V + G / ETA, G],
    ),
    "outer_nesterov": (
        [X, C, V, G],
        [ETA, DELTA],
        [C - ETA * (G + DELTA * (DELTA * V + G)), C - ETA * (G + DELTA * (DELTA * V + G)), DELTA * V + G, G],
    ),
    "delayed_correction": ([X, S, C], [], [X + C - S, S, C]),
    "entropy_outer": (
        [X, V, C, S, G, S],
        [ETA, DELTA, A_W],
        [OUTER, DELTA * V + (X - G) + A_W * (X - C), C, OUTER, OUTER, 0 * S],
    ),
    "receive": ([X, C], [], [C, C]),
    "accumulate": ([S, G], [A_W], [S + A_W * G, G]),
    "weighted_mix_2": ([X, C, S], [0.5, 0.2, 0.3], [0.5 * X + 0.2 * C + 0.3 * S, C, S]),
    "mean_sgd_step_2": ([X, C, S], [0.5, ETA, DECAY], [X - ETA * ((C + S) / 2 + DECAY * X), C, S]),
    "mean_momentum_step_2": (
        [X, V, C, S],
        [0.5, ETA, DELTA, DECAY],
        [X - ETA * (DELTA * V + MEAN), DELTA * V + MEAN, C, S],
    ),
    "mean_nesterov_step_2": (
        [X, V, C, S],
        [0.5, ETA, DELTA, DECAY],
        [X - ETA * (MEAN + DELTA * (DELTA * V + MEAN)), DELTA * V + MEAN, C, S],
    ),
    "sum_into_3": ([X, C, S, V], [1 / 3], [(C + S + V) / 3, C, S, V]),
    "sum_everywhere_3": ([C, S, V], [1 / 3], [(C + S + V) / 3] * 3),
}
TRAJECTORIES = {"eamsgd_step", "entropy_inner", "torch_momentum_step", "torch_nesterov_step"}
LIBRARY = {kernel.name: kernel for kernel in kernels.library()}


def test_every_kernel_has_an_oracle():
    assert set(ORACLES) | TRAJECTORIES == set(LIBRARY)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-14), (np.float32, 2e-6)])
@pytest.mark.parametrize("name", ORACLES)
def test_kernel_matches_its_papers_formula(name, dtype, tolerance):
    before, scalars, after = ORACLES[name]
    arrays = [array.astype(dtype) for array in before]
    assert LIBRARY[name](*arrays, *scalars) == 0
    for array, wanted in zip(arrays, after, strict=True):
        np.testing.assert_allclose(array, wanted, rtol=tolerance, atol=tolerance)


def test_eamsgd_step_is_nesterov_momentum_with_gradients_at_the_look_ahead():
    h, b = np.abs(normal(30, seed=1)), normal(30, seed=2)  # the gradient of the quadratic at y is h (y - b)
    x, v = normal(30, seed=3), np.zeros(30)
    wanted_x, wanted_v = x.copy(), v.copy()
    y = x + DELTA * v
    for _ in range(20):
        at = wanted_x + DELTA * wanted_v
        wanted_v = DELTA * wanted_v - ETA * (h * (at - b) + DECAY * at)
        wanted_x = wanted_x + wanted_v
        kernels.eamsgd_step(x, v, h * (y - b), y, eta=ETA, delta=DELTA, decay=DECAY)
    np.testing.assert_allclose(x, wanted_x, rtol=1e-12)
    np.testing.assert_allclose(v, wanted_v, rtol=1e-10)
    np.testing.assert_allclose(y, wanted_x + DELTA * wanted_v, rtol=1e-12)


def test_entropy_inner_is_nesterov_descent_on_the_loss_and_a_spring():
    import torch

    h, b, x, decay, gamma_inverse, a = np.abs(normal(30, seed=1)), *normal(2, 30, seed=2), 0.01, 0.3, 0.75
    y, v, z = x.copy(), np.zeros(30), x.copy()
    p = torch.nn.Parameter(torch.from_numpy(x.copy()))
    optimizer = torch.optim.SGD([p], lr=ETA, momentum=DELTA, nesterov=True, weight_decay=decay)
    wanted_z = x.copy()
    for _ in range(20):
        p.grad = torch.from_numpy(h * (p.detach().numpy() - b) + gamma_inverse * (p.detach().numpy() - x))
        optimizer.step()
        wanted_z = a * wanted_z + (1 - a) * p.detach().numpy()
        kernels.entropy_inner(y, v, z, x, h * (y - b), ETA, DELTA, gamma_inverse, a, decay)
    np.testing.assert_allclose(y, p.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(z, wanted_z, rtol=1e-10)


@pytest.mark.parametrize("nesterov", [False, True])
def test_torch_steps_match_torch(nesterov):
    import torch

    kernel = kernels.torch_nesterov_step if nesterov else kernels.torch_momentum_step
    parameter = torch.nn.Parameter(torch.from_numpy(X.copy()))
    optimizer = torch.optim.SGD([parameter], lr=ETA, momentum=DELTA, weight_decay=DECAY, nesterov=nesterov)
    x, v = X.copy(), np.zeros_like(X)
    for t in range(10):
        g = normal(257, seed=t)
        parameter.grad = torch.from_numpy(g.copy())
        optimizer.step()
        kernel(x, v, g, eta=ETA, delta=DELTA, decay=DECAY)
    np.testing.assert_allclose(x, parameter.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_zero_momentum_is_sgd_bit_for_bit():
    x, y = X.astype(np.float32), X.astype(np.float32)
    g = G.astype(np.float32)
    for _ in range(3):
        kernels.sgd_step(x, g, ETA, 0.0)
        kernels.heavy_ball_step(y, np.zeros_like(y), g, ETA, 0.0, 0.0)
    assert x.tobytes() == y.tobytes()


def test_synchronous_exchange_is_its_two_halves_bit_for_bit():
    x, c, s = (a.astype(np.float32) for a in (X, C, S))
    both_x, both_c = x.copy(), c.copy()
    kernels.elastic_sync(both_x, both_c, s, A_W, A_C, 4)
    kernels.elastic_pull(x, c, A_W)
    kernels.elastic_center(c, s, A_C, 4)
    assert (both_x.tobytes(), both_c.tobytes()) == (x.tobytes(), c.tobytes())


def test_synchronous_exchange_with_the_center_first_is_its_two_halves_bit_for_bit():
    x, c, s = (a.astype(np.float32) for a in (X, C, S))
    both_x, both_c = x.copy(), c.copy()
    kernels.elastic_sync_center_first(both_x, both_c, s, A_W, A_C, 4)
    kernels.elastic_center(c, s, A_C, 4)
    kernels.elastic_pull(x, c, A_W)
    assert (both_x.tobytes(), both_c.tobytes()) == (x.tobytes(), c.tobytes())


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**16), st.integers(1, 500))
def test_equal_rates_conserve_the_sum_of_worker_and_center(alpha, seed, n):
    x, c = normal(2, n, seed=seed)
    total = x + c
    kernels.elastic_exchange(x, c, alpha, alpha)
    np.testing.assert_allclose(x + c, total, rtol=0, atol=8 * np.finfo(float).eps * (np.abs(total) + 8).max())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 500))
def test_averages_stay_between_both_vectors_and_conserve_the_sum(seed, n):
    x, z = normal(2, n, seed=seed).astype(np.float32)
    low, high, total = np.minimum(x, z), np.maximum(x, z), x.astype(float) + z
    pulled = x.copy()
    kernels.pair_average(pulled, z)
    kernels.symmetric_average(x, z)
    assert pulled.tobytes() == x.tobytes()
    for mean in (x, z):
        assert ((low <= mean) & (mean <= high)).all()
    np.testing.assert_allclose(x.astype(float) + z, total, rtol=0, atol=1e-6)


GUARDED = {name: kernel for name, kernel in LIBRARY.items() if kernel.equations.guard}

# Kernel: the array that must stay finite and unchanged, and the one with the non-finite elements.
PROTECTED = {
    "elastic_exchange": ("c", "x"),
    "elastic_exchange_seen": ("c", "x"),
    "elastic_displacement": ("c", "x"),
    "elastic_pull": ("x", "c"),
    "elastic_center": ("c", "s"),
    "elastic_sync": ("c", "s"),
    "elastic_sync_center_first": ("c", "s"),
    "admm_local": ("c", "g"),
    "admm_turn": ("c", "g"),
    "admm_arrival": ("m", "g"),
    "commit_and_pull": ("c", "x"),
    "commit_only": ("c", "x"),
    "commit_averaged": ("c", "x"),
    "commit_gathered": ("c", "v"),
    "master_momentum": ("c", "g"),
    "adag_commit": ("c", "x"),
    "adag_push": ("c", "x"),
    "pair_average": ("x", "z"),
    "symmetric_average": ("x", "z"),
    "push_receive": ("x", "r"),
    "weighted_average": ("x", "z"),
    "delayed_correction": ("x", "m"),
}

# Guarded kernels for which non-finite elements count as zero, and those with tests of their own.
BETWEEN_ROUNDS = {"keep_finite", "receive", "outer_gradient", "slow_momentum", "outer_nesterov", "entropy_outer"}
NO_DISPLACEMENT = {"pull_only", "adag_scale"}
RESET = {"accumulate"}  # test_robust.py


def test_kernels_that_change_shared_vectors_are_guarded_and_each_guard_is_tested():
    assert set(PROTECTED) | BETWEEN_ROUNDS | NO_DISPLACEMENT | RESET == set(GUARDED)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", PROTECTED)
def test_a_guard_keeps_non_finite_elements_out_and_counts_them(name, dtype):
    kernel = GUARDED[name]
    kept, bad = PROTECTED[name]
    arrays = {array: normal(1001, seed=j).astype(dtype) for j, array in enumerate(kernel.equations.arrays)}
    where = np.array([0, 1, 63, 64, 500, 999, 1000])
    arrays[bad][where] = [np.nan, np.inf, -np.inf, np.nan, -np.nan, np.inf, np.nan]
    scalars = {"a_w": 0.5, "a_c": 0.5, "p": 2.0, "n": 1.0, "share": 0.5}
    scalars |= {"rho": 2.0, "a": 0.5, "k": 4.0, "eta": 0.5, "delta": 0.0, "decay": 0.0}
    before = arrays[kept].copy()
    n_nonfinite = kernel(*arrays.values(), **{scalar: scalars[scalar] for scalar in kernel.equations.scalars})
    assert n_nonfinite == len(where)
    assert np.isfinite(arrays[kept]).all()
    np.testing.assert_array_equal(arrays[kept][where], before[where])
    assert (np.delete(arrays[kept], where) != np.delete(before, where)).all()


@pytest.mark.parametrize(
    ("name", "scalars", "arrays"),
    [  # x = [2, NaN], o = [1, 1], c = [3, 3] before; the arrays afterwards
        ("pull_only", (), [[3, 3], [2, 3], [3, 3]]),
        ("adag_scale", (0.5, 4.0), [[0.5 / 17, 0], [3, 3], [3, 3]]),
    ],
)
def test_a_worker_with_non_finite_parameters_has_no_displacement_after_a_pull(name, scalars, arrays):
    x, o, c = np.array([2, np.nan]), np.ones(2), np.full(2, 3.0)
    assert LIBRARY[name](x, o, c, *scalars) == 1
    np.testing.assert_array_equal([x, o, c], arrays)


@pytest.mark.parametrize("name", ["debias", "push_receive", "admm_local"])
def test_a_division_by_zero_gives_infinity_or_nan_and_no_exception(name):
    kernel = LIBRARY[name]
    arrays = [np.ones(9, np.float32) for _ in kernel.equations.arrays]
    scalars = {"w": 0.0, "n": -1.0, "eta": 1.0, "rho": -1.0, "decay": 0.0}
    kernel(*arrays, *[scalars[scalar] for scalar in kernel.equations.scalars])
    assert not np.isfinite(arrays[0]).any()


@pytest.mark.parametrize(
    ("name", "bad", "scalars"),
    [
        ("keep_finite", "x", ()),
        ("receive", "z", ()),
        ("outer_gradient", "x", ()),
        ("slow_momentum", "d", (0.9, 2.0, 0.5)),
        ("outer_nesterov", "d", (0.7, 0.9)),
        ("entropy_outer", "r", (0.1, 0.9, 2.0)),
    ],
)
def test_non_finite_elements_count_as_zero_between_rounds(name, bad, scalars):
    kernel = LIBRARY[name]
    arrays = {array: normal(100, seed=j) for j, array in enumerate(kernel.equations.arrays)}
    arrays[bad][[0, 50, 99]] = [np.nan, np.inf, -np.inf]
    zero = {array: values.copy() for array, values in arrays.items()}
    same = {"outer_gradient": "theta", "entropy_outer": "x"}.get(name)  # the difference from it is zero
    zero[bad][[0, 50, 99]] = zero[same][[0, 50, 99]] if same else 0.0
    assert kernel(*arrays.values(), *scalars) == 3
    assert kernel(*zero.values(), *scalars) == 0
    for array in kernel.equations.stored:
        np.testing.assert_array_equal(arrays[array], zero[array])


def test_a_vector_of_nan_is_replaced_and_counted_element_by_element():
    x, c = np.full(100_000, np.nan, np.float32), np.zeros(100_000, np.float32)
    assert kernels.elastic_exchange(x, c, 0.5, 0.5) == 100_000
    assert not c.any()
