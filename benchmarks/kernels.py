"""How near the host kernels come to the bandwidth of the memory, beside NumPy and torch.

A kernel is one pass, so its floor is the time that its bytes need: each array read once and, if assigned, written
once. The practical limit is an in-place scale of the very same arrays, measured in turn with the kernel, because one
read and one write of each line is the pattern that memory serves best. An array that is only written is first read by
the hardware, which is not counted here: such kernels stay well below the limit. NumPy evaluates the same equations an
operator at a time, torch too, but in place where it has an operation for it; both with one thread, as a rank on its own
core has it.

    python benchmarks/kernels.py [--n 8000000] [--repeats 21] [--kernels elastic_exchange,scale] [--json]
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


def torch_elastic_exchange(x: Any, c: Any, a_w: float, a_c: float) -> None:
    d = x - c
    x.sub_(d, alpha=a_w)
    c.add_(d, alpha=a_c)


def torch_sgd_step(x: Any, g: Any, eta: float, decay: float) -> None:
    x.mul_(1 - eta * decay).sub_(g, alpha=eta)


def torch_momentum_step(x: Any, v: Any, g: Any, eta: float, delta: float, decay: float) -> None:
    v.mul_(delta).add_(g).add_(x, alpha=decay)
    x.sub_(v, alpha=eta)


# Where torch has in-place operations for it, it is measured with those; elsewhere with the equations.
TORCH: dict[str, Callable[..., None]] = {
    "elastic_exchange": torch_elastic_exchange,
    "sgd_step": torch_sgd_step,
    "torch_momentum_step": torch_momentum_step,
    "pair_average": lambda x, z: x.lerp_(z, 0.5),
    "scaled_add": lambda y, x, a: y.add_(x, alpha=a),
    "scale": lambda x, a: x.mul_(a),
    "copy": lambda y, x: y.copy_(x),
}


def expression(kernel: Kernel) -> Callable[..., None]:
    """The kernel's equations as a function that evaluates them an operator at a time, for NumPy and torch alike."""
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
    """Median and 95th percentile of each candidate, in seconds; the candidates take turns, so that noise hits all."""
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
    """GB/s of a kernel at n float32, and what it costs to call it at all."""
    rng = np.random.default_rng(0)
    arrays = [rng.random(n, np.float32) for _ in kernel.equations.arrays]
    # Small steps towards stable values: a thousand calls must meet neither subnormals nor infinities.
    scalars = [1.0 if name in ("keep", "w", "a", "w0") else 1e-3 for name in kernel.equations.scalars]
    tensors = [torch.from_numpy(array) for array in arrays]
    eager = expression(kernel)
    torch_eager = TORCH.get(kernel.name, eager)
    timed = medians(
        {
            "mpitrain": lambda: kernel(*arrays, *scalars),
            "limit": lambda: [scale(array, 1.0) for array in arrays],
            "numpy": lambda: eager(*arrays, *scalars),
            "torch": lambda: torch_eager(*tensors, *scalars),
        },
        repeats,
    )
    n_bytes = kernel.bytes_per_element(np.float32) * n
    result: dict[str, Any] = {"kernel": kernel.name, "bytes_per_element": kernel.bytes_per_element(np.float32)}
    for name, figures in timed.items():
        moved = 8 * n * len(arrays) if name == "limit" else n_bytes
        result[f"{name}_gb_per_s"] = moved / figures["median_seconds"] / 1e9
        result[f"{name}_p95_seconds"] = figures["p95_seconds"]
    result["limit_fraction"] = result["mpitrain_gb_per_s"] / result["limit_gb_per_s"]
    result["call_seconds"] = call_seconds(kernel, scalars)
    return result


def call_seconds(kernel: Kernel, scalars: Sequence[float]) -> float:
    """Seconds of a call on vectors of one element: the overhead of every call."""
    arrays = [np.ones(1, np.float32) for _ in kernel.equations.arrays]
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            kernel(*arrays, *scalars)
        best = min(best, (time.perf_counter() - start) / 500)
    return best


def bench_reduction(name: str, k: int, n: int, repeats: int) -> dict[str, Any]:
    """GB/s of a reduction of k vectors of n float32."""
    vectors = [np.ones(n, np.float32) for _ in range(k)]
    out = np.ones(n, np.float32)
    tensors = [torch.from_numpy(vector) for vector in vectors]

    def numpy_sum() -> None:
        total = np.add(vectors[0], vectors[1])
        for vector in vectors[2:]:
            total += vector
        total *= 1 / k
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
        n_bytes, run = 4 * n * (k + 1), lambda: reduce_sum(out, vectors, 1 / k)
    else:
        n_bytes, run = 8 * n * k, lambda: reduce_broadcast(vectors, 1 / k)
    timed = medians(
        {"mpitrain": run, "limit": lambda: [scale(v, 1.0) for v in vectors], "numpy": numpy_sum, "torch": torch_sum},
        repeats,
    )
    result: dict[str, Any] = {"kernel": f"{name}({k})", "bytes_per_element": n_bytes // n}
    for key, figures in timed.items():
        moved = 8 * n * k if key == "limit" else n_bytes
        result[f"{key}_gb_per_s"] = moved / figures["median_seconds"] / 1e9
        result[f"{key}_p95_seconds"] = figures["p95_seconds"]
    result["limit_fraction"] = result["mpitrain_gb_per_s"] / result["limit_gb_per_s"]
    return result


def hardware() -> dict[str, Any]:
    """The processor and how many of its cores this process may use."""
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": model, "llvm_cpu": llvmlite.binding.get_host_cpu_name(), "cores": len(os.sched_getaffinity(0))}


def main() -> None:
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
        print(f"{'kernel':<22}{'bytes':>6}{'mpitrain':>10}{'limit':>8}{'%':>5}{'NumPy':>8}{'torch':>8}{'call us':>9}")
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
                f"{row['kernel']:<22}{row['bytes_per_element']:>6}{row['mpitrain_gb_per_s']:>10.1f}"
                f"{row['limit_gb_per_s']:>8.1f}{100 * row['limit_fraction']:>5.0f}{row['numpy_gb_per_s']:>8.1f}"
                f"{row['torch_gb_per_s']:>8.1f}{1e6 * row.get('call_seconds', float('nan')):>9.2f}",
                flush=True,
            )
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "torch": torch.__version__,
    }
    document = {"n": options.n, "repeats": options.repeats, "results": results}
    print(json.dumps({**document, "versions": versions, "hardware": hardware()}))


if __name__ == "__main__":
    main()
