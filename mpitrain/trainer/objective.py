"""The loss that a run minimises, and the metric of its evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from mpitrain.data import Dataset
from mpitrain.errors import UsageError
from mpitrain.models.imported import imported
from mpitrain.trainer.batches import cross_entropy, widened
from mpitrain.trainer.objective_options import LOSSES, METRICS, OF_CLASSES, OF_NUMBERS, ObjectiveOptions

Compare = Callable[[torch.Tensor, torch.Tensor], Any]
"""Of outputs and targets: a tensor () or a number."""


class Score(NamedTuple):
    """The evaluation of parameters on a test set.

    Attributes:
        loss: The mean loss.
        accuracy: The accuracy from 0 to 1; NaN without classes.
        metric: The value of the run's metric.
    """

    loss: float
    accuracy: float
    metric: float


class Objective:
    """The loss and the metric of a run.

    Args:
        options: The options of the run, which name the loss and the metric.
        dataset: The data set, with class labels or real-valued targets.

    Attributes:
        loss: A function that returns the mean loss of outputs (b, ...) and targets (b, ...), in at least 32 bits.
        metric_name: The name of the metric.
        higher_is_better: Whether a larger value of the metric is better. For an imported function, it is the function's
            attribute with this name; True if there is none.
        n_outputs: The number of outputs of the model for one sample.

    Raises:
        UsageError: The loss or the metric does not fit the data, or cannot be imported.
    """

    def __init__(self, options: ObjectiveOptions, dataset: Dataset) -> None:
        name, has_classes = options.loss, dataset.n_classes > 0
        if name in OF_CLASSES and not has_classes:
            raise UsageError(f"{dataset.name} has real-valued targets: use --loss mse or l1, not {name}")
        if name in OF_NUMBERS and has_classes:
            raise UsageError(f"{dataset.name} has classes: use --loss cross_entropy, not {name}")
        if name == "binary" and dataset.n_classes != 2:
            raise UsageError(f"--loss binary is for 2 classes, and {dataset.name} has {dataset.n_classes}")
        self._is_binary = name == "binary"
        if name == "binary" and dataset.predicts_tokens:
            raise UsageError(f"--loss binary is for single answers, and {dataset.name} is text: use cross_entropy")
        self.metric_name = options.metric or _default_metric(dataset, name)
        self._check_metric(dataset)
        options.check_target(self.metric_name)
        self.n_outputs = 1 if self._is_binary else dataset.n_outputs
        others = f"use one of {', '.join(LOSSES)}"
        self.loss: Compare = _LOSSES[name] if name in _LOSSES else imported("loss", name, otherwise=others)
        others = f"use one of {', '.join(METRICS)}"
        is_own = self.metric_name not in METRICS
        self._own = imported("metric", self.metric_name, otherwise=others) if is_own else None
        self.higher_is_better = bool(getattr(self._own, "higher_is_better", METRICS.get(self.metric_name, True)))
        self._has_classes = has_classes

    def _check_metric(self, dataset: Dataset) -> None:
        name = self.metric_name
        if name in ("accuracy", "top5") and not dataset.n_classes:
            raise UsageError(f"{dataset.name} has real-valued targets: use --metric mae, not {name}")
        if name == "mae" and dataset.n_classes:
            raise UsageError(f"{dataset.name} has classes: use --metric accuracy, not mae")
        if name == "top5" and dataset.n_classes <= 5:
            raise UsageError(f"--metric top5 needs more than 5 classes, and {dataset.name} has {dataset.n_classes}")

    def score(self, batches: Any) -> Score:
        """Return loss, accuracy and metric over all samples.

        Args:
            batches: Outputs and targets of each mini-batch.
        """
        loss, n_right, total, n = 0.0, 0, 0.0, 0
        for outputs, targets in batches:
            size = targets.numel() if self._has_classes else len(targets)  # each token of a text is an answer
            loss += float(self.loss(outputs, targets)) * size
            if self._has_classes:
                n_right += int((self._classes(outputs) == targets).sum())
            total += self._total(outputs, targets) if self.metric_name not in ("accuracy", "perplexity") else 0.0
            n += size
        accuracy = n_right / n if self._has_classes else math.nan
        if self.metric_name == "accuracy":
            return Score(loss / n, accuracy, accuracy)
        if self.metric_name == "perplexity":
            return Score(loss / n, accuracy, _exp(loss / n))
        return Score(loss / n, accuracy, total / n)

    def _classes(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the class (b,) of each sample, or the token (b, T) at each place of a text."""
        return (outputs.reshape(len(outputs)) > 0).long() if self._is_binary else outputs.argmax(-1)

    def _total(self, outputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Return the metric, summed over the answers of a batch."""
        if self._own is not None:
            return float(self._own(outputs, targets)) * (targets.numel() if self._has_classes else len(targets))
        if self.metric_name == "top5":
            return float((outputs.topk(5, dim=-1).indices == targets[..., None]).sum())
        return float(l1(outputs, targets)) * len(targets)


def _default_metric(dataset: Dataset, loss: str) -> str:
    if dataset.predicts_tokens and loss == "cross_entropy":
        return "perplexity"
    return "accuracy" if dataset.n_classes else "mae"


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _as_targets(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the outputs in the shape of the targets: (b,) and (b, 1) would otherwise make (b, b) differences.

    Raises:
        UsageError: They are not as many numbers.
    """
    if outputs.numel() != targets.numel():
        raise UsageError(
            f"the model returns {tuple(outputs.shape)} for targets {tuple(targets.shape)}: it must return as many "
            "numbers per sample"
        )
    return widened(outputs).reshape(targets.shape)


def binary(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of logits (b,) or (b, 1) of class 1."""
    outputs = _as_targets(outputs, targets)
    return functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))


def mse(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean square of the differences."""
    outputs = _as_targets(outputs, targets)
    return functional.mse_loss(outputs, targets.to(outputs.dtype))


def l1(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute value of the differences."""
    outputs = _as_targets(outputs, targets)
    return functional.l1_loss(outputs, targets.to(outputs.dtype))


_LOSSES: dict[str, Compare] = {"cross_entropy": cross_entropy, "binary": binary, "mse": mse, "l1": l1}
