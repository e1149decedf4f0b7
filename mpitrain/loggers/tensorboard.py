"""The logger for TensorBoard, through tensorboardX: it needs neither TensorFlow nor TensorBoard itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpitrain.errors import UsageError


class TensorBoardLogger:
    """Event files in ``RUN/tensorboard``, for ``tensorboard --logdir RUN``.

    When a run continues, TensorBoard hides the points of the steps that are made again.

    Args:
        folder: The folder of the run.

    Raises:
        UsageError: There is no folder.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            raise UsageError("a TensorBoard log needs a folder")
        self._folder = folder / "tensorboard"
        self._config: Mapping[str, Any] = {}
        self._writer: Any = None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Import tensorboardX. The event file begins with the first numbers, whose step is then known."""
        import tensorboardX

        self._make_writer = tensorboardX.SummaryWriter
        self._config = config

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each name."""
        if self._writer is None:
            # The suffix: two files that begin in the same second would have the same name.
            suffix = f".step-{step}"
            self._writer = self._make_writer(str(self._folder), purge_step=step, flush_secs=10, filename_suffix=suffix)
            self._writer.add_text("config", f"```\n{json.dumps(self._config, indent=2)}\n```", step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Write the rest and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
