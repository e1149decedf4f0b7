"""Averages and linear combinations of vectors: gossip, all-reduce, and plain vector operations.

A pair average is written as a displacement, x + (z - x)/2, rather than as (x + z)/2. The guard can then drop a peer's
NaN and leave x unchanged, and a symmetric average moves both vectors by the same amount in opposite directions, so that
their sum is conserved even where an element is dropped. Both forms stay between x and z.
"""

from __future__ import annotations

import functools
from typing import Final

from mpitrain.kernels.compile.declare import Kernel

_GOSSIP: Final = "Jin, Yuan, Iandola, Keutzer 2016, How to scale distributed deep learning?, arXiv 1611.04581"

pair_average: Final = Kernel(
    "pair_average",
    """
    d = z - x
    x = x + 0.5 * d
    """,
    arrays="x z",
    guard="d",
    source=f"{_GOSSIP}, gossiping SGD (pull)",
    doc="Replace x by the mean of x and a peer's z; z is unchanged.",
)

symmetric_average: Final = Kernel(
    "symmetric_average",
    """
    d = z - x
    x = x + 0.5 * d
    z = z - 0.5 * d
    """,
    arrays="x z",
    guard="d",
    source="Lian, Zhang, Zhang, Liu 2018, AD-PSGD, arXiv 1710.06952, Algorithm 1",
    doc="Replace x and z by their mean (up to rounding); x + z is conserved.",
)

weighted_average: Final = Kernel(
    "weighted_average",
    """
    d = z - x
    x = x + share * d
    """,
    arrays="x z",
    scalars="share",
    guard="d",
    source="Assran et al. 2019, SGP, arXiv 1811.10792; Lian et al. 2017, D-PSGD, arXiv 1705.09056",
    doc="Replace x by (w*x + w_z*z)/(w + w_z), with share = w_z/(w + w_z); z is unchanged.",
)

push_receive: Final = Kernel(
    "push_receive",
    """
    d = r - n * x
    x = x + d / (1 + n)
    """,
    arrays="x r",
    scalars="n",
    guard="d",
    source=f"{_GOSSIP}, gossiping SGD (push): x = (x + r) / (1 + n)",
    doc="Replace x by the mean of itself and n received vectors whose sum is r.",
)

scaled_add: Final = Kernel(
    "scaled_add",
    "y = y + a * x",
    arrays="y x",
    scalars="a",
    source="BLAS axpy",
    doc="Add a multiple of x to y.",
)

scale: Final = Kernel("scale", "x = a * x", arrays="x", scalars="a", source="BLAS scal", doc="Multiply x by a.")

copy: Final = Kernel(
    "copy", "y = x", arrays="y x", source="BLAS copy", doc="Copy x to y, converting the dtype if they differ."
)

KERNELS: Final = (pair_average, symmetric_average, weighted_average, push_receive, scaled_add, scale, copy)


@functools.cache
def weighted_mix(k: int) -> Kernel:
    """Return the kernel ``x = w0*x + w1*z1 + ... + wk*zk``.

    It is called as ``weighted_mix(k)(x, z1, ..., zk, w0, ..., wk)``.
    Source: Lian et al. 2017, D-PSGD, arXiv 1705.09056, Algorithm 1; the weights are row i of the mixing matrix W.
    """
    _check_count(k)
    others = range(1, k + 1)
    return Kernel(
        f"weighted_mix_{k}",
        f"x = {' + '.join(['w0 * x', *(f'w{j} * z{j}' for j in others)])}",
        arrays=" ".join(["x", *(f"z{j}" for j in others)]),
        scalars=" ".join(f"w{j}" for j in range(k + 1)),
        source="Lian et al. 2017, arXiv 1705.09056, Algorithm 1",
        doc=f"Replace x by a weighted mean of itself and {k} others.",
    )


@functools.cache
def sum_into(k: int) -> Kernel:
    """Return the kernel ``out = a * (z1 + ... + zk)``, summed in this order.

    For many vectors, `reduce_sum` is faster on the host.
    """
    _check_count(k)
    names = [f"z{j}" for j in range(1, k + 1)]
    return Kernel(
        f"sum_into_{k}",
        f"out = a * ({' + '.join(names)})",
        arrays=" ".join(["out", *names]),
        scalars="a",
        source="the definition of a reduction",
        doc=f"Set out to a times the sum of {k} vectors.",
    )


@functools.cache
def sum_everywhere(k: int) -> Kernel:
    """Return the kernel ``zj = a * (z1 + ... + zk)`` for every j.

    For many vectors, `reduce_broadcast` is faster on the host.
    """
    _check_count(k)
    names = [f"z{j}" for j in range(1, k + 1)]
    return Kernel(
        f"sum_everywhere_{k}",
        "\n".join([f"m = a * ({' + '.join(names)})", *(f"{name} = m" for name in names)]),
        arrays=" ".join(names),
        scalars="a",
        source="the definition of an all-reduce",
        doc=f"Set each of {k} vectors to a times the sum of all.",
    )


def _check_count(k: int) -> None:
    if not 1 <= k <= 64:
        raise ValueError(f"{k} vectors; a kernel takes 1 to 64, combine more in groups")
