"""The hook that passes the numbers of a run to its loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpitrain.loggers.run_logger import RunLogger
from mpitrain.trainer import result
from mpitrain.trainer.counters import Totals
from mpitrain.trainer.run import Hook, Point, Run

SECONDS_BETWEEN_LOGS = 1.0


class LoggingHook(Hook):
    """The hook of ``--log``.

    Args:
        run_logger: The loggers.
        config: The options of the run and its circumstances.
    """

    def __init__(self, run_logger: RunLogger, config: Mapping[str, Any]) -> None:
        self._log, self._config = run_logger, config
        self._logged = -SECONDS_BETWEEN_LOGS

    def on_start(self, run: Run) -> None:
        """Open the logs."""
        self._log.begin(self._config)

    def on_totals(self, run: Run, totals: Totals, *, in_full: bool) -> None:
        """Log the totals, at most once a second of training."""
        seconds = run.clock.seconds
        if in_full or seconds - self._logged >= SECONDS_BETWEEN_LOGS:
            self._logged = seconds
            samples = run.plan.n_samples(totals.steps_of_ranks)
            self._log.log(
                run.step,
                {
                    "train/loss": totals.loss,
                    "train/learning_rate": run.learning_rate,
                    "train/gradients": totals.gradients,
                    "train/seconds": seconds,
                    "train/samples_per_second": samples / max(seconds, 1e-9),
                    "train/bytes_sent": totals.bytes,
                    **{f"share/{name}": share for name, share in totals.shares.items()},
                },
            )

    def on_evaluation(self, run: Run, point: Point) -> None:
        """Log an evaluation."""
        metric = run.passes.objective.metric_name
        self._log.log(
            point.step,
            {
                "test/loss": point.test_loss,
                f"test/{metric.replace(':', '.')}": point.test_metric,
                "test/epoch": point.epoch,
                "test/consensus_distance": point.consensus_distance,
            },
        )

    def on_end(self, run: Run) -> None:
        """Close the logs with the result."""
        if run.is_leader:
            self._log.end(result.document(run))

    def close(self) -> None:
        """Close the logs after an error."""
        self._log.end(None)
