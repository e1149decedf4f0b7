"""Measure one-sided MPI from Python, call by call and size by size, and the exchange with the center built on it.

    jobs/local.sh 2 python -m benchmarks.micro.windows [--sizes 8,64,1K,...,256M] [--most 256M] [--repeats 20] [--json]

What each operation is stands in one_sided.py; a run is of the MPI that started it. The calls and the transfers are
rank 0's, at the memory of the last rank. Meanwhile all others wait in a non-blocking barrier that they test again and
again, because an MPI may need the target's attention, and give their core away between two tests: the figures are those
of a target that is always there. The exchanges are made by all ranks at once, as in collectives.py.

The operations take turns. In each round each is called once for the caches' sake and then timed, those of all ranks
after a barrier. A figure is the median over the rounds, of the slowest rank's time where all take part; the rounds of
small vectors have several calls each, and those of large ones are as many as fit in a few seconds. GB/s are the bytes
of the vector by that time: one transfer with its flush, not many with one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.micro.one_sided import Calls, Exchanges, Operations, Transfers
from benchmarks.micro.timing import beside, calls_of, gb_per_s, name_of, one_round, rows_of, size_of, slowest, where
from mpitrain.cli import info
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.collectives.world.launch import init
from mpitrain.collectives.world.shared_memory import check_free_memory
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.report import text
from mpitrain.trainer.runfolder import to_json

SIZES = "8,64,1K,4K,16K,64K,256K,1M,4M,16M,64M,256M"
MOST = "256M"
LARGEST_IN_PIECES = 2**24
"""Bytes: larger vectors take as many times longer, chunk by chunk, and nothing new is seen."""

SECONDS_OF_A_SET = 2.0
FEWEST_REPEATS = 5


def rounds(one: Callable[[], list[float]], most: int, agree: Callable[[bool], bool]) -> np.ndarray:
    """Make rounds until there are ``most`` or time is up, after a warm-up round.

    Args:
        one: Makes a round: seconds of each operation.
        most: Rounds.
        agree: Whether to make one more, from whether this rank would.

    Returns:
        (operations, rounds) seconds.
    """
    one()
    made: list[list[float]] = []
    began = time.perf_counter()
    while agree(len(made) < most and (len(made) < FEWEST_REPEATS or time.perf_counter() - began < SECONDS_OF_A_SET)):
        made.append(one())
    return np.array(made).T


def of_origin(world: World, measured: Operations, n_bytes: int, most: int) -> list[dict[str, Any]]:
    """Measure the operations of rank 0 alone; the other ranks return no rows. Collective.

    Args:
        world: The ranks.
        measured: Given back when it is done.
        n_bytes: Of a vector, or of what a call is about.
        most: Rounds.
    """
    n_calls = calls_of(n_bytes)
    rows = []
    attend(world)  # until the target has touched its memory
    if world.rank == 0:
        seconds = rounds(lambda: one_round(measured.operations, n_calls), most, bool)
        rows = rows_of(list(measured.operations), seconds, measured.references, n_bytes=n_bytes, n_calls=n_calls)
    attend(world)
    measured.free()
    return rows


def attend(world: World) -> None:
    """Answer MPI until all ranks have come here. Collective."""
    arrived = world.comm.Ibarrier()
    while not arrived.Test():
        os.sched_yield()


def of_all(world: World, measured: Operations, n_bytes: int, most: int) -> list[dict[str, Any]]:
    """Measure simultaneous operations of all ranks; otherwise as ``of_origin``. Collective."""
    n_calls = calls_of(n_bytes)
    mine = rounds(lambda: one_round(measured.operations, n_calls, world.barrier), most, world.comm.bcast)
    seconds = slowest(world, mine)
    rows = rows_of(list(measured.operations), seconds, measured.references, n_bytes=n_bytes, n_calls=n_calls)
    measured.free()
    return rows


def shared_bytes(n_bytes: int, local_size: int) -> int:
    """Return the node's shared memory that vectors of this size need at most.

    Each rank has its vector and the one of its local pass, and a third one if there are exchanges in pieces; the center
    exists once for us, once for Get/Put at each share, once for that at the server and once for each kind of pieces.
    """
    in_pieces = n_bytes <= LARGEST_IN_PIECES
    return ((2 + in_pieces) * local_size + 3 + 2 * in_pieces) * n_bytes


def no_room(world: World, n_bytes: int) -> str | None:
    """Return why vectors of this size cannot be measured on some node, else None. Collective."""
    problem = None
    try:
        check_free_memory(shared_bytes(n_bytes, world.local_size))
    except UsageError as error:
        problem = str(error)
    return next((theirs for theirs in world.comm.allgather(problem) if theirs), None)


def run(world: World, sizes: Sequence[int], most: int) -> dict[str, Any]:
    """Measure each set of operations; return the rows and the omitted sizes. Collective."""
    results: dict[str, list[dict[str, Any]]] = {"calls": of_origin(world, Calls(world), 8, most)}
    results |= {"transfers": [], "exchanges": []}
    left_out = []
    for n_bytes in sizes:
        reason = no_room(world, n_bytes)
        if reason:
            left_out.append({"bytes": n_bytes, "reason": reason})
            continue
        n = n_bytes // 4
        results["transfers"] += of_origin(world, Transfers(world, n), n_bytes, most)
        exchanges = Exchanges(world, n, in_pieces=n_bytes <= LARGEST_IN_PIECES)
        results["exchanges"] += of_all(world, exchanges, n_bytes, most)
    return {"results": results, "left_out": left_out}


def sizes_of(words: str, most: str) -> list[int]:
    """Return the requested sizes up to the largest, in ascending order.

    Raises:
        UsageError: What is no size, is too large for one message, or when all are left out.
    """
    largest = size_of(most, "--most")
    if largest > 2**30:
        raise UsageError(f"--most {most}: one message carries 1G at most")
    sizes = sorted({size for word in words.split(",") if (size := size_of(word.strip())) <= largest})
    if not sizes:
        raise UsageError(f"--sizes {words} are all more than --most {most}")
    return sizes


def micro(seconds: float) -> str:
    """Format seconds as microseconds."""
    return f"{1e6 * seconds:.2f}" if seconds < 1e-4 else f"{1e6 * seconds:.0f}"


def table_of_rows(rows: list[dict[str, Any]], *, sized: bool) -> list[str]:
    """Format one line per row.

    Args:
        rows: Of calls or of exchanges.
        sized: Whether they are of vectors.
    """
    columns = {
        "operation": [row["operation"] for row in rows],
        "median us": [micro(row["median_seconds"]) for row in rows],
        "p95 us": [micro(row["p95_seconds"]) for row in rows],
    }
    if sized:
        columns = {"vector": [name_of(row["bytes"]) for row in rows], **columns}
        columns["GB/s"] = [gb_per_s(row) for row in rows]
    return text.table(columns | {"beside": [beside(row) for row in rows]}, left=("operation", "beside"))


def table_of_transfers(rows: list[dict[str, Any]]) -> list[str]:
    """Format one line per transfer: both kinds of windows after the limit in the origin's own memory."""
    found = {(row["bytes"], row["operation"]): row for row in rows}
    pairs = [(row, found[row["bytes"], f"{_transfer(row)}, Create"]) for row in rows if "Allocate" in row["operation"]]
    limits = [found[row["bytes"], row["reference"]] for row, _ in pairs]
    columns = {
        "vector": [name_of(row["bytes"]) for row, _ in pairs],
        "operation": [_transfer(row) for row, _ in pairs],
        "limit": [row["operation"] for row in limits],
        "limit us": [micro(row["median_seconds"]) for row in limits],
        "GB/s": [gb_per_s(row) for row in limits],
    }
    for kind, of_kind in zip(("Allocate", "Create"), zip(*pairs, strict=True), strict=True):
        columns[f"{kind} us"] = [micro(row["median_seconds"]) for row in of_kind]
        columns[f"{kind} GB/s"] = [gb_per_s(row) for row in of_kind]
        columns[f"{kind} beside"] = [f"{row['ratio']:.2f} x limit" for row in of_kind]
    return text.table(columns, left=("operation", "limit"))


