"""The few numbers that summarise a run, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpitrain.records.metrics import Column
from mpitrain.report.runs import Run


def summarise(run: Run) -> dict[str, Any]:
    """Return the numbers of a run for its row in the report. A number that the run has not recorded is None."""
    result = run.result
    _, accuracies = run.curve("evaluation", "seconds", "test_accuracy")
    _, losses = run.curve("evaluation", "seconds", "test_loss")
    seconds = _number(result.get("seconds", run.total("seconds")))
    gradients = _number(result.get("gradients", run.total("gradients")))
    sent_bytes = _number(result.get("bytes_sent", run.total("bytes")))
    final_accuracy = _number(result.get("test_accuracy", accuracies[-1] if len(accuracies) else None))
    seen_accuracies = [*accuracies, *([] if final_accuracy is None else [final_accuracy])]
    return {
        "run": run.label,
        "finished": bool(result),
        "algorithm": result.get("algorithm", run.config.get("algorithm")),
        "data": run.facts().get("data"),
        "model": run.facts().get("model"),
        "settings": result.get("settings", run.config.get("settings", {})),
        "ranks": result.get("ranks", run.config.get("ranks")),
        "test_accuracy": final_accuracy,
        "best_test_accuracy": _number(max(seen_accuracies, default=None)),
        "test_loss": _number(result.get("test_loss", losses[-1] if len(losses) else None)),
        "seconds": seconds,
        "gradients": gradients,
        "gradients_per_second": gradients / seconds if gradients is not None and seconds else None,
        "bytes_per_gradient": sent_bytes / gradients if sent_bytes is not None and gradients else None,
        "waiting_share": _number(run.shares().get("waiting")),
        "exchanges": _number(run.total("exchanges")),
        "lock_wait_seconds": _number(run.total("lock_wait_seconds")),
    }


def _number(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


Curve = tuple[Sequence[float] | Column, Sequence[float] | Column]


def temporal_efficiency(a: Curve, b: Curve) -> float:
    """Return the temporal efficiency of run a relative to run b (Hermans, CERN-THESIS-2017-103).

    It compares the areas under two curves of a metric that grows, such as the accuracy:

        E(a, b) = int_0^m f_a dt / int_0^m f_b dt,    m = min(T_a, T_b),    f(0) = the first measured value

    Between two measurements, f is interpolated linearly.

    Args:
        a, b: For each run, the seconds in ascending order, and the metric at each of them.

    Raises:
        ValueError: A curve is empty, or the integral of b is not positive.
    """
    if not (len(a[0]) and len(b[0])):
        raise ValueError("temporal efficiency needs at least one measurement of each run")
    m = min(float(a[0][-1]), float(b[0][-1]))
    denominator = _area(b, m)
    if not denominator > 0:
        raise ValueError("temporal efficiency needs a run b whose metric is above 0 for some time")
    return _area(a, m) / denominator


def _area(curve: Curve, m: float) -> float:
    """Return the integral from 0 to m of the straight lines through `curve`."""
    t, f = np.asarray(curve[0], dtype=np.float64), np.asarray(curve[1], dtype=np.float64)
    stamps = np.unique(np.concatenate([[0.0, m], t[(t > 0) & (t < m)]]))
    return float(np.trapezoid(np.interp(stamps, t, f), stamps))
