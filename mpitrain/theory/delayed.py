"""Parameter servers: stability under delay. DOWNPOUR, AGN, DynSGD, momentum at the master, staleness.

In round-robin order each of p workers pushes the displacement of tau local steps on h x^2 / 2. It has computed them
from a center that is p-1 pushes old. The methods differ only in q, the fraction of that center's error that a push
removes:

    c_{k+1} = c_k - q c_{k-(p-1)},   stable iff 0 < q < 2 sin(pi / (2(2p-1)))

    DOWNPOUR  q = 1 - (1-eh)^tau          AGN  q = (1 - (1-eh)^tau) / tau          DynSGD  q = (1 - (1-eh)^tau) / p

Sources of the methods: Dean et al., Large scale distributed deep networks, 2012, as run by Zhang, Choromanska, LeCun
2015, https://arxiv.org/abs/1412.6651; Hermans, Accumulated Gradient Normalization, 2017,
https://arxiv.org/abs/1710.02368, and his thesis, CERN-THESIS-2017-103. The recursion and its bound were derived for
this project and are tested against its eigenvalues.
"""

from __future__ import annotations

import math

import numpy as np

from mpitrain.errors import UsageError
from mpitrain.theory.linear import Matrix, spectral_radius


def _check(p: int, tau: int = 1) -> None:
    if p < 1 or tau < 1:
        raise UsageError(f"at least one worker and one local step are needed, not {p} and {tau}")


def downpour_bound(p: int) -> float:
    """Return 2 sin(pi/(2(2p-1))), the value of q below which the recursion is stable: 2, 1, .618, .445, ...

    q is the fraction of the center's error that a push removes, and the p workers push in round-robin order.
    """
    _check(p)
    return (
        1.0 if p == 2 else 2 * math.sin(math.pi / (2 * (2 * p - 1)))
    )  # math.sin(pi/6) differs from 1/2 in its last bit


def delayed_matrix(q: float, p: int) -> Matrix:
    """Return the matrix of c_{k+1} = c_k - q c_{k-(p-1)} on (c_k, c_{k-1}, ..., c_{k-p+1}), shape (p, p)."""
    _check(p)
    matrix = np.eye(p, k=-1)
    matrix[0, 0] = 1.0
    matrix[0, p - 1] -= q
    return matrix


def delayed_radius(q: float, p: int) -> float:
    """Return the spectral radius of ``delayed_matrix``. It is below 1 if and only if 0 < q < ``downpour_bound(p)``."""
    return spectral_radius(delayed_matrix(q, p))


def downpour_q(eh: float, tau: int) -> float:
    """Return q = 1 - (1-eh)^tau, the fraction of the center's error that a push of DOWNPOUR removes.

    Args:
        eh: The learning rate times the curvature.
        tau: The number of local steps between two pushes.
    """
    return 1 - (1 - eh) ** tau


def agn_q(eh: float, tau: int) -> float:
    """Return the fraction of the center's error that a push of AGN removes: (1 - (1-eh)^tau) / tau.

    AGN is accumulated gradient normalization. For eh <= 1 the result is at most min(eh, 1/tau).
    """
    return downpour_q(eh, tau) / tau


def dynsgd_q(eh: float, tau: int, p: int) -> float:
    """Return the fraction of the center's error that a push of DynSGD removes: (1 - (1-eh)^tau) / p.

    DynSGD divides a push of staleness p-1 by p. The method is stable for all p and tau if 0 < eh < 1.
    """
    return downpour_q(eh, tau) / p


def downpour_is_stable(eh: float, p: int, tau: int) -> bool:
    """Return whether round-robin DOWNPOUR converges on the quadratic: 0 < q < ``downpour_bound(p)``."""
    return 1 - downpour_bound(p) < (1 - eh) ** tau < 1  # in terms of 1 - q, which is exact where q rounds to 1


def downpour_largest_eh(p: int, tau: int) -> float:
    """Return the value of eh below which DOWNPOUR is stable.

    It is 1 - (1 - ``downpour_bound(p)``)^(1/tau), or 2 for a single worker.
    """
    _check(p, tau)
    return 2.0 if p == 1 else 1 - (1 - min(downpour_bound(p), 1.0)) ** (1 / tau)


def downpour_largest_period(p: int, eh: float) -> float:
    """Return the largest tau such that DOWNPOUR is stable for all periods up to tau. It may be 0 or infinite."""
    _check(p)
    if not 0 < eh < 2:
        return 0
    bound = downpour_bound(p)
    if bound >= 1 and (eh < 1 or p == 1):
        return math.inf
    if eh >= bound:
        return 0
    tau = math.floor(math.log1p(-bound) / math.log1p(-eh))
    return tau if downpour_is_stable(eh, p, tau) else tau - 1  # the bound itself is unstable


