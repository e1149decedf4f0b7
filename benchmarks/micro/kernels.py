"""Measure host kernels against memory bandwidth, NumPy and torch.

A kernel is one pass, so its floor is the time that its bytes need: each array read once and, if assigned, written
once. The practical limit is an in-place scale of the very same arrays, measured in turn with the kernel, because one
read and one write of each line is the pattern that memory serves best. Two columns compare with it:

    %        by bytes moved: GB/s of the kernel by GB/s of the scale
    lines %  by lines fetched: time of the scale by time of the kernel

One core fetches lines at a fixed rate, and whether a line is written back afterwards hardly matters: a kernel that only
reads some of its arrays takes as long as if it changed them too, stays below the limit by bytes, and is at it by lines.
An array that is only written would be fetched by the hardware first, for nothing: from 60 MB of all arrays on it is
written past the caches instead. One core writes as many lines as it reads, so a kernel that writes more of them than
it reads, or reads more than it writes, cannot have both directions full.

NumPy evaluates the same equations an operator at a time, torch too, but in place where it has an operation for it; both
with one thread, as a rank on its own core has it. They do it without the guards against what is not finite, which our
kernels have. torch.compile is not among them: its first kernel took 24 s to compile, and it needs a C++ compiler.

The project's bars are for fused kernels: those that change two arrays or more in place (that read the old value of at
least two arrays and assign a new one to each). ``elastic_exchange`` and ``torch_momentum_step`` are such, and so is
``reduce_broadcast``; ``scaled_add``, ``elastic_pull`` and ``copy``, for which libraries have a function or need no
intermediate vector, are not. A bar's figure is that of the fused kernel that is farthest from it.

    python -m benchmarks.micro.kernels [--n 8000000] [--repeats 21] [--kernels elastic_exchange,scale] [--json]
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Before NumPy and torch start their threads.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"

import llvmlite.binding  # noqa: E402
import numba  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from mpitrain.kernels import Kernel, library, reduce_broadcast, reduce_sum, scale  # noqa: E402

# The project's bars, for fused kernels on vectors of this many elements or more: what no cache holds.
BAR_ELEMENTS = 4_000_000
OF_LIMIT_AT_LEAST, OF_NUMPY_AT_LEAST = 0.9, 4.0
FEWEST_UPDATED = 2  # arrays of a fused kernel


def torch_elastic_exchange(x: Any, c: Any, a_w: float, a_c: float) -> None:
    """Exchange elastically by torch's in-place operations."""
    d = x - c
    x.sub_(d, alpha=a_w)
    c.add_(d, alpha=a_c)


def torch_sgd_step(x: Any, g: Any, eta: float, decay: float) -> None:
    """Make a step of SGD by torch's in-place operations."""
    x.mul_(1 - eta * decay).sub_(g, alpha=eta)


def torch_momentum_step(x: Any, v: Any, g: Any, eta: float, delta: float, decay: float) -> None:
    """Make a momentum step by torch's in-place operations."""
    v.mul_(delta).add_(g).add_(x, alpha=decay)
    x.sub_(v, alpha=eta)


# Where torch has in-place operations for it, it is measured with those; elsewhere with the equations.
TORCH: dict[str, Callable[..., object]] = {
    "elastic_exchange": torch_elastic_exchange,
    "sgd_step": torch_sgd_step,
    "torch_momentum_step": torch_momentum_step,
    "pair_average": lambda x, z: x.lerp_(z, 0.5),
    "scaled_add": lambda y, x, a: y.add_(x, alpha=a),
    "scale": lambda x, a: x.mul_(a),
    "copy": lambda y, x: y.copy_(x),
    "keep_finite": lambda x: x.nan_to_num_(0.0, 0.0, 0.0),
}

# Without its guard this one does nothing.
NUMPY: dict[str, Callable[..., object]] = {
    "keep_finite": lambda x: np.nan_to_num(x, copy=False, nan=0.0, posinf=0.0, neginf=0.0),
}


def expression(kernel: Kernel) -> Callable[..., None]:
    """Return the kernel's equations as a function that evaluates them operator by operator, for NumPy and torch."""
    equations = kernel.equations
    lines = [f"def {kernel.name}({', '.join(equations.arrays + equations.scalars)}):"]
    lines += [f"    {name}_at = {name}" for name in equations.stored]
    lines += [f"    {name} = {value!r}" for name, value in equations.literals]
    lines += [f"    {target} = {ast.unparse(value)}" for target, value in equations.statements]
    lines += [f"    {name}_at[:] = {name}" for name in equations.stored]
    namespace: dict[str, Any] = {}
    exec("\n".join(lines), namespace)
    function: Callable[..., None] = namespace[kernel.name]
    return function


