"""Measure exchange, all-reduce, tree and gossip beside the operations that they replace, on the same ranks in
the same run.

    jobs/local.sh 2 python -m benchmarks.micro.collectives [--sizes 1K,4K,...,256M] [--repeats 30] [--no-gloo] [--json]

What each operation is stands in candidates.py. They take turns, the tree and the gossip among themselves; each is
called once for the caches' sake and then, after a barrier, timed. A figure is the median over the repeats of the
slowest rank's time; the repeats of small vectors are several calls each, of what is slow fewer than of what is fast.
Without --sizes the tree and the gossip are measured at a few sizes only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.micro.candidates import GET_AND_PUT, REFERENCES, Candidates, Forms, start_gloo
from benchmarks.micro.timing import WARM_UPS, beside, calls_of, gb_per_s, measure, name_of, rows_of, size_of, where
from mpitrain.cli import info
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.collectives.world.launch import init
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.report import text
from mpitrain.trainer.runfolder import to_json

SIZES = "1K,4K,16K,64K,256K,1M,4M,32M"
SIZES_OF_FORMS = "4K,256K,4M,32M"  # of the tree and the gossip, unless sizes are asked for
BYTES_OF_ALL_REPEATS = 3 * 2**27  # larger vectors are repeated fewer times
FEWEST_REPEATS = 5  # for the sake of the bytes; fewer if fewer are asked for
SECONDS_OF_A_FIGURE = 0.02  # a slow operation fills them with fewer calls than a vector of its size may have
TRIALS = 2

# The bars of the project, for 2 ranks.
BAR_RANKS = 2
EXCHANGE_AT_MOST = {2**25: 1.15}  # x the local pass, on vectors of these bytes
SMALL_EXCHANGE_AT_MOST = dict.fromkeys((2**10, 2**12, 2**14), 1.5)  # x an MPI lock with Get and Put
FORMS_AT_LEAST = {2**12: ("MPI_Reduce + Bcast", "MPI_Sendrecv + NumPy")}  # as slow as ours
GET_PUT_AT_LEAST = {2**25: 3.0}  # x the exchange
ALL_REDUCE_AT_LEAST = {2**25: {"MPI_Allreduce": 3.0, "gloo": 10.0}, 2**22: {"MPI_Allreduce": 3.0, "gloo": 20.0}}
NEVER_SLOWER_FROM = 2**10  # bytes: the all-reduce than MPI_Allreduce


def repeats_of(n_bytes: int, most: int) -> int:
    """Return the number of figures per operation on vectors of this size."""
    return min(most, max(BYTES_OF_ALL_REPEATS // n_bytes, FEWEST_REPEATS))


def calls_that_fit(seconds: float, n_bytes: int) -> int:
    """Return how many calls make one figure of an operation with this duration on a vector of this size."""
    return max(1, min(calls_of(n_bytes), round(SECONDS_OF_A_FIGURE / seconds)))


def rows_in_turns(
    world: World, operations: Mapping[str, Callable[[], object]], n_bytes: int, most_repeats: int
) -> list[dict[str, Any]]:
    """Measure operations in turns and return one row each. Collective."""
    calls, n_warm_ups = dict.fromkeys(operations, 1), WARM_UPS
    if calls_of(n_bytes) > 1:
        least = measure(world, operations, TRIALS, calls).min(axis=1)  # what disturbs one call makes nothing slow
        calls = {name: calls_that_fit(of_one, n_bytes) for name, of_one in zip(operations, least, strict=True)}
        n_warm_ups = 0  # they are warm
    seconds = measure(world, operations, repeats_of(n_bytes, most_repeats), calls, n_warm_ups)
    return rows_of(list(operations), seconds, REFERENCES, n_bytes=n_bytes, n_calls=calls)


def bench(world: World, n_bytes: int, most_repeats: int, *, with_gloo: bool, with_forms: bool) -> list[dict[str, Any]]:
    """Measure every operation on vectors of this size and return the rows. Collective.

    Args:
        world: The ranks.
        n_bytes: Of a vector.
        most_repeats: Of each operation.
        with_gloo: Whether torch.distributed could be started.
        with_forms: Whether the tree and the gossip are measured too.
    """
    candidates = Candidates(world, n_bytes // 4, with_gloo=with_gloo)
    rows = rows_in_turns(world, candidates.operations, n_bytes, most_repeats)
    candidates.free()
    if with_forms:
        forms = Forms(world, n_bytes // 4)
        rows += rows_in_turns(world, forms.operations, n_bytes, most_repeats)
        forms.free()
    return rows


def sizes_of(words: str) -> list[int]:
    """Parse ``4K,32M`` into bytes."""
    return [size_of(word.strip()) for word in words.split(",")]


def verdicts(rows: list[dict[str, Any]], n_ranks: int) -> list[dict[str, Any]]:
    """Return the verdicts on the project's bars that apply to this run and its sizes."""
    if n_ranks != BAR_RANKS:
        return []
    ratios = {(row["bytes"], row["operation"]): row["ratio"] for row in rows if row["ratio"] is not None}
    bars = []

    def at_least(n_bytes: int, name: str, least: float, bar: str) -> None:
        if (n_bytes, name) in ratios:
            ratio = ratios[n_bytes, name]
            bars.append({"bar": f"{name_of(n_bytes)}: {bar}", "ratio": ratio, "passed": ratio >= least})

    for n_bytes, most in EXCHANGE_AT_MOST.items():
        if (n_bytes, "exchange") in ratios:
            ratio = ratios[n_bytes, "exchange"]
            bar = f"{name_of(n_bytes)}: exchange at most {most:g} x the local pass"
            bars.append({"bar": bar, "ratio": ratio, "passed": ratio <= most})
    for n_bytes, least in GET_PUT_AT_LEAST.items():
        for name in GET_AND_PUT:
            at_least(n_bytes, name, least, f"{name} at least {least:g} x the exchange")
    for n_bytes, peers in ALL_REDUCE_AT_LEAST.items():
        for name, least in peers.items():
            at_least(n_bytes, name, least, f"all-reduce at least {least:g} x faster than {name}")
    for n_bytes, most in SMALL_EXCHANGE_AT_MOST.items():
        if (n_bytes, GET_AND_PUT[0]) in ratios:
            ratio = 1 / ratios[n_bytes, GET_AND_PUT[0]]
            bar = f"{name_of(n_bytes)}: exchange at most {most:g} x {GET_AND_PUT[0]}"
            bars.append({"bar": bar, "ratio": ratio, "passed": ratio <= most})
    for n_bytes, names in FORMS_AT_LEAST.items():
        for name in names:
            at_least(n_bytes, name, 1.0, f"{REFERENCES[name]} at most as slow as {name}")
    others = {n: ratio for (n, name), ratio in ratios.items() if name == "MPI_Allreduce" and n >= NEVER_SLOWER_FROM}
    if others:
        worst = min(others, key=others.__getitem__)
        bar = (
            f"all-reduce never slower than MPI_Allreduce from {name_of(NEVER_SLOWER_FROM)} (least at {name_of(worst)})"
        )
        bars.append({"bar": bar, "ratio": others[worst], "passed": others[worst] >= 1})
    return bars


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Format the rows as a table."""
    return text.table(
        {
            "vector": [name_of(row["bytes"]) for row in rows],
            "operation": [row["operation"] for row in rows],
            "median ms": [f"{1e3 * row['median_seconds']:.3f}" for row in rows],
            "p95 ms": [f"{1e3 * row['p95_seconds']:.3f}" for row in rows],
            "GB/s": [gb_per_s(row) for row in rows],
            "beside": [beside(row) for row in rows],
        },
        left=("operation", "beside"),
    )


def main() -> int:
    """Run the benchmark and return the exit code. Collective."""
    parser = Parser(prog="python -m benchmarks.micro.collectives", description="Collectives. Run under mpirun or srun.")
    default = f"{SIZES}; of the tree and the gossip: {SIZES_OF_FORMS}"
    parser.add_argument("--sizes", help=f"of a vector, in bytes (default: {default})")
    parser.add_argument("--repeats", type=int, default=30, help="of each operation, at most (default: %(default)s)")
    parser.add_argument("--no-gloo", action="store_true", help="leave it out: every rank starts torch for it")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    try:
        sizes, of_forms = sizes_of(options.sizes or SIZES), sizes_of(options.sizes or SIZES_OF_FORMS)
    except UsageError as error:
        return fail(str(error))
    if options.repeats < 1:
        return fail(f"--repeats must be 1 or more, not {options.repeats}")
    world = init()
    load_before = os.getloadavg()
    no_gloo = "left out" if options.no_gloo else start_gloo(world)
    rows = []
    for n_bytes in sizes:
        rows += bench(world, n_bytes, options.repeats, with_gloo=not no_gloo, with_forms=n_bytes in of_forms)
    if world.rank == 0:
        bars = verdicts(rows, world.size)
        document = {"results": rows, "bars": bars, "gloo": no_gloo or "available", **info.describe(world)}
        document["load_average"] = {"before": load_before, "after": os.getloadavg()}
        if not options.json:
            print(where(document))
            print("float32; GB/s: bytes of the vector by time\n")
            print("\n".join([*table(rows), ""]))
            print(f"no gloo: {no_gloo}\n" if no_gloo else "", end="")
            for bar in bars:
                print(f"{'PASS' if bar['passed'] else 'MISSED'}: {bar['bar']}: {bar['ratio']:.2f}")
        print(to_json(document), flush=True)
    if not no_gloo:
        import torch.distributed

        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
