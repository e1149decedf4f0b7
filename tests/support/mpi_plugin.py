"""A pytest plugin for tests on several ranks: it selects the tests for a world size, and makes the ranks agree.

    pytest tests                                      the single-process tests; MPI is not started
    jobs/local.sh 3 python -m pytest tests            the tests marked ranks(..., 3, ...)

- A test for another world size is deselected and counted as deselected; it is never skipped. On ranks, a file is
  imported only if its text has a mark for this world size (`marked_sizes`).
- The ranks agree after every phase of a test: a test that fails on one rank fails on all, and rank 0, which alone
  reports, shows the traceback of every rank that failed.
- The watchdog ends a test that hangs, for example because its ranks wait for a peer that raised.

The fixtures of pytest-mpi (mpi_tmp_path, ...) may be used: the mark `ranks` implies its mark `mpi`.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import cluster, launching
from support.launching import is_launched
from support.watchdog import Watchdog

OPTIONAL_MARKS = {
    "browser": "needs Chromium",
    "examples": "needs the packages of the extra `examples`",
    "gpu": "needs a CUDA device",
    "shared_data": "needs the CIFAR-10 archive (the fixture cifar10_archive)",
    "slow": "takes minutes",
    "trackers": "needs the packages of the extras `wandb` and `mlflow`",
}
LIMIT_SECONDS = 180.0
SINGLE_PROCESS_LIMIT_SECONDS = 600.0
GARBAGE_THRESHOLD = 20_000  # allocations of containers between two collections; Python's default is 700

# The world sizes of every collected test, deselected or not. test_ranks_launched.py compares them with the launches.
MARKED_RANKS = pytest.StashKey[dict[str, tuple[int, ...]]]()
_DESELECTED = pytest.StashKey[Counter[str]]()
_RANKS_MARK = re.compile(r"\bmark\.ranks\(([^)]*)\)")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mpitrain")
    group.addoption("--also", default="", help=f"comma-separated marks to run too, of {', '.join(OPTIONAL_MARKS)}")
    group.addoption("--time-limit", type=float, help="seconds a test may take, whatever its mark says")


@pytest.hookimpl(trylast=True)  # after the terminal reporter is there, which only rank 0 keeps
def pytest_configure(config: pytest.Config) -> None:
    unknown = _also(config) - OPTIONAL_MARKS.keys()
    if unknown:
        raise pytest.UsageError(f"--also {','.join(sorted(unknown))}: choose from {', '.join(OPTIONAL_MARKS)}")
    config.addinivalue_line(
        "markers", "ranks(1, 2, ...): the world sizes a test is for; without it: one process and no MPI"
    )
    config.addinivalue_line(
        "markers", "launches: starts ranks or other processes of its own, for seconds; left out by `make check`"
    )
    config.addinivalue_line("markers", "time_limit(seconds): for a test that takes longer than the general limit")
    config.addinivalue_line("markers", "cluster: boots SLURM on emulated hosts; deselected where that is impossible")
    for name, meaning in OPTIONAL_MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}; deselected unless --also {name}")
    config.stash[MARKED_RANKS] = {}
    config.stash[_DESELECTED] = Counter()
    if is_launched():
        config.option.with_mpi = True  # pytest-mpi would skip every test that it is not told to run
        plugin: Ranks | SingleProcess = Ranks(config)
    else:
        plugin = SingleProcess(config)
    config.pluginmanager.register(plugin, "mpitrain-ranks")


def _also(config: pytest.Config) -> set[str]:
    return {name.strip() for name in config.getoption("--also").split(",") if name.strip()}


def ranks_of(item: pytest.Item) -> tuple[int, ...]:
    """Return the world sizes that a test is marked for, () for a single-process test. The nearest mark counts."""
    mark = item.get_closest_marker("ranks")
    if mark is None:
        return ()
    if not mark.args or mark.kwargs or not all(type(n) is int and n > 0 for n in mark.args):
        raise pytest.UsageError(f"{item.nodeid}: ranks takes world sizes, as in ranks(1, 2, 3)")
    return tuple(mark.args)


def marked_sizes(source: str) -> frozenset[int] | None:
    """Return the world sizes that the `ranks` marks of a test file name, None where one of them is computed."""
    sizes: set[int] = set()
    for arguments in _RANKS_MARK.findall(source):
        names = [name.strip() for name in arguments.split(",") if name.strip()]
        if not all(name.isdecimal() for name in names):
            return None
        sizes.update(map(int, names))
    return frozenset(sizes)


@functools.cache
def _sizes_of(file: Path) -> frozenset[int] | None:
    return marked_sizes(file.read_text())


def may_have_tests(path: Path, size: int) -> bool:
    """Return whether a test file, or a file of tests below a folder, may have a test for a world size."""
    files = path.rglob("test_*.py") if path.is_dir() else [path]
    return any(sizes is None or size in sizes for sizes in map(_sizes_of, files))


class Selection:
    """The part that all world sizes share: deselects the tests for other ones, and limits the time of the others."""

    def __init__(self, config: pytest.Config, size: int, watchdog: Watchdog) -> None:
        self.config = config
        self.size = size  # 0: not launched
        self.watchdog = watchdog
        default = LIMIT_SECONDS if size else SINGLE_PROCESS_LIMIT_SECONDS
        self.limit_seconds = config.getoption("--time-limit") or default

    def _reason_against(self, item: pytest.Item) -> str | None:
        ranks = ranks_of(item)
        self.config.stash[MARKED_RANKS][item.nodeid] = ranks
        if ranks:
            item.add_marker(pytest.mark.mpi)
        if self.size and not ranks:
            return "for a single process"
        if ranks and self.size not in ranks:
            return "for other rank counts"
        names = {mark.name for mark in item.iter_markers()}
        for name in OPTIONAL_MARKS:
            if name in names and name not in _also(self.config):
                return f"{name} (--also {name})"
        if "cluster" in names and cluster.missing():
            return f"cluster ({cluster.missing()})"
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, dropped = [], []
        for item in items:
            reason = self._reason_against(item)
            if reason is None:
                kept.append(item)
            else:
                dropped.append(item)
                config.stash[_DESELECTED][reason] += 1
        if dropped:
            config.hook.pytest_deselected(items=dropped)
            items[:] = kept

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self) -> None:
        """Spare time: imported modules and collected tests are never garbage, and torch's compiler is not imported.

        Searching a million objects of libraries again and again took a tenth of the time.
        """
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_THRESHOLD, 10, 10)
        if "torch" in sys.modules:
            from mpitrain.trainer.compiler import do_without_compiler

            do_without_compiler()  # as `mpitrain train` does: the compiler's import costs a second of each rank

    def pytest_report_collectionfinish(self, config: pytest.Config) -> str:
        reasons = config.stash[_DESELECTED]
        return "deselected: " + (", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items())) or "none")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        mark = item.get_closest_marker("time_limit")
        seconds = float(mark.args[0]) if mark and not self.config.getoption("--time-limit") else self.limit_seconds
        launching.unmarked_test = None if item.get_closest_marker("launches") else item.nodeid
        try:
            with self.watchdog.limit(seconds, item.nodeid):
                return (yield)
        finally:
            launching.unmarked_test = None


class SingleProcess(Selection):
    """The plugin without a launcher and MPI: in one process, or in several that share the tests (pytest-xdist)."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config, 0, Watchdog())
        self._deselected: str | None = None  # the line that a worker of pytest-xdist sent to the process that reports

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Put the tests that launch ranks first: the other processes compute while these wait."""
        super().pytest_collection_modifyitems(config, items)
        items.sort(key=lambda item: item.get_closest_marker("launches") is None)

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["deselected"] = self.pytest_report_collectionfinish(self.config)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._deselected = getattr(node, "workeroutput", {}).get("deselected", self._deselected)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._deselected is not None:
            terminalreporter.write_line(self._deselected)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a phase of a test on one rank."""

    nodeid: str
    phase: str
    outcome: str
    message: str = ""
    text: str = ""