def medians(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Return the median and 95th percentile of each candidate in seconds; the candidates take turns."""
    for run in candidates.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {"median_seconds": statistics.median(s), "p95_seconds": float(np.percentile(s, 95))}
        for name, s in seconds.items()
    }


def bench_kernel(kernel: Kernel, n: int, repeats: int) -> dict[str, Any]:
    """Measure the GB/s of a kernel at n float32 elements, and the cost of a call."""
    rng = np.random.default_rng(0)
    arrays = [rng.random(n, np.float32) for _ in kernel.equations.arrays]
    # Small steps towards stable values: a thousand calls must meet neither subnormals nor infinities.
    scalars = [1.0 if name in ("keep", "w", "a", "w0") else 1e-3 for name in kernel.equations.scalars]
    tensors = [torch.from_numpy(array) for array in arrays]
    eager = expression(kernel)
    numpy_eager, torch_eager = (peers.get(kernel.name, eager) for peers in (NUMPY, TORCH))
    timed = medians(
        {
            "mpitrain": lambda: kernel(*arrays, *scalars),
            "limit": lambda: [scale(array, 1.0) for array in arrays],
            "numpy": lambda: numpy_eager(*arrays, *scalars),
            "torch": lambda: torch_eager(*tensors, *scalars),
        },
        repeats,
    )
    result = row_of(kernel.name, timed, n, kernel.bytes_per_element(np.float32), len(arrays))
    result["n_updated"] = len(set(kernel.equations.loaded) & set(kernel.equations.stored))
    result["call_seconds"] = call_seconds(kernel, scalars)
    return result


def row_of(
    name: str, timed: dict[str, dict[str, float]], n: int, bytes_per_element: int, n_arrays: int
) -> dict[str, Any]:
    """Return the figures of one kernel.

    Args:
        name: Of the kernel.
        timed: What ``medians`` returned for "mpitrain", "limit", "numpy" and "torch".
        n: Elements of a vector.
        bytes_per_element: That the kernel moves.
        n_arrays: How many float32 vectors there are; the limit reads and writes each.
    """
    row: dict[str, Any] = {"kernel": name, "bytes_per_element": bytes_per_element}
    for key, figures in timed.items():
        moved = n * (8 * n_arrays if key == "limit" else bytes_per_element)
        row[f"{key}_gb_per_s"] = moved / figures["median_seconds"] / 1e9
        row[f"{key}_p95_seconds"] = figures["p95_seconds"]
    row["limit_fraction"] = row["mpitrain_gb_per_s"] / row["limit_gb_per_s"]
    row["lines_fraction"] = timed["limit"]["median_seconds"] / timed["mpitrain"]["median_seconds"]
    row["of_numpy"] = timed["numpy"]["median_seconds"] / timed["mpitrain"]["median_seconds"]
    return row


def verdicts(rows: Sequence[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """Return the verdicts on the project's bars, if they apply to this run.

    Args:
        rows: Of all kernels; which are fused is in the module's docstring.
        n: Elements of a vector.
    """
    fused = [row for row in rows if row["n_updated"] >= FEWEST_UPDATED]
    if n < BAR_ELEMENTS or not fused:
        return []
    limit = f"fused kernels at least {OF_LIMIT_AT_LEAST:.0%} of an in-place scale"
    bars = []
    for column, least, bar in (
        ("lines_fraction", OF_LIMIT_AT_LEAST, f"{limit}, by lines fetched"),
        ("limit_fraction", OF_LIMIT_AT_LEAST, f"{limit}, by bytes moved"),
        ("of_numpy", OF_NUMPY_AT_LEAST, f"fused kernels at least {OF_NUMPY_AT_LEAST:g} x faster than NumPy"),
    ):
        worst = min(fused, key=lambda row: row[column])
        missed = [row["kernel"] for row in fused if row[column] < least]
        bar = f"{bar} (least: {worst['kernel']}; {len(fused) - len(missed)} of {len(fused)} pass)"
        bars.append({"bar": bar, "ratio": worst[column], "passed": not missed, "missed_by": missed})
    return bars


def call_seconds(kernel: Kernel, scalars: Sequence[float]) -> float:
    """Measure the seconds of a call on vectors of one element: the overhead of every call."""
    arrays = [np.ones(1, np.float32) for _ in kernel.equations.arrays]
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            kernel(*arrays, *scalars)
        best = min(best, (time.perf_counter() - start) / 500)
    return best


def bench_reduction(name: str, k: int, n: int, repeats: int) -> dict[str, Any]:
    """Measure the GB/s of a reduction of k vectors of n float32 elements."""
    vectors = [np.ones(n, np.float32) for _ in range(k)]
    out = np.ones(n, np.float32)
    tensors = [torch.from_numpy(vector) for vector in vectors]

    def numpy_sum() -> None:
        total = sum(vectors[1:], start=vectors[0]) * (1 / k)
        for vector in [out] if name == "reduce_sum" else vectors:
            vector[:] = total

    def torch_sum() -> None:
        total = tensors[0] + tensors[1]
        for tensor in tensors[2:]:
            total += tensor
        total *= 1 / k
        for tensor in [torch.from_numpy(out)] if name == "reduce_sum" else tensors:
            tensor.copy_(total)

    if name == "reduce_sum":
        assigned, run = [out], lambda: reduce_sum(out, vectors, 1 / k)
    else:
        assigned, run = [], lambda: reduce_broadcast(vectors, 1 / k)
    arrays = [*vectors, *assigned]
    timed = medians(
        {"mpitrain": run, "limit": lambda: [scale(v, 1.0) for v in arrays], "numpy": numpy_sum, "torch": torch_sum},
        repeats,
    )
    bytes_per_element = 4 * (k + 1) if assigned else 8 * k
    return row_of(f"{name}({k})", timed, n, bytes_per_element, len(arrays)) | {"n_updated": 0 if assigned else k}


def hardware() -> dict[str, Any]:
    """Describe the processor and how many of its cores this process may use."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": model, "llvm_cpu": llvmlite.binding.get_host_cpu_name(), "cores": len(os.sched_getaffinity(0))}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=8_000_000, help="elements of a vector (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=21, help="runs of each (default: %(default)s)")
    parser.add_argument("--kernels", default="", help="names separated by commas (default: all, and the reductions)")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = set(filter(None, options.kernels.split(",")))
    table = None if options.json else sys.stdout

    if table:
        print(f"{options.n} float32, median of {options.repeats}, one thread; GB/s", file=table)
        print(
            f"{'kernel':<26}{'bytes':>6}{'mpitrain':>10}{'limit':>8}{'%':>5}{'lines %':>9}"
            f"{'NumPy':>8}{'torch':>8}{'call us':>9}",
            file=table,
        )
    results = []
    jobs: list[Callable[[], dict[str, Any]]] = [
        lambda kernel=kernel: bench_kernel(kernel, options.n, options.repeats)  # type: ignore[misc]
        for kernel in library()
        if not chosen or kernel.name in chosen
    ]
    jobs += [
        lambda name=name, k=k: bench_reduction(name, k, options.n, options.repeats)  # type: ignore[misc]
        for name in ("reduce_sum", "reduce_broadcast")
        for k in (2, 4, 8)
        if not chosen or name in chosen
    ]
    for job in jobs:
        row = job()
        results.append(row)
        if table:
            print(
                f"{row['kernel']:<26}{row['bytes_per_element']:>6}{row['mpitrain_gb_per_s']:>10.1f}"
                f"{row['limit_gb_per_s']:>8.1f}{100 * row['limit_fraction']:>5.0f}{100 * row['lines_fraction']:>9.0f}"
                f"{row['numpy_gb_per_s']:>8.1f}{row['torch_gb_per_s']:>8.1f}"
                + (f"{1e6 * row['call_seconds']:>9.2f}" if "call_seconds" in row else ""),
                flush=True,
            )
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "torch": torch.__version__,
    }
    bars = verdicts(results, options.n)
    if table:
        print()
        for bar in bars:
            print(f"{'PASS' if bar['passed'] else 'MISSED'}: {bar['bar']}: {bar['ratio']:.2f}")
            if bar["missed_by"]:
                print(f"    missed by {', '.join(bar['missed_by'])}")
    document = {"n": options.n, "repeats": options.repeats, "results": results, "bars": bars}
    print(json.dumps({**document, "versions": versions, "hardware": hardware()}))


if __name__ == "__main__":
    main()
