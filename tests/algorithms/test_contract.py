"""The contract of every method in the registry. No method is named here."""

import dataclasses
import math
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.alone import ALONE, sgd
from support.quadratic import assert_states_equal, load, same_bits, simulate, slope, states
from support.variants import variants

from mpitrain import UsageError, kernels
from mpitrain.algorithms import METHODS, create
from mpitrain.algorithms.base.replica import ParamGroupSlice
from mpitrain.algorithms.base.settings import Boolean, Bounded, Choice, Integer, settings_of
from mpitrain.errors import RankFailed
from mpitrain.simulation.engine import Simulation
from mpitrain.simulation.world import SimulatedWorld

STARTS = np.random.default_rng(0).normal(size=(5, 40))
H, B = np.array([0.5, 1.0, 2.0, 0.8, 1.4]), np.array([1.0, -2.0, 0.5, 3.0, 0.1])


def numbers(method):
    """Return the settings of a method that are numbers, by name."""
    return {key: setting for key, setting in settings_of(method).items() if isinstance(setting, Bounded)}


ALL_VARIANTS = [pytest.param(method, id=name) for name, method in variants()]
FIRST_VARIANTS = list({param.values[0].name: param for param in reversed(ALL_VARIANTS)}.values())[::-1]
NUMBERS = [pytest.param(m, k, s, id=f"{n}-{k}") for n, m in METHODS.items() for k, s in numbers(m).items()]
every_variant = pytest.mark.parametrize("method", ALL_VARIANTS)
first_variants = pytest.mark.parametrize("method", FIRST_VARIANTS)  # one of each method
every_method = pytest.mark.parametrize("name", METHODS)
every_number = pytest.mark.parametrize(("method", "key", "setting"), NUMBERS)


def run(method, p, steps, **more):
    return simulate(method, p, start=STARTS[:p], eta=0.1, gradient=slope(H, B), largest_shard=8, **more).run(steps)


@every_method
def test_an_unknown_setting_is_refused_and_the_known_ones_are_named(name):
    method = METHODS[name]
    with pytest.raises(TypeError, match=f"{method.__name__} has no setting 'xyzzy': ") as error:
        method(xyzzy=3)
    assert all(key in str(error.value) for key in settings_of(method))
    if "period" in settings_of(method):
        with pytest.raises(TypeError, match="has no setting 'perod': did you mean period"):
            method(perod=3)


@every_method
def test_every_method_describes_itself(name):
    method = METHODS[name]
    assert method.name == name
    for text in (method.summary, method.source, method.communication, method.__doc__):
        assert text.strip()
        assert "\n" not in method.summary + method.source + method.communication
    assert all(setting.help.strip() for setting in settings_of(method).values())


@every_method
def test_settings_are_frozen(name):
    method = METHODS[name]()
    for key, setting in settings_of(method).items():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, key, setting.default)


BOUNDS = ("low", "high", "above", "below")


def outside(setting):
    """Yield values of the right type just outside the range."""
    step = 1 if isinstance(setting, Integer) else 1e-9
    for bound, beyond in zip(BOUNDS, (-step, step, 0, 0), strict=True):
        if getattr(setting, bound) is not None:
            yield type(step)(getattr(setting, bound) + beyond)


@every_number
def test_numbers_outside_their_range_are_refused_with_the_range(method, key, setting):
    wrong_types = ["3", [1], 1j, True]
    if not setting.optional:
        wrong_types.append(None)
    if isinstance(setting, Integer):
        wrong_types.append(1.5)
    for bad in [math.nan, math.inf, -math.inf, *outside(setting), *wrong_types]:
        with pytest.raises(UsageError) as refused:
            method(**{key: bad})
        text = str(refused.value)
        assert "\n" not in text
        assert all(word in text for word in (method.name, key, repr(bad)))
        for bound in BOUNDS:
            if getattr(setting, bound) is not None:
                assert f"{getattr(setting, bound):g}" in text


@every_number
@settings(max_examples=10)
@given(data=st.data())
def test_numbers_inside_their_range_are_accepted_and_parsed(method, key, setting, data):
    low, high, above, below = (getattr(setting, bound) for bound in BOUNDS)
    values = (
        st.integers(low, high)
        if isinstance(setting, Integer)
        else st.floats(
            low if low is not None else above,
            high if high is not None else below,
            exclude_min=above is not None,
            exclude_max=below is not None,
            allow_nan=False,
            allow_infinity=False,
        )
    )
    value = data.draw(values)
    made = method(**{key: value})
    assert getattr(made, key) == value
    assert create(method.name, {key: repr(value)}) == made


