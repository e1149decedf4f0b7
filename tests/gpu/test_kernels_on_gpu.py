"""Every kernel on a GPU has the bits of its reference, for any length, alignment and dtype."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mpitrain.kernels import Kernel, elastic_exchange, library, reduce_broadcast, reduce_sum, scale, sum_everywhere

pytestmark = pytest.mark.gpu

DTYPES = [np.dtype(t) for t in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
BY_NAME = {kernel.name: kernel for kernel in library()}
MARGIN = 19  # elements on either side that must stay unchanged


def to_gpu(array: np.ndarray) -> Any:
    """Copy an array to device memory bit by bit, at an address that is a multiple of 512."""
    import cupy

    return cupy.asarray(array.view(np.uint8)).view(array.dtype)


def to_host(array: Any) -> np.ndarray:
    import cupy

    bits: np.ndarray = array.view(cupy.uint8).get()
    return bits.view(array.dtype)


def bits(array: np.ndarray) -> np.ndarray:
    """Return the array's bits, with one pattern for all NaN, whose payloads depend on the processor."""
    unsigned = array.view(f"u{array.itemsize}").copy()
    unsigned[np.isnan(array.astype(np.float64))] = 1
    return unsigned


def buffers_of(dtypes: list[np.dtype], n: int, seed: int) -> list[np.ndarray]:
    """Return arrays of numbers of all magnitudes, with some zeros, infinities and NaN."""
    rng = np.random.default_rng(seed)
    made = []
    for dtype in dtypes:
        values = rng.normal(size=n) * 10.0 ** rng.integers(-6, 5, n)
        wild = rng.random(n) < 0.05
        values[wild] = rng.choice([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, 6e4, 1e38], wild.sum())
        with np.errstate(all="ignore"):
            made.append(values.astype(dtype))
    return made


def check(kernel: Kernel, dtypes: list[np.dtype], n: int, seed: int, offsets: list[int] | None = None) -> None:
    """Compare the kernel on views into device memory with its reference on the host."""
    offsets = offsets or [0] * len(dtypes)
    scalars = np.random.default_rng(seed + 1).uniform(0.05, 1.5, len(kernel.equations.scalars)).tolist()
    hosts = buffers_of(dtypes, MARGIN + n + MARGIN, seed)
    devices = [to_gpu(buffer) for buffer in hosts]
    parts = [slice(offset, offset + n) for offset in offsets]
    wanted = kernel.reference(*[b[p] for b, p in zip(hosts, parts, strict=True)], *scalars)
    n_nonfinite = kernel(*[b[p] for b, p in zip(devices, parts, strict=True)], *scalars)
    for name, device, host in zip(kernel.equations.arrays, devices, hosts, strict=True):
        np.testing.assert_array_equal(bits(to_host(device)), bits(host), err_msg=f"{kernel.name}: {name}")
    assert int(n_nonfinite) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BY_NAME)
def test_every_kernel_has_the_bits_of_its_reference(name: str, dtype: np.dtype) -> None:
    kernel = BY_NAME[name]
    for n in (1, 1003, 100_003):
        check(kernel, [dtype] * len(kernel.equations.arrays), n, seed=n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 8, 16])
def test_sums_of_many_vectors_have_the_bits_of_their_reference(k: int, dtype: np.dtype) -> None:
    check(sum_everywhere(k), [dtype] * k, 4099, seed=k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", [[0, 0], [1, 1], [4, 4], [3, 0], [0, 7], [5, 6], [16, 8]], ids=str)
def test_any_alignment_and_tail_has_the_bits_and_nothing_else_changes(dtype: np.dtype, offsets: list[int]) -> None:
    for n in (*range(20), 31, 33, 127, 511, 1025, 65_537):
        check(elastic_exchange, [dtype] * 2, n, seed=n, offsets=offsets)


@pytest.mark.parametrize("one", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_mixed_types_have_the_bits_of_the_reference(one: np.dtype, other: np.dtype) -> None:
    check(elastic_exchange, [one, other], 5003, seed=1)
    check(elastic_exchange, [one, other], 5003, seed=2, offsets=[3, 1])


def test_every_16_bit_pattern_is_widened_and_narrowed_as_on_the_host() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype in DTYPES[2:]:
        check_copy(patterns.view(dtype), np.dtype(np.float32))
    rng = np.random.default_rng(3)
    anything = rng.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    for dtype in DTYPES[2:]:
        check_copy(anything, dtype)


def check_copy(source: np.ndarray, to: np.dtype) -> None:
    from mpitrain.kernels import copy

    wanted, found = np.zeros(source.size, to), to_gpu(np.zeros(source.size, to))
    copy.reference(wanted, source)
    copy(found, to_gpu(source))
    np.testing.assert_array_equal(bits(to_host(found)), bits(wanted))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("k", [1, 3, 8])
def test_reductions_have_the_sum(k: int, dtype: np.dtype) -> None:
    hosts = [np.random.default_rng(j).integers(-50, 50, 4099).astype(dtype) for j in range(k)]
    out, devices = to_gpu(np.zeros(4099, dtype)), [to_gpu(host) for host in hosts]
    wanted = sum(host.astype(np.float64) for host in hosts) * 0.5  # whole numbers: exact in any order
    reduce_sum(out, devices, 0.5)
    np.testing.assert_array_equal(to_host(out), wanted)
    reduce_broadcast(devices, 0.5)
    for device in devices:
        np.testing.assert_array_equal(to_host(device), wanted)


def test_guarded_calls_have_separate_counts_although_read_late() -> None:
    import cupy

    found = []
    for n_bad in range(200):
        x = np.ones(300, np.float32)
        x[:n_bad] = np.nan
        found.append(elastic_exchange(to_gpu(x), cupy.zeros(300, np.float32), 0.5, 0.5))
    assert list(map(int, found)) == list(range(200))


def test_a_finite_vector_has_a_count_of_zero() -> None:
    assert int(elastic_exchange(to_gpu(np.ones(1000, np.float32)), to_gpu(np.zeros(1000, np.float32)), 0.5, 0.5)) == 0


def test_vectors_of_more_than_2_to_the_31_elements() -> None:
    import cupy

    n = 2**31 + 5
    x = cupy.ones(n, np.float16)  # 4 GiB
    scale(x, 3.0)
    for part in (x[:1000], x[2**30 : 2**30 + 1000], x[-1000:]):
        assert (part.get() == 3.0).all()
    assert int((x == 3.0).sum(dtype=np.int64)) == n


def test_a_kernel_runs_on_the_current_stream(late: Any) -> None:
    import cupy

    x = cupy.full(1000, np.nan, np.float32)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        late(x, 2.0)
        scale(x, 4.0)
        stream.synchronize()
    assert (x.get() == 8.0).all()


def test_a_guard_on_another_stream_counts_after_earlier_work(late: Any) -> None:
    import cupy

    x, c = cupy.zeros(1000, np.float32), cupy.zeros(1000, np.float32)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        late(x, np.inf)
        n_nonfinite = elastic_exchange(x, c, 0.5, 0.5)
    assert int(n_nonfinite) == 1000


def test_host_and_device_arrays_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="NumPy arrays only or CuPy arrays only"):
        elastic_exchange(to_gpu(np.ones(3, np.float32)), np.ones(3, np.float32), 0.5, 0.5)
