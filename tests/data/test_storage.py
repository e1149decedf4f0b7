"""Laws of the choice of a storage, and of reading from files."""

from itertools import pairwise
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain.data.node_agreement import agree, all_ok
from mpitrain.data.storage import FileImages, Limits, choose, runs, share_of
from mpitrain.errors import UsageError

quick = settings(max_examples=60, deadline=None)


@quick
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 64))
def test_shares_cover_all_rows_once_without_cutting_a_chunk(n, count, align):
    shares = [share_of(n, index, count, align) for index in range(count)]
    assert shares[0][0] == 0
    assert shares[-1][1] == n
    assert all(stop == start for (_, stop), (start, _) in pairwise(shares))
    assert all(start % align == 0 or start == n for start, _ in shares)


@quick
@given(st.lists(st.integers(0, 300)), st.integers(1, 20), st.integers(1, 50))
def test_runs_cover_sorted_indices_within_their_bounds(indices, max_gap, max_length):
    ascending = np.sort(np.array(indices, np.int64))
    found = list(runs(ascending, max_gap=max_gap, max_length=max_length))
    assert [k for i, j in found for k in range(i, j)] == list(range(len(ascending)))
    for i, j in found:
        assert ascending[j - 1] - ascending[i] < max_length
        assert (np.diff(ascending[i:j]) <= max_gap).all()


@quick
@given(st.lists(st.integers(0, 199), min_size=1), st.lists(st.integers(0, 199)), st.booleans())
def test_selected_images_are_those_at_the_indices(indices, staged, staging):
    with h5py.File("memory", "w", driver="core", backing_store=False) as file:
        pixels = np.random.default_rng(0).integers(256, size=(200, 2, 3), dtype=np.uint8)
        images = FileImages(file.create_dataset("x", data=pixels, chunks=(16, 2, 3)), staging=staging)
        images.stage(np.array(staged, np.int64))
        np.testing.assert_array_equal(images.select(np.array(indices)), pixels[indices])
        images.stage(np.array(indices, np.int64))
        np.testing.assert_array_equal(images.select(np.array(indices)), pixels[indices])


def test_staged_images_are_not_read_again(tmp_path):
    pixels = np.arange(60, dtype=np.uint8).reshape(20, 3)
    file = h5py.File(tmp_path / "x.h5", "w")
    images = FileImages(file.create_dataset("x", data=pixels), staging=True)
    images.stage(np.array([5, 3, 11]))
    file.close()
    np.testing.assert_array_equal(images.select(np.array([11, 3, 3])), pixels[[11, 3, 3]])


def test_an_error_while_reading_is_reported():
    class Broken:
        shape, dtype = (20, 3), np.dtype(np.uint8)
        file = SimpleNamespace(filename="data.h5")

        def __getitem__(self, _):
            raise OSError("no such device")

    with pytest.raises(UsageError, match=r"data.h5: images 4 to 4 cannot be read \(no such device\).*resume"):
        FileImages(Broken()).select(np.array([4]))


@pytest.mark.parametrize(
    ("shared", "private", "sampling", "expected"),
    [
        (100, 0, "independent", "shared"),
        (100, 0, "sharded", "shared"),
        (99, 1000, "independent", "file"),  # every rank would need all of it
        (99, 50, "sharded", "private"),  # 2 of 4 ranks on this node, 25 bytes each
        (99, 49, "sharded", "file"),
    ],
)
def test_the_first_storage_that_fits_is_chosen(shared, private, sampling, expected):
    limits = Limits(shared, private)
    assert choose(100, sampling=sampling, size=4, local_size=2, limits=limits) == expected


def test_limits_are_below_the_free_memory():
    limits = Limits.measure()
    assert 0 <= limits.shared_bytes <= limits.private_bytes


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ranks_of_a_node_agree_on_the_value_of_the_first(on_node, n):
    assert on_node(n, lambda world: agree(world, 10 + world.local_rank)) == [10] * n


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_ranks_fail_when_one_does(on_node, n):
    def act(world):
        if world.local_rank == n - 1:
            raise OSError("disk on fire")
        return world.local_rank

    outcomes = on_node(n, lambda world: all_ok(world, lambda: act(world)))
    assert all(str(error) == "disk on fire" for error in outcomes)
    assert [type(error) for error in outcomes] == [UsageError] * (n - 1) + [OSError]


def test_each_rank_gets_its_own_result(on_node):
    assert on_node(3, lambda world: all_ok(world, lambda: world.local_rank)) == [0, 1, 2]