class AgreedFailure:
    """The failure of a test on some ranks, in the form that pytest's reporters expect."""

    def __init__(self, message: str, text: str) -> None:
        self.reprcrash = SimpleNamespace(message=message)
        self.text = text

    def __str__(self) -> str:
        return self.text

    def toterminal(self, tw: Any) -> None:
        for line in self.text.splitlines():
            tw.line(line, red=line.startswith("E "))


class Ranks(Selection):
    """The plugin on a rank."""

    def __init__(self, config: pytest.Config) -> None:
        from mpi4py import MPI

        # On a communicator of its own, so that no message of a test can be received here.
        self.comm = MPI.COMM_WORLD.Dup()
        self.rank = self.comm.rank
        self.library = " ".join(MPI.Get_library_version().splitlines()[0].split(",")[0].split())
        self.collect_errors: list[str] = []
        super().__init__(config, self.comm.size, Watchdog(self.rank, self.comm.size, MPI.COMM_WORLD.Abort))
        reporter = config.pluginmanager.getplugin("terminalreporter")
        if self.rank > 0 and reporter is not None:
            config.pluginmanager.unregister(reporter)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Import no file, and no conftest.py of a folder, without a test for this world size.

        Most have none, and every rank would import them: a single one that imports torch costs each rank two seconds.
        """
        is_folder = self.config.rootpath / "tests" in collection_path.parents and collection_path.is_dir()
        is_file = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
        return True if (is_folder or is_file) and not may_have_tests(collection_path, self.size) else None

    def pytest_report_header(self) -> str:
        return f"ranks: {self.size}, {self.library}, {self.limit_seconds:g} s a test"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collect_errors.append(f"{report.nodeid}:\n{report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Run no test where the ranks have collected different ones, or in another order. Collective."""
        with self.watchdog.limit(self.limit_seconds, "collection"):
            plans = self.comm.allgather((self.collect_errors, [item.nodeid for item in session.items]))
        failed_ranks: dict[str, list[int]] = {}
        for rank, (errors, _) in enumerate(plans):
            for text in errors:
                failed_ranks.setdefault(text, []).append(rank)
        if failed_ranks:
            session.shouldfail = "collection failed:\n" + "\n".join(
                f"on {_ranks(ranks)} of {self.size}: {text}" for text, ranks in failed_ranks.items()
            )
        elif all(plan == plans[0] for plan in plans):
            return
        else:
            first = next(i for i, plan in enumerate(plans) if plan != plans[0])
            differ = sorted(set(plans[0][1]) ^ set(plans[first][1])) or ["the same tests in another order"]
            session.shouldfail = f"ranks 0 and {first} collected different tests: {', '.join(differ[:5])}"
        raise session.Failed(session.shouldfail)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Make the report of a phase (set-up, call, tear-down) that of all ranks. Collective."""
        report = yield
        mine = _outcome_of(report)
        self.watchdog.note = mine.text if mine.outcome == "failed" else ""
        everyone = self._everyones(mine)
        self.watchdog.note = ""
        if everyone is None:
            return report
        if len({(theirs.nodeid, theirs.phase) for theirs in everyone}) > 1:
            places = [f"rank {i}: {theirs.nodeid} ({theirs.phase})" for i, theirs in enumerate(everyone)]
            self.watchdog.die("the ranks are in different tests: " + ", ".join(places))
        failure = agreed_failure(everyone)
        if failure is not None:
            report.outcome = "failed"
            report.longrepr = failure  # type: ignore[assignment]
            report.sections.clear()  # they are in the failure's text, with their rank
            vars(report).pop("wasxfail", None)
        return report

    def _everyones(self, mine: Outcome) -> list[Outcome] | None:
        """Return the outcomes of all ranks, None where all passed the same phase. Collective.

        Most pass: a number of each rank shows it, and is faster than the outcome itself.
        """
        passed = zlib.crc32(f"{mine.nodeid} {mine.phase}".encode()) if mine.outcome == "passed" else -1
        numbers = array("q", [0] * self.size)
        self.comm.Allgather(array("q", [passed]), numbers)
        if passed >= 0 and set(numbers) == {passed}:
            return None
        return self.comm.allgather(mine)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        self.watchdog.die(f"interrupted: {excinfo.exconly()}")

    @pytest.hookimpl(trylast=True)
    def pytest_internalerror(self, excrepr: object) -> None:
        self.watchdog.die(f"internal error:\n{excrepr}")

    def pytest_unconfigure(self) -> None:
        self.watchdog.backup(self.limit_seconds)  # MPI is finalised after this, and may wait for a peer


def _outcome_of(report: pytest.TestReport) -> Outcome:
    if report.passed:
        return Outcome(report.nodeid, report.when, "passed")
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else report.longreprtext
    text = report.longreprtext
    if report.failed:
        text += "".join(f"\n---- {title} ----\n{content.rstrip()}" for title, content in report.sections)
    return Outcome(report.nodeid, report.when, report.outcome, message.partition("\n")[0], text)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def agreed_failure(everyone: list[Outcome]) -> AgreedFailure | None:
    """Return what all ranks report if one has failed or they differ, None if all passed or all were skipped."""
    outcomes = [theirs.outcome for theirs in everyone]
    if "failed" not in outcomes:
        if len(set(outcomes)) == 1:
            return None
        message = "the ranks differ: " + ", ".join(f"{outcome} on rank {i}" for i, outcome in enumerate(outcomes))
        return AgreedFailure(message, message)
    failed_ranks = [i for i, outcome in enumerate(outcomes) if outcome == "failed"]
    first = everyone[failed_ranks[0]]
    who = f"{_ranks(failed_ranks)} of {len(everyone)}"
    blocks = []
    shown: dict[str, int] = {}  # a failure that many ranks share is shown once
    for i in failed_ranks:
        theirs = everyone[i]
        if theirs.message in shown and theirs.message:
            blocks.append(f"======== rank {i}: as rank {shown[theirs.message]}")
            continue
        shown[theirs.message] = i
        blocks.append(f"======== rank {i} of {len(everyone)}, {theirs.phase}\n{theirs.text}")
    return AgreedFailure(f"failed on {who}: {first.message}", "\n".join(blocks))


def register_hypothesis_profiles() -> None:
    """Register the settings of Hypothesis: the same examples on every rank and in CI, new ones in a single process."""
    from hypothesis import HealthCheck, Phase, settings

    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("developer", deadline=None, suppress_health_check=slow)
    settings.register_profile("ci", derandomize=True, database=None, deadline=None, suppress_health_check=slow)
    # No shrinking: the ranks that did not fail would not follow.
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("ranks", settings.get_profile("ci"), phases=phases, report_multiple_bugs=False)
    settings.load_profile("ranks" if is_launched() else "ci" if os.environ.get("CI") else "developer")


register_hypothesis_profiles()
