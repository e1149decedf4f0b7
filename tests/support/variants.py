"""Each method with each of its choices and switches, for the tests that run over the whole registry."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from mpitrain import UsageError
from mpitrain.algorithms import METHODS, Method
from mpitrain.algorithms.base.settings import Boolean, Choice, settings_of


def variants() -> Iterator[tuple[str, Method]]:
    """Yield a name and a method, which exchanges at about every second step so that a short run has exchanges."""
    for name, method in METHODS.items():
        settings = settings_of(method)
        chosen: dict[str, tuple[Any, ...]] = {}
        for key, setting in settings.items():
            if isinstance(setting, Choice):
                chosen[key] = setting.choices
            elif isinstance(setting, Boolean):
                chosen[key] = (False, True)
        often = {key: 2 for key in settings if key.endswith("period")}
        if "probability" in settings:
            often["probability"] = 0.5
        for values in itertools.product(*chosen.values()):
            try:
                yield "-".join([name, *map(str, values)]), method(**dict(zip(chosen, values, strict=True)), **often)
            except UsageError:
                continue  # two settings that exclude each other
