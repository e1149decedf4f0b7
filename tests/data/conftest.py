"""Worlds without MPI, and a data file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpitrain.data.hdf5_format import create


class Node:
    """The memory and barrier of `n` ranks of a node, which are threads.

    Arrays are numbered: the k-th call of each rank returns the same one.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.barrier = threading.Barrier(n, timeout=120)
        self.arrays: dict[int, np.ndarray] = {}
        self.lock = threading.Lock()


class LocalRank:
    """One rank of a node; the part of a world that loading needs."""

    node = 0

    def __init__(self, rank: int, shared: Node) -> None:
        self.rank = self.local_rank = rank
        self.size = self.local_size = shared.n
        self.shared = shared
        self.n_arrays = 0

    def shared_array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        with self.shared.lock:
            array = self.shared.arrays.setdefault(self.n_arrays, np.zeros(shape, dtype))
        assert array.shape == shape
        assert array.dtype == dtype
        self.n_arrays += 1
        return array

    def node_barrier(self) -> None:
        self.shared.barrier.wait()


@pytest.fixture
def lone() -> LocalRank:
    """Return a world of one rank."""
    return LocalRank(0, Node(1))


@pytest.fixture
def on_node() -> Callable[[int, Callable[[LocalRank], Any]], list[Any]]:
    """Return on_node(n, f), the result of f(world), or its exception, on each of the n ranks of a node."""

    def outcome(f: Callable[[LocalRank], Any], world: LocalRank) -> Any:
        try:
            return f(world)
        except Exception as error:
            return error

    def run(n: int, f: Callable[[LocalRank], Any]) -> list[Any]:
        shared = Node(n)
        with ThreadPoolExecutor(n) as pool:
            return list(pool.map(lambda rank: outcome(f, LocalRank(rank, shared)), range(n)))

    return run


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Write 700 training and 90 test images of 3x5x4 in 7 classes."""
    path = tmp_path / "some.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        create(file, classes=[f"class {k}" for k in range(7)], shape=(3, 5, 4), n=(700, 90))
        for split, n in (("train", 700), ("test", 90)):
            file[split]["images"][:] = rng.integers(256, size=(n, 3, 5, 4), dtype=np.uint8)
            file[split]["labels"][:] = rng.integers(7, size=n)
        file.attrs["mean"] = [0.5, 0.4, 0.3]
        file.attrs["std"] = [0.2, 0.3, 0.1]
    return path
