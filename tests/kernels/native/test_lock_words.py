"""Locks in shared words: they have one owner at a time, and the next owner sees all writes of the previous one."""

import threading

import numba
import numpy as np
import pytest
from support.threads import in_threads

from mpitrain.kernels.native.atomics import compare_and_swap, give_way, load_acquire, store_release
from mpitrain.kernels.native.lock_words import OWNER_BITS, OWNER_MASK, STRIDE, acquire, swap

THREADS = pytest.mark.parametrize("n", [1, 2, 5])


@numba.njit(nogil=True)
def begin_together(ready, rank):
    """Wait for all threads: without it, one thread would finish before the next one starts."""
    store_release(ready, rank, 1)
    for k in range(len(ready)):
        while load_acquire(ready, k) == 0:
            give_way()


@numba.njit(nogil=True)
def count(ready, rank, words, at, times):
    """Increment the word without a lock and return the sum of its former values."""
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
    """Repeatedly take the lock, add one to each element, and return how many of them differed from the version."""
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
def test_no_swap_is_lost_and_no_two_see_the_same_value(n):
    ready, words, times = np.zeros(n, np.int64), np.zeros(3, np.int64), 100_000
    totals = in_threads(n, lambda rank: count(ready, rank, words, 1, times))
    assert words.tolist() == [0, n * times, 0]
    assert sum(totals) == n * times * (n * times - 1) // 2


@THREADS
def test_a_swap_orders_the_writes_under_the_lock(n):
    ready, words, data = np.zeros(n, np.int64), np.zeros(2 * STRIDE, np.int64), np.zeros(100, np.int64)
    times = 20_000
    assert in_threads(n, lambda rank: hammer(ready, rank, words, STRIDE, data, times)) == [0] * n
    assert np.all(data == n * times)
    assert words[STRIDE] == n * times << OWNER_BITS


@THREADS
@pytest.mark.parametrize("spin_limit", [0, 1000])
def test_a_lock_has_one_owner(n, spin_limit):
    """Each version is seen once, in the order of the counter."""
    words, times = np.zeros(STRIDE, np.int64), 200
    acquire_word, swap_word = acquire(), swap()
    counter = [0]

    def body(rank):
        versions = []
        for _ in range(times):
            found = acquire_word(words, 0, rank + 1, spin_limit)
            while found & OWNER_MASK:
                assert found & OWNER_MASK <= n
                threading.Event().wait(1e-5)
                found = acquire_word(words, 0, rank + 1, spin_limit)
            seen = counter[0]
            assert found == seen << OWNER_BITS
            threading.Event().wait(1e-5)  # time for another thread to come between
            counter[0] = seen + 1
            assert swap_word(words, 0, found | (rank + 1), (seen + 1) << OWNER_BITS) == found | (rank + 1)
            versions.append(seen)
        return versions

    versions = in_threads(n, body)
    assert all(mine == sorted(mine) for mine in versions)
    assert sorted(version for mine in versions for version in mine) == list(range(n * times))


def test_a_free_word_is_acquired_at_any_version_and_its_neighbours_stay():
    words = np.arange(4, dtype=np.int64) << OWNER_BITS
    assert acquire()(words, 2, 7, 0) == 2 << OWNER_BITS
    assert words.tolist() == [0, 1 << OWNER_BITS, 2 << OWNER_BITS | 7, 3 << OWNER_BITS]


@pytest.mark.parametrize("spin_limit", [0, 1, 1000])
def test_a_held_word_stays_with_its_owner(spin_limit):
    held = 5 << OWNER_BITS | 2
    words = np.array([held])
    assert acquire()(words, 0, 7, spin_limit) == held
    assert words[0] == held


def test_a_word_with_an_unexpected_value_is_not_swapped():
    words = np.array([3, 4])
    assert swap()(words, 1, 3, 9) == 4
    assert words.tolist() == [3, 4]
    assert swap()(words, 1, 4, 9) == 4
    assert words.tolist() == [3, 9]


def test_a_spinning_caller_acquires_the_lock_on_release():
    held = 5 << OWNER_BITS | 2
    words = np.array([held])
    owner = threading.Timer(0.01, lambda: swap()(words, 0, held, 6 << OWNER_BITS))
    owner.start()
    found = acquire()(words, 0, 7, 10**10)
    owner.join()
    assert found == 6 << OWNER_BITS
    assert words[0] == 6 << OWNER_BITS | 7
