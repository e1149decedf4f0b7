#!/usr/bin/env python
"""Run the tests: in a single process, then on ranks under each MPI. `make check` and `make test` call it.

    tests/run.py --tier check                          while working: one process, Open MPI on 2 ranks, some on 3
    tests/run.py                                       before a commit: every test; one process, both MPIs, 1 to 5 ranks
    tests/run.py --tier all                            every test on ranks under both MPIs
    tests/run.py --mpi openmpi --ranks 2,3 -k gossip   some tests
    tests/run.py --ranks 0 tests/kernels               0 ranks: the single-process tests
    tests/run.py --mpi active --ranks 1,4              the environment of this interpreter and the mpirun on PATH

Every launch has a time limit and prints pytest's closing line, after its whole output if something failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.util import find_spec

from support import cluster
from support.launching import MPIS, Finished, end_all, launch, python

LAUNCHED_RANKS = (1, 2, 3, 4, 5)  # odd and prime on purpose
TIERS = {"check": (0, 2, 3), "test": (0, *LAUNCHED_RANKS), "all": (0, *LAUNCHED_RANKS)}

# Of the package only collectives/ calls MPI (test_layers.py): everything else is the same code under every MPI. In the
# tier "test" all tests on ranks run under the first MPI, and under the others those of these files and folders. In the
# tier "check" all run on 2 ranks, and these on 3.
UNDER_EVERY_MPI = (
    "tests/collectives",
    "tests/algorithms/test_simulated_and_real.py",  # every synchronous method
    "tests/algorithms/elastic/test_elastic_ranks.py",  # an asynchronous one
    "tests/optimizer/test_ranks.py",  # parameters of torch in windows
    "tests/benchmarks/test_collectives.py",  # these call MPI themselves
    "tests/benchmarks/test_windows.py",
    "tests/test_ranks_launched.py",
)

# Tests on an emulated cluster (tests/cluster) have a launch of their own. Each process boots a cluster of its own.
CLUSTER = ("-m", "cluster", "tests/cluster")
WITHOUT_CLUSTER = ("-m", "not cluster")
WITHOUT_LAUNCHES = ("-m", "not launches and not cluster")
# Under those other MPIs, 4 and 5 ranks are left out: which rank does what is decided without MPI, and tested under the
# first. What an MPI does differently shows on one rank, on two, and on three, of which two share a node.
RANKS_UNDER_OTHER_MPIS = (1, 2, 3)

CORES = len(os.sched_getaffinity(0))
N_PROCESSES = min(CORES, 8)  # that share the single-process tests
CLUSTERS = ["-n", "2", "--dist", "loadfile"] if find_spec("xdist") else []
# Launches that run at the same time. Waiting ranks sleep (support/sleep_when_idle.cpp), so two launches fill the cores.
LANES = min(2, CORES)
MOST_WORK_FIRST = (3, 2, 5, 1, 4)  # numbers of ranks: a long launch that starts last leaves a lane empty
PASSED, FAILED = ("passed", "xfailed"), ("failed", "error", "errors", "xpassed")


@dataclass(frozen=True)
class Launch:
    """One run of pytest. `n_ranks` 0 is the single process; `selection` are further arguments of pytest."""

    mpi: str
    n_ranks: int
    selection: tuple[str, ...] = ()

    def __str__(self) -> str:
        single = "cluster" if self.selection == CLUSTER else "one process"
        kind = f"{self.n_ranks} rank{'s' * (self.n_ranks > 1)}" if self.n_ranks else single
        return f"{self.mpi:8s} {kind:12s}"


@dataclass
class Verdict:
    """The outcome of a launch. `trouble` is what pytest's counts do not say."""

    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    closing: str = ""
    trouble: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.failed


