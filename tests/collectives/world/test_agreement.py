"""Settings that differ between ranks: the message names setting, values and ranks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mpitrain.collectives.world.agreement import differences, ranks_in_words, require_equal
from mpitrain.errors import UsageError


def on_ranks(settings_of_ranks, f):
    """Return f(gather, rank, settings), or its error, on each of as many threads."""
    p = len(settings_of_ranks)
    barrier, posted = threading.Barrier(p, timeout=120), [None] * p

    def of_rank(rank):
        def gather(value):
            posted[rank] = value
            barrier.wait()
            found = list(posted)
            barrier.wait()
            return found

        try:
            return f(gather, rank, settings_of_ranks[rank])
        except UsageError as error:
            return error

    with ThreadPoolExecutor(p) as pool:
        return list(pool.map(of_rank, range(p)))


@pytest.mark.parametrize("p", [1, 2, 5])
def test_equal_settings_pass(p):
    assert on_ranks([{"period": "5", "lr": "0.1"}] * p, differences) == [{}] * p


def test_each_difference_has_its_values_and_ranks():
    settings = [{"period": "5", "lr": x} for x in ("0.1", "0.1", "0.1", "0.3", "0.1", "0.2")]
    found = on_ranks(settings, differences)
    assert found == [{"lr": "0.1 on ranks 0 to 2, 4, 0.3 on rank 3, 0.2 on rank 5"}] * 6


def test_all_ranks_raise_the_same_line_with_the_first_difference():
    settings = [{"method": "easgd", "period": "5"}, {"method": "easgd", "period": "7", "rho": "1"}]
    errors = on_ranks(settings, lambda *args: require_equal(*args, remedy="use one"))
    assert [str(error) for error in errors] == [
        "period differs between ranks: 5 on rank 0, 7 on rank 1 (so do rho); use one"
    ] * 2
    assert all(error.on_all_ranks for error in errors)


def test_a_setting_of_one_rank_only_is_absent_elsewhere():
    assert on_ranks([{}, {"rho": "1"}], differences)[0] == {"rho": "absent on rank 0, 1 on rank 1"}


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([3], "rank 3"), ([2, 0], "ranks 0, 2"), ([0, 1], "ranks 0, 1"), ([7, 1, 2, 3], "ranks 1 to 3, 7")],
)
def test_ranks_in_words(ranks, words):
    assert ranks_in_words(ranks) == words
