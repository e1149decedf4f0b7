"""What ``mpitrain info`` says: this MPI, this machine, these GPUs, and what will be used of them."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from typing import Any

from mpitrain.collectives.probe.cache import Probe
from mpitrain.collectives.probe.outcome import Outcome
from mpitrain.collectives.world.device import gpu_names
from mpitrain.collectives.world.shared_memory import SHARED_MEMORY
from mpitrain.collectives.world.world import World
from mpitrain.kernels import cache_root
from mpitrain.trainer.runfolder import versions


def describe(world: World) -> dict[str, Any]:
    """The facts as one JSON document. Local."""
    shared = shutil.disk_usage(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    return {
        "world": world.describe(),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "shared_memory": f"{shared.free / 2**30:.1f} GiB free" if shared else None,
            "kernel_cache": str(cache_root()),
        },
        "gpus": {"visible": gpu_names(), "cupy": importlib.util.find_spec("cupy") is not None},
        "versions": versions(),
    }


HOW_TO_PROBE = "mpirun -n 2 mpitrain info --probe"
ERROR_LETTERS = 40
"""Of an error's first line in a table; the JSON document has all of it."""


def _processor() -> str:
    """The model, as Linux calls it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(document: dict[str, Any], probes: Sequence[Probe] = ()) -> str:
    """The same for people.

    Args:
        document: What ``describe`` gives.
        probes: What was found out about this MPI, by host.
    """
    lines = []
    for section, facts in document.items():
        lines.append(section)
        width = max(len(name) for name in facts)
        for name, fact in facts.items():
            first, *others = _words(fact)
            lines.append(f"  {name.replace('_', ' '):{width}s}  {first}")
            lines += [f"  {'':{width}s}  {other}" for other in others]
    return "\n".join([*lines, *_probe_section(probes)])


def _probe_section(probes: Sequence[Probe]) -> list[str]:
    """A table for all hosts whose verdicts are alike, with the figures of the first."""
    if not probes:
        return ["probe", f"  nothing is known yet: {HOW_TO_PROBE}"]
    alike: dict[tuple[str, ...], list[Probe]] = {}
    for probe in probes:
        verdicts = tuple(outcome.verdict for row in probe.outcomes.values() for outcome in row.values())
        alike.setdefault(verdicts, []).append(probe)
    lines = []
    for first, *others in alike.values():
        hosts = ", ".join(probe.host for probe in (first, *others))
        gpus = {0: "without GPUs", 1: "sharing one " + "".join(first.gpus)}.get(
            len(first.gpus), " and ".join(first.gpus)
        )
        lines.append(f"probe of {hosts}: two ranks of one host, {gpus}; measured {first.measured} ({HOW_TO_PROBE})")
        lines += [f"  {name}={value}" for name, value in first.settings.items()]
        lines += [f"  {line}" for line in table(first)]
    return lines


def table(probe: Probe) -> list[str]:
    """A line for each operation, a column for each kind of memory, and why what was not tried was not."""
    memories = list(next(iter(probe.outcomes.values())))
    rows = [["", *memories]]
    rows += [[operation, *(_cell(row[memory]) for memory in memories)] for operation, row in probe.outcomes.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:{width}s}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    places: dict[str, list[str]] = {}
    for memory in memories:
        column = {operation: row[memory] for operation, row in probe.outcomes.items()}
        reasons = {operation: outcome.detail for operation, outcome in column.items() if outcome.verdict == "not tried"}
        for reason in dict.fromkeys(reasons.values()):
            operations = [operation for operation in reasons if reasons[operation] == reason]
            which = "" if len(operations) == len(column) else f" ({', '.join(operations)})"
            places.setdefault(reason, []).append(memory + which)
    return [*lines, *(f"- {', '.join(where)}: not tried, {reason}" for reason, where in places.items())]


def _cell(outcome: Outcome) -> str:
    if outcome.verdict == "not tried":
        return "-"
    if outcome.verdict == "error":
        text = f"error: {outcome.detail}"
        return text if len(outcome.detail) <= ERROR_LETTERS else f"{text[: len('error: ') + ERROR_LETTERS - 3]}..."
    if outcome.verdict == "wrong":
        return "wrong bytes"
    if outcome.verdict != "ok":
        return f"{outcome.verdict} ({outcome.detail})"
    latency = "" if outcome.latency_us is None else f"{_figure(outcome.latency_us)} us"
    speed = "" if outcome.gb_per_s is None else f"{_figure(outcome.gb_per_s)} GB/s"
    return f"ok {latency:>8s}  {speed:>9s}".rstrip()


def _figure(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _words(fact: Any) -> list[str]:
    if isinstance(fact, dict):
        return [f"{name}: {value}" for name, value in fact.items()]
    if isinstance(fact, list):
        return [", ".join(map(str, fact)) or "none"]
    if isinstance(fact, bool) or fact is None:
        return [{True: "yes", False: "no", None: "unknown"}[fact]]
    return [str(fact)]
