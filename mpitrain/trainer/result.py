"""The result document of a run: the content of ``RUN/result.json``."""

from __future__ import annotations

from typing import Any

from mpitrain.trainer import runfolder
from mpitrain.trainer.run import Run


def document(run: Run) -> dict[str, Any]:
    """Return the result document. Local; lead only, after the last exchange."""
    plan, config, world, totals = run.plan, run.plan.config, run.world, run.counters.totals()
    n_workers, seconds = plan.n_workers(world.size), run.clock.seconds
    found: dict[str, Any] = {
        "algorithm": plan.method.name,
        "settings": plan.method.settings(),
        "warnings": plan.warnings(n_workers),
        "data": config.data,
        "model": config.model,
        "ranks": world.size,
        "died": sorted(world.dead),
        "workers": n_workers,
        "replica_size": config.replica_size,
        "wire": config.wire,
        "complete": run.is_complete,
        "stopped_by": run.stopped_by,
        "ended_by": "signal" if run.stopped_by else run.stop_requested or "budget",
        "metric": run.passes.objective.metric_name,
    }
    if run.is_complete:
        found |= {name: getattr(run.points[-1], name) for name in ("test_accuracy", "test_metric", "test_loss")}
    return found | {
        "train_loss": totals.loss,
        "seconds": seconds,
        "steps": run.step,
        "steps_of_ranks": totals.steps_of_ranks,
        "gradients": totals.gradients,
        "bytes_sent": totals.bytes,
        "n_nonfinite": totals.n_nonfinite,
        "n_clipped": totals.n_clipped,
        "samples_per_second": plan.n_samples(totals.steps_of_ranks) / max(seconds, 1e-9),
        "shares": totals.shares,
        "cpu_seconds": totals.cpu_seconds,
        "of_ranks": {
            name: totals.scoreboard[name].tolist()
            for name in ("exchanges", "bytes", "wire_bytes", "exchange_cpu", "serving_cpu", "gradient_cpu")
        },
        "parameters": run.optimizer.n_parameters,
        "evaluation": [vars(point) for point in run.points],
        "out": None if run.folder is None else str(run.folder),
        "world": world.describe(),
        "versions": runfolder.versions(),
    }
