"""The mean of all workers' gradients, and the norm of the gradient of a step.

The norm of a common gradient is computed in slices: worker k reads slice k, and all add the same numbers in the same
order. The norm is therefore equal on all workers to the last bit, even on different machines. Each of the p workers
reads only a p-th of the vector.
"""

from __future__ import annotations

import math
from typing import Any

from mpitrain.collectives.topology.partition import split
from mpitrain.kernels import norms

EPSILON = 1e-6
"""Added to the norm by ``torch.nn.utils.clip_grad_norm_``, and so here."""


def combine(worker: Any, *, skips: bool) -> None:
    """Begin a step, and combine the gradients of all workers if the method does so. Collective if it does, else Local.

    Args:
        worker: A ``Worker``, as in the other functions here.
        skips: Whether the gradient of this worker is not finite.
    """
    worker.skips, worker.has_common_gradient = skips, False
    worker.combine_gradients()


def average(worker: Any) -> None:
    """Compute gbar = (1/p) sum_i g_i; skip the step if the gradient of any worker is not finite. Collective.

    A worker whose gradient is not finite sets the first element of this gradient to NaN. The mean then contains this
    NaN, which tells all workers to skip the step.
    """
    first = worker.g.local[:1]
    if worker.skips:
        first[...] = math.nan
    worker.comm.allreduce(worker.g, mean=True)
    worker.skips = not all(math.isfinite(float(element)) for element in first)
    worker.has_common_gradient = True


def norm(worker: Any, order: float) -> float:
    """Return the norm of the gradient, or NaN if the step is skipped. Collective if all workers have the same gradient.

    Args:
        worker: A ``Worker``, as in the other functions here.
        order: The order p > 0 of the norm (sum |g_i|^p)^(1/p); infinity stands for the largest absolute value.
    """
    g, comm = worker.g.local, worker.comm
    if worker.skips:
        return math.nan
    if not worker.has_common_gradient:
        return norms.root(norms.powers(g, order), order)
    found = comm.gather([norms.powers(g[split(g.size, comm.size)[comm.rank]], order)])
    return norms.root(norms.total(found[:, 0], order), order)


def clip_factor(norm: float, max_norm: float) -> float:
    """Return the factor that scales a gradient to a norm of at most ``max_norm``. It is 1 if the norm is not finite."""
    factor = max_norm / (norm + EPSILON)
    return factor if factor < 1 else 1.0
