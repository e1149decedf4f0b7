"""The options of ``mpitrain simulate`` in addition to those of a real run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpitrain.errors import UsageError
from mpitrain.trainer.options import (
    NON_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_INFINITE,
    check_ranges,
    number_for_rank,
    option,
    straggler,
)

SHARED = (
    *(
        "algorithm",
        "settings",
        "data",
        "model",
        "model_settings",
        "batch_size",
        "lr",
        "momentum",
        "weight_decay",
        "average",
        "sampling",
    ),
    *("clip_displacement", "seed", "out", "epochs", "gradients"),
)
"""The fields of ``TrainConfig`` that are options of ``mpitrain simulate`` too."""


@dataclass(frozen=True)
class StudyConfig:
    """The workers of a simulation, their speed and the network. Each field declares an option."""

    seconds: float | None = option(None, "seconds of virtual time", parse=float, within=POSITIVE, group="budget")
    workers: int = option(16, "number of workers", parse=int, within=POSITIVE)
    workers_per_node: int | None = option(
        None,
        "consecutive workers that share a node",
        parse=int,
        within=POSITIVE,
        metavar="N",
        default_text="all on one node",
    )
    calibrate: str | None = option(
        None,
        "fit the time of a gradient, the network and the cores to a finished run; options that are given come first",
        metavar="RUN",
        default_text="none",
    )
    step_seconds: float = option(0.01, "virtual time of a gradient, in seconds", parse=float, within=POSITIVE)
    jitter: float = option(
        0.0, "spread of the gradient times: standard deviation of their logarithm", parse=float, within=NON_NEGATIVE
    )
    latency: float = option(
        0.0, "virtual latency of an exchange, in seconds", parse=float, within=NON_NEGATIVE, metavar="SECONDS"
    )
    bandwidth: float = option(
        math.inf,
        "bandwidth of a worker's link",
        parse=float,
        within=POSITIVE_OR_INFINITE,
        metavar="BYTES/S",
        default_text="unlimited",
    )
    straggler: tuple[tuple[int, float], ...] = option(
        (),
        "slow one worker down by a factor; may be given several times",
        parse=straggler,
        metavar="RANK:FACTOR",
        repeated=True,
        collect=tuple,
    )
    death: tuple[tuple[int, float], ...] = option(
        (),
        "the virtual time at which a worker dies; may be given several times",
        parse=number_for_rank("RANK:SECONDS, such as 3:1.5"),
        metavar="RANK:SECONDS",
        repeated=True,
        collect=tuple,
    )
    join: tuple[tuple[int, float], ...] = option(
        (),
        "the virtual time at which a worker begins, instead of 0; may be given several times",
        parse=number_for_rank("RANK:SECONDS, such as 3:1.5"),
        metavar="RANK:SECONDS",
        repeated=True,
        collect=tuple,
    )
    evaluations: int = option(10, "evaluations, evenly spread over the run", parse=int, within=POSITIVE)

    def __post_init__(self) -> None:
        check_ranges(self)
        workers = f"a worker from 0 to {self.workers - 1}"
        for rank, factor in self.straggler:
            if not (0 <= rank < self.workers and 1 <= factor < math.inf):
                raise UsageError(f"--straggler {rank}:{factor:g} must be {workers} and a factor of 1 or more")
        for rank, seconds in self.death:
            if not (0 <= rank < self.workers and 0 <= seconds < math.inf):
                raise UsageError(f"--death {rank}:{seconds:g} must be {workers} and a time of 0 or more")
        for rank, seconds in self.join:
            if not (0 <= rank < self.workers and 0 <= seconds < math.inf):
                raise UsageError(f"--join {rank}:{seconds:g} must be {workers} and a time of 0 or more")
        if len({rank for rank, _ in self.death}) == self.workers:
            raise UsageError("--death must leave a worker alive")

    def step_seconds_of_workers(self) -> list[float]:
        """Return the virtual time that each worker takes for a gradient, in seconds."""
        seconds = [self.step_seconds] * self.workers
        for rank, factor in self.straggler:
            seconds[rank] *= factor
        return seconds

    def starts_of_workers(self) -> list[float]:
        """Return the virtual time at which each worker begins, in seconds."""
        seconds = [0.0] * self.workers
        for rank, start in self.join:
            seconds[rank] = start
        return seconds

    def nodes_of_workers(self) -> list[int]:
        """Return the node of each worker."""
        if self.workers_per_node is None:
            return [0] * self.workers
        return [rank // self.workers_per_node for rank in range(self.workers)]
