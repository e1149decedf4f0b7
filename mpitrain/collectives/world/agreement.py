"""Settings that must be equal on all ranks: comparison, and a message that names setting, values and ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpitrain.errors import UsageError

MOST_NAMED = 3
"""The most settings that a message names besides the first."""

ABSENT = "absent"

Gather = Callable[[Any], list[Any]]
"""Returns the objects of all ranks, on all ranks. Collective."""


def require_equal(gather: Gather, rank: int, settings: Mapping[str, str], *, remedy: str) -> None:
    """Check that all ranks have the same settings. Collective.

    Args:
        gather: A function that gathers an object from each rank, such as ``comm.allgather``.
        rank: The number of this rank, for messages.
        settings: The value of each setting as text, by its name for messages. The most informative settings come first.
        remedy: The remedy, for the end of the message.

    Raises:
        UsageError: A setting differs. All ranks raise it; the message names the first difference.
    """
    found = differences(gather, rank, settings)
    if not found:
        return
    (name, values), *others = found.items()
    also = ", ".join(list(found)[1 : MOST_NAMED + 1]) + (", ..." if len(others) > MOST_NAMED else "")
    raise UsageError(
        f"{name} differs between ranks: {values}{f' (so do {also})' if others else ''}; {remedy}", on_all_ranks=True
    )


def differences(gather: Gather, rank: int, settings: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that are not equal on all ranks, with their values in words. Collective.

    Ranks first compare digests. If the digests differ, one rank for each digest sends its settings.

    Args:
        gather, rank, settings: See ``require_equal``.
    """
    content = "\n".join(f"{name}\t{value}" for name, value in settings.items())
    digest = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()
    ranks_of: dict[str, list[int]] = {}
    for other, found in gather((rank, digest)):
        ranks_of.setdefault(found, []).append(other)
    if len(ranks_of) == 1:
        return {}
    firsts = {ranks[0] for ranks in ranks_of.values()}
    sent = dict(gather((rank, dict(settings) if rank in firsts else {})))
    kinds = [(ranks, sent[ranks[0]]) for ranks in sorted(ranks_of.values())]
    names = dict.fromkeys(name for _, kind in kinds for name in kind)
    return {
        name: values
        for name in names
        if (values := _values_in_words([(ranks, kind.get(name, ABSENT)) for ranks, kind in kinds]))
    }


def _values_in_words(kinds: Sequence[tuple[Sequence[int], str]]) -> str:
    """Return ``0.1 on ranks 0 to 2, 0.3 on rank 3``; nothing if all values are equal."""
    ranks_of: dict[str, list[int]] = {}
    for ranks, value in kinds:
        ranks_of.setdefault(value, []).extend(ranks)
    if len(ranks_of) == 1:
        return ""
    return ", ".join(f"{value} on {ranks_in_words(ranks)}" for value, ranks in ranks_of.items())


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Return ``rank 3``, ``ranks 0, 2`` or ``ranks 0 to 5, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run))  # 4, 5 is as short as 4 to 5
        for run in runs
    ]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(parts)}"
