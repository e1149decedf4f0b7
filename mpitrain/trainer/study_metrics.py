"""The folder of a simulated run, in the form of a real one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.errors import UsageError
from mpitrain.records.metrics import MetricsWriter
from mpitrain.simulation.engine import Simulation
from mpitrain.trainer import runfolder
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.metrics import tables


class StudyMetrics:
    """The files of a simulation: ``config.json``, ``metrics.h5`` and, at the end, ``result.json``.

    Args:
        folder: A new folder.
        simulation: The workers.
        config: The options of the run.

    Raises:
        UsageError: The folder already contains a run, or cannot be created.
    """

    def __init__(self, folder: Path, simulation: Simulation, config: TrainConfig) -> None:
        if (folder / "config.json").exists():
            raise UsageError(f"{folder} already holds a run: choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {folder} cannot be used ({error.strerror}): choose another folder") from error
        self._folder, self._simulation, self._names = folder, simulation, simulation.method.metrics
        document = {"config": config.to_json(), "algorithm": config.algorithm, "versions": runfolder.versions()}
        runfolder.write_json(folder / "config.json", {**document, "settings": simulation.method.settings()})
        self._writer = MetricsWriter(folder / "metrics.h5", tables(simulation.world.size, self._names))

    def add_evaluation(self, point: Mapping[str, float], loss: float) -> None:
        """Append an evaluation, and the present state of the workers.

        Args:
            point: The evaluation, as a row of ``evaluation`` in the result.
            loss: The running mean of the loss.
        """
        workers = self._simulation.workers
        statistics = [worker.comm.statistics for worker in workers]
        at = {name: point[name] for name in ("seconds", "step", "gradients", "bytes")}
        measured = {name: point[name] for name in ("epoch", "test_loss", "test_accuracy")}
        self._writer.append("evaluation", **at, **measured)
        distance = point["consensus_distance"]
        coefficient = self._simulation.method.elastic_coefficient(len(workers), self._simulation.learning_rate)
        energy = coefficient / 2 * len(workers) * distance**2
        exchanges = sum(s.n_exchanges for s in statistics)
        spread = {"consensus_distance": distance, "elastic_energy": energy}
        self._writer.append("progress", **at, **spread, loss=loss, exchanges=exchanges)
        seconds = {"seconds": point["seconds"]}
        updates, moves = ([getattr(s, name) for s in statistics] for name in ("staleness", "staleness_distance"))
        self._writer.append("staleness", **seconds, histogram=np.sum(updates, 0), distance=np.sum(moves, 0))
        if self._names:
            metrics = [worker.metrics() for worker in workers]
            self._writer.append("method", **seconds, **{name: [own[name] for own in metrics] for name in self._names})

    def write(self, document: dict[str, Any]) -> None:
        """Close the metrics and write the result."""
        self._writer.close()
        runfolder.write_json(self._folder / "result.json", document)
