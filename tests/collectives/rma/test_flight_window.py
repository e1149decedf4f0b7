"""The window of a visit: bandwidth times round trip, found by doubling."""

import pytest

from mpitrain.collectives.rma.flight_window import FEWEST_BYTES, GAIN, MOST_BYTES, FlightWindow


def visits(window: FlightWindow, n_bytes: float, bandwidth: float, round_trip: float, n: int) -> None:
    """Let a link of `bandwidth` bytes a second and `round_trip` seconds carry n visits of `n_bytes`."""
    for _ in range(n):
        rate = min(bandwidth, window.n_bytes / round_trip)
        window.record_round_trip(round_trip)
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
    window.record_round_trip(3.0)
    window.record_visit(10**6, 5.0)
    assert window.n_bytes == before


def test_a_visit_without_a_round_trip_changes_nothing() -> None:
    window = FlightWindow()
    window.record_visit(10**9, 0.1)
    assert window.n_bytes == FEWEST_BYTES
