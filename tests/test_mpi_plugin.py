"""The plugin for tests on several ranks, tried on tiny test files that a single process launches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.launching import ROOT, Finished, installed, launch, python
from support.mpi_plugin import Outcome, agreed_failure

FIRST_MPI = installed()[:1]

HEAD = """
import pytest

@pytest.fixture
def comm():
    from mpi4py import MPI
    return MPI.COMM_WORLD
"""


def run_pytest(
    folder: Path, body: str, *options: str, mpi: str, n_ranks: int = 2, timeout_seconds: float = 150.0
) -> Finished:
    """Run a test file with this body on `n_ranks` ranks."""
    (folder / "conftest.py").write_text('pytest_plugins = ("support.mpi_plugin",)\n')
    (folder / "test_tiny.py").write_text(HEAD + body)
    command = [
        python(mpi),
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--color=no",
        "--rootdir",
        str(folder),
        *options,
        str(folder),
    ]
    variables = {"PYTHONPATH": str(ROOT / "tests"), "CI": "1"}  # CI: pytest cuts no message short
    return launch(n_ranks, command, mpi=mpi, timeout_seconds=timeout_seconds, extra_env=variables, cwd=folder)


FAILURES = """
@pytest.mark.ranks(2)
def test_one(comm):
    print("said by", comm.rank)
    assert comm.rank == 0, "only rank one fails"

@pytest.fixture
def table(comm):
    if comm.rank == 1:
        raise OSError("no table on rank one")

@pytest.mark.ranks(2)
def test_collective(comm, table):
    comm.barrier()

@pytest.mark.ranks(2)
def test_after(comm):
    assert comm.allreduce(1) == 2
"""


@pytest.fixture(scope="module", params=installed())
def failures(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Finished:
    """A launch on 2 ranks in which a test, and the set-up of another one, fail on rank 1."""
    return run_pytest(tmp_path_factory.mktemp("failures"), FAILURES, mpi=request.param)


@pytest.mark.launches
def test_a_failure_on_one_rank_fails_all_and_shows_its_traceback(failures: Finished) -> None:
    assert failures.returncode != 0
    assert "1 failed, 1 passed, 1 error" in failures.output
    assert "failed on rank 1 of 2: AssertionError: only rank one fails" in failures.output
    assert '>       assert comm.rank == 0, "only rank one fails"' in failures.output
    assert "said by 1" in failures.output
    assert failures.output.count("test session starts") == 1


@pytest.mark.launches
def test_a_set_up_that_fails_on_one_rank_keeps_the_others_out_of_the_test(failures: Finished) -> None:
    assert "failed on rank 1 of 2: OSError: no table on rank one" in failures.output
    assert "has not ended" not in failures.output
    assert not failures.timed_out


@pytest.mark.launches
@pytest.mark.parametrize("mpi", installed())
def test_a_hang_ends_the_job_with_the_stacks_of_every_rank(tmp_path: Path, mpi: str) -> None:
    body = """
@pytest.mark.ranks(2)
def test_left_alone(comm):
    if comm.rank == 1:
        raise ValueError("rank one leaves")
    wait_for_peer(comm)

def wait_for_peer(comm):
    comm.barrier()
"""
    finished = run_pytest(tmp_path, body, "--time-limit", "5", mpi=mpi)
    assert not finished.timed_out
    assert finished.returncode != 0
    assert "[rank 0 of 2] test_tiny.py::test_left_alone has not ended after 5 s" in finished.output
    assert "in wait_for_peer" in finished.output
    assert "[rank 1 of 2] test_tiny.py::test_left_alone has not ended after 5 s" in finished.output
    assert "ValueError: rank one leaves" in finished.output


@pytest.mark.launches
@pytest.mark.parametrize("mpi", FIRST_MPI)
def test_a_mark_can_give_a_test_another_limit(tmp_path: Path, mpi: str) -> None:
    body = """
@pytest.mark.ranks(1)
@pytest.mark.time_limit(1.5)
def test_sleeper():
    import time
    time.sleep(60)
"""
    finished = run_pytest(tmp_path, body, mpi=mpi, n_ranks=1)
    assert "test_sleeper has not ended after 1.5 s" in finished.output
    assert finished.returncode != 0


def test_a_hang_in_a_single_process_ends_too(tmp_path: Path) -> None:
    finished = run_pytest(
        tmp_path, "def test_sleeper():\n    import time; time.sleep(60)\n", "--time-limit", "1", mpi="active", n_ranks=0
    )
    assert "test_sleeper has not ended after 1 s" in finished.output
    assert finished.returncode == 70


def test_a_hang_that_holds_the_interpreter_lock_ends_too(tmp_path: Path) -> None:
    body = """
