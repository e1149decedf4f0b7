"""What the kernels compute: the papers' formulas in float64, conservation laws, and what a guard keeps out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain import kernels


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


X, C, S, G, V = normal(5, 257)
A_W, A_C, ETA, DELTA, DECAY = 0.21, 0.34, 0.05, 0.9, 0.01

# Kernel: its arrays, its scalars, and what each array becomes. Every right-hand side is at the old values.
ORACLES = {
    "elastic_exchange": ([X, C], [A_W, A_C], [X - A_W * (X - C), C + A_C * (X - C)]),
    # beta = p*alpha: c' = (1 - beta) c + beta mean(x), s = p mean(x)
    "elastic_center": ([C, S], [A_C / 4, 4], [(1 - A_C) * C + A_C * (S / 4), S]),
    "elastic_pull": ([X, C], [A_W], [(1 - A_W) * X + A_W * C, C]),
    "elastic_sync": ([X, C, S], [A_W, A_C / 4, 4], [(1 - A_W) * X + A_W * C, (1 - A_C) * C + A_C * (S / 4), S]),
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
    "downpour_exchange": ([X, V, C], [], [C + V, 0 * V, C + V]),
    "scaled_add": ([C, X], [A_W], [C + A_W * X, X]),
    "scale": ([X], [A_W], [A_W * X]),
    "copy": ([X, C], [], [C, C]),
    "push_sum_mix": ([X, S], [0.5], [0.5 * X + S, S]),
    "debias": ([C, X], [0.7], [X / 0.7, X]),
    "weighted_mix_2": ([X, C, S], [0.5, 0.2, 0.3], [0.5 * X + 0.2 * C + 0.3 * S, C, S]),
    "sum_into_3": ([X, C, S, V], [1 / 3], [(C + S + V) / 3, C, S, V]),
    "sum_everywhere_3": ([C, S, V], [1 / 3], [(C + S + V) / 3] * 3),
}
TRAJECTORIES = {"eamsgd_step", "torch_momentum_step", "torch_nesterov_step"}
LIBRARY = {kernel.name: kernel for kernel in kernels.library()}


def test_every_kernel_has_an_oracle():
    assert set(ORACLES) | TRAJECTORIES == set(LIBRARY)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-14), (np.float32, 2e-6)])
@pytest.mark.parametrize("name", ORACLES)
def test_kernel_is_its_papers_formula(name, dtype, tolerance):
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


@pytest.mark.parametrize("nesterov", [False, True])
def test_torch_steps_are_those_of_torch(nesterov):
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


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**16), st.integers(1, 500))
def test_equal_rates_conserve_the_sum_of_worker_and_center(alpha, seed, n):
    x, c = normal(2, n, seed=seed)
    total = x + c
    kernels.elastic_exchange(x, c, alpha, alpha)
    np.testing.assert_allclose(x + c, total, rtol=0, atol=8 * np.finfo(float).eps * (np.abs(total) + 8).max())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 500))
def test_averages_stay_in_the_hull_and_conserve_the_sum(seed, n):
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


def test_what_enters_a_shared_vector_is_guarded():
    assert set(GUARDED) == {
        *("elastic_exchange", "elastic_center", "elastic_sync", "downpour_exchange"),
        *("pair_average", "symmetric_average", "push_receive", "push_sum_mix"),
    }


# Kernel: the array that is to stay finite, and the one that a diverged peer or worker brings.
PROTECTED = {
    "elastic_exchange": ("c", "x"),
    "elastic_center": ("c", "s"),
    "elastic_sync": ("c", "s"),
    "downpour_exchange": ("c", "v"),
    "pair_average": ("x", "z"),
    "symmetric_average": ("x", "z"),
    "push_receive": ("x", "r"),
    "push_sum_mix": ("x", "r"),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", PROTECTED)
def test_a_guard_keeps_what_is_not_finite_out_and_counts_it(name, dtype):
    kernel = GUARDED[name]
    kept, bad = PROTECTED[name]
    arrays = {array: normal(1001, seed=j).astype(dtype) for j, array in enumerate(kernel.equations.arrays)}
    where = np.array([0, 1, 63, 64, 500, 999, 1000])
    arrays[bad][where] = [np.nan, np.inf, -np.inf, np.nan, -np.nan, np.inf, np.nan]
    scalars = {"a_w": 0.5, "a_c": 0.5, "p": 2.0, "n": 1.0, "keep": 1.0}
    before = arrays[kept].copy()
    n_rejected = kernel(*arrays.values(), **{scalar: scalars[scalar] for scalar in kernel.equations.scalars})
    assert n_rejected == len(where)
    assert np.isfinite(arrays[kept]).all()
    np.testing.assert_array_equal(arrays[kept][where], before[where])
    assert (np.delete(arrays[kept], where) != np.delete(before, where)).all()


def test_a_poisoned_vector_is_rejected_element_by_element():
    x, c = np.full(100_000, np.nan, np.float32), np.zeros(100_000, np.float32)
    assert kernels.elastic_exchange(x, c, 0.5, 0.5) == 100_000
    assert not c.any()
