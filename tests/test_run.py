"""What the runner launches in each tier, and that it believes pytest's closing line only where all else agrees."""

from __future__ import annotations

import pytest
from run import (
    CLUSTER,
    LAUNCHED_RANKS,
    UNDER_EVERY_MPI,
    WITHOUT_CLUSTER,
    WITHOUT_LAUNCHES,
    Launch,
    Verdict,
    in_lanes,
    judge,
    planned,
    run,
    summarize,
)
from support import launching
from support.launching import Finished, environment, is_launched, launch, python, sleep_when_idle


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
    ids=[
        "passed",
        "xfailed and noise",
        "failed",
        "error",
        "exit code after the tests",
        "aborted",
        "timed out",
        "timed out after the tests",
        "no tests",
        "all deselected",
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
    result = launch(0, ["bash", "-c", "echo started; (set -m; sleep 1000 & wait)"], mpi="active", timeout_seconds=3)
    assert result.timed_out
    assert result.seconds < 500
    assert result.output == "started\n"


def test_the_tier_test_runs_everything_once_and_what_calls_mpi_under_every_mpi() -> None:
    launches = planned("test", ["openmpi", "mpich"], [0, *LAUNCHED_RANKS], selective=False)
    single = Launch("openmpi", 0, WITHOUT_CLUSTER)
    assert [this for this in launches if this.mpi == "openmpi"] == [
        single,
        *(Launch("openmpi", n) for n in LAUNCHED_RANKS),
    ]
    assert [this for this in launches if this.mpi == "mpich"] == [
        Launch("mpich", n, UNDER_EVERY_MPI) for n in (1, 2, 3)
    ]


def test_the_cluster_has_a_launch_of_its_own_where_it_can_be_booted() -> None:
    launches = planned("test", ["openmpi", "mpich"], [0, 2], selective=False, has_cluster=True)
    assert launches[:2] == [Launch("openmpi", 0, WITHOUT_CLUSTER), Launch("openmpi", 0, CLUSTER)]
    assert str(launches[1]).split() == ["openmpi", "cluster"]
    others = [("check", [0, 2], False), ("test", [2], False), ("test", [0, 2], True)]
    for tier, ranks, selective in others:
        plan = planned(tier, ["openmpi"], ranks, selective=selective, has_cluster=True)
        assert all(this.selection != CLUSTER for this in plan)


def test_the_tier_check_leaves_out_what_launches_ranks_and_runs_on_3_what_calls_mpi() -> None:
    assert planned("check", ["openmpi"], [0, 2, 3], selective=False) == [
        Launch("openmpi", 0, WITHOUT_LAUNCHES),
        Launch("openmpi", 2),
        Launch("openmpi", 3, UNDER_EVERY_MPI),
    ]


@pytest.mark.parametrize(("tier", "selective"), [("all", False), ("test", True), ("check", True)])
def test_a_selection_of_the_users_is_run_under_every_mpi(tier: str, selective: bool) -> None:
    launches = planned(tier, ["openmpi", "mpich"], [0, 2], selective=selective)
    single = () if selective else WITHOUT_CLUSTER
    assert launches == [Launch("openmpi", 0, single), Launch("openmpi", 2), Launch("mpich", 2)]


def test_the_table_has_the_counts_and_the_seconds_of_every_launch(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = {
        Launch("openmpi", 0): Verdict(passed=7, seconds=80.2),
        Launch("mpich", 2): Verdict(passed=3, failed=1, seconds=9.6, trouble=["died with exit code 9"]),
    }
    assert summarize(verdicts, 90.0) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert rows == [
        ["launch", "passed", "failed", "seconds"],
        ["openmpi", "one", "process", "7", "0", "80"],
        ["mpich", "2", "ranks", "3", "1", "10", "died", "with", "exit", "code", "9"],
        ["together", "10", "1", "90"],
        ["10", "passed,", "1", "failed"],
    ]


def test_the_cluster_has_a_lane_of_its_own_and_the_single_process_comes_before_ranks() -> None:
    launches = planned("test", ["openmpi", "mpich"], [0, *LAUNCHED_RANKS], selective=False, has_cluster=True)
    cluster, others = in_lanes(launches)
    assert cluster == [Launch("openmpi", 0, CLUSTER)]
    assert others[0] == Launch("openmpi", 0, WITHOUT_CLUSTER)
    assert {*cluster, *others} == set(launches)
    assert len(others) == len(launches) - 1
    assert [this.n_ranks for this in others[1:3]] == [3, 3]
    assert in_lanes(others) == ([], others)


def test_every_launch_runs_once_and_the_table_is_in_the_order_of_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launches = planned("test", ["openmpi", "mpich"], [0, *LAUNCHED_RANKS], selective=False, has_cluster=True)
    began: list[tuple[str, int, bool]] = []

    def launch_nothing(n_ranks: int, command: list[str], *, mpi: str, **more: object) -> Finished:
        began.append((mpi, n_ranks, command[-len(CLUSTER) :] == list(CLUSTER)))
        return finished("4 passed in 0.10s\n")

    monkeypatch.setattr("run.launch", launch_nothing)
    assert run(launches, [], timeout_seconds=1.0, selective=False) == 0
    assert sorted(began) == sorted((this.mpi, this.n_ranks, this.selection == CLUSTER) for this in launches)
    table = capsys.readouterr().out.partition("seconds\n")[2].splitlines()
    assert [line.split("  ")[0].split() for line in table[: len(launches)]] == [
        str(this).split()[:1] for this in launches
    ]
    assert table[len(launches)].split()[:2] == ["together", str(4 * len(launches))]


@pytest.mark.skipif(sleep_when_idle() is None, reason="no C++ compiler")
def test_a_launched_process_sleeps_where_it_offers_its_core() -> None:
    script = """
import os
switches = lambda: int(open("/proc/self/status").read().partition("\\nvoluntary_ctxt_switches:")[2].split()[0])
before = switches()
for _ in range(50):
    os.sched_yield()
print(switches() - before)
"""
    assert int(launch(0, [python("active"), "-c", script], mpi="active").output) >= 50


ABORTED = "MPI_ABORT was invoked on rank 1\n    Errorcode: 4\nprterun has exited due to process rank 1 calling abort"


@pytest.mark.parametrize(
    ("returncode", "output", "expected"),
    [(4, ABORTED, 4), (-11, "a rank crashed", -11), (-9, ABORTED, -9)],
    ids=["the launcher ends", "a crash before", "killed"],
)
def test_the_exit_code_of_a_launch_is_that_of_the_launcher(returncode, output, expected):
    assert launching._exit_code(returncode, output) == expected


def test_a_launcher_that_crashes_after_it_has_ended_all_ranks_is_a_warning():
    with pytest.warns(UserWarning, match="mpirun crashed"):
        assert launching._exit_code(-11, ABORTED) == 4
