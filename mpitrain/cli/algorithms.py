"""``mpitrain algorithms``: every method, its paper and its settings; and the graphs of methods that gossip."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from mpitrain.algorithms import METHODS, catalogue
from mpitrain.algorithms.gossip.graph_method import GraphMethod, graph_named
from mpitrain.collectives.topology.graphs import Topology
from mpitrain.collectives.topology.mixing import consensus_rate
from mpitrain.collectives.world.launchers import launched_rank
from mpitrain.errors import UsageError

DEFAULT_WORKERS = 8
MAX_WORKERS = 2048
"""The spectral gap takes time that grows with the cube of the number of workers: some ten seconds here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON document")
    form.add_argument("--markdown", action="store_true", help="print Markdown with equations, as in docs/methods.md")
    parser.add_argument(
        "--topology", metavar="GRAPH", help="describe a graph of workers instead: a name, such as torus:4x2, or a file"
    )
    parser.add_argument(
        "--workers", type=int, metavar="P", help=f"workers of that graph (default: {DEFAULT_WORKERS}, or the file's)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw that graph")


def run(args: argparse.Namespace) -> int:
    """Print the methods, or a graph; return the exit code."""
    if args.topology is None and (args.workers is not None or args.plot is not None):
        raise UsageError("--workers and --plot describe a graph: give --topology GRAPH too")
    if args.topology is not None and args.markdown:
        raise UsageError("--markdown prints the methods: remove it, or --topology")
    if args.workers is not None and not 1 <= args.workers <= MAX_WORKERS:
        raise UsageError(f"--workers must be between 1 and {MAX_WORKERS}, not {args.workers}")
    if launched_rank() != 0:
        return 0
    if args.topology is not None:
        return _show_graph(args)
    if args.json:
        print(json.dumps(catalogue.catalogue()))
    else:
        print(catalogue.markdown() if args.markdown else catalogue.text(), end="")
    return 0


def _show_graph(args: argparse.Namespace) -> int:
    graph = graph_named(args.topology, args.workers, default=DEFAULT_WORKERS)
    found = describe(graph)
    if args.plot is not None:
        from mpitrain.report.graph_plot import plot_graph  # matplotlib takes a second to load

        plot_graph(args.plot, graph, found["spectral_gap"])
    if args.json:
        print(json.dumps(found))
        return 0
    low, high = found["sends"]
    print(f"{found['name']}, {found['workers']} workers")
    print(f"  sends per step     {low if low == high else f'{low} to {high}'} of a worker")
    print(f"  period             {found['period']} step{'s' * (found['period'] > 1)}")
    print(f"  undirected         {'yes' if found['undirected'] else 'no'}")
    print(f"  spectral gap       {found['spectral_gap']:.4g} a period, with {found['weights']} weights")
    print(f"  steps for 1/10     {_steps(found['steps_to_a_tenth'])} until the workers' disagreement is a tenth")
    print(f"  methods            {', '.join(found['methods']) or 'none: it is not connected'}")
    if args.plot is not None:
        print(f"wrote {args.plot}")
    return 0


def describe(graph: Topology) -> dict[str, Any]:
    """Return the properties of a graph that determine how fast its workers agree, as JSON types.

    The spectral gap is 1 minus the factor by which the disagreement of the workers shrinks in one period. If it is 1,
    one period makes all workers equal to their mean.
    """
    rate = consensus_rate(graph)
    sends = [len(peers) for step in graph.steps for peers in step]
    tenth: float | None = None
    if rate < 1 - 1e-12:
        tenth = graph.period * max(1.0, math.log(0.1) / math.log(max(rate, 1e-12)))
    return {
        "name": graph.name,
        "workers": graph.size,
        "period": graph.period,
        "sends": [min(sends), max(sends)],
        "undirected": graph.is_symmetric,
        "weights": "Metropolis-Hastings" if graph.is_symmetric else "push",
        "spectral_gap": 1 - rate,
        "steps_to_a_tenth": tenth,
        "methods": [name for name, method in METHODS.items() if _takes(method, graph)],
    }


def _takes(method: type[Any], graph: Topology) -> bool:
    if not issubclass(method, GraphMethod):
        return False
    try:
        method(topology=graph).graph(graph.size)
    except UsageError:
        return False
    return True


def _steps(number: float | None) -> str:
    return "never" if number is None else f"{number:.3g}"
