"""Kill ranks at random moments, run after run, and count the runs that the others finish.

    python -m benchmarks.chaos --kills 20 [--ranks 4] [--algorithms easgd,gossip] [--aim checkpoint] [--seed 1] [--json]
    python -m benchmarks.chaos --kills 40 --algorithms synchronous
    python -m benchmarks.chaos --kills 40 --nodes 2         the ranks are on two emulated nodes (also synchronous ones)
    python -m benchmarks.chaos --kills 40 --hosts 2         and on two hosts of this machine (network/hosts.sh; root)
    python -m benchmarks.chaos --whole-job 100      whole jobs are killed and resumed (``chaos_jobs``)
    python -m benchmarks.chaos --full-disk 200      checkpoints on a disk that fills up (``chaos_files``)
    python -m benchmarks.chaos --damage 100         damaged files of each kind (``chaos_files``)

Each run trains the digits on a few ranks under `mpirun --with-ft ulfm` (Open MPI), with one method after the other, and
loses ranks until two are left. Synchronous methods run with `--on-failure continue`. A rank, rank 0 included, is killed
at a random moment of the run, or aimed at

- ``checkpoint``: checkpoints are written every second step, and the kill follows a step at once;
- ``evaluation``: rank 0 evaluates after every second step, and it is the one that is killed;
- ``end``: the kill follows the last step of the rank.

Before them, each method makes one run without kills, whose accuracy is reported beside that of the others.

A run has survived if it ends with exit code 0, writes its result, loses no other rank than those that are killed, and
leaves neither processes nor shared memory. The pause of a synchronous method is what it prints: the time from the
beginning of the exchange in which a rank died to the end of the repeated one. That of an asynchronous method is the
longest time between two records of the progress, which are a quarter of a second apart where nothing happens. The last
line is one JSON document with --json.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import chaos_files, chaos_jobs
from benchmarks.chaos_runs import LIMIT_SECONDS, finished, left_in_memory
from benchmarks.network.hosts import TOOLS, Cluster, missing
from mpitrain.algorithms import METHODS
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.collectives.world.ranks import EMULATED_NODES
from mpitrain.errors import UsageError
from mpitrain.records.metrics import read_metrics

ALGORITHMS = "easgd,eamsgd,easgd-tree,downpour,adag,gossip,gosgd,adpsgd"
BETWEEN_NODES = "easgd,eamsgd,aeasgd,easgd-tree,downpour,adownpour,adag,gossip,gosgd,adpsgd,zealous"
"""On several nodes."""

SYNCHRONOUS = "synchronous"
"""Stands for all methods that wait for each other by default."""

PAUSE = re.compile(r"workers continue with step \d+, after a pause of ([\d.]+) s")
AIMS = ("any", "checkpoint", "evaluation", "end")
STEPS = 120
LATEST_SECONDS = 0.15  # between a step and a kill that is aimed


@dataclass(frozen=True)
class Outcome:
    """One run with its kills.

    Attributes:
        algorithm, faults: As they were asked for.
        survived: Whether the others finished it.
        died: Ranks that had died at its end; a kill may come after it.
        accuracy: On the test set, 0 to 1; 0 if it was lost.
        pause_seconds: The longest pause.
        reason: The last lines of a run that was lost.
    """

    algorithm: str
    faults: list[str]
    survived: bool
    died: list[int]
    accuracy: float
    pause_seconds: float
    reason: str = ""


def main() -> int:
    """Run the kill loop and return the exit code."""
    parser = Parser(prog="benchmarks.chaos", description="Kill ranks at random moments and count the survivals.")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--kills", type=int, default=100, help="in all runs together (default: %(default)s)")
    kinds.add_argument("--whole-job", type=int, metavar="N", help="kill and resume N whole jobs instead")
    kinds.add_argument("--full-disk", type=int, metavar="N", help="begin N checkpoints on disks that fill up instead")
    kinds.add_argument("--damage", type=int, metavar="N", help="damage N files of each kind instead")
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--nodes", type=int, default=1, help="emulated, for the ranks of each run (default: 1)")
    places.add_argument("--hosts", type=int, default=1, help="of this machine, for the ranks of each run (default: 1)")
    parser.add_argument("--ranks", type=int, default=4, help="of each run, 3 or more (default: %(default)s)")
    defaults = f"default: {ALGORITHMS}; of whole jobs: {chaos_jobs.ALGORITHMS}"
    parser.add_argument(
        "--algorithms", metavar="NAME,NAME", help=f"{SYNCHRONOUS}: all that wait for each other; {defaults}"
    )
    parser.add_argument("--aim", default="any", choices=AIMS, help="what the kills are aimed at (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the ranks (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    try:
        return run(options)
    except UsageError as error:
        return fail(str(error))


def run(options: Any) -> int:
    """Kill as many ranks as asked for; return 1 if a run was lost."""
    n_nodes = max(options.nodes, options.hosts)
    default = ALGORITHMS if n_nodes == 1 else BETWEEN_NODES
    default = default if options.whole_job is None else chaos_jobs.ALGORITHMS
    names = (options.algorithms or default).split(",")
    if SYNCHRONOUS in names:
        at = names.index(SYNCHRONOUS)
        names[at : at + 1] = [name for name, method in METHODS.items() if method().is_synchronous]
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--algorithms: {name} is not one of {', '.join(METHODS)}")
    if options.whole_job is not None or options.full_disk is not None or options.damage is not None:
        return run_cases(options, names)
    if options.ranks < 3:
        raise UsageError(f"--ranks must be 3 or more, not {options.ranks}: two ranks survive a run")
    if options.hosts > 1:
        if problem := missing(os.geteuid() == 0, {name: shutil.which(name) for name in TOOLS}):
            raise UsageError(problem)
        if options.ranks % options.hosts:
            raise UsageError(f"--ranks {options.ranks} is no multiple of --hosts {options.hosts}")
    undisturbed, outcomes = kill_loop(options, names)
    document = summary(outcomes, options.kills, undisturbed)
    if not options.json:
        print(table(document))
    print(json.dumps(document))
    return 0 if document["lost"] == 0 else 1


def kill_loop(options: Any, names: list[str]) -> tuple[dict[str, float], list[Outcome]]:
    """Make a run of each method without kills, then runs with kills until there are as many kills as asked for.

    Returns:
        The accuracy of each method's run without kills, and the outcomes of the runs with kills.
    """
    rng, outcomes, n_kills = random.Random(options.seed), [], 0
    with Cluster(options.hosts, {EMULATED_NODES: str(options.nodes)}) as cluster:
        undisturbed = {name: train(name, cluster, options.ranks, [], options.aim).accuracy for name in names}
        while n_kills < options.kills:
            name = names[len(outcomes) % len(names)]
            faults = kills(rng, options.ranks, min(options.ranks - 2, options.kills - n_kills), options.aim)
            outcome = train(name, cluster, options.ranks, faults, options.aim)
            outcomes.append(outcome)
            n_kills += len(faults)
            how = (
                f"{outcome.accuracy:.2%}, pause {outcome.pause_seconds:.2f} s"
                if outcome.survived
                else f"LOST\n{outcome.reason}"
            )
            print(f"{n_kills} of {options.kills} kills: {name}, {' '.join(faults)}: {how}", file=sys.stderr, flush=True)
    return undisturbed, outcomes


def run_module(cluster: Cluster, n_ranks: int, arguments: Sequence[str]) -> tuple[str, int]:
    """Run a Python module on ranks that survive failures, and return its output and exit code."""
    words, env = cluster.on_ranks(n_ranks, [sys.executable, "-m", *arguments], flags=["--with-ft", "ulfm"])
    return finished(words, env=env)


def files(cluster: Cluster) -> set[str]:
    """Return the files in shared memory: of this machine, or of its hosts."""
    if cluster.n_hosts == 1:
        return set(os.listdir("/dev/shm"))
    found = set()
    for name, words, env in cluster.on_each(["ls", "/dev/shm"]):
        output, _ = finished(words, env=env)
        found |= {f"{name}: {file}" for file in output.split()}
    return found


def files_left(cluster: Cluster, before: set[str]) -> list[str]:
    """Return the files in shared memory that were not there before and that no process uses."""
    return left_in_memory(before) if cluster.n_hosts == 1 else sorted(files(cluster) - before)


def run_cases(options: Any, names: list[str]) -> int:
    """Make the loop of whole jobs, of full disks or of damaged files; return 1 if a case failed."""
    rng, cases = random.Random(options.seed), []
    for case in _cases(options, rng, names):
        cases.append(asdict(case))
        print(" ".join(f"{name}={value}" for name, value in cases[-1].items()), file=sys.stderr, flush=True)
    n_failed = sum(not case.get("went_on", case.get("passed")) for case in cases)
    document = {"cases": len(cases), "failed": n_failed, "n": sum(case.get("n", 1) for case in cases)}
    if not options.json:
        print(", ".join(f"{name}: {number}" for name, number in document.items()))
    print(json.dumps({**document, "outcomes": cases}))
    return 1 if n_failed else 0


def _cases(options: Any, rng: random.Random, names: list[str]) -> Iterator[chaos_jobs.Job | chaos_files.Case]:
    if options.whole_job is not None:
        references: dict[str, Path] = {}
        try:
            for number in range(options.whole_job):
                yield chaos_jobs.kill_and_resume(number, rng, options.ranks, names, references)
        finally:
            for run in references.values():
                shutil.rmtree(run.parent, ignore_errors=True)
    elif options.full_disk is not None:
        begun = 0
        while begun < options.full_disk:
            case = chaos_files.fill_disk(rng)
            begun += case.n
            yield case
    else:
        with chaos_files.Originals() as originals:
            for kind in chaos_files.KINDS:
                for number in range(options.damage):
                    yield originals.damage(kind, options.seed * options.damage + number)


def kills(rng: random.Random, n_ranks: int, n: int, aim: str) -> list[str]:
    """Return n kills of different ranks, at random moments that fit the aim."""
    ranks = rng.sample(range(n_ranks), n)
    if aim == "evaluation":
        ranks = list(range(n))  # each in turn has the lead
    found = []
    for rank in ranks:
        step = STEPS if aim == "end" else 2 * rng.randrange(2, STEPS // 2 - 1)
        seconds = rng.uniform(0, 2.0 if aim == "end" else LATEST_SECONDS)
        found.append(f"kill:rank={rank},step={step},after={seconds:.4f}")
    return found


def train(algorithm: str, cluster: Cluster, n_ranks: int, faults: list[str], aim: str) -> Outcome:
    """Train once with these faults."""
    folder = Path(tempfile.mkdtemp(prefix="mpitrain-chaos-"))
    before = files(cluster)
    command = ["mpitrain", "train", "--quiet", "--algorithm", algorithm, "--steps", str(STEPS)]
    for key, value in METHODS[algorithm].short_run.items():
        command += ["--set", f"{key}={value}"]
    command += ["--on-failure", "continue", "--timeout", str(LIMIT_SECONDS / 2), "--out", str(folder / "run")]
    command += ["--checkpoint-every", "2" if aim in ("checkpoint", "end") else str(STEPS // 4)]
    command += ["--evaluate-every", "2" if aim == "evaluation" else str(STEPS // 4)]
    for fault in faults:
        command += ["--inject", fault]
    try:
        output, code = run_module(cluster, n_ranks, command)
        return _outcome(algorithm, faults, folder / "run", output, code, files_left(cluster, before))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _outcome(algorithm: str, faults: list[str], run: Path, output: str, code: int, left: list[str]) -> Outcome:
    try:
        result = json.loads((run / "result.json").read_text())
    except (OSError, ValueError):
        result = None
    died = {int(rank) for rank in re.findall(r"rank (\d+) of \d+ died", output)} | set((result or {}).get("died", ()))
    others = sorted(died - {int(rank) for rank in re.findall(r"rank=(\d+)", " ".join(faults))})
    if code or result is None or left or others:
        lines = [line for line in output.splitlines() if line.strip() and "help message" not in line]
        reason = [f"exit code {code}; left in /dev/shm: {left}; died without being killed: {others}", *lines[-30:]]
        return Outcome(algorithm, faults, False, sorted(died), 0.0, 0.0, "\n".join(reason))
    if METHODS[algorithm]().is_synchronous:
        pause = max(map(float, PAUSE.findall(output)), default=0.0)
    else:
        pause = float(np.diff(read_metrics(run / "metrics.h5")["progress"]["seconds"]).max(initial=0.0))
    return Outcome(algorithm, faults, True, sorted(died), result["test_accuracy"], pause)


def summary(outcomes: list[Outcome], n_kills: int, undisturbed: dict[str, float]) -> dict[str, Any]:
    """Return the JSON document.

    Args:
        outcomes: Of the runs with kills.
        n_kills: The number of kills in them.
        undisturbed: The accuracy of each method's run without kills. Their mean has the weights of the runs that
            survived.
    """
    survived = [outcome for outcome in outcomes if outcome.survived]
    without_kills = [undisturbed[outcome.algorithm] for outcome in survived]
    return {
        "kills": n_kills,
        "runs": len(outcomes),
        "survived": len(survived),
        "lost": len(outcomes) - len(survived),
        "deaths_seen": sum(len(outcome.died) for outcome in survived),
        "mean_accuracy": float(np.mean([outcome.accuracy for outcome in survived])) if survived else None,
        "undisturbed_accuracy": float(np.mean(without_kills)) if survived else None,
        "longest_pause_seconds": max((outcome.pause_seconds for outcome in survived), default=None),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def table(document: dict[str, Any]) -> str:
    """Return the document for people."""
    lines = [f"{key}: {document[key]}" for key in document if key != "outcomes"]
    lines += [
        f"\nLOST {each['algorithm']} {' '.join(each['faults'])}\n{each['reason']}"
        for each in document["outcomes"]
        if not each["survived"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
