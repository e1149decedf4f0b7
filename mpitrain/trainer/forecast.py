"""A forecast for a cluster that may not be at hand: for each method the time of an epoch, and which method to pick.

The classes of the methods run in the simulated world, on the network of ``simulation.network``. Only time is of
interest. They therefore exchange a shorter vector, on a network whose bandwidths are smaller by the same factor. This
does not change the time, which is linear in bytes in LogGP, the model of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpitrain import algorithms
from mpitrain.algorithms import METHODS, Method
from mpitrain.algorithms.base.settings import settings_of
from mpitrain.collectives.rma.peer_memory import LARGEST_REMOTE_SHARD, SMALLEST_REMOTE_SHARD
from mpitrain.collectives.rma.shared_vector import LARGEST_SHARD, SMALLEST_SHARD
from mpitrain.errors import UsageError
from mpitrain.simulation.compute import ComputeTime
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.network import REQUEST_BYTES, Network
from mpitrain.simulation.network_time import NetworkTime
from mpitrain.simulation.world import SimulatedWorld
from mpitrain.trainer.forecast_config import ForecastConfig

ELEMENTS = 4096
"""Elements of the vector that is exchanged in place of the model."""

FEWEST_STEPS, MOST_STEPS = 40, 1000
CLOSE = 1.25
"""A synchronous method with at most this many times the shortest time of an epoch is preferred."""


@dataclass(frozen=True)
class Forecast:
    """The expected time and communication of a method.

    Attributes:
        algorithm: The name of the method.
        settings: The settings of the method.
        is_synchronous: Whether its workers wait for each other.
        epoch_seconds: The time in which all ranks together compute the gradients of an epoch.
        computing_share: The fraction of the ranks' time in which they compute gradients.
        communication_share: The fraction of the ranks' time for messages, locks and waiting. Both shares add up to 1.
        bytes_per_step: The mean number of bytes that a rank sends and receives in a step.
        warnings: A line for each setting outside the region in which the method is known to be stable.
    """

    algorithm: str
    settings: dict[str, Any]
    is_synchronous: bool
    epoch_seconds: float
    computing_share: float
    communication_share: float
    bytes_per_step: float
    warnings: tuple[str, ...]

    @property
    def is_stable(self) -> bool:
        """Whether all settings are inside the region in which the method is known to be stable."""
        return not self.warnings


def forecasts(config: ForecastConfig) -> list[Forecast]:
    """Return the forecast of each method, the shortest epoch first.

    Raises:
        UsageError: A setting belongs to none of the methods, or its value is invalid.
    """
    chosen = {name: settings_of(METHODS[name]) for name in config.methods}
    for key in config.settings:
        if not any(key in settings for settings in chosen.values()):
            raise UsageError(f"--set {key}: none of {', '.join(chosen)} has this setting")
    found = []
    for name, known in chosen.items():
        own = {key: value for key, value in config.settings.items() if key in known}
        found.append(forecast(algorithms.create(name, own), config))
    return sorted(found, key=lambda one: one.epoch_seconds)


def forecast(method: Method, config: ForecastConfig) -> Forecast:
    """Return the forecast of one method."""
    p, n = config.ranks, min(config.parameters, ELEMENTS)
    factor = config.parameters / n
    nodes = [rank // config.ranks_per_node for rank in range(p)]
    means = [config.step_seconds] * p
    for rank, slower in config.straggler:
        means[rank] *= slower
    compute = ComputeTime(means, jitter=config.jitter)
    clock = NetworkTime(compute, _network(config, factor), nodes)
    smallest, largest = (max(math.ceil(size / factor), 1) for size in shard_sizes(nodes))
    world = SimulatedWorld(p, clock, nodes=nodes, largest_shard=largest, smallest_shard=smallest)
    start = np.ones(n, np.float32)
    steps = _steps(method)
    Simulation(method, world, lambda rank, x: x, start, learning_rate=1e-6).run(steps)
    n_bytes = sum(comm.statistics.bytes_sent for comm in world.communicators)
    steps_per_second = float(np.sum(steps / clock.clocks))
    computing = float(compute.spent.sum() / clock.clocks.sum())
    return Forecast(
        algorithm=method.name,
        settings=method.settings(),
        is_synchronous=method.is_synchronous,
        epoch_seconds=config.samples / config.batch_size / steps_per_second,
        computing_share=computing,
        communication_share=1 - computing,
        bytes_per_step=n_bytes * factor / (p * steps),
        warnings=tuple(method.warnings(p, config.lr)),
    )


def recommendation(found: Sequence[Forecast]) -> str:
    """Return a sentence that recommends one of the forecasts.

    Only methods inside their stability region are candidates. A synchronous method is preferred unless it is much
    slower than the fastest method. It usually has the lowest loss after the same number of gradients.
    """
    stable = [one for one in found if one.is_stable]
    if not stable:
        return "No method is inside its stability region: lower the learning rate, or change the settings named above."
    fastest = min(stable, key=lambda one: one.epoch_seconds)
    close = [one for one in stable if one.is_synchronous and one.epoch_seconds <= CLOSE * fastest.epoch_seconds]
    every_step = [one for one in close if one.algorithm == "allreduce"]
    if every_step:
        return f"Pick allreduce: its epoch takes {_ratio(every_step[0], fastest)}, and all ranks stay equal."
    if close:
        best = min(close, key=lambda one: one.epoch_seconds)
        return f"Pick {best.algorithm}: its epoch takes {_ratio(best, fastest)}, and its workers keep in step."
    return f"Pick {fastest.algorithm}: its epoch is the shortest; synchronous ones take over {CLOSE:g} times as long."


def _ratio(one: Forecast, fastest: Forecast) -> str:
    ratio = one.epoch_seconds / fastest.epoch_seconds
    return "the least time" if ratio <= 1 else f"{ratio:.2f} times the least"


def shard_sizes(nodes: Sequence[int]) -> tuple[int, int]:
    """Return two limits that real ranks on these nodes use to divide a center into shards, in elements.

    Returns:
        The smallest part of the center in the memory of one rank, and the largest size of a shard.
    """
    if len(set(nodes)) == 1:
        return SMALLEST_SHARD, LARGEST_SHARD
    return SMALLEST_REMOTE_SHARD, LARGEST_REMOTE_SHARD


def _network(config: ForecastConfig, factor: float) -> Network:
    """Return the network on which a vector shorter by a factor takes the same time."""
    return Network(
        latency=config.latency,
        bandwidth=config.bandwidth / factor,
        node_latency=config.node_latency,
        node_bandwidth=config.node_bandwidth / factor,
        rack_nodes=config.rack_nodes,
        uplink=config.uplink / factor,
        request_bytes=REQUEST_BYTES / factor,
    )


def _steps(method: Method) -> int:
    """Return the number of steps to simulate: two of the method's longest periods."""
    periods = [value for name, value in method.settings().items() if name.endswith("period") and value]
    return min(max(FEWEST_STEPS, 2 * max(periods, default=1)), MOST_STEPS)
