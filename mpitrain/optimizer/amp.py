"""The part of ``torch.amp.GradScaler``'s protocol that makes its decisions the same on all ranks.

If an optimizer has the attribute ``_step_supports_amp_scaling``, the scaler calls its ``step`` on every rank, even if
it has found an infinity. Before the call, the scaler sets two attributes of the optimizer: ``found_inf``, and
``grad_scale`` unless the gradients are unscaled already. The optimizer itself then unscales the gradients, and decides
whether to skip the step.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

MOST_FRAMES = 12
"""Frames between the scaler's ``step`` and ours: decorators of torch and of users."""


@dataclass(frozen=True)
class Scaling:
    """The scale factor of a ``GradScaler`` for one step, and whether it has found an infinity.

    Attributes:
        grad_scale: The factor by which the gradients are scaled; None if they are not scaled.
        found_inf: Whether the scaler has found an infinite or NaN gradient on this rank.
    """

    grad_scale: torch.Tensor | None = None
    found_inf: bool = False

    @classmethod
    def of(cls, optimizer: Any) -> Scaling:
        """Return the values that the scaler has stored in attributes of ``optimizer``."""
        found_inf = getattr(optimizer, "found_inf", None)
        return cls(getattr(optimizer, "grad_scale", None), found_inf is not None and bool(found_inf))

    def unscale(self, parameters: list[torch.nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.grad_scale is not None and gradients:
            torch._foreach_mul_(gradients, self.grad_scale.double().reciprocal().item())


def report_found_inf() -> None:
    """Tell the scaler of this rank that another rank has found an infinity. Local.

    The scaler then lowers its scale, so the scale is the same on all ranks. The optimizer has only a copy of the
    scaler's ``found_inf`` tensors, so this function changes the originals, which it finds in the scaler's stack frame.
    If it cannot find them, the scales of the ranks may differ, which is harmless.
    """
    frame: Any = sys._getframe()
    for _ in range(MOST_FRAMES):
        frame = frame.f_back
        if frame is None:
            return
        found = frame.f_locals
        if isinstance(found.get("self"), torch.amp.GradScaler) and "optimizer_state" in found:
            for found_inf in found["optimizer_state"]["found_inf_per_device"].values():
                found_inf.fill_(1.0)
            return
