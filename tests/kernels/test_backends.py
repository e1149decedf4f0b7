"""NumPy, the reference, and Numba give the same bits for any length, offset and value."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpitrain.kernels import (
    Kernel,
    commit_gathered,
    elastic_exchange,
    elastic_sync,
    library,
    sum_everywhere,
    symmetric_average,
    weighted_mix,
)
from mpitrain.kernels import __file__ as package
from mpitrain.kernels.compile import host
from mpitrain.kernels.compile.cache import OPTIONS
from mpitrain.kernels.compile.entry import entry

ROOT = Path(package).parents[2]

HALVES = [np.float16, ml_dtypes.bfloat16]
NAMES = [kernel.name for kernel in library()]
BY_NAME = dict(zip(NAMES, library(), strict=True))
lengths = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 1000, 1025]), st.integers(0, 300)
)


def bits(array):
    """Return the array's bits, with one pattern for all NaN, whose payloads depend on the CPU."""
    unsigned = array.view(f"u{array.itemsize}").copy()
    unsigned[np.isnan(array.astype(np.float64))] = 1
    return unsigned


def vectors(kernel, dtypes, n, seed, offset=0):
    """Return larger arrays with some extreme values, and views of length n at an offset into them."""
    rng = np.random.default_rng(seed)
    buffers = []
    for dtype in dtypes:
        values = rng.normal(size=n + 2 * offset + 3) * 10.0 ** rng.integers(-6, 5, n + 2 * offset + 3)
        wild = rng.random(len(values)) < 0.05
        values[wild] = rng.choice([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, 6e4, 1e38], wild.sum())
        with np.errstate(all="ignore"):
            buffers.append(values.astype(dtype))
    return buffers, [buffer[offset : offset + n] for buffer in buffers]


def check(kernel, dtypes, n, seed, offset=0):
    scalars = np.random.default_rng(seed + 1).uniform(0.05, 1.5, len(kernel.equations.scalars)).tolist()
    expected_buffers, expected = vectors(kernel, dtypes, n, seed, offset)
    buffers, arrays = vectors(kernel, dtypes, n, seed, offset)
    assert kernel(*arrays, *scalars) == kernel.reference(*expected, *scalars)
    for name, buffer, wanted in zip(kernel.equations.arrays, buffers, expected_buffers, strict=True):
        np.testing.assert_array_equal(bits(buffer), bits(wanted), err_msg=f"{kernel.name}: {name}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_host_has_the_bits_of_numpy(name, dtype):
    kernel = BY_NAME[name]
    check(kernel, [dtype] * len(kernel.equations.arrays), 1003, seed=7)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "name", ["elastic_exchange", "eamsgd_step", "symmetric_average", "copy", "debias", "sum_everywhere_3"]
)
def test_host_has_the_bits_of_numpy_in_16_bits(name, dtype):
    kernel = BY_NAME[name]
    check(kernel, [dtype] * len(kernel.equations.arrays), 1003, seed=8)


@pytest.mark.parametrize(
    "dtypes",
    [
        (np.float32, np.float64),
        (np.float64, np.float32),
        (np.float32, ml_dtypes.bfloat16),
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float64),
    ],
)
def test_host_has_the_bits_of_numpy_for_mixed_types(dtypes):
    check(elastic_exchange, dtypes, 515, seed=9)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(0, 17), st.integers(0, 2**16), st.sampled_from([elastic_exchange, elastic_sync]))
@example(1000, 1, 0, elastic_sync)
def test_tails_and_offsets_have_the_bits_of_numpy_and_nothing_else_changes(n, offset, seed, kernel):
    check(kernel, [np.float32] * len(kernel.equations.arrays), n, seed, offset)


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(0, 17), st.integers(0, 2**16), st.sampled_from(HALVES))
def test_16_bit_tails_and_offsets_have_the_bits_of_numpy(n, offset, seed, dtype):
    check(symmetric_average, [dtype] * 2, n, seed, offset)


WRITING = [k.name for k in library() if set(k.equations.stored) - set(k.equations.loaded)]
"""Kernels with a write-only array."""


@pytest.fixture
def streaming(monkeypatch):
    """Return a function that copies a kernel so that it streams write-only arrays of any length."""
    monkeypatch.setattr(host, "STREAMED_FROM", 0)

    def make(kernel):
        fresh = copy.copy(kernel)
        fresh._functions = {}
        fresh._entry = entry(fresh.equations, fresh._functions, fresh._otherwise)
        return fresh

    return make


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 511, 512, 513, 1024, 1603])
@pytest.mark.parametrize("name", WRITING)
def test_streamed_vectors_have_the_bits_of_numpy_and_nothing_else_changes(streaming, name, n):
    kernel = streaming(BY_NAME[name])
    for offset in (0, 1, 13, 16):
        check(kernel, [np.float32] * len(kernel.equations.arrays), n, seed=n, offset=offset)


@pytest.mark.parametrize("dtypes", [(np.float64,) * 3, (np.float16,) * 3, (np.float32, np.float32, np.float64)])
def test_streamed_vectors_of_any_type_have_the_bits_of_numpy(streaming, dtypes):
    for n, offset in ((3, 2), (1603, 0), (1603, 5)):
        check(streaming(commit_gathered), dtypes, n, seed=10, offset=offset)


