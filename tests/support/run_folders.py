"""Folders of runs in any state, written without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.records import lock_file
from mpitrain.records.metrics import MetricsWriter
from mpitrain.trainer.metrics import tables

CONFIG: dict[str, Any] = {
    "algorithm": "easgd",
    "config": {"data": "digits", "model": "mlp", "metric": None},
    "world": {"size": 2},
}


def write_run(folder: Path, seconds: Sequence[float], *, n_ranks: int = 2, total: float = 100.0, **others: Any) -> Path:
    """Write a run that has made 10 steps a second on rank 0 and 5 on rank 1, 2, ..., and return its folder.

    Ranks other than 0 wait for a quarter of their time. Each step is a gradient of 32 samples.

    Args:
        folder: The folder, which is created.
        seconds: The times of training at which rows were written.
        n_ranks: The number of ranks.
        total: The seconds of the whole run.
        others: ``state`` (running, finished or interrupted), ``alive`` (ranks), ``config``, ``result``.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **others.get("config", {})}))
    alive = np.isin(np.arange(n_ranks), others.get("alive", range(n_ranks)))
    with MetricsWriter(folder / "metrics.h5", tables(n_ranks, []), flush_seconds=0) as metrics:
        for now in seconds:
            steps = np.array([10.0] + [5.0] * (n_ranks - 1)) * now
            metrics.append(
                "progress",
                seconds=now,
                step=steps[0],
                gradients=steps.sum(),
                samples=32 * steps.sum(),
                loss=1 / (1 + now),
                learning_rate=0.05,
                done=now / total,
                compute_share=0.5,
                exchange_share=0.25,
                waiting_share=0.25,
            )
            waits = np.array([0.0] + [0.25] * (n_ranks - 1)) * now
            metrics.append("ranks", seconds=now, steps=steps, waiting_seconds=waits, alive=alive)
            histogram = np.zeros(33)
            histogram[[0, 2, 5]] = [2, 5, 1]
            metrics.append("staleness", seconds=now, histogram=histogram)
        if seconds:
            metrics.append("evaluation", seconds=seconds[-1], test_loss=0.25, test_accuracy=0.875, test_metric=0.875)
    state = others.get("state", "finished")
    if state == "running":
        (folder / "lock").write_text(json.dumps(lock_file.describe()))
    elif state == "finished":
        finish(folder, **others.get("result", {}))
    return folder


def finish(folder: Path, **changes: Any) -> None:
    """Write the result of a run."""
    result = {"algorithm": "easgd", "ranks": 2, "complete": True, "metric": "accuracy", **changes}
    (folder / "result.json").write_text(json.dumps(result))
