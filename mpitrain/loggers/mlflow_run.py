"""The logger for MLflow.

``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME`` and its other variables have their meaning.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpitrain.loggers.interface import flat, identifier, store_identifier

LONGEST_VALUE = 500
"""The number of characters of a parameter that every server accepts."""


class MLflowLogger:
    """A run of MLflow. A resumed run continues the same one.

    Args:
        folder: The folder of the run. Without ``MLFLOW_TRACKING_URI``, it holds the file store ``mlruns``.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._client: Any = None
        self._id = ""

    def begin(self, config: Mapping[str, Any]) -> None:
        """Start the run and store the options as its parameters."""
        import mlflow
        from mlflow.entities import Param

        self._entities = mlflow.entities
        uri = None
        if "MLFLOW_TRACKING_URI" not in os.environ and self._folder is not None:
            uri = (self._folder / "mlruns").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks for it
        client = mlflow.MlflowClient(tracking_uri=uri)
        known = identifier(self._folder, "mlflow")
        if known is None:
            title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mpitrain")
            found = client.get_experiment_by_name(title)
            experiment = client.create_experiment(title) if found is None else found.experiment_id
            name = None if self._folder is None else self._folder.resolve().name
            self._id = client.create_run(experiment, run_name=name).info.run_id
            values = {key: str(value)[:LONGEST_VALUE] for key, value in flat(config).items()}
            client.log_batch(self._id, params=[Param(key, value) for key, value in list(values.items())[:100]])
            store_identifier(self._folder, "mlflow", self._id)
        else:
            self._id = known
            client.update_run(self._id, status="RUNNING")
        self._client = client

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Store the numbers of the result, and end the run."""
        if self._client is None:
            return
        numbers = {} if result is None else {k: v for k, v in result.items() if isinstance(v, int | float)}
        if numbers:
            self.log(int(numbers.get("steps", 0)), {f"result/{name}": float(value) for name, value in numbers.items()})
        self._client.set_terminated(self._id, status="FAILED" if result is None else "FINISHED")
        self._client = None
