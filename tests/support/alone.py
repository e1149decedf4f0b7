"""The result of one worker alone, for each method that is then not plain SGD; the contract test compares.

    ALONE[name](method, x, gradient, eta, steps) -> x

with ``x`` (n,) float64 where the worker begins, ``gradient(x)`` (n,), and the result what the model holds after
``steps`` steps: the documented sequential case, typed again in NumPy. A method that is not in the table is SGD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Gradient = Callable[[np.ndarray], np.ndarray]
Reference = Callable[[Any, np.ndarray, Gradient, float, int], np.ndarray]


def sgd(method: Any, x: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """x <- x - eta*g(x)"""
    for _ in range(steps):
        x = x - eta * gradient(x)
    return x


def elastic(order: str, x: np.ndarray, c: np.ndarray, a_w: float, a_c: float) -> tuple[np.ndarray, np.ndarray]:
    """Make one exchange of one worker with the center, by the definition of each order."""
    if order == "center_first":
        c = c + a_c * (x - c)
        return x - a_w * (x - c), c
    if order == "worker_first":
        x = x - a_w * (x - c)
        return x, c + a_c * (x - c)
    return x - a_w * (x - c), c + a_c * (x - c)


def eamsgd(
    method: Any, x: np.ndarray, gradient: Gradient, eta: float, steps: int, delta: float | None = None
) -> np.ndarray:
    """Run one worker with Nesterov momentum and a spring to the center (arXiv 1412.6651, eq. 5-8, p = 1).

    The model holds x + delta*v. With the worker first and a gradient from before, the center sees the new x.
    """
    c, v, (a_w, a_c) = x.copy(), np.zeros_like(x), method.rates(1, eta)
    delta = method.momentum if delta is None else delta
    pre, split = method.grad_point == "pre", method.grad_point == "pre" and method.order == "worker_first"
    for t in range(steps):
        g = gradient(x + delta * v)
        if split and t % method.period == 0:
            x = x - a_w * (x - c)
        elif pre and t % method.period == 0:
            x, c = elastic(method.order, x, c, a_w, a_c)
        v = delta * v - eta * g
        x = x + v
        if split and t % method.period == 0:
            c = c + a_c * (x - c)
        elif not pre and (t + 1) % method.period == 0:
            x, c = elastic(method.order, x, c, a_w, a_c)
    return x + delta * v


def easgd(method: Any, x: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """Run EAMSGD without momentum; with ``overlap`` the worker's moves come a step late."""
    if not method.overlap:
        return eamsgd(method, x, gradient, eta, steps, delta=0.0)
    c, late, (a_w, a_c), is_pre = x.copy(), np.zeros_like(x), method.rates(1, eta), method.grad_point == "pre"
    for t in range(steps):
        g = gradient(x)
        x, late = x - late, np.zeros_like(x)
        if is_pre and t % method.period == 0:
            late, c = a_w * (x - c), c + a_c * (x - c)
        x = x - eta * g
        if not is_pre and (t + 1) % method.period == 0:
            late, c = a_w * (x - c), c + a_c * (x - c)
    return x