def _transfer(row: dict[str, Any]) -> str:
    name: str = row["operation"]
    return name.partition(", ")[0]


def show(document: dict[str, Any]) -> str:
    """Print the document as text."""
    results = document["results"]
    lines = [where(document), "", "One rank at the memory of another; each but the locks with its flush", ""]
    lines += table_of_rows(results["calls"], sized=False)
    lines += ["", "Vectors of float32, each transfer with its flush; GB/s: bytes of the vector by time", ""]
    lines += table_of_transfers(results["transfers"])
    lines += ["", "The elastic exchange of all ranks at once", ""]
    lines += [*table_of_rows(results["exchanges"], sized=True), ""]
    lines += [f"without {name_of(left['bytes'])}: {left['reason']}" for left in document["left_out"]]
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark and return the exit code. Collective."""
    parser = Parser(
        prog="benchmarks.micro.windows", description="One-sided MPI. Run under mpirun or srun, on 2 or more ranks."
    )
    parser.add_argument("--sizes", default=SIZES, help="of a vector, in bytes (default: %(default)s)")
    parser.add_argument("--most", default=MOST, help="leave larger ones out (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="of each operation, at most (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    try:
        sizes = sizes_of(options.sizes, options.most)
        if options.repeats < 1:
            raise UsageError(f"--repeats must be 1 or more, not {options.repeats}")
        world = init()
        if world.size < 2:
            raise UsageError("one-sided operations need a target: start 2 or more ranks (jobs/local.sh 2 ...)")
    except UsageError as error:
        return fail(str(error), on_all_ranks=True)
    load_before = os.getloadavg()
    measured = run(world, sizes, options.repeats)
    if world.rank == 0:
        document = {**measured, **info.describe(world)}
        document["load_average"] = {"before": load_before, "after": os.getloadavg()}
        if not options.json:
            print(show(document))
        print(to_json(document), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
