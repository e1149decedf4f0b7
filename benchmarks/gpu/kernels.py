"""Measure GPU kernels against memory bandwidth, CuPy, torch and torch's fused optimizer.

    python -m benchmarks.gpu.kernels [--sizes 1M,4M,...,4G] [--repeats 11] [--all] [--json]

A kernel is one pass: its bytes are those of each array once if it is read and once if it is assigned. The limit is a
copy from one array of the vector's size to another by the driver (cudaMemcpyAsync), counting the bytes read and those
written. Beside it:

    CuPy            the equations as one writes them, an operator at a time
    cupy.fuse       the same function, made one kernel by CuPy where it can
    torch           the same function again, eager
    torch in place  eager, with the fewest passes that torch's own operations allow
    torch.optim     the step of ``torch.optim.SGD(fused=True)``, where the kernel is one

They do it without the guards against what is not finite, which our kernels have. GB/s are the bytes of one pass by time
for all of them. A figure is the median over turns, by the GPU's events; every call takes the next one of several sets
of arrays, so that none is found in the cache that holds those of small vectors. The limit of a size is the best of its
medians beside each kernel. The last table has what Python pays for a call, on vectors of 1 KB.

torch's fewest passes over the elastic exchange move 9/4 of the bytes: no single pass beats them by more than that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import machine as gpu_machine
from benchmarks.gpu.timing import ClockTimer, EventTimer, Timer, calls_of, fill, medians
from benchmarks.micro.kernels import FEWEST_UPDATED, TORCH, expression, hardware
from benchmarks.micro.timing import name_of, size_of
from mpitrain import kernels
from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.errors import UsageError
from mpitrain.kernels import Kernel, gpu
from mpitrain.report import text
from mpitrain.trainer.runfolder import to_json

SIZES = "1M,4M,16M,64M,256M,1G,4G"
CHOSEN = (
    *(kernels.elastic_exchange, kernels.elastic_sync, kernels.sgd_step, kernels.torch_momentum_step),
    *(kernels.eamsgd_step, kernels.symmetric_average, kernels.sum_everywhere(2), kernels.mean_step("momentum", 2)),
)
PEERS = ("cupy", "cupy.fuse", "torch", "torch in place", "torch.optim")

ROTATED_BYTES = 2**28  # several times the cache
MOST_SETS = 128
LAUNCH_BYTES, LAUNCH_CALLS, LAUNCH_REPEATS = 2**10, 200, 7

# The project's bars, on vectors of these bytes and more: column, least, words.
BAR_KERNEL, BAR_BYTES = "elastic_exchange", 2**26
COPY_BAR = ("of_copy", 0.9, "at least 90% of a copy on the device")
TORCH_BAR = ("of_torch", 2.5, "at least 2.5 x faster than torch eager")


def eager_elastic_exchange(x: Any, c: Any, a_w: float, a_c: float) -> None:
    """Exchange elastically, x and c from their old values."""
    d = x - c
    x -= a_w * d
    c += a_c * d


def eager_elastic_sync(x: Any, c: Any, s: Any, a_w: float, a_c: float, p: float) -> None:
    """Exchange elastically with the sum s of p workers."""
    d = s - p * c
    x -= a_w * (x - c)
    c += a_c * d


def eager_sgd_step(x: Any, g: Any, eta: float, decay: float) -> None:
    """Make a step of SGD with weight decay."""
    x -= eta * (g + decay * x)


def eager_momentum_step(x: Any, v: Any, g: Any, eta: float, delta: float, decay: float) -> None:
    """Make a step of SGD with momentum, as torch defines it."""
    v *= delta
    v += g + decay * x
    x -= eta * v


def eager_eamsgd_step(x: Any, v: Any, g: Any, y: Any, eta: float, delta: float, decay: float) -> None:
    """Make the Nesterov step of EAMSGD."""
    v *= delta
    v -= eta * (g + decay * y)
    x += v
    y[:] = x + delta * v


def eager_symmetric_average(x: Any, z: Any) -> None:
    """Move x and z to their mean."""
    d = z - x
    x += 0.5 * d
    z -= 0.5 * d


def eager_sum_everywhere(z1: Any, z2: Any, a: float) -> None:
    """Replace both vectors by their scaled sum."""
    z1 += z2
    z1 *= a
    z2[:] = z1


def eager_mean_momentum_step(
    x: Any, v: Any, z1: Any, z2: Any, a: float, eta: float, delta: float, decay: float
) -> None:
    """Make a momentum step with the scaled sum of two gradients."""
    v *= delta
    v += a * (z1 + z2) + decay * x
    x -= eta * v


def torch_elastic_sync(x: Any, c: Any, s: Any, a_w: float, a_c: float, p: float) -> None:
    """Exchange with the sum of p workers by torch's in-place operations."""
    d = torch.sub(s, c, alpha=p)
    x.lerp_(c, a_w)
    c.add_(d, alpha=a_c)