@every_number
def test_none_is_a_value_of_optional_numbers_alone(method, key, setting):
    if setting.optional:
        assert getattr(method(**{key: None}), key) is None
        assert getattr(create(method.name, {key: "None"}), key) is None
    else:
        with pytest.raises(UsageError, match=f"{key} must be a .*number, not 'none'"):
            create(method.name, {key: "none"})


@every_method
def test_defaults_survive_being_text(name):
    default = METHODS[name]()
    text = {key: str(getattr(default, key)) for key in settings_of(default)}
    assert create(name, text) == create(name) == default


@every_method
def test_choices_and_switches_are_parsed_and_others_refused(name):
    for key, setting in settings_of(METHODS[name]).items():
        if isinstance(setting, Choice):
            good, words = {word: word for word in setting.choices}, setting.choices
        elif isinstance(setting, Boolean):
            good = {"true": True, "False": False, "1": True, "0": False, "yes": True, "no": False}
            words = ("true", "false")
        else:
            continue
        for text, value in good.items():
            assert getattr(create(name, {key: text}), key) == value
        with pytest.raises(UsageError) as refused:
            create(name, {key: "sideways"})
        assert all(word in str(refused.value) for word in (name, key, "'sideways'", *words))


@every_number
def test_text_that_is_no_number_is_refused(method, key, setting):
    whole = isinstance(setting, Integer)
    for text in ("abc", "", "1.5.2", *(["1.5", "1e3"] if whole else [])):
        with pytest.raises(UsageError, match=f"{method.name}: {key} must be a {'whole ' if whole else ''}number, not"):
            create(method.name, {key: text})
    for text in ("nan", "inf"):
        with pytest.raises(UsageError, match=key):
            create(method.name, {key: text})


def test_unknown_names_are_refused_and_the_known_ones_are_named():
    with pytest.raises(UsageError, match="unknown algorithm 'xyzzy': see mpitrain algorithms"):
        create("xyzzy")
    for name, method in METHODS.items():
        with pytest.raises(UsageError) as refused:
            create(name, {"xyzzy": "1"})
        assert all(key in str(refused.value) for key in settings_of(method))


@first_variants
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_any_number_of_workers_runs_and_comes_to_rest(method, p):
    check_that_workers_come_to_rest(method, p)


@every_variant
def test_workers_of_every_variant_come_to_rest(method):
    check_that_workers_come_to_rest(method, 5)


def check_that_workers_come_to_rest(method, p):
    # Alike workers on one quadratic: whatever is exchanged, and however late, all of it ends at the minimum.
    end = simulate(method, p, start=STARTS[0], eta=0.1, gradient=slope(1.0, 0.7), largest_shard=8).run(600)
    np.testing.assert_allclose(end.x(), 0.7, atol=1e-3)
    for rank in range(p):
        if method.evaluates_history:  # on its way from the start to where the workers are
            passed = (end.consensus(rank) - STARTS[0]) / (0.7 - STARTS[0])
            assert np.all((passed > 0.1) & (passed < 1 + 1e-9))
        else:
            np.testing.assert_allclose(end.consensus(rank), 0.7, atol=1e-3)


@every_variant
def test_one_worker_is_the_documented_sequential_case(method):
    gradient = slope(H[0], B[0])
    end = run(method, 1, 7)
    expected = ALONE.get(method.name, sgd)(method, STARTS[0], lambda x: gradient(0, x), 0.1, 7)
    np.testing.assert_allclose(end.x()[0], expected, rtol=0, atol=1e-10)


@every_variant
def test_metrics_are_those_declared(method):
    for worker in run(method, 3, 3).workers:
        found = worker.metrics()
        assert tuple(found) == method.metrics
        assert all(type(value) is float for value in found.values())


@every_method
def test_short_run_settings_are_settings(name):
    method = METHODS[name]
    assert method(**method.short_run).settings().items() >= dict(method.short_run).items()


@every_method
@pytest.mark.parametrize("p", [1, 4, 64])
def test_warnings_are_single_lines(name, p):
    for text in METHODS[name]().warnings(p, 0.1):
        assert text.strip()
        assert "\n" not in text


@every_variant
@settings(max_examples=6)
@given(before=st.integers(0, 7), after=st.integers(1, 7), p=st.integers(1, 4))
def test_state_reproduces_the_rest_of_the_run_at_any_step(method, before, after, p):
    whole = run(method, p, before, seed=1)
    saved = states(whole)
    whole.run(after)
    resumed = simulate(method, p, start=np.zeros(40), eta=0.1, gradient=slope(H, B), largest_shard=8, seed=99)
    load(resumed, saved).run(after)
    assert same_bits(resumed.x(), whole.x())
    assert same_bits(resumed.consensus(), whole.consensus())
    for a, b in zip(states(resumed), states(whole), strict=True):
        assert_states_equal(a, b)


