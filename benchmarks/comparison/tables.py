"""The evaluation of a comparison: pure functions of the trainer's result documents.

A run reaches the target accuracy where the straight lines between its evaluations first cross it. Of several seeds the
median counts. A seed that never reaches the target counts as infinitely slow, so the median exists only if more than
half of the seeds reach it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpitrain.report import text

HIGHEST_DEFAULT_TARGET = 0.95

Result = Mapping[str, Any]


def first_crossing(xs: Sequence[float], ys: Sequence[float], target: float) -> float | None:
    """Return where the straight lines through the points first reach ``target``, or None.

    Args:
        xs: Increasing coordinates.
        ys: Values at ``xs``; non-finite values are skipped.
        target: The level, which is reached at the first point if that is not below it.
    """
    before: tuple[float, float] | None = None
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            continue
        if y >= target:
            if before is None:
                return float(x)
            x_0, y_0 = before
            return float(x_0 + (x - x_0) * (target - y_0) / (y - y_0))
        before = (x, y)
    return None


def curve(result: Result, x: str) -> tuple[list[float], list[float]]:
    """Return a counter of a run (seconds, gradients, bytes) and the test accuracies at its values."""
    return [point[x] for point in result["evaluation"]], [point["test_accuracy"] for point in result["evaluation"]]


def best_accuracy(result: Result) -> float:
    """Return the highest test accuracy of a run; 0 if none is finite."""
    return max((y for y in curve(result, "seconds")[1] if math.isfinite(y)), default=0.0)


def default_target(results: Sequence[Result]) -> float:
    """Return the highest whole percent that every run reaches, at most 95 %."""
    reached = min(best_accuracy(result) for result in results)
    return min(math.floor(100 * reached + 1e-9) / 100, HIGHEST_DEFAULT_TARGET)


def to_target(result: Result, target: float) -> dict[str, float | None]:
    """Return the seconds, gradients and bytes that a run needed for the target accuracy."""
    return {f"{x}_to_target": first_crossing(*curve(result, x), target) for x in ("seconds", "gradients", "bytes")}


def median_reached(values: Sequence[float | None]) -> float | None:
    """Return the median, where None stands for infinity."""
    median = float(np.median([math.inf if value is None else value for value in values]))
    return median if math.isfinite(median) else None


def summarise(results: Sequence[Result], target: float) -> dict[str, Any]:
    """Return the row of one method.

    Args:
        results: Its runs, one for each seed.
        target: A test accuracy, 0 to 1.
    """
    reached = [to_target(result, target) for result in results]
    accuracies = [float(result["test_accuracy"]) for result in results]
    return {
        "algorithm": results[0]["algorithm"],
        "settings": results[0]["settings"],
        "n_runs": len(results),
        "target_accuracy": target,
        "n_reached": sum(one["seconds_to_target"] is not None for one in reached),
        **{name: median_reached([one[name] for one in reached]) for name in reached[0]},
        "test_accuracy_mean": float(np.mean(accuracies)),
        "test_accuracy_std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        "test_accuracy_min": min(accuracies),
        "test_accuracy_max": max(accuracies),
        "test_loss_mean": float(np.mean([result["test_loss"] for result in results])),
        "seconds": float(np.median([result["seconds"] for result in results])),
        "gradients_per_second": float(np.median([result["gradients"] / result["seconds"] for result in results])),
        "bytes_per_gradient": float(np.median([result["bytes_sent"] / result["gradients"] for result in results])),
        "waiting_share": float(np.mean([result["shares"]["waiting"] for result in results])),
        "n_nonfinite": sum(result["n_nonfinite"] for result in results),
    }


def run_document(result: Result, seed: int, target: float) -> dict[str, Any]:
    """Return one run without its curve, which its folder holds."""
    columns = ("algorithm", "test_accuracy", "test_loss", "train_loss", "seconds", "gradients", "bytes_sent")
    document = {name: result[name] for name in (*columns, "steps_of_ranks", "shares", "n_nonfinite", "out")}
    return {"seed": seed, **document, **to_target(result, target)}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the rows as a Markdown table."""
    to = f"to {100 * rows[0]['target_accuracy']:.4g} %"

    def accuracy(row: Mapping[str, Any]) -> str:
        mean, spread = 100 * row["test_accuracy_mean"], row["test_accuracy_std"]
        return f"{mean:.2f} %" if spread is None else f"{mean:.2f} ± {100 * spread:.2f} %"

    return text.table(
        {
            "algorithm": [row["algorithm"] for row in rows],
            f"time {to}": [text.duration(row["seconds_to_target"]) for row in rows],
            "reached": [f"{row['n_reached']} of {row['n_runs']}" for row in rows],
            f"gradients {to}": [text.number(row["gradients_to_target"], "{:,.0f}") for row in rows],
            f"sent {to}": [text.size(row["bytes_to_target"]) for row in rows],
            "final accuracy": [accuracy(row) for row in rows],
            "gradients/s": [text.number(row["gradients_per_second"], "{:,.4g}") for row in rows],
            "sent/gradient": [text.size(row["bytes_per_gradient"]) for row in rows],
            "waiting": [text.number(row["waiting_share"], "{:.1%}") for row in rows],
        },
        left=("algorithm",),
    )
