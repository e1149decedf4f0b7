"""Models for the tests of the command line and the trainer, as a user has them: `--model small_models:NAME`."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

PIXELS = 64  # the digits are 8 x 8

on_batch: Callable[[int], None] | None = None
"""Called with the number of the training batch, from 1, by models made by `watched`."""


def rank() -> int:
    """As the launcher calls it."""
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))


class Watched(nn.Module):
    """A network with dropout that tells of each training batch."""

    def __init__(self, function: Callable[[int], None]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(PIXELS, 24), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(24), nn.Linear(24, 10)
        )
        self._function, self._n = function, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self._n += 1
            self._function(self._n)
        return self.layers(x)


def watched() -> nn.Module:
    return Watched(lambda n: on_batch(n) if on_batch is not None else None)


def raises_at_step_3_of_rank_1() -> nn.Module:
    def fail(n: int) -> None:
        if n == 3 and rank() == 1:
            raise ArithmeticError("a reason of the model's own")

    return Watched(fail)


def kills_rank_1_after_a_checkpoint() -> nn.Module:
    """Of the run in the folder $RUN."""

    def kill(n: int) -> None:
        if rank() == 1 and any(Path(os.environ["RUN"]).glob("checkpoints/step-*")):
            os.kill(os.getpid(), signal.SIGKILL)

    return Watched(kill)


def when_reported(text: str, call: Callable[[], object]) -> None:
    """Call a function whenever mpitrain reports something with this text on this rank."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                call()

    logging.getLogger("mpitrain").addHandler(Handler())


def continues_the_launcher() -> nn.Module:
    """A model; the launcher, which leads the session, is continued when this rank has reported a death."""
    when_reported("was killed", lambda: os.kill(os.getsid(0), signal.SIGCONT))
    return Watched(lambda n: None)


def kills_a_rank() -> nn.Module:
    """Rank $VICTIM, in its 30th step."""

    def kill(n: int) -> None:
        if n == 30 and rank() == int(os.environ["VICTIM"]):
            os.kill(os.getpid(), signal.SIGKILL)

    return Watched(kill)


def kills_a_rank_and_waits() -> nn.Module:
    """Rank $VICTIM, in its 30th step. The others wait in their 31st step until one has reported the death.

    They tell each other by the file $REPORTED.
    """
    reported = Path(os.environ["REPORTED"])
    when_reported("died", reported.touch)

    def kill(n: int) -> None:
        if n == 30 and rank() == int(os.environ["VICTIM"]):
            os.kill(os.getpid(), signal.SIGKILL)
        while n == 31 and not reported.exists():
            time.sleep(0.01)

    return Watched(kill)


def whole_numbers() -> nn.Module:
    model = nn.Linear(PIXELS, 10)
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(parameter.to(torch.int32), requires_grad=False))
    return model


def no_module() -> int:
    return 3