OPTIONAL = re.compile("under_way|snapshot|center_[0-9]+")
"""Entries of operations in the background, and of nodes that no part of a checkpoint may hold."""


@every_variant
def test_entries_have_names_of_their_own_and_none_may_be_missing(method):
    simulation = run(method, 1, 3)
    worker = simulation.workers[0]
    names = [name for name, _ in worker.state()]
    assert len(set(names)) == len(names)
    saved = states(simulation)
    for name in names:
        if not OPTIONAL.fullmatch(name):
            with pytest.raises(KeyError, match=name):
                load(run(method, 1, 0), [{key: value for key, value in saved[0].items() if key != name}])


@every_variant
def test_finalize_exchanges_the_remaining_steps_once(method):
    simulation = run(method, 3, 7).finalize()
    end = states(simulation)
    simulation.finalize()
    for a, b in zip(states(simulation), end, strict=True):
        assert_states_equal(a, b)
    loaded = load(run(method, 3, 0), end).finalize()
    for a, b in zip(states(loaded), end, strict=True):
        assert_states_equal(a, b)


@every_variant
@pytest.mark.parametrize("p", [1, 3])
def test_a_run_shorter_than_a_period_evaluates_what_was_trained(method, p):
    # Far from the minimum every worker descends at each step; one exchange brings a good part of that to the center.
    long = {key: 50 for key in settings_of(method) if key.endswith("period")}
    method = dataclasses.replace(method, **long)
    start = np.full(40, 10.0)
    simulation = simulate(method, p, start=start, eta=0.1, gradient=slope(np.ones(5), np.zeros(5)), largest_shard=8)
    simulation.run(7).finalize()
    workers, evaluated = np.linalg.norm(simulation.x().mean(0)), np.linalg.norm(simulation.consensus())
    share = 0.0 if method.evaluates_history else 0.2  # an average over the past moves as slowly as its rate says
    assert evaluated < np.linalg.norm(start) - share * (np.linalg.norm(start) - workers)


@every_method
def test_a_run_of_few_periods_is_warned_of_before_it_starts(name):
    method = METHODS[name]()
    interval = method.interval(4)
    assert not list(method.budget_warnings(4, 3 * interval.steps))
    if interval.steps > 1:
        (text,) = method.budget_warnings(4, 2 * interval.steps)
        key, value = re.search(r"set (\w+)=([0-9.e-]+) or (?:less|more)", text).groups()
        value = int(value) if isinstance(getattr(method, key) or 1, int) else float(value)
        fits = dataclasses.replace(method, **{key: value})
        assert not list(fits.budget_warnings(4, 2 * interval.steps))


@every_variant
def test_taking_the_state_disturbs_nothing(method):
    watched, alone = run(method, 3, 3), run(method, 3, 3)
    states(watched)
    watched.consensus(1)
    watched.run(4)
    alone.run(4)
    assert same_bits(watched.x(), alone.x())
    for a, b in zip(watched.workers, alone.workers, strict=True):
        assert_states_equal(vars(a.comm.statistics), vars(b.comm.statistics))


@every_variant
def test_consensus_is_local(method):
    # Called by one worker, at a moment when the others are on their way: nobody else runs, so it may wait for nobody.
    asked = []

    def ask(simulation, rank):
        out = np.full(40, np.nan)
        before = [worker.t for worker in simulation.workers]
        simulation.workers[rank].consensus(out)
        assert np.isfinite(out).all()
        assert [worker.t for worker in simulation.workers] == before
        asked.append(rank)

    simulate(method, 3, start=STARTS[:3], eta=0.1, gradient=slope(H, B)).run(4, ask)
    assert sorted(asked) == sorted([0, 1, 2] * 4)


