"""The hook that writes the final and the best model of a run, as they were evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpitrain.log import decoration
from mpitrain.records.model_file import write_model
from mpitrain.trainer.evaluation import Evaluator
from mpitrain.trainer.ranking import Ranking
from mpitrain.trainer.run import Hook, Point, Run

FINAL, BEST = "model.safetensors", "best-model.safetensors"


class ModelFiles(Hook):
    """The files ``model.safetensors`` and ``best-model.safetensors``. The lead, the first rank alive, writes them.

    They hold the consensus that was evaluated, with the model's buffers (re-estimated BatchNorm statistics).

    Args:
        evaluator: The evaluator that has evaluated the last point.
        ranking: The order of evaluations, from which the best one follows.
        deferred: Whether points are evaluated after the run; then only the final model is written.
    """

    def __init__(self, evaluator: Evaluator, ranking: Ranking, *, deferred: bool) -> None:
        self._evaluator, self._ranking, self._deferred = evaluator, ranking, deferred

    def on_evaluation(self, run: Run, point: Point) -> None:
        """Write the model if this evaluation is the best one so far."""
        if run.folder is not None and not self._deferred and self._ranking.best(run.points) == len(run.points) - 1:
            self._write(run, run.folder / BEST, self._evaluator.evaluated)

    def on_end(self, run: Run) -> None:
        """Write the final model of a run that was not interrupted."""
        if run.folder is not None and run.is_leader and run.is_complete:
            self._write(run, run.folder / FINAL, self._evaluator.state_dict(run.optimizer.consensus_vector()))

    def _write(self, run: Run, path: Path, state: dict[str, Any]) -> None:
        point = run.points[-1]
        metadata = {
            "algorithm": run.plan.method.name,
            "model": run.plan.config.model,
            "step": point.step,
            "test_loss": point.test_loss,
            f"test_{self._evaluator.objective.metric_name}": point.test_metric,
        }
        with decoration(path.name):
            write_model(path, state, metadata)
