"""NeuroevolutionSGD, our reconstruction of arXiv 2012.11184: clusters, survival, children, guarantees."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quadratic import same_bits, simulate, slope, statistics
from torch import nn

from mpitrain import DistributedOptimizer, NeuroevolutionSGD
from mpitrain.algorithms.population.neuroevolution import Sketcher, clusters, make_plan, mean_cosine
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.schedules import RandomOrder
from mpitrain.simulation.world import SimulatedWorld

ALONE = NeuroevolutionSGD(period=2, similarity=1.0, unfit_fraction=0.0)  # nobody is replaced


def rng(seed=0):
    return np.random.default_rng(seed)


def population(method, start, gradient, *, eta=0.1, fitness=None, seed=0, layers=(), schedule=None):
    start = np.asarray(start)
    world = SimulatedWorld(len(start), schedule)
    return Simulation(method, world, gradient, start, eta, seed=seed, layers=layers, fitness=fitness)


def survivors(simulation):
    plan = simulation.workers[0].plan
    return [k for k in range(simulation.world.size) if k not in plan.children]


# Clusters


def test_average_linkage_merges_the_most_similar_first():
    s = np.eye(4)
    for (i, j), value in {(0, 1): 0.95, (0, 2): 0.85, (1, 2): 0.75, (2, 3): 0.78, (0, 3): 0.1, (1, 3): 0.1}.items():
        s[i, j] = s[j, i] = value
    assert clusters(s, 0.9) == [[0, 1], [2], [3]]
    assert clusters(s, 0.79) == [[0, 1, 2], [3]]  # {0,1} and 2: (.85 + .75)/2 = .8, more than 2 and 3
    assert clusters(s, 0.3) == [[0, 1, 2, 3]]  # (.1 + .1 + .78)/3
    assert clusters(s, 0.33) == [[0, 1, 2], [3]]
    assert clusters(s, 1.0) == [[0], [1], [2], [3]]


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(0, 999), st.floats(-0.5, 1))
def test_clusters_are_a_partition_and_no_two_of_them_are_too_similar(n, seed, theta):
    unit = rng(seed).normal(size=(n, 3))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    found = clusters(unit @ unit.T, theta)
    assert sorted(k for members in found for k in members) == list(range(n))
    for i, a in enumerate(found):
        for b in found[:i]:
            assert (unit @ unit.T)[np.ix_(a, b)].mean() <= theta


# The plan


def test_the_fittest_of_each_cluster_survives():
    s = np.eye(5)
    s[0, 1] = s[1, 0] = s[2, 4] = s[4, 2] = 0.99
    method = NeuroevolutionSGD(unfit_fraction=0.0)
    plan = make_plan(np.array([3.0, 2.0, 5.0, 4.0, 1.0]), s, method, rng())
    assert plan.best == 4
    assert plan.suppressed == (0, 2)
    assert sorted(plan.children) == [0, 2]


def test_the_least_fit_are_replaced_but_never_the_elite():
    fitness, s = np.array([4.0, 1.0, 3.0, 2.0]), np.eye(4)
    for unfit, elite, gone in [(0.0, 0.25, []), (0.25, 0.25, [0]), (0.5, 0.25, [0, 2]), (1.0, 0.25, [0, 2, 3])]:
        method = NeuroevolutionSGD(unfit_fraction=unfit, elite_fraction=elite)
        assert sorted(make_plan(fitness, s, method, rng()).children) == gone
    method = NeuroevolutionSGD(unfit_fraction=1.0, elite_fraction=0.75)
    assert sorted(make_plan(fitness, s, method, rng()).children) == [0]
    assert not make_plan(fitness, s, NeuroevolutionSGD(unfit_fraction=1.0, elite_fraction=1.0), rng()).children


@settings(max_examples=80)
@given(st.integers(1, 10), st.integers(0, 999), st.floats(0, 1), st.floats(0, 1), st.floats(-0.5, 1), st.integers(0, 3))
def test_parents_survive_and_are_of_different_clusters(n, seed, elite, unfit, theta, n_bad):
    generator = rng(seed)
    unit = generator.normal(size=(n, 3))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    s, fitness = unit @ unit.T, generator.normal(size=n)
    fitness[:n_bad] = np.nan
    method = NeuroevolutionSGD(elite_fraction=elite, unfit_fraction=unfit, similarity=theta)
    plan = make_plan(fitness, s, method, generator)
    if not np.isfinite(fitness).any():
        assert not plan.children
        return
    assert plan.best == np.nanargmin(fitness)
    assert plan.best not in plan.children
    cluster = {k: i for i, members in enumerate(clusters(s, theta)) for k in members}
    stay = set(range(n)) - set(plan.children)
    assert stay.isdisjoint(plan.suppressed)
    assert np.isfinite(fitness[list(stay)]).all()
    assert len({cluster[k] for k in stay}) == len(stay)
    for child in plan.children.values():
        assert {child.first, child.second} <= stay
        assert child.first == child.second if len(stay) == 1 else cluster[child.first] != cluster[child.second]


def test_the_plan_depends_on_the_random_state_only():
    fitness, s = rng(1).normal(size=8), np.eye(8)
    plans = [make_plan(fitness, s, NeuroevolutionSGD(unfit_fraction=0.5), rng(seed)) for seed in (5, 5, 6)]
    assert plans[0] == plans[1] != plans[2]


# Similarity


def test_sketches_keep_inner_products_on_average():
    n, trials = 900, 300
    x = rng(1).normal(size=(2, n))
    x[1] += 0.7 * x[0]
    sketcher = Sketcher((slice(0, n),))
    generator, products = rng(2), []
    for _ in range(trials):
        signs = generator.bit_generator.state
        a, rms = sketcher(x[0], np.zeros(n), generator)
        generator.bit_generator.state = signs
        b, _ = sketcher(x[1], np.zeros(n), generator)
        products.append(float((a * b).sum()))
        assert rms[0] == pytest.approx(np.sqrt((x[0] ** 2).mean()))
    assert np.mean(products) == pytest.approx(x[0] @ x[1], abs=4 * np.std(products) / np.sqrt(trials))


@pytest.mark.parametrize("n", [1, 7, 256, 5000, 20_000])
def test_equal_updates_have_similarity_one_opposite_ones_minus_one_orthogonal_ones_little(n):
    u, v = rng(n).normal(size=(2, n))
    v -= u * (u @ v) / (u @ u) if n > 1 else 0
    sketcher = Sketcher((slice(0, n),))
    sketches = np.stack([sketcher(x, np.zeros(n), rng(3))[0] for x in (u, 2.5 * u, -u, v)])
    s = mean_cosine(sketches)
    np.testing.assert_allclose([s[0, 1], s[0, 2]], [1, -1], atol=1e-12)
    if n > 1:
        assert abs(s[0, 3]) < 4 / np.sqrt(min(n, 256))


def test_every_layer_counts_the_same():
    # Alike in one of two layers, opposite in the other; and one layer at rest.
    sketches = np.array([[[3.0, 4.0], [100.0, 0.0]], [[6.0, 8.0], [-1.0, 0.0]], [[0.3, 0.4], [0.0, 0.0]]])
    np.testing.assert_allclose(mean_cosine(sketches), [[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 0.5]], atol=1e-15)


# Generations


@pytest.mark.parametrize("crossover", ["convex", "uniform"])
def test_identical_individuals_are_one_cluster(crossover):
    method = NeuroevolutionSGD(period=3, crossover=crossover, mutation=0.0)
    end = population(method, np.ones((5, 40)), slope(1.0, 0.7)).run(3)
    for worker in end.workers:
        assert worker.plan.suppressed == (1, 2, 3, 4)
        assert worker.metrics()["suppressed"] == 4.0
    np.testing.assert_allclose(end.x(), 0.7 + 0.3 * 0.9**3, rtol=1e-12)  # children of one are copies of it


def test_orthogonal_updates_suppress_no_individual():
    p, n = 4, 64
    target = 5.0 * np.eye(p).repeat(n // p, axis=1)  # each worker goes its own way
    method = NeuroevolutionSGD(period=2, unfit_fraction=0.0)
    ours = population(method, np.zeros((p, n)), slope(1.0, target)).run(10)
    assert survivors(ours) == list(range(p))
    assert ours.workers[2].metrics()["suppressed"] == 0.0
    np.testing.assert_allclose(ours.x(), target * (1 - 0.9**10), rtol=1e-12)


@pytest.mark.parametrize(("method", "p"), [(ALONE, 4), (NeuroevolutionSGD(period=2), 1)])
def test_without_evolution_it_is_sgd(method, p):
    start = rng(4).normal(size=(p, 30))
    end = population(method, start, slope(2.0, 0.3)).run(9)
    np.testing.assert_allclose(end.x(), 0.3 + (start - 0.3) * 0.8**9, rtol=1e-12)
    assert sum(statistics(end, "bytes_sent")) == 0


@settings(max_examples=25)
@given(st.integers(2, 7), st.sampled_from([0.0, 0.1]), st.sampled_from(["convex", "uniform"]), st.integers(0, 99))
def test_the_best_never_gets_worse(p, eta, crossover, seed):
    # With a fitness that is always the same and a descent that descends, elitism keeps what was reached.
    b = rng(seed).normal(size=20)
    fitness = lambda x: float(((x - b) ** 2).sum())  # noqa: E731
    method = NeuroevolutionSGD(period=1, crossover=crossover, unfit_fraction=0.5, mutation=0.5)
    start = rng(seed + 1).normal(size=(p, 20))
    simulation, best = population(method, start, slope(1.0, [b] * p), eta=eta, fitness=fitness, seed=seed), np.inf
    for _ in range(12):
        simulation.run(1)
        assert min(worker.metrics()["fitness"] for worker in simulation.workers) <= best
        best = fitness(simulation.consensus(p - 1))
        assert best == min(worker.metrics()["fitness"] for worker in simulation.workers)


def test_convex_children_lie_between_their_parents():
    start = rng(5).normal(size=(6, 50))
    method = NeuroevolutionSGD(period=1, unfit_fraction=0.5, mutation=0.1)
    end = population(method, start, slope(), eta=0.0, fitness=lambda x: float(x[0])).run(1)
    children = end.workers[0].plan.children
    assert len(children) == 3
    for slot, child in children.items():  # at eta = 0 the update is 0, and so is the mutation
        a, b, x = start[child.first], start[child.second], end.x()[slot]
        w = ((x - a) / (b - a)).mean()
        assert 0 < w < 1
        np.testing.assert_allclose(x, (1 - w) * a + w * b, rtol=1e-10)
    assert same_bits(end.x()[survivors(end)], start[survivors(end)])


def test_uniform_children_have_each_layer_from_one_parent():
    layers = tuple(slice(k, k + 5) for k in range(0, 60, 6))  # with gaps, as between aligned tensors
    start = rng(6).normal(size=(8, 60))
    method = NeuroevolutionSGD(period=1, unfit_fraction=0.5, crossover="uniform")
    end = population(method, start, slope(), eta=0.0, fitness=lambda x: float(x[0]), layers=layers).run(1)
    from_second = []
    for slot, child in end.workers[0].plan.children.items():
        a, b, x = start[child.first], start[child.second], end.x()[slot]
        for layer in layers:
            assert (x[layer] == a[layer]).all() or (x[layer] == b[layer]).all()
            from_second.append((x[layer] == b[layer]).all())
    assert 0 < np.mean(from_second) < 1


def test_mutation_is_relative_to_the_update_of_a_layer():
    n, sigma = 20_000, 0.2
    layers = (slice(0, n), slice(n, 2 * n))
    pull = np.concatenate([np.full(n, 1.0), np.full(n, 0.01)])
    method = NeuroevolutionSGD(period=1, mutation=sigma)
    end = population(method, np.zeros((2, 2 * n)), lambda rank, x: pull, layers=layers, fitness=lambda x: 0.0).run(1)
    change = end.x()[1] - end.x()[0]  # worker 1 is a mutated copy of worker 0
    for layer, update in zip(layers, (0.1, 0.001), strict=True):
        expected = (sigma * update) ** 2
        assert change[layer].var() == pytest.approx(expected, abs=4 * expected * np.sqrt(2 / n))
    assert abs(np.corrcoef(change[layers[0]], change[layers[1]])[0, 1]) < 4 / np.sqrt(n)


def test_fitness_is_the_mean_loss_of_a_generation_unless_one_is_given():
    losses = iter(np.arange(100.0))
    world = SimulatedWorld(1)
    method = NeuroevolutionSGD(period=4)
    simulation = Simulation(method, world, slope(), np.ones(3), 0.1, loss=lambda rank, x: next(losses))
    assert simulation.workers[0].metrics()["fitness"] == np.inf
    assert simulation.run(4).workers[0].metrics()["fitness"] == 1.5
    assert simulation.run(4).workers[0].metrics()["fitness"] == 5.5
    given = population(method, np.ones((1, 3)), slope(), fitness=lambda x: float(x.sum())).run(4)
    assert given.workers[0].metrics()["fitness"] == pytest.approx(3 * 0.9**4)


def test_a_diverged_individual_is_replaced():
    def gradient(rank, x):
        return np.full(30, np.nan if rank == 2 and asked.append(1) is None and len(asked) < 5 else 0.0) + x

    asked = []
    method = NeuroevolutionSGD(period=4, unfit_fraction=0.0)
    simulation = population(method, rng(7).normal(size=(4, 30)), gradient)
    simulation.run(3)
    assert np.isnan(simulation.x()[2]).all()
    assert np.isfinite(np.delete(simulation.x(), 2, axis=0)).all()
    simulation.run(1)
    assert np.isfinite(simulation.x()).all()
    assert simulation.workers[0].plan.children[2]
    assert np.isfinite(simulation.run(8).x()).all()


@settings(max_examples=15)
@given(st.integers(2, 6), st.integers(0, 99), st.sampled_from(["convex", "uniform"]))
def test_the_order_of_events_does_not_matter(p, seed, crossover):
    start = rng(seed).normal(size=(p, 40)).astype(np.float32)
    method = NeuroevolutionSGD(period=2, unfit_fraction=0.5, crossover=crossover, similarity=0.5)
    layers = (slice(0, 16), slice(16, 40))

    def x(schedule, seed=seed):
        return population(method, start, slope(1.0, 0.7), schedule=schedule, seed=seed, layers=layers).run(10).x()

    assert same_bits(x(None), x(RandomOrder(seed)))
    assert not same_bits(x(None), x(None, seed + 1))


def test_all_workers_agree_on_the_best():
    start = rng(8).normal(size=(5, 12))
    end = population(NeuroevolutionSGD(period=3), start, slope(1.0, 0.2)).run(6)
    fitness = [worker.metrics()["fitness"] for worker in end.workers]
    assert all(same_bits(end.consensus(rank), end.x()[np.argmin(fitness)]) for rank in range(5))


def test_a_child_counts_what_it_reads():
    n = 100
    end = population(NeuroevolutionSGD(period=1), np.ones((3, n)), slope()).run(1)
    assert statistics(end, "bytes_sent") == [0, 8 * n, 8 * n]  # the others are copies of worker 0


@pytest.mark.ranks(2, 3)
@pytest.mark.time_limit(180)
@pytest.mark.parametrize("crossover", ["convex", "uniform"])
def test_ranks_do_what_simulated_workers_do(world, crossover):
    p, n, steps = world.size, 64, 12
    method = NeuroevolutionSGD(period=3, crossover=crossover, unfit_fraction=0.5)
    start, b = rng(1).normal(size=n), rng(2).normal(size=(p, n))
    h = np.linspace(0.5, 1.5, p)

    def loss(rank, x):
        return float((h[rank] * (x - b[rank]) ** 2 / 2).sum())

    simulated = simulate(method, p, start=start, eta=0.1, gradient=slope(h, b), seed=3)
    simulated.loss = loss
    simulated.run(steps)
    model = nn.Module()
    model.x = nn.Parameter(torch.tensor(start))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with DistributedOptimizer(base, model, method, seed=3) as optimizer:
        for _ in range(steps):
            optimizer.zero_grad()
            value = (h[world.rank] * (model.x - torch.from_numpy(b[world.rank])) ** 2 / 2).sum()
            value.backward()
            optimizer.step(value)
        world.barrier()
        mine = model.x.detach().numpy().copy()
        np.testing.assert_allclose(mine, simulated.x()[world.rank], rtol=1e-10, atol=1e-12)
        with optimizer.consensus():
            best = model.x.detach().numpy().copy()
        assert len({x.tobytes() for x in world.comm.allgather(best)}) == 1
        world.barrier()


@pytest.mark.ranks(2, 3)
@pytest.mark.time_limit(180)
def test_the_optimizer_asks_for_the_fitness_of_the_model(world):
    model = nn.Module()
    model.x = nn.Parameter(torch.full((20,), 3.0))
    asked = []

    def fitness():
        assert not torch.is_grad_enabled()
        asked.append(model.x.detach().clone())
        return (model.x**2).sum()

    base = torch.optim.SGD(model.parameters(), lr=0.1)
    method = NeuroevolutionSGD(period=2, similarity=1.0, unfit_fraction=0.0)
    with DistributedOptimizer(base, model, method, fitness=fitness) as optimizer:
        for _ in range(4):
            optimizer.zero_grad()
            loss = model.x.sum()
            loss.backward()
            optimizer.step(loss)
        assert [float(x[0]) for x in asked] == [pytest.approx(2.8), pytest.approx(2.6)]
        assert optimizer._parts.replica.worker.metrics()["fitness"] == pytest.approx(20 * 2.6**2)
        world.barrier()
