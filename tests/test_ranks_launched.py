"""Every marked world size is launched, and no test is lost because its file is not imported."""

from __future__ import annotations

from pathlib import Path

import pytest
from run import LAUNCHED_RANKS, TIERS, UNDER_EVERY_MPI
from support.launching import ROOT
from support.mpi_plugin import MARKED_RANKS, marked_sizes, may_have_tests


def test_every_marked_rank_count_is_launched(request: pytest.FixtureRequest) -> None:
    marked = request.config.stash[MARKED_RANKS]  # of everything that this run collected, deselected or not
    nowhere = {nodeid: ranks for nodeid, ranks in marked.items() if not set(ranks) <= set(LAUNCHED_RANKS)}
    assert not nowhere, f"tests/run.py launches {LAUNCHED_RANKS} ranks only; marked for others: {nowhere}"


def test_the_text_of_a_file_names_every_world_size_of_its_tests(request: pytest.FixtureRequest) -> None:
    """A launch on ranks imports only files whose text names its size; this process has imported all files."""
    by_file: dict[str, set[int]] = {}
    for nodeid, ranks in request.config.stash[MARKED_RANKS].items():
        by_file.setdefault(nodeid.partition("::")[0], set()).update(ranks)
    assert by_file
    named = {file: marked_sizes((ROOT / file).read_text()) for file in by_file}
    missed = {
        file: sizes - named_sizes
        for file, sizes in by_file.items()
        if (named_sizes := named[file]) is not None and not sizes <= named_sizes
    }
    assert not missed, f"write pytest.mark.ranks(...) in the test file itself: {missed}"


def test_no_folder_with_a_test_for_a_world_size_is_left_out(request: pytest.FixtureRequest) -> None:
    """A launch on ranks leaves out folders, with their conftest.py, in which no file names its size."""
    marked = {
        (nodeid.partition("::")[0], n) for nodeid, ranks in request.config.stash[MARKED_RANKS].items() for n in ranks
    }
    assert marked
    for file, n in marked:
        assert all(may_have_tests(ROOT / folder, n) for folder in Path(file).parents), (file, n)
    assert not may_have_tests(ROOT / "tests" / "theory", 2)


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        ("def test_one(): pass", set()),
        ("@pytest.mark.ranks(1, 2)\ndef test_one(): pass\n\nALL = pytest.mark.ranks(\n    3,\n)", {1, 2, 3}),
        ("pytestmark = [pytest.mark.ranks(4), pytest.mark.time_limit(9)]", {4}),
        ("@pytest.mark.ranks(*LAUNCHED_RANKS)\ndef test_one(): pass", None),
        ("@pytest.mark.ranks(1, N)\ndef test_one(): pass", None),
        ("@pytest.mark.ranks(*range(1, 4))\ndef test_one(): pass", None),
        ("with ranks(2) as comm: pass", set()),
    ],
    ids=["none", "two marks", "of the module", "a tuple", "a name", "a call", "a function of this name"],
)
def test_world_sizes_are_read_from_the_text(source: str, sizes: set[int] | None) -> None:
    assert marked_sizes(source) == sizes


def test_every_tier_launches_ranks_that_there_are() -> None:
    assert TIERS["all"] == TIERS["test"] == (0, *LAUNCHED_RANKS)
    assert set(TIERS["check"]) <= {0, *LAUNCHED_RANKS}
    assert all((ROOT / path).exists() for path in UNDER_EVERY_MPI)


@pytest.mark.ranks(*LAUNCHED_RANKS)
def test_a_launch_is_one_world_of_the_size_asked_for(request: pytest.FixtureRequest) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    assert comm.size in LAUNCHED_RANKS
    assert comm.allgather(comm.rank) == list(range(comm.size))
    assert len(set(comm.allgather(tuple(request.config.stash[MARKED_RANKS])))) == 1
