"""The generated CUDA C, run on the host thread by thread, has the bits of the reference.

A C++ compiler compiles the source that CuPy compiles, after a few lines that replace what CUDA provides. So the packs,
heads, tails and strides of the kernels are tested without a GPU; test_cuda.py tests their compilation by NVRTC. A
kernel is called as by CuPy, through pointers to its arguments, so the bytes of the arguments are tested too.
"""

import ctypes
import itertools
import shutil
import subprocess
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from mpitrain.kernels import copy, elastic_exchange, keep_finite, library, scale, symmetric_average, weighted_mix
from mpitrain.kernels.compile import cuda, cuda_source
from mpitrain.kernels.compile.storage import STORAGES, dtypes_label, storages_of

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BY_NAME = {kernel.name: kernel for kernel in library()}
MIXES = list(itertools.permutations(STORAGES, 2))
MIXED = (elastic_exchange, symmetric_average, copy)

# What CUDA provides. uint4 counts the 16-byte accesses, and the misaligned ones among them.
SHIM = r"""
#include <cstdint>
#include <cstring>
#include <utility>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
struct Index { unsigned int x; };
static Index threadIdx, blockIdx, blockDim, gridDim;
extern "C" { unsigned long long n_words = 0, n_misaligned = 0; }
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
    uint4& operator=(const uint4& other) {
        n_words += 1;
        n_misaligned += ((uintptr_t)this | (uintptr_t)&other) % 16 != 0;
        memcpy((void*)this, (const void*)&other, 16);
        return *this;
    }
};
static float __uint_as_float(unsigned int bits) { float value; memcpy(&value, &bits, 4); return value; }
static unsigned int __float_as_uint(float value) { unsigned int bits; memcpy(&bits, &value, 4); return bits; }
static void atomicAdd(unsigned long long* at, unsigned long long by) { *at += by; }
#if defined(__aarch64__)
typedef __fp16 half;
#else
typedef _Float16 half;
#endif
static float half_to_float(unsigned short bits) { half value; memcpy(&value, &bits, 2); return (float)value; }
static unsigned short float_to_half(float value) {
    const half rounded = (half)value; unsigned short bits; memcpy(&bits, &rounded, 2); return bits;
}
template <typename... P, std::size_t... K>
static void each(void (*kernel)(P...), void** arguments, unsigned long long first, unsigned long long last,
                 std::index_sequence<K...>) {
    for (unsigned long long thread = first; thread < last; ++thread) {
        blockIdx.x = thread / blockDim.x;
        threadIdx.x = thread % blockDim.x;
        kernel(*(P*)arguments[K]...);
    }
}
template <typename... P>
static void launch(void (*kernel)(P...), void** arguments, unsigned long long first, unsigned long long last) {
    each(kernel, arguments, first, last, std::index_sequence_for<P...>());
}
#define LAUNCHER(NAME) extern "C" void launch_##NAME(void** arguments, unsigned int blocks, unsigned int threads, \
    unsigned long long first, unsigned long long last) { \
    gridDim.x = blocks; blockDim.x = threads; launch(NAME, arguments, first, last); }
"""


def numpy_type(name):
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


class Array:
    """The attributes of a cupy.ndarray that a launch reads, around a NumPy array."""

    __cuda_array_interface__ = None

    def __init__(self, host):
        self.host, self.size = host, host.size
        self.data = types.SimpleNamespace(ptr=host.ctypes.data, device_id=0)


