"""An agreement is the conjunction of all ranks, also where MPI has lost the values that they contributed."""

from __future__ import annotations

from functools import reduce

import pytest

from mpitrain.collectives.world.ulfm_agreement import agreed


class Comm:
    """A communicator whose agreements lose all values a few times.

    Args:
        others: The outcomes of the other ranks.
        n_losses: The number of agreements without a result.
    """

    def __init__(self, others: list[bool], n_losses: int) -> None:
        self._others, self.n_losses, self.n_agreements = others, n_losses, 0

    def Agree(self, value: int) -> int:
        self.n_agreements += 1
        if self.n_agreements <= self.n_losses:
            return 0
        return reduce(int.__and__, [Contribution(outcome).value for outcome in self._others], value)


class Contribution:
    """Records what a rank of a given outcome contributes to an agreement."""

    def __init__(self, succeeded: bool) -> None:
        self.value = 0
        agreed(self, succeeded)

    def Agree(self, value: int) -> int:
        self.value = value
        return value


@pytest.mark.parametrize("n_losses", [0, 1, 3])
@pytest.mark.parametrize("mine", [True, False])
@pytest.mark.parametrize("others", [[True, True], [True, False], [False, False]])
def test_an_agreement_is_the_conjunction_of_all_ranks(others, mine, n_losses):
    comm = Comm(others, n_losses)
    assert agreed(comm, mine) == (mine and all(others))
    assert comm.n_agreements == n_losses + 1
