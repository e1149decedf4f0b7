"""Kill ranks at random moments, run after run, and count the runs that the others finish.

    python -m benchmarks.chaos --kills 20 [--ranks 4] [--algorithms easgd,gossip] [--aim checkpoint] [--seed 1] [--json]

Each run trains the digits on a few ranks under `mpirun --with-ft ulfm` (Open MPI), with one method after the other, and
loses ranks until two are left. A rank, rank 0 included, is killed at a random moment of the run, or aimed at

- ``checkpoint``: checkpoints are written every second step, and the kill follows a step at once;
- ``evaluation``: rank 0 evaluates after every second step, and it is the one that is killed;
- ``end``: the kill follows the last step of the rank.

A run has survived if it ends with exit code 0, writes its result, and leaves neither processes nor shared memory. The
pause is the longest time between two records of the progress, which are a quarter of a second apart where nothing
happens. The last line is one JSON document with --json.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.algorithms import METHODS
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.errors import UsageError
from mpitrain.records.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS = "easgd,eamsgd,easgd-tree,downpour,adag,gossip,gosgd,adpsgd"
AIMS = ("any", "checkpoint", "evaluation", "end")
STEPS = 120
LIMIT_SECONDS = 300.0  # of a run: one that hangs is lost
SINGLETON = r"sm_segment\..*0000\.\d+"
"""The name of Open MPI's memory of a process that no launcher started: of another program."""

LATEST_SECONDS = 0.15  # between a step and a kill that is aimed


@dataclass(frozen=True)
class Outcome:
    """One run with its kills.

    Attributes:
        algorithm, faults: As they were asked for.
        survived: Whether the others finished it.
        died: Ranks that had died at its end; a kill may come after it.
        accuracy: On the test set, 0 to 1; 0 if it was lost.
        pause_seconds: The longest between two records of the progress.
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
    parser.add_argument("--kills", type=int, default=100, help="in all runs together (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="of each run, 3 or more (default: %(default)s)")
    parser.add_argument("--algorithms", default=ALGORITHMS, metavar="NAME,NAME", help="default: %(default)s")
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
    names = options.algorithms.split(",")
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--algorithms: {name} is not one of {', '.join(METHODS)}")
    if options.ranks < 3:
        raise UsageError(f"--ranks must be 3 or more, not {options.ranks}: two ranks survive a run")
    rng, outcomes, n_kills = random.Random(options.seed), [], 0
    while n_kills < options.kills:
        name = names[len(outcomes) % len(names)]
        faults = kills(rng, options.ranks, min(options.ranks - 2, options.kills - n_kills), options.aim)
        outcome = train(name, options.ranks, faults, options.aim)
        outcomes.append(outcome)
        n_kills += len(faults)
        how = (
            f"{outcome.accuracy:.2%}, pause {outcome.pause_seconds:.2f} s"
            if outcome.survived
            else f"LOST\n{outcome.reason}"
        )
        print(f"{n_kills} of {options.kills} kills: {name}, {' '.join(faults)}: {how}", file=sys.stderr, flush=True)
    document = summary(outcomes, n_kills)
    if not options.json:
        print(table(document))
    print(json.dumps(document))
    return 0 if document["lost"] == 0 else 1


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


def train(algorithm: str, n_ranks: int, faults: list[str], aim: str) -> Outcome:
    """Train once with these faults."""
    folder = Path(tempfile.mkdtemp(prefix="mpitrain-chaos-"))
    before = set(os.listdir("/dev/shm"))
    command = [str(ROOT / "jobs" / "local.sh"), str(n_ranks), "--with-ft", "ulfm"]
    command += [sys.executable, "-m", "mpitrain", "train", "--quiet", "--algorithm", algorithm, "--steps", str(STEPS)]
    command += ["--timeout", str(LIMIT_SECONDS / 2), "--out", str(folder / "run")]
    command += ["--checkpoint-every", "2" if aim in ("checkpoint", "end") else str(STEPS // 4)]
    command += ["--evaluate-every", "2" if aim == "evaluation" else str(STEPS // 4)]
    for fault in faults:
        command += ["--inject", fault]
    try:
        output, code = _finished(command)
        left = sorted(name for name in set(os.listdir("/dev/shm")) - before if not _is_mapped(name))
        return _outcome(algorithm, faults, folder / "run", output, code, left)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _finished(command: list[str]) -> tuple[str, int]:
    """Return the output and the exit code of a command, which is ended if it hangs."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
            output += f"\nended after {LIMIT_SECONDS:.0f} s"
    return output, process.returncode


def _is_mapped(name: str) -> bool:
    """Return whether a file in /dev/shm is in use, gone or of another kind: other programs run here too."""
    if not Path("/dev/shm", name).exists() or re.fullmatch(SINGLETON, name):
        return True
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if f"/dev/shm/{name}" in maps.read_text(errors="replace"):
                return True
    return False


def _outcome(algorithm: str, faults: list[str], run: Path, output: str, code: int, left: list[str]) -> Outcome:
    try:
        result = json.loads((run / "result.json").read_text())
    except (OSError, ValueError):
        result = None
    if code or result is None or left:
        lines = [line for line in output.splitlines() if line.strip() and "help message" not in line]
        reason = "\n".join([f"exit code {code}; left in /dev/shm: {left}", *lines[-30:]])
        return Outcome(algorithm, faults, False, [], 0.0, 0.0, reason)
    died = sorted({int(rank) for rank in re.findall(r"rank (\d+) of \d+ died", output)} | set(result["died"]))
    seconds = read_metrics(run / "metrics.h5")["progress"]["seconds"]
    pause = float(np.diff(seconds).max(initial=0.0))
    return Outcome(algorithm, faults, True, died, result["test_accuracy"], pause)


def summary(outcomes: list[Outcome], n_kills: int) -> dict[str, Any]:
    """Return the JSON document."""
    survived = [outcome for outcome in outcomes if outcome.survived]
    return {
        "kills": n_kills,
        "runs": len(outcomes),
        "survived": len(survived),
        "lost": len(outcomes) - len(survived),
        "deaths_seen": sum(len(outcome.died) for outcome in survived),
        "mean_accuracy": float(np.mean([outcome.accuracy for outcome in survived])) if survived else None,
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
