"""Errors that a user can cause or must know of, and the timing of their last messages."""

import os
import re

_CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(9), *range(11, 32), *range(127, 160))}
# Marks of the direction of writing, with which a text shows other letters than it has.
_DIRECTIONS = (0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_CONTROL |= {code: f"\\u{code:04x}" for code in _DIRECTIONS}

OUTPUT_SECONDS = 0.3
"""Pause of a rank between its last message and `MPI_Abort`: a launcher that ends the ranks (MPICH's Hydra) may drop
output written a moment before."""

TURN_SECONDS = 0.5
"""Delay between two ranks that may both end all ranks: Open MPI's launcher may hang when two do so at once after the
death of a third one."""


EXIT_TIMEOUT = 4
"""Of a job that ends because a rank has waited for too long (``collectives.world.watchdog``)."""


class UsageError(ValueError):
    """A mistake of the user, not of mpitrain.

    Its text is one line that names the mistake and the way out. The command line prints that line on one rank and exits
    with code 2; all other exceptions show a traceback.
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(" ".join(text.split())))


def printable(text: str) -> str:
    """Return a text for a terminal, with control characters as escapes: names in files may contain any."""
    return text.translate(_CONTROL)


def reason(error: BaseException) -> str:
    """Return why a file cannot be used, in a few words, where HDF5 writes a hundred."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    number = getattr(error, "errno", None)
    found = re.search(r"error message = '([^']*)'", str(error))
    return os.strerror(number) if number else found.group(1) if found else str(error)


class RankFailed(RuntimeError):
    """The death of a rank without which an operation cannot complete.

    Raised only where the launcher lets the other ranks survive (``world.fault_tolerance``); elsewhere they end too.
    """