def planned(
    tier: str, mpis: Sequence[str], ranks: Sequence[int], *, selective: bool, has_cluster: bool = False
) -> list[Launch]:
    """Return the launches of a tier. A selection of the user's is not narrowed further."""
    single = () if selective else WITHOUT_LAUNCHES if tier == "check" else WITHOUT_CLUSTER
    launches = [Launch(mpis[0], 0, single)] if 0 in ranks else []
    if 0 in ranks and has_cluster and tier != "check" and not selective:
        launches.append(Launch(mpis[0], 0, CLUSTER))
    for n_ranks in ranks:
        for mpi in mpis if n_ranks else ():
            everything = selective or tier == "all" or (mpi == mpis[0] and (tier, n_ranks) != ("check", 3))
            if everything or mpi == mpis[0] or n_ranks in RANKS_UNDER_OTHER_MPIS:
                launches.append(Launch(mpi, n_ranks, () if everything else UNDER_EVERY_MPI))
    return launches


def judge(finished: Finished, *, may_be_empty: bool) -> Verdict:
    """Read pytest's closing line. A launch that has none, or whose exit code disagrees, counts as a failure."""
    verdict = Verdict(seconds=finished.seconds)
    closings = re.findall(
        r"^(?:=+ )?((?:\d+ \w+|no tests ran).* in [\d.]+s.*?)(?: =+)?$", finished.output, re.MULTILINE
    )
    if closings:
        verdict.closing = closings[-1]
        counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (\w+)", verdict.closing.rpartition(" in ")[0])}
        verdict.passed = sum(counts.get(kind, 0) for kind in PASSED)
        verdict.failed = sum(counts.get(kind, 0) for kind in FAILED)
    if finished.timed_out:
        verdict.trouble.append(f"ended after {finished.seconds:.0f} s")
    elif not closings:
        verdict.trouble.append(f"died with exit code {finished.returncode}")
    elif not verdict.passed and not verdict.failed:
        if not may_be_empty:
            verdict.trouble.append("ran no test")
    elif finished.returncode and not verdict.failed:
        verdict.trouble.append(f"exit code {finished.returncode} after the tests")
    verdict.failed += bool(verdict.trouble)
    return verdict


def run(
    launches: list[Launch],
    pytest_arguments: list[str],
    *,
    timeout_seconds: float,
    selective: bool,
    verbose: bool = False,
) -> int:
    """Run the launches, print the table, and return the exit code."""

    def finished_of(this: Launch) -> Finished:
        kind = ["-m", "ranks"] if this.n_ranks else CLUSTERS if this.selection == CLUSTER else processes(this)
        return launch(
            this.n_ranks,
            [python(this.mpi), "-m", "pytest", *kind, *pytest_arguments, *this.selection],
            mpi=this.mpi,
            timeout_seconds=timeout_seconds,
            extra_env={"CI": os.environ.get("CI") or "1"},  # CI: the same Hypothesis examples every time
        )

    def report(this: Launch, finished: Finished) -> None:
        verdicts[this] = verdict = judge(finished, may_be_empty=selective)
        if verbose or not verdict.good:
            print(finished.output.rstrip())
        print(f"{this} {', '.join([verdict.closing, *verdict.trouble]).strip(', ')}", flush=True)

    began = time.monotonic()
    verdicts: dict[Launch, Verdict] = {}
    lanes, lane_of_cluster = ThreadPoolExecutor(LANES), ThreadPoolExecutor(1)
    try:
        cluster_launches, others = in_lanes(launches)
        running = {lane_of_cluster.submit(finished_of, this): this for this in cluster_launches}
        running |= {lanes.submit(finished_of, this): this for this in others}
        for finished in as_completed(running):
            report(running[finished], finished.result())
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends a second one
        for pool in (lanes, lane_of_cluster):
            pool.shutdown(wait=False, cancel_futures=True)
        end_all()  # each launch leads a session of its own, which the signal does not reach
        raise
    return summarize({this: verdicts[this] for this in launches}, time.monotonic() - began)


