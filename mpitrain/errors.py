"""What a user can get wrong, and how the user gets to hear of it."""

import os
import re

OUTPUT_SECONDS = 0.3
"""How long a rank waits between its last words and `MPI_Abort`: a launcher that ends the ranks (MPICH's Hydra) may drop
what they wrote a moment before."""

TURN_SECONDS = 0.5
"""How much later than the rank before it one ends all ranks, where several might: Open MPI's launcher may hang when two
do so at once after a third one has died."""


class UsageError(ValueError):
    """A mistake in what was asked for, not in mpitrain.

    Its text is one line that says what is wrong and what to do about it. The command line prints that line on one rank
    and exits with code 2; everything else shows a traceback.
    """

    def __init__(self, text: str) -> None:
        super().__init__(" ".join(text.split()))


def reason(error: Exception) -> str:
    """Why a file cannot be used, in a few words; HDF5 takes a hundred."""
    number = getattr(error, "errno", None)
    found = re.search(r"error message = '([^']*)'", str(error))
    return os.strerror(number) if number else found.group(1) if found else str(error)


class RankFailed(RuntimeError):
    """A rank has died, and what was begun cannot be done without it.

    It is raised only where the launcher lets the other ranks live (``world.fault_tolerance``); elsewhere they end too.
    """
