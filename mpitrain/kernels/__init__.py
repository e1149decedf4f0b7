"""The fused arithmetic of the methods: one declaration, three back-ends (NumPy, Numba, CUDA).

`Kernel` declares one; the library below holds those of the methods, by family:

- elastic averaging: `elastic_exchange elastic_exchange_seen elastic_displacement elastic_center elastic_pull
  elastic_sync elastic_sync_center_first`
- multipliers: `admm_local admm_turn admm_arrival`
- local steps: `sgd_step heavy_ball_step eamsgd_step lookahead torch_momentum_step torch_nesterov_step`
- parameter servers: `commit_and_pull commit_only pull_only commit_averaged commit_gathered gather_step master_momentum
  adag_commit adag_scale adag_push`
- mixing: `pair_average symmetric_average weighted_average push_receive scaled_add scale copy`,
  and for a number of vectors `weighted_mix(k) sum_into(k) sum_everywhere(k) mean_step(kind, k)`
- push-sum: `debias`
- between rounds of local steps: `keep_finite outer_gradient slow_momentum outer_nesterov delayed_correction
  entropy_inner entropy_outer`
- many workers' vectors side by side: `receive accumulate`, and `robust.Rows`
- reductions of many vectors: `reduce_sum reduce_broadcast`
- no arithmetic, but wherever vectors lie: `assign to_host`; what small changes are added up in: `accumulator`

Importing this package imports NumPy only. Numba comes with the first call on NumPy arrays, CuPy with the first on
others.
"""

from __future__ import annotations

from mpitrain.kernels import admm, commit, elastic, mixing, outer, push_sum, robust, steps
from mpitrain.kernels.admm import admm_arrival, admm_local, admm_turn
from mpitrain.kernels.commit import (
    adag_commit,
    adag_push,
    adag_scale,
    commit_and_pull,
    commit_averaged,
    commit_gathered,
    commit_only,
    gather_step,
    master_momentum,
    pull_only,
)
from mpitrain.kernels.compile.cache import cache_root
from mpitrain.kernels.compile.declare import Kernel
from mpitrain.kernels.compile.storage import accumulator
from mpitrain.kernels.elastic import (
    elastic_center,
    elastic_displacement,
    elastic_exchange,
    elastic_exchange_seen,
    elastic_pull,
    elastic_sync,
    elastic_sync_center_first,
)
from mpitrain.kernels.gpu import assign, to_host
from mpitrain.kernels.mixing import (
    copy,
    pair_average,
    push_receive,
    scale,
    scaled_add,
    sum_everywhere,
    sum_into,
    symmetric_average,
    weighted_average,
    weighted_mix,
)
from mpitrain.kernels.outer import (
    delayed_correction,
    entropy_inner,
    entropy_outer,
    keep_finite,
    outer_gradient,
    outer_nesterov,
    slow_momentum,
)
from mpitrain.kernels.push_sum import debias
from mpitrain.kernels.reductions import reduce_broadcast, reduce_sum
from mpitrain.kernels.robust import accumulate, receive
from mpitrain.kernels.steps import (
    MOST_OF_A_MEAN,
    eamsgd_step,
    heavy_ball_step,
    lookahead,
    mean_step,
    sgd_step,
    torch_momentum_step,
    torch_nesterov_step,
)

__all__ = [
    "MOST_OF_A_MEAN",
    "Kernel",
    "accumulate",
    "accumulator",
    "adag_commit",
    "adag_push",
    "adag_scale",
    "admm_arrival",
    "admm_local",
    "admm_turn",
    "assign",
    "cache_root",
    "commit_and_pull",
    "commit_averaged",
    "commit_gathered",
    "commit_only",
    "copy",
    "debias",
    "delayed_correction",
    "eamsgd_step",
    "elastic_center",
    "elastic_exchange",
    "elastic_displacement",
    "elastic_exchange_seen",
    "elastic_pull",
    "elastic_sync",
    "elastic_sync_center_first",
    "entropy_inner",
    "entropy_outer",
    "gather_step",
    "heavy_ball_step",
    "keep_finite",
    "library",
    "lookahead",
    "master_momentum",
    "mean_step",
    "outer_gradient",
    "outer_nesterov",
    "pair_average",
    "pull_only",
    "push_receive",
    "receive",
    "reduce_broadcast",
    "reduce_sum",
    "scale",
    "scaled_add",
    "sgd_step",
    "slow_momentum",
    "sum_everywhere",
    "sum_into",
    "symmetric_average",
    "to_host",
    "torch_momentum_step",
    "torch_nesterov_step",
    "weighted_average",
    "weighted_mix",
]


def library() -> tuple[Kernel, ...]:
    """Every declared kernel, and one of each that is made for a number of vectors."""
    families = (
        *elastic.KERNELS,
        *admm.KERNELS,
        *steps.KERNELS,
        *commit.KERNELS,
        *mixing.KERNELS,
        *push_sum.KERNELS,
        *outer.KERNELS,
        *robust.KERNELS,
    )
    of_many = (weighted_mix(2), sum_into(3), sum_everywhere(3))
    return (*families, *of_many, *(mean_step(kind, 2) for kind in ("sgd", "momentum", "nesterov")))
