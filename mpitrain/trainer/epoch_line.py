"""The lines of a run on the terminal: its start, and one for each evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mpitrain.trainer.objective_options import metric_in_words
from mpitrain.trainer.run import Point, Run


def start_line(run: Run) -> str:
    """Return a line about the model, the ranks and the data of a run."""
    config, ranks = run.plan.config, run.world.size
    per_step = sum(config.samples_of_ranks(ranks))
    return (
        f"{config.model}: {run.optimizer.n_parameters:,} parameters; {run.plan.method.name} on {ranks} "
        f"rank{'s' * (ranks > 1)}, {config.optimizer}, lr {config.lr:g}; {run.batches.dataset.n_train:,} training "
        f"samples, {per_step} per step"
    )


def details(run: Run) -> Iterator[str]:
    """Yield the lines that ``--verbose`` adds at the start."""
    plan, config = run.plan, run.plan.config
    yield f"method: {plan.method.name} ({_settings(plan.method.settings())})"
    yield f"optimizer: {config.optimizer} ({_settings(_numbers(run.optimizer.param_groups[0]))})"
    yield f"schedule: {config.schedule} ({_settings(config.schedule_settings)}), warm-up {config.warmup} steps"
    yield f"precision: {config.precision}; loss: {config.loss}; metric: {run.passes.objective.metric_name}"
    end = f"{run.budget.seconds:g} s" if run.budget.seconds is not None else f"{run.budget.gradients:,} gradients"
    yield f"budget: {end}; an epoch has {run.batches.steps_per_epoch:,} steps of each rank"
    yield f"samples per step of each rank: {', '.join(map(str, config.samples_of_ranks(run.world.size)))}"
    for name, parameter in run.model.named_parameters():
        frozen = "" if parameter.requires_grad else ", frozen"
        yield f"parameter {name}: {tuple(parameter.shape)}, {parameter.numel():,} numbers{frozen}"


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group that are not their type's zero."""
    return {name: value for name, value in group.items() if name not in ("params", "initial_lr") and value}


def _settings(values: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "defaults"


def remaining_seconds(done: float, total: float, seconds: float) -> float | None:
    """Return the seconds until the end at the pace so far; None before any progress.

    Args:
        done: The part of the budget that this process has used.
        total: The part of the budget that was left when this process began to train.
        seconds: The time in which this process has used ``done``.
    """
    return None if done <= 0 else seconds * max(total - done, 0.0) / done


def epoch_line(run: Run, point: Point, train_loss: float, remaining: float | None) -> str:
    """Return the line of an evaluation."""
    objective = run.passes.objective
    end = "" if remaining is None else f"  ETA {duration(remaining)}"
    return (
        f"epoch {point.epoch:6.1f}  {point.seconds:7.1f} s  train loss {train_loss:.4f}  "
        f"test loss {point.test_loss:.4f}  test {metric_in_words(objective.metric_name, point.test_metric)}  "
        f"lr {run.learning_rate:.3g}{end}"
    )


def duration(seconds: float) -> str:
    """Return seconds as ``9 s``, ``2:05`` or ``1:02:05``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
