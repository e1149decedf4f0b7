"""The difference between the clocks of two ranks, by messages in both directions.

    this rank     sent               received
                     \\             /
    reference          --> read -->

The reference has read its clock somewhere between ``sent`` and ``received``. Its middle is the estimate; the truth lies
within half the round trip. Of several rounds, the shortest one counts. Two measurements, at the beginning and at the
end, give the drift, which is assumed to be constant between them.

Source: Cristian 1989, Probabilistic clock synchronization, Distributed Computing 3.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.world.world import World

N_ROUNDS = 16
IDENTITY_BYTES = 128


@dataclass(frozen=True)
class ClockOffset:
    """The offset between this rank's clock and that of rank 0.

    Attributes:
        at: The time of the measurement by this rank's clock, in seconds.
        seconds: The amount to add to this rank's clock to get that of rank 0.
        error_seconds: The largest possible error of ``seconds``.
    """

    at: float
    seconds: float
    error_seconds: float


def estimate(rounds: Sequence[tuple[float, float, float]]) -> ClockOffset:
    """Return the offset from the shortest of some rounds.

    Args:
        rounds: (sent, read, received) of each round; ``read`` is by the clock of the reference.
    """
    sent, read, received = min(rounds, key=lambda one: one[2] - one[0])
    middle = (sent + received) / 2
    return ClockOffset(middle, read - middle, (received - sent) / 2)


def aligned(times: np.ndarray, first: ClockOffset, last: ClockOffset | None) -> np.ndarray:
    """Return times of this rank's clock by the clock of rank 0, with the drift between two measurements.

    Args:
        times: The times, in seconds.
        first: The offset at the beginning.
        last: The offset at the end; None if it was not measured: there is no drift then.
    """
    if last is None or last.at <= first.at:
        return times + first.seconds
    drift = (last.seconds - first.seconds) / (last.at - first.at)
    return times + (first.seconds + drift * (times - first.at))


def measure(world: World, clock: Callable[[], float] = time.perf_counter) -> ClockOffset | None:
    """Return the offset of this rank's clock; None if rank 0 has died. Collective.

    Ranks that share the clock of rank 0, because they run on the same machine, have an offset of 0 without an error.

    Args:
        world: The ranks.
        clock: The clock of this rank.
    """

    def collective(comm: Any) -> ClockOffset | None:
        reference, identity = np.array([world.rank]), _identity_of_clock()
        shared = identity.copy()
        comm.Bcast(reference)
        comm.Bcast(shared)
        if reference[0] != 0:
            return None
        found = exchange(comm, clock)
        is_shared = clock is time.perf_counter and np.array_equal(identity, shared)
        return ClockOffset(found.at, 0.0, 0.0) if is_shared else found

    found: ClockOffset | None = world.run_on_survivors(collective, "the comparison of clocks")
    return found


def exchange(comm: Any, clock: Callable[[], float]) -> ClockOffset:
    """Measure the offset to the first rank of a communicator, one rank after the other. Collective."""
    message = np.zeros(1)
    if comm.Get_rank() == 0:
        for rank in range(1, comm.Get_size()):
            for _ in range(N_ROUNDS):
                comm.Recv(message, rank)
                message[0] = clock()
                comm.Send(message, rank)
        return ClockOffset(clock(), 0.0, 0.0)
    rounds = []
    for _ in range(N_ROUNDS):  # the first one lasts until the ranks before have ended theirs
        sent = clock()
        comm.Send(message, 0)
        comm.Recv(message, 0)
        rounds.append((sent, float(message[0]), clock()))
    return estimate(rounds)


def _identity_of_clock() -> np.ndarray:
    """Return bytes that are equal on two ranks with the same monotonic clock: the boot and the time namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        text = f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        text = f"unknown {os.urandom(16).hex()}"
    return np.frombuffer(text.encode()[:IDENTITY_BYTES].ljust(IDENTITY_BYTES), np.uint8).copy()