@every_variant
def test_steady_state_allocates_no_vector(method):
    n = 200_000
    gradients = np.random.default_rng(1).normal(size=(2, n)).astype(np.float32)
    simulation = simulate(
        method, 2, start=np.zeros(n, np.float32), eta=0.01, gradient=lambda rank, x: gradients[rank]
    ).run(4)
    out = np.zeros(n, np.float32)
    simulation.workers[1].consensus(out)
    tracemalloc.start()
    try:
        simulation.run(4)
        simulation.workers[1].consensus(out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < out.nbytes / 10


@every_variant
def test_same_schedule_and_seed_give_the_same_bits(method):
    assert same_bits(run(method, 3, 8, seed=4).x(), run(method, 3, 8, seed=4).x())


@every_variant
def test_half_precision_runs(method):
    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        end = simulate(method, 2, start=STARTS[:2].astype(dtype), eta=0.05, gradient=slope(1.0, 0.7)).run(60)
        assert end.x().dtype == dtype
        assert np.isfinite(end.consensus().astype(np.float64)).all()


class Blind(Simulation):
    """A simulation without gradients in ``g``: only the local update has them."""

    def run(self, steps, after_step=None):
        self.known = {}
        return super().run(steps, after_step)

    def _sgd(self, worker):
        x, rank = worker.x.local, worker.comm.rank
        return lambda: kernels.sgd_step(x, self.known[rank], self.learning_rate, self.weight_decay), None

    def _loss(self, worker):
        return float(np.linalg.norm(self.known[worker.comm.rank]))


@every_variant
def test_a_method_that_declares_to_need_no_gradient_reads_none(method):
    if method.needs_gradient:
        return
    gradient = slope(H, B)

    def hidden(rank, x):
        blind.known[rank] = gradient(rank, x)
        return np.full_like(x, np.nan)

    seeing = simulate(method, 3, start=STARTS[:3], eta=0.1, gradient=gradient, seed=1)
    blind = Blind(method, SimulatedWorld(3), hidden, STARTS[:3], 0.1, seed=1)
    assert same_bits(blind.run(9).x(), seeing.run(9).x())
    assert same_bits(blind.consensus(), seeing.consensus())


@every_variant
def test_a_worker_recovers_from_a_gradient_that_is_not_finite(method):
    if method.name == "allreduce":  # it has no exchange in which to leave one out: as with any all-reduce, all have it
        return
    bad_step, steps = 6, 150
    made = [0] * 4
    exact = slope(H, B)

    def gradient(rank, x):
        made[rank] += 1
        g = np.array(exact(rank, x))
        g[3] = np.nan if (rank, made[rank]) == (1, bad_step) else g[3]
        return g

    momentum = 0.0 if method.owns_update else 0.5
    world = SimulatedWorld(4, largest_shard=8)
    simulation = Simulation(method, world, gradient, STARTS[:4], 0.02, momentum=momentum).run(steps)
    n_nonfinite = [int(worker.comm.statistics.n_nonfinite) for worker in simulation.workers]
    assert sum(n_nonfinite) > 0
    simulation.run(steps)
    assert np.isfinite(simulation.x()).all()
    assert all(np.abs(simulation.consensus(rank)).max() < 100 for rank in range(4))
    assert [int(worker.comm.statistics.n_nonfinite) for worker in simulation.workers] == n_nonfinite


@every_variant
def test_a_parameter_group_at_rest_does_not_stop_the_others(method):
    """The first group has no learning rate, as when the body of a model is frozen."""
    groups = [ParamGroupSlice(slice(0, 20), 0.0), ParamGroupSlice(slice(20, 40), 0.1)]
    run = simulate(method, 3, start=STARTS[:1].repeat(3, axis=0), eta=0.1, gradient=slope(1.0, 0.7))

    def program(comm):
        worker = run.workers[comm.rank]
        x, g = worker.x.local[20:], worker.g.local

        def update():
            kernels.sgd_step(x, g[20:], 0.1, 0.0)

        for _ in range(60):
            g[...] = worker.x.local - 0.7
            worker.step(groups, None if method.owns_update else update, 1.0 if method.needs_loss else None)
            comm.end_step()

    run.world.run(program)
    before, after = (np.abs(v[20:] - 0.7).max() for v in (STARTS[0], run.consensus()))
    assert after < before


def test_methods_that_make_the_update_need_the_gradient():
    assert all(method.needs_gradient for method in METHODS.values() if method.owns_update)


@every_variant
@pytest.mark.parametrize(("p", "victim"), [(2, 1), (4, 2), (4, 0)])
def test_a_dead_worker_stops_synchronous_methods_only(method, p, victim):
    steps, made = 60, [0] * p

    def count(simulation, rank):
        made[rank] += 1
        if (rank, made[rank]) == (victim, 5):
            simulation.world.kill(victim)
            simulation.workers[victim].x.local[...] = 1e9  # of no use to anybody from now on

    simulation = simulate(method, p, start=STARTS[:p], eta=0.1, gradient=slope(H, B), largest_shard=8)
    if method.is_synchronous:
        with pytest.raises(RankFailed, match=f"^rank {victim} died"):
            simulation.run(steps, count)
        return
    simulation.run(steps, count)
    assert made == [5 if rank == victim else steps for rank in range(p)]
    alive_ranks = [rank for rank in range(p) if rank != victim]
    assert all(np.abs(simulation.consensus(rank)).max() < 100 for rank in alive_ranks)
    assert np.abs(simulation.x()[alive_ranks]).max() < 100

    parts = states(simulation)  # as a checkpoint has them: the next that lives stands in
    parts[victim] = parts[(victim + 1) % p]
    again = load(run(method, p, 0), parts)
    assert np.abs(again.consensus(0) - simulation.consensus(alive_ranks[0])).max() < 10
    again.run(steps)
    assert np.abs(again.x()).max() < 100
