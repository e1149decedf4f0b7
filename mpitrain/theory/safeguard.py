"""SafeguardSGD: the step at which a worker that drifts away from the others is detected.

Source: Allen-Zhu, Ebrahimianghazani, Li, Alistarh, Byzantine-Resilient Non-Convex Stochastic Gradient Descent, 2021,
https://arxiv.org/abs/2012.14368. The prediction was derived for this project.
"""

from __future__ import annotations

import math

from mpitrain.errors import UsageError


def safeguard_detection_step(drift: float, threshold: float, n_good: int, window: int | None = None) -> int | None:
    """Return the step at which a worker of constant drift is removed, counted from 1 after a reset of the sums.

    Each step adds drift/n_good to the distance between the worker's sum of gradients and the median of all sums. The
    worker is removed at the first step at which this distance exceeds 2*threshold, which is step
    floor(2*threshold*n_good/drift) + 1. The result is None if the window ends before this step.

    Args:
        drift: The norm of the difference between the worker's gradient and the honest workers' mean gradient.
        threshold: The paper's T_0 or T_1 threshold, before the factor 2.
        n_good: The number of workers in the good set, including this one; the same at every step.
        window: The number of steps between two resets of the sums.
    """
    if drift < 0 or threshold <= 0 or n_good < 1:
        raise UsageError(
            "the drift must not be negative, the threshold must be positive, and at least one worker must be good"
        )
    if drift == 0:
        return None
    step = math.floor(2 * threshold * n_good / drift) + 1
    return None if window is not None and step > window else step
