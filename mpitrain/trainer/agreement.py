"""The options of a run that all ranks must share: all of them, compared once before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mpitrain.collectives.world.agreement import require_equal
from mpitrain.collectives.world.world import World
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.options import flag_of, options_of


def require_equal_options(config: TrainConfig, resume: Path | None, world: World) -> None:
    """Check that all ranks were given the same options. Collective.

    Args:
        config: The options of this rank.
        resume: The folder of the run to resume; None for a new run.
        world: The ranks.

    Raises:
        UsageError: The options differ. All ranks raise it; the message names the first difference.
    """
    require_equal(world.allgather, world.rank, options_in_words(config, resume), remedy="start all ranks with the same")


def options_in_words(config: TrainConfig, resume: Path | None) -> dict[str, str]:
    """Return a dictionary from the flag of each option to its value, as text."""
    texts = {"--resume": _text(resume)}
    for name, declared in options_of(config).items():
        value, flag = getattr(config, name), flag_of(name, declared)
        if isinstance(value, Mapping):
            texts |= {f"{flag} {key}": _text(value[key]) for key in sorted(value)}
        else:
            texts[flag] = _text(value)
    return texts


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)
