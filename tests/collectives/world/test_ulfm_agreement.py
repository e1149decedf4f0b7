"""An agreement is the conjunction of all ranks, also where MPI has lost the values that they contributed."""

from __future__ import annotations

import pytest

from mpitrain.collectives.world.ulfm_agreement import FAILED, SUCCEEDED, agreed


class Comm:
    """A communicator of two ranks.

    Args:
        other: The outcome of the other rank.
        lost: The result that this rank gets instead of the right one.
    """

    def __init__(self, other: bool, lost: int | None) -> None:
        self._other, self._lost, self.is_revoked, self.n_agreements = other, lost, not other, 0

    def Agree(self, value: int) -> int:
        self.n_agreements += 1
        return value & (SUCCEEDED if self._other else FAILED) if self._lost is None else self._lost

    def Revoke(self) -> None:
        self.is_revoked = True

    def Is_revoked(self) -> bool:
        return self.is_revoked


@pytest.mark.parametrize("lost", [None, 0, 1, -1705140472], ids=lambda lost: "kept" if lost is None else f"lost={lost}")
@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("other", [True, False])
def test_an_agreement_is_the_conjunction_of_all_ranks_and_never_repeated(other, mine, lost):
    comm = Comm(other, lost)
    assert agreed(comm, mine) == (mine and other)
    assert comm.n_agreements == 1
    assert comm.is_revoked == (not (mine and other))
