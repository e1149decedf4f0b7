"""A SLURM cluster for these tests (support/cluster.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cluster import Cluster, booted


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four hosts with SLURM, idle at the start."""
    with booted() as found:
        yield found
