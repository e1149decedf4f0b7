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
    """Report a problem once, and end all ranks; return the exit code.

    Args:
        text: One line.
        on_all_ranks: Whether every rank is sure to find the problem, as with a wrong argument: only rank 0 reports it.
        code: The exit code.
    """
    return end_with_line(text, code, on_all_ranks=on_all_ranks, after_death=code == EXIT_FAILURE)


def exit_code(result: Mapping[str, Any]) -> int:
    """Return the exit code of a run: 0, ``EXIT_STOPPED``, or 128 + the number of SIGTERM or SIGINT.

    Args:
        result: Its result document.
    """
    if result["complete"]:
        return 0
    number = int(result["stopped_by"])
    return EXIT_STOPPED if number == signal.SIGUSR1 else 128 + number
