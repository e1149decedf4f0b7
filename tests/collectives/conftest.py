"""Worlds over the same ranks: as they are, one node, and taken for two. `world` runs a test in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest


def make_world(n_nodes: int) -> Any:
    """Collective. A world of the ranks of this launch as `n_nodes` nodes (1 where there is only one rank)."""
    from mpi4py import MPI

    from mpitrain.collectives.world.launch import create_world
    from mpitrain.collectives.world.ranks import EMULATED_NODES

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EMULATED_NODES, str(n_nodes))
        return create_world(MPI.COMM_WORLD.Dup())


@pytest.fixture(scope="session")
def one_node() -> Any:
    """Collective. All ranks on one node."""
    return make_world(1)


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[Any]:
    """Collective. The ranks as two nodes, of unequal size where their number is odd."""
    world = make_world(2)
    yield world
    if world.progress_thread is not None:
        world.progress_thread.stop()


@pytest.fixture(scope="session")
def windows() -> Iterator[Any]:
    """Collective. As two nodes that visit each other's memory by MPI's one-sided operations."""
    from mpitrain.collectives.world.launch import BETWEEN_NODES

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BETWEEN_NODES, "windows")
        world = make_world(2)
    yield world
    if world.progress_thread is not None:
        world.progress_thread.stop()


@pytest.fixture(scope="session", params=["one_node", "two_nodes"])
def world(request: pytest.FixtureRequest) -> Any:
    """Collective. One after the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def comm(world: Any) -> Iterator[Any]:
    """Collective. A communicator of this test's own, with fresh statistics."""
    from mpitrain.collectives.mpi import MPICommunicator

    communicator = MPICommunicator(world)
    yield communicator
    world.comm.Barrier()  # nobody is still reading
    communicator.free()


@pytest.fixture
def largest_shards(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`largest_shards(n)`: from now on shards have at most n elements, of whichever node their ranks are."""
    from mpitrain.collectives.rma import peer_memory

    def limit(n: int) -> None:
        for name in ("LARGEST_SHARD", "LARGEST_REMOTE_SHARD"):
            monkeypatch.setattr(peer_memory, name, n)

    return limit


@pytest.fixture
def window(world: Any) -> Iterator[Callable[..., Any]]:
    """Makes windows, `window(n, dtype)`, collectively; they are freed after the test."""
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
    """Local. `fetch(window, rank, n, start=0)`: a copy of a rank's elements, from its memory or by get."""

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
    """Local. `store(window, rank, values, start=0)`: writes into a rank's array, to its memory or by put."""

    def write(window: Any, rank: int, values: np.ndarray, start: int = 0) -> None:
        array = window.of(rank)
        if array is not None:
            array[start : start + values.size] = values
            window.sync()
        else:
            window.put(rank, values, start)
            window.flush(rank)

    return write
