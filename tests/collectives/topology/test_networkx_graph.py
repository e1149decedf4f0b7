"""Graphs of networkx and files of graphs: edges, directions, and one line for every damage."""

import os
import subprocess
import sys

import networkx as nx
import pytest

from mpitrain.collectives.topology import networkx_graph
from mpitrain.collectives.topology.networkx_graph import from_networkx, is_graph_file, read_graph
from mpitrain.errors import UsageError

WHEEL = nx.wheel_graph(6)
CIRCLE = nx.cycle_graph(5, create_using=nx.DiGraph)
WRITERS = {
    ".edgelist": lambda graph, path: nx.write_edgelist(graph, path, data=False),
    ".adjlist": nx.write_adjlist,
    ".gml": nx.write_gml,
    ".graphml": nx.write_graphml,
}


def test_an_edge_sends_from_its_first_node_and_an_undirected_one_both_ways():
    assert from_networkx(nx.DiGraph([(0, 1), (0, 2), (2, 1)])).steps == (((1, 2), (), (1,)),)
    assert from_networkx(nx.Graph([(0, 1), (0, 2)])).steps == (((1, 2), (0,), (0,)),)


def test_loops_and_repeated_edges_are_dropped():
    assert from_networkx(nx.MultiGraph([(0, 0), (0, 1), (0, 1)])).steps == (((1,), (0,)),)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_gives_the_graph_that_was_written(tmp_path, suffix):
    path = str(tmp_path / f"wheel{suffix}")
    WRITERS[suffix](WHEEL, path)
    assert is_graph_file(path)
    assert read_graph(path).steps == from_networkx(WHEEL).steps
    assert read_graph(path).name == path


@pytest.mark.parametrize("suffix", [".gml", ".graphml"])
def test_a_file_of_a_directed_graph_keeps_the_directions(tmp_path, suffix):
    path = str(tmp_path / f"circle{suffix}")
    WRITERS[suffix](CIRCLE, path)
    assert read_graph(path).steps == (((1,), (2,), (3,), (4,), (0,)),)


def test_the_order_of_nodes_in_a_file_makes_no_difference(tmp_path):
    path = tmp_path / "path.edgelist"
    path.write_text("2 1\n1 0\n")
    assert read_graph(str(path)).steps == (((1,), (0, 2), (1,)),)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"0 x\n", b"<graphml", b"graph [ node [ id 1 ] ]", b"0 1\n1 7\n"]
)
def test_a_file_that_is_no_graph_is_refused_with_its_name(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"bad{suffix}"):
        read_graph(str(path))


def test_a_file_that_is_missing_or_huge_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"cannot read the graph .*none.gml"):
        read_graph(str(tmp_path / "none.gml"))
    path = tmp_path / "huge.edgelist"
    path.write_text("0 1\n")
    os.truncate(path, networkx_graph.MAX_BYTES + 1)
    with pytest.raises(UsageError, match=r"huge.edgelist has more than 64 MiB"):
        read_graph(str(path))


def test_networkx_is_not_imported_without_need():
    code = "import sys, mpitrain.algorithms.gossip.adpsgd, mpitrain.trainer.plan; print('networkx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
