"""``clip_displacement``: what one worker may move the center, or a peer, in an exchange."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from support.quadratic import load, states

from mpitrain.algorithms import METHODS, create
from mpitrain.algorithms.base.settings import settings_of
from mpitrain.errors import UsageError
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.schedules import RandomOrder
from mpitrain.simulation.world import SimulatedWorld
from mpitrain.trainer.config import TrainConfig
from mpitrain.trainer.plan import RunPlan

CLIPPED = [name for name, method in METHODS.items() if "clip_displacement" in settings_of(method)]
VARIANTS = [
    *((name, {}) for name in CLIPPED),
    ("easgd", {"synchronous": True}),
    ("easgd", {"order": "worker_first"}),
    ("easgd", {"order": "center_first"}),
    ("aeasgd", {"early_exchange": True}),
    ("downpour", {"push_period": 2, "fetch_period": 4}),
    ("agn", {"normalise": "gradient"}),
    ("gossip", {"direction": "push"}),
    ("gossip", {"grad_point": "post"}),
]
every_variant = pytest.mark.parametrize(
    ("name", "settings"), VARIANTS, ids=["-".join([name, *map(str, kw.values())]) for name, kw in VARIANTS]
)
P, N, ETA, C = 4, 50, 0.02, 0.3
SPIKE = 1e6


def simulation(name, settings, *, spike_at=None):
    """Workers on |x|^2/2 with noise; from step ``spike_at`` on, three gradients of the last are far too large."""
    noise, steps = np.random.default_rng(0), [0] * P

    def gradient(rank, x):
        steps[rank] += 1
        g = x + 0.1 * noise.normal(size=x.shape)
        is_spike = spike_at is not None and rank == P - 1 and spike_at <= steps[rank] < spike_at + 3
        return SPIKE * g if is_spike else g

    method = METHODS[name](**{**METHODS[name].short_run, **settings})
    schedule = None if method.is_synchronous else RandomOrder(0)
    world = SimulatedWorld(P) if schedule is None else SimulatedWorld(P, schedule)
    return Simulation(method, world, gradient, np.ones(N), ETA)


def distance(name, settings, **spike):
    """The distance of what is evaluated from the minimum, after all workers have made 400 steps."""
    run = simulation(name, settings, **spike).run(400).finalize()
    return float(np.linalg.norm(run.consensus()))


@every_variant
def test_spikes_of_one_worker_leave_the_shared_model_intact(name, settings):
    bounded = {**settings, "clip_displacement": C}
    assert distance(name, bounded, spike_at=100) < distance(name, settings) + 1
    assert not distance(name, settings, spike_at=398) < 100  # without the bound they do not


@every_variant
def test_one_exchange_moves_the_other_side_by_at_most_the_bound(name, settings):
    run = simulation(name, {**settings, "clip_displacement": C}, spike_at=30)
    before, moves = run.consensus(), []

    def watch(run, rank):
        nonlocal before
        after = run.consensus()
        moves.append(float(np.linalg.norm(after - before)))
        before = after

    run.run(60, watch)
    # Synchronous workers move the center together.
    together = P if run.method.is_synchronous else 1
    assert max(moves) <= together * C * (1 + 1e-6)
    assert sum(worker.comm.statistics.n_clipped for worker in run.workers) > 0


@every_variant
def test_a_wide_bound_changes_no_bit(name, settings):
    wide = simulation(name, {**settings, "clip_displacement": 1e9}).run(40).x()
    assert np.array_equal(wide, simulation(name, settings).run(40).x())


@every_variant
def test_the_bound_is_the_same_after_a_checkpoint_in_the_middle_of_a_period(name, settings):
    """What the local steps have moved since the last exchange is measured from the same point."""
    period = {"period": 4} if "period" in settings_of(METHODS[name]) else {}
    method = METHODS[name](**{**METHODS[name].short_run, **period, **settings, "clip_displacement": 0.05})

    def after(steps):
        return Simulation(method, SimulatedWorld(P), lambda rank, x: (rank + 1) * x, np.ones(N), ETA).run(steps)

    whole, resumed = after(6), load(after(0), states(after(6)))
    assert sum(worker.comm.statistics.n_clipped for worker in whole.run(4).workers) > 0
    assert np.array_equal(whole.x(), resumed.run(4).x())


def test_the_first_and_the_tenth_spike_of_a_rank_are_told(caplog):
    with caplog.at_level(logging.WARNING, "mpitrain"):
        run = simulation("easgd", {"clip_displacement": 1e-3, "period": 1}, spike_at=10).run(40)
    assert "exceeds clip_displacement" in caplog.text
    of_ranks = [worker.comm.statistics.n_clipped for worker in run.workers]
    for number in (1, 10):
        assert caplog.text.count(f"(number {number} on") == sum(n >= number for n in of_ranks) > 0
    assert "(number 2 " not in caplog.text


def test_the_option_is_the_setting():
    plan = RunPlan.of(TrainConfig("easgd", clip_displacement=0.5))
    assert plan.method.clip_displacement == 0.5
    assert METHODS["easgd"]().clip_displacement is None


@pytest.mark.parametrize("name", ["allreduce", "diloco", "robust"])
def test_methods_without_a_bound_refuse_the_option(name):
    with pytest.raises(UsageError, match=f"--clip-displacement is not for {name}, but for easgd"):
        RunPlan.of(TrainConfig(name, clip_displacement=0.5))


@pytest.mark.parametrize("bound", ["0", "-1", "nan", "much"])
def test_a_bound_is_positive(bound):
    with pytest.raises(UsageError, match="clip_displacement must be"):
        create("downpour", {"clip_displacement": bound})


def test_overlap_refuses_the_bound():
    with pytest.raises(UsageError, match="leave out clip_displacement"):
        METHODS["easgd"](overlap=True, clip_displacement=1.0)
