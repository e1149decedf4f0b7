"""Topologies: laws of every graph and size, and products, gaps and limits known in closed form."""

import itertools
import math

import numpy as np
import pytest

from mpitrain.collectives.topology.graphs import (
    TOPOLOGIES,
    Topology,
    bipartite_exponential,
    complete,
    erdos_renyi,
    exponential,
    grid,
    hypercube,
    one_peer_exponential,
    ring,
    star,
    topology,
    torus,
    uniform_peer,
)
from mpitrain.collectives.topology.mixing import (
    consensus_rate,
    is_doubly_stochastic,
    mixing_matrix,
    period_matrix,
    spectral_gap,
)

ANY_SIZE = sorted(set(TOPOLOGIES) - {"hypercube"})
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17)
EVERY = [(name, size) for name in ANY_SIZE for size in SIZES] + [("hypercube", 2**k) for k in range(6)]
every = pytest.mark.parametrize(("name", "size"), EVERY)

# The digraph of unequal degrees on which x alone goes wrong: 0 -> 1, 2, 3; 1 -> 2; 2 -> 3; 3 -> 0.
IRREGULAR = Topology("irregular", 4, (((1, 2, 3), (2,), (3,), (0,)),))


# ---- laws --------------------------------------------------------------------------------------------------


@every
def test_in_and_out_neighbours_are_the_same_edges(name: str, size: int) -> None:
    graph = topology(name, size)
    for step in range(graph.period):
        out = {(i, j) for i in range(size) for j in graph.out_neighbours(i, step)}
        into = {(i, j) for j in range(size) for i in graph.in_neighbours(j, step)}
        assert out == into
        assert all(i != j for i, j in out)


@every
def test_graphs_are_connected_and_periodic(name: str, size: int) -> None:
    graph = topology(name, size)
    assert graph.is_connected
    assert all(graph.out_neighbours(i, 3) == graph.out_neighbours(i, 3 + graph.period) for i in range(size))


@every
def test_a_name_reproduces_its_graph(name: str, size: int) -> None:
    graph = topology(name, size)
    assert topology(graph.name, size) == graph
    assert topology(graph.name, size).digest == graph.digest


@every
def test_rows_or_columns_of_weights_sum_to_one(name: str, size: int) -> None:
    graph = topology(name, size)
    for step in range(graph.period):
        pull, push = mixing_matrix(graph, step, "uniform"), mixing_matrix(graph, step, "push")
        np.testing.assert_allclose(pull.sum(axis=1), 1, rtol=1e-14)
        np.testing.assert_allclose(push.sum(axis=0), 1, rtol=1e-14)
        for i, j in itertools.product(range(size), repeat=2):
            edge = i == j or j in graph.in_neighbours(i, step)
            assert (pull[i, j] > 0) == (push[i, j] > 0) == edge
        if graph.is_symmetric:
            metropolis = mixing_matrix(graph, step, "metropolis")
            assert is_doubly_stochastic(metropolis)
            assert (metropolis == metropolis.T).all()


@every
def test_periods_reach_consensus(name: str, size: int) -> None:
    assert consensus_rate(topology(name, size)) < 1 - 1e-3


def test_no_two_topologies_of_a_size_have_the_same_digest() -> None:
    digests = {topology(name, 16).digest for name in TOPOLOGIES} | {ring(17).digest, torus(16, 2, 8).digest}
    assert len(digests) == len(TOPOLOGIES) + 2
    assert all(len(digest) == 16 for digest in digests)
    assert ring(4).digest == Topology("other name", 4, ring(4).steps).digest


# ---- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 18))
def test_degrees_are_those_of_the_definitions(size: int) -> None:
    hops = math.floor(math.log2(size - 1)) + 1 if size > 1 else 0
    assert {len(exponential(size).out_neighbours(i)) for i in range(size)} == {hops}
    assert one_peer_exponential(size).period == max(1, hops)
    assert {len(ring(size).out_neighbours(i)) for i in range(size)} == {min(2, size - 1)}
    assert {len(complete(size).out_neighbours(i)) for i in range(size)} == {size - 1}
    assert sum(len(star(size, size - 1).out_neighbours(i)) for i in range(size)) == 2 * (size - 1)
    assert exponential(size).steps == one_peer_exponential(size).union.steps


def test_rectangles_are_near_to_square() -> None:
    assert [torus(n).name for n in (1, 7, 8, 12, 16)] == [f"torus:{s}" for s in ("1x1", "1x7", "2x4", "3x4", "4x4")]
    assert torus(12).out_neighbours(0) == (1, 3, 4, 8)
    assert grid(12).out_neighbours(0) == (1, 4)
    assert grid(12).out_neighbours(5) == (1, 4, 6, 9)
    assert topology("torus:4x2", 8) == torus(8, 4, 2) != torus(8)


@pytest.mark.parametrize("size", range(2, 18))
def test_bipartite_steps_are_matchings_of_odd_with_even_ranks(size: int) -> None:
    graph = bipartite_exponential(size)
    assert graph.is_symmetric
    for step in range(graph.period):
        peers = [graph.out_neighbours(i, step) for i in range(size)]
        assert sum(not p for p in peers) == size % 2
        assert max(map(len, peers)) == 1
        assert all((i + p[0]) % 2 == 1 for i, p in enumerate(peers) if p)
    assert graph.two_colouring() == tuple(i % 2 for i in range(size))


def test_two_colourings_exist_for_bipartite_graphs_only() -> None:
    assert ring(6).two_colouring() is not None
    assert ring(5).two_colouring() is None
    assert hypercube(8).two_colouring() is not None
    assert grid(15).two_colouring() is not None
    assert torus(16).two_colouring() is not None
    assert torus(15).two_colouring() is None


