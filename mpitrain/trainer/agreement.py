"""The options of a run that all ranks must share: all of them, compared once before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mpitrain.collectives.world.agreement import require_equal
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.options import flag_of, options_of

NOT_GIVEN = "not given"


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


def require_options_of_checkpoint(config: TrainConfig, saved: Mapping[str, str], folder: Path) -> None:
    """Check that a resumed run has the options of its checkpoint, where they decide what it computes. Local.

    Args:
        config: The options, from ``config.json``.
        saved: The options in the checkpoint, from ``deciding_options``.
        folder: The folder of the run.

    Raises:
        UsageError: An option differs; the message names the first one.
    """
    here = deciding_options(config)
    for flag in {**saved, **here}:
        there, now = saved.get(flag, NOT_GIVEN), here.get(flag, NOT_GIVEN)
        if there != now:
            raise UsageError(
                f"{folder / 'config.json'} says {flag} {now}, but the checkpoint was written with {there}: "
                "the file is damaged or was changed; restore it, or start a new run"
            )


def deciding_options(config: TrainConfig) -> dict[str, str]:
    """Return a dictionary from the flag of each option that decides what a run computes to its value, as text."""
    declared = options_of(config)
    replaceable = {flag_of(name, one) for name, one in declared.items() if one.replaceable} | {"--out", "--resume"}
    return {flag: text for flag, text in options_in_words(config, None).items() if flag not in replaceable}


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
        return ", ".join(map(str, value)) or NOT_GIVEN
    return NOT_GIVEN if value is None else str(value)
