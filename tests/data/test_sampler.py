"""Laws of the order in which workers draw samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.data import MODES, Sampler
from mpitrain.errors import UsageError

quick = settings(max_examples=60, deadline=None)


@st.composite
def worlds(draw):
    """n, b, p with at least one step for sharded sampling."""
    p, b = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    n = draw(st.integers(p * b, p * b * 5 + 7))
    return n, b, p


def samplers(n, b, p, mode, seed=0):
    return [Sampler(n, b, rank=r, size=p, seed=seed, mode=mode) for r in range(p)]


@quick
@given(worlds(), st.integers(0, 5), st.integers(0, 100))
def test_sharded_batches_are_those_of_one_worker_with_the_large_batch(world, epoch, seed):
    n, b, p = world
    one = Sampler(n, p * b, seed=seed, mode="sharded")
    many = samplers(n, b, p, "sharded", seed)
    for step in range(one.steps_per_epoch):
        drawn = np.concatenate([sampler.indices(epoch, step) for sampler in many])
        np.testing.assert_array_equal(drawn, one.indices(epoch, step))


@quick
@given(worlds(), st.integers(0, 5))
def test_shards_are_disjoint_and_cover_all_but_the_remainder(world, epoch):
    n, b, p = world
    drawn = np.concatenate([sampler.shard(epoch) for sampler in samplers(n, b, p, "sharded")])
    assert len(np.unique(drawn)) == len(drawn) == n - n % (p * b)
    assert drawn.min() >= 0
    assert drawn.max() < n


@quick
@given(worlds(), st.sampled_from(MODES))
def test_every_rank_has_the_same_steps_and_full_batches(world, mode):
    n, b, p = world
    for sampler in samplers(n, b, p, mode):
        assert sampler.steps_per_epoch == n // (p * b)
        assert all(len(sampler.indices(2, step)) == b for step in range(sampler.steps_per_epoch))
        with pytest.raises(IndexError):
            sampler.indices(0, sampler.steps_per_epoch)


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_an_independent_worker_draws_every_sample_once_in_each_pass(n, b, p, n_passes):
    b = min(n, b)
    for sampler in samplers(n, b, p, "independent"):
        steps = -(-n * (n_passes + 1) // b)
        stream = np.concatenate([sampler.draw() for _ in range(steps)])
        last = stream[n_passes * n : (n_passes + 1) * n]
        np.testing.assert_array_equal(np.sort(last), np.arange(n))


@pytest.mark.parametrize("mode", MODES)
def test_batches_depend_on_epoch_and_seed_only(mode):
    a = Sampler(100, 10, rank=1, size=2, seed=3, mode=mode)
    again = Sampler(100, 10, rank=1, size=2, seed=3, mode=mode)
    other = Sampler(100, 10, rank=1, size=2, seed=4, mode=mode)
    np.testing.assert_array_equal(a.shard(5), again.shard(5))
    assert (a.shard(5) != a.shard(6)).any()
    assert (a.shard(5) != other.shard(5)).any()


def test_independent_ranks_draw_differently():
    first, second = samplers(100, 10, 2, "independent")
    assert (first.indices(0, 0) != second.indices(0, 0)).any()


def test_batches_do_not_depend_on_the_order_of_calls():
    sampler = Sampler(50, 7, size=2, rank=1, mode="independent")
    steps = [(epoch, step) for epoch in range(6) for step in range(sampler.steps_per_epoch)]
    forward = {at: sampler.indices(*at) for at in steps}
    for at in reversed(steps):
        np.testing.assert_array_equal(sampler.indices(*at), forward[at])


@quick
@given(worlds(), st.sampled_from(MODES), st.integers(0, 12))
def test_a_resumed_sampler_continues_at_its_position(world, mode, n_before):
    n, b, p = world
    original = samplers(n, b, p, mode)[-1]
    for _ in range(n_before):
        original.draw()
    state = original.state()
    assert all(type(value) is int for value in state.values())
    resumed = samplers(n, b, p, mode)[-1]
    resumed.load(state)
    for _ in range(5):
        np.testing.assert_array_equal(resumed.draw(), original.draw())


def test_a_caller_may_overwrite_a_batch():
    for mode in MODES:
        sampler = Sampler(20, 5, mode=mode)
        expected = sampler.indices(0, 1).copy()
        sampler.indices(0, 1)[:] = -1
        np.testing.assert_array_equal(sampler.indices(0, 1), expected)


def test_the_state_of_another_sampler_is_refused():
    with pytest.raises(UsageError, match=r"batch_size 5.*10"):
        Sampler(100, 10).load(Sampler(100, 5).state())


def test_more_workers_than_samples_still_sample_independently():
    assert Sampler(10, 8, size=4).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"n": 10, "batch_size": 11}, "--batch-size 10 or less"),
        ({"n": 10, "batch_size": 4, "size": 4, "mode": "sharded"}, "--batch-size 2 or less"),
        ({"n": 3, "batch_size": 1, "size": 4, "mode": "sharded"}, "fewer workers"),
        ({"n": 3, "batch_size": 0}, "above 0"),
        ({"n": 3, "batch_size": 1, "mode": "random"}, "independent, sharded"),
    ],
)
def test_invalid_arguments_are_explained(arguments, text):
    with pytest.raises(UsageError, match=text):
        Sampler(**arguments)
