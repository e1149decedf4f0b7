"""The CUDA back-end, as far as it goes without a GPU: NVRTC compiles all kernels, and CuPy is called rightly."""

import sys
import types

import numpy as np
import pytest

from mpitrain.kernels import cuda, elastic_exchange, library, weighted_mix
from mpitrain.kernels.storage import STORAGES, storages_of

NAMES = [kernel.name for kernel in library()]


def compiled(source, capability):
    """The PTX of a CUDA source for a compute capability; NVRTC's log as an assertion where it has one."""
    from cuda.bindings import nvrtc  # only one of the environments has it, and all of them collect this file

    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    options = [f"--gpu-architecture=compute_{capability}".encode(), *(option.encode() for option in cuda.OPTIONS)]
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


@pytest.mark.parametrize("capability", [70, 80, 90])
@pytest.mark.parametrize("dtype", STORAGES)
def test_every_kernel_compiles(dtype, capability):
    # One translation unit for all: NVRTC's start costs more than the kernels.
    sources = [kernel.cuda_source(dtype).removeprefix(cuda.PREAMBLE) for kernel in library()]
    ptx = compiled(cuda.PREAMBLE + "".join(sources), capability)
    assert all(f".entry {name}(" in ptx for name in NAMES)
    assert "fma." not in ptx
    assert "atom." in ptx or "red." in ptx
    assert dtype == "float64" or ".f64" not in ptx


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float16", "float64"), ("bfloat16", "float16")])
def test_a_source_is_self_contained_and_takes_mixed_types(dtypes):
    compiled(elastic_exchange.cuda_source(dtypes), 80)


def test_the_largest_mix_compiles():
    compiled(weighted_mix(64).cuda_source("float32"), 70)


@pytest.mark.parametrize("kernel", library(), ids=NAMES)
def test_host_and_cuda_compute_with_the_same_text(kernel):
    host, device = kernel.host_source("float32"), kernel.cuda_source("float32")
    for line in cuda.body(
        kernel.equations, storages_of("float32", len(kernel.equations.arrays)), "float32", cuda.CASTS
    ):
        assert f"{line.target} = {line.text};" in device
        if not line.target.startswith("_k"):
            assert f"{line.target} = {line.text}\n" in host


class Duck:
    """What the back-end needs of a cupy.ndarray, around a NumPy array."""

    __cuda_array_interface__ = None

    def __init__(self, array):
        self.array = array
        self.dtype, self.shape, self.ndim, self.size = array.dtype, array.shape, array.ndim, array.size
        self.flags = types.SimpleNamespace(c_contiguous=array.flags.c_contiguous)
        self.device = Device()

    def view(self, dtype):
        return Duck(self.array.view(dtype))

    def get(self):
        return self.array


class Device:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def launches(monkeypatch):
    """A stand-in for cupy whose ElementwiseKernel notes how it is declared and called, and rejects 3 elements."""
    noted = []

    class ElementwiseKernel:
        def __init__(self, in_params, out_params, operation, **options):
            self.declared = {"in": in_params, "out": out_params, "operation": operation, **options}

        def __call__(self, *args, size):
            noted.append((self.declared, args, size))
            if isinstance(args[-1], Duck) and args[-1].dtype == np.uint64:
                args[-1].array[0] = 3

    cupy = types.SimpleNamespace(
        ndarray=Duck,
        uint16=np.uint16,
        uint64=np.uint64,
        zeros=lambda n, dtype: Duck(np.zeros(n, dtype)),
        ElementwiseKernel=ElementwiseKernel,
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    cuda.elementwise.cache_clear()
    yield noted
    cuda.elementwise.cache_clear()


def test_inputs_come_before_scalars_and_outputs_last(launches):
    from mpitrain.kernels import heavy_ball_step

    x, v, g = (Duck(np.ones(7, np.float32)) for _ in range(3))
    assert heavy_ball_step(x, v, g, eta=0.1, delta=0.2, decay=0.3) == 0
    ((declared, args, size),) = launches
    assert args == (g, 0.1, 0.2, 0.3, x, v)
    assert size == 7
    assert declared["in"] == "raw float32 g_at, float32 eta_in, float32 delta_in, float32 decay_in"
    assert declared["out"] == "raw float32 x_at, raw float32 v_at"
    assert declared["options"] == ("--fmad=false",)
    assert declared["operation"] in heavy_ball_step.cuda_source("float32")


def test_a_guard_counts_and_16_bit_arrays_travel_as_bits(launches):
    import ml_dtypes

    x, c = Duck(np.ones(7, ml_dtypes.bfloat16)), Duck(np.ones(7, np.float32))
    assert elastic_exchange(x, c, 0.5, 0.5) == 3
    ((declared, args, _),) = launches
    assert args[2].dtype == np.uint16
    assert args[3] is c
    assert declared["out"] == "raw uint16 x_at, raw float32 c_at, raw uint64 rejected_at"


def test_an_empty_vector_launches_nothing(launches):
    assert elastic_exchange(Duck(np.ones(0)), Duck(np.ones(0)), 0.5, 0.5) == 0
    assert not launches


@pytest.mark.parametrize(
    ("x", "c", "problem"),
    [
        (Duck(np.ones(3)), Duck(np.ones(4)), "one length"),
        (Duck(np.ones((2, 2))), Duck(np.ones((2, 2))), "1-D"),
        (Duck(np.ones(6)[::2]), Duck(np.ones(3)), "contiguous"),
        (Duck(np.ones(3, np.int32)), Duck(np.ones(3)), "int32"),
        (Duck(np.ones(3)), np.ones(3), "NumPy arrays only or CuPy arrays only"),
        (np.ones(3), Duck(np.ones(3)), "NumPy arrays only or CuPy arrays only"),
    ],
)
def test_device_arrays_that_do_not_fit_are_refused(launches, x, c, problem):
    with pytest.raises(ValueError, match=problem):
        elastic_exchange(x, c, 0.5, 0.5)
