"""B10: from a cold start, more clients of a server are slower; from a warm start, they give a sub-linear speed-up.

Paine, Jin, Yang, Lin, Huang 2013, https://arxiv.org/abs/1312.6186, train with up to 8 clients that exchange with a
parameter server every n_sync steps. From random parameters, more clients are slower. After a warm start, in which one
client trains alone, there is a speed-up of up to 3.2 with every n_sync.

Here 1 to 8 simulated clients train a classifier of digits at the same learning rate, with n_sync 1, 4 and 16. The
speed-up is the time of one client until the training loss is 0.5, divided by that of several clients. A time of "inf"
means that a run never reaches this loss. After a warm start, both times count from its end, as in the paper, where the
warm start is a given checkpoint.

    python -m benchmarks.reproduce.warm_start [--quick] [--out DIR] [--json]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.reproduce.digits import Network
from benchmarks.reproduce.figure import COLOURS, DASHES, Outcome, panels, quick_parser
from benchmarks.reproduce.training import Cluster, train
from mpitrain.algorithms import GPUASGD
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.network_time import NetworkTime

CLIENTS, PERIODS, QUICK_PERIODS = (1, 2, 4, 8), (1, 4, 16), (4,)
LEARNING_RATE, WARM_STEPS, STEPS, QUICK_STEPS, TARGET = 0.15, 80, 400, 320, 0.5
EARLY_STEPS = 20
STARTS = {"cold": 0, "warm": WARM_STEPS}

Key = tuple[str, int, int]
"""Start, n_sync, clients."""


AGAINST_FREQUENT = (
    "the classifier is small and leaves its random start within seconds. Clients that exchange at every step differ "
    "little, and their gradients add up as in a larger batch"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = quick_parser(__doc__).parse_args(arguments)
    outcome, network = Outcome("warm_start", options), Network(dtype=np.float32)
    periods, steps = (QUICK_PERIODS, QUICK_STEPS) if options.quick else (PERIODS, STEPS)
    times: dict[Key, float] = {}
    early: dict[Key, float] = {}
    outcome.say(f"start  n_sync  clients   seconds to {TARGET}   speed-up   loss 2 s after the start")
    for start, n_warm in STARTS.items():
        for period in periods:
            for n_clients in CLIENTS:
                key = start, period, n_clients
                times[key], early[key] = measure(network, n_clients, period, n_warm, steps)
                speedup = times[start, period, 1] / times[key]
                outcome.say(f"{start:5}{period:8}{n_clients:9}{times[key]:17.1f}{speedup:11.2f}{early[key]:18.3f}")
    judge(outcome, times, early, periods)
    draw(outcome, times, early, periods)
    cells = [
        {"start": start, "n_sync": period, "clients": n, "seconds": seconds, "early_loss": early[start, period, n]}
        for (start, period, n), seconds in times.items()
    ]
    return outcome.conclude(cells=cells)


def measure(network: Network, n_clients: int, period: int, n_warm: int, steps: int) -> tuple[float, float]:
    """Return the seconds from the start of all clients to the target, and the loss ``EARLY_STEPS`` steps after it."""
    method = GPUASGD(period=period, warm_start_steps=n_warm)
    begin = [0.0]

    def note_begin(simulation: Simulation, rank: int) -> None:
        if rank == 0 and simulation.workers[0].t == n_warm:
            clock = simulation.world.schedule
            assert isinstance(clock, NetworkTime)
            begin[0] = float(clock.clocks[0])

    budget = (steps + n_warm) * n_clients
    curve = train(
        network, method, LEARNING_RATE, n_clients, budget, points=(steps + n_warm) // 4, after_step=note_begin
    )
    later = begin[0] + EARLY_STEPS * Cluster().step_seconds
    k = min(int(np.searchsorted(curve.seconds, later)), len(curve.loss) - 1)
    return curve.to(TARGET)[0] - begin[0], float(curve.loss[k])


def judge(outcome: Outcome, times: Mapping[Key, float], early: Mapping[Key, float], periods: Sequence[int]) -> None:
    """Check the criteria of the published picture."""
    most, longest = max(CLIENTS), max(periods)
    slower = times["cold", longest, most] / times["cold", longest, 2]
    outcome.criterion(
        f"cold, n_sync {longest}: {most} clients take longer to the target than 2, or never reach it. Value: the ratio",
        slower,
        slower > 1,
    )
    shortest = min(periods)
    frequent = times["cold", shortest, most] / times["cold", shortest, 1]
    outcome.criterion(
        f"cold, n_sync {shortest}: {most} clients take longer to the target than 1. Value: the ratio",
        frequent,
        frequent > 1,
        contradicts=AGAINST_FREQUENT,
    )
    helped = early["warm", longest, most] / early["cold", longest, most]
    outcome.criterion(
        f"n_sync {longest}, {most} clients: the loss after 2 s is lower from a warm start. Value: the ratio",
        helped,
        helped < 1,
    )
    gains = [times["warm", period, 1] / min(times["warm", period, n] for n in CLIENTS[1:]) for period in periods]
    outcome.criterion(
        "warm: the best speed-up is above 1 for every n_sync. Value: the smallest one", min(gains), min(gains) > 1
    )
    efficiency = max(times["warm", period, 1] / times["warm", period, most] / most for period in periods)
    outcome.criterion(
        f"warm: the speed-up of {most} clients is below {most}. Value: the largest one, over {most}",
        efficiency,
        efficiency < 1,
    )


def draw(outcome: Outcome, times: Mapping[Key, float], early: Mapping[Key, float], periods: Sequence[int]) -> None:
    """Draw speed-ups and early losses over clients."""
    figure, ((left, right),) = panels(2)
    for start, dash in zip(STARTS, DASHES, strict=False):
        for colour, period in zip(COLOURS, periods, strict=False):
            style = {"color": colour, "linestyle": dash, "marker": "o", "label": f"{start}, n_sync {period}"}
            left.plot(CLIENTS, [times[start, period, 1] / times[start, period, n] for n in CLIENTS], **style)
            right.plot(CLIENTS, [early[start, period, n] for n in CLIENTS], **style)
    left.plot(CLIENTS, CLIENTS, color="black", linewidth=0.8)
    left.set_ylabel(f"speed-up to a loss of {TARGET}")
    right.set_ylabel("loss 2 s after the start")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("clients")
        axes.set_xscale("log", base=2)
    right.legend(frameon=False, fontsize="small")
    outcome.save(figure)


if __name__ == "__main__":
    sys.exit(main())
