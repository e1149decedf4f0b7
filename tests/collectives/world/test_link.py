"""The constants of the network between nodes: measured, stored, and the same on all ranks."""

import json
import math
from dataclasses import asdict

import pytest

from mpitrain.collectives.topology.allreduce_cost import Link

SOME = Link(latency=1e-6, overhead=2e-6, bandwidth=3e9, mpi_bandwidth=4e9, addition=5e9)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Store results in a folder of this test. Collective."""
    from mpitrain.collectives.world import link

    monkeypatch.setattr(link, "cache_root", lambda: tmp_path)
    return tmp_path


@pytest.mark.ranks(2, 3)
def test_all_ranks_get_the_same_measured_constants(two_nodes):
    from mpitrain.collectives.world.link import measure

    found = measure(two_nodes.comm, two_nodes.nodes)
    assert len(set(two_nodes.comm.allgather(found))) == 1
    assert all(math.isfinite(value) and value >= 0 for value in asdict(found).values())
    assert min(found.latency, found.bandwidth, found.mpi_bandwidth, found.addition) > 0


@pytest.mark.ranks(1, 2)
def test_there_is_nothing_to_measure_on_one_node(one_node):
    from mpitrain.collectives.world.link import measure

    assert measure(one_node.comm, one_node.nodes) is None


@pytest.mark.ranks(1, 2, 3)
def test_ranks_use_what_rank_0_has_stored(one_node, folder):
    from mpitrain.collectives.world import link

    assert link.known(one_node.comm) == (Link(), "assumed")
    if one_node.rank == 0:
        link.store(SOME)
    assert link.known(one_node.comm)[0] == SOME


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    "damage",
    [{"format": 0}, {"bandwidth": 0.0}, {"latency": -1.0}, {"latency": "1"}, {"latency": math.nan}, {"new": 1.0}],
)
def test_a_damaged_file_counts_as_none(one_node, folder, damage):
    from mpitrain.collectives.world import link

    link.store(SOME)
    (path,) = folder.glob("link/*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert link.known(one_node.comm) == (Link(), "assumed")


@pytest.mark.ranks(1)
def test_emulated_nodes_have_a_file_of_their_own(one_node, folder, monkeypatch):
    from mpitrain.collectives.world import link
    from mpitrain.collectives.world.ranks import EMULATED_NODES

    link.store(SOME)
    monkeypatch.setenv(EMULATED_NODES, "2")
    assert link.known(one_node.comm) == (Link(), "assumed")
