"""SafeguardSGD (Allen-Zhu et al., arXiv 2012.14368) against its algorithm; its guarantees and its threshold."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quadratic import assert_states_equal, load, same_bits, simulate, states, statistics
from torch import nn

from mpitrain import AllReduceSGD, DistributedOptimizer, SafeguardSGD
from mpitrain.algorithms.byzantine.attacks import Attacked, variance
from mpitrain.algorithms.byzantine.safeguard import Window, majority_radius, median_worker
from mpitrain.simulation.schedules import RandomOrder

NEVER = 1e9  # a threshold that nobody exceeds


def noise(p, n, *, seed=0, bias=None, dtype=np.float64):
    """Return gradients that do not depend on x: N(0, 1) from a stream per worker, plus bias[rank]."""
    rngs = [np.random.default_rng([seed, rank]) for rank in range(p)]

    def gradient(rank, x):
        g = rngs[rank].standard_normal(n)
        return (g if bias is None else g + bias[rank]).astype(dtype)

    return gradient


def reference(gradient, x, eta, steps, method, m):
    """Run algorithm 1 with one master and given thresholds; return x and the step in which each worker leaves."""
    good, left = set(range(m)), {}
    a, b = np.zeros((m, x.size)), np.zeros((m, x.size))
    for t in range(steps):
        if t % method.long_window == 0:
            a[:] = 0
        if t % method.short_window == 0:
            b[:] = 0
        g = {i: gradient(i, x) for i in range(m)}
        for i in good:
            a[i] += g[i] / len(good)
            b[i] += g[i] / len(good)
        close = []
        guards = [(a, method.long_threshold)] + [(b, method.short_threshold)] * (method.guards == "double")
        for sums, threshold in guards:
            near = {i: sum(np.linalg.norm(sums[i] - sums[j]) <= threshold for j in good) for i in sorted(good)}
            most = max(near, key=near.get)
            if near[most] > m / 2:
                close.append({i for i in good if np.linalg.norm(sums[i] - sums[most]) <= 2 * threshold})
        x = x - eta * np.mean([g[i] for i in sorted(good)], axis=0)
        kept = good.intersection(*close)
        left |= dict.fromkeys(good - kept, t)
        good = kept
    return x, left


@settings(max_examples=25)
@given(
    guards=st.sampled_from(["double", "single"]),
    m=st.integers(1, 7),
    windows=st.tuples(st.integers(1, 5), st.integers(5, 12)),
    thresholds=st.tuples(st.floats(0.05, 2), st.floats(0.05, 4)),
    seed=st.integers(0, 99),
)
def test_it_is_the_algorithm_of_the_paper(guards, m, windows, thresholds, seed):
    method = SafeguardSGD(guards, *windows, *thresholds)
    n, start = 21, np.random.default_rng(seed).normal(size=21)
    bias = np.linspace(0, 1, m)[:, None] * np.ones(n)
    ours = simulate(method, m, start=start, eta=0.1, gradient=noise(m, n, seed=seed, bias=bias)).run(18)
    x, left = reference(noise(m, n, seed=seed, bias=bias), start, 0.1, 18, method, m)
    np.testing.assert_allclose(ours.x(), np.tile(x, (m, 1)), rtol=0, atol=1e-10)
    for worker in ours.workers:
        assert worker.removed_at.tolist() == [left.get(i, -1) for i in range(m)]
        assert worker.good.tolist() == [i not in left for i in range(m)]


@pytest.mark.parametrize("guards", ["double", "single"])
@pytest.mark.parametrize("threshold", [None, 0.0])
@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_equal_gradients_are_all_reduce_sgd(guards, threshold, p):
    start = np.random.default_rng(2).normal(size=50)

    def gradient(rank, x):
        return np.sin(x) + 0.3 * x

    method = SafeguardSGD(guards, 3, 7, threshold, threshold)
    ours = simulate(method, p, start=start, eta=0.1, gradient=gradient, decay=0.01).run(20)
    plain = simulate(AllReduceSGD(), p, start=start, eta=0.1, gradient=gradient, decay=0.01).run(20)
    np.testing.assert_allclose(ours.x(), plain.x(), rtol=1e-12, atol=1e-13)
    for worker in ours.workers:
        assert worker.good.all()
        for window in worker._windows.values():
            assert not window.squared_distances(np.arange(p)).any()


@settings(max_examples=8)
@given(st.integers(3, 8), st.floats(0.3, 4), st.floats(0.5, 3))
def test_a_steady_bias_is_detected_in_the_predicted_step(m, threshold, length):
    # ||B_i - B_med|| = s*||u||/m after s steps
    u = np.zeros(30)
    u[7] = length
    method = SafeguardSGD(short_window=200, long_window=200, short_threshold=threshold, long_threshold=NEVER)
    end = simulate(method, m, start=np.zeros(30), eta=0.1, gradient=lambda rank, x: (rank == 1) * u + x).run(120)
    distances = np.arange(1, 121) * length / m
    expected = int(np.argmax(distances > 2 * threshold)) if distances[-1] > 2 * threshold else -1
    if np.abs(distances - 2 * threshold).min() > 1e-9:
        assert end.workers[0].removed_at.tolist() == [-1, expected] + [-1] * (m - 2)


def test_the_short_window_forgets_and_the_long_one_does_not():
    u = np.ones(10) / np.sqrt(10)  # of length 1; the distance is s/4

    def removed_at(**thresholds):
        method = SafeguardSGD(short_window=5, long_window=100, **thresholds)
        gradient = lambda rank, x: (rank == 3) * u  # noqa: E731
        return simulate(method, 4, start=np.zeros(10), eta=0.1, gradient=gradient).run(99).workers[2].removed_at[3]

    assert removed_at(short_threshold=1.0, long_threshold=NEVER) == -1  # 5/4 <= 2*1 in every window
    assert removed_at(short_threshold=0.6, long_threshold=NEVER) == 4  # 5/4 > 2*0.6
    assert removed_at(short_threshold=NEVER, long_threshold=1.0) == 8  # 9/4 > 2*1


@settings(max_examples=10)
@given(m=st.integers(2, 6), seed=st.integers(0, 99), tolerance=st.floats(1, 1.3))
def test_an_excluded_worker_does_not_return(m, seed, tolerance):
    method = SafeguardSGD(short_window=2, long_window=6, tolerance=tolerance)
    seen = []
    simulation = simulate(method, m, start=np.zeros(4), eta=0.1, gradient=noise(m, 4, seed=seed))
    for _ in range(25):
        simulation.run(1)
        goods = [worker.good for worker in simulation.workers]
        assert all((good == goods[0]).all() for good in goods)
        seen.append(goods[0].copy())
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(seen))
    assert seen[-1].any()


def test_all_workers_return_after_a_reset():
    method = SafeguardSGD(short_window=4, long_window=6, short_threshold=0.5, long_threshold=NEVER, reset_good_every=2)
    gradient = lambda rank, x: np.full(3, 10.0 * (rank == 0))  # noqa: E731
    simulation = simulate(method, 5, start=np.zeros(3), eta=0.1, gradient=gradient)
    seen = [int(simulation.run(1).workers[1].metrics()["n_good"]) for _ in range(30)]
    # Out in the first step after each of 0, 12 and 24: its gradient is in the means of steps 0, 12 and 24.
    assert seen == [4] * 30
    assert simulation.workers[0].metrics()["removed_at"] == 24
    np.testing.assert_allclose(simulation.x(), -0.1 * 3 * 2.0, rtol=1e-12)


@settings(max_examples=30)
@given(m=st.integers(3, 9), seed=st.integers(0, 999), far=st.sampled_from([0.0, 1.0, 1e3, np.inf]))
def test_attackers_cannot_move_the_automatic_scale(m, seed, far):
    rng = np.random.default_rng(seed)
    k = m // 2 - 1  # attackers
    points = rng.normal(size=(m, 5))
    honest = rng.permutation(m)[k:]
    attackers = np.setdiff1d(np.arange(m), honest)
    # Close to each other and to one honest worker, in the middle of all, or far away.
    points[attackers] = points[honest[0]] + 1e-3 * points[attackers] + (far if np.isfinite(far) else 0)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    if far == np.inf:
        distances[np.ix_(attackers, honest)] = distances[np.ix_(honest, attackers)] = np.inf
    among = np.linalg.norm(points[honest][:, None] - points[honest][None], axis=2)[np.triu_indices(m - k, 1)]
    r = majority_radius(distances, np.ones(m, bool))
    assert among.min() <= r <= among.max()
    assert median_worker(distances, np.ones(m, bool), r) is not None


def test_half_is_no_majority_and_twice_the_threshold_is_inside():
    good = np.ones(4, bool)
    pairs = np.full((4, 4), 9.0)
    pairs[:2, :2] = pairs[2:, 2:] = 1.0
    np.fill_diagonal(pairs, 0.0)
    assert median_worker(pairs, good, 1.0) is None  # two of four are within 1
    pairs[0, 2] = pairs[2, 0] = 1.0
    assert median_worker(pairs, good, 1.0) == 0
    assert median_worker(pairs, np.array([False, True, True, True]), 1.0) is None  # of the good ones, of all four
    window = Window(4, np.zeros(1), length=10, threshold=1.0, tolerance=1.0)
    pairs[0, 3] = 2.0
    assert window.close(pairs, good).tolist() == [True, True, True, True]
    pairs[0, 3] = 2.0 + 1e-12
    assert window.close(pairs, good).tolist() == [True, True, True, False]


def test_without_a_majority_no_worker_leaves_and_the_step_is_counted():
    method = SafeguardSGD("single", long_window=50, long_threshold=1e-6)
    end = simulate(method, 4, start=np.zeros(6), eta=0.1, gradient=noise(4, 6)).run(11)
    assert end.workers[3].metrics() == {"n_good": 4.0, "removed_at": -1.0, "n_undecided": 11.0}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("guards", ["double", "single"])
def test_a_gradient_that_is_not_finite_is_not_used_at_all(bad, guards):
    honest, asked = noise(4, 40, dtype=np.float32), []

    def gradient(rank, x):
        g = honest(rank, x)
        asked.append(rank)
        if rank == 2 and asked.count(2) == 4:
            g[17] = bad
        return g

    method = SafeguardSGD(guards, short_threshold=NEVER, long_threshold=NEVER)
    start = np.zeros(40, np.float32)
    simulation = simulate(method, 4, start=start, eta=0.1, gradient=gradient).run(3)
    before, again = simulation.x(), noise(4, 40, dtype=np.float32)
    simulation.run(1)
    g = [[again(rank, None) for rank in range(4)] for _ in range(4)][3]
    np.testing.assert_allclose(simulation.x(), before - 0.1 * np.mean([g[0], g[1], g[3]], axis=0), rtol=1e-5, atol=1e-6)
    assert simulation.workers[0].removed_at.tolist() == [-1, -1, 3, -1]
    assert sum(statistics(simulation, "n_nonfinite")) == 1
    assert np.isfinite(simulation.run(5).x()).all()


def test_a_worker_whose_sum_overflows_is_excluded():
    def gradient(rank, x):
        return np.full(5, 3e38 if rank == 1 else 0.5, np.float32)

    method = SafeguardSGD(short_threshold=NEVER, long_threshold=1e300)
    end = simulate(method, 3, start=np.zeros(5, np.float32), eta=1e-3, gradient=gradient).run(6)
    assert end.workers[0].removed_at.tolist() == [-1, 0, -1]  # NEVER is exceeded; 1e300 never
    method = SafeguardSGD("single", long_threshold=1e300)
    end = simulate(method, 3, start=np.zeros(5, np.float32), eta=1e-30, gradient=gradient).run(6)
    assert end.workers[0].removed_at.tolist() == [-1, 3, -1]  # 4*3e38/3 is more than float32 holds


def test_the_gradient_of_an_excluded_worker_is_not_read():
    def gradient(rank, x):
        return np.full(64, np.nan) if rank == 1 else x

    end = simulate(SafeguardSGD(), 3, start=np.ones(64), eta=0.1, gradient=gradient).run(8)
    assert sum(statistics(end, "n_nonfinite")) == 64  # once
    slices = [worker._slices.mine.nbytes for worker in end.workers]
    sent = [2 * 2 * 64 * 8 // 3 * 8] * 3  # the all-reduces
    reads = [np.array([2, 1, 2]) if t else np.array([2, 2, 2]) for t in range(8)]
    reads = sum(np.where(np.arange(3) == 1, 2, r) if t else r for t, r in enumerate(reads))
    reads = reads - np.array([7, 0, 7])  # workers 0 and 2 read one other, worker 1 two
    assert statistics(end, "bytes_sent") == [s + int(r) * b for s, r, b in zip(sent, reads, slices, strict=True)]


def test_workers_are_equal_to_the_bit_with_noise_too():
    bias = 3.0 * (np.arange(5) == 4)[:, None] * np.ones(100)
    method = SafeguardSGD(short_window=4, long_window=9, noise=0.3)
    gradient = noise(5, 100, bias=bias, dtype=np.float32)
    simulation = simulate(
        method, 5, start=np.ones(100, np.float32), eta=0.1, gradient=gradient, schedule=RandomOrder(3)
    )
    for _ in range(20):
        x = simulation.run(1).x()
        assert all(same_bits(x[0], other) for other in x)
    assert not simulation.workers[1].good.all()


def test_the_noise_has_its_variance():
    n, nu = 40_000, 0.3
    gradient = lambda rank, x: np.zeros(n)  # noqa: E731
    x = simulate(SafeguardSGD(noise=nu), 3, start=np.zeros(n), eta=0.5, gradient=gradient).run(1).x()[0]
    assert x.var() == pytest.approx(0.25 * nu**2, abs=4 * 0.25 * nu**2 * np.sqrt(2 / n))
    assert abs(x.mean()) < 4 * 0.5 * nu / np.sqrt(n)
    assert np.unique(x).size == n  # no two slices from one stream


def test_honest_noise_grows_like_sqrt_t():
    # With Th = k*sqrt(T) how often an honest worker is outside does not depend on T; with Th = k*T it would.
    m, d, k, trials = 5, 8, 0.7, 250

    def outside(length):
        rng, count = np.random.default_rng(length), 0
        for _ in range(trials):
            window = Window(m, np.zeros(d), length, threshold=k * np.sqrt(length), tolerance=1.0)
            for _ in range(length):
                window.add(np.arange(m), rng.standard_normal((m, d)))
            close = window.close(np.sqrt(window.squared_distances(np.arange(m))), np.ones(m, bool))
            count += close is None or not close.all()
        return count / trials

    few, many = outside(2), outside(32)
    assert 0.1 < few < 0.9
    assert abs(few - many) < 4 * np.sqrt(2 * 0.25 / trials)


@pytest.mark.parametrize(("window", "found"), [(200, True), (20, False)])
def test_the_automatic_threshold_detects_a_small_bias_in_a_long_window_only(window, found):
    # z = 0.5: more than 8/z^2 = 32 steps are needed, and honest workers are never thrown out.
    n, start = 400, np.zeros(400)
    gradient = Attacked(noise(10, n), size=10, attackers=range(6, 10), attack=variance(0.5))
    method = SafeguardSGD("single", long_window=window)
    end = simulate(method, 10, start=start, eta=0.01, gradient=gradient).run(2 * window)
    removed_at = end.workers[4].removed_at
    assert (removed_at[:6] == -1).all()
    assert (removed_at[6:] >= 0).all() if found else (removed_at[6:] == -1).all()


def test_the_automatic_threshold_is_scale_free():
    def removed_at(scale):
        base = noise(7, 60, bias=1.5 * (np.arange(7) == 2)[:, None] * np.ones(60))
        gradient = lambda rank, x: scale * base(rank, x)  # noqa: E731
        end = simulate(SafeguardSGD(short_window=20, long_window=60), 7, start=np.zeros(60), eta=0.0, gradient=gradient)
        return end.run(40).workers[0].removed_at.tolist()

    assert removed_at(1.0) == removed_at(2.0**-40) == removed_at(2.0**40)
    assert removed_at(1.0)[2] >= 0


def test_half_of_the_workers_together_can_exclude_the_others():
    # Where the guarantee ends: three of five agree, and the honest ones are the outliers.
    gradient = lambda rank, x: np.full(4, 100.0) if rank < 3 else x  # noqa: E731
    end = simulate(SafeguardSGD(), 5, start=np.ones(4), eta=0.01, gradient=gradient).run(150)
    assert end.workers[0].good.tolist() == [True, True, True, False, False]


@settings(max_examples=20)
@given(before=st.integers(0, 9), after=st.integers(1, 9), guards=st.sampled_from(["double", "single"]))
def test_resuming_across_windows_and_removals(before, after, guards):
    method = SafeguardSGD(guards, short_window=3, long_window=5, noise=0.1, reset_good_every=2)
    fixed = np.random.default_rng(1).normal(size=(40, 4, 33))
    fixed[6:, 1] += 2.0

    def make(seed, at):
        clock = [at] * 4

        def gradient(rank, x):
            clock[rank] += 1
            return fixed[clock[rank] - 1, rank] + x

        return simulate(method, 4, start=np.ones(33), eta=0.1, gradient=gradient, seed=seed)

    whole = make(1, 0).run(before)
    saved = states(whole)
    whole.run(after)
    resumed = load(make(99, before), saved).run(after)
    assert same_bits(resumed.x(), whole.x())
    for a, b in zip(states(resumed), states(whole), strict=True):
        assert_states_equal(a, b)


def test_each_worker_keeps_its_slice_only():
    simulation = simulate(SafeguardSGD(), 4, start=np.zeros(1000), eta=0.1)
    lengths = [worker._windows["short"].sums.shape for worker in simulation.workers]
    assert [k for k, _ in lengths] == [4] * 4
    assert sum(n for _, n in lengths) == 1000


def test_warnings_name_a_setting():
    assert "3" in next(SafeguardSGD().warnings(2, 0.1))
    assert "short_window <= long_window" in next(SafeguardSGD(short_window=20, long_window=10).warnings(8, 0.1))
    assert not list(SafeguardSGD("single", short_window=20, long_window=10).warnings(8, 0.1))


@pytest.mark.ranks(3)
@pytest.mark.time_limit(180)
def test_ranks_do_what_simulated_workers_do(world):
    p, n, steps = world.size, 70, 14
    method = SafeguardSGD(short_window=3, long_window=7)
    bias = 4.0 * (np.arange(p) == p - 1)[:, None] * np.ones(n)
    start = np.random.default_rng(1).normal(size=n)
    simulated = simulate(method, p, start=start, eta=0.1, gradient=noise(p, n, bias=bias)).run(steps)
    model = nn.Module()
    model.x = nn.Parameter(torch.tensor(start))
    gradient = noise(p, n, bias=bias)
    with DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, method) as optimizer:
        for _ in range(steps):
            optimizer.zero_grad()
            (model.x * torch.from_numpy(gradient(world.rank, None))).sum().backward()
            optimizer.step()
        mine = model.x.detach().numpy().copy()
        np.testing.assert_allclose(mine, simulated.x()[world.rank], rtol=1e-12, atol=1e-13)
        assert len({x.tobytes() for x in world.comm.allgather(mine)}) == 1
        assert optimizer._parts.replica.worker.removed_at.tolist() == simulated.workers[0].removed_at.tolist()
        assert (optimizer._parts.replica.worker.good.sum() < p) == (p >= 3)
