"""Run scripts under every method on the ranks of this launch; rank 0 prints one JSON document per script and method.

jobs/local.sh 2 python -m examples.compatibility.measure mnist gpt
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import mpitrain
from examples.compatibility.harness import Outcome, Run, deviation
from examples.compatibility.registry import LARGEST_DEVIATION, LARGEST_LOSS_FRACTION, METHODS, SCRIPTS

Result = dict[str, Any]


def measure(module: str, method: str, *, compiler: str = "inductor") -> Result:
    """Run a script as the public one is, and under all-reduce also in the form that is compared. Collective.

    Returns:
        ``before`` and ``after``, losses; under all-reduce also ``deviation`` from one process, None on other ranks
        than 0.
    """
    compared = {"deviation": compare(module, compiler=compiler)["deviation"]} if method == "all-reduce" else {}
    outcome: Outcome = _train(module)(Run(METHODS[method], compiler=compiler))
    return {"before": outcome.before, "after": outcome.after, **compared}


def compare(module: str, *, compiler: str = "inductor") -> Result:
    """Run a script under all-reduce and in one process, in the form that can be compared. Collective.

    Returns:
        ``before`` and ``after``, losses under all-reduce; ``deviation`` from one process, None on other ranks than 0.
    """
    train, world = _train(module), mpitrain.init()
    ours = train(Run(METHODS["all-reduce"], is_exact=True, compiler=compiler))
    alone = train(Run(None, is_exact=True, compiler=compiler)) if world.rank == 0 else None
    world.barrier()
    return {"before": ours.before, "after": ours.after, "deviation": alone and deviation(ours, alone)}


def _train(module: str) -> Callable[[Run], Outcome]:
    """Return the function of a script."""
    train: Callable[[Run], Outcome] = importlib.import_module(f"examples.compatibility.scripts.{module}").train
    return train


def failure(result: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a result, None if nothing is."""
    if "error" in result:
        return str(result["error"])
    if not math.isfinite(result["after"]) or result["after"] > LARGEST_LOSS_FRACTION * result["before"]:
        return f"the loss of the consensus went from {result['before']:.4g} to {result['after']:.4g}"
    found = result.get("deviation")
    if found is not None and not found <= LARGEST_DEVIATION:
        return f"a parameter differs from that of one process by {found:.2g}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=[script.module for script in SCRIPTS])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--compiler", default="inductor", help="the backend of torch.compile (default: %(default)s)")
    arguments = parser.parse_args()
    world = mpitrain.init(hide_launcher=True)
    for module in arguments.scripts:
        for method in arguments.methods.split(","):
            began = time.monotonic()
            try:
                result = measure(module, method, compiler=arguments.compiler)
            except Exception as error:  # recorded; the other ranks wait in vain, so that this launch is over
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            if world.rank == 0:
                line = {"script": module, "method": method, "ranks": world.size, **result}
                print(json.dumps({**line, "seconds": round(time.monotonic() - began, 1)}), flush=True)
            if "error" in result:
                sys.stdout.flush()
                world.abort(1)


if __name__ == "__main__":
    main()
