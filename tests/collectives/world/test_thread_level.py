"""The thread level is lowered for ranks on several nodes under an Open MPI whose windows need it, and only there."""

from __future__ import annotations

import pytest

from mpitrain.collectives.world.thread_level import lowered_level, on_several_nodes


@pytest.mark.parametrize(
    ("vendor", "lowered"),
    [
        (("Open MPI", (4, 1, 4)), True),
        (("Open MPI", (4, 1, 8)), True),
        (("Open MPI", (5, 0, 0)), False),
        (("MPICH", (4, 3, 0)), False),
    ],
)
def test_open_mpi_4_is_started_for_one_thread_at_a_time(
    vendor: tuple[str, tuple[int, int, int]], lowered: bool
) -> None:
    reason = lowered_level(vendor)
    assert (reason is not None) == lowered
    if reason is not None:
        assert reason.startswith(f"Open MPI {'.'.join(map(str, vendor[1]))} has no windows between nodes")
        assert "\n" not in reason


@pytest.mark.parametrize(
    ("environ", "several"),
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, True),
        ({"SLURM_STEP_NUM_NODES": "1"}, False),
        ({"SLURM_STEP_NUM_NODES": "2"}, True),
    ],
)
def test_the_launcher_tells_whether_ranks_are_on_several_nodes(environ: dict[str, str], several: bool) -> None:
    assert on_several_nodes(environ) == several
