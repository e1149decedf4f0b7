"""Exit codes, and the one line with which a command fails."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

from mpitrain.collectives.world.ending import end_with_line

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_STOPPED = 3
"""A run that SIGUSR1 has stopped and that --resume continues."""
EXIT_DIVERGED = 5
"""A run whose loss stays NaN or infinite (``--on-nonfinite stop``)."""


def fail(text: str, *, on_all_ranks: bool = False, code: int = EXIT_USAGE) -> int:
    """Print a problem once and end all ranks; in a single process, return the exit code.

    Args:
        text: The problem, in one line.
        on_all_ranks: Whether all ranks have the same problem, for example an invalid argument. If so, only rank 0
            prints it.
        code: The exit code.
    """
    return end_with_line(text, code, on_all_ranks=on_all_ranks, after_death=code == EXIT_FAILURE)


def exit_code(result: Mapping[str, Any]) -> int:
    """Return the exit code of a run: 0, ``EXIT_STOPPED``, or 128 + the number of SIGTERM or SIGINT."""
    if result["complete"]:
        return 0
    number = int(result["stopped_by"])
    return EXIT_STOPPED if number == signal.SIGUSR1 else 128 + number
