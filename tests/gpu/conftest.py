"""What the tests on a real GPU share.

`--also gpu` runs them. They are collected without CuPy too, and so import it where they use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

LATE = r"""
// Writes `value` everywhere, but only after a while: who does not wait for it finds what was there before.
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
    """Begins, on CuPy's current stream, to fill an array with a value, long after everything else would be over."""
    import cupy

    kernel = cupy.RawKernel(LATE, "late")

    def begin(array: Any, value: float) -> None:
        arguments = (array, np.float32(value), np.int64(array.size), np.uint64(LATE_NANOSECONDS))
        kernel((1,), (1024,), arguments)

    return begin


@pytest.fixture
def exact() -> Iterator[None]:
    """torch computes in float32 on a GPU, and not in TF32."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def world_on() -> Iterator[Callable[..., Any]]:
    """Collective to call. Makes a world of all ranks of this launch on ``cpu`` or ``cuda``, with a transport."""
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
