"""The constants of a cluster, fitted to the metrics of a real run, for ``mpitrain simulate --calibrate``.

    gradient     the time of computation per step; its CPU time if ranks shared cores
    exchange     the time per exchange without waiting, as a bandwidth: from one run, a latency cannot be told from it
    time slice and jitter    the values for which the simulated staleness is closest to the staleness of the run
    wake-up      of a synchronous method whose ranks shared cores: the time of a step in which the cores were idle

A rank that shares a core stops while others compute, and its times say nothing about its own work. The CPU time of its
steps does, and it is divided between computation and exchanges in the proportion of their times.

The distance of two histograms is their total variation, half the sum of the absolute differences of their frequencies.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain import algorithms
from mpitrain.algorithms import Method
from mpitrain.collectives.world.statistics import STALENESS_BINS
from mpitrain.errors import UsageError
from mpitrain.records.metrics import read_metrics
from mpitrain.simulation.compute import ComputeTime
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.network import Network
from mpitrain.simulation.network_time import NetworkTime
from mpitrain.simulation.world import SimulatedWorld

SLICES = tuple(float(seconds) for seconds in np.geomspace(3e-4, 3e-2, 7))
JITTERS = (0.0, 0.1, 0.3, 0.6)
VISITS = 200
"""Steps of each worker in a simulation of the staleness."""


@dataclass(frozen=True)
class Measured:
    """The figures of a finished run that describe its cluster.

    Attributes:
        algorithm, settings: The method and its settings.
        nodes: (ranks,) the node of each rank.
        step_seconds: The time between two steps of a rank.
        cpu_seconds: The CPU time of a step.
        compute_share, exchange_share: The fractions of this time that a rank spends on computation and on exchanges.
            The rest is waiting.
        exchanges_per_step: The number of exchanges of a rank per step.
        vector_bytes: The size of the model's vector, in bytes.
        staleness: (33,) the histogram of the staleness of exchanges with the center; None without such exchanges.
    """

    algorithm: str
    settings: Mapping[str, Any]
    nodes: tuple[int, ...]
    step_seconds: float
    cpu_seconds: float
    compute_share: float
    exchange_share: float
    exchanges_per_step: float
    vector_bytes: int
    staleness: np.ndarray | None


def measured(run: Path) -> Measured:
    """Return the measurements of a run.

    Raises:
        UsageError: The folder holds no finished run of ``mpitrain train``.
    """
    try:
        result = json.loads((run / "result.json").read_text())
        shares, steps = result["shares"], sum(result["steps_of_ranks"])
        nodes = [node for node, n_ranks in enumerate(result["world"]["ranks_of_node"]) for _ in range(n_ranks)]
        tables = read_metrics(run / "metrics.h5")
        histogram = tables["staleness"]["histogram"][-1]
        return Measured(
            algorithm=result["algorithm"],
            settings=result["settings"],
            nodes=tuple(nodes),
            step_seconds=result["seconds"] * len(nodes) / steps,
            cpu_seconds=result["cpu_seconds"] / steps,
            compute_share=shares["compute"],
            exchange_share=shares["exchange"],
            exchanges_per_step=float(np.nanmax(tables["progress"]["exchanges"])) / steps,
            vector_bytes=4 * result["parameters"],
            staleness=histogram / histogram.sum() if histogram.sum() else None,
        )
    except (OSError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UsageError(f"--calibrate {run} is not the folder of a finished run of mpitrain train ({why})") from error


def calibrated(run: Path, cores: int | None = None) -> dict[str, Any]:
    """Fit options of ``mpitrain simulate`` to a run, and return them by the names of their fields.

    Args:
        run: The folder of the run.
        cores: The cores of each node of the run. If the run was on this machine, the default is the cores of this
            machine.

    Raises:
        UsageError: The run cannot be read, or its number of cores is unknown.
    """
    found = measured(run)
    per_node = max(found.nodes.count(node) for node in set(found.nodes))
    n_cores = _cores(run) if cores is None else cores
    compute, exchange = found.step_seconds * found.compute_share, found.step_seconds * found.exchange_share
    if n_cores < per_node:
        factor = found.cpu_seconds / max(compute + exchange, 1e-12)
        compute, exchange = factor * compute, factor * exchange
    options = {"network": "loggp", "workers_per_node": per_node, "cores": n_cores, "step_seconds": compute}
    exchange /= max(found.exchanges_per_step, 1e-12)
    if exchange > 0 and found.exchanges_per_step > 0:
        link = "node_bandwidth" if len(set(found.nodes)) == 1 else "bandwidth"
        options[link] = found.vector_bytes / exchange
    return options | _fit_staleness(found, options) | _fit_wake_up(found, options, exchange)


def _fit_wake_up(found: Measured, options: Mapping[str, Any], exchange: float) -> dict[str, float]:
    """Return the time of an exchange in which workers that share cores neither compute nor pass over memory.

    Args:
        found: The measurements.
        options: The options that are fitted so far.
        exchange: The seconds of an exchange.
    """
    per_node, n_cores = options["workers_per_node"], options["cores"]
    if not _method(found).is_synchronous or n_cores >= per_node or found.exchanges_per_step <= 0:
        return {}
    busy = math.ceil(per_node / n_cores) * (options["step_seconds"] + exchange * found.exchanges_per_step)
    return {"wake_up": max(found.step_seconds - busy, 0.0) / found.exchanges_per_step}


def _method(found: Measured) -> Method:
    """Return the method of the run, with its settings."""
    return algorithms.create(
        found.algorithm, {name: str(value) for name, value in found.settings.items() if value is not None}
    )


def _cores(run: Path) -> int:
    hosts = json.loads((run / "result.json").read_text())["world"].get("hosts", [])
    if socket.gethostname() not in hosts:
        raise UsageError(f"--calibrate {run}: the run was on another machine, so give the --cores of its nodes")
    return len(os.sched_getaffinity(0))


def _fit_staleness(found: Measured, options: Mapping[str, Any]) -> dict[str, float]:
    """Return the time slice and the jitter whose staleness is closest to that of the run; none without staleness."""
    if found.staleness is None:
        return {}
    is_shared = options["workers_per_node"] > options["cores"]
    best = min(
        product(SLICES if is_shared else SLICES[:1], JITTERS),
        key=lambda pair: total_variation(found.staleness, simulated_staleness(found, options, *pair)),
    )
    return {"time_slice": best[0], "jitter": best[1]} if is_shared else {"jitter": best[1]}


def total_variation(one: Any, other: Any) -> float:
    """Return the total variation distance of two histograms (bins,): 0 if they are equal, 1 if they are disjoint."""
    return float(np.abs(np.asarray(one) - np.asarray(other)).sum() / 2)


def simulated_staleness(found: Measured, options: Mapping[str, Any], slice_seconds: float, jitter: float) -> np.ndarray:
    """Simulate the run's method on a short vector, and return the histogram (33,) of the staleness."""
    n = 16
    network = Network(
        bandwidth=options.get("bandwidth", float("inf")) * 4 * n / found.vector_bytes,
        node_bandwidth=options.get("node_bandwidth", float("inf")) * 4 * n / found.vector_bytes,
    )
    clock = NetworkTime(
        ComputeTime([options["step_seconds"]] * len(found.nodes), jitter=jitter),
        network,
        found.nodes,
        cores=options["cores"],
        slice_seconds=slice_seconds,
    )
    world = SimulatedWorld(len(found.nodes), clock, nodes=found.nodes)
    simulation = Simulation(_method(found), world, lambda rank, x: x, np.ones(n, np.float32), 1e-6)
    simulation.run(VISITS)
    histogram = np.sum([comm.statistics.staleness for comm in world.communicators], axis=0)
    return np.asarray(histogram / histogram.sum()) if histogram.sum() else np.zeros(STALENESS_BINS)
