"""Measure the time before training starts: the import, and the start of a run up to its first step.

    VIRTUAL_ENV=.venv/openmpi python -m benchmarks.micro.startup [--ranks 2] [--repeats 5] [--imports 9] [--json]

This script starts processes and is none of the ranks itself. The MPI is that of ``VIRTUAL_ENV``, or that of
``.venv/openmpi``:

    import     seconds of ``python -c "import mpitrain"`` less those of ``python -c pass``, which takes turns with it;
               the same of torch, its peer. The package imports its parts, torch among them, when they are used
    first step seconds from the start of ``jobs/local.sh 2 mpitrain train --data digits --steps 2`` until all ranks have
               made the first step, which is when their second forward pass begins: the model notes when it is called
    whole run  seconds of the same command until its end: the rest is another step, the evaluation and the end of MPI

A figure is the median over the repeats, after a first one that counts for nothing: the kernels are compiled and kept,
the files are in memory. The first run ever, which compiles its kernels, takes longer.

Where the time goes, in CPU seconds of a rank (torch 2.13): the import of torch 1.4; Numba, mpi4py and the toolkit 0.4.
The step itself takes milliseconds. What is spared: torch._dynamo, which torch imports when the first optimizer is made,
1.1 (``trainer.compiler``); scikit-learn for its digits, 0.9; libfabric's search for networks in Open MPI's start, 1.0,
all of it waiting (``jobs/local.sh``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.micro.timing import where
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.errors import UsageError
from mpitrain.report import text

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 120.0  # of a command

# The project's bars.
BAR_RANKS = 2
IMPORT_AT_MOST, FIRST_STEP_AT_MOST = 0.3, 4.0  # seconds

# What a launcher tells its ranks: a command that inherits it would join the launcher's world.
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_LOCAL", "MPIR_CVAR_")

TRAIN = ("mpitrain", "train", "--data", "digits", "--quiet", "--model", "startup_model:Noting", "--steps", "2")

# A file of each process has the wall-clock times at which its training passes began.
MODEL = """
import os
import time
from pathlib import Path

from mpitrain.models.mlp import MLP


class Noting(MLP):
    def forward(self, x):
        if self.training:
            with Path(__file__).with_name(f"{os.getpid()}.times").open("a") as file:
                print(time.time(), file=file)
        return super().forward(x)
