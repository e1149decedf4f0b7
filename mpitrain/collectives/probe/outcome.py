"""The operations and memories that are probed, and the outcome of an operation."""

from __future__ import annotations

from dataclasses import dataclass

OPERATIONS = (
    "send",
    "all-reduce",
    "window creation",
    "put",
    "get",
    "accumulate",
    "fetch_and_op",
    "rput",
    "rget",
    "lock",
)
MEMORIES = ("host", "pinned", "device")
"""Managed memory is left out: nothing here allocates it, and the driver moves it while MPI uses it."""

WINDOW_CREATION = "window creation"
NEED_A_WINDOW = OPERATIONS[OPERATIONS.index(WINDOW_CREATION) + 1 :]


@dataclass(frozen=True)
class Outcome:
    """The outcome of an operation.

    Attributes:
        verdict: ``ok``, ``wrong`` (other bytes arrived), ``error``, ``crashed``, ``hung`` or ``not tried``.
        detail: The first line of the error, the signal, or the reason why the operation was not tried.
        latency_us: The latency of 8 bytes, or the time to create and free a window of 16 MiB.
        gb_per_s: The rate at 16 MiB, for operations that transfer bytes.
    """

    verdict: str
    detail: str = ""
    latency_us: float | None = None
    gb_per_s: float | None = None


Matrix = dict[str, dict[str, Outcome]]
"""Outcomes by operation and memory."""
