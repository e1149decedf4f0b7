"""The exchanges of elastic averaging.

Zhang, Choromanska, LeCun: Deep learning with Elastic Averaging SGD, 2015, https://arxiv.org/abs/1412.6651, equations
5-6 and Algorithms 1-2. x is a worker's parameters, c the center. Worker and center have separate moving rates (a_w,
a_c), which makes DOWNPOUR-like pulls and model averaging special cases. The paper's symmetric exchange is a_w = a_c =
alpha and conserves x + c. Both sides move from their old values (Jacobi) unless a kernel says otherwise (Gauss-Seidel;
Zhang's thesis, 2016, https://arxiv.org/abs/1605.02216, chapter 6).

The difference that enters the center is guarded: a worker with non-finite parameters does not spoil the center.
"""

from __future__ import annotations

from typing import Final

from mpitrain.kernels.compile.declare import Kernel

elastic_exchange: Final = Kernel(
    "elastic_exchange",
    """
    d = x - c
    x = x - a_w * d
    c = c + a_c * d
    """,
    arrays="x c",
    scalars="a_w a_c",
    guard="d",
    source="Zhang et al. 2015, arXiv 1412.6651, Algorithm 1",
    doc="Move a worker and the center towards each other; both moves use the old values.",
)

elastic_exchange_seen: Final = Kernel(
    "elastic_exchange_seen",
    """
    d = x - c
    x = x - a_w * d
    c = c + a_c * d
    z = c
    """,
    arrays="x c z",
    scalars="a_w a_c",
    guard="d",
    source="Zhang et al. 2015, arXiv 1412.6651, Algorithm 1",
    doc="Perform elastic_exchange and copy the new center to z.",
)

elastic_displacement: Final = Kernel(
    "elastic_displacement",
    """
    d = x - c
    x = a_w * d
    c = c + a_c * d
    """,
    arrays="x c",
    scalars="a_w a_c",
    guard="d",
    source="Zhang et al. 2015, arXiv 1412.6651, Algorithm 1",
    doc="Perform elastic_exchange on a copy x of a worker that trains on: x becomes the displacement to subtract.",
)

elastic_center: Final = Kernel(
    "elastic_center",
    """
    d = s - p * c
    c = c + a_c * d
    """,
    arrays="c s",
    scalars="a_c p",
    guard="d",
    source="Zhang et al. 2015, arXiv 1412.6651, eq. 6",
    doc="Move the synchronous center towards the workers; s is the sum of all p workers.",
)

elastic_pull: Final = Kernel(
    "elastic_pull",
    """
    d = x - c
    x = x - a_w * d
    """,
    arrays="x c",
    scalars="a_w",
    guard="d",
    source="Zhang et al. 2015, arXiv 1412.6651, eq. 5",
    doc="Move a worker towards the center and leave the center unchanged.",
)

elastic_sync: Final = Kernel(
    "elastic_sync",
    """
    d = s - p * c
    x = x - a_w * (x - c)
    c = c + a_c * d
    """,
    arrays="x c s",
    scalars="a_w a_c p",
    guard="d",
    source="Zhang et al. 2015, arXiv 1412.6651, eq. 5-6",
    doc="Exchange synchronously with a local copy of the center, both sides from their old values (Jacobi).",
)

elastic_sync_center_first: Final = Kernel(
    "elastic_sync_center_first",
    """
    d = s - p * c
    c = c + a_c * d
    x = x - a_w * (x - c)
    """,
    arrays="x c s",
    scalars="a_w a_c p",
    guard="d",
    source="Zhang 2016, arXiv 1605.02216, chapter 6",
    doc="Exchange synchronously; workers move towards the center after it has moved (Gauss-Seidel).",
)

KERNELS: Final = (
    *(elastic_exchange, elastic_exchange_seen, elastic_displacement, elastic_center, elastic_pull),
    *(elastic_sync, elastic_sync_center_first),
)