def processes(this: Launch) -> list[str]:
    """Return the options of pytest-xdist for the single-process tests.

    There is one process more than there are cores if many of the tests wait for what they launch. Each process imports
    and collects all tests, which takes 14 seconds of CPU time.
    """
    n = N_PROCESSES + (this.selection != WITHOUT_LAUNCHES)
    return ["-n", str(n), "--dist", "worksteal"] if find_spec("xdist") else []


def in_lanes(launches: Sequence[Launch]) -> tuple[list[Launch], list[Launch]]:
    """Return the cluster, and the other launches with most work first: the single process, then those on ranks.

    The cluster waits for SLURM most of the time and runs beside all others. The single process waits for what it
    launches, and launches on ranks use the cores meanwhile.
    """
    cluster_launches = [this for this in launches if this.selection == CLUSTER]
    single = [this for this in launches if not this.n_ranks and this.selection != CLUSTER]
    on_ranks = sorted((this for this in launches if this.n_ranks), key=lambda this: MOST_WORK_FIRST.index(this.n_ranks))
    return cluster_launches, [*single, *on_ranks]


def summarize(verdicts: dict[Launch, Verdict], seconds: float) -> int:
    """Print the counts and seconds of every launch and of all of them; return the exit code."""
    print(f"\n{'launch':21s}  passed  failed  seconds")
    for this, verdict in verdicts.items():
        row = f"{this} {verdict.passed:7d} {verdict.failed:7d} {verdict.seconds:8.0f}  {', '.join(verdict.trouble)}"
        print(row.rstrip())
    passed = sum(verdict.passed for verdict in verdicts.values())
    failed = sum(verdict.failed for verdict in verdicts.values())
    print(f"{'together':21s} {passed:7d} {failed:7d} {seconds:8.0f}")
    if not passed and not failed:
        print("no test was selected")
    print(f"\n{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="files or folders of tests (default: all)")
    parser.add_argument("--tier", choices=TIERS, default="test", help="which launches (default: %(default)s)")
    parser.add_argument("--mpi", help="comma-separated: openmpi, mpich, active (default: both; check: openmpi)")
    parser.add_argument("--ranks", help="comma-separated; 0 is the single process (default: the tier's)")
    parser.add_argument("-k", help="as pytest's -k")
    parser.add_argument("-x", action="store_true", help="as pytest's -x")
    parser.add_argument("--durations", help="as pytest's --durations; prints the output of every launch")
    parser.add_argument("--also", help="marks to run too: browser, examples, gpu, shared_data, slow, trackers")
    parser.add_argument("--timeout", type=float, default=3000.0, help="seconds of a launch (default: %(default)g)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    mpis = args.mpi.split(",") if args.mpi else list(MPIS[:1] if args.tier == "check" else MPIS)
    for mpi in mpis:
        if mpi not in (*MPIS, "active"):
            raise SystemExit(f"--mpi {mpi}: choose from {', '.join(MPIS)}, active")
        if not os.path.exists(python(mpi)):
            raise SystemExit(f"{python(mpi)} does not exist: run 'make setup', or choose --mpi active")
    ranks = sorted({int(n) for n in args.ranks.split(",")}) if args.ranks else TIERS[args.tier]
    selective = bool(args.k or args.paths)
    passed_on = ["-q", "--color=no"] + (["-k", args.k] if args.k else []) + ["-x"] * args.x
    passed_on += ["--durations", args.durations] if args.durations else []
    passed_on += (["--also", args.also] if args.also else []) + args.paths
    lacks = cluster.missing()
    if lacks and not selective and args.tier != "check" and 0 in ranks:
        print(f"tests/cluster: deselected, {lacks}", flush=True)
    launches = planned(args.tier, mpis, ranks, selective=selective, has_cluster=lacks is None)
    return run(launches, passed_on, timeout_seconds=args.timeout, selective=selective, verbose=bool(args.durations))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
