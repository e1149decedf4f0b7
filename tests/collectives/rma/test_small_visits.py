"""What an exchange of a small vector on a node consists of: a few calls, and the same statistics."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

OF_A_VISIT, OF_A_SHARD = 5, 3
"""Calls: two of the visit and three of the statistics; entry, exit and the caller's function."""


@pytest.mark.ranks(1, 2)
def test_an_exchange_on_a_node_takes_few_python_calls(one_node):
    from mpitrain.collectives.mpi import MPICommunicator

    comm = MPICommunicator(one_node)
    vector, calls = comm.shared_vector(1000, np.float32), []
    if comm.rank == 0:
        for _ in range(3):
            vector.update(lambda part, values: None)

        def profile(frame: Any, event: str, _: object) -> None:
            if event == "call":
                calls.append(frame.f_code.co_qualname)

        sys.setprofile(profile)
        try:
            vector.update(lambda part, values: None)
        finally:
            sys.setprofile(None)
    comm.barrier()
    comm.free()
    assert len(calls) <= OF_A_VISIT + OF_A_SHARD * len(vector.parts), calls


@pytest.mark.ranks(2)
def test_a_message_between_neighbours_of_a_node_takes_few_python_calls(one_node):
    from mpitrain.algorithms.gossip.neighbours import Neighbours
    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.collectives.topology.graphs import topology

    comm, calls = MPICommunicator(one_node), []
    x = np.ones(1000, np.float32)
    neighbours = Neighbours(comm, topology("ring", 2), x)

    def step() -> None:
        neighbours.post(x)
        neighbours.average(x, 0.5, [0.5, 0.5])

    for _ in range(3):
        step()
    comm.barrier()
    neighbours.post(x)
    comm.barrier()  # the message has arrived

    def profile(frame: Any, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        neighbours.average(x, 0.5, [0.5, 0.5])
        neighbours.post(x)
    finally:
        sys.setprofile(None)
    neighbours.average(x, 0.5, [0.5, 0.5])
    comm.barrier()
    comm.free()
    # Average: is the message there (3), average (3), count. Post: acknowledgements (2), message (3); the end.
    assert len(calls) <= 2 + 7 + 5 + 1, calls


@pytest.mark.ranks(1)
def test_a_distance_is_measured_only_if_the_vector_has_moved(one_node):
    """By updates of others, or by pushes of this worker since its last pull."""
    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.collectives.world.statistics import distance_bin

    comm = MPICommunicator(one_node)
    vector, histogram = comm.shared_vector(100, np.float32), comm.statistics.staleness_distance

    def add(part: slice, values: Any) -> None:
        values += 3

    vector.update(add)
    vector.update(add)  # unchanged since the last visit
    assert histogram[0] == 1
    vector.update(add, pulls=False)
    before = histogram.copy()
    vector.update(add)
    comm.free()
    changed = np.flatnonzero(np.asarray(histogram) - np.asarray(before))
    assert changed.tolist() == [distance_bin(30.0)]  # 3 in 100 elements
