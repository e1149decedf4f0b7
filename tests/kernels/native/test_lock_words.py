"""Locks in shared words: one owner at a time, whoever else wants them, and what was written under them is seen."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest

from mpitrain.kernels.native.atomics import compare_and_swap, give_way, load_acquire, store_release
from mpitrain.kernels.native.lock_words import OWNER_BITS, OWNER_MASK, STRIDE, swap, take

THREADS = pytest.mark.parametrize("n", [1, 2, 5])


def in_threads(n, body):
    """Run ``body(rank)`` on n threads; compiled code runs without the interpreter's lock."""
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(body, range(n)))


@numba.njit(nogil=True)
def begin_together(ready, rank):
    """Otherwise one thread would be done before the next one has begun."""
    store_release(ready, rank, 1)
    for k in range(len(ready)):
        while load_acquire(ready, k) == 0:
            give_way()


@numba.njit(nogil=True)
def count(ready, rank, words, at, times):
    """Count up without a lock. Returns the sum of the numbers that this thread counted from."""
    begin_together(ready, rank)
    total = 0
    for _ in range(times):
        found = load_acquire(words, at)
        while True:
            expected = found
            found = compare_and_swap(words, at, expected, expected + 1)
            if found == expected:
                break
        total += expected
    return total


@numba.njit(nogil=True)
def hammer(ready, rank, words, at, data, times):
    """Under the lock, again and again, see whether all elements are the version, and add one to each."""
    begin_together(ready, rank)
    mine, torn = rank + 1, 0
    for _ in range(times):
        while True:
            found = load_acquire(words, at)
            if found & OWNER_MASK == 0 and compare_and_swap(words, at, found, found | mine) == found:
                break
            give_way()
        version = found >> OWNER_BITS
        for i in range(len(data)):
            torn += data[i] != version
            data[i] += 1
        compare_and_swap(words, at, found | mine, (version + 1) << OWNER_BITS)
    return torn


@THREADS
def test_no_swap_is_lost_and_no_two_see_the_same(n):
    ready, words, times = np.zeros(n, np.int64), np.zeros(3, np.int64), 100_000
    totals = in_threads(n, lambda rank: count(ready, rank, words, 1, times))
    assert words.tolist() == [0, n * times, 0]
    assert sum(totals) == n * times * (n * times - 1) // 2


@THREADS
def test_a_swap_orders_what_is_written_between_two_of_them(n):
    ready, words, data = np.zeros(n, np.int64), np.zeros(2 * STRIDE, np.int64), np.zeros(100, np.int64)
    times = 20_000
    assert in_threads(n, lambda rank: hammer(ready, rank, words, STRIDE, data, times)) == [0] * n
    assert np.all(data == n * times)
    assert words[STRIDE] == n * times << OWNER_BITS


@THREADS
@pytest.mark.parametrize("spin_limit", [0, 1000])
def test_only_one_has_the_lock(n, spin_limit):
    """And gives it back by a swap: versions are seen once each, in the order of the counter."""
    words, times = np.zeros(STRIDE, np.int64), 200
    taken, swapped = take(), swap()
    counter = [0]

    def body(rank):
        versions = []
        for _ in range(times):
            found = taken(words, 0, rank + 1, spin_limit)
            while found & OWNER_MASK:
                assert found & OWNER_MASK <= n
                threading.Event().wait(1e-5)
                found = taken(words, 0, rank + 1, spin_limit)
            seen = counter[0]
            assert found == seen << OWNER_BITS
            threading.Event().wait(1e-5)  # whoever could come between would
            counter[0] = seen + 1
            assert swapped(words, 0, found | (rank + 1), (seen + 1) << OWNER_BITS) == found | (rank + 1)
            versions.append(seen)
        return versions

    versions = in_threads(n, body)
    assert all(mine == sorted(mine) for mine in versions)
    assert sorted(version for mine in versions for version in mine) == list(range(n * times))


def test_a_free_word_is_taken_whatever_its_version_and_its_neighbours_are_left_alone():
    words = np.arange(4, dtype=np.int64) << OWNER_BITS
    assert take()(words, 2, 7, 0) == 2 << OWNER_BITS
    assert words.tolist() == [0, 1 << OWNER_BITS, 2 << OWNER_BITS | 7, 3 << OWNER_BITS]


@pytest.mark.parametrize("spin_limit", [0, 1, 1000])
def test_a_held_word_is_left_to_its_owner(spin_limit):
    held = 5 << OWNER_BITS | 2
    words = np.array([held])
    assert take()(words, 0, 7, spin_limit) == held
    assert words[0] == held


def test_a_word_that_is_not_what_was_expected_is_left_as_it_is():
    words = np.array([3, 4])
    assert swap()(words, 1, 3, 9) == 4
    assert words.tolist() == [3, 4]
    assert swap()(words, 1, 4, 9) == 4
    assert words.tolist() == [3, 9]


def test_who_is_patient_gets_the_lock_when_it_is_given_back():
    held = 5 << OWNER_BITS | 2
    words = np.array([held])
    owner = threading.Timer(0.01, lambda: swap()(words, 0, held, 6 << OWNER_BITS))
    owner.start()
    found = take()(words, 0, 7, 10**10)
    owner.join()
    assert found == 6 << OWNER_BITS
    assert words[0] == 6 << OWNER_BITS | 7
