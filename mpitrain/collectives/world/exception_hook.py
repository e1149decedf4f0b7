"""The hook that reports an uncaught exception of a rank and ends all ranks."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from mpitrain.collectives.world.ending import end_with_line, exit_in_order
from mpitrain.errors import UsageError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

PACKAGE = Path(__file__).resolve().parents[2]


class ExceptionHook:
    """The hook that ends all ranks after an uncaught exception.

    It prints a ``UsageError`` as one line, and other exceptions with a traceback. Without the hook, the other ranks
    would wait for this rank until the time limit of the job.

    Attributes:
        ranks: An object with ``rank``, ``size`` and ``abort(code)``; None before MPI has started. With a single rank,
            Python's own hook prints the traceback.
    """

    def __init__(self) -> None:
        self.ranks: Any = None
        self._hook_before = sys.excepthook

    def install(self) -> None:
        """Replace Python's hooks for uncaught exceptions in any thread. Local."""
        sys.excepthook = self._report
        threading.excepthook = self._report_in_thread

    def _report(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        is_interactive = hasattr(sys, "ps1") or sys.flags.interactive
        if isinstance(error, UsageError) and not is_interactive:
            code = end_with_line(f"{error}{place_in_script(trace)}", EXIT_USAGE, on_all_ranks=error.on_all_ranks)
            exit_in_order(code)
        if self.ranks is None or self.ranks.size == 1:
            self._hook_before(kind, error, trace)
            return
        text = "".join(traceback.format_exception(kind, error, trace))
        sys.stdout.flush()
        sys.stderr.write(f"rank {self.ranks.rank} of {self.ranks.size} failed:\n{text}")
        sys.stderr.flush()
        self.ranks.abort(EXIT_INTERRUPTED if issubclass(kind, KeyboardInterrupt) else EXIT_FAILURE)

    def _report_in_thread(self, args: threading.ExceptHookArgs) -> None:
        if self.ranks is None or self.ranks.size == 1 or isinstance(args.exc_value, UsageError):
            threading.__excepthook__(args)
            if self.ranks is not None and self.ranks.size > 1:
                self.ranks.abort(EXIT_USAGE)
        elif args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
            self._report(args.exc_type, args.exc_value, args.exc_traceback)


def place_in_script(trace: TracebackType | None) -> str:
    """Return the line of the user's program that caused an error, in parentheses; empty if there is none."""
    frames = traceback.extract_tb(trace)
    own = [
        frame
        for frame in frames
        if PACKAGE not in Path(frame.filename).parents
        and not (frame.name == "__init__" and frame.filename.startswith("<"))  # of a dataclass
    ]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
