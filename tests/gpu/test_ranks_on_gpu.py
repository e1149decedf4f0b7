"""Ranks that share a real GPU map each other's memory and see each other's delayed writes in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from mpitrain.kernels import elastic_exchange, gpu, scaled_add

pytestmark = [pytest.mark.gpu, pytest.mark.ranks(1, 2, 4), pytest.mark.time_limit(120)]

N = 100_003
TRANSPORTS = ("auto", "ipc", "staged")
SLEEP_CYCLES = 30_000_000  # of the GPU's clock: some 15 ms


@contextmanager
def communicator(world: Any) -> Iterator[Any]:
    """Make a communicator and free it at the end. Collective."""
    from mpitrain.collectives.mpi import MPICommunicator

    comm = MPICommunicator(world)
    yield comm
    world.comm.Barrier()  # no rank is still reading
    comm.free()


@pytest.fixture(params=TRANSPORTS)
def comm(request: pytest.FixtureRequest, world_on: Callable[..., Any]) -> Iterator[Any]:
    """Return a communicator of ranks on the GPU. Collective."""
    with communicator(world_on("cuda", request.param)) as comm:
        yield comm


@contextmanager
def computing(comm: Any) -> Iterator[int]:
    """Make a stream current for torch and CuPy, like that of a backward pass, and yield its address."""
    import cupy
    import torch

    with torch.cuda.stream(torch.cuda.Stream()):
        address = int(torch.cuda.current_stream().cuda_stream)
        with cupy.cuda.ExternalStream(address):
            yield address


def test_a_rank_writes_into_the_memory_of_another(world_on: Callable[..., Any]) -> None:
    world = world_on("cuda", "ipc")
    device, following = world.gpu, (world.rank + 1) % world.size
    mine = device.zeros(N, np.float32)
    handles = world.comm.allgather(device.handle(mine))
    theirs = device.mapped(handles[following], N, np.float32) if world.size > 1 else mine
    gpu.assign(theirs, np.arange(N, dtype=np.float32) + world.rank)
    device.synchronize()
    world.barrier()
    assert_array_equal(mine.get(), np.arange(N) + (world.rank - 1) % world.size)
    world.barrier()
    if world.size > 1:
        device.unmap(theirs)
    world.barrier()


def test_a_world_describes_its_device_and_transport(comm: Any) -> None:
    described = comm.world.describe()
    assert described["device"].startswith("cuda:")
    assert any(name.startswith("vectors on GPUs") for name in described["transport"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_an_all_reduce_is_the_sum(comm: Any, dtype: Any) -> None:
    for n in (1, 17, N):
        vector = comm.vector(n, dtype)
        gpu.assign(vector.local, (np.arange(n) % 31 * (comm.rank + 1)).astype(dtype))
        comm.allreduce(vector)
        total = sum(rank + 1 for rank in range(comm.size))
        assert_array_equal(gpu.to_host(vector.local), np.arange(n) % 31 * total)


def test_an_all_reduce_sees_late_writes(comm: Any, late: Any) -> None:
    vector = comm.vector(N, np.float32)
    for turn in range(3):
        gpu.assign(vector.local, np.full(N, np.nan, np.float32))
        comm.world.gpu.synchronize()
        with computing(comm) as stream:
            late(vector.local, 1.0 + comm.rank + turn)
            with comm.world.gpu.exchanging(stream):
                comm.allreduce(vector, mean=True)
                found = gpu.to_host(vector.local)
        assert_allclose(found, 1 + turn + (comm.size - 1) / 2, rtol=1e-6)
        comm.barrier()


def test_a_center_update_sees_late_writes(comm: Any, late: Any) -> None:
    x, center = comm.vector(N, np.float32), comm.shared_vector(N, np.float32)
    gpu.assign(x.local, np.full(N, np.nan, np.float32))
    comm.barrier()
    with computing(comm) as stream:
        late(x.local, 8.0)
        with comm.world.gpu.exchanging(stream):
            center.update(lambda part, c: elastic_exchange(x.local[part], c, 0.0, 0.25))
    comm.barrier()
    out = np.zeros(N, np.float32)
    center.read(out)
    assert_allclose(out, 8 * (1 - 0.75**comm.size), rtol=1e-6)
    assert comm.statistics.n_nonfinite == 0  # no rank has seen a NaN
    comm.barrier()


def test_a_lock_is_released_after_late_writes(comm: Any, late: Any) -> None:
    """Each rank in turn writes late inside its update: the lock must not be released before the write is done."""
    center = comm.shared_vector(N, np.float32)
    seen = []

    def visit(part: slice, c: Any) -> None:
        seen.append(gpu.to_host(c).copy())
        late(c, 1.0 + comm.rank)

    for rank in range(comm.size):
        if rank == comm.rank:
            with computing(comm) as stream, comm.world.gpu.exchanging(stream):
                center.update(visit)
        comm.world.barrier()  # a plain MPI barrier: the lock must order the work on the GPU
    assert_array_equal(np.concatenate(seen), float(comm.rank))
    comm.barrier()


def test_no_concurrent_update_is_lost(comm: Any) -> None:
    center, one = comm.shared_vector(N, np.float32), comm.world.gpu.zeros(N, np.float32)
    gpu.assign(one, 1.0)
    comm.barrier()
    for _ in range(20):
        center.update(lambda part, c: scaled_add(c, one[part], 1.0))
    comm.barrier()
    out = np.zeros(N, np.float32)
    center.read(out)
    assert_array_equal(out, 20 * comm.size)
    comm.barrier()


def test_a_peer_is_read_as_of_the_barrier(comm: Any, late: Any) -> None:
    vector, found = comm.vector(N, np.float32), comm.world.gpu.zeros(N, np.float32)
    with computing(comm) as stream, comm.world.gpu.exchanging(stream):
        late(vector.local, 3.0 + comm.rank)
        comm.barrier()
        comm.read(vector, (comm.rank + 1) % comm.size, lambda x: scaled_add(found, x, 1.0))
        comm.world.gpu.synchronize()
    assert_array_equal(found.get(), 3.0 + (comm.rank + 1) % comm.size)
    comm.barrier()


def test_a_background_operation_sees_late_writes(comm: Any, late: Any) -> None:
    x, center = comm.vector(N, np.float32), comm.shared_vector(N, np.float32)
    with computing(comm) as stream, comm.world.gpu.exchanging(stream):
        late(x.local, 4.0)
        started = comm.start(lambda: center.update(lambda part, c: elastic_exchange(x.local[part], c, 0.0, 0.5)))
        started.wait()
    comm.barrier()
    out = np.zeros(N, np.float32)
    center.read(out)
    assert_allclose(out, 4 * (1 - 0.5**comm.size), rtol=1e-6)
    comm.barrier()


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_step_sees_a_late_gradient(world_on: Callable[..., Any], transport: str, own_stream: bool) -> None:
    """``step`` is called before the backward pass is done, and later work sees the step."""
    import torch

    import mpitrain

    world = world_on("cuda", transport)
    with torch.cuda.stream(torch.cuda.Stream() if own_stream else torch.cuda.current_stream()):
        model = torch.nn.Linear(300, 300).to(world.device)
        base = torch.optim.SGD(model.parameters(), lr=1.0)
        with mpitrain.DistributedOptimizer(base, model, mpitrain.AllReduceSGD(), world=world) as optimizer:
            before = [p.detach().clone() for p in model.parameters()]
            for turn in range(1, 4):
                optimizer.zero_grad(set_to_none=False)
                for p in model.parameters():
                    p.grad.fill_(float("nan"))
                torch.cuda._sleep(SLEEP_CYCLES)
                for p in model.parameters():
                    p.grad.fill_(1.0 + world.rank)
                optimizer.step()
                after = [p.detach().clone() for p in model.parameters()]
                for a, b in zip(after, before, strict=True):
                    wanted = b.cpu().numpy() - turn * (1 + (world.size - 1) / 2)
                    assert_allclose(a.cpu().numpy(), wanted, rtol=1e-5)
            world.barrier()


@pytest.mark.parametrize("synchronous", [False, True], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_exchange_sees_late_parameters(world_on: Callable[..., Any], transport: str, synchronous: bool) -> None:
    import torch

    import mpitrain

    world = world_on("cuda", transport)
    model = torch.nn.Linear(300, 300).to(world.device)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    method = mpitrain.EASGD(period=1, synchronous=synchronous, moving_rate=0.5 / world.size)
    with mpitrain.DistributedOptimizer(base, model, method, world=world) as optimizer:
        for _ in range(3):
            with torch.no_grad():
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                    p.fill_(float("nan"))
                torch.cuda._sleep(SLEEP_CYCLES)
                for p in model.parameters():
                    p.fill_(7.0)
            optimizer.step()
            assert all(bool(p.isfinite().all()) for p in model.parameters())
        world.barrier()
        assert np.isfinite(optimizer.consensus_vector()).all()
        assert int(optimizer.statistics.n_nonfinite) == 0
        world.barrier()
