"""The methods' fused arithmetic: declared once, run by three back-ends (NumPy, Numba, CUDA).

A `Kernel` is declared in the file of its family with the equations of its paper. `__all__` lists them by family, and
each kernel's docstring gives its equations, source and bytes moved per element.

Importing this package imports NumPy only. Numba is imported with the first call on NumPy arrays, CuPy with the first
call on device arrays.
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
    MAX_MEAN_GRADIENTS,
    eamsgd_step,
    heavy_ball_step,
    lookahead,
    mean_step,
    sgd_step,
    torch_momentum_step,
    torch_nesterov_step,
)

__all__ = [
    # The declaration, and the compiled kernels.
    "Kernel",
    "cache_root",
    "library",
    # Elastic averaging.
    "elastic_center",
    "elastic_displacement",
    "elastic_exchange",
    "elastic_exchange_seen",
    "elastic_pull",
    "elastic_sync",
    "elastic_sync_center_first",
    # ADMM.
    "admm_arrival",
    "admm_local",
    "admm_turn",
    # Local steps; `mean_step(kind, k)` takes the mean of k gradients.
    "MAX_MEAN_GRADIENTS",
    "eamsgd_step",
    "heavy_ball_step",
    "lookahead",
    "mean_step",
    "sgd_step",
    "torch_momentum_step",
    "torch_nesterov_step",
    # Parameter servers.
    "adag_commit",
    "adag_push",
    "adag_scale",
    "commit_and_pull",
    "commit_averaged",
    "commit_gathered",
    "commit_only",
    "gather_step",
    "master_momentum",
    "pull_only",
    # Mixing; `weighted_mix(k)`, `sum_into(k)` and `sum_everywhere(k)` are kernels for k vectors.
    "copy",
    "debias",
    "pair_average",
    "push_receive",
    "scale",
    "scaled_add",
    "sum_everywhere",
    "sum_into",
    "symmetric_average",
    "weighted_average",
    "weighted_mix",
    # Between rounds of local steps.
    "delayed_correction",
    "entropy_inner",
    "entropy_outer",
    "keep_finite",
    "outer_gradient",
    "outer_nesterov",
    "slow_momentum",
    # Byzantine robustness; `robust.Rows` holds many workers' vectors.
    "accumulate",
    "receive",
    # Reductions of many vectors.
    "reduce_broadcast",
    "reduce_sum",
    # Vectors in host or device memory, and the dtype in which to accumulate small changes.
    "accumulator",
    "assign",
    "to_host",
]


def library() -> tuple[Kernel, ...]:
    """Return all declared kernels, and one example of each kind of kernel that takes any number of vectors."""
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
    for_many_vectors = (weighted_mix(2), sum_into(3), sum_everywhere(3))
    return (*families, *for_many_vectors, *(mean_step(kind, 2) for kind in ("sgd", "momentum", "nesterov")))
