"""The learning rate of a run as a function of the local step: ``--schedule cosine --warmup 100``.

    lr(t) = lr * (t + 1)/W               for t < W, the warm-up
    lr(t) = lr * factor(t - W, T - W)    afterwards

Here t is the number of steps that this rank has made; a slow rank of an asynchronous method is therefore behind. T is
the number of steps of a rank in the run: ``--steps``, those of ``--epochs``, or ``--gradients`` divided by the number
of ranks. A rank that makes more than T steps keeps the last factor. A run that is resumed with a longer budget
continues on the curve of the new T.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from mpitrain.algorithms.base.settings import check_settings, integer, literal, number, settings_taken, values_of_texts
from mpitrain.errors import UsageError, unknown


@dataclass(frozen=True)
class Schedule(ABC):
    """A factor of the learning rate as a function of the step. Subclasses are dataclasses whose fields are settings.

    In the formulas of the subclasses, the numbers of steps t and T are counted from the end of the warm-up.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_settings(self, self.name)

    @property
    def needs_total(self) -> bool:
        """Whether the factor depends on the number of steps in the run."""
        return True

    @abstractmethod
    def factor(self, step: int, total: int) -> float:
        """Return the factor of a step.

        Args:
            step: The number of steps since the warm-up, at most ``total``.
            total: The number of steps after the warm-up in the run. It is 0 if it is unknown and not needed.
        """


@dataclass(frozen=True)
class Constant(Schedule):
    """The constant factor 1."""

    name: ClassVar[str] = "constant"

    @property
    def needs_total(self) -> bool:
        """Whether the factor depends on the number of steps in the run."""
        return False

    def factor(self, step: int, total: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Step(Schedule):
    """The factor gamma^floor(t / step_size).

    Attributes:
        step_size: The number of steps between two drops. If it is None, there are two drops, after T/3 and 2*T/3 steps.
        gamma: The factor of each drop.
    """

    step_size: int | None = integer(None, "steps between two drops; a third of the run if none", low=1, optional=True)
    gamma: float = number(0.1, "factor of a drop", above=0, high=1)

    name: ClassVar[str] = "step"

    @property
    def needs_total(self) -> bool:
        """Whether the factor depends on the number of steps in the run."""
        return self.step_size is None

    def factor(self, step: int, total: int) -> float:
        """Return gamma to the power of the number of drops so far."""
        if self.step_size is not None:
            return float(self.gamma ** (step // self.step_size))
        return float(self.gamma ** min(3 * step // max(total, 1), 2))


@dataclass(frozen=True)
class Cosine(Schedule):
    """The factor final + (1 - final)*(1 + cos(pi*t/T))/2.

    Attributes:
        final: The factor at the end of the run.
    """

    final: float = number(0.0, "factor at the end of the run", low=0, high=1)

    name: ClassVar[str] = "cosine"

    def factor(self, step: int, total: int) -> float:
        """Return the factor, which follows half a period of the cosine from 1 to ``final``."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * step / total)) / 2


@dataclass(frozen=True)
class Linear(Schedule):
    """The factor 1 - (1 - final)*t/T.

    Attributes:
        final: The factor at the end of the run.
    """

    final: float = number(0.0, "factor at the end of the run", low=0, high=1)

    name: ClassVar[str] = "linear"

    def factor(self, step: int, total: int) -> float:
        """Return the factor, which decreases linearly from 1 to ``final``."""
        return 1 - (1 - self.final) * step / total


@dataclass(frozen=True)
class Imported(Schedule):
    """A function that is imported from ``module:function``, and called as ``function(step, total, **settings)``.

    Attributes:
        path: ``module:function``.
        texts: The settings as texts: Python literals, or words.
    """

    path: str
    texts: Mapping[str, str]

    name: ClassVar[str] = "imported"

    @cached_property
    def function(self) -> Callable[[int, int], Any]:
        """The function with its settings. Raises UsageError if it cannot be imported or does not accept a setting."""
        from mpitrain.models.imported import imported

        function = imported("schedule", self.path, otherwise=f"use one of {', '.join(KINDS)}")
        settings = settings_taken(function, self.path, {key: literal(text) for key, text in self.texts.items()})
        return lambda step, total: function(step, total, **settings)

    def factor(self, step: int, total: int) -> float:
        """Return what the function returns.

        Raises:
            UsageError: The function does not return a number >= 0.
        """
        value = self.function(step, total)
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not (math.isfinite(found) and found >= 0):
            raise UsageError(f"{self.path} returned {value!r} at step {step}: return a factor of 0 or more")
        return found


KINDS: dict[str, type[Schedule]] = {kind.name: kind for kind in (Constant, Step, Cosine, Linear)}


def create(name: str, texts: Mapping[str, str]) -> Schedule:
    """Return a schedule from its name and its settings as text.

    Raises:
        UsageError: The name or a setting is unknown, or a value is invalid.
    """
    if ":" in name:
        return Imported(name, texts)
    if name not in KINDS:
        raise UsageError(unknown("schedule", name, KINDS, otherwise="module:function for a schedule of your own"))
    return KINDS[name](**values_of_texts(KINDS[name], name, texts))


@dataclass(frozen=True)
class RateCurve:
    """The factor of the learning rate at every step of a rank.

    Attributes:
        schedule: The curve after the warm-up.
        warmup: The number W of steps of the warm-up.
        total: The number T of steps of a rank in the run; None if the run is limited by time.
    """

    schedule: Schedule
    warmup: int
    total: int | None

    def __post_init__(self) -> None:
        if self.total is not None and self.warmup >= self.total:
            raise UsageError(
                f"--warmup {self.warmup} leaves nothing of a run of {self.total} steps: use fewer, or a longer run"
            )

    def __call__(self, step: int) -> float:
        """Return the factor of step number ``step``, from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        total = 0 if self.total is None else self.total - self.warmup
        step -= self.warmup
        return self.schedule.factor(step if self.total is None else min(step, total), total)
