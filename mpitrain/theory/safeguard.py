"""SafeguardSGD: when a worker that drifts away from the others is found.

Source: Allen-Zhu, Ebrahimianghazani, Li, Alistarh, Byzantine-Resilient Non-Convex Stochastic Gradient Descent, 2021,
https://arxiv.org/abs/2012.14368. The prediction was derived for this project.
"""

from __future__ import annotations

import math

from mpitrain.errors import UsageError


def safeguard_detection_step(drift: float, threshold: float, n_good: int, window: int | None = None) -> int | None:
    """The step, counted from 1 after a reset of the sums, at which a worker of constant drift is removed.

    Each step adds drift/n_good to the distance between its sum and the median's; it is removed at the first step where
    that exceeds 2*threshold, floor(2*threshold*n_good/drift) + 1. None if the window is over before.

    Args:
        drift: norm of its gradient minus the honest ones'.
        threshold: the paper's T_0 or T_1 threshold, before the factor 2.
        n_good: workers in the good set, this one among them, the same at every step.
        window: steps between two resets of the sums.
    """
    if drift < 0 or threshold <= 0 or n_good < 1:
        raise UsageError("a drift is not negative, a threshold positive, and at least one worker good")
    if drift == 0:
        return None
    step = math.floor(2 * threshold * n_good / drift) + 1
    return None if window is not None and step > window else step
