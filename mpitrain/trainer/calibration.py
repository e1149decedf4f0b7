"""The constants of a cluster, fitted to the metrics of a real run, for ``mpitrain simulate --calibrate``.

    gradient     the time of computation per step; if ranks shared cores, the CPU time of an undisturbed gradient
    exchange     the time of exchanges without waiting (if ranks shared cores, the CPU time of undisturbed ones) as a
                 bandwidth: from one run, a latency cannot be told from it. Between nodes, the cost of a byte that
                 crosses the network and that of an exchange within a node fit the exchanges of all ranks best
    service      the CPU time of the threads that serve other nodes, per exchange with another node: a quarter, as an
                 exchange has two requests, and a message wakes the threads of both ranks
    sharing      of an asynchronous method whose ranks shared cores: the part by which gradients take longer with which
                 a simulation of the run takes as long as the run
    time slice and jitter    the values for which the simulated staleness is closest to the staleness of the run
    wake-up      of a synchronous method whose ranks shared cores: the time of a step in which the cores were idle

A rank that shares a core stops while others compute, and its times say nothing about its own work. Its CPU time does,
but the CPU time of a gradient grows where others empty the caches between two turns, and where the kernel serves the
messages of others in the rank's turn. The lower quartiles of its gradients and of its exchanges are taken as
undisturbed (``step_cpu``), and ``sharing`` is the rest.

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
VISITS, STEPS = 200, 1000
"""Steps of each worker in a simulation of the staleness, and of the time of a step."""

N_CORRECTIONS = 3
"""Simulations of the run in the fit of ``sharing``; each corrects the error of the one before."""


@dataclass(frozen=True)
class Measured:
    """The figures of a finished run that describe its cluster.

    Attributes:
        algorithm, settings: The method and its settings.
        nodes: (ranks,) the node of each rank.
        steps: (ranks,) the number of steps of each rank.
        step_seconds: The time between two steps of a rank.
        gradient_cpu_seconds: The CPU time of an undisturbed gradient.
        compute_share, exchange_share: The fractions of this time that a rank spends on computation and on exchanges.
            The rest is waiting.
        exchanges_per_step: The number of exchanges of a rank per step.
        exchanges: (ranks,) the number of exchanges.
        bytes, wire_bytes: (ranks,) the bytes of exchanges, and those that have crossed the network.
        exchange_cpu_seconds: (ranks,) the CPU time of an undisturbed exchange.
        serving_cpu_seconds: (ranks,) the CPU time of the thread that serves requests of other nodes.
        vector_bytes: The size of the model's vector, in bytes.
        staleness: (33,) the histogram of the staleness of exchanges with the center; None without such exchanges.
    """

    algorithm: str
    settings: Mapping[str, Any]
    nodes: tuple[int, ...]
    steps: np.ndarray
    step_seconds: float
    gradient_cpu_seconds: float
    compute_share: float
    exchange_share: float
    exchanges_per_step: float
    exchanges: np.ndarray
    bytes: np.ndarray
    wire_bytes: np.ndarray
    exchange_cpu_seconds: np.ndarray
    serving_cpu_seconds: np.ndarray
    vector_bytes: int
    staleness: np.ndarray | None

    @property
    def n_nodes(self) -> int:
        """The number of nodes."""
        return len(set(self.nodes))

    @property
    def remote_exchanges(self) -> np.ndarray:
        """(ranks,) the number of exchanges with other nodes, in the proportion of their bytes."""
        return self.exchanges * np.clip(self.wire_bytes / np.maximum(self.bytes, 1), 0, 1)


def measured(run: Path) -> Measured:
    """Return the measurements of a run.

    Raises:
        UsageError: The folder holds no finished run of ``mpitrain train``.
    """
    try:
        result = json.loads((run / "result.json").read_text())
        shares, steps = result["shares"], sum(result["steps_of_ranks"])
        of_ranks = {name: np.array(values, np.float64) for name, values in result["of_ranks"].items()}
        nodes = [node for node, n_ranks in enumerate(result["world"]["ranks_of_node"]) for _ in range(n_ranks)]
        tables = read_metrics(run / "metrics.h5")
        histogram = tables["staleness"]["histogram"][-1]
        return Measured(
            algorithm=result["algorithm"],
            settings=result["settings"],
            nodes=tuple(nodes),
            steps=np.array(result["steps_of_ranks"]),
            step_seconds=result["seconds"] * len(nodes) / steps,
            gradient_cpu_seconds=float(of_ranks["gradient_cpu"].mean()),
            compute_share=shares["compute"],
            exchange_share=shares["exchange"],
            exchanges_per_step=float(of_ranks["exchanges"].sum()) / steps,
            exchanges=of_ranks["exchanges"],
            bytes=of_ranks["bytes"],
            wire_bytes=of_ranks["wire_bytes"],
            exchange_cpu_seconds=of_ranks["exchange_cpu"],
            serving_cpu_seconds=of_ranks["serving_cpu"],
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
    is_shared = n_cores < per_node
    gradient = found.gradient_cpu_seconds if is_shared else found.step_seconds * found.compute_share
    options = {"network": "loggp", "workers_per_node": per_node, "cores": n_cores, "step_seconds": gradient}
    options |= _fit_exchanges(found, is_shared=is_shared)
    if _method(found).is_synchronous:
        return options | _fit_wake_up(found, options)
    return options | _fit_turns(found, options)


def _fit_exchanges(found: Measured, *, is_shared: bool) -> dict[str, float]:
    """Return bandwidths, and the time of a service, from the times of exchanges without waiting.

    Args:
        found: The measurements.
        is_shared: Whether ranks shared cores.
    """
    n_exchanges, seconds = found.exchanges.sum(), found.exchanges * found.exchange_cpu_seconds
    if not is_shared:  # the share of each rank in the time is that in the CPU time
        n_steps = n_exchanges / max(found.exchanges_per_step, 1e-12)
        seconds = seconds * (found.step_seconds * found.exchange_share * n_steps / max(seconds.sum(), 1e-12))
    if not seconds.sum() > 0 or not n_exchanges:
        return {}
    of_all = {"bandwidth" if found.n_nodes > 1 else "node_bandwidth": found.vector_bytes * n_exchanges / seconds.sum()}
    n_remote = found.remote_exchanges
    if _method(found).is_synchronous or not n_remote.sum():
        return of_all
    of_local, of_byte = _nonnegative_fit(found.exchanges - n_remote, found.wire_bytes, seconds)
    # A visit has two requests, each of which wakes the threads of both ranks.
    fitted = {"service": float(found.serving_cpu_seconds.sum() / n_remote.sum()) / 4}
    if of_local:
        fitted["node_bandwidth"] = found.vector_bytes / of_local
    if of_byte:
        fitted["bandwidth"] = 1 / of_byte
    return fitted


def _nonnegative_fit(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> tuple[float, float]:
    """Return x, y >= 0 for which x*a + y*b is closest to ``total``, all (ranks,); x is 0 if they are not unique."""
    columns = np.stack([a / max(a.max(), 1e-12), b / max(b.max(), 1e-12)], axis=1)
    (x, y), _, rank, _ = np.linalg.lstsq(columns, total, rcond=1e-6)
    if rank < 2 or x < 0:
        return 0.0, float(total.sum() / max(b.sum(), 1e-12))
    if y < 0:
        return float(total.sum() / max(a.sum(), 1e-12)), 0.0
    return float(x / max(a.max(), 1e-12)), float(y / max(b.max(), 1e-12))


def _fit_wake_up(found: Measured, options: Mapping[str, Any]) -> dict[str, float]:
    """Return the time of an exchange in which workers that share cores neither compute nor exchange."""
    per_node, n_cores = options["workers_per_node"], options["cores"]
    if n_cores >= per_node or found.exchanges_per_step <= 0:
        return {}
    n_turns = math.ceil(per_node / n_cores)
    exchange = found.vector_bytes / options.get("bandwidth", math.inf)
    exchange += n_turns * found.vector_bytes / options.get("node_bandwidth", math.inf)
    busy = n_turns * options["step_seconds"] + exchange * found.exchanges_per_step
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


def _fit_turns(found: Measured, options: Mapping[str, Any]) -> dict[str, float]:
    """Return the jitter of an asynchronous method, and on shared cores the time slice and ``sharing``.

    The jitter and the slice are those whose staleness is closest to that of the run.
    """
    is_shared = options["workers_per_node"] > options["cores"]
    fitted: dict[str, float] = {"time_slice": SLICES[3], "jitter": 0.0} if is_shared else {}
    if is_shared:
        fitted["sharing"] = _fit_sharing(found, options, fitted)
    if found.staleness is not None:
        best = min(
            product(SLICES if is_shared else SLICES[:1], JITTERS),
            key=lambda pair: total_variation(found.staleness, simulated_staleness(found, {**options, **fitted}, *pair)),
        )
        fitted |= {"time_slice": best[0], "jitter": best[1]} if is_shared else {"jitter": best[1]}
        if is_shared:
            fitted["sharing"] = _fit_sharing(found, options, fitted)
    elif is_shared:
        del fitted["time_slice"], fitted["jitter"]
    return fitted


def _fit_sharing(found: Measured, options: Mapping[str, Any], turns: Mapping[str, float]) -> float:
    """Return the ``sharing`` with which a simulation takes as long as the run; 0 if it takes longer without."""
    sharing, per_core = 0.0, options["workers_per_node"] / options["cores"]
    for _ in range(N_CORRECTIONS):
        seconds, _ = simulated(found, {**options, **turns, "sharing": sharing}, STEPS)
        missing = (found.step_seconds - seconds) / per_core  # of each gradient
        sharing = max(sharing + missing / options["step_seconds"] / (per_core - 1), 0.0)
    return sharing


def total_variation(one: Any, other: Any) -> float:
    """Return the total variation distance of two histograms (bins,): 0 if they are equal, 1 if they are disjoint."""
    return float(np.abs(np.asarray(one) - np.asarray(other)).sum() / 2)


def simulated_staleness(found: Measured, options: Mapping[str, Any], slice_seconds: float, jitter: float) -> np.ndarray:
    """Simulate the run's method on a short vector, and return the histogram (33,) of the staleness."""
    return simulated(found, {**options, "time_slice": slice_seconds, "jitter": jitter})[1]


