"""Faults that are injected into a run for tests and experiments: deaths, slowness, hangs, NaN and full disks.

    --inject kill:rank=2,step=50          rank 2 is killed (SIGKILL) in its step 50
    --inject kill:rank=2,step=50,after=0.1    the same, 0.1 s after that step's gradient, wherever the rank is then
    --inject slow:rank=1,factor=4         the computation of rank 1 takes 4 times as long
    --inject nan:rank=3,step=10           the gradient of rank 3 in its step 10 is NaN
    --inject hang:rank=1,seconds=30       rank 1 sleeps for 30 s in its first step, or in step=N
    --inject disk-full:step=40            from step 40 on there is no room for checkpoints, on all ranks or on rank=N

Steps count from 1. A resumed run has no faults unless new ones are given.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpitrain.errors import UsageError
from mpitrain.records import durable

NEEDED = {
    "kill": ("rank", "step"),
    "slow": ("rank", "factor"),
    "nan": ("rank", "step"),
    "hang": ("rank", "seconds"),
    "disk-full": ("step",),
}
"""The parameters that each kind of fault needs."""

OPTIONAL = {"kill": ("after",), "hang": ("step",), "disk-full": ("rank",)}


@dataclass(frozen=True)
class Fault:
    """A fault to inject.

    Attributes:
        kind: The kind of the fault, one of the keys of ``NEEDED``, for example "kill".
        rank: The rank; None for all ranks.
        step: The step of this rank, counted from 1.
        factor: The factor by which a slow rank is slower, at least 1.
        seconds: The duration of a hang.
        after: The time of a kill, in seconds after the gradient of the step.
    """

    kind: str
    rank: int | None = None
    step: int = 1
    factor: float = 1.0
    seconds: float = 0.0
    after: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Return the fault that a text such as ``kill:rank=2,step=50`` describes.

        Raises:
            UsageError: The kind does not exist, or does not have these parameters.
        """
        kind, _, rest = text.partition(":")
        if kind not in NEEDED:
            raise UsageError(f"--inject {text}: the fault must be one of {', '.join(NEEDED)}")
        names = (*NEEDED[kind], *OPTIONAL.get(kind, ()))
        pairs = dict(pair.partition("=")[::2] for pair in rest.split(",") if pair)
        form = f"{kind}:{','.join(f'{name}=...' for name in NEEDED[kind])}"
        if set(pairs) - set(names) or set(NEEDED[kind]) - set(pairs):
            raise UsageError(f"--inject {text}: it must be {form}" + _optional(kind))
        try:
            values: dict[str, Any] = {
                name: int(value) if name in ("rank", "step") else float(value) for name, value in pairs.items()
            }
        except ValueError as error:
            raise UsageError(f"--inject {text}: it must be {form} with numbers") from error
        fault = cls(kind, **values)
        numbers = fault.factor, fault.seconds, fault.after
        if (fault.rank or 0) < 0 or fault.step < 1 or fault.factor < 1 or not all(0 <= x < math.inf for x in numbers):
            raise UsageError(f"--inject {text}: steps and factors are 1 or more, ranks and seconds 0 or more")
        return fault


def _optional(kind: str) -> str:
    return f", and may have {', '.join(OPTIONAL[kind])}" if kind in OPTIONAL else ""


def check_ranks(texts: Sequence[str], size: int) -> None:
    """Check that all ranks named in faults exist.

    Raises:
        UsageError: A rank does not exist.
    """
    for text in texts:
        rank = Fault.parse(text).rank
        if rank is not None and rank >= size:
            raise UsageError(f"--inject {text} names rank {rank}: there are ranks 0 to {size - 1}")


class Faults:
    """The injected faults of one rank.

    Args:
        texts: The faults of all ranks.
        rank: This rank.
    """

    def __init__(self, texts: Sequence[str], rank: int) -> None:
        faults = [Fault.parse(text) for text in texts]
        self._faults = [fault for fault in faults if fault.rank in (None, rank)]

    def act(self, step: int, seconds: float, model: Any) -> None:
        """Inject the faults of a step, between its gradient and its exchange. Local.

        Args:
            step: The step, counted from 1.
            seconds: The duration of its computation.
            model: The model, which holds the gradient.
        """
        for fault in self._faults:
            if fault.kind == "slow":
                time.sleep((fault.factor - 1) * seconds)
            elif fault.kind == "disk-full" and step >= fault.step:
                durable.injected_errno = errno.ENOSPC
            elif step == fault.step:
                self._act_once(fault, model)

    def _act_once(self, fault: Fault, model: Any) -> None:
        if fault.kind == "nan":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
        elif fault.kind == "hang":
            time.sleep(fault.seconds)
        elif fault.after:
            timer = threading.Timer(fault.after, _kill)
            timer.daemon = True
            timer.start()
        else:
            _kill()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
