"""Attacks on training: what Byzantine workers send instead of their gradients. For tests and studies.

    gradient = Attacked(gradient, size=10, attackers=[6, 7, 8, 9], attack=variance(0.3))
    Simulation(SafeguardSGD(), SimulatedWorld(10), gradient, start, learning_rate)

An attack is a function: from the gradients that the attackers would have sent if they were honest, (k, n), and those of
the honest workers in the same step, (h, n), it makes what the attackers send, (k, n). It knows everything (an
omniscient adversary), whether it uses it or not.

``flip_labels`` is an attack on the data: train the attackers' gradients on what it returns.

Sources: Allen-Zhu, Ebrahimianghazani, Li, Alistarh, Byzantine-Resilient Non-Convex Stochastic Gradient Descent, 2021,
https://arxiv.org/abs/2012.14368, section 5 (which attacks, and their parameters); Baruch, Baruch, Goldberg, A Little Is
Enough, 2019, https://arxiv.org/abs/1902.06156 (variance attack).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Attack = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``attack(own, honest)``: (k, n) what the attackers send, from their own gradients (k, n) and the others' (h, n)."""


def sign_flip(own: np.ndarray, honest: np.ndarray) -> np.ndarray:
    """-g_i"""
    return -own


def zero(own: np.ndarray, honest: np.ndarray) -> np.ndarray:
    """0"""
    return np.zeros_like(own)


def scaled_negative(factor: float = 0.4) -> Attack:
    """-factor*g_i: the sign flip made small enough to stay within a safeguard's thresholds (``safeguard attack``)."""
    return lambda own, honest: -factor * own


def variance(z: float = 0.3) -> Attack:
    """mean - z*std of the honest gradients, of each coordinate: hardly ever an outlier, always on the same side."""

    def shifted(own: np.ndarray, honest: np.ndarray) -> np.ndarray:
        return np.broadcast_to(honest.mean(axis=0) - z * honest.std(axis=0), own.shape)

    return shifted


class Delayed:
    """g_i of ``delay`` steps before; the present one until there is one so old.

    Args:
        delay: D, steps; 1000 in the paper.
    """

    def __init__(self, delay: int = 1000) -> None:
        self._recent: deque[np.ndarray] = deque(maxlen=delay + 1)
        self._delay = delay

    def __call__(self, own: np.ndarray, honest: np.ndarray) -> np.ndarray:
        self._recent.append(own.copy())
        return self._recent[0] if len(self._recent) > self._delay else own


def flip_labels(labels: np.ndarray, n_classes: int = 10) -> np.ndarray:
    """l -> n_classes - 1 - l"""
    return n_classes - 1 - labels


class Attacked:
    """``gradient(rank, x)`` of workers of whom some are Byzantine; for synchronous methods.

    In each step the first worker that asks has all gradients computed, at its own ``x``, which is everybody's in a
    synchronous method.

    Args:
        gradient: ``gradient(rank, x)`` of each worker if it is honest.
        size: m, the number of workers.
        attackers: Their ranks.
        attack: What they send.
    """

    def __init__(
        self, gradient: Callable[[int, np.ndarray], Any], *, size: int, attackers: Sequence[int], attack: Attack
    ) -> None:
        self._gradient, self._attack, self._size = gradient, attack, size
        self._attackers = np.asarray(attackers, int)
        self._honest = np.setdiff1d(np.arange(size), self._attackers)
        self._sent = np.zeros((size, 0))
        self._asked: set[int] = set(range(size))

    def __call__(self, rank: int, x: np.ndarray) -> np.ndarray:
        """(n,) what this worker sends."""
        if rank in self._asked:  # a new step
            self._asked.clear()
            self._sent = np.stack([self._gradient(peer, x) for peer in range(self._size)])
            self._sent[self._attackers] = self._attack(self._sent[self._attackers], self._sent[self._honest])
        self._asked.add(rank)
        return self._sent[rank]
