"""Fixtures of the tests on a real GPU, which `--also gpu` runs.

These tests are also collected where CuPy is missing, so they import it inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

LATE = r"""
// Fills x with `value` after a delay: code that does not wait for it sees the old values.
extern "C" __global__ void late(float* x, float value, long long n, unsigned long long nanoseconds) {
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - begin < nanoseconds);
    for (long long i = threadIdx.x; i < n; i += blockDim.x) x[i] = value;
}
"""

LATE_NANOSECONDS = 20_000_000


@pytest.fixture(scope="session")
def device() -> Any:
    """This process's GPU."""
    from mpitrain.kernels import gpu

    return gpu.current()


@pytest.fixture(scope="session")
def late() -> Callable[[Any, float], None]:
    """Return a function that fills an array on CuPy's current stream, after a delay longer than the rest of a test."""
    import cupy

    kernel = cupy.RawKernel(LATE, "late")

    def begin(array: Any, value: float) -> None:
        arguments = (array, np.float32(value), np.int64(array.size), np.uint64(LATE_NANOSECONDS))
        kernel((1,), (1024,), arguments)

    return begin


@pytest.fixture
def exact() -> Iterator[None]:
    """Let torch compute in float32 on a GPU instead of TF32."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def world_on() -> Iterator[Callable[..., Any]]:
    """Return a function that makes a world on ``cpu`` or ``cuda``, with a transport. Calling it is collective."""
    from mpi4py import MPI

    from mpitrain.collectives.world.launch import create_world
    from mpitrain.collectives.world.world import World

    made: list[World] = []

    def make(device: str, transport: str = "auto") -> World:
        made.append(create_world(MPI.COMM_WORLD.Dup(), device, transport))
        return made[-1]

    yield make
    for world in made:
        world.free()
