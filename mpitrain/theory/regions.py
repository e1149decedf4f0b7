"""Warnings before a run with settings outside the known stable region: one line each, or None.

The bounds hold for the quadratic h x^2 / 2, with workers in round-robin order or all at once. The curvature h of a
training loss is unknown, so a method is warned about if it is stable only for learning rate times curvature below 0.05;
plain SGD allows 2. A warning is not an error: no setting is changed.
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
"""A method that is stable only below this learning rate times curvature gets a warning."""

BETA = 0.9
"""p*alpha in all experiments of Zhang, Choromanska and LeCun 2015."""

STABLE = "is stable only where learning rate times curvature is below"


def downpour_warning(p: int, tau: int) -> str | None:
    """Return a warning about DOWNPOUR with p workers that push every tau steps; see ``downpour_bound``."""
    largest = downpour_largest_eh(p, tau)
    if largest >= LEAST_EH:
        return None
    inside = downpour_largest_period(p, LEAST_EH)
    if inside >= 1:
        out = f"period {inside:.0f} or less is stable up to {LEAST_EH:g}"
    else:
        best = downpour_largest_eh(p, 1)
        out = f"with this many workers even period 1 only below {best:.2g}: divide the learning rate by {p}"
    return f"DOWNPOUR with {p} workers and period {tau} {STABLE} {largest:.2g}; {out}"


def agn_warning(p: int, tau: int) -> str | None:
    """Return a warning about AGN with p workers that push every tau steps; see ``agn_safe_period``."""
    largest = agn_largest_eh(p, tau)
    if largest >= LEAST_EH:
        return None
    safe = agn_safe_period(p)
    return f"AGN with {p} workers and period {tau} {STABLE} {largest:.2g}; period {safe} or more is stable up to 1"


def mdownpour_warning(p: int, delta: float) -> str | None:
    """Return a warning about MDOWNPOUR with p workers and momentum delta; see ``mdownpour_largest_eh``."""
    largest = mdownpour_largest_eh(p, delta)
    if largest >= LEAST_EH:
        return None
    without = mdownpour_largest_eh(p, 0.0)
    out = f"without momentum it is stable below {without:.2g}"
    return f"MDOWNPOUR with {p} workers and momentum {delta:g} {STABLE} {largest:.2g}; {out}"


def elastic_warning(p: int, alpha: float, beta: float | None = None, *, synchronous: bool = True) -> str | None:
    """Return a warning about EASGD or EAMSGD with p workers, moving rate alpha and center rate beta (default p*alpha).

    There are three reasons for a warning. First, a negative alpha acts as momentum. Second, a positive alpha is stable
    only if (2-eh)(2-beta) > 2*alpha, with beta/p in place of beta if the workers take turns. There is a warning if this
    holds for no eh, or only for eh below 0.05. Third, with beta > 1 the center overshoots the mean of the workers if
    they exchange at the same time.
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
        return f"{rates}: {what}, and above 1 simultaneous exchanges push the center past the workers' mean; {inside}"
    return None


def slowmo_warning(alpha: float, beta: float) -> str | None:
    """Return a warning about SlowMo with slow learning rate alpha and slow momentum beta.

    SlowMo is stable for 0 < alpha(1-q) < 2(1+beta). In a period, local steps multiply the error by q, which approaches
    0 for long periods.
    """
    bound = 2 * (1 + beta)
    if 0 < alpha < bound:
        return None
    return (
        f"SlowMo with slow learning rate {alpha:g} and slow momentum {beta:g} is stable for long periods only where "
        f"the slow learning rate is between 0 and {bound:.3g}, 2(1 + slow momentum); 1 is inside"
    )


def diloco_warning(alpha: float, delta: float) -> str | None:
    """Return a warning about DiLoCo with outer learning rate alpha and outer Nesterov momentum delta.

    DiLoCo is stable for 0 < alpha(1-q) < 2(1+delta)/(1+2 delta). In a period, local steps multiply the error by q,
    which approaches 0 for long periods.
    """
    bound = 2 * (1 + delta) / (1 + 2 * delta)
    if 0 < alpha < bound:
        return None
    return (
        f"DiLoCo with outer learning rate {alpha:g} and outer momentum {delta:g} is stable for long periods only where "
        f"the outer learning rate is between 0 and {bound:.3g}, 2(1+m)/(1+2m) for momentum m; 0.7 is inside"
    )
