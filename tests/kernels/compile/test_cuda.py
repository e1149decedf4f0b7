"""The CUDA back-end without a GPU: NVRTC compiles all kernels, CuPy is called correctly, and counts are exact.

test_cuda_on_host.py tests the results of the kernels.
"""

import re
import sys
import threading
import types

import ml_dtypes
import numpy as np
import pytest
from support.standin_gpu import DeviceArray, StandInGpu, current_stream, install

from mpitrain.kernels import Kernel, elastic_exchange, gpu, library, pair_average, scale, weighted_mix
from mpitrain.kernels.compile import cuda, cuda_source
from mpitrain.kernels.compile.body import body
from mpitrain.kernels.compile.nonfinite_count import N_COUNTERS
from mpitrain.kernels.compile.storage import STORAGES, storages_of

NAMES = [kernel.name for kernel in library()]
LOAD, STORE = (rf"\b{access}\.global\.(?:v4\.[bfu]32|v2\.[bfu]64)" for access in ("ld", "st"))


def compiled(source, capability):
    """Return the PTX of a CUDA source for a compute capability, or fail with NVRTC's log."""
    from cuda.bindings import nvrtc  # not in every environment that collects this file

    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    options = [
        f"--gpu-architecture=compute_{capability}".encode(),
        *(option.encode() for option in cuda_source.OPTIONS),
    ]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    _, size = nvrtc.nvrtcGetPTXSize(program)
    ptx = b" " * size
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(program)
    return ptx.decode()


# The oldest and the newest capability see both 16-bit types, of which bfloat16 has no instructions before 80.
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [("float32", 70), ("float64", 90), ("float16", 70), ("bfloat16", 70), ("bfloat16", 80), ("float16", 90)],
)
def test_every_kernel_compiles(dtype, capability):
    # One translation unit for all, because starting NVRTC takes longer than compiling the kernels.
    sources = [kernel.cuda_source(dtype).removeprefix(cuda_source.PREAMBLE) for kernel in library()]
    ptx = compiled(cuda_source.PREAMBLE + "".join(sources), capability)
    assert all(f".entry {name}(" in ptx for name in NAMES)
    assert "fma." not in ptx
    assert ".local" not in ptx  # packs live in registers
    assert "atom." in ptx or "red." in ptx
    assert dtype == "float64" or ".f64" not in ptx


@pytest.mark.parametrize(
    ("dtypes", "accesses"),
    [
        ("float32", 1 + 1),
        ("float64", 1 + 1),
        ("float16", 1 + 1),
        ("bfloat16", 1 + 1),
        (("float32", "bfloat16"), 2 + 1),
        (("bfloat16", "float16"), 1 + 1),
        (("float16", "float64"), 1 + 4),
    ],
    ids=str,
)
def test_a_pack_is_loaded_and_stored_16_bytes_at_a_time(dtypes, accesses):
    ptx = compiled(elastic_exchange.cuda_source(dtypes), 80)
    assert len(re.findall(LOAD, ptx)) == len(re.findall(STORE, ptx)) == accesses


@pytest.mark.parametrize("dtype", STORAGES)
def test_a_kernel_that_loads_one_array_loads_two_packs_before_it_stores(dtype):
    accesses = re.findall(f"{LOAD}|{STORE}", compiled(scale.cuda_source(dtype), 90))
    assert [access[:2] for access in accesses] == ["ld", "ld", "st", "st", "ld", "st"]


def test_the_largest_mix_compiles():
    compiled(weighted_mix(64).cuda_source("float32"), 70)


@pytest.mark.parametrize("kernel", library(), ids=NAMES)
def test_host_and_cuda_compute_with_the_same_text(kernel):
    host, device = kernel.host_source("float32"), kernel.cuda_source("float32")
    for line in body(
        kernel.equations, storages_of("float32", len(kernel.equations.arrays)), "float32", cuda_source.CASTS
    ):
        assert f"{line.target} = {line.text};" in device
        if not line.target.startswith("_k"):
            assert f"{line.target} = {line.text}\n" in host


