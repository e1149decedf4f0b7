"""Attacks: vectors that Byzantine workers send in place of their gradients, for tests and studies.

    gradient = Attacked(gradient, size=10, attackers=[6, 7, 8, 9], attack=variance(0.3))
    Simulation(SafeguardSGD(), SimulatedWorld(10), gradient, start, learning_rate)

An attack is a function of the gradients that the attackers would send if they were honest, (k, n), and those of the
honest workers in the same step, (h, n). It returns what the attackers send, (k, n). The adversary is omniscient.

``flip_labels`` is an attack on the data: compute the attackers' gradients with the labels that it returns.

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
"""``attack(own, honest)``: return what the attackers send (k, n), from their own and the honest gradients."""


def sign_flip(own: np.ndarray, honest: np.ndarray) -> np.ndarray:
    """Return -g_i for each attacker i."""
    return -own


def zero(own: np.ndarray, honest: np.ndarray) -> np.ndarray:
    """Return a gradient of zeros for each attacker."""
    return np.zeros_like(own)


def scaled_negative(factor: float = 0.4) -> Attack:
    """Return the attack -factor*g_i. With a small factor, SafeguardSGD does not detect it ("safeguard attack")."""
    return lambda own, honest: -factor * own


def variance(z: float = 0.3) -> Attack:
    """Return the attack mean - z*std of the honest gradients, per coordinate.

    The vector that it sends is rarely an outlier, but always deviates to the same side.
    """

    def shifted(own: np.ndarray, honest: np.ndarray) -> np.ndarray:
        return np.broadcast_to(honest.mean(axis=0) - z * honest.std(axis=0), own.shape)

    return shifted


class Delayed:
    """The attack that sends an old gradient: the g_i of ``delay`` steps before.

    In the first steps, it sends the present gradient.

    Args:
        delay: The delay D in steps; 1000 in the paper.
    """

    def __init__(self, delay: int = 1000) -> None:
        self._recent: deque[np.ndarray] = deque(maxlen=delay + 1)
        self._delay = delay

    def __call__(self, own: np.ndarray, honest: np.ndarray) -> np.ndarray:
        self._recent.append(own.copy())
        return self._recent[0] if len(self._recent) > self._delay else own


def flip_labels(labels: np.ndarray, n_classes: int = 10) -> np.ndarray:
    """Return the false label n_classes - 1 - l for each label l."""
    return n_classes - 1 - labels


class Attacked:
    """A gradient function ``gradient(rank, x)`` with Byzantine workers, for synchronous methods.

    The first call in a step computes the gradients of all workers at the ``x`` of this call. In a synchronous method,
    all workers have the same ``x``.

    Args:
        gradient: The ``gradient(rank, x)`` of an honest worker.
        size: m, the number of workers.
        attackers: The ranks of the Byzantine workers.
        attack: The attack.
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
        """Return the vector (n,) that this worker sends."""
        if rank in self._asked:  # a new step
            self._asked.clear()
            self._sent = np.stack([self._gradient(peer, x) for peer in range(self._size)])
            self._sent[self._attackers] = self._attack(self._sent[self._attackers], self._sent[self._honest])
        self._asked.add(rank)
        return self._sent[rank]
