"""All-reduce against the sum in float64; the bits are the same on every rank and in every run."""

import ml_dtypes
import numpy as np
import pytest

ALL = pytest.mark.ranks(1, 2, 3, 4, 5)
SIZES = (0, 1, 2, 3, 7, 15, 16, 17, 1000, 65_537)
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def values(rank, n, dtype, seed=0):
    return np.random.default_rng([rank, n, seed]).normal(size=n).astype(dtype)


def assert_is_sum(result, vectors, scale=1.0):
    """Check a sum in float32 or wider, rounded once: half a unit of the dtype, and p of float32 (or float64)."""
    terms = np.stack([v.astype(np.float64) for v in vectors])
    exact = scale * terms.sum(0)
    eps = float(ml_dtypes.finfo(result.dtype).eps)
    bound = eps * np.abs(exact) + 2 * len(vectors) * min(eps, 2.0**-23) * scale * np.abs(terms).sum(0)
    subnormal = 1e-7 if result.dtype == np.float16 else 0.0
    assert np.all(np.abs(result.astype(np.float64) - exact) <= bound + subnormal)


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_gets_the_sum_or_the_mean(comm, dtype):
    for n in SIZES:
        vector = comm.vector(n, dtype)
        everyones = [values(rank, n, dtype) for rank in range(comm.size)]
        for mean in (False, True):
            vector.local[:] = everyones[comm.rank]
            comm.allreduce(vector, mean=mean)
            assert_is_sum(vector.local, everyones, 1 / comm.size if mean else 1.0)


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_the_same_on_all_ranks_and_in_every_run(comm, dtype):
    vector = comm.vector(10_007, dtype)
    results = set()
    for _ in range(3):
        vector.local[:] = values(comm.rank, 10_007, dtype)
        comm.allreduce(vector)
        results.update(comm.world.comm.allgather(vector.local.tobytes()))
    assert len(results) == 1


@ALL
def test_windows_are_independent(comm):
    """For all sizes and dtypes, and if one window reuses the memory of another."""
    kept = comm.vector(100, np.float32)
    kept.local[:] = 1
    for n, dtype in (
        (1000, np.float64),
        (10, np.float32),
        (1000, ml_dtypes.bfloat16),
        (0, np.float32),
        (999, np.float32),
    ):
        vector = comm.vector(n, dtype)
        vector.local[:] = comm.rank
        comm.allreduce(vector)
        assert np.all(vector.local == sum(range(comm.size)))
        comm.allreduce(kept, mean=True)
        assert np.all(kept.local == 1)
        comm.barrier()
        comm._made.remove(vector)
        vector.free()
        del vector  # the next one may have its address


@ALL
def test_sums_can_be_repeated_in_place(comm):
    """No rank reads a slice of the previous round."""
    vector = comm.vector(50_000, np.float64)
    vector.local[:] = comm.rank
    x = float(sum(range(comm.size)))
    for _ in range(20):
        comm.allreduce(vector)
        assert np.all(vector.local == x)
        vector.local[:] = x % 2 + comm.rank
        x = comm.size * (x % 2) + sum(range(comm.size))


@ALL
def test_the_volume_is_that_of_a_ring(comm):
    """2 (p-1)/p S bytes per rank, and 2 (m-1) S in total between m nodes."""
    for k, n in enumerate((1000, 17), start=1):
        before = comm.statistics.bytes_sent
        comm.allreduce(comm.vector(n, np.float32))
        assert comm.statistics.bytes_sent - before == 2 * (comm.size - 1) * 4 * n // comm.size
        assert comm.statistics.n_exchanges == k
    wire_bytes = comm.gather([comm.statistics.wire_bytes]).sum()
    assert 0 <= 2 * (comm.world.n_nodes - 1) * 4 * (1000 + 17) - wire_bytes < 2 * comm.size  # each rounds down


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_too_large_for_one_kernel_or_message_are_split(comm, monkeypatch, dtype):
    from mpitrain.collectives import allreduce

    monkeypatch.setattr(allreduce, "MOST", 2)
    monkeypatch.setattr(allreduce, "DIRECT", 2)
    monkeypatch.setattr(allreduce, "LARGEST_COUNT", 300)
    vector = comm.vector(1000, dtype)
    vector.local[:] = values(comm.rank, 1000, dtype)
    comm.allreduce(vector, mean=True)
    assert_is_sum(vector.local, [values(rank, 1000, dtype) for rank in range(comm.size)], 1 / comm.size)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 8, 9, 15, 16, 64, 65, 130])
def test_any_number_of_vectors_is_summed(dtype, k):
    from mpitrain.collectives.allreduce import sum_in_groups

    total = np.full(100, np.nan, np.float64 if dtype == np.float64 else np.float32)
    sum_in_groups(total, [np.full(100, j % 5 + 0.5, dtype) for j in range(k)], 0.5)
    assert np.all(total == 0.5 * sum(j % 5 + 0.5 for j in range(k)))
