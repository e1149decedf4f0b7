"""Graphs of networkx, and files that networkx reads, as topologies.

The nodes are the ranks, 0 to p - 1, as numbers or as text. An edge of an undirected graph counts in both directions,
an edge i -> j of a directed one means that j receives the vector of i. Self-loops are dropped, since every rank keeps
a share of its own. Weights of edges are not used: each method has its own (``mixing``).

    .edgelist    "0 1" per line: an undirected edge        .gml, .graphml    directed if the file says so
    .adjlist     "0 1 2" per line: a rank and its neighbours

networkx is imported only when it is needed. Most runs name their graph; and with srun --mpi=pmi2, MPICH 5 may fail to
start after large imports, because its first message contains memory that it has not set.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import ParseError

from mpitrain.collectives.topology.graphs import Topology
from mpitrain.errors import UsageError, reason

if TYPE_CHECKING:
    import networkx

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".edgelist": ("read_edgelist", {}),
    ".adjlist": ("read_adjlist", {}),
    ".gml": ("read_gml", {"label": "id"}),
    ".graphml": ("read_graphml", {}),
}
"""The name of a function of networkx and its keyword arguments for each suffix."""

MAX_BYTES = 2**26
"""The largest file that is read."""


def is_graph_file(text: str) -> bool:
    """Return whether a text is the name of a graph file, according to its suffix."""
    return Path(text).suffix.lower() in READERS


def is_networkx_graph(value: object) -> bool:
    """Return whether a value is a graph of networkx. It is not if networkx has not been imported."""
    module: Any = sys.modules.get("networkx")
    return module is not None and isinstance(value, module.Graph)


def from_networkx(graph: networkx.Graph, name: str = "") -> Topology:
    """Return the topology of a networkx graph.

    Args:
        graph: A graph or a directed graph with the nodes 0 to p - 1.
        name: The topology's name; by default that of the graph.

    Raises:
        ValueError: The nodes are not 0 to p - 1.
    """
    numbers = {node: _number(node) for node in graph}
    size = len(numbers)
    if not size or sorted(numbers.values()) != list(range(size)):
        raise ValueError(f"the nodes of a graph of {size} ranks must be the numbers 0 to {max(size - 1, 0)}")
    peers: list[set[int]] = [set() for _ in range(size)]
    for a, b in graph.edges():
        i, j = numbers[a], numbers[b]
        peers[i].add(j)
        if not graph.is_directed():
            peers[j].add(i)
    step = tuple(tuple(sorted(others - {rank})) for rank, others in enumerate(peers))
    return Topology(name or str(graph.name) or "networkx graph", size, (step,))


def read_graph(path: str) -> Topology:
    """Return the topology in a file.

    Raises:
        UsageError: The file cannot be read, is too large, or does not contain a graph with the nodes 0 to p - 1.
    """
    import networkx

    reader, arguments = READERS[Path(path).suffix.lower()]
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise UsageError(f"{path} has more than {MAX_BYTES // 2**20} MiB, too much for a graph of ranks")
        graph = getattr(networkx, reader)(path, **arguments)
    except OSError as error:
        raise UsageError(f"cannot read the graph {path} ({reason(error)})") from error
    except (networkx.NetworkXException, ParseError, ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} is not a graph in the format of its suffix ({error!s:.100})") from error
    try:
        return from_networkx(graph, path)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def _number(node: object) -> int:
    """Return the rank that a node stands for; -1 for none."""
    if isinstance(node, str):
        return int(node) if node.isascii() and node.isdigit() else -1
    try:
        number = int(node)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return -1
    return int(number) if number == node else -1
