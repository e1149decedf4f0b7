"""Worlds of the same ranks as one node and as two. A test with the fixture `world` runs in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from mpitrain.collectives.topology.partition import ALIGNMENT


def make_world(n_nodes: int) -> Any:
    """Create a world of the ranks of this launch as `n_nodes` nodes (1 for a single rank). Collective."""
    from mpi4py import MPI

    from mpitrain.collectives.world.launch import create_world
    from mpitrain.collectives.world.ranks import EMULATED_NODES

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EMULATED_NODES, str(n_nodes))
        return create_world(MPI.COMM_WORLD.Dup())


@pytest.fixture(scope="session")
def one_node() -> Any:
    """Return a world of all ranks on one node. Collective."""
    return make_world(1)


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[Any]:
    """Return a world of the ranks as two nodes, of unequal size if their number is odd. Collective."""
    world = make_world(2)
    yield world
    if world.progress_thread is not None:
        world.progress_thread.stop()


@pytest.fixture(scope="session")
def windows() -> Iterator[Any]:
    """Return a world of two nodes that visit each other's memory by MPI's one-sided operations. Collective."""
    from mpitrain.collectives.world.launch import BETWEEN_NODES

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BETWEEN_NODES, "windows")
        world = make_world(2)
    yield world
    if world.progress_thread is not None:
        world.progress_thread.stop()


@pytest.fixture(scope="session", params=["one_node", "two_nodes"])
def world(request: pytest.FixtureRequest) -> Any:
    """Return a world of one node, then one of two. Collective."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def comm(world: Any) -> Iterator[Any]:
    """Return a communicator for this test only, with fresh statistics. Collective."""
    from mpitrain.collectives.mpi import MPICommunicator

    communicator = MPICommunicator(world)
    yield communicator
    world.comm.Barrier()  # no rank is still reading
    communicator.free()


@pytest.fixture(autouse=True)
def smallest_shards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let every rank own shards of the short vectors of these tests; `smallest_shards(n)` sets the real limit again."""
    if request.node.get_closest_marker("ranks") is None:
        return lambda n: None  # MPI is not to be started
    from mpitrain.collectives.rma import peer_memory

    def limit(n: int) -> None:
        for name in ("SMALLEST_SHARD", "SMALLEST_REMOTE_SHARD"):
            monkeypatch.setattr(peer_memory, name, n)

    limit(ALIGNMENT)
    return limit


@pytest.fixture
def largest_shards(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return `largest_shards(n)`, which limits shards to n elements, on the same node and on others."""
    from mpitrain.collectives.rma import peer_memory

    def limit(n: int) -> None:
        for name in ("LARGEST_SHARD", "LARGEST_REMOTE_SHARD"):
            monkeypatch.setattr(peer_memory, name, n)

    return limit


@pytest.fixture
def window(world: Any) -> Iterator[Callable[..., Any]]:
    """Return `window(n, dtype)`, which creates windows that are freed after the test. Collective."""
    from mpitrain.collectives.rma.window import Window

    made = []

    def make(n: int, dtype: Any) -> Any:
        made.append(Window(world, n, dtype))
        return made[-1]

    yield make
    world.comm.Barrier()
    for each in reversed(made):
        each.free()


@pytest.fixture(scope="session")
def fetch() -> Callable[..., np.ndarray]:
    """Return `fetch(window, rank, n, start=0)`, which copies elements of a rank, from its memory or by get. Local."""

    def copy(window: Any, rank: int, n: int, start: int = 0) -> np.ndarray:
        array = window.of(rank)
        if array is not None:
            window.sync()
            return array[start : start + n].copy()
        copied = np.empty(n, window.dtype)
        window.get(rank, copied, start)
        window.flush(rank)
        return copied

    return copy


@pytest.fixture(scope="session")
def store() -> Callable[..., None]:
    """Return `store(window, rank, values, start=0)`, which writes into a rank's array, in memory or by put. Local."""

    def write(window: Any, rank: int, values: np.ndarray, start: int = 0) -> None:
        array = window.of(rank)
        if array is not None:
            array[start : start + values.size] = values
            window.sync()
        else:
            window.put(rank, values, start)
            window.flush(rank)

    return write
