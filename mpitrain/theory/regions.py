"""What to tell before a run whose settings lie outside a region that is known to be stable: one line, or None.

The bounds are those of the quadratic h x^2 / 2, with the workers served in turn or all at once. The curvature h of a
training loss is not known, so a setting is remarked on when the method would need learning rate times curvature below
0.05, where plain SGD bears 2. A remark is no error: nothing is clamped.
"""

from __future__ import annotations

from mpitrain.theory.delayed import (
    agn_largest_eh,
    agn_safe_period,
    downpour_largest_eh,
    downpour_largest_period,
    mdownpour_largest_eh,
)

LEAST_EH = 0.05
"""A method that needs learning rate times curvature below this is remarked on."""

BETA = 0.9
"""p*alpha in all experiments of Zhang, Choromanska and LeCun 2015."""

STABLE = "is stable only where learning rate times curvature is below"


def downpour_warning(p: int, tau: int) -> str | None:
    """DOWNPOUR with p workers that push every tau steps: 2 sin(pi/(2(2p-1))) of ``downpour_bound``."""
    largest = downpour_largest_eh(p, tau)
    if largest >= LEAST_EH:
        return None
    inside = downpour_largest_period(p, LEAST_EH)
    if inside >= 1:
        out = f"period {inside:.0f} or less is stable up to {LEAST_EH:g}"
    else:
        best = downpour_largest_eh(p, 1)
        out = f"with so many workers even period 1 only below {best:.2g}: divide the learning rate by {p}"
    return f"DOWNPOUR with {p} workers and period {tau} {STABLE} {largest:.2g}; {out}"


def agn_warning(p: int, tau: int) -> str | None:
    """AGN with p workers that push every tau steps; from ``agn_safe_period`` on it is stable whatever the curvature."""
    largest = agn_largest_eh(p, tau)
    if largest >= LEAST_EH:
        return None
    safe = agn_safe_period(p)
    return f"AGN with {p} workers and period {tau} {STABLE} {largest:.2g}; period {safe} or more is stable up to 1"


def mdownpour_warning(p: int, delta: float) -> str | None:
    """Momentum at the master with p workers, served in turn: the delay adds to the momentum."""
    largest = mdownpour_largest_eh(p, delta)
    if largest >= LEAST_EH:
        return None
    without = mdownpour_largest_eh(p, 0.0)
    out = f"without momentum it is stable below {without:.2g}"
    return f"MDOWNPOUR with {p} workers and momentum {delta:g} {STABLE} {largest:.2g}; {out}"


def elastic_warning(p: int, alpha: float, beta: float | None = None, *, synchronous: bool = True) -> str | None:
    """EASGD and EAMSGD with p workers, moving rate alpha and center rate beta (p*alpha unless given).

    A negative alpha is momentum. Otherwise all workers at once need (2-eh)(2-beta) > 2*alpha, one after the other the
    same with beta/p whatever p: told when that holds for no eh, or only below 0.05. Last, beta > 1 lets the center
    overshoot the mean of the workers when they come together.
    """
    symmetric = beta is None
    beta = p * alpha if beta is None else beta
    inside = f"moving_rate {BETA / p:.3g} (0.9/p) is inside"
    if alpha < 0:
        apart = f", and workers move apart where learning rate times curvature is below {-alpha:.3g}" if p > 1 else ""
        return f"moving_rate {alpha:g} is negative: it acts as momentum on the workers' mean{apart}; {inside}"
    at_once = beta if synchronous else beta / p
    rates = f"moving_rate {alpha:g} with {p} workers" + ("" if symmetric else f" and center rate {at_once:g}")
    largest = 2 - 2 * alpha / (2 - at_once) if at_once < 2 else 0.0
    if largest <= 0:
        is_one = symmetric and not synchronous
        bound = "moving_rate must be below 1" if is_one else "moving rate + center rate must be below 2"
        center = f" (the center rate is p*moving_rate, {beta:.3g})" if symmetric and synchronous else ""
        return f"{rates} is stable for no learning rate: {bound}{center}; {inside}"
    if largest < LEAST_EH:
        return f"{rates} {STABLE} {largest:.2g}; {inside}"
    if beta > 1:
        what = f"p*moving_rate is {beta:.3g}" if symmetric else f"the center rate is {beta:g}"
        return f"{rates}: {what}, and beyond 1 workers that come together push the center past their mean; {inside}"
    return None


def slowmo_warning(alpha: float, beta: float) -> str | None:
    """SlowMo with slow learning rate alpha and slow momentum beta: 0 < alpha(1-q) < 2(1+beta) with q down to 0."""
    bound = 2 * (1 + beta)
    if 0 < alpha < bound:
        return None
    return (
        f"SlowMo with slow learning rate {alpha:g} and slow momentum {beta:g} is stable for long periods only where "
        f"the slow learning rate is between 0 and {bound:.3g}, 2(1 + slow momentum); 1 is inside"
    )


def diloco_warning(alpha: float, delta: float) -> str | None:
    """DiLoCo with outer rate alpha and Nesterov momentum delta: alpha(1-q) < 2(1+delta)/(1+2 delta), q down to 0."""
    bound = 2 * (1 + delta) / (1 + 2 * delta)
    if 0 < alpha < bound:
        return None
    return (
        f"DiLoCo with outer learning rate {alpha:g} and outer momentum {delta:g} is stable for long periods only where "
        f"the outer learning rate is between 0 and {bound:.3g}, 2(1+m)/(1+2m) for momentum m; 0.7 is inside"
    )