def simulated(found: Measured, options: Mapping[str, Any], n_steps: int = VISITS) -> tuple[float, np.ndarray]:
    """Simulate steps of the run's workers on a short vector, divided among them as in the run.

    Args:
        found: The measurements.
        options: The options of the simulation.
        n_steps: The mean number of steps of a worker.

    Returns:
        The seconds of a step, and the histogram (33,) of the staleness.
    """
    n, n_steps_of = 16, np.rint(n_steps * found.steps / found.steps.mean()).astype(int)
    network = Network(
        bandwidth=options.get("bandwidth", float("inf")) * 4 * n / found.vector_bytes,
        node_bandwidth=options.get("node_bandwidth", float("inf")) * 4 * n / found.vector_bytes,
        service=options.get("service", 0.0),
        request_bytes=0.0,
    )
    clock = NetworkTime(
        ComputeTime([options["step_seconds"]] * len(found.nodes), jitter=options["jitter"]),
        network,
        found.nodes,
        cores=options["cores"],
        slice_seconds=options["time_slice"],
        sharing=options.get("sharing", 0.0),
    )
    world = SimulatedWorld(len(found.nodes), clock, nodes=found.nodes)
    simulation = Simulation(_method(found), world, lambda rank, x: x, np.ones(n, np.float32), 1e-6)
    simulation.run(int(n_steps_of.max()), is_over=lambda worker: worker.t >= n_steps_of[worker.comm.rank])
    histogram = np.sum([comm.statistics.staleness for comm in world.communicators], axis=0)
    histogram = histogram / histogram.sum() if histogram.sum() else np.zeros(STALENESS_BINS)
    return float(clock.clocks.max()) / n_steps, np.asarray(histogram)
