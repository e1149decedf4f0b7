"""Methods on a graph of workers: the setting that chooses the graph, and what the graph must be like."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mpitrain.algorithms.base.method import Method
from mpitrain.algorithms.base.settings import Setting
from mpitrain.collectives.topology.graphs import TOPOLOGIES, Topology, topology
from mpitrain.collectives.topology.networkx_graph import (
    from_networkx,
    is_graph_file,
    is_networkx_graph,
    read_graph,
)
from mpitrain.errors import UsageError, suggestion


@dataclass(frozen=True, kw_only=True)
class Graph(Setting):
    """A setting that is a graph of workers: a name with options, a file, a networkx graph or a ``Topology``."""

    _kind: ClassVar[str] = "a graph"

    def describe(self) -> str:
        """Return a description of the valid values."""
        return f"{' | '.join(TOPOLOGIES)} | FILE"

    def _parsed(self, text: str) -> str:
        return text

    def _accepts(self, value: Any) -> bool:
        if isinstance(value, str):
            return is_graph_file(value) or value.strip().partition(":")[0] in TOPOLOGIES
        return isinstance(value, Topology) or is_networkx_graph(value)

    def _wanted(self) -> str:
        return "the name of a graph, such as ring or torus:4x2, a file (.edgelist, .adjlist, .gml, .graphml) or a graph"

    def _hint(self, value: Any) -> str:
        return f": {suggestion(value, TOPOLOGIES)}" if isinstance(value, str) else ""


def graph(default: str, help: str) -> Any:
    """Declare a setting that is a graph of workers; see ``Setting`` for the arguments."""
    return dataclasses.field(default=default, metadata={"setting": Graph(default=default, help=help)})


def graph_named(text: str, size: int | None, *, default: int) -> Topology:
    """Return the graph with a given name, or the graph in a file.

    Args:
        text: The name with its options, or the file.
        size: The number of workers. With None, a file determines it; for a name, it is ``default``.
        default: The number of workers for a name if ``size`` is None.

    Raises:
        UsageError: There is no graph with this name and size.
    """
    try:
        found = read_graph(text) if is_graph_file(text) else topology(text, default if size is None else size)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if size is not None and found.size != size:
        raise UsageError(f"the graph {found.name} is one of {found.size} workers, not {size}")
    return found


class GraphMethod(Method):
    """A method whose workers exchange along the edges of a graph, given by the setting ``topology``.

    Attributes:
        topology: The name of a graph, or the graph.
        is_undirected: Whether every edge must exist in both directions.
    """

    topology: Any
    is_undirected: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.topology
        try:
            if is_networkx_graph(value):
                value = from_networkx(value)
            elif isinstance(value, str) and is_graph_file(value):
                value = read_graph(value)
        except ValueError as error:
            raise UsageError(f"{self.name}: topology: {error}") from None
        object.__setattr__(self, "topology", value)

    def settings(self) -> dict[str, Any]:
        """Return the settings by name, with the name of the graph in place of the graph."""
        value = self.topology
        return {**super().settings(), "topology": value.name if isinstance(value, Topology) else value}

    def graph(self, size: int) -> Topology:
        """Return the graph between ``size`` workers.

        Raises:
            UsageError: There is no graph with this name and size, or it is not connected, or not symmetric although the
                method requires it.
        """
        try:
            found = self.topology if isinstance(self.topology, Topology) else topology(self.topology, size)
        except ValueError as error:
            raise UsageError(f"{self.name}: topology={self.topology}: {error}") from None
        if found.size != size:
            raise UsageError(
                f"{self.name}: the graph {found.name} is one of {found.size} workers, but there are {size}"
            )
        if self.is_undirected and not found.is_symmetric:
            raise UsageError(
                f"{self.name} needs an undirected graph, and {found.name} is directed: use sgp, or another"
            )
        if not self._is_connected(found):
            raise UsageError(
                f"{self.name}: the graph {found.name} is not connected: some workers would never hear of others"
            )
        return found

    def check_size(self, size: int) -> None:
        """Check that there is a graph between ``size`` workers. Local."""
        self.graph(size)

    def _is_connected(self, found: Topology) -> bool:
        """Return whether the vector of every worker reaches all others."""
        return found.is_connected
