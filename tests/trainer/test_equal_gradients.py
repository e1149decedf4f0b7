"""After the same number of gradients on the digits no method is more than 1.5 points below all-reduce.

880 gradients of 4 simulated workers, with each method's settings for short runs and its factor of the learning rate.
"""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain.algorithms import METHODS
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.plan import DEFAULT_MOMENTUM, RunPlan
from mpitrain.trainer.study import simulate
from mpitrain.trainer.study_config import StudyConfig

SEEDS = (0, 1)
POINTS = 0.015
QUICK = ("parle", "entropysgd", "dynsgd", "easgd")


@pytest.fixture(scope="module")
def accuracy():
    """``accuracy(name)``: the mean over the seeds; each method is run once."""
    found = {}

    def accuracy(name):
        if name not in found:
            found[name] = float(np.mean([accuracy_of(name, seed) for seed in SEEDS]))
        return found[name]

    return accuracy


def accuracy_of(name, seed):
    method = METHODS[name]
    plan = RunPlan.of(
        TrainConfig(
            name,
            {key: str(value) for key, value in method.short_run.items()},
            lr=0.05 * method.learning_rate_factor,
            momentum=None if method.owns_update else DEFAULT_MOMENTUM,
            gradients=880,
            seed=seed,
        )
    )
    return simulate(plan, StudyConfig(workers=4, evaluations=1, jitter=0.1))["test_accuracy"]


@pytest.mark.parametrize("name", QUICK)
def test_these_are_near_allreduce(name, accuracy):
    assert accuracy(name) >= accuracy("allreduce") - POINTS


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in QUICK])
def test_all_others_are_near_allreduce(name, accuracy):
    assert accuracy(name) >= accuracy("allreduce") - POINTS