def torch_eamsgd_step(x: Any, v: Any, g: Any, y: Any, eta: float, delta: float, decay: float) -> None:
    """Make the Nesterov step of EAMSGD by torch's in-place operations."""
    v.mul_(delta).sub_(g, alpha=eta).sub_(y, alpha=eta * decay)
    x.add_(v)
    torch.add(x, v, alpha=delta, out=y)


def torch_symmetric_average(x: Any, z: Any) -> None:
    """Move x and z to their mean by torch's in-place operations."""
    x.lerp_(z, 0.5)
    z.copy_(x)


def torch_sum_everywhere(z1: Any, z2: Any, a: float) -> None:
    """Replace both vectors by their scaled sum, by torch's in-place operations."""
    z1.add_(z2).mul_(a)
    z2.copy_(z1)


def torch_mean_momentum_step(
    x: Any, v: Any, z1: Any, z2: Any, a: float, eta: float, delta: float, decay: float
) -> None:
    """Make a momentum step with the scaled sum of two gradients by torch's in-place operations."""
    g = torch.add(z1, z2)
    v.mul_(delta).add_(g, alpha=a).add_(x, alpha=decay)
    x.sub_(v, alpha=eta)


# Written for NumPy's operators, which CuPy and torch have too; kernels without one are measured with their equations.
EAGER: dict[str, Callable[..., None]] = {
    "elastic_exchange": eager_elastic_exchange,
    "elastic_sync": eager_elastic_sync,
    "sgd_step": eager_sgd_step,
    "torch_momentum_step": eager_momentum_step,
    "eamsgd_step": eager_eamsgd_step,
    "symmetric_average": eager_symmetric_average,
    "sum_everywhere_2": eager_sum_everywhere,
    "mean_momentum_step_2": eager_mean_momentum_step,
}
IN_PLACE: dict[str, Callable[..., object]] = {
    **TORCH,
    "elastic_sync": torch_elastic_sync,
    "eamsgd_step": torch_eamsgd_step,
    "symmetric_average": torch_symmetric_average,
    "sum_everywhere_2": torch_sum_everywhere,
    "mean_momentum_step_2": torch_mean_momentum_step,
}
OPTIMIZERS: dict[str, Callable[[dict[str, float]], dict[str, Any]]] = {
    "sgd_step": lambda s: {},
    "torch_momentum_step": lambda s: {"momentum": s["delta"]},
    "torch_nesterov_step": lambda s: {"momentum": s["delta"], "nesterov": True},
}


