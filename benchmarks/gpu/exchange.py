"""Measure the exchange with the center and the all-reduce of GPU vectors by each transport, beside the kernel alone.

    jobs/local.sh 2 python -m benchmarks.gpu.exchange [--transports ipc,staged] [--sizes 1M,...,1G] [--json]

Every rank holds float32 vectors in the memory of its GPU, which ranks may share:

    copy            one vector to another on the device
    local kernel    the fused kernel of the elastic exchange over a vector and a center of the rank's own
    exchange        the same kernel over the vector and the center of all ranks, shard by shard under our locks
    all-reduce      ours, in place, the mean
    gloo            torch.distributed's all-reduce of tensors on the GPU (NCCL refuses two ranks on one GPU)

They are measured twice: by one rank while the others wait, and by all ranks at once, which on a shared GPU take turns.
A figure is what a program waits, until its GPU has done the work: the median over rounds in which the operations take
turns, of the slowest rank's time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.gpu import machine as gpu_machine
from benchmarks.gpu.timing import fill
from benchmarks.micro.candidates import RATE, start_gloo
from benchmarks.micro.timing import beside, gb_per_s, name_of, size_of, where
from benchmarks.micro.windows import of_all, of_origin
from mpitrain.cli import info
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.collectives.mpi import MPICommunicator
from mpitrain.collectives.world.launch import create_world, init
from mpitrain.collectives.world.transport import TRANSPORTS
from mpitrain.collectives.world.world import World
from mpitrain.errors import UsageError
from mpitrain.kernels import elastic_exchange
from mpitrain.report import text
from mpitrain.trainer.runfolder import to_json

SIZES = "1M,16M,256M,1G"
MEASURED = "ipc,staged"
GLOO_MOST_BYTES = 2**26  # it takes seconds for more

ONE, ALL = "one rank", "all ranks"
LOCAL = "local kernel"

# The project's bar.
BAR_RANKS, BAR_BYTES, BAR_TRANSPORT, AT_MOST = 2, 2**28, "ipc", 1.2


class Exchanges:
    """The operations on vectors of one size. Collective to create and to free.

    Args:
        worlds: The same ranks, by transport.
        n: Elements of a vector.
        collective: Whether all ranks call them at once.
        gloo_device: Where torch has the vectors of gloo; None without it.

    Attributes:
        operations: By name. Each returns when the GPU has done its work.
        references: What each operation is compared with.
        left_out: Why a transport is not measured: the node's shared memory has no room for its vectors.
    """

    def __init__(self, worlds: Mapping[str, World], n: int, *, collective: bool, gloo_device: str | None) -> None:
        device = next(iter(worlds.values())).gpu
        assert device is not None
        self._comms: list[MPICommunicator] = []
        self.operations: dict[str, Callable[[], object]] = {}
        self.references = {f"exchange, {name}": LOCAL for name in worlds}
        self._gpu = device
        x, own = (fill(device, device.zeros(n, np.float32), seed) for seed in range(2))
        self._add("copy", lambda: device.copy(own, x))
        self._add(LOCAL, lambda: elastic_exchange(x, own, RATE, RATE))
        self.left_out: dict[str, str] = {}
        for name, world in worlds.items():
            try:
                self._add_of(name, world, x, collective=collective)
            except UsageError as error:  # on all ranks
                self.left_out[name] = str(error)
        summed = [name for name in self.operations if name.startswith("all-reduce")]
        if gloo_device is not None and collective and 4 * n <= GLOO_MOST_BYTES:
            import torch

            tensor = torch.zeros(n, device=gloo_device)
            self._add("gloo", lambda: torch.distributed.all_reduce(tensor))
            summed.append("gloo")
        self.references |= dict.fromkeys(summed[1:], summed[0] if summed else "")

    def _add(self, name: str, begin: Callable[[], object]) -> None:
        def operation() -> None:
            begin()
            self._gpu.synchronize()

        self.operations[name] = operation

    def _add_of(self, name: str, world: World, x: Any, *, collective: bool) -> None:
        comm = MPICommunicator(world)
        self._comms.append(comm)
        center = comm.shared_vector(len(x), np.float32)
        vector = comm.vector(len(x), np.float32) if collective else None
        self._add(f"exchange, {name}", lambda: center.update(lambda p, c: elastic_exchange(x[p], c, RATE, RATE)))
        if vector is not None:
            fill(self._gpu, vector.local, world.rank)
            self._add(f"all-reduce, {name}", lambda: comm.allreduce(vector, mean=True))

    def free(self) -> None:
        """Free the memory. Collective."""
        self.operations.clear()
        for comm in self._comms:
            comm.free()
        self._comms.clear()


def worlds_of(whole: World, names: Sequence[str]) -> tuple[dict[str, World], dict[str, str]]:
    """Create one world per transport, and collect the reasons why some do not work. Collective."""
    worlds, refused = {}, {}
    for name in names:
        try:
            worlds[name] = create_world(whole.comm.Dup(), whole.device, name)
        except UsageError as error:
            refused[name] = str(error)
    return worlds, refused


def gloo_problem(device: str) -> str | None:
    """Return why gloo cannot sum device vectors, else None. Collective, after gloo was started."""
    import torch

    try:
        torch.distributed.all_reduce(torch.zeros(1, device=device))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def bench(
    whole: World, worlds: Mapping[str, World], sizes: Sequence[int], most: int, gloo_device: str | None
) -> dict[str, Any]:
    """Measure all sizes; return the rows and the omitted sizes. Collective.

    Args:
        whole: The ranks.
        worlds: The same ranks by transport.
        sizes: Of a vector, in bytes.
        most: Rounds.
        gloo_device: Where torch has the vectors of gloo; None without it.
    """
    rows: list[dict[str, Any]] = []
    left_out = []
    for n_bytes in sizes:
        for mode, measure in ((ONE, of_origin), (ALL, of_all)):
            measured = Exchanges(worlds, n_bytes // 4, collective=mode == ALL, gloo_device=gloo_device)
            left_out += [{"bytes": n_bytes, "name": f"{mode}, {k}", "why": why} for k, why in measured.left_out.items()]
            rows += [row | {"mode": mode} for row in measure(whole, measured, n_bytes, most)]
    return {"results": rows, "left_out": left_out}


def verdicts(rows: Sequence[Mapping[str, Any]], n_ranks: int) -> list[dict[str, Any]]:
    """Return the verdict on the project's bar, for one rank and for all ranks, if it applies to this run."""
    if n_ranks != BAR_RANKS:
        return []
    bars = []
    for row in rows:
        if (row["bytes"], row["operation"]) == (BAR_BYTES, f"exchange, {BAR_TRANSPORT}"):
            bar = f"{name_of(BAR_BYTES)}, {row['mode']}: exchange by {BAR_TRANSPORT} at most {AT_MOST:g} x the {LOCAL}"
            bars.append({"bar": bar, "ratio": row["ratio"], "passed": row["ratio"] <= AT_MOST})
    return bars


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Format the rows as a table."""
    return text.table(
        {
            "vector": [name_of(row["bytes"]) for row in rows],
            "at once": [row["mode"] for row in rows],
            "operation": [row["operation"] for row in rows],
            "median ms": [f"{1e3 * row['median_seconds']:.3f}" for row in rows],
            "p95 ms": [f"{1e3 * row['p95_seconds']:.3f}" for row in rows],
            "GB/s": [gb_per_s(row) for row in rows],
            "beside": [beside(row) for row in rows],
        },
        left=("at once", "operation", "beside"),
    )


def show(document: dict[str, Any]) -> str:
    """Print the document as text."""
    lines = [gpu_machine.line(document["gpu"]), where(document), "float32; GB/s: bytes of the vector by time", ""]
    lines += [*table(document["results"]), ""]
    lines += [f"without {name}: {why}" for name, why in document["refused"].items()]
    lines += [f"without gloo: {document['gloo']}"] if document["gloo"] != "available" else []
    lines += [f"without {name_of(left['bytes'])}, {left['name']}: {left['why']}" for left in document["left_out"]]
    lines += [f"{'PASS' if bar['passed'] else 'MISSED'}: {bar['bar']}: {bar['ratio']:.3f}" for bar in document["bars"]]
    return "\n".join(lines)


def options_of(arguments: Sequence[str] | None) -> tuple[list[int], list[str], Any]:
    """Parse sizes in bytes, transports, and the other options.

    Raises:
        UsageError: What is no size or no transport.
    """
    parser = Parser(prog="benchmarks.gpu.exchange", description="Exchange and all-reduce on GPUs. Run under mpirun.")
    parser.add_argument("--sizes", default=SIZES, help="of a vector, in bytes (default: %(default)s)")
    parser.add_argument("--transports", default=MEASURED, help="separated by commas (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds, at most (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.transports.split(",")]
    unknown = [name for name in names if name not in TRANSPORTS]
    if unknown:
        raise UsageError(f"--transports {', '.join(unknown)}: choose from {', '.join(TRANSPORTS)}")
    if options.repeats < 1:
        raise UsageError(f"--repeats must be 1 or more, not {options.repeats}")
    return [size_of(word.strip()) for word in options.sizes.split(",")], names, options


def main() -> int:
    """Run the benchmark and return the exit code. Collective."""
    problem = gpu_machine.problem()
    if problem:
        return fail(problem, on_all_ranks=True)
    try:
        sizes, names, options = options_of(None)
        world = init("cuda")
    except UsageError as error:
        return fail(str(error), on_all_ranks=True)
    load_before = os.getloadavg()
    worlds, refused = worlds_of(world, names)
    if not worlds:
        return fail("; ".join(refused.values()), on_all_ranks=True)
    not_started = start_gloo(world)
    no_gloo = not_started or gloo_problem(world.device)
    measured = bench(world, worlds, sizes, options.repeats, None if no_gloo else world.device)
    if world.rank == 0:
        document = {**measured, "bars": verdicts(measured["results"], world.size), "refused": refused}
        document |= {"gloo": no_gloo or "available", **info.describe(world), "gpu": gpu_machine.describe()}
        document["versions"] = gpu_machine.versions()
        document["load_average"] = {"before": load_before, "after": os.getloadavg()}
        if not options.json:
            print(show(document))
        print(to_json(document), flush=True)
    if not not_started:
        import torch.distributed

        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
