"""The curves of the methods' pages on the documentation site.

python -m benchmarks.pages.method_curves            simulate every method, and write docs/site/curves.json
python -m benchmarks.pages.method_curves NAME ...   replace the curves of these methods
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mpitrain.algorithms import METHODS
from mpitrain.cli import main as cli
from mpitrain.records.metrics import read_metrics

CURVES = Path(__file__).resolve().parents[2] / "docs" / "site" / "curves.json"
RUN = "--data digits --model mlp --workers 4 --gradients 880 --evaluations 22"
CAPTION = (
    "Four simulated workers train a multilayer perceptron on the digits of scikit-learn, with the settings that the "
    f"method recommends for short runs: `mpitrain simulate {RUN} --algorithm NAME --set KEY=VALUE`."
)


def simulated(name: str) -> tuple[list[int], list[float]]:
    """Simulate a method.

    Args:
        name: The name of the method.

    Returns:
        The gradients of all workers before each evaluation, and the test loss of each.
    """
    settings = [f"--set={key}={value}" for key, value in METHODS[name].short_run.items()]
    with tempfile.TemporaryDirectory() as folder:
        if code := cli.main(["simulate", f"--algorithm={name}", *settings, *RUN.split(), f"--out={folder}/run"]):
            raise SystemExit(code)
        table = read_metrics(Path(folder, "run", "metrics.h5"))["evaluation"]
    return [int(n) for n in table["gradients"]], [round(float(loss), 4) for loss in table["test_loss"]]


def main(names: Sequence[str]) -> None:
    """Simulate methods and write their curves.

    Args:
        names: The names of the methods; empty for all.
    """
    found = json.loads(CURVES.read_text())["runs"] if names else {}
    for name in names or METHODS:
        gradients, losses = simulated(name)
        found[name] = {"gradients": gradients, "test_loss": losses}
    CURVES.write_text(json.dumps({"caption": CAPTION, "runs": {name: found[name] for name in METHODS}}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