def test_names_in_equations_do_not_clash_with_generated_ones():
    names = ["size", "head", "packs", "pack", "n", "thread", "threads", "element", "stride", "words", "x", "N"]
    arrays, scalars = names[:6], names[6:]
    kernel = Kernel(
        "pack",
        f"rest = {' + '.join(names)}\nsize = rest\nx_pack = size",
        arrays=" ".join([*arrays, "x_pack"]),
        scalars=" ".join(scalars),
        guard="rest",
        source="test",
    )
    compiled(kernel.cuda_source("float32"), 80)


class Array:
    """The attributes of a cupy.ndarray that the back-end reads, around a NumPy array."""

    __cuda_array_interface__ = None

    def __init__(self, host, device=0):
        self.host = host
        self.dtype, self.shape, self.ndim, self.size = host.dtype, host.shape, host.ndim, host.size
        self.nbytes = host.nbytes
        self.data = types.SimpleNamespace(ptr=host.ctypes.data, device_id=device)

    flags = property(lambda self: self.host.flags)

    def __getitem__(self, part):
        return Array(self.host[part], self.data.device_id)


class Cupy:
    """A fake cupy that records how kernels are made and launched. Of its two GPUs, 0 is in use."""

    def __init__(self):
        self.launches = []
        self.in_use = 0
        self.synchronized = []
        self.cuda = types.SimpleNamespace(
            runtime=types.SimpleNamespace(getDevice=lambda: self.in_use),
            Device=lambda index: Device(self, index),
            get_current_stream=lambda: types.SimpleNamespace(synchronize=lambda: self.synchronized.append(self.in_use)),
        )

    def RawKernel(self, code, name, options, backend):
        def launch(grid, block, arguments):
            made = {"code": code, "name": name, "options": options, "backend": backend}
            self.launches.append(
                types.SimpleNamespace(**made, grid=grid, block=block, arguments=arguments, device=self.in_use)
            )

        return launch


class Device:
    def __init__(self, cupy, index):
        self.cupy, self.index = cupy, index
        self.attributes = {"MultiProcessorCount": 2}

    def __enter__(self):
        self.before, self.cupy.in_use = self.cupy.in_use, self.index

    def __exit__(self, *_):
        self.cupy.in_use = self.before


class Memory:
    """A fake GPU that has memory only."""

    def zeros(self, n, dtype):
        return Array(np.zeros(n, dtype))

    def page_locked(self, n, dtype):
        return np.zeros(n, dtype)

    def copy(self, to, source):
        pass

    def mark(self):
        return None

    def wait_for(self, mark):
        pass


@pytest.fixture
def cupy(monkeypatch):
    module = Cupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(gpu, "_current", Memory())
    monkeypatch.setattr(cuda, "_launches", {})
    cuda.launcher.cache_clear()
    yield module
    cuda.launcher.cache_clear()


def test_a_launch_passes_arrays_then_scalars_then_the_size(cupy):
    from mpitrain.kernels import heavy_ball_step

    x, v, g = (Array(np.ones(7, np.float32)) for _ in range(3))
    assert heavy_ball_step(x, v, g, eta=0.1, delta=0.2, decay=0.3) == 0
    (launch,) = cupy.launches
    assert launch.arguments == (x, v, g, np.float32(0.1), np.float32(0.2), np.float32(0.3), 7)
    assert [type(a) for a in launch.arguments[3:]] == [np.float32, np.float32, np.float32, np.int64]
    assert (launch.name, launch.options, launch.backend) == ("heavy_ball_step", ("--fmad=false",), "nvrtc")
    assert launch.code == heavy_ball_step.cuda_source("float32")
    assert (launch.grid, launch.block) == ((1,), (cuda.THREADS,))


def test_scalars_have_the_compute_type_and_a_guard_has_a_counter(cupy):
    x, c = Array(np.ones(7, ml_dtypes.bfloat16)), Array(np.ones(7))
    elastic_exchange(x, c, 1, 0.5)
    elastic_exchange(x, c, 1, 0.5)
    for launch in cupy.launches:
        assert launch.arguments[:2] == (x, c)
        counter, size = launch.arguments[4:]
        assert [type(a) for a in launch.arguments[2:4]] == [np.float64, np.float64]
        assert (counter.dtype, counter.shape, size) == (np.uint64, (1,), 7)
        assert launch.code == elastic_exchange.cuda_source(("bfloat16", "float64"))
    first, second = (launch.arguments[4].data.ptr for launch in cupy.launches)
    assert first != second


