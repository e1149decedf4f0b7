"""Errors that a user can cause or must know of, and the pauses around the last messages of a run."""

import difflib
import os
import re
import shlex
from collections.abc import Iterable

_CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(9), *range(11, 32), *range(127, 160))}
# Marks of the direction of writing, with which a text shows other letters than it has.
_DIRECTIONS = (0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_CONTROL |= {code: f"\\u{code:04x}" for code in _DIRECTIONS}

OUTPUT_SECONDS = 0.3
"""Pause of a rank between its last message and `MPI_Abort`: a launcher that ends the ranks (MPICH's Hydra) may drop
output written a moment before."""

MOST_LISTED = 12
"""The most names that a message lists."""

TURN_SECONDS = 0.5
"""Delay between two ranks that may both end all ranks: Open MPI's launcher may hang when two do so at once after the
death of a third one."""


EXIT_TIMEOUT = 4
"""Of a job that ends because a rank has waited for too long (``collectives.world.watchdog``)."""


class UsageError(ValueError):
    """A mistake of the user, not of mpitrain.

    The text is one line that names the mistake and a remedy. The command line prints this line on one rank and exits
    with code 2. All other exceptions show a traceback.

    Args:
        text: The line.
        on_all_ranks: Whether all ranks raise the same error. If so, only rank 0 prints it.
    """

    def __init__(self, text: str, *, on_all_ranks: bool = False) -> None:
        super().__init__(printable(" ".join(text.split())))
        self.on_all_ranks = on_all_ranks


def unknown(what: str, value: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return the message for a name that does not exist.

    Args:
        what: The kind of name, such as ``algorithm``.
        value: The unknown name.
        known: The names that exist.
        otherwise: The end of the message: where the names are listed, or what else is accepted.
    """
    return f"unknown {what} {value!r}: {suggestion(value, known, otherwise=otherwise)}"


def suggestion(value: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return ``did you mean NAME?`` if a known name is similar; otherwise list the known names, if they are few.

    Args:
        value, known, otherwise: See ``unknown``.
    """
    names = list(known)
    if close := nearest(value, names):
        return f"did you mean {close}?"
    parts = [f"it must be {'one of ' * (len(names) > 1)}{', '.join(names)}"] if 0 < len(names) <= MOST_LISTED else []
    return ", or ".join([*parts, *([otherwise] if otherwise else [])]) or "there is none"


def nearest(value: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to a misspelt one, ignoring case; None if none is similar."""
    plain = {name.casefold().replace("_", "-"): name for name in reversed(list(known))}
    close = difflib.get_close_matches(value.casefold().replace("_", "-"), plain, n=1)
    return plain[close[0]] if close else None


def option_in_words(flag: str, value: object) -> str:
    """Return an option and its value as one types them in a shell: ``--out runs/a``, ``--out='two words'``.

    An equals sign joins them if the value needs quotes, or begins with a dash and could be taken for another option.
    """
    text = shlex.quote(str(value))
    return f"{flag} {text}" if text == str(value) and not text.startswith("-") else f"{flag}={text}"


def printable(text: str) -> str:
    """Return a text with its control characters escaped, so that a terminal can show it."""
    return text.translate(_CONTROL)


def reason(error: BaseException) -> str:
    """Return, in a few words, why a file cannot be used. The messages of HDF5 itself are long."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    number = getattr(error, "errno", None)
    found = re.search(r"error message = '([^']*)'", str(error))
    return os.strerror(number) if number else found.group(1) if found else str(error)


class Diverged(RuntimeError):
    """The error that ends a run whose loss stays NaN or infinite; the command line exits with code 5."""


class RankFailed(RuntimeError):
    """The error of an operation that cannot complete because a rank has died.

    It is raised only if the launcher lets the other ranks survive (``world.fault_tolerance``). Otherwise all ranks end.
    """
