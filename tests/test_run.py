"""The runner believes pytest's closing line only where the exit code and the clock agree with it."""

from __future__ import annotations

import pytest
from run import Launch, groups, judge
from support.launching import Finished, environment, is_launched, launch


def finished(output: str, returncode: int = 0, *, timed_out: bool = False) -> Finished:
    return Finished(returncode, output, 1.0, timed_out)


@pytest.mark.parametrize(
    ("result", "passed", "failed"),
    [
        (finished("....\n4 passed, 2 deselected in 0.10s\n"), 4, 0),
        (finished("=== 4 passed, 1 xfailed, 3 warnings in 61.10s (0:01:01) ===\nlauncher noise\n"), 5, 0),
        (finished("1 failed, 3 passed in 1.00s\n", 1), 3, 1),
        (finished("2 passed, 1 error in 1.00s\n", 1), 2, 1),
        (finished("4 passed in 0.10s\nMPI_Finalize failed\n", 9), 4, 1),
        (finished("....\n[rank 0 of 2] aborting\n", 70), 0, 1),
        (finished("....\n", -15, timed_out=True), 0, 1),
        (finished("4 passed in 0.10s\n", -15, timed_out=True), 4, 1),
        (finished("no tests ran in 0.10s\n", 5), 0, 1),
        (finished("7 deselected in 0.10s\n", 5), 0, 1),
    ],
)
def test_a_launch_is_good_only_if_everything_says_so(result: Finished, passed: int, failed: int) -> None:
    verdict = judge(result, may_be_empty=False)
    assert (verdict.passed, verdict.failed) == (passed, failed)
    assert verdict.good == (failed == 0)


def test_a_selection_may_leave_a_launch_without_tests() -> None:
    assert judge(finished("7 deselected in 0.10s\n", 5), may_be_empty=True).good


def test_a_launch_inherits_nothing_from_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_FD", "PRTE_MCA_x", "HYDI_CONTROL_FD"):
        monkeypatch.setenv(name, "1")
    assert is_launched()
    env = environment("active")
    assert not is_launched(env)
    assert not any(name.startswith(("OMPI_", "PMI", "PRTE_", "HYD")) for name in env)


def test_a_command_that_does_not_end_is_ended_with_its_children() -> None:
    result = launch(0, ["bash", "-c", "echo started; (set -m; sleep 300 & wait)"], mpi="active", timeout_seconds=0.5)
    assert result.timed_out
    assert result.seconds < 10
    assert result.output == "started\n"


@pytest.mark.parametrize(("cores", "at_once"), [(1, [1, 1, 1, 1, 1]), (2, [1, 2, 1, 1]), (4, [1, 2, 2])])
def test_launches_run_together_where_the_cores_are_enough(cores: int, at_once: list[int]) -> None:
    launches = [Launch("openmpi", 0), *(Launch(mpi, n) for n in (1, 2) for mpi in ("openmpi", "mpich"))]
    made = groups(launches, cores)
    assert [len(group) for group in made] == at_once
    assert [launch for group in made for launch in group] == launches