def aeasgd(method: Any, x: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """Exchange after the step, or early when ||eta g|| - ||eta rho (x - c)|| < eta (CERN-THESIS-2017-103)."""
    c, local = x.copy(), 0
    for _ in range(steps):
        g, local = gradient(x), local + 1
        balanced = np.linalg.norm(eta * g) - np.linalg.norm(eta * method.rho * (x - c)) < eta
        x = x - eta * g
        if local == method.period or (method.early_exchange and balanced):
            (x, c), local = elastic("jacobi", x, c, eta * method.rho, eta * method.rho), 0
    return x


def easgd_tree(method: Any, x: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """Exchange between a leaf and its root, where one side may stay (arXiv 1605.02216, ch. 6); alpha 0.9/(1+1)."""
    c, alpha = x.copy(), 0.45 if method.moving_rate is None else method.moving_rate
    down = method.period if method.scheme == "multi-scale" else method.slow_period
    for t in range(steps):
        g = gradient(x)
        if method.grad_point == "post":
            x, t = x - eta * g, t + 1
        e = alpha * (x - c)
        x, c = x - e * (t % down == 0), c + e * (t % method.period == 0)
        if method.grad_point == "pre":
            x = x - eta * g
    return x


def admm(method: Any, x: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """Run round-robin ADMM (arXiv 1412.6651, section 4) with a single worker, whose turn it always is."""
    c, multiplier, er = x.copy(), np.zeros_like(x), eta * method.rho
    for _ in range(steps):
        multiplier = multiplier - (x - c)
        x = (x - eta * gradient(x) + er * (multiplier + c)) / (1 + er)
        c = x - multiplier
    return x


def slowmo(method: Any, x: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """u <- beta*u + (x0 - x)/eta;  x0 <- x0 - alpha*eta*u, once per round (arXiv 1910.00643, algorithm 1)."""
    x0, u = x.copy(), np.zeros_like(x)
    for t in range(steps):
        x = x - eta * gradient(x)
        if (t + 1) % method.period == 0:
            u = method.slow_momentum * u + (x0 - x) / eta
            x0 = x = x0 - method.slow_learning_rate * eta * u
    return x


def diloco(method: Any, x: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """Make Nesterov's step with theta - x as the gradient, once per round (arXiv 2311.08105, algorithm 1)."""
    theta, b, m = x.copy(), np.zeros_like(x), method.outer_momentum
    for t in range(steps):
        x = x - eta * gradient(x)
        if (t + 1) % method.period == 0:
            d = theta - x
            b = m * b + d
            theta = x = theta - method.outer_learning_rate * (d + m * b)
    return x


def entropysgd(
    method: Any, y: np.ndarray, gradient: Gradient, eta: float, steps: int, rho_inverse: float = 0.0
) -> np.ndarray:
    """Run the inner and the outer loop of one replica (arXiv 1611.01838 and 1707.00424); the model holds y."""
    x, z, u, v, delta, a = y, y, np.zeros_like(y), np.zeros_like(y), method.momentum, method.averaging
    gamma_inverse = method.gamma_inverse
    for t in range(steps):
        h = gradient(y) + gamma_inverse * (y - x)
        v = delta * v + h
        y = y - method.inner_rate * (h + delta * v)
        z = a * z + (1 - a) * y
        if (t + 1) % method.period == 0:
            d = (1 + rho_inverse) * (x - z)
            u = delta * u + d
            x = x - eta * (d + delta * u)
            y, z, v = x, x, np.zeros_like(v)
            growth = 1 + 1 / (2 * method.scoping_batches)
            gamma_inverse, rho_inverse = growth * gamma_inverse, growth * rho_inverse
    return y


def parle(method: Any, y: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """Run one replica, which is its own reference r: its x, without a spring; or its z, with a second spring to it."""
    return entropysgd(method, y, gradient, eta, steps, method.rho_inverse if method.reference == "z" else 0.0)


def mdownpour(method: Any, y: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """Run Nesterov momentum SGD; the model holds y = x + delta*v (arXiv 1412.6651, section 5)."""
    x, v, delta = y, np.zeros_like(y), method.momentum
    for _ in range(steps):
        v = delta * v - eta * gradient(y)
        x = x + v
        y = x + delta * v
    return y


def agn(method: Any, x: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """Replace the local steps by their mean at the end of each window (arXiv 1710.02368)."""
    origin = x
    for t in range(steps):
        x = x - eta * gradient(x)
        if (t + 1) % method.period == 0:
            origin = x = origin + (x - origin) / method.period
    return x


def adag(method: Any, x: np.ndarray, gradient: Gradient, eta: float, steps: int) -> np.ndarray:
    """No other worker moves the center, so every factor is 1."""
    return (agn if method.normalise else sgd)(method, x, gradient, eta, steps)


ALONE: dict[str, Reference] = {
    "easgd": easgd,
    "eamsgd": eamsgd,
    "aeasgd": aeasgd,
    "easgd-tree": easgd_tree,
    "admm": admm,
    "mdownpour": mdownpour,
    "agn": agn,
    "adag": adag,
    "slowmo": slowmo,
    "diloco": diloco,
    "entropysgd": entropysgd,
    "parle": parle,
}