@pytest.mark.parametrize(
    ("n", "blocks"), [(1, 1), (1024, 1), (1025, 2), (2 * 64 * 1024, 128), (2 * 64 * 1024 + 1, 128), (2**33, 128)]
)
def test_the_grid_has_a_thread_for_each_pack_up_to_a_full_gpu(cupy, n, blocks):
    launch = cuda.launcher("scale", scale.equations, storages_of("float32", 1))
    launch([Array(np.ones(1, np.float32))], [2.0], n, None)  # two packs of 4 for each of 128 threads: 1024 elements
    assert cupy.launches[0].grid == (blocks,)


def test_a_call_with_empty_vectors_compiles_as_prepare_does(cupy):
    empty = Array(np.ones(0))
    assert elastic_exchange(empty, empty, 0.5, 0.5) == 0
    assert cupy.launches.pop().code == elastic_exchange.cuda_source("float64")
    elastic_exchange.prepare(Array(np.ones(5, np.float32)))
    scale.prepare(Array(np.ones(5, ml_dtypes.bfloat16)))
    guarded, plain = cupy.launches
    assert (guarded.grid, guarded.arguments[-1], plain.arguments[-1]) == ((1,), 0, 0)
    assert guarded.code == elastic_exchange.cuda_source("float32")
    assert plain.code == scale.cuda_source("bfloat16")


def test_a_kernel_runs_on_the_gpu_of_its_arrays(cupy, monkeypatch):
    x = Array(np.ones(7, np.float32), device=1)
    scale(x, 2.0)
    assert (cupy.launches[0].device, cupy.in_use, cupy.synchronized) == (1, 0, [])
    with pytest.raises(ValueError, match="the arrays are on GPU 1, but this process uses another"):
        pair_average(x, x)
    monkeypatch.setattr(Memory, "zeros", lambda _, n, dtype: Array(np.zeros(n, dtype), device=1))
    monkeypatch.setattr(gpu, "_current", Memory())
    pair_average(x, x)
    assert (cupy.launches[1].device, cupy.in_use, cupy.synchronized) == (1, 0, [1])


class Tensor:
    """A torch tensor, which has the interface on any device but not CuPy's attributes."""

    __cuda_array_interface__ = None
    dtype, shape, ndim = np.dtype(np.float64), (3,), 1


@pytest.mark.parametrize(
    ("x", "c", "problem"),
    [
        (Array(np.ones(3)), Array(np.ones(4)), "c has shape .* one length"),
        (Array(np.ones((2, 2))), Array(np.ones((2, 2))), "x has .* 1-D"),
        (Array(np.ones(6)[::2]), Array(np.ones(3)), "x has .* contiguous"),
        (Array(np.ones(3)), Array(np.ones(6)[::2]), "c has .* contiguous"),
        (Array(np.ones(3, np.int32)), Array(np.ones(3)), "x: .*int32"),
        (Array(np.ones(3)), Array(np.ones(3, ">f4")), "c: .* native byte order"),
        (Array(np.ones(3)), np.ones(3), "c is a ndarray; .* NumPy arrays only or CuPy arrays only"),
        (np.ones(3), Array(np.ones(3)), "c is a Array; .* NumPy arrays only or CuPy arrays only"),
        (Array(np.ones(3)), [1.0, 1.0, 1.0], "c is a list"),
        (Tensor(), Tensor(), "x is a Tensor; .*from_dlpack"),
        (Array(np.ones(3)), Tensor(), "c is a Tensor; .*from_dlpack"),
    ],
)
def test_unsuitable_device_arrays_are_refused(cupy, x, c, problem):
    with pytest.raises(ValueError, match=f"elastic_exchange: {problem}"):
        elastic_exchange(x, c, 0.5, 0.5)
    assert not cupy.launches


