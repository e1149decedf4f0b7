"""The options of ``mpitrain plan``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mpitrain.algorithms import METHODS
from mpitrain.errors import UsageError, unknown
from mpitrain.trainer.options import (
    AT_LEAST_ONE,
    NON_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_INFINITE,
    check_ranges,
    option,
    parse_settings,
    straggler,
)

COMPARED = (
    *("allreduce", "localsgd", "slowmo", "sgp", "adpsgd", "gossip", "easgd", "eamsgd", "lsgd"),
    *("downpour", "agn", "diloco"),
)
"""The methods that are compared unless others are named."""


def names(text: str) -> tuple[str, ...]:
    """Parse names of methods, separated by commas.

    Raises:
        UsageError: A method does not exist.
    """
    found = tuple(name.strip() for name in text.split(","))
    for name in found:
        if name not in METHODS:
            raise UsageError(unknown("algorithm", name, METHODS, otherwise="see mpitrain algorithms"))
    return found


@dataclass(frozen=True)
class ForecastConfig:
    """A model, a cluster and the methods to compare on it. Each field declares an option."""

    parameters: int = option(1_000_000, "parameters of the model, float32", parse=int, within=POSITIVE)
    step_seconds: float = option(0.1, "time of a gradient, in seconds", parse=float, within=POSITIVE)
    samples: int = option(50_000, "training samples in an epoch", parse=int, within=POSITIVE)
    batch_size: int = option(32, "samples in a mini-batch of each rank", parse=int, within=POSITIVE)
    lr: float = option(0.05, "learning rate of the local SGD", parse=float, within=NON_NEGATIVE)
    ranks: int = option(16, "number of ranks", parse=int, within=AT_LEAST_ONE)
    ranks_per_node: int = option(1, "consecutive ranks that share a node", parse=int, within=AT_LEAST_ONE)
    latency: float = option(
        25e-6, "latency of a message between nodes", parse=float, within=NON_NEGATIVE, metavar="SECONDS"
    )
    bandwidth: float = option(
        1.25e9, "bandwidth of a node's adapter", parse=float, within=POSITIVE_OR_INFINITE, metavar="BYTES/S"
    )
    node_latency: float = option(
        2e-6, "time to lock a vector in the memory of the node", parse=float, within=NON_NEGATIVE, metavar="SECONDS"
    )
    node_bandwidth: float = option(
        5e9,
        "bandwidth of a pass over a vector in the memory of the node",
        parse=float,
        within=POSITIVE_OR_INFINITE,
        metavar="BYTES/S",
    )
    rack_nodes: int = option(
        0,
        "consecutive nodes that share an uplink to the others",
        parse=int,
        within=NON_NEGATIVE,
        metavar="N",
        default_text="all in one rack",
    )
    uplink: float = option(
        math.inf,
        "bandwidth of a rack's uplink, in each direction",
        parse=float,
        within=POSITIVE_OR_INFINITE,
        metavar="BYTES/S",
        default_text="unlimited",
    )
    jitter: float = option(
        0.1, "spread of the gradient times: standard deviation of their logarithm", parse=float, within=NON_NEGATIVE
    )
    straggler: tuple[tuple[int, float], ...] = option(
        (),
        "slow one rank down by a factor; may be given several times",
        parse=straggler,
        metavar="RANK:FACTOR",
        repeated=True,
        collect=tuple,
    )
    methods: tuple[str, ...] = option(
        COMPARED, "methods to compare", parse=names, metavar="NAME,...", default_text=",".join(COMPARED)
    )
    settings: Mapping[str, str] = option(
        {},
        "a setting, of the methods that have it; may be given several times",
        flag="--set",
        metavar="KEY=VALUE",
        repeated=True,
        collect=parse_settings,
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        for rank, factor in self.straggler:
            if not (0 <= rank < self.ranks and 1 <= factor < math.inf):
                raise UsageError(
                    f"--straggler {rank}:{factor:g} must be a rank from 0 to {self.ranks - 1} and a factor of 1 or more"
                )
        if self.uplink < math.inf and not self.rack_nodes:
            raise UsageError("--uplink needs --rack-nodes: without racks there is no uplink")
