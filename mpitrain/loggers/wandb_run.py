"""The logger for Weights & Biases. ``WANDB_MODE``, ``WANDB_PROJECT`` and its other variables have their meaning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpitrain.loggers.interface import flat, identifier, store_identifier

SECONDS_TO_CONNECT = 30


class WandbLogger:
    """A run on Weights & Biases. A resumed run continues the same one.

    Args:
        folder: The folder of the run, for the files of ``WANDB_MODE=offline``; None for the current folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._run: Any = None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Start the run. The output of the terminal is not captured."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mpitrain"),
            name=None if self._folder is None else self._folder.resolve().name,
            dir=None if self._folder is None else str(self._folder),
            id=identifier(self._folder, "wandb"),
            resume="allow",
            config=flat(config),
            settings=wandb.Settings(console="off", init_timeout=SECONDS_TO_CONNECT, silent=True),
        )
        store_identifier(self._folder, "wandb", str(self._run.id))
        # The step is a value like the others: W&B's own step refuses the steps that a resumed run makes again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send a row."""
        self._run.log({"step": step, **values})

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Add the numbers and texts of the result to the summary of the run, and finish it."""
        if self._run is None:
            return
        if result is not None:
            self._run.summary.update(
                {
                    f"result/{name}": value
                    for name, value in result.items()
                    if isinstance(value, bool | int | float | str)
                }
            )
        self._run.finish(exit_code=1 if result is None else 0)
        self._run = None
