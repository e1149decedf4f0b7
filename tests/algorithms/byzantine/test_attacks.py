"""The vectors that attackers send."""

import numpy as np
import pytest
from support.quadratic import simulate

from mpitrain import AllReduceSGD
from mpitrain.algorithms.byzantine.attacks import (
    Attacked,
    Delayed,
    flip_labels,
    scaled_negative,
    sign_flip,
    variance,
    zero,
)
from mpitrain.simulation.schedules import RandomOrder

RNG = np.random.default_rng(0)
OWN, HONEST = RNG.normal(size=(2, 5)), RNG.normal(size=(3, 5))


@pytest.mark.parametrize(
    ("attack", "sent"),
    [
        (sign_flip, -OWN),
        (zero, 0 * OWN),
        (scaled_negative(), -0.4 * OWN),
        (scaled_negative(0.7), -0.7 * OWN),
        (variance(), np.tile(HONEST.mean(0) - 0.3 * np.sqrt(((HONEST - HONEST.mean(0)) ** 2).mean(0)), (2, 1))),
        (variance(0), np.tile(HONEST.mean(0), (2, 1))),
    ],
)
def test_attackers_send_the_formula(attack, sent):
    own, honest = OWN.copy(), HONEST.copy()
    np.testing.assert_allclose(attack(own, honest), sent, rtol=0, atol=1e-15)
    assert (own == OWN).all()
    assert (honest == HONEST).all()


@pytest.mark.parametrize("delay", [1, 3])
def test_old_gradients_are_those_of_delay_steps_before(delay):
    attack, own = Delayed(delay), np.zeros((2, 3))
    for t in range(9):
        own[...] = t  # the same memory each time
        assert (attack(own, HONEST) == (t if t < delay else t - delay)).all()


def test_labels_are_flipped_end_to_end():
    labels = np.arange(10)
    assert flip_labels(labels).tolist() == labels[::-1].tolist()
    assert flip_labels(flip_labels(labels)).tolist() == labels.tolist()
    assert flip_labels(np.array([0, 2]), n_classes=3).tolist() == [2, 0]


@pytest.mark.parametrize("schedule", [None, RandomOrder(4)])
def test_honest_workers_are_left_alone_and_each_step_is_computed_once(schedule):
    asked = []

    def gradient(rank, x):
        asked.append(rank)
        return np.full(4, float(rank + 1))

    lying = Attacked(gradient, size=5, attackers=[1, 4], attack=scaled_negative(2.0))
    simulation = simulate(AllReduceSGD(), 5, start=np.zeros(4), eta=1.0, gradient=lying, schedule=schedule).run(6)
    np.testing.assert_allclose(simulation.x(), -6 * (1 - 4 + 3 + 4 - 10) / 5, rtol=1e-14)
    assert asked == list(range(5)) * 6


def test_an_attacker_knows_the_honest_gradients_of_the_step():
    seen = []

    def attack(own, honest):
        seen.append((own.copy(), honest.copy()))
        return own

    lying = Attacked(lambda rank, x: rank + x, size=4, attackers=[0, 2], attack=attack)
    for rank in (3, 0, 2, 1):
        assert (lying(rank, np.array([10.0, 20.0])) == [rank + 10, rank + 20]).all()
    ((own, honest),) = seen
    assert own.tolist() == [[10, 20], [12, 22]]
    assert honest.tolist() == [[11, 21], [13, 23]]
