"""Each method with each of its choices and switches: what the tests over the whole registry run over."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from mpitrain import UsageError
from mpitrain.algorithms import METHODS, Method


def variants() -> Iterator[tuple[str, Method]]:
    """A name and a method, exchanging at every second step so that a short run does."""
    for name, method in METHODS.items():
        fields = dataclasses.fields(method)
        chosen = {
            f.name: f.metadata["choices"] or (False, True)
            for f in fields
            if "int" not in f.type and "float" not in f.type
        }
        period = {f.name: 2 for f in fields if f.name.endswith("period")}
        for values in itertools.product(*chosen.values()):
            settings: dict[str, Any] = dict(zip(chosen, values, strict=True)) | period
            try:
                yield "-".join([name, *map(str, values)]), method(**settings)
            except UsageError:
                continue  # two that exclude each other