@pytest.fixture
def device(monkeypatch):
    """A GPU in host memory that defers work until something waits for it."""
    return install(monkeypatch, StandInGpu())


def count_of(n_bad, n=1000):
    """Start pair_average with ``n_bad`` NaN on this thread's stream."""
    x, z = DeviceArray(np.ones(n, np.float32)), DeviceArray(np.ones(n, np.float32))
    z.host[:n_bad] = np.nan
    return pair_average(x, z)


def n_pending():
    stream = current_stream()
    return stream.n_begun - stream.n_done


@pytest.mark.usefixtures("device")
def test_a_count_waits_when_it_is_read():
    n_nonfinite = count_of(3)
    assert n_pending() == 2  # the kernel, and the copy of its counter to the host
    total = 0
    total += n_nonfinite
    total += count_of(0)
    total = total + 4 + np.int64(2) + count_of(5)
    assert n_pending() == 6
    assert total == 14
    assert n_pending() == 0
    assert n_nonfinite == 3
    assert n_nonfinite
    assert not count_of(0)
    assert [10, 20, 30, 40][n_nonfinite] == 40
    assert f"{total}" == "14"
    assert int(sum([count_of(1), count_of(2)])) == 3
    with pytest.raises(TypeError):
        n_nonfinite + 0.5


@pytest.mark.usefixtures("device")
def test_counts_are_ordered_as_their_numbers_are():
    three, five = count_of(3), count_of(5)
    assert 2 < three < five
    assert three > 0
    assert three <= 3 <= five
    assert five >= three
    assert not count_of(0) > 0
    with pytest.raises(TypeError):
        _ = three < "4"


@pytest.mark.usefixtures("device")
def test_counts_are_exact_in_any_order_and_with_many_unread():
    n_bad = np.random.default_rng(0).integers(0, 50, 5 * N_COUNTERS).tolist()
    n_nonfinite = [count_of(n) for n in n_bad]
    assert n_pending() > N_COUNTERS // 4  # the newest launches have not been waited for
    for k in np.random.default_rng(1).permutation(len(n_bad)):
        assert int(n_nonfinite[k]) == n_bad[k]
    assert [int(r) for r in n_nonfinite] == n_bad


@pytest.mark.usefixtures("device")
def test_a_long_sum_is_exact_and_does_not_grow():
    total = 0
    for n in range(10 * N_COUNTERS):
        total = total + count_of(n % 7)
        assert len(total._launches) <= N_COUNTERS + 1
    assert total == sum(n % 7 for n in range(10 * N_COUNTERS))


def test_streams_may_change_between_launches(device):
    first = count_of(3)
    with device.in_background():
        second = count_of(4)
        third = count_of(5)
    fourth = count_of(6)
    assert [int(r) for r in (third, first, fourth, second)] == [5, 3, 6, 4]


def test_a_thread_may_read_the_counts_of_another(device):
    n_nonfinite, failed = [], []
    lock = threading.Lock()

    def launch(seed):
        for n in np.random.default_rng(seed).integers(0, 50, 3 * N_COUNTERS).tolist():
            one = count_of(n)
            with lock:
                n_nonfinite.append((one, n))

    def read():
        for _ in range(50):
            with lock:
                so_far = n_nonfinite[-20:]
            failed.extend((int(one), n) for one, n in so_far if int(one) != n)

    threads = [threading.Thread(target=launch, args=(k,)) for k in range(2)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(one == n for one, n in n_nonfinite)
    assert sum((one for one, _ in n_nonfinite), start=0) == sum(n for _, n in n_nonfinite)


def test_a_launch_that_fails_takes_no_counter(device, monkeypatch):
    def broken(*_):
        def launch(*_):
            raise RuntimeError("does not compile")

        return launch

    with monkeypatch.context() as patched:
        patched.setattr(cuda, "launcher", broken)
        for _ in range(2 * N_COUNTERS):
            with pytest.raises(RuntimeError, match="does not compile"):
                count_of(1)
    assert count_of(2) == 2
