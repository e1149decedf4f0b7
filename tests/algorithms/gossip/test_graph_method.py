"""The graph of a method: names, files, networkx graphs; what is refused; and that any graph trains."""

import networkx as nx
import numpy as np
import pytest
from support.quadratic import simulate, slope

from mpitrain import UsageError
from mpitrain.algorithms import ADPSGD, DPSGD
from mpitrain.algorithms import StochasticGradientPush as SGP
from mpitrain.collectives.topology.graphs import topology

TWO_PAIRS = nx.Graph([(0, 1), (2, 3)])
ONE_WAY = nx.DiGraph([(0, 1), (1, 2)])


@pytest.mark.parametrize("method", [DPSGD, ADPSGD, SGP])
def test_a_networkx_graph_is_the_named_one_with_its_edges(method):
    assert method(topology=nx.cycle_graph(5)).graph(5).digest == topology("ring", 5).digest
    assert method(topology=topology("torus", 6)).graph(6) == topology("torus", 6)
    assert method(topology="torus:3x2").graph(6).name == "torus:3x2"


def test_the_settings_of_a_run_name_the_graph():
    assert DPSGD().settings() == {"topology": "ring"}
    assert DPSGD(topology=nx.cycle_graph(4)).settings() == {"topology": "networkx graph"}


def test_ranks_with_other_graphs_have_other_settings():
    """Ranks compare the text of each setting before they train."""
    assert repr(DPSGD(topology=nx.cycle_graph(4))) != repr(DPSGD(topology=nx.path_graph(4)))
    assert repr(DPSGD(topology=nx.cycle_graph(4))) == repr(DPSGD(topology=nx.cycle_graph(4)))


def test_workers_on_any_graph_agree_on_the_best_mean():
    """The Petersen graph: 10 workers, 3 neighbours each, second eigenvalue 1/2 with these weights."""
    petersen, b = nx.petersen_graph(), np.linspace(-1, 1, 10)[:, None]
    simulation = simulate(DPSGD(topology=petersen), 10, start=np.ones(1), eta=0.0)
    start = np.random.default_rng(0).normal(size=(10, 1))
    for worker, x in zip(simulation.workers, start, strict=True):
        worker.x.local[:] = x
    simulation.run(20)
    assert np.abs(simulation.x() - start.mean()).max() < np.abs(start).sum() * 0.5**20
    simulation = simulate(DPSGD(topology=petersen), 10, start=np.ones(1), eta=0.05, gradient=slope(1.0, b)).run(400)
    np.testing.assert_allclose(simulation.x().mean(0), b.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "graph", "size", "message"),
    [
        (DPSGD, "rnig", 4, "topology must be the name of a graph.*not 'rnig': did you mean ring"),
        (DPSGD, 3, 4, "topology must be the name of a graph.*not 3"),
        (SGP, "", 4, "topology must be the name of a graph"),
        (SGP, "hypercube", 6, "sgp: topology=hypercube: a hypercube needs a power of two, not 6"),
        (ADPSGD, "torus:2x2", 6, "adpsgd: topology=torus:2x2: 2 x 2 is not 6 ranks"),
        (DPSGD, nx.cycle_graph(4), 3, "the graph networkx graph is one of 4 workers, but there are 3"),
        (DPSGD, nx.path_graph(["a", "b"]), 2, "dpsgd: topology: the nodes .* must be the numbers 0 to 1"),
        (DPSGD, nx.path_graph([1, 2, 3]), 3, "the nodes of a graph of 3 ranks must be the numbers 0 to 2"),
        (DPSGD, nx.DiGraph([(0, 1), (1, 2), (2, 0)]), 3, "dpsgd needs an undirected graph"),
        (SGP, ONE_WAY, 3, "sgp: the graph networkx graph is not connected"),
        (DPSGD, TWO_PAIRS, 4, "not connected: some workers would never hear of others"),
        (ADPSGD, TWO_PAIRS, 4, "not connected"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", None) or "graph",
)
def test_a_graph_that_does_not_fit_is_refused(method, graph, size, message):
    with pytest.raises(UsageError, match=message):
        method(topology=graph).graph(size)


def test_the_direction_of_an_edge_makes_no_difference_to_pairwise_averages():
    assert ADPSGD(topology=ONE_WAY).graph(3).union.size == 3
