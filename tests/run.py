#!/usr/bin/env python
"""Runs the tests: once in a single process, then on every number of ranks under every MPI. `make test` calls it.

    tests/run.py                                       everything
    tests/run.py --mpi openmpi --ranks 2,3 -k gossip   a part of it, while working
    tests/run.py --ranks 0 tests/kernels               0 ranks: the single-process tests
    tests/run.py --mpi active --ranks 1,4              the environment of this interpreter and the mpirun on PATH

Each launch is bounded in time and prints pytest's closing line; before it, where something failed, its whole output.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec

from support.launching import MPIS, Finished, launch, python

LAUNCHED_RANKS = (1, 2, 3, 4, 5)  # odd and prime on purpose
# The tests of a single process are shared by as many as there are cores: they often wait for what they have launched.
CORES = len(os.sched_getaffinity(0))
PROCESSES = ["-n", str(min(CORES, 8)), "--dist", "loadfile"] if find_spec("xdist") else []
PASSED, FAILED = ("passed", "xfailed"), ("failed", "error", "errors", "xpassed")


@dataclass(frozen=True)
class Launch:
    """One run of pytest; `n_ranks` 0 is the single process."""

    mpi: str
    n_ranks: int

    def __str__(self) -> str:
        kind = f"{self.n_ranks} rank{'s' * (self.n_ranks > 1)}" if self.n_ranks else "one process"
        return f"{self.mpi:8s} {kind:12s}"


@dataclass
class Verdict:
    """What a launch came to. `trouble` is what pytest's counts do not say."""

    passed: int = 0
    failed: int = 0
    closing: str = ""
    trouble: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.failed


def judge(finished: Finished, *, may_be_empty: bool) -> Verdict:
    """Reads pytest's closing line. A launch that has none, or whose exit code disagrees, counts as a failure."""
    verdict = Verdict()
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


def run(launches: list[Launch], pytest_arguments: list[str], *, timeout_seconds: float, selective: bool) -> int:
    """Runs the launches, as many at a time as the cores allow, and prints the table; returns the exit code."""

    def finished_of(this: Launch) -> Finished:
        kind = ["-m", "ranks"] if this.n_ranks else PROCESSES
        return launch(
            this.n_ranks,
            [python(this.mpi), "-m", "pytest", *kind, *pytest_arguments],
            mpi=this.mpi,
            timeout_seconds=timeout_seconds,
            extra_env={"CI": os.environ.get("CI") or "1"},  # CI: the same Hypothesis examples every time
        )

    verdicts: dict[Launch, Verdict] = {}
    for at_once in groups(launches, CORES):
        with ThreadPoolExecutor(len(at_once)) as pool:
            for this, finished in zip(at_once, pool.map(finished_of, at_once), strict=True):
                verdict = judge(finished, may_be_empty=selective)
                verdicts[this] = verdict
                if not verdict.good:
                    print(finished.output.rstrip())
                print(f"{this} {', '.join([verdict.closing, *verdict.trouble]).strip(', ')}", flush=True)
    return summarize(verdicts)


def groups(launches: Sequence[Launch], cores: int) -> list[list[Launch]]:
    """Launches that fit on the cores together: of as many ranks each, in their order. The single process fills them."""
    made: list[list[Launch]] = []
    for this in launches:
        at_once = made[-1] if made else []
        if at_once and at_once[0].n_ranks == this.n_ranks and 0 < this.n_ranks * (len(at_once) + 1) <= cores:
            at_once.append(this)
        else:
            made.append([this])
    return made


def summarize(verdicts: dict[Launch, Verdict]) -> int:
    """Prints every launch's counts and the closing line."""
    print("\n" + "launch".ljust(21) + "  passed  failed")
    for this, verdict in verdicts.items():
        print(f"{this} {verdict.passed:7d} {verdict.failed:7d}  {', '.join(verdict.trouble)}".rstrip())
    passed = sum(verdict.passed for verdict in verdicts.values())
    failed = sum(verdict.failed for verdict in verdicts.values())
    if not passed and not failed:
        print("no test was selected")
    print(f"\n{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", help="files or folders of tests (default: all)")
    parser.add_argument(
        "--mpi", default=",".join(MPIS), help="comma-separated: openmpi, mpich, active (default: %(default)s)"
    )
    ranks = ",".join(map(str, (0, *LAUNCHED_RANKS)))
    parser.add_argument(
        "--ranks", default=ranks, help="comma-separated; 0 is the single process (default: %(default)s)"
    )
    parser.add_argument("-k", help="as pytest's -k")
    parser.add_argument("-x", action="store_true", help="as pytest's -x")
    parser.add_argument("--also", help="marks to run too: gpu, shared_data, slow")
    parser.add_argument("--timeout", type=float, default=1500.0, help="seconds of a launch (default: %(default)g)")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    mpis = args.mpi.split(",")
    for mpi in mpis:
        if mpi not in (*MPIS, "active"):
            raise SystemExit(f"--mpi {mpi}: choose from {', '.join(MPIS)}, active")
        if not os.path.exists(python(mpi)):
            raise SystemExit(f"{python(mpi)} does not exist: run 'make setup', or choose --mpi active")
    ranks = sorted({int(n) for n in args.ranks.split(",")})
    launches = [Launch(mpis[0], 0)] if 0 in ranks else []
    launches += [Launch(mpi, n) for n in ranks if n for mpi in mpis]
    passed_on = ["-q", "--color=no"] + (["-k", args.k] if args.k else []) + ["-x"] * args.x
    passed_on += (["--also", args.also] if args.also else []) + args.paths
    return run(launches, passed_on, timeout_seconds=args.timeout, selective=bool(args.k or args.paths))


if __name__ == "__main__":
    sys.exit(main())
