"""Sums of many vectors in one pass, for an all-reduce among ranks that share memory.

Up to `DIRECT` vectors the declared kernel is best: one fused loop, as fast as scaling the vectors in place. With more,
the prefetchers lose track of the streams, and vectors that start at the same offset within a page, as those of
shared-memory windows do, evict each other from the first-level cache: with 32 vectors the fused loop drops to a
thirtieth of the bandwidth. More vectors are therefore summed in blocks that stay in the cache, `GROUP` vectors at a
time, which reaches 60 to 90 % of the bandwidth for any number. Both ways sum each element in the order of the vectors:
the bits are those of NumPy's sequential sum, and equal on all ranks that sum the same vectors in the same order.

Bytes moved per element: `reduce_sum` reads k elements and writes one, `reduce_broadcast` reads k and writes k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from mpitrain.kernels.compile import cache, host
from mpitrain.kernels.compile.declare import as_bits
from mpitrain.kernels.compile.entry import READABLE, WRITEABLE
from mpitrain.kernels.compile.storage import Storage, compute_type, storage_of
from mpitrain.kernels.mixing import sum_everywhere, sum_into

DIRECT: Final = 8  # vectors; measured with 2 to 16
GROUP: Final = 4
BLOCK: Final = 4096  # elements: 16 KiB of float32, half of the smallest first-level cache in use
MOST: Final = 64  # vectors


def reduce_sum(out: Any, sources: Sequence[Any], scale: float = 1.0) -> None:
    """Compute ``out = scale * (sources[0] + sources[1] + ...)``; `out` may be one of the sources.

    Args:
        out: (n,) the result, of any dtype that the kernels support.
        sources: 1 to 64 vectors of the same length and dtype as `out`. 16-bit vectors are summed in float32 and rounded
            once.
        scale: The scale; 1/k gives the mean.

    Raises:
        ValueError: The vectors differ in length or dtype.
    """
    k = _count("reduce_sum", sources)
    if k <= DIRECT or not isinstance(out, np.ndarray):
        sum_into(k)(out, *sources, scale)
        return
    _check([out], WRITEABLE, like=out)
    _check(sources, READABLE, like=out)
    function, is_half = _compiled("reduce_sum", k, out.dtype)
    if is_half:
        (out,), sources = as_bits([out]), as_bits(sources)
    function(out, tuple(sources), scale)


def reduce_broadcast(targets: Sequence[Any], scale: float = 1.0) -> None:
    """Set every vector to ``scale * (targets[0] + targets[1] + ...)``.

    Args:
        targets: 1 to 64 vectors of the same length and dtype, all changed in place.
        scale: The scale; 1/k gives the mean.

    Raises:
        ValueError: The vectors differ in length or dtype, or one is read-only.
    """
    k = _count("reduce_broadcast", targets)
    if k <= DIRECT or not isinstance(targets[0], np.ndarray):
        sum_everywhere(k)(*targets, scale)
        return
    _check(targets, WRITEABLE, like=targets[0])
    function, is_half = _compiled("reduce_broadcast", k, targets[0].dtype)
    function(tuple(as_bits(targets) if is_half else targets), scale)


def source(name: str, k: int, storage: Storage) -> str:
    """Return the Python source of `reduce_sum` or `reduce_broadcast` for k vectors, and of ``SIGNATURE``, its types."""
    compute = compute_type([storage])
    broadcast = name == "reduce_broadcast"
    vector, vectors = f"{storage.numba}[::1]", f"UniTuple({storage.numba}[::1], {k})"
    signature = ", ".join([*([] if broadcast else [vector]), vectors, compute])
    groups = [range(start, min(start + GROUP, k)) for start in range(0, k, GROUP)]
    lines = [
        "import numpy as np",
        *host.conversion_imports([storage]),
        f'SIGNATURE = "int64({signature})"',
        f"def {name}({'zs' if broadcast else 'out, zs'}, scale):",
        "    n = len(zs[0])",
        f"    block = np.empty({BLOCK}, np.{compute})",
        f"    for start in range(0, n, {BLOCK}):",
        f"        stop = min(start + {BLOCK}, n)",
        # Slices, because Numba would check each index start + i for being negative.
        *(f"        z{j} = zs[{j}][start:stop]" for j in range(k)),
    ]
    for group in groups:
        terms = ["block[i]"] if group[0] else []
        terms += [f"{storage.widen}(z{j}[i])" for j in group]
        lines += ["        for i in range(stop - start):", f"            block[i] = {' + '.join(terms)}"]
    # Scale and round once, into the first vector that is assigned; the others are copies of it.
    lines += [
        f"        w = {'zs[0]' if broadcast else 'out'}[start:stop]",
        "        for i in range(stop - start):",
        f"            w[i] = {storage.narrow}(scale * block[i])",
    ]
    for group in groups if broadcast else []:
        lines += ["        for i in range(stop - start):", "            m = w[i]"]
        lines += [f"            z{j}[i] = m" for j in group if j > 0]
    return "\n".join([*lines, "    return 0", ""])


def _count(name: str, vectors: Sequence[Any]) -> int:
    if not 1 <= len(vectors) <= MOST:
        raise ValueError(f"{name}: {len(vectors)} vectors; it takes 1 to {MOST}, reduce more in groups")
    return len(vectors)


@functools.cache
def _compiled(name: str, k: int, dtype: Any) -> tuple[Callable[..., int], bool]:
    storage = storage_of(dtype)
    return cache.compiled(name, f"{k}_{storage.short}", source(name, k, storage)), storage.itemsize == 2


def _check(vectors: Sequence[Any], flags: int, like: np.ndarray) -> None:
    dtype, shape = like.dtype, like.shape
    if len(shape) != 1:
        raise ValueError(f"the vectors have shape {shape}; pass 1-D vectors (array.reshape(-1))")
    for j, vector in enumerate(vectors):
        if (
            type(vector) is not np.ndarray
            or vector.dtype != dtype
            or vector.shape != shape
            or vector.flags.num & flags != flags
        ):
            raise ValueError(
                f"vector {j} of the reduction must be a contiguous NumPy vector of {like.size} {dtype} elements like "
                "the first, and writeable if it is assigned"
            )
