"""The options of a run that decide what is minimised, what is reported, and when a run ends early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpitrain.errors import UsageError, unknown
from mpitrain.trainer.options import AT_LEAST_ONE, option

OF_CLASSES = ("cross_entropy", "binary")
OF_NUMBERS = ("mse", "l1")
LOSSES = (*OF_CLASSES, *OF_NUMBERS)
"""The losses: of class labels, and of real-valued targets."""

METRICS = {"accuracy": True, "top5": True, "perplexity": False, "mae": False}
"""The metrics, and whether a larger value is better."""

LOSS = "loss"
"""The name of the test loss in ``--target``."""


def metric_in_words(name: str, value: float) -> str:
    """Return a metric and its value, such as ``accuracy 91.00%``."""
    if name in ("accuracy", "top5"):
        return f"{name} {value:.2%}"
    return f"{name.rpartition(':')[2]} {value:.4g}"


@dataclass(frozen=True)
class Target:
    """The value that a metric or the loss has to reach.

    Attributes:
        name: The name of the run's metric, or ``loss``.
        value: The value.
    """

    name: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Return the target that a text such as ``accuracy=0.95`` states.

        Raises:
            UsageError: The text has another form.
        """
        name, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (equals and name and math.isfinite(value)):
            raise UsageError(f"--target takes METRIC=VALUE, such as --target accuracy=0.95, not {text!r}")
        return cls(name, value)


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Loss, metric and early end; a base of ``TrainConfig``."""

    loss: str = option(
        "cross_entropy",
        "mean loss of a mini-batch: cross_entropy, binary (cross entropy of two classes with one logit), mse or l1 "
        "(real-valued targets), or module:function",
        metavar="NAME",
    )
    metric: str | None = option(
        None,
        "what is reported of the test set beside its loss: accuracy, top5, perplexity, mae or module:function",
        metavar="NAME",
        default_text="accuracy, perplexity of text, or mae with real-valued targets",
    )
    target: str | None = option(
        None,
        "end the run as soon as an evaluation reaches this value of the metric or of the loss",
        metavar="METRIC=VALUE",
        default_text="none",
        replaceable=True,
    )
    patience: int | None = option(
        None,
        "end the run after this many evaluations in a row without a new best of what --target names, or of the loss",
        parse=int,
        within=AT_LEAST_ONE,
        metavar="N",
        default_text="no limit",
        replaceable=True,
    )

    def check_objective(self) -> None:
        """Check the names of loss, metric and target.

        Raises:
            UsageError: One is unknown, or they do not fit together.
        """
        if self.loss not in LOSSES and ":" not in self.loss:
            raise UsageError(unknown("loss", self.loss, LOSSES, otherwise="module:function for a loss of your own"))
        metric = self.metric
        if metric is not None and metric not in METRICS and ":" not in metric:
            raise UsageError(unknown("metric", metric, METRICS, otherwise="module:function for a metric of your own"))
        if metric == "perplexity" and self.loss != "cross_entropy":
            raise UsageError(f"--metric perplexity is exp(cross entropy): it does not go with --loss {self.loss}")
        if metric in ("accuracy", "top5") and self.loss in OF_NUMBERS:
            raise UsageError(f"--metric {metric} needs classes: --loss {self.loss} goes with mae or module:function")
        if metric == "mae" and self.loss in OF_CLASSES:
            raise UsageError(f"--metric mae needs real-valued targets, which --loss {self.loss} does not have")
        if self.target is not None:
            name = Target.parse(self.target).name
            defaults = ("mae",) if self.loss in OF_NUMBERS else ("accuracy",)
            if metric is None and name == "perplexity" and self.loss == "cross_entropy":
                return  # the default metric of text, which only the data show
            _check_target(name, (LOSS, *((metric,) if metric else defaults)))

    def check_target(self, metric: str) -> None:
        """Check that the target is the loss or the metric of the run, once the data have decided the metric.

        Raises:
            UsageError: It is another metric.
        """
        if self.target is not None:
            _check_target(Target.parse(self.target).name, (LOSS, metric))


def _check_target(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UsageError(f"--target {name}: this run has {' and '.join(known)}; choose another with --metric")
