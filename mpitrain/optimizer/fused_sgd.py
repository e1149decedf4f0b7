"""The step of a plain ``torch.optim.SGD`` on the host, in one pass over each tensor instead of three or more.

The state is torch's: momentum buffers lie where ``base.state`` has them, and ``base.step()`` can take over at any time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpitrain import kernels
from mpitrain.optimizer.checks import DirectStepGuard
from mpitrain.optimizer.flat import FlatParameters


def is_plain_sgd(base: torch.optim.Optimizer) -> bool:
    """Whether the kernels have the equations of ``base.step()``, and nobody would miss the call itself."""
    return (
        type(base) is torch.optim.SGD
        and "step" not in vars(base)  # a scheduler that was given the base optimizer counts its steps
        and not base._optimizer_step_pre_hooks
        and all(isinstance(hook, DirectStepGuard) for hook in base._optimizer_step_post_hooks.values())
        and not any(g["dampening"] or g["maximize"] or g["differentiable"] for g in base.param_groups)
    )


class FusedSGD:
    """Makes the steps of ``base`` on parameters that lie in a flat vector.

    Args:
        base: A plain SGD.
        flat: Its parameters, on the host, float32 or float64.
        x: (n,) the vector.
    """

    def __init__(self, base: torch.optim.Optimizer, flat: FlatParameters, x: np.ndarray) -> None:
        self._base, self._flat, self._x = base, flat, x
        self._v: np.ndarray | None = None
        self._places = {place.parameter: place for place in flat.places}
        for kernel in (kernels.sgd_step, kernels.torch_momentum_step, kernels.torch_nesterov_step):
            kernel.prepare(x)

    def step(self) -> None:
        """What ``base.step()`` does."""
        if self._v is None and any(group["momentum"] for group in self._base.param_groups):
            self._v = np.zeros_like(self._x)
            self.adopt_state()
        for group in self._base.param_groups:
            for parameter in group["params"]:
                place = self._places.get(parameter)  # none for those that were frozen from the beginning
                if place is not None and parameter.grad is not None:
                    self._advance(group, slice(place.start, place.start + parameter.numel()), parameter.grad)

    def adopt_state(self) -> None:
        """Make the momentum buffers of ``base.state`` views into this object's vector, with the values they have."""
        if self._v is None:
            return
        velocity = torch.from_numpy(self._v)
        for place in self._flat.places:
            state, view = self._base.state[place.parameter], place.view(velocity)
            known = state.get("momentum_buffer")
            if known is None:
                view.zero_()
            else:
                view.copy_(known)
            state["momentum_buffer"] = view

    def _advance(self, group: dict[str, Any], part: slice, gradient: torch.Tensor) -> None:
        """One tensor's step."""
        x, g, eta, decay = self._x[part], gradient.reshape(-1).numpy(), group["lr"], group["weight_decay"]
        if not group["momentum"]:
            kernels.sgd_step(x, g, eta, decay)
            return
        assert self._v is not None
        step = kernels.torch_nesterov_step if group["nesterov"] else kernels.torch_momentum_step
        step(x, self._v[part], g, eta, group["momentum"], decay)