"""


def environment(environ: Mapping[str, str], venv: Path) -> dict[str, str]:
    """Return a command's environment in this virtual environment, without variables of a launcher or a benchmark."""
    env = {name: value for name, value in environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    env |= {"VIRTUAL_ENV": str(venv), "PATH": f"{venv / 'bin'}{os.pathsep}{environ.get('PATH', '')}"}
    return env | {"OMP_NUM_THREADS": "1"}


def run(command: Sequence[str], env: Mapping[str, str], folder: Path) -> tuple[float, str]:
    """Run a command; return its seconds and its output.

    Raises:
        RuntimeError: It failed or took too long; what it printed is in the message.
    """
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        env=env,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired as error:
            process.terminate()  # mpirun ends its ranks before it ends
            raise RuntimeError(f"{' '.join(command)} took more than {LIMIT_SECONDS:g} s") from error
    seconds = time.perf_counter() - began
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed ({process.returncode}):\n{printed}")
    return seconds, printed


def turns(commands: Mapping[str, Callable[[], float]], n_repeats: int) -> dict[str, list[float]]:
    """Time each command, turn by turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(1 + n_repeats):
        for name, measure in commands.items():
            used = measure()
            if repeat:
                seconds[name].append(used)
    return seconds


def first_step(folder: Path, began: float, n_ranks: int) -> tuple[float, float]:
    """Return the seconds until all ranks had begun their first training pass, and until their first step was made.

    Args:
        folder: In which each rank's model has noted its passes.
        began: Wall-clock time at which the command was started.
        n_ranks: That were to note them.

    Raises:
        RuntimeError: Some rank noted fewer than two passes.
    """
    notes = [[float(line) for line in file.read_text().split()] for file in folder.glob("*.times")]
    if len(notes) != n_ranks or min(map(len, notes)) < 2:
        raise RuntimeError(f"two training passes of {n_ranks} ranks were expected, not {[len(one) for one in notes]}")
    begun, made = (max(one[k] for one in notes) - began for k in (0, 1))
    return begun, made


def measure_imports(env: Mapping[str, str], venv: Path, n_repeats: int) -> dict[str, list[float]]:
    """Time an empty interpreter, and one that imports mpitrain."""

    def of(code: str) -> Callable[[], float]:
        return lambda: run([str(venv / "bin" / "python"), "-c", code], env, ROOT)[0]

    return turns({code: of(code) for code in ("pass", "import mpitrain", "import torch")}, n_repeats)


def measure_runs(env: Mapping[str, str], n_ranks: int, n_repeats: int) -> dict[str, list[float]]:
    """Time runs until their first pass, first step and end, after a run that is not counted."""
    command = [str(ROOT / "jobs" / "local.sh"), str(n_ranks), *TRAIN]
    runs: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "startup_model.py").write_text(MODEL)
        noting = dict(env, PYTHONPATH=os.pathsep.join(filter(None, [name, env.get("PYTHONPATH")])))
        for _ in range(1 + n_repeats):
            for file in folder.glob("*.times"):
                file.unlink()
            began = time.time()
            whole, _ = run(command, noting, folder)
            runs.append((*first_step(folder, began, n_ranks), whole))
    names = ("first pass", "first step", "whole run")
    return {name: list(seconds) for name, seconds in zip(names, zip(*runs[1:], strict=True), strict=True)}


def rows_of(imports: Mapping[str, Sequence[float]], runs: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return one row per figure; those of imports without the interpreter's own start, turn by turn."""
    nothing = np.array(imports["pass"])
    seconds = {"interpreter": nothing}
    seconds |= {name: np.array(of_one) - nothing for name, of_one in imports.items() if name != "pass"}
    seconds |= {name: np.array(of_one) for name, of_one in runs.items()}
    return [
        {
            "what": name,
            "median_seconds": float(np.median(of_one)),
            "least_seconds": float(of_one.min()),
            "most_seconds": float(of_one.max()),
            "n_repeats": len(of_one),
        }
        for name, of_one in seconds.items()
    ]


def verdicts(rows: Sequence[Mapping[str, Any]], n_ranks: int) -> list[dict[str, Any]]:
    """Return the verdicts on the project's bars that apply to this run."""
    seconds = {row["what"]: row["median_seconds"] for row in rows}
    bars = [("import mpitrain", IMPORT_AT_MOST, "import of mpitrain")]
    if n_ranks == BAR_RANKS:
        bars.append(("first step", FIRST_STEP_AT_MOST, f"first step of {BAR_RANKS} ranks, from the command on"))
    return [
        {"bar": f"{bar}: less than {most:g} s", "seconds": seconds[name], "passed": seconds[name] < most}
        for name, most, bar in bars
    ]


MEANINGS = {
    "interpreter": "python -c pass",
    "import mpitrain": "without the interpreter",
    "import torch": "without the interpreter: the peer",
    "first pass": "until the last rank begins its first forward pass",
    "first step": "until the last rank has made its first step",
    "whole run": "two steps, evaluation and end",
}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format the rows as a table."""
    return text.table(
        {
            "what": [row["what"] for row in rows],
            "median s": [f"{row['median_seconds']:.3f}" for row in rows],
            "least s": [f"{row['least_seconds']:.3f}" for row in rows],
            "most s": [f"{row['most_seconds']:.3f}" for row in rows],
            "meaning": [MEANINGS[row["what"]] for row in rows],
        },
        left=("what", "meaning"),
    )


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = Parser(
        prog="python -m benchmarks.micro.startup", description="Seconds of the import and until the first step."
    )
    parser.add_argument("--ranks", type=int, default=BAR_RANKS, help="of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--imports", type=int, default=9, help="imports of each kind (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    venv = Path(os.environ.get("VIRTUAL_ENV", ROOT / ".venv" / "openmpi")).absolute()
    try:
        for name in ("ranks", "repeats", "imports"):
            if getattr(options, name) < 1:
                raise UsageError(f"--{name} must be 1 or more, not {getattr(options, name)}")
        if not (venv / "bin" / "mpirun").exists():
            raise UsageError(f"{venv} has no mpirun: run make setup, or set VIRTUAL_ENV to an environment with an MPI")
    except UsageError as error:
        return fail(str(error))
    env = environment(os.environ, venv)
    load_before = os.getloadavg()
    try:
        information = run(
            [str(ROOT / "jobs" / "local.sh"), str(options.ranks), "mpitrain", "info", "--json"], env, ROOT
        )
        imports = measure_imports(env, venv, options.imports)
        runs = measure_runs(env, options.ranks, options.repeats)
    except RuntimeError as error:
        print(f"startup.py: {error}", file=sys.stderr)
        return 1
    rows = rows_of(imports, runs)
    bars = verdicts(rows, options.ranks)
    facts = json.loads(information[1].splitlines()[-1])
    del facts["probes"]
    document = {"results": rows, "bars": bars, **facts}
    document["load_average"] = {"before": load_before, "after": os.getloadavg()}
    if not options.json:
        print("\n".join([where(document), "", *table(rows), ""]))
        for bar in bars:
            print(f"{'PASS' if bar['passed'] else 'MISSED'}: {bar['bar']}: {bar['seconds']:.2f} s")
    print(json.dumps(document), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
