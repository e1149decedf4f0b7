"""The options of ``mpitrain simulate`` that describe a cluster: its network, racks, servers and cores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mpitrain.errors import UsageError
from mpitrain.simulation.network import Network
from mpitrain.trainer.options import (
    NON_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_INFINITE,
    check_ranges,
    default_of,
    flag_of,
    option,
    options_of,
)

NETWORKS = ("private", "loggp")


def pauses(text: str) -> tuple[float, float]:
    """Parse ``RATE:SECONDS``: the number of pauses per second of computation, and their length.

    Raises:
        UsageError: The text does not have this form.
    """
    rate, _, seconds = text.partition(":")
    try:
        return float(rate), float(seconds)
    except ValueError:
        raise UsageError(f"must be RATE:SECONDS, such as 0.5:0.1, not {text!r}") from None


def _seconds(help: str) -> Any:
    return option(0.0, help, parse=float, within=NON_NEGATIVE, metavar="SECONDS")


def _bandwidth(help: str) -> Any:
    return option(math.inf, help, parse=float, within=POSITIVE_OR_INFINITE, metavar="BYTES/S", default_text="unlimited")


@dataclass(frozen=True)
class ClusterConfig:
    """The cluster of a simulation. Each field declares an option; all but the first need ``--network loggp``."""

    network: str = option(
        "private",
        "private: an exchange takes a latency and its bytes over a link of the worker's own; loggp: messages share "
        "adapters, uplinks, servers and locks, and a collective costs what its algorithm does",
        choices=NETWORKS,
    )
    overhead: float = _seconds("processor time of a message at each end")
    gap: float = _seconds("least time between two messages of a node's adapter")
    node_latency: float = _seconds("time to lock a vector in the memory of the node")
    node_bandwidth: float = _bandwidth("bandwidth of a pass over a vector in the memory of the node")
    rack_nodes: int = option(
        0,
        "consecutive nodes that share an uplink to the others",
        parse=int,
        within=NON_NEGATIVE,
        metavar="N",
        default_text="all in one rack",
    )
    uplink: float = _bandwidth("bandwidth of a rack's uplink, in each direction")
    service: float = _seconds("time of the processor that serves a shard or a mailbox, for each request")
    service_bandwidth: float = _bandwidth("bandwidth of that processor")
    cores: int | None = option(
        None,
        "cores of a node, which its workers share in turns",
        parse=int,
        within=POSITIVE,
        metavar="N",
        default_text="one for each worker",
    )
    time_slice: float = option(
        0.003, "turn of a worker on a core that it shares", parse=float, within=POSITIVE, metavar="SECONDS"
    )
    wake_up: float = _seconds("time after a collective until workers that share cores run again")
    sharing: float = option(
        0.0,
        "part by which gradients take longer for each further worker of a core",
        parse=float,
        within=NON_NEGATIVE,
        metavar="PART",
    )
    pauses: tuple[float, float] = option(
        (0.0, 0.0),
        "random pauses of a worker: how many in a second of computation, and their length",
        parse=pauses,
        metavar="RATE:SECONDS",
        default_text="none",
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if not all(0 <= number < math.inf for number in self.pauses):
            raise UsageError(f"--pauses RATE:SECONDS must be two numbers of 0 or more, not {self.pauses}")
        if self.network == "private":
            declared = options_of(type(self))
            for name in declared:
                if name != "network" and getattr(self, name) != default_of(type(self), name):
                    raise UsageError(f"{flag_of(name, declared[name])} needs --network loggp")
        if self.uplink < math.inf and not self.rack_nodes:
            raise UsageError("--uplink needs --rack-nodes: without racks there is no uplink")

    def constants(self, latency: float, bandwidth: float) -> Network:
        """Return the network that these options describe.

        Args:
            latency, bandwidth: The latency and the bandwidth between nodes.
        """
        return Network(
            latency=latency,
            overhead=self.overhead,
            gap=self.gap,
            bandwidth=bandwidth,
            node_latency=self.node_latency,
            node_bandwidth=self.node_bandwidth,
            rack_nodes=self.rack_nodes,
            uplink=self.uplink,
            service=self.service,
            service_bandwidth=self.service_bandwidth,
        )
