"""Run all reproductions, two at a time, and print their criteria.

python -m benchmarks.reproduce [NAME ...] [--quick] [--jobs 2] [--out runs/reproduce]

Scripts that need a data file are not among them; their pages have their commands.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
WHOLE = ("byzantine", "crossover", "flat_minima", "gradient_push", "neuroevolution", "warm_start")
"""Scripts whose results hold at full size only; a quick run makes them as they are."""
QUICK: dict[str, list[str]] = {
    "admm_stability": ["--points", "12"],
    "gossip_spread": ["--rounds", "200"],
    **{name: [] for name in WHOLE},
}
"""The options of a quick run, where they are not ``--quick``."""


WITH_DATA = ("cifar10",)
"""Scripts that need a data file, and an hour."""


def scripts() -> list[str]:
    """Return the names of the reproductions: the files of this folder with a function ``main`` of their own."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem[0] != "_" and "\ndef main(" in path.read_text())


def options_of(name: str, *, quick: bool) -> list[str]:
    """Return the options of a script for a quick or a whole run."""
    if not quick:
        return []
    has_quick = "quick_parser(__doc__)" in (HERE / f"{name}.py").read_text()
    return QUICK.get(name, ["--quick"] if has_quick else [])


def run(name: str, out: Path, *, quick: bool) -> bool:
    """Run a script on one core, write what it prints to OUT/NAME.txt, and print its criteria; return its success."""
    command = [sys.executable, "-m", f"benchmarks.reproduce.{name}", "--out", str(out), *options_of(name, quick=quick)]
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=env, capture_output=True, text=True, check=False)
    (out / f"{name}.txt").write_text(done.stdout + done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("criterion ")]
    verdict = "as expected" if done.returncode == 0 else f"exit code {done.returncode}, see {out / name}.txt"
    print("\n".join([f"== {name}: {verdict}", *lines]), flush=True)
    return done.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scripts; return 1 if one of them missed a criterion or failed."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("names", nargs="*", metavar="NAME", help="scripts to run (default: all)")
    made.add_argument("--quick", action="store_true", help="smaller sizes: minutes in all")
    made.add_argument("--jobs", type=int, default=2, help="scripts that run at a time (%(default)s)")
    made.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of the results (%(default)s)")
    options = made.parse_args(arguments)
    without_data = [name for name in scripts() if name not in WITH_DATA]
    unknown = set(options.names) - set(without_data)
    if unknown or options.jobs < 1:
        made.error(f"there is no script {', '.join(sorted(unknown))}" if unknown else "--jobs must be 1 or more")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        succeeded = list(pool.map(lambda name: run(name, out, quick=options.quick), options.names or without_data))
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
