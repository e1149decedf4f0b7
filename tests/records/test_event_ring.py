"""The ring of events: the newest ones, from a process that may have been killed."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import pytest

from mpitrain.collectives.world.clock_offset import ClockOffset
from mpitrain.records import durable, event_ring
from mpitrain.records.event_ring import EventRing


def numbers(n: int, start: int = 0) -> array:
    """Return events number ``start`` to ``start + n``: event k is in phase k % 5 from k to k + 0.5."""
    return array("d", [x for k in range(start, start + n) for x in (k % 5, k, k + 0.5)])


@pytest.mark.parametrize(("pieces", "room"), [([3], 10), ([10], 10), ([4, 4, 4], 10), ([25], 10), ([7, 1, 30, 2], 10)])
def test_the_newest_events_are_kept_in_their_order(tmp_path: Path, pieces: list[int], room: int) -> None:
    ring, n = EventRing(tmp_path / "ring", 3, room), 0
    size = (tmp_path / "ring").stat().st_size
    for piece in pieces:
        ring.append(numbers(piece, n))
        n += piece
    assert (tmp_path / "ring").stat().st_size == size == 128 + 24 * room
    found = event_ring.read(tmp_path / "ring")  # it is not closed: its process may have been killed
    kept = np.arange(max(0, n - room), n)
    np.testing.assert_array_equal(found.phases, kept % 5)
    np.testing.assert_array_equal(found.began, kept)
    np.testing.assert_array_equal(found.ended, kept + 0.5)
    assert (found.rank, found.n_dropped) == (3, n - len(kept))
    assert (found.first, found.last) == (None, None)
    ring.close()


def test_the_offsets_of_the_clock_are_kept(tmp_path: Path) -> None:
    ring = EventRing(tmp_path / "ring", 0, 4)
    ring.set_offset(1, ClockOffset(1.0, -2.0, 0.25))
    ring.append(numbers(1))
    ring.close()
    found = event_ring.read(tmp_path / "ring")
    assert (found.first, found.last) == (None, ClockOffset(1.0, -2.0, 0.25))


@pytest.mark.parametrize("content", [b"", b"mpitrac1", b"x" * 1000], ids=["empty", "short", "other"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ring").write_bytes(content)
    with pytest.raises(ValueError, match="holds no events"):
        event_ring.read(tmp_path / "ring")


def test_a_full_disk_is_noticed_before_the_first_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "injected_errno", 28)
    with pytest.raises(OSError, match="No space left"):
        EventRing(tmp_path / "ring", 0, 4)
