"""The windows and files of a rank do not depend on the number of ranks: those of docs/scale.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Windows of an allocation, as in docs/scale.md. Each is a file in shared memory, and an RMA window between nodes.
ALLOCATIONS = {
    "vector": (1, lambda comm: comm.vector(1000, np.float32)),
    "numbers": (1, lambda comm: comm.numbers(4)),
    "node vector": (1, lambda comm: comm.node_vector(1000, np.float32)),
    "shared vector": (3, lambda comm: comm.shared_vector(100_000, np.float32)),
    "mailboxes": (3, lambda comm: comm.mailboxes(1000, np.float32, 2)),
}
FILES_OF_A_WINDOW = 2
"""Mapped at most; MPICH maps one for the directory of a window and one for its memory."""


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return the list of all windows created during the test."""
    from mpitrain.collectives.rma.window import Window

    made: list[Any] = []
    original = Window._allocate

    def allocate(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Window, "_allocate", allocate)
    return made


def mapped_files() -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {fields[5] for line in lines if len(fields := line.split(None, 5)) > 5}
    return sum(path.startswith(("/dev/shm", "/tmp")) for path in paths)


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.parametrize("kind", ALLOCATIONS)
def test_an_allocation_makes_as_many_windows_and_files_on_any_number_of_ranks(comm, created, kind):
    n_windows, allocate = ALLOCATIONS[kind]
    comm.vector(10, np.float32)  # the first vector also makes the barrier of the node
    created.clear()
    n_open, n_mapped = len(os.listdir("/proc/self/fd")), mapped_files()
    allocate(comm)
    assert len(os.listdir("/proc/self/fd")) <= n_open
    assert mapped_files() - n_mapped <= FILES_OF_A_WINDOW * n_windows
    assert len(created) == n_windows
    assert sum(window._remote is not None for window in created) == n_windows * (comm.world.n_nodes > 1)