# ---- oracles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "error"), [(2, 0), (4, 0), (8, 0), (16, 0), (32, 0), (12, 1 / 24), (6, 1 / 12)])
def test_one_peer_exponential_averages_exactly_for_powers_of_two(size: int, error: float) -> None:
    """The product of floor(log2(n - 1)) + 1 steps, weights 1/2, against 1/n: off by .0417 for 12, .0833 for 6."""
    product = period_matrix(one_peer_exponential(size), "push")
    assert np.abs(product - 1 / size).max() == pytest.approx(error, abs=1e-15)


@pytest.mark.parametrize("size", range(3, 18))
def test_the_gap_of_a_ring(size: int) -> None:
    """Eigenvalues (1 + 2 cos(2 pi k / n)) / 3."""
    second = max(abs(1 + 2 * math.cos(2 * math.pi * k / size)) / 3 for k in range(1, size))
    assert spectral_gap(mixing_matrix(ring(size))) == pytest.approx(1 - second, abs=1e-12)
    assert consensus_rate(ring(size)) == pytest.approx(second, abs=1e-12)


@pytest.mark.parametrize("size", range(3, 18))
def test_the_gaps_of_complete_graph_and_star(size: int) -> None:
    assert spectral_gap(mixing_matrix(complete(size))) == pytest.approx(1, abs=1e-12)
    assert spectral_gap(mixing_matrix(star(size), weights="metropolis")) == pytest.approx(1 / size, abs=1e-12)


@pytest.mark.parametrize("dimension", range(1, 6))
def test_the_gap_of_a_hypercube(dimension: int) -> None:
    assert spectral_gap(mixing_matrix(hypercube(2**dimension))) == pytest.approx(2 / (dimension + 1), abs=1e-12)


def test_the_gap_of_a_torus() -> None:
    """W = I - L / 5 with the Laplacian eigenvalues of two circles added."""
    laplacian = [
        4 - 2 * math.cos(2 * math.pi * a / 3) - 2 * math.cos(2 * math.pi * b / 4) for a in range(3) for b in range(4)
    ]
    second = sorted(abs(1 - eigenvalue / 5) for eigenvalue in laplacian)[-2]
    assert spectral_gap(mixing_matrix(torus(12))) == pytest.approx(1 - second, abs=1e-12)


def test_push_needs_debiasing_on_an_irregular_digraph() -> None:
    x, w = np.array([4.0, 0, 0, 0]), np.ones(4)
    push = mixing_matrix(IRREGULAR, weights="push")
    for _ in range(200):
        x, w = push @ x, push @ w
    np.testing.assert_allclose(x, [1, 0.5, 1, 1.5], atol=1e-10)
    np.testing.assert_allclose(x / w, 1, atol=1e-10)
    assert w.sum() == pytest.approx(4, abs=1e-12)


def test_consensus_rate_of_a_digraph_is_the_rate_in_the_limit() -> None:
    push, rate = mixing_matrix(IRREGULAR, weights="push"), consensus_rate(IRREGULAR)
    x, w, spreads = np.array([4.0, 0, 0, 0]), np.ones(4), []
    for _ in range(41):
        spreads.append(np.abs(x / w - 1).max())
        x, w = push @ x, push @ w
    assert (spreads[40] / spreads[10]) ** (1 / 30) == pytest.approx(
        rate, rel=0.05
    )  # a complex pair oscillates around it


def test_pull_on_an_irregular_digraph_keeps_consensus_and_loses_the_mean() -> None:
    pull = mixing_matrix(IRREGULAR, weights="uniform")
    np.testing.assert_allclose(pull @ np.ones(4), 1, rtol=1e-14)
    assert not np.allclose(pull.sum(axis=0), 1)


def test_uniform_peer_draws_all_others_equally_and_never_itself() -> None:
    rng, size, draws = np.random.default_rng(5), 5, 20_000
    for rank in range(size):
        counts = np.bincount([uniform_peer(rng, rank, size) for _ in range(draws // size)], minlength=size)
        share = counts[np.arange(size) != rank] / (draws / size)
        assert counts[rank] == 0
        assert np.abs(share - 1 / 4).max() < 4 * math.sqrt(3 / 16 / (draws / size))


# ---- mistakes of a user -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "size", "says"),
    [
        ("rign", 4, "ring"),
        ("torus:3x3", 8, "nearest to a square"),
        ("torus:0x3", 8, "nearest to a square"),
        ("hypercube", 6, "power of two"),
        ("star:4", 4, "center"),
        ("ring:3", 4, "does not take"),
        ("torus:axb", 4, "numbers"),
        ("erdos_renyi:0.0", 4, "disconnected"),
        ("ring", 0, "at least one rank"),
    ],
)
def test_the_message_of_a_mistake_names_the_way_out(spec: str, size: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        topology(spec, size)


def test_matrices_refuse_unsuitable_graphs_and_weights() -> None:
    with pytest.raises(ValueError, match="push weights"):
        mixing_matrix(exponential(4), weights="metropolis")
    with pytest.raises(ValueError, match="consensus_rate"):
        spectral_gap(mixing_matrix(IRREGULAR, weights="push"))
    with pytest.raises(ValueError, match="uniform, metropolis or push"):
        mixing_matrix(ring(3), weights="even")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no peer"):
        uniform_peer(np.random.default_rng(0), 0, 1)
    with pytest.raises(ValueError, match="sorted"):
        Topology("loop", 2, (((0,), ()),))


def test_random_graphs_follow_their_seed() -> None:
    assert erdos_renyi(12, 0.4, 1) == erdos_renyi(12, 0.4, 1) != erdos_renyi(12, 0.4, 2)
    assert erdos_renyi(12, 0.4, 1).is_symmetric
    assert erdos_renyi(9, 1).steps == complete(9).steps