def test_arrays_at_different_offsets_in_their_cache_lines_are_streamed_correctly(streaming):
    split = Kernel("split", "y = x + 1\nz = x - 1", arrays="y z x", source="test")
    x = np.arange(1000, dtype=np.float32)
    y, z = (np.zeros(1100, np.float32) for _ in range(2))
    streaming(split)(y[3:1003], z[8:1008], x)
    np.testing.assert_array_equal(y, np.pad(x + 1, (3, 97)))
    np.testing.assert_array_equal(z, np.pad(x - 1, (8, 92)))


def test_an_array_given_twice_is_not_streamed(streaming):
    kernel = streaming(commit_gathered)  # x, v, c: the last one assigned stays
    for twice in ((0, 0, 1), (0, 1, 0), (0, 1, 1)):
        arrays, expected = (np.random.default_rng(3).random((2, 1500), np.float32) for _ in range(2))
        kernel(*[arrays[k] for k in twice], 0.5)
        kernel.reference(*[expected[k] for k in twice], 0.5)
        np.testing.assert_array_equal(arrays, expected)


NONTEMPORAL_STORE = r"\bv?movnt|\bstnp\b"  # x86, 64-bit ARM
FENCE = r"\bmfence\b|\block\s+or|\bdmb\b"


def assembly_of(kernel, dtype):
    import numba

    namespace: dict = {}
    exec(kernel.host_source(dtype), namespace)
    function = numba.njit(namespace["SIGNATURE"], **OPTIONS)(namespace[kernel.name])
    (assembly,) = function.inspect_asm().values()
    return assembly


def test_only_write_only_arrays_are_streamed():
    assert re.search(NONTEMPORAL_STORE, assembly_of(commit_gathered, "float32"))
    assert not re.search(NONTEMPORAL_STORE, assembly_of(elastic_exchange, "float32"))


def test_a_fence_orders_streamed_stores_before_the_kernel_returns():
    # Without a fence another rank could get the lock before the stores arrive; no test of results would show that.
    assert re.search(FENCE, assembly_of(commit_gathered, "float32"))
    assert not re.search(FENCE, assembly_of(elastic_exchange, "float32"))


def test_literals_and_scalars_do_not_widen_float32():
    kernel = Kernel("thirds", "x = 0.1 * x + a / 3", arrays="x", scalars="a", source="test")
    x = np.linspace(1, 2, 1000, dtype=np.float32)
    expected = np.float32(0.1) * x + np.float32(0.7) / np.float32(3)
    kernel(x, 0.7)
    assert x.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_pattern_widens_and_narrows_as_in_numpy(dtype):
    copy = BY_NAME["copy"]
    patterns = np.arange(2**16, dtype=np.uint16).view(dtype)
    wide = np.empty(2**16, np.float32)
    copy(wide, patterns)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(bits(wide), bits(patterns.astype(np.float32)))
    back = np.empty(2**16, dtype)
    copy(back, wide)
    finite = ~np.isnan(wide)
    np.testing.assert_array_equal(back.view(np.uint16)[finite], patterns.view(np.uint16)[finite])
    assert np.isnan(back[~finite].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_rounds_to_16_bits_as_in_numpy(dtype):
    copy = BY_NAME["copy"]
    rng = np.random.default_rng(3)
    anything = rng.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    # Ties halfway between all neighbours, and their neighbours in float32.
    patterns = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    with np.errstate(all="ignore"):
        ties = ((patterns[:-1].astype(np.float64) + patterns[1:]) / 2).astype(np.float32)
        close = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
        values = np.concatenate([anything, close, -close])
        expected = values.astype(dtype)
    rounded = np.empty(len(values), dtype)
    copy(rounded, values)
    np.testing.assert_array_equal(bits(rounded), bits(expected))


BITWISE = """
import numpy as np, torch
from mpitrain.kernels import copy
rng = np.random.default_rng(5)
patterns = np.arange(2**16, dtype=np.uint16).view(np.float16)
values = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
values[:50_000] = rng.normal(size=50_000) * 10.0 ** rng.integers(-8, 5, 50_000)
with np.errstate(all="ignore"):
    expected, expected_wide = values.astype(np.float16), patterns.astype(np.float32)
torch.set_flush_denormal(True)
wide, rounded = np.empty(2**16, np.float32), np.empty(len(values), np.float16)
copy(wide, patterns)
copy(rounded, values)
torch.set_flush_denormal(False)
np.testing.assert_array_equal(wide, expected_wide)
np.testing.assert_array_equal(rounded, expected)
from numba.core.registry import cpu_target
print(cpu_target.target_context.codegen().magic_tuple()[1:])
"""


@pytest.mark.parametrize(
    "processor", [{}, {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}], ids=["host", "generic"]
)
def test_float16_is_the_same_with_and_without_cpu_conversions_and_subnormals(processor):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **processor}
    done = subprocess.run(
        [sys.executable, "-c", BITWISE], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("+f16c" in done.stdout) <= (not processor)


@pytest.mark.parametrize("kernel", [elastic_exchange, elastic_sync, weighted_mix(7), sum_everywhere(8)], ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loops_are_vectorised_and_not_contracted_for_any_number_of_arrays(kernel, dtype):
    assembly = assembly_of(kernel, dtype)
    # x86: addps or vaddps; 64-bit ARM: fadd v0.4s. A scalar loop has only addss, or fadd s0.
    assert re.search(r"\bv?(add|sub|mul)ps\b|\bf(add|sub|mul)\s+v\d+\.4s", assembly)
    # Contraction would change bits.
    assert not re.search(r"\bvfn?m(add|sub)|\bfml[as]\b|\bfn?madd\b", assembly)