def agn_safe_period(p: int) -> int:
    """Return the smallest tau for which AGN is stable for every 0 < eh <= 1.

    It is the smallest tau with 1/tau <= ``downpour_bound(p)``, about 0.64 p. Hermans' rule of thumb, (p + number of
    layers)/2, grows similarly.
    """
    return math.ceil(1 / downpour_bound(p) - 1e-12)


def agn_largest_eh(p: int, tau: int) -> float:
    """Return the value of eh, at most 1, below which AGN is stable: 1 - (1 - tau*downpour_bound(p))^(1/tau)."""
    _check(p, tau)
    pushed = tau * downpour_bound(p)
    return 1.0 if pushed >= 1 else 1 - (1 - pushed) ** (1 / tau)


def mdownpour_matrix(eh: float, delta: float, p: int) -> Matrix:
    """Return the matrix of an update of MDOWNPOUR on (c, v, y_k, ..., y_{k-p+1}), shape (p+2, p+2).

        v <- delta*v - eh*y_{k-p+1};   c <- c + v;   y_{k+1} = c + delta*v

    The workers pull y. This is MDOWNPOUR of arXiv 1412.6651 in its look-ahead form. In round-robin order, gradients are
    p-1 updates old. For delta = 0, the eigenvalues are those of ``delayed_matrix(eh, p)``; for p = 1, they are those of
    ``msgd_matrix``. Derived for this project.
    """
    _check(p)
    n = p + 2
    v, c = np.zeros(n), np.zeros(n)
    v[1], v[-1] = delta, -eh
    c += v
    c[0] += 1
    return np.vstack([c, v, c + delta * v, np.eye(n)[2:-1]])


def mdownpour_largest_eh(p: int, delta: float) -> float:
    """Return the value of eh up to which round-robin MDOWNPOUR is stable, for 0 <= delta < 1.

    It is the smallest eh at which the spectral radius is 1, found by bisection. Delay and momentum reinforce each
    other: with 8 workers and momentum 0.9, the result is a hundredth of that for one worker without momentum.
    """
    if not 0 <= delta < 1:
        raise UsageError(f"momentum must be in [0, 1), not {delta:g}")
    low, high = 0.0, 1e-9
    while high < 4 and spectral_radius(mdownpour_matrix(high, delta, p)) < 1:
        low, high = high, 1.25 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if spectral_radius(mdownpour_matrix(middle, delta, p)) < 1 else (low, middle)
    return low


def implicit_momentum(p: int) -> float:
    """Return 1 - 1/p, the implicit momentum of p asynchronous workers with step eta/p (Mitliagkas et al. 2016)."""
    _check(p)
    return 1 - 1 / p


def implicit_momentum_matrix(eh: float, p: int) -> Matrix:
    """Return the matrix of a step with implicit momentum on (E x_t, E x_{t-1}), shape (2, 2).

    E x_{t+1} - E x_t = (1-1/p)(E x_t - E x_{t-1}) - (eh/p) E x_t
    """
    m = implicit_momentum(p)
    return np.array([[1 + m - eh / p, -m], [1.0, 0.0]])


def geometric_staleness_mean(eh: float, p: int, n_steps: int) -> Matrix:
    """Return the means E x_0 = 1, ..., E x_n if the age l of a gradient is random: P(l) = (1/p)(1-1/p)^l.

        E x_{t+1} = E x_t - eh sum_{l<=t} P(l) E x_{t-l},   shape (n_steps + 1,)

    Gradients from before the start count as 0. The means follow ``implicit_momentum_matrix`` exactly, with x_{-1} =
    x_0. Derived for this project.
    """
    probability = (1 / p) * (1 - 1 / p) ** np.arange(n_steps + 1)
    x = np.ones(n_steps + 1)
    for t in range(n_steps):
        x[t + 1] = x[t] - eh * probability[: t + 1] @ x[t::-1]
    return x


def elastic_equilibrium(h: float, rho: float, minimum: float, center: float) -> float:
    """Return (h x* + rho c)/(h + rho), the point at which elastic force and gradient cancel for a fixed center c.

    At this point, further local steps have no effect. The loss is f = h (x - x*)^2 / 2 with the minimum at x*. The
    condition is from Hermans' thesis.
    """
    return (h * minimum + rho * center) / (h + rho)


def early_exchange_step(h: float, eta: float, rho: float, x_start: float, center: float) -> int:
    """Return the first local step t >= 0 at which Hermans' rule exchanges: |eta g| - |eta rho (x-c)| < eta.

    In one dimension, local steps from x_0 = ``x_start`` give x_t = (1-eta*h)^t x_0. The center c is fixed. The result
    is the first t with h|x_t| - rho|x_t - c| < 1. The rule is from Hermans' thesis; this special case was derived for
    this project.
    """
    if not 0 < eta * h < 2:
        raise UsageError(f"local steps converge only for 0 < eta*h < 2, not for {eta * h:g}")
    t, x = 0, x_start
    while h * abs(x) - rho * abs(x - center) >= 1:
        t, x = t + 1, (1 - eta * h) * x
    return t
