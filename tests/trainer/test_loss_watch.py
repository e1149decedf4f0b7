"""Losses that stay NaN or infinite end a run; a single one does not."""

from __future__ import annotations

import math

import pytest

from mpitrain.errors import Diverged
from mpitrain.trainer.loss_watch import MOST_IN_A_ROW, LossWatch


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_in_a_row_that_are_not_finite_end_a_run(bad):
    watch = LossWatch(stops=True)
    for _ in range(3):
        for _ in range(MOST_IN_A_ROW - 1):
            watch.add(bad)
        watch.add(1.0)
    for _ in range(MOST_IN_A_ROW - 1):
        watch.add(bad)
    with pytest.raises(Diverged, match="smaller --lr"):
        watch.add(bad)


def test_a_watch_that_does_not_stop_lets_any_losses_pass():
    watch = LossWatch(stops=False)
    for _ in range(3 * MOST_IN_A_ROW):
        watch.add(math.nan)
