"""``mpitrain info``: this MPI, the machines, their GPUs, the parts that a run uses, and problems that it will have."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Sequence
from typing import Any

from mpitrain.cli import inspection
from mpitrain.collectives.probe.cache import Probe, probe_hosts
from mpitrain.collectives.probe.outcome import Outcome
from mpitrain.collectives.world import link
from mpitrain.collectives.world.device import gpu_names
from mpitrain.collectives.world.launch import init
from mpitrain.collectives.world.shared_memory import SHARED_MEMORY
from mpitrain.collectives.world.world import World
from mpitrain.kernels import cache_root
from mpitrain.trainer.runfolder import versions

HOW_TO_PROBE = "mpirun -n 2 mpitrain info --probe"
MAX_ERROR_LETTERS = 40
"""The length of an error's first line in a table; the JSON document has the whole text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="show what a run on this device uses (default: cpu)")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="try MPI operations on each kind of memory, on each host (minutes with GPUs), and store the results, also "
        "those of the network between nodes",
    )


def run(args: argparse.Namespace) -> int:
    """Print the facts about MPI, GPUs and machine on rank 0; return the exit code. Collective."""
    world = init(args.device)
    probes = probe_hosts(world.comm, world.hosts, gpu_names(), again=args.probe)
    facts = world.comm.gather(inspection.facts_here(world))
    document = {**describe(world), **_between_nodes(world, stores=args.probe)}
    if world.rank == 0:
        problems = inspection.verdicts(facts, threads=document["world"]["threads"])
        if args.json:
            whole = {"ranks": inspection.document(facts), "verdicts": problems}
            print(json.dumps({**document, **whole, "probes": [probe.document() for probe in probes]}))
        else:
            print("\n".join([show(document, probes), "hosts", *_indented(inspection.host_table(facts)), "verdicts"]))
            print("\n".join(_indented(problems or ["nothing here will hurt a run"])))
    return 0


def _between_nodes(world: World, *, stores: bool) -> dict[str, Any]:
    """Measure the network between two nodes, and return its section of the document. Collective."""
    measured = link.measure(world.comm, world.nodes)
    if measured is None:
        return {}
    if stores and world.rank == 0:
        link.store(measured)
    used, origin = (measured, "measured, and stored for later runs") if stores else link.known(world.comm)
    return {"between nodes": inspection.between_nodes(world.n_nodes, measured, used, origin)}


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def describe(world: World) -> dict[str, Any]:
    """Return the facts as one JSON document. Local."""
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


def _processor() -> str:
    """Return the model of the processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(document: dict[str, Any], probes: Sequence[Probe] = ()) -> str:
    """Return the facts as text.

    Args:
        document: The document of ``describe``.
        probes: For each host, the results of trying MPI operations on its kinds of memory (``--probe``).
    """
    lines = []
    for section, facts in document.items():
        lines.append(section)
        width = max(len(name) for name in facts)
        for name, fact in facts.items():
            first, *others = _lines(fact)
            lines.append(f"  {name.replace('_', ' '):{width}s}  {first}")
            lines += [f"  {'':{width}s}  {other}" for other in others]
    return "\n".join([*lines, *_probe_section(probes)])


def _probe_section(probes: Sequence[Probe]) -> list[str]:
    """Return a table for all hosts with the same verdicts, with the figures of the first."""
    if not probes:
        return ["probe", f"  not probed yet: {HOW_TO_PROBE}"]
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
    """Return a host's results as lines: one per operation, with a column per kind of memory, then remarks."""
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
        return (
            text if len(outcome.detail) <= MAX_ERROR_LETTERS else f"{text[: len('error: ') + MAX_ERROR_LETTERS - 3]}..."
        )
    if outcome.verdict == "wrong":
        return "wrong bytes"
    if outcome.verdict != "ok":
        return f"{outcome.verdict} ({outcome.detail})"
    latency = "" if outcome.latency_us is None else f"{_figure(outcome.latency_us)} us"
    speed = "" if outcome.gb_per_s is None else f"{_figure(outcome.gb_per_s)} GB/s"
    return f"ok {latency:>8s}  {speed:>9s}".rstrip()


def _figure(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _lines(fact: Any) -> list[str]:
    if isinstance(fact, dict):
        return [f"{name}: {value}" for name, value in fact.items()]
    if isinstance(fact, list):
        return [", ".join(map(str, fact)) or "none"]
    if isinstance(fact, bool) or fact is None:
        return [{True: "yes", False: "no", None: "unknown"}[fact]]
    return [str(fact)]
