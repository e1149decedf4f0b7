"""What the ranks of a node are doing, in memory that they share: steps, process numbers, whether they wait.

Every rank writes its own row, and any rank of the node reads all rows, also those of a rank that is stopped or dead.
"""

from __future__ import annotations

import os
import select
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.collectives.world.shared_memory import allocate_shared_array

STEP, N_WAITS, HAS_ENDED, PROCESS, NAMESPACE, ALARM, WIDTH = range(7)


class NodeStatus:
    """The status of the ranks of a node, a row for each, in shared memory. Collective over them to create.

    The memory is never freed.

    Args:
        node_comm: The communicator of these ranks.
        ranks: The rank in the run of each of them.
        host: The name of the host.

    Attributes:
        row: The row of this rank; the constants of this module name its elements.
        host, ranks: See the arguments.
        exits: A ``select.poll`` object with a file for each other process of the node; the file becomes readable when
            its process ends.
    """

    def __init__(self, node_comm: Any, ranks: list[int], host: str) -> None:
        self.ranks, self.host = list(ranks), host
        self._me = node_comm.Get_rank()
        self._window, self._rows = allocate_shared_array(node_comm, (len(ranks), WIDTH), np.int64)
        self.row = memoryview(self._rows[self._me])
        self.row[PROCESS], self.row[NAMESPACE] = os.getpid(), _process_namespace()
        node_comm.Barrier()
        self.exits = select.poll()
        self._files: dict[int, int] = {}  # of each process: the local rank, by file
        for local_rank in range(len(ranks)):
            if local_rank != self._me and self._is_visible(local_rank):
                with suppress(OSError):  # no pidfd here, or the process has just ended
                    file = os.pidfd_open(int(self._rows[local_rank, PROCESS]))
                    self._files[file] = local_rank
                    self.exits.register(file, select.POLLIN)

    def _is_visible(self, local_rank: int) -> bool:
        """Return whether the number of a process means the same here: containers have their own."""
        return int(self._rows[local_rank, NAMESPACE]) == self.row[NAMESPACE]

    def raise_alarm(self) -> None:
        """Ask all ranks of the node to print what they are doing. Local."""
        self._rows[:, ALARM] = 1

    def died(self, file: int) -> int | None:
        """Return the rank whose process has ended, given its file from ``exits``; None if it has announced its end."""
        local_rank = self._files.pop(file)
        self.exits.unregister(file)
        os.close(file)
        self._rows[local_rank, N_WAITS] = 0
        return None if self._rows[local_rank, HAS_ENDED] else self.ranks[local_rank]

    def is_first(self) -> bool:
        """Return whether this rank is the first living one of its node. Local."""
        return all(self._process_state(local_rank) in "ZX" for local_rank in range(self._me))

    def process(self, rank: int) -> int:
        """Return the process number of a rank of this node. Local."""
        return int(self._rows[self.ranks.index(rank), PROCESS])

    def step(self, rank: int) -> int:
        """Return the step that a rank of this node is in, or was in when it died. Local."""
        return int(self._rows[self.ranks.index(rank), STEP])

    def announce_end_of_all(self) -> None:
        """Announce to the ranks of the node that all ranks end now, for a reason that has been printed. Local."""
        self._rows[:, HAS_ENDED] = 1

    def not_waiting(self) -> list[int]:
        """Return those other ranks of this node that do not wait for another rank. Local."""
        return [
            rank
            for local_rank, rank in enumerate(self.ranks)
            if local_rank != self._me and not self._rows[local_rank, N_WAITS]
        ]

    def describe(self, rank: int) -> str:
        """Return a description of a rank, such as ``rank 1 (in step 30)``. Local."""
        if rank not in self.ranks:
            return f"rank {rank}"
        local_rank = self.ranks.index(rank)
        step, waits = int(self._rows[local_rank, STEP]), bool(self._rows[local_rank, N_WAITS])
        state = self._process_state(local_rank)
        if self._rows[local_rank, HAS_ENDED]:
            doing = f"which ended after step {step}"
        elif state in "ZX":
            doing = f"process {self.process(rank)}, which was killed in step {step}"
        elif state == "T":
            doing = f"process {self.process(rank)}, which a signal stopped in step {step}"
        else:
            doing = f"{'waiting' if waits else 'busy'} in step {step}"
        return f"rank {rank} ({doing})"

    def _process_state(self, local_rank: int) -> str:
        """Return the state of a process as in proc(5): X if it is gone, R if it cannot be seen from here."""
        if not self._is_visible(local_rank):
            return "R"
        try:
            text = Path(f"/proc/{int(self._rows[local_rank, PROCESS])}/stat").read_text()
        except OSError:
            return "X"
        return text.rpartition(")")[2].split()[0]


def _process_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0
