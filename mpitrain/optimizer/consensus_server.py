"""A thread with which the head of a replica group, its first rank, sends the consensus to members that request it."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from mpitrain.collectives.world.world import World
from mpitrain.errors import RankFailed

ASK, ANSWER = 23, 24
"""Tags of a member's request and of the head's reply."""

REQUEST_POLL_SECONDS = 2e-3
"""Time between two polls for requests."""


class ConsensusServer:
    """A thread that sends the consensus to the members of a replica group. It runs on the head, the first rank.

    Args:
        world: The ranks of the group.
        vector: (n,) the buffer for an answer.
        answer: Writes the consensus to the buffer.
        busy: A lock that the thread holds while it answers.
    """

    def __init__(self, world: World, vector: np.ndarray, answer: Callable[[Any], None], busy: threading.Lock) -> None:
        self._world, self._comm, self._members = world, world.comm, range(1, world.size)
        self._vector, self._answer, self._busy = vector, answer, busy
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="consensus-server", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # runs before MPI is finalized

    def _run(self) -> None:
        with suppress(RankFailed), self._world.translated_errors():  # the thread that makes the steps reports it
            while not self._stopped.wait(REQUEST_POLL_SECONDS):
                for member in self._members:
                    self._serve(member)

    def _serve(self, member: int) -> None:
        if self._comm.Iprobe(member, ASK):
            self._comm.Recv(np.empty(0, np.uint8), member, ASK)
            with self._busy:
                self._answer(self._vector)
            self._comm.Send(self._vector.view(np.uint8), member, ANSWER)

    def stop(self) -> None:
        """End the thread. Local; safe to call again."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        atexit.unregister(self.stop)
