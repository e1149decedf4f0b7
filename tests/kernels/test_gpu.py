"""Vectors wherever they lie; and that the stand-in, on which tests of GPUs rest, finds what it is there to find."""

import numpy as np
import pytest
from support.standin_gpu import DeviceArray, Stream, on

from mpitrain.kernels import assign, elastic_exchange, gpu, norms, scale, to_host
from mpitrain.kernels.gpu import address_of, is_device


def test_the_process_has_one_gpu(standin_gpu):
    assert gpu.current() is standin_gpu


def test_assign_takes_and_gives_what_lies_anywhere(standin_gpu):
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


def test_norms_are_those_of_the_host(standin_gpu):
    x, y = np.arange(5.0), np.ones(5)
    on_gpu = [standin_gpu.zeros(5, np.float64) for _ in range(2)]
    for to, values in zip(on_gpu, (x, y), strict=True):
        assign(to, values)
    assert norms.norm(on_gpu[0]) == pytest.approx(norms.norm(x))
    assert norms.distance(*on_gpu) == pytest.approx(norms.distance(x, y))


def test_a_kernel_on_device_arrays_is_the_one_on_hosts(standin_gpu):
    host = [np.array([1.0, np.nan, 3.0]), np.array([2.0, 2.0, np.inf])]
    on_gpu = [standin_gpu.zeros(3, np.float64) for _ in range(2)]
    for to, values in zip(on_gpu, host, strict=True):
        assign(to, values)
    n_nonfinite = elastic_exchange(*on_gpu, 0.5, 0.25)
    assert elastic_exchange(*host, 0.5, 0.25) == 2
    assert int(n_nonfinite) == 2
    for mine, theirs in zip(on_gpu, host, strict=True):
        np.testing.assert_array_equal(to_host(mine), theirs)


def test_work_is_not_done_before_somebody_waits(standin_gpu):
    x = standin_gpu.zeros(2, np.float64)
    x.fill(1.0)
    scale(x, 3.0)
    assert x.host.tolist() == [0, 0]
    gpu.synchronize(x)
    assert x.host.tolist() == [3, 3]


def test_streams_know_nothing_of_each_other_but_by_marks(standin_gpu):
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


def test_it_refuses_what_cupy_refuses(standin_gpu):
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


def test_it_copies_to_and_from_page_locked_memory_only(standin_gpu):
    x, locked = standin_gpu.zeros(4, np.float32), standin_gpu.page_locked(4, np.float32)
    locked[:] = range(4)
    standin_gpu.copy(x, locked)
    standin_gpu.synchronize()
    locked[:] = 0
    standin_gpu.wait_for(standin_gpu.copy_out(locked[1:], x[1:]))
    assert locked.tolist() == [0, 1, 2, 3]
    with pytest.raises(AssertionError, match="pageable"):
        standin_gpu.copy(x, np.zeros(4, np.float32))