@dataclass(frozen=True)
class Bench:
    """The measurement of kernels on one device.

    Attributes:
        gpu: Whose memory holds the arrays.
        timer: Of what the GPU does.
        device: torch's name of it.
        peers: Which of ``PEERS`` are measured too.
        n_repeats: Turns of each candidate.
    """

    gpu: gpu.Gpu
    timer: Timer
    device: str
    peers: Sequence[str] = PEERS
    n_repeats: int = 11

    def row(self, kernel: Kernel, n_bytes: int) -> dict[str, Any]:
        """Measure a kernel and its peers on vectors of one size."""
        operations, left_out = self._operations(kernel, n_bytes)
        seconds = medians(operations, self.timer, self.n_repeats, calls_of(n_bytes))
        moved = {name: n_bytes // 4 * kernel.bytes_per_element(np.float32) for name in seconds}
        moved["copy"] = 2 * n_bytes
        equations = kernel.equations
        return {
            "kernel": kernel.name,
            "bytes": n_bytes,
            "bytes_per_element": kernel.bytes_per_element(np.float32),
            "n_updated": len(set(equations.loaded) & set(equations.stored)),
            "seconds": seconds,
            "gb_per_s": {name: moved[name] / seconds[name] / 1e9 for name in seconds},
            "left_out": left_out,
        }

    def launches(self, kernel: Kernel) -> dict[str, Any]:
        """Measure the Python cost of a call, on vectors so short that the GPU finishes sooner."""
        operations, _ = self._operations(kernel, LAUNCH_BYTES)
        seconds = medians(operations, ClockTimer(self.gpu.synchronize), LAUNCH_REPEATS, LAUNCH_CALLS)
        return {"kernel": kernel.name, "seconds": seconds}

    def needed_bytes(self, kernel: Kernel, n_bytes: int) -> int:
        """Return the device memory needed at most: our arrays, torch's, the copy's, and the vectors in between."""
        n_arrays = len(kernel.equations.arrays)
        return (2 * n_arrays + 2) * max(n_bytes, ROTATED_BYTES) + (n_arrays + 4) * n_bytes

    def _operations(self, kernel: Kernel, n_bytes: int) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
        """Return the operations by name, and the reasons why peers are missing."""
        n, arrays = n_bytes // 4, kernel.equations.arrays
        n_sets = min(max(ROTATED_BYTES // (n_bytes * len(arrays)), 1), MOST_SETS)
        sets = _sets([self._random(n_sets * n, k) for k in range(len(arrays))], n)
        pairs = _sets([self._random(n_sets * n, k) for k in range(2)], n)
        scalars = scalars_of(kernel)
        operations: dict[str, Callable[[], object]] = {
            "mpitrain": in_turns([lambda of=of: kernel(*of, *scalars.values()) for of in sets]),
            "copy": in_turns([lambda of=of: self.gpu.copy(*of) for of in pairs]),
        }
        left_out = {}
        made = self._peers(kernel, sets, n, n_sets, scalars)
        for name in self.peers:
            if name in made:
                try:
                    operation = made[name]()
                    operation()
                except Exception as error:  # what a library cannot do must not stop the others
                    left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                else:
                    operations[name] = operation
        return operations, left_out

    def _peers(
        self, kernel: Kernel, sets: list[list[Any]], n: int, n_sets: int, scalars: dict[str, float]
    ) -> dict[str, Callable[[], Callable[[], object]]]:
        """Return the constructors of all available peers of a kernel."""
        values, eager = tuple(scalars.values()), EAGER.get(kernel.name) or expression(kernel)
        in_place = IN_PLACE.get(kernel.name)
        tensors = _sets([torch.rand(n_sets * n, device=self.device) for _ in kernel.equations.arrays], n)

        def each(function: Callable[..., object], of_all: list[list[Any]]) -> Callable[[], object]:
            return in_turns([lambda of=of: function(*of, *values) for of in of_all])

        def fused() -> Callable[[], object]:
            import cupy

            return each(cupy.fuse(eager), sets)

        made: dict[str, Callable[[], Callable[[], object]]] = {
            "cupy": lambda: each(eager, sets),
            "cupy.fuse": fused,
            "torch": lambda: each(eager, tensors),
        }
        if in_place is not None:
            made["torch in place"] = lambda: each(in_place, tensors)
        if kernel.name in OPTIMIZERS:
            settings = OPTIMIZERS[kernel.name](scalars)
            made["torch.optim"] = lambda: in_turns([_optimizer(of, scalars, settings).step for of in tensors])
        return made

    def _random(self, n: int, seed: int) -> Any:
        """Return random numbers, (n,) float32 in device memory."""
        return fill(self.gpu, self.gpu.zeros(n, np.float32), seed)


def _sets(wholes: Sequence[Any], n: int) -> list[list[Any]]:
    """Split arrays into parts of ``n`` elements: a list of the first parts, one of the second parts, and so on."""
    return [[whole[start : start + n] for whole in wholes] for start in range(0, len(wholes[0]), n)]


def _optimizer(tensors: Sequence[torch.Tensor], scalars: dict[str, float], settings: dict[str, Any]) -> Any:
    """Return torch's fused step on x, the first tensor, with the gradient in the last."""
    parameter = torch.nn.Parameter(tensors[0])
    parameter.grad = tensors[-1]
    return torch.optim.SGD([parameter], lr=scalars["eta"], weight_decay=scalars["decay"], fused=True, **settings)


def in_turns(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a function that calls the given functions in turn, one per call."""
    turn = cycle(functions)

    def call() -> object:
        return next(turn)()

    return call


def scalars_of(kernel: Kernel) -> dict[str, float]:
    """Return small steps towards stable values, so that thousands of calls meet neither subnormals nor infinities."""
    values = {"keep": 1.0, "w": 1.0, "w0": 1.0, "a": 1 / len(kernel.equations.arrays), "p": 1.0}
    return {name: values.get(name, 1e-3) for name in kernel.equations.scalars}


def with_fractions(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the ratios to the best copy of the same size and to torch."""
    best: dict[int, float] = {}
    for row in rows:
        best[row["bytes"]] = max(best.get(row["bytes"], 0.0), row["gb_per_s"]["copy"])
    return [
        row
        | {"limit_gb_per_s": best[row["bytes"]], "of_copy": row["gb_per_s"]["mpitrain"] / best[row["bytes"]]}
        | {
            key: row["seconds"][name] / row["seconds"]["mpitrain"] if name in row["seconds"] else None
            for key, name in (("of_torch", "torch"), ("of_torch_in_place", "torch in place"))
        }
        for row in rows
    ]


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the verdicts on the project's bars, for vectors of 64 MiB and more."""
    large = [row for row in rows if row["bytes"] >= BAR_BYTES]
    bars = []
    elastic = [row for row in large if row["kernel"] == BAR_KERNEL]
    fused = [row for row in large if row["n_updated"] >= FEWEST_UPDATED and row["kernel"] != BAR_KERNEL]
    judged = ((elastic, BAR_KERNEL, (COPY_BAR, TORCH_BAR)), (fused, "the other fused kernels", (COPY_BAR,)))
    for of, words, bounds in judged:
        for column, least, bar in bounds:
            known = [row for row in of if row[column] is not None]
            if not known:
                continue
            worst = min(known, key=lambda row: row[column])
            missed = sorted({row["kernel"] for row in known if row[column] < least})
            least_at = f"least: {worst['kernel']} at {name_of(worst['bytes'])}"
            bar = f"{words} from {name_of(BAR_BYTES)} up {bar} ({least_at})"
            bars.append({"bar": bar, "ratio": worst[column], "passed": not missed, "missed_by": missed})
    return bars


def table(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> list[str]:
    """Format the rows as a table."""
    columns = {
        "vector": [name_of(row["bytes"]) for row in rows],
        "kernel": [row["kernel"] for row in rows],
        "mpitrain": [f"{row['gb_per_s']['mpitrain']:.0f}" for row in rows],
        "copy": [f"{row['limit_gb_per_s']:.0f}" for row in rows],
        "% of copy": [f"{100 * row['of_copy']:.0f}" for row in rows],
    }
    for peer in peers:
        columns[peer] = [text.number(row["gb_per_s"].get(peer), "{:.0f}") for row in rows]
    columns["x torch"] = [text.number(row["of_torch"], "{:.2f}") for row in rows]
    columns["x in place"] = [text.number(row["of_torch_in_place"], "{:.2f}") for row in rows]
    return text.table(columns, left=("kernel",))


def table_of_launches(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> list[str]:
    """Format the microseconds per call as a table."""
    names = ("mpitrain", "copy", *peers)
    columns = {"kernel": [row["kernel"] for row in rows]}
    for name in names:
        columns[name] = [
            text.number(1e6 * row["seconds"][name] if name in row["seconds"] else None, "{:.1f}") for row in rows
        ]
    return text.table(columns, left=("kernel",))


def show(document: Mapping[str, Any], device: str) -> str:
    """Print the document as text."""
    peers = document["peers"]
    lines = [device, "float32; GB/s of the bytes of one pass", "", *table(document["results"], peers), ""]
    lines += [
        "Microseconds of a call from Python, vectors of 1 KiB",
        "",
        *table_of_launches(document["launches"], peers),
    ]
    lines += [""]
    reasons = {(name, why) for row in document["results"] for name, why in row["left_out"].items()}
    lines += [f"without {name}: {why}" for name, why in sorted(reasons)]
    lines += [f"without {left['kernel']}, {name_of(left['bytes'])}: {left['why']}" for left in document["no_room"]]
    lines += [f"{'PASS' if b['passed'] else 'MISSED'}: {b['bar']}: {b['ratio']:.3f}" for b in document["bars"]]
    return "\n".join(lines)


def measure(bench: Bench, chosen: Sequence[Kernel], sizes: Sequence[int], buffer: Callable[[], int]) -> dict[str, Any]:
    """Measure all kernels, size by size, and the cost of their launches.

    Args:
        bench: Measures one.
        chosen: The kernels.
        sizes: Of a vector, in bytes.
        room: Bytes of device memory that are free.
    """
    rows, no_room = [], []
    for n_bytes in sizes:
        for kernel in chosen:
            free, needed = buffer(), bench.needed_bytes(kernel, n_bytes)
            if needed > free:
                why = f"needs {name_of(needed)} of device memory, {name_of(free)} are free"
                no_room.append({"kernel": kernel.name, "bytes": n_bytes, "why": why})
            else:
                rows.append(bench.row(kernel, n_bytes))
    rows = with_fractions(rows)
    launches = [bench.launches(kernel) for kernel in chosen]
    return {"results": rows, "launches": launches, "no_room": no_room, "bars": verdicts(rows)}


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = Parser(prog="python -m benchmarks.gpu.kernels", description="Kernels on a GPU.")
    parser.add_argument("--sizes", default=SIZES, help="of a vector, in bytes (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=11, help="turns of each (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every kernel, not only those that matter most")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    problem = gpu_machine.problem()
    if problem:
        return fail(problem)
    try:
        sizes = [size_of(word.strip()) for word in options.sizes.split(",")]
    except UsageError as error:
        return fail(str(error))
    device = gpu.current()
    torch.set_num_threads(1)
    bench = Bench(device, EventTimer(), f"cuda:{device.index}", n_repeats=options.repeats)
    chosen = (*CHOSEN, *(k for k in kernels.library() if k not in CHOSEN)) if options.all else CHOSEN
    document = measure(bench, chosen, sizes, gpu_machine.free_bytes)
    described = gpu_machine.describe()
    document |= {"peers": PEERS, "repeats": options.repeats, "gpu": described, "hardware": hardware()}
    document |= {"versions": gpu_machine.versions(), "load_average": os.getloadavg()}
    if not options.json:
        print(show(document, gpu_machine.line(described)))
    print(to_json(document), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
