"""The options of a run that decide how a rank makes its local update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpitrain.errors import UsageError
from mpitrain.trainer.options import AT_LEAST_ONE, NON_NEGATIVE, option, pairs


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """The options for the optimizer, the learning rate and the gradient; the base class of ``TrainConfig``."""

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
    precision: str = option(
        "float32",
        "type in which the model computes, by autocast; parameters keep theirs",
        choices=("float32", "bfloat16", "float16"),
    )
    accumulate: int = option(
        1,
        "mini-batches of a rank in a step, whose gradients are averaged; they count as one gradient",
        parse=int,
        within=AT_LEAST_ONE,
        metavar="N",
    )
    batch_sizes: Mapping[str, str] = option(
        {},
        "--batch-size of one rank, for unequal machines; may be given several times",
        flag="--batch-size-of",
        metavar="RANK=N",
        repeated=True,
        collect=pairs("--batch-size-of", "1=16"),
    )

    def check_batch_sizes(self) -> None:
        """Check the batch sizes of individual ranks.

        Raises:
            UsageError: A batch size or a rank is invalid.
        """
        for rank, size in self.batch_sizes.items():
            if not (rank.isdecimal() and size.isdecimal() and int(size) > 0):
                raise UsageError(f"--batch-size-of takes RANK=N, such as --batch-size-of 1=16, not '{rank}={size}'")
