"""Messages to people: the logger ``mpitrain`` and the handler that writes its records to standard error.

    level       line of rank 0             line of rank R
    INFO        mpitrain: TEXT             mpitrain (rank R): TEXT
    WARNING     mpitrain: warning: TEXT    mpitrain: warning (rank R): TEXT
    ERROR       mpitrain: error: TEXT      mpitrain: error (rank R): TEXT
    CRITICAL    mpitrain: TEXT             mpitrain (rank R): TEXT

CRITICAL is for what happens to the run, such as the death of a rank. Below ERROR, only the records of rank 0 are
written, with two exceptions: records that concern one rank, ``logger.warning(text, extra=ANY_RANK)``, are written on
every rank, and so are all records after ``logging.getLogger("mpitrain").setLevel("DEBUG")``. Records propagate. They
have the attribute ``rank``, for formats such as ``%(rank)d``.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from mpitrain.errors import printable

ANY_RANK = {"any_rank": True}
"""For ``extra``: the record is written whichever rank logs it."""

_LABELS = {logging.WARNING: ": warning", logging.ERROR: ": error"}


class LineFormatter(logging.Formatter):
    """The format of log messages: one line with the program's name, the level and the rank (unless it is 0)."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for a record."""
        rank = getattr(record, "rank", 0)
        where = f" (rank {rank})" if rank else ""
        return f"mpitrain{_LABELS.get(record.levelno, '')}{where}: {printable(record.getMessage())}"


class StderrHandler(logging.Handler):
    """A handler that writes to ``sys.stderr``, unless the application itself shows the record on the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record and flush it."""
        if _is_shown_by_application(record):
            return
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _is_shown_by_application(record: logging.LogRecord) -> bool:
    handlers = (*logger.handlers, *logging.getLogger().handlers)
    streams = [
        handler.stream
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and record.levelno >= handler.level
    ]
    return any(stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__) for stream in streams)


def set_rank(rank: int) -> None:
    """Set the rank that log messages show; it is 0 at first. Local."""
    _RankFilter.rank = rank


class _RankFilter(logging.Filter):
    """Gives every record its rank, and drops those for which rank 0 speaks."""

    rank = 0

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = self.rank
        is_of_rank = record.levelno >= logging.ERROR or getattr(record, "any_rank", False)
        return self.rank == 0 or is_of_rank or logger.isEnabledFor(logging.DEBUG)


logger = logging.getLogger("mpitrain")
"""The logger of all modules."""


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal; False for None and for a closed stream."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError, OSError):
        return False


@contextlib.contextmanager
def decoration(what: str) -> Iterator[None]:
    """Turn an error inside the block into a logged warning, so that a plot or a progress bar never ends a run. Local.

    Args:
        what: The part that is missing after an error, for the message.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(Exception):  # standard error may be what is broken
            logger.warning("%s is missing (%s); the result is not affected", what, reason)


def _install() -> None:
    handler = StderrHandler()
    handler.setFormatter(LineFormatter())
    logger.addHandler(handler)
    logger.addFilter(_RankFilter())
    logger.setLevel(logging.INFO)


_install()
