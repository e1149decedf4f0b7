"""Running averages of the iterates: their values, that nothing is fed back, and that they work with any method."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.quadratic import assert_states_equal, load, same_bits, slope, states

from mpitrain import UsageError
from mpitrain.algorithms import EASGD, METHODS, AllReduceSGD, Downpour
from mpitrain.algorithms.base.iterate_average import Average
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.schedules import RandomOrder
from mpitrain.simulation.world import SimulatedWorld

STARTS = np.random.default_rng(0).normal(size=(4, 30))
AVERAGES = [Average(*chosen) for chosen in itertools.product(("polyak", "moving"), (0.2,), ("workers", "consensus"))]
every_average = pytest.mark.parametrize("average", AVERAGES, ids=lambda a: f"{a.kind}-{a.source}")
every_method = pytest.mark.parametrize("name", METHODS)


def simulation(method, p=3, average=None, start=STARTS, seed=0, gradient=None):
    world = SimulatedWorld(p, RandomOrder(5), largest_shard=8)
    gradient = gradient or slope([0.5, 1.0, 2.0, 0.8], [1.0, -2.0, 0.5, 3.0])
    return Simulation(method, world, gradient, start[:p], 0.1, seed=seed, average=average)


@every_method
@every_average
def test_an_average_is_the_average_and_changes_no_method(name, average):
    method = METHODS[name]()
    plain = simulation(method).run(12)
    seen: list[list[np.ndarray]] = [[] for _ in range(3)]

    def note(simulation, rank):
        worker = simulation.workers[rank]
        if average.source == "workers":
            seen[rank].append(worker.x.local.copy())
        elif rank == 0:
            out = np.zeros(30)
            worker._worker.consensus(out)
            seen[0].append(out)

    averaged = simulation(method, average=average).run(12, note)
    assert same_bits(averaged.x(), plain.x())
    expected = []
    for x in filter(None, seen):
        z = STARTS[0]
        for t, value in enumerate(x, 1):
            z = z + (1 / t if average.kind == "polyak" else 0.2) * (value - z)
        expected.append(z)
        if average.kind == "polyak":
            np.testing.assert_allclose(z, np.mean(x, axis=0), atol=1e-12)
    if average.kind == "polyak" or average.source == "consensus":
        for rank in range(3):
            np.testing.assert_allclose(averaged.consensus(rank), np.mean(expected, axis=0), atol=1e-12)


@every_method
@every_average
def test_average_is_in_the_checkpoint(name, average):
    method = METHODS[name]()
    whole = simulation(method, average=average, seed=1).run(5)
    saved = states(whole)
    whole.run(4)
    # The schedule has a state of its own, which a synchronous method and one worker alone do not notice.
    alone = simulation(method, 1, average=average, seed=1).run(5)
    saved_alone = states(alone)
    alone.run(4)
    resumed = load(simulation(method, 1, average, np.zeros((1, 30)), seed=9), saved_alone).run(4)
    assert same_bits(resumed.consensus(), alone.consensus())
    assert_states_equal(states(resumed)[0], states(alone)[0])
    assert all("average_of_iterates" in state for state in saved)


@every_average
def test_the_end_of_a_run_is_that_of_the_method_alone(average):
    ends = [simulation(Downpour(period=5), average=average).run(7), simulation(Downpour(period=5)).run(7)]
    for end in ends:
        end.finalize()
    assert same_bits(states(ends[0])[0]["center"], states(ends[1])[0]["center"])


def test_rate_one_is_the_last_iterate():
    end = simulation(AllReduceSGD(), average=Average("moving", 1.0)).run(7)
    np.testing.assert_allclose(end.consensus(), end.x().mean(axis=0), atol=1e-14)


@given(st.floats(0.01, 1), st.integers(1, 20))
def test_average_of_constant_parameters_is_constant(rate, steps):
    for kind in ("polyak", "moving"):
        end = simulation(AllReduceSGD(), 1, Average(kind, rate), np.ones((1, 3)), gradient=slope(0.0)).run(steps)
        np.testing.assert_allclose(end.consensus(), 1.0, atol=1e-12)


def test_averaged_center_is_asymptotically_efficient():
    """T*Var((1/T) sum c_t) -> sigma^2/(p*h^2), whatever the moving rate (algorithms of Zhang's thesis, ch. 3)."""
    p, steps, n = 4, 1500, 4000
    for alpha in (0.1, 0.225):
        method = EASGD(moving_rate=alpha, period=1, synchronous=True)
        world = SimulatedWorld(p)
        noisy = slope(1.0, 0.0, sigma=1.0, seed=3)
        end = Simulation(method, world, noisy, np.zeros(n), 0.1, average=Average("polyak", source="consensus"))
        variance = np.mean(end.run(steps).consensus() ** 2)
        # The limit is reached as 1/T: the correlation time is 1/(eh) = 10 steps, so half a percent at 1500.
        assert abs(steps * variance * p - 1) < 4 * np.sqrt(2 / n) + 0.02


@pytest.mark.parametrize(
    ("text", "average"),
    [
        ("polyak", Average("polyak")),
        ("moving", Average("moving", 0.001)),
        ("moving:0.05", Average("moving", 0.05)),
        ("moving:1e-2:consensus", Average("moving", 0.01, "consensus")),
        ("polyak:consensus", Average("polyak", source="consensus")),
    ],
)
def test_averages_are_parsed(text, average):
    assert Average.parse(text) == average


@pytest.mark.parametrize(
    "text", ["", "mean", "polyak:0.1", "moving:x", "moving:0.1:2", "moving:0.1:center", "moving:nan"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(UsageError, match="average"):
        Average.parse(text)


@pytest.mark.parametrize("bad", [{"kind": "median"}, {"source": "rank"}, {"rate": 0.0}, {"rate": 1.5}])
def test_bad_averages_are_refused(bad):
    with pytest.raises(UsageError, match=f"average: (unknown )?{next(iter(bad))} "):
        Average(**bad)


@pytest.mark.ranks(2)
def test_average_between_ranks(world):
    import torch

    import mpitrain

    torch.manual_seed(0)
    model = torch.nn.Linear(5, 2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with mpitrain.DistributedOptimizer(base, model, AllReduceSGD(), world=world, average=Average()) as optimizer:
        seen = []
        for step in range(4):
            optimizer.zero_grad()
            model(torch.full((3, 5), float(world.rank + step))).square().mean().backward()
            optimizer.step()
            seen.append(model.weight.detach().clone())
        world.barrier()
        with optimizer.consensus():
            torch.testing.assert_close(model.weight.detach(), torch.stack(seen).mean(0))
        torch.testing.assert_close(model.weight.detach(), seen[-1])
        world.barrier()


def test_the_next_worker_continues_the_average_of_one_that_died():
    def kill(simulation, rank):
        if rank == 0 and simulation.workers[0].t == 30:
            simulation.world.kill(0)

    average = Average("moving", 0.2, "consensus")
    run = Simulation(EASGD(period=1), SimulatedWorld(3), slope(1.0), np.ones(4), 0.1, average=average).run(90, kill)
    of_method = np.zeros(4)
    run.workers[1]._worker.consensus(of_method)
    assert np.abs(of_method).max() < 0.01
    assert np.abs(run.consensus(1)).max() < 0.02


@pytest.mark.parametrize("kind", ["polyak", "moving"])
def test_an_average_leaves_out_nonfinite_values(kind):
    def gradient(rank, x):
        steps[rank] += 1
        return np.full_like(x, np.nan) if (rank, steps[rank]) == (1, 7) else x

    steps = [0, 0]
    run = Simulation(EASGD(period=2), SimulatedWorld(2), gradient, np.ones(4), 0.1, average=Average(kind, 0.2)).run(40)
    assert np.isfinite(run.consensus()).all()
