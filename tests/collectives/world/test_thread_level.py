"""The thread level is lowered for ranks on several nodes under an Open MPI whose windows need it, and only there."""

from __future__ import annotations

import pytest

from mpitrain.collectives.world.thread_level import THREAD_LEVEL, chosen_level, lowered_level, on_several_nodes
from mpitrain.errors import UsageError


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


@pytest.mark.parametrize(
    ("asked", "reason", "level"),
    [
        (None, None, "multiple"),
        (None, "no windows", "serialized"),
        ("single", None, "single"),
        ("funneled", "no windows", "funneled"),
        ("multiple", None, "multiple"),
    ],
)
def test_the_level_is_what_is_asked_for_and_possible(asked: str | None, reason: str | None, level: str) -> None:
    environ = {} if asked is None else {THREAD_LEVEL: asked}
    assert chosen_level(environ, "multiple", reason) == level


@pytest.mark.parametrize(
    ("asked", "words"),
    [("multiple", f"unset {THREAD_LEVEL}=multiple: no windows"), ("many", f"unknown {THREAD_LEVEL} 'many'")],
)
def test_an_impossible_level_is_refused(asked: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        chosen_level({THREAD_LEVEL: asked}, "multiple", "no windows")
