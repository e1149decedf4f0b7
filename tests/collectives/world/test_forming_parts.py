"""Ranks that wait in a collective without the dead one are released by those that have learned of the death."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpitrain.collectives.world import fault_tolerance
from mpitrain.collectives.world.fault_tolerance import FaultTolerance, ULFMFaultTolerance
from mpitrain.collectives.world.ranks import RankInfo, revoke_all
from mpitrain.collectives.world.world import revoke
from mpitrain.errors import RankFailed


class Comm:
    """A communicator of four ranks, in which a collective fails that ``fails`` names.

    Attributes:
        is_revoked: Whether ``Revoke`` was called.
    """

    def __init__(self, fails: str = "", node: Comm | None = None) -> None:
        self.is_revoked, self._fails, self._node = False, fails, node

    def _call(self, name, result):
        from mpi4py import MPI

        if name == self._fails:
            raise MPI.Exception(MPI.ERR_OTHER)
        return result

    def Get_rank(self):
        return 0

    def Get_size(self):
        return 4

    def Split(self, color, key):
        return self._call("Split", self._node)

    def allgather(self, value):
        return self._call("allgather", [value] * 4)

    def Revoke(self):
        self.is_revoked = True

    def Is_revoked(self):
        return self.is_revoked


@pytest.fixture
def of_run() -> RankInfo:
    facts = {"rank": 0, "size": 4, "local_rank": 0, "local_size": 2, "node": 0, "n_nodes": 2, "n_rails": 2}
    lists = {"node_ranks": [0, 1], "nodes": [0, 0, 1, 1], "hosts": ["a"] * 4}
    return RankInfo(comm=None, node_comm=None, rail_comm=None, cores=1.0, **facts, **lists)


@pytest.mark.parametrize("fails_here", [True, False], ids=["here", "elsewhere"])
def test_no_rank_uses_the_communicator_of_its_node_if_another_one_has_none(of_run, fails_here):
    told = []

    def agree(succeeded: bool) -> bool:
        told.append(succeeded)
        return False

    with pytest.raises(RankFailed):
        of_run.part(Comm(fails="Split" if fails_here else "", node=Comm()), agree)
    assert told == [not fails_here]


def test_a_rank_that_fails_later_revokes_the_communicators_in_which_others_may_wait(of_run):
    from mpi4py import MPI

    node = Comm()
    whole = Comm(fails="allgather", node=node)
    with pytest.raises(MPI.Exception):
        of_run.part(whole, lambda succeeded: succeeded)
    assert whole.is_revoked
    assert node.is_revoked


def test_a_part_is_revoked_with_its_nodes_and_rails():
    from mpi4py import MPI

    part = SimpleNamespace(comm=Comm(), node_comm=Comm(), rail_comm=Comm())
    revoke(part)
    assert part.comm.is_revoked
    assert part.node_comm.is_revoked
    assert part.rail_comm.is_revoked
    revoke_all(MPI.COMM_NULL)  # a rank without a rail


@pytest.mark.parametrize("is_revoked", [True, False], ids=["revoked", "not revoked"])
def test_an_error_comes_from_a_death_of_which_only_another_rank_knows(monkeypatch, is_revoked):
    """That rank has revoked the communicator. Open MPI then reports an error in one of several requests."""
    from mpi4py import MPI

    monkeypatch.setattr(fault_tolerance, "LONGEST_DETECTION_SECONDS", 0.1)
    comm = Comm()
    comm.is_revoked = is_revoked
    detector = SimpleNamespace(dead=frozenset(), poll=lambda: None)
    tolerance = ULFMFaultTolerance(comm, detector, [0, 1, 2, 3])
    assert tolerance.comes_from_death(MPI.Exception(MPI.ERR_IN_STATUS)) == is_revoked
    assert not FaultTolerance(comm).comes_from_death(MPI.Exception(MPI.ERR_IN_STATUS))


def test_a_death_while_the_communicator_shrinks_repeats_the_shrinking():
    from mpi4py import MPI

    made = Comm()
    made.Agree = lambda value: value

    class Dying(Comm):
        """Its first shrinking fails on all ranks."""

        n_shrinks = 0

        def Agree(self, succeeded):
            raise MPI.Exception(MPI.ERR_PROC_FAILED)

        def Shrink(self):
            self.n_shrinks += 1
            if self.n_shrinks == 1:
                raise MPI.Exception(MPI.ERR_PROC_FAILED)
            return made

    dying = Dying()
    tolerance = ULFMFaultTolerance(dying, SimpleNamespace(dead=frozenset({3}), poll=lambda: None), [0, 1, 2, 3])
    assert tolerance.run_on_survivors(lambda comm: comm) is made
    assert dying.n_shrinks == 2