class Compiled:
    """A kernel in the library, called like a cupy.RawKernel."""

    def __init__(self, functions, name, source):
        self.functions, self.name, self.source = functions, name, source

    def __call__(self, grid, block, arguments, threads=None):
        """Run the threads from the first to the last (exclusive) of ``threads``; all by default."""
        held = [np.array(a.data.ptr, np.uint64) if isinstance(a, Array) else np.array(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(a.ctypes.data for a in held))
        first, last = threads or (0, grid[0] * block[0])
        function = getattr(self.functions, f"launch_{self.name}")
        function(pointers, grid[0], block[0], ctypes.c_ulonglong(first), ctypes.c_ulonglong(last))


class Library:
    """All kernels in one shared library, by kernel and dtypes."""

    def __init__(self, path, sources):
        functions = ctypes.CDLL(str(path))
        self.compiled = {name: Compiled(functions, name, source) for name, source in sources.items()}
        self._counters = [ctypes.c_ulonglong.in_dll(functions, name) for name in ("n_words", "n_misaligned")]

    def moved(self):
        """Return the number of 16-byte accesses since the last call, and whether all were aligned."""
        n_words, n_misaligned = (counter.value for counter in self._counters)
        for counter in self._counters:
            counter.value = 0
        return n_words, n_misaligned == 0

    def __getitem__(self, kernel_and_dtypes):
        return self.compiled[label(*kernel_and_dtypes)]


def label(kernel, dtypes):
    return f"{kernel.name}_{dtypes_label(storages_of(dtypes, len(kernel.equations.arrays)))}"


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        pytest.fail("running CUDA C on the host needs a C++ compiler: install g++ (Debian, Ubuntu: apt install g++)")
    cases = [(kernel, dtype) for kernel in (*library(), weighted_mix(20)) for dtype in STORAGES]
    cases += [(kernel, dtypes) for kernel in MIXED for dtypes in MIXES]
    sources = {}
    for kernel, dtypes in cases:
        storages = storages_of(dtypes, len(kernel.equations.arrays))
        sources[label(kernel, dtypes)] = cuda_source.source(label(kernel, dtypes), kernel.equations, storages)
    folder = tmp_path_factory.mktemp("cuda")
    text = [SHIM, cuda_source.PREAMBLE.removeprefix(cuda_source.HALVES)]
    text += [source.removeprefix(cuda_source.PREAMBLE) + f"LAUNCHER({name})" for name, source in sources.items()]
    (folder / "kernels.cpp").write_text("\n".join(text))
    options = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC"]
    command = [compiler, *options, "kernels.cpp", "-o", "kernels.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return Library(folder / "kernels.so", sources)


def bits(array):
    """Return the array's bits, with one pattern for all NaN."""
    unsigned = array.view(f"u{array.itemsize}").copy()
    unsigned[np.isnan(array.astype(np.float64))] = 1
    return unsigned


def vectors(dtypes, n, offsets, seed):
    """Return aligned buffers with some extreme values, and views of length n at offsets into them."""
    rng = np.random.default_rng(seed)
    arrays, buffers = [], []
    for dtype, offset in zip(dtypes, offsets, strict=True):
        room = n + offset + 9
        values = rng.normal(size=room) * 10.0 ** rng.integers(-6, 5, room)
        wild = rng.random(room) < 0.05
        values[wild] = rng.choice([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, 6e4, 1e38], wild.sum())
        memory = np.empty(room * dtype.itemsize + 16, np.uint8)
        buffer = memory[-memory.ctypes.data % 16 :][: room * dtype.itemsize].view(dtype)
        with np.errstate(all="ignore"):
            buffer[...] = values.astype(dtype)
        buffers.append(buffer)
        arrays.append(buffer[offset : offset + n])
    return buffers, arrays


def words_of(kernel, arrays):
    """Return the expected 16-byte accesses: those of whole packs, if all arrays reach alignment at the same element."""
    length = 16 // min(array.itemsize for array in arrays)
    n = arrays[0].size
    heads = [h for h in range(length) if all((a.ctypes.data + h * a.itemsize) % 16 == 0 for a in arrays)]
    n_packs = max((n - heads[0]) // length, 0) if heads else 0
    itemsize = {name: array.itemsize for name, array in zip(kernel.equations.arrays, arrays, strict=True)}
    moved = kernel.equations.loaded + kernel.equations.stored
    return n_packs * sum(length * itemsize[name] // 16 for name in moved)


def check(on_host, kernel, dtypes, n, offsets, grid=2, block=32, seed=0):
    """Compare one launch with the reference: bits of the arrays and around them, the count, the 16-byte accesses."""
    n_arrays = len(kernel.equations.arrays)
    compute = np.float64 if "float64" in (dtypes if isinstance(dtypes, tuple) else (dtypes,)) else np.float32
    types_ = [numpy_type(storage.name) for storage in storages_of(dtypes, n_arrays)]
    scalars = np.random.default_rng(seed + 1).uniform(0.05, 1.5, len(kernel.equations.scalars)).tolist()
    expected_buffers, expected = vectors(types_, n, offsets, seed)
    buffers, arrays = vectors(types_, n, offsets, seed)
    counter = np.full(1, 5, np.uint64)
    arguments = [*map(Array, arrays), *map(compute, scalars)]
    arguments += [Array(counter)] * (kernel.equations.guard is not None)
    n_words = words_of(kernel, arrays)
    on_host[kernel, dtypes]((grid,), (block,), (*arguments, np.int64(n)))
    with np.errstate(all="ignore"):
        n_nonfinite = kernel.reference(*expected, *scalars)
    where = f"{kernel.name}, {dtypes}, {n} elements at {offsets}, {grid} blocks of {block}"
    for name, buffer, wanted in zip(kernel.equations.arrays, buffers, expected_buffers, strict=True):
        np.testing.assert_array_equal(bits(buffer), bits(wanted), err_msg=f"{where}: {name}")
    assert counter[0] == 5 + n_nonfinite, where
    assert on_host.moved() == (n_words, True), where
    return n_nonfinite


@pytest.mark.parametrize("dtype", STORAGES)
def test_every_kernel_has_the_bits_of_the_reference(on_host, dtype):
    for kernel in (*library(), weighted_mix(20)):
        check(on_host, kernel, dtype, 1003, [3] * len(kernel.equations.arrays), seed=7)


SIZES = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 1000, 4097]


@pytest.mark.parametrize("kernel", [elastic_exchange, keep_finite, scale], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", STORAGES)
def test_any_size_and_alignment_on_any_grid(on_host, dtype, kernel):
    length = 16 // numpy_type(dtype).itemsize
    n_nonfinite = 0
    for n, offset, (grid, block) in itertools.product(SIZES, range(length), [(1, 1), (1, 32), (3, 64), (40, 128)]):
        offsets = [offset] * len(kernel.equations.arrays)
        n_nonfinite += check(on_host, kernel, dtype, n, offsets, grid, block, seed=n)
    assert (n_nonfinite > 0) == (kernel.equations.guard is not None)


@pytest.mark.parametrize("dtype", STORAGES)
def test_arrays_with_different_alignment(on_host, dtype):
    for n, offsets in itertools.product(SIZES, [(0, 1), (1, 0), (3, 2), (1, 9)]):
        check(on_host, elastic_exchange, dtype, n, offsets)


@pytest.mark.parametrize("dtypes", MIXES, ids="-".join)
def test_arrays_of_different_types(on_host, dtypes):
    for kernel in MIXED:
        for n, offsets in itertools.product(SIZES, [(0, 0), (1, 1), (5, 5), (0, 1), (2, 0)]):
            check(on_host, kernel, dtypes, n, offsets)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", STORAGES)
def test_a_vector_without_finite_elements_is_counted(on_host, dtype, value):
    _, (x, z) = vectors([numpy_type(dtype)] * 2, 4097, [1, 1], seed=0)
    x[...], z[...] = 1, value
    counter = np.zeros(1, np.uint64)
    on_host[symmetric_average, dtype]((3,), (128,), (Array(x), Array(z), Array(counter), np.int64(4097)))
    assert counter[0] == 4097
    assert np.array_equal(x, np.ones(4097, x.dtype))
    assert on_host.moved()[1]


@pytest.mark.parametrize("dtype", STORAGES)
def test_the_same_array_may_be_given_twice(on_host, dtype):
    _, (x,) = vectors([numpy_type(dtype)], 1003, [1], seed=2)
    expected = x.copy()
    with np.errstate(all="ignore"):
        n_nonfinite = symmetric_average.reference(expected, expected)
    counter = np.zeros(1, np.uint64)
    on_host[symmetric_average, dtype]((2,), (64,), (Array(x), Array(x), Array(counter), np.int64(1003)))
    np.testing.assert_array_equal(bits(x), bits(expected))
    assert counter[0] == n_nonfinite > 0


def test_16_bit_conversions_match_numpy(on_host):
    patterns = np.arange(2**16, dtype=np.uint16)
    anything = np.random.default_rng(3).integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    for half in ("float16", "bfloat16"):
        halves = patterns.view(numpy_type(half))
        wide, narrow = np.empty(2**16, np.float32), np.empty(300_000, numpy_type(half))
        on_host[copy, ("float32", half)]((8,), (128,), (Array(wide), Array(halves), np.int64(wide.size)))
        on_host[copy, (half, "float32")]((8,), (128,), (Array(narrow), Array(anything), np.int64(narrow.size)))
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(bits(wide), bits(halves.astype(np.float32)))
            np.testing.assert_array_equal(bits(narrow), bits(anything.astype(numpy_type(half))))


@pytest.mark.parametrize("offset", [0, 1])
def test_more_than_2_to_the_31_elements(on_host, offset, tmp_path):
    """Use a sparse file, and run only the threads that work on its ends."""
    n = 2**31 + 13
    x = np.memmap(tmp_path / "x", np.float16, "w+", shape=n + 16)[offset : offset + n]
    ends = (slice(0, 64), slice(n - 64, n))
    for end in ends:
        x[end] = 1
    blocks, block = 2**17, 1024
    n_threads = blocks * block
    assert n // 8 > 2 * n_threads - 8  # two packs at once for these threads, and for some a third one
    kernel, arguments = on_host[scale, "float16"], (Array(x), np.float32(2), np.int64(n))
    for threads in ((0, 64), (n_threads - 64, n_threads)):
        kernel((blocks,), (block,), arguments, threads=threads)
    for end in ends:
        np.testing.assert_array_equal(x[end], np.full(64, 2, np.float16))
    assert on_host.moved()[1]


@pytest.fixture
def cupy(on_host, monkeypatch):
    """Replace cupy by a fake whose RawKernel runs on the host."""

    def raw_kernel(code, name, options, backend):
        found = on_host.compiled[name]
        assert code == found.source
        assert (options, backend) == (("--fmad=false",), "nvrtc")
        return found

    runtime = types.SimpleNamespace(getDevice=lambda: 0)
    device = types.SimpleNamespace(attributes={"MultiProcessorCount": 1})
    module = types.SimpleNamespace(
        RawKernel=raw_kernel, cuda=types.SimpleNamespace(runtime=runtime, Device=lambda _: device)
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    cuda.launcher.cache_clear()
    yield
    cuda.launcher.cache_clear()


@pytest.mark.parametrize("n", [0, 1, 1000, 100_000])
@pytest.mark.parametrize("dtypes", ["float32", "float64", "bfloat16", ("float32", "bfloat16")], ids=str)
@pytest.mark.usefixtures("cupy")
def test_a_launch_passes_correct_arguments(on_host, dtypes, n):
    """Test the order and bytes of the arguments, also with a grid smaller than the vector."""
    storages = storages_of(dtypes, 2)
    launch = cuda.launcher(label(elastic_exchange, dtypes), elastic_exchange.equations, storages)
    types_ = [numpy_type(storage.name) for storage in storages]
    _, expected = vectors(types_, n, [0, 0], seed=4)
    _, arrays = vectors(types_, n, [0, 0], seed=4)
    counter = np.zeros(1, np.uint64)
    launch([Array(a) for a in arrays], [0.3, 0.7], n, Array(counter))
    with np.errstate(all="ignore"):
        assert counter[0] == elastic_exchange.reference(*expected, 0.3, 0.7)
    for array, wanted in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(bits(array), bits(wanted))
    assert on_host.moved()[1]
