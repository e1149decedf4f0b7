"""The shared parts of the benchmarks on ranks: rounds in which operations take turns, rows, and sizes as users type
them.

Operations that are compared are measured in turns, so that what disturbs the machine disturbs all of them. A figure is
the median over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain.errors import UsageError

if TYPE_CHECKING:
    from mpitrain.collectives.world.world import World

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
BYTES_OF_A_REPEAT = 2**18  # smaller vectors are called several times for one figure
MOST_CALLS = 256  # so many that it does not matter how far apart ranks leave the barrier before them
WARM_UPS = 2

Calls = int | Mapping[str, int]
"""How often an operation is called for one figure: the same number for all, or by name."""


def one_round(
    operations: Mapping[str, Callable[[], object]],
    n_calls: Calls,
    begin: Callable[[], object] | None = None,
) -> list[float]:
    """Time one call of each operation, one after the other.

    Args:
        operations: By name.
        n_calls: For one figure.
        begin: Called right before the clock starts: the barrier of operations that all ranks make at once.
    """
    seconds = []
    for name, operation in operations.items():
        n = _calls(n_calls, name)
        operation()  # each finds its own vectors in the caches, not those of the one before it
        if begin is not None:
            begin()
        began = time.perf_counter()
        for _ in range(n):
            operation()
        seconds.append((time.perf_counter() - began) / n)
    return seconds


def measure(
    world: World,
    operations: Mapping[str, Callable[[], object]],
    n_repeats: int,
    n_calls: Calls,
    n_warm_ups: int = WARM_UPS,
) -> np.ndarray:
    """Return the seconds per call of the slowest rank, (operations, n_repeats). Collective."""
    rounds = [one_round(operations, n_calls, world.barrier) for _ in range(n_warm_ups + n_repeats)]
    return slowest(world, np.array(rounds[n_warm_ups:]).T)


def slowest(world: World, seconds: np.ndarray) -> np.ndarray:
    """Return the elementwise maximum over the ranks. Collective."""
    most: np.ndarray = np.max(world.comm.allgather(seconds), axis=0)
    return most


def calls_of(n_bytes: int) -> int:
    """Return how many calls make one figure for a vector of this size."""
    return max(1, min(MOST_CALLS, BYTES_OF_A_REPEAT // max(n_bytes, 1)))


def rows_of(
    names: Sequence[str], seconds: np.ndarray, references: Mapping[str, str], *, n_bytes: int, n_calls: Calls
) -> list[dict[str, Any]]:
    """Return one row per operation.

    Args:
        names: Of the operations.
        seconds: (operations, repeats)
        references: What each operation is compared with; those that are compared with nothing are not in it.
        n_bytes: Of the vector.
        n_calls: For one figure.
    """
    median = dict(zip(names, np.median(seconds, axis=1), strict=True))
    rows = []
    for name, of_one in zip(names, seconds, strict=True):
        reference = references.get(name)
        rows.append(
            {
                "bytes": n_bytes,
                "operation": name,
                "median_seconds": float(median[name]),
                "p95_seconds": float(np.percentile(of_one, 95)),
                "reference": reference,
                "ratio": float(median[name] / median[reference]) if reference else None,
                "n_repeats": len(of_one),
                "n_calls": _calls(n_calls, name),
            }
        )
    return rows


def _calls(n_calls: Calls, name: str) -> int:
    return n_calls if isinstance(n_calls, int) else n_calls[name]


def beside(row: Mapping[str, Any]) -> str:
    """Format the reference of a row."""
    return f"{row['ratio']:.2f} x {row['reference']}" if row["ratio"] else ""


def gb_per_s(row: Mapping[str, Any]) -> str:
    """Format the vector's bytes per second."""
    return f"{row['bytes'] / row['median_seconds'] / 1e9:.2f}"


def size_of(word: str, option: str = "--sizes") -> int:
    """Parse ``4K`` into bytes."""
    digits, factor = (word[:-1], UNITS[word[-1].upper()]) if word[-1:].upper() in UNITS else (word, 1)
    if not digits.isdigit() or int(digits) * factor < 4:
        raise UsageError(f"{option} takes bytes, such as 4K or 32M, not {word!r}")
    return int(digits) * factor // 4 * 4


def name_of(n_bytes: int) -> str:
    """Format bytes as ``4 KiB``."""
    unit = next((u for u in reversed(UNITS) if n_bytes >= UNITS[u]), None)
    return f"{n_bytes / UNITS[unit]:g} {unit}iB" if unit else f"{n_bytes} B"


def where(document: Mapping[str, Any]) -> str:
    """Format the ranks, machine and MPI of a document that contains ``info.describe``."""
    world, machine = document["world"], document["machine"]
    load = document["load_average"]["before"][0]
    cores = f"{machine['cores']} cores ({machine['processor']})"
    return f"{world['ranks']} ranks on {cores}, {world['mpi']}; load {load:.1f}"
