"""Vectors in host and device memory; and that the stand-in GPU of the tests detects the errors it is made for."""

import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
from support.standin_gpu import DeviceArray, Stream, on

from mpitrain.kernels import assign, elastic_exchange, gpu, norms, scale, to_host
from mpitrain.kernels.gpu import address_of, is_device
from mpitrain.kernels.gpu.cuda_gpu import CudaGpu


def test_the_process_has_one_gpu(standin_gpu):
    assert gpu.current() is standin_gpu


def test_assign_copies_between_host_and_device(standin_gpu):
    values, host = np.arange(6, dtype=np.float32), np.zeros(6, np.float32)
    on_gpu, other = standin_gpu.zeros(6, np.float32), standin_gpu.zeros(6, np.float32)
    assign(on_gpu, values.astype(np.float64))
    assign(other, on_gpu)
    assign(host, other)
    np.testing.assert_array_equal(host, values)
    assign(other[:3], 7)
    assign(host, values[::-1])
    np.testing.assert_array_equal(to_host(other), [7, 7, 7, 3, 4, 5])
    np.testing.assert_array_equal(host, values[::-1])
    rows = standin_gpu.zeros(12, np.float32).reshape(2, -1)
    assign(rows, values)
    np.testing.assert_array_equal(to_host(rows), [values, values])


def test_host_vectors_are_not_copied():
    values = np.ones(3)
    assert to_host(values) is values
    assert not is_device(values)
    assert address_of(values) == values.ctypes.data
    gpu.synchronize(values)  # needs no GPU


def test_norms_on_the_gpu_are_those_on_the_host(standin_gpu):
    x, y = np.arange(5.0), np.ones(5)
    on_gpu = [standin_gpu.zeros(5, np.float64) for _ in range(2)]
    for to, values in zip(on_gpu, (x, y), strict=True):
        assign(to, values)
    assert norms.norm(on_gpu[0]) == pytest.approx(norms.norm(x))
    assert norms.distance(*on_gpu) == pytest.approx(norms.distance(x, y))


def test_a_kernel_on_device_arrays_is_the_kernel_on_host_arrays(standin_gpu):
    host = [np.array([1.0, np.nan, 3.0]), np.array([2.0, 2.0, np.inf])]
    on_gpu = [standin_gpu.zeros(3, np.float64) for _ in range(2)]
    for to, values in zip(on_gpu, host, strict=True):
        assign(to, values)
    n_nonfinite = elastic_exchange(*on_gpu, 0.5, 0.25)
    assert elastic_exchange(*host, 0.5, 0.25) == 2
    assert int(n_nonfinite) == 2
    for mine, theirs in zip(on_gpu, host, strict=True):
        np.testing.assert_array_equal(to_host(mine), theirs)


def test_work_is_deferred_until_something_waits_for_it(standin_gpu):
    x = standin_gpu.zeros(2, np.float64)
    x.fill(1.0)
    scale(x, 3.0)
    assert x.host.tolist() == [0, 0]
    gpu.synchronize(x)
    assert x.host.tolist() == [3, 3]


def test_streams_are_ordered_by_marks_only(standin_gpu):
    x, other = standin_gpu.zeros(2, np.float64), Stream()
    x.fill(1.0)
    with on(other):
        assert x.get().tolist() == [0, 0]
    mark = standin_gpu.mark()
    x.fill(2.0)
    with on(other):
        standin_gpu.after(mark)
        assert x.get().tolist() == [1, 1]
    assert x.get().tolist() == [2, 2]


def test_device_arrays_refuse_what_cupy_refuses(standin_gpu):
    x = standin_gpu.zeros(2, np.float64)
    for wrong in (lambda: np.asarray(x), lambda: x + 1, lambda: np.add(x, 1), lambda: np.sum(x)):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(TypeError):
        x[...] = np.ones(2)
    with pytest.raises(TypeError):
        np.zeros(2)[...] = x
    with pytest.raises(ValueError, match="NumPy arrays only or CuPy arrays only"):
        elastic_exchange(x, np.ones(2), 0.5, 0.5)
    assert isinstance(np.zeros_like(x, shape=5), DeviceArray)


def test_copies_need_page_locked_memory(standin_gpu):
    x, locked = standin_gpu.zeros(4, np.float32), standin_gpu.page_locked(4, np.float32)
    locked[:] = range(4)
    standin_gpu.copy(x, locked)
    standin_gpu.synchronize()
    locked[:] = 0
    standin_gpu.wait_for(standin_gpu.copy_out(locked[1:], x[1:]))
    assert locked.tolist() == [0, 1, 2, 3]
    with pytest.raises(AssertionError, match="pageable"):
        standin_gpu.copy(x, np.zeros(4, np.float32))


@pytest.fixture
def cuda_gpu(monkeypatch):
    """A CudaGpu on a recording cupy, whose streams have the addresses 1 (exchange) and 2 (out)."""
    cupy = MagicMock()
    cupy.cuda.Stream.side_effect = [MagicMock(ptr=address) for address in (1, 2, 3)]
    cupy.cuda.Event.side_effect = [MagicMock(ptr=address) for address in range(100, 110)]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return CudaGpu(0), cupy.cuda.runtime


COMPUTE = 7  # the address of torch's stream


def order_of(runtime):
    """Return pairs of streams of which the second was made to wait for the first, and forget them."""
    recorded, pairs = {}, []
    for name, arguments, _ in runtime.method_calls:
        if name == "eventRecord":
            recorded[arguments[0]] = arguments[1]
        elif name == "streamWaitEvent":
            pairs.append((recorded[arguments[1]], arguments[0]))
    runtime.reset_mock()
    return pairs


def test_an_exchange_follows_the_computation_before_it_and_precedes_the_one_after(cuda_gpu):
    gpu, runtime = cuda_gpu
    with gpu.exchanging(COMPUTE):
        assert order_of(runtime) == [(COMPUTE, 1)]
    assert order_of(runtime) == [(1, COMPUTE)]
    with pytest.raises(ZeroDivisionError), gpu.exchanging(COMPUTE):  # also after an error
        raise ZeroDivisionError
    assert order_of(runtime) == [(COMPUTE, 1), (1, COMPUTE)]


def test_a_local_step_comes_between_two_parts_of_an_exchange(cuda_gpu):
    gpu, runtime = cuda_gpu
    with gpu.computing(COMPUTE):
        assert order_of(runtime) == [(1, COMPUTE)]
    assert order_of(runtime) == [(COMPUTE, 1)]


def test_background_work_is_done_at_the_end_on_one_stream_per_thread(cuda_gpu):
    gpu, _ = cuda_gpu
    for _ in range(2):
        with gpu.in_background():
            stream = gpu._per_thread.stream
            stream.synchronize.reset_mock()
        stream.synchronize.assert_called_once()
        assert stream.ptr == 3
