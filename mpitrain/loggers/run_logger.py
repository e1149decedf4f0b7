"""``RunLogger``: one logger for a run, which passes everything to several back-ends on the lead."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mpitrain import loggers
from mpitrain.collectives.world.launch import init
from mpitrain.collectives.world.world import World
from mpitrain.errors import reason
from mpitrain.log import ANY_RANK, logger
from mpitrain.loggers.interface import Logger


class RunLogger:
    """The loggers of a run. All ranks may call it; only the lead, the first rank alive, passes the calls on.

    A back-end that raises an error is reported once and left out from then on: logging never ends the training. When
    the lead dies, the next rank continues the logs. All methods are Local.

    Args:
        backends: Names (``csv``, ``tensorboard``, ``wandb``, ``mlflow``), and objects with the methods of ``Logger``.
        folder: The folder of the run, which CSV and TensorBoard need.
        world: The ranks; by default those of ``mpitrain.init()``.

    Raises:
        UsageError: A name is unknown, the package of a back-end is not installed, or a folder is missing.

    Example:
        >>> with mpitrain.RunLogger(["csv", "wandb"], "runs/mine") as log:  # doctest: +SKIP
        ...     log.begin({"lr": 0.05})
        ...     for step, (x, y) in enumerate(batches):
        ...         ...
        ...         log.log(step, {"train/loss": float(loss)})
    """

    def __init__(
        self,
        backends: Sequence[str | Logger],
        folder: str | Path | None = None,
        *,
        world: World | None = None,
    ) -> None:
        self._world = world or init()
        self._folder = None if folder is None else Path(folder)
        self._loggers: list[tuple[str, Logger]] = [
            (one, loggers.make(one, self._folder)) if isinstance(one, str) else (type(one).__name__, one)
            for one in backends
        ]
        self._config: Mapping[str, Any] = {}
        self._has_begun = False

    def begin(self, config: Mapping[str, Any]) -> None:
        """Open the logs.

        Args:
            config: The options of the run; values are JSON types.
        """
        self._config = dict(config)
        if self._world.rank == self._world.leader:
            self._has_begun = True
            self._each(lambda one: one.begin(self._config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name. NaN is left out.

        Args:
            step: The step of this rank.
            values: The numbers by name.
        """
        if self._world.rank != self._world.leader or not self._loggers:
            return
        if not self._has_begun:  # the lead before this rank has died, or the caller had no options to record
            self.begin(self._config)
        numbers = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        if numbers:
            self._each(lambda one: one.log(int(step), numbers))

    def end(self, result: Mapping[str, Any] | None = None) -> None:
        """Close the logs; a second call does nothing.

        Args:
            result: The result of the run; None if an error has ended it.
        """
        if self._has_begun:
            self._has_begun = False
            self._each(lambda one: one.end(result))
        self._loggers = []

    def _each(self, call: Callable[[Logger], None]) -> None:
        """Call a function with each logger, and drop those that fail."""
        remaining = []
        for name, one in self._loggers:
            try:
                call(one)
            except Exception as error:
                text = " ".join(reason(error).split()) or type(error).__name__
                logger.warning("logging to %s has ended (%s); the run continues", name, text, extra=ANY_RANK)
            else:
                remaining.append((name, one))
        self._loggers = remaining

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end({} if kind is None else None)
