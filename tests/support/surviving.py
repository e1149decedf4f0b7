"""Run on ranks, by test_survivors.py: visits a shared vector under its locks, and is killed inside of one on one rank.

    surviving.py VICTIM

With MPITRAIN_EMULATED_NODES, it holds the lock of a shard of another node then, which the other node has not got back.

Every element of the vector counts the visits to it. Rank 0 prints a JSON document: who died, how many visits each rank
has finished, how many elements the dead one has changed in its unfinished one, and the elements that were changed once
more than the finished visits say, or not as often as that.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import numpy as np

import mpitrain
from mpitrain.collectives.mpi import MPICommunicator

N, BEFORE_DEATH, AFTER_DEATH = 3_000_000, 20, 50


def main() -> None:
    victim = int(sys.argv[1])
    world = mpitrain.init()
    comm = MPICommunicator(world)
    vector, board = comm.shared_vector(N, np.float32), comm.numbers(2)
    finished, unfinished = board.local[:1], board.local[1:]  # visits, and elements of the one under way
    comm.barrier()

    def visit(part: slice, shard: np.ndarray) -> None:
        if world.rank == victim and finished == BEFORE_DEATH and unfinished:
            half = shard[: shard.size // 2]
            half += 1
            unfinished[:] += half.size
            os.kill(os.getpid(), signal.SIGKILL)  # half of the second shard is done, and its lock is held
        shard += 1
        unfinished[:] += shard.size

    n_after = 0
    while n_after < AFTER_DEATH:
        n_after += victim in world.dead
        vector.update(visit)
        unfinished[:] = 0
        finished[:] += 1
    world.barrier()
    found = np.zeros(N, np.float32)
    vector.read(found)
    boards: list[list[float]] = []
    for rank in range(world.size):
        comm.read(board, rank, lambda numbers: boards.append(numbers.tolist()))
    ranks = world.run_on_survivors(lambda alive_ranks: alive_ranks.allgather(world.rank))
    if world.rank == 0:
        more = found - sum(visits for visits, _ in boards)
        document = {
            "dead": sorted(world.dead),
            "alive_ranks": ranks,
            "finished": [visits for visits, _ in boards],
            "unfinished": sum(elements for _, elements in boards),
            "once_more": int((more == 1).sum()),
            "wrong": int(((more != 0) & (more != 1)).sum()),
        }
        print(json.dumps(document), flush=True)
    comm.free()


if __name__ == "__main__":
    main()
