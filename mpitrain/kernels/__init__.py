"""The fused arithmetic of the methods: one declaration, three back-ends (NumPy, Numba, CUDA).

`Kernel` declares one; the library below holds those of the methods, by family:

- elastic averaging: `elastic_exchange elastic_center elastic_pull elastic_sync`
- local steps: `sgd_step heavy_ball_step eamsgd_step lookahead torch_momentum_step torch_nesterov_step`
- mixing: `pair_average symmetric_average push_receive downpour_exchange scaled_add scale copy`,
  and for a number of vectors `weighted_mix(k) sum_into(k) sum_everywhere(k)`
- push-sum: `push_sum_mix debias`
- reductions of many vectors: `reduce_sum reduce_broadcast`

Importing this package imports NumPy only. Numba comes with the first call on NumPy arrays, CuPy with the first on
others.
"""

from __future__ import annotations

from . import elastic, mixing, push_sum, steps
from .cache import cache_root
from .declare import Kernel
from .elastic import elastic_center, elastic_exchange, elastic_pull, elastic_sync
from .mixing import (
    copy,
    downpour_exchange,
    pair_average,
    push_receive,
    scale,
    scaled_add,
    sum_everywhere,
    sum_into,
    symmetric_average,
    weighted_mix,
)
from .push_sum import debias, push_sum_mix
from .reductions import reduce_broadcast, reduce_sum
from .steps import eamsgd_step, heavy_ball_step, lookahead, sgd_step, torch_momentum_step, torch_nesterov_step

__all__ = [
    "Kernel",
    "cache_root",
    "copy",
    "debias",
    "downpour_exchange",
    "eamsgd_step",
    "elastic_center",
    "elastic_exchange",
    "elastic_pull",
    "elastic_sync",
    "heavy_ball_step",
    "library",
    "lookahead",
    "pair_average",
    "push_receive",
    "push_sum_mix",
    "reduce_broadcast",
    "reduce_sum",
    "scale",
    "scaled_add",
    "sgd_step",
    "sum_everywhere",
    "sum_into",
    "symmetric_average",
    "torch_momentum_step",
    "torch_nesterov_step",
    "weighted_mix",
]


def library() -> tuple[Kernel, ...]:
    """Every declared kernel, and one of each that is made for a number of vectors."""
    families = (*elastic.KERNELS, *steps.KERNELS, *mixing.KERNELS, *push_sum.KERNELS)
    return (*families, weighted_mix(2), sum_into(3), sum_everywhere(3))