def test_in_compiled_code():
    import ctypes
    ctypes.PyDLL(None).sleep(120)
"""
    finished = run_pytest(tmp_path, body, "--time-limit", "3", mpi="active", n_ranks=0)
    assert "in test_in_compiled_code" in finished.output
    assert finished.returncode != 0
    assert "1 passed" not in finished.output


SELECTION = """
@pytest.mark.ranks(1)
def test_one(comm): pass

@pytest.mark.ranks(1, 2)
def test_one_or_two(comm): pass

@pytest.mark.ranks(3)
def test_three(comm): pass

@pytest.mark.ranks(2)
@pytest.mark.slow
def test_slow(comm): pass

def test_single():
    import sys
    assert "mpi4py" not in sys.modules
"""


@pytest.mark.launches
@pytest.mark.parametrize("mpi", FIRST_MPI)
@pytest.mark.parametrize(
    ("n_ranks", "options", "closing"),
    [
        (0, [], "1 passed, 4 deselected"),
        (1, [], "2 passed, 3 deselected"),
        (2, [], "1 passed, 4 deselected"),
        (2, ["--also", "slow"], "2 passed, 3 deselected"),
    ],
    ids=["no launcher", "1 rank", "2 ranks", "2 ranks and slow"],
)
def test_what_is_for_another_world_is_deselected(
    tmp_path: Path, mpi: str, n_ranks: int, options: list[str], closing: str
) -> None:
    finished = run_pytest(tmp_path, SELECTION, *options, mpi=mpi, n_ranks=n_ranks)
    assert finished.returncode == 0
    assert closing in finished.output
    assert "skipped" not in finished.output
    assert ("1 slow (--also slow)" in finished.output) == (n_ranks == 2 and not options)


@pytest.mark.launches
@pytest.mark.parametrize("mpi", FIRST_MPI)
@pytest.mark.parametrize(
    ("n_ranks", "is_imported"), [(0, True), (1, False), (2, True)], ids=["no launcher", "1 rank", "2 ranks"]
)
def test_a_file_with_nothing_for_this_many_ranks_is_not_imported(
    tmp_path: Path, mpi: str, n_ranks: int, is_imported: bool
) -> None:
    (tmp_path / "test_other.py").write_text("import pytest\n\nALL = pytest.mark.ranks(2, 3)\n1 / 0\n")
    finished = run_pytest(tmp_path, SELECTION, mpi=mpi, n_ranks=n_ranks)
    assert ("ZeroDivisionError" in finished.output) == is_imported, finished.output
    assert finished.output.count("on ranks 0, 1 of 2: test_other.py:\n") == (n_ranks == 2)
    assert (finished.returncode != 0) == is_imported


@pytest.mark.launches
@pytest.mark.parametrize("mpi", FIRST_MPI)
def test_ranks_that_collect_different_tests_run_none(tmp_path: Path, mpi: str) -> None:
    body = """
import os
rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))

@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", [f"rank{rank}"])
def test_own(comm, where): pass
"""
    finished = run_pytest(tmp_path, body, mpi=mpi)
    assert finished.returncode != 0
    assert "ranks 0 and 1 collected different tests" in finished.output
    assert not re.search(r"\d+ passed", finished.output)


@pytest.mark.launches
@pytest.mark.parametrize("mpi", FIRST_MPI)
def test_an_error_in_collection_on_one_rank_is_shown(tmp_path: Path, mpi: str) -> None:
    body = """
import os
if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
    raise ImportError("only rank one cannot import this")

@pytest.mark.ranks(2)
def test_any(comm): pass
"""
    finished = run_pytest(tmp_path, body, mpi=mpi)
    assert finished.returncode != 0
    assert "on rank 1 of 2: test_tiny.py:\n" in finished.output
    assert "ImportError: only rank one cannot import this" in finished.output
    assert not re.search(r"\d+ passed", finished.output)


def outcomes(*kinds: str) -> list[Outcome]:
    return [Outcome("test_x", "call", kind, f"message {kind}", f"text {kind}") for kind in kinds]


@pytest.mark.parametrize("kind", ["passed", "skipped"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_of_one_mind_agree(kind: str, size: int) -> None:
    assert agreed_failure(outcomes(*[kind] * size)) is None


@pytest.mark.parametrize(
    "kinds", [("passed", "skipped"), ("failed",), ("skipped", "failed", "passed"), ("failed", "failed")], ids=", ".join
)
def test_any_failure_or_difference_is_a_failure(kinds: tuple[str, ...]) -> None:
    failure = agreed_failure(outcomes(*kinds))
    assert failure is not None
    assert ("text failed" in str(failure)) == ("failed" in kinds)
    assert str(failure).count("text failed") <= 1  # shown once, however many ranks share it
