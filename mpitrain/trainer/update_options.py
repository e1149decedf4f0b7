"""The options of a run that decide how a rank makes its local update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpitrain.trainer.options import NON_NEGATIVE, option, pairs


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """Optimizer and learning rate; a base of ``TrainConfig``."""

    optimizer: str = option("sgd", "local optimizer: sgd, adam, adamw, lion or module:Class", metavar="NAME")
    optimizer_settings: Mapping[str, str] = option(
        {},
        "a setting of the optimizer, such as beta2=0.95; may be given several times",
        flag="--optimizer-set",
        metavar="KEY=VALUE",
        repeated=True,
        collect=pairs("--optimizer-set", "beta2=0.95"),
    )
    schedule: str = option(
        "constant",
        "learning rate over the steps of a rank: constant, step, cosine, linear or module:function",
        metavar="NAME",
    )
    schedule_settings: Mapping[str, str] = option(
        {},
        "a setting of the schedule, such as final=0.1; may be given several times",
        flag="--schedule-set",
        metavar="KEY=VALUE",
        repeated=True,
        collect=pairs("--schedule-set", "final=0.1"),
    )
    warmup: int = option(
        0,
        "steps of a rank in which the learning rate rises to --lr",
        parse=int,
        within=NON_NEGATIVE,
        metavar="STEPS",
    )
