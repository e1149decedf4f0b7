"""The window of a visit: bandwidth times round trip, found by doubling."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from mpitrain.collectives.rma.flight_window import (
    FEWEST_BYTES,
    GAIN,
    MOST_BYTES,
    FlightWindow,
    socket_buffer_bytes,
)
from mpitrain.collectives.world.progress import MOST_AWAITED


def visits(window: FlightWindow, n_bytes: float, bandwidth: float, round_trip: float, n: int) -> None:
    """Let a link of `bandwidth` bytes a second and `round_trip` seconds carry n visits of `n_bytes`."""
    for _ in range(n):
        rate = min(bandwidth, window.n_bytes / round_trip)
        window.record_answer(round_trip, 0)
        window.record_visit(int(n_bytes), round_trip + n_bytes / rate)


@pytest.mark.parametrize("round_trip", [10e-3, 50e-3, 100e-3])
def test_the_window_grows_until_it_holds_what_the_link_holds(round_trip: float) -> None:
    window, bandwidth = FlightWindow(), 118e6
    visits(window, 64e6, bandwidth, round_trip, 8)
    assert bandwidth * round_trip <= window.n_bytes <= min(GAIN * bandwidth * round_trip, MOST_BYTES)


def test_a_short_link_keeps_the_smallest_window() -> None:
    window = FlightWindow()
    visits(window, 64e6, 118e6, 0.2e-3, 8)
    assert window.n_bytes == FEWEST_BYTES


def test_a_longer_round_trip_is_queueing_and_a_slower_visit_is_waiting() -> None:
    window = FlightWindow()
    visits(window, 64e6, 118e6, 20e-3, 8)
    before = window.n_bytes
    window.record_answer(3.0, 1 << 20)
    window.record_visit(10**6, 5.0)
    assert window.n_bytes == before


def test_a_visit_without_a_round_trip_changes_nothing() -> None:
    window = FlightWindow()
    window.record_visit(10**9, 0.1)
    assert window.n_bytes == FEWEST_BYTES


def visit(window: FlightWindow, n_blocks: int, block: int, bandwidth: float, round_trip: float) -> float:
    """Return the seconds of a visit on a link that carries one block after the other; an answer comes with its data."""
    now, link_free, n_left = 0.0, 0.0, n_blocks
    requested: deque[tuple[float, float, float]] = deque()  # (request, answer, arrival of the data)
    for _ in range(n_blocks):
        while n_left and window.admits([(0, block)] * len(requested), 0, block):
            begins = max(now + round_trip, link_free)
            link_free = begins + block / bandwidth
            requested.append((now, begins, link_free))
            n_left -= 1
        began, answered, arrived = requested.popleft()
        now = max(now, answered)
        window.record_answer(now - began, block)
        while n_left and window.admits([(0, block)] * len(requested), 0, block):
            begins = max(now + round_trip, link_free)
            link_free = begins + block / bandwidth
            requested.append((now, begins, link_free))
            n_left -= 1
        now = max(now, arrived)
    window.record_visit(n_blocks * block, now)
    return now


@pytest.mark.parametrize("round_trip", [0.2e-3, 10e-3, 50e-3])
def test_a_visit_of_64_mb_takes_its_bytes_and_few_round_trips(round_trip: float) -> None:
    """As TCP: the first visit doubles from 1 MiB to the link's 6 MB; later ones are within 85 % of the link."""
    window, block, n_blocks, bandwidth = FlightWindow(), 1 << 19, 122, 118e6
    window.bytes_of_server = MOST_BYTES
    ideal = round_trip + n_blocks * block / bandwidth
    first, *later = [visit(window, n_blocks, block, bandwidth, round_trip) for _ in range(6)]
    assert first <= ideal + 4 * round_trip
    assert max(later) <= ideal / 0.85
    assert window.n_bytes <= max(2 * GAIN * bandwidth * round_trip, FEWEST_BYTES + block)


def test_answers_that_queue_do_not_open_the_window() -> None:
    window = FlightWindow()
    window.record_answer(10e-3, 1 << 19)
    window.record_answer(12e-3, 1 << 19)
    assert window.n_bytes == FEWEST_BYTES + (2 << 19)
    window.record_answer(13e-3, 1 << 19)
    assert window.n_bytes == FEWEST_BYTES + (2 << 19)
    for _ in range(100):
        window.record_answer(10e-3, 1 << 19)
    assert window.n_bytes == MOST_BYTES


def test_a_short_visit_says_only_what_was_under_way_in_a_round_trip() -> None:
    window = FlightWindow()
    window.record_answer(10e-3, 0)
    window.record_visit(20_000_000, 10.1e-3)  # 20 MB in a round trip, not in the 0.1 ms after it
    assert window.n_bytes == MOST_BYTES
    window = FlightWindow()
    window.record_answer(10e-3, 0)
    window.record_visit(2_000_000, 10.1e-3)
    assert window.n_bytes == pytest.approx(GAIN * 2_000_000, rel=0.02)


def n_admitted(window: FlightWindow, block: int, server_of: Callable[[int], int]) -> int:
    """Return how many of many blocks the window lets a visit request at once; block k is at ``server_of(k)``."""
    requested: list[tuple[int, int]] = []
    while len(requested) < 1000 and window.admits(requested, server_of(len(requested)), block):
        requested.append((server_of(len(requested)), block))
    return len(requested)


def test_a_server_has_to_send_at_most_what_its_socket_holds() -> None:
    window, block = FlightWindow(), 1 << 19
    window.n_bytes, window.bytes_of_server = MOST_BYTES, 8 * block + 1
    assert n_admitted(window, block, lambda k: 0) == 8
    assert n_admitted(window, block, lambda k: k % 2) == 16
    assert n_admitted(window, block, lambda k: k) == MOST_BYTES // block


def test_a_block_longer_than_the_socket_buffer_is_requested_beside_none_of_its_server() -> None:
    window = FlightWindow()
    window.n_bytes, window.bytes_of_server = MOST_BYTES, 1 << 20
    assert window.admits([(1, 1 << 20), (2, 1 << 20)], 0, 2 << 20)
    assert not window.admits([(0, 2 << 20), (1, 1 << 20)], 0, 2 << 20)


def test_short_blocks_of_many_servers_fill_the_window_and_those_of_one_its_slots() -> None:
    """A server keeps a slot for each request, of which each rank has ``MOST_AWAITED``; the link knows no servers."""
    window, block = FlightWindow(), 1 << 17
    window.n_bytes = window.bytes_of_server = MOST_BYTES
    assert n_admitted(window, block, lambda k: k) == MOST_BYTES // block
    assert n_admitted(window, block, lambda k: 0) == MOST_AWAITED


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096\t16384\t4194304\n", 4194304), ("4096 4096 8192", FEWEST_BYTES), ("", MOST_BYTES), (None, MOST_BYTES)],
    ids=["Linux", "short", "empty", "no file"],
)
def test_the_size_of_a_socket_buffer(tmp_path: Path, text: str | None, expected: int) -> None:
    if text is not None:
        (tmp_path / "tcp_wmem").write_text(text)
    assert socket_buffer_bytes(tmp_path / "tcp_wmem") == expected
