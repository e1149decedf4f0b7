"""`kernels.gpu` on a real GPU: memory, copies, and the order of streams, which delayed writes reveal."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from mpitrain.kernels import gpu, scale
from mpitrain.kernels.norms import distance, norm

pytestmark = pytest.mark.gpu

N = 10_000


def compute_stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64])
@pytest.mark.parametrize("n", [0, 1, N])
def test_new_memory_is_zeros_of_its_type(device: Any, n: int, dtype: Any) -> None:
    for _ in range(3):  # reused memory is not zero by itself
        array = device.zeros(n, dtype)
        assert gpu.is_device(array)
        assert (array.shape, array.dtype) == ((n,), np.dtype(dtype))
        assert not array.view(np.uint8).get().any()
        array.view(np.uint8).fill(0xA5)
        del array


def test_host_arrays_are_not_device_arrays() -> None:
    assert not gpu.is_device(np.zeros(3))
    assert not gpu.is_device(3.0)


def test_a_gpu_has_an_identity(device: Any) -> None:
    assert device.identity.count(":") == 2
    assert gpu.use(device.index) is device


def test_copies_reach_host_and_device_and_parts_of_both(device: Any) -> None:
    host, back = device.page_locked(N, np.float32), device.page_locked(N, np.float32)
    assert not host.any()
    host[...] = np.arange(N)
    one, other = (device.zeros(N, np.float32) for _ in range(2))
    device.copy(one[100:], host[100:])
    device.copy(other[:5000], one[:5000])
    device.copy(back[7:6000], other[7:6000])
    device.synchronize()
    wanted = np.where((np.arange(N) >= 100) & (np.arange(N) < 5000), host, 0)
    assert_array_equal(other.get(), wanted)
    assert_array_equal(back[7:6000], wanted[7:6000])


def test_existing_memory_can_be_locked_and_unlocked(device: Any) -> None:
    host = np.arange(N, dtype=np.float32)
    device.lock_pages(host)
    array = device.zeros(N, np.float32)
    device.copy(array, host)
    device.synchronize()
    assert_array_equal(array.get(), host)
    device.unlock_pages(host)


def test_assign_and_to_host_copy_in_both_directions(device: Any) -> None:
    array, values = device.zeros(N, np.float32), np.arange(N)
    gpu.assign(array, values)
    assert_array_equal(gpu.to_host(array), values)
    host = np.zeros(N, np.float32)
    gpu.assign(host, array)
    assert_array_equal(host, values)
    other = device.zeros(N, np.float32)
    gpu.assign(other, array)
    gpu.assign(array, 3.0)
    assert_array_equal(other.get(), values)
    assert_array_equal(array.get(), 3.0)


def test_synchronize_waits_for_the_current_stream(device: Any, late: Any) -> None:
    import cupy

    array, host = device.zeros(N, np.float32), device.page_locked(N, np.float32)
    with cupy.cuda.Stream(non_blocking=True):
        late(array, 5.0)
        device.copy(host, array)
        device.synchronize()
    assert_array_equal(host, 5.0)


def test_a_mark_orders_two_streams(device: Any, late: Any) -> None:
    import cupy

    array, host = device.zeros(N, np.float32), device.page_locked(N, np.float32)
    with cupy.cuda.Stream(non_blocking=True):
        late(array, 6.0)
        mark = device.mark()
    with cupy.cuda.Stream(non_blocking=True):
        device.after(mark)
        device.copy(host, array)
        device.wait_for(device.mark())
    assert_array_equal(host, 6.0)


def test_copy_out_copies_the_result_of_earlier_work(device: Any, late: Any) -> None:
    import cupy

    array, host = device.zeros(N, np.float32), device.page_locked(N, np.float32)
    with cupy.cuda.Stream(non_blocking=True):
        late(array, 7.0)
        device.wait_for(device.copy_out(host, array))
    assert_array_equal(host, 7.0)


def test_an_exchange_is_ordered_between_torch_computations(device: Any, late: Any) -> None:
    import cupy
    import torch

    array = device.zeros(N, np.float32)
    tensor = torch.from_dlpack(array)
    with torch.cuda.stream(torch.cuda.Stream()), cupy.cuda.ExternalStream(compute_stream()):
        late(array, 2.0)
        with device.exchanging(compute_stream()):
            scale(array, 10.0)
            late(array[: N // 2], 1.0)
        found = tensor + 0
        host = found.cpu().numpy()
    assert_array_equal(host[: N // 2], 1.0)
    assert_array_equal(host[N // 2 :], 20.0)


def test_a_local_step_inside_an_exchange_is_ordered_between_its_parts(device: Any, late: Any) -> None:
    import torch

    array = device.zeros(N, np.float32)
    tensor = torch.from_dlpack(array)
    with torch.cuda.stream(torch.cuda.Stream()):
        with device.exchanging(compute_stream()):
            late(array, 2.0)
            with device.computing(compute_stream()):
                tensor.add_(1.0)
            scale(array, 10.0)
        assert_array_equal((tensor + 0).cpu().numpy(), 30.0)


def test_background_work_is_done_when_the_block_ends(device: Any, late: Any) -> None:
    array, host = device.zeros(N, np.float32), device.page_locked(N, np.float32)
    mark = device.mark()
    with device.in_background():
        device.after(mark)
        late(array, 9.0)
        device.copy(host, array)
    assert_array_equal(host, 9.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_norms_match_those_on_the_host(device: Any, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    hosts = [rng.normal(size=100_003).astype(dtype) for _ in range(2)]
    arrays = [device.zeros(100_003, dtype) for _ in hosts]
    for array, host in zip(arrays, hosts, strict=True):
        gpu.assign(array, host)
    assert norm(arrays[0]) == pytest.approx(norm(hosts[0]), rel=1e-6)
    assert distance(*arrays) == pytest.approx(distance(*hosts), rel=1e-6)


def test_torch_sees_the_same_memory(device: Any) -> None:
    import torch

    array = device.zeros(N, np.float32)
    tensor = torch.from_dlpack(array)
    tensor.fill_(4.0)
    torch.cuda.synchronize()
    assert_array_equal(array.get(), 4.0)
    assert tensor.data_ptr() == array.data.ptr
